"""A table of faults and places: what a pass culls and keeps, and how it ends, whatever the Hub or the network does.

The Hub has six users on three pages: ann and busy, bob and dot, cat and zoe. The servers of ann, bob and cat are idle,
those of busy and dot active, and zoe has none. A pass that nothing disturbs stops the three and deletes zoe.
"""

from __future__ import annotations

import gzip
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runs import Cull
from scripted_hub import (
    LONG_AGO,
    Answer,
    Exchange,
    Reply,
    ScriptedHub,
    drip,
    edited,
    empty,
    hang,
    html,
    raw,
    redirect,
    reset,
    reset_in_body,
    respond,
    respond_json,
    user_model,
)

import cull_idle

REQUEST_TIMEOUT = 0.4
ENOUGH_TIME = 1.2  # for one request that times out and all others; seconds
TRIES = 4
MEBIBYTE = 1 << 20
GZIP = {"Content-Encoding": "gzip"}

# Places: the requests that the fault answers

PLACES = {
    "first page": ("GET", r"/users\?limit=2"),
    "middle page": ("GET", r"/users\?limit=2&offset=2"),
    "look": ("GET", "/users/bob"),
    "DELETE": ("DELETE", "/users/bob/server"),
}


# How a pass ends


class Pass(NamedTuple):
    """The servers it stopped, the users it deleted, its exit code and the number of ERROR lines."""

    stopped: str
    deleted: str
    exit_code: int
    errors: int


DONE = Pass("ann bob cat", "zoe", 0, 0)
OUTCOMES = {
    # The fault passes, or is none: all is done.
    "+": dict.fromkeys(PLACES, DONE),
    # The page fails the pass, and what was due before it is stopped; a look or DELETE fails only bob.
    "-": {
        "first page": Pass("", "", 3, 1),
        "middle page": Pass("ann", "", 1, 1),
        "look": Pass("ann cat", "zoe", 1, 1),
        "DELETE": Pass("ann cat", "zoe", 1, 1),
    },
    # The token may not: the pass ends.
    "x": {
        "first page": Pass("", "", 3, 1),
        "middle page": Pass("ann", "", 3, 1),
        "look": Pass("ann", "", 3, 1),
        "DELETE": Pass("ann", "", 3, 1),
    },
    # Nothing answers any more: all that comes later fails too.
    "d": {
        "first page": Pass("", "", 3, 1),
        "middle page": Pass("", "", 1, 2),
        "look": Pass("ann", "", 1, 2),  # three failures, of which two are only counted
        "DELETE": Pass("ann", "", 1, 2),
    },
    # In doubt a user is kept: ann on the first page, else bob.
    "k": {
        "first page": Pass("bob cat", "zoe", 0, 0),
        "middle page": Pass("ann cat", "zoe", 0, 0),
        "look": Pass("ann cat", "zoe", 0, 0),
    },
    # The page is read, but the list ends with it.
    "e": {"first page": Pass("ann", "", 1, 1), "middle page": Pass("ann bob", "", 1, 1)},
}


# Faults that scripted_hub does not have


def reset_in_head() -> Reply:
    """A connection reset within the first line of the answer."""
    return lambda exchange: Answer(raw=b"HTTP/1.1 20", end="reset")


class Surroundings(NamedTuple):
    """What a reply may need."""

    hub: ScriptedHub
    elsewhere: str
    lasting: bool
    monkeypatch: pytest.MonkeyPatch


class Made(NamedTuple):
    """A reply that needs its surroundings."""

    make: Callable[[Surroundings], Reply]


def go_down(around: Surroundings) -> Reply:
    """The listener is down: for good, or until it has refused a connection."""
    connect = socket.socket.connect

    def resume_when_refused(self: socket.socket, address: Any) -> None:
        try:
            connect(self, address)
        except ConnectionRefusedError:
            around.hub.resume()
            raise

    if not around.lasting:
        around.monkeypatch.setattr(socket.socket, "connect", resume_when_refused)

    def reply(exchange: Exchange) -> Answer:
        exchange.hub.pause_listening()
        return Answer(raw=b"", end="close")

    return reply


def gigantic(zipped: bool = False) -> Reply:
    """What would be a good answer, but for the spaces at its end."""

    def reply(exchange: Exchange) -> Answer:
        body = b"" if exchange.request.method == "DELETE" else exchange.normal().body
        body += b" " * MEBIBYTE * (16 if zipped else 1)
        return Answer(200, gzip.compress(body) if zipped else body, GZIP if zipped else {})

    return reply


def without_pending(user: dict[str, Any]) -> dict[str, Any]:
    """A user whose servers do not say what the Hub is doing with them."""
    servers = user["servers"].items()
    kept = {name: {key: server[key] for key in server if key != "pending"} for name, server in servers}
    return {**user, "servers": kept}


def each_user(change: Callable[[dict[str, Any]], object]) -> Reply:
    """The idle user of the page, or the user looked at, as `change` returns it."""

    def edit(body: dict[str, Any]) -> object:
        if "items" not in body:
            return change(body)
        items = [change(user) if user["name"] in ("ann", "bob") else user for user in body["items"]]
        return {**body, "items": items}

    return edited(edit)


def next_is(following: object) -> Reply:
    """A page that says this of the next one."""
    return edited(lambda body: {**body, "_pagination": {**body["_pagination"], "next": following}})


def next_is_elsewhere(around: Surroundings) -> Reply:
    """A page whose next one is said to be on another host."""

    def edit(body: dict[str, Any]) -> object:
        following = {**body["_pagination"]["next"], "url": f"{around.elsewhere}/users"}
        return {**body, "_pagination": {**body["_pagination"], "next": following}}

    return edited(edit)


def go_elsewhere(status: int) -> Made:
    """A redirect to another host."""
    return Made(lambda around: redirect(f"{around.elsewhere}/users", status))


def users_again(exchange: Exchange) -> Answer:
    """A page that shows the users of the pages before and after it too."""
    hub = exchange.hub
    everybody = [user_model(hub.users[name], hub.scopes) for name in ("cat", "ann", "bob", "busy")]
    return edited(lambda body: {**body, "items": [*body["items"], *everybody]})(exchange)


def busy_status(status: int, retry_after: str | None = None) -> Reply:
    return respond(status, headers={} if retry_after is None else {"Retry-After": retry_after})


def not_200(status: int) -> Reply:
    return respond_json(status, {"status": status, "message": "Oops"})


TOO_MANY_HEADERS = b"HTTP/1.1 200 OK\r\n" + b"X-Header: 1\r\n" * 200 + b"Content-Length: 0\r\n\r\n"

# The table: how a pass ends if the fault happens once, and if it lasts. Blank where there is no such fault.

TABLE: list[tuple[str, Reply | Made, str, str, str, str]] = [
    # fault, the Hub's reply                                                        first middle look DELETE
    ("connection refused", Made(go_down), "+d", "+d", "+d", "+d"),
    ("reset before the answer", reset(), "+-", "+-", "+-", "+-"),
    ("reset in the first line", reset_in_head(), "+-", "+-", "+-", "+-"),
    ("reset in the body", reset_in_body(of=respond(200, b"x" * 99)), "+-", "+-", "+-", "+-"),
    ("closed without a word", raw(b""), "+-", "+-", "+-", "+-"),
    ("closed in the body", raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n["), "+-", "+-", "+-", "+-"),
    ("closed in a chunk", raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n["), "+-", "+-", "+-", "+-"),
    ("no HTTP", raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "+-", "+-", "+-", "+-"),
    ("too many headers", raw(TOO_MANY_HEADERS), "+-", "+-", "+-", "+-"),
    ("no answer", hang(), "--", "--", "--", "--"),
    ("a drip of the body", drip(0.1, of=respond(200, b"x" * 99)), "--", "--", "--", "--"),
    ("429", busy_status(429), "+-", "+-", "+-", "+-"),
    ("429, again in 1s", busy_status(429, "1"), "+-", "+-", "+-", "+-"),
    ("429, again in 3 years", busy_status(429, "99999999"), "+-", "+-", "+-", "+-"),
    ("429, again before", busy_status(429, "-5"), "+-", "+-", "+-", "+-"),
    ("503", busy_status(503), "+-", "+-", "+-", "+-"),
    ("503, again in 3 years", busy_status(503, "99999999"), "+-", "+-", "+-", "+-"),
    ("503, again never", busy_status(503, "9" * 400), "+-", "+-", "+-", "+-"),
    ("503, again before", busy_status(503, "-99999999"), "+-", "+-", "+-", "+-"),
    ("503, again some time", busy_status(503, "soon\x85;"), "+-", "+-", "+-", "+-"),
    ("503, again in 9999", busy_status(503, "Fri, 31 Dec 9999 23:59:59 GMT"), "+-", "+-", "+-", "+-"),
    ("503, again in 1970", busy_status(503, "Thu, 01 Jan 1970 00:00:00 GMT"), "+-", "+-", "+-", "+-"),
    ("502", not_200(502), "+-", "+-", "+-", "+-"),
    ("504", not_200(504), "+-", "+-", "+-", "+-"),
    ("502 in HTML", html(502), "+-", "+-", "+-", "+-"),
    ("500", not_200(500), "--", "--", "--", "--"),
    ("400", not_200(400), "--", "--", "--", "--"),
    ("401", not_200(401), "xx", "xx", "xx", "xx"),
    ("403", not_200(403), "xx", "xx", "xx", "xx"),
    ("302 to another host", go_elsewhere(302), "--", "--", "--", "--"),
    ("308 to another host", go_elsewhere(308), "--", "--", "--", "--"),
    ("HTML", html(), "--", "--", "--", "--"),
    ("an empty body", empty(), "--", "--", "--", "--"),
    ("truncated JSON", respond(200, b'{"items": [{"name": "an'), "--", "--", "--", "--"),
    ("no UTF-8", respond(200, b'["\xff\xfe"]'), "--", "--", "--", "--"),
    ("no gzip", respond(200, b"[]", GZIP), "--", "--", "--", "--"),
    ("a dict", respond_json(200, {}), "--", "--", "--", "--"),
    ("a number", respond_json(200, 5), "--", "--", "--", "--"),
    ("a number too long to read", respond(200, b"9" * 9999), "++", "++", "--", "--"),
    ("null", respond_json(200, None), "--", "--", "--", "--"),
    ("users that are a dict", respond_json(200, {"items": {}, "_pagination": {"next": None}}), "--", "--", "--", "--"),
    ("a gigantic body", gigantic(), "++", "++", "--", "--"),
    ("a gigantic body, zipped", gigantic(zipped=True), "", "", "--", "--"),
    ("deep JSON", respond(200, b"[" * 99_999), "++", "++", "--", "--"),
    ("a user without a name", each_user(lambda user: {**user, "name": None}), "kk", "kk", "--", ""),
    ("a user that is a number", each_user(lambda user: 5), "kk", "kk", "--", ""),
    ("servers that are a list", each_user(lambda user: {**user, "servers": [1]}), "kk", "kk", "kk", ""),
    ("a server that is a number", each_user(lambda user: {**user, "servers": {"": 5}}), "kk", "kk", "kk", ""),
    ("a server without a pending", each_user(without_pending), "kk", "kk", "kk", ""),
    ("the next page is this one", next_is({"offset": 0}), "ee", "", "", ""),
    ("the next page is this one, again", next_is({"offset": 2}), "", "ee", "", ""),
    ("the next page is the first", next_is({"offset": 0}), "", "ee", "", ""),
    ("the next page is before the first", next_is({"offset": -2}), "ee", "ee", "", ""),
    ("the next page is on another host", Made(next_is_elsewhere), "++", "++", "", ""),
    ("the same users on several pages", users_again, "++", "++", "", ""),
]


class Case(NamedTuple):
    """One cell of the table, and whether the fault happens once or lasts."""

    fault: str
    reply: Reply | Made
    place: str
    lasting: bool
    retried: bool
    expected: Pass


def cases() -> Iterator[Any]:
    """All cells of the table, with ids."""
    for fault, reply, *cells in TABLE:
        for place, cell in zip(PLACES, cells, strict=True):
            for lasting, code in enumerate(cell):
                case = Case(fault, reply, place, bool(lasting), cell in ("+-", "+d"), OUTCOMES[code][place])
                yield pytest.param(case, id=f"{fault}-{place}-{('once', 'lasting')[lasting]}")


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The URL of another host, to which nobody may even connect."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/hub/api"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cull_idle, "PAUSES", (0.0,) * (TRIES - 1))
    monkeypatch.setattr(cull_idle, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(cull_idle, "ANSWER", (MEBIBYTE, 1_000_000))
    monkeypatch.setattr("random.sample", lambda items, _: items)  # what is due is culled in the order of the list


@pytest.fixture
def six_users(scripted: ScriptedHub) -> ScriptedHub:
    """The Hub that this module's docstring describes."""
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("busy", idle=0, age=LONG_AGO, user_idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    scripted.add("dot", idle=0, age=LONG_AGO, user_idle=LONG_AGO)
    scripted.add("cat", idle=LONG_AGO)
    scripted.add_user("zoe", idle=LONG_AGO)
    return scripted


def counted(reply: Reply, calls: Counter[str]) -> Reply:
    """The reply, and a note that it was given."""

    def count(exchange: Exchange) -> Answer:
        calls["faults"] += 1
        return reply(exchange)

    return count


@pytest.mark.parametrize("case", list(cases()))
def test_a_fault_keeps_what_is_in_doubt_and_nothing_else(
    cull_scripted: Cull, six_users: ScriptedHub, elsewhere: str, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    calls = Counter[str]()
    reply = case.reply
    if isinstance(reply, Made):
        reply = reply.make(Surroundings(six_users, elsewhere, case.lasting, monkeypatch))
    six_users.fault(*PLACES[case.place], counted(reply, calls), times=None if case.lasting else 1)

    began = time.monotonic()
    result = cull_scripted(
        *("--timeout", "1h", "--cull-users", "--api-page-size", "2"),
        *("--concurrency", "1", "--request-timeout", str(REQUEST_TIMEOUT)),
    )
    seconds = time.monotonic() - began

    users = {"ann", "busy", "bob", "dot", "cat", "zoe"}
    deleted = users - six_users.users.keys()
    stopped = users - {"zoe"} - six_users.running()
    ended = Pass(" ".join(sorted(stopped)), " ".join(sorted(deleted)), result.exit_code, len(result.errors))
    assert ended == case.expected

    asked_to_go = {line.split("/")[2] for line in six_users.lines("DELETE")}
    assert not asked_to_go & {"busy", "dot"}
    assert all(re.match(r"(INFO|WARNING|ERROR) +\S", line) for line in result.lines), "one line for each sentence"
    assert len(set(result.lines)) == len(result.lines), "nothing is said twice"
    assert all(re.search(r"(GET|DELETE) /users|; the Hub answered ", error) for error in result.errors)
    assert seconds < ENOUGH_TIME
    if case.fault != "connection refused" and case.expected.errors:
        assert calls["faults"] == (TRIES if case.retried else 1)
    assert calls["faults"]


# No more threads


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_all_that_is_due_is_done_by_the_threads_there_are(
    cull: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, threads: int
) -> None:
    users, servers = ([f"{what}{number}" for number in range(30)] for what in ("user", "server"))
    for user, server in zip(users, servers, strict=True):
        scripted.add_user(user, idle=LONG_AGO)
        scripted.add(server, idle=LONG_AGO)
    started: list[threading.Thread] = []
    really_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("cull_idle"):
            if len(started) >= threads:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        really_start(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    notified = tmp_path / "notified"
    notify = f"--notify=sh -c 'echo $CULL_IDLE_USER >> {notified}'"
    args = ["--once", "--url", scripted.url, "--timeout=1h", "--cull-users", notify]
    result = cull(*args, token=scripted.token)
    assert result.exit_code == 0
    assert len(started) == threads
    expected = [f"DELETE /users/{name}" for name in users] + [f"DELETE /users/{name}/server" for name in servers]
    assert sorted(scripted.lines("DELETE")) == sorted(expected)
    assert sorted(notified.read_text().split()) == sorted([*users, *servers])
