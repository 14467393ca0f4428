"""The second look, right before each DELETE: whoever changed since the scan is spared."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from conftest import Cull
from scripted_hub import (
    FROM_CLOCK,
    LONG_AGO,
    Answer,
    Exchange,
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


def on_look(scripted: ScriptedHub, hook: Callable[[], object]) -> None:
    """Call `hook` when ann is looked at, before the Hub answers."""
    scripted.fault("GET", "/users/ann", then_do(hook))


# Servers


def test_a_server_that_comes_back_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    on_look(scripted, lambda: scripted.touch("ann"))
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert any(line.startswith("INFO     spared ann: active again ") for line in result.lines)
    assert "2 due, 1 culled, 1 spared" in result.lines[-1]


def test_a_server_that_was_started_anew_is_spared_even_from_max_age(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    server = scripted.add("ann", idle=LONG_AGO)
    restarted = scripted.now - timedelta(seconds=7200)
    on_look(scripted, lambda: setattr(server, "started", restarted))
    result = cull_scripted("--timeout", "1h", "--max-age", "1h")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert result.lines[0].startswith("INFO     spared ann: ")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        pytest.param(lambda server: setattr(server, "pending", "stop"), "WARNING  stopping ann: ", id="stopping"),
        pytest.param(lambda server: setattr(server, "ready", False), "INFO     gone ann: ", id="stopped"),
        pytest.param(lambda server: setattr(server, "pending", "spawn"), "INFO     spared ann: ", id="starting"),
        pytest.param(
            lambda server: setattr(server, "last_activity", "garbage"), "INFO     spared ann: ", id="garbage time"
        ),
        pytest.param(lambda server: server.extra.update(ready=None), "INFO     spared ann: ", id="garbage ready"),
    ],
)
def test_a_server_that_is_not_ready_any_more_is_left_alone(
    cull_scripted: Cull, scripted: ScriptedHub, change: Change, line: str
) -> None:
    server = scripted.add("ann", idle=LONG_AGO)
    on_look(scripted, lambda: change(server))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert any(said.startswith(line) for said in result.lines)
    assert "DELETE /users/ann/server" not in scripted.lines()


def test_a_server_whose_stop_is_under_way_keeps_its_user(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    server = scripted.add("ann", idle=LONG_AGO, stops=False)

    def stop() -> None:
        server.pending, server.ready = "stop", False

    on_look(scripted, stop)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.lines("DELETE") == []
    assert "INFO     spared user ann: a server is still there" in result.lines


@pytest.mark.parametrize("status", [404, 405])
def test_where_there_is_no_second_look_the_delete_decides(
    cull_scripted: Cull, scripted: ScriptedHub, status: int
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    scripted.fault("GET", "/users/.*", respond(status), times=None)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.users == {}
    assert result.lines[0].startswith("INFO     culled ann: idle 2h, limit 1h")


def test_a_user_and_server_that_are_gone_are_no_failure(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    on_look(scripted, lambda: scripted.users.pop("ann"))
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 0
    assert result.lines[0].startswith("INFO     gone ann: ")


def renamed(model: dict[str, Any]) -> dict[str, Any]:
    return {**model, "name": "ann-marie"}


USELESS_LOOKS = [
    pytest.param(respond(400), id="400"),
    pytest.param(respond_json(403, {"message": "no"}), id="403"),
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


@pytest.mark.parametrize("look", USELESS_LOOKS)
def test_a_second_look_that_shows_nothing_keeps_the_server(
    cull_scripted: Cull, scripted: ScriptedHub, look: Reply
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", look, times=None)
    result = cull_scripted("--timeout", "1h")
    assert scripted.running() == {"ann"}
    assert "DELETE /users/ann/server" not in scripted.lines()
    assert result.exit_code == 1
    (failed,) = [line for line in result.lines if line.startswith("ERROR")]
    assert failed.startswith("ERROR    failed ann: idle 2h, limit 1h; GET /users/ann: ")


@pytest.mark.parametrize("look", USELESS_LOOKS)
def test_a_second_look_that_shows_nothing_keeps_the_user(
    cull_scripted: Cull, scripted: ScriptedHub, look: Reply
) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", look, times=None)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert scripted.lines("DELETE") == []
    assert result.exit_code == 1
    assert result.lines[0].startswith("ERROR    failed user ann: idle 2h, limit 1h; GET /users/ann: ")


def test_a_second_look_that_hangs_keeps_the_server(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", hang(), times=None)
    result = cull_scripted("--timeout", "1h", "--request-timeout", "0.3")
    assert result.exit_code == 1
    assert scripted.lines("DELETE") == []


def test_a_second_look_that_shows_nothing_at_first_is_taken_again(cull_scripted: Cull, scripted: ScriptedHub) -> None:
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


def test_a_user_with_a_server_again_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    on_look(scripted, lambda: scripted.add("ann", idle=LONG_AGO))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert scripted.lines("DELETE") == []
    assert result.lines[0] == "INFO     spared user ann: a server is there again"


def test_a_user_whose_server_comes_back_once_it_was_stopped_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault(
        "GET", "/users/ann", normal(), then_do(lambda: scripted.add("ann", "new", ready=False, pending="spawn"))
    )
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.lines("DELETE") == ["DELETE /users/ann/server"]
    assert any(line.startswith("INFO     spared user ann: ") for line in result.lines)


def test_a_user_without_servers_that_comes_back_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    on_look(scripted, lambda: scripted.touch("ann"))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.lines("DELETE") == []
    assert result.lines[0].startswith("INFO     spared user ann: active again ")


@pytest.mark.parametrize("server", [True, False], ids=["with a server", "without"])
def test_a_user_who_was_created_anew_is_spared(cull_scripted: Cull, scripted: ScriptedHub, server: bool) -> None:
    if server:
        scripted.add("ann", idle=LONG_AGO)
        scripted.fault("GET", "/users/ann", normal())
    else:
        scripted.add_user("ann", idle=LONG_AGO)
    on_look(scripted, lambda: scripted.add_user("ann", idle=LONG_AGO, age=LONG_AGO))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert "DELETE /users/ann" not in scripted.lines()
    assert any(line.startswith("INFO     spared user ann: ") for line in result.lines)


def test_a_user_is_judged_on_the_look_before_its_servers_were_stopped(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    ann = scripted.add("ann", idle=LONG_AGO)
    cull_scripted("--timeout", "1h")
    user = scripted.users["ann"]
    assert isinstance(user.last_activity, type(ann.started))
    assert (scripted.now - user.last_activity).total_seconds() < 60  # type: ignore[operator]
    scripted.add("bob", idle=LONG_AGO)
    scripted.add("bob", "gpu", idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h", "--cull-users", "--concurrency", "1")
    assert set(scripted.users) == {"ann"}
    assert "INFO     deleted user bob: idle 2h, limit 1h" in result.lines


def test_a_user_who_was_active_at_the_look_before_its_servers_were_stopped_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    on_look(scripted, lambda: setattr(scripted.users["ann"], "last_activity", scripted.now))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.lines("DELETE") == ["DELETE /users/ann/server"]
    assert any(line.startswith("INFO     spared user ann: active again ") for line in result.lines)


def test_a_user_who_was_active_after_its_servers_were_stopped_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    later = scripted.now + timedelta(seconds=30)
    log_in = then_do(lambda: setattr(scripted.users["ann"], "last_activity", later))
    scripted.fault("GET", "/users/ann", normal(), log_in)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert scripted.lines("DELETE") == ["DELETE /users/ann/server"]
    assert "INFO     spared user ann: active again 0s ago" in result.lines


def test_a_stop_that_takes_long_is_not_taken_for_an_activity_of_its_user(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.date_header = format_datetime(scripted.now, usegmt=True)  # the Hub dates an answer when it is asked
    scripted.add("ann", idle=LONG_AGO, stop_seconds=1.2)
    cull_scripted("--timeout", "1h", "--cull-users")
    assert scripted.lines("DELETE") == ["DELETE /users/ann/server", "DELETE /users/ann"]


def test_a_user_whose_look_before_the_stop_was_denied_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", respond(404), normal())
    cull_scripted("--timeout", "1h", "--cull-users")
    assert scripted.lines("DELETE") == ["DELETE /users/ann/server"]


def test_a_user_who_was_active_at_the_first_of_several_tries_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    on_look(scripted, lambda: setattr(scripted.users["ann"], "last_activity", scripted.now))
    scripted.fault("DELETE", "/users/ann/server", respond(503), times=2)
    cull_scripted("--timeout", "1h", "--cull-users")
    assert "DELETE /users/ann" not in scripted.lines()


def test_a_user_whose_second_look_is_in_doubt_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    spoil = edited(lambda model: {**model, "last_activity": "garbage"})
    scripted.fault("GET", "/users/ann", normal(), spoil)
    scripted.fault("GET", "/users/bob", spoil)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert set(scripted.users) == {"ann", "bob"}


def test_a_user_who_became_an_admin_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    user = scripted.add_user("ann", idle=LONG_AGO)
    on_look(scripted, lambda: setattr(user, "admin", True))
    result = cull_scripted("--timeout", "1h", "--cull-users", "--cull-admin-users=false")
    assert scripted.lines("DELETE") == []
    assert result.lines[0] == "INFO     spared user ann: admins are not deleted"


def test_a_user_with_a_server_who_became_an_admin_is_spared(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    promote = then_do(lambda: setattr(scripted.users["ann"], "admin", True))
    scripted.fault("GET", "/users/ann", normal(), promote)
    cull_scripted("--timeout", "1h", "--cull-users", "--cull-admin-users=false")
    assert scripted.lines("DELETE") == ["DELETE /users/ann/server"]


@pytest.mark.parametrize(
    ("answer", "exit_code"),
    [
        pytest.param(respond(202), 0, id="stopping"),
        pytest.param(respond(500), 1, id="failed"),
        pytest.param(respond(418), 1, id="refused"),
    ],
)
def test_a_user_is_kept_when_any_server_stays(
    cull_scripted: Cull, scripted: ScriptedHub, answer: Reply, exit_code: int
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("ann", "gpu", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/servers/gpu", answer)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == exit_code
    assert "DELETE /users/ann/server" in scripted.lines()
    assert "DELETE /users/ann" not in scripted.lines()
    assert "INFO     spared user ann: a server is still there" in result.lines


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
    assert "2 running, 1 due, 1 culled" in result.lines[-1]


@pytest.mark.parametrize("state", [{"ready": False, "pending": "spawn"}, {"ready": False, "pending": "stop"}])
def test_a_user_whose_server_is_starting_or_stopping_is_not_due(
    cull_scripted: Cull, scripted: ScriptedHub, state: dict[str, Any]
) -> None:
    scripted.add("ann", idle=LONG_AGO, **state)
    assert cull_scripted("--timeout", "1h", "--cull-users").exit_code == 0
    assert scripted.lines("DELETE") == []


# What a user did while servers were being stopped


def log_in_later(scripted: ScriptedHub, after: timedelta = timedelta(seconds=5)) -> Reply:
    """Ann opens the Hub's home page a little later, before the Hub answers."""

    def hook() -> None:
        scripted.now += after
        scripted.users["ann"].last_activity = scripted.now

    return then_do(hook)


def test_a_login_that_the_look_at_a_second_server_shows_keeps_the_user(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.now = scripted.now.replace(microsecond=0)
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("ann", "gpu", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", normal(), log_in_later(scripted))
    cull_scripted("--timeout=1h", "--cull-users", "--concurrency=1")
    assert "ann" in scripted.users
    assert scripted.running() == set()


def test_a_login_that_the_look_before_a_second_try_shows_keeps_the_user(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.now = scripted.now.replace(microsecond=0)
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", respond(503))
    scripted.fault("GET", "/users/ann", normal(), log_in_later(scripted))
    cull_scripted("--timeout=1h", "--cull-users")
    assert "ann" in scripted.users


def test_the_stop_of_a_server_that_answers_with_no_date_or_anothers_hides_no_login(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.now -= timedelta(hours=1)
    scripted.add("ann", idle=LONG_AGO)

    def dateless(exchange: Exchange) -> Answer:
        scripted.date_header = None
        return exchange.normal()

    def log_in() -> None:
        scripted.date_header = FROM_CLOCK
        scripted.now += timedelta(minutes=2)
        scripted.users["ann"].last_activity = scripted.now

    scripted.fault("DELETE", "/users/ann/server", dateless)
    scripted.fault("GET", "/users/ann", normal(), then_do(log_in))
    cull_scripted("--timeout=1h", "--cull-users")
    assert "ann" in scripted.users


def test_a_date_at_the_end_of_time_is_garbage(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.date_header = "Fri, 31 Dec 9999 23:59:59 GMT"
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=60)
    assert cull_scripted("--timeout=1h", "--cull-users").exit_code == 0
    assert scripted.running() == {"bob"}
