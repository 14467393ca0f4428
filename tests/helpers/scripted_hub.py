"""A Hub over real sockets that misbehaves on command: for what a real JupyterHub cannot be made to do.

Left alone it answers as JupyterHub 6.1.1 does; real_hub/test_contract.py compares the two. In a test:

    with ScriptedHub() as hub:
        hub.add("ann", idle=7200)
        hub.fault("DELETE", "/users/ann/server", respond(503), reset())
        ...
        assert hub.running() == set()
"""

from __future__ import annotations

import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode

PREFIX = "/hub/api"
HOUR = 3600
# Idle times in seconds. Half a minute over: messages round down to whole minutes, so a slow test reads the same text.
LONG_AGO = 2 * HOUR + 30.0
NEARLY_DUE = 50 * 60 + 30.0  # with a timeout of an hour
PAGINATION = "application/jupyterhub-pagination+json"
NO_ACCESS = "No access to resources or resources not found"  # what a Hub says of whatever a filtered scope leaves out
DROP = object()  # in an `extra`: the Hub leaves this key out
FROM_CLOCK = "from the clock"  # for `ScriptedHub.date_header`: what `clock` says

LEAST_SCOPES = ("delete:servers", "list:users", "read:servers", "read:users:activity", "read:users:name")
ALL_SCOPES = (  # of a culler with admin:users, as the Hub expands them
    *(*LEAST_SCOPES, "admin:auth_state", "admin:users", "delete:users", "read:roles:users", "read:users"),
    *("read:users:groups", "users", "users:activity"),
)
SEEN_WITH = {  # the scopes that show a key of a user's model; without an entry, all do
    "roles": {"read:users", "read:roles:users"},
    "auth_state": {"admin:auth_state"},
    "admin": {"read:users", "read:users:name"},
    "groups": {"read:users", "read:users:groups"},
    "server": {"read:users"},
    "pending": {"read:users"},
    "created": {"read:users"},
    "last_activity": {"read:users", "read:users:activity"},
    "servers": {"read:servers"},
    "user_info": {"read:users", "read:users:name"},
}

Time = datetime | str | None
Reply = Callable[["Exchange"], "Answer"]


# What is on the Hub


@dataclass
class FakeJupyter:
    """What a server says of itself; models as a Jupyter server has them, with times of any kind."""

    last_activity: Time = None
    kernels: list[dict[str, Any]] = field(default_factory=list)
    terminals: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class FakeServer:
    """A server; times may be any text, and `extra` any keys of its JSON model."""

    name: str = ""
    last_activity: Time = None
    started: Time = None
    pending: str | None = None
    ready: bool = True
    user_options: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    stop_seconds: float = 0.0
    stops: bool = True
    says: FakeJupyter = field(default_factory=FakeJupyter)
    extra: dict[str, Any] = field(default_factory=dict)
    down_at: float | None = None

    @property
    def active(self) -> bool:
        """Whether the Hub has it at all: up, starting, or stopping."""
        return bool(self.ready or self.pending)


@dataclass
class FakeUser:
    """A user; `servers` also holds the stopped ones, which the Hub does not list."""

    name: str
    admin: bool = False
    created: Time = None
    last_activity: Time = None
    groups: list[str] = field(default_factory=list)
    servers: dict[str, FakeServer] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        return any(server.active for server in list(self.servers.values()))

    @property
    def ready(self) -> bool:
        return any(server.ready for server in list(self.servers.values()))


def hub_time(moment: Time) -> str | None:
    """A time as the Hub writes it; text stays as it is."""
    if not isinstance(moment, datetime):
        return moment
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC).replace(tzinfo=None)
    return moment.isoformat() + "Z"


def with_extra(model: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**model, **extra}.items() if value is not DROP}


def server_model(user: FakeUser, server: FakeServer, scopes: Iterable[str]) -> dict[str, Any]:
    owner, name = quote(user.name, safe="@~"), quote(server.name, safe="@~")
    model = {
        "name": server.name,
        "display_name": server.name,
        "full_name": f"{user.name}/{server.name}",
        "last_activity": hub_time(server.last_activity),
        "started": hub_time(server.started),
        "pending": server.pending,
        "ready": server.ready,
        "stopped": not server.active,
        "url": f"/user/{owner}/{name}/" if name else f"/user/{owner}/",
        "user_options": server.user_options,
        "progress_url": f"{PREFIX}/users/{owner}/{f'servers/{name}' if name else 'server'}/progress",
        "full_url": None,
        "full_progress_url": None,
    }
    if "admin:server_state" in scopes:
        model["state"] = server.state
    return with_extra(model, server.extra)


def granted_for(name: str, groups: Iterable[str], scopes: Iterable[str]) -> set[str]:
    """What the scopes of a token allow for a user; one may be filtered, as `delete:servers!group=students` is."""
    filters = {"", f"user={name}", *(f"group={group}" for group in groups)}
    return {scope for scope, _, only in (each.partition("!") for each in scopes) if only in filters}


def user_model(user: FakeUser, scopes: Iterable[str]) -> dict[str, Any]:
    default = user.servers.get("")
    servers = [server for server in list(user.servers.values()) if server.active]
    model = {
        "kind": "user",
        "name": user.name,
        "admin": user.admin,
        "roles": ["user", "admin"] if user.admin else ["user"],
        "auth_state": None,
        "groups": user.groups,
        "server": f"/user/{quote(user.name, safe='@~')}/" if default and default.ready else None,
        "pending": default.pending if default else None,
        "created": hub_time(user.created),
        "last_activity": hub_time(user.last_activity),
        "servers": {server.name: server_model(user, server, scopes) for server in servers},
        "user_info": None,
    }
    granted = granted_for(user.name, user.groups, scopes)
    seen = {key: value for key, value in model.items() if SEEN_WITH.get(key, granted) & granted}
    return with_extra(seen, user.extra)


# What is asked and answered


@dataclass(frozen=True)
class Request:
    """A request; `target` as it came, `segments` of the path below /hub/api decoded, headers in lower case."""

    method: str
    target: str
    segments: tuple[str, ...]
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    time: float  # time.monotonic() when it arrived

    @property
    def path(self) -> str:
        """The raw target below /hub/api, without its query."""
        return self.target.partition("?")[0].removeprefix(PREFIX)

    @property
    def line(self) -> str:
        return f"{self.method} {self.target.removeprefix(PREFIX)}"


@dataclass(frozen=True)
class Answer:
    """What goes over the wire, and what becomes of the connection after it."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # sent in place of a status line, headers and body
    sent: int | None = None  # how many bytes of the body are really sent
    seconds_per_byte: float = 0.0
    end: str = "keep"  # the connection after it: keep, close or reset


@dataclass(frozen=True)
class Exchange:
    """A request to be answered: what a reply has to work with."""

    hub: ScriptedHub
    request: Request

    def normal(self) -> Answer:
        """Do what was asked, and say what Hub 6.1.1 says."""
        return self.hub.normal(self.request)


def as_json(status: int, content: object) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def error(status: int, message: str | None = None) -> Answer:
    return as_json(status, {"status": status, "message": message})


# Replies, for `ScriptedHub.fault`; `of` is the reply that they change


def normal() -> Reply:
    """As if there were no fault."""
    return Exchange.normal


def respond(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Reply:
    return lambda exchange: Answer(status, body, headers or {})


def respond_json(status: int, content: object, headers: Mapping[str, str] | None = None) -> Reply:
    answer = as_json(status, content)
    return respond(status, answer.body, {**answer.headers, **(headers or {})})


def of_hub(status: int, message: str | None = None) -> Reply:
    """The Hub's own error. Of a user that it does not know, its message is null."""
    return lambda _: error(status, message)


def raw(sent: bytes) -> Reply:
    """These bytes, HTTP or not, and the end of the connection."""
    return lambda exchange: Answer(raw=sent, end="close")


def redirect(to: str, status: int = 302) -> Reply:
    return respond(status, headers={"Location": to})


def html(status: int = 200, text: str = "<!DOCTYPE html><title>Sign in</title>") -> Reply:
    return respond(status, text.encode(), {"Content-Type": "text/html; charset=utf-8"})


def empty(status: int = 200) -> Reply:
    return respond(status, headers={"Content-Type": "application/json"})


def edited(change: Callable[[Any], object], of: Reply = Exchange.normal) -> Reply:
    """The JSON answer as `change` returns it: anything may be put in or left out."""
    return changed(lambda answer: replace(answer, body=json.dumps(change(json.loads(answer.body))).encode()), of)


def changed(change: Callable[[Answer], Answer], of: Reply) -> Reply:
    return lambda exchange: change(of(exchange))


def swapped(old: bytes, new: bytes, of: Reply = Exchange.normal) -> Reply:
    """The answer with other bytes in it: what `json.dumps` cannot write, or only slowly."""
    return changed(lambda answer: replace(answer, body=answer.body.replace(old, new)), of)


def truncated(keep: float = 0.5, of: Reply = Exchange.normal) -> Reply:
    """A well-formed answer whose body stops in the middle."""
    return changed(lambda answer: replace(answer, body=answer.body[: int(len(answer.body) * keep)]), of)


def reset() -> Reply:
    """A connection reset, and nothing done."""
    return lambda exchange: Answer(raw=b"", end="reset")


def reset_in_body(keep: float = 0.5, of: Reply = Exchange.normal) -> Reply:
    """Headers that promise the whole body, a part of it, a connection reset."""
    return changed(lambda answer: replace(answer, sent=int(len(answer.body) * keep), end="reset"), of)


def hang(seconds: float | None = None) -> Reply:
    """Nothing is done or said for so long, or until the end; then the connection is closed."""
    return slow(seconds, raw(b""))


def slow(seconds: float | None, of: Reply = Exchange.normal) -> Reply:
    """The answer, that much later."""
    return lambda exchange: then_do(lambda: exchange.hub.sleep(seconds), of)(exchange)


def drip(seconds: float = 0.1, of: Reply = Exchange.normal) -> Reply:
    """The headers at once, then the body with a pause before each byte."""
    return changed(lambda answer: replace(answer, seconds_per_byte=seconds), of)


def then_do(hook: Callable[[], object], of: Reply = Exchange.normal) -> Reply:
    """Call `hook` while the request is being handled, then answer: this makes races."""

    def reply(exchange: Exchange) -> Answer:
        hook()
        return of(exchange)

    return reply


def and_do(hook: Callable[[], object], of: Reply = Exchange.normal) -> Reply:
    """Make up the answer, call `hook`, send the answer, which by then is out of date."""

    def reply(exchange: Exchange) -> Answer:
        answer = of(exchange)
        hook()
        return answer

    return reply


def done_but_lost(of: Reply = Exchange.normal) -> Reply:
    """What was asked is done, but the connection is closed without a word."""
    return changed(lambda answer: Answer(raw=b"", end="close"), of)


@dataclass
class Fault:
    method: str
    pattern: re.Pattern[str]
    replies: Sequence[Reply]
    left: int | None
    used: int = 0

    def matches(self, request: Request) -> bool:
        texts = (request.target.removeprefix(PREFIX), request.path)
        return self.left != 0 and self.method in ("*", request.method) and any(map(self.pattern.fullmatch, texts))

    def take(self) -> Reply:
        reply = self.replies[self.used % len(self.replies)]
        self.used += 1
        if self.left is not None:
            self.left -= 1
        return reply


# The Hub


class ScriptedHub:
    """A Hub on a free port of 127.0.0.1, served by threads of this process while in its `with`.

    Attributes may be set at any time. An exception in a reply or a hook is answered with 500, and
    raised when the `with` is left.
    """

    def __init__(self, token: str = "scripted-token") -> None:
        self.token = token
        self.port = 0  # a free one, as soon as it listens
        self.version = "6.1.1"
        self.scopes: list[str] = list(ALL_SCOPES)
        self.clock: Callable[[], datetime] = lambda: datetime.now(UTC)
        self.date_header: str | None = FROM_CLOCK  # the Date header: FROM_CLOCK, None for none, or this text
        self.page_max = 200
        self.slow_stop = 10.0  # seconds for which a DELETE waits for the server to be down
        self.users: dict[str, FakeUser] = {}
        self.leads_to_servers = True  # a proxy, as a public address is; else the Hub's own port
        self.tokens: dict[str, dict[str, Any]] = {}  # the models of those that were made and not revoked, by their ids
        self.tokens_made = 0
        self.requests: list[Request] = []
        self.recording = True
        self.request_count = 0
        self.connection_count = 0
        self.in_flight = 0
        self.in_flight_max = 0  # the most DELETEs that were being handled at the same time
        self.stopped_count = 0
        self.errors: list[BaseException] = []
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._listener: _Listener | None = None
        self._closed: list[_Listener] = []

    def __enter__(self) -> Self:
        self.resume()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._ending.set()
        self.pause_listening()
        for listener in self._closed:
            listener.wait()
        if self.errors and kind is None:
            raise self.errors[0]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{PREFIX}"

    @property
    def now(self) -> datetime:
        """What `clock` says; setting it stops the clock there."""
        return self.clock()

    @now.setter
    def now(self, moment: datetime) -> None:
        self.clock = lambda: moment

    @property
    def connections_open(self) -> int:
        return len(self._listener.connections) if self._listener else 0

    def add_user(self, name: str, *, idle: float | None = 0.0, age: float | None = None, **fields: Any) -> FakeUser:
        """A user with no server, created `age` and last active `idle` (None: never) seconds ago."""
        now = self.now
        seen = None if idle is None else now - timedelta(seconds=idle)
        created = now - timedelta(seconds=(idle or 0.0) + 60 if age is None else age)
        self.users[name] = FakeUser(name, **{"created": created, "last_activity": seen, **fields})
        return self.users[name]

    def add(
        self,
        name: str,
        server: str = "",
        *,
        idle: float = 0.0,
        age: float | None = None,
        user_idle: float | None = None,
        **fields: Any,
    ) -> FakeServer:
        """A ready server; its user is made if need be. Seconds; `fields` as in FakeServer.

        The user was last active `user_idle` seconds ago, or else with the most recent server.
        """
        now = self.now
        seen = now - timedelta(seconds=idle)
        started = now - timedelta(seconds=idle + 60 if age is None else age)
        made = FakeServer(server, **{"last_activity": seen, "started": started, **fields})
        user = self.users.get(name) or self.add_user(name, idle=None, created=started)
        if user_idle is not None:
            user.last_activity = now - timedelta(seconds=user_idle)
        elif user.last_activity is None or (isinstance(user.last_activity, datetime) and user.last_activity < seen):
            user.last_activity = seen
        user.servers[server] = made
        return made

    def touch(self, name: str) -> None:
        """This user and all of their servers become active again."""
        user = self.users[name]
        user.last_activity = self.now
        for server in list(user.servers.values()):
            server.last_activity = user.last_activity

    def running(self) -> set[str]:
        """The servers that are not down, "ann" and "ann/gpu"."""
        self._settle()
        return {
            f"{user.name}/{server.name}" if server.name else user.name
            for user in list(self.users.values())
            for server in list(user.servers.values())
            if server.active
        }

    def fault(self, method: str, pattern: str, *replies: Reply, times: int | None = 1) -> None:
        """Let `replies`, one after the other, answer what matches, `times` over (None: for ever).

        `pattern` is a regular expression for the whole raw target below /hub/api, with or without
        its query; `method` may be "*". The first fault that matches and is not used up applies.
        """
        left = None if times is None else times * len(replies)
        with self._lock:
            self._faults.append(Fault(method, re.compile(pattern), replies, left))

    def lines(self, method: str | None = None) -> list[str]:
        """The requests so far, as "DELETE /users/ann/server"."""
        return [request.line for request in list(self.requests) if method in (None, request.method)]

    def pause_listening(self) -> None:
        """Close every connection, and refuse new ones until `resume`, on the same port."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener:
            self._closed.append(listener)
            listener.stop()
            listener.wait(seconds=1.0)  # not longer: a reply may hang

    def resume(self) -> None:
        with self._lock:
            if self._listener is None:
                self._listener = _Listener(self, self.port)
                self.port = int(self._listener.server_address[1])
                threading.Thread(target=self._listener.serve_forever, args=(0.005,), daemon=True).start()

    def sleep(self, seconds: float | None) -> None:
        """Wait for so long (None: for ever), or until the `with` is left."""
        self._ending.wait(seconds)

    # Answering

    def answer(self, request: Request) -> Answer:
        with self._lock:
            self.request_count += 1
            if self.recording:
                self.requests.append(request)
            self.in_flight += request.method == "DELETE"
            self.in_flight_max = max(self.in_flight_max, self.in_flight)
            fault = next((fault for fault in self._faults if fault.matches(request)), None)
            reply = fault.take() if fault else Exchange.normal
        try:
            return reply(Exchange(self, request))
        except Exception as problem:
            self.errors.append(problem)
            return error(500, f"scripted_hub: {problem!r}")
        finally:
            with self._lock:
                self.in_flight -= request.method == "DELETE"

    def normal(self, request: Request) -> Answer:
        if self.leads_to_servers and request.target.startswith("/user/"):
            return self._server_says(request)
        if not request.target.startswith("/hub/"):
            return Answer(302, headers={"Location": "/hub" + request.target})
        if not re.match(PREFIX + r"([/?]|$)", request.target):
            return html(404, "<!DOCTYPE html><title>Not Found</title>")(Exchange(self, request))
        self._settle()
        if request.method == "GET" and request.segments == ("",):
            return as_json(200, {"version": self.version})
        if request.headers.get("authorization") != f"token {self.token}":
            return error(403, None if request.segments == ("user",) else "Missing or invalid credentials.")
        return self._api(request)

    def _api(self, request: Request) -> Answer:
        match request.method, *request.segments:
            case "GET", "user":
                culler = {"kind": "service", "admin": False, "name": "culler", "token_id": "a2", "session_id": None}
                return as_json(200, {**culler, "scopes": self.scopes})
            case "GET", "users":
                return self._allowed("list:users") or self._list_users(request)
            case "GET", "users", name:
                found = self._find(name)
                look = as_json(200, user_model(found, self.scopes)) if found else error(404)
                return self._may(name, "read:users:name", "read:servers") or look
            case "DELETE", "users", name:
                return self._may(name, "delete:users") or self._delete_user(name)
            case "POST", "users", name, "tokens":
                return self._make_token(name, json.loads(request.body))
            case "DELETE", "users", name, "tokens", token:
                return self._may(name, "tokens") or self._revoke(name, token)
            case "DELETE", "users", name, "server":
                return self._may(name, "delete:servers") or self._stop(name, "", request.body)
            case "DELETE", "users", name, "servers", server:
                return self._may(name, "delete:servers") or self._stop(name, server, request.body)
            case _:
                return error(404)

    def _allowed(self, *scopes: str) -> Answer | None:
        if set(scopes) & {scope.partition("!")[0] for scope in self.scopes}:
            return None
        refused = "Action is not authorized with current scopes; requires any of"
        return error(403, f"{refused} [{', '.join(scopes)}]")

    def _may(self, name: str, *scopes: str) -> Answer | None:
        """None if one of these scopes of the token covers a user."""
        user = self._find(name)
        granted = granted_for(name, user.groups if user else [], self.scopes)
        return self._allowed(*scopes) or (None if granted & set(scopes) else error(404, NO_ACCESS))

    def _list_users(self, request: Request) -> Answer:
        paginated = request.headers.get("accept") == PAGINATION
        query = request.query
        state = query.get("state")
        if state not in (None, "", "active", "ready", "inactive"):
            return error(400, f"Unrecognized state filter: {state!r}")
        try:
            offset = abs(int(query.get("offset", 0)))
            limit = abs(int(query.get("limit", 50 if paginated else self.page_max)))
        except ValueError:
            return error(400, "Invalid argument type, offset and limit must be integers")
        limit = max(1, min(limit, self.page_max))
        models, total = self._page(state, offset, limit)
        body = f"[{', '.join(models)}]"
        if paginated:
            following: dict[str, object] | None = None
            if offset + limit < total:
                following = {"offset": offset + limit, "limit": limit}
                following["url"] = f"{self.url}/users?{urlencode({**query, **following})}"
            page = {"offset": offset, "limit": limit, "total": total, "next": following}
            body = f'{{"items": {body}, "_pagination": {json.dumps(page)}}}'
        return Answer(200, body.encode(), {"Content-Type": "application/json"})

    def _page(self, state: str | None, offset: int, limit: int) -> tuple[list[str], int]:
        """The users' models as JSON, and how many users the pages share.

        As on the real Hub, the pages are of users with *active* servers: `ready` takes users off
        a page that is cut already, so that a page may be short, or empty, and not be the last.
        """
        users = [user for user in list(self.users.values()) if self._in_state(user, state)]
        shown = [user for user in users[offset : offset + limit] if state != "ready" or user.ready]
        return [json.dumps(user_model(user, self.scopes)) for user in shown], len(users)

    def _in_state(self, user: FakeUser, state: str | None) -> bool:
        seen = "list:users" in granted_for(user.name, user.groups, self.scopes)
        return seen and (not state or user.active == (state != "inactive"))

    def _find(self, name: str) -> FakeUser | None:
        return self.users.get(name)

    def _make_token(self, name: str, asked: Mapping[str, Any]) -> Answer:
        if name not in self.users or self._may(name, "tokens"):
            return error(403, f"Service {name} not found or no permissions to generate tokens")
        with self._lock:
            self.tokens_made += 1
            model: dict[str, Any] = {"user": name, "id": f"a{self.tokens_made}", "note": asked["note"]}
        now = self.now
        model |= {"kind": "api_token", "roles": [], "session_id": None, "oauth_client": "JupyterHub"}
        model |= {"created": hub_time(now), "last_activity": None}
        model["expires_at"] = hub_time(now + timedelta(seconds=asked["expires_in"]))
        model["scopes"] = [f"read:users:name!user={name}", *asked["scopes"], f"read:users:groups!user={name}"]
        model["token"] = f"token-{model['id']}-of-{quote(name)}"
        self.tokens[model["id"]] = model
        return as_json(201, model)

    def _revoke(self, name: str, token: str) -> Answer:
        if name not in self.users:
            return error(404, f"No such user: {name}")
        return Answer(204) if self.tokens.pop(token, None) else error(404, f"No such token {token} for user {name}")

    def _server_says(self, request: Request) -> Answer:
        """What a server answers that is reached through the proxy."""
        _, _, name, *server_name, _, what = (unquote(part) for part in request.target.partition("?")[0].split("/"))
        user = self._find(name)
        server = user.servers.get("".join(server_name)) if user else None
        if server is None or not server.ready:
            return Answer(302, headers={"Location": "/hub" + request.target})
        scope = f"access:servers!server={name}/{server.name}"
        words = request.headers.get("authorization", "").removeprefix("token ")
        if not any(token["token"] == words and scope in token["scopes"] for token in self.tokens.values()):
            return error(403, "Forbidden")
        models: dict[str, Any] = {
            "status": {"last_activity": server.says.last_activity or server.started},
            "kernels": server.says.kernels,
            "terminals": server.says.terminals,
        }
        return Answer(200, json.dumps(models[what], default=hub_time).encode(), {"Content-Type": "application/json"})

    def _delete_user(self, name: str) -> Answer:
        user = self._find(name)
        if user is None:
            return error(404)
        default = user.servers.get("")
        if default and default.ready and not default.pending:
            self._bring_down(user, default)
        if default and default.pending == "stop":
            return error(400, f"{name}'s server is in the process of stopping, please wait.")
        if user.active:  # the default server is starting, or a named one is not stopped
            return error(500, "Internal Server Error")
        self.users.pop(name, None)
        return Answer(204)

    def _stop(self, name: str, server_name: str, body: bytes) -> Answer:
        user = self._find(name)
        if user is None:
            return error(404)
        try:
            remove = bool((json.loads(body) or {}).get("remove")) if body else False
        except (ValueError, AttributeError):
            return error(400, "Invalid JSON in body of request")
        server = user.servers.get(server_name)
        if server is None and server_name:
            return error(404, f"{name} has no server named '{server_name}'")
        if remove and not server_name:
            return error(400, "Cannot delete the default server")
        if server and server.active and server.pending != "stop":
            self._bring_down(user, server)
        if server and server.pending == "stop":
            return Answer(202, headers={"Content-Type": "text/plain"})
        if remove:
            user.servers.pop(server_name, None)
        return Answer(204, headers={"Content-Type": "text/plain"})

    def _bring_down(self, user: FakeUser, server: FakeServer) -> None:
        """Stop a server, and wait for it, but not longer than `slow_stop`."""
        with self._lock:
            server.pending, server.ready = "stop", False
            server.down_at = time.monotonic() + server.stop_seconds if server.stops else None
        if server.stops:
            self.sleep(min(server.stop_seconds, self.slow_stop))
        if server.stops and server.stop_seconds <= self.slow_stop:
            self._is_down(user, server)

    def _is_down(self, user: FakeUser, server: FakeServer) -> None:
        with self._lock:
            if server.pending == "stop":
                server.pending = server.down_at = None
                server.last_activity = user.last_activity = self.now
                self.stopped_count += 1

    def _settle(self) -> None:
        """Slow stops that are over by now are over."""
        for user in list(self.users.values()):
            for server in list(user.servers.values()):
                if server.down_at is not None and server.down_at <= time.monotonic():
                    self._is_down(user, server)


# The sockets


class _Listener(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, hub: ScriptedHub, port: int) -> None:
        self.hub = hub
        self.connections: dict[socket.socket, threading.Thread] = {}
        super().__init__(("127.0.0.1", port), _Connection)

    def stop(self) -> None:
        """Close the port and every connection."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def wait(self, seconds: float = 10.0) -> None:
        """Wait for the threads of its connections."""
        for thread in list(self.connections.values()):
            if thread is not threading.current_thread():
                thread.join(seconds)

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self.connections[request] = thread
        self.hub.connection_count += 1
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        problem = sys.exception()
        if problem and not isinstance(problem, OSError):  # which clients that go away cause
            self.hub.errors.append(problem)


class _Connection(BaseHTTPRequestHandler):
    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _exchange(self) -> None:
        target = self.requestline.split(" ")[1]
        path, _, query = target.partition("?")
        below = path.removeprefix(PREFIX).removeprefix("/")
        request = Request(
            method=self.command,
            target=target,
            segments=tuple(unquote(segment) for segment in below.split("/")),
            query=dict(parse_qsl(query, keep_blank_values=True)),
            headers={name.lower(): value for name, value in self.headers.items()},
            body=self.rfile.read(int(self.headers.get("Content-Length", 0))),
            time=time.monotonic(),
        )
        self._send(self.server.hub.answer(request))

    do_GET = do_POST = do_DELETE = _exchange  # noqa: N815

    def _send(self, answer: Answer) -> None:
        hub, body = self.server.hub, answer.body[: answer.sent]
        head = self._head(answer) if answer.raw is None else answer.raw
        if answer.seconds_per_byte:
            self.wfile.write(head)
            for index in range(len(body)):
                hub.sleep(answer.seconds_per_byte)
                self.wfile.write(body[index : index + 1])
        else:
            self.wfile.write(head + (body if answer.raw is None else b""))
        self.close_connection = self.close_connection or answer.end != "keep"
        if answer.end == "reset":  # RST in place of FIN, once what was sent had time to arrive
            hub.sleep(0.05 if body else 0.0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()

    def _head(self, answer: Answer) -> bytes:
        hub = self.server.hub
        headers = {"Server": "TornadoServer/6.5", "X-Jupyterhub-Version": hub.version}
        if hub.date_header is not None:
            now = format_datetime(hub.now.astimezone(UTC), usegmt=True)
            headers["Date"] = now if hub.date_header == FROM_CLOCK else hub.date_header
        if answer.status != 204:
            headers["Content-Length"] = str(len(answer.body))
        headers.update(answer.headers)
        reason = dict(self.responses).get(answer.status, ("Unknown",))[0]
        lines = [f"HTTP/1.1 {answer.status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
