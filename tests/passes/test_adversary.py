"""What users, proxies and Hubs may send to have the wrong server stopped, a due one missed, the token shown, or no end.

Points of an adversary's review, worst first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from processes import PROGRAM
from runs import Cull, Result
from scripted_hub import (
    ALL_SCOPES,
    LONG_AGO,
    NO_ACCESS,
    BulkHub,
    Exchange,
    Reply,
    Request,
    ScriptedHub,
    edited,
    normal,
    redirect,
    respond,
    respond_json,
    swapped,
    then_do,
)

import cull_idle

ESCAPE = "\x1b[2J\x1b]0;owned\x07"
FOREIGN_BODIES = [
    pytest.param(b"404 page not found\n", "text/plain", id="text"),
    pytest.param(b"<html><h1>nginx</h1></html>", "text/html", id="HTML"),
    pytest.param(b"", "text/plain", id="empty"),
    pytest.param(b'{"error": "no such route"}', "application/json", id="JSON"),
    pytest.param(
        b'{"kind": "Status", "status": "Failure", "message": "no", "code": 404}', "application/json", id="k8s"
    ),
]


def foreign(status: int, body: bytes = b"404 page not found\n", content_type: str = "text/plain") -> Reply:
    """As something between us and the Hub says it."""
    return respond(status, body, {"Content-Type": content_type})


def of_hub(status: int, message: str | None = None) -> Reply:
    """As the Hub itself says it; of a user that it does not know, its message is null."""
    return respond_json(status, {"status": status, "message": message})


def outcomes(result: Result, outcome: str) -> set[str]:
    """The servers, "ann" and "ann/gpu", and the users, "user ann", that --json gives this outcome."""
    events = [json.loads(line) for line in result.out.splitlines()]
    return {
        f"user {event['user']}" if event["event"] == "user" else f"{event['user']}/{event['server']}".rstrip("/")
        for event in events
        if event["event"] != "pass" and event["outcome"] == outcome
    }


def lists(scripted: ScriptedHub) -> list[Request]:
    """The requests for the user list, or a part of it."""
    return [request for request in scripted.requests if request.method == "GET" and request.path == "/users"]


def looks(scripted: ScriptedHub) -> list[Request]:
    """The requests for one user."""
    return [request for request in scripted.requests if request.method == "GET" and request.path.startswith("/users/")]


# An ingress that answers for the Hub


def come_back(scripted: ScriptedHub, name: str, answer: Reply) -> None:
    """Answer each look at a user with this; at the first one, the user becomes active."""
    scripted.fault("GET", f"/users/{name}", then_do(lambda: scripted.touch(name), of=answer))
    scripted.fault("GET", f"/users/{name}", answer, times=None)


@pytest.mark.parametrize("flags", [[], ["--cull-users"]], ids=["servers", "users too"])
@pytest.mark.parametrize("status", [404, 405])
@pytest.mark.parametrize(("body", "content_type"), FOREIGN_BODIES)
def test_a_user_who_is_back_is_spared_though_an_ingress_answers_the_look(
    cull_scripted: Cull, scripted: ScriptedHub, body: bytes, content_type: str, status: int, flags: list[str]
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    come_back(scripted, "ann", foreign(status, body, content_type))
    result = cull_scripted("--timeout=1h", "--json", *flags)
    assert scripted.running() == {"ann"}
    assert "ann" in scripted.users
    assert [line for line in scripted.lines("DELETE") if "ann" in line] == []
    assert "ann" in outcomes(result, "spared")
    assert outcomes(result, "culled") >= {"bob"}
    assert result.exit_code == 0


@pytest.mark.parametrize("status", [404, 405])
def test_a_user_without_servers_who_is_back_is_not_deleted_though_an_ingress_answers_the_look(
    cull_scripted: Cull, scripted: ScriptedHub, status: int
) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    come_back(scripted, "ann", foreign(status))
    result = cull_scripted("--timeout=1h", "--json", "--cull-users")
    assert scripted.lines("DELETE") == ["DELETE /users/bob"]
    assert outcomes(result, "spared") == {"user ann"}
    assert result.exit_code == 0


@pytest.mark.parametrize("kind", ["server", "user"])
def test_where_no_look_is_answered_the_user_list_tells_who_is_still_due(
    cull_scripted: Cull, scripted: ScriptedHub, kind: str
) -> None:
    back, away = {f"user-{number}" for number in range(0, 30, 3)}, {f"user-{n}" for n in range(30) if n % 3}
    for number in range(30):
        (scripted.add if kind == "server" else scripted.add_user)(f"user-{number}", idle=LONG_AGO)

    def some_come_back() -> None:
        for name in back:
            scripted.touch(name)

    scripted.fault("GET", "/users/.*", then_do(some_come_back, of=foreign(404)))
    scripted.fault("GET", "/users/.*", foreign(404), times=None)
    result = cull_scripted(
        *("--timeout=1h", "--json", "--api-page-size=7", "--concurrency=1"), *["--cull-users"] * (kind == "user")
    )
    assert (scripted.running() if kind == "server" else set(scripted.users)) == back
    prefix = "" if kind == "server" else "user "
    assert outcomes(result, "spared") == {f"{prefix}{name}" for name in back}
    assert outcomes(result, "culled") == {f"{prefix}{name}" for name in away}
    assert result.exit_code == 0


@pytest.mark.parametrize("due", [0, 60, 150, 199, 203])
def test_a_user_anywhere_on_a_page_is_found_in_the_user_list_again(
    cull_scripted: Cull, scripted: ScriptedHub, due: int
) -> None:
    for number in range(204):
        scripted.add(f"user-{number}", idle=LONG_AGO if number == due else 60)
    scripted.fault("GET", "/users/.*", foreign(404), times=None)
    assert cull_scripted("--timeout=1h").outcomes == {f"user-{due}": "culled"}


def test_what_the_user_list_does_not_have_any_more_is_gone(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=60)
    scripted.fault("GET", "/users/ann", then_do(lambda: scripted.users.pop("ann"), of=foreign(404)))
    result = cull_scripted("--timeout=1h", "--json")
    assert scripted.lines("DELETE") == []
    assert outcomes(result, "gone") == {"ann"}
    assert result.exit_code == 0


def test_where_nothing_shows_who_is_due_nothing_is_stopped(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users", normal())
    scripted.fault("GET", "/users.*", foreign(404), times=None)
    result = cull_scripted("--timeout=1h", "--json")
    assert scripted.running() == {"ann"}
    assert scripted.lines("DELETE") == []
    assert outcomes(result, "failed") == {"ann"}
    assert result.exit_code == 1


@pytest.mark.parametrize("kind", ["server", "user"])
def test_what_the_hub_says_is_no_more_needs_no_delete(cull_scripted: Cull, scripted: ScriptedHub, kind: str) -> None:
    if kind == "server":
        scripted.add("ann", idle=LONG_AGO)
    else:
        scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", then_do(lambda: scripted.users.pop("ann"), of=of_hub(404)))
    result = cull_scripted("--timeout=1h", "--json", *["--cull-users"] * (kind == "user"))
    assert scripted.lines("DELETE") == []
    assert outcomes(result, "gone") == {"ann" if kind == "server" else "user ann"}
    assert result.exit_code == 0


@pytest.mark.parametrize("kind", ["server", "user"])
@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize(("body", "content_type"), FOREIGN_BODIES)
def test_a_delete_that_something_else_refuses_has_failed(
    cull_scripted: Cull, scripted: ScriptedHub, body: bytes, content_type: str, status: int, kind: str
) -> None:
    if kind == "server":
        scripted.add("ann", idle=LONG_AGO)
    else:
        scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann.*", foreign(status, body, content_type), times=None)
    result = cull_scripted("--timeout=1h", "--json", *["--cull-users"] * (kind == "user"))
    assert outcomes(result, "failed") == {"ann" if kind == "server" else "user ann"}
    assert outcomes(result, "gone") == outcomes(result, "spared") == set()
    assert result.exit_code == 1
    assert str(status) in result.err


@pytest.mark.parametrize("status", [400, 404])
def test_a_server_that_is_down_when_the_delete_comes_is_gone(
    cull_scripted: Cull, scripted: ScriptedHub, status: int
) -> None:
    server = scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", then_do(lambda: setattr(server, "ready", False), of=of_hub(status)))
    result = cull_scripted("--timeout=1h", "--json")
    assert outcomes(result, "gone") == {"ann"}
    assert result.exit_code == 0


def test_a_user_who_is_no_more_when_the_delete_comes_is_gone(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", then_do(lambda: scripted.users.pop("ann"), of=of_hub(404)))
    result = cull_scripted("--timeout=1h", "--json", "--cull-users")
    assert outcomes(result, "gone") == {"user ann"}
    assert result.exit_code == 0


def test_a_user_whom_the_hub_does_not_delete_now_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", of_hub(400, "ann's server is in the process of stopping, please wait."))
    result = cull_scripted("--timeout=1h", "--json", "--cull-users")
    assert outcomes(result, "spared") == {"user ann"}
    assert result.exit_code == 0


# Scopes with a filter


def test_servers_that_a_filtered_scope_does_not_cover_have_failed(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.scopes = ["list:users", "read:servers", "read:users:activity", "read:users:name"]
    scripted.scopes += ["delete:servers!group=students"]
    outside = {f"teacher-{number}" for number in range(5)} | {"teacher-0/gpu"}
    for name in outside:
        scripted.add(*name.split("/"), idle=LONG_AGO)
    for number in range(5):
        scripted.add(f"student-{number}", idle=LONG_AGO)
        scripted.users[f"student-{number}"].groups = ["students"]
    result = cull_scripted("--timeout=1h", "--json")
    assert scripted.running() == outside
    assert outcomes(result, "failed") == outside
    assert outcomes(result, "culled") == {f"student-{number}" for number in range(5)}
    assert result.exit_code == 1
    assert "delete:servers!group=students" in result.err
    # One line for the first of them, another for how many more there are.
    assert len([line for line in result.lines if line.startswith("ERROR")]) <= 2


def test_users_whom_a_filtered_scope_does_not_cover_have_failed(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.scopes = [scope for scope in ALL_SCOPES if scope not in ("admin:users", "delete:users")]
    scripted.scopes += ["delete:users!group=students"]
    for number in range(5):
        scripted.add_user(f"teacher-{number}", idle=LONG_AGO)
        scripted.add_user(f"student-{number}", idle=LONG_AGO, groups=["students"])
    result = cull_scripted("--timeout=1h", "--json", "--cull-users")
    assert set(scripted.users) == {f"teacher-{number}" for number in range(5)}
    assert outcomes(result, "failed") == {f"user teacher-{number}" for number in range(5)}
    assert result.exit_code == 1
    assert "delete:users!group=students" in result.err
    assert len([line for line in result.lines if line.startswith("ERROR")]) <= 2


def test_a_404_for_a_server_that_still_runs_is_no_success_without_a_filter_either(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", of_hub(404, NO_ACCESS), times=None)
    result = cull_scripted("--timeout=1h", "--json")
    assert outcomes(result, "failed") == {"ann"}
    assert result.exit_code == 1


# What users choose for their servers


def add_due(scripted: ScriptedHub, count: int, odd: dict[int, Any] | None = None) -> list[str]:
    """So many users, each with a due server; some, by number, have options of their own."""
    names = [f"user-{number:03}" for number in range(count)]
    for number, name in enumerate(names):
        scripted.add(name, idle=LONG_AGO, user_options={"profile": (odd or {}).get(number, "small")})
    return names


def deep(depth: int) -> bytes:
    """Nested so deep that json.loads may refuse it: from 1,000 on with Python 3.11, from some 60,000 on with 3.14."""
    return b"[" * depth + b"]" * depth


TOO_DEEP = 100_000  # for every Python


def is_refused(text: bytes) -> bool:
    """True if this Python's json.loads refuses it."""
    try:
        json.loads(text)
    except RecursionError:
        return True
    return False


@pytest.mark.parametrize("depth", [1_000, 5_000, TOO_DEEP])
def test_only_a_user_with_options_that_are_too_deep_is_left_out(
    cull_scripted: Cull, scripted: ScriptedHub, depth: int
) -> None:
    names = add_due(scripted, 60, {17: "DEEP"})
    scripted.add_user("zoe", idle=LONG_AGO)
    scripted.fault("GET", r"/users\b.*", swapped(b'"DEEP"', deep(depth)), times=None)
    result = cull_scripted("--timeout=1h", "--api-page-size=50", "--cull-users")
    left_out = {names[17]} if is_refused(deep(depth)) else set()
    assert scripted.running() == left_out
    assert set(scripted.users) == set(names)
    assert result.exit_code == len(result.errors) == len(left_out)


def test_who_is_left_out_is_said_once_however_often_the_user_list_is_read(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    names = add_due(scripted, 20, {17: "DEEP"})
    scripted.fault("GET", "/users/.*", foreign(404), times=None)
    scripted.fault("GET", "/users", swapped(b'"DEEP"', deep(TOO_DEEP)), times=None)
    result = cull_scripted("--timeout=1h", "--concurrency=1")
    assert scripted.running() == {names[17]}
    assert (result.exit_code, len(result.errors)) == (1, 1)


@pytest.mark.parametrize("odd", [(0,), (49,), (50,), (59,), (0, 1, 2), (5, 25, 45, 55)], ids=str)
def test_users_with_deep_options_are_found_wherever_they_are(
    cull_scripted: Cull, scripted: ScriptedHub, odd: tuple[int, ...]
) -> None:
    names = add_due(scripted, 60, dict.fromkeys(odd, "DEEP"))
    scripted.fault("GET", r"/users\b.*", swapped(b'"DEEP"', deep(TOO_DEEP)), times=None)
    result = cull_scripted("--timeout=1h", "--api-page-size=50")
    assert scripted.running() == {names[number] for number in odd}
    assert result.exit_code == 1
    assert len(lists(scripted)) <= 2 + 60
    for number, error in zip(odd, result.errors, strict=True):
        assert f" user {number + 1} of the list " in error
        assert f" (after {names[number - 1]}) " in error or number - 1 in (-1, *odd)


def test_many_users_with_deep_options_end_the_list(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cull_idle, "MOST_LEFT_OUT", 4)
    names = add_due(scripted, 10, dict.fromkeys(range(2, 7), "DEEP"))
    scripted.fault("GET", r"/users\b.*", swapped(b'"DEEP"', deep(TOO_DEEP)), times=None)
    assert cull_scripted("--timeout=1h", "--api-page-size=5").exit_code == 1
    assert scripted.running() == set(names[2:])


def test_only_a_user_with_a_number_that_is_too_long_is_left_out(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    """Python reads no more than 4,300 digits."""
    names = add_due(scripted, 60, {17: "DIGITS"})
    scripted.fault("GET", r"/users\b.*", swapped(b'"DIGITS"', b"7" * 5000), times=None)
    result = cull_scripted("--timeout=1h", "--api-page-size=50")
    assert scripted.running() == {names[17]}
    assert result.exit_code == 1


def test_a_hub_without_pages_and_with_deep_options_is_not_asked_for_ever(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.version = "1.5.1"
    add_due(scripted, 20, {7: "DEEP"})
    plain = edited(lambda body: body["items"])
    of_old = swapped(b'"DEEP"', deep(TOO_DEEP), of=plain)
    scripted.fault("GET", "/users", lambda exchange: of_old(whole_list(exchange)), times=500)
    result = cull_scripted("--timeout=1h")
    assert len(lists(scripted)) < 20
    assert result.exit_code == 3


def whole_list(exchange: Exchange) -> Exchange:
    """A request for the user list as an old Hub takes it: without offset and limit."""
    query = {key: value for key, value in exchange.request.query.items() if key == "state"}
    return replace(exchange, request=replace(exchange.request, query=query))


# Runs a script as Python does; at the end, notes its peak memory. That of wait4 also counts the process it comes from.
PEAK = """
import atexit, os, runpy, sys

def note():
    with open("/proc/self/status") as status, open(os.environ["PEAK_FILE"], "w") as file:
        file.write(next(line for line in status if line.startswith("VmHWM:")).split()[1])

atexit.register(note)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Measured(NamedTuple):
    """What a process of its own came to."""

    exit_code: int
    out: str
    err: str
    peak: float  # resident bytes


def measured(hub: ScriptedHub, directory: Path, *args: str) -> Measured:
    peak = directory / "peak"
    settings = ("CULL_IDLE", "JUPYTERHUB", "COV")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(settings)}
    environment |= {"JUPYTERHUB_API_TOKEN": hub.token, "PEAK_FILE": str(peak)}
    command = [sys.executable, "-c", PEAK, str(PROGRAM), "--once", "--url", hub.url, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return Measured(done.returncode, done.stdout, done.stderr, int(peak.read_text()) * 1024.0)


def test_one_users_huge_options_neither_fill_the_memory_nor_save_others(scripted: ScriptedHub, tmp_path: Path) -> None:
    names = add_due(scripted, 50, {20: "HUGE"})
    huge = b"[" + b"[]," * 4_000_000 + b"[]]"  # 12 MB
    scripted.fault("GET", r"/users\b.*", swapped(b'"HUGE"', huge), times=None)
    run = measured(scripted, tmp_path, "--timeout=1h")
    assert run.peak < 128 * 2**20
    assert scripted.running() == {names[20]}
    assert run.exit_code == 1
    assert " user 21 of the list (after user-019) is left out: " in run.err


def test_20000_due_servers_take_at_most_80_MB(tmp_path: Path) -> None:  # noqa: N802 -- a unit
    options = {"profile": "gpu", "image": "registry.example/notebook:2026-11", "resources": {"cpu": 4, "memory": "16G"}}
    with BulkHub(20_000, due=20_000, groups=["students", "physics"], user_options=options) as hub:
        run = measured(hub, tmp_path, "--timeout=1h", "--dry-run", "--json")
    assert run.exit_code == 0
    assert len(run.out.splitlines()) == 20_001
    assert run.peak <= 80e6


# Answers that are printed

TOKEN = "5ec2e7f00dfeedc0ffee0ddba11ca5cade5ca1ab1e"
Surface = Callable[[ScriptedHub, str], None]


def server_with(**fields: str) -> Surface:
    """Due, but for a field which is this text."""

    def arrange(scripted: ScriptedHub, text: str) -> None:
        scripted.add("ann", idle=LONG_AGO, extra={key: value.replace("TEXT", text) for key, value in fields.items()})

    return arrange


def changed_at_a_look(key: str) -> Surface:
    """Due, but at the second look a field is this text."""

    def arrange(scripted: ScriptedHub, text: str) -> None:
        server = scripted.add("ann", idle=LONG_AGO)
        scripted.fault("GET", "/users/ann", then_do(lambda: server.extra.update({key: text})))

    return arrange


def message(method: str, pattern: str, status: int) -> Surface:
    """An error with this text as its message."""

    def arrange(scripted: ScriptedHub, text: str) -> None:
        scripted.add("ann", idle=LONG_AGO)
        scripted.add_user("bob", idle=LONG_AGO)
        scripted.fault(method, pattern, respond_json(status, {"status": status, "message": text}), times=None)

    return arrange


def location(method: str, pattern: str) -> Surface:
    """A redirect to this text, as far as a header can hold it."""

    def arrange(scripted: ScriptedHub, text: str) -> None:
        scripted.add("ann", idle=LONG_AGO)
        line = "".join(char for char in text[:60_000] if char not in "\r\n" and ord(char) < 256)
        scripted.fault(method, pattern, redirect(f"http://elsewhere/{line}"), times=None)

    return arrange


def identity(kind: str, name: str) -> Surface:
    """A token that lacks scopes, whose owner this text names."""

    def arrange(scripted: ScriptedHub, text: str) -> None:
        owner = {"kind": kind.replace("TEXT", text), "name": name.replace("TEXT", text), "scopes": ["list:users"]}
        scripted.fault("GET", "/user", respond_json(200, owner), times=None)

    return arrange


def next_offset(scripted: ScriptedHub, text: str) -> None:
    """A pagination that goes on at this text."""
    scripted.add("ann", idle=LONG_AGO)
    page = {"offset": 0, "limit": 50, "total": 2, "next": {"offset": text, "limit": 50}}
    scripted.fault("GET", "/users", edited(lambda body: {**body, "_pagination": page}), times=None)


def version(scripted: ScriptedHub, text: str) -> None:
    """A Hub whose version is this text."""
    scripted.add("ann", idle=LONG_AGO)
    scripted.version = "".join(char for char in text[:60_000] if char not in "\r\n" and ord(char) < 256)


# What a dry run meets, too.
LISTED: dict[str, Surface] = {
    "message of the list's 500": message("GET", "/users", 500),
    "message of the list's 403": message("GET", "/users", 403),
    "Location of the list": location("GET", "/users"),
    "kind": identity("TEXT", "culler"),
    "name": identity("service", "TEXT"),
    "next.offset": next_offset,
    "pending": server_with(pending="TEXT"),
    "last_activity": server_with(last_activity="TEXT"),
    "started": server_with(started="TEXT"),
    "version": version,
}
LATER: dict[str, Surface] = {
    "message of a look's 500": message("GET", "/users/.*", 500),
    "message of a look's 403": message("GET", "/users/.*", 403),
    "Location of a look": location("GET", "/users/.*"),
    "pending at a look": changed_at_a_look("pending"),
    "last_activity at a look": changed_at_a_look("last_activity"),
    "message of a stop's 400": message("DELETE", ".*/server", 400),
    "message of a stop's 403": message("DELETE", ".*/server", 403),
    "message of a stop's 404": message("DELETE", ".*/server", 404),
    "message of a stop's 418": message("DELETE", ".*/server", 418),
    "message of a stop's 503": message("DELETE", ".*/server", 503),
    "Location of a stop": location("DELETE", ".*"),
    "message of a deletion's 400": message("DELETE", "/users/bob", 400),
    "message of a deletion's 418": message("DELETE", "/users/bob", 418),
}
MODES = {"log": ["-v", "--cull-users"], "JSON": ["-v", "--json", "--cull-users"]}
DRY_MODES = {"table": ["-v", "--dry-run"], "dry JSON": ["-v", "--dry-run", "--json"]}
PRINTED = [
    pytest.param(surface, mode, id=f"{what}-{where}")
    for surfaces, modes in (({**LISTED, **LATER}, MODES), (LISTED, DRY_MODES))
    for what, surface in surfaces.items()
    for where, mode in modes.items()
]


@pytest.mark.parametrize(("surface", "mode"), PRINTED)
def test_an_answer_that_repeats_the_token_does_not_print_it(
    cull: Cull, scripted: ScriptedHub, surface: Surface, mode: list[str]
) -> None:
    scripted.token = TOKEN
    surface(scripted, TOKEN * 100)  # wherever it is cut, a token is on the edge
    result = cull("--once", "--timeout=1h", "--url", scripted.url, *mode, token=TOKEN)
    assert not [
        part for start in range(len(TOKEN) - 7) if (part := TOKEN[start : start + 8]) in result.out + result.err
    ]


@pytest.mark.parametrize(("surface", "mode"), PRINTED)
def test_an_answer_with_control_characters_is_printed_escaped(
    cull_scripted: Cull, scripted: ScriptedHub, surface: Surface, mode: list[str]
) -> None:
    surface(scripted, f"a{ESCAPE}\r\nERROR    forged\n\x9b31m\u202e\u2028\x00")
    result = cull_scripted("--timeout=1h", *mode)
    assert [char for char in result.out + result.err if char != "\n" and not char.isprintable()] == []
    assert not [line for line in result.lines if line.startswith("ERROR    forged")]


@pytest.mark.parametrize(("surface", "mode"), PRINTED)
def test_an_answer_of_1_MB_is_printed_cut(  # noqa: N802 -- a unit
    cull_scripted: Cull, scripted: ScriptedHub, surface: Surface, mode: list[str]
) -> None:
    surface(scripted, "x" * 1_000_000)
    result = cull_scripted("--timeout=1h", *mode)
    assert max(map(len, [*result.err.splitlines(), *result.out.splitlines()]), default=0) <= 2_000


def test_an_offset_of_4000_digits_is_printed_cut(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    page = {"offset": 0, "limit": 50, "total": 1, "next": {"offset": "DIGITS"}}
    paged = edited(lambda body: {**body, "_pagination": page})
    scripted.fault("GET", "/users", swapped(b'"DIGITS"', b"9" * 4000, of=paged), times=50)
    result = cull_scripted("--timeout=1h")
    assert max(map(len, result.err.splitlines())) <= 2_000
    assert len(lists(scripted)) < 20


# A token that is revoked during the pass


def revoked(scripted: ScriptedHub) -> None:
    """After the list, the Hub does not know the token any more."""
    refused = of_hub(403, "Missing or invalid credentials.")
    scripted.fault("GET", "/users/.*", refused, times=None)
    scripted.fault("DELETE", ".*", refused, times=None)


def refused_looks(scripted: ScriptedHub) -> None:
    """The token may list and stop, but not look."""
    refused = of_hub(403, "Action is not authorized with current scopes; requires any of [read:users:name]")
    scripted.fault("GET", "/users/.*", refused, times=None)


@pytest.mark.parametrize("concurrency", [1, 10])
@pytest.mark.parametrize("how", [revoked, refused_looks])
@pytest.mark.parametrize("kind", ["servers", "users"])
def test_a_token_that_is_refused_ends_the_pass(
    cull_scripted: Cull, scripted: ScriptedHub, how: Callable[[ScriptedHub], None], concurrency: int, kind: str
) -> None:
    for number in range(300):
        if kind == "servers":
            scripted.add(f"user-{number}", idle=LONG_AGO)
        else:
            scripted.add_user(f"user-{number}", idle=LONG_AGO)
    how(scripted)
    result = cull_scripted("--timeout=1h", f"--concurrency={concurrency}", *["--cull-users"] * (kind == "users"))
    assert len(looks(scripted)) <= concurrency + 5
    assert scripted.lines("DELETE") == []
    assert result.exit_code == 3
    assert "token" in result.err
    assert "403" in result.err


def test_a_user_list_costs_as_many_requests_as_it_has_pages(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for number in range(2000):
        scripted.add(f"user-{number}", idle=60)
    assert cull_scripted("--timeout=1h", "--api-page-size=50").exit_code == 0
    assert len(lists(scripted)) == 40
