"""Each command line of jupyterhub-idle-culler leaves the same servers and users behind here.

The one intended difference: a user whose server is stopped is deleted by a later pass.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import pytest
from hub import RealHub, full_name
from reference import REFERENCE_ONCE
from runs import Cull

MINUTE, HOUR, DAY = 60, 3600, 86400
USER_ACTIVE = {"user_idle_seconds": MINUTE, "user_age_seconds": 3 * HOUR}
USER_IDLE = {"user_idle_seconds": 2 * HOUR, "user_age_seconds": 3 * HOUR}
USER_OLD = {"user_idle_seconds": MINUTE, "user_age_seconds": 3 * DAY}
IDLE: dict[str, Any] = {"idle_seconds": 2 * HOUR, "age_seconds": 3 * HOUR, **USER_IDLE}
BUSY: dict[str, Any] = {"idle_seconds": MINUTE, "age_seconds": 2 * HOUR, **USER_ACTIVE}
OLD_AND_BUSY: dict[str, Any] = {"idle_seconds": MINUTE, "age_seconds": 2 * DAY, **USER_OLD}

READY: Mapping[tuple[str, str], Mapping[str, object]] = {
    ("ann", ""): IDLE,
    ("ann", "gpu"): IDLE,
    ("bob", ""): BUSY,
    ("cat", ""): IDLE | USER_ACTIVE,
    ("cat", "gpu"): BUSY,
    ("dan", ""): OLD_AND_BUSY,
    ("eve", "gpu"): OLD_AND_BUSY,
    ("fay", "gpu"): IDLE,
    ("ida", "gpu"): IDLE | USER_ACTIVE,
    ("root", ""): IDLE,
    ("boss", ""): OLD_AND_BUSY,
}
STARTING: Mapping[tuple[str, str], Mapping[str, object]] = {
    ("fay", ""): {"start_seconds": 600, **IDLE},
    ("gus", ""): {"start_seconds": 600, **IDLE},
}
USERS: Mapping[str, Mapping[str, Any]] = {
    "admin-idle": {"admin": True, "idle_seconds": 2 * HOUR, "age_seconds": 3 * HOUR},
    "admin-old": {"admin": True, "idle_seconds": MINUTE, "age_seconds": 3 * DAY},
    "idle": {"idle_seconds": 2 * HOUR, "age_seconds": 3 * HOUR},
    "never-active": {"age_seconds": 3 * HOUR},
    "new": {"age_seconds": MINUTE},
    "old": {"idle_seconds": MINUTE, "age_seconds": 3 * DAY},
    "root": {"admin": True},
    "boss": {"admin": True},
}

# As Zero to JupyterHub's jupyterhub_config.py builds it, from cull: timeout, every, concurrency, users, adminUsers,
# removeNamedServers and maxAge, of which those that are 0, or true for adminUsers, are left out.
Z2JH = "--url=http://localhost:8081/hub/api --timeout=3600 --cull-every=600 --concurrency=10"
# As The Littlest JupyterHub's configurer.py does, from services.cull. The Hub's $JUPYTERHUB_API_URL says where it is.
TLJH = "--timeout=3600 --cull-every=600 --concurrency=10"

COMMAND_LINES = [
    # of issue 4
    f"{Z2JH} --cull-users --cull-admin-users=false --remove-named-servers --max-age=0",
    Z2JH,
    f"{Z2JH} --cull-users --cull-admin-users=false",
    f"{Z2JH} --cull-admin-users=false --remove-named-servers",
    f"{Z2JH} --cull-users --remove-named-servers --max-age=86400",
    f"{TLJH} --max-age=0 --cull-users",
    f"{TLJH} --max-age=86400 --remove-named-servers",
    # of cull_idle_servers.py
    "--timeout=600 --cull_every=300 --cull_users=true",
    "--timeout=3600 --cull_every=300 --remove_named_servers --cull_admin_users=false",
    # with the names of its settings
    "--IdleCuller.timeout=600",
    "--IdleCuller.timeout=600 --IdleCuller.cull_users=True --IdleCuller.cull_named_servers=False",
    # of others
    "--timeout=600 --cull-named-servers=false --cull-users",
    "--timeout=600 --cull-default-servers=false --cull-users --remove-named-servers",
    "--timeout=10000000 --max-age=10000 --api-page-size=2",
    "--timeout=0 --cull-every=600 --cull-users --api-page-size=3",
]


# The exceptions, with the users and servers that only cull_idle.py keeps. With --max-age, the reference also culls what
# other options exempt: admins, and named or default servers.
WHERE_THE_REFERENCE_IS_WRONG: list[tuple[str, set[str], set[str]]] = [
    (f"{Z2JH} --cull-users --cull-admin-users=false --max-age=86400", {"admin-old", "boss"}, set()),
    (f"{TLJH} --max-age=86400 --cull-named-servers=false", set(), {"eve/gpu is ready"}),
    (f"{TLJH} --max-age=86400 --cull-default-servers=false", set(), {"boss is ready", "dan is ready"}),
]


class Left(NamedTuple):
    """The users and servers on a Hub after a pass."""

    users: set[str]
    servers: set[str]  # full names, with what the Hub says of each


def left(hub: RealHub) -> Left:
    users = hub.api("GET", "/users?include_stopped_servers&limit=200").json()["items"]
    return Left(
        {user["name"] for user in users},
        {
            f"{full_name(user['name'], name)} is {'ready' if server['ready'] else server['pending'] or 'stopped'}"
            for user in users
            for name, server in user["servers"].items()
            if name or not server["stopped"]
        },
    )


def bring_back(hub: RealHub) -> None:
    """Add the users and start the servers that are not there."""
    there = {(user["name"], server) for user in hub.models("users") for server in user["servers"]}
    for name in USERS.keys() - hub.users():
        hub.add_user(name, **USERS[name])
    for servers in (STARTING, READY):
        if missing := servers.keys() - there:
            hub.spawn_many(((*key, servers[key]) for key in missing), wait=servers is READY)


class Hubs(NamedTuple):
    """Two Hubs, equal until they are culled."""

    reference: RealHub
    ours: RealHub


@pytest.fixture(scope="module")
def both() -> Iterator[Hubs]:
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        yield Hubs(*pool.map(lambda _: stack.enter_context(RealHub()), range(2)))


@pytest.fixture
def hubs(both: Hubs) -> Hubs:
    """The same users and servers on two Hubs."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(bring_back, both))
    assert left(both.reference) == left(both.ours)
    return both


class Passes(NamedTuple):
    """What passes have left behind."""

    theirs: Left
    first: Left  # of ours
    ours: Left  # by another pass, once all whom the reference has deleted are idle for long enough again


class CullBoth(Protocol):
    """Culls one Hub with the reference, the other one with cull_idle.py."""

    def __call__(self, command_line: str) -> Passes: ...


@pytest.fixture
def cull_both(hubs: Hubs, cull: Cull, tmp_path: Path) -> CullBoth:
    def run(command_line: str) -> Passes:
        words = command_line.split()
        unwanted = ("JUPYTERHUB_", "COV")  # nor is the reference to be measured
        environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        with subprocess.Popen(
            [sys.executable, "-c", REFERENCE_ONCE, *for_hub(hubs.reference, map(as_2_0_0_takes_it, words))],
            env={**environment, **managed(hubs.reference), "JUPYTERHUB_API_TOKEN": hubs.reference.user_culler_token},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as reference:
            first = cull_ours(words)
            out, err = reference.communicate(timeout=60)
        assert reference.returncode == 0, err
        assert re.fullmatch(r"[\d.]+\n", out), err  # how long its pass took
        assert not re.search("Traceback|no effect", err), err
        theirs = left(hubs.reference)
        hubs.ours.make_idle(*first.users - theirs.users)
        return Passes(theirs, first, cull_ours(words))

    def cull_ours(words: list[str]) -> Left:
        args = for_hub(hubs.ours, words)
        result = cull("--once", *args, token=hubs.ours.user_culler_token, env=managed(hubs.ours))
        assert result.exit_code == 0, result.err
        return left(hubs.ours)

    return run


def managed(hub: RealHub) -> Mapping[str, str]:
    """What the Hub tells a service that it manages."""
    return {"JUPYTERHUB_API_URL": hub.url}


def for_hub(hub: RealHub, words: Iterable[str]) -> list[str]:
    port = urlsplit(hub.url).port
    return [word.replace("//localhost:8081/", f"//localhost:{port}/") for word in words]


def as_2_0_0_takes_it(word: str) -> str:
    """A word of a command line: 2.0.0 refuses bare flags, and lets underscores have no effect."""
    name, equals, value = word.partition("=")
    return f"{name if '.' in name else name.replace('_', '-')}={value if equals else 'true'}"


@pytest.mark.parametrize("command_line", COMMAND_LINES)
def test_a_command_line_leaves_the_same_servers_and_users(hubs: Hubs, cull_both: CullBoth, command_line: str) -> None:
    before = left(hubs.ours)
    theirs, first, ours = cull_both(command_line)
    assert ours == theirs
    assert ours != before
    later = first.users - theirs.users
    assert later <= {user for user, _ in READY}
    servers = {f"{full_name(*key)} is stopped" for key in READY if key[0] in later}
    assert theirs.servers <= first.servers <= theirs.servers | servers


@pytest.mark.parametrize(("command_line", "users", "servers"), WHERE_THE_REFERENCE_IS_WRONG)
def test_max_age_does_not_cull_what_other_options_exempt(
    cull_both: CullBoth, command_line: str, users: set[str], servers: set[str]
) -> None:
    theirs, _, ours = cull_both(command_line)
    assert ours.users - theirs.users == users
    assert ours.servers - theirs.servers == servers
    assert theirs.users <= ours.users
