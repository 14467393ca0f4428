"""Random Hubs, options, faults and changes. An oracle that is independent of the program says what must come of a pass.

Users come, go, are active again and are created anew, between passes and in the middle of them. Requests fail, an
ingress answers for the Hub, a proxy decodes %2F, clocks are ahead. Of a pass that nothing disturbs, all is compared:
who is stopped, spared, warned and asked. Of others, each DELETE must be allowed by a look, and the exit code be right.

The Hub's clock stands still in a pass, and no idle time or age is within minutes of a limit: a slow machine changes
nothing. By hand, at random and for longer:

    EXAMPLES=2000 pytest tests/passes/test_model_based.py
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from fnmatch import fnmatchcase
from itertools import takewhile
from posixpath import normpath
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
import scripted_hub as hub_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import wait_for
from runs import Cull
from scripted_hub import ALL_SCOPES, PREFIX, Answer, FakeJupyter, FakeServer, FakeUser, Reply, Request, ScriptedHub

BEGINNING = datetime(2026, 11, 22, 20, 0, 0, 700_000, tzinfo=UTC)  # a Date header cuts off the rest of the second
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
# Limits are whole hours. What is there before a pass was active whole hours and 20 minutes ago, and before each pass
# whole hours and 7 minutes go by. So a limit, and the time of a warning, are 3 minutes off, or more.
ODD_MINUTES, BETWEEN_PASSES, WARN_BEFORE = 20 * MINUTE, 7 * MINUTE, 50 * MINUTE
MEANWHILE = timedelta(seconds=5)
NEVER = datetime.max.replace(tzinfo=UTC)
TRIES = 4  # of each request
ODD = re.compile(r"[/\\?#%]")  # a proxy that decodes paths makes another path of a name with one of these
SAFE = re.compile(r"[^/\\?#%]*[^/\\?#%.\0- ][^/\\?#%]*")  # the names of servers that lead nowhere else

Key = tuple[str, str | None]  # a user's name, and a server's, or None for the user
Thing = tuple[FakeUser, FakeServer | None]  # a server and its user, or a user
Hours = int | None  # None is never


# What should happen


class Rule(NamedTuple):
    """An exception: pairs of what is matched and a glob, and what it sets."""

    matches: tuple[tuple[str, str], ...]
    setting: str
    hours: Hours

    def __str__(self) -> str:
        setting = self.setting if self.setting == "keep" else f"{self.setting}={written(self.hours)}"
        return shlex.join([*map("=".join, self.matches), setting])

    def applies(self, user: FakeUser, server: FakeServer | None) -> bool:
        facts = {"user": [user.name], "admin": [str(user.admin).lower()], "group": user.groups}
        if server:
            facts |= {"server": [server.name], "option.profile": [server.user_options.get("profile", "")]}
        return all(any(fnmatchcase(fact, glob) for fact in facts.get(what, ())) for what, glob in self.matches)


def written(hours: Hours) -> str:
    return "never" if hours is None else f"{hours}h"


class Plan(NamedTuple):
    """What should become of a server or user."""

    outcome: str  # empty: nothing is said of it
    due_at: datetime
    is_asked: bool


class Options(NamedTuple):
    """The options of a pass, and when something is due by them."""

    timeout: Hours
    max_age: Hours
    cull_users: bool
    cull_admin_users: bool
    cull_default_servers: bool
    cull_named_servers: bool
    remove_named_servers: bool
    idle_by: str
    concurrency: int
    api_page_size: int
    warns: bool
    rules: tuple[Rule, ...]

    @property
    def arguments(self) -> list[str]:
        values = {**self._asdict(), "timeout": written(self.timeout), "max_age": written(self.max_age)}
        more = ["--warn-before=50m"] * values.pop("warns") + [f"--rule={rule}" for rule in values.pop("rules")]
        return [*(f"--{name.replace('_', '-')}={value}" for name, value in values.items()), *more]

    def limits(self, user: FakeUser, server: FakeServer | None) -> tuple[Hours, Hours]:
        """After how many hours without activity, and at what age, it is due. Of rules, only `keep` is for users."""
        if server:
            wanted = self.cull_named_servers if server.name else self.cull_default_servers
            wanted = wanted and server.ready and not server.pending
        else:
            wanted = self.cull_users and (self.cull_admin_users or not user.admin) and not user.active
        rule = next((rule for rule in self.rules if rule.applies(user, server)), None)
        if not wanted or (rule and rule.setting == "keep"):
            return None, None
        timeout, max_age = self.timeout, self.max_age
        if rule and server:
            timeout, max_age = (rule.hours, max_age) if rule.setting == "timeout" else (timeout, rule.hours)
        return timeout, max_age or None

    def due_at(self, thing: Thing, now: datetime, idle_by: str = "") -> datetime:
        """When it is due if nobody uses it any more. Who has an odd name cannot be asked."""
        timeout, max_age = self.limits(*thing)
        idle_by = "hub" if ODD.search(thing[0].name) else idle_by or self.idle_by
        times = [] if timeout is None else [last_active(thing, idle_by, now) + timeout * HOUR]
        return min([*times, *([born(thing) + max_age * HOUR] if max_age else [])], default=NEVER)

    def is_asked(self, thing: Thing, now: datetime) -> bool:
        """Whether what it says can change anything, now or for a warning."""
        timeout, max_age = self.limits(*thing)
        if not thing[1] or ODD.search(thing[0].name) or self.idle_by == "hub" or not timeout:
            return False
        if self.idle_by == "both" and self.due_at(thing, now, "hub") > now:
            return False
        later = [now + WARN_BEFORE] if self.warns and self.idle_by != "both" else []
        ages = [then - born(thing) for then in (now, *later)]
        return any(age >= timeout * HOUR and not (max_age and age >= max_age * HOUR) for age in ages)

    def plan(self, thing: Thing, now: datetime) -> Plan:
        """What becomes of it in a pass that nothing disturbs."""
        server = thing[1]
        by_scan = self.due_at(thing, now, "hub" if self.idle_by == "both" else "")
        outcome = "warned" if server and self.warns and by_scan <= now + WARN_BEFORE else ""
        if by_scan <= now:
            outcome = "stopping" if server and not server.stops else "culled"
            outcome = "spared" if self.due_at(thing, now) > now else outcome
        return Plan(outcome, by_scan, self.is_asked(thing, now))


def moment(time: hub_of.Time) -> datetime:
    assert isinstance(time, datetime)
    return time


def born(thing: Thing) -> datetime:
    return moment(thing[1].started if thing[1] else thing[0].created)


def last_active(thing: Thing, idle_by: str, now: datetime) -> datetime:
    """Its last activity, by the word that counts. A server says of itself at most that it is idle since its start."""
    user, server = thing
    by_hub = moment((server or user).last_activity or born(thing))
    if not server or idle_by == "hub":
        return by_hub
    found = [now if each["execution_state"] == "busy" else each["last_activity"] for each in server.says.kernels]
    found += [each["last_activity"] for each in server.says.terminals]
    found += [by_hub] if idle_by == "both" else []
    found += [] if idle_by == "kernels" else [moment(server.says.last_activity)]
    return max([born(thing), *found])


# A Hub that notes what was so at each request


class Then(NamedTuple):
    """What was so of a user when a request came."""

    user: FakeUser | None
    servers: Mapping[str, FakeServer]  # all but the stopped ones
    due: frozenset[str | None]  # of the servers, and None if the user is


NOBODY = Then(None, {}, frozenset())


@dataclass(frozen=True)
class Seen:
    """A request as it arrived at the Hub, what was so of each user then, and the answer."""

    request: Request
    then: Mapping[str, Then]
    answer: Answer

    @property
    def kind(self) -> str:
        """What it is for: a page, a look, asking, or a DELETE."""
        match self.request.method, *self.request.segments:
            case "GET", "users":
                return "page"
            case "GET", "users", _:
                return "look"
            case ("DELETE", "users", _) | ("DELETE", "users", _, "server" | "servers", *_):
                return "delete"
            case (_, "user", _, *_) | (_, "users", _, "tokens", *_):
                return "ask"
        return ""

    @property
    def key(self) -> Key:
        """Of a DELETE."""
        _, user, *rest = self.request.segments
        return user, "".join(rest[1:]) if rest else None

    @property
    def arrived(self) -> bool:
        return self.answer.raw is None

    @property
    def content(self) -> Mapping[str, Any]:
        """The JSON object that came back; empty where none did."""
        if self.arrived and self.answer.status == 200:
            with contextlib.suppress(ValueError):
                return dict(json.loads(self.answer.body))
        return {}

    @property
    def fine(self) -> bool:
        """Whether there was no fault."""
        own = self.answer.body.startswith(b'{"status"') and self.answer.status in (400, 404)
        done = self.request.method == "DELETE" and self.answer.status in (202, 204)
        return self.arrived and (self.kind == "ask" or own or done or bool(self.content))

    def look_at(self, user: str) -> Then | None:
        """What it showed of a user; None if nothing. A page is a look, where an ingress answers the others."""
        shown = [item["name"] for item in self.content.get("items", ())] if self.kind == "page" else []
        is_look = self.kind == "look" and self.request.segments[1] == user and self.fine
        return self.then.get(user, NOBODY) if is_look or user in shown else None


def decoded(request: Request) -> Request:
    """The request behind a proxy that decodes %2F and then resolves dots, as nginx does."""
    path, mark, query = request.target.partition("?")
    path = normpath(path.replace("%2F", "/"))
    segments = tuple(map(unquote, path.removeprefix(PREFIX).removeprefix("/").split("/")))
    return replace(request, target=path + mark + query, segments=segments)


class WatchedHub(ScriptedHub):
    """A Hub whose clock stands still, which notes all requests, and on which something changes at some looks."""

    def __init__(self) -> None:
        super().__init__()
        self.scopes = [*ALL_SCOPES, "tokens"]
        self.now = BEGINNING
        self.seen: list[Seen] = []
        self.options: Options | None = None
        self.surprises: Iterable[Surprise] = ()
        self.proxy_decodes = False
        self.another_node_is_ahead = False  # the one that answers all but the first request of a pass
        self._one_by_one = threading.Lock()

    def disturb(self, troubles: Iterable[Trouble], surprises: Iterable[Surprise]) -> None:
        """From now on, there are these faults and changes, and no others."""
        self._faults.clear()
        self.surprises = surprises
        for (method, pattern), fault, after, times in troubles:
            self.fault(method, pattern, *[hub_of.normal()] * after, *[fault] * times)

    def answer(self, request: Request) -> Answer:
        if self.proxy_decodes:
            request = decoded(request)
        with self._one_by_one:
            if Seen(request, {}, Answer()).kind == "look":
                self._surprise(request.segments[1])
            then = {name: self.what_is_so(name) for name in self.users}
            answer = super().answer(request)
            if self.another_node_is_ahead and request.segments[0] == "users":
                date = format_datetime(self.now + 5 * HOUR, usegmt=True)
                answer = replace(answer, headers={**answer.headers, "Date": date})
            self.seen.append(Seen(request, then, answer))
            return answer

    def things(self, name: str) -> dict[str | None, Thing]:
        """A user, and their servers that are not stopped."""
        user = self.users[name]
        return {None: (user, None), **{name: (user, each) for name, each in user.servers.items() if each.active}}

    def what_is_so(self, name: str) -> Then:
        assert self.options
        things = self.things(name)
        due = frozenset(key for key, thing in things.items() if self.options.due_at(thing, self.now) <= self.now)
        return Then(
            self.users[name], {key: server for key, (_, server) in things.items() if key is not None and server}, due
        )

    def _surprise(self, user: str) -> None:
        nth = sum(each.kind == "look" for each in self.seen)
        for change, server, look in self.surprises:
            if look == nth:
                self.now += MEANWHILE
                self.change(change, user, server)

    def change(self, change: Change, name: str, server: str) -> None:
        if user := self.users.get(name):
            change(self, user, user.servers.get(server) or FakeServer(server, ready=False))

    def is_told_of_starts(self) -> None:
        """A server that has just started is not idle for longer than it is up, once nothing is on its way any more."""
        for server in (server for user in self.users.values() for server in user.servers.values()):
            server.last_activity = max(moment(server.last_activity or server.started), moment(server.started))

    def ago(self, hours: int) -> datetime:
        return self.now - hours * HOUR - ODD_MINUTES

    def user_is_there(self, name: str, idle: int, *, admin: bool = False, groups: Iterable[str] = ()) -> FakeUser:
        seen = self.ago(idle)
        return self.users.setdefault(name, FakeUser(name, admin, seen - HOUR, seen, list(groups)))

    def server_is_up(self, name: str, server: str, its: Mapping[str, Any]) -> None:
        """A new server; it may have started, and its user been created, long ago."""
        user, seen = self.user_is_there(name, its["idle"]), self.ago(its["idle"])
        kernels = [{"execution_state": state, "last_activity": self.ago(idle)} for state, idle in its["kernels"]]
        says = FakeJupyter(
            self.ago(its["says"]), kernels, [{"last_activity": self.ago(idle)} for idle in its["terminals"]]
        )
        started, options = seen - its["older"] * HOUR - 6 * MINUTE, its["user_options"]
        user.servers[server] = FakeServer(server, seen, started, says=says, stops=its["stops"], user_options=options)
        user.last_activity = max(moment(user.last_activity), seen)


# What happens on it


Change = Callable[[WatchedHub, FakeUser, FakeServer], object]


class Surprise(NamedTuple):
    """What happens to a user and a server in the middle of a pass: at its nth look, to who is looked at."""

    change: Change
    server: str
    look: int


class Trouble(NamedTuple):
    """A fault, once so many requests of its kind were answered as they should be."""

    place: tuple[str, str]
    fault: Reply
    after: int
    times: int


def user_logs_in_and_uses_no_server(hub: WatchedHub, user: FakeUser, _server: FakeServer) -> None:
    user.last_activity = hub.now


def user_is_active_again(hub: WatchedHub, user: FakeUser, _server: FakeServer) -> None:
    hub.touch(user.name)


def user_is_promoted(_hub: WatchedHub, user: FakeUser, _server: FakeServer) -> None:
    user.admin = True


def user_goes(hub: WatchedHub, user: FakeUser, _server: FakeServer) -> None:
    hub.users.pop(user.name)


def user_is_made_anew_and_seems_to_be_idle(hub: WatchedHub, user: FakeUser, _server: FakeServer) -> None:
    hub.users[user.name] = FakeUser(user.name, False, hub.now, user.last_activity)


def server_computes_and_the_hub_does_not_know(_hub: WatchedHub, _user: FakeUser, server: FakeServer) -> None:
    server.says.kernels = [{"execution_state": "busy", "last_activity": BEGINNING}]


def server_restarts_and_seems_to_be_idle(hub: WatchedHub, user: FakeUser, server: FakeServer) -> None:
    if server.active:
        user.servers[server.name] = replace(server, started=hub.now, says=FakeJupyter(hub.now))


def server_is_started_by_an_admin(hub: WatchedHub, user: FakeUser, server: FakeServer) -> None:
    user.servers[server.name] = FakeServer(server.name, None, hub.now, says=FakeJupyter(hub.now))


def server_stops_by_itself(_hub: WatchedHub, user: FakeUser, server: FakeServer) -> None:
    user.servers.pop(server.name, None)


def server_begins_to_spawn(_hub: WatchedHub, _user: FakeUser, server: FakeServer) -> None:
    server.pending, server.ready = "spawn" if server.active else None, False


def server_begins_to_stop(_hub: WatchedHub, _user: FakeUser, server: FakeServer) -> None:
    server.pending, server.ready = "stop" if server.active else None, False


def all_that_is_pending_ends(_hub: WatchedHub, user: FakeUser, _server: FakeServer) -> None:
    for server in user.servers.values():
        server.ready, server.pending = server.ready or server.pending == "spawn", None


# What is drawn


CHANGES: list[Change] = [
    *[user_logs_in_and_uses_no_server] * 3,
    *[user_is_active_again, user_is_made_anew_and_seems_to_be_idle] * 2,
    *[server_restarts_and_seems_to_be_idle, server_is_started_by_an_admin] * 2,
    *[user_goes, server_stops_by_itself, server_begins_to_spawn, server_begins_to_stop, all_that_is_pending_ends],
]
# A look after a decision that took long sees activity by the Hub's word, and no change of these.
SUBTLE_CHANGES: list[Change] = [user_is_promoted, server_computes_and_the_hub_does_not_know]
PAGES, LOOKS = ("GET", r"/users(\?.*)?"), ("GET", r"/users/[^/]+")
STOPS, USER_DELETES = ("DELETE", r"/users/[^/]+/server.*"), ("DELETE", r"/users/[^/]+")
PLACES = [("GET", "/user"), *[PAGES] * 2, *[LOOKS] * 3, *[STOPS] * 2, USER_DELETES]
FAULTS: list[Reply] = [hub_of.respond(500), hub_of.respond(503), hub_of.reset(), hub_of.done_but_lost()]
FAULTS += [hub_of.truncated(), hub_of.html()]
FAULTS += [hub_of.html(status, f"<h1>{status} from the ingress</h1>") for status in (400, 404, 404, 405, 502)]
TROUBLES = st.builds(Trouble, st.sampled_from(PLACES), st.sampled_from(FAULTS), st.integers(0, 3), st.integers(1, 5))

PLAIN_NAMES = st.permutations(["ann", "bob", "ann?x"]).map(lambda users: [*users, "gpu", "b-2"])
# Three users and two servers, of whom some mean another one once they are decoded.
NAMES_TO_DECODE = st.permutations(["ann", "ann/server", "bob", "../bob", "bob/servers/gpu"]).map(
    lambda names: [*names[:3], "gpu", "../../bob/server"]
)
ANY_NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6) | st.sampled_from(
    ["ann", "ann?x", "ann/server", "a%2fb", "..", "ünï", "bob\n#1", "\N{WATER WAVE} \u202e"]
)
ANY_NAMES = st.lists(ANY_NAME, min_size=5, max_size=5, unique=True)

FEW = st.integers(0, 2)
MANY: dict[str, object] = {"many": [{}] * 3000}  # parsing them takes a while, in which another thread goes on
MOSTLY = st.sampled_from([True] * 5 + [False])
SERVERS = st.fixed_dictionaries(
    {
        "idle": st.sampled_from([2, 2, 3, 1, 0]),  # hours
        "older": st.sampled_from([0, 1, 4]),
        "stops": MOSTLY,  # while the Hub waits
        "says": st.sampled_from([2, 3, 1, 0]),
        "kernels": st.lists(st.tuples(st.sampled_from(["idle", "idle", "busy"]), FEW), max_size=2),
        "terminals": st.lists(FEW, max_size=1),
        "user_options": st.sampled_from([{}, {"profile": "large"}, MANY]),
    }
)


def options_of(names: list[str], idle_by: list[str]) -> st.SearchStrategy[Options]:
    """Mostly such that most things are due."""
    matches = [("user", glob.escape(name)) for name in names[:3]] + [
        ("server", glob.escape(name)) for name in names[3:]
    ]
    matches += [("user", "*"), ("server", ""), ("server", "?*"), ("group", "gpu"), ("group", "st*")]
    matches += [("admin", "true"), ("admin", "false"), ("option.profile", "large")]
    some = st.lists(st.sampled_from(matches), min_size=1, max_size=2).map(tuple)
    rules = st.builds(Rule, some, st.sampled_from(["keep", "timeout", "max-age"]), st.sampled_from([1, 2, 3, 4, None]))
    return st.builds(
        Options,
        *[st.sampled_from([1, 1, 1, 2, 2, 0, None]), st.sampled_from([None, None, 0, 5])],
        *[MOSTLY] * 4,
        remove_named_servers=st.booleans(),
        idle_by=st.sampled_from(idle_by),
        concurrency=st.sampled_from([1, 1, 2, 4]),
        api_page_size=st.integers(1, 3),
        warns=st.booleans(),
        rules=st.lists(rules, max_size=2).map(tuple),
    )


# What must hold


class Watch:
    """Passes over one Hub, and what must hold after each."""

    def __init__(self, hub: WatchedHub, cull: Cull) -> None:
        self.hub = hub
        self.cull = cull
        self.stopped: list[FakeServer] = []

    def may_fail(self, key: Key) -> bool:
        """Whether it may be impossible to cull under this name: a path with it could lead elsewhere."""
        user, server = key
        is_lost = ODD.search(user) and (self.hub.proxy_decodes or user not in self.hub.users)
        return bool(is_lost or (server and not SAFE.fullmatch(server)))

    def make_pass(self, options: Options, *, is_disturbed: bool, decision_is_old: bool = False) -> None:
        hub, hub.options, hub.seen = self.hub, options, []
        hub.is_told_of_starts()
        at_first = {name: hub.what_is_so(name) for name in hub.users}
        things = {(name, key): thing for name in hub.users for key, thing in hub.things(name).items()}
        plans = {key: options.plan(thing, hub.now) for key, thing in things.items()}
        threads = threading.active_count()
        arguments = ["--once", "--json", "--request-timeout=1h", "--url", hub.url, *options.arguments]
        result = self.cull(*arguments, token=hub.token)
        wait_for(lambda: not hub.connections_open and threading.active_count() <= threads)
        assert not hub.tokens, "left a token"

        *events, total = map(json.loads, result.out.splitlines())
        outcomes: dict[Key, str] = {(each["user"], each["server"]): each["outcome"] for each in events}
        assert len(outcomes) == len(events), "said two things of one"
        self.check_deletes(at_first, 2 if decision_is_old else 1, one_by_one=options.concurrency == 1)
        complete = self.check_exit_code(result.exit_code, outcomes)
        warned = {(each["user"], each["server"]): each["due"] for each in events if each["outcome"] == "warned"}
        assert all(plans[key].outcome == "warned" for key in warned)
        assert all(abs(datetime.fromisoformat(due) - plans[key].due_at) < MINUTE for key, due in warned.items())
        assert not complete or len(warned) == sum(plan.outcome == "warned" for plan in plans.values())
        if not is_disturbed:
            expected = {key: plan.outcome for key, plan in plans.items() if plan.outcome}
            expected |= {key: "failed" for key in expected if self.may_fail(key) and outcomes.get(key) == "failed"}
            assert outcomes == expected
            assert total["planned"] == len(expected) - len(warned)
            asked = {(name, "".join(rest[:-2])) for name, *rest in self.asks()}
            assert asked == {key for key, plan in plans.items() if plan.is_asked}

    def asks(self) -> list[tuple[str, ...]]:
        """Who was asked what: `ann, gpu, api, kernels`."""
        return [each.request.segments[1:] for each in self.hub.seen if each.request.target.startswith("/user/")]

    def check_deletes(self, at_first: Mapping[str, Then], fewest_looks: int, *, one_by_one: bool) -> None:
        """Each server and user was due, and still the same one, at a look since the last try to delete it.

        If requests are sent one by one, the look is the request right before the DELETE, but for those that ask.
        """
        last_try: dict[Key, int] = {}
        seen = [each for each in self.hub.seen if each.kind != "ask"]
        for number, each in enumerate(seen):
            if each.kind != "delete":
                continue
            (user, server), begin = each.key, last_try.get(each.key, -1) + 1
            last_try[each.key] = number
            before = seen[max(begin, number - 1) if one_by_one else begin : number]
            looks = [then for look in before if (then := look.look_at(user))]
            wrongs = [what_is_wrong(server, then, at_first.get(user, NOBODY)) for then in looks]
            assert "" in wrongs, wrongs or "a DELETE without a look"
            looks_sent = [
                look for look in seen[begin:number] if look.kind == "look" and look.request.segments[1] == user
            ]
            assert len(looks_sent) >= fewest_looks
            there = each.then.get(user, NOBODY).servers
            assert server is not None or not there, "deleted a user with a server"
            stopped = there.get(server or "") if server is not None else None
            assert all(stopped is not known for known in self.stopped), "stopped a server twice"
            if stopped and each.arrived and each.answer.status == 204:
                self.stopped.append(stopped)

    def check_exit_code(self, exit_code: int, outcomes: Mapping[Key, str]) -> bool:
        """The exit code says what happened. Returns whether the whole list was read: else, no user is deleted."""
        seen = self.hub.seen
        scan = takewhile(lambda each: each.kind not in ("look", "delete"), seen)
        pages = [each.content for each in scan if each.kind == "page"]  # none if the first request of the pass fails
        last = pages[-1].get("_pagination", {}) if pages else {}
        complete = last.get("next", "unknown") is None
        was_read = complete or any(page.get("items") for page in pages)
        asks = [each for each in seen if each.request.target.startswith("/user/")]
        last_answers = {each.request.segments[:-2]: each.answer.status for each in asks}  # of each server
        lost = set(last_answers.values()) == {302}
        failed = "failed" in outcomes.values()
        assert exit_code == (3 if lost or not was_read else failed if complete else 1)
        assert complete or not any(each.kind == "delete" and each.key[1] is None for each in seen)
        faults = [each for each in seen if not each.fine]
        if len(faults) < TRIES and not any(each.arrived and each.answer.status not in (502, 503) for each in faults):
            assert exit_code == 0 or lost or any(map(self.may_fail, outcomes))
        return complete


def what_is_wrong(server: str | None, at_look: Then, at_first: Then) -> str:
    """Why a look does not allow a DELETE of this server, or of the user; empty if it does."""
    if server not in at_look.due or (server is None and None not in at_first.due):
        return "deleted what was not due"
    same = at_look.user is at_first.user if server is None else at_look.servers[server] is at_first.servers.get(server)
    return "" if same else "deleted another one of that name"


EXAMPLES = os.environ.get("EXAMPLES")


@settings(
    max_examples=int(EXAMPLES or 150), derandomize=not EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_a_pass_does_what_it_should_whatever_happens(
    cull: Cull, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    draw = data.draw
    asks = draw(st.booleans())
    names = draw(PLAIN_NAMES if asks else ANY_NAMES | NAMES_TO_DECODE)
    user, server = st.sampled_from([names[0], *names[:3]]), st.sampled_from(["", "", *names[3:]])
    options = options_of(names, ["both", "server", "kernels"] if asks else ["hub"])
    with WatchedHub() as hub:
        hub.proxy_decodes, hub.another_node_is_ahead = draw(st.booleans()), draw(st.booleans())
        watch = Watch(hub, cull)
        for _ in range(draw(st.integers(1, 3))):
            hub.now += draw(st.sampled_from([0, 0, 1, 2])) * HOUR + BETWEEN_PASSES
            for name, idle, groups in draw(
                st.lists(st.tuples(user, FEW, st.sampled_from([[], ["gpu"], ["staff"]])), min_size=1, max_size=3)
            ):
                hub.user_is_there(name, 2 * idle, admin=draw(st.booleans()), groups=groups)
            for name, named, its in draw(st.lists(st.tuples(user, server, SERVERS), min_size=1, max_size=5)):
                hub.server_is_up(name, named, its)
            for change in draw(
                st.lists(st.tuples(st.sampled_from(CHANGES + SUBTLE_CHANGES), user, server), max_size=1)
            ):
                hub.change(*change)
            is_disturbed, decision_is_old = draw(st.booleans()), draw(st.booleans())
            changes = CHANGES if decision_is_old else CHANGES + SUBTLE_CHANGES
            monkeypatch.setattr("cull_idle.OLD_DECISION", 0.0 if decision_is_old else 1e9)
            if is_disturbed:
                surprises = st.builds(Surprise, st.sampled_from(changes), server, st.integers(0, 4))
                hub.disturb(
                    draw(st.lists(TROUBLES, max_size=3) | st.just([])),
                    draw(st.lists(surprises, min_size=2, max_size=4)),
                )
            passing = draw(options)
            watch.make_pass(passing, is_disturbed=is_disturbed, decision_is_old=decision_is_old)
            hub.disturb((), ())
        hub.now += BETWEEN_PASSES
        monkeypatch.setattr("cull_idle.OLD_DECISION", 1e9)
        watch.make_pass(passing, is_disturbed=False)
