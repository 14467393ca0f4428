"""Random users and servers, random faults, random options: what must hold after every pass.

Users come, go, are active again and are created anew, between passes and in the middle of them. Some Hubs are behind a
proxy that decodes %2F, and an ingress may answer for the Hub with an error of its own. An oracle that is independent of
the program says what may be stopped, from what the Hub knew at each request. By hand, at random and for longer:

    EXAMPLES=2000 pytest tests/passes/test_model_based.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from posixpath import normpath
from typing import NamedTuple
from unittest import mock
from urllib.parse import unquote

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from scripted_hub import (
    PREFIX,
    Answer,
    FakeServer,
    FakeUser,
    Reply,
    Request,
    ScriptedHub,
    Time,
    done_but_lost,
    html,
    normal,
    reset,
    respond,
    truncated,
)

import cull_idle

BEGINNING = datetime(2026, 11, 22, 20, 0, 0, 700_000, tzinfo=UTC)  # a Date header cuts off the rest of the second
HOUR = timedelta(hours=1)
A_LITTLE = timedelta(minutes=1)  # no limit is reached to the second
MEANWHILE = timedelta(seconds=5)

# Who lives on the Hub


def moment(time: Time) -> datetime:
    assert isinstance(time, datetime)
    return time


class Flags(NamedTuple):
    """The options of a pass, and when something is due by them."""

    timeout: int | None  # hours, as max_age
    max_age: int | None
    cull_users: bool
    admins: bool
    default_servers: bool
    named_servers: bool
    remove: bool
    concurrency: int
    page_size: int

    @property
    def arguments(self) -> list[str]:
        return [
            f"--timeout={'never' if self.timeout is None else f'{self.timeout}h'}",
            f"--max-age={'never' if self.max_age is None else f'{self.max_age}h'}",
            f"--cull-users={self.cull_users}",
            f"--cull-admin-users={self.admins}",
            f"--cull-default-servers={self.default_servers}",
            f"--cull-named-servers={self.named_servers}",
            f"--remove-named-servers={self.remove}",
            f"--concurrency={self.concurrency}",
            f"--api-page-size={self.page_size}",
        ]

    def server_is_due(self, server: FakeServer, now: datetime) -> bool:
        wanted = self.named_servers if server.name else self.default_servers
        up = server.ready and not server.pending
        return wanted and up and self._reached(server.last_activity or server.started, server.started, now)

    def user_is_due(self, user: FakeUser, now: datetime) -> bool:
        """Whether a user without a server is."""
        wanted = self.cull_users and (self.admins or not user.admin) and not user.active
        return wanted and self._reached(user.last_activity or user.created, user.created, now)

    def _reached(self, active: Time, born: Time, now: datetime) -> bool:
        idle = self.timeout is not None and now - moment(active) >= self.timeout * HOUR
        return idle or bool(self.max_age and now - moment(born) >= self.max_age * HOUR)


class Then(NamedTuple):
    """What was so when a request came."""

    user: FakeUser | None
    servers: Mapping[str, FakeServer]  # all but the stopped ones
    due: frozenset[str]  # of the servers
    user_due: bool


NOBODY = Then(None, {}, frozenset(), user_due=False)


@dataclass(frozen=True)
class Seen:
    """A request as it arrived at the Hub, what was so then, and the answer."""

    request: Request
    then: Then
    answer: Answer
    everybody: Mapping[str, Then]  # where it is for a page of the user list

    @property
    def is_look(self) -> bool:
        return self.request.method == "GET" and self.request.segments[:-1] == ("users",)

    @property
    def is_page(self) -> bool:
        return self.request.segments == ("users",)

    @property
    def stopped(self) -> FakeServer | None:
        """The server that this request is to stop, if there is one."""
        return self.then.servers.get(self.server) if self.is_stop else None

    @property
    def is_stop(self) -> bool:
        return self.request.method == "DELETE" and len(self.request.segments) > 2

    @property
    def is_user_delete(self) -> bool:
        return self.request.method == "DELETE" and len(self.request.segments) == 2

    @property
    def user(self) -> str:
        return self.request.segments[1]

    @property
    def server(self) -> str:
        """The name of the server, empty for the default one."""
        return "".join(self.request.segments[3:])

    @property
    def arrived(self) -> bool:
        return self.answer.raw is None

    @property
    def content(self) -> Mapping[str, object]:
        """The JSON object that came back; empty where none did."""
        if self.arrived and self.answer.status == 200:
            with contextlib.suppress(ValueError):
                return dict(json.loads(self.answer.body))
        return {}

    @property
    def fine(self) -> bool:
        """Whether there was no fault."""
        if self.request.method == "DELETE":
            return self.arrived and (self.answer.status in (202, 204) or self.hub_says(400, 404))
        return bool(self.content) or self.hub_says(404)

    def hub_says(self, *statuses: int) -> bool:
        """Whether it is an error of the Hub's own with one of these statuses; an ingress answers in HTML."""
        return self.arrived and self.answer.status in statuses and self.answer.body.startswith(b'{"status"')

    def look_at(self, user: str) -> Then | None:
        """What it showed of a user; None if nothing."""
        if self.is_look and self.user == user and self.fine:
            return self.then
        items = self.content.get("items") if self.is_page else None
        names = [item["name"] for item in items] if isinstance(items, list) else []
        return self.everybody[user] if user in names else None

    @property
    def passes_by(self) -> bool:
        """Whether another try may help."""
        return not self.arrived or self.answer.status in (502, 503)

    @property
    def last_page(self) -> bool:
        page = self.content.get("_pagination")
        return isinstance(page, dict) and page["next"] is None


def decoded(request: Request) -> Request:
    """The request behind a proxy that decodes %2F and then resolves dots, as nginx does."""
    path, mark, query = request.target.partition("?")
    path = normpath(path.replace("%2F", "/"))
    segments = tuple(map(unquote, path.removeprefix(PREFIX).removeprefix("/").split("/")))
    return replace(request, target=path + mark + query, segments=segments)


Change = Callable[["WatchedHub", str, str], object]


class Surprise(NamedTuple):
    """What happens to a user and a server in the middle of a pass, when the user is looked at for the nth time."""

    change: Change
    user: str
    server: str
    look: int


class Trouble(NamedTuple):
    """A fault, once so many requests of its kind were answered as they should be."""

    place: tuple[str, str]
    fault: Reply
    after: int
    times: int


class WatchedHub(ScriptedHub):
    """A Hub that records what was so at each request, and changes at some looks. Its clock stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.now = BEGINNING
        self.seen: list[Seen] = []
        self.flags: Flags | None = None
        self.surprises: list[Surprise] = []
        self.behind_a_proxy_that_decodes = False
        self.options: dict[str, object] = {}  # of all servers
        self._one_by_one = threading.Lock()

    def later(self, time: timedelta) -> None:
        self.now = self.now + time

    def fail(self, troubles: list[Trouble]) -> None:
        for (method, pattern), fault, after, times in troubles:
            self.fault(method, pattern, *[normal()] * after, *[fault] * times)

    def heal(self) -> None:
        """No more faults and surprises."""
        self._faults.clear()
        self.surprises = []

    def answer(self, request: Request) -> Answer:
        if self.behind_a_proxy_that_decodes:
            request = decoded(request)
        with self._one_by_one:
            if request.method == "GET" and len(request.segments) == 2:
                self._surprise(request.segments[1])
            then = self.what_is_so(request.segments[1]) if len(request.segments) > 1 else NOBODY
            everybody = {name: self.what_is_so(name) for name in self.users} if request.segments == ("users",) else {}
            answer = super().answer(request)
            self.seen.append(Seen(request, then, answer, everybody))
            return answer

    def what_is_so(self, name: str) -> Then:
        user = self.users.get(name)
        if user is None or self.flags is None:
            return NOBODY
        servers = {name: server for name, server in user.servers.items() if server.active}
        due = frozenset(name for name, server in servers.items() if self.flags.server_is_due(server, self.now))
        return Then(user, servers, due, self.flags.user_is_due(user, self.now))

    def _surprise(self, user: str) -> None:
        nth = sum(each.is_look and each.user == user for each in self.seen)
        for surprise in self.surprises:
            if (surprise.user, surprise.look) == (user, nth):
                self.later(MEANWHILE)
                surprise.change(self, user, surprise.server)

    # What happens on it

    def person_comes(self, name: str, *, idle: timedelta = timedelta(0), admin: bool = False) -> FakeUser:
        """A user who is there from now on, if not before."""
        seen = self.now - idle
        person = self.users.get(name) or FakeUser(name, admin, seen - HOUR, seen)
        self.users[name] = person
        return person

    def server_starts(
        self, user: str, server: str, *, idle: timedelta = timedelta(0), age: timedelta = timedelta(0)
    ) -> FakeServer:
        """A server that is up from now on, a new one; it may have started, and its user be created, long ago."""
        person = self.person_comes(user, idle=idle)
        seen, started = self.now - idle, self.now - idle - age
        made = person.servers[server] = FakeServer(server, seen, started, user_options=self.options)
        person.last_activity = max(moment(person.last_activity), seen)
        return made

    def active_again(self, user: str, _server: str) -> None:
        if user in self.users:
            self.touch(user)

    def logs_in(self, user: str, _server: str) -> None:
        """The user is active, but none of the servers."""
        if person := self.users.get(user):
            person.last_activity = self.now

    def restarts(self, user: str, server: str) -> None:
        """A new server with the activity of the old one, which was not told to the Hub yet."""
        if (person := self.users.get(user)) and (old := person.servers.get(server)):
            person.servers[server] = FakeServer(server, old.last_activity, self.now)

    def is_started_by_an_admin(self, user: str, server: str) -> None:
        """A new server, for which the user did nothing."""
        if person := self.users.get(user):
            person.servers[server] = FakeServer(server, None, self.now)

    def stops_by_itself(self, user: str, server: str) -> None:
        if person := self.users.get(user):
            person.servers.pop(server, None)

    def begins(self, user: str, server: str, pending: str) -> None:
        if (person := self.users.get(user)) and (old := person.servers.get(server)) and old.active:
            old.pending, old.ready = pending, False

    def ends(self, user: str, _server: str) -> None:
        """Whatever was pending is over."""
        for server in (self.users[user].servers if user in self.users else {}).values():
            server.ready = server.ready or server.pending == "spawn"
            server.pending = None

    def promoted(self, user: str, _server: str) -> None:
        if person := self.users.get(user):
            person.admin = True

    def goes(self, user: str, _server: str) -> None:
        self.users.pop(user, None)

    def made_anew(self, user: str, _server: str) -> None:
        """Another user of the same name, who seems to be idle: the Hub copied it."""
        if old := self.users.pop(user, None):
            self.users[user] = FakeUser(user, False, self.now, old.last_activity)


CHANGES: list[Change] = [
    WatchedHub.logs_in,
    WatchedHub.logs_in,
    WatchedHub.logs_in,
    WatchedHub.active_again,
    WatchedHub.active_again,
    WatchedHub.restarts,
    WatchedHub.restarts,
    WatchedHub.is_started_by_an_admin,
    WatchedHub.is_started_by_an_admin,
    WatchedHub.stops_by_itself,
    lambda hub, user, server: hub.begins(user, server, "spawn"),
    lambda hub, user, server: hub.begins(user, server, "stop"),
    WatchedHub.ends,
    WatchedHub.promoted,
    WatchedHub.goes,
    WatchedHub.made_anew,
    WatchedHub.made_anew,
]
PAGES, LOOKS = ("GET", r"/users(\?.*)?"), ("GET", r"/users/[^/]+")
STOPS, USER_DELETES = ("DELETE", r"/users/[^/]+/server.*"), ("DELETE", r"/users/[^/]+")
PLACES = [PAGES, PAGES, LOOKS, LOOKS, LOOKS, STOPS, STOPS, USER_DELETES]
FAULTS: list[Reply] = [respond(500), respond(503), reset(), done_but_lost(), truncated(), html()]
FAULTS += [html(status, f"<html><h1>{status} from the ingress</h1></html>") for status in (400, 404, 404, 405, 502)]


USERS = SERVERS = st.integers(0, 2)  # by number: what is drawn must not depend on the order in which threads run
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6) | st.sampled_from(
    ["ann", "ann?x", "ann/server", "a%2fb", "..", "ünï", "bob\n#1", "\N{WATER WAVE} \u202e"]
)
# Three users and two servers, of whom some mean another one once they are decoded.
NAMES_TO_DECODE = st.permutations(["ann", "ann/server", "bob", "../bob", "bob/servers/gpu"]).map(
    lambda names: [*names[:3], "gpu", "../../bob/server"]
)


class ToBe(NamedTuple):
    """A server to be: whose, which, idle for so many hours, older by so many, not down while the Hub waits."""

    user: int
    server: int
    idle: int
    older: int
    slow: bool


SERVERS_TO_BE = st.lists(
    st.builds(
        ToBe,
        USERS,
        SERVERS,
        idle=st.sampled_from([2, 2, 3, 1, 0]),
        older=st.sampled_from([0, 1, 4]),
        slow=st.sampled_from([False] * 7 + [True]),
    ),
    min_size=1,
    max_size=6,
)
FLAGS = st.builds(
    Flags,
    timeout=st.sampled_from([1, 1, 1, 1, 1, 1, 0, None]),
    max_age=st.sampled_from([None, None, 5]),
    cull_users=st.sampled_from([True, True, False]),
    admins=st.sampled_from([True, True, True, False]),
    default_servers=st.sampled_from([True] * 7 + [False]),
    named_servers=st.sampled_from([True] * 7 + [False]),
    remove=st.booleans(),
    concurrency=st.integers(1, 4),
    page_size=st.integers(1, 3),
)
ALL = Flags(
    timeout=1,
    max_age=None,
    cull_users=True,
    admins=True,
    default_servers=True,
    named_servers=True,
    remove=False,
    concurrency=1,
    page_size=1,
)
TROUBLES = st.lists(
    st.builds(Trouble, st.sampled_from(PLACES), st.sampled_from(FAULTS), st.integers(0, 3), st.integers(1, 5)),
    min_size=1,
    max_size=3,
)
SURPRISES = st.lists(st.tuples(st.sampled_from(CHANGES), USERS, SERVERS, st.integers(0, 2)), max_size=4)


# What must hold


def check_order(seen: list[Seen], at_first: Mapping[str, Then], one_by_one: bool) -> None:
    """Each server and user was due, and still the same one, at a look since the last try to delete it.

    A page of the user list is a look, too, for where an ingress answers the others. If requests are sent one by one,
    the look is the request right before the DELETE.
    """
    last_try: dict[tuple[str, str | None], int] = {}
    for number, each in enumerate(seen):
        if not each.is_stop and not each.is_user_delete:
            continue
        key = (each.user, each.server if each.is_stop else None)
        begin = last_try.get(key, -1) + 1
        last_try[key] = number
        before = seen[max(begin, number - 1) if one_by_one else begin : number]
        looks = [then for look in before if (then := look.look_at(each.user))]
        assert looks, "a DELETE without a look"
        wrongs = [what_is_wrong(each, then, at_first.get(each.user, NOBODY)) for then in looks]
        assert "" in wrongs, wrongs
        if each.is_user_delete:
            assert not each.then.servers, "deleted a user with a server"


def what_is_wrong(delete: Seen, at_look: Then, at_first: Then) -> str:
    """Why the look does not allow the DELETE; empty if it does."""
    if at_look.user is None:
        return "deleted a user or server that did not exist"
    if delete.is_stop:
        if delete.server not in at_look.due:
            return "stopped a server that was not due"
        if at_look.servers[delete.server] is not at_first.servers.get(delete.server):
            return "stopped another server of that name"
        return ""
    if not (at_first.user_due and at_look.user_due):
        return "deleted a user who was not due, perhaps one with a server"
    return "" if at_look.user is at_first.user else "deleted another user of that name"


class Life(RuleBasedStateMachine):
    """A Hub, and passes over it."""

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = contextlib.ExitStack()
        self.hub = self.cleanup.enter_context(WatchedHub())
        self.cleanup.enter_context(mock.patch.object(cull_idle, "PAUSES", (0.0, 0.0, 0.0)))
        self.cleanup.enter_context(mock.patch.dict(os.environ, {"JUPYTERHUB_API_TOKEN": self.hub.token}))
        self.stopped: list[FakeServer] = []
        self.users: list[str] = []
        self.servers: list[str] = []

    def teardown(self) -> None:
        self.cleanup.close()

    @initialize(
        names=st.lists(NAMES, min_size=5, max_size=5, unique=True) | NAMES_TO_DECODE,
        proxy=st.booleans(),
        options=st.sampled_from([{}, {}, {"many": [{}] * 3000}]),
    )
    def a_hub_is_set_up(self, names: list[str], proxy: bool, options: dict[str, object]) -> None:
        self.users, self.servers = names[:3], ["", *names[3:]]
        self.hub.behind_a_proxy_that_decodes = proxy
        self.hub.options = options  # parsing many takes a while, in which another thread may go on

    def is_lost(self, user: str, server: str = "") -> bool:
        """Whether it may be impossible to cull under this name: a path with it could lead elsewhere."""
        decoded = self.hub.behind_a_proxy_that_decodes and "/" in user
        return decoded or not re.fullmatch(r"|\.*[^./\\?#%][^/\\?#%]*", server)

    # What happens on the Hub

    @rule(user=USERS, hours=st.integers(0, 6), admin=st.booleans())
    def a_user_comes(self, user: int, hours: int, admin: bool) -> None:
        self.hub.person_comes(self.users[user], idle=hours * HOUR + A_LITTLE, admin=admin)

    def servers_are_there(self, there: list[ToBe]) -> None:
        for user, server, hours, older, slow in there:
            idle = hours * HOUR + A_LITTLE * bool(hours)
            made = self.hub.server_starts(self.users[user], self.servers[server], idle=idle, age=older * HOUR)
            made.stops = not slow

    @rule(user=USERS, server=SERVERS, change=st.sampled_from(CHANGES))
    def something_changes(self, user: int, server: int, change: Change) -> None:
        change(self.hub, self.users[user], self.servers[server])

    @rule(hours=st.integers(1, 3))
    def time_passes(self, hours: int) -> None:
        self.hub.later(hours * HOUR + A_LITTLE)

    # What the program does about it

    @rule(there=SERVERS_TO_BE, flags=FLAGS, troubles=TROUBLES, surprises=SURPRISES)
    def a_pass_is_made(
        self, there: list[ToBe], flags: Flags, troubles: list[Trouble], surprises: list[tuple[Change, int, int, int]]
    ) -> None:
        self.servers_are_there(there)
        self.hub.fail(troubles)
        self.hub.surprises = [
            Surprise(change, self.users[user], self.servers[server], look) for change, user, server, look in surprises
        ]
        self.make_pass(flags)

    @rule(
        user=USERS,
        servers=st.sampled_from([2, 1, 2, 0]),
        change=st.sampled_from(CHANGES),
        changed=SERVERS,
        look=st.sampled_from([1, 0, 2]),
        trouble=st.sampled_from([None, Trouble(STOPS, respond(503), 0, 1), Trouble(PAGES, respond(500), 1, 1)]),
        concurrency=st.integers(1, 2),
    )
    def all_of_a_user_would_go_but_for_one_change(
        self,
        user: int,
        servers: int,
        change: Change,
        changed: int,
        look: int,
        trouble: Trouble | None,
        concurrency: int,
    ) -> None:
        """The stop of a server may be tried again, after a change that a first look could not see."""
        name = self.users[user]
        self.hub.goes(name, "")
        person = self.hub.person_comes(name, idle=2 * HOUR)
        for server in self.servers[:servers]:
            self.hub.server_starts(name, server, idle=2 * HOUR)
        self.hub.person_comes(self.users[user - 1])
        self.hub.users = {name: person, **self.hub.users}
        self.hub.fail([trouble] if trouble else [])
        self.hub.surprises = [Surprise(change, name, self.servers[changed], look)]
        self.make_pass(ALL._replace(concurrency=concurrency))

    @rule(there=SERVERS_TO_BE, flags=FLAGS)
    def all_that_is_due_goes(self, there: list[ToBe], flags: Flags) -> None:
        """Without faults, two passes do all."""
        self.servers_are_there(there)
        hub, hub.flags = self.hub, flags
        at_first = {name: hub.what_is_so(name) for name in hub.users}
        exit_codes = [self.make_pass(flags), self.make_pass(flags)]
        for name, was in at_first.items():
            assert all(self.is_lost(name, server) or not was.servers[server].ready for server in was.due)
            assert not was.user_due or self.is_lost(name) or hub.users.get(name) is not was.user
        assert self.some_are_lost(at_first) or exit_codes == [0, 0]

    def some_are_lost(self, at_first: Mapping[str, Then]) -> bool:
        """Whether the name of anything due may be lost."""
        servers = any(self.is_lost(user, server) for user, was in at_first.items() for server in was.due)
        return servers or any(self.is_lost(user) for user, was in at_first.items() if was.user_due)

    def make_pass(self, flags: Flags) -> int:
        hub = self.hub
        hub.seen, hub.flags = [], flags
        at_first = {name: hub.what_is_so(name) for name in hub.users}
        before = open_things()
        arguments = ["--once", "--url", hub.url, *flags.arguments]
        with contextlib.redirect_stderr(io.StringIO()) as output:
            exit_code = cull_idle.main(arguments)
        assert_nothing_is_left_over(before)
        hub.heal()
        err = output.getvalue()
        assert "Traceback" not in err
        assert hub.token not in err
        check_order(hub.seen, at_first, one_by_one=flags.concurrency == 1)
        self.check_stops()
        self.check_exit_code(exit_code, err, at_first)
        return exit_code

    def check_stops(self) -> None:
        """Nothing is stopped twice, and no user deleted unless the whole list was read."""
        for each in self.hub.seen:
            assert all(each.stopped is not server for server in self.stopped)
            if each.stopped and each.arrived and each.answer.status == 204:
                self.stopped.append(each.stopped)
        assert self.list_is_complete or not any(each.is_user_delete for each in self.hub.seen)

    @property
    def pages(self) -> list[Seen]:
        """Those of the scan."""
        scan = takewhile(lambda each: not each.is_look and each.request.method == "GET", self.hub.seen)
        return [each for each in scan if each.is_page]

    @property
    def list_is_complete(self) -> bool:
        return self.pages[-1].last_page

    def check_exit_code(self, exit_code: int, err: str, at_first: Mapping[str, Then]) -> None:
        """The exit code says what happened."""
        failed = [line for line in err.splitlines() if " ERROR    failed " in line]
        read = any(page.content.get("items") for page in self.pages)
        assert exit_code == (bool(failed) if self.list_is_complete else 1 if read else 3)
        faults = [each for each in self.hub.seen if not each.fine]
        if all(each.passes_by for each in faults) and len(faults) <= len(cull_idle.PAUSES):
            assert exit_code == 0 or self.some_are_lost(at_first)
        if exit_code == 0:
            assert self.still_due(at_first) == []

    def still_due(self, at_first: Mapping[str, Then]) -> list[tuple[str, str]]:
        """The servers that were due when the pass began, and still are."""
        found = []
        for user, was in at_first.items():
            now = self.hub.what_is_so(user)
            found += [
                (user, name)
                for name in was.due & now.due
                if was.servers[name] is now.servers[name] and not self.is_lost(user, name)
            ]
        return found


def open_things() -> tuple[int, int]:
    """How many threads and open files this process has."""
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


def assert_nothing_is_left_over(before: tuple[int, int]) -> None:
    """No thread, socket or file, once the Hub has seen that its connections are closed."""
    deadline = time.monotonic() + 5
    while any(map(int.__gt__, open_things(), before)) and time.monotonic() < deadline:
        time.sleep(0.0005)
    threads, files = open_things()
    assert threads <= before[0], threading.enumerate()
    assert files <= before[1]


EXAMPLES = os.environ.get("EXAMPLES")
Life.TestCase.settings = settings(
    max_examples=int(EXAMPLES or 40),
    stateful_step_count=16,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
test_a_pass_does_what_it_should_whatever_happens = Life.TestCase
