#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["click>=8.4.1", "python-dateutil>=2.9", "requests>=2.32.2"]
# ///
"""Stop the idle servers of a JupyterHub through its REST API.

It polls the Hub's user list and stops every server whose last activity is older than a limit: once, or in a loop.
The API token comes from $JUPYTERHUB_API_TOKEN or --token-file, never from the command line.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import enum
import gc
import os
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property, lru_cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TextIO, TypeVar

import click

# What takes long to import is imported where it is needed: --help and --version answer at once.
if TYPE_CHECKING:
    import logging
    import socket
    from concurrent.futures import Future, ThreadPoolExecutor

    import urllib3

__version__ = "0.1.0"

PROGRAM = "cull_idle.py"
T = TypeVar("T")
Target = TypeVar("Target", "Server", "User")

# ---- What can go wrong, and what the program exits with


class Exit(enum.IntEnum):
    """What an exit code means to cron, systemd and scripts."""

    DONE = 0  # all that was due is done; nothing due is fine
    UNDONE = 1  # something due was not done
    USAGE = 2  # an option, or the token, is wrong
    NO_HUB = 3  # the Hub could not be used


class CullError(Exception):
    """A failure; its text is the sentence that the administrator reads."""

    exit_code: Exit


class UsageError(CullError):
    """What was given cannot be used."""

    exit_code = Exit.USAGE


class FuseBlown(CullError):
    """More is due than one pass may cull."""

    exit_code = Exit.UNDONE


class UnreadableError(CullError):
    """A rule needs what the Hub does not show: to guess would cull what the rule may keep."""

    exit_code = Exit.NO_HUB


class HubError(CullError):
    """The Hub, or whatever answers at its URL, cannot be used like this."""

    exit_code = Exit.NO_HUB
    of_all = False  # what is asked next may come to the same


class TryAgain(HubError):
    """The Hub cannot be used now, but perhaps soon: after `pause` seconds, if it said so."""

    of_all = True

    def __init__(self, sentence: str, pause: float = 0) -> None:
        super().__init__(sentence)
        self.pause = pause


def printable(text: str) -> str:
    """Escape what a terminal or a log reader could take for more than text, such as control characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, width: int = 200) -> str:
    """Text of the Hub's, on one line, escaped and cut to at most width characters."""
    line = printable(" ".join(text[: 4 * width].split()))
    return line if len(line) <= width else line[: width - 1] + "…"


# ---- Durations and times

ZERO = timedelta(0)
NEVER = timedelta.max
LAST_YEAR = 9000  # there is no counting with later ones
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
UNITS = {"weeks": "w", "days": "d", "hours": "h", "minutes": "m", "seconds": "s"}
DURATION = r"\s*".join(f"(?:(?P<{name}>{NUMBER}){unit})?" for name, unit in UNITS.items())


def parse_duration(text: str) -> timedelta:
    """Read seconds (`3600`) or numbers with units, the largest first (`90s`, `1h30m`, `1.5h`, `2d`, `1w`).

    Raises ValueError, with a sentence, for anything else.
    """
    words = text.strip().lower()
    match = re.fullmatch(DURATION, f"{words}s" if re.fullmatch(NUMBER, words) else words)
    if not words or not match:
        raise ValueError(
            f"{shorten(text, 40)!r} is not a duration: write seconds, or like 90s, 15m, 1.5h, 1h30m, 2d, 1w."
        )
    try:
        return timedelta(**{name: float(number) for name, number in match.groupdict(default="0").items()})
    except OverflowError:
        raise ValueError(f"{shorten(text, 40)!r} is too long a duration.") from None


def parse_limit(text: str) -> timedelta:
    """Read a duration, or `never` as NEVER. Raises ValueError, as parse_duration."""
    return NEVER if text.strip().lower() == "never" else parse_duration(text)


def format_duration(duration: timedelta, units: int = 4) -> str:
    """Write a duration as parse_duration reads it (`2h03m`, `1d04h`), cut to whole seconds and `units` units."""
    minutes, seconds = divmod(int(duration.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    del parts[units:]
    while len(parts) > 1 and not parts[-1][0]:
        parts.pop()
    (number, unit), *rest = parts
    return f"{number}{unit}" + "".join(f"{number:02}{unit}" for number, unit in rest)


def parse_time(text: object) -> datetime | None:
    """Read a timestamp of the Hub's, null as None. One without a zone is UTC: Hubs before 0.9 left it out.

    Raises ValueError for what is not a moment; a date without a time of day could be off by a day.
    """
    try:
        moment = datetime.fromisoformat(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        moment = None
    if moment and moment.tzinfo:
        return moment
    if text is None:
        return None
    if not isinstance(text, str) or len(text) <= len("2026-11-22"):
        raise ValueError(f"{shorten(str(text), 40)!r} is not a time")
    if not moment:
        from dateutil.parser import isoparse  # slower, and slow to import, but reads more of ISO 8601

        try:
            moment = isoparse(text)
        except (ValueError, OverflowError):
            raise ValueError(f"{shorten(text, 40)!r} is not a time") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def parse_http_date(text: str | None) -> datetime:
    """Read a Date header; the local clock stands in for one that is missing or garbage."""
    from email.utils import parsedate_to_datetime

    try:
        moment = parsedate_to_datetime(text or "")
    except (ValueError, OverflowError):
        return datetime.now(UTC)
    if moment.year > LAST_YEAR:
        return datetime.now(UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


# ---- The Hub's users and servers, as values


class Server(NamedTuple):
    """A server that the Hub does not call stopped."""

    user: str
    name: str  # empty for the default server
    ready: bool
    pending: str  # what the Hub is doing with it ("spawn", "stop"), empty for nothing
    started: datetime | None  # unknown before JupyterHub 0.9
    last_activity: datetime | None
    doubt: str  # what in the Hub's answer is not understood, empty for nothing
    model: Mapping[str, Any]  # as the Hub has it, for an arbiter
    user_model: Mapping[str, Any]

    @property
    def full_name(self) -> str:
        """The name as the Hub writes it, safe to print: `ann`, or `ann/gpu` for a named server."""
        return printable(f"{self.user}/{self.name}" if self.name else self.user)

    def facts(self, field: str) -> tuple[str, ...] | None:
        """What a rule may match: the values of `server`, `option.KEY`, `state.KEY` or a field of the user's.

        None for what the Hub does not show.
        """
        if field == "server":
            return (self.name,)
        kind, _, key = field.partition(".")
        if not key:
            return user_facts(self.user_model, field)
        shown = self.model.get({"option": "user_options", "state": "state"}[kind])
        return as_texts(shown.get(key, [])) if isinstance(shown, dict) else None


class User(NamedTuple):
    """A user, with the servers that the token may see."""

    name: str
    admin: bool
    created: datetime | None  # unknown before JupyterHub 0.9
    last_activity: datetime | None
    servers: list[Server]
    doubt: str  # what in the Hub's answer is not understood, empty for nothing
    model: Mapping[str, Any]  # as the Hub has it

    @property
    def full_name(self) -> str:
        """The name, safe to print and not to be mistaken for a server's."""
        return f"user {printable(self.name)}"

    def facts(self, field: str) -> tuple[str, ...] | None:
        """What a rule may match: the values of `user`, `group` or `admin`; None for what the Hub does not show."""
        return user_facts(self.model, field)

    def server(self, name: str) -> Server | None:
        """The server of that name, if there is one."""
        return next((server for server in self.servers if server.name == name), None)


def user_facts(model: Mapping[str, Any], field: str) -> tuple[str, ...] | None:
    """The values of a user's `user`, `group` or `admin`, as facts of Server has it."""
    shown = model.get({"user": "name", "group": "groups", "admin": "admin"}[field])
    return None if shown is None else as_texts(shown)


def as_texts(value: object) -> tuple[str, ...]:
    """A JSON value, or the values of a list, as texts that a glob can match."""
    return tuple(map(as_text, value)) if isinstance(value, list) else (as_text(value),)


def as_text(value: object) -> str:
    """A JSON value as a text: `true`, `7`."""
    return value if isinstance(value, str) else str(value).lower()


def read_user(model: object) -> User:
    """Turn a user model of the REST API, of any Hub since 0.6, into values.

    What is missing or malformed makes a `doubt`; raises ValueError only for what has no name.
    https://jupyterhub.readthedocs.io/en/stable/reference/rest-api.html#/default/get_users
    """
    model = named(model)
    created, last_activity, doubt = None, None, ""
    try:
        created = parse_time(model.get("created"))
        last_activity = parse_time(model.get("last_activity")) or created  # null until the first activity
    except ValueError as error:
        doubt = f"created or last_activity: {error}"
    admin = model.get("admin")
    if "last_activity" not in model:
        doubt = "its last_activity is not shown: that takes the scope read:users:activity"
    elif last_activity is None:
        doubt = doubt or "neither last_activity nor created is known"
    elif not isinstance(admin, bool):
        doubt = "the Hub does not say whether it is an admin"
    return User(model["name"], admin is not False, created, last_activity, read_servers(model), doubt, model)


def read_servers(model: object) -> list[Server]:
    """Turn the servers in a user model into values, all that a pass needs that leaves users alone. As read_user."""
    model = named(model)
    name, servers = model["name"], model.get("servers")
    if isinstance(servers, dict):
        if "" not in servers and model.get("pending"):
            # JupyterHub 0.8 with named servers lists the ready ones: what the default one waits for is the user's.
            servers = {**servers, "": {"url": None}}
        return [
            read_server(name, server_name, server, model)
            for server_name, server in servers.items()
            if not (isinstance(server, dict) and server.get("stopped") is True)
        ]
    if "servers" not in model and "server" in model and "created" not in model:
        # JupyterHub 0.6 to 0.8 without named servers: the default server is described by the user's own keys.
        running = model["server"] or model.get("pending")
        return [read_server(name, "", {"url": model["server"]}, model)] if running else []
    doubt = "its servers are not shown: that takes the scope read:servers"
    return [Server(name, "", False, "", None, None, doubt, {}, model)]


def named(model: object) -> dict[str, Any]:
    """Pass on what is a user model as far as that it has a name. Raises ValueError."""
    if isinstance(model, dict) and isinstance(name := model.get("name"), str) and name:
        return model
    raise ValueError("answered a user without a name")


def read_server(user: str, name: str, model: object, user_model: Mapping[str, object]) -> Server:
    """Turn a server model, with the user model around it, into values."""
    if not isinstance(model, dict):
        return Server(user, name, False, "", None, None, "its model is not a JSON object", {}, user_model)
    if "ready" not in model and "pending" not in model and "last_activity" not in model:
        # JupyterHub 0.6 to 0.8: `url` is set once the server is ready, and all else is said of the user only.
        model = {
            **model,
            "ready": bool(model.get("url")),
            "pending": user_model.get("pending"),
            "last_activity": user_model.get("last_activity"),
        }
    started, last_activity, doubt = None, None, ""
    try:
        started = parse_time(model.get("started"))
        last_activity = parse_time(model["last_activity"]) or started  # null until the first activity
        ready, pending = model["ready"], model["pending"]
        if last_activity is None:
            doubt = "neither last_activity nor started is known"
        elif not isinstance(ready, bool):
            doubt = "ready is neither true nor false"
    except ValueError as error:
        return Server(user, name, False, "", None, None, f"started or last_activity: {error}", model, user_model)
    except KeyError as key:
        return Server(user, name, False, "", None, None, f"{key.args[0]} is missing", model, user_model)
    pending = str(pending) if pending else ""
    return Server(user, name, ready is True, pending, started, last_activity, doubt, model, user_model)


# ---- Decisions: pure, from a model, a policy and the Hub's clock


class Limit(NamedTuple):
    """A duration from which on something is due, and where it comes from."""

    duration: timedelta  # NEVER for none
    source: str = ""  # " by rule …"; empty for an option

    def __str__(self) -> str:
        limit = "no limit" if self.duration == NEVER else f"limit {format_duration(self.duration)}"
        return limit + self.source


class Policy(NamedTuple):
    """What is due of servers, or of users."""

    timeout: Limit
    max_age: Limit
    default_servers: bool = True
    named_servers: bool = True
    admins: bool = True
    kept_by: str = ""  # the rule that keeps it, whatever the limits
    arbiter: Arbiter | None = None  # decides about servers in place of the timeout


class Verdict(NamedTuple):
    """Whether to cull, and why."""

    cull: bool
    because: str  # "idle" or "age" where a limit decided, else the reason in words
    idle: timedelta | None = None
    age: timedelta | None = None
    limit: Limit | None = None
    doubt: bool = False  # it is kept only because something is not understood

    @property
    def reason(self) -> str:
        """The reason as a log line carries it: `idle 2h03m, limit 1h`."""
        measured = {"idle": self.idle, "age": self.age}.get(self.because)
        if measured is None:
            return self.because
        return f"{self.because} {format_duration(measured, units=2)}, {self.limit}"


def weigh(active: datetime, born: datetime | None, policy: Policy, now: datetime) -> Verdict:
    """Judge something last active and born at these moments by the policy's limits."""
    # `now` is cut to whole seconds, so what is active at this moment seems to be so in the future.
    idle = now - active if active < now else ZERO
    age = None if born is None else now - born if born < now else ZERO
    if idle >= policy.timeout.duration and not policy.arbiter:
        return Verdict(True, "idle", idle, age, policy.timeout)
    if age is not None and age >= policy.max_age.duration:
        return Verdict(True, "age", idle, age, policy.max_age)
    return Verdict(False, "idle", idle, age, policy.timeout)


def judge_server(server: Server, policy: Policy, now: datetime) -> Verdict:
    """Decide whether a server is to be stopped, at `now` by the Hub's clock. In doubt it is kept."""
    if server.doubt or server.last_activity is None:
        return Verdict(False, server.doubt, doubt=True)
    verdict = weigh(server.last_activity, server.started, policy, now)
    if server.pending:
        return verdict._replace(cull=False, because=f"pending {shorten(server.pending, 20)}")
    if not server.ready:
        return verdict._replace(cull=False, because="not ready")
    if server.name and not policy.named_servers:
        return verdict._replace(cull=False, because="named servers are not culled")
    if not server.name and not policy.default_servers:
        return verdict._replace(cull=False, because="default servers are not culled")
    if policy.kept_by:
        return verdict._replace(cull=False, because=policy.kept_by)
    if policy.arbiter and not verdict.cull:
        return arbitrate(server, verdict, policy.timeout.duration, policy.arbiter)
    return verdict


def due_soon(
    server: Server, verdict: Verdict, policy: Policy, now: datetime, within: timedelta
) -> tuple[datetime, Verdict] | None:
    """When a server that is kept `now` will be due and by which limit, if nothing happens and it is within a duration.

    What an arbiter will say, nobody knows.
    """
    if policy.arbiter:
        policy = policy._replace(arbiter=None, timeout=Limit(NEVER))
    if not judge_server(server, policy, now + within).cull:
        return None
    limits = ((server.last_activity, policy.timeout.duration), (server.started, policy.max_age.duration))
    due = min(since + limit for since, limit in limits if since and limit <= now + within - since)
    then = judge_server(server, policy, due)
    return due, verdict._replace(because=then.because, limit=then.limit)


def judge_user(user: User, policy: Policy, now: datetime) -> Verdict:
    """Decide whether a user is to be deleted, its servers left aside. In doubt it is kept."""
    if user.doubt or user.last_activity is None:
        return Verdict(False, user.doubt, doubt=True)
    verdict = weigh(user.last_activity, user.created, policy, now)
    if user.admin and not policy.admins:
        return verdict._replace(cull=False, because="admins are not deleted")
    if policy.kept_by:
        return verdict._replace(cull=False, because=policy.kept_by)
    return verdict


# ---- An arbiter: a decision of the administrator's own


class Arbiter(NamedTuple):
    """A function, plain or async, that says whether to cull a server; it gets those of ARBITER_ARGUMENTS it takes."""

    function: Callable[..., object]
    arguments: frozenset[str]

    def __call__(self, **arguments: object) -> bool:
        """Ask it. Raises whatever it raises."""
        import asyncio
        import inspect

        answer = self.function(**{name: value for name, value in arguments.items() if name in self.arguments})
        if inspect.isawaitable(answer):
            answer = asyncio.run(awaited(answer))
        return bool(answer)


async def awaited(awaitable: Awaitable[object]) -> object:
    """Wait for any awaitable: asyncio.run takes coroutines only."""
    return await awaitable


ARBITER_ARGUMENTS = frozenset(("inactive", "inactive_limit", "server", "user"))


def load_arbiter(name: str) -> Arbiter:
    """Load `MODULE:FUNC` or `FILE.py:FUNC`. Raises ValueError, with a sentence, for what cannot be used."""
    import importlib
    import importlib.util
    import inspect

    source, _, function_name = name.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(os.path.basename(source).removesuffix(".py"), source)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            # jupyterhub-idle-culler's config files end in `c.IdleCuller.cull_arbiter_hook = …`
            vars(module)["c"] = SimpleNamespace(IdleCuller=SimpleNamespace())
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            module = importlib.import_module(source)
        function = getattr(module, function_name)
        parameters = inspect.signature(function).parameters
    except Exception as error:  # whatever a module of the administrator's raises
        raise ValueError(f"{name!r} cannot be loaded: {type(error).__name__}: {shorten(str(error))}.") from None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return Arbiter(function, ARBITER_ARGUMENTS)
    if unknown := [n for n, p in parameters.items() if p.default is p.empty and n not in ARBITER_ARGUMENTS]:
        raise ValueError(f"{name!r} wants {unknown[0]!r}, and is given only {', '.join(sorted(ARBITER_ARGUMENTS))}.")
    return Arbiter(function, ARBITER_ARGUMENTS & parameters.keys())


def arbitrate(server: Server, verdict: Verdict, limit: timedelta, arbiter: Arbiter) -> Verdict:
    """Let the arbiter decide about a server that no other limit makes due. One that fails keeps it."""
    try:
        cull = arbiter(
            inactive=verdict.idle, inactive_limit=limit.total_seconds(), server=server.model, user=server.user_model
        )
    except Exception as error:  # whatever a function of the administrator's raises
        why = f"the arbiter failed: {type(error).__name__}: {shorten(str(error))}"
        return verdict._replace(because=why, doubt=True)
    idle = "" if verdict.idle is None else f", idle {format_duration(verdict.idle, units=2)}"
    return verdict._replace(cull=cull, because=f"the arbiter says {'cull' if cull else 'keep'}{idle}")


# ---- Rules: exceptions for some servers and users

MATCHES = ("user", "group", "server", "admin", "option.KEY", "state.KEY")
RULE_HELP = f"write matches ({', '.join(f'{name}=' for name in MATCHES)}) and settings (timeout=, max-age=, keep)"


def of_server(field: str) -> bool:
    """Whether what a rule matches is a server's, and no user has it."""
    return field.partition(".")[0] in ("server", "option", "state")


class Rule(NamedTuple):
    """An exception: all matches must hold for it to apply. What it does not set comes from the options."""

    text: str
    matches: tuple[tuple[str, re.Pattern[str]], ...]  # of fields, as facts of Server has them
    timeout: timedelta | None
    max_age: timedelta | None
    keep: bool

    @property
    def of_users(self) -> bool:
        """Whether it may apply to users too: it matches nothing of a server."""
        return not any(of_server(field) for field, _ in self.matches)


def parse_rule(text: str) -> Rule:
    """Read `MATCH… SETTING…`, words as in a shell. Raises ValueError, with a sentence that names the wrong word."""
    import fnmatch
    import shlex

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{shorten(text)!r}: {error}.") from None
    matches: list[tuple[str, re.Pattern[str]]] = []
    limits: dict[str, timedelta] = {}
    keep = False
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("max_age", "max-age")
        kind, dot, key = name.partition(".")
        if word == "keep":
            keep = True
        elif equals and name in ("timeout", "max-age") and name not in limits:
            try:
                limits[name] = parse_limit(value)
            except ValueError as error:
                raise ValueError(f"{shorten(word)!r}: {error}") from None
        elif equals and (
            (kind in ("user", "group", "server") and not dot)
            or (kind in ("option", "state") and key)
            or (name == "admin" and value in ("true", "false"))
        ):
            matches.append((name, re.compile(fnmatch.translate(value))))
        else:
            raise ValueError(f"{shorten(word)!r} in {shorten(text)!r} is not understood: {RULE_HELP}.")
    if keep == bool(limits):
        raise ValueError(f"{shorten(text)!r} needs timeout= or max-age=, or keep in their place: {RULE_HELP}.")
    return Rule(printable(text), tuple(matches), limits.get("timeout"), limits.get("max-age"), keep)


class Policies:
    """Which policy applies: that of the first rule that fits, or that of the options.

    For each field that rules match, the rules that its value fits are a set of bits, remembered by the value but for
    names of users: most servers share all else.
    """

    def __init__(self, rules: Sequence[Rule], servers: Policy, users: Policy) -> None:
        self._rules = rules
        self._servers = [*(by_rule(number, rule, servers) for number, rule in enumerate(rules, 1)), servers]
        self._users = [
            *(by_rule(number, rule, users) if rule.keep else users for number, rule in enumerate(rules, 1)),
            users,
        ]
        self._globs: dict[str, list[tuple[int, Callable[[str], object]]]] = {}
        self._all = self._of_users = (1 << len(rules) + 1) - 1
        for number, rule in enumerate(rules):
            for field, glob in rule.matches:
                self._globs.setdefault(field, []).append((1 << number, glob.match))
            if not rule.of_users:
                self._of_users &= ~(1 << number)
        self._fields = list(self._globs)
        self._user_fields = [field for field in self._fields if not of_server(field)]
        self._remembered = lru_cache(maxsize=10_000)(self._find_fitting)

    def of_server(self, server: Server) -> Policy:
        """The policy for a server. Raises UnreadableError."""
        return self._servers[self._first(server, self._fields, self._all)] if self._rules else self._servers[0]

    def of_user(self, user: User) -> Policy:
        """The policy for a user: only rules that match nothing of a server apply. Raises UnreadableError."""
        return self._users[self._first(user, self._user_fields, self._of_users)] if self._rules else self._users[0]

    def _first(self, target: Server | User, fields: Sequence[str], fitting: int) -> int:
        for field in fields:
            values = target.facts(field)
            if values is None:
                raise UnreadableError(
                    f"a rule matches {field}=, which the Hub does not show of {target.full_name};"
                    f" that takes the scope {scope_for(field)}, or a newer Hub"
                )
            fitting &= self._find_fitting(field, values) if field == "user" else self._remembered(field, values)
        return (fitting & -fitting).bit_length() - 1

    def _find_fitting(self, field: str, values: tuple[str, ...]) -> int:
        fitting = self._all
        for bit, fits in self._globs[field]:
            for value in values:  # any() would take half as long again, for each server and rule
                if fits(value):
                    break
            else:
                fitting &= ~bit
        return fitting


def by_rule(number: int, rule: Rule, policy: Policy) -> Policy:
    """The policy that a rule makes of the options' one."""
    name = f"rule {number}: {rule.text}"
    if rule.keep:
        return policy._replace(timeout=Limit(NEVER), max_age=Limit(NEVER), kept_by=name)
    return policy._replace(
        timeout=policy.timeout if rule.timeout is None else Limit(rule.timeout, f" by {name}"),
        max_age=policy.max_age if rule.max_age is None else Limit(rule.max_age or NEVER, f" by {name}"),
    )


def scope_for(field: str) -> str:
    """The scope that shows the token what a rule matches."""
    scopes = {"group": "read:users:groups", "state": "admin:server_state", "option": "read:servers"}
    return scopes.get(field.partition(".")[0], "list:users")


# ---- The Hub

READ_SIZE = 1 << 16  # bytes
LARGEST_BODY = 1 << 28  # bytes; the list of half a million users, from a Hub that knows no pages
NO_API = "--url must lead to a JupyterHub API, and usually ends in /hub/api"
NO_TLS = "a Hub with internal_ssl wants --ssl-enabled and its --internal-certs-location, another CA $REQUESTS_CA_BUNDLE"
NO_TOKEN = (
    "the token must be of this Hub, not expired, and its owner have a role or, before JupyterHub 2.0, be an admin"
)


class Answer(NamedTuple):
    """What the Hub answered to one request."""

    status: int
    body: bytes
    now: datetime  # the Hub's clock

    def json(self) -> object:
        """The body as JSON, whatever its Content-Type says: JupyterHub 0.6 and 0.7 call it HTML. Raises ValueError."""
        import json

        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            looks = "HTML" if self.body.lstrip()[:1] == b"<" else "no JSON" if self.body else "nothing"
            raise ValueError(f"answered {looks}") from None

    def __str__(self) -> str:
        """What it was, for a sentence, with the Hub's own words."""
        with contextlib.suppress(ValueError):
            match self.json():
                case {"message": str(words)} if words:
                    return f"answered {self.status} ({shorten(words)})"
        return f"answered {self.status}"


class Page(NamedTuple):
    """A part of the user list; the whole list from Hubs before 2.0."""

    models: list[object]
    now: datetime  # the Hub's clock
    offset: int
    next: object = None  # null on the last page, else {"offset": …}
    total: object = None  # how many users there are, if the Hub says so

    def next_offset(self) -> int | None:
        """Where the next page starts, None after the last. Raises HubError for a pagination that would never end."""
        if self.next is None:
            return None
        offset = self.next.get("offset") if isinstance(self.next, dict) else None
        total = self.total if isinstance(self.total, int) else sys.maxsize
        if type(offset) is not int or not self.offset < offset < total:
            raise HubError(
                f"GET /users: the page after offset {self.offset} would start at {offset}; the rest is not read"
            )
        return offset


def read_page(answer: Answer, offset: int) -> Page | None:
    """Read an answer as the part of the user list that begins there, None if it is other JSON. Raises ValueError."""
    match answer.json():
        case list(models):
            return Page(models, answer.now, offset)
        case {"items": list(models), "_pagination": {"next": following} as pagination}:
            return Page(models, answer.now, offset, following, pagination.get("total"))
    return None


def read_body(response: urllib3.BaseHTTPResponse) -> bytes:
    """Read an answer's body. Raises ValueError for one that is too large to be an answer."""
    chunks, size = [], 0
    for chunk in response.stream(READ_SIZE, decode_content=True):
        chunks.append(chunk)
        size += len(chunk)
        if size > LARGEST_BODY:
            raise ValueError(f"the answer has more than {LARGEST_BODY >> 20} MiB")
    return b"".join(chunks)


def punctual(connection: type) -> type:
    """Connections whose timeout bounds a whole answer; that of urllib3 bounds each read, and an answer may drip."""
    import io
    from http.client import HTTPResponse

    class Reader(io.RawIOBase):
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock
            self.stream = sock.makefile("rb", buffering=0)  # keeps the socket open for as long as it is read
            self.deadline = time.monotonic() + (sock.gettimeout() or 0)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.sock.settimeout(max(self.deadline - time.monotonic(), 0.001))
            return self.stream.readinto(buffer) or 0

        def close(self) -> None:
            self.stream.close()
            super().close()

    class Response(HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            self.fp.close()
            self.fp = io.BufferedReader(Reader(sock), READ_SIZE)

    return type("Connection", (connection,), {"response_class": Response})


class ClientTLS(NamedTuple):
    """The certificates, as paths, with which a Hub with internal_ssl and its clients know each other."""

    key: str
    cert: str
    ca: str


class Identity(NamedTuple):
    """Whose a token is, and what it may do."""

    kind: str  # "service" or "user"
    name: str
    scopes: set[str]  # expanded, without their filters


class Hub:
    """The REST API of one Hub, as far as culling needs it.

    Threads may share it: each has a connection of its own. Every method that asks raises HubError, or its TryAgain
    where another try may help. The token goes into the Authorization header and nowhere else: requests finds the way
    and the certificates, but sends nothing itself, or it would follow redirects, keep cookies and look into .netrc.
    """

    def __init__(self, url: str, token: str, request_timeout: timedelta, tls: ClientTLS | None = None) -> None:
        self.url = url
        self._headers = {
            "Authorization": f"token {token}",
            "Accept": "application/jupyterhub-pagination+json",
            "User-Agent": f"cull_idle/{__version__}",
        }
        self._timeout = request_timeout
        self._tls = tls
        self.version: str | None = None  # of JupyterHub, as soon as it has said so
        self._rewritten: dict[str, bool] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if "_way" in vars(self):
            self._way[0].close()  # on their own they are closed when the last exception from them is freed

    def page(self, offset: int, *, size: int, ready_only: bool) -> Page:
        """Read a page of the user list: `size` users from an offset on, or as many as the Hub likes if that is 0.

        With `ready_only`, only users with a ready server. Hubs before 1.3 ignore this, those before 2.0 all the rest.
        """
        query = {"state": "ready" if ready_only else None, "limit": size, "offset": offset}
        answer = self._ask("GET", "/users", {key: value for key, value in query.items() if value})
        if answer.status in (401, 403):
            raise HubError(f"GET /users: {self.url} {answer}; {NO_TOKEN}")
        if answer.status != 200:
            raise HubError(f"GET /users: {self.url} {answer}; {NO_API}")
        try:
            page = read_page(answer, offset)
        except ValueError as error:
            raise HubError(f"GET /users: {self.url} {error}; {NO_API}") from None
        if page is None:
            raise HubError(f"GET /users: {self.url} answered JSON that is not a user list; {NO_API}")
        return page

    def user(self, name: str) -> tuple[User | None, datetime]:
        """Look at one user; None if there is no such user, or no such request; and the Hub's clock."""
        answer = self._ask("GET", path := f"/users/{segment(name)}")
        if answer.status in (404, 405):
            return None, answer.now
        if answer.status != 200:
            raise HubError(f"GET {path}: the Hub {answer}")
        try:
            user = read_user(answer.json())
        except ValueError as error:
            raise HubError(f"GET {path}: the Hub {error}") from None
        if user.name != name:
            raise HubError(f"GET {path}: the Hub answered another user")
        return user, answer.now

    def knows(self, name: str) -> bool:
        """Whether the Hub does not deny that there is such a user."""
        return self._ask("GET", f"/users/{segment(name)}").status != 404

    def stop(self, server: Server, *, remove: bool) -> Answer:
        """Tell the Hub to stop a server and, if it is a named one, also to remove it."""
        path = f"/users/{segment(server.user)}"
        if not server.name:
            return self._ask("DELETE", f"{path}/server")
        return self._ask("DELETE", f"{path}/servers/{segment(server.name)}", body={"remove": True} if remove else None)

    def delete_user(self, name: str) -> Answer:
        """Tell the Hub to delete a user, and to stop the user's servers first."""
        return self._ask("DELETE", f"/users/{segment(name)}")

    def check_way_for(self, *names: str) -> None:
        """Raise HubError if a proxy on the way to the Hub would make another's path of one with these names.

        configurable-http-proxy does of one with a server named `.`, and nginx of one with `../../ann/server` if its
        proxy_pass ends in a path.
        """
        for code in {code for name in names for code in risky_codes(name)}:
            if self._rewrites(code):
                raise HubError(
                    f"a proxy on the way to {self.url} rewrites {code} in paths, so that this name may come to mean"
                    " another's; it must pass paths on unchanged, or --url lead past it"
                )

    def identity(self) -> Identity | None:
        """Whose the token is and which scopes it has; None from Hubs that cannot tell (before 2.0)."""
        answer = self._ask("GET", "/user")
        with contextlib.suppress(ValueError):
            match answer.json():
                case {"kind": str(kind), "name": str(name), "scopes": list(scopes)}:
                    return Identity(kind, name, {str(scope).partition("!")[0] for scope in scopes})
        return None

    def _rewrites(self, code: str) -> bool:
        """Whether the user list is found where it is only if this code is decoded."""
        if code not in self._rewritten:
            answer = self._ask("GET", LEADS_TO_USERS[code], {"limit": 1})
            self._rewritten[code] = False
            with contextlib.suppress(ValueError):
                self._rewritten[code] = read_page(answer, 0) is not None
        return self._rewritten[code]

    def _ask(self, method: str, path: str, query: Mapping[str, object] | None = None, body: object = None) -> Answer:
        """Send one request and read its answer."""
        import json
        from urllib.parse import urlencode

        import urllib3

        try:
            pool, api = self._way
            headers = self._headers if body is None else {**self._headers, "Content-Type": "application/json"}
            response = pool.urlopen(
                method,
                f"{api}{path}" + (f"?{urlencode(query)}" if query else ""),
                None if body is None else json.dumps(body),
                headers,
                retries=False,
                redirect=False,
                timeout=self._timeout.total_seconds(),
                preload_content=False,
                enforce_content_length=True,
            )
            with contextlib.closing(response):
                content = read_body(response)
        except (OSError, urllib3.exceptions.HTTPError, ValueError) as error:  # all that requests raises is an OSError
            raise no_answer(f"{method} {path}", self.url, error, self._timeout) from None
        self.version = response.headers.get("X-JupyterHub-Version", self.version)
        answer = Answer(response.status, content, parse_http_date(response.headers.get("Date")))
        if answer.status in (429, 502, 503, 504):
            pause = parse_retry_after(response.headers.get("Retry-After"), answer.now)
            raise TryAgain(f"{method} {path}: the Hub {answer}", pause)
        if 300 <= answer.status < 400:
            where = shorten(response.headers.get("Location", "nowhere"))
            raise HubError(f"{method} {path}: {self.url} redirects to {where}, which is not followed; {NO_API}")
        return answer

    @cached_property
    def _way(self) -> tuple[urllib3.HTTPConnectionPool, str]:
        """Connections to the Hub, and the API's path there."""
        import requests

        request = requests.Request("GET", self.url).prepare()
        cert = (self._tls.cert, self._tls.key) if self._tls else None
        verify: Any = self._tls.ca if self._tls else None
        proxies: Any = None  # one for plain HTTP would see the token
        if self.url.startswith("https:"):
            by_user = requests.Session().merge_environment_settings(self.url, {}, None, verify, cert)
            verify, proxies = by_user["verify"], by_user["proxies"]
        adapter = requests.adapters.HTTPAdapter()
        pool: Any = adapter.get_connection_with_tls_context(request, verify, proxies, cert)
        adapter.cert_verify(pool, self.url, verify, cert)  # type: ignore[no-untyped-call]
        pool.ConnectionCls = punctual(pool.ConnectionCls)
        return pool, request.path_url.rstrip("/")


def segment(name: str) -> str:
    """A name as one segment of a path, such that no server or proxy takes a part of it for anything else."""
    from urllib.parse import quote

    quoted = quote(name, safe="", errors="surrogatepass")
    return quoted.replace(".", "%2E") if not quoted.strip(".") else quoted


# Below the API's path, and by what is to be decoded in it for it to become that of the user list: else it is none.
LEADS_TO_USERS = {"%2F": "%2Fusers", "%2E": "/%2E/users", "%3F": "/users%3F"}


def risky_codes(name: str) -> list[str]:
    """What must not be decoded in a name's segment, because it would be more than one then, or none, or another."""
    if name in (".", ".."):
        return ["%2E"]
    return ["%2F"] * ("/" in name) + ["%3F"] * any(sign in name for sign in "?#%")


def parse_retry_after(text: str | None, now: datetime) -> float:
    """Seconds that a Retry-After header asks for, 0 for one that is missing or garbage."""
    from email.utils import parsedate_to_datetime

    if text and text.isdecimal():
        return float(text)
    try:
        return (parsedate_to_datetime(text or "") - now).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0


def no_answer(request: str, url: str, error: Exception, timeout: timedelta) -> HubError:
    """The sentence for a request that was not answered."""
    import socket

    from urllib3 import exceptions

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and not isinstance(cause, TypeError):
        causes.append(cause)  # a TypeError is how urllib3 1 finds out that this is not Python 2

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    where = f"{request}: {url}"
    if caused_by(exceptions.ProxyError):
        return TryAgain(f"{where} is not reached through the proxy of $HTTPS_PROXY ({type(causes[-1]).__name__})")
    if caused_by(exceptions.SSLError):
        why = shorten(str(causes[-1]))
        return HubError(f"{where}: TLS failed: {why}; {NO_TLS}")
    if caused_by(socket.gaierror):
        return TryAgain(f"{where}: its host name does not resolve; is --url right?")
    if caused_by(ConnectionRefusedError):
        return TryAgain(f"{where} refuses the connection; is the Hub running, and --url right?")
    if caused_by(exceptions.NewConnectionError):
        why = getattr(causes[-1], "strerror", None) or type(causes[-1]).__name__
        return TryAgain(f"{where} cannot be reached: {why}; is --url right?")
    if caused_by(exceptions.TimeoutError):
        late = HubError(f"{where} did not answer within {timeout.total_seconds():g}s (--request-timeout)")
        late.of_all = request.startswith("GET")  # to stop a server may take long
        return late
    if caused_by(exceptions.ProtocolError):
        return TryAgain(
            f"{where}: the connection was lost before the whole answer had come ({type(causes[-1]).__name__});"
            " if it never comes, is it http: or https:?"
        )
    return HubError(f"{where} cannot be asked: {shorten(str(causes[-1]))}")


# ---- Scopes: what the token must be allowed to do, from JupyterHub 2.0 on


def role_for(settings: Settings, identity: Identity | None) -> str:
    """The lines of jupyterhub_config.py that allow the token's owner what these settings need."""
    import json

    scopes = ["list:users", "read:users:activity", "read:servers", "delete:servers"]
    if settings.cull_users:
        scopes.append("admin:users")
    scopes += [scope for scope in settings.rule_scopes if scope not in scopes]
    kind, name = (identity.kind, identity.name) if identity else ("service", "cull-idle")
    role = {"name": "cull-idle", "scopes": scopes, f"{kind}s": [name]}
    return f"c.JupyterHub.load_roles.append({json.dumps(role)})"


def check_scopes(identity: Identity, settings: Settings) -> None:
    """Raise HubError, with the role that would help, if the token may not do what these settings need."""
    needed = ["list:users", "read:servers"]
    needed += [scope for scope in settings.rule_scopes if scope not in needed]
    if not settings.dry_run and settings.explain is None:
        needed.append("delete:servers")
        if settings.cull_users and "delete:users" not in identity.scopes:
            needed.append("admin:users")
    if missing := [scope for scope in needed if scope not in identity.scopes]:
        raise HubError(
            f"the token of {identity.kind} {printable(identity.name)} lacks {' and '.join(missing)};"
            f" add to jupyterhub_config.py: {role_for(settings, identity)}"
        )


# ---- A pass: scan, then cull

PAUSES = (0.5, 1, 2)  # seconds between tries
LONGEST_PAUSE = 30.0  # seconds, whatever Retry-After says
IN_VAIN = 10  # so many in a row without an answer, or two for each request in flight, end a pass


class Due(NamedTuple, Generic[Target]):
    """A server or user, and what was decided about it."""

    target: Target
    verdict: Verdict


class Outcome(enum.StrEnum):
    """What became of something that is due, or soon will be."""

    PLANNED = "planned"  # by a dry run
    WARNED = "warned"  # kept, but due soon
    CULLED = "culled"
    STOPPING = "stopping"
    GONE = "gone"
    SPARED = "spared"
    FAILED = "failed"


OF_DUE = [outcome for outcome in Outcome if outcome not in (Outcome.PLANNED, Outcome.WARNED)]


class Event(NamedTuple):
    """What became of one server or user."""

    target: Server | User
    outcome: Outcome
    reason: str
    verdict: Verdict
    error: str = ""  # why it failed
    due: datetime | None = None  # from when on something that is warned will be culled
    ends_pass: bool = False  # the token may not do this to anything
    in_vain: bool = False  # the Hub did not answer, and may not answer anything

    def __str__(self) -> str:
        deleted = self.outcome is Outcome.CULLED and isinstance(self.target, User)
        why = f"{self.reason}; {self.error}" if self.error else self.reason
        return f"{'deleted' if deleted else self.outcome} {self.target.full_name}: {why}"


@dataclasses.dataclass(eq=False, repr=False)
class Scan:
    """What the user list says, taken in page by page. What is kept is only told, or a large Hub would not fit."""

    settings: Settings
    keep: Callable[[Due[Server] | Due[User]], None] | None = None  # told what is kept
    complete: bool = False  # the whole list was read
    listed: int = 0  # users
    running: int = 0  # servers
    servers: dict[tuple[str, str], Due[Server]] = dataclasses.field(default_factory=dict)
    users: dict[str, Due[User]] = dataclasses.field(default_factory=dict)
    soon: dict[tuple[str, str], Event] = dataclasses.field(default_factory=dict)  # kept, but due within --warn-before
    idle_for: dict[timedelta, int] = dataclasses.field(default_factory=dict)  # how many servers, at least that long
    doubts: int = 0
    first_doubt: str = ""
    error: HubError | None = None  # why the list is not complete
    # The Hub's, and time.monotonic() at that time.
    clock: tuple[datetime, float] = (datetime(LAST_YEAR, 1, 1, tzinfo=UTC), 0)

    def add(self, page: Page) -> None:
        """Decide about all users and servers of a page."""
        policies, warn_before = self.settings.policies, self.settings.warn_before
        for model in page.models:
            try:
                user = read_user(model) if self.settings.cull_users else None
                servers = user.servers if user else read_servers(model)
            except ValueError as error:
                self._doubt("the user list", str(error))
                continue
            self.listed += 1
            staying = 0
            for server in servers:
                policy = policies.of_server(server)
                verdict = judge_server(server, policy, page.now)
                self.running += server.ready
                if self.idle_for and server.ready:
                    self._measure(verdict)
                if verdict.cull:
                    self.servers.setdefault((server.user, server.name), Due(server, verdict))
                    continue
                staying += 1
                if warn_before and (soon := due_soon(server, verdict, policy, page.now, warn_before)):
                    self._warn(Due(server, verdict), *soon, page.now)
                elif self.keep or verdict.doubt:
                    self._keep(Due(server, verdict))
            if user and not staying:
                verdict = judge_user(user, policies.of_user(user), page.now)
                if verdict.cull:
                    self.users.setdefault(user.name, Due(user, verdict))
                else:
                    self._keep(Due(user, verdict))

    def not_after(self, now: datetime) -> datetime:
        """A second look's time, or what the Hub's clock must show by now if that is earlier.

        An answer without a date, or with that of another clock, must not make an active server seem idle.
        """
        then, at = self.clock
        return min(now, then + timedelta(seconds=time.monotonic() - at))

    def _measure(self, verdict: Verdict) -> None:
        for step in self.idle_for:
            self.idle_for[step] += verdict.idle is not None and verdict.idle >= step

    def _warn(self, kept: Due[Server], due: datetime, verdict: Verdict, now: datetime) -> None:
        if kept.verdict.doubt:
            self._doubt(kept.target.full_name, kept.verdict.reason)
        reason = f"{verdict.reason}; due in {format_duration(due - now, units=2)}"
        event = Event(kept.target, Outcome.WARNED, reason, verdict, due=due)
        self.soon.setdefault((kept.target.user, kept.target.name), event)

    def _keep(self, kept: Due[Server] | Due[User]) -> None:
        if kept.verdict.doubt:
            self._doubt(kept.target.full_name, kept.verdict.reason)
        if self.keep:
            self.keep(kept)

    def _doubt(self, where: str, what: str) -> None:
        self.doubts += 1
        self.first_doubt = self.first_doubt or f"{where}: {what}"


def scan_hub(hub: Hub, scan: Scan, stop: threading.Event) -> Scan:
    """Read the whole user list. After an error, what was read may be stopped, but no user is deleted."""
    settings = scan.settings
    offset: int | None = 0
    try:
        while offset is not None and not stop.is_set():
            read_page = partial(hub.page, offset, size=settings.api_page_size, ready_only=not settings.cull_users)
            asked = time.monotonic()
            page = patiently(read_page, stop)
            scan.clock = page.now, asked
            scan.add(page)
            offset = page.next_offset()
        scan.complete = offset is None
    except HubError as error:
        scan.error = error
        scan.users.clear()
    return scan


def patiently(task: Callable[[], T], stop: threading.Event) -> T:
    """Do a task; while it raises TryAgain, and nobody says stop, do it again after growing pauses, a few times."""
    for pause in PAUSES:
        try:
            return task()
        except TryAgain as failure:
            if stop.wait(min(max(pause, failure.pause), LONGEST_PAUSE)):
                raise
    return task()


class Fuse(NamedTuple):
    """How much one pass may cull."""

    most: float
    percent: bool  # of the ready servers, and of the users

    def __str__(self) -> str:
        return f"{self.most:g}{'%' * self.percent}"

    def check(self, scan: Scan) -> None:
        """Raise FuseBlown if more is due."""
        for what, due, whole in (
            ("servers", len(scan.servers), scan.running),
            ("users", len(scan.users), scan.listed),
        ):
            if due > (self.most * whole / 100 if self.percent else self.most):
                raise FuseBlown(
                    f"nothing is culled, because {due} of {whole} {what} are due and --max-culls is {self};"
                    " look with --dry-run and, if they should go, raise it"
                )


@dataclasses.dataclass(eq=False, repr=False)
class Culling:
    """The second half of a pass: each server and user that the scan found due is looked at once more, and culled."""

    hub: Hub
    scan: Scan
    stop: threading.Event
    ended: bool = False
    in_vain: int = 0  # how many of the last ones, without a break
    # The Hub takes the stop of a server for an activity of its user. So, by name: the users as second looks found them,
    # and from when to when their servers were stopped.
    looks: dict[str, list[User]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    stops: dict[str, list[tuple[datetime, datetime]]] = dataclasses.field(default_factory=lambda: defaultdict(list))

    def events(self) -> Iterator[Event]:
        """Cull, several at a time, and yield what became of each; when told to stop, the rest is left out."""
        if not self.scan.servers and not self.scan.users:
            return
        from concurrent.futures import ThreadPoolExecutor

        staying: set[str] = set()
        with ThreadPoolExecutor(self.scan.settings.concurrency) as workers:
            try:
                for event in self._side_by_side(
                    workers, self._look_at_server, self._stop_server, self.scan.servers.values()
                ):
                    if isinstance(event.target, Server) and event.outcome not in (Outcome.CULLED, Outcome.GONE):
                        staying.add(event.target.user)
                    yield event
                vacant = [due for due in self.scan.users.values() if due.target.name not in staying]
                yield from self._side_by_side(workers, self._look_at_user, self._delete_user, vacant)
            finally:
                self.ended = True
        for name in staying & self.scan.users.keys():
            user, verdict = self.scan.users[name]
            yield Event(user, Outcome.SPARED, "a server is still there", verdict)

    def _side_by_side(
        self,
        workers: ThreadPoolExecutor,
        look: Callable[[Due[Target]], Verdict | Event],
        cull: Callable[[Target, Verdict], Event],
        dues: Iterable[Due[Target]],
    ) -> Iterator[Event]:
        from concurrent.futures import as_completed

        def look_and_cull(due: Due[Target]) -> Event | None:
            seen = look(due)
            if isinstance(seen, Event):
                return seen
            return None if self._over() else cull(due.target, seen)

        def work(due: Due[Target]) -> Event | None:
            if self._over():
                return None
            try:
                event = patiently(partial(look_and_cull, due), self.stop)
            except HubError as error:
                return Event(
                    due.target, Outcome.FAILED, due.verdict.reason, due.verdict, str(error), in_vain=error.of_all
                )
            if event and event.ends_pass:
                self.ended = True
            return event

        for future in as_completed([workers.submit(work, due) for due in dues]):
            if event := future.result():
                yield self._give_up(event)

    def _give_up(self, event: Event) -> Event:
        """End the pass if this is one failure too many that the Hub does not answer; the event then says so."""
        self.in_vain = self.in_vain + 1 if event.in_vain else 0
        if self.in_vain != max(IN_VAIN, 2 * self.scan.settings.concurrency):
            return event
        self.ended = True
        return event._replace(error=f"the pass ends, because the last {self.in_vain} all failed so: {event.error}")

    def _over(self) -> bool:
        """Whether nothing new may be started."""
        return self.ended or self.stop.is_set()

    def _stop_server(self, server: Server, verdict: Verdict) -> Event:
        remove = self.scan.settings.remove_named_servers
        began = time.monotonic()
        answer = self.hub.stop(server, remove=remove)
        match answer.status:
            case 204:
                # The Hub dates its answer when the request comes, others when they send it, all in whole seconds.
                now, around = self.scan.not_after(answer.now), timedelta(seconds=time.monotonic() - began + 2)
                self.stops[server.user].append((now - around, now + around))
                removed = "; removed" if server.name and remove else ""
                return Event(server, Outcome.CULLED, verdict.reason + removed, verdict)
            case 202:
                waited = format_duration(timedelta(seconds=round(time.monotonic() - began)))
                return Event(server, Outcome.STOPPING, f"{verdict.reason}; not down after {waited}", verdict)
            case 404 | 400:
                return Event(server, Outcome.GONE, f"the Hub {answer}", verdict)
        return self._refused(server, verdict, answer, "delete:servers")

    def _look_at_server(self, due: Due[Server]) -> Verdict | Event:
        """Decide again on the fresh model; without one, it is for the DELETE to tell."""
        server, verdict = due
        self.hub.check_way_for(server.user, server.name)
        user, now = self.hub.user(server.user)
        if user is None:
            return verdict
        self.looks[user.name].append(user)
        fresh = user.server(server.name) or next((each for each in user.servers if each.doubt), None)
        if fresh is None:
            return Event(server, Outcome.GONE, "not running any more", verdict)
        if fresh.doubt:
            return Event(server, Outcome.SPARED, fresh.doubt, verdict)
        if fresh.pending == "stop":
            return Event(server, Outcome.STOPPING, "the Hub is stopping it already", verdict)
        if fresh.started != server.started:
            return Event(server, Outcome.SPARED, "it was started anew", verdict)
        verdict = judge_server(fresh, self.scan.settings.policies.of_server(fresh), self.scan.not_after(now))
        return verdict if verdict.cull else Event(server, Outcome.SPARED, change_of_mind(verdict), verdict)

    def _delete_user(self, user: User, verdict: Verdict) -> Event:
        answer = self.hub.delete_user(user.name)
        match answer.status:
            case 204:
                return Event(user, Outcome.CULLED, verdict.reason, verdict)
            case 202:
                return Event(user, Outcome.STOPPING, f"{verdict.reason}; a server is not down yet", verdict)
            case 404:
                return Event(user, Outcome.GONE, f"the Hub {answer}", verdict)
            case 400:  # it has a server that is stopping, or is the token's owner
                return Event(user, Outcome.SPARED, f"the Hub {answer}", verdict)
        return self._refused(user, verdict, answer, "admin:users")

    def _look_at_user(self, due: Due[User]) -> Verdict | Event:
        """Decide again, now that its servers are stopped; that is not to count as activity, all else is."""
        user, verdict = due
        self.hub.check_way_for(user.name)
        fresh, now = self.hub.user(user.name)
        if fresh is None:
            return verdict
        if fresh.servers:
            return Event(user, Outcome.SPARED, "a server is there again", verdict)
        if fresh.created != user.created:
            return Event(user, Outcome.SPARED, "it was created anew", verdict)
        verdict = judge_user(
            self._without_stops(fresh), self.scan.settings.policies.of_user(fresh), self.scan.not_after(now)
        )
        return verdict if verdict.cull else Event(user, Outcome.SPARED, change_of_mind(verdict), verdict)

    def _without_stops(self, user: User) -> User:
        """The user, last active as of all looks, but for activity that was the stop of a server."""
        looks = [*self.looks[user.name], user]
        activities = [look.last_activity for look in looks if look.last_activity]
        own = [at for at in activities if not any(begin <= at <= end for begin, end in self.stops[user.name])]
        doubt = next((look.doubt for look in looks if look.doubt), "")
        return user._replace(last_activity=max(own, default=user.last_activity), doubt=doubt)

    def _refused(self, target: Server | User, verdict: Verdict, answer: Answer, scope: str) -> Event:
        """The event for a DELETE that did not work."""
        error = f"the Hub {answer}"
        if answer.status in (401, 403):
            role = role_for(self.scan.settings, None)
            error += f"; the token needs the scope {scope}, or before JupyterHub 2.0 to be an admin's: {role}"
            return Event(target, Outcome.FAILED, verdict.reason, verdict, error, ends_pass=True)
        owner = target.user if isinstance(target, Server) else target.name
        if answer.status == 500 and not self.hub.knows(owner):  # what JupyterHub 2 to 4 say for a user that is no more
            return Event(target, Outcome.GONE, error, verdict)
        return Event(target, Outcome.FAILED, verdict.reason, verdict, error)


def change_of_mind(verdict: Verdict) -> str:
    """Why the second look spares what the scan found due."""
    if verdict.because == "idle" and verdict.idle is not None:
        return f"active again {format_duration(verdict.idle, units=2)} ago"
    return verdict.reason


@dataclasses.dataclass(eq=False, repr=False)
class PassResult:
    """What a pass came to."""

    dry_run: bool
    started: datetime = dataclasses.field(default_factory=lambda: datetime.now(UTC))
    version: str | None = None  # of the Hub, as far as it says so
    listed: bool = False  # the whole user list was read
    running: int = 0
    idle: int = 0  # servers idle for at least --timeout, if anybody wants to know
    due: int = 0
    outcomes: Counter[Outcome] = dataclasses.field(default_factory=Counter)  # of what was due
    deleted: int = 0  # users; they are not among the outcomes
    warned: int = 0  # nor are these
    seconds: float = 0
    refused: bool = False  # the token may not do what was due
    errors: list[CullError] = dataclasses.field(default_factory=list)  # of the whole pass

    @property
    def undone(self) -> int:
        """How many were due and not tried, because the pass ended early."""
        return 0 if self.dry_run else self.due - self.deleted - self.outcomes.total()

    def take(self, scan: Scan) -> None:
        """Take in what the user list says."""
        self.listed = scan.complete
        self.running = scan.running
        self.idle = scan.idle_for.get(scan.settings.timeout, 0)
        self.due = len(scan.servers) + len(scan.users)
        self.warned = len(scan.soon) if self.dry_run else 0
        if scan.error:
            self.errors.append(scan.error)

    def count(self, event: Event) -> None:
        """Take in what became of something."""
        self.refused = self.refused or event.ends_pass
        if event.outcome is Outcome.WARNED:
            self.warned += 1
        elif event.outcome is Outcome.CULLED and isinstance(event.target, User):
            self.deleted += 1
        else:
            self.outcomes[event.outcome] += 1

    @property
    def counts(self) -> dict[str, int]:
        """What became of how many, in the words of the log."""
        outcomes = {str(outcome): self.outcomes[outcome] for outcome in OF_DUE}
        return {**outcomes, "deleted": self.deleted, "left undone": self.undone, "warned": self.warned}

    @property
    def exit_code(self) -> Exit:
        """What --once exits with."""
        if self.errors:
            return max(error.exit_code for error in self.errors)
        if self.refused:
            return Exit.NO_HUB
        return Exit.UNDONE if self.outcomes[Outcome.FAILED] or self.undone or not self.listed else Exit.DONE

    def __str__(self) -> str:
        counts = [f"{self.running} running", f"{self.due} due"]
        counts += [f"{count} {what}" for what, count in self.counts.items() if count]
        return f"{', '.join(counts)} in {self.seconds:.1f}s"


class Culler:
    """Makes passes, as the settings say, until told to stop."""

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self.settings = settings
        self.stop = stop
        self.report = Report(settings, stop)
        self._token = ""
        self._no_token = ""  # why the last one could not be read again
        self._scopes_checked = False
        self._warned: dict[tuple[str, str], datetime] = {}  # servers, and when they are due

    def run(self) -> Exit:
        """Make one pass, or passes until told to stop. The first token must be readable."""
        self._token = read_token(self.settings.token_file)  # once, or a pipe would be empty
        if self.settings.explain is not None:
            with self._hub(self._token) as hub:
                self._check_scopes(hub)
                show_reasons(explain(hub, self.settings, self.settings.explain))
            return Exit.DONE
        if self.settings.once or self.settings.dry_run:
            result = self.make_pass()
            self.report.result(result)
            if self.stop.is_set():
                self.report.say("error", "told to stop before the pass was over")
                return max(result.exit_code, Exit.UNDONE)
            return result.exit_code
        failures = 0
        while not self.stop.is_set():
            began = time.monotonic()
            result = self.make_pass()
            failures = failures + 1 if result.exit_code else 0
            interval = self.settings.interval.total_seconds()
            pause = min(2.0**failures, interval) if failures else max(interval - (time.monotonic() - began), 0)
            self.report.result(result, None if self.stop.is_set() else pause)
            if not self.stop.wait(pause):
                self._read_token_again()
        self.report.say("info", "told to stop")
        return Exit.DONE

    def make_pass(self) -> PassResult:
        """Scan the Hub once and cull what is due, or show it."""
        began = time.monotonic()
        settings, report = self.settings, self.report
        result = PassResult(settings.dry_run)
        try:
            with self._hub(self._token) as hub:
                self._check_scopes(hub)
                scan = Scan(settings, report.keep, idle_for=dict.fromkeys(settings.idle_steps, 0))
                scan_hub(hub, scan, self.stop)
                result.take(scan)
                result.version = hub.version
                if scan.doubts:
                    report.say("warning", f"kept {scan.doubts} in doubt; the first: {scan.first_doubt}")
                if settings.dry_run:
                    report.plan(scan)
                else:
                    with report.culling(result.due, self._token):
                        for event in self._events(hub, scan):
                            result.count(event)
                            report.event(event)
        except CullError as error:
            result.errors.append(error)
        result.seconds = time.monotonic() - began
        self._scopes_checked = self._scopes_checked or not result.errors
        return result

    def _read_token_again(self) -> None:
        """Go on with the last token while none can be read: a pipe is empty, a file is being replaced."""
        try:
            self._token, self._no_token = read_token(self.settings.token_file), ""
        except UsageError as error:
            if str(error) != self._no_token:
                self.report.say("warning", f"{error} The last token is used.")
            self._no_token = str(error)

    def _hub(self, token: str) -> Hub:
        return Hub(self.settings.url, token, self.settings.request_timeout, self.settings.tls)

    def _events(self, hub: Hub, scan: Scan) -> Iterator[Event]:
        """Warn of what is due soon, once until something happens to it, and cull what is due. Raises FuseBlown."""
        if not scan.error:  # what is not listed this time may be so the next time
            self._warned = {name: due for name, due in self._warned.items() if due > scan.clock[0]}
        for name, event in scan.soon.items():
            if event.due and self._warned.get(name) != event.due:
                self._warned[name] = event.due
                yield event
            else:
                self.report.say("debug", f"kept {event.target.full_name}: {event.verdict.reason}")
        if self.settings.max_culls:
            self.settings.max_culls.check(scan)
        yield from Culling(hub, scan, self.stop).events()

    def _check_scopes(self, hub: Hub) -> None:
        """Complain of missing scopes before anything is done, unless a pass has worked or the Hub cannot tell."""
        if self._scopes_checked:
            return
        try:
            identity = patiently(hub.identity, self.stop)
        except TryAgain:
            raise
        except HubError:  # GET /users will say it better
            return
        if identity:
            check_scopes(identity, self.settings)


TOKEN_SECONDS = 5  # to wait for what writes into a pipe


def read_soon(path: str) -> bytes:
    """Read a small file, or a pipe until its writers close it. Raises OSError, also if that takes long."""
    import errno
    import select

    content, deadline = b"", time.monotonic() + TOKEN_SECONDS
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or a FIFO would wait for a writer
    try:
        readable = select.poll()
        readable.register(descriptor, select.POLLIN)
        while len(content) < READ_SIZE:
            if not readable.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise TimeoutError(errno.ETIMEDOUT, f"nothing wrote to this pipe and closed it within {TOKEN_SECONDS}s")
            part = os.read(descriptor, READ_SIZE)
            if not part:
                break
            content += part
    finally:
        os.close(descriptor)
    return content


def read_token(path: str | None) -> str:
    """The API token, from the file if there is one, else from $JUPYTERHUB_API_TOKEN. Raises UsageError."""
    source = f"--token-file {path}" if path else "$JUPYTERHUB_API_TOKEN"
    try:
        token = os.environ.get("JUPYTERHUB_API_TOKEN", "")
        if path:
            token = read_soon(path).decode()
    except OSError as error:
        raise UsageError(
            f"{source} cannot be read: {error.strerror}; it must be a file that this user may read."
        ) from None
    except ValueError:
        token = "not even text"
    token = token.strip()
    if not token:
        where = "is empty" if path or "JUPYTERHUB_API_TOKEN" in os.environ else "is not set"
        raise UsageError(f"{source} {where}: put an API token of the Hub there (README: a first real run).")
    if not re.fullmatch("[!-~]+", token):
        raise UsageError(f"{source} does not hold an API token: a token is one word of plain ASCII characters.")
    return token


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second signal ends the program at once."""
    import signal

    stop = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}

    def tell(*_: object) -> None:
        stop.set()
        for number in signals:
            signal.signal(number, signal.SIG_DFL)

    for number in signals:
        signal.signal(number, tell)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- What it shows

JOURNAL = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # the priorities that sd-daemon(3) has
HANDFUL = 10  # more servers to cull get a progress bar, more kinds of failures are not told apart
ERASE = "\r\033[K"  # the line on which a bar is
NOTIFIED = (Outcome.WARNED, Outcome.CULLED, Outcome.STOPPING, Outcome.FAILED)


class Report:
    """Says what is done: a log on stderr, results on stdout, figures in a file, notices to a command."""

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self._log = open_log(settings.level)
        self._settings = settings
        self._stop = stop
        self._unread: OSError | None = None  # why nobody gets the JSON any more
        self._kept: list[Due[Server] | Due[User]] = []
        self._failures: Counter[str] = Counter()  # of one pass, by what they have in common
        self._notices: Notices | None = None
        self._bar: Any = None  # click's, while it is on the screen

    @property
    def keep(self) -> Callable[[Due[Server] | Due[User]], None] | None:
        """Say what is kept, if that is wanted: at once, or as part of the plan."""
        if self._settings.level != "debug":
            return None
        if self._settings.dry_run:
            return self._kept.append
        return lambda kept: self.say("debug", f"kept {kept.target.full_name}: {kept.verdict.reason}")

    def say(self, level: str, sentence: str) -> None:
        """Log a sentence."""
        if self._bar:
            click.echo(ERASE, nl=False, err=True)
        getattr(self._log, level)("%s", sentence)
        self._draw_bar()

    def event(self, event: Event) -> None:
        """Say what became of something due. Failures of one kind are said once, and counted, unless all is wanted."""
        facts = self._facts(event)
        if self._bar and event.outcome is not Outcome.WARNED:
            self._bar.make_step(1)
        if event.outcome is not Outcome.FAILED:
            self.say("warning" if event.outcome is Outcome.STOPPING else "info", str(event))
        else:
            self._fail(str(event), event.error)
        self._tell(facts)
        if self._notices and event.outcome in NOTIFIED:
            self._notices.send(facts)

    @contextlib.contextmanager
    def culling(self, due: int, token: str) -> Iterator[None]:
        """While events come: send notices, wait for them at the end, and show how far it is if somebody looks."""
        with contextlib.ExitStack() as stack:
            if self._settings.notify:
                self._notices = Notices(self._settings.notify, token, self._stop)
                stack.callback(self._end_notices)
            if due > HANDFUL and self._settings.level in ("debug", "info") and not self._settings.json:
                stack.callback(self._end_bar)
                self._begin_bar(due)
            yield

    def result(self, result: PassResult, pause: float | None = None) -> None:
        """Say what a pass came to, and in how many seconds the next one starts. Raises OSError if nobody reads JSON."""
        for kind, count in self._failures.items():
            if not kind:
                self.say("error", f"{count} more failed in other ways; -v says each")
            elif count > 1:
                self.say("error", f"{count - 1} more failed in the same way: {kind}")
        self._failures.clear()
        following = "" if pause is None else f"; next in {format_duration(timedelta(seconds=round(pause)))}"
        for error in result.errors:
            self.say("error", f"{error}{following}")
        if not self._settings.dry_run and (result.running or not result.errors):
            self.say("info", f"pass: {result}{following}")
        self._tell(pass_facts(result, self._settings.url))
        if self._settings.metrics_file and not self._settings.dry_run:
            try:
                write_metrics(self._settings.metrics_file, result)
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                self.say("error", f"--metrics-file {self._settings.metrics_file} is not written: {why}")
        if self._unread:
            raise self._unread

    def plan(self, scan: Scan) -> None:
        """Show what a pass would do, the longest idle first, and what other timeouts would."""
        due: list[Due[Server] | Due[User]] = [*scan.servers.values(), *scan.users.values()]
        planned = [Event(target, Outcome.PLANNED, verdict.reason, verdict) for target, verdict in due]
        if self._settings.json:
            for event in (*planned, *scan.soon.values()):
                self._tell(self._facts(event))
            return
        rows = [
            (event.target, event.verdict, self._would_be(event), event.reason)
            for event in (*planned, *scan.soon.values())
        ]
        rows += [(kept.target, kept.verdict, "kept", kept.verdict.reason) for kept in self._kept]
        rows.sort(key=lambda row: row[1].idle or ZERO, reverse=True)
        width = terminal_width(sys.stdout)
        lines = [*table(rows, width)] if rows else []
        users = f", {len(scan.users)} user{'s' * (len(scan.users) != 1)} deleted" if self._settings.cull_users else ""
        lines += wrap(f"{len(scan.servers)} of {scan.running} running servers would be stopped{users}.", width)
        if self._settings.max_culls:
            try:
                self._settings.max_culls.check(scan)
            except FuseBlown as error:
                lines += wrap(f"But {error}.", width)
        if scan.running:
            lines += ["", *bars(scan.idle_for, self._settings.timeout, width)]
        click.echo("\n".join(lines), color=wants_color())

    def _begin_bar(self, due: int) -> None:
        """Show a bar if stderr is a terminal. Only what click says of it is used: drawing, it would hide the cursor."""
        if (width := terminal_width(sys.stderr)) and os.environ.get("TERM") != "dumb":
            beside = len(f"  []  {due}/{due}  9d 00:00:00 ")
            self._bar = click.progressbar(length=due, show_pos=True, width=min(36, width - beside), file=sys.stderr)
            self._draw_bar()

    def _draw_bar(self) -> None:
        if self._bar:
            click.echo(f"{ERASE}{self._bar.format_progress_line()}", nl=False, err=True)

    def _end_bar(self) -> None:
        if self._bar:
            click.echo(ERASE, nl=False, err=True)
            self._bar = None

    def _would_be(self, event: Event) -> str:
        if event.outcome is Outcome.WARNED:
            return "warned"
        return {"stop": "stopped", "remove": "removed", "delete": "deleted"}[self._action(event.target)]

    def _action(self, target: Server | User) -> str:
        if isinstance(target, User):
            return "delete"
        return "remove" if target.name and self._settings.remove_named_servers else "stop"

    def _facts(self, event: Event) -> dict[str, object]:
        """An event for programs, as the README documents it."""
        target, verdict = event.target, event.verdict
        return {
            "event": "user" if isinstance(target, User) else "server",
            "user": target.name if isinstance(target, User) else target.user,
            "server": None if isinstance(target, User) else target.name,
            "action": self._action(target),
            "outcome": event.outcome,
            "reason": event.reason,
            "idle_seconds": None if verdict.idle is None else int(verdict.idle.total_seconds()),
            "age_seconds": None if verdict.age is None else int(verdict.age.total_seconds()),
            "due": format_time(event.due) if event.due else None,
            "error": event.error or None,
        }

    def _tell(self, facts: Mapping[str, object]) -> None:
        """Print JSON at once, if wanted. When nobody can read it, nothing new is begun, all else is told as ever."""
        import json

        if self._settings.json and not self._unread:
            try:
                click.echo(json.dumps(facts))
            except OSError as error:
                self._unread = error
                self._stop.set()

    def _fail(self, sentence: str, error: str) -> None:
        """Say what failed, the first of each kind. What the Hub says of it, in brackets, may be of just this one."""
        kind = re.sub(r"/users/[^\s:]+", "/users/…", error.partition(" (")[0])
        if kind not in self._failures and len(self._failures) >= HANDFUL:
            kind = ""
        self._failures[kind] += 1
        self.say("error" if kind and self._failures[kind] == 1 else "debug", sentence)

    def _end_notices(self) -> None:
        notices, self._notices = self._notices, None
        for sentence, kind in notices.wait() if notices else ():
            self._fail(sentence, kind)


def open_log(level: str) -> logging.Logger:
    """Log to stderr, in lines that begin with the time and the level, or with a priority if they go to the journal."""
    import logging

    layout = "%(asctime)s %(levelname)-8s %(message)s"
    handler = logging.StreamHandler()
    if goes_to_journal():
        layout = "<%(priority)d>%(message)s"
        handler.addFilter(lambda record: vars(record).update(priority=JOURNAL[record.levelname]) is None)
    handler.setFormatter(logging.Formatter(layout, "%Y-%m-%d %H:%M:%S"))
    log = logging.getLogger("cull_idle")
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level.upper())
    return log


def goes_to_journal() -> bool:
    """Whether stderr is the journal's: systemd says which file that would be."""
    try:
        stderr = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


def format_time(moment: datetime) -> str:
    """A moment as programs read it: `2026-11-22T20:14:03Z`."""
    try:
        moment = moment.astimezone(UTC)
    except OverflowError:  # in UTC it is before the year 1, or after 9999
        return moment.isoformat(timespec="seconds")
    return moment.replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


def pass_facts(result: PassResult, url: str) -> dict[str, object]:
    """A pass for programs, as the README documents it."""
    return {
        "event": "pass",
        "started": format_time(result.started),
        "hub": url,
        "version": result.version,
        "running": result.running,
        "idle": result.idle,
        "planned": result.due,
        **{what.replace(" ", "_"): count for what, count in result.counts.items()},
        "seconds": round(result.seconds, 3),
        "dry_run": result.dry_run,
        "error": "; ".join(map(str, result.errors)) or None,
    }


# ---- A plan, as a table and as bars

IDLE_STEPS = ("10m", "30m", "1h", "2h", "4h", "8h", "1d", "1w")
NARROWEST = 40  # columns that are laid out for
READABLE = 24  # columns that a reason needs to stand beside the rest
AT_TIMEOUT = "  <- --timeout"
COLOURS: Mapping[str, Mapping[str, Any]] = {
    "kept": {"dim": True},
    "warned": {"fg": "yellow"},
    "stopped": {"fg": "red"},
    "removed": {"fg": "red"},
    "deleted": {"fg": "red", "bold": True},
}


def wants_color() -> bool | None:
    """Whether to use colours, None to do so on a terminal only (no-color.org, force-color.org)."""
    return False if os.environ.get("NO_COLOR") else True if os.environ.get("FORCE_COLOR") else None


def terminal_width(stream: TextIO) -> int | None:
    """The columns of the terminal that a stream leads to; None if it leads to none."""
    return max(os.get_terminal_size(stream.fileno()).columns or 80, NARROWEST) if stream.isatty() else None


def displayed(text: str) -> str:
    """A text as stdout shows it: what its encoding lacks is escaped."""
    return text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding)


def columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = {"W": 2, "F": 2}
    return sum(
        wide.get(unicodedata.east_asian_width(c), 1) for c in text if unicodedata.category(c) not in ("Mn", "Me")
    )


def fit(text: str, width: int) -> str:
    """As much of the beginning of a text as takes at most that many columns."""
    if text.isascii():
        return text[:width]
    for end, char in enumerate(text):
        width -= columns(char)
        if width < 0:
            return text[:end]
    return text


def cut_middle(text: str, width: int, mark: str = "…") -> str:
    """A text of at most that many columns, at the cost of its middle."""
    if columns(text) <= width:
        return text
    tail = fit(text[::-1], (width - 1) // 2)[::-1]
    while tail and not columns(tail[0]):  # an accent whose letter is cut off
        tail = tail[1:]
    return f"{fit(text, width // 2)}{mark}{tail}"


def wrap(text: str, width: int | None) -> list[str]:
    """Lines of at most that many columns, two or more, broken between words where that is possible."""
    lines = []
    while width and columns(text) > width:
        most = len(fit(text, width))
        end = text.rfind(" ", 1, most + 1)
        end = most if end < 0 else end
        lines.append(text[:end])
        text = text[end:].lstrip(" ")
    return [*lines, text]


Row = tuple["Server | User", Verdict, str, str]  # what, how idle and old, what would be done to it, and why


def table(rows: Iterable[Row], width: int | None) -> Iterator[str]:
    """Lines of a table that takes no more than that many columns: names are cut in the middle, reasons wrapped."""
    cells = []
    for target, verdict, would_be, reason in rows:
        idle, age = ("-" if d is None else format_duration(d, units=2) for d in (verdict.idle, verdict.age))
        cells.append((displayed(target.full_name), idle, age, would_be, displayed(f"{would_be}: {reason}")))
    header = ("SERVER", "IDLE", "AGE", "", "WOULD BE")
    names, idles, ages, _, room = (max(map(columns, column)) for column in zip(header, *cells, strict=True))
    numbers = 2 + idles + 2 + ages + 2
    beside = True
    if width is not None and names + numbers + room > width:
        least = min(names, width // 3)
        beside = width - least - numbers >= READABLE
        names = min(names, max(least, width - numbers - room) if beside else width - numbers + 2)
        room = width - names - numbers if beside else width - 2
    indent = " " * (names + numbers if beside else 2)
    mark = "…" if displayed("…") == "…" else "~"

    def line(name: str, idle: str, age: str, why: str) -> str:
        left = f"{name}{' ' * (names - columns(name))}  {idle:{idles}}  {age:{ages}}"
        return f"{left}  {why}" if beside else f"{left.rstrip()}\n{indent}{why}"

    yield click.style(line("SERVER", "IDLE", "AGE", "WOULD BE"), bold=True)
    for full_name, idle, age, would_be, why in cells:
        first, *others = wrap(why, room)
        first = click.style(would_be, **COLOURS[would_be]) + first.removeprefix(would_be)
        yield line(cut_middle(full_name, names, mark), idle, age, first)
        yield from (indent + other for other in others)


def bars(idle_for: Mapping[timedelta, int], timeout: timedelta, width: int | None) -> Iterator[str]:
    """A picture of how many servers each of some timeouts would stop, and --timeout."""
    eighths = " ▏▎▍▌▋▊▉█"
    if displayed(eighths) != eighths:
        eighths = " ########"
    written = {parse_duration(step): step for step in IDLE_STEPS}
    labels = [written.get(step) or format_duration(step) for step in idle_for]
    indent = max(7, *map(len, labels))
    most = max(idle_for.values()) or 1
    longest = min(40, (width or 80) - indent - len(f"   {most}{AT_TIMEOUT}"))
    yield "idle for at least"
    for label, (step, count) in zip(labels, idle_for.items(), strict=True):
        full, part = divmod(max(count * longest * 8 // most, count > 0), 8)
        bar = (eighths[-1] * full + eighths[part]).strip()
        yield f"{label:>{indent}}  {bar}{' ' * bool(bar)}{count}{AT_TIMEOUT * (step == timeout)}"


# ---- Figures for Prometheus


def metric_families(result: PassResult, last_success: float) -> Iterator[tuple[str, str, Mapping[str, float]]]:
    """Names of metrics, what they mean, and their values by their labels; of counters what this pass adds."""
    ended = result.started.timestamp() + result.seconds
    done = result.exit_code is Exit.DONE
    outcomes = {f'{{outcome="{outcome}"}}': result.outcomes[outcome] for outcome in OF_DUE}
    yield "passes_total", "Passes.", {"": 1}
    yield "failed_passes_total", "Passes that did not do all they set out to do.", {"": not done}
    yield "outcomes_total", "What became of servers, and of users that were not deleted, that were due.", outcomes
    yield "deleted_users_total", "Users that were deleted.", {"": result.deleted}
    yield "warned_servers_total", "Servers that --warn-before reported.", {"": result.warned}
    yield "pass_duration_seconds", "Time that the last pass took.", {"": result.seconds}
    yield "last_pass_timestamp_seconds", "When the last pass ended.", {"": ended}
    success = "When the last pass ended that did all it set out to do."
    yield "last_success_timestamp_seconds", success, {"": ended if done else last_success}
    if result.listed:
        idle = "Ready servers that were idle for at least --timeout in the last pass."
        yield "running_servers", "Servers that were ready in the last pass.", {"": result.running}
        yield "idle_servers", idle, {"": result.idle}
        yield "planned", "Servers and users that were due in the last pass.", {"": result.due}


def write_metrics(path: str, result: PassResult) -> None:
    """Write what node_exporter's textfile collector reads, whole or not at all. Counters go on from what is there.

    Raises OSError, or ValueError if it is another file.
    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    before = read_metrics(path)
    lines = []
    for name, meaning, samples in metric_families(result, before.get("cull_idle_last_success_timestamp_seconds", 0)):
        counts = name.endswith("_total")
        lines += [f"# HELP cull_idle_{name} {meaning}", f"# TYPE cull_idle_{name} {'counter' if counts else 'gauge'}"]
        for labels, value in samples.items():
            sample = f"cull_idle_{name}{labels}"
            lines.append(f"{sample} {round(value + (before.get(sample, 0) if counts else 0), 3)}")
    unfinished = f"{path}.{os.getpid()}"
    try:
        with open(unfinished, "w") as file:
            file.write("\n".join(lines) + "\n")
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        raise


def read_metrics(path: str) -> dict[str, float]:
    """What a metrics file holds; nothing if there is none yet. Raises OSError, or ValueError if it is another file."""
    if not os.path.exists(path):
        return {}
    text = "perhaps a device"
    if os.path.isfile(path):
        with open(path, errors="replace") as file:
            text = file.read()
    if text and not text.startswith("# HELP cull_idle_"):
        raise ValueError("it is not one of cull_idle.py's, and is not overwritten")
    samples = re.findall(r"^(cull_idle_\S+) (-?\d+(?:\.\d+)?(?:e[+-]\d+)?)\n", text, re.MULTILINE)
    return {name: float(value) for name, value in samples}


# ---- Notices: a command of the administrator's own

NOTICE_SECONDS = 30  # for one command
NOTICES_AT_ONCE = 4
LATE_NOTICES = 10  # after so many in a pass no other is begun: it would take hours


class Notices:
    """Runs a command for each event, a few at a time, with the event as JSON on its standard input."""

    def __init__(self, command: Sequence[str], token: str, stop: threading.Event) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._command = command
        self._secrets = {token, os.environ.get("JUPYTERHUB_API_TOKEN", "").strip() or token}
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if not any(secret in value for secret in self._secrets)  # $JUPYTERHUB_API_TOKEN, and what else has it
        }
        self._stop = stop
        self._workers = ThreadPoolExecutor(NOTICES_AT_ONCE)
        self._running: list[tuple[str, Future[str]]] = []
        # Only how many counts; lists, because several threads add to them.
        self._late: list[object] = []  # not done in time
        self._left_out: list[object] = []

    def send(self, facts: Mapping[str, Any]) -> None:
        """Run the command soon, unless told to stop before that, or many were not done in time."""
        name = printable(f"{facts['user']}/{facts['server']}" if facts["server"] else facts["user"])
        self._running.append((name, self._workers.submit(self._run, facts)))

    def wait(self) -> Iterator[tuple[str, str]]:
        """Wait for all; yields what failed, as a sentence, and in which way."""
        with self._workers:
            for name, future in self._running:
                if error := future.result():
                    yield f"--notify for {name}: {error}", f"--notify: {error.partition(': ')[0]}"
        if self._left_out:
            why = "told to stop" if self._stop.is_set() else f"{len(self._late)} were not done in time"
            yield (sentence := f"--notify: {len(self._left_out)} left out, because {why}"), sentence

    def _run(self, facts: Mapping[str, Any]) -> str:
        """Run the command for one event; returns why it failed."""
        import json
        import signal
        import subprocess
        import tempfile

        if self._stop.is_set() or len(self._late) >= LATE_NOTICES:
            self._left_out.append(facts)
            return ""
        variables = {"EVENT": facts["outcome"], "USER": facts["user"], "SERVER": facts["server"], "DUE": facts["due"]}
        environment = self._environment | {f"CULL_IDLE_{name}": value or "" for name, value in variables.items()}
        command = self._command[0]
        try:
            # Not a pipe: what the command leaves running in the background may keep that open.
            with tempfile.TemporaryFile() as complaints:
                process = subprocess.Popen(  # noqa: S603 (the administrator's own command)
                    self._command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=complaints,
                    start_new_session=True,
                )
                try:
                    process.communicate(json.dumps(facts).encode() + b"\n", NOTICE_SECONDS)
                except subprocess.TimeoutExpired:
                    self._late.append(facts)
                    with contextlib.suppress(OSError):  # what runs as another user cannot be killed
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                    return f"{command} was not done after {NOTICE_SECONDS}s, and is given up"
                complaints.seek(max(complaints.seek(0, os.SEEK_END) - READ_SIZE, 0))
                words = complaints.read(READ_SIZE).decode(errors="replace")
        except (OSError, ValueError) as error:  # ValueError: a name that no variable can hold
            return f"{command} cannot be run: {shorten(str(getattr(error, 'strerror', None) or error))}"
        if process.returncode == 0:
            return ""
        for secret in self._secrets:
            words = words.replace(secret, "…")
        how = f"exited with {process.returncode}" if process.returncode > 0 else f"was killed ({-process.returncode})"
        *_, last = words.strip().splitlines() or ["no word of why"]  # of a traceback the last line says it
        return f"{command} {how}: {shorten(last)}"


# ---- The reasons for one decision

LABEL = 9  # columns


def show_reasons(facts: Iterable[tuple[str, str]]) -> None:
    """Print labels and facts, one below the other."""
    width = terminal_width(sys.stdout)
    for label, fact in facts:
        lines = wrap(displayed(fact), width and width - LABEL)
        click.echo(f"{label:{LABEL}}" + f"\n{'':{LABEL}}".join(lines))


def explain(hub: Hub, settings: Settings, name: str) -> Iterator[tuple[str, str]]:
    """All that decides about `USER/SERVER`, or about `USER` and the default server, as labels and facts.

    Raises CullError.
    """
    user_name, _, server_name = name.partition("/")
    if not user_name:
        raise UsageError("--explain: write USER, or USER/SERVER for a named server.")
    user, now = hub.user(user_name)
    if user is None:
        raise UsageError(f"--explain: {hub.url} knows no user {shorten(user_name, 40)!r}.")
    ahead = round((now - datetime.now(UTC)).total_seconds())
    drift = f", {format_duration(timedelta(seconds=abs(ahead)))} {'ahead of' if ahead > 0 else 'behind'} this machine's"
    yield "hub", f"{hub.url}, JupyterHub {shorten(hub.version, 20) if hub.version else 'of an unknown version'}"
    yield "clock", format_time(now) + (drift if abs(ahead) > 1 else "")
    server = user.server(server_name) or next((each for each in user.servers if each.doubt), None)
    if server:
        policy = settings.policies.of_server(server)
        verdict = judge_server(server, policy, now)
        yield "server", server.full_name
        ready = "yes" if server.ready else "unknown" if server.doubt else "no"
        yield "ready", ready + (f", pending {shorten(server.pending, 20)}" if server.pending else "")
        yield from explain_limits(server, verdict, policy, list(enumerate(settings.rule, 1)), now)
        would_be = "removed" if server.name and settings.remove_named_servers else "stopped"
        yield "verdict", f"{f'would be {would_be}' if verdict.cull else 'kept'}: {verdict.reason}"
    else:
        others = ", ".join(each.full_name for each in user.servers)
        yield "server", f"{printable(name)} is not running" + (f", only {others}" if others else "")
        yield "verdict", "nothing to stop"
    if settings.cull_users and not server_name:
        rules = [(number, rule) for number, rule in enumerate(settings.rule, 1) if rule.of_users]
        policy = settings.policies.of_user(user)
        verdict = judge_user(user, policy, now)
        yield "user", printable(user.name) + ", an admin" * user.admin
        yield from explain_limits(user, verdict, policy, rules, now)
        staying = [
            each.full_name
            for each in user.servers
            if not judge_server(each, settings.policies.of_server(each), now).cull
        ]
        if verdict.cull and staying:
            verdict = verdict._replace(cull=False, because=f"{', '.join(staying)} would not be stopped")
        first = " once no server is left" if user.servers else ""
        yield "verdict", f"{f'would be deleted{first}' if verdict.cull else 'kept'}: {verdict.reason}"


def explain_limits(
    target: Server | User, verdict: Verdict, policy: Policy, rules: Sequence[tuple[int, Rule]], now: datetime
) -> Iterator[tuple[str, str]]:
    """What is measured of a server or a user, which rule applies, and what the limits come to."""
    birth, born = ("started", target.started) if isinstance(target, Server) else ("created", target.created)
    active = target.last_activity
    # The very same moment only where it stands in, see read_user and read_server.
    stands_in = f": when it was {birth}, no activity is known" if active is born else ""
    for label, moment, measured in (("active", active, verdict.idle), (birth, born, verdict.age)):
        ago = f", {format_duration(measured)} ago" if measured is not None else ""
        yield label, f"{format_time(moment)}{ago}{stands_in * (label == 'active')}" if moment else "unknown"
    for number, rule in rules:
        misfits = [field for field, glob in rule.matches if not any(map(glob.match, target.facts(field) or ()))]
        if not misfits:
            servers_only = ", its limits only to servers" if isinstance(target, User) and not rule.keep else ""
            yield f"rule {number}", f"{rule.text}: applies{servers_only}"
            break
        values = ", ".join(target.facts(misfits[0]) or ("none",))
        yield f"rule {number}", f"{rule.text}: does not apply, {misfits[0]} is {shorten(values)}"
    for label, limit, since in (("timeout", policy.timeout, active), ("max-age", policy.max_age, born)):
        yield label, reach(limit, since, now)
    if policy.arbiter:
        yield "arbiter", "decides in place of the timeout"


def reach(limit: Limit, since: datetime | None, now: datetime) -> str:
    """A limit, and when something reaches it that goes on since then."""
    by_rule = limit.source.partition(":")[0]
    if limit.duration == NEVER:
        return f"never{by_rule}"
    text = f"{format_duration(limit.duration)}{by_rule}"
    if since is None:
        return f"{text}, not reached: unknown since when"
    left = limit.duration - max(now - since, ZERO)
    if left >= datetime(LAST_YEAR, 1, 1, tzinfo=UTC) - now:
        return f"{text}, not reached"
    at = format_time(min(since, now) + limit.duration)
    return f"{text}, not reached before {at}, in {format_duration(left)}" if left > ZERO else f"{text}, reached at {at}"


# ---- The command line: each option is declared once, as a field of Settings


LONGEST = timedelta(days=365)


def duration(*, least: timedelta = ZERO, most: timedelta = timedelta.max, never: bool = False) -> dict[str, Any]:
    """Attributes of an option that is a duration within these bounds, or perhaps `never`."""

    def convert(_ctx: click.Context, _param: click.Parameter, value: str | None) -> timedelta | None:
        if value is None:
            return None
        try:
            number = parse_limit(value) if never else parse_duration(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
        if number < least:
            raise click.BadParameter(f"{value!r} is too short: at least {least.total_seconds():g}s.")
        if number > most:
            raise click.BadParameter(f"{value!r} is too long: at most {format_duration(most)}.")
        return number

    return {"callback": convert, "metavar": "DURATION|never" if never else "DURATION"}


def fuse(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Fuse | None:
    """Read a number, or a percentage."""
    if value is None:
        return None
    match = re.fullmatch(rf"({NUMBER})%|([0-9]+)", value.strip())
    if not match or float(match[1] or 0) > 100:
        raise click.BadParameter(
            f"{shorten(value, 40)!r} is neither a number, such as 20, nor a percentage, such as 10%."
        )
    return Fuse(float(match[1] or match[2]), percent=bool(match[1]))


def read_rules(_ctx: click.Context, _param: click.Parameter, values: Sequence[str]) -> tuple[Rule, ...]:
    """Read all rules."""
    try:
        return tuple(map(parse_rule, values))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def read_arbiter(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Arbiter | None:
    """Load an arbiter."""
    try:
        return load_arbiter(value) if value else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def read_command(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Split a command as a shell would."""
    if value is None:
        return None
    import shlex
    import shutil

    try:
        words = tuple(shlex.split(value))
    except ValueError as error:
        raise click.BadParameter(f"{shorten(value)!r}: {error}.") from None
    if not words or "\0" in value or not shutil.which(words[0]):
        raise click.BadParameter(f"{shorten(words[0] if words else value)!r} is no program that can be run.")
    return words


def check_metrics_file(_ctx: click.Context, _param: click.Parameter, path: str | None) -> str | None:
    """Refuse what could not be written after a pass, or is another file."""
    if path is None:
        return None
    try:
        read_metrics(path)
    except ValueError as error:
        raise click.BadParameter(f"{path} is there already: {error}.") from None
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be read: {error.strerror}.") from None
    if not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise click.BadParameter(f"{path} cannot be written: its folder must exist and be writable.")
    return path


def option_name(field: str) -> str:
    """The name of an option, from that of its field."""
    return field.replace("_", "-")


def read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Take defaults from a TOML file whose keys are the names of options."""
    if path is None:
        return None
    import tomllib

    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be read: {error.strerror}.", ctx, param) from None
    except ValueError as error:
        raise click.BadParameter(f"{path} is not TOML: {shorten(str(error))}.", ctx, param) from None
    names = {field.name for field in dataclasses.fields(Settings) if field.metadata.get("callback") is not read_config}
    paths = {field.name for field in dataclasses.fields(Settings) if field.metadata.get("type") is PATH}
    # As texts, as they come from the command line and the environment: click's types are made for these.
    ctx.default_map = {
        name.replace("-", "_"): [*as_texts(value)] if isinstance(value, list) else as_text(value)
        for name, value in values.items()
    }
    if unknown := [name for name in values if name.replace("-", "_") not in names]:
        raise click.BadParameter(f"{path} has a key {shorten(unknown[0], 40)!r}, which is no option.", ctx, param)
    if wrong := [n for n, v in values.items() if isinstance(v, dict) or (isinstance(v, list) and n != "rule")]:
        raise click.BadParameter(f"{path}: {wrong[0]} must be one value, not a table or a list.", ctx, param)
    if wrong := [n for n, v in values.items() if n.replace("-", "_") in paths and not isinstance(v, str)]:
        raise click.BadParameter(f"{path}: {wrong[0]} must be a text in quotes.", ctx, param)
    return path


def hub_url(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    """Check a URL as far as that is possible without asking it."""
    from urllib.parse import urlsplit

    try:
        url = urlsplit(value)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch("[!-~]+", value):
        raise click.BadParameter(f"{shorten(value)!r} is not a URL like http://127.0.0.1:8081/hub/api.")
    if url.username is not None or url.query or url.fragment:
        raise click.BadParameter("a Hub's URL has no user, no password, no ? and no #.")
    return value.rstrip("/")


class GroupedOption(click.Option):
    """An option that --help shows under a heading."""

    def __init__(self, *args: Any, heading: str, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.heading = heading

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """Several values in one variable are separated by semicolons: rules have spaces in them."""
        value = self.resolve_envvar_value(ctx)
        if value and self.multiple:
            return [part for part in value.split(";") if part.strip()]
        return super().value_from_envvar(ctx)


class GroupedCommand(click.Command):
    """A command whose --help shows its options under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, in the order in which they are declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                names, text = record
                section = sections.setdefault(getattr(param, "heading", OUTPUT), [])
                section.append((names.replace(" [=", "[="), text))
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=32)


def option(heading: str, help: str, *names: str, **attrs: Any) -> Any:
    """A field of Settings that is an option, and a variable CULL_IDLE_…, of its name; `attrs` as for click.Option."""
    return dataclasses.field(metadata={"names": names, "show_default": True, "help": help, "heading": heading, **attrs})


def boolean(heading: str, help: str, default: str) -> Any:
    """A field of Settings that is an option given bare or as --option=BOOL."""
    return option(heading, help, type=bool, is_flag=False, flag_value="true", default=default, metavar="[=BOOL]")


class FilePath(click.Path):
    """A path that the system can take."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse NUL, for which os.stat raises ValueError."""
        if "\0" in value:
            self.fail(f"{shorten(value)!r} is no path: it contains NUL.", param, ctx)
        return super().convert(value, param, ctx)


PATH = FilePath()
WHAT, WHEN, HUB, OUTPUT = "What to cull", "When", "The Hub", "Output"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """Everything that the command line, the environment and the defaults decide."""

    timeout: timedelta = option(
        WHAT,
        "Stop servers idle for at least this long; 0 stops every ready server.",
        **duration(never=True),
        default="10m",
    )
    max_age: timedelta = option(
        WHAT,
        "Stop servers that started at least this long ago, even active ones; 0 is never.",
        **duration(never=True),
        default="never",
    )
    cull_default_servers: bool = boolean(WHAT, "Cull default servers.", "true")
    cull_named_servers: bool = boolean(WHAT, "Cull named servers.", "true")
    remove_named_servers: bool = boolean(WHAT, "Also remove a named server once it is stopped.", "false")
    cull_users: bool = boolean(WHAT, "Also delete idle users none of whose servers still run.", "false")
    cull_admin_users: bool = boolean(WHAT, "Let --cull-users delete admins too.", "true")
    user_timeout: timedelta | None = option(
        WHAT,
        "Idle time after which --cull-users deletes a user.  [default: --timeout]",
        **duration(never=True),
    )
    user_max_age: timedelta | None = option(
        WHAT, "Age after which --cull-users deletes a user; 0 is never.  [default: --max-age]", **duration(never=True)
    )
    rule: tuple[Rule, ...] = option(
        WHAT,
        f"An exception, such as 'group=gpu timeout=30m' or 'user=svc-* keep'; may be repeated, the first that fits"
        f" applies. Globs match {', '.join(MATCHES)}.",
        multiple=True,
        callback=read_rules,
        metavar="RULE",
    )
    arbiter: Arbiter | None = option(
        WHAT,
        "Your own decision in place of --timeout: a function that takes inactive, inactive_limit, server and user, or"
        " some of them, and returns whether to cull.",
        callback=read_arbiter,
        metavar="MODULE:FUNC|FILE.py:FUNC",
    )
    max_culls: Fuse | None = option(
        WHAT,
        "A fuse: a pass that would stop more servers, or delete more users, than this stops nothing and fails; N% is"
        " of the ready servers, and of the users.",
        callback=fuse,
        metavar="N|N%",
    )

    once: bool = option(WHEN, "Make one pass, then exit.", is_flag=True, show_default=False)
    cull_every: timedelta | None = option(
        WHEN,
        "Time between the starts of two passes; they never overlap.  [default: half of --timeout]",
        **duration(least=timedelta(seconds=1), most=LONGEST),
    )
    dry_run: bool = option(
        WHEN, "Decide and show, change nothing, exit; with -v show what is kept too.", is_flag=True, show_default=False
    )
    explain: str | None = option(
        WHEN,
        "Say all that decides about a user's default server, or a named one, change nothing, exit.",
        metavar="USER[/SERVER]",
    )

    url: str = option(
        HUB,
        "The Hub's API; $JUPYTERHUB_API_URL if set.",
        envvar=["JUPYTERHUB_API_URL"],
        default="http://127.0.0.1:8081/hub/api",
        callback=hub_url,
        metavar="URL",
    )
    token_file: str | None = option(
        HUB,
        "Read the API token from this file, again for each pass, and not from $JUPYTERHUB_API_TOKEN.",
        type=PATH,
        metavar="FILE",
    )
    concurrency: int = option(
        HUB, "Requests in flight at the same time.", type=click.IntRange(1, 1000), default=10, metavar="N"
    )
    api_page_size: int = option(
        HUB,
        "Users per page; the Hub caps it, 0 leaves it to the Hub.",
        type=click.IntRange(min=0),
        default=200,
        metavar="N",
    )
    request_timeout: timedelta = option(
        HUB,
        "Time for one request; $JUPYTERHUB_REQUEST_TIMEOUT if set.",
        envvar=["JUPYTERHUB_REQUEST_TIMEOUT"],
        **duration(least=timedelta(milliseconds=1), most=timedelta(days=1)),
        default="1m",
    )

    ssl_enabled: bool = boolean(HUB, "Use the client certificates of a Hub with internal_ssl.", "false")
    internal_certs_location: str = option(
        HUB,
        "The Hub's folder of these; $JUPYTERHUB_SSL_KEYFILE, …CERTFILE and …CLIENT_CA come first, if set.",
        type=PATH,
        default="internal-ssl",
        metavar="DIR",
    )

    verbose: bool = option(OUTPUT, "Say also what is kept, and why.", "-v", is_flag=True, show_default=False)
    quiet: bool = option(OUTPUT, "Say nothing unless something failed.", "-q", is_flag=True, show_default=False)
    log_level: str | None = option(
        OUTPUT,
        "Say exactly this much.  [default: info]",
        type=click.Choice(["debug", "info", "warning", "error", "critical"], case_sensitive=False),
        metavar="LEVEL",
    )

    json: bool = option(OUTPUT, "Print events as JSON Lines.", is_flag=True, show_default=False)
    warn_before: timedelta | None = option(
        OUTPUT,
        "Report servers that will be due within this time if nothing happens.",
        **duration(most=LONGEST),
    )
    notify: tuple[str, ...] | None = option(
        OUTPUT,
        "Run this for each server or user warned, culled, stopping or failed, with its JSON on standard input.",
        callback=read_command,
        metavar="COMMAND",
    )
    metrics_file: str | None = option(
        OUTPUT,
        "After each pass write figures for node_exporter's textfile collector.",
        type=PATH,
        callback=check_metrics_file,
        metavar="FILE",
    )

    config: str | None = option(
        OUTPUT,
        "Take defaults from a TOML file of these options.",
        type=PATH,
        is_eager=True,
        callback=read_config,
        metavar="FILE",
    )

    @property
    def level(self) -> str:
        """The level of the log."""
        return self.log_level or ("debug" if self.verbose else "error" if self.quiet else "info")

    @property
    def idle_steps(self) -> list[timedelta]:
        """The idle times for which servers are counted."""
        if self.dry_run:
            return sorted({*map(parse_duration, IDLE_STEPS), self.timeout} - {NEVER})
        return [self.timeout] if self.json or self.metrics_file else []

    @property
    def interval(self) -> timedelta:
        """Time between the starts of two passes."""
        limit = self.timeout if ZERO < self.timeout < NEVER else self.max_age if ZERO < self.max_age < NEVER else None
        return self.cull_every or min(max((limit or timedelta(minutes=10)) / 2, timedelta(seconds=1)), LONGEST)

    @cached_property
    def policies(self) -> Policies:
        """What is due of which server and user."""
        servers = Policy(
            Limit(self.timeout),
            Limit(self.max_age or NEVER),
            default_servers=self.cull_default_servers,
            named_servers=self.cull_named_servers,
            arbiter=self.arbiter,
        )
        users = Policy(
            Limit(self.timeout if self.user_timeout is None else self.user_timeout),
            Limit((self.max_age if self.user_max_age is None else self.user_max_age) or NEVER),
            admins=self.cull_admin_users,
        )
        return Policies(self.rule, servers, users)

    @property
    def rule_scopes(self) -> list[str]:
        """What rules need to read, beyond what every pass does."""
        fields = [field.partition(".")[0] for rule in self.rule for field, _ in rule.matches]
        return [scope_for(field) for field in dict.fromkeys(fields) if field in ("group", "state")]

    @property
    def tls(self) -> ClientTLS | None:
        """The client certificates, where the Hub wants some."""
        by_hub = [os.environ.get(f"JUPYTERHUB_SSL_{name}", "") for name in ("KEYFILE", "CERTFILE", "CLIENT_CA")]
        if all(by_hub):
            return ClientTLS(*by_hub)
        if not self.ssl_enabled:
            return None
        of_hub = f"{self.internal_certs_location}/hub-internal/hub-internal"
        return ClientTLS(f"{of_hub}.key", f"{of_hub}.crt", f"{self.internal_certs_location}/hub-ca/hub-ca.crt")


ACTIVITY_INTERVAL = timedelta(minutes=5, seconds=30)  # JupyterHub.last_activity_interval, and some time to do it


def run(**values: Any) -> Exit:
    """Stop the idle servers of a JupyterHub."""
    settings = Settings(**values)
    timeouts = [] if settings.arbiter else [settings.timeout, *(rule.timeout for rule in settings.rule)]
    if settings.warn_before and any(timeout and timeout <= settings.warn_before for timeout in timeouts):
        raise click.UsageError(
            "--warn-before must be shorter than --timeout and each rule's timeout=, or it would warn of servers in use."
        )
    with stop_signals() as stop:
        culler = Culler(settings, stop)
        if ZERO < settings.timeout < ACTIVITY_INTERVAL:
            culler.report.say(
                "warning",
                f"--timeout {format_duration(settings.timeout)} may stop servers in use: a Hub refreshes last_activity"
                " every 5m by default (JupyterHub.last_activity_interval); from 5m30s on it is safe",
            )
        return culler.run()


def generate_config(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    """Print a TOML file with every option, its default and its help, commented out."""
    import json
    import textwrap

    if not wanted:
        return
    click.echo(
        "# Options of cull_idle.py: remove the # in front of a name to set it. The command line and variables win."
    )
    for field in dataclasses.fields(Settings):
        attrs = field.metadata
        if attrs.get("callback") is read_config:
            continue
        click.echo("\n" + "\n".join(f"## {line}" for line in textwrap.wrap(attrs["help"], 100)))
        default = [] if attrs.get("multiple") else attrs.get("default", False if attrs.get("is_flag") is True else None)
        if default is None:
            click.echo(f"## {option_name(field.name)} = …")
        else:
            click.echo(
                f"# {option_name(field.name)} = {default if default in ('true', 'false') else json.dumps(default)}"
            )
    ctx.exit()


def make_command() -> click.Command:
    """The command line, from the fields of Settings."""
    params: list[click.Parameter] = []
    for field in dataclasses.fields(Settings):
        attrs = dict(field.metadata)
        names = [f"--{option_name(field.name)}", *attrs.pop("names")]
        variables = [f"CULL_IDLE_{field.name.upper()}", *attrs.pop("envvar", [])]
        params.append(GroupedOption(names, envvar=variables, **attrs))
    command = GroupedCommand(
        PROGRAM,
        params=params,
        callback=run,
        help="Stop the idle servers of a JupyterHub: once, or in a loop."
        " The API token comes from $JUPYTERHUB_API_TOKEN or --token-file.",
        epilog="A DURATION is seconds, or like 90s, 15m, 1.5h, 1h30m, 2d, 1w. Each option is an environment variable"
        " too: CULL_IDLE_TIMEOUT=1h. Exit codes: 0 all done, 1 something due was not done, 2 usage, 3 no usable Hub.",
        context_settings={
            "help_option_names": ["-h", "--help"],
            # as the old scripts wrote them, and jupyterhub-idle-culler in full
            "token_normalize_func": lambda name: name.removeprefix("IdleCuller.").replace("_", "-"),
        },
    )
    generate = click.option(
        "--generate-config",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=generate_config,
        help="Print such a file with every option, its default and its help, commented out, and exit.",
    )
    return click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")(generate(command))


def blame_source(error: click.ClickException) -> None:
    """Let the sentence name the environment variable or the file that a bad value came from."""
    if isinstance(error, click.BadParameter) and error.ctx and error.param and error.param.name:
        source = error.ctx.get_parameter_source(error.param.name)
        if source is click.core.ParameterSource.ENVIRONMENT:
            error.param_hint = next(f"${name}" for name in error.param.envvar or () if os.environ.get(name))
        elif source is click.core.ParameterSource.DEFAULT_MAP:
            error.param_hint = f"{option_name(error.param.name)} in {error.ctx.params.get('config')}"


def nowhere() -> TextIO:
    """A stream for what nobody reads."""
    return open(os.devnull, "w")


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    gc.set_threshold(10_000)  # imports and pages make many objects, and hardly any cycles
    atexit.register(gc.freeze)  # nor does Python have to look for these before it ends
    sys.stdout, sys.stderr = sys.stdout or nowhere(), sys.stderr or nowhere()  # None where the caller has closed it
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        if not hasattr(click, "NoSuchCommand"):  # which came with 8.4
            raise UsageError("click is too old here and would misread options: pip install --upgrade click")
        return int(make_command().main(args, PROGRAM, standalone_mode=False))
    except click.ClickException as error:
        blame_source(error)
        sentence, exit_code = error.format_message(), Exit.USAGE
    except CullError as error:
        sentence, exit_code = str(error), error.exit_code
    except click.Abort:  # SIGINT before stop_signals: an arbiter is loaded
        sentence, exit_code = "told to stop", Exit.UNDONE
    except ModuleNotFoundError as error:
        sentence, exit_code = f"the Python module {error.name} is missing (README: install)", Exit.USAGE
    except OSError as error:  # all others are met where they happen; click ends the program if it is a closed pipe
        sys.stdout = nowhere()  # or Python would try again
        sentence, exit_code = f"stdout cannot be written: {error.strerror}", Exit.UNDONE
    click.echo(f"{'<3>' * goes_to_journal()}{PROGRAM}: {sentence}", err=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
