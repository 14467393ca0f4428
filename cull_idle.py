#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["click>=8.4.1", "python-dateutil>=2.9", "requests>=2.32.2"]
# ///
"""Stop the idle servers of a JupyterHub through its REST API.

Polls the Hub's user list and stops every server whose last activity is older than a limit: once, or in a loop.
The API token comes from $JUPYTERHUB_API_TOKEN or --token-file, never from the command line.

    main ─ Settings ─ Loop ─ Pass: scan    Hub.users ─ parse_user ─ Target ─ Judge.decide ─ Verdict ─ Event
                                   fuse    --max-culls
                                   cull    Hub.look ─ Judge.decide (Asker.ask) ─ Hub.delete ─ Event
                                   report  Log, JSON, Notices, the table of a dry run

A Target is a server or a user, a Verdict what is decided about it and why, an Event what becomes of it.
"""

from __future__ import annotations

import sys

# What `pip install` needs. urllib3 comes with requests, but from 2.2 on it can read an answer in steps.
PACKAGES = ("click>=8.4.1", "python-dateutil>=2.9", "requests>=2.32.2", "urllib3>=2.2")


def what_is_missing() -> str:
    """A sentence that says what to install, empty if nothing is missing. It must run on Python 3.8."""
    if sys.version_info < (3, 11):  # noqa: UP036
        return f"cull_idle needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable})."
    install = f"pip install {' '.join(map(repr, PACKAGES))}"
    if sys.prefix != sys.base_prefix:  # in a virtual environment
        install = f"{sys.executable} -m {install}"
    else:  # pip often refuses to install into the system's Python
        install = f"{sys.executable} -m venv .venv && .venv/bin/{install}  # then run .venv/bin/python {sys.argv[0]}"
    try:
        import click
        import dateutil  # noqa: F401
        import requests  # noqa: F401
        import urllib3
    except ImportError:
        return f"cull_idle needs more packages: {install}"
    if not hasattr(click, "NoSuchCommand") or not hasattr(urllib3.HTTPResponse, "read1"):
        return f"cull_idle needs newer packages: {install}"  # click 8.4 has the one, urllib3 2.2 the other
    return ""


if WHAT_IS_MISSING := what_is_missing():
    sys.stderr.write(WHAT_IS_MISSING + "\n")
    sys.exit(2)

import asyncio
import atexit
import enum
import fnmatch
import importlib
import inspect
import json
import logging
import os
import queue
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import tomllib
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from functools import cache, partial
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeVar, get_args
from urllib.parse import quote, unquote, urlencode, urljoin, urlsplit

import click
import requests
from click import BadParameter
from click.core import ParameterSource
from dateutil.parser import isoparse
from requests.adapters import HTTPAdapter
from urllib3 import exceptions

__version__ = "0.2.0"

PROGRAM = "cull_idle.py"

T = TypeVar("T")

# ---- Errors and text


class Exit(enum.IntEnum):
    """The exit codes."""

    DONE = 0  # all that was due is done; nothing due is fine
    UNDONE = 1  # something due was not done
    USAGE = 2  # an option or the token is wrong
    NO_HUB = 3  # the Hub could not be used


class CullError(Exception):
    """A failure. Its text is the sentence that the administrator reads."""

    def __init__(self, sentence: str, exit_code: Exit = Exit.NO_HUB) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code  # of a pass that ends with it


class RequestError(CullError):
    """A request failed, or what it answered cannot be used. refused: the token may not do this, so the pass ends."""

    def __init__(self, sentence: str, *, refused: bool = False) -> None:
        super().__init__(sentence)
        self.refused = refused

    @property
    def kind(self) -> str:
        """The sentence without the name of a user and the Hub's words: one kind is reported once and counted."""
        return re.sub(r" \(.*\)", "", re.sub(r"/users/[^ :]+", "/users/…", str(self)))


class UnansweredError(RequestError):
    """No other request would be answered now. pause: another try may help in so many seconds; None if not."""

    def __init__(self, sentence: str, pause: float | None = None) -> None:
        super().__init__(sentence)
        self.pause = pause


class TooMuchError(RequestError):
    """An answer is too large, or nested too deeply, to be parsed. A smaller page may work."""


LONGEST_TEXT = 520  # characters of a name or message that one line shows; user and server have up to 255 each
SECRETS: set[str] = set()  # tokens that were read; nothing that is shown may contain them


def printable(text: str, width: int = LONGEST_TEXT) -> str:
    """Make a text from outside safe to show: tokens replaced, cut to `width` characters, escaped.

    All that comes from the Hub, a server or a user passes through here before it is logged or printed.
    """
    for secret in SECRETS:
        text = text.replace(secret, "…")
    text = text if len(text) <= width else text[: width - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, width: int = 200) -> str:
    """Make a message from outside safe to show, on one line and with single spaces."""
    return printable(" ".join(text.split()), width)


# ---- Durations and times

ZERO = timedelta(0)
NEVER = timedelta.max
LONGEST = timedelta(days=36525)  # a century; a date plus any duration but NEVER is a date
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
SECONDS = rf"{NUMBER}(?:e\+?[0-9]+)?"  # Helm writes large numbers as 1.2096e+06
UNITS = {
    "weeks": ("w(?:eeks?)?", 604800),
    "days": ("d(?:ays?)?", 86400),
    "hours": ("h(?:(?:ou)?rs?)?", 3600),
    "minutes": ("m(?:in(?:ute)?s?)?", 60),
    "seconds": ("s(?:ec(?:ond)?s?)?", 1),
}
DURATION = r"\s*".join(rf"(?:(?P<{name}>{NUMBER})\s*{unit})?" for name, (unit, _) in UNITS.items())


def parse_duration(text: str) -> timedelta:
    """Read seconds (`3600`), or numbers with units (`90s`, `1.5h`, `1h30m`, `2d`, `1w`). Raises BadParameter."""
    if "M" in text:
        raise BadParameter(f"{one_line(text, 40)!r} is not a duration: some read M as months; write m for minutes.")
    words = text.lower().strip()
    if not (match := re.fullmatch(f"(?P<bare>{SECONDS})|{DURATION}", words)) or not words:
        hint = "write seconds, or numbers with units, such as 90s, 15m, 1.5h, 1h30m, 2d or 1w"
        raise BadParameter(f"{one_line(text, 40)!r} is not a duration: {hint}.")
    numbers = {name: float(number) for name, number in match.groupdict(default="0").items()}
    seconds = numbers.pop("bare") + sum(number * UNITS[name][1] for name, number in numbers.items())
    if seconds > LONGEST.total_seconds():
        raise BadParameter(f"{one_line(text, 40)!r} is too long a duration.")
    return timedelta(seconds=seconds)


def parse_limit(text: str) -> timedelta:
    """Read a duration, or `never` as NEVER. Raises BadParameter like parse_duration."""
    return NEVER if text.lower() == "never" else parse_duration(text)


def format_duration(duration: timedelta, units: int = 4) -> str:
    """Write a duration the way parse_duration reads it (`2h03m`, `1d04h`), cut to whole seconds and `units` units."""
    minutes, seconds = divmod(int(duration.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours // 24}d{hours % 24:02}h{minutes:02}m{seconds:02}s"
    text = re.sub("^(0+[dhm])+", "", text)  # without the units that are 0 at the start, and below at the end
    text = "".join(re.findall("[0-9]+[dhms]", text)[:units])
    return re.sub("^0(?=[0-9])|(?<=[dhm])(00[hms])+$", "", text)


def short(duration: timedelta) -> str:
    """The two largest units of a duration, enough for a log line: `2h03m`."""
    return format_duration(duration, units=2)


def parse_time(text: object) -> datetime | None:
    """Read a timestamp of the Hub's, in UTC. null is None; one without a zone is in UTC (Hubs before 0.9).

    Raises ValueError for anything else, also for a date without a time of day, which could be off by a day.
    """
    if text is None:
        return None
    try:
        if not isinstance(text, str) or len(text) <= len("2026-11-22"):
            raise ValueError
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            moment = isoparse(text)  # slower, but reads more of ISO 8601
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{one_line(str(text), 40)!r} is not a time") from None


def format_time(moment: datetime) -> str:
    """Write a moment for programs: `2026-11-22T20:14:03Z`."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def parse_http_date(text: str | None) -> datetime | None:
    """Read a Date header. None if it is missing, garbage, or of a far future."""
    with suppress(ValueError, OverflowError):
        moment = parsedate_to_datetime(text or "")
        if moment.year < 3000:
            return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return None


class Clock:
    """The Hub's clock, by the Date headers of a pass. The earliest reading counts.

    So one answer from a clock that is ahead cannot make an active server look idle. Looks before a DELETE count.
    """

    def __init__(self) -> None:
        self._zero: datetime | None = None  # the Hub's time when monotonic() was 0

    def read(self, date: str | None, requested: float) -> None:
        """Take a Date header as a reading. requested: monotonic() when its answer was requested."""
        if moment := parse_http_date(date):
            zero = moment - timedelta(seconds=requested)
            self._zero = zero if self._zero is None else min(zero, self._zero)

    def now(self) -> datetime:
        """The Hub's time, or that of this machine if no answer had a date."""
        return self._zero + timedelta(seconds=monotonic()) if self._zero else datetime.now(UTC)

    @property
    def difference(self) -> str:
        """How far it is from the clock of this machine: `2h00m ahead of this machine's`. Empty below 2 seconds."""
        ahead = timedelta(seconds=round((self.now() - datetime.now(UTC)).total_seconds()))
        how = "ahead of" if ahead > ZERO else "behind"
        return f"{short(abs(ahead))} {how} this machine's" if abs(ahead) >= timedelta(seconds=2) else ""


# ---- Servers and users: the Hub's JSON as typed values

Key = tuple[str, str | None]  # the names of a user and of a server, or None for the user
# Who says when a server was last active, as words for a log line; nothing for the Hub.
SERVER, KERNEL, TERMINAL = ", says the server", ", say its kernels", ", say its terminals"
BUSY_KERNEL = ", says a busy kernel"


@dataclass(slots=True)
class Target:
    """A server that the Hub does not list as stopped, or a user. Never changed once it is parsed."""

    user: str
    server: str | None  # empty for the default server, None for a user
    born: datetime | None = None  # when the server was started or the user created; unknown before JupyterHub 0.9
    active: datetime | None = None  # the last activity
    ready: bool = False  # True for a user
    pending: str = ""  # what the Hub is doing with a server ("spawn", "stop")
    admin: bool = False
    doubt: str = ""  # what in the Hub's answer cannot be understood
    misleading: bool = False  # a path with this server's name could lead to something else
    source: str = ""  # who says `active`
    model: Mapping[str, Any] = field(default_factory=dict)  # as the Hub sent it
    user_model: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The Hub's name for it, safe to print: `ann`, `ann/gpu` for a named server, `user ann` for a user."""
        if self.is_user:
            return f"user {printable(self.user)}"
        return printable(f"{self.user}/{self.server}" if self.server else self.user)

    @property
    def is_user(self) -> bool:
        """False for a server."""
        return self.server is None

    @property
    def key(self) -> Key:
        """What tells it from all others."""
        return self.user, self.server

    def without_models(self) -> Target:
        """The same without the Hub's JSON, which may be large."""
        return replace(self, model={}, user_model={})


def parse_user(model: Any) -> list[Target]:
    """Turn a user model of the REST API, of any Hub since 0.6, into the user and the servers that are not stopped.

    The user comes first. A field that is missing or malformed becomes a `doubt`. Raises ValueError only for a model
    without a name. https://jupyterhub.readthedocs.io/en/stable/reference/rest-api.html#/default/get_users
    """
    servers = parse_servers(model)
    admin = model.get("admin")
    created, active, doubt = parse_times(model, "created")
    if "last_activity" not in model:
        doubt = "its last_activity is not shown; the token needs the scope read:users:activity"
    elif not isinstance(admin, bool):
        doubt = doubt or "the Hub does not say whether the user is an admin"
    user = Target(model["name"], None, created, active, True, admin=admin is True, doubt=doubt)
    user.model = user.user_model = model
    return [user, *servers]


def parse_times(model: Mapping[str, Any], birth: str) -> tuple[datetime | None, datetime | None, str]:
    """When a server or user was born (`started`, `created`) and last active, and what is in doubt about that."""
    try:
        born = parse_time(model.get(birth))
        active = parse_time(model.get("last_activity")) or born  # null until the first activity
    except ValueError as error:
        return None, None, f"{birth} or last_activity: {error}"
    return born, active, "" if active else f"neither last_activity nor {birth} is known"


def name_of(model: object) -> str:
    """The name in a user model; empty if there is none."""
    name = model.get("name") if isinstance(model, dict) else None
    return name if isinstance(name, str) else ""


def parse_servers(user: Any) -> list[Target]:
    """Turn the servers in a user model into values. Raises ValueError as parse_user does."""
    if not name_of(user):
        raise ValueError("answered a user without a name")
    servers = user.get("servers")
    if isinstance(servers, dict):
        if "" not in servers and user.get("pending"):
            # JupyterHub 0.8 with named servers lists only ready ones; `pending` of the user is the default server's.
            servers = {**servers, "": {}}
    elif "servers" not in user and "server" in user and "created" not in user:
        # JupyterHub 0.6 to 0.8 without named servers: the user's own keys describe the default server.
        servers = {"": {"url": user["server"]}} if user["server"] or user.get("pending") else {}
    else:
        return [Target(user["name"], "", doubt="its servers are not shown; the token needs the scope read:servers")]
    return [
        parse_server(name, server, user)
        for name, server in servers.items()
        if not (isinstance(server, dict) and server.get("stopped") is True)
    ]


SERVER_KEYS = frozenset(("last_activity", "ready", "pending"))  # that a server's model has had since JupyterHub 0.9


def parse_server(name: str, model: Any, user: Mapping[str, Any]) -> Target:
    """Turn a server model, with the user model around it, into values."""
    if not isinstance(model, dict):
        return Target(user["name"], name, doubt="its model is not a JSON object")
    if model.keys().isdisjoint(SERVER_KEYS):
        # JupyterHub 0.6 to 0.8: `url` is set once the server is ready; all else is known of the user only.
        model = {**model, **{key: user.get(key) for key in SERVER_KEYS}, "ready": bool(model.get("url"))}
    started, active, doubt = parse_times(model, "started")
    ready = model.get("ready")
    pending = str(model.get("pending") or "")
    if missing := SERVER_KEYS.difference(model):
        doubt = f"{min(missing)} is missing"
    elif not isinstance(ready, bool):
        doubt = doubt or "ready is neither true nor false"
    server = Target(user["name"], name, started, active, ready is True and not doubt, pending, doubt=doubt)
    server.misleading = leads_elsewhere(name, user.get("servers") or ())
    server.model = model
    server.user_model = user
    return server


def leads_elsewhere(name: str, others: Iterable[str]) -> bool:
    """True if a proxy that decodes paths could take a path with this server's name for another one.

    For example, `DELETE /users/ann/servers/%2e%2e` deletes ann. JupyterHub 6 takes safe names only, Hubs up to 5 any.
    """
    if name.isalnum() or not name:  # the default server's path has no name in it
        return False
    for text in (name, unquote(name), unquote(unquote(name))):
        path = re.split(r"[?#]", text, maxsplit=1)[0]
        if not re.sub(r"[\0- .]", "", path) or "/" in path or "\\" in path or (path != name and path in others):
            return True
    return False


def find(targets: Sequence[Target], server: str | None) -> Target | None:
    """The user (for None) or server among the targets of parse_user. None only if it is surely gone.

    If a server is missing, any server in doubt is returned, which may be that one.
    """
    found = next((target for target in targets if target.server == server), None)
    return found or next((target for target in targets[1:] if target.doubt), None)


# ---- Decisions: pure, from a server or user, a policy and the Hub's clock


class Limit(NamedTuple):
    """How long until something is due."""

    of: Literal["idle", "age"]
    duration: timedelta  # NEVER for none
    by: str = ""  # the rule that says so: ` by rule 2: group=gpu timeout=30m`

    def __str__(self) -> str:
        return ("no limit" if self.duration == NEVER else f"limit {format_duration(self.duration)}") + self.by


class Policy(NamedTuple):
    """What makes a server, or a user, due."""

    timeout: Limit
    max_age: Limit
    keep: str = ""  # why it is kept whatever the limits are: an option, or a rule with `keep`


@dataclass(slots=True)
class Verdict:
    """Whether to cull, and why."""

    cull: bool
    idle: timedelta | None = None
    age: timedelta | None = None
    limit: Limit | None = None  # that decided, reached or not
    why: str = ""  # the reason in words, if no limit decided
    in_doubt: bool = False  # kept only because something is not understood
    source: str = ""  # who says how long it is idle

    @property
    def reason(self) -> str:
        """The reason as a log line shows it: `idle 2h03m, limit 1h, say its kernels`."""
        if not self.limit:
            return self.why
        if self.source == BUSY_KERNEL and not self.cull:
            return "kernel busy"
        lasted = self.idle if self.limit.of == "idle" else self.age
        return f"{self.limit.of} {short(lasted or ZERO)}, {self.limit}{self.source}"

    def keep_in_doubt(self, why: str) -> Verdict:
        """The same figures, but kept, because this is not understood."""
        return replace(self, cull=False, limit=None, why=why, in_doubt=True)


def why_not_ready(target: Target) -> str:
    """Why a server is not to be stopped now, empty if it may be."""
    if target.pending:
        return f"pending {one_line(target.pending, 20)}"
    return "" if target.ready else "not ready"


def judge(target: Target, policy: Policy, now: datetime) -> Verdict:
    """Decide about a server or user, at `now` by the Hub's clock. In doubt it is kept. A time in the future is now."""
    if target.doubt or target.active is None:
        return Verdict(False, why=target.doubt, in_doubt=True)
    idle = max(now - target.active, ZERO)
    age = None if target.born is None else max(now - target.born, ZERO)
    if why := why_not_ready(target) or policy.keep:
        return Verdict(False, idle, age, why=why)
    if idle >= policy.timeout.duration:
        return Verdict(True, idle, age, policy.timeout, source=target.source)
    if age is not None and age >= policy.max_age.duration:
        return Verdict(True, idle, age, policy.max_age)
    return Verdict(False, idle, age, policy.timeout, source=target.source)


# ---- Rules: exceptions for some servers and users


class RuleField(NamedTuple):
    """What a rule can match, and where the Hub shows it."""

    model_key: str  # in the Hub's model of the user or server; empty for a server's name, which old Hubs leave out
    scope: str  # that the token needs to see it
    of_server: bool = False


RULE_FIELDS = {
    "user": RuleField("name", "list:users"),
    "group": RuleField("groups", "read:users:groups"),
    "server": RuleField("", "read:servers", of_server=True),
    "admin": RuleField("admin", "list:users"),
    "option": RuleField("user_options", "read:servers", of_server=True),
    "state": RuleField("state", "admin:server_state", of_server=True),
}
RULE_WORD = re.compile(r"(user|group|server|admin|(?:option|state)\.[^=]+|timeout|max[-_]age)=(.*)", re.DOTALL)
RULE_HELP = (
    "a rule has matches (user=, group=, server=, admin=, option.KEY=, state.KEY=) and timeout=, max-age= or keep"
)


class Match(NamedTuple):
    """A condition of a rule."""

    name: str  # as it is written: `group`, `option.profile`
    field: RuleField
    key: str  # after the dot
    glob: re.Pattern[str]

    def values(self, target: Target) -> list[str]:
        """The texts that the glob may match. Raises CullError if the Hub does not show them: a guess could cull."""
        field = self.field
        value: Any = target.server
        if field.model_key:
            value = (target.model if field.of_server else target.user_model).get(field.model_key)
        if value is None or (self.key and not isinstance(value, dict)):
            remedy = f"the token needs the scope {field.scope}, or the Hub is too old"
            raise CullError(f"a rule matches {self.name}=, but the Hub does not show it for {target}: {remedy}")
        value = value.get(self.key) if self.key else value
        values = value if isinstance(value, list) else [value]
        known = [each for each in values if isinstance(each, (str, int, float))]
        return [each if isinstance(each, str) else json.dumps(each) for each in known]

    def holds(self, target: Target) -> bool:
        """True if the glob matches one of the values. Raises CullError."""
        return any(map(self.glob.match, self.values(target)))


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

    def applies(self, target: Target) -> bool:
        """True if all matches hold. Raises CullError if the Hub does not show what a rule matches."""
        return all(match.holds(target) for match in self.matches)

    def change(self, policy: Policy, number: int) -> Policy:
        """The policy with what the rule sets. `number`, from 1, is for messages."""
        by = f" by rule {number}: {self.text}"
        if self.keep:
            return Policy(Limit("idle", NEVER, by), Limit("age", NEVER, by), policy.keep or by.removeprefix(" by "))
        if self.timeout is not None:
            policy = policy._replace(timeout=Limit("idle", self.timeout, by))
        if self.max_age is not None:
            policy = policy._replace(max_age=Limit("age", self.max_age or NEVER, by))
        return policy


def split_words(text: str) -> list[str]:
    """Split a text like a shell. Raises BadParameter."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadParameter(f"{one_line(text)!r}: {error}.") from None


def parse_rule(text: str) -> Rule:
    """Read `MATCH… SETTING…`, words as in a shell. Raises BadParameter, which names the wrong word."""
    if re.search("[\ud800-\udfff]", text):  # it would match no name
        raise BadParameter(f"{one_line(text)!r} is not UTF-8.")
    matches: list[Match] = []
    limits: dict[str, timedelta] = {}
    words = split_words(text)
    for word in words:
        found = RULE_WORD.fullmatch(word)
        if word == "keep":
            continue
        if not found or found[1].replace("_", "-") in limits:
            raise BadParameter(f"{one_line(word)!r} in {one_line(text)!r} is not understood: {RULE_HELP}.")
        name, value = found.groups()
        field, _, key = name.partition(".")
        if field not in RULE_FIELDS:
            limits[name.replace("_", "-")] = parse_limit(value)
        elif field == "admin" and value not in ("true", "false"):
            raise BadParameter(f"{one_line(word)!r}: admin= is true or false.")
        else:
            matches.append(Match(name, RULE_FIELDS[field], key, re.compile(fnmatch.translate(value))))
    keep = "keep" in words
    if keep and limits:
        raise BadParameter(f"{one_line(text)!r} has both keep and a limit, but keep means no limit: leave one out.")
    if not keep and not limits:
        raise BadParameter(f"{one_line(text)!r} sets nothing: put quotes around the whole rule; {RULE_HELP}.")
    return Rule(printable(text), tuple(matches), limits.get("timeout"), limits.get("max-age"), keep)


# ---- The arbiter: the administrator's own decision in place of the timeout

ARBITER_ARGUMENTS = frozenset(("inactive", "inactive_limit", "server", "user"))


class Arbiter(NamedTuple):
    """A function, plain or async, that says whether to cull a server."""

    function: Callable[..., object]
    arguments: frozenset[str]  # those of ARBITER_ARGUMENTS that it takes

    def decide(self, server: Target, verdict: Verdict, timeout: timedelta) -> Verdict:
        """The arbiter's verdict, made of one that does not count the timeout. If it fails, the server is kept."""
        arguments = {
            "inactive": verdict.idle,
            "inactive_limit": timeout.total_seconds(),  # not a timedelta: as in jupyterhub-idle-culler
            "server": server.model,
            "user": server.user_model,
        }
        try:
            with calling_arbiter:
                answer = self.function(**{name: value for name, value in arguments.items() if name in self.arguments})
                if inspect.isawaitable(answer):
                    answer = arbiter_loop().run(wait_for(answer))
            says = one_line(repr(answer), 40)
        except BaseException as error:  # whatever the administrator's function raises; stop_signals handles Ctrl-C
            why = f"the arbiter failed: {one_line(traceback.format_exception_only(error)[-1].strip())}"
            return verdict.keep_in_doubt(why)
        if says not in ("True", "False", "None", "np.True_", "np.False_"):  # numpy has booleans of its own
            return verdict.keep_in_doubt(f"the arbiter returned {says}, which is neither true nor false")
        cull = "True" in says
        why = f"the arbiter says {'cull' if cull else 'keep'}, idle {short(verdict.idle or ZERO)}"
        return replace(verdict, cull=cull, limit=None, why=why)


calling_arbiter = threading.Lock()  # its author need not think of threads


async def wait_for(answer: Any) -> object:
    """Wait for any awaitable."""
    return await answer


@cache
def arbiter_loop() -> asyncio.Runner:
    """One event loop for all calls, so that an arbiter may keep a lock or a session between them."""
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


def load_arbiter(name: str) -> Arbiter:
    """Load `MODULE:FUNC` or `FILE.py:FUNC`. Raises BadParameter if that fails."""
    source, _, function_name = name.rpartition(":")
    if not source or not function_name:
        raise BadParameter(f"{name!r} names no function: write MODULE:FUNC or FILE.py:FUNC.")
    config = SimpleNamespace(IdleCuller=SimpleNamespace())
    try:
        if source.endswith(".py"):
            # Config files of jupyterhub-idle-culler say `c = get_config()` and `c.IdleCuller.cull_arbiter_hook = …`
            names = {"c": config, "get_config": lambda: config}
            module: Any = SimpleNamespace(**runpy.run_path(source, names, "cull_idle_arbiter"))
        else:
            module = importlib.import_module(source)
        function = getattr(module, function_name)
        parameters = inspect.signature(function).parameters
        others = sorted(vars(config.IdleCuller).keys() - {"cull_arbiter_hook"})
    except (Exception, SystemExit) as error:  # whatever the administrator's module raises
        raise BadParameter(f"{name!r} cannot be loaded: {type(error).__name__}: {one_line(str(error))}.") from None
    if others:
        raise BadParameter(f"{name!r} sets c.IdleCuller.{others[0]}, which has no effect here: use the option instead.")
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    if unknown := [] if takes_all else [each for each in required if each not in ARBITER_ARGUMENTS]:
        known = f"only these are passed: {', '.join(sorted(ARBITER_ARGUMENTS))}"
        raise BadParameter(f"{name!r} has an argument {unknown[0]!r}, but {known}.")
    return Arbiter(function, ARBITER_ARGUMENTS if takes_all else ARBITER_ARGUMENTS & parameters.keys())


# ---- Settings: each option is declared once, as a field of Settings

# Which last activity of a server counts: the Hub's, the later of the Hub's and the server's own, the server's own, that
# of its kernels and terminals.
IdleBy = Literal["hub", "both", "server", "kernels"]


class Fuse(NamedTuple):
    """How much one pass may cull (--max-culls)."""

    most: float
    percent: str  # `%` for a part of the ready servers, and of the users

    def blown(self, what: str, due: int, total: int) -> str:
        """A sentence if more are due, else empty. `what`: servers or users; `total`: how many there are."""
        if due <= (self.most * total / 100 if self.percent else self.most):
            return ""
        fuse = f"--max-culls is {self.most:g}{self.percent}"
        return f"nothing is culled, because {due} of {total} {what} are due and {fuse}; raise it if they should go"


def parse_fuse(text: str) -> Fuse:
    """Read a number or a percentage. Raises BadParameter."""
    match = re.fullmatch(rf"([0-9]+)|({NUMBER})%", text)
    if not match or float(match[2] or 0) > 100:
        raise BadParameter(f"{one_line(text, 40)!r} is neither a number, such as 20, nor 0% to 100%.")
    return Fuse(float(match[1] or match[2]), "%" if match[2] else "")


def parse_command(text: str) -> tuple[str, ...]:
    """Split a command like a shell. Raises BadParameter if that fails, or its program does not exist."""
    words = tuple(split_words(text))
    if not words or not shutil.which(words[0]):
        program = one_line(words[0] if words else text)
        raise BadParameter(f"{program!r} is not a program that can be run: is it executable, and on the $PATH?")
    return words


def parse_path(text: str) -> str:
    """A path. Raises BadParameter, also if it is empty, as that of an unset variable."""
    if not text or "\0" in text:
        raise BadParameter("that is not a path.")
    return text


def parse_explained(text: str) -> str:
    """The name of a server or user to explain. Raises BadParameter, also for an option in its place."""
    if text.startswith(("-", "/")) or not text:
        raise BadParameter("write USER, or USER/SERVER for a named server.")
    return text


def parse_url(text: str) -> str:
    """Check an address as far as that is possible without a request. Raises BadParameter."""
    if text.startswith("http+unix:"):
        raise BadParameter(f"{one_line(text)!r} is a unix socket, which is not supported: give the Hub a port.")
    if re.search("[@?#]", text):  # not shown: it may hold a token
        raise BadParameter("the URL of a Hub has no user, no password, no ? and no #.")
    usable = re.fullmatch("(?i)https?://[!-~]+", text)  # printable ASCII without spaces
    with suppress(ValueError):
        url = urlsplit(text)
        if usable and url.hostname and url.port != 0:
            return url.geturl().rstrip("/")  # with the scheme in lower case
    raise BadParameter(f"{one_line(text)!r} is not a URL: write http:// or https://, then a host.")


class RuleType(click.types.FuncParamType):  # type: ignore[type-arg]
    """Rules in a variable are separated by semicolons, because they have spaces in them."""

    envvar_list_splitter = ";"


def read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Take defaults from a TOML file whose keys are the names of options."""
    if path is not None:
        try:
            ctx.default_map = config_values(path)
        except (OSError, ValueError) as error:
            why = f" cannot be read: {error.strerror}." if isinstance(error, OSError) else error
            raise BadParameter(f"{path}{why}", ctx, param) from None
    return path


def config_values(path: str) -> dict[str, Any]:
    """The values in a config file, by the names of fields. Raises OSError, ValueError with the rest of a sentence."""
    hint = ""
    try:
        with open(path, encoding="utf-8-sig") as file:  # without a byte order mark
            text = file.read()
        if re.search(r"^(c\b|from |import |(async )?def |@)", text, re.MULTILINE):
            hint = f"; a Python file of jupyterhub-idle-culler is not read: use options and --arbiter {path}:NAME"
        values = {key.replace("-", "_"): value for key, value in tomllib.loads(text).items()}
    except (ValueError, RecursionError) as error:
        quotes = '; texts and durations need quotes, such as timeout = "1h"'
        raise ValueError(f" is not TOML: {one_line(str(error))}{hint or quotes}.") from None
    types = {each.name: each.metadata["type"] for each in fields(Settings) if each.name != "config"}
    for name, value in values.items():
        key = one_line(name.replace("_", "-"), 40)
        if isinstance(value, dict) and not hint:
            raise ValueError(f": [{key}] is a section, but this file has no sections.")
        if name not in types:
            for near in get_close_matches(name, types, 1):
                hint = f"; did you mean {near.replace('_', '-')}?"
            raise ValueError(f": {key!r} is not an option{hint}")
        is_path = types[name] is parse_path
        if (is_path and not isinstance(value, str)) or (isinstance(value, bool) and types[name] not in (bool, None)):
            raise ValueError(f": {key} must be a text in quotes.")
        if name == "rule":
            values[name] = [str(each) for each in (value if isinstance(value, list) else [value])]
        elif not isinstance(value, bool):
            values[name] = str(value)
    return values


METAVARS: Mapping[Any, str] = {
    parse_duration: "DURATION",
    parse_limit: "DURATION|never",
    parse_path: "FILE",
    parse_url: "URL",
    parse_fuse: "N|N%",
    parse_command: "COMMAND",
    parse_explained: "USER[/SERVER]",
    load_arbiter: "MODULE:FUNC|FILE.py:FUNC",
}


def option(read: Any, help: str, default: Any = None, *names: str, **attrs: Any) -> Any:
    """A field that becomes the option --NAME and the variable $CULL_IDLE_NAME; `attrs` as of click.Option.

    read: click's type, or a function that reads the text and raises BadParameter.
    """
    attrs.setdefault("metavar", METAVARS.get(read))
    return field(metadata={"type": read, "help": help, "default": default, "names": names, **attrs})


def boolean(help: str, default: str) -> Any:
    """A field that is an option with or without a value: --option or --option=BOOL."""
    return option(bool, help, default, is_flag=False, flag_value="true", metavar="[=BOOL]")


def switch(help: str, *names: str) -> Any:
    """A field that is an option without a value."""
    return option(None, help, False, *names, is_flag=True)


LEVELS = click.Choice(["debug", "info", "warning", "error", "critical"], case_sensitive=False)
IDLE_BY = click.Choice(["hub", "both", "server", "kernels"], case_sensitive=False)
REQUEST_TIMEOUT = "JUPYTERHUB_REQUEST_TIMEOUT"
API_URL = "http://127.0.0.1:8081/hub/api"
STORAGE = "On Kubernetes this deletes storage, too (KubeSpawner.delete_pvc)."
HEADINGS = {"timeout": "What to cull", "dry_run": "When", "url": "The Hub", "verbose": "Output"}


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """Everything that the command line, the environment, the config file and the defaults decide."""

    timeout: timedelta = option(parse_limit, "Stop servers idle for at least this long; 0 stops every one.", "10m")
    max_age: timedelta = option(parse_limit, "Stop servers of this age, even active ones; 0 is never.", "never")
    idle_by: IdleBy = option(
        IDLE_BY,
        "Whose word about a server's last activity counts: the Hub's, which is late and does not see busy kernels; the"
        " later of the Hub's and the server's; the server's; that of its kernels and terminals. All but `hub` need the"
        " scope tokens.",
        "hub",
        metavar="hub|both|server|kernels",
    )
    rule: tuple[Rule, ...] = option(
        RuleType(parse_rule),
        "An exception, such as 'group=gpu timeout=30m' or 'user=svc-* keep'; may be repeated, the first that matches"
        " applies. Globs match user, group, server, admin, option.KEY, state.KEY.",
        multiple=True,
        metavar="RULE",
    )
    cull_default_servers: bool = boolean("Cull default servers.", "true")
    cull_named_servers: bool = boolean("Cull named servers.", "true")
    remove_named_servers: bool = boolean(f"Also remove a named server once it is stopped. {STORAGE}", "false")
    cull_users: bool = boolean(f"Also delete idle users; needs --timeout or --user-timeout. {STORAGE}", "false")
    cull_admin_users: bool = boolean("Let --cull-users delete admins too.", "true")
    user_timeout: timedelta | None = option(parse_limit, "Delete users idle for this long.  [default: --timeout]")
    user_max_age: timedelta | None = option(parse_limit, "Delete users of this age; 0 is never.  [default: --max-age]")
    max_culls: Fuse | None = option(parse_fuse, "A fuse: if more servers, or users, are due, a pass stops nothing.")
    arbiter: Arbiter | None = option(load_arbiter, "A function of your own that decides in place of --timeout.")

    dry_run: bool = switch("Show what would be culled, change nothing, and exit; with -v also show what is kept.")
    once: bool = switch("Make one pass, then exit.")
    cull_every: timedelta | None = option(parse_duration, "Time between two passes.  [default: half of the limit]")
    explain: str | None = option(parse_explained, "Explain the decision about a default server, or a named one.")

    url: str = option(parse_url, "The Hub's API; $JUPYTERHUB_API_URL if set.", API_URL, envvar=["JUPYTERHUB_API_URL"])
    token_file: str | None = option(parse_path, "Read the token from this file, not from $JUPYTERHUB_API_TOKEN.")
    servers_url: str | None = option(parse_url, "Where --idle-by asks servers: their URL up to /user/.")
    concurrency: int = option(click.IntRange(1, 1000), "Requests in flight at the same time.", "10", metavar="N")
    api_page_size: int = option(click.IntRange(min=0), "Users per page; 0 leaves it to the Hub.", "200", metavar="N")
    request_timeout: timedelta = option(parse_duration, "Time for one request.", "1m", envvar=[REQUEST_TIMEOUT])
    ssl_enabled: bool = boolean("Use the client certificates of internal_ssl; $JUPYTERHUB_SSL_… come first.", "false")
    internal_certs_location: str = option(parse_path, "Directory of the internal_ssl certificates.", "internal-ssl")

    verbose: bool = switch("Also say what is kept, and why.", "-v")
    quiet: bool = switch("Say nothing unless something fails.", "-q")
    log_level: str | None = option(LEVELS, f"How much to log: {', '.join(LEVELS.choices)}.  [default: info]")
    json: bool = switch("Print events as JSON Lines.")
    warn_before: timedelta | None = option(parse_duration, "Report servers that will be due within this time.")
    notify: tuple[str, ...] | None = option(parse_command, "Run this for each event, with its JSON on standard input.")
    metrics_file: str | None = option(parse_path, "Write metrics for node_exporter's textfile collector.")
    config: str | None = option(parse_path, "Take defaults from this TOML file.", is_eager=True, callback=read_config)

    @property
    def level(self) -> str:
        """The level of the log."""
        usual = "error" if self.quiet else "info"
        return self.log_level or ("debug" if self.verbose else usual)

    @property
    def changes_something(self) -> bool:
        """False if the program only looks."""
        return not self.dry_run and self.explain is None

    @property
    def asks_while_scanning(self) -> bool:
        """True if the scan asks servers, because the Hub's word does not count."""
        return self.idle_by in ("server", "kernels")

    @property
    def servers_root(self) -> str:
        """What comes before /user/… in the address of a server whose full address the Hub does not tell."""
        public = os.getenv("JUPYTERHUB_PUBLIC_HUB_URL", "").strip().rstrip("/").removesuffix("/hub")
        return self.servers_url or public or self.url.removesuffix("/hub/api")

    @property
    def interval(self) -> timedelta:
        """By default half of the shortest limit, or 5 minutes if there is none; no longer than --warn-before."""
        limits = [self.timeout, self.max_age, *(limit for rule in self.rule for limit in (rule.timeout, rule.max_age))]
        if self.cull_users:
            limits += [self.user_timeout, self.user_max_age]
        halves = [limit / 2 for limit in limits if limit and limit < NEVER]
        interval = min(halves, default=timedelta(minutes=5))
        # 0 is the default, as in jupyterhub-idle-culler before 2.0.
        return max(self.cull_every or min(interval, self.warn_before or interval), timedelta(seconds=1))

    @property
    def client_certificate(self) -> Sequence[str]:
        """Paths of the key and certificate that a Hub with internal_ssl wants, and of its authority; else empty."""
        from_hub = [os.getenv(f"JUPYTERHUB_SSL_{name}", "") for name in ("KEYFILE", "CERTFILE", "CLIENT_CA")]
        if all(from_hub) or not self.ssl_enabled:
            return from_hub if all(from_hub) else ()
        base = f"{self.internal_certs_location}/hub-internal/hub-internal"
        return f"{base}.key", f"{base}.crt", f"{self.internal_certs_location}/hub-ca/hub-ca.crt"


# ---- The judge: options, rules and arbiter together


class Judge:
    """Decides by options, rules and arbiter. Raises CullError if the Hub does not show what a rule matches."""

    def __init__(self, settings: Settings) -> None:
        self.rules = list(enumerate(settings.rule, 1))  # with their numbers
        self.unused = dict(self.rules)  # those that have applied to nobody
        self._settings = settings
        limits = Limit("idle", settings.timeout), Limit("age", settings.max_age or NEVER)
        self._default = Policy(*limits, "" if settings.cull_default_servers else "default servers are not culled")
        self._named = Policy(*limits, "" if settings.cull_named_servers else "named servers are not culled")
        timeout = settings.timeout if settings.user_timeout is None else settings.user_timeout
        max_age = settings.max_age if settings.user_max_age is None else settings.user_max_age
        limits = Limit("idle", timeout), Limit("age", max_age or NEVER)
        self._users = Policy(*limits)
        self._admins = Policy(*limits, "" if settings.cull_admin_users else "admins are not deleted")

    def policy(self, target: Target) -> Policy:
        """The policy for a server or user: that of the options, changed by the first rule that applies."""
        if target.is_user:
            policy = self._admins if target.admin else self._users
        else:
            policy = self._named if target.server else self._default
        if target.doubt:  # kept in any case, and its model may lack what a rule matches
            return policy
        for number, rule in self.rules:
            if (rule.for_users or not target.is_user) and rule.applies(target):
                self.unused.pop(number, None)
                # Of a rule only `keep` counts for users: its limits are for servers. But no later rule applies.
                return policy if target.is_user and not rule.keep else rule.change(policy, number)
        return policy

    def decide(self, target: Target, now: datetime) -> Verdict:
        """Decide about a server or user, at `now` by the Hub's clock."""
        policy = self.policy(target)
        if not (arbiter := self._settings.arbiter) or target.is_user:
            return judge(target, policy, now)
        verdict = judge(target, policy._replace(timeout=Limit("idle", NEVER)), now)
        if verdict.cull or not verdict.limit:  # due by its age, or kept whatever the limits are
            return verdict
        return arbiter.decide(target, verdict, policy.timeout.duration)

    def worth_asking(self, server: Target, now: datetime) -> bool:
        """True if the answer of a server can decide: it is due if idle since its start, and kept if active now."""
        policy = self.policy(server)
        if self._settings.arbiter:  # which may say cull at any idle time; not 0, which would be due even if active now
            policy = policy._replace(timeout=Limit("idle", timedelta.resolution))
        idle = replace(server, active=server.born or server.active)
        return judge(idle, policy, now).cull and not judge(replace(server, active=now), policy, now).cull

    def due_soon(self, server: Target, now: datetime, within: timedelta) -> tuple[datetime | None, Limit | None]:
        """When a kept server becomes due if it stays idle, and the limit that it reaches first.

        None if that is later than `within` from now, or there is no warning to give.
        """
        if not within or server.is_user:
            return None, None
        policy = self.policy(server)
        if self._settings.arbiter:  # nobody knows what it will say
            policy = policy._replace(timeout=Limit("idle", NEVER))
        end = now + within
        if not judge(server, policy, end).cull:
            return None, None
        limits = ((server.active, policy.timeout), (server.born, policy.max_age))
        due = [(since + limit.duration, limit) for since, limit in limits if since and limit.duration <= end - since]
        return min(due, key=lambda each: each[0])


# ---- The Hub

READ_SIZE = 1 << 16  # bytes
LARGE_ANSWER = 1 << 22  # bytes; from here on, answers are read and parsed one at a time
ODD_NAME = re.compile(r"[/\\?#%]")  # a proxy that decodes paths makes another path of it
MOST_LEFT_OUT = 100  # users whose data is too much; if there are more, the Hub ignores the size of a page
PAUSES = (1, 1, 2)  # whole seconds between tries
LONGEST_PAUSE = 30.0  # seconds, whatever Retry-After says
API_HINT = "--url must lead to the API of a JupyterHub, and usually ends in /hub/api"
TLS_HINT = "a Hub with internal_ssl needs --ssl-enabled and --internal-certs-location, another CA $REQUESTS_CA_BUNDLE"
TOKEN_HINT = "the token must be of this Hub, not expired, and its owner must have a role (before Hub 2.0: be an admin)"
PROXY_HINT = "this is not the Hub's form of an answer, so perhaps a proxy or firewall on the way refuses the request"
OLD_VERSIONS = ("0.", "1.")  # which send the user list as a whole
NEEDS_HUB_3 = "--idle-by needs JupyterHub 3 or later"
# What an answer may have, in bytes and values: far more than real Hubs hold, and less than what fills the memory. What
# takes memory is structure: json.loads needs up to 28 times the bytes of `[[],[],…`.
ANSWER = (1 << 26, 1_000_000)
WHOLE_LIST = (1 << 28, 20_000_000)  # of a Hub before 2.0, which has no pages
SERVER_ANSWER = (1 << 20, 100_000)
HEADERS = {
    "Accept": "application/jupyterhub-pagination+json",
    "Cache-Control": "no-cache",
    "User-Agent": f"cull_idle/{__version__}",
}


class Answer(NamedTuple):
    """The answer to one request."""

    status: int
    headers: Mapping[str, str]
    content: Any = None  # the JSON
    problem: str = ""  # why there is none: `answered HTML`

    @property
    def own(self) -> bool:
        """True if it is an error that the Hub itself reports; False if a proxy may have answered."""
        error = self.content
        return isinstance(error, dict) and error.get("status") == self.status and "message" in error

    def __str__(self) -> str:
        """What was answered, with the Hub's own words: `answered 404 (no such user)`, `answered HTML`."""
        if self.status == 200 and self.problem:
            return self.problem
        message = self.content.get("message") if isinstance(self.content, dict) else None
        return f"answered {self.status}" + (f" ({one_line(str(message))})" if message else "")

    @property
    def refusal_hint(self) -> str:
        """What helps against a 401 or 403: of the Hub, or of something on the way to it."""
        return TOKEN_HINT if self.own else PROXY_HINT


def parse_json(body: bytearray, most: tuple[int, int]) -> tuple[Any, str]:
    """The JSON of a body, whatever its Content-Type (0.6 says HTML), or why it is none. Raises TooMuchError."""
    if sum(map(body.count, (b"[", b"{", b","))) > most[1]:
        raise TooMuchError(f"answered JSON of more than {most[1]:,} values")
    try:
        return json.loads(body), ""
    except (json.JSONDecodeError, UnicodeDecodeError):  # also what is packed, which nobody asked for
        what = "no JSON" if body else "nothing"
        return None, f"answered {'HTML' if body.lstrip().startswith(b'<') else what}"
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        raise TooMuchError("answered JSON that is nested too deeply") from None


FAILURES = (OSError, ValueError, exceptions.HTTPError)
LATE = "{url} did not answer within {timeout:g}s (--request-timeout)"
# Why a request got no answer: an exception among its causes, the words, and whether another try may help.
WHY_FAILED: Sequence[tuple[type[BaseException], str, bool]] = (
    (exceptions.ProxyError, "{url} cannot be reached through the proxy of $HTTPS_PROXY: {strerror}", True),
    (exceptions.NewConnectionError, "{url} cannot be reached: {strerror}; is the Hub running, and --url right?", True),
    (exceptions.SSLError, f"{{url}}: TLS failed: {{text}}; {TLS_HINT}", False),
    (exceptions.TimeoutError, LATE, False),
    (exceptions.ProtocolError, "{url}: the connection was lost before the whole answer had come ({kind})", True),
    (BaseException, "the request to {url} failed: {text}", False),
)


def causes_of(error: BaseException | None) -> list[BaseException]:
    """An exception and what it was raised from, without tracebacks: they keep connections open."""
    causes = []
    while error:
        causes.append(error)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    return causes


def request_failure(request: str, url: str, error: Exception, timeout: float) -> RequestError:
    """The failure of a request (`GET /users`) that was not answered."""
    causes = causes_of(error)
    kind, words, again = next(why for why in WHY_FAILED if any(isinstance(cause, why[0]) for cause in causes))
    texts = " ".join(map(str, causes))
    if url.startswith("https:") and re.search("WRONG_VERSION_NUMBER|handshake operation|record layer failure", texts):
        words, again = "{url} does not speak https; try --url http:{rest}", False
    elif kind is exceptions.ProtocolError and url.startswith("http:"):
        words += "; if this goes on, try --url https:{rest}"
    elif words is LATE and request == "GET /users":
        words += "; if this goes on, try a smaller --api-page-size"
    name, text, rest = type(causes[-1]).__name__, one_line(str(causes[-1])), url.partition(":")[2]
    strerror = getattr(causes[-1], "strerror", None) or name
    why = f"{request}: {words.format(url=url, rest=rest, kind=name, strerror=strerror, text=text, timeout=timeout)}"
    if again or request.startswith("GET") or kind is exceptions.SSLError:
        return UnansweredError(why, 0 if again else None)
    return RequestError(why)  # a stop may take long, so a late DELETE says nothing about others


def wait_in_slices(stop: threading.Event, seconds: float) -> bool:
    """Wait until told to stop, but no longer than that. Returns whether it was told."""
    for _ in range(round(seconds)):
        if not stop.is_set():
            sleep(1)  # not stop.wait, whose lock the handler of a signal needs
    return stop.is_set()


def with_retries(request: Callable[[], T], stop: threading.Event) -> T:
    """Call a function; while another try may help, and nobody says stop, call it again, after growing pauses."""
    for pause in PAUSES:
        try:
            return request()
        except UnansweredError as error:
            if error.pause is None or wait_in_slices(stop, min(max(pause, error.pause), LONGEST_PAUSE)):
                raise
    return request()


class Identity(NamedTuple):
    """Whose a token is, and what it may do."""

    kind: str  # "service" or "user"
    name: str
    scopes: frozenset[str]  # expanded, with their filters: `delete:servers!group=students`; not those for itself alone

    def may(self, scope: str) -> bool:
        """True if the token has the scope, perhaps for some users only."""
        return scope in self.scopes or bool(self.filtered(scope))

    def filtered(self, *scopes: str) -> str:
        """Those of these scopes that the token has for some users only, with their filters."""
        narrow = {each for each in self.scopes for scope in scopes if each.startswith(f"{scope}!")}
        return " and ".join(sorted(each for each in narrow if each.partition("!")[0] not in self.scopes))


class Hub:
    """The REST API of one Hub, as far as culling needs it, and all requests. Threads may share it.

    Every method that sends a request to the Hub raises RequestError. Its token goes into the Authorization header of
    these, and nowhere else. No redirect is followed, no .netrc and no cookies are used.
    """

    def __init__(self, token: str, settings: Settings, stop: threading.Event) -> None:
        self.url = settings.url
        self.version = ""  # of JupyterHub, once it has said so
        self.clock = Clock()
        self.left_out: list[str] = []  # sentences about users whose data is too much
        self._token = token
        self._settings = settings
        self._stop = stop  # says that nothing is to be tried again
        self._timeout = min(max(settings.request_timeout.total_seconds(), 0.001), 86400)  # what a socket can
        self._reading_large = threading.Lock()
        self._adapter = HTTPAdapter(pool_maxsize=settings.concurrency)
        self.close = self._adapter.close

    def send(  # noqa: PLR0913, PLR0917 (all requests pass here)
        self, method: str, url: str, token: str, body: object, timeout: float, most: tuple[int, int]
    ) -> Answer:
        """Send a request; `body` becomes JSON. timeout: seconds for the answer's body. most: what that may have.

        Raises FAILURES, which are exceptions of requests (OSErrors) and urllib3, and TooMuchError.
        """
        headers = {**HEADERS, "Authorization": f"token {token}"} if token else HEADERS
        request = requests.Request(method, url, headers, json=body).prepare()
        request.url = url  # as it is: requests would decode %2E in it
        how = {"timeout": (min(timeout, 5), timeout), **self._tls(url, to_hub=url.startswith(self.url))}
        # Not through a Session: even with allow_redirects=False it reads all of a redirect's body.
        with ExitStack() as stack:
            response = stack.enter_context(self._adapter.send(request, **how))
            if 300 <= response.status_code < 400:
                return Answer(response.status_code, response.headers)
            content = bytearray()
            deadline = monotonic() + timeout
            # In steps, because the timeout of requests is for each read of the socket.
            while (chunk := response.raw.read1(READ_SIZE, decode_content=False)) or monotonic() > deadline:
                if monotonic() > deadline:
                    raise exceptions.TimeoutError
                if len(content) < LARGE_ANSWER <= len(content) + len(chunk):
                    stack.enter_context(self._reading_large)
                    deadline = monotonic() + timeout
                content += chunk
                if most is ANSWER and content.startswith(b"["):
                    most = WHOLE_LIST
                if len(content) > most[0]:
                    too_much = TooMuchError if most is ANSWER else RequestError  # a whole list has no smaller parts
                    raise too_much(f"answered more than {most[0] >> 20} MiB")
            return Answer(response.status_code, response.headers, *parse_json(content, most))

    def _tls(self, url: str, *, to_hub: bool) -> Mapping[str, Any]:
        """Arguments for requests: for https:, certificates and the proxy. A proxy for http: would see the token."""
        if not url.startswith("https:"):
            return {"stream": True}
        key, cert, ca = (to_hub and self._settings.client_certificate) or ("", "", True)
        options = requests.Session().merge_environment_settings(url, {}, True, ca, (cert, key) if cert else None)
        if options["verify"] is True:
            options["verify"] = os.getenv("SSL_CERT_FILE") or True
        return options

    def users(self, state: str, left_out: list[str]) -> Iterator[list[Any]]:
        """The list of users with a server in that state, or of all users, page by page, as the Hub's models.

        A page that is too much to parse is read again user by user. left_out: gets a sentence for each user who alone
        is too much.
        """
        offset, one_by_one_until, last = 0, 0, ""
        while not self._stop.is_set():
            size = 1 if offset < one_by_one_until else self._settings.api_page_size
            try:
                models, following = with_retries(partial(self._page, state, offset, size), self._stop)
            except TooMuchError as error:
                if self.version.startswith(OLD_VERSIONS) or len(left_out) == MOST_LEFT_OUT:
                    left_out.clear()
                    raise
                if size == 1:
                    after = f" (after {printable(last)})" if last else ""
                    left_out.append(f"user {offset + 1} of the list{after} is left out: {error}")
                    offset += 1
                else:
                    one_by_one_until = offset + (size or 50)  # users, of a Hub that may choose
                continue
            yield models
            if following is None:
                return
            following = following.get("offset") if isinstance(following, dict) else None
            if type(following) is not int or following <= offset:
                where = f"after offset {one_line(str(offset), 40)} starts at {one_line(str(following), 40)}"
                raise RequestError(f"GET /users: the page {where}; the rest is not read")
            offset, last = following, name_of(models[-1]) if models else last

    def _page(self, state: str, offset: int, size: int) -> tuple[list[Any], Any]:
        """Read a part of the user list: its models, and the Hub's `next`, which is None on the last page.

        Hubs before 1.3 ignore the state; those before 2.0 ignore size and offset, and send the whole list.
        """
        query = {"state": state, "limit": size, "offset": offset}
        answer = self._request("GET", f"/users?{urlencode({key: value for key, value in query.items() if value})}")
        where = f"GET /users: {self.url} {answer}"
        if answer.status in (401, 403):
            raise RequestError(f"{where}; {answer.refusal_hint}", refused=True)
        models: Any = answer.content
        pagination: Any = {"next": None}
        if isinstance(models, dict):
            pagination = models.get("_pagination")
            models = models.get("items")
        named = isinstance(models, list) and (not models or any(map(name_of, models)))
        if answer.status != 200 or not named or not isinstance(pagination, dict) or "next" not in pagination:
            raise RequestError(f"{where}, and no user list; {self._api_hint()}")
        if self.version and models is answer.content and not self.version.startswith(OLD_VERSIONS):
            why = "a proxy on the way drops the header Accept; it must pass it on, or --url must lead past it"
            raise RequestError(f"{where}, a list without pages, perhaps only the first users: {why}")
        return models, pagination["next"]

    def look(self, name: str) -> list[Target]:
        """One user as they are now, as parse_user returns it. Empty if there is no such user.

        Only the Hub itself can say that. If the API has no such request, the user is looked for in the user list.
        """
        path = f"/users/{segment(name)}"
        answer = self._request("GET", path)
        if answer.status == 404 and answer.own and not ODD_NAME.search(name):
            return []
        if answer.status in (404, 405):
            return self._find(name)
        if answer.status in (401, 403):
            raise RequestError(f"GET {path}: the Hub {answer}; {answer.refusal_hint}", refused=answer.own)
        if answer.status != 200 or name_of(answer.content) != name:
            raise RequestError(f"GET {path}: the Hub {answer}{', and not this user' * (answer.status == 200)}")
        return parse_user(answer.content)

    def _find(self, name: str) -> list[Target]:
        """Look for a user in a fresh read of the user list."""
        left_out: list[str] = []
        if ODD_NAME.search(name):  # the 404 may be that of another path
            raise RequestError(f"GET /users/{segment(name)}: this path is not known; perhaps a proxy changes it")
        for models in self.users("", left_out):
            for model in models:
                if name_of(model) == name:
                    return parse_user(model)
        if self._stop.is_set() or left_out:
            raise RequestError("GET /users: the user is not found, but not the whole list could be read")
        return []

    def delete(self, target: Target) -> Answer:
        """Stop a server, or delete a user. With --remove-named-servers, the Hub removes a named server, too."""
        path = f"/users/{segment(target.user)}"
        if target.is_user:
            return self._request("DELETE", path)
        if not target.server:
            return self._request("DELETE", f"{path}/server")
        body = {"remove": True} if action(target, self._settings) == "remove" else None
        return self._request("DELETE", f"{path}/servers/{segment(target.server)}", body)

    @contextmanager
    def server_token(self, server: Target, lifetime: float) -> Iterator[str]:
        """A token for one server and so many seconds, which is revoked in the end: JupyterHub 3 and later can.

        Empty if the Hub refuses: the user is gone, or not covered by a filtered scope such as `tokens!group=…`.
        """
        if ODD_NAME.search(server.user):  # `POST /users/ann%3Fx/tokens` could become `POST /users/ann`, which makes ann
            yield ""
            return
        path = f"/users/{segment(server.user)}/tokens"
        scope = f"access:servers!server={server.user}/{server.server}"
        # What a token does whose note begins with "Server at " does not count as an activity of its user.
        body = {"scopes": [scope], "note": f"Server at {server}: idle?", "expires_in": round(lifetime)}
        answer = self._request("POST", path, body)
        model = answer.content if isinstance(answer.content, dict) else {}
        if answer.status in (403, 404) and answer.own:
            yield ""
        elif "token" not in model or not isinstance(model.get("scopes") or [], list):
            raise RequestError(f"POST {path}: the Hub {answer}, and no token")
        else:
            try:
                # JupyterHub adds the first two, for its owner, to each token.
                own = ("read:users:name!", "read:users:groups!")
                if {each for each in map(str, model.get("scopes") or ()) if not each.startswith(own)} != {scope}:
                    opens_more = "the Hub has made a token that opens more than one server; it is not used"
                    raise RequestError(f"servers cannot be asked: {opens_more}; {NEEDS_HUB_3}", refused=True)
                yield str(model["token"])
            finally:
                with suppress(RequestError):  # then it expires
                    self._request("DELETE", f"{path}/{segment(str(model.get('id')))}")

    def identity(self) -> Identity | None:
        """Whose the token is, and its scopes; None from Hubs that cannot tell (before 2.0)."""
        model = self._request("GET", "/user").content
        if not isinstance(model, dict) or not isinstance(scopes := model.get("scopes"), list):
            return None
        kind, name = (one_line(str(model.get(key)), 300) for key in ("kind", "name"))
        for_others = frozenset(each for each in map(str, scopes) if not each.endswith(f"!{kind}={name}"))
        return Identity(kind, name, for_others)

    def _request(self, method: str, path: str, body: object = None) -> Answer:
        """Send one request and read its answer."""
        what = f"{method} {path.partition('?')[0]}"
        requested = monotonic()
        try:
            answer = self.send(method, self.url + path, self._token, body, self._timeout, ANSWER)
        except FAILURES as error:
            raise request_failure(what, self.url, error, self._timeout) from None
        except RequestError as error:
            raise type(error)(f"{what}: the Hub {error}") from None
        self.version = answer.headers.get("X-JupyterHub-Version", self.version)
        self.clock.read(answer.headers.get("Date"), requested)
        if answer.status in (429, 502, 503, 504):
            retry_after = answer.headers.get("Retry-After", "")
            raise UnansweredError(f"{what}: the Hub {answer}", float(retry_after) if retry_after.isdecimal() else 0)
        if 300 <= answer.status < 400:
            location = answer.headers.get("Location", "nowhere")
            where = f"{self.url} redirects to {one_line(location)}, which is not followed"
            raise RequestError(f"{what}: {where}; {self._api_hint(location)}")
        return answer

    def _api_hint(self, location: str = "") -> str:
        """What --url should be. `location`: where the Hub redirects to, which shows its base_url, or https:."""
        with suppress(ValueError):
            found = urlsplit(urljoin(f"{self.url}/users", location))
            below_hub = re.match(r"(.*?)/hub(/|$)", found.path)
            base = below_hub[1] if below_hub else found.path.removesuffix("/users").rstrip("/")
            better = f"{found.scheme}://{found.netloc}{base}/hub/api"
            known = below_hub or found.hostname == urlsplit(self.url).hostname
            # Nothing that a shell would run or change, should somebody paste it.
            if known and better != self.url and re.fullmatch(r"[A-Za-z0-9_.:/~%\[\]-]+", better):
                return f"{API_HINT}: try --url {better}"
        return API_HINT


def segment(name: str) -> str:
    """A name as one segment of a path, encoded so that no server or proxy takes a part of it for anything else."""
    quoted = quote(name, safe="", errors="surrogatepass")
    return quoted.replace(".", "%2E") if not quoted.strip(".") else quoted


# ---- Scopes: what the token must be allowed to do, from JupyterHub 2.0 on


def advice_on_scopes(identity: Identity, scopes: Sequence[str]) -> str:
    """What helps if a token lacks scopes, with the line of jupyterhub_config.py that gives them to its owner.

    The line is a role with a name of its own: a Hub does not start if a role is defined twice.
    """
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
    if settings.idle_by != "hub" and (to_cull or not settings.dry_run or settings.asks_while_scanning):
        needed.append("tokens")
    if to_cull:
        needed.append("delete:servers")
        if settings.cull_users and not identity.may("delete:users"):
            needed.append("admin:users")
    return [scope for scope in dict.fromkeys(needed) if not identity.may(scope)]


def caveats_of_scopes(identity: Identity | None, settings: Settings) -> Iterator[str]:
    """Why a real pass could not do what it should with this token."""
    if not identity:
        return
    if missing := missing_scopes(identity, settings, to_cull=True):
        advice = advice_on_scopes(identity, missing)
        yield f"the token lacks {' and '.join(missing)}: a real pass would stop nothing; {advice}"
    if narrow := identity.filtered("delete:servers"):
        yield f"the token has only {narrow}: stopping the servers of other users would fail"


# ---- Servers asked for their last activity (--idle-by)

SERVER_SECONDS = 10.0  # for all answers of a server, if --request-timeout is not shorter
SERVERS_HINT = "--servers-url must be what precedes /user/… in a server's address: the proxy, not the Hub's own port"
# What became of asking a server, other than an answer, as the log says it.
UNUSABLE, SILENT = "gave no usable answer, so the Hub's word counts", "gave no answer, and are kept"
REDIRECTED = "were not reached, and are kept"
BUSY = (ZERO, BUSY_KERNEL)  # how long a server has been idle, and who says so


class NoAnswer(Exception):
    """A server gave no usable answer. The text never quotes the server, which may be hostile."""

    def __init__(self, why: str, asked: str = UNUSABLE) -> None:
        super().__init__(why)
        self.asked = asked


class Asker:
    """Asks servers for their last activity, as --idle-by says. Threads may share it.

    A server runs whatever its user likes. So the culler's own token never goes there: each server gets a token that the
    Hub makes for it, and that is revoked afterwards. All that a server answers is bounded in size and time.
    Neither the server nor the Hub counts what such a token asks as activity. The proxy does, and tells the Hub.
    https://jupyter-server.readthedocs.io/en/latest/developers/rest-api.html
    """

    def __init__(self, hub: Hub, settings: Settings) -> None:
        self.asked: dict[Key, str] = {}  # each server, and what became of asking it last
        self.first: dict[str, str] = {}  # the first server of each kind, and why
        self._hub = hub
        self._settings = settings
        self._timeout = min(SERVER_SECONDS, settings.request_timeout.total_seconds())
        self._hint = SERVERS_HINT + ("; with subdomains, leave it out" if settings.servers_url else "")

    def check(self, identity: Identity | None) -> None:
        """Raise RequestError if no server can be asked: a wrong address, too old a Hub, a filtered scope."""
        major, version = self._version_at_address()
        if major < 3:
            raise RequestError(f"{NEEDS_HUB_3}; this is {version}")
        if identity is None:
            raise RequestError(f"servers cannot be asked: GET {self._hub.url}/user does not say what the token may do")
        if major < 5 and identity.kind == "service" and (narrow := identity.filtered("tokens")):
            remedy = "give it the whole scope tokens, or use JupyterHub 5 or later"
            raise RequestError(f"in JupyterHub {version} the scope {narrow} of a service covers nobody; {remedy}")

    def check_redirects(self) -> None:
        """Raise RequestError if servers were redirected, and none has answered: then the address is wrong."""
        found = set(self.asked.values())
        if REDIRECTED in found and found <= {REDIRECTED, SILENT}:
            raise RequestError(f"servers cannot be asked: {self.first[REDIRECTED]}; {self._hint}")

    def _version_at_address(self) -> tuple[int, str]:
        """The first number and the whole version of the Hub that the proxy leads to. Or raises UnansweredError."""
        url = f"{self._settings.servers_root}/hub/api"
        try:
            version = one_line(str(self._get(url, monotonic() + self._timeout).content["version"]), 20)
            return int(version.partition(".")[0]), version
        except (LookupError, TypeError, ValueError):
            why = "is not the API of a JupyterHub"
        except NoAnswer as error:
            why = str(error)
        raise UnansweredError(f"servers cannot be asked: GET {url} {why}; {self._hint}")

    def ask(self, server: Target) -> Target:
        """The server with the last activity that counts; in doubt if that is unknown. Raises RequestError."""
        idle_by = self._settings.idle_by
        asked = "yes"
        found: list[tuple[timedelta, str]] = []  # how long it has been idle, and who says so
        try:
            with self._hub.server_token(server, self._timeout + 60) as token:
                if not token:
                    raise NoAnswer("is not asked: its user is gone, not covered by the scope tokens, or oddly named")
                deadline = monotonic() + self._timeout
                for what, source in (("kernels", KERNEL), ("terminals", TERMINAL), ("status", SERVER)):
                    if BUSY not in found and (source != SERVER or idle_by != "kernels"):
                        url = f"{server_address(server, self._settings)}/api/{what}"
                        found += parse_activities(self._get(url, deadline, token), source)
        except NoAnswer as error:
            asked, idle_by = error.asked, "both"  # what it said before that can still keep it
            self.first.setdefault(asked, f"{server} {error}")
            if asked != UNUSABLE:
                server = replace(server, doubt=f"its own activity is unknown: it {error}")
        self.asked[server.key] = "busy" if BUSY in found else asked
        now = self._hub.clock.now()
        age = max(now - (server.born or server.active or now), ZERO)
        idle, source = min(found, default=(age, KERNEL))  # without kernels and terminals, idle since its start
        active = now - min(idle, age)
        if idle_by == "both" and server.active and server.active >= active:
            return server
        return replace(server, active=active, source=source)

    def _get(self, url: str, deadline: float, token: str = "") -> Answer:
        """The JSON that a server answers until the deadline of monotonic(). Raises NoAnswer, UnansweredError."""
        timeout = max(deadline - monotonic(), 0.001)
        try:
            answer = self._hub.send("GET", f"{url}?no_track_activity=1", token, None, timeout, SERVER_ANSWER)
        except FAILURES as error:
            raise NoAnswer(f"gave no whole answer ({type(causes_of(error)[-1]).__name__})", SILENT) from None
        except RequestError as error:
            raise NoAnswer(str(error)) from None
        if answer.status == 200 and not answer.problem:
            return answer
        if answer.status == 404 and url.endswith("/api/terminals"):  # they are off
            return answer._replace(content=[])
        if 300 <= answer.status < 400:
            location = answer.headers.get("Location", "")
            lost = "/hub/user/" in location or urlsplit(url).path in location  # to the Hub, or to https:
            raise NoAnswer("is redirected, to the Hub or to https:", REDIRECTED if lost else UNUSABLE)
        if answer.status >= 500 and token:
            self._version_at_address()  # if the proxy fails, too, this says nothing about the server
        raise NoAnswer(answer.problem if answer.status == 200 else f"answered {answer.status}")


def parse_activities(answer: Answer, source: str) -> list[tuple[timedelta, str]]:
    """Read a server's status, or its list of kernels or terminals. A busy kernel alone decides.

    Only the server's own clock counts; a time in the future is now. Raises NoAnswer for what no Jupyter server answers.
    """
    found = []
    now = parse_http_date(answer.headers.get("Date")) or datetime.now(UTC)
    try:
        models = [answer.content] if source == SERVER else answer.content
        if not isinstance(models, list):
            raise TypeError
        if any(model.get("execution_state") == "busy" for model in models):
            return [BUSY]
        for model in models:
            active = parse_time(model["last_activity"]) or now  # unknown counts as now
            found.append((max(now - active, ZERO), source))
    except (AttributeError, LookupError, TypeError, ValueError):
        raise NoAnswer("answered what no Jupyter server does") from None
    return found


def server_address(server: Target, settings: Settings) -> str:
    """Where a server is: as --servers-url says, or as the Hub knows it (JupyterHub 5 with public_url, subdomains)."""
    addresses = [str(server.model.get(key)).rstrip("/") for key in ("full_url", "url")]
    known = [each for each in addresses if each.startswith(("http://", "https://"))]
    if known and not settings.servers_url:
        return known[0]
    # Only user/NAME/SERVER of the url: what comes before it may be different outside.
    return "/".join([settings.servers_root, *addresses[1].split("/")[-3 if server.server else -2 :]])


# ---- The log


class Log:
    """Log lines on stderr."""

    def __init__(self, level: str) -> None:
        """In a terminal the date is left out, so that most lines fit 80 columns."""
        name = "cull_idle: " if os.getenv("JUPYTERHUB_SERVICE_NAME") else ""
        date = "%H:%M:%S" if sys.stderr.isatty() else "%Y-%m-%d %H:%M:%S"
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-8s {name}%(message)s", date))
        logging.raiseExceptions = False  # a full disk under stderr is no reason for a traceback
        self._logger = logging.getLogger("cull_idle")
        self._logger.handlers[:] = [handler]
        self._logger.propagate = False
        self._logger.setLevel(level.upper())
        self._said: set[str] = set()
        self._failures: Counter[str] = Counter()  # of one pass, by kind

    def say(self, level: str, sentence: str) -> None:
        """Log a sentence."""
        getattr(self._logger, level)("%s", sentence)

    def say_once(self, level: str, sentence: str) -> None:
        """Log a sentence, unless this process has done so before."""
        if sentence not in self._said:
            self._said.add(sentence)
            self.say(level, sentence)

    def failure(self, sentence: str, kind: str) -> None:
        """Log the first failure of each kind as an error. Others are counted, and shown with -v."""
        self._failures[kind] += 1
        self.say("error" if self._failures[kind] == 1 else "debug", sentence)

    def repeated_failures(self) -> None:
        """Log how many failures of each kind a pass had, beyond the first."""
        for kind, count in self._failures.items():
            if count > 1:
                self.say("error", f"{count - 1} more failed in the same way: {kind}")
        self._failures.clear()


# ---- A pass

OLD_DECISION = 1.0  # seconds after which a decision is looked at once more before the DELETE
MOST_FAILURES = 10  # in a row, or two for each thread if that is more: then the pass ends
PROGRESS_SECONDS = 10  # between lines that say how many users were read
CLOCK_DIFFERENCE = timedelta(minutes=5)  # between the Hub and this machine, from which on a warning is due
LONG_AGO = datetime.min.replace(tzinfo=UTC)
SAME_TIME = timedelta(seconds=30)  # due times that differ by less are the same: servers tell theirs only roughly
MISLEADING = "a path with its name could lead a proxy to something else: stop it by hand"
IDLE_STEPS = ("10m", "30m", "1h", "2h", "4h", "8h", "1d", "1w")  # the timeouts that a dry run compares
# What becomes of a server or user. `kept`: nothing is done to it. `planned`: due, and nothing is done about it yet.
# `warned`: kept, but due soon. `stopping`: not down yet. `gone`: before anything was done. `spared`: not due any more.
Outcome = Literal["kept", "planned", "warned", "culled", "stopping", "gone", "spared", "failed"]


class Event(NamedTuple):
    """A server or user and what becomes of it: for the log, the JSON, --notify and the table of a dry run."""

    target: Target
    verdict: Verdict
    outcome: Outcome
    reason: str
    error: RequestError | None = None  # why it failed, or will fail
    due_at: datetime | None = None  # when something that is warned will be due

    def __str__(self) -> str:
        return f"{self.word} {self.target}: {self.why}"

    @property
    def why(self) -> str:
        """The reason, and the error if there is one."""
        return f"{self.reason}; {self.error}" if self.error else self.reason

    @property
    def word(self) -> str:
        """The outcome, or `deleted` for a user who is culled: the name of its figure."""
        return "deleted" if self.outcome == "culled" and self.target.is_user else self.outcome

    @property
    def is_due(self) -> bool:
        """True if nothing has become of it yet."""
        return self.outcome == "planned"

    def becomes(self, outcome: Outcome, reason: str = "", error: RequestError | None = None) -> Event:
        """The same server or user with this outcome."""
        return self._replace(outcome=outcome, reason=reason or self.reason, error=error)


def in_parallel(function: Callable[[T], T], items: Iterable[T], threads: int) -> Iterator[T]:
    """Call a function for each item, in up to so many threads; yields the results as they come.

    If the system refuses more threads, those that have started do all the work (ThreadPoolExecutor would fail, and not
    say what it has done). An exception of the function is raised here, and ends the work.
    """
    waiting = deque(items)
    count = len(waiting)
    workers: list[threading.Thread] = []
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        with suppress(IndexError):
            while True:
                item = waiting.popleft()
                try:
                    done.put((function(item), None))
                except BaseException as error:  # raised again below
                    done.put((None, error))

    with suppress(RuntimeError):  # can't start new thread
        while len(workers) < min(threads, count):
            worker = threading.Thread(target=work, name="cull_idle", daemon=True)
            worker.start()
            workers.append(worker)
    if not workers:
        work()
    try:
        while count:
            with suppress(queue.Empty):  # in slices: Python may miss a signal that comes just before a wait
                result, error = done.get(timeout=1)
                count -= 1
                if error:
                    raise error
                yield result
    finally:
        waiting.clear()
        for worker in workers:
            worker.join()


@dataclass(eq=False, repr=False)
class Pass:
    """One pass over the Hub: what it works with, its figures, and its steps."""

    hub: Hub
    settings: Settings
    log: Log
    stop: threading.Event  # says that nothing new is to be started
    report: Callable[[Event], None] = print  # is told what becomes of each server and user
    warned_before: Mapping[Key, datetime] = field(default_factory=dict)  # when servers are due that were warned of

    identity: Identity | None = None  # the token's, if the Hub tells it
    asker: Asker | None = None  # if servers are asked
    started: datetime = field(default_factory=partial(datetime.now, UTC))
    seconds: float = 0.0
    figures: Counter[str] = field(default_factory=Counter)  # by their names in the JSON, and some more
    idle_for: Counter[timedelta] = field(default_factory=Counter)  # how many servers have been idle for that long
    warned: dict[Key, datetime] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    errors: list[CullError] = field(default_factory=list)  # of the whole pass
    complete: bool = False  # the whole user list was read
    refused: bool = False  # the token may not do what was due
    ended: bool = False  # early
    failures: int = 0  # in a row, without an answer
    deletes_lost: set[Key] = field(default_factory=set)  # whose answers were lost
    counting: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.judge = Judge(self.settings)
        self.debug = self.settings.level == "debug"
        if self.settings.idle_by != "hub":
            self.asker = Asker(self.hub, self.settings)
        steps = map(parse_duration, IDLE_STEPS if self.settings.dry_run else ())
        self.idle_for.update(dict.fromkeys(sorted({*steps, self.settings.timeout} - {NEVER}), 0))

    def run(self) -> None:
        """Scan and decide, check the fuse, cull, and report each event. A dry run only reports what is due."""
        began = monotonic()
        try:
            self.check_access()
            due = self._scan()
            if not self.settings.dry_run:
                if blown := self.fuse_blown():
                    raise CullError(f"{blown}; --dry-run shows them", Exit.UNDONE)
                due = self._cull_all(due)
            for event in due:
                self.report(event)
            if self.asker:
                self.asker.check_redirects()
        except CullError as error:
            self.errors.append(error)
        self.seconds = monotonic() - began
        self._sum_up()

    @property
    def exit_code(self) -> Exit:
        """What --once exits with."""
        undone = self.figures["failed"] or self.figures["left_undone"] or self.hub.left_out or not self.complete
        codes = [error.exit_code for error in self.errors] or [Exit.UNDONE if undone else Exit.DONE]
        return Exit.NO_HUB if self.refused else max(codes)

    def check_access(self) -> None:
        """Check the token's scopes, if the Hub can tell them, and where servers are asked. Raises RequestError."""
        try:
            self.identity = with_retries(self.hub.identity, self.stop)
        except RequestError as error:
            if isinstance(error, UnansweredError):  # else GET /users will say it better
                raise
        if identity := self.identity:
            if missing_scopes(identity, self.settings, to_cull=self.settings.changes_something):
                # A dry run names all that a real pass would need: each change of the roles is a restart of the Hub.
                missing = missing_scopes(identity, self.settings, to_cull=True)
                lacks = f"the token of {identity.kind} {identity.name} lacks {' and '.join(missing)}"
                raise RequestError(f"{lacks}; {advice_on_scopes(identity, missing)}")
            if narrow := identity.filtered("list:users", "read:servers"):
                self.log.say_once("info", f"the token has only {narrow}: only these users are seen")
        if self.asker:
            self.asker.check(self.identity)

    # Scan and decide

    def _scan(self) -> Iterable[Event]:
        """Read the whole user list, and decide about all of it. Returns what is due, in random order.

        After an error, what was found so far may be stopped, but no user is deleted: a deleted user does not come back.
        """
        due: dict[Key, Event] = {}  # a user may be listed twice
        said = monotonic()
        try:
            for models in self.hub.users("" if self.settings.cull_users else "ready", self.hub.left_out):
                self.figures["pages"] += 1
                self._decide_page(models, due)
                if monotonic() - said > PROGRESS_SECONDS:
                    said = monotonic()
                    self.log.say("info", f"{self.figures['users']} users read so far")
            self.complete = not self.stop.is_set()
        except RequestError as error:
            if self.figures["pages"] and not error.refused:
                error.exit_code = Exit.UNDONE
            self.errors.append(error)
            due = {key: event for key, event in due.items() if not event.target.is_user}
        if self.doubts:
            self.log.say("warning", f"kept {len(self.doubts)} in doubt; the first: {self.doubts[0]}")
        self.figures["planned"] = len(due)
        self.figures["due_users"] = sum(event.target.is_user for event in due.values())
        # In random order, so that servers that cannot be stopped do not end each pass before all others.
        return random.sample(list(due.values()), len(due))

    def _decide_page(self, models: list[Any], due: dict[Key, Event]) -> None:
        """Decide about all users and servers of a page. A user is judged only if no server is there."""
        users = []
        for model in models:
            try:
                users.append(parse_servers(model) or (parse_user(model) if self.settings.cull_users else []))
            except ValueError as error:
                self.doubts.append(f"the Hub: {error}")
        self.figures["users"] += len(users)
        asked = self._ask_page([target for found in users for target in found if not target.is_user])
        now = self.hub.clock.now()
        for found in users:
            if self.stop.is_set():  # an arbiter may be slow
                return
            for target in found:
                event = self._decide(asked.get(target.key, target), now)
                if event.is_due:
                    due.setdefault(target.key, event)
                elif event.reason:
                    self.report(event)

    def _decide(self, target: Target, now: datetime) -> Event:
        """Decide about a server or user, and count it. What is kept has a reason only at level debug."""
        verdict = self.judge.decide(target, now)
        if not target.is_user and target.ready:
            self.figures["running"] += 1
            for step in self.idle_for:
                self.idle_for[step] += (verdict.idle or ZERO) >= step
        if verdict.cull:
            error = RequestError(MISLEADING) if target.misleading else None
            return Event(target.without_models(), verdict, "planned", verdict.reason, error)
        if verdict.in_doubt:
            self.doubts.append("" if self.doubts else f"{target}: {verdict.reason}")
        due_at, limit = self.judge.due_soon(target, now, self.settings.warn_before or ZERO)
        if due_at:
            before = self.warned.get(target.key) or self.warned_before.get(target.key) or LONG_AGO
            self.warned[target.key] = due_at
        if not due_at or abs(due_at - before) < SAME_TIME:
            return Event(target, verdict, "kept", verdict.reason if self.debug else "")
        self.figures["warned"] += 1
        reason = f"{replace(verdict, limit=limit).reason}; due in {short(due_at - now)}"
        return Event(target.without_models(), verdict, "warned", reason, due_at=due_at)

    def _ask_page(self, servers: list[Target]) -> dict[Key, Target]:
        """Ask those servers of a page whose answer can decide, now or for a warning. Raises RequestError."""
        if not self.settings.asks_while_scanning:
            return {}
        now = self.hub.clock.now()
        times = {now, now + (self.settings.warn_before or ZERO)}
        worth_asking = [each for each in servers if any(self.judge.worth_asking(each, time) for time in times)]
        return {server.key: server for server in in_parallel(self._ask, worth_asking, self.settings.concurrency)}

    def _ask(self, server: Target) -> Target:
        """The server with its own last activity; in doubt if the Hub makes no token for it. Raises RequestError."""
        if not self.asker or self.stop.is_set():
            return replace(server, doubt="not asked, because the pass is told to stop")
        try:
            return with_retries(partial(self.asker.ask, server), self.stop)
        except RequestError as error:
            if isinstance(error, UnansweredError) or error.refused:
                raise
            return replace(server, doubt=str(error))

    # Fuse

    def fuse_blown(self) -> str:
        """A sentence if more is due than --max-culls allows, else empty. N% is of what was read."""
        if not (fuse := self.settings.max_culls):
            return ""
        figures = self.figures
        servers = fuse.blown("servers", figures["planned"] - figures["due_users"], figures["running"])
        return servers or fuse.blown("users", figures["due_users"], figures["users"])

    # Cull

    def _cull_all(self, due: Iterable[Event]) -> Iterator[Event]:
        """Cull, several at a time, and yield what became of each. What is left undone yields nothing."""
        for event in in_parallel(self._attempt, due, self.settings.concurrency):
            if not event.is_due:
                self.figures[event.word] += 1
                self.figures["done"] += 1
                yield event

    def _attempt(self, due: Event) -> Event:
        """Cull one, with retries. Ends the pass if the token is refused, or nobody answers any more."""
        if self._is_over:
            return due
        try:
            event = with_retries(partial(self._cull, due), self.stop)
        except RequestError as error:
            event = due.becomes("failed", error=error)
        except CullError as error:  # what a rule needs was shown in the list, but is not any more
            event = due.becomes("failed", error=RequestError(str(error), refused=True))
        with self.counting:
            problem = event.error
            if not event.is_due:
                self.failures = self.failures + 1 if isinstance(problem, UnansweredError) else 0
            if problem and problem.refused:
                self.refused = self.ended = True
            # Exactly this many: failures still in flight must not say it again.
            if self.failures == max(MOST_FAILURES, 2 * self.settings.concurrency):
                self.ended = True
                sentence = f"the pass ends after {self.failures} failures in a row; the last: {problem}"
                event = event._replace(error=RequestError(sentence))
        return event

    @property
    def _is_over(self) -> bool:
        """True if nothing new may be started."""
        return self.ended or self.stop.is_set()

    def _cull(self, due: Event) -> Event:
        """Look at a server or user again, decide again, and send the DELETE if it is still due."""
        since = monotonic()
        event = looked = self._look(due)
        if event.is_due:
            event = self.ask_and_decide(looked)
        if event.is_due and monotonic() - since > OLD_DECISION:
            event = self._look_once_more(looked, event)
        event = event._replace(target=event.target.without_models())
        return self._delete(event) if event.is_due and not self._is_over else event

    def _look(self, due: Event) -> Event:
        """The second look: something due with its target as it is now, or what becomes of it."""
        target = due.target
        found = self.hub.look(target.user)
        fresh = find(found, target.server)
        if not fresh:
            if target.key in self.deletes_lost:
                return due.becomes("culled", f"{due.reason}; the Hub's answer was lost")
            return due.becomes("gone", "not running any more" if found else "the user is gone")
        if due.error or fresh.misleading:
            return due.becomes("failed", error=RequestError(MISLEADING))
        if fresh.doubt:
            in_doubt = due.verdict.keep_in_doubt(fresh.doubt)
            return due._replace(verdict=in_doubt).becomes("spared", fresh.doubt)
        if fresh.pending == "stop":
            return due.becomes("stopping", "the Hub is stopping it already")
        if target.is_user and len(found) > 1:
            return due.becomes("spared", "a server is there again")
        if fresh.born != target.born:
            return due.becomes("spared", "the user was created anew" if target.is_user else "it was restarted")
        if why := why_not_ready(fresh):
            return due.becomes("spared", why)
        return due._replace(target=fresh)

    def ask_and_decide(self, event: Event) -> Event:
        """Decide about a server or user as it is now; a server is asked first if --idle-by says so.

        `both` asks only what the Hub calls idle, because asking is activity for the proxy.
        """
        target = event.target
        now = self.hub.clock.now()
        verdict = self.judge.decide(target, now)
        may_ask = not target.is_user and (verdict.cull or self.settings.asks_while_scanning)
        if self.asker and may_ask and self.judge.worth_asking(target, now):
            target = self.asker.ask(target)
            verdict = self.judge.decide(target, self.hub.clock.now())
        event = event._replace(target=target, verdict=verdict, reason=verdict.reason)
        return event if verdict.cull else event.becomes("spared")

    def _look_once_more(self, looked: Event, decided: Event) -> Event:
        """Spare what has been active while a decision took long, by the Hub's word, unless only the server's counts."""
        again = self._look(looked)
        if again.is_due and (again.target.active == looked.target.active or self.settings.asks_while_scanning):
            return decided
        return again.becomes("spared", "it was active meanwhile") if again.is_due else again

    def _delete(self, event: Event) -> Event:
        """Send the DELETE, and turn the answer into an outcome."""
        target = event.target
        began = monotonic()
        try:
            answer = self.hub.delete(target)
        except RequestError:
            self.deletes_lost.add(target.key)
            raise
        said = f"the Hub {answer}"
        if answer.status == 204:
            removed = "; removed" if action(target, self.settings) == "remove" else ""
            return event.becomes("culled", event.reason + removed)
        if answer.status == 202:
            waited = format_duration(timedelta(seconds=round(monotonic() - began)))
            slow = "a server is not down yet" if target.is_user else f"not down after {waited}"
            return event.becomes("stopping", f"{event.reason}; {slow}")
        if answer.status == 400 and answer.own and target.is_user:  # a server is stopping, or it owns the token
            return event.becomes("spared", said)
        # 400 is also that of a server that is down (Hubs before 1.0), 500 that of a user who is gone (Hubs 2 to 4).
        if answer.status == 500 or (answer.status in (400, 404) and answer.own):
            again = self._look(event)
            if not again.is_due:
                return again.becomes(again.outcome, said)
        return event.becomes("failed", error=self._delete_error(answer, target))

    def _delete_error(self, answer: Answer, target: Target) -> RequestError:
        """Why a DELETE failed, with the scope that would allow it."""
        scope, *others = ["admin:users", "delete:users"] if target.is_user else ["delete:servers"]
        said = f"the Hub {answer}"
        if answer.status == 404 and answer.own:
            filtered = self.identity and self.identity.filtered(scope, *others)
            by = filtered or f"a filtered scope, such as {scope}!group=…"
            return RequestError(f"{said}: it is still there, so it is not covered by {by}")
        if answer.status not in (401, 403):
            return RequestError(said)
        hint = answer.refusal_hint
        if answer.status == 403 and answer.own and self.identity:
            hint = f"the token needs the scope {scope}; {advice_on_scopes(self.identity, [scope])}"
        return RequestError(f"{said}; {hint}", refused=answer.own)

    # Figures

    def _sum_up(self) -> None:
        """Complete the figures, and say what concerns the pass as a whole."""
        figures = self.figures
        figures["left_undone"] = 0 if self.settings.dry_run else figures["planned"] - figures["done"]
        figures["idle"] = self.idle_for[self.settings.timeout]
        for sentence in self.hub.left_out:
            self.log.say("error", sentence)
        if self.asker:
            counts = Counter(self.asker.asked.values())
            figures.update(asked=counts.total(), busy=counts["busy"], no_answer=counts[SILENT])
            for asked, first in self.asker.first.items():
                of = f"{counts[asked]} of {counts.total()} servers asked"
                self.log.say("warning", f"{of} {asked}; the first: {first}")
        if abs(self.hub.clock.now() - datetime.now(UTC)) > CLOCK_DIFFERENCE:
            self.log.say_once("warning", f"the Hub's clock is {self.hub.clock.difference}; the Hub's counts")
        if self.complete and not self.settings.dry_run:  # which says it below the table
            for number, rule in self.judge.unused.items():
                level = "info" if rule.keep or NEVER in (rule.timeout, rule.max_age) else "debug"
                self.log.say_once(level, f"rule {number}, {rule.text}, applies to nobody now")


# ---- JSON, metrics and notices: a pass for programs

# From `culled` on: they are in the JSON, in the metrics and, unless 0, in the log.
COUNTS = (*get_args(Outcome)[3:], "deleted", "left_undone", "warned", "asked", "busy", "no_answer")
WOULD_BE = {"stop": "stopped", "remove": "removed", "delete": "deleted"}  # by action


def action(target: Target, settings: Settings) -> str:
    """What culling does to a server or user.

    A server with an odd name is never removed: behind a proxy that decodes paths, a stopped one could be instead.
    """
    if target.is_user:
        return "delete"
    may_remove = settings.remove_named_servers and not ODD_NAME.search(target.server or "/")
    return "remove" if may_remove else "stop"


def event_fields(event: Event, settings: Settings) -> dict[str, object]:
    """The JSON fields of an event. The README documents them."""
    idle, age = event.verdict.idle, event.verdict.age
    return {
        "event": "user" if event.target.is_user else "server",
        "user": event.target.user,
        "server": event.target.server,
        "action": action(event.target, settings),
        "outcome": event.outcome,
        "reason": event.reason,
        "idle_seconds": None if idle is None else int(idle.total_seconds()),
        "age_seconds": None if age is None else int(age.total_seconds()),
        "due": format_time(event.due_at) if event.due_at else None,
        "error": str(event.error) if event.error else None,
    }


def pass_fields(done: Pass) -> dict[str, object]:
    """The JSON fields of a pass. The README documents them."""
    return {
        "event": "pass",
        "started": format_time(done.started),
        "hub": done.hub.url,
        "version": printable(done.hub.version, 40) or None,
        **{name: done.figures[name] for name in ("running", "idle", "planned", *COUNTS)},
        "seconds": round(done.seconds, 3),
        "dry_run": done.settings.dry_run,
        "error": "; ".join([*map(str, done.errors), *done.hub.left_out]) or None,
    }


def write_metrics(path: str, done: Pass) -> None:
    """Write a file for node_exporter's textfile collector, whole or not at all: gauges of this pass.

    Raises OSError, or ValueError for what must not be replaced: no file, or another program's.
    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    if os.path.lexists(path):
        with open(path if os.path.isfile(path) else os.devnull, errors="replace") as file:
            if not file.read(20).startswith("# HELP cull_idle_"):
                raise ValueError("what is there already is not a file of this program, so it is not overwritten")
    ended = {"exit_code": done.exit_code, "last_pass_timestamp_seconds": int(datetime.now(UTC).timestamp())}
    text = ""
    for name, value in (pass_fields(done) | ended).items():
        if isinstance(value, (int, float)):
            text += f"# HELP cull_idle_{name} Of the last pass, as in its JSON.\n# TYPE cull_idle_{name} gauge\n"
            text += f"cull_idle_{name} {value + 0}\n"
    # A new file that nobody else can have prepared, in the same directory, so that it can replace the old one.
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".cull_idle")
    try:
        with open(descriptor, "w") as file:
            file.write(text)
            os.fchmod(descriptor, 0o644)  # node_exporter runs as another user
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.remove(temporary)
        raise


NOTICE_SECONDS = 30.0  # for one command
NOTICES_AT_ONCE = 4
LATE_NOTICES = 10  # commands not done in time, after which a pass runs no more: it would take hours
NOTICE_VARIABLES = {"EVENT": "outcome", "USER": "user", "SERVER": "server", "DUE": "due"}  # and JSON fields
NOTIFIED = ("warned", "culled", "stopping", "failed")


class Notices:
    """Runs --notify for each event of a pass, a few at a time, with the event's JSON on its standard input."""

    def __init__(self, command: Sequence[str], log: Log, stop: threading.Event) -> None:
        self._command = command
        self._log = log
        self._stop = stop
        self._late = 0  # commands that were not done in time
        self._left_out = 0
        self._pool = ThreadPoolExecutor(NOTICES_AT_ONCE)

    def send(self, fields: Mapping[str, object]) -> None:
        """Run the command soon."""
        try:
            self._pool.submit(self._run, fields)
        except RuntimeError as error:  # can't start new thread
            self._log.failure(f"--notify: {error}", "--notify")

    def wait(self) -> None:
        """Wait for all commands."""
        self._pool.shutdown()
        if self._left_out:
            why = "told to stop" if self._stop.is_set() else f"{self._late} were not done in time"
            self._log.say("error", f"--notify: {self._left_out} left out, because {why}")

    def _run(self, fields: Mapping[str, object]) -> None:
        """Run the command once. What it prints is dropped, and its stderr is our own."""
        if self._stop.is_set() or self._late >= LATE_NOTICES:
            self._left_out += 1
            return
        # Without $JUPYTERHUB_API_TOKEN, and whatever else holds a token.
        own = {name: value for name, value in os.environ.items() if not any(secret in value for secret in SECRETS)}
        variables = {f"CULL_IDLE_{name}": str(fields.get(field) or "") for name, field in NOTICE_VARIABLES.items()}
        name = printable(f"{fields.get('user', 'the pass')}/{fields.get('server') or ''}").removesuffix("/")
        why = ""
        try:
            process = subprocess.Popen(  # noqa: S603 (the administrator's own command)
                self._command,
                env=own | variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # so that a Ctrl-C does not end it
            )
            process.communicate(json.dumps(fields).encode() + b"\n", NOTICE_SECONDS)
            why = f"exited with {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            self._late += 1
            why = f"was not done after {NOTICE_SECONDS:g}s, and is given up"
            with suppress(PermissionError):  # a process of another user
                process.kill()
                process.communicate()
        except (OSError, ValueError) as error:  # ValueError: a name that no variable can hold
            why = f"cannot be run: {one_line(str(error))}"
        if why:
            self._log.failure(f"--notify for {name}: {self._command[0]} {why}", f"--notify: {self._command[0]} {why}")


# ---- A dry run and an explanation

LONGEST_NAME = 40  # columns in a terminal


def show_plan(events: Sequence[Event], done: Pass) -> None:
    """Print what a pass would do, and how many servers other timeouts would stop; with --json only log caveats."""
    settings, figures = done.settings, done.figures
    if settings.json:
        for caveat in plan_caveats(done):
            done.log.say("warning", caveat)
        return
    width = LONGEST_NAME if sys.stdout.isatty() else LONGEST_TEXT
    rows = [("SERVER", "IDLE", "AGE", "WOULD BE")]
    for event in sorted(events, key=lambda event: event.verdict.idle or ZERO, reverse=True):
        planned = event.is_due and not event.error
        would_be = WOULD_BE[action(event.target, settings)] if planned else "failed" if event.error else event.outcome
        idle, age = ("-" if figure is None else short(figure) for figure in (event.verdict.idle, event.verdict.age))
        rows.append((printable(str(event.target), width), idle, age, f"{would_be}: {event.why}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] if events else []
    users = f", {figures['due_users']} of {figures['users']} users deleted" if settings.cull_users else ""
    lines.append(
        f"{figures['planned'] - figures['due_users']} of {figures['running']} running servers would be stopped{users}."
    )
    if figures["running"] and not events:
        lines.append("-v shows all of them, and for how long they have been idle.")
    lines += [f"But {caveat}." for caveat in plan_caveats(done)]
    if most := max(done.idle_for.values(), default=0):
        rules = ", whatever rules and an arbiter say" if settings.rule or settings.arbiter else ""
        lines += ["", f"idle for at least{rules}"]
        for step, count in done.idle_for.items():
            mark = "  <- --timeout" if step == settings.timeout else ""
            bar = "#" * -(-count * 40 // most)
            lines.append(f"{format_duration(step):>7}  {bar}{bar and ' '}{count}{mark}")
    click.echo("\n".join(lines))


def plan_caveats(done: Pass) -> Iterator[str]:
    """Why a real pass would do less than planned, or more than somebody may expect."""
    settings, figures = done.settings, done.figures
    if blown := done.fuse_blown():
        yield blown
    if figures["planned"] and settings.idle_by == "both":
        yield "--idle-by both asks each of them first, and spares those in use"
    if figures["due_users"] or (settings.remove_named_servers and figures["planned"]):
        yield "on Kubernetes, what is deleted or removed takes its storage along (KubeSpawner.delete_pvc)"
    yield from caveats_of_scopes(done.identity, settings)
    for number, rule in done.judge.unused.items():
        yield f"rule {number}, {rule.text}, applies to nobody now"


def explanation(current: Pass, name: str) -> Iterator[tuple[str, str]]:
    """What decides about `USER/SERVER`, or `USER` and the default server, as labels and facts. Raises CullError."""
    hub = current.hub
    current.check_access()
    user_name, _, server_name = name.partition("/")
    if not (found := hub.look(user_name)):
        raise CullError(f"--explain: {hub.url} knows no user {one_line(user_name, 40)!r}.", Exit.USAGE)
    yield "hub", f"{hub.url}, JupyterHub {printable(hub.version, 40) or 'of an unknown version'}"
    yield "clock", ", ".join(filter(None, (format_time(hub.clock.now()), hub.clock.difference)))
    if server := find(found, server_name):
        yield from explain_target(current, server)
    else:
        others = ", ".join(map(str, found[1:]))
        yield "server", f"{Target(user_name, server_name)} is not running" + (f", only {others}" if others else "")
        yield "verdict", "nothing to stop"
    if current.settings.cull_users and not server_name:
        yield from explain_target(current, found[0], "a server is there" if found[1:] else "")
    for caveat in caveats_of_scopes(current.identity, current.settings):
        yield "but", caveat


def explain_target(current: Pass, target: Target, kept: str = "") -> Iterator[tuple[str, str]]:
    """What decides about a server or user. kept: why it is kept whatever is decided."""
    is_user, settings = target.is_user, current.settings
    event = current.ask_and_decide(Event(target, Verdict(False), "planned", ""))
    target, verdict, policy = event.target, event.verdict, current.judge.policy(target)
    now = current.hub.clock.now()
    yield ("user", printable(target.user)) if is_user else ("server", str(target))
    if current.asker and not is_user:
        asked = current.asker.asked.get(target.key, "no: its answer would not change the verdict")
        yield "asked", current.asker.first.get(asked, asked)
    if not is_user:
        yield "ready", "unknown" if target.doubt else why_not_ready(target) or "yes"
    for label, moment in (("active", target.active), ("born", target.born)):
        yield label, f"{format_time(moment)}, {format_duration(max(now - moment, ZERO))} ago" if moment else "unknown"
    for number, rule in () if target.doubt else current.judge.rules:
        if is_user and not rule.for_users:
            continue
        if failing := next((match for match in rule.matches if not match.holds(target)), None):
            values = ", ".join(failing.values(target)) or "none"
            yield f"rule {number}", f"{rule.text}: does not apply, {failing.name} is {one_line(values)}"
        else:
            only = ", its limits only to servers" if is_user and not rule.keep else ""
            yield f"rule {number}", f"{rule.text}: applies{only}"
            break
    for label, limit, since in (("timeout", policy.timeout, target.active), ("max-age", policy.max_age, target.born)):
        due = since and limit.duration < NEVER and min(since, now) + limit.duration
        yield label, f"{limit}, which is at {format_time(due)}" if due else str(limit)
    if settings.arbiter and not is_user:
        yield "arbiter", "decides in place of the timeout"
    kept = kept or (MISLEADING if target.misleading else "" if verdict.cull else verdict.reason)
    yield "verdict", f"kept: {kept}" if kept else f"would be {WOULD_BE[action(target, settings)]}: {verdict.reason}"


# ---- The loop, with token and signals

MANY = 10  # due servers and users; if there are more, log lines say how far the pass is


def read_token(path: str | None) -> str:
    """Read the API token from a file if there is one, else from $JUPYTERHUB_API_TOKEN. Raises CullError."""
    source = f"--token-file {path}" if path else "$JUPYTERHUB_API_TOKEN"
    try:
        token = os.getenv("JUPYTERHUB_API_TOKEN", "")
        if path:
            with open(path, encoding="ascii", errors="replace") as file:
                token = file.read(1 << 16)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and re.fullmatch("[0-9a-f]{32,}", path or ""):
            raise CullError("--token-file takes a file's name, and this looks like a token.", Exit.USAGE) from None
        must = "it must be a file that this user may read"
        raise CullError(f"{source} cannot be read: {error.strerror}; {must}.", Exit.USAGE) from None
    token = token.strip()
    if not token:
        state = "is empty" if path or "JUPYTERHUB_API_TOKEN" in os.environ else "is not set"
        there = "there" if path else "there, or into a file for --token-file"
        raise CullError(f"{source} {state}: put an API token of the Hub {there} (README: a first look).", Exit.USAGE)
    if not re.fullmatch("[!-~]+", token):
        raise CullError(f"{source} holds no API token: a token is one word of plain ASCII characters.", Exit.USAGE)
    SECRETS.add(token)
    return token


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set. A second signal ends the program at once."""
    stop = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def handle(number: int, _frame: object) -> None:
        for each in signals:  # PID 1, as in a container, would not be ended by the default action
            signal.signal(each, (lambda number, _: os._exit(128 + number)) if os.getpid() == 1 else signal.SIG_DFL)
        stop.set()
        if number == signal.SIGINT and sys.stderr.isatty():
            os.write(2, b"\nfinishing what is in flight; press Ctrl-C again to quit at once\n")

    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Loop:
    """Makes passes, as the settings say, until told to stop."""

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        """Read the first token. Raises CullError."""
        self.settings = settings
        self.log = Log(settings.level)
        self._stop = stop
        self._stdout_error: OSError | None = None  # why nobody can read the JSON any more
        self._token = read_token(settings.token_file)
        self._warned: dict[Key, datetime] = {}  # servers, and when they are due
        self._exit_codes: deque[Exit] = deque(maxlen=3)  # of the last passes
        self._told = Exit.DONE  # the exit code that --notify was told of last

    def run(self) -> Exit:
        """Make one pass, or passes until told to stop. Raises CullError, and OSError if nobody reads the JSON."""
        if self.settings.explain is not None:
            return self._explain(self.settings.explain)
        once = self.settings.once or self.settings.dry_run
        failures = 0
        interval = self.settings.interval.total_seconds()
        while True:
            began = monotonic()
            done = self._make_pass()
            failures = failures + 1 if done.exit_code else 0
            rest = max(interval - (monotonic() - began), 0)
            pause = min(2.0 ** min(failures, 20), interval) if failures else rest
            self._report(done, None if once or self._stop.is_set() else pause)
            if once and not self._stop.is_set():
                return done.exit_code
            wait_in_slices(self._stop, pause)
            if self._stop.is_set():
                break
            self._read_token_again()
        if not once:
            self.log.say("info", "told to stop")
            return Exit.DONE
        self.log.say("error", "told to stop before the pass was over")
        return max(done.exit_code, Exit.UNDONE)

    def _explain(self, name: str) -> Exit:
        """Explain one decision. Raises CullError."""
        with closing(Hub(self._token, self.settings, self._stop)) as hub:
            for label, fact in list(explanation(Pass(hub, self.settings, self.log, self._stop), name)):
                click.echo(f"{label:9}{fact}")
        return Exit.DONE

    def _make_pass(self) -> Pass:
        """Make a pass, and tell everybody what becomes of each server and user."""
        settings = self.settings
        table: list[Event] = []
        notices = Notices(settings.notify, self.log, self._stop) if settings.notify and not settings.dry_run else None

        def report(event: Event) -> None:
            if settings.dry_run and not settings.json:
                table.append(event._replace(target=event.target.without_models()))
            elif event.outcome == "kept":
                self.log.say("debug", str(event))
            else:
                self._print(event_fields(event, settings))
                if not settings.dry_run:
                    self._log_event(event, current)
                if notices and event.outcome in NOTIFIED:
                    notices.send(event_fields(event, settings))

        with closing(Hub(self._token, settings, self._stop)) as hub:
            current = Pass(hub, settings, self.log, self._stop, report, self._warned)
            current.run()
        self._warned = current.warned if current.complete else {**self._warned, **current.warned}
        if settings.dry_run and (current.complete or current.figures["users"]):
            show_plan(table, current)
        if notices:
            if alarm := self._alarm(current.exit_code):
                notices.send({**pass_fields(current), "outcome": alarm})
            notices.wait()
        return current

    def _log_event(self, event: Event, current: Pass) -> None:
        """Log what became of a server or user; if there are many, with how far the pass is."""
        due = current.figures["planned"]
        progress = f" ({current.figures['done']} of {due})" if due > MANY else ""
        if event.error:
            self.log.failure(f"{event}{progress}", event.error.kind)
        else:
            level = "warning" if event.outcome == "stopping" or event.verdict.in_doubt else "info"
            self.log.say(level, f"{event}{progress}")

    def _alarm(self, code: Exit) -> str:
        """What --notify is told of a pass, if anything: in a loop what lasts for three passes, as no restart does."""
        self._exit_codes.append(code)
        lasts = list(self._exit_codes) == [code] * 3 and code != self._told
        if not lasts and not (self.settings.once and code):
            return ""
        self._told = code
        return "pass_failed" if code else "pass_recovered"

    def _report(self, done: Pass, pause: float | None = None) -> None:
        """Report a pass, and in how many seconds the next one starts. Raises OSError if nobody reads the JSON."""
        self.log.repeated_failures()
        following = "" if pause is None else f"; next in {format_duration(timedelta(seconds=round(pause)))}"
        for error in done.errors:
            self.log.say("error", f"{error}{following}")
        figures = done.figures
        if not done.settings.dry_run and (figures["running"] or not done.errors):  # else there is nothing to count
            counts = [f"{figures['running']} running", f"{figures['planned']} due"]
            counts += [f"{figures[name]} {name.replace('_', ' ')}" for name in COUNTS if figures[name]]
            self.log.say("info", f"pass: {', '.join(counts)} in {done.seconds:.1f}s{following}")
        self._print(pass_fields(done))
        path = self.settings.metrics_file
        if path and not self.settings.dry_run:
            try:
                write_metrics(path, done)
            except (OSError, ValueError) as error:
                self.log.say("error", f"--metrics-file {path} is not written: {getattr(error, 'strerror', error)}")
        if self._stdout_error:
            raise self._stdout_error

    def _print(self, fields: Mapping[str, object]) -> None:
        """Print a line of JSON, if --json is set. If nobody can read it any more, the pass ends; the log goes on."""
        if self.settings.json and not self._stdout_error:
            try:
                click.echo(json.dumps(fields))
            except OSError as error:
                self._stdout_error = error
                self._stop.set()

    def _read_token_again(self) -> None:
        """Read the token again, so that a new one needs no restart. The last one stays if that fails."""
        try:
            self._token = read_token(self.settings.token_file)
        except CullError as error:
            self.log.say_once("warning", f"{error} The last token stays in use.")


# ---- The command line

ACTIVITY_INTERVAL = timedelta(minutes=5, seconds=30)  # JupyterHub.last_activity_interval, and some time to do it


class Option(click.Option):
    """An option of ours. White space around its values does not count."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert the text, or the texts."""
        if self.multiple:
            value = [each.strip() for each in value or () if each.strip() or len(value) == 1]
        return super().type_cast_value(ctx, value.strip() if isinstance(value, str) else value)


class Command(click.Command):
    """A command whose --help shows its options under their headings, and below each other in a narrow terminal."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, in the order in which they are declared."""
        sections: dict[str, list[Any]] = {}
        for param in self.get_params(ctx):
            if heading := HEADINGS.get(param.name or ""):
                records = sections[heading] = []
            names, text = param.get_help_record(ctx) or ("", "")
            records.append((names.replace(" [=", "[="), text))
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=32 if formatter.width >= 70 else 2)


def stop_idle_servers(**values: Any) -> Exit:
    """Stop the idle servers of a JupyterHub."""
    source_of: Callable[[str], Any] = click.get_current_context().get_parameter_source
    given = [name for name in ("log_level", "verbose", "quiet") if values[name]]
    first = min(map(source_of, given), default=None)  # of these, only what comes first counts
    settings = Settings(**values | dict.fromkeys(name for name in given if source_of(name) != first))
    chosen = {source_of("timeout"), source_of("user_timeout")} != {ParameterSource.DEFAULT}
    if settings.cull_users and not chosen:
        raise click.UsageError(
            "--cull-users needs --timeout or --user-timeout, such as --user-timeout=90d: by default it would delete"
            " users after 10 minutes."
        )
    timeouts = [] if settings.arbiter else [settings.timeout, *(rule.timeout for rule in settings.rule)]
    if settings.warn_before and any(timeout and timeout <= settings.warn_before for timeout in timeouts):
        raise click.UsageError("--warn-before must be shorter than --timeout and each rule's timeout=.")
    with stop_signals() as stop:
        loop = Loop(settings, stop)
        for warning in warnings_about(settings):
            loop.log.say("warning", warning)
        return loop.run()


def warnings_about(settings: Settings) -> Iterator[str]:
    """What in the settings or the environment is probably a mistake."""
    limits = [("--", settings.timeout, settings.max_age)]
    limits += [(f"rule {n}: ", rule.timeout or ZERO, rule.max_age or ZERO) for n, rule in enumerate(settings.rule, 1)]
    for name, timeout, age in limits:
        if timeout and timeout < ACTIVITY_INTERVAL and settings.idle_by == "hub":
            yield (
                f"{name}timeout {format_duration(timeout)} may stop servers in use: a Hub refreshes last_activity"
                " every 5m by default (JupyterHub.last_activity_interval); set at least 5m30s"
            )
        if age and age < ACTIVITY_INTERVAL:
            yield f"{name}max-age {format_duration(age)} stops all servers that are older than that, also those in use"
    if not settings.cull_users and not (settings.user_timeout is None and settings.user_max_age is None):
        yield "--user-timeout and --user-max-age do nothing without --cull-users"
    is_loop = settings.changes_something and not settings.once
    if settings.warn_before and is_loop and settings.interval > settings.warn_before:
        yield (
            f"--cull-every {format_duration(settings.interval)} is longer than --warn-before"
            f" {format_duration(settings.warn_before)}: some servers will be stopped without a warning"
        )
    known = [f"CULL_IDLE_{field.name.upper()}" for field in fields(Settings)]
    known += [f"CULL_IDLE_{name}" for name in NOTICE_VARIABLES]  # in the environment of a --notify command
    for name in sorted(os.environ):
        if name.startswith("CULL_IDLE_") and name not in known:
            near = "".join(f"; did you mean ${each}?" for each in get_close_matches(name, known, 1))
            yield f"${printable(name)} is not an option of this program{near}"


def make_command(program: str = PROGRAM) -> click.Command:
    """The command line, from the fields of Settings."""
    params: list[click.Parameter] = []
    for each in fields(Settings):
        attrs = dict(each.metadata)
        names = [f"--{each.name.replace('_', '-')}", *attrs.pop("names")]
        variables = [f"CULL_IDLE_{each.name.upper()}", *attrs.pop("envvar", [])]
        params.append(Option(names, envvar=variables, show_default=isinstance(attrs["default"], str), **attrs))
    command = Command(
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
    return click.version_option(__version__, prog_name=program, message="%(prog)s %(version)s")(command)


def usage_sentence(error: click.ClickException) -> str:
    """What is wrong with an option, named by the environment variable or the file that it came from."""
    if isinstance(error, click.BadParameter) and error.ctx and error.param and error.param.name:
        source = error.ctx.get_parameter_source(error.param.name)
        if source is ParameterSource.ENVIRONMENT:
            error.param_hint = next(f"${name}" for name in error.param.envvar or () if os.getenv(name))
        elif source is ParameterSource.DEFAULT_MAP:
            error.param_hint = f"{error.param.name.replace('_', '-')} in {error.ctx.params.get('config')}"
    if isinstance(error, click.NoSuchOption) and " " in error.option_name:
        return f"No such option '{error.option_name}'. Did you mean '{error.option_name.replace(' ', '=', 1)}'?"
    # click lists the empty text among the values of a boolean
    return error.format_message().replace("values: , ", "values: ")


def main(args: list[str] | None = None) -> int:
    """Run the command line, and turn each failure into a sentence; returns the exit code."""
    program = PROGRAM if args is not None else os.path.basename(sys.argv[0])
    nowhere = partial(open, os.devnull, "w")
    sys.stdout, sys.stderr = sys.stdout or nowhere(), sys.stderr or nowhere()  # None if the caller has closed it
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.filterwarnings("ignore", "http.cookiejar bug")  # a traceback, for an odd Set-Cookie
    if token := os.getenv("JUPYTERHUB_API_TOKEN", "").strip():
        SECRETS.add(token)  # before an arbiter is loaded, which may quote it in an exception
    sentence = ""
    try:
        exit_code = Exit(make_command(program).main(args, program, standalone_mode=False))
    except click.ClickException as error:
        sentence, exit_code = usage_sentence(error), Exit.USAGE
    except (click.Abort, KeyboardInterrupt):
        sentence, exit_code = "interrupted", Exit.UNDONE
    except CullError as error:
        sentence, exit_code = str(error), error.exit_code
    except OSError as error:  # all others are handled where they happen; click ends the program if it is a closed pipe
        sys.stdout = nowhere()  # or Python would try to write again at its end
        sentence, exit_code = f"stdout cannot be written: {error.strerror}", Exit.UNDONE
    try:
        sys.stderr.write(f"{program}: {sentence}\n" if sentence else "")
        sys.stderr.flush()
    except OSError:  # on a full disk the exit code is all that can tell
        sys.stderr = nowhere()  # or Python would try to write again at its end, and exit with 120
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
