"""Each answer to a DELETE: what it means, and whether the DELETE is tried again."""

from __future__ import annotations

import threading

import pytest
from runs import Cull
from scripted_hub import (
    LONG_AGO,
    Reply,
    ScriptedHub,
    done_but_lost,
    hang,
    html,
    of_hub,
    redirect,
    reset,
    respond,
    respond_json,
    slow,
    then_do,
)

import cull_idle

PAUSES = cull_idle.PAUSES
TRIES = len(PAUSES) + 1

SERVER = pytest.param("/users/ann/server", "ann", id="server")
USER = pytest.param("/users/ann", "user ann", id="user")
PASSING = [
    pytest.param(respond_json(429, {"message": "slow down"}), id="429"),
    pytest.param(respond(502), id="502"),
    pytest.param(respond(503), id="503"),
    pytest.param(respond(504), id="504"),
    pytest.param(reset(), id="connection lost"),
]


@pytest.fixture
def ann(scripted: ScriptedHub, request: pytest.FixtureRequest) -> str:
    """Ann is due: her server, or where the test is of users she herself."""
    if request.node.callspec.params["path"].endswith("/server"):
        scripted.add("ann", idle=LONG_AGO)
        return "--cull-users=false"
    scripted.add_user("ann", idle=LONG_AGO)
    return "--cull-users"


@pytest.mark.parametrize(
    ("status", "level", "outcome"),
    [
        pytest.param(204, "INFO", "culled", id="204 stopped"),
        pytest.param(202, "WARNING", "stopping", id="202 still stopping"),
    ],
)
def test_a_server_that_is_not_left_running_is_no_failure(
    cull_scripted: Cull, scripted: ScriptedHub, status: int, level: str, outcome: str
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", respond_json(status, {"status": status, "message": "Oops"}))
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 0
    assert result.said["ann"][:2] == (level, outcome)
    assert result.counts == {"running": 1, "due": 1, outcome: 1}
    assert scripted.lines("DELETE") == ["DELETE /users/ann/server"]


def test_a_server_that_the_hub_does_not_stop_and_that_runs_on_has_failed(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    """A named one, after named servers were switched off."""
    scripted.add("ann", "gpu", idle=LONG_AGO)
    answer = {"status": 400, "message": "Named servers are not enabled."}
    scripted.fault("DELETE", ".*", respond_json(400, answer), times=None)
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 1
    assert result.said["ann/gpu"][:2] == ("ERROR", "failed")
    assert "Named servers are not enabled." in result.said["ann/gpu"].reason
    assert len(scripted.lines("DELETE")) == 1


@pytest.mark.parametrize(
    ("status", "level", "outcome"),
    [
        pytest.param(204, "INFO", "deleted", id="204 deleted"),
        pytest.param(202, "WARNING", "stopping", id="202 a server is stopping"),
        pytest.param(400, "INFO", "spared", id="400 a server is stopping"),
    ],
)
def test_a_user_who_is_deleted_gone_or_spared_is_no_failure(
    cull_scripted: Cull, scripted: ScriptedHub, status: int, level: str, outcome: str
) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann", respond_json(status, {"status": status, "message": "Oops"}))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert result.said["user ann"][:2] == (level, outcome)
    assert result.counts == {"running": 0, "due": 1, outcome: 1}
    assert scripted.lines("DELETE") == ["DELETE /users/ann"]


def test_a_culled_server_and_a_deleted_user_are_said_with_idle_time_and_limit(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h", "--cull-users", "--user-timeout", "30m")
    assert result.said == {
        "ann": ("INFO", "culled", "idle 2h, limit 1h"),
        "user bob": ("INFO", "deleted", "idle 2h, limit 30m"),
    }


def test_a_server_that_takes_longer_than_the_hub_waits_is_stopping_and_keeps_its_user(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.slow_stop = 0.0
    scripted.add("ann", idle=LONG_AGO, stops=False)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert result.outcomes == {"ann": "stopping"}
    assert "ann" in scripted.users
    assert scripted.lines("DELETE") == ["DELETE /users/ann/server"]


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        pytest.param("/users/ann/server", "delete:servers", id="server"),
        pytest.param("/users/ann", "admin:users", id="user"),
    ],
)
def test_a_403_names_the_scope_and_shows_the_role(
    cull_scripted: Cull, scripted: ScriptedHub, ann: str, path: str, scope: str
) -> None:
    scripted.fault("DELETE", path, of_hub(403, "you may not"))
    result = cull_scripted("--timeout", "1h", ann)
    assert result.exit_code == 3
    (failed,) = result.said.values()
    assert failed[:2] == ("ERROR", "failed")
    assert "403 (you may not)" in failed.reason
    sentence, _, role = failed.reason.partition("load_roles")
    assert scope in sentence
    assert f'"{scope}"' in role


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_ends_the_pass(cull_scripted: Cull, scripted: ScriptedHub, status: int) -> None:
    for index in range(30):
        scripted.add(f"user-{index}", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", of_hub(status), times=None)
    result = cull_scripted("--timeout", "1h", "--concurrency", "1")
    assert result.exit_code == 3
    assert len(scripted.lines("DELETE")) == 1
    assert result.counts == {"running": 30, "due": 30, "failed": 1, "left undone": 29}


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("request_", ["GET /users/eve", "DELETE /users/eve/servers/.env"])
def test_a_refusal_that_is_not_the_hubs_concerns_one_server_only(
    cull_scripted: Cull, scripted: ScriptedHub, request_: str, status: int
) -> None:
    """A firewall before the Hub refuses what its rules call dangerous."""
    scripted.add("eve", ".env", idle=LONG_AGO)
    for index in range(30):
        scripted.add(f"user-{index}", idle=LONG_AGO)
    method, path = request_.split()
    scripted.fault(method, path, html(status), times=None)
    result = cull_scripted("--timeout", "1h", "--concurrency", "1")
    assert result.exit_code == 1
    assert result.counts == {"running": 31, "due": 31, "culled": 30, "failed": 1}
    assert "scope" not in result.err


def test_after_a_403_a_stop_in_flight_that_works_does_not_let_the_pass_go_on(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.sample", lambda items, _: items)
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    scripted.add_user("cat", idle=LONG_AGO)
    bob_is_stopping = threading.Event()
    scripted.fault("DELETE", "/users/ann/server", then_do(lambda: bob_is_stopping.wait(5), of_hub(403)))
    scripted.fault("DELETE", "/users/bob/server", then_do(bob_is_stopping.set, slow(0.1)))
    assert cull_scripted("--timeout", "1h", "--cull-users", "--concurrency", "2").exit_code == 3
    assert scripted.running() == {"ann"}
    assert set(scripted.users) == {"ann", "bob", "cat"}


@pytest.mark.parametrize("passing", PASSING)
@pytest.mark.parametrize(("path", "name"), [SERVER, USER])
def test_a_failure_that_may_pass_is_tried_again(
    cull_scripted: Cull, scripted: ScriptedHub, *, ann: str, path: str, name: str, passing: Reply
) -> None:
    scripted.fault("DELETE", path, passing, times=TRIES - 1)
    result = cull_scripted("--timeout", "1h", ann)
    assert result.exit_code == 0
    assert scripted.running() == set()
    assert scripted.lines("DELETE") == [f"DELETE {path}"] * TRIES
    assert result.outcomes == {name: "deleted" if name.startswith("user ") else "culled"}
    assert len(result.lines) == 2


@pytest.mark.parametrize("passing", PASSING)
@pytest.mark.parametrize(("path", "name"), [SERVER, USER])
def test_a_failure_that_does_not_pass_has_failed_after_a_few_tries(
    cull_scripted: Cull, scripted: ScriptedHub, *, ann: str, path: str, name: str, passing: Reply
) -> None:
    scripted.add("bob", idle=LONG_AGO)
    scripted.fault("DELETE", path, passing, times=None)
    result = cull_scripted("--timeout", "1h", ann)
    assert result.exit_code == 1
    assert scripted.lines("DELETE").count(f"DELETE {path}") == TRIES
    assert result.said[name][:2] == ("ERROR", "failed")
    assert "idle 2h, limit 1h" in result.said[name].reason
    assert f"DELETE {path}" in result.said[name].reason
    assert "ann" in scripted.users
    assert "bob" not in scripted.running()
    assert result.counts["failed"] == 1


@pytest.mark.parametrize(("path", "name"), [SERVER, USER])
def test_a_500_for_a_user_who_no_longer_exists_is_gone(
    cull_scripted: Cull, scripted: ScriptedHub, ann: str, path: str, name: str
) -> None:
    vanish = then_do(lambda: scripted.users.pop("ann"), respond_json(500, {"message": "Internal Server Error"}))
    scripted.fault("DELETE", path, vanish)
    result = cull_scripted("--timeout", "1h", ann)
    assert result.exit_code == 0
    assert result.said[name][:2] == ("INFO", "gone")
    assert scripted.lines()[-2:] == [f"DELETE {path}", "GET /users/ann"]


@pytest.mark.parametrize(("path", "name"), [SERVER, USER])
def test_a_500_for_a_user_who_exists_has_failed(
    cull_scripted: Cull, scripted: ScriptedHub, ann: str, path: str, name: str
) -> None:
    scripted.fault("DELETE", path, respond_json(500, {"message": "the spawner broke"}), times=None)
    result = cull_scripted("--timeout", "1h", ann)
    assert result.exit_code == 1
    assert result.outcomes[name] == "failed"
    assert "500 (the spawner broke)" in result.said[name].reason
    assert scripted.lines("DELETE") == [f"DELETE {path}"]


@pytest.mark.parametrize(
    "look",
    [pytest.param(respond(500), id="500"), pytest.param(respond(418), id="418"), pytest.param(reset(), id="reset")],
)
def test_a_500_has_failed_if_the_look_for_the_user_fails_too(
    cull_scripted: Cull, scripted: ScriptedHub, look: Reply
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    breaks = then_do(lambda: scripted.fault("GET", "/users/ann", look, times=None), respond(500))
    scripted.fault("DELETE", "/users/ann/server", breaks, times=None)
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 1
    assert result.outcomes == {"ann": "failed"}
    assert scripted.lines("DELETE") == ["DELETE /users/ann/server"]


def test_only_after_a_500_is_the_user_looked_for(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", then_do(scripted.users.clear, respond(418)))
    assert cull_scripted("--timeout", "1h").exit_code == 1
    assert scripted.lines()[-1] == "DELETE /users/ann/server"


@pytest.mark.parametrize(
    ("answer", "quoted"),
    [
        pytest.param(respond_json(418, {"message": "I am a teapot"}), "418 (I am a teapot)", id="a message"),
        pytest.param(respond_json(409, {"message": None}), "409", id="no message"),
        pytest.param(respond_json(507, ["full"]), "507", id="a list"),
        pytest.param(respond(501, b"<h1>no</h1>"), "501", id="HTML"),
        pytest.param(respond(200), "the Hub answered", id="an unknown success"),
        pytest.param(respond_json(451, {"message": "word " * 999}), "451 (word word", id="a novel"),
        pytest.param(redirect("http://127.0.0.1:1/elsewhere"), "http://127.0.0.1:1/elsewhere", id="a redirect"),
    ],
)
@pytest.mark.parametrize(("path", "name"), [SERVER, USER])
def test_any_other_answer_has_failed_and_is_quoted(
    cull_scripted: Cull, scripted: ScriptedHub, *, ann: str, path: str, name: str, answer: Reply, quoted: str
) -> None:
    scripted.add("bob", idle=LONG_AGO)
    scripted.fault("DELETE", path, answer)
    result = cull_scripted("--timeout", "1h", ann)
    assert result.exit_code == 1
    (error,) = result.errors
    assert result.outcomes[name] == "failed"
    assert "idle 2h, limit 1h" in error
    assert quoted in error
    assert len(error) < 400
    assert scripted.lines("DELETE").count(f"DELETE {path}") == 1
    assert "bob" not in scripted.running()


def test_a_delete_that_hangs_has_failed_and_names_the_option(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", hang(), times=None)
    result = cull_scripted("--timeout", "1h", "--request-timeout", "0.3")
    assert result.exit_code == 1
    assert result.outcomes == {"ann": "failed"}
    assert "0.3s" in result.lines[0]
    assert "--request-timeout" in result.lines[0]


@pytest.mark.parametrize(("path", "name"), [SERVER, USER])
def test_a_delete_whose_answer_is_lost_is_looked_at_again(
    cull_scripted: Cull, scripted: ScriptedHub, ann: str, path: str, name: str
) -> None:
    scripted.fault("DELETE", path, done_but_lost())
    result = cull_scripted("--timeout", "1h", ann)
    assert result.exit_code == 0
    assert result.outcomes[name] == ("culled" if path.endswith("server") else "deleted")


@pytest.mark.parametrize(("path", "name"), [SERVER, USER])
def test_before_each_try_comes_a_look(
    cull_scripted: Cull, scripted: ScriptedHub, ann: str, path: str, name: str
) -> None:
    scripted.fault("DELETE", path, respond(503), reset())
    assert cull_scripted("--timeout", "1h", ann).exit_code == 0
    assert scripted.lines()[2:] == ["GET /users/ann", f"DELETE {path}"] * 3


@pytest.mark.parametrize(("path", "name"), [SERVER, USER])
def test_who_becomes_active_between_two_tries_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub, ann: str, path: str, name: str
) -> None:
    scripted.fault("DELETE", path, then_do(lambda: scripted.touch("ann"), respond(503)))
    result = cull_scripted("--timeout", "1h", ann)
    assert result.exit_code == 0
    assert result.outcomes[name] == "spared"
    assert scripted.lines("DELETE") == [f"DELETE {path}"]


def test_a_user_who_starts_a_server_between_two_tries_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    start = then_do(lambda: scripted.add("ann", idle=LONG_AGO), respond(503))
    scripted.fault("DELETE", "/users/ann", start)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert scripted.lines("DELETE") == ["DELETE /users/ann"]
    assert "ann" in scripted.running()
    assert result.outcomes == {"user ann": "spared"}


def pause_before_retry(scripted: ScriptedHub) -> float:
    """Seconds between the first DELETE and the look before the second."""
    requests = list(scripted.requests)
    first = next(index for index, request in enumerate(requests) if request.method == "DELETE")
    return requests[first + 1].time - requests[first].time


def test_pauses_grow() -> None:
    assert list(PAUSES) == sorted(set(PAUSES))
    assert PAUSES[0] > 0
    assert max(PAUSES) <= cull_idle.LONGEST_PAUSE


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured_but_not_for_long(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(cull_idle, "LONGEST_PAUSE", 0.25)
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", respond(status, headers={"Retry-After": "600"}))
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert 0.25 <= pause_before_retry(scripted) < 1.5


def test_a_retry_after_longer_than_the_usual_pause_is_waited_for(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", respond(503, headers={"Retry-After": "1"}))
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert 1 <= pause_before_retry(scripted) < 2.5


@pytest.mark.parametrize("text", ["0", "-600", "soon", "", "Mon, 01 Jan 2091 00:00:00 GMT", "\u00b2"], ids=ascii)
def test_a_retry_after_that_is_no_number_adds_nothing(cull_scripted: Cull, scripted: ScriptedHub, text: str) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", respond(503, headers={"Retry-After": text}))
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert pause_before_retry(scripted) < 0.5
