#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["click>=8.4.1", "python-dateutil>=2.9", "requests>=2.32.2"]
# ///
"""Stop the idle servers of a JupyterHub through its REST API.

Polls the Hub's user list and stops every server whose last activity is older than a limit: once, or in a loop.
The API token comes from $JUPYTERHUB_API_TOKEN or --token-file, never from the command line.

To find your way: `main`, at the end, turns the command line into Settings and starts Loop. Loop.make_pass makes a pass:
Scan reads the user list and lets Judge decide about each server, Culler looks again at what is due and sends the
DELETEs, and what became of each is an Event for Log, JsonLines and Notices. PassResult sums up.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

# Before the other imports, and in a file that Python 3.8 can parse, so that an old Python gets a clear message too.
PACKAGES = {"click": "click>=8.4.1", "dateutil": "python-dateutil>=2.9", "requests": "requests>=2.32.2"}
if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write(f"cull_idle needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable}).\n")
    sys.exit(2)
INSTALL = f"pip install {' '.join(map(repr, PACKAGES.values()))}"
if sys.prefix != sys.base_prefix:  # in a virtual environment
    INSTALL = f"{sys.executable} -m {INSTALL}"
else:  # pip often refuses to install into the system's Python
    INSTALL = f"{sys.executable} -m venv .venv && .venv/bin/{INSTALL}  # then run .venv/bin/python {sys.argv[0]}"
if not all(map(find_spec, PACKAGES)):
    sys.stderr.write(f"cull_idle needs more packages: {INSTALL}\n")
    sys.exit(2)

import atexit
import contextlib
import dataclasses
import enum
import gc
import io
import os
import queue
import re
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Literal, NamedTuple, Self, TextIO, TypeVar

import click

if not hasattr(click, "NoSuchCommand"):  # which came with 8.4
    sys.stderr.write(f"cull_idle needs a newer click: {INSTALL}\n")
    sys.exit(2)

# Slow imports are made where they are used, so that --help and --version answer at once.
if TYPE_CHECKING:
    import asyncio
    import logging
    import socket
    from http.client import HTTPResponse

    import requests

__version__ = "0.1.0"

PROGRAM = "cull_idle.py"

T = TypeVar("T")
Result = TypeVar("Result")
Target = TypeVar("Target", "Server", "User")

# ---- Errors and text


class Exit(enum.IntEnum):
    """The exit codes."""

    DONE = 0  # all that was due is done; nothing due is fine
    UNDONE = 1  # something due was not done
    USAGE = 2  # an option or the token is wrong
    NO_HUB = 3  # the Hub could not be used


class CullError(Exception):
    """A failure. Its text is the sentence that the administrator reads."""

    exit_code: Exit


class SettingsError(CullError):
    """An option, the config file or the token cannot be used."""

    exit_code = Exit.USAGE


class FuseBlownError(CullError):
    """More is due than --max-culls allows."""

    exit_code = Exit.UNDONE


class UnreadableError(CullError):
    """A rule needs a field that the token may not read. Guessing could cull what the rule keeps."""

    exit_code = Exit.NO_HUB


class HubError(CullError):
    """A request to the Hub failed.

    kind: the sentence without the name of a user or server; failures of one kind are reported once and counted.
    refused: the token may not do this, so the pass ends.
    affects_all: True if every other request would probably fail too.
    """

    exit_code = Exit.NO_HUB  # for a whole pass; if only a server or a user fails, it is UNDONE

    def __init__(self, sentence: str, kind: str = "", *, refused: bool = False, affects_all: bool = False) -> None:
        super().__init__(sentence)
        self.kind = kind or sentence
        self.refused = refused
        self.affects_all = affects_all


class TryAgain(HubError):
    """The Hub cannot be used now, but perhaps in `pause` seconds (0 if it does not say when)."""

    def __init__(self, sentence: str, kind: str = "", pause: float = 0) -> None:
        super().__init__(sentence, kind, affects_all=True)
        self.pause = pause


class TooMuchData(HubError):
    """An answer is too large, or nested too deeply, to be parsed. A smaller page may work."""


LONGEST_TEXT = 520  # characters of a name or message that one line shows; user and server have up to 255 each
SECRETS: set[str] = set()  # tokens that were read; nothing that is shown may contain them


def printable(text: str, width: int = LONGEST_TEXT) -> str:
    """Make a text from outside safe to show: tokens replaced, cut to `width` characters, escaped.

    All that comes from the Hub, a user, a file or a command passes through here before it is logged or printed.
    """
    for secret in SECRETS:
        text = text.replace(secret, "…")
    text = text if len(text) <= width else text[: width - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, width: int = 200) -> str:
    """Make a text from outside safe to show like printable, on one line and with single spaces."""
    for secret in SECRETS:  # before white space is changed: a token is found only as a whole
        text = text.replace(secret, "…")
    return printable(" ".join(text[: 4 * width].split()), width)


# ---- Durations and times

ZERO = timedelta(0)
NEVER = timedelta.max
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
UNITS = {
    "weeks": "w(?:eeks?)?",
    "days": "d(?:ays?)?",
    "hours": "h(?:(?:ou)?rs?)?",
    "minutes": "m(?:in(?:ute)?s?)?",
    "seconds": "s(?:ec(?:ond)?s?)?",
}
DURATION = r"\s*".join(rf"(?:(?P<{name}>{NUMBER})\s*{unit})?" for name, unit in UNITS.items())
SECONDS = rf"{NUMBER}(?:e\+?[0-9]+)?"  # Helm writes large numbers as 1.2096e+06


def parse_duration(text: str) -> timedelta:
    """Read seconds (`3600`), or numbers with units, the largest first (`90s`, `1h30m`, `1.5h`, `2d`, `1w`).

    Raises ValueError with a sentence for anything else.
    """
    words = text.strip().lower()
    match = re.fullmatch(DURATION, words)
    try:
        if re.fullmatch(SECONDS, words):
            return timedelta(seconds=float(words))
        if words and match:
            return timedelta(**{name: float(number) for name, number in match.groupdict(default="0").items()})
    except OverflowError:
        raise ValueError(f"{one_line(text, 40)!r} is too long a duration.") from None
    raise ValueError(
        f"{one_line(text, 40)!r} is not a duration: write seconds, or numbers with units, such as"
        " 90s, 15m, 1.5h, 1h30m, 2d or 1w."
    )


def parse_limit(text: str) -> timedelta:
    """Read a duration, or `never` as NEVER. Raises ValueError like parse_duration."""
    return NEVER if text.strip().lower() == "never" else parse_duration(text)


def format_duration(duration: timedelta, units: int = 4) -> str:
    """Write a duration the way parse_duration reads it (`2h03m`, `1d04h`), cut to whole seconds and `units` units."""
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


def short(duration: timedelta) -> str:
    """The two largest units of a duration, enough for a log line: `2h03m`."""
    return format_duration(duration, units=2)


def parse_time(text: object) -> datetime | None:
    """Read a timestamp of the Hub's, in UTC. null is None; one without a zone is in UTC (Hubs before 0.9).

    Raises ValueError for anything else, also for a date without a time of day, which could be off by a day.
    """
    try:
        moment = datetime.fromisoformat(text)  # type: ignore[arg-type]
        if moment.tzinfo is UTC:
            return moment
    except (TypeError, ValueError):
        moment = None
    if text is None:
        return None
    if not isinstance(text, str) or len(text) <= len("2026-11-22"):
        raise ValueError(f"{one_line(str(text), 40)!r} is not a time")
    if not moment:
        from dateutil.parser import isoparse  # slower, but reads more of ISO 8601

        try:
            moment = isoparse(text)
        except (ValueError, OverflowError):
            raise ValueError(f"{one_line(text, 40)!r} is not a time") from None
    if moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{one_line(text, 40)!r} is not a time") from None


def parse_http_date(text: str | None) -> datetime:
    """Read a Date header. The local clock stands in for one that is missing or not plausible."""
    from email.utils import parsedate_to_datetime

    try:
        moment = parsedate_to_datetime(text or "")
    except (ValueError, OverflowError):
        return datetime.now(UTC)
    if moment.year >= 3000:  # a limit added to it could be beyond all dates
        return datetime.now(UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def format_time(moment: datetime) -> str:
    """Write a moment for programs: `2026-11-22T20:14:03Z`."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"


# ---- Servers and users: the Hub's JSON as typed values
#
# Each server of the Hub becomes a Server and gets a Verdict. Dataclasses with slots are made faster than NamedTuples.
# They are not frozen, which would be slower, but never changed: `replace` makes a new one.


class Source(enum.Enum):
    """Who says when a server was last active; the values are words for a log line."""

    HUB = ""
    NO_ANSWER = "says the Hub, because the server gave no answer"
    SERVER = "says the server"
    KERNEL = "say its kernels"
    BUSY_KERNEL = "says a busy kernel"
    TERMINAL = "say its terminals"


@dataclasses.dataclass(slots=True)
class Server:
    """A server that the Hub does not list as stopped: ready, starting or stopping."""

    user: str
    name: str  # empty for the default server
    ready: bool
    pending: str  # what the Hub is doing with it ("spawn", "stop"), empty for nothing
    started: datetime | None  # unknown before JupyterHub 0.9
    last_activity: datetime | None
    doubt: str  # what in the Hub's answer cannot be understood, empty for nothing
    model: Mapping[str, Any]  # as the Hub sent it, for rules and --arbiter
    user_model: Mapping[str, Any]
    source: Source = Source.HUB  # who says last_activity

    @property
    def full_name(self) -> str:
        """The Hub's name for it, safe to print: `ann`, or `ann/gpu` for a named server."""
        return printable(f"{self.user}/{self.name}" if self.name else self.user)

    def without_models(self) -> Server:
        """The server without the Hub's JSON, which may be large."""
        return replace(self, model={}, user_model={})


@dataclasses.dataclass(slots=True)
class User:
    """A user, with the servers that the token may see."""

    name: str
    admin: bool
    created: datetime | None  # unknown before JupyterHub 0.9
    last_activity: datetime | None
    servers: list[Server]
    doubt: str  # what in the Hub's answer cannot be understood, empty for nothing
    model: Mapping[str, Any]  # as the Hub sent it, for rules

    @property
    def full_name(self) -> str:
        """`user ann`, safe to print. The first word tells it from ann's default server."""
        return f"user {printable(self.name)}"

    def server_or_doubt(self, name: str) -> Server | None:
        """The server of that name, else any server in doubt, which may be that one. None only if it is surely gone."""
        found = next((server for server in self.servers if server.name == name), None)
        return found or next((server for server in self.servers if server.doubt), None)

    def without_models(self) -> User:
        """The user without the servers and the Hub's JSON, which may be large."""
        return replace(self, servers=[], model={})


def parse_user(model: object) -> User:
    """Turn a user model of the REST API, of any Hub since 0.6, into values.

    A field that is missing or malformed becomes a `doubt`. Raises ValueError only for a model without a name.
    https://jupyterhub.readthedocs.io/en/stable/reference/rest-api.html#/default/get_users
    """
    model = named_model(model)
    created, last_activity, doubt = None, None, ""
    try:
        created = parse_time(model.get("created"))
        last_activity = parse_time(model.get("last_activity")) or created  # null until the first activity
    except ValueError as error:
        doubt = f"created or last_activity: {error}"
    admin = model.get("admin")
    if "last_activity" not in model:
        doubt = "its last_activity is not shown; the token needs the scope read:users:activity"
    elif last_activity is None:
        doubt = doubt or "neither last_activity nor created is known"
    elif not isinstance(admin, bool):
        doubt = "the Hub does not say whether the user is an admin"
    return User(model["name"], admin is True, created, last_activity, parse_servers(model), doubt, model)


def parse_servers(model: object) -> list[Server]:
    """Turn the servers in a user model into values. Raises ValueError only for a model without a name."""
    model = named_model(model)
    name, servers = model["name"], model.get("servers")
    if isinstance(servers, dict):
        if "" not in servers and model.get("pending"):
            # JupyterHub 0.8 with named servers lists only ready ones; `pending` of the user is the default server's.
            servers = {**servers, "": {}}
        found = []
        for server_name, server in servers.items():
            if not (isinstance(server, dict) and server.get("stopped") is True):
                found.append(parse_server(name, server_name, server, model))
        return found
    if "servers" not in model and "server" in model and "created" not in model:
        # JupyterHub 0.6 to 0.8 without named servers: the user's own keys describe the default server.
        exists = model["server"] or model.get("pending")
        return [parse_server(name, "", {"url": model["server"]}, model)] if exists else []
    return [server_in_doubt(name, "", "its servers are not shown; the token needs the scope read:servers")]


def name_of(model: object) -> str:
    """The name in a user model; empty if there is none."""
    name = model.get("name") if isinstance(model, dict) else None
    return name if isinstance(name, str) else ""


def named_model(model: object) -> dict[str, Any]:
    """Return the user model if it is a JSON object with a name. Raises ValueError."""
    if isinstance(model, dict) and name_of(model):
        return model
    raise ValueError("answered a user without a name")


def server_in_doubt(user: str, name: str, doubt: str) -> Server:
    """A server that is kept because its model is not understood. Rules and arbiter never see it: it has no models."""
    return Server(user, name, False, "", None, None, doubt, {}, {})


def parse_server(user: str, name: str, model: object, user_model: Mapping[str, object]) -> Server:
    """Turn a server model, with the user model around it, into values."""
    if not isinstance(model, dict):
        return server_in_doubt(user, name, "its model is not a JSON object")
    if "ready" not in model and "pending" not in model and "last_activity" not in model:
        # JupyterHub 0.6 to 0.8: `url` is set once the server is ready; all else is known of the user only.
        model = {
            **model,
            "ready": bool(model.get("url")),
            "pending": user_model.get("pending"),
            "last_activity": user_model.get("last_activity"),
        }
    doubt = ""
    try:
        started = parse_time(model.get("started"))
        last_activity = parse_time(model["last_activity"]) or started  # null until the first activity
        ready, pending = model["ready"], model["pending"]
    except ValueError as error:
        return server_in_doubt(user, name, f"started or last_activity: {error}")
    except KeyError as key:
        return server_in_doubt(user, name, f"{key.args[0]} is missing")
    if last_activity is None:
        doubt = "neither last_activity nor started is known"
    elif not isinstance(ready, bool):
        doubt = "ready is neither true nor false"
    pending = str(pending) if pending else ""
    return Server(user, name, ready is True, pending, started, last_activity, doubt, model, user_model)


# ---- Decisions: pure, from a server or user, a policy and the Hub's clock


class IdleBy(enum.StrEnum):
    """Which last activity of a server counts (--idle-by)."""

    HUB = "hub"  # as the Hub knows it
    BOTH = "both"  # the later of the Hub's and the server's own
    SERVER = "server"  # the server's own
    KERNELS = "kernels"  # that of the server's kernels and terminals


class Limit(NamedTuple):
    """How long until something is due, and the rule that says so."""

    duration: timedelta  # NEVER for none
    rule_number: int = 0  # 0 for an option
    rule_text: str = ""

    def __str__(self) -> str:
        limit = "no limit" if self.duration == NEVER else f"limit {format_duration(self.duration)}"
        return f"{limit}{self.by_rule}: {self.rule_text}" if self.rule_number else limit

    @property
    def by_rule(self) -> str:
        """` by rule 2`, empty for an option."""
        return f" by rule {self.rule_number}" if self.rule_number else ""


class Policy(NamedTuple):
    """What makes servers, or users, due."""

    timeout: Limit
    max_age: Limit
    default_servers: bool = True  # culled, too
    named_servers: bool = True
    admins: bool = True
    kept_by: str = ""  # the rule with `keep` that applies, for the log; empty for none


@dataclasses.dataclass(slots=True)
class Verdict:
    """Whether to cull, and why."""

    cull: bool
    decided_by: Literal["idle", "age", ""]  # the limit that it was compared with, reached or not; empty for none
    why: str = ""  # the reason in words, if no limit decided
    idle: timedelta | None = None
    age: timedelta | None = None
    limit: Limit | None = None
    in_doubt: bool = False  # kept only because something is not understood
    source: Source = Source.HUB  # who says how long it is idle

    @property
    def reason(self) -> str:
        """The reason as a log line shows it: `idle 2h03m, limit 1h`, `terminal active 2m ago, limit 1h`."""
        if self.decided_by == "idle" and self.idle is not None:
            if self.source in ACTIVE and not self.cull:
                return f"{self.activity}, {self.limit}"
            says = f", {self.source.value}" if self.source.value else ""
            return f"idle {short(self.idle)}, {self.limit}{says}"
        if self.decided_by == "age" and self.age is not None:
            return f"age {short(self.age)}, {self.limit}"
        return self.why

    @property
    def activity(self) -> str:
        """What was active last, and when, for one that is spared: `active again 4s ago, says the server`."""
        what = ACTIVE.get(self.source, "active again")
        if self.source is Source.BUSY_KERNEL or self.idle is None:
            return what
        says = f", {self.source.value}" if self.source is Source.SERVER else ""
        return f"{what} {short(self.idle)} ago{says}"

    def keep_because(self, why: str) -> Verdict:
        """The same figures, but kept, for this reason."""
        return replace(self, cull=False, decided_by="", why=why)


def keep_in_doubt(why: str) -> Verdict:
    """The verdict on what is not understood: it is kept."""
    return Verdict(False, "", why, in_doubt=True)


ACTIVE = {
    Source.KERNEL: "kernel active",
    Source.BUSY_KERNEL: "kernel busy",
    Source.TERMINAL: "terminal active",
}


def compare_with_limits(
    active: datetime, born: datetime | None, policy: Policy, now: datetime, source: Source = Source.HUB
) -> Verdict:
    """Compare the time since the last activity, and the age, with the policy's limits. A time in the future is now."""
    idle = now - active if active < now else ZERO
    age = None
    if born is not None:
        age = now - born if born < now else ZERO
    kept = Verdict(False, "idle", "", idle, age, policy.timeout, False, source)
    if idle >= policy.timeout.duration:
        return replace(kept, cull=True)
    if age is not None and age >= policy.max_age.duration:
        return replace(kept, cull=True, decided_by="age", limit=policy.max_age)
    return kept


def judge_server(server: Server, policy: Policy, now: datetime) -> Verdict:
    """Decide whether a server is to be stopped, at `now` by the Hub's clock. In doubt it is kept."""
    if server.doubt or server.last_activity is None:
        return keep_in_doubt(server.doubt)
    verdict = compare_with_limits(server.last_activity, server.started, policy, now, server.source)
    if server.pending:
        return verdict.keep_because(f"pending {one_line(server.pending, 20)}")
    if not server.ready:
        return verdict.keep_because("not ready")
    if server.name and not policy.named_servers:
        return verdict.keep_because("named servers are not culled")
    if not server.name and not policy.default_servers:
        return verdict.keep_because("default servers are not culled")
    if policy.kept_by:
        return verdict.keep_because(policy.kept_by)
    return verdict


def judge_user(user: User, policy: Policy, now: datetime) -> Verdict:
    """Decide whether a user is to be deleted, regardless of the user's servers. In doubt the user is kept."""
    if user.doubt or user.last_activity is None:
        return keep_in_doubt(user.doubt)
    verdict = compare_with_limits(user.last_activity, user.created, policy, now)
    if user.admin and not policy.admins:
        return verdict.keep_because("admins are not deleted")
    if policy.kept_by:
        return verdict.keep_because(policy.kept_by)
    return verdict


def due_within(
    server: Server, verdict: Verdict, policy: Policy, now: datetime, within: timedelta
) -> tuple[datetime, Verdict] | None:
    """When a kept server becomes due if it stays idle, and its verdict with the limit that it reaches first.

    None if that is later than `within` from now.
    """
    if not judge_server(server, policy, now + within).cull:
        return None
    limits = ((server.last_activity, policy.timeout.duration), (server.started, policy.max_age.duration))
    # Only limits that are reached by then, at least one of them: others, such as NEVER, could overflow.
    due_at = min(since + limit for since, limit in limits if since and limit <= now + within - since)
    then = judge_server(server, policy, due_at)
    return due_at, replace(verdict, decided_by=then.decided_by, limit=then.limit)


class OwnActivity(NamedTuple):
    """The last activity of a server as the server itself tells it."""

    source: Source
    idle: timedelta | None = None  # by the server's own clock; None if it has no kernel and no terminal
    # With NO_ANSWER: what it said before it failed to answer, None for nothing.


def with_own_activity(server: Server, own: OwnActivity, idle_by: IdleBy, now: datetime) -> Server:
    """The server with the last activity that --idle-by counts, no earlier than its start."""
    age = max(now - (server.started or server.last_activity or now), ZERO)
    active = now - (age if own.idle is None else min(own.idle, age))  # without kernels, idle since its start
    if own.source is Source.NO_ANSWER:
        if own.idle is not None and server.last_activity and active > server.last_activity:
            return replace(server, last_activity=active, source=Source.SERVER)  # a part of an answer can keep it
        return replace(server, source=own.source)
    if idle_by is IdleBy.BOTH and server.last_activity and server.last_activity > active:
        return server
    return replace(server, last_activity=active, source=own.source)


def is_worth_asking(server: Server, policy: Policy, now: datetime) -> bool:
    """True if the verdict depends on the server's answer: due if idle since its start, kept if active now."""
    idle = replace(server, last_activity=server.started or server.last_activity)
    active = replace(server, last_activity=now)
    return judge_server(idle, policy, now).cull and not judge_server(active, policy, now).cull


# ---- Rules: exceptions for some servers and users

MOST_REMEMBERED = 10_000  # combinations of values for which Policies remembers the rules
LONGEST_REMEMBERED = 1_000  # characters and values; what is longer is not remembered: an option may have a megabyte


class RuleField(NamedTuple):
    """What a rule can match, and where the Hub shows it."""

    model_key: str  # in the Hub's model of the user or server; empty for a server's name, which old Hubs leave out
    scope: str  # that the token needs to see it
    of_server: bool = False
    has_key: bool = False  # has a key after a dot: `option.profile=`
    allowed: tuple[str, ...] = ()  # the only values that it can have


RULE_FIELDS = {
    "user": RuleField("name", "list:users"),
    "group": RuleField("groups", "read:users:groups"),
    "server": RuleField("", "read:servers", of_server=True),
    "admin": RuleField("admin", "list:users", allowed=("true", "false")),
    "option": RuleField("user_options", "read:servers", of_server=True, has_key=True),
    "state": RuleField("state", "admin:server_state", of_server=True, has_key=True),
}
MATCHES = [f"{name}.KEY" if field.has_key else name for name, field in RULE_FIELDS.items()]
RULE_HELP = (
    f"a rule is matches ({', '.join(f'{name}=' for name in MATCHES)}) and settings (timeout=, max-age=, or keep)"
)


class Match(NamedTuple):
    """A condition of a rule."""

    name: str  # as it is written: `group`, `option.profile`
    field: RuleField
    key: str  # after the dot
    glob: re.Pattern[str]

    def values(self, target: Server | User) -> tuple[str, ...]:
        """The texts that the glob may match. Raises UnreadableError if the Hub does not show the field."""
        field = self.field
        if isinstance(target, User):
            value = target.model.get(field.model_key)  # not of a server: see Rule.for_users
        elif not field.model_key:
            value = target.name
        else:
            value = (target.model if field.of_server else target.user_model).get(field.model_key)
        if field.has_key and isinstance(value, dict):
            value = value.get(self.key, [])
        elif field.has_key or value is None:
            raise UnreadableError(
                f"a rule matches {self.name}=, but the Hub does not show it for {target.full_name}: the token needs the"
                f" scope {field.scope}, or the Hub is too old"
            )
        return as_texts(value)

    def holds(self, values: Iterable[str]) -> bool:
        """True if the glob matches one of the values."""
        return any(map(self.glob.match, values))


def as_texts(value: object) -> tuple[str, ...]:
    """A JSON value, or those of a list, as texts: `true`, `7`. null, objects and inner lists match nothing."""
    values = value if isinstance(value, list) else [value]
    return tuple(
        each if isinstance(each, str) else str(each).lower()
        for each in values
        if each is not None and not isinstance(each, (list, dict))
    )


class Rule(NamedTuple):
    """An exception: it applies where all its matches hold. What it does not set comes from the options."""

    text: str
    matches: tuple[Match, ...]
    timeout: timedelta | None
    max_age: timedelta | None
    keep: bool

    @property
    def for_users(self) -> bool:
        """True if the rule can apply to users too: it matches no field of a server."""
        return not any(match.field.of_server for match in self.matches)

    def policy(self, number: int, default: Policy) -> Policy:
        """The options' policy with what the rule sets. `number`, from 1, is for messages."""
        if self.keep:
            no_limit = Limit(NEVER)  # for --explain
            return default._replace(timeout=no_limit, max_age=no_limit, kept_by=f"rule {number}: {self.text}")
        timeout, max_age = default.timeout, default.max_age
        if self.timeout is not None:
            timeout = Limit(self.timeout, number, self.text)
        if self.max_age is not None:
            max_age = Limit(self.max_age or NEVER, number, self.text)
        return default._replace(timeout=timeout, max_age=max_age)


def split_words(text: str) -> list[str]:
    """Split a text like a shell. Raises ValueError with a sentence."""
    import shlex

    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{one_line(text)!r}: {error}.") from None


def parse_rule(text: str) -> Rule:
    """Read `MATCH… SETTING…`, words as in a shell. Raises ValueError with a sentence that names the wrong word."""
    if any("\ud800" <= char <= "\udfff" for char in text):  # it would match no name
        raise ValueError(f"{one_line(text)!r} is not UTF-8.")
    matches: list[Match] = []
    limits: dict[str, timedelta] = {}
    keep = False
    for word in split_words(text):
        name, equals, value = word.partition("=")
        if name == "max_age":  # as in the option's variable
            name = "max-age"
        if word == "keep":
            keep = True
        elif equals and name in ("timeout", "max-age") and name not in limits:
            try:
                limits[name] = parse_limit(value)
            except ValueError as error:
                raise ValueError(f"{one_line(word)!r}: {error}") from None
        elif equals and (match := parse_match(name, value)):
            matches.append(match)
        else:
            raise ValueError(f"{one_line(word)!r} in {one_line(text)!r} is not understood: {RULE_HELP}.")
    if keep and limits:
        raise ValueError(f"{one_line(text)!r} has both keep and a limit, but keep means no limit: leave one out.")
    if not keep and not limits:
        raise ValueError(
            f"{one_line(text)!r} sets nothing: put quotes around the whole rule, and set timeout=, max-age=, or keep;"
            f" {RULE_HELP}."
        )
    return Rule(printable(text), tuple(matches), limits.get("timeout"), limits.get("max-age"), keep)


def parse_match(name: str, value: str) -> Match | None:
    """Read a condition of a rule; None if it is not one. Raises ValueError for a value that it cannot have."""
    import fnmatch

    field_name, dot, key = name.partition(".")
    field = RULE_FIELDS.get(field_name)
    if field is None or bool(dot) != field.has_key or bool(key) != field.has_key:
        return None
    if field.allowed and value not in field.allowed:
        raise ValueError(f"{one_line(f'{name}={value}')!r}: {name}= is {' or '.join(field.allowed)}.")
    return Match(name, field, key, re.compile(fnmatch.translate(value)))


class Policies:
    """Finds the policy for a server or user: that of the first rule that applies, else that of the options.

    Most servers differ only in their user's name. So for each combination of values of the other fields, the rules
    that match are remembered; for each server, only their globs for the user's name are tried.
    It also remembers which rules have applied.
    """

    def __init__(self, rules: Sequence[tuple[Rule, Policy]], default: Policy) -> None:
        self._rules = rules
        self._default = default
        self.applied: set[str] = set()  # texts of rules
        # A Match for each field but the user's name. Any will do: all that match a field read the same values.
        self._fields = {match.name: match for rule, _ in rules for match in rule.matches if match.name != "user"}
        self._remembered: dict[tuple[tuple[str, ...], ...], list[tuple[list[re.Pattern[str]], Policy, str]]] = {}

    def find(self, target: Server | User) -> Policy:
        """The policy for a server or user; for one in doubt, that of the options.

        Raises UnreadableError if the Hub does not show what a rule matches.
        """
        if not self._rules or target.doubt:  # kept in any case, and its model may lack what a rule matches
            return self._default
        values = tuple(match.values(target) for match in self._fields.values())
        candidates = self._remembered.get(values)
        if candidates is None:
            candidates = self._candidates(dict(zip(self._fields, values, strict=True)))
            if len(self._remembered) >= MOST_REMEMBERED:
                self._remembered.clear()
            if sum(len(value) + 1 for each in values for value in each) <= LONGEST_REMEMBERED:
                self._remembered[values] = candidates
        name = target.user if isinstance(target, Server) else target.name
        for globs, policy, text in candidates:
            for glob in globs:  # faster than all(…), and done for each server
                if not glob.match(name):
                    break
            else:
                self.applied.add(text)
                return policy
        return self._default

    def _candidates(self, values: Mapping[str, tuple[str, ...]]) -> list[tuple[list[re.Pattern[str]], Policy, str]]:
        """The rules that match these values, each as its globs for the user's name, its policy and its text."""
        return [
            ([match.glob for match in rule.matches if match.name == "user"], policy, rule.text)
            for rule, policy in self._rules
            if all(match.holds(values[match.name]) for match in rule.matches if match.name != "user")
        ]


# ---- The arbiter: the administrator's own decision in place of the timeout

ARBITER_ARGUMENTS = frozenset(("inactive", "inactive_limit", "server", "user"))


class Arbiter(NamedTuple):
    """A function, plain or async, that says whether to cull a server."""

    function: Callable[..., object]
    arguments: frozenset[str]  # those of ARBITER_ARGUMENTS that it takes

    def __call__(self, **arguments: object) -> bool:
        """Ask it. Raises whatever it raises."""
        import inspect

        with calling_arbiter:
            answer = self.function(**{name: value for name, value in arguments.items() if name in self.arguments})
            if inspect.isawaitable(answer):
                answer = arbiter_loop().run(answer)  # type: ignore[arg-type]  # raises for anything but a coroutine
            return bool(answer)


calling_arbiter = threading.Lock()  # its author need not think of threads


@cache
def arbiter_loop() -> asyncio.Runner:
    """One event loop for all calls, so that an arbiter may keep a lock or a session between them."""
    import asyncio

    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


def load_arbiter(name: str) -> Arbiter:
    """Load `MODULE:FUNC` or `FILE.py:FUNC`. Raises ValueError with a sentence if that fails."""
    import importlib
    import importlib.util
    import inspect

    source, _, function_name = name.rpartition(":")
    if not source or not function_name:
        raise ValueError(f"{name!r} names no function: write MODULE:FUNC or FILE.py:FUNC.")
    config = SimpleNamespace(IdleCuller=SimpleNamespace())
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location("cull_idle_arbiter", source)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            sys.modules["cull_idle_arbiter"] = module  # where dataclasses and pickle look for it
            # Config files of jupyterhub-idle-culler say `c = get_config()` and `c.IdleCuller.cull_arbiter_hook = …`
            vars(module).update(c=config, get_config=lambda: config)
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            module = importlib.import_module(source)
        function = getattr(module, function_name)
        parameters = inspect.signature(function).parameters
        others = sorted(vars(config.IdleCuller).keys() - {"cull_arbiter_hook"})
    except (Exception, SystemExit) as error:  # whatever the administrator's module raises
        raise ValueError(f"{name!r} cannot be loaded: {describe(error)}.") from None
    if others:
        raise ValueError(
            f"{name!r} sets c.IdleCuller.{others[0]}, which has no effect here: take it out, and use the option."
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return Arbiter(function, ARBITER_ARGUMENTS)
    if unknown := [n for n, p in parameters.items() if p.default is p.empty and n not in ARBITER_ARGUMENTS]:
        known = ", ".join(sorted(ARBITER_ARGUMENTS))
        raise ValueError(f"{name!r} has an argument {unknown[0]!r}, but only these are passed: {known}.")
    return Arbiter(function, ARBITER_ARGUMENTS & parameters.keys())


def describe(error: BaseException) -> str:
    """An exception of somebody else's code in a few words."""
    return f"{type(error).__name__}: {one_line(str(error))}"


def judge_with_arbiter(server: Server, policy: Policy, arbiter: Arbiter, now: datetime) -> Verdict:
    """Decide like judge_server, but let the arbiter decide in place of the timeout. If it fails, the server is kept."""
    verdict = judge_server(server, policy._replace(timeout=Limit(NEVER)), now)
    if verdict.cull or verdict.decided_by != "idle":  # due by its age, or kept whatever the limits are
        return verdict
    try:
        cull = arbiter(
            inactive=verdict.idle,
            inactive_limit=policy.timeout.duration.total_seconds(),  # not a timedelta: as in jupyterhub-idle-culler
            server=server.model,
            user=server.user_model,
        )
    except BaseException as error:  # whatever the administrator's function raises; stop_signals handles Ctrl-C
        return replace(verdict.keep_because(f"the arbiter failed: {describe(error)}"), in_doubt=True)
    idle = "" if verdict.idle is None else f", idle {short(verdict.idle)}"
    return replace(verdict, cull=cull, decided_by="", why=f"the arbiter says {'cull' if cull else 'keep'}{idle}")


# ---- Settings: each option is declared once, as a field of Settings

LONGEST = timedelta(days=365)  # for --cull-every and --warn-before
IDLE_STEPS = ("10m", "30m", "1h", "2h", "4h", "8h", "1d", "1w")  # the timeouts that a dry run compares
WHAT, WHEN, HUB, OUTPUT = "What to cull", "When", "The Hub", "Output"  # headings of --help


class TextType(click.ParamType[Any]):
    """An option type made from a function that reads its text. Its ValueError is the sentence for the user."""

    def __init__(self, read: Callable[[str], object], name: str) -> None:
        self.read = read
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the text. Raises click.BadParameter."""
        try:
            return self.read(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002 (click passes them)
        """The name is written as it is."""
        return self.name


def duration_type(*, least: timedelta = ZERO, most: timedelta) -> TextType:
    """The type of a duration within these bounds."""

    def read(text: str) -> timedelta:
        duration = parse_duration(text)
        if duration < least:
            raise ValueError(f"{text!r} is too short: at least {least.total_seconds():g}s.")
        if duration > most:
            raise ValueError(f"{text!r} is too long: at most {format_duration(most)}.")
        return duration

    return TextType(read, "DURATION")


class Fuse(NamedTuple):
    """How much one pass may cull (--max-culls)."""

    most: float
    percent: bool  # of the ready servers, and of the users

    def __str__(self) -> str:
        return f"{self.most:g}{'%' if self.percent else ''}"

    def check(self, what: str, due: int, total: int) -> None:
        """Raise FuseBlownError if more are due. `what`: servers or users; `total`: how many there are."""
        if due > (self.most * total / 100 if self.percent else self.most):
            raise FuseBlownError(
                f"nothing is culled, because {due} of {total} {what} are due and --max-culls is {self};"
                " look at them with --dry-run, and raise --max-culls if they should go"
            )


def parse_fuse(text: str) -> Fuse:
    """Read a number or a percentage. Raises ValueError."""
    match = re.fullmatch(rf"({NUMBER})%|([0-9]+)", text.strip())
    if not match or float(match[1] or 0) > 100:
        raise ValueError(f"{one_line(text, 40)!r} is neither a number, such as 20, nor 0% to 100%.")
    return Fuse(float(match[1] or match[2]), percent=bool(match[1]))


def parse_command(text: str) -> tuple[str, ...]:
    """Split a command like a shell. Raises ValueError if that fails, or its program does not exist."""
    import shutil

    words = tuple(split_words(text))
    if not words or "\0" in text or not shutil.which(words[0]):
        raise ValueError(
            f"{one_line(words[0] if words else text)!r} is not a program that can be run: it must be executable, and on"
            " the $PATH or written with its directory."
        )
    return words


def parse_path(text: str) -> str:
    """A path. Raises ValueError for what cannot be one."""
    if not text or "\0" in text:
        raise ValueError(f"{one_line(text)!r} is not a path.")
    return text


def parse_url(text: str) -> str:
    """Check an address as far as that is possible without a request. Raises ValueError."""
    from urllib.parse import urlsplit

    try:
        url = urlsplit(text)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch("[!-~]+", text):  # printable ASCII without spaces
        raise ValueError(f"{one_line(text)!r} is not a URL: write http:// or https://, then a host.")
    if url.username is not None or url.query or url.fragment:
        raise ValueError("the URL of a Hub has no user, no password, no ? and no #.")
    return f"{url.scheme}{text[len(url.scheme) :]}".rstrip("/")  # with the scheme in lower case


def read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Take defaults from a TOML file whose keys are the names of options."""
    import tomllib

    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be read: {error.strerror}.", ctx, param) from None
    except ValueError as error:
        unquoted = str(error).startswith(("Invalid value", "Expected newline"))  # what tomllib says then
        hint = '; durations and texts need quotes, such as timeout = "1h"' if unquoted else ""
        raise click.BadParameter(f"{path} is not TOML: {one_line(str(error))}{hint}.", ctx, param) from None
    types = {field.name: field.metadata.get("type") for field in dataclasses.fields(Settings) if field.name != "config"}
    defaults: dict[str, str | list[str]] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            hint = "; a Python file of jupyterhub-idle-culler is not read" if key == "c" else ""
            sentence = f"{path}: [{one_line(key, 40)}] is a section, but no option is in one{hint}."
            raise click.BadParameter(sentence, ctx, param)
        if name not in types:
            hint = f"; did you mean {option_name(near)}?" if (near := most_similar(name, types)) else "."
            sentence = f"{path} has a key {one_line(key, 40)!r}, which is not an option{hint}"
            raise click.BadParameter(sentence, ctx, param)
        if name == "rule":
            defaults[name] = [str(rule) for rule in (value if isinstance(value, list) else [value])]
        elif isinstance(value, list):
            raise click.BadParameter(f"{path}: {key} must be one value, not a list.", ctx, param)
        elif types[name] in (FILE_TYPE, DIRECTORY_TYPE) and not isinstance(value, str):  # else a file called `true`
            raise click.BadParameter(f"{path}: {key} must be a text in quotes.", ctx, param)
        else:
            defaults[name] = str(value).lower() if isinstance(value, bool) else str(value)
    ctx.default_map = defaults
    return path


def most_similar(name: str, names: Iterable[str]) -> str:
    """The name that somebody who wrote this one probably meant; empty if there is none."""
    import difflib

    return next(iter(difflib.get_close_matches(name, names, n=1)), "")


def option_name(field: str) -> str:
    """The name of an option, from that of its field."""
    return field.replace("_", "-")


def option(heading: str, help: str, *names: str, **attrs: Any) -> Any:
    """A field that becomes the option --NAME and the variable $CULL_IDLE_NAME; `attrs` as of click.Option."""
    return dataclasses.field(metadata={"names": names, "show_default": True, "help": help, "heading": heading, **attrs})


def switch(heading: str, help: str, *names: str, **attrs: Any) -> Any:
    """A field that is an option without a value."""
    return option(heading, help, *names, is_flag=True, show_default=False, **attrs)


def boolean(heading: str, help: str, default: str) -> Any:
    """A field that is an option with or without a value: --option or --option=BOOL."""
    return option(heading, help, type=bool, is_flag=False, flag_value="true", default=default, metavar="[=BOOL]")


class ClientCertificate(NamedTuple):
    """Paths of the key and certificate that a Hub with internal_ssl wants, and of the authority that signed its own."""

    key: str
    cert: str
    ca: str


LIMIT_TYPE = TextType(parse_limit, "DURATION|never")
FILE_TYPE, DIRECTORY_TYPE = TextType(parse_path, "FILE"), TextType(parse_path, "DIR")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """Everything that the command line, the environment, the config file and the defaults decide."""

    timeout: timedelta = option(
        WHAT,
        "Stop servers idle for at least this long; 0 stops every ready server.",
        type=LIMIT_TYPE,
        default="10m",
    )
    max_age: timedelta = option(
        WHAT,
        "Stop servers that started at least this long ago, even active ones; 0 is never.",
        type=LIMIT_TYPE,
        default="never",
    )
    cull_default_servers: bool = boolean(WHAT, "Cull default servers.", "true")
    cull_named_servers: bool = boolean(WHAT, "Cull named servers.", "true")
    remove_named_servers: bool = boolean(WHAT, "Also remove a named server once it is stopped.", "false")
    cull_users: bool = boolean(WHAT, "Also delete idle users who have no running server left.", "false")
    cull_admin_users: bool = boolean(WHAT, "Let --cull-users delete admins too.", "true")
    user_timeout: timedelta | None = option(
        WHAT, "Idle time after which --cull-users deletes a user.  [default: --timeout]", type=LIMIT_TYPE
    )
    user_max_age: timedelta | None = option(
        WHAT, "Age after which --cull-users deletes a user; 0 is never.  [default: --max-age]", type=LIMIT_TYPE
    )
    rule: tuple[Rule, ...] = option(
        WHAT,
        "An exception, such as 'group=gpu timeout=30m' or 'user=svc-* keep'; may be repeated, the first that matches"
        f" applies. Globs match {', '.join(MATCHES)}.",
        type=TextType(parse_rule, "RULE"),
        multiple=True,
    )
    arbiter: Arbiter | None = option(
        WHAT,
        "Your own decision in place of --timeout: a function that takes inactive, inactive_limit, server and user, or"
        " some of them, and returns whether to cull.",
        type=TextType(load_arbiter, "MODULE:FUNC|FILE.py:FUNC"),
    )
    idle_by: IdleBy = option(
        WHAT,
        "Whose word about a server's last activity counts. `hub`: the Hub's; it is late and does not see busy kernels."
        " `both`: the later of the Hub's and the server's; asks a server before stopping it. `server`: the server's"
        " alone. `kernels`: that of its kernels and terminals alone; people who only write text count as idle. All but"
        " `hub` need the scope tokens.",
        type=click.Choice(IdleBy, case_sensitive=False),
        default="hub",
        metavar="|".join(IdleBy),
    )
    max_culls: Fuse | None = option(
        WHAT,
        "A fuse: if a pass would stop more servers, or delete more users, than this, it stops nothing and fails. N% is"
        " of the ready servers, and of the users.",
        type=TextType(parse_fuse, "N|N%"),
    )

    once: bool = switch(WHEN, "Make one pass, then exit.")
    cull_every: timedelta | None = option(
        WHEN,
        "Time between the starts of two passes, which never overlap.  [default: half of the shortest limit, at most"
        " --warn-before]",
        type=duration_type(least=timedelta(seconds=1), most=LONGEST),
    )
    dry_run: bool = switch(WHEN, "Show what would be culled, change nothing, and exit; with -v also show what is kept.")
    explain: str | None = option(
        WHEN,
        "Explain the decision for a user's default server, or a named one, change nothing, and exit.",
        metavar="USER[/SERVER]",
    )

    url: str = option(
        HUB,
        "The Hub's API; $JUPYTERHUB_API_URL if set.",
        envvar=["JUPYTERHUB_API_URL"],
        type=TextType(parse_url, "URL"),
        default="http://127.0.0.1:8081/hub/api",
    )
    servers_url: str | None = option(
        HUB,
        "Where --idle-by asks servers: what comes before /user/… in their address.  [default: as the Hub knows it, or"
        " --url without /hub/api]",
        type=TextType(parse_url, "URL"),
    )
    token_file: str | None = option(
        HUB,
        "Read the API token from this file, before each pass, instead of from $JUPYTERHUB_API_TOKEN.",
        type=FILE_TYPE,
    )
    concurrency: int = option(
        HUB, "Requests in flight at the same time.", type=click.IntRange(1, 1000), default=10, metavar="N"
    )
    api_page_size: int = option(
        HUB,
        "Users per page; the Hub may send fewer, 0 leaves it to the Hub.",
        type=click.IntRange(min=0),
        default=200,
        metavar="N",
    )
    request_timeout: timedelta = option(
        HUB,
        "Time for one request, or for all that --idle-by asks one server; $JUPYTERHUB_REQUEST_TIMEOUT if set.",
        envvar=["JUPYTERHUB_REQUEST_TIMEOUT"],
        type=duration_type(least=timedelta(milliseconds=1), most=timedelta(days=1)),
        default="1m",
    )
    ssl_enabled: bool = boolean(HUB, "Use the client certificates of a Hub with internal_ssl.", "false")
    internal_certs_location: str = option(
        HUB,
        "Directory of the internal_ssl certificates; $JUPYTERHUB_SSL_KEYFILE, …CERTFILE and …CLIENT_CA come first.",
        type=DIRECTORY_TYPE,
        default="internal-ssl",
    )

    verbose: bool = switch(OUTPUT, "Also say what is kept, and why.", "-v")
    quiet: bool = switch(OUTPUT, "Say nothing unless something fails.", "-q")
    log_level: str | None = option(
        OUTPUT,
        "How much to log: debug, info, warning, error or critical.  [default: info]",
        type=click.Choice(["debug", "info", "warning", "error", "critical"], case_sensitive=False),
        metavar="LEVEL",
    )
    json: bool = switch(OUTPUT, "Print events as JSON Lines.")
    warn_before: timedelta | None = option(
        OUTPUT, "Report servers that will be due within this time if nothing happens.", type=duration_type(most=LONGEST)
    )
    notify: tuple[str, ...] | None = option(
        OUTPUT,
        "Run this for each server or user warned, culled, stopping or failed, with its JSON on standard input.",
        type=TextType(parse_command, "COMMAND"),
    )
    metrics_file: str | None = option(
        OUTPUT,
        "Write metrics for node_exporter's textfile collector after each pass.",
        type=FILE_TYPE,
    )
    config: str | None = option(
        OUTPUT,
        "Take defaults from a TOML file of these options.",
        type=FILE_TYPE,
        is_eager=True,
        callback=read_config,
    )

    @property
    def level(self) -> str:
        """The level of the log."""
        if self.log_level:
            return self.log_level
        if self.verbose:
            return "debug"
        return "error" if self.quiet else "info"

    @property
    def changes_something(self) -> bool:
        """False if the program only looks."""
        return not self.dry_run and self.explain is None

    @property
    def asks_while_scanning(self) -> bool:
        """True if the scan asks servers, because the Hub's word does not count."""
        return self.idle_by in (IdleBy.SERVER, IdleBy.KERNELS)

    @property
    def servers_root(self) -> str:
        """What comes before /user/… in the address of a server whose full address the Hub does not tell."""
        public = os.environ.get("JUPYTERHUB_PUBLIC_HUB_URL", "").rstrip("/").removesuffix("/hub")
        return self.servers_url or public or self.url.removesuffix("/hub/api")

    @property
    def idle_steps(self) -> list[timedelta]:
        """The idle times for which servers are counted: for the bars of a dry run, or for JSON and metrics."""
        if self.dry_run:
            return sorted({*map(parse_duration, IDLE_STEPS), self.timeout} - {NEVER})
        return [self.timeout] if self.json or self.metrics_file else []

    @property
    def interval(self) -> timedelta:
        """Time between the starts of two passes.

        By default half of the shortest limit, or 5 minutes without one, and no longer than --warn-before.
        """
        if self.cull_every:
            return self.cull_every
        limits = [self.timeout, self.max_age]
        if self.cull_users:
            limits += [limit for limit in (self.user_timeout, self.user_max_age) if limit is not None]
        limits += [limit for rule in self.rule for limit in (rule.timeout, rule.max_age) if limit is not None]
        interval = min((limit / 2 for limit in limits if ZERO < limit < NEVER), default=timedelta(minutes=5))
        return max(min(interval, self.warn_before or LONGEST, LONGEST), timedelta(seconds=1))

    @property
    def client_certificate(self) -> ClientCertificate | None:
        """The client certificate, if the Hub wants one."""
        from_hub = [os.environ.get(f"JUPYTERHUB_SSL_{name}", "") for name in ("KEYFILE", "CERTFILE", "CLIENT_CA")]
        if all(from_hub):
            return ClientCertificate(*from_hub)
        if not self.ssl_enabled:
            return None
        base = f"{self.internal_certs_location}/hub-internal/hub-internal"
        return ClientCertificate(f"{base}.key", f"{base}.crt", f"{self.internal_certs_location}/hub-ca/hub-ca.crt")


# ---- The judge: options, rules and arbiter together


class Judge:
    """Decides by options, rules and arbiter. Raises UnreadableError if the Hub does not show what a rule matches."""

    def __init__(self, settings: Settings) -> None:
        self.rules = list(enumerate(settings.rule, 1))  # with their numbers
        self._arbiter = settings.arbiter
        for_servers = Policy(
            Limit(settings.timeout),
            Limit(settings.max_age or NEVER),
            default_servers=settings.cull_default_servers,
            named_servers=settings.cull_named_servers,
        )
        for_users = Policy(
            Limit(settings.timeout if settings.user_timeout is None else settings.user_timeout),
            Limit((settings.max_age if settings.user_max_age is None else settings.user_max_age) or NEVER),
            admins=settings.cull_admin_users,
        )
        self.server_policies = Policies(
            [(rule, rule.policy(number, for_servers)) for number, rule in self.rules], for_servers
        )
        # Of a rule only `keep` counts for users: its limits are for servers. But no later rule applies after it.
        self.user_policies = Policies(
            [
                (rule, rule.policy(number, for_users) if rule.keep else for_users)
                for number, rule in self.rules
                if rule.for_users
            ],
            for_users,
        )

    def decide(self, server: Server, now: datetime) -> Verdict:
        """Decide about a server."""
        policy = self.server_policies.find(server)
        if self._arbiter:
            return judge_with_arbiter(server, policy, self._arbiter, now)
        return judge_server(server, policy, now)

    def decide_user(self, user: User, now: datetime) -> Verdict:
        """Decide about a user."""
        return judge_user(user, self.user_policies.find(user), now)

    def worth_asking(self, server: Server, now: datetime) -> bool:
        """True if the answer of a server can decide."""
        policy = self.server_policies.find(server)
        if self._arbiter:  # which may say cull at any idle time; not 0, which would be due even if active now
            policy = policy._replace(timeout=Limit(timedelta.resolution))
        return is_worth_asking(server, policy, now)

    def due_soon(
        self, server: Server, verdict: Verdict, now: datetime, within: timedelta
    ) -> tuple[datetime, Verdict] | None:
        """When a kept server will be due, with the limit that it will reach. None if not within that time."""
        policy = self.server_policies.find(server)
        if self._arbiter:  # nobody knows what it will say
            policy = policy._replace(timeout=Limit(NEVER))
        return due_within(server, verdict, policy, now, within)


# ---- The Hub

READ_SIZE = 1 << 16  # bytes
LARGEST_LIST = 1 << 28  # bytes; half a million users, from a Hub before 2.0, which has no pages
LARGEST_PAGE = 1 << 21  # bytes of any other answer; a page of 200 users has some 300 KB
CONNECT_SECONDS = 5.0
API_HINT = "--url must lead to the API of a JupyterHub, and usually ends in /hub/api"
TLS_HINT = "a Hub with internal_ssl needs --ssl-enabled and --internal-certs-location, another CA $REQUESTS_CA_BUNDLE"
SCOPES_OF_EVERY_TOKEN = ("read:users:name", "read:users:groups")  # JupyterHub adds them to each token
NEEDS_HUB_3 = "--idle-by needs JupyterHub 3 or later"
TOKEN_HINT = (
    "the token must be of this Hub and not expired, and its owner must have a role (before JupyterHub 2.0: be an admin)"
)
PROXY_HINT = "this is not the Hub's form of an answer, so perhaps a proxy or firewall on the way refuses the request"

# One answer is parsed at a time: what users put into their options takes up to 30 times its length in memory.
parsing = threading.Lock()


class Answer(NamedTuple):
    """The Hub's answer to one request."""

    status: int
    body: bytes
    now: datetime  # the Hub's clock
    requested: float = 0  # time.monotonic() when it was requested

    def json(self) -> Any:
        """The body as JSON, whatever its Content-Type (JupyterHub 0.6 and 0.7 call it HTML).

        Raises ValueError for no JSON, RecursionError for one that is nested too deeply or has too long a number.
        """
        import json

        gc.disable()  # deep in nested JSON, finalizers would fail for lack of stack, and Python would print tracebacks
        try:
            return json.loads(self.body)
        except ValueError as error:
            # Any other ValueError is an integer of more than 4,300 digits. A smaller page may be without it.
            if self.body.startswith(b"{") and not isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
                raise RecursionError from None
            if not self.body:
                raise ValueError("answered nothing") from None
            is_html = self.body.lstrip().startswith(b"<")
            raise ValueError("answered HTML" if is_html else "answered no JSON") from None
        finally:
            gc.enable()

    @property
    def error(self) -> dict[str, Any] | None:
        """The error as the Hub itself reports it, with `status` and `message`; None if a proxy may have answered."""
        with contextlib.suppress(ValueError, RecursionError):
            error = self.json()
            if isinstance(error, dict) and error.get("status") == self.status and "message" in error:
                return error
        return None

    def __str__(self) -> str:
        """What was answered, with the Hub's own words: `answered 404 (no such user)`."""
        with contextlib.suppress(ValueError, RecursionError):
            content = self.json()
            message = content.get("message") if isinstance(content, dict) else None
            if message and isinstance(message, str):
                return f"answered {self.status} ({one_line(message)})"
        return f"answered {self.status}"


def refusal_hint(answer: Answer) -> str:
    """What helps against a 401 or 403: of the Hub, or of something on the way to it."""
    return TOKEN_HINT if answer.error else PROXY_HINT


class Page(NamedTuple):
    """A part of the user list; the whole list from Hubs before 2.0."""

    models: list[Any]  # of users
    now: datetime  # the Hub's clock
    requested: float  # time.monotonic() when it was requested
    offset: int
    following: object = None  # null on the last page, else {"offset": …}
    total: object = None  # how many users there are, if the Hub says so
    problem: str = ""  # why a user is left out; such a page has no models

    def next_offset(self) -> int | None:
        """Where the next page starts, None after the last. Raises HubError if that makes no sense."""
        if self.following is None:
            return None
        offset = self.following.get("offset") if isinstance(self.following, dict) else None
        total = self.total if isinstance(self.total, int) else sys.maxsize
        if type(offset) is not int or not self.offset < offset < total:
            shown = one_line(str(offset), 40)
            raise HubError(f"GET /users: the page after offset {self.offset} starts at {shown}; the rest is not read")
        return offset


def parse_page(answer: Answer, offset: int) -> Page | None:
    """Read an answer as the part of the user list that starts at an offset; None for other JSON.

    Raises ValueError for no JSON, RecursionError for one that is nested too deeply.
    """
    content = answer.json()
    if isinstance(content, list):
        return Page(content, answer.now, answer.requested, offset)
    if isinstance(content, dict):
        models, pagination = content.get("items"), content.get("_pagination")
        if isinstance(models, list) and isinstance(pagination, dict) and "next" in pagination:
            total = pagination.get("total")
            return Page(models, answer.now, answer.requested, offset, pagination["next"], total)
    return None


class Identity(NamedTuple):
    """Whose a token is, and what it may do."""

    kind: str  # "service" or "user"
    name: str
    scopes: frozenset[str]  # expanded, with their filters: `delete:servers!group=students`; not those for itself alone

    def may(self, scope: str) -> bool:
        """True if the token has the scope, perhaps for some users only."""
        return any(each.partition("!")[0] == scope for each in self.scopes)

    def filtered(self, *scopes: str) -> list[str]:
        """Those of these scopes that the token has for some users only, with their filters."""
        return sorted(each for each in self.scopes if "!" in each and each.partition("!")[0] in scopes)


class ServerToken(NamedTuple):
    """A token that opens one server and nothing else."""

    user: str
    id: str
    token: str


class UserNow(NamedTuple):
    """What the Hub answers about one user."""

    user: User | None  # None if there is no such user
    now: datetime  # the Hub's clock


class DeadlineReader(io.RawIOBase):
    """Reads an answer from a socket, and gives up when the answer as a whole takes too long.

    Guards against a server that sends a byte now and then: the timeout of requests is for each read of the socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._stream = sock.makefile("rb", buffering=0)  # keeps the socket open for as long as it is read
        self._deadline = time.monotonic() + (sock.gettimeout() or 0)

    def readable(self) -> bool:
        """Reading is all it can do."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what there is. Raises TimeoutError."""
        self._socket.settimeout(max(self._deadline - time.monotonic(), 0.001))
        return self._stream.readinto(buffer) or 0

    def close(self) -> None:
        """Let go of the socket."""
        self._stream.close()
        super().close()

    @classmethod
    def make_response(cls, sock: socket.socket, *args: Any, **kwargs: Any) -> HTTPResponse:
        """An http.client response that is read through a DeadlineReader."""
        from http.client import HTTPResponse

        response = HTTPResponse(sock, *args, **kwargs)
        response.fp.close()
        response.fp = io.BufferedReader(cls(sock), READ_SIZE)
        return response


def adapter_with_deadline(connections: int) -> requests.adapters.HTTPAdapter:
    """The transport of requests, with DeadlineReader, for so many connections to a host.

    The class is made here because requests takes long to import.
    """
    from requests.adapters import HTTPAdapter

    def connect(connection_class: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        connection = connection_class(*args, **kwargs)
        connection.response_class = DeadlineReader.make_response
        return connection

    pools: weakref.WeakSet[Any] = weakref.WeakSet()  # all, to close them: requests forgets those beyond ten hosts

    class Adapter(HTTPAdapter):
        def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
            pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
            if not isinstance(pool.ConnectionCls, partial):
                pool.ConnectionCls = partial(connect, pool.ConnectionCls)
                pools.add(pool)
            return pool

        def build_response(self, request: Any, answer: Any) -> requests.Response:
            for name in ("Set-Cookie", "Set-Cookie2"):  # http.cookiejar prints a traceback for an odd one
                del answer._original_response.msg[name]
            return super().build_response(request, answer)

        def close(self) -> None:
            for pool in pools:  # else connections stay open for as long as an exception refers to them
                pool.close()
            super().close()

    return Adapter(pool_maxsize=connections)


class Connections:
    """Sends requests as requests does, but no answer may take longer than --request-timeout as a whole.

    No redirect is followed, no .netrc and no cookies are used. Exceptions are those of requests and urllib3.
    """

    def __init__(self, settings: Settings, certificate: ClientCertificate | None = None) -> None:
        self.request_timeout = settings.request_timeout
        self._certificate = certificate
        self._adapter = adapter_with_deadline(settings.concurrency)

    def close(self) -> None:
        """Close all connections."""
        self._adapter.close()

    def send(
        self, method: str, url: str, headers: Mapping[str, str], body: object = None, timeout: float | None = None
    ) -> requests.Response:
        """Send a request; `body` becomes JSON. The answer's body is not read yet.

        timeout: seconds for the whole answer once connected, if less than --request-timeout.
        """
        import requests

        timeout = self.request_timeout.total_seconds() if timeout is None else timeout
        timeouts = (min(self.request_timeout.total_seconds(), CONNECT_SECONDS), timeout)
        prepared = requests.Request(method, url, headers=dict(headers), json=body).prepare()
        prepared.url = url  # as it is: requests would decode %2E in it
        # Not through a Session: even with allow_redirects=False it reads all of a redirect's body.
        response = self._adapter.send(prepared, timeout=timeouts, **self._send_options(url))
        response.raw.enforce_content_length = True  # urllib3 1.26 takes a part of an answer for all of it
        return response

    def _send_options(self, url: str) -> Mapping[str, Any]:
        """Arguments for requests: for https:, certificates and the proxy. A proxy for http: would see the token."""
        if not url.startswith("https:"):
            return {"stream": True}  # else the defaults of requests, which check certificates
        import requests

        certificate = self._certificate
        verify = certificate.ca if certificate else None
        cert = (certificate.cert, certificate.key) if certificate else None
        return requests.Session().merge_environment_settings(url, {}, True, verify, cert)


class Hub:
    """The REST API of one Hub, as far as culling needs it. Threads may share it.

    Every method that sends a request raises HubError, or its TryAgain where another try may help.
    The token goes into the Authorization header of requests to the Hub, and nowhere else: no redirect is followed,
    and no .netrc and no cookies are used.
    """

    def __init__(self, token: str, settings: Settings) -> None:
        self.url = settings.url
        self.version: str | None = None  # of JupyterHub, once it has said so
        self._headers = {
            "Authorization": f"token {token}",
            "Accept": "application/jupyterhub-pagination+json",
            "User-Agent": f"cull_idle/{__version__}",
        }
        self._connections = Connections(settings, settings.client_certificate)
        self._probing = threading.Lock()
        self._decoded: dict[str, bool] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connections.close()

    def page(self, offset: int, *, size: int, ready_only: bool) -> Page:
        """Read a page of the user list: `size` users from an offset on, or as many as the Hub likes if that is 0.

        With `ready_only`, only users with a ready server; Hubs before 1.3 ignore that. Those before 2.0 ignore size and
        offset, and send the whole list.
        """
        query = {"state": "ready" if ready_only else None, "limit": size, "offset": offset}
        answer = self._request("GET", "/users", {key: value for key, value in query.items() if value})
        where = f"GET /users: {self.url}"
        if answer.status in (401, 403):
            raise HubError(f"{where} {answer}; {refusal_hint(answer)}", refused=True)
        if answer.status != 200:
            raise HubError(f"{where} {answer}; {self._api_hint}")
        is_list = answer.body.startswith(b"[")  # before JupyterHub 2.0: no pages
        try:
            with parsing:
                page = parse_page(answer, offset)
        except ValueError as error:
            raise HubError(f"{where} {error}; {self._api_hint}") from None
        except RecursionError:
            failure = HubError if is_list else TooMuchData
            raise failure(f"{where} answered JSON that is nested too deeply") from None
        if page is None or (page.models and not any(map(name_of, page.models))):
            raise HubError(f"{where} answered JSON that is not a user list; {self._api_hint}")
        if is_list and self.version and not self.version.startswith(("0.", "1.")):
            raise HubError(
                f"{where} answered a list without pages, perhaps only the first users: a proxy on the way drops the"
                " header Accept; it must pass it on, or --url must lead past it"
            )
        return page

    def user(self, name: str) -> UserNow | None:
        """Read one user. None if the answer is not the Hub's own, or the API has no such request.

        Only the Hub itself can say that there is no such user.
        """
        path = self._path("/users/{}", name)
        answer = self._request("GET", path)
        if answer.status == 404 and answer.error:
            return UserNow(None, answer.now)
        if answer.status in (404, 405):
            return None
        kind = f"GET /users/…: the Hub answered {answer.status}"
        if answer.status in (401, 403):
            sentence = f"GET {path}: the Hub {answer}; {refusal_hint(answer)}"
            raise HubError(sentence, kind, refused=answer.error is not None)
        if answer.status != 200:
            raise HubError(f"GET {path}: the Hub {answer}", kind)
        try:
            with parsing:
                user = parse_user(answer.json())
        except (ValueError, RecursionError) as error:
            why = error if isinstance(error, ValueError) else "answered JSON that is nested too deeply"
            raise HubError(f"GET {path}: the Hub {why}", kind) from None
        if user.name != name:
            raise HubError(f"GET {path}: the Hub answered another user", kind)
        return UserNow(user, answer.now)

    def stop(self, server: Server, *, remove: bool) -> Answer:
        """Stop a server. With `remove`, the Hub removes a named server, too."""
        if not server.name:
            return self._request("DELETE", self._path("/users/{}/server", server.user))
        path = self._path("/users/{}/servers/{}", server.user, server.name)
        return self._request("DELETE", path, body={"remove": True} if remove else None)

    def delete_user(self, name: str) -> Answer:
        """Delete a user. The Hub would stop a server of the user's first."""
        return self._request("DELETE", self._path("/users/{}", name))

    def make_token(self, server: Server, lifetime: timedelta) -> ServerToken | None:
        """Make a token for one server: JupyterHub 3 and later can.

        None if the Hub refuses: the user is gone, or not covered by a filtered scope such as `tokens!group=…`.
        """
        path = self._path("/users/{}/tokens", server.user)
        scope = f"access:servers!server={server.user}/{server.name}"
        # What a token does whose note begins with "Server at " does not count as an activity of its user.
        note = f"Server at {server.full_name}: idle?"
        body = {"scopes": [scope], "note": note, "expires_in": round(lifetime.total_seconds())}
        answer = self._request("POST", path, body=body)
        if answer.status in (403, 404) and answer.error:
            return None
        try:
            model = answer.json()
            token = ServerToken(server.user, str(model["id"]), str(model["token"]))
            granted = {str(each) for each in model.get("scopes") or ()}
        except (ValueError, LookupError, TypeError, RecursionError):
            kind = f"POST /users/…/tokens: the Hub answered {answer.status}, and no token"
            raise HubError(f"POST {path}: the Hub {answer}, and no token", kind) from None
        if {each for each in granted if each.partition("!")[0] not in SCOPES_OF_EVERY_TOKEN} != {scope}:
            self.revoke_token(token)
            raise HubError(
                "servers cannot be asked: the Hub has made a token that opens more than one server; it is revoked,"
                f" and was not used; {NEEDS_HUB_3}",
                refused=True,
            )
        return token

    def revoke_token(self, token: ServerToken) -> None:
        """Revoke a token that was made for a server. If that fails, it expires."""
        with contextlib.suppress(HubError):
            self._request("DELETE", self._path("/users/{}/tokens/{}", token.user, token.id))

    def identity(self) -> Identity | None:
        """Whose the token is, and its scopes; None from Hubs that cannot tell (before 2.0)."""
        answer = self._request("GET", "/user")
        with contextlib.suppress(ValueError, RecursionError):
            model = answer.json()
            if isinstance(model, dict) and isinstance(scopes := model.get("scopes"), list):
                kind, name = str(model.get("kind")), str(model.get("name"))
                for_others = frozenset(each for each in map(str, scopes) if not each.endswith(f"!{kind}={name}"))
                return Identity(one_line(kind, 100), one_line(name, 100), for_others)
        return None

    def _path(self, path: str, *names: str) -> str:
        """A path with these names in it. Raises HubError like check_names."""
        self.check_names(*names)
        return path.format(*map(segment, names))

    def check_names(self, *names: str) -> None:
        """Raise HubError if a proxy on the way to the Hub could turn a path with these names into another's.

        A proxy that decodes %2F makes bob's server s1 of `/users/..%2F..%2Fbob%2Fservers%2Fs1`. So, before the first
        such name, ask for the user list in a way that only such a proxy understands.
        """
        for code in {code for name in names for code in risky_codes(name)}:
            with self._probing:  # others wait for the result
                if code not in self._decoded:
                    self._decoded[code] = self._is_decoded(code)
            if self._decoded[code]:
                raise HubError(
                    f"a proxy on the way to {self.url} decodes {code} in paths, so the request could reach another"
                    " user's server; the proxy must pass paths on unchanged, or --url must lead past it",
                    f"a proxy on the way to {self.url} decodes {code} in paths",
                )

    def _is_decoded(self, code: str) -> bool:
        """True if a proxy decodes this code: the probe is then answered with the user list, and not with 404."""
        answer = self._request("GET", PROBES[code], {"limit": 1})
        if answer.status in (200, 404):
            return answer.status == 200
        if answer.status == 500 and self.version and self.version.startswith("0.9."):  # its answer to unknown paths
            return False
        raise HubError(f"GET {PROBES[code]}: {self.url} {answer}, so it is not known whether a proxy decodes paths")

    @property
    def _api_hint(self) -> str:
        if self.url.endswith("/hub/api"):
            return API_HINT
        base = re.sub(r"(?<!/)/hub(/.*)?$", "", self.url)  # without a page of the Hub, such as /hub/token
        return f"{API_HINT}: try --url {base}/hub/api"

    def _request(
        self, method: str, path: str, query: Mapping[str, object] | None = None, body: object = None
    ) -> Answer:
        """Send one request and read its answer."""
        from urllib.parse import urlencode

        url = f"{self.url}{path}" + (f"?{urlencode(query)}" if query else "")
        requested = time.monotonic()
        try:
            with self._connections.send(method, url, self._headers, body) as response:
                content = read_body(response, f"{method} {path}: {self.url}")
        except (OSError, ValueError) as error:  # exceptions of requests are OSErrors, some of urllib3 ValueErrors
            raise request_failure(method, path, self.url, error, self._connections.request_timeout) from None
        self.version = response.headers.get("X-JupyterHub-Version", self.version)
        answer = Answer(response.status_code, content, parse_http_date(response.headers.get("Date")), requested)
        if answer.status in (429, 502, 503, 504):
            pause = parse_retry_after(response.headers.get("Retry-After"), answer.now)
            raise TryAgain(
                f"{method} {path}: the Hub {answer}",
                f"{method} {without_name(path)}: the Hub answered {answer.status}",
                pause,
            )
        if 300 <= answer.status < 400:
            where = one_line(response.headers.get("Location", "nowhere"))
            sentence = f"{self.url} redirects to {where}, which is not followed; {self._api_hint}"
            raise HubError(f"{method} {path}: {sentence}", sentence)
        return answer


def read_body(response: requests.Response, request: str) -> bytes:
    """Read an answer's body. Raises TooMuchData, or HubError for a plain list, if it is larger than it may be."""
    chunks: list[bytes] = []
    size, largest = 0, LARGEST_PAGE
    failure: type[HubError] = TooMuchData
    for chunk in response.iter_content(READ_SIZE):
        if not chunks and chunk.startswith(b"["):  # a Hub without pages: there are no smaller parts
            largest, failure = LARGEST_LIST, HubError
        chunks.append(chunk)
        size += len(chunk)
        if size > largest:
            raise failure(f"{request} answered more than {largest >> 20} MiB")
    return b"".join(chunks)


def segment(name: str) -> str:
    """A name as one segment of a path, encoded so that no server or proxy takes a part of it for anything else."""
    from urllib.parse import quote

    quoted = quote(name, safe="", errors="surrogatepass")
    return quoted.replace(".", "%2E") if not quoted.strip(".") else quoted


# Paths that lead to the user list only if the code is decoded on the way (%5C: to a slash); else they lead nowhere.
PROBES = {"%2F": "%2Fusers", "%5C": "%5Cusers", "%2E": "/%2E/users", "%3F": "/users%3F"}


def risky_codes(name: str) -> list[str]:
    """The codes in a name's segment that would change the path if a proxy decoded them. # and % are probed like ?."""
    if name in (".", ".."):
        return ["%2E"]
    codes = [code for sign, code in (("/", "%2F"), ("\\", "%5C")) if sign in name]
    return [*codes, "%3F"] if any(sign in name for sign in "?#%") else codes


def parse_retry_after(text: str | None, now: datetime) -> float:
    """Seconds that a Retry-After header asks for, below 0 for a time in the past. 0 if it is missing or garbage."""
    from email.utils import parsedate_to_datetime

    if text and text.isdecimal():
        return float(text)
    try:
        return (parsedate_to_datetime(text or "") - now).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0


def without_name(path: str) -> str:
    """A path without the name of its user: `/users/…`."""
    return "/users/…" if path.startswith("/users/") else path


def request_failure(method: str, path: str, url: str, error: Exception, timeout: timedelta) -> HubError:
    """The failure of a request that was not answered."""
    from urllib3 import exceptions

    request, kind_of_request = f"{method} {path}", f"{method} {without_name(path)}"
    causes = causes_of(error)
    if why := why_unreachable(causes, url):
        return TryAgain(f"{request}: {why}", f"{kind_of_request}: {why}")
    if why := why_not_secure(causes, url):
        return HubError(f"{request}: {why}", why, affects_all=True)
    if is_among(causes, exceptions.TimeoutError, TimeoutError):
        why = f"{url} did not answer within {timeout.total_seconds():g}s (--request-timeout)"
        # Stopping a server may take long, so a late DELETE says nothing about other requests.
        return HubError(f"{request}: {why}", f"{kind_of_request}: {why}", affects_all=method == "GET")
    if is_among(causes, exceptions.ProtocolError):
        why = f"{url}: the connection was lost before the whole answer had come ({type(causes[-1]).__name__})"
        if url.startswith("http:"):
            why += f"; if this goes on, try --url https:{url.removeprefix('http:')}"
        return TryAgain(f"{request}: {why}", f"{kind_of_request}: {why}")
    why = f"the request to {url} failed: {one_line(str(causes[-1]))}"
    return HubError(f"{request}: {why}", f"{kind_of_request}: {why}")


def why_unreachable(causes: Sequence[BaseException], url: str) -> str:
    """A sentence if there is no connection to the Hub, which may be there soon; else empty."""
    import socket

    from urllib3 import exceptions

    last_name = type(causes[-1]).__name__
    if is_among(causes, exceptions.ProxyError):
        return f"{url} cannot be reached through the proxy of $HTTPS_PROXY ({last_name})"
    if is_among(causes, socket.gaierror):
        return f"{url}: its host name does not resolve; is --url right?"
    if is_among(causes, ConnectionRefusedError):
        return f"{url} refuses the connection; is the Hub running, and --url right?"
    if is_among(causes, exceptions.NewConnectionError, exceptions.ConnectTimeoutError):
        return f"{url} cannot be reached: {getattr(causes[-1], 'strerror', None) or last_name}; is --url right?"
    return ""


def why_not_secure(causes: Sequence[BaseException], url: str) -> str:
    """A sentence if TLS is the reason, else empty. A Hub that speaks plain HTTP never answers a TLS handshake."""
    from urllib3 import exceptions

    texts = " ".join(map(str, causes))
    plain = ("WRONG_VERSION_NUMBER", "handshake operation timed out", "record layer failure")
    if url.startswith("https:") and any(text in texts for text in plain):
        return f"{url} does not speak https; try --url http:{url.removeprefix('https:')}"
    if is_among(causes, exceptions.SSLError):
        return f"{url}: TLS failed: {one_line(str(causes[-1]))}; {TLS_HINT}"
    return ""


def causes_of(error: BaseException) -> list[BaseException]:
    """An exception and what it was raised from. requests passes some causes on as arguments only."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and not isinstance(cause, TypeError):
        causes.append(cause)  # a TypeError is how urllib3 1.26 finds out that this is not Python 2
    arguments = [each for cause in causes for each in cause.args if isinstance(each, BaseException)]
    reasons = [why for each in [*causes, *arguments] if isinstance(why := getattr(each, "reason", None), BaseException)]
    return [*arguments, *reasons, *causes]


def is_among(causes: Iterable[BaseException], *kinds: type[BaseException]) -> bool:
    """True if one of the causes is of one of these kinds."""
    return any(isinstance(cause, kinds) for cause in causes)


# ---- Scopes: what the token must be allowed to do, from JupyterHub 2.0 on


def advice_on_scopes(identity: Identity, scopes: Sequence[str]) -> str:
    """What helps if a token lacks scopes, with the line of jupyterhub_config.py that gives them to its owner.

    The line is a role with a name of its own: a Hub does not start if a role is defined twice.
    """
    import json

    name = "-".join(["cull-idle", *scopes]).replace(":", "-")
    role = {"name": name, "scopes": list(scopes), f"{identity.kind}s": [identity.name]}
    add = f"add to jupyterhub_config.py, and restart the Hub: c.JupyterHub.load_roles.append({json.dumps(role)})"
    if identity.kind == "user":  # whose token may have been limited when it was made
        return f"make a new token that may do this or, if {identity.name} may not do it at all, {add}"
    return add


def missing_scopes(identity: Identity, settings: Settings, *, to_cull: bool) -> list[str]:
    """The scopes that the token lacks for a pass with these settings; `to_cull`: for one that changes something."""
    needed = ["list:users", "read:servers", *(match.field.scope for rule in settings.rule for match in rule.matches)]
    if settings.cull_users:
        needed.append("read:users:activity")
    if settings.asks_while_scanning or (to_cull and settings.idle_by is IdleBy.BOTH):
        needed.append("tokens")
    if to_cull:
        needed.append("delete:servers")
        if settings.cull_users and not identity.may("delete:users"):
            needed.append("admin:users")
    return [scope for scope in dict.fromkeys(needed) if not identity.may(scope)]


def check_scopes(identity: Identity, settings: Settings) -> None:
    """Raise HubError, with the role that would help, if the token may not do what the settings need."""
    if missing := missing_scopes(identity, settings, to_cull=settings.changes_something):
        raise HubError(
            f"the token of {identity.kind} {identity.name} lacks {' and '.join(missing)};"
            f" {advice_on_scopes(identity, missing)}"
        )


# ---- Servers asked for their last activity (--idle-by)

LARGEST_SERVER_ANSWER = 1 << 20  # bytes; a Jupyter server sends some hundred
SERVERS_HINT = (
    "--servers-url must be what comes before /user/… in the address of a server: the proxy, not the Hub's own port"
)


class NoAnswer(Exception):
    """A server gave no usable answer. The text never quotes the server, which may be hostile."""


class NotReached(NoAnswer):
    """A redirect, or a refused token. Perhaps a proxy has answered that has lost the route to the server."""


class WrongAddress(HubError):
    """--servers-url, or a setting of this machine such as a proxy, leads to no server, or a hostile server pretends so.

    Culler keeps the server: if the Hub's word counted instead, an outage of the proxy would stop busy servers.
    """


class Asker:
    """Asks servers for their last activity, as --idle-by says. Threads may share it.

    A server runs whatever its user likes. So the culler's own token never goes there: each server gets a token that the
    Hub makes for it, and that is revoked afterwards. All that a server answers is bounded in size and time.
    Neither the server nor the Hub counts what such a token asks as activity. The proxy does, and tells the Hub.
    https://jupyter-server.readthedocs.io/en/latest/developers/rest-api.html
    """

    def __init__(self, hub: Hub, settings: Settings) -> None:
        self.address_is_right = False  # a Jupyter server has answered there, in this pass
        self.sources: dict[tuple[str, str], Source] = {}  # of the last answer of each server
        self.first_problem = ""  # why a server gave no answer
        self._hub = hub
        self._settings = settings
        self._connections = Connections(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connections.close()

    def check(self, identity: Identity | None) -> None:
        """Raise HubError if no server can be asked: the address is wrong, or the Hub too old, or its scope filtered."""
        version, major = self._version_at_address()
        if major < 3:
            raise HubError(f"{NEEDS_HUB_3}; this is {one_line(version, 20)}")
        if identity is None:
            raise HubError(f"servers cannot be asked: GET {self._hub.url}/user does not say what the token may do")
        if major < 5 and identity.kind == "service" and "tokens" not in identity.scopes:
            filtered = " and ".join(identity.filtered("tokens"))
            raise HubError(
                f"this is JupyterHub {one_line(version, 20)}, where the scope {filtered} of a service covers nobody;"
                " give it the whole scope tokens, or use JupyterHub 5 or later"
            )

    def _version_at_address(self) -> tuple[str, int]:
        """The version, and its first number, of the Hub that the proxy leads to. Raises WrongAddress if to none."""
        url = f"{self._settings.servers_root}/hub/api"
        deadline = time.monotonic() + self._settings.request_timeout.total_seconds()
        try:
            version = str(self._get(url, deadline).json()["version"])
            return version, int(version.partition(".")[0])
        except (NoAnswer, ValueError, LookupError, TypeError, RecursionError) as error:
            why = f" {error}" if isinstance(error, NoAnswer) else " is not the API of a JupyterHub"
            raise WrongAddress(f"servers cannot be asked: GET {url}{why}; {SERVERS_HINT}", affects_all=True) from None

    def ask(self, server: Server, now: datetime) -> Server:
        """The server with its own last activity, as --idle-by counts it; in doubt if it alone is not reached.

        Raises HubError if the Hub makes no token, and WrongAddress.
        """
        activities: list[OwnActivity] = []
        try:
            self._ask(server, activities)
            nothing = OwnActivity(Source.KERNEL)  # no kernel and no terminal
            own = min(activities, key=lambda each: each.idle or ZERO, default=nothing)
        except NotReached as error:
            if not self.address_is_right:
                where = f"GET {server_address(server, self._settings)}/api/kernels"
                raise WrongAddress(f"servers cannot be asked: {where} {error}; {SERVERS_HINT}") from None
            self.sources[server.user, server.name] = Source.HUB
            return replace(server, doubt=f"its own activity is unknown: it {error}")
        except NoAnswer as error:
            self._version_at_address()  # if the proxy fails, too, this says nothing about the server
            answered = [each.idle for each in activities if each.idle is not None]
            own = OwnActivity(Source.NO_ANSWER, min(answered, default=None))
            self.first_problem = self.first_problem or f"{server.full_name} {error}"
        self.sources[server.user, server.name] = own.source
        return with_own_activity(server, own, self._settings.idle_by, now)

    def _ask(self, server: Server, activities: list[OwnActivity]) -> None:
        """Ask with a token of its own. Adds to `activities`, so that NoAnswer does not lose a part. Raises NoAnswer.

        A server has --request-timeout for all its answers: one that is slow on purpose must not hold up a pass.
        """
        timeout = self._settings.request_timeout
        token = self._hub.make_token(server, timeout + timedelta(minutes=1))
        if not token:
            raise NoAnswer("is not asked: its user is gone, or the culler's scope tokens does not cover them")
        address = server_address(server, self._settings)
        deadline = time.monotonic() + timeout.total_seconds()
        try:
            activities += parse_activities(self._get(f"{address}/api/kernels", deadline, token), Source.KERNEL)
            self.address_is_right = True
            if activities != [BUSY]:
                terminals = self._get(f"{address}/api/terminals", deadline, token, optional=True)
                activities += parse_activities(terminals, Source.TERMINAL)
                if self._settings.idle_by is not IdleBy.KERNELS:
                    status = self._get(f"{address}/api/status", deadline, token)
                    activities += parse_activities(status, Source.SERVER)
        finally:
            self._hub.revoke_token(token)

    def _send(
        self, url: str, headers: Mapping[str, str], deadline: float, *, tries: int = 2
    ) -> tuple[requests.Response, bytes]:
        """Send a GET and read the answer; once more if the connection is lost, as one kept alive may be at any time."""
        from urllib3 import exceptions

        timeout = deadline - time.monotonic()
        if timeout <= 0:
            raise TimeoutError
        try:
            with self._connections.send("GET", url, headers, timeout=timeout) as response:
                return response, response.raw.read(LARGEST_SERVER_ANSWER + 1, decode_content=False)
        except (OSError, exceptions.HTTPError) as error:
            if tries == 1 or not is_among(causes_of(error), exceptions.ProtocolError):
                raise
        return self._send(url, headers, deadline, tries=tries - 1)

    def _get(self, url: str, deadline: float, token: ServerToken | None = None, *, optional: bool = False) -> Answer:
        """Send a GET that the server does not count as activity. Raises NoAnswer, NotReached and WrongAddress.

        deadline: of time.monotonic(), for the whole answer.
        optional: 404 means that there is nothing to list.
        """
        from urllib3 import exceptions

        headers = {"User-Agent": f"cull_idle/{__version__}", "Accept-Encoding": "identity"}
        if token:
            headers["Authorization"] = f"token {token.token}"
        try:
            response, body = self._send(f"{url}?no_track_activity=1", headers, deadline)
        except (OSError, ValueError, exceptions.HTTPError) as error:
            causes = causes_of(error)
            unreachable = (exceptions.NewConnectionError, exceptions.ConnectTimeoutError, exceptions.ProxyError)
            not_sent = is_among(causes, exceptions.SSLError, exceptions.LocationValueError, *unreachable)
            # Whatever is wrong with an answer is an HTTPError of urllib3. All else is wrong on this machine.
            if not_sent or not is_among(causes, exceptions.HTTPError, TimeoutError):
                sentence = f"GET {url} fails: {one_line(str(causes[-1]))}; {SERVERS_HINT}"
                raise WrongAddress(sentence, affects_all=True) from None
            raise NoAnswer(f"gave no whole answer ({type(causes[-1]).__name__})") from None
        if len(body) > LARGEST_SERVER_ANSWER:
            raise NoAnswer(f"answered more than {LARGEST_SERVER_ANSWER >> 20} MiB")
        status, where = response.status_code, response.headers.get("Location", "")
        if status == 200 or (status == 404 and optional):
            content = body if status == 200 else b"[]"
            return Answer(status, content, parse_http_date(response.headers.get("Date")))
        # The Hub's own port redirects to …/hub/user/…, an ingress that wants https: to the same path: the end of the
        # path is the same. So does the proxy if a server, or the route to it, is gone, and so may a hostile server.
        end_of_path = "/".join(url.split("/")[-2:])
        if 300 <= status < 400 and where.partition("?")[0].endswith(f"/{end_of_path}"):
            raise NotReached("is redirected, to the Hub or to https:")
        if status in (401, 403):
            raise NotReached(f"answered {status}" + (" to a token made for it" if token else ""))
        raise NoAnswer(f"answered {status}")


BUSY = OwnActivity(Source.BUSY_KERNEL, ZERO)


def parse_activities(answer: Answer, source: Source) -> list[OwnActivity]:
    """Read a server's status, or its list of kernels or terminals. A busy kernel alone decides.

    Only the server's own clock counts. A time in the future is now. Raises NoAnswer for what no Jupyter server answers.
    """
    activities = []
    try:
        with parsing:
            content = answer.json()
        models = [content] if source is Source.SERVER else content
        if not isinstance(models, list):
            raise TypeError
        for model in models:
            active = parse_time(model["last_activity"])
            if model.get("execution_state") == "busy":
                return [BUSY]
            if active:
                activities.append(OwnActivity(source, max(answer.now - active, ZERO)))
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        raise NoAnswer("answered what no Jupyter server does") from None
    return activities


def server_address(server: Server, settings: Settings) -> str:
    """Where a server is: as --servers-url says, or as the Hub knows it (JupyterHub 5 with public_url, subdomains)."""
    full_url, url = (str(server.model.get(key)).rstrip("/") for key in ("full_url", "url"))
    if not settings.servers_url:
        for known in (full_url, url):
            if known.startswith(("http://", "https://")):
                return known
    # Only user/NAME/SERVER of the url: what comes before it may be different outside.
    return "/".join([settings.servers_root, *url.split("/")[-3 if server.name else -2 :]])


# ---- The parts of a pass: read the user list, scan, look again, cull

PAUSES = (0.5, 1, 2)  # seconds between tries
LONGEST_PAUSE = 30.0  # seconds, whatever Retry-After says
MOST_LEFT_OUT = 100  # users whose data is too much; if there are more, the Hub ignores the size of a page
OVERLAP = 40  # neighbouring pages overlap by one user in so many
SMALLER = 8  # a page that is too much to parse is read again in so many parts
USUAL_PAGE = 50  # users, of a Hub that is not asked for more
DATE_ERROR = timedelta(seconds=2)  # a Date is in whole seconds, and may be rounded
ANSWER_LOST = "the Hub's answer was lost"
MOST_FAILURES = 10  # in a row, or two for each thread if that is more: then the pass ends


class Outcome(enum.StrEnum):
    """The result for a server or user."""

    KEPT = "kept"  # nothing is done to it; only shown with -v
    PLANNED = "planned"  # by a dry run
    WARNED = "warned"  # kept, but due soon
    DUE = "due"  # still due, and nothing has been done about it yet; never reported
    CULLED = "culled"
    STOPPING = "stopping"  # not down yet
    GONE = "gone"  # before anything was done
    SPARED = "spared"  # not due any more
    FAILED = "failed"


FINAL_OUTCOMES = (Outcome.CULLED, Outcome.STOPPING, Outcome.GONE, Outcome.SPARED, Outcome.FAILED)  # of what was due


class PassContext(NamedTuple):
    """What the parts of a pass work with."""

    hub: Hub
    identity: Identity | None  # the token's, if the Hub tells it
    settings: Settings
    judge: Judge
    told_to_stop: threading.Event
    asker: Asker | None  # if servers are asked


class Decision(NamedTuple, Generic[Target]):
    """A server or user, and what the scan decided about it."""

    target: Target
    verdict: Verdict
    position: int = 0  # of the user in the user list


class Event(NamedTuple):
    """A server or user and its outcome, for the log, the JSON and --notify."""

    target: Server | User
    outcome: Outcome
    reason: str
    verdict: Verdict
    error: HubError | None = None  # why it failed
    due_at: datetime | None = None  # when something that is warned will be due

    def __str__(self) -> str:
        deleted = self.outcome is Outcome.CULLED and isinstance(self.target, User)
        why = f"{self.reason}; {self.error}" if self.error else self.reason
        return f"{'deleted' if deleted else self.outcome} {self.target.full_name}: {why}"


def still_due(decision: Decision[Target]) -> Event:
    """The event for something due about which nothing has been done."""
    return Event(decision.target, Outcome.DUE, decision.verdict.reason, decision.verdict)


def with_retries(request: Callable[[], T], told_to_stop: threading.Event) -> T:
    """Call a function; while it raises TryAgain, and nobody says stop, call it again, after growing pauses."""
    for pause in PAUSES:
        try:
            return request()
        except TryAgain as failure:
            if told_to_stop.wait(min(max(pause, failure.pause), LONGEST_PAUSE)):
                raise
    return request()


class UserList:
    """The whole user list, page by page, each without the users of the page before.

    - Users who leave the list meanwhile move the rest forward. So pages of 40 or more overlap by a few users, and one
      that does not begin with a user of the page before is read again from half a page further back, once.
    - A page that is too much to parse, because of what some user put into their options, is read again in smaller
      parts, until only that user is left out.
    """

    def __init__(self, context: PassContext) -> None:
        self._hub = context.hub
        self._ready_only = not context.settings.cull_users
        self._told_to_stop = context.told_to_stop
        self._usual_size = context.settings.api_page_size
        self._size = self._usual_size
        self._offset = 0
        self._length = 0  # offsets that the page before covered; its users may be fewer, if the Hub leaves some out
        self._before: set[str] = set()  # the names on the page before
        self._overlaps = False  # this page should begin with some of them
        self._stepped_back = False  # this page is already read again, from further back
        self._last_name = ""  # of a user, to say after whom one is left out
        self._nothing_new = 0  # pages in a row without a new user
        self._left_out = 0  # users

    def pages(self) -> Iterator[Page]:
        """Fetch the pages. Raises HubError."""
        while not self._told_to_stop.is_set():
            fetch = partial(self._hub.page, self._offset, size=self._size, ready_only=self._ready_only)
            try:
                page = with_retries(fetch, self._told_to_stop)
            except TooMuchData:
                if self._left_out == MOST_LEFT_OUT:
                    raise
                if self._size == 1:
                    yield self._leave_out_user()
                else:
                    self._size = max((self._size or USUAL_PAGE) // SMALLER, 1)
                continue
            names = [name_of(model) for model in page.models]
            if self._overlaps and names and names[0] not in self._before and not self._stepped_back:
                self._offset = max(self._offset - self._length // 2, 0)
                self._stepped_back = True
                continue
            new = [m for m, name in zip(page.models, names, strict=True) if not name or name not in self._before]
            # As if all known users came first: a position that is wrong by a few is good enough for Culler._find_user.
            known = len(page.models) - len(new)
            yield page._replace(models=new, offset=page.offset + known)
            next_offset = page.next_offset()
            if next_offset is None:
                return
            # A page is empty if none of its users has a ready server. With a total, the list ends all the same.
            empty_but_bounded = not names and isinstance(page.total, int)
            self._check_progress(bool(new) or empty_but_bounded)
            self._advance(names, next_offset)

    def _leave_out_user(self) -> Page:
        """Go past a user whose data is too much; the page says so."""
        self._left_out += 1
        after = printable(self._last_name) or "the start"
        problem = f"the user after {after} is left out: too much data, or nested too deeply"
        page = Page([], datetime.now(UTC), 0, self._offset, problem=problem)
        self._offset += 1
        self._before, self._overlaps = set(), False
        return page

    def _check_progress(self, progress: bool) -> None:
        """Raise HubError if several pages in a row lead no further: the list would never end."""
        self._nothing_new = 0 if progress else self._nothing_new + 1
        if self._nothing_new == 3:
            hub = self._hub.url
            raise HubError(f"GET /users: {hub} lists no more users, but always another page; the rest is not read")

    def _advance(self, names: Sequence[str], next_offset: int) -> None:
        """Go on to the next page, a little before the place where the Hub says that it begins."""
        self._length = next_offset - self._offset
        self._before = set(names)
        self._last_name = names[-1] if names and names[-1] else self._last_name
        overlap = len(names) // OVERLAP
        self._overlaps, self._stepped_back = overlap > 0, False
        self._offset = max(next_offset - overlap, self._offset + 1)
        larger = self._size * SMALLER
        self._size = self._usual_size if larger >= (self._usual_size or USUAL_PAGE) else larger


def in_parallel(function: Callable[[T], Result], items: Iterable[T], threads: int) -> Iterator[Result]:
    """Call a function for each item, in up to so many threads; yields the results as they come.

    If the system refuses more threads, those that have started do all the work (ThreadPoolExecutor would fail).
    An exception of the function is raised here. Once the caller stops iterating, no other item is begun.
    """
    waiting = deque(items)
    count = len(waiting)
    done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()
    workers = []
    for _ in range(min(threads, count)):
        worker = threading.Thread(target=run_worker, args=(function, waiting, done), name="cull_idle", daemon=True)
        try:
            worker.start()
        except RuntimeError:  # can't start new thread
            break
        workers.append(worker)
    if not workers:
        run_worker(function, waiting, done)
    try:
        for _ in range(count):
            result, error = done.get()
            if error:
                raise error
            yield result  # type: ignore[misc]
    finally:
        waiting.clear()
        for worker in workers:
            worker.join()


def run_worker(function: Callable[[T], Result], waiting: deque[T], done: queue.SimpleQueue[Any]) -> None:
    """Call the function for each item that waits, and put its result, or its exception, into `done`."""
    while True:
        try:
            item = waiting.popleft()
        except IndexError:
            return
        try:
            done.put((function(item), None))
        except BaseException as error:  # raised again by in_parallel
            done.put((None, error))


@dataclasses.dataclass(eq=False, repr=False)
class Findings:
    """What a scan found. Kept servers are only counted, so memory stays flat."""

    complete: bool = False  # the whole list was read
    error: HubError | None = None  # why the list is not complete
    users_listed: int = 0
    running: int = 0  # ready servers
    servers: dict[tuple[str, str], Decision[Server]] = dataclasses.field(default_factory=dict)  # due
    users: dict[str, Decision[User]] = dataclasses.field(default_factory=dict)  # due
    warnings: dict[tuple[str, str], Event] = dataclasses.field(default_factory=dict)  # due within --warn-before
    idle_for: dict[timedelta, int] = dataclasses.field(default_factory=dict)  # how many servers, at least that long
    doubts: int = 0
    first_doubt: str = ""
    hub_time: datetime | None = None  # the Hub's clock at the last page
    hub_time_requested: float = 0  # time.monotonic() when that page was requested

    @property
    def due_count(self) -> int:
        """How many servers and users are to be culled."""
        return len(self.servers) + len(self.users)

    def check_fuse(self, fuse: Fuse | None) -> None:
        """Raise FuseBlownError if more is due than the fuse allows. N% is of what was read, if only a part was."""
        if fuse:
            fuse.check("servers", len(self.servers), self.running)
            fuse.check("users", len(self.users), self.users_listed)

    def plausible(self, now: datetime) -> datetime:
        """The Hub's clock at a second look, but no later than the scan and the time since then allow.

        An answer without a date, or with that of another clock, must not make an active server look idle.
        """
        if self.hub_time is None:
            return now
        return min(now, self.hub_time + timedelta(seconds=time.monotonic() - self.hub_time_requested))


class Scan:
    """Reads the whole user list and decides about all of it. `on_kept` is told of each server or user that is kept."""

    def __init__(self, context: PassContext, on_kept: Callable[[Event], None] | None = None) -> None:
        self._context = context
        self._settings = context.settings
        self._judge = context.judge
        self._asker = context.asker if context.settings.asks_while_scanning else None
        self._on_kept = on_kept
        self._wrong_address: WrongAddress | None = None  # why --servers-url seems to be wrong
        self._findings = Findings(idle_for=dict.fromkeys(context.settings.idle_steps, 0))

    def run(self) -> Findings:
        """Scan and decide. After an error, what was found so far may be stopped, but no user is deleted.

        Raises WrongAddress.
        """
        findings = self._findings
        try:
            for page in UserList(self._context).pages():
                self._decide(page)
            findings.complete = not self._context.told_to_stop.is_set()
        except HubError as error:
            findings.error = error
            findings.users.clear()  # a deleted user does not come back
        if self._wrong_address and self._asker and not self._asker.address_is_right:
            raise self._wrong_address
        return findings

    def _decide(self, page: Page) -> None:
        """Decide about all users and servers of a page."""
        if page.problem:
            self._count_doubt("the user list", page.problem)
            return
        findings, cull_users = self._findings, self._settings.cull_users
        findings.hub_time, findings.hub_time_requested = page.now, page.requested
        asked = self._ask_servers(page, self._asker) if self._asker else {}
        for position, model in enumerate(page.models, page.offset):
            if self._settings.arbiter and self._context.told_to_stop.is_set():  # it may be slow
                return
            try:
                user = parse_user(model) if cull_users else None
                servers = user.servers if user else parse_servers(model)
            except ValueError as error:
                self._count_doubt("the Hub", str(error))
                continue
            findings.users_listed += 1
            if asked:
                servers = [asked.get((server.user, server.name), server) for server in servers]
            all_due = True
            for server in servers:
                all_due &= self._decide_server(server, page.now, position)
            if user and all_due:
                self._decide_user(user, page.now, position)

    def _ask_servers(self, page: Page, asker: Asker) -> dict[tuple[str, str], Server]:
        """Ask the servers of a page whose answer can decide. Returns them with their own last activity.

        Raises HubError.
        """
        times = {page.now, page.now + (self._settings.warn_before or ZERO)}  # due now, or soon
        servers = [server for model in page.models if name_of(model) for server in parse_servers(model)]
        worth_asking = [each for each in servers if any(self._judge.worth_asking(each, time) for time in times)]
        ask = partial(self._ask_server, asker, page.now)
        asked = in_parallel(ask, worth_asking, self._settings.concurrency)
        return {(server.user, server.name): server for server in asked}

    def _ask_server(self, asker: Asker, now: datetime, server: Server) -> Server:
        """The server with its own last activity; in doubt if the Hub makes no token for it.

        Raises HubError if the Hub makes no token for anybody.
        """
        if self._context.told_to_stop.is_set():
            return replace(server, doubt="not asked, because the pass is told to stop")
        try:
            return with_retries(partial(asker.ask, server, now), self._context.told_to_stop)
        except HubError as error:
            if isinstance(error, WrongAddress):
                self._wrong_address = self._wrong_address or error
                return replace(server, doubt="its own activity is unknown: it is not reached")
            if error.affects_all or error.refused:
                raise
            return replace(server, doubt=str(error))

    def _decide_server(self, server: Server, now: datetime, position: int) -> bool:
        """Decide about a server; returns whether it is due. `position`: of its user in the user list."""
        findings = self._findings
        verdict = self._judge.decide(server, now)
        findings.running += server.ready
        if findings.idle_for and server.ready and verdict.idle is not None:
            for step in findings.idle_for:
                findings.idle_for[step] += verdict.idle >= step
        if verdict.cull:
            decision = Decision(server.without_models(), verdict, position)
            findings.servers.setdefault((server.user, server.name), decision)  # a user may be listed twice
            return True
        if verdict.in_doubt:
            self._count_doubt(server.full_name, verdict.reason)
        warning = self._warning(server, verdict, now) if self._settings.warn_before else None
        if warning:
            findings.warnings.setdefault((server.user, server.name), warning)
        elif self._on_kept:
            self._on_kept(Event(server.without_models(), Outcome.KEPT, verdict.reason, verdict))
        return False

    def _decide_user(self, user: User, now: datetime, position: int) -> None:
        """Decide about a user all of whose servers are due."""
        verdict = self._judge.decide_user(user, now)
        if verdict.cull:
            self._findings.users.setdefault(user.name, Decision(user.without_models(), verdict, position))
            return
        if verdict.in_doubt:
            self._count_doubt(user.full_name, verdict.reason)
        if self._on_kept:
            self._on_kept(Event(user.without_models(), Outcome.KEPT, verdict.reason, verdict))

    def _warning(self, server: Server, verdict: Verdict, now: datetime) -> Event | None:
        """The warning for a kept server, if it will be due within --warn-before."""
        found = self._judge.due_soon(server, verdict, now, self._settings.warn_before or ZERO)
        if not found:
            return None
        due_at, later = found
        reason = f"{later.reason}; due in {short(due_at - now)}"
        return Event(server.without_models(), Outcome.WARNED, reason, later, due_at=due_at)

    def _count_doubt(self, where: str, what: str) -> None:
        self._findings.doubts += 1
        self._findings.first_doubt = self._findings.first_doubt or f"{where}: {what}"


class OwnStops:
    """Separates the activity of users from what our own stops cause.

    The Hub sets a user's last activity when it stops a server. So a user who may be deleted is looked at right before
    and right after each stop: a value that is new then is the stop's, every other value is the user's. For example,
    9:00 before the stop, 11:30 after it: if the Hub still says 11:30 in the end, the user was last active at 9:00.
    """

    def __init__(self) -> None:
        self._before: dict[tuple[str, str], datetime | None] = {}  # by user and server
        self._seen: dict[str, set[datetime | None]] = {}
        self._caused: dict[str, set[datetime | None]] = {}

    def see_before_stop(self, user: User, server_name: str) -> None:
        """Remember the last activity right before the stop of a server."""
        self._before[user.name, server_name] = user.last_activity
        self._seen.setdefault(user.name, set()).add(user.last_activity)

    def see_after_stop(self, user: User, server_name: str, stopped: datetime) -> None:
        """Remember the last activity right after it. `stopped`: the latest time at which the stop can have been."""
        at = user.last_activity
        if at and at <= stopped and at != self._before.get((user.name, server_name)):
            self._caused.setdefault(user.name, set()).add(at)

    def without_own_stops(self, user: User) -> User:
        """The user with the last activity that our stops did not cause."""
        seen = {*self._seen.get(user.name, ()), user.last_activity} - self._caused.get(user.name, set())
        return replace(user, last_activity=max((at for at in seen if at), default=user.last_activity))


class Culler:
    """Culls what the scan found. Each server and user is looked at again right before the DELETE."""

    def __init__(self, context: PassContext, findings: Findings) -> None:
        self._hub = context.hub
        self._identity = context.identity
        self._settings = context.settings
        self._judge = context.judge
        self._told_to_stop = context.told_to_stop
        self._asker = context.asker
        self._findings = findings
        self._own_stops = OwnStops()
        # Servers of a user who may be deleted: no other stop may come between a stop and the looks around it.
        self._one_by_one = {user: threading.Lock() for user in findings.users}
        # When DELETEs were answered, or given up: time.monotonic(), by user, or user and server.
        self._deletes_sent: dict[str | tuple[str, str], float] = {}
        self._ended = False  # early
        self._failures = 0  # in a row that would affect all requests

    def cull(self) -> Iterator[Event]:
        """Cull, several at a time, and yield what became of each. What is left undone yields nothing."""
        outcomes: dict[str, set[Outcome]] = {}  # of the servers, by user
        for event in self._cull_servers():
            if isinstance(event.target, Server):
                outcomes.setdefault(event.target.user, set()).add(event.outcome)
            if event.outcome is not Outcome.DUE:
                yield event
        without_server = []
        for name, decision in self._findings.users.items():
            others = outcomes.get(name, set()) - {Outcome.CULLED, Outcome.GONE}
            if not others:
                without_server.append(decision)
            elif Outcome.DUE not in others:  # else a server is left undone, and so is its user
                yield Event(decision.target, Outcome.SPARED, "a server is still there", decision.verdict)
        for event in self._cull_all(self._cull_user, without_server):
            if event.outcome is not Outcome.DUE:
                yield event

    def _cull_servers(self) -> Iterator[Event]:
        """Cull the servers. Raises WrongAddress if they are to be asked, and none has answered at --servers-url."""
        undecided: list[Decision[Server]] = []  # until another server answers
        error: HubError | None = None
        for event in self._cull_all(self._cull_server, self._findings.servers.values()):
            if isinstance(event.error, WrongAddress) and isinstance(server := event.target, Server):
                error = event.error
                undecided.append(self._findings.servers[server.user, server.name])
            else:
                yield event
        if error and self._asker and not self._asker.address_is_right:
            raise error
        # Another server has answered, so the address is right: ask these again.
        yield from self._cull_all(self._cull_server, undecided)

    def _cull_all(
        self, cull: Callable[[Decision[Target]], Event], decisions: Iterable[Decision[Target]]
    ) -> Iterator[Event]:
        """Cull each, several at a time, and yield what became of it."""
        for event in in_parallel(partial(self._attempt, cull), decisions, self._settings.concurrency):
            yield self._end_after_failures(event)

    def _attempt(self, cull: Callable[[Decision[Target]], Event], decision: Decision[Target]) -> Event:
        """Cull one, with retries. Ends the pass early if the token is refused."""
        due = still_due(decision)
        if self._is_over():
            return due
        try:
            event = with_retries(partial(cull, decision), self._told_to_stop)
        except HubError as error:
            event = due._replace(outcome=Outcome.FAILED, error=error)
        except UnreadableError as error:  # what a rule needs was shown in the list, but is not any more
            event = due._replace(outcome=Outcome.FAILED, error=HubError(str(error), refused=True))
        if event.error and event.error.refused:
            self._ended = True
        return event

    def _end_after_failures(self, event: Event) -> Event:
        """End the pass after too many failures in a row. The event that reaches the limit says so."""
        if event.outcome is not Outcome.DUE:
            self._failures = self._failures + 1 if event.error and event.error.affects_all else 0
        # Exactly this many: failures still in flight must not say it again.
        if not event.error or self._failures != max(MOST_FAILURES, 2 * self._settings.concurrency):
            return event
        self._ended = True
        sentence = f"the pass ends after {self._failures} failures in a row; the last: {event.error}"
        return event._replace(error=HubError(sentence))

    def _is_over(self) -> bool:
        """True if nothing new may be started."""
        return self._ended or self._told_to_stop.is_set()

    def _cull_server(self, decision: Decision[Server]) -> Event:
        """Look at a server again, and stop it if it is still due."""
        with self._one_by_one.get(decision.target.user, contextlib.nullcontext()):
            if self._is_over():  # while another server of this user was stopped
                return still_due(decision)
            event = self._look_at_server(decision)
            if event.outcome is Outcome.DUE and not self._is_over():
                return self._stop_server(decision, event)
            return event

    def _look_at_server(self, decision: Decision[Server]) -> Event:
        """Decide about a server again, from what the Hub says of it now."""
        server, verdict, _ = decision
        event = Event(server, Outcome.SPARED, "", verdict)
        self._hub.check_names(server.name)  # before the look, so that the DELETE comes right after it
        user, now = self._find_user(server.user, decision.position)
        if user is None:
            return event._replace(outcome=Outcome.GONE, reason="the user is gone")
        fresh = user.server_or_doubt(server.name)
        if fresh is None and (server.user, server.name) in self._deletes_sent:
            since = timedelta(seconds=time.monotonic() - self._deletes_sent[server.user, server.name])
            self._own_stops.see_after_stop(user, server.name, self._findings.plausible(now) - since + DATE_ERROR)
            return event._replace(outcome=Outcome.CULLED, reason=f"{verdict.reason}; {ANSWER_LOST}")
        self._own_stops.see_before_stop(user, server.name)
        if fresh is None:
            return event._replace(outcome=Outcome.GONE, reason="not running any more")
        if fresh.doubt:
            return second_look(server, keep_in_doubt(fresh.doubt))
        if fresh.pending == "stop":
            return event._replace(outcome=Outcome.STOPPING, reason="the Hub is stopping it already")
        if fresh.started != server.started:
            return event._replace(reason="it was restarted")
        verdict = self._ask_and_decide(fresh, self._findings.plausible(now))
        return second_look(server, verdict)

    def _ask_and_decide(self, server: Server, now: datetime) -> Verdict:
        """Decide about a server, and ask it first if --idle-by says so. `both` asks only what the Hub calls idle."""
        verdict = self._judge.decide(server, now)
        may_ask = verdict.cull or self._settings.asks_while_scanning
        if self._asker and may_ask and self._judge.worth_asking(server, now):
            verdict = self._judge.decide(self._asker.ask(server, now), now)
        return verdict

    def _stop_server(self, decision: Decision[Server], event: Event) -> Event:
        """Send the DELETE, and turn the answer into an outcome."""
        server = decision.target
        began = time.monotonic()
        try:
            answer = self._hub.stop(server, remove=self._settings.remove_named_servers)
        finally:
            self._deletes_sent[server.user, server.name] = time.monotonic()
        if answer.status == 204:
            # The Hub's Date is when the request arrived, a proxy's when it answered.
            latest = self._findings.plausible(answer.now) + timedelta(seconds=time.monotonic() - began) + DATE_ERROR
            self._see_own_stop(decision, latest)
            removed = "; removed" if server.name and self._settings.remove_named_servers else ""
            return event._replace(outcome=Outcome.CULLED, reason=event.reason + removed)
        if answer.status == 202:
            waited = format_duration(timedelta(seconds=round(time.monotonic() - began)))
            return event._replace(outcome=Outcome.STOPPING, reason=f"{event.reason}; not down after {waited}")
        # 400: not running any more (Hub 0.x), or started again; 500: a user who is gone (Hubs 2 to 4)
        if answer.status == 500 or (answer.status in (400, 404) and answer.error):
            user, _ = self._find_user(server.user, decision.position)
            found = user.server_or_doubt(server.name) if user else None
            gone = {400: not (found and found.ready), 404: not found, 500: not user}
            if gone[answer.status]:
                return event._replace(outcome=Outcome.GONE, reason=f"the Hub {answer}")
        return self._failed(event, answer, "delete:servers")

    def _see_own_stop(self, decision: Decision[Server], stopped: datetime) -> None:
        """Look at a user who may be deleted, right after a stop. Without that, the stop counts as an activity."""
        if decision.target.user in self._findings.users:
            with contextlib.suppress(HubError):
                user, _ = self._find_user(decision.target.user, decision.position)
                if user:
                    self._own_stops.see_after_stop(user, decision.target.name, stopped)

    def _cull_user(self, decision: Decision[User]) -> Event:
        """Look at a user again, now that all servers are stopped, and delete the user if that is still due."""
        event = self._look_at_user(decision)
        if event.outcome is Outcome.DUE and not self._is_over():
            return self._delete_user(decision, event)
        return event

    def _look_at_user(self, decision: Decision[User]) -> Event:
        """Decide about a user again, without the activity of our own stops."""
        user, verdict, _ = decision
        event = Event(user, Outcome.SPARED, "", verdict)
        fresh, now = self._find_user(user.name, decision.position)
        if fresh is None and user.name in self._deletes_sent:
            return event._replace(outcome=Outcome.CULLED, reason=f"{verdict.reason}; {ANSWER_LOST}")
        if fresh is None:
            return event._replace(outcome=Outcome.GONE, reason="the user is gone")
        if fresh.servers:
            return event._replace(reason="a server is there again")
        if fresh.created != user.created:
            return event._replace(reason="the user was created anew")
        verdict = self._judge.decide_user(self._own_stops.without_own_stops(fresh), self._findings.plausible(now))
        return second_look(user, verdict)

    def _delete_user(self, decision: Decision[User], event: Event) -> Event:
        """Send the DELETE, and turn the answer into an outcome."""
        try:
            answer = self._hub.delete_user(decision.target.name)
        finally:
            self._deletes_sent[decision.target.name] = time.monotonic()
        if answer.status == 204:
            return event._replace(outcome=Outcome.CULLED)
        if answer.status == 202:
            return event._replace(outcome=Outcome.STOPPING, reason=f"{event.reason}; a server is not down yet")
        if answer.status == 400 and answer.error:  # a server is stopping, or the user owns the token
            return event._replace(outcome=Outcome.SPARED, reason=f"the Hub {answer}")
        if answer.status == 500 or (answer.status == 404 and answer.error):
            user, _ = self._find_user(decision.target.name, decision.position)
            if user is None:
                return event._replace(outcome=Outcome.GONE, reason=f"the Hub {answer}")
        return self._failed(event, answer, "admin:users", "delete:users")

    def _find_user(self, name: str, position: int) -> UserNow:
        """Read one user; where that is not possible, find the user in the user list.

        Users who have left the list since the scan have moved this one forward.
        """
        found = self._hub.user(name)
        if found:
            return found
        # From where the user probably is, back to the start.
        size = min(self._settings.api_page_size or USUAL_PAGE, USUAL_PAGE)
        start = max(position - size // 2, 0)
        for offset in [*range(start, 0, -size), 0]:
            page = self._hub.page(offset, size=size, ready_only=not self._settings.cull_users)
            for model in page.models:
                if name_of(model) == name:
                    return UserNow(parse_user(model), page.now)
            following = page.next_offset()
            if following is not None and following - offset < size:
                raise HubError(f"GET /users: {self._hub.url} sends fewer than {size} users, so one is not found")
        return UserNow(None, page.now)

    def _failed(self, event: Event, answer: Answer, scope: str, *others: str) -> Event:
        """The event for a DELETE that did not work. `scope`, or one of the others, would allow it."""
        sentence = f"the Hub {answer}"
        kind = f"the Hub answered {answer.status}"
        refused = answer.status in (401, 403) and answer.error is not None
        if answer.status in (401, 403):
            sentence += f"; {self._advice(answer, scope)}"
        elif answer.status == 404 and answer.error:
            filtered = self._identity.filtered(scope, *others) if self._identity else []
            named = " and ".join(filtered) or f"a filtered scope, such as {scope}!group=…"
            kind = f"not covered by {named}"
            sentence += f": it is still there, so it is {kind}"
        return event._replace(outcome=Outcome.FAILED, error=HubError(sentence, kind, refused=refused))

    def _advice(self, answer: Answer, scope: str) -> str:
        """What helps against a refusal."""
        if answer.status == 401 or not answer.error or not self._identity:
            return refusal_hint(answer)
        return f"the token needs the scope {scope}; {advice_on_scopes(self._identity, [scope])}"


def second_look(target: Server | User, verdict: Verdict) -> Event:
    """What the second look decides about something that the scan found due."""
    if verdict.cull:
        return Event(target, Outcome.DUE, verdict.reason, verdict)
    why = verdict.activity if verdict.decided_by == "idle" else verdict.reason
    return Event(target, Outcome.SPARED, why, verdict)


# ---- The result of a pass


@dataclasses.dataclass(eq=False, repr=False)
class PassResult:
    """The result of a pass: counts, errors and the exit code."""

    dry_run: bool
    started: datetime = dataclasses.field(default_factory=lambda: datetime.now(UTC))
    version: str | None = None  # of the Hub, if it has said so
    complete: bool = False  # the whole user list was read
    running: int = 0
    idle: int = 0  # servers idle for at least --timeout, if that is counted
    due_count: int = 0  # servers and users
    doubts: int = 0
    outcomes: Counter[Outcome] = dataclasses.field(default_factory=Counter)  # of what was due, without deleted users
    deleted: int = 0  # users
    warned: int = 0
    asked: int = 0  # servers
    busy: int = 0  # of these, with a busy kernel
    no_answer: int = 0  # of these, without a usable answer
    seconds: float = 0
    refused: bool = False  # the token may not do what was due
    errors: list[CullError] = dataclasses.field(default_factory=list)  # of the whole pass

    @property
    def undone(self) -> int:
        """How many were due and not tried, because the pass ended early."""
        return 0 if self.dry_run else self.due_count - self.deleted - self.outcomes.total()

    def add_findings(self, findings: Findings, timeout: timedelta) -> None:
        """Take over what the scan found."""
        self.complete = findings.complete
        self.running = findings.running
        self.idle = findings.idle_for.get(timeout, 0)
        self.due_count = findings.due_count
        self.doubts = findings.doubts
        self.warned = len(findings.warnings) if self.dry_run else 0
        if findings.error:
            self.errors.append(findings.error)

    def add_answers(self, asker: Asker) -> None:
        """Count the servers that were asked."""
        answers = Counter(asker.sources.values())
        self.asked = answers.total()
        self.busy, self.no_answer = answers[Source.BUSY_KERNEL], answers[Source.NO_ANSWER]

    def count(self, event: Event) -> None:
        """Count an event."""
        self.refused = self.refused or bool(event.error and event.error.refused)
        if event.outcome is Outcome.WARNED:
            self.warned += 1
        elif event.outcome is Outcome.CULLED and isinstance(event.target, User):
            self.deleted += 1
        else:
            self.outcomes[event.outcome] += 1

    @property
    def counts(self) -> dict[str, int]:
        """The counts, under the names that they have in the JSON and in the log."""
        outcomes = {str(outcome): self.outcomes[outcome] for outcome in FINAL_OUTCOMES}
        asked = {"asked": self.asked, "busy": self.busy, "no_answer": self.no_answer}
        return {**outcomes, "deleted": self.deleted, "left_undone": self.undone, "warned": self.warned, **asked}

    @property
    def exit_code(self) -> Exit:
        """What --once exits with."""
        if self.errors:
            return max(error.exit_code for error in self.errors)
        if self.refused:
            return Exit.NO_HUB
        return Exit.UNDONE if self.outcomes[Outcome.FAILED] or self.undone or not self.complete else Exit.DONE

    def __str__(self) -> str:
        counts = [f"{self.running} running", f"{self.due_count} due"]
        counts += [f"{count} {what.replace('_', ' ')}" for what, count in self.counts.items() if count]
        return f"{', '.join(counts)} in {self.seconds:.1f}s"


# ---- Log and progress

PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # of sd-daemon(3)
BAR_FROM = 10  # a pass that culls more than this shows a progress bar
FAILURE_KINDS = 10  # so many kinds of failures are counted apart, all others together
ERASE_LINE = "\r\033[K"
NARROWEST = 40  # columns of the smallest terminal that is laid out for


class Log:
    """Log lines on stderr, with a progress bar below them if stderr is a terminal."""

    def __init__(self, settings: Settings) -> None:
        self._logger = open_log(settings.level)
        self._show_bar = settings.level in ("debug", "info") and not settings.json
        self._bar: Any = None  # click's, while it is on the screen
        self._failures: Counter[str] = Counter()  # of one pass, by kind

    def say(self, level: str, sentence: str) -> None:
        """Log a sentence."""
        if self._bar:
            self._draw(ERASE_LINE)
        getattr(self._logger, level)("%s", sentence)
        self._draw_bar()

    def kept(self, event: Event) -> None:
        """Log a server or user that is kept."""
        self.say("debug", str(event))

    def event(self, event: Event) -> None:
        """Log what became of a server or user."""
        if self._bar and event.outcome is not Outcome.WARNED:
            self._bar.make_step(1)
        if event.error:
            self.failure(str(event), event.error.kind)
        else:
            warn = event.outcome is Outcome.STOPPING or event.verdict.in_doubt
            self.say("warning" if warn else "info", str(event))

    def failure(self, sentence: str, kind: str) -> None:
        """Log the first failure of each kind as an error. Others are counted, and shown with -v."""
        if kind not in self._failures and len(self._failures) >= FAILURE_KINDS:
            kind = ""
        self._failures[kind] += 1
        self.say("error" if kind and self._failures[kind] == 1 else "debug", sentence)

    def repeated_failures(self) -> None:
        """Log how many failures of each kind a pass had, beyond the first."""
        for kind, count in self._failures.items():
            if not kind:
                self.say("error", f"{count} more failed in other ways; -v shows each")
            elif count > 1:
                self.say("error", f"{count - 1} more failed in the same way: {kind}")
        self._failures.clear()

    def result(self, result: PassResult, pause: float | None) -> None:
        """Log the result of a pass, and in how many seconds the next one starts."""
        self.repeated_failures()
        following = "" if pause is None else f"; next in {format_duration(timedelta(seconds=round(pause)))}"
        for error in result.errors:
            self.say("error", f"{error}{following}")
        if not result.dry_run and (result.running or not result.errors):  # else there is nothing to count
            self.say("info", f"pass: {result}{following}")

    @contextlib.contextmanager
    def progress(self, due: int) -> Iterator[None]:
        """Show a bar while events come, if a terminal shows it and there are many.

        Only the text of click's bar is used: drawn by click, it would hide the cursor, and log lines would break it.
        """
        width = terminal_width(sys.stderr)
        if self._show_bar and due > BAR_FROM and width and os.environ.get("TERM") != "dumb":
            beside = len(f"  []  {due}/{due}  9d 00:00:00 ")
            self._bar = click.progressbar(length=due, show_pos=True, width=min(36, width - beside), file=sys.stderr)
            self._draw_bar()
        try:
            yield
        finally:
            if self._bar:
                self._draw(ERASE_LINE)
                self._bar = None

    def _draw_bar(self) -> None:
        if self._bar:
            self._draw(f"{ERASE_LINE}{self._bar.format_progress_line()}")

    def _draw(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            click.echo(text, nl=False, err=True)


def open_log(level: str) -> logging.Logger:
    """A logger to stderr. Lines begin with time and level; under systemd with a priority, under a Hub with a name.

    In a terminal the date is left out, so that most lines fit 80 columns.
    """
    import logging

    layout = "%(asctime)s %(levelname)-8s %(message)s"
    handler = logging.StreamHandler()
    if goes_to_journal():
        layout = "<%(priority)d>%(message)s"
        handler.addFilter(add_priority)
    elif os.environ.get("JUPYTERHUB_SERVICE_NAME"):
        layout = "%(asctime)s %(levelname)-8s cull_idle: %(message)s"
    handler.setFormatter(logging.Formatter(layout, "%H:%M:%S" if terminal_width(sys.stderr) else "%Y-%m-%d %H:%M:%S"))
    logging.raiseExceptions = False  # a full disk under stderr is no reason for a traceback
    logger = logging.getLogger("cull_idle")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())
    return logger


def add_priority(record: logging.LogRecord) -> bool:
    """Give a log record the priority that the journal understands."""
    record.priority = PRIORITIES[record.levelname]
    return True


def goes_to_journal() -> bool:
    """True if stderr is the journal's, which systemd says in $JOURNAL_STREAM."""
    try:
        stderr = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


def terminal_width(stream: TextIO) -> int | None:
    """The columns of the terminal that a stream leads to, at least NARROWEST; None if it leads to none."""
    if not stream.isatty():
        return None
    return max(os.get_terminal_size(stream.fileno()).columns or 80, NARROWEST)


# ---- JSON for programs


def action(target: Server | User, settings: Settings) -> str:
    """What culling does to a server or user."""
    if isinstance(target, User):
        return "delete"
    return "remove" if target.name and settings.remove_named_servers else "stop"


def event_fields(event: Event, settings: Settings) -> dict[str, object]:
    """The JSON fields of an event. The README documents them."""
    target, verdict = event.target, event.verdict
    return {
        "event": "user" if isinstance(target, User) else "server",
        "user": target.name if isinstance(target, User) else target.user,
        "server": None if isinstance(target, User) else target.name,
        "action": action(target, settings),
        "outcome": event.outcome,
        "reason": event.reason,
        "idle_seconds": None if verdict.idle is None else int(verdict.idle.total_seconds()),
        "age_seconds": None if verdict.age is None else int(verdict.age.total_seconds()),
        "due": format_time(event.due_at) if event.due_at else None,
        "error": str(event.error) if event.error else None,
    }


def pass_fields(result: PassResult, url: str) -> dict[str, object]:
    """The JSON fields of a pass. The README documents them."""
    return {
        "event": "pass",
        "started": format_time(result.started),
        "hub": url,
        "version": printable(result.version, 40) if result.version else None,
        "running": result.running,
        "idle": result.idle,
        "planned": result.due_count,  # also in a real pass
        **result.counts,
        "seconds": round(result.seconds, 3),
        "dry_run": result.dry_run,
        "error": "; ".join(map(str, result.errors)) or None,
    }


class JsonLines:
    """Prints a line of JSON on stdout for each event and pass, at once, if --json is set.

    If nobody can read it any more, it tells the culler to stop. The log goes on.
    """

    def __init__(self, settings: Settings, told_to_stop: threading.Event) -> None:
        self._settings = settings
        self._told_to_stop = told_to_stop
        self.broken: OSError | None = None  # why nobody can read it any more

    def event(self, event: Event) -> None:
        """Print an event."""
        if self._settings.json:
            self._print(event_fields(event, self._settings))

    def result(self, result: PassResult) -> None:
        """Print a pass. Raises OSError if nobody can read it."""
        if self._settings.json:
            self._print(pass_fields(result, self._settings.url))
        if self.broken:
            raise self.broken

    def _print(self, fields: Mapping[str, object]) -> None:
        import json

        if self.broken:
            return
        try:
            click.echo(json.dumps(fields))
        except OSError as error:
            self.broken = error
            self._told_to_stop.set()


# ---- The plan of a dry run: a table and bars

REASON_WIDTH = 24  # columns that a reason needs to stand beside the rest
AT_TIMEOUT = "  <- --timeout"
COLOURS: Mapping[str, Mapping[str, Any]] = {
    "kept": {"dim": True},
    "warned": {"fg": "yellow"},
    "stopped": {"fg": "red"},
    "removed": {"fg": "red"},
    "deleted": {"fg": "red", "bold": True},
}
TABLE_HEADER = ("SERVER", "IDLE", "AGE", "WOULD BE")
WOULD_BE = {"stop": "stopped", "remove": "removed", "delete": "deleted"}


def planned_events(findings: Findings) -> Iterator[Event]:
    """What is due, and what will be soon."""
    due: list[Decision[Server] | Decision[User]] = [*findings.servers.values(), *findings.users.values()]
    for decision in due:
        yield Event(decision.target, Outcome.PLANNED, decision.verdict.reason, decision.verdict)
    yield from findings.warnings.values()


def plan_caveats(findings: Findings, judge: Judge, identity: Identity | None, settings: Settings) -> Iterator[str]:
    """Why a real pass would do less than planned, and which rules apply to nobody."""
    try:
        findings.check_fuse(settings.max_culls)
    except FuseBlownError as error:
        yield str(error)
    if findings.servers and settings.idle_by is IdleBy.BOTH:
        yield "--idle-by both asks each of them first, and spares those in use"
    yield from caveats_of_scopes(identity, settings)
    for number, rule in judge.rules:
        if rule.text not in judge.server_policies.applied | judge.user_policies.applied:
            yield f"rule {number}, {rule.text}, applies to nobody now"


def caveats_of_scopes(identity: Identity | None, settings: Settings) -> Iterator[str]:
    """Why a real pass could not do what it should with this token."""
    if not identity:
        return
    if missing := missing_scopes(identity, settings, to_cull=True):
        yield f"the token lacks {' and '.join(missing)}: a real pass would stop nothing"
    if "delete:servers" not in identity.scopes and (narrow := identity.filtered("delete:servers")):
        yield f"the token has only {' and '.join(narrow)}: stopping the servers of other users would fail"


def show_plan(findings: Findings, kept: Sequence[Event], caveats: Iterable[str], settings: Settings) -> None:
    """Print what a pass would do, the longest idle first, and how many servers other timeouts would stop.

    kept: what is shown besides. caveats: of plan_caveats.
    """
    events = sorted([*planned_events(findings), *kept], key=lambda event: event.verdict.idle or ZERO, reverse=True)
    width = terminal_width(sys.stdout)
    lines = [*table(events, settings, width)] if events else []
    users = f", {len(findings.users)} of {findings.users_listed} users deleted" if settings.cull_users else ""
    lines += wrap(f"{len(findings.servers)} of {findings.running} running servers would be stopped{users}.", width)
    for caveat in caveats:
        lines += wrap(f"But {caveat}.", width)
    if any(findings.idle_for.values()):
        lines += ["", *bars(findings.idle_for, settings.timeout, width)]
    click.echo("\n".join(lines), color=wants_color())


def wants_color() -> bool | None:
    """Whether to use colours; None to use them on a terminal only (no-color.org, force-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return False if os.environ.get("TERM") == "dumb" else None


def encodable(text: str) -> str:
    """The text as stdout can write it: what its encoding lacks is escaped."""
    return text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding)


def display_width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = {"W": 2, "F": 2}
    return sum(
        wide.get(unicodedata.east_asian_width(c), 1) for c in text if unicodedata.category(c) not in ("Mn", "Me")
    )


def cut_end(text: str, width: int) -> str:
    """As much of the beginning of a text as takes at most that many columns."""
    if text.isascii():
        return text[:width]
    for end, char in enumerate(text):
        width -= display_width(char)
        if width < 0:
            return text[:end]
    return text


def cut_middle(text: str, width: int, mark: str = "…") -> str:
    """The text in at most that many columns, if need be without its middle."""
    if display_width(text) <= width:
        return text
    tail = cut_end(text[::-1], (width - 1) // 2)[::-1]
    while tail and not display_width(tail[0]):  # an accent whose letter is cut off
        tail = tail[1:]
    return f"{cut_end(text, width // 2)}{mark}{tail}"


def wrap(text: str, width: int | None) -> list[str]:
    """Lines of at most that many columns, broken between words where that is possible.

    Unlike textwrap it counts columns, not characters, and leaves spaces in names as they are.
    """
    lines = []
    while width and display_width(text) > width:
        most = len(cut_end(text, width))
        end = text.rfind(" ", 1, most + 1)
        end = most if end < 0 else end
        lines.append(text[:end])
        text = text[end:].lstrip(" ")
    return [*lines, text]


def table(events: Iterable[Event], settings: Settings, width: int | None) -> Iterator[str]:
    """Lines of a table of at most that many columns: long names are cut in the middle, reasons are wrapped."""
    cells = []
    for event in events:
        would_be = WOULD_BE[action(event.target, settings)] if event.outcome is Outcome.PLANNED else event.outcome
        idle, age = ("-" if d is None else short(d) for d in (event.verdict.idle, event.verdict.age))
        cells.append((encodable(event.target.full_name), idle, age, encodable(f"{would_be}: {event.reason}")))
    widths = [max(map(display_width, column)) for column in zip(TABLE_HEADER, *cells, strict=True)]
    name_width, idle_width, age_width, reason_width = widths
    middle_width = 2 + idle_width + 2 + age_width + 2
    beside = True  # reasons stand beside the rest, not below it
    if width is not None and name_width + middle_width + reason_width > width:
        least = min(name_width, width // 3)
        beside = width - least - middle_width >= REASON_WIDTH
        if beside:
            name_width = min(name_width, max(least, width - middle_width - reason_width))
            reason_width = width - name_width - middle_width
        else:
            name_width = min(name_width, width - middle_width + 2)
            reason_width = width - 2
    indent = " " * (name_width + middle_width if beside else 2)
    mark = "…" if encodable("…") == "…" else "~"

    def line(name: str, idle: str, age: str, why: str) -> str:
        left = f"{name}{' ' * (name_width - display_width(name))}  {idle:{idle_width}}  {age:{age_width}}"
        return f"{left}  {why}" if beside else f"{left.rstrip()}\n{indent}{why}"

    yield click.style(line(*TABLE_HEADER), bold=True)
    for full_name, idle, age, why in cells:
        would_be = why.partition(":")[0]
        first, *others = wrap(why, reason_width)
        first = click.style(would_be, **COLOURS[would_be]) + first.removeprefix(would_be)
        yield line(cut_middle(full_name, name_width, mark), idle, age, first)
        yield from (indent + other for other in others)


def bars(idle_for: Mapping[timedelta, int], timeout: timedelta, width: int | None) -> Iterator[str]:
    """A bar for each of some timeouts: how many servers it would stop."""
    eighths = " ▏▎▍▌▋▊▉█"
    if encodable(eighths) != eighths:
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
        figure = f"{bar} {count}" if bar else str(count)
        yield f"{label:>{indent}}  {figure}{AT_TIMEOUT if step == timeout else ''}"


# ---- Metrics for Prometheus


class Metric(NamedTuple):
    """A metric. `samples`: values by label; of a counter, what this pass adds."""

    name: str  # without cull_idle_
    help: str
    samples: Mapping[str, float]


def metrics_of(result: PassResult, last_success: float) -> Iterator[Metric]:
    """The metrics of a pass. `last_success`: when an earlier one succeeded, in seconds since 1970."""
    ended = result.started.timestamp() + result.seconds
    succeeded = result.exit_code is Exit.DONE
    outcomes = {f'{{outcome="{outcome}"}}': result.outcomes[outcome] for outcome in FINAL_OUTCOMES}
    yield Metric("passes_total", "Passes.", {"": 1})
    yield Metric("failed_passes_total", "Passes that did not do all they set out to do.", {"": not succeeded})
    yield Metric("outcomes_total", "What became of due servers, and of due users who were not deleted.", outcomes)
    yield Metric("deleted_users_total", "Users who were deleted.", {"": result.deleted})
    yield Metric("warned_servers_total", "Servers that --warn-before reported.", {"": result.warned})
    no_answer = "Servers asked in the last pass that gave no usable answer."
    yield Metric("asked_servers", "Servers that --idle-by asked in the last pass.", {"": result.asked})
    yield Metric("busy_servers", "Servers asked in the last pass that had a busy kernel.", {"": result.busy})
    yield Metric("no_answer_servers", no_answer, {"": result.no_answer})
    yield Metric("pass_duration_seconds", "Time that the last pass took.", {"": result.seconds})
    yield Metric("last_pass_timestamp_seconds", "When the last pass ended.", {"": ended})
    success = "When the last pass ended that did all it set out to do."
    yield Metric("last_success_timestamp_seconds", success, {"": ended if succeeded else last_success})
    if result.complete:
        idle = "Ready servers that were idle for at least --timeout in the last pass."
        yield Metric("running_servers", "Servers that were ready in the last pass.", {"": result.running})
        yield Metric("idle_servers", idle, {"": result.idle})
        yield Metric("planned", "Servers and users that were due in the last pass.", {"": result.due_count})


def write_metrics(path: str, result: PassResult) -> None:
    """Write a file for node_exporter's textfile collector, whole or not at all. Counters continue those in the file.

    Raises OSError, or ValueError if it is another program's file.
    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    import tempfile

    before = read_metrics(path)
    lines = []
    for metric in metrics_of(result, before.get("cull_idle_last_success_timestamp_seconds", 0)):
        is_counter = metric.name.endswith("_total")
        name = f"cull_idle_{metric.name}"
        lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {'counter' if is_counter else 'gauge'}"]
        for labels, value in metric.samples.items():
            earlier = before.get(f"{name}{labels}", 0) if is_counter else 0
            lines.append(f"{name}{labels} {round(value + earlier, 3)}")
    # A new file that nobody else can have prepared, in the same directory, so that it can replace the old one.
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".cull_idle")
    try:
        with open(descriptor, "w") as file:
            file.write("\n".join(lines) + "\n")
            os.fchmod(descriptor, 0o644)  # node_exporter runs as another user
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def read_metrics(path: str) -> dict[str, float]:
    """The samples in a metrics file, none if there is no file. Raises OSError, or ValueError for another's file."""
    if not os.path.exists(path):
        return {}
    if not os.path.isfile(path):
        raise ValueError("it is not a file")
    with open(path, errors="replace") as file:
        text = file.read()
    if text and not text.startswith("# HELP cull_idle_"):
        raise ValueError("another program wrote it, so it is not overwritten")
    samples = re.findall(r"^(cull_idle_\S+) (-?\d+(?:\.\d+)?(?:e[+-]\d+)?)\n", text, re.MULTILINE)
    return {name: float(value) for name, value in samples}


def check_metrics_file(path: str) -> None:
    """Raise SettingsError if the metrics could not be written after a pass."""
    try:
        read_metrics(path)
    except ValueError as error:
        raise SettingsError(f"--metrics-file {path} is there already: {error}.") from None
    except OSError as error:
        raise SettingsError(f"--metrics-file {path} cannot be read: {error.strerror}.") from None
    if not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise SettingsError(f"--metrics-file {path} cannot be written: its directory must exist and be writable.")


# ---- Notices: the administrator's own command for each event

NOTICE_SECONDS = 30  # for one command
NOTICES_AT_ONCE = 4
LATE_NOTICES = 10  # commands not done in time, after which a pass runs no more: it would take hours
NOTICE_VARIABLES = {"EVENT": "outcome", "USER": "user", "SERVER": "server", "DUE": "due"}  # and JSON fields
NOTIFIED = (Outcome.WARNED, Outcome.CULLED, Outcome.STOPPING, Outcome.FAILED)


class Notices:
    """Runs a command for each event, a few at a time, with the event's JSON on its standard input."""

    def __init__(self, command: Sequence[str], settings: Settings, told_to_stop: threading.Event) -> None:
        self._command = command
        self._settings = settings
        # Without $JUPYTERHUB_API_TOKEN, and whatever else holds a token.
        self._environment = {
            name: value for name, value in os.environ.items() if not any(secret in value for secret in SECRETS)
        }
        self._told_to_stop = told_to_stop
        self._waiting: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        # Lists, because several threads add to them.
        self._failed: list[tuple[Event, str]] = []  # and why
        self._late: list[Event] = []  # not done in time
        self._left_out: list[Event] = []

    def send(self, event: Event) -> None:
        """Run the command soon, if it is an event to notify of."""
        if event.outcome not in NOTIFIED:
            return
        self._waiting.put(event)
        if len(self._threads) < NOTICES_AT_ONCE:
            thread = threading.Thread(target=self._work, name="cull_idle notices", daemon=True)
            with contextlib.suppress(RuntimeError):  # can't start new thread
                thread.start()
                self._threads.append(thread)

    def wait(self) -> Iterator[tuple[str, str]]:
        """Wait for all commands; yields a sentence for each that failed, and the kind of failure."""
        for _ in range(len(self._threads) or 1):
            self._waiting.put(None)
        if not self._threads:
            self._work()
        for thread in self._threads:
            thread.join()
        for event, why in self._failed:
            name = printable(event.target.name) if isinstance(event.target, User) else event.target.full_name
            yield f"--notify for {name}: {why}", f"--notify: {why.partition(': ')[0]}"
        if self._left_out:
            why = "told to stop" if self._told_to_stop.is_set() else f"{len(self._late)} were not done in time"
            sentence = f"--notify: {len(self._left_out)} left out, because {why}"
            yield sentence, sentence

    def _work(self) -> None:
        """Run the command for events until there are no more."""
        while event := self._waiting.get():
            if why := self._run(event):
                self._failed.append((event, why))

    def _run(self, event: Event) -> str:
        """Run the command for one event; returns why it failed, empty if it did not."""
        if self._told_to_stop.is_set() or len(self._late) >= LATE_NOTICES:
            self._left_out.append(event)
            return ""
        fields = event_fields(event, self._settings)
        environment = {f"CULL_IDLE_{name}": str(fields[field] or "") for name, field in NOTICE_VARIABLES.items()}
        command = self._command[0]
        try:
            import json
            import signal
            import subprocess
            import tempfile

            # Not a pipe: what the command leaves running in the background may keep that open.
            with tempfile.TemporaryFile() as stderr:
                process = subprocess.Popen(  # noqa: S603 (the administrator's own command)
                    self._command,
                    env=self._environment | environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,
                )
                try:
                    process.communicate(json.dumps(fields).encode() + b"\n", NOTICE_SECONDS)
                except subprocess.TimeoutExpired:
                    self._late.append(event)
                    with contextlib.suppress(OSError):  # a process of another user cannot be killed
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                    return f"{command} was not done after {NOTICE_SECONDS}s, and is given up"
                words = last_line(stderr)
        except (OSError, ValueError) as error:  # ValueError: a name that no variable can hold
            return f"{command} cannot be run: {one_line(str(getattr(error, 'strerror', None) or error))}"
        if process.returncode == 0:
            return ""
        how = f"exited with {process.returncode}" if process.returncode > 0 else f"was killed ({-process.returncode})"
        return f"{command} {how}: {words}"


def last_line(stream: BinaryIO) -> str:
    """The last line that a command has written, which in a traceback says what is wrong."""
    start = max(stream.seek(0, os.SEEK_END) - READ_SIZE, 0)
    stream.seek(start)
    lines = stream.read().decode(errors="replace").strip().splitlines()
    if start:
        lines = lines[1:]  # the rest of a line, which may begin in the middle of a token
    if not lines:
        return f"its last line has more than {READ_SIZE} bytes" if start else "nothing on its stderr"
    return one_line(lines[-1])


# ---- Explaining one decision

LABEL_WIDTH = 9  # columns


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print labels and facts, one below the other."""
    width = terminal_width(sys.stdout)
    for label, fact in facts:
        lines = wrap(encodable(fact), width and width - LABEL_WIDTH)
        click.echo(f"{label:{LABEL_WIDTH}}" + f"\n{'':{LABEL_WIDTH}}".join(lines))


def explanation(context: PassContext, name: str) -> Iterator[tuple[str, str]]:
    """What decides about `USER/SERVER`, or about `USER` and the default server, as labels and facts.

    Raises CullError.
    """
    hub = context.hub
    user_name, _, server_name = name.partition("/")
    if not user_name:
        raise SettingsError("--explain: write USER, or USER/SERVER for a named server.")
    found = hub.user(user_name)
    if found is None:
        raise HubError(f"{hub.url} cannot show a single user, so there is nothing to explain; {API_HINT}")
    user, now = found
    if user is None:
        raise SettingsError(f"--explain: {hub.url} knows no user {one_line(user_name, 40)!r}.")
    yield "hub", f"{hub.url}, JupyterHub {printable(hub.version, 20) if hub.version else 'of an unknown version'}"
    clock = format_time(now)
    ahead = round((now - datetime.now(UTC)).total_seconds())
    if abs(ahead) > 1:
        difference = format_duration(timedelta(seconds=abs(ahead)))
        clock += f", {difference} {'ahead of' if ahead > 0 else 'behind'} this machine's"
    yield "clock", clock
    explains_user = context.settings.cull_users and not server_name
    servers = [
        ask_if_it_decides(context, server, now) if explains_user or server.name == server_name else server
        for server in user.servers
    ]
    user = replace(user, servers=servers)
    yield from explain_server(context, user, server_name, now)
    if explains_user:
        yield from explain_user(user, context.judge, now)
    for caveat in caveats_of_scopes(context.identity, context.settings):
        yield "but", caveat


def ask_if_it_decides(context: PassContext, server: Server, now: datetime) -> Server:
    """The server with its own last activity, if --idle-by asks while scanning. Raises HubError."""
    if not (context.asker and context.settings.asks_while_scanning and context.judge.worth_asking(server, now)):
        return server
    return context.asker.ask(server, now)


def explain_server(context: PassContext, user: User, name: str, now: datetime) -> Iterator[tuple[str, str]]:
    """What decides about a server of a user."""
    settings, judge = context.settings, context.judge
    server = user.server_or_doubt(name)
    if server is None:
        full_name = printable(f"{user.name}/{name}" if name else user.name)
        others = ", ".join(each.full_name for each in user.servers)
        yield "server", f"{full_name} is not running" + (f", only {others}" if others else "")
        yield "verdict", "nothing to stop"
        return
    yield "server", server.full_name
    if settings.idle_by is IdleBy.BOTH:
        yield "asked", "no: to the Hub that looks like activity, so it is asked only before it is stopped"
    elif server.source is Source.NO_ANSWER:
        yield "asked", f"no answer: {context.asker.first_problem if context.asker else ''}"
    elif server.source is not Source.HUB:
        yield "asked", "yes"
    verdict = judge.decide(server, now)
    ready = "yes" if server.ready else "no"
    pending = f", pending {one_line(server.pending, 20)}" if server.pending else ""
    yield "ready", "unknown" if server.doubt else f"{ready}{pending}"
    yield from explain_times(server.last_activity, "started", server.started, verdict)
    if not server.doubt:  # else its model may lack what a rule matches
        yield from explain_rules(server, judge.rules)
    yield from explain_limits(judge.server_policies.find(server), server.last_activity, server.started, now)
    if settings.arbiter:
        yield "arbiter", "decides in place of the timeout"
    yield "verdict", f"{f'would be {WOULD_BE[action(server, settings)]}' if verdict.cull else 'kept'}: {verdict.reason}"


def explain_user(user: User, judge: Judge, now: datetime) -> Iterator[tuple[str, str]]:
    """What decides about a user."""
    verdict = judge.decide_user(user, now)
    yield "user", printable(user.name) + (", an admin" if user.admin else "")
    yield from explain_times(user.last_activity, "created", user.created, verdict)
    yield from explain_rules(user, [(number, rule) for number, rule in judge.rules if rule.for_users])
    yield from explain_limits(judge.user_policies.find(user), user.last_activity, user.created, now)
    staying = [server.full_name for server in user.servers if not judge.decide(server, now).cull]
    if verdict.cull and staying:
        verdict = verdict.keep_because(f"{', '.join(staying)} would not be stopped")
    when = " once no server is left" if user.servers else ""
    yield "verdict", f"{f'would be deleted{when}' if verdict.cull else 'kept'}: {verdict.reason}"


def explain_times(
    active: datetime | None, birth: str, born: datetime | None, verdict: Verdict
) -> Iterator[tuple[str, str]]:
    """When something was last active and when it was born, and how long ago that is."""
    stands_in = f": when it was {birth}, no activity is known" if active == born else ""
    for label, moment, measured in (("active", active, verdict.idle), (birth, born, verdict.age)):
        if moment is None:
            yield label, "unknown"
            continue
        ago = f", {format_duration(measured)} ago" if measured is not None else ""
        yield label, f"{format_time(moment)}{ago}{stands_in if label == 'active' else ''}"


def explain_rules(target: Server | User, rules: Iterable[tuple[int, Rule]]) -> Iterator[tuple[str, str]]:
    """Why rules do not apply, up to the first one that does."""
    for number, rule in rules:
        failing = [match for match in rule.matches if not match.holds(match.values(target))]
        if not failing:
            servers_only = ", its limits only to servers" if isinstance(target, User) and not rule.keep else ""
            yield f"rule {number}", f"{rule.text}: applies{servers_only}"
            return
        values = ", ".join(failing[0].values(target)) or "none"
        yield f"rule {number}", f"{rule.text}: does not apply, {failing[0].name} is {one_line(values)}"


def explain_limits(
    policy: Policy, active: datetime | None, born: datetime | None, now: datetime
) -> Iterator[tuple[str, str]]:
    """The limits, and when they are reached."""
    yield "timeout", explain_limit(policy.timeout, active, now)
    yield "max-age", explain_limit(policy.max_age, born, now)


def explain_limit(limit: Limit, since: datetime | None, now: datetime) -> str:
    """A limit, and when something that has lasted since then reaches it."""
    if limit.duration == NEVER:
        return f"never{limit.by_rule}"
    text = f"{format_duration(limit.duration)}{limit.by_rule}"
    if since is None:
        return f"{text}, not reached: unknown since when"
    left = limit.duration - max(now - since, ZERO)
    try:
        at = format_time(min(since, now) + limit.duration)
    except OverflowError:
        return f"{text}, not reached"
    return f"{text}, not reached before {at}, in {format_duration(left)}" if left > ZERO else f"{text}, reached at {at}"


# ---- The loop, with token and signals

TOKEN_SECONDS = 5  # how long a pipe may keep us waiting for a token
LONGEST_TOKEN = 1 << 16  # bytes
SAME_TIME = timedelta(seconds=30)  # due times that differ by less are the same: servers tell theirs only roughly


def read_token(path: str | None) -> str:
    """Read the API token from a file if there is one, else from $JUPYTERHUB_API_TOKEN. Raises SettingsError."""
    source = f"--token-file {path}" if path else "$JUPYTERHUB_API_TOKEN"
    try:
        token = (read_token_file(path) if path else os.environ.get("JUPYTERHUB_API_TOKEN", "")).strip()
    except OSError as error:
        if path and isinstance(error, FileNotFoundError) and re.fullmatch("[0-9a-f]{32,}", path):
            raise SettingsError("--token-file takes the name of a file, and this looks like a token.") from None
        why = error.strerror or error
        raise SettingsError(f"{source} cannot be read: {why}; it must be a file that this user may read.") from None
    if not token:
        state = "is empty" if path or "JUPYTERHUB_API_TOKEN" in os.environ else "is not set"
        other = "" if path else ", or into a file for --token-file"
        raise SettingsError(f"{source} {state}: put an API token of the Hub there{other} (README: a first look).")
    if not re.fullmatch("[!-~]+", token):
        raise SettingsError(f"{source} holds no API token: a token is one word of plain ASCII characters.")
    SECRETS.add(token)
    return token


def read_token_file(path: str) -> str:
    """The content of a file, or of a pipe that somebody writes to. Raises OSError."""
    import select

    content = b""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        while len(content) < LONGEST_TOKEN:
            if not select.select([descriptor], [], [], TOKEN_SECONDS)[0]:
                raise TimeoutError(None, f"nothing has come for {TOKEN_SECONDS}s")
            chunk = os.read(descriptor, LONGEST_TOKEN)
            if not chunk:
                break
            content += chunk
    finally:
        os.close(descriptor)
    return content.decode("ascii", errors="replace")


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set. A second signal ends the program at once.

    Python handles a signal in the main thread. One that comes just before this thread waits for a lock would be handled
    only after the wait, which may take minutes. So a timer interrupts the main thread every second.
    """
    import signal

    told_to_stop = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def handle(number: int, _frame: object) -> None:
        for each in signals:  # PID 1, as in a container, would not be ended by the default action
            signal.signal(each, exit_at_once if os.getpid() == 1 else signal.SIG_DFL)
        told_to_stop.set()
        if number == signal.SIGINT and sys.stderr.isatty():
            os.write(2, f"{ERASE_LINE}finishing what is in flight; press Ctrl-C again to quit at once\n".encode())

    before = {number: signal.signal(number, handle) for number in signals}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield told_to_stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_at_once(number: int, _frame: object) -> None:
    """Exit with the code that a shell reports for a process killed by this signal."""
    os._exit(128 + number)


class Loop:
    """Makes passes, as the settings say, until told to stop."""

    def __init__(self, settings: Settings, told_to_stop: threading.Event) -> None:
        """Read the first token. Raises SettingsError."""
        self.settings = settings
        self.told_to_stop = told_to_stop
        self.log = Log(settings)
        self._judge = Judge(settings)
        self.json_lines = JsonLines(settings, told_to_stop)
        self._token = read_token(settings.token_file)
        self._token_problem = ""  # why the last token is still used
        self._identity: Identity | None = None
        self._pass_has_worked = False  # the last one, with this token and without any doubt
        self._warned: dict[tuple[str, str], datetime] = {}  # servers, and when they are due

    def run(self) -> Exit:
        """Make one pass, or passes until told to stop."""
        return self.run_once() if self.settings.once or self.settings.dry_run else self.run_forever()

    def run_once(self) -> Exit:
        """Make one pass."""
        result = self.make_pass()
        self.report(result)
        if self.told_to_stop.is_set():
            self.log.say("error", "told to stop before the pass was over")
            return max(result.exit_code, Exit.UNDONE)
        return result.exit_code

    def run_forever(self) -> Exit:
        """Make passes until told to stop. After a pass that failed the next one comes sooner: in 2, 4, 8 … seconds."""
        failures = 0
        while not self.told_to_stop.is_set():
            began = time.monotonic()
            result = self.make_pass()
            failures = failures + 1 if result.exit_code else 0
            interval = self.settings.interval.total_seconds()
            pause = (
                min(2.0 ** min(failures, 20), interval) if failures else max(interval - (time.monotonic() - began), 0)
            )
            self.report(result, None if self.told_to_stop.is_set() else pause)
            if not self.told_to_stop.wait(pause):
                self._read_token_again()
        self.log.say("info", "told to stop")
        return Exit.DONE

    def explain(self, name: str) -> Exit:
        """Explain one decision. Raises CullError."""
        with Hub(self._token, self.settings) as hub:
            self._check_scopes(hub)
            with self._open_asker(hub) as asker:
                print_facts(explanation(self._context(hub, asker), name))
        return Exit.DONE

    def make_pass(self) -> PassResult:
        """Scan the Hub once and decide, then cull what is due, or show it."""
        began = time.monotonic()
        result = PassResult(self.settings.dry_run)
        try:
            with Hub(self._token, self.settings) as hub:
                self._check_scopes(hub)
                with self._open_asker(hub, result) as asker:
                    context = self._context(hub, asker)
                    if self.settings.dry_run:
                        self._scan_and_show(context, result)
                    else:
                        self._scan_and_cull(context, result)
        except CullError as error:
            result.errors.append(error)
        result.seconds = time.monotonic() - began
        self._pass_has_worked = result.exit_code is Exit.DONE and not result.doubts
        return result

    def _context(self, hub: Hub, asker: Asker | None) -> PassContext:
        return PassContext(hub, self._identity, self.settings, self._judge, self.told_to_stop, asker)

    @contextlib.contextmanager
    def _open_asker(self, hub: Hub, result: PassResult | None = None) -> Iterator[Asker | None]:
        """Open the Asker if servers are to be asked; at the end, count its answers in the result. Raises HubError.

        To the Hub, asking looks like activity. So `both` asks only right before a stop. A dry run checks the address.
        """
        if self.settings.idle_by is IdleBy.HUB:
            yield None
            return
        with Asker(hub, self.settings) as asker:
            asker.check(self._identity)
            try:
                yield asker
            finally:
                if result:
                    result.add_answers(asker)
                if result and result.no_answer:
                    count = f"{result.no_answer} of {result.asked} servers asked gave no answer"
                    self.log.say("warning", f"{count}, so the Hub's word counts; the first: {asker.first_problem}")

    def _scan_and_cull(self, context: PassContext, result: PassResult) -> None:
        """Scan and decide, warn, check the fuse, cull, and report each event. Raises CullError."""
        findings = self._scan(context, result, self.log.kept)
        with self._notices() as notices, self.log.progress(findings.due_count):
            for event in self._new_warnings(findings):
                self._report_event(event, result, notices)
            findings.check_fuse(self.settings.max_culls)
            for event in Culler(context, findings).cull():
                self._report_event(event, result, notices)

    def _report_event(self, event: Event, result: PassResult, notices: Notices | None) -> None:
        """Count an event, and tell everybody of it."""
        result.count(event)
        self.log.event(event)
        self.json_lines.event(event)
        if notices:
            notices.send(event)

    def _scan_and_show(self, context: PassContext, result: PassResult) -> None:
        """Scan, decide and show. Raises CullError."""
        kept: list[Event] = []
        findings = self._scan(context, result, self.log.kept if self.settings.json else kept.append)
        caveats = plan_caveats(findings, self._judge, self._identity, self.settings)
        if self.settings.json:
            for event in planned_events(findings):
                self.json_lines.event(event)
            for caveat in caveats:
                self.log.say("warning", caveat)
        elif findings.complete or findings.users_listed:
            show_plan(findings, kept, caveats, self.settings)

    def _scan(self, context: PassContext, result: PassResult, on_kept: Callable[[Event], None]) -> Findings:
        """Scan and decide. `on_kept` is told of what is kept, if that is to be shown. Raises CullError."""
        findings = Scan(context, on_kept if self.settings.level == "debug" else None).run()
        result.add_findings(findings, self.settings.timeout)
        result.version = context.hub.version
        if findings.doubts:
            self.log.say("warning", f"kept {findings.doubts} in doubt; the first: {findings.first_doubt}")
        return findings

    def _new_warnings(self, findings: Findings) -> Iterator[Event]:
        """Warnings of servers that will be due soon, once for each due time. Others are logged as kept."""
        if findings.hub_time:  # forget those that were due meanwhile
            now = findings.hub_time
            self._warned = {key: due_at for key, due_at in self._warned.items() if due_at > now - SAME_TIME}
        for key, event in findings.warnings.items():
            before = self._warned.get(key)
            if event.due_at and (before is None or abs(event.due_at - before) > SAME_TIME):
                self._warned[key] = event.due_at
                yield event
            else:
                self.log.kept(event._replace(outcome=Outcome.KEPT, reason=event.verdict.reason))

    @contextlib.contextmanager
    def _notices(self) -> Iterator[Notices | None]:
        """Commands of --notify; waits for them at the end."""
        if not self.settings.notify:
            yield None
            return
        notices = Notices(self.settings.notify, self.settings, self.told_to_stop)
        try:
            yield notices
        finally:
            for sentence, kind in notices.wait():
                self.log.failure(sentence, kind)

    def report(self, result: PassResult, pause: float | None = None) -> None:
        """Report a pass, and in how many seconds the next one starts. Raises OSError if nobody reads the JSON."""
        self.log.result(result, pause)
        try:
            self.json_lines.result(result)
        finally:
            if self.settings.metrics_file and not self.settings.dry_run:
                self._write_metrics(self.settings.metrics_file, result)

    def _write_metrics(self, path: str, result: PassResult) -> None:
        try:
            write_metrics(path, result)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            self.log.say("error", f"--metrics-file {path} is not written: {why}")

    def _read_token_again(self) -> None:
        """Read the token again, so that a new one needs no restart. The last one stays if that fails."""
        before, problem = self._token, ""
        try:
            self._token = read_token(self.settings.token_file)
        except SettingsError as error:
            problem = str(error)
        if self._token != before:
            self._pass_has_worked = False
        if problem and problem != self._token_problem:
            self.log.say("warning", f"{problem} The last token stays in use.")
        self._token_problem = problem

    def _check_scopes(self, hub: Hub) -> None:
        """Check the token's scopes, unless the last pass has worked, if the Hub can tell them. Raises HubError.

        Where servers are asked, before each pass: without the scope `tokens` they would seem not to answer.
        """
        if self._pass_has_worked and self.settings.idle_by is IdleBy.HUB:
            return
        try:
            self._identity = with_retries(hub.identity, self.told_to_stop)
        except HubError as error:
            if error.affects_all:
                raise
            return  # GET /users will say it better
        if self._identity:
            check_scopes(self._identity, self.settings)


# ---- The command line

ACTIVITY_INTERVAL = timedelta(minutes=5, seconds=30)  # JupyterHub.last_activity_interval, and some time to do it


class GroupedOption(click.Option):
    """An option that --help shows under a heading."""

    def __init__(self, *args: Any, heading: str, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.heading = heading

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """Several values in one variable are separated by semicolons, because rules have spaces in them."""
        value = self.resolve_envvar_value(ctx)
        if value and self.multiple:
            return [part for part in value.split(";") if part.strip()]
        return super().value_from_envvar(ctx)


class GroupedCommand(click.Command):
    """A command whose --help shows its options under their headings, and fits terminals from 40 columns on."""

    def get_help(self, ctx: click.Context) -> str:
        """Write the help as wide as the terminal; click itself would write 50 columns at least."""
        import shutil

        ctx.terminal_width = max(min(shutil.get_terminal_size().columns, 80), NARROWEST) - 2
        return super().get_help(ctx)

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
                formatter.write_dl(records, col_max=32 if formatter.width >= 70 else 2)  # 2: help below the option


def stop_idle_servers(**values: Any) -> Exit:
    """Stop the idle servers of a JupyterHub."""
    settings = Settings(**without_overruled(values, "log_level", "verbose", "quiet"))
    timeouts = [] if settings.arbiter else [settings.timeout, *(rule.timeout for rule in settings.rule)]
    if settings.warn_before and any(timeout and timeout <= settings.warn_before for timeout in timeouts):
        raise click.UsageError(
            "--warn-before must be shorter than --timeout and each rule's timeout=, or it would warn of servers in use."
        )
    if settings.metrics_file and settings.changes_something:
        check_metrics_file(settings.metrics_file)
    with stop_signals() as told_to_stop:
        loop = Loop(settings, told_to_stop)
        for warning in warnings_about(settings):
            loop.log.say("warning", warning)
        if settings.explain is not None:
            return loop.explain(settings.explain)
        return loop.run()


def without_overruled(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """The values of options. Of these options only those stay that come first: command line, variables, file."""
    get_source = click.get_current_context().get_parameter_source
    sources = {name: source for name in names if values[name] and (source := get_source(name)) is not None}
    overruled = [name for name, source in sources.items() if source > min(sources.values())]
    return {**values, **dict.fromkeys(overruled)}


def warnings_about(settings: Settings) -> Iterator[str]:
    """What in the settings or the environment is probably a mistake."""
    timeouts = [("--timeout", settings.timeout)]
    timeouts += [
        (f"rule {number}: timeout", rule.timeout) for number, rule in enumerate(settings.rule, 1) if rule.timeout
    ]
    for name, timeout in timeouts:
        if ZERO < timeout < ACTIVITY_INTERVAL and settings.idle_by is IdleBy.HUB:
            yield (
                f"{name} {format_duration(timeout)} may stop servers in use: a Hub refreshes last_activity"
                " every 5m by default (JupyterHub.last_activity_interval); set at least 5m30s"
            )
    at_the_api = settings.servers_root == settings.url.removesuffix("/hub/api")
    managed = "JUPYTERHUB_SERVICE_NAME" in os.environ and settings.url == os.environ.get("JUPYTERHUB_API_URL")
    if settings.idle_by is not IdleBy.HUB and at_the_api and (managed or ":8081/" in settings.url):
        yield (
            f"--idle-by asks servers through the proxy, but {settings.url} is probably the Hub's own port: set"
            " --servers-url, on the Hub's machine usually to http://127.0.0.1:8000"
        )
    if not settings.cull_users and not (settings.user_timeout is None and settings.user_max_age is None):
        yield "--user-timeout and --user-max-age do nothing without --cull-users"
    is_loop = settings.changes_something and not settings.once
    if settings.warn_before and is_loop and settings.interval > settings.warn_before:
        yield (
            f"--cull-every {format_duration(settings.interval)} is longer than --warn-before"
            f" {format_duration(settings.warn_before)}: some servers will be stopped without a warning"
        )
    prefix = "CULL_IDLE_"
    known = [f"{prefix}{field.name.upper()}" for field in dataclasses.fields(Settings)]
    own = {f"{prefix}{name}" for name in NOTICE_VARIABLES}  # in the environment of a --notify command
    for name in sorted(os.environ):
        if name.startswith(prefix) and name not in known and name not in own:
            suggestion = f"; did you mean ${near}?" if (near := most_similar(name, known)) else ""
            yield f"${printable(name)} is not an option of this program{suggestion}"


def generate_config(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    """Print a TOML file with every option, its default and its help, commented out."""
    import json
    import textwrap

    if not wanted or ctx.resilient_parsing:  # which is completion
        return
    click.echo(
        "# Options of cull_idle.py. To set one, remove the # or ## before its name, and write a value in place of …"
    )
    click.echo("# The command line and variables win.")
    for field in dataclasses.fields(Settings):
        attrs = field.metadata
        if field.name == "config":
            continue
        click.echo("\n" + "\n".join(f"## {line}" for line in textwrap.wrap(attrs["help"], 100)))
        default = attrs.get("default")
        if attrs.get("multiple"):
            default = []
        elif attrs.get("is_flag"):
            default = False
        if default is None:
            click.echo(f"## {option_name(field.name)} = …")
        else:
            value = default if default in ("true", "false") else json.dumps(default)
            click.echo(f"# {option_name(field.name)} = {value}")
    ctx.exit()


def make_command(program: str = PROGRAM) -> click.Command:
    """The command line, from the fields of Settings."""
    params: list[click.Parameter] = []
    for field in dataclasses.fields(Settings):
        attrs = dict(field.metadata)
        names = [f"--{option_name(field.name)}", *attrs.pop("names")]
        variables = [f"CULL_IDLE_{field.name.upper()}", *attrs.pop("envvar", [])]
        params.append(GroupedOption(names, envvar=variables, **attrs))
    command = GroupedCommand(
        program,
        params=params,
        callback=stop_idle_servers,
        help="Stop the idle servers of a JupyterHub: once, or in a loop."
        " The API token comes from $JUPYTERHUB_API_TOKEN or --token-file.",
        epilog="A DURATION is a number of seconds, or like 90s, 15m, 1.5h, 1h30m, 2d, 1w. Each option is a variable,"
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
        help="Print a file for --config with every option, its default and its help, commented out, and exit.",
    )
    return click.version_option(__version__, prog_name=program, message="%(prog)s %(version)s")(generate(command))


def name_source(error: click.ClickException) -> None:
    """Let the sentence name the environment variable or the file that a bad value came from."""
    if isinstance(error, click.BadParameter) and error.ctx and error.param and error.param.name:
        source = error.ctx.get_parameter_source(error.param.name)
        if source is click.core.ParameterSource.ENVIRONMENT:
            error.param_hint = next(f"${name}" for name in error.param.envvar or () if os.environ.get(name))
        elif source is click.core.ParameterSource.DEFAULT_MAP:
            error.param_hint = f"{option_name(error.param.name)} in {error.ctx.params.get('config')}"


def open_null() -> TextIO:
    """A stream for what nobody can read."""
    return open(os.devnull, "w")


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    exit_code = run_command_line(args)
    try:
        sys.stderr.flush()
    except OSError:
        sys.stderr = open_null()  # or Python would try to write again at its end, and exit with 120
    return exit_code


def run_command_line(args: list[str] | None) -> int:
    """Run the command line, and turn each failure into a sentence; returns the exit code."""
    gc.set_threshold(10_000)  # pages make many objects and hardly any cycles
    atexit.register(gc.freeze)  # skips the search for cycles at the end: 0.05 s
    program = PROGRAM if args is not None else os.path.basename(sys.argv[0])
    sys.stdout, sys.stderr = sys.stdout or open_null(), sys.stderr or open_null()  # None if the caller has closed it
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if token := os.environ.get("JUPYTERHUB_API_TOKEN", "").strip():
        SECRETS.add(token)  # before an arbiter is loaded, which may quote it in an exception
    try:
        return int(make_command(program).main(args, program, standalone_mode=False))
    except click.ClickException as error:
        name_source(error)
        # click lists the empty text among the values of a boolean
        sentence, exit_code = error.format_message().replace("values: , ", "values: "), Exit.USAGE
    except (click.Abort, KeyboardInterrupt):
        sentence, exit_code = "interrupted", Exit.UNDONE
    except CullError as error:
        sentence, exit_code = str(error), error.exit_code
    except OSError as error:  # all others are handled where they happen; click ends the program if it is a closed pipe
        sys.stdout = open_null()  # or Python would try to write again at its end
        sentence, exit_code = f"stdout cannot be written: {error.strerror}", Exit.UNDONE
    with contextlib.suppress(OSError):  # on a full disk the exit code is all that can tell
        click.echo(f"{'<3>' if goes_to_journal() else ''}{program}: {sentence}", err=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
