"""--idle-by: servers that lie, drip or say nothing, tokens for one server each, and what an administrator got wrong.

The scripted Hub is its own proxy here: what is below /user/ goes to servers.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hub.process import free_ports
from runs import Cull, Result, RunLoop
from scripted_hub import (
    ALL_SCOPES,
    HOUR,
    LONG_AGO,
    Answer,
    Exchange,
    FakeJupyter,
    Reply,
    Request,
    ScriptedHub,
    drip,
    edited,
    hang,
    html,
    of_hub,
    raw,
    redirect,
    reset,
    reset_in_body,
    respond,
    respond_json,
    slow,
    then_do,
    truncated,
)

CODES = [503, 502, 504, 500, 429, 404, 401, 403, 424]
BUSY = {"id": "1", "execution_state": "busy", "last_activity": "2026-01-01T00:00:00Z"}


@pytest.fixture
def scripted(scripted: ScriptedHub) -> ScriptedHub:
    """A Hub whose culler may make tokens."""
    scripted.scopes = [*ALL_SCOPES, "tokens"]
    return scripted


@pytest.fixture
def cull_asking(cull_scripted: Cull, scripted: ScriptedHub) -> Cull:
    """Run `cull_idle.py --once --timeout=1h ARGS`; whatever happens, no token is left, and ours goes to the Hub."""

    def run(*args: str, token: str | None = None, env: Mapping[str, str] | None = None) -> Result:
        result = cull_scripted("--timeout=1h", *args, token=token, env=env)
        assert scripted.tokens == {}
        assert not any(scripted.token in str(request.headers) for request in asked(scripted))
        return result

    return run


def asked(hub: ScriptedHub) -> list[Request]:
    """The requests that servers got."""
    return [request for request in list(hub.requests) if request.target.startswith("/user/")]


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def idle(seconds: float, **more: object) -> dict[str, Any]:
    """A kernel or a terminal, last active that long ago."""
    return {"id": "1", "name": "1", "last_activity": ago(seconds), **more}


def total(result: Result) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(result.out.splitlines()[-1])
    return line


# What counts


@pytest.mark.parametrize(
    ("says", "modes"),
    [
        (FakeJupyter(), ""),
        (FakeJupyter(ago(10)), "both server"),
        (FakeJupyter(ago(LONG_AGO), [BUSY]), "both server kernels"),
        (FakeJupyter(ago(LONG_AGO), [idle(10, execution_state="idle")]), "both server kernels"),
        (FakeJupyter(ago(LONG_AGO), [idle(LONG_AGO, execution_state="idle"), BUSY]), "both server kernels"),
        (FakeJupyter(ago(LONG_AGO), [], [idle(10)]), "both server kernels"),
        (FakeJupyter(ago(LONG_AGO), [idle(LONG_AGO)], [idle(LONG_AGO), idle(10)]), "both server kernels"),
        (FakeJupyter(ago(LONG_AGO), [idle(LONG_AGO), idle(10), idle(LONG_AGO)]), "both server kernels"),
        (FakeJupyter(ago(10), [idle(LONG_AGO)], [idle(LONG_AGO)]), "both server"),
        (FakeJupyter(ago(LONG_AGO), [idle(LONG_AGO, execution_state="starting")], [idle(LONG_AGO)]), ""),
        (FakeJupyter("2999-01-01T00:00:00Z"), "both server"),
        (FakeJupyter(ago(LONG_AGO), [], [idle(-LONG_AGO)]), "both server kernels"),
    ],
)
@pytest.mark.parametrize("mode", ["hub", "both", "server", "kernels"])
def test_what_a_server_says_can_keep_it(
    cull_asking: Cull, scripted: ScriptedHub, says: FakeJupyter, modes: str, mode: str
) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=says)
    scripted.add("bob", "gpu", idle=LONG_AGO, age=9 * HOUR, says=says)
    assert cull_asking("--idle-by", mode).exit_code == 0
    assert scripted.running() == ({"ann", "bob/gpu"} if mode in modes.split() else set())


@pytest.mark.parametrize("mode", ["both", "server", "kernels"])
@pytest.mark.parametrize(("seconds", "kept"), [(10, True), (LONG_AGO, False)], ids=["active", "idle"])
def test_a_part_of_an_answer_can_keep_a_server_but_not_stop_it(
    cull_asking: Cull, scripted: ScriptedHub, mode: str, seconds: float, kept: bool
) -> None:
    kernel = idle(seconds, execution_state="idle")
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(ago(LONG_AGO), [kernel]))
    scripted.add("bob", idle=10, age=9 * HOUR, says=FakeJupyter(ago(LONG_AGO), [kernel]))
    scripted.fault("GET", ".*/api/terminals.*", respond(500), times=None)
    result = cull_asking("--idle-by", mode)
    assert result.exit_code == 0
    assert scripted.running() == ({"ann", "bob"} if kept else {"bob"})  # bob is active by the Hub's word


@pytest.mark.parametrize(("mode", "kept"), [("hub", True), ("both", True), ("server", False), ("kernels", False)])
def test_what_the_hub_calls_active_is_stopped_only_if_its_word_does_not_count(
    cull_asking: Cull, scripted: ScriptedHub, mode: str, kept: bool
) -> None:
    scripted.add("ann", idle=10, age=9 * HOUR, says=FakeJupyter(ago(LONG_AGO)))
    assert cull_asking("--idle-by", mode).exit_code == 0
    assert scripted.running() == ({"ann"} if kept else set())
    assert bool(asked(scripted)) == (not kept)


def test_a_server_is_not_idle_for_longer_than_it_runs(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=60, age=HOUR + 90, says=FakeJupyter("0001-01-01T00:00:00Z"))
    assert "idle 1h01m" in cull_asking("--idle-by=server").err


def test_only_the_servers_own_clock_counts_for_what_it_says(cull_asking: Cull, scripted: ScriptedHub) -> None:
    """A machine whose clock is a day behind."""
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    day = timedelta(days=1)
    date = (datetime.now(UTC) - day).strftime("%a, %d %b %Y %H:%M:%S GMT")
    model = {"last_activity": (ago(65) - day).isoformat()}
    scripted.fault("GET", "/user/ann/api/status", respond_json(200, model, {"Date": date}), times=None)
    assert "spared ann: idle 1m0" in cull_asking("--idle-by=both").err
    assert scripted.running() == {"ann"}


def test_without_kernels_a_server_is_idle_since_its_start(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=10, age=5 * HOUR + 30, says=FakeJupyter(ago(10)))
    assert "idle 5h" in cull_asking("--idle-by=kernels").err


def test_terminals_may_be_switched_off(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=10, age=5 * HOUR, says=FakeJupyter(ago(LONG_AGO)))
    scripted.fault("GET", "/user/ann/api/terminals", html(404), times=None)
    assert total(cull_asking("--idle-by=server", "--json"))["no_answer"] == 0
    assert scripted.running() == set()


# Who is asked


def test_while_scanning_only_those_are_asked_whose_word_can_decide(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("young", idle=10, age=600)
    scripted.add("old", idle=10, age=9 * HOUR, says=FakeJupyter(ago(10)))
    scripted.add("aged", idle=10, age=50 * HOUR, says=FakeJupyter(ago(10)))
    scripted.add("kept", idle=LONG_AGO, age=9 * HOUR)
    scripted.add("pending", idle=LONG_AGO, age=9 * HOUR, pending="spawn", ready=False)
    cull_asking("--idle-by=server", "--max-age=2d", "--rule=user=kept keep")
    assert {request.target.split("/")[2] for request in asked(scripted)} == {"old"}
    assert scripted.running() == {"young", "old", "kept", "pending"}


def test_who_will_be_too_old_soon_is_asked_all_the_same(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, age=8.5 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    scripted.add("bob", idle=10, age=8.5 * HOUR, says=FakeJupyter(ago(LONG_AGO)))
    result = cull_asking("--idle-by=server", "--max-age=9h", "--warn-before=40m")
    assert result.outcomes == {"ann": "warned", "bob": "culled"}


def test_who_is_due_is_asked_again_before_the_stop(cull_asking: Cull, scripted: ScriptedHub) -> None:
    server = scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)

    def come_back() -> None:
        server.says = FakeJupyter(ago(15))

    scripted.fault("GET", "/users/ann", then_do(come_back))
    result = cull_asking("--idle-by=server")
    assert result.outcomes == {"ann": "spared"}
    assert scripted.running() == {"ann"}


def test_an_arbiter_gets_the_idle_time_that_counts(cull_asking: Cull, scripted: ScriptedHub, tmp_path: Path) -> None:
    arbiter = tmp_path / "arbiter.py"
    arbiter.write_text("def decide(inactive):\n    return inactive.total_seconds() > 1800\n")
    scripted.add("ann", idle=10, age=9 * HOUR, says=FakeJupyter(ago(1900)))
    scripted.add("bob", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(ago(1700)))
    scripted.add("cat", idle=10, age=HOUR - 600, says=FakeJupyter(ago(1900)))  # younger than --timeout
    cull_asking("--idle-by=server", f"--arbiter={arbiter}:decide")
    assert scripted.running() == {"bob"}


def test_who_is_due_soon_by_its_own_word_is_warned(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=10, age=9 * HOUR, says=FakeJupyter(ago(HOUR - 300)))
    scripted.add("bob", idle=10, age=HOUR - 300, says=FakeJupyter(ago(HOUR - 300)))  # younger than --timeout
    result = cull_asking("--idle-by=server", "--warn-before=10m")
    assert result.outcomes == {"ann": "warned", "bob": "warned"}


def test_who_explains_a_server_asks_only_that_one(cull: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=10, age=9 * HOUR, says=FakeJupyter(ago(LONG_AGO)), user_idle=LONG_AGO)
    scripted.add("ann", "gpu", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    args = ["--url", scripted.url, "--timeout=1h", "--idle-by=server", "--cull-users", "--explain=ann"]
    explained = [line.split(maxsplit=1) for line in cull(*args, token=scripted.token).out.splitlines()]
    assert ["asked", "yes"] in explained
    of_server, of_user = (fact for label, fact in explained if label == "verdict")
    assert of_server.startswith("would be stopped: ")
    assert of_user.startswith("kept: ")
    assert not any("/gpu/" in request.target for request in asked(scripted))


@pytest.mark.parametrize("look", ["--dry-run", "--explain=ann"])
@pytest.mark.parametrize("mode", ["both", "server"])
def test_a_dry_run_asks_only_where_the_hubs_word_does_not_count_and_who_explains_always(
    cull: Cull, scripted: ScriptedHub, mode: str, look: str
) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    result = cull("--url", scripted.url, "--timeout=1h", "--idle-by", mode, look, "-v", token=scripted.token)
    assert result.exit_code == 0
    asks = (mode, look) != ("both", "--dry-run")
    assert (bool(asked(scripted)), "kernel busy" in result.out) == (asks, asks)
    assert scripted.tokens == {}


def test_a_hub_without_a_second_look_is_asked_for_tokens_all_the_same(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    scripted.fault("GET", "/users/ann", respond(405), times=None)
    cull_asking("--idle-by=both")
    assert scripted.running() == {"ann"}


# What it costs


@pytest.mark.parametrize(("mode", "kernels", "most"), [("both", [], 5), ("kernels", [], 4), ("both", [BUSY], 3)])
def test_a_server_costs_at_most_five_requests(
    cull_asking: Cull, scripted: ScriptedHub, mode: str, kernels: list[dict[str, Any]], most: int
) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(ago(1), kernels, [idle(1)]))
    cull_asking("--idle-by", mode)
    tokens = [request for request in scripted.requests if "tokens" in request.segments]
    assert len(tokens) + len(asked(scripted)) == most
    assert all(request.query == {"no_track_activity": "1"} for request in asked(scripted))
    assert all(request.headers["accept-encoding"] == "identity" for request in asked(scripted))


@pytest.mark.parametrize("mode", ["both", "server"])
def test_servers_are_asked_side_by_side(cull_asking: Cull, scripted: ScriptedHub, mode: str) -> None:
    for number in range(9):
        scripted.add(f"user{number}", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    scripted.fault("GET", "/user/.*", slow(0.3), times=None)
    began = time.monotonic()
    cull_asking("--idle-by", mode, "--concurrency=3")
    assert 0.9 <= time.monotonic() - began < 2.0
    assert len(scripted.running()) == 9


def test_servers_with_hosts_of_their_own_leave_few_connections_open(
    cull_asking: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub with subdomains."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **kw: resolve("127.0.0.1", *more, **kw))
    for number in range(60):
        full_url = f"http://user{number}.hub.example.org:{scripted.port}/user/user{number}/"
        scripted.add(f"user{number}", age=9 * HOUR, says=FakeJupyter(ago(LONG_AGO)), extra={"full_url": full_url})
    most_open = 0

    def count(answer: object) -> object:
        nonlocal most_open
        most_open = max(most_open, scripted.connections_open)
        return answer

    scripted.fault("GET", "/user/.*", edited(count), times=None)
    cull_asking("--idle-by=server", "--concurrency=4")
    assert scripted.running() == set()
    assert 4 < most_open < 30


# Tokens


def test_a_token_opens_one_server_for_a_short_time_and_is_no_activity(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("dave smith", "ünï", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    cull_asking("--idle-by=both", "--request-timeout=30s")
    made = [json.loads(request.body) for request in scripted.requests if request.method == "POST"]
    assert {tuple(body["scopes"]) for body in made} == {
        ("access:servers!server=dave smith/ünï",),
        ("access:servers!server=ann/",),
    }
    assert all(30 < body["expires_in"] <= 300 and body["note"].startswith("Server at ") for body in made)
    assert scripted.running() == {"ann", "dave smith/ünï"}


def test_a_token_is_revoked_when_the_culler_is_told_to_stop(
    cull_asking: Cull, scripted: ScriptedHub, tell_to_stop: Callable[[], None]
) -> None:
    for name in ("ann", "bob", "cat"):
        scripted.add(name, idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("GET", "/user/ann/api/kernels", then_do(tell_to_stop))
    assert cull_asking("--idle-by=server", "--concurrency=1").exit_code == 1
    assert scripted.tokens_made == 1
    assert scripted.running() == {"ann", "bob", "cat"}


def test_a_token_that_cannot_be_revoked_is_left_to_expire(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("DELETE", "/users/ann/tokens/.*", respond(500), reset(), times=None)
    assert cull_scripted("--timeout=1h", "--idle-by=both").exit_code == 0
    assert scripted.running() == set()


def test_a_server_is_kept_if_the_hub_makes_no_token(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("POST", ".*", respond(503), times=None)
    result = cull_asking("--idle-by=both")
    assert result.exit_code == 1
    assert result.outcomes == {"ann": "failed"}
    assert scripted.running() == {"ann"}


def test_a_server_is_kept_if_the_hub_limits_how_long_a_token_lives(cull_asking: Cull, scripted: ScriptedHub) -> None:
    """JupyterHub.token_expires_in_max_seconds may be less than a long --request-timeout needs."""
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    scripted.fault("POST", ".*", of_hub(400, "token expires_in: 3660 must not exceed 3600"), times=None)
    result = cull_asking("--idle-by=both")
    assert result.exit_code == 1
    assert "must not exceed 3600" in result.said["ann"].reason
    assert scripted.running() == {"ann"}


def test_while_scanning_a_token_that_is_not_made_keeps_one_server_only(
    cull_asking: Cull, scripted: ScriptedHub
) -> None:
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("POST", "/users/ann/tokens", respond(500), times=None)
    result = cull_asking("--idle-by=server")
    assert result.doubts.number == 1
    assert result.doubts.first.startswith("ann: ")
    assert scripted.running() == {"ann"}


def test_whom_a_filtered_scope_does_not_cover_the_hub_decides_about(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    scripted.add("bob", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    refused = respond_json(403, {"status": 403, "message": "no permissions to generate tokens"})
    scripted.fault("POST", "/users/ann/tokens", refused, times=None)
    result = cull_asking("--idle-by=both", "--json")
    assert (total(result)["asked"], total(result)["no_answer"]) == (2, 0)
    assert scripted.running() == {"bob"}
    assert len(result.warnings) == 1


def test_nothing_that_a_server_or_the_environment_plants_is_sent(
    cull_asking: Cull, scripted: ScriptedHub, elsewhere: ScriptedHub, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ann password secret\n")
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO, age=9 * HOUR)
    cookie = {"Set-Cookie": "planted=1; Path=/"}
    scripted.fault("GET", "/user/ann/api/kernels", respond_json(200, [], cookie), times=None)
    env = {"HOME": str(tmp_path), "HTTP_PROXY": f"http://127.0.0.1:{elsewhere.port}", "NETRC": str(tmp_path / ".netrc")}
    cull_asking("--idle-by=both", "--concurrency=1", env=env)
    assert scripted.running() == set()
    for request in asked(scripted):
        assert "cookie" not in request.headers
        assert request.headers["authorization"].startswith("token token-a")


# Hostile servers

# Of these the Hub's word counts.
ANSWERS: dict[str, Reply] = {
    **{str(code): respond(code) for code in CODES},
    "HTML": html(),
    "nothing": respond(200),
    "2 MiB": respond_json(200, [{"id": "x" * (2 << 20)}]),
    "4 GiB": respond(200, b"[" * (2 << 20), {"Content-Length": str(4 << 30)}),
    "zipped": respond(200, b"\x1f\x8b" + b"\0" * 100, {"Content-Encoding": "gzip"}),
    "deep": respond(200, b"[" * 100_000),
    "an object": respond_json(200, {}),
    "a number": respond_json(200, 5),
    "an odd redirect": redirect("http://[/user/ann"),
    "an odd cookie": respond(500, headers={"Set-Cookie": f"a=b; expires=Mon, 01-Jan-{'9' * 5000} 00:00:00 GMT"}),
    "null": respond_json(200, None),
    "numbers": respond_json(200, [1]),
    "no time": respond_json(200, [{"id": "1"}]),
    "a wrong time": respond_json(200, [{"last_activity": "soon"}]),
    "an odd time": respond_json(200, [{"last_activity": {}}]),
    "no such day": respond_json(200, [{"last_activity": "2026-02-30T00:00:00Z"}]),
    "cut off": truncated(of=respond_json(200, [])),
}
# These are kept: a computation may starve its server.
NO_ANSWERS: dict[str, Reply] = {
    "no HTTP": raw(b"\x00" * 100),
    "headers without end": raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000),
    "reset": reset(),
    "reset in the body": reset_in_body(of=respond_json(200, [])),
    "silence": hang(),
    "drip": drip(0.05, of=respond_json(200, ["x" * 1000])),
}
HOSTILE = [
    (path, how)
    for path in ("kernels", "terminals", "status")
    for how in (*ANSWERS, *NO_ANSWERS)
    if (path, how) != ("terminals", "404")  # which says that they are switched off
]


@pytest.mark.parametrize(("path", "how"), HOSTILE)
def test_a_hostile_server_affects_only_itself(cull_asking: Cull, scripted: ScriptedHub, how: str, path: str) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(ago(1)))
    scripted.add("bob", idle=LONG_AGO, age=9 * HOUR)
    scripted.add("cat", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    scripted.fault("GET", f"/user/ann/api/{path}", {**ANSWERS, **NO_ANSWERS}[how], times=None)
    began = time.monotonic()
    result = cull_asking("--idle-by=both", "--json", "--request-timeout=0.4s", "--concurrency=1")
    assert time.monotonic() - began < 3
    assert result.exit_code == 0
    assert any("ann" in warning for warning in result.warnings)
    kept = how in NO_ANSWERS
    assert scripted.running() == ({"ann", "cat"} if kept else {"cat"})
    assert [total(result)[what] for what in ("asked", "busy", "no_answer", "failed")] == [3, 1, int(kept), 0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # urllib3 leaves a socket open then
def test_a_hostile_server_with_two_lengths_is_kept(cull_asking: Cull, scripted: ScriptedHub) -> None:
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter())
    two_lengths = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n[]")
    scripted.fault("GET", "/user/ann/.*", two_lengths, times=None)
    assert cull_asking("--idle-by=both").exit_code == 0
    assert scripted.running() == {"ann"}
    gc.collect()


def test_a_server_that_is_slow_on_purpose_has_one_timeout_for_all_its_answers(
    cull_asking: Cull, scripted: ScriptedHub
) -> None:
    """Each answer comes just in time."""
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(ago(2 * HOUR)))
    scripted.fault("GET", "/user/ann/api/.*", slow(0.8), times=None)
    cull_asking("--idle-by=both", "--request-timeout=1s")
    assert [request.path for request in asked(scripted)] == ["/user/ann/api/kernels", "/user/ann/api/terminals"]
    assert scripted.running() == {"ann"}


def test_a_redirect_is_not_followed(cull_asking: Cull, scripted: ScriptedHub, elsewhere: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("GET", "/user/ann/.*", redirect(f"{elsewhere.url}/steal"), times=None)
    assert cull_asking("--idle-by=both").exit_code == 0


def test_a_hostile_servers_words_are_not_repeated(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("GET", "/user/ann/.*", respond_json(418, {"message": "call 555"}, {"X-Why": "555"}), times=None)
    assert "555" not in cull_asking("--idle-by=both", "-v").err


def test_busy_for_ever_ends_with_max_age(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, age=50 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    cull_asking("--idle-by=both")
    assert scripted.running() == {"ann"}
    cull_asking("--idle-by=both", "--max-age=2d")
    assert scripted.running() == set()


@pytest.mark.parametrize("mode", ["both", "server"])
def test_a_server_that_is_gone_meanwhile_is_no_error(cull_asking: Cull, scripted: ScriptedHub, mode: str) -> None:
    """The proxy leads to the Hub then."""
    server = scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    scripted.add("bob", idle=LONG_AGO, age=9 * HOUR)

    def end() -> None:
        server.ready = False

    scripted.fault("POST", "/users/ann/tokens", then_do(end))
    assert cull_asking("--idle-by", mode, "--concurrency=1").exit_code == 0
    assert scripted.running() == set()


# What an administrator got wrong: nothing is culled, and the sentence says what to set


@pytest.mark.parametrize("mode", ["both", "server", "kernels"])
def test_the_hubs_own_port(cull_asking: Cull, scripted: ScriptedHub, mode: str) -> None:
    scripted.leads_to_servers = False
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO, age=9 * HOUR)
    result = cull_asking("--idle-by", mode)
    assert result.exit_code == 3
    assert "--servers-url" in result.err
    assert scripted.running() == {"ann", "bob"}


@pytest.mark.parametrize("mode", ["server", "kernels"])
def test_the_hubs_own_port_where_nobody_would_be_due(cull_asking: Cull, scripted: ScriptedHub, mode: str) -> None:
    scripted.leads_to_servers = False
    scripted.add("ann", idle=10, age=9 * HOUR)
    result = cull_asking("--idle-by", mode)
    assert result.exit_code == 3
    assert "--servers-url" in result.err


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:REFUSES", "http://no-such-host.invalid", "http://127.0.0.1:ELSEWHERE", "https://127.0.0.1:PORT"],
)
@pytest.mark.parametrize("mode", ["both", "server"])
def test_an_address_that_does_not_lead_to_this_hub(
    cull_asking: Cull, scripted: ScriptedHub, mode: str, url: str
) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    with ScriptedHub() as another:
        another.fault("GET", ".*", html(), times=None)
        for word, port in (("REFUSES", free_ports(1)[0]), ("ELSEWHERE", another.port), ("PORT", scripted.port)):
            url = url.replace(word, str(port))
        result = cull_asking("--idle-by", mode, "--servers-url", url)
    assert result.exit_code == 3
    assert "--servers-url" in result.err
    assert scripted.running() == {"ann"}


@pytest.mark.parametrize("lost", [reset(), raw(b"")], ids=["reset", "closed"])
@pytest.mark.parametrize("mode", ["both", "server"])
def test_a_connection_that_is_lost_once_hides_no_busy_kernel(
    cull_asking: Cull, scripted: ScriptedHub, mode: str, lost: Reply
) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    scripted.fault("GET", "/user/ann/api/kernels", lost)
    assert cull_asking("--idle-by", mode).exit_code == 0
    assert scripted.running() == {"ann"}


def to_the_hub(exchange: Exchange) -> Answer:
    return redirect(f"/hub{exchange.request.target}")(exchange)


@pytest.mark.parametrize("path", ["kernels", "terminals", "status"])
@pytest.mark.parametrize("mode", ["both", "server"])
@pytest.mark.parametrize("first", ["ann", "bob"])
def test_a_server_that_alone_is_redirected_to_the_hub_is_kept_alone(
    cull_asking: Cull, scripted: ScriptedHub, first: str, mode: str, path: str
) -> None:
    for name in (first, *({"ann", "bob"} - {first})):
        scripted.add(name, idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(ago(2 * HOUR)))
    scripted.fault("GET", f"/user/ann/api/{path}", to_the_hub, times=None)
    result = cull_asking("--idle-by", mode, "--json", "--concurrency=1")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert "ann" in result.warnings[-1]
    assert total(result)["no_answer"] == 0
    if first == "bob":  # whose answer shows that the address is right
        assert total(result)["asked"] == 2


def test_many_servers_that_are_redirected_do_not_end_the_pass(cull_asking: Cull, scripted: ScriptedHub) -> None:
    for name in (*(f"lost{number}" for number in range(12)), "zoe"):
        scripted.add(name, idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("GET", "/user/lost.*", to_the_hub, times=None)
    assert cull_asking("--idle-by=both", "--concurrency=1").exit_code == 0
    assert len(scripted.running()) == 12


def test_a_proxy_that_has_lost_its_routes_costs_no_busy_server(loop: RunLoop, scripted: ScriptedHub) -> None:
    """As after a restart of the proxy: until the Hub adds the routes again, it sends all requests to the Hub."""
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))

    def lose_the_routes() -> None:
        scripted.leads_to_servers = False

    first, second = loop(scripted, "--timeout=1h", "--idle-by=both", between=[lose_the_routes]).passes
    assert scripted.running() == {"ann"}
    assert first.outcomes == {"ann": "spared"}
    assert len(second.errors) == 1
    assert "--servers-url" in second.errors[0]


@pytest.mark.parametrize("how", [respond(503), hang()], ids=["503", "silence"])
@pytest.mark.parametrize("mode", ["both", "server"])
def test_a_proxy_that_fails_during_a_pass_costs_no_busy_server(
    cull_asking: Cull, scripted: ScriptedHub, mode: str, how: Reply
) -> None:
    for name in ("ann", "bob", "cat"):
        scripted.add(name, idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    the_proxy_fails = then_do(lambda: scripted.fault("GET", "", how, times=None), how)
    scripted.fault("GET", "/user/(bob|cat)/.*", the_proxy_fails, times=None)
    cull_asking("--idle-by", mode, "--concurrency=1", "--request-timeout=0.3s")
    assert scripted.running() == {"ann", "bob", "cat"}


def test_a_proxy_that_fails_for_good_ends_the_pass(cull_asking: Cull, scripted: ScriptedHub) -> None:
    for number in range(20):
        scripted.add(f"user{number:02}", idle=LONG_AGO, age=9 * HOUR)
    the_proxy_fails = then_do(lambda: scripted.fault("GET", "", respond(503), times=None), respond(503))
    scripted.fault("GET", "/user/.*", the_proxy_fails, times=None)
    result = cull_asking("--idle-by=both", "--concurrency=1")
    assert (result.exit_code, len(scripted.running())) == (1, 20)
    assert (result.counts["failed"], result.counts["left undone"]) == (10, 10)


def test_a_version_that_is_no_number_is_not_that_of_a_hub(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("GET", "", respond_json(200, {"version": "dev"}), times=None)
    result = cull_asking("--idle-by=both")
    assert (result.exit_code, scripted.running()) == (3, {"ann"})
    assert "--servers-url" in result.err


@pytest.mark.parametrize("active", ["kernel", "terminal"])
def test_the_latest_activity_of_a_part_of_an_answer_counts(
    cull_asking: Cull, scripted: ScriptedHub, active: str
) -> None:
    kernel, terminal = (idle(10 if what == active else LONG_AGO) for what in ("kernel", "terminal"))
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[kernel], terminals=[terminal]))
    scripted.fault("GET", "/user/ann/api/status", respond(503), times=None)
    cull_asking("--idle-by=both")
    assert scripted.running() == {"ann"}


def test_the_port_of_a_hub_with_a_base_url_does_not_lead_to_servers(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    scripted.fault("GET", "/jhub/hub/api", respond_json(200, {"version": "6.1.1"}), times=None)
    to_the_hub = redirect("/jhub/hub/user/ann/api/kernels?no_track_activity=1")
    scripted.fault("GET", "/jhub/user/.*", to_the_hub, times=None)
    result = cull_asking("--idle-by=both", f"--servers-url={scripted.url.removesuffix('/hub/api')}/jhub")
    assert (result.exit_code, scripted.running()) == (3, {"ann"})
    assert "--servers-url" in result.err


def to_https(exchange: Exchange) -> Answer:
    return redirect(f"https://hub.example.org{exchange.request.target}", 308)(exchange)


@pytest.mark.parametrize(
    ("address", "env"),
    [
        ("https://127.0.0.1:PORT", {"REQUESTS_CA_BUNDLE": "/no-such-directory/ca.pem"}),
        # needs a package that is not there
        ("https://127.0.0.1:PORT", {"HTTPS_PROXY": "socks5://127.0.0.1:1", "NO_PROXY": ""}),
        ("http://[hub.example.org", {}),
    ],
    ids=["no CA file", "a proxy that requests cannot use", "no URL"],
)
def test_what_hinders_us_from_asking_is_not_an_answer_of_the_server(
    cull_asking: Cull, scripted: ScriptedHub, address: str, env: dict[str, str]
) -> None:
    full_url = {"full_url": f"{address.replace('PORT', str(scripted.port))}/user/ann/"}
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]), extra=full_url)
    result = cull_asking("--idle-by=both", "--json", env=env)
    assert (result.exit_code, total(result)["no_answer"], len(result.warnings)) == (0, 1, 2)
    assert scripted.running() == {"ann"}


def test_an_ingress_that_wants_https_is_not_an_answer_of_the_server(cull_asking: Cull, scripted: ScriptedHub) -> None:
    """The Hub's public_url says http:."""
    for name in ("ann", "bob"):
        full_url = {"full_url": f"http://127.0.0.1:{scripted.port}/user/{name}/"}
        scripted.add(name, idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]), extra=full_url)
    scripted.fault("GET", "/user/.*", to_https, times=None)
    assert cull_asking("--idle-by=both").exit_code == 3
    assert scripted.running() == {"ann", "bob"}


@pytest.mark.parametrize("mode", ["both", "server"])
def test_without_the_tokens_scopes_no_server_is_judged_by_the_hubs_word(
    cull_asking: Cull, scripted: ScriptedHub, mode: str
) -> None:
    """An ingress that does not let GET /user pass."""
    scripted.scopes = list(ALL_SCOPES)  # not `tokens`
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    scripted.fault("GET", "/user", html(404), times=None)
    result = cull_asking("--idle-by", mode)
    assert result.exit_code == 3
    assert "/user " in result.err
    assert scripted.running() == {"ann"}


def test_an_ingress_that_refuses_tokens_is_not_the_hub(cull_asking: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]))
    scripted.fault("POST", "/users/ann/tokens", html(403), times=None)
    result = cull_asking("--idle-by=both")
    assert result.outcomes == {"ann": "failed"}
    assert scripted.running() == {"ann"}


@pytest.mark.parametrize("version", ["2.3.1", "1.5.1"])
def test_a_hub_that_is_too_old_makes_no_token(cull_asking: Cull, scripted: ScriptedHub, version: str) -> None:
    scripted.version = version
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    result = cull_asking("--idle-by=both")
    assert result.exit_code == 3
    assert version in result.err
    assert scripted.tokens_made == 0
    assert scripted.running() == {"ann"}


@pytest.mark.parametrize("mode", ["both", "server"])
@pytest.mark.parametrize(
    ("version", "scope", "exit_code"),
    [
        ("3.1.1", "tokens!group=students", 3),
        ("4.1.6", "tokens!group=students", 3),
        ("4.1.6", "tokens", 0),
        ("5.0.0", "tokens!group=students", 0),
        ("6.1.1", "tokens!group=students", 0),
    ],
)
def test_where_a_filtered_scope_of_a_service_covers_nobody_nothing_is_stopped(
    cull_asking: Cull, scripted: ScriptedHub, version: str, scope: str, exit_code: int, mode: str
) -> None:
    """JupyterHub 3 and 4 refuse each token, so a busy server would be stopped by the Hub's word."""
    scripted.version = version
    scripted.scopes = [*ALL_SCOPES, scope]
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    result = cull_asking("--idle-by", mode)
    assert result.exit_code == exit_code
    assert scripted.running() == ({"ann"} if exit_code else set())
    assert ("tokens!group=students" in result.err) == (exit_code == 3)


@pytest.mark.parametrize("scopes", [["self"], ["access:servers!server=ann/", "delete:servers!user=ann"], None, []])
@pytest.mark.parametrize("mode", ["both", "server"])
def test_a_token_that_can_do_more_is_revoked_and_never_used(
    cull_asking: Cull, scripted: ScriptedHub, mode: str, scopes: list[str] | None
) -> None:
    """JupyterHub 2 ignores the scopes."""
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("POST", "/users/ann/tokens", edited(lambda model: {**model, "scopes": scopes}), times=None)
    result = cull_asking("--idle-by", mode)
    assert result.exit_code == 3
    assert scripted.tokens_made == 1
    assert asked(scripted) == []
    assert scripted.running() == {"ann"}


@pytest.mark.parametrize("mode", ["both", "server", "kernels", "hub"])
def test_the_scope_is_needed_only_to_ask(cull_asking: Cull, scripted: ScriptedHub, mode: str) -> None:
    scripted.scopes.remove("tokens")
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    result = cull_asking("--idle-by", mode)
    assert result.exit_code == (0 if mode == "hub" else 3)
    assert ('"tokens"' in result.err) == (mode != "hub")
    assert scripted.running() == (set() if mode == "hub" else {"ann"})


# Where servers are


@pytest.mark.parametrize("where", ["--servers-url", "full_url", "url", "$JUPYTERHUB_PUBLIC_HUB_URL"])
def test_the_address_is_as_given_or_as_the_hub_knows_it(cull_asking: Cull, scripted: ScriptedHub, where: str) -> None:
    """The Hub's own port leads nowhere here; a proxy is below /outside."""
    scripted.leads_to_servers = False
    with ScriptedHub() as proxy:
        proxy.users, proxy.tokens = scripted.users, scripted.tokens
        public = f"http://127.0.0.1:{proxy.port}"
        extra = {where: f"{public}/user/ann/"} if "url" in where else {}
        if where == "--servers-url":
            extra = {"full_url": "http://no-such-host.invalid/user/ann/"}
        scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]), extra=extra)
        args = ["--servers-url", public] if where == "--servers-url" else []
        env = {where[1:]: f"{public}/hub/"} if where.startswith("$") else {}
        assert cull_asking("--idle-by=both", *args, env=env).exit_code == 0
        assert len(asked(proxy)) == 1
    assert scripted.running() == {"ann"}


def test_a_pass_that_is_told_to_stop_does_not_wait_for_those_not_asked_yet(
    cull_asking: Cull, scripted: ScriptedHub
) -> None:
    for number in range(20):
        scripted.add(f"user{number}", idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("GET", "/user/.*", slow(0.2), times=None)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    assert cull_asking("--idle-by=server", "--concurrency=2").exit_code == 1
    assert time.monotonic() - began < 2
    assert len(scripted.running()) == 20
