"""User models: recorded answers of every Hub since 0.6, and garbage."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_hub import DROP

from cull_idle import Target, parse_user

RECORDINGS = sorted((Path(__file__).parents[1] / "recordings").glob("hub-*.json"))


def answer(recording: Path, request: str) -> Any:
    """The recorded answer to a request."""
    return next(each["body"] for each in json.loads(recording.read_text()) if each["request"] == request)


def users_of(recording: Path) -> dict[str, list[Target]]:
    """The user and the servers, by the names of users."""
    body = answer(recording, "GET /users")
    models = body if isinstance(body, list) else body["items"]
    return {user.user: [user, *servers] for user, *servers in map(parse_user, models)}


def servers_of(model: object) -> list[Target]:
    return parse_user(model)[1:]


def state_of(target: Target) -> tuple[object, ...]:
    return (str(target), target.ready, target.pending, target.born, target.active, bool(target.doubt))


@pytest.fixture(params=RECORDINGS, ids=lambda path: path.stem)
def recording(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_there_is_a_recording_of_each_hub() -> None:
    assert len(RECORDINGS) == 12


def test_each_hubs_running_servers_are_ready_and_their_times_known(recording: Path) -> None:
    user, *servers = users_of(recording)["ann"]
    assert (user.server, user.admin, user.doubt) == (None, False, "")
    named = recording.stem not in ("hub-0.6.1", "hub-0.7.2", "hub-0.8.1")
    assert [str(server) for server in servers] == (["ann", "ann/gpu"] if named else ["ann"])
    for server in servers:
        assert (server.ready, server.pending, server.doubt) == (True, "", "")
        assert server.active is not None
        assert server.active.tzinfo == UTC
        assert (server.born is None) == recording.stem.startswith(("hub-0.6", "hub-0.7", "hub-0.8"))


def test_each_hubs_user_without_a_server_has_none(recording: Path) -> None:
    assert len(users_of(recording)["bob"]) == 1


def test_each_hub_shows_a_server_in_the_middle_of_stopping_as_pending_or_not_at_all(recording: Path) -> None:
    _, *servers = users_of(recording)["slowstop"]
    assert [(server.ready, server.pending) for server in servers] in ([], [(False, "stop")])


def test_a_user_alone_is_described_as_in_the_list(recording: Path) -> None:
    alone, listed = parse_user(answer(recording, "GET /users/ann")), users_of(recording)["ann"]
    assert alone[0].admin == listed[0].admin
    assert list(map(state_of, alone)) == list(map(state_of, listed))


MOMENT = "2026-11-22T20:00:00Z"
WHEN = datetime(2026, 11, 22, 20, tzinfo=UTC)
SERVER = {"last_activity": MOMENT, "started": MOMENT, "pending": None, "ready": True, "url": "/user/ann/"}
ANN = {"name": "ann", "admin": False, "created": MOMENT, "last_activity": MOMENT}


def the_server(**changes: object) -> Target:
    return parse_user({**ANN, "servers": {"": {**SERVER, **changes}}})[1]


def test_a_server_that_was_never_active_is_as_old_as_its_start() -> None:
    assert the_server(last_activity=None).active == WHEN


def test_a_user_who_was_never_active_is_as_old_as_its_creation() -> None:
    assert parse_user({**ANN, "last_activity": None, "servers": {}})[0].active == WHEN


def test_a_server_without_activity_of_its_own_uses_the_users() -> None:  # JupyterHub 0.8
    model = {"name": "ann", "admin": False, "last_activity": MOMENT, "servers": {"gpu": {"name": "gpu", "url": "/x"}}}
    assert list(map(state_of, servers_of(model))) == [("ann/gpu", True, "", None, WHEN, False)]


def test_a_pending_user_of_old_makes_a_pending_server() -> None:  # JupyterHub 0.6 and 0.7, spawning
    model = {"name": "ann", "admin": False, "last_activity": MOMENT, "server": None, "pending": "spawn"}
    assert list(map(state_of, servers_of(model))) == [("ann", False, "spawn", None, WHEN, False)]


def test_a_pending_user_whose_default_server_is_not_listed_has_a_pending_one() -> None:  # JupyterHub 0.8, named servers
    model = {"name": "ann", "admin": False, "last_activity": MOMENT, "server": None, "pending": "spawn", "servers": {}}
    assert list(map(state_of, servers_of(model))) == [("ann", False, "spawn", None, WHEN, False)]


def test_a_pending_user_with_a_default_server_says_nothing_new_of_it() -> None:  # JupyterHub 0.9 and later
    model = {**ANN, "pending": "stop", "servers": {"": {**SERVER, "pending": "stop"}}}
    assert list(map(state_of, servers_of(model))) == [("ann", True, "stop", WHEN, WHEN, False)]


def test_only_a_server_that_is_called_stopped_is_left_out() -> None:
    servers = {str(value): {**SERVER, "stopped": value} for value in (True, False, None, 1, "true")}
    assert {server.server for server in servers_of({**ANN, "servers": servers})} == set(servers) - {"True"}


# In doubt, and nothing of it is known but its name; or its times, too.
UNKNOWN = ("ann/gpu", False, "", None, None, True)
TIMED = ("ann/gpu", False, "", WHEN, WHEN, True)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"last_activity": "garbage"}, UNKNOWN),
        ({"started": "garbage"}, UNKNOWN),
        ({"last_activity": DROP}, TIMED),
        ({"pending": DROP}, TIMED),
        ({"ready": DROP}, TIMED),
        ({"ready": DROP, "pending": DROP}, TIMED),
        ({"pending": DROP, "last_activity": DROP, "started": DROP}, UNKNOWN),
        ({"ready": DROP, "last_activity": DROP, "started": DROP}, UNKNOWN),
        ({"last_activity": None, "started": None}, UNKNOWN),
        ({"ready": "yes"}, TIMED),
        ({"ready": None}, TIMED),
    ],
)
def test_a_server_with_a_field_that_is_missing_or_garbage_is_in_doubt(
    changes: dict[str, object], state: tuple[object, ...]
) -> None:
    model = {key: value for key, value in {**SERVER, **changes}.items() if value is not DROP}
    (server,) = servers_of({**ANN, "servers": {"gpu": model}})
    assert state_of(server) == state


@pytest.mark.parametrize("model", [None, 7, "x", []])
def test_a_server_that_is_not_an_object_is_in_doubt(model: object) -> None:
    (server,) = servers_of({**ANN, "servers": {"gpu": model}})
    assert state_of(server) == UNKNOWN


@pytest.mark.parametrize(
    ("changes", "created", "last_activity"),
    [
        ({"last_activity": "garbage"}, None, None),
        ({"created": 7}, None, None),
        ({"last_activity": None, "created": None}, None, None),
        ({"last_activity": DROP}, WHEN, WHEN),
        ({"admin": None}, WHEN, WHEN),
        ({"admin": DROP}, WHEN, WHEN),
        ({"created": 7, "admin": None}, None, None),
    ],
)
def test_a_user_with_a_field_that_is_missing_or_garbage_is_in_doubt(
    changes: dict[str, object], created: datetime | None, last_activity: datetime | None
) -> None:
    model = {**ANN, "server": "/user/ann/", "servers": {}, **changes}  # JupyterHub 2 shows `server` to read:users
    user, *_ = parse_user({key: value for key, value in model.items() if value is not DROP})
    assert user.doubt
    assert (user.born, user.active) == (created, last_activity)


@pytest.mark.parametrize(
    "servers",
    [
        {},
        {"server": "/user/ann/"},  # JupyterHub 2, to the scope read:users
        {"servers": None},
        {"servers": []},
        {"servers": "none"},
        {"servers": None, "server": "/user/ann/"},
        {"servers": None, "server": "/user/ann/", "created": DROP},  # not one of JupyterHub 0.8 either
    ],
)
def test_servers_that_are_not_shown_are_one_server_in_doubt(servers: dict[str, object]) -> None:
    model = {key: value for key, value in {**ANN, **servers}.items() if value is not DROP}
    (server,) = servers_of(model)
    assert state_of(server) == ("ann", False, "", None, None, True)


@pytest.mark.parametrize("admin", [DROP, None, 0, "no"])
def test_a_user_who_may_be_an_admin_is_in_doubt(admin: object) -> None:
    model = {key: value for key, value in {**ANN, "servers": {}, "admin": admin}.items() if value is not DROP}
    assert parse_user(model)[0].doubt


@pytest.mark.parametrize("model", [None, 7, "ann", [], {}, {"name": ""}, {"name": 7}])
def test_a_user_without_a_name_is_refused(model: object) -> None:
    with pytest.raises(ValueError, match="name"):
        parse_user(model)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(MOMENT),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = ["admin", "created", "last_activity", "server", "servers", "pending"]
SERVER_KEYS = ["last_activity", "started", "pending", "ready", "stopped", "url"]


@given(
    st.dictionaries(st.sampled_from(KEYS), JSON),
    st.none() | st.dictionaries(st.text(), st.dictionaries(st.sampled_from(SERVER_KEYS), JSON) | JSON),
)
def test_any_json_object_with_a_name_is_read(user: dict[str, Any], servers: dict[str, Any] | None) -> None:
    for target in parse_user({"name": "ann", **user, **({} if servers is None else {"servers": servers})}):
        assert target.doubt or target.active
        assert str(target).isprintable()
