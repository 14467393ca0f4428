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


EACH_HUB = pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.stem)


def test_there_is_a_recording_of_each_hub() -> None:
    assert len(RECORDINGS) == 12


@EACH_HUB
def test_each_hubs_servers_and_users_are_understood(recording: Path) -> None:
    """The servers of ann are running, bob has none, and that of slowstop, which is stopping, may be hidden."""
    users = users_of(recording)
    user, *servers = users["ann"]
    assert (user.server, user.admin, user.doubt) == (None, False, "")
    version = recording.stem.removeprefix("hub-")
    old = version < "0.9"
    named = version not in ("0.6.1", "0.7.2", "0.8.1")
    assert [str(server) for server in servers] == (["ann", "ann/gpu"] if named else ["ann"])
    for server in servers:
        assert (server.ready, server.pending, server.doubt, server.born is None) == (True, "", "", old)
        assert server.active is not None
        assert server.active.tzinfo == UTC
    assert len(users["bob"]) == 1
    stopping = [(server.ready, server.pending) for server in users["slowstop"][1:]]
    assert stopping == ([(False, "stop")] if version >= "1.5" else [])


@EACH_HUB
def test_a_user_alone_is_described_as_in_the_list(recording: Path) -> None:
    alone, listed = parse_user(answer(recording, "GET /users/ann")), users_of(recording)["ann"]
    assert (alone[0].admin, *map(state_of, alone)) == (listed[0].admin, *map(state_of, listed))


def without_dropped(model: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in model.items() if value is not DROP}


MOMENT = "2026-11-22T20:00:00Z"
WHEN = datetime(2026, 11, 22, 20, tzinfo=UTC)
SERVER = {"last_activity": MOMENT, "started": MOMENT, "pending": None, "ready": True, "url": "/user/ann/"}
ANN = {"name": "ann", "admin": False, "created": MOMENT, "last_activity": MOMENT}


OLD = {"name": "ann", "admin": False, "last_activity": MOMENT}  # JupyterHub 0.6 to 0.8
PENDING = ("ann", False, "spawn", None, WHEN, False)


@pytest.mark.parametrize(
    ("model", "servers"),
    [
        pytest.param(
            {**ANN, "servers": {"": {**SERVER, "last_activity": None}}},
            [("ann", True, "", WHEN, WHEN, False)],
            id="a server that was never active is as old as its start",
        ),
        pytest.param(
            {**ANN, "pending": "stop", "servers": {"": {**SERVER, "pending": "stop"}}},
            [("ann", True, "stop", WHEN, WHEN, False)],
            id="a pending user with a default server says nothing new of it",
        ),
        pytest.param(
            {**OLD, "servers": {"gpu": {"name": "gpu", "url": "/x"}}},
            [("ann/gpu", True, "", None, WHEN, False)],
            id="a server without activity of its own uses the user's, in 0.8",
        ),
        pytest.param(
            {**OLD, "server": None, "pending": "spawn"}, [PENDING], id="a pending user makes a pending server, in 0.6"
        ),
        pytest.param(
            {**OLD, "server": None, "pending": "spawn", "servers": {}},
            [PENDING],
            id="a pending user whose default server is not listed has a pending one, in 0.8",
        ),
    ],
)
def test_servers(model: dict[str, Any], servers: list[tuple[object, ...]]) -> None:
    assert list(map(state_of, servers_of(model))) == servers


def test_a_user_who_was_never_active_is_as_old_as_its_creation() -> None:
    assert parse_user({**ANN, "last_activity": None, "servers": {}})[0].active == WHEN


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
    (server,) = servers_of({**ANN, "servers": {"gpu": without_dropped({**SERVER, **changes})}})
    assert state_of(server) == state


@pytest.mark.parametrize("model", [None, 7, "x", []])
def test_a_server_that_is_not_an_object_is_in_doubt(model: object) -> None:
    assert list(map(state_of, servers_of({**ANN, "servers": {"gpu": model}}))) == [UNKNOWN]


@pytest.mark.parametrize(
    ("changes", "created", "last_activity"),
    [
        ({"last_activity": "garbage"}, None, None),
        ({"created": 7}, None, None),
        ({"last_activity": None, "created": None}, None, None),
        ({"last_activity": DROP}, WHEN, WHEN),
        *(({"admin": admin}, WHEN, WHEN) for admin in (DROP, None, 0, "no")),
        ({"created": 7, "admin": None}, None, None),
    ],
)
def test_a_user_with_a_field_that_is_missing_or_garbage_is_in_doubt(
    changes: dict[str, object], created: datetime | None, last_activity: datetime | None
) -> None:
    model = {**ANN, "server": "/user/ann/", "servers": {}, **changes}  # JupyterHub 2 shows `server` to read:users
    user, *_ = parse_user(without_dropped(model))
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
    states = list(map(state_of, servers_of(without_dropped({**ANN, **servers}))))
    assert states == [("ann", False, "", None, None, True)]


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
