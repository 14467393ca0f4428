"""The second look, right before each DELETE: a server or user that changed since the scan is spared."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from runs import Cull
from scripted_hub import (
    LONG_AGO,
    FakeServer,
    Reply,
    ScriptedHub,
    edited,
    empty,
    hang,
    html,
    normal,
    redirect,
    reset,
    reset_in_body,
    respond,
    respond_json,
    then_do,
    truncated,
)

Change = Callable[[FakeServer], object]
SERVER = {"last_activity": None, "started": "2026-11-22T20:00:00Z", "pending": None, "ready": True}


def on_look(scripted: ScriptedHub, hook: Callable[[], object]) -> None:
    """Call `hook` at the second look at ann, before the Hub answers."""
    scripted.fault("GET", "/users/ann", then_do(hook))


# Servers


def test_a_server_that_comes_back_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    on_look(scripted, lambda: scripted.touch("ann"))
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert result.said["ann"][:2] == ("INFO", "spared")
    assert result.counts == {"running": 2, "due": 2, "culled": 1, "spared": 1}


@pytest.mark.parametrize(
    ("seconds", "words"), [(30, "30s"), (26 * 3600 + 210, "1d02h")], ids=["a moment ago", "a day ago"]
)
def test_a_server_that_comes_back_is_said_with_its_idle_time(
    cull_scripted: Cull, scripted: ScriptedHub, seconds: int, words: str
) -> None:
    scripted.now = scripted.now.replace(microsecond=0)
    server = scripted.add("ann", idle=4 * 86400)
    on_look(scripted, lambda: setattr(server, "last_activity", scripted.now - timedelta(seconds=seconds)))
    result = cull_scripted("--timeout", "3d")
    assert result.outcomes == {"ann": "spared"}
    assert words in result.said["ann"].reason


def test_a_server_that_was_started_anew_is_spared_even_from_max_age(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    server = scripted.add("ann", idle=LONG_AGO)
    restarted = scripted.now - timedelta(seconds=7200)
    on_look(scripted, lambda: setattr(server, "started", restarted))
    result = cull_scripted("--timeout", "1h", "--max-age", "1h")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert result.outcomes == {"ann": "spared"}


@pytest.mark.parametrize(
    ("change", "level", "outcome"),
    [
        pytest.param(lambda server: setattr(server, "pending", "stop"), "WARNING", "stopping", id="stopping"),
        pytest.param(lambda server: setattr(server, "ready", False), "INFO", "gone", id="stopped"),
        pytest.param(lambda server: setattr(server, "pending", "spawn"), "INFO", "spared", id="starting"),
        pytest.param(lambda server: setattr(server, "last_activity", "x"), "WARNING", "spared", id="garbage time"),
        pytest.param(lambda server: server.extra.update(ready=None), "WARNING", "spared", id="garbage ready"),
    ],
)
def test_a_server_that_is_no_longer_ready_is_left_alone(
    cull_scripted: Cull, scripted: ScriptedHub, change: Change, level: str, outcome: str
) -> None:
    server = scripted.add("ann", idle=LONG_AGO)
    on_look(scripted, lambda: change(server))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert result.said["ann"][:2] == (level, outcome)
    assert scripted.lines("DELETE") == []


@pytest.mark.parametrize(
    ("name", "servers", "outcome"),
    [
        pytest.param("gpu", None, "spared", id="named server, servers null"),
        pytest.param("gpu", [1], "spared", id="named server, servers a list"),
        pytest.param("gpu", {"": None}, "spared", id="named server, another one null"),
        pytest.param("gpu", {"": SERVER}, "gone", id="named server, only another one"),
        pytest.param("gpu", {}, "gone", id="named server, no servers"),
        pytest.param("", [1], "spared", id="default server, servers a list"),
        pytest.param("", {"": 5}, "spared", id="default server a number"),
    ],
)
def test_a_server_that_is_not_shown_is_gone_only_if_the_rest_is_understood(
    cull_scripted: Cull, scripted: ScriptedHub, name: str, servers: object, outcome: str
) -> None:
    scripted.add("ann", name, idle=LONG_AGO)
    full_name = f"ann/{name}" if name else "ann"
    scripted.fault("GET", "/users/ann", edited(lambda model: {**model, "servers": servers}), times=None)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.said[full_name][:2] == ("WARNING" if outcome == "spared" else "INFO", outcome)
    assert [line for line in scripted.lines("DELETE") if "/server" in line] == []
    assert outcome == "gone" or "ann" in scripted.users


@pytest.mark.parametrize("status", [404, 405])
def test_without_a_second_look_the_user_list_is_read_again(
    cull_scripted: Cull, scripted: ScriptedHub, status: int
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    scripted.fault("GET", "/users/.*", respond(status), times=None)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert sorted(scripted.lines("DELETE")) == ["DELETE /users/ann/server", "DELETE /users/bob"]
    assert result.outcomes == {"ann": "culled", "user bob": "deleted"}


@pytest.mark.parametrize(("page", "end"), [(normal(), (0, "culled")), (respond(500), (1, "failed"))])
def test_a_user_list_that_is_read_again_is_read_whole(
    cull_scripted: Cull, scripted: ScriptedHub, page: Reply, end: tuple[int, str]
) -> None:
    """The Hub sends fewer users than asked for, and an ingress lets no single user be read."""
    for number in range(100):
        scripted.add(f"user{number:03}", idle=LONG_AGO if number == 61 else 60)
    scripted.page_max = 20
    scripted.fault("GET", "/users/.*", respond(404), times=None)
    scripted.fault("GET", r"/users\?.*&offset=40", normal(), page)
    result = cull_scripted("--timeout", "1h")
    assert (result.exit_code, result.outcomes["user061"]) == end


def test_a_server_whose_user_is_gone_is_no_failure(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    on_look(scripted, lambda: scripted.users.pop("ann"))
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 0
    assert result.outcomes == {"ann": "gone"}


def renamed(model: dict[str, Any]) -> dict[str, Any]:
    return {**model, "name": "ann-marie"}


FAILED_LOOKS = [
    pytest.param(respond(400), id="400"),
    pytest.param(respond_json(500, {"message": "Oops"}), id="500"),
    pytest.param(respond(503), id="503"),
    pytest.param(redirect("http://127.0.0.1:1/"), id="redirect"),
    pytest.param(reset(), id="reset"),
    pytest.param(reset_in_body(), id="reset in the body"),
    pytest.param(truncated(), id="half an answer"),
    pytest.param(empty(), id="empty"),
    pytest.param(html(), id="HTML"),
    pytest.param(respond_json(200, []), id="list"),
    pytest.param(respond_json(200, None), id="null"),
    pytest.param(respond_json(200, {}), id="no name"),
    pytest.param(edited(renamed), id="another user"),
    pytest.param(respond(200, b"[" * 100_000), id="deep"),
]


@pytest.mark.parametrize("look", FAILED_LOOKS)
def test_a_second_look_that_fails_keeps_the_server(cull_scripted: Cull, scripted: ScriptedHub, look: Reply) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", look, times=None)
    result = cull_scripted("--timeout", "1h")
    assert scripted.running() == {"ann"}
    assert "DELETE /users/ann/server" not in scripted.lines()
    assert result.exit_code == 1
    assert result.said["ann"][:2] == ("ERROR", "failed")
    (error,) = result.errors
    assert "idle 2h, limit 1h" in error
    assert "GET /users/ann" in error


@pytest.mark.parametrize("look", FAILED_LOOKS)
def test_a_second_look_that_fails_keeps_the_user(cull_scripted: Cull, scripted: ScriptedHub, look: Reply) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", look, times=None)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert scripted.lines("DELETE") == []
    assert result.exit_code == 1
    assert result.said["user ann"][:2] == ("ERROR", "failed")
    (error,) = result.errors
    assert "idle 2h, limit 1h" in error
    assert "GET /users/ann" in error


def test_a_second_look_that_hangs_keeps_the_server(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", hang(), times=None)
    result = cull_scripted("--timeout", "1h", "--request-timeout", "0.3")
    assert result.exit_code == 1
    assert scripted.lines("DELETE") == []


def test_a_second_look_that_fails_for_a_moment_is_taken_again(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", respond(503), reset(), respond(502))
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert scripted.running() == set()


def test_two_servers_of_a_user_are_judged_each_by_itself(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    gpu = scripted.add("ann", "gpu", idle=LONG_AGO)
    on_look(scripted, lambda: setattr(gpu, "last_activity", scripted.now))
    result = cull_scripted("--timeout", "1h", "--cull-users", "--concurrency", "1")
    assert result.exit_code == 0
    assert scripted.running() == {"ann/gpu"}
    assert "ann" in scripted.users


# Users


@pytest.mark.parametrize("state", [{}, {"ready": False, "pending": "spawn"}, {"ready": False, "pending": "stop"}])
def test_a_user_with_a_server_again_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub, state: dict[str, Any]
) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    on_look(scripted, lambda: scripted.add("ann", idle=LONG_AGO, **state))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert scripted.lines("DELETE") == []
    assert result.outcomes == {"user ann": "spared"}


def test_a_user_without_servers_that_comes_back_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    on_look(scripted, lambda: scripted.touch("ann"))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.lines("DELETE") == []
    assert result.outcomes == {"user ann": "spared"}


def test_a_user_who_was_created_anew_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    on_look(scripted, lambda: scripted.add_user("ann", idle=LONG_AGO, age=LONG_AGO))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert "DELETE /users/ann" not in scripted.lines()
    assert result.said["user ann"][:2] == ("INFO", "spared")


def test_a_user_whose_servers_are_stopped_is_deleted_once_the_limit_has_passed_since_then(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    """The Hub counts a stop as activity."""
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("ann", "gpu", idle=LONG_AGO)
    passes = []
    for minutes in (0, 59, 2):
        scripted.now += timedelta(minutes=minutes)
        passes.append(cull_scripted("--timeout", "1h", "--cull-users").outcomes)
    assert passes == [{"ann": "culled", "ann/gpu": "culled"}, {}, {"user ann": "deleted"}]


@pytest.mark.parametrize("garbage", [{"last_activity": "garbage"}, {"admin": None}], ids=["activity", "admin"])
def test_a_user_in_doubt_at_the_second_look_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub, garbage: dict[str, object]
) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", edited(lambda model: {**model, **garbage}))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert (result.exit_code, scripted.lines("DELETE")) == (0, [])
    assert result.said["user ann"][:2] == ("WARNING", "spared")


def test_a_user_who_became_an_admin_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    user = scripted.add_user("ann", idle=LONG_AGO)
    on_look(scripted, lambda: setattr(user, "admin", True))
    result = cull_scripted("--timeout", "1h", "--cull-users", "--cull-admin-users=false")
    assert scripted.lines("DELETE") == []
    assert result.outcomes == {"user ann": "spared"}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--cull-named-servers=false"], id="named servers are kept"),
        pytest.param(["--cull-default-servers=false"], id="default servers are kept"),
    ],
)
def test_a_user_with_a_server_that_is_not_due_is_not_due(
    cull_scripted: Cull, scripted: ScriptedHub, arguments: list[str]
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("ann", "gpu", idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h", "--cull-users", *arguments)
    assert result.exit_code == 0
    assert len(scripted.lines("DELETE")) == 1
    assert "ann" in scripted.users
    assert result.counts == {"running": 2, "due": 1, "culled": 1}


@pytest.mark.parametrize("state", [{"ready": False, "pending": "spawn"}, {"ready": False, "pending": "stop"}])
def test_a_user_whose_server_is_starting_or_stopping_is_not_due(
    cull_scripted: Cull, scripted: ScriptedHub, state: dict[str, Any]
) -> None:
    scripted.add("ann", idle=LONG_AGO, **state)
    assert cull_scripted("--timeout", "1h", "--cull-users").exit_code == 0
    assert scripted.lines("DELETE") == []
