"""Each command line of jupyterhub-idle-culler leaves the same servers and users behind here.

The one intended difference: a user whose server is stopped is deleted by a later pass.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

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


class Row(NamedTuple):
    """A command line, and the users and servers that only cull_idle.py keeps."""

    command_line: str
    users: Set[str] = frozenset()
    servers: Set[str] = frozenset()


ROWS = [
    # of issue 4
    Row(f"{Z2JH} --cull-users --cull-admin-users=false --remove-named-servers --max-age=0"),
    Row(Z2JH),
    Row(f"{Z2JH} --cull-users --cull-admin-users=false"),
    Row(f"{Z2JH} --cull-admin-users=false --remove-named-servers"),
    Row(f"{Z2JH} --cull-users --remove-named-servers --max-age=86400"),
    Row(f"{TLJH} --max-age=0 --cull-users"),
    Row(f"{TLJH} --max-age=86400 --remove-named-servers"),
    # of cull_idle_servers.py
    Row("--timeout=600 --cull_every=300 --cull_users=true"),
    Row("--timeout=3600 --cull_every=300 --remove_named_servers --cull_admin_users=false"),
    # with the names of its settings
    Row("--IdleCuller.timeout=600"),
    Row("--IdleCuller.timeout=600 --IdleCuller.cull_users=True --IdleCuller.cull_named_servers=False"),
    # of others
    Row("--timeout=600 --cull-named-servers=false --cull-users"),
    Row("--timeout=600 --cull-default-servers=false --cull-users --remove-named-servers"),
    Row("--timeout=10000000 --max-age=10000 --api-page-size=2"),
    Row("--timeout=0 --cull-every=600 --cull-users --api-page-size=3"),
    # With --max-age, the reference also culls what other options exempt: admins, and named or default servers.
    Row(f"{Z2JH} --cull-users --cull-admin-users=false --max-age=86400", users={"admin-old", "boss"}),
    Row(f"{TLJH} --max-age=86400 --cull-named-servers=false", servers={"eve/gpu is ready"}),
    Row(f"{TLJH} --max-age=86400 --cull-default-servers=false", servers={"boss is ready", "dan is ready"}),
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


def arguments(hub: RealHub, words: Iterable[str]) -> list[str]:
    return [word.replace("//localhost:8081/hub/api", hub.url.partition(":")[2]) for word in words]


def as_2_0_0_takes_it(word: str) -> str:
    """A word of a command line: 2.0.0 refuses bare flags, and lets underscores have no effect."""
    name, equals, value = word.partition("=")
    return f"{name if '.' in name else name.replace('_', '-')}={value if equals else 'true'}"


def run_the_reference(hub: RealHub, words: Iterable[str]) -> Left:
    result = subprocess.run(
        [sys.executable, "-c", REFERENCE_ONCE, *arguments(hub, map(as_2_0_0_takes_it, words))],
        env={"JUPYTERHUB_API_URL": hub.url, "JUPYTERHUB_API_TOKEN": hub.user_culler_token},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert re.fullmatch(r"[\d.]+\n", result.stdout), result.stderr  # how long its pass took
    assert not re.search("Traceback|no effect", result.stderr), result.stderr
    return left(hub)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.command_line)
def test_a_command_line_leaves_the_same_servers_and_users(both: Hubs, cull: Cull, row: Row) -> None:
    def run_ours() -> Left:
        hub = both.ours
        env = {"JUPYTERHUB_API_URL": hub.url}  # what the Hub tells a service that it manages
        result = cull("--once", *arguments(hub, words), token=hub.user_culler_token, env=env)
        assert result.exit_code == 0, result.err
        return left(hub)

    words = row.command_line.split()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(bring_back, both))
        before = left(both.ours)
        assert left(both.reference) == before
        reference = pool.submit(run_the_reference, both.reference, words)
        first = run_ours()
        theirs = reference.result()
    later = first.users - theirs.users - row.users
    both.ours.make_idle(*later)
    ours = run_ours()
    stopped = {server.replace("ready", "stopped") for server in row.servers if "/" in server}
    assert (ours.users - theirs.users, theirs.users - ours.users) == (row.users, set())
    assert (ours.servers - theirs.servers, theirs.servers - ours.servers) == (row.servers, stopped)
    assert ours != before
    # Only users whose servers were just stopped are deleted later.
    assert later <= {user for user, _ in READY}
    servers = {f"{full_name(*key)} is stopped" for key in READY if key[0] in later}
    assert first.servers - theirs.servers <= servers | row.servers
