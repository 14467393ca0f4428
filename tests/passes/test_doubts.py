"""A server or user that the Hub describes unclearly is kept and reported; the rest is culled."""

from __future__ import annotations

from typing import Any

import pytest
from runs import Cull
from scripted_hub import DROP, LONG_AGO, ScriptedHub, edited

GARBAGE: list[Any] = [5, "", "yesterday", "2026-13-45T99:99:99Z", "2026-11-22", [], {}]
NO_BOOLEANS: list[Any] = [None, 1, "no", []]


def with_items(*items: object) -> Any:
    """The user list with these items before its own."""
    return edited(lambda body: {**body, "items": [*items, *body["items"]]})


UNCLEAR_SERVERS = [
    *(pytest.param({"last_activity": value}, id=f"last_activity {value!r}") for value in GARBAGE),
    *(pytest.param({"started": value}, id=f"started {value!r}") for value in GARBAGE),
    *(pytest.param({"ready": value}, id=f"ready {value!r}") for value in NO_BOOLEANS),
    pytest.param({"last_activity": None, "started": None}, id="both times null"),
    pytest.param({"last_activity": None, "started": DROP}, id="one time null, one missing"),
]


@pytest.mark.parametrize("extra", UNCLEAR_SERVERS)
def test_a_server_with_unclear_values_is_kept_and_reported(
    cull_scripted: Cull, scripted: ScriptedHub, extra: dict[str, Any]
) -> None:
    scripted.add("ann", idle=LONG_AGO, extra=extra)
    scripted.add("bob", idle=LONG_AGO)
    result = cull_scripted("--timeout", "0", "--max-age", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert result.doubts.number == 1
    assert result.doubts.first.startswith("ann: ")
    assert len(result.warnings) == 1


@pytest.mark.parametrize("key", ["last_activity", "ready", "pending"])
def test_a_server_without_a_key_that_decides_is_kept_and_reported(
    cull_scripted: Cull, scripted: ScriptedHub, key: str
) -> None:
    scripted.add("ann", idle=LONG_AGO, extra={key: DROP})
    scripted.users["ann"].extra = {"last_activity": DROP, "pending": DROP}
    scripted.add("bob", idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert result.doubts.number == 1
    assert result.doubts.first.startswith("ann: ")
    assert len(result.warnings) == 1


@pytest.mark.parametrize("model", [None, [], "up", 5, True])
def test_a_server_that_is_no_object_is_kept_and_reported(
    cull_scripted: Cull, scripted: ScriptedHub, model: object
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.users["ann"].extra = {"servers": {"": model}}
    scripted.add("bob", idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert result.doubts.number == 1
    assert result.doubts.first.startswith("ann: ")
    assert len(result.warnings) == 1


@pytest.mark.parametrize("arguments", [[], ["--cull-users"]], ids=["servers only", "users too"])
@pytest.mark.parametrize("servers", [DROP, None, [], [{"name": ""}], "none", 0, False])
def test_a_user_whose_servers_are_unclear_is_kept_and_reported(
    cull_scripted: Cull, scripted: ScriptedHub, servers: object, arguments: list[str]
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.users["ann"].extra = {"servers": servers}
    scripted.add("bob", idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h", *arguments)
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert "ann" in scripted.users
    assert result.doubts.number == 1
    assert result.doubts.first.startswith("ann: ")
    assert len(result.warnings) == 1


UNCLEAR_USERS = [
    *(pytest.param({"last_activity": value}, id=f"last_activity {value!r}") for value in GARBAGE),
    *(pytest.param({"created": value}, id=f"created {value!r}") for value in GARBAGE),
    pytest.param({"last_activity": None, "created": None}, id="both times null"),
    pytest.param({"last_activity": None, "created": DROP}, id="one time null, one missing"),
    pytest.param({"last_activity": DROP}, id="no last_activity"),
    pytest.param({"last_activity": DROP, "created": DROP}, id="no times"),
    pytest.param({"admin": DROP}, id="no admin"),
    *(pytest.param({"admin": value}, id=f"admin {value!r}") for value in NO_BOOLEANS),
]


@pytest.mark.parametrize("extra", UNCLEAR_USERS)
def test_an_unclear_user_is_never_deleted(cull_scripted: Cull, scripted: ScriptedHub, extra: dict[str, Any]) -> None:
    scripted.add_user("ann", idle=LONG_AGO, extra=extra)
    scripted.add_user("bob", idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert set(scripted.users) == {"ann"}
    assert result.doubts.number == 1
    assert result.doubts.first.startswith("user ann: ")
    assert len(result.warnings) == 1


@pytest.mark.parametrize("extra", UNCLEAR_USERS[::5])
def test_the_servers_of_an_unclear_user_are_culled(
    cull_scripted: Cull, scripted: ScriptedHub, extra: dict[str, Any]
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.users["ann"].extra = extra
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.running() == set()
    assert set(scripted.users) == {"ann"}


@pytest.mark.parametrize(
    "model", [None, [], "ann", 17, True, {}, {"name": ""}, {"name": None}, {"name": 5}, {"name": ["ann"]}], ids=repr
)
def test_a_user_without_a_name_is_reported(cull_scripted: Cull, scripted: ScriptedHub, model: object) -> None:
    scripted.add("bob", idle=LONG_AGO)
    scripted.fault("GET", "/users", with_items(model))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.running() == set()
    assert result.doubts.number == 1
    assert len(result.warnings) == 1


def test_many_doubts_make_one_line_with_their_count_and_the_first(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for name in ("ann", "bob", "cat"):
        scripted.add(name, idle=LONG_AGO, extra={"last_activity": f"{name}'s garbage"})
    scripted.add("dan", idle=LONG_AGO)
    scripted.page_max = 2
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 0
    assert result.doubts.number == 3
    assert result.doubts.first.startswith("ann: ")
    assert "ann's garbage" in result.doubts.first
    assert len(result.warnings) == 1
    assert "bob" not in result.err
    assert scripted.running() == {"ann", "bob", "cat"}


def test_without_doubts_there_is_no_warning(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO, last_activity=None)
    scripted.add("cat")
    scripted.users["bob"].last_activity = None
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert result.warnings == []
    assert scripted.running() == {"cat"}


def test_a_server_that_was_never_active_is_judged_from_its_start(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("new", age=60, last_activity=None)
    scripted.add("old", age=LONG_AGO, last_activity=None)
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert scripted.running() == {"new"}


def test_a_user_who_was_never_active_is_judged_from_its_creation(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("new", idle=None, age=60)
    scripted.add_user("old", idle=None, age=LONG_AGO)
    assert cull_scripted("--timeout", "1h", "--cull-users").exit_code == 0
    assert set(scripted.users) == {"new"}


def test_a_server_active_in_the_future_is_not_idle(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=-LONG_AGO)
    scripted.add("bob", last_activity="9999-12-31T23:59:59.999999-23:59")
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert scripted.running() == {"ann", "bob"}


def test_a_server_that_the_hub_calls_stopped_is_left_out(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", "gpu", idle=LONG_AGO, extra={"stopped": True, "ready": False})
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.lines("DELETE") == ["DELETE /users/ann"]
    assert result.warnings == []


@pytest.mark.parametrize(
    "state", [{"ready": False}, {"pending": "spawn"}, {"pending": "stop", "ready": False}], ids=str
)
def test_a_server_that_is_not_ready_or_is_pending_is_kept_without_a_doubt(
    cull_scripted: Cull, scripted: ScriptedHub, state: dict[str, Any]
) -> None:
    scripted.add("ann", idle=LONG_AGO, extra=state)
    result = cull_scripted("--timeout", "0", "--max-age", "1h", "--cull-users")
    assert result.exit_code == 0
    assert scripted.lines("DELETE") == []
    assert result.warnings == []


# Admins


def add_admin(scripted: ScriptedHub) -> None:
    scripted.add_user("root", idle=LONG_AGO, admin=True)
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.add("boss", idle=LONG_AGO)
    scripted.users["boss"].admin = True


def test_admins_are_kept_when_told_but_their_servers_are_stopped(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    add_admin(scripted)
    assert cull_scripted("--timeout", "1h", "--cull-users", "--cull-admin-users=false").exit_code == 0
    assert set(scripted.users) == {"root", "boss"}
    assert scripted.running() == set()


@pytest.mark.parametrize("arguments", [[], ["--cull-admin-users"], ["--cull-admin-users=true"]])
def test_admins_are_deleted_by_default(cull_scripted: Cull, scripted: ScriptedHub, arguments: list[str]) -> None:
    add_admin(scripted)
    assert cull_scripted("--timeout", "1h", "--cull-users", *arguments).exit_code == 0
    assert set(scripted.users) == {"boss"}


def test_without_cull_users_nobody_is_deleted(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    add_admin(scripted)
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert set(scripted.users) == {"root", "ann", "boss"}
