"""A table of faults and places: what a pass culls and keeps, and how it ends, whatever the Hub or the network does.

The Hub has six users on three pages: ann and busy, bob and dot, cat and zoe. The servers of ann, bob and cat are idle,
those of busy and dot active, and zoe has none. A pass that nothing disturbs stops the three and deletes zoe.
"""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from runs import Cull
from scenes import Play, Scene, fault, idle
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
    of_hub,
    raw,
    redirect,
    reset,
    reset_in_body,
    respond,
    respond_json,
)

import cull_idle

MEBIBYTE = 1 << 20
GZIP = {"Content-Encoding": "gzip"}
ELSEWHERE = "http://127.0.0.1:1/hub/api/users"  # where nobody may knock
PAUSES = cull_idle.PAUSES
TRIES = len(PAUSES) + 1

# Places: the requests that the fault answers

PLACES = {
    "token": ("GET", "/user"),
    "first page": ("GET", r"/users\?limit=2"),
    "middle page": ("GET", r"/users\?limit=2&offset=2"),
    "look": ("GET", "/users/bob"),
    "DELETE": ("DELETE", "/users/bob/server"),
}


class Pass(NamedTuple):
    """How a pass ends: the servers it stopped, the users it deleted, its exit code and the number of ERROR lines."""

    stopped: str
    deleted: str
    exit_code: int
    errors: int


DONE = Pass("ann bob cat", "zoe", 0, 0)
NOTHING = Pass("", "", 3, 1)
OUTCOMES = {
    # The fault passes, or is none: all is done.
    "+": dict.fromkeys(PLACES, DONE),
    # The page fails the pass, and what was due before it is stopped; a look or DELETE fails only bob.
    "-": {
        "token": NOTHING,
        "first page": NOTHING,
        "middle page": Pass("ann", "", 1, 1),
        "look": Pass("ann cat", "zoe", 1, 1),
        "DELETE": Pass("ann cat", "zoe", 1, 1),
    },
    # The token may not: the pass ends.
    "x": {
        "first page": NOTHING,
        "middle page": Pass("ann", "", 3, 1),
        "look": Pass("ann", "", 3, 1),
        "DELETE": Pass("ann", "", 3, 1),
    },
    # Nothing answers any more: all that comes later fails too.
    "d": {
        "token": NOTHING,
        "first page": NOTHING,
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


def go_down(exchange: Exchange) -> Answer:
    """The listener is down: for good, or until it has refused a connection."""
    exchange.hub.pause_listening()
    return Answer(raw=b"", end="close")


def gigantic(zipped: bool = False) -> Reply:
    """What would be a good answer, but for the spaces at its end."""

    def reply(exchange: Exchange) -> Answer:
        body = b"" if exchange.request.method == "DELETE" else exchange.normal().body
        body += b" " * MEBIBYTE * (16 if zipped else 1)
        return Answer(200, gzip.compress(body) if zipped else body, GZIP if zipped else {})

    return reply


def each_user(change: Callable[[dict[str, Any]], object]) -> Reply:
    """The idle user of the page, or the user looked at, as `change` returns it."""

    def edit(body: dict[str, Any]) -> object:
        if "items" not in body:
            return change(body)
        items = [change(user) if user["name"] in ("ann", "bob") else user for user in body["items"]]
        return {**body, "items": items}

    return edited(edit)


def without_pending(user: dict[str, Any]) -> dict[str, Any]:
    """A user whose servers do not say what the Hub is doing with them."""
    for server in user["servers"].values():
        del server["pending"]
    return user


def next_is(following: object) -> Reply:
    """A page that says this of the next one."""
    return edited(lambda body: {**body, "_pagination": {**body["_pagination"], "next": following}})


TOO_MANY_HEADERS = b"HTTP/1.1 200 OK\r\n" + b"X-Header: 1\r\n" * 200 + b"Content-Length: 0\r\n\r\n"
LAST = {"_pagination": {"next": None}}
NO_END = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n[" + b" " * 2 * MEBIBYTE

# The table: how a pass ends if the fault happens once, and if it lasts. Dots where there is no such fault.

TABLE: list[tuple[str, Reply, str]] = [
    # fault, the Hub's reply, and what it does to each of the places: token, first page, middle page, look, DELETE
    ("connection refused", go_down, "+d +d +d +d +d"),
    ("reset before the answer", reset(), "+- +- +- +- +-"),
    ("reset in the first line", lambda _: Answer(raw=b"HTTP/1.1 20", end="reset"), "+- +- +- +- +-"),
    ("reset in the body", reset_in_body(of=respond(200, b"x" * 99)), "+- +- +- +- +-"),
    ("closed without a word", raw(b""), "+- +- +- +- +-"),
    ("closed in the body", raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n["), "+- +- +- +- +-"),
    ("closed in a chunk", raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n["), "+- +- +- +- +-"),
    ("no HTTP", raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "+- +- +- +- +-"),
    ("too many headers", raw(TOO_MANY_HEADERS), "+- +- +- +- +-"),
    ("no answer", hang(), "- - - - -"),
    ("a drip of the body", drip(0.1, of=respond(200, b"x" * 99)), "- - - - -"),
    ("429", respond(429), "+- +- +- +- +-"),
    ("502", of_hub(502), "+- +- +- +- +-"),
    ("502 in HTML", html(502), "+- +- +- +- +-"),
    ("503", respond(503), "+- +- +- +- +-"),
    ("504", of_hub(504), "+- +- +- +- +-"),
    ("500", of_hub(500, "Oops"), "++ -- -- -- --"),
    ("400", of_hub(400, "Oops"), "++ -- -- -- --"),
    ("401", of_hub(401, "Oops"), "++ xx xx xx xx"),
    ("403", of_hub(403, "Oops"), "++ xx xx xx xx"),
    ("302 to another host", redirect(ELSEWHERE), "++ -- -- -- --"),
    ("308 to another host", redirect(ELSEWHERE, 308), "++ -- -- -- --"),
    ("302 with half a body", raw(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 99\r\n\r\n"), "++ -- -- -- --"),
    ("HTML", html(), "++ -- -- -- --"),
    ("an empty body", empty(), "++ -- -- -- --"),
    ("truncated JSON", respond(200, b'{"items": [{"name": "an'), "++ -- -- -- --"),
    ("no UTF-8", respond(200, b'["\xff\xfe"]'), "++ -- -- -- --"),
    ("no gzip", respond(200, b"[]", GZIP), "++ -- -- -- --"),
    ("a dict", respond_json(200, {}), "++ -- -- -- --"),
    ("a list", respond_json(200, []), "++ -- -- -- --"),
    ("a number", respond_json(200, 5), "++ -- -- -- --"),
    ("null", respond_json(200, None), "++ -- -- -- --"),
    ("a number too long to read", respond(200, b"9" * 9999), "++ ++ ++ -- --"),
    ("deep JSON", respond(200, b"[" * 99_999), "++ ++ ++ -- --"),
    ("a gigantic body", gigantic(), "++ ++ ++ -- --"),
    ("a gigantic body, zipped", gigantic(zipped=True), ".. .. .. -- --"),
    ("a list without an end", raw(NO_END), "++ -- -- -- --"),
    ("users that are a dict", respond_json(200, {"items": {}, **LAST}), ".. -- -- -- --"),
    ("users that are a number", respond_json(200, {"items": 5, **LAST}), ".. -- -- .. .."),
    ("only users without a name", respond_json(200, {"items": [None], **LAST}), ".. -- -- .. .."),
    ("no pagination", respond_json(200, {"items": []}), ".. -- -- .. .."),
    ("a pagination without a next page", respond_json(200, {"items": [], "_pagination": {}}), ".. -- -- .. .."),
    ("a pagination that is a number", respond_json(200, {"items": [], "_pagination": 5}), ".. -- -- .. .."),
    ("a user without a name", each_user(lambda user: {**user, "name": None}), ".. kk kk -- .."),
    ("a user that is a number", each_user(lambda user: 5), ".. kk kk -- .."),
    ("servers that are a list", each_user(lambda user: {**user, "servers": [1]}), ".. kk kk kk .."),
    ("a server that is a number", each_user(lambda user: {**user, "servers": {"": 5}}), ".. kk kk kk .."),
    ("a server without a pending", each_user(without_pending), ".. kk kk kk .."),
    ("the next page is the first", next_is({"offset": 0}), ".. ee ee .. .."),
    ("the next page is the second", next_is({"offset": 2}), ".. .. ee .. .."),
    ("the next page is before the first", next_is({"offset": -2}), ".. ee ee .. .."),
    ("the next page is a text", next_is({"offset": "4"}), ".. ee ee .. .."),
    ("the next page is null", next_is({"offset": None}), ".. ee ee .. .."),
    ("the next page is a fraction", next_is({"offset": 4.5}), ".. ee ee .. .."),
    ("the next page is only a URL", next_is({"limit": 2, "url": f"{ELSEWHERE}?offset=4"}), ".. ee ee .. .."),
    ("the next page is a string", next_is(f"{ELSEWHERE}?offset=4"), ".. ee ee .. .."),
    ("the next page is a number", next_is(4), ".. ee ee .. .."),
    ("the next page is nothing", next_is({}), ".. ee ee .. .."),
    ("the next page is on another host, too", next_is({"offset": 2, "url": ELSEWHERE}), ".. ++ .. .. .."),
]


class Case(NamedTuple):
    """One cell of the table, and whether the fault happens once or lasts."""

    fault: str
    reply: Reply
    place: str
    lasting: bool
    retried: bool
    expected: Pass


def cases() -> Iterator[Any]:
    """All cells of the table, with ids."""
    for name, reply, cells in TABLE:
        for place, cell in zip(PLACES, cells.split(), strict=True):
            for lasting, code in enumerate(cell.strip(".")):
                case = Case(name, reply, place, bool(lasting), cell in ("+-", "+d"), OUTCOMES[code][place])
                yield pytest.param(case, id=f"{name}, {place}, {('once', 'for ever')[lasting]}")


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch, _no_pauses: None) -> list[float]:
    """Small limits; pauses take no time, but are noted; what is due is culled in the order of the list."""
    noted: list[float] = []
    monkeypatch.setattr(cull_idle, "wait_in_slices", lambda stop, seconds: noted.append(seconds))
    monkeypatch.setattr(cull_idle, "PAUSES", PAUSES)
    monkeypatch.setattr(cull_idle, "ANSWER", (MEBIBYTE, 1_000_000))
    monkeypatch.setattr(cull_idle, "WHOLE_LIST", (MEBIBYTE, 1_000_000))
    monkeypatch.setattr("random.sample", lambda items, _: items)
    return noted


@pytest.fixture
def six_users(scripted: ScriptedHub) -> ScriptedHub:
    """The Hub that this module's docstring describes."""
    for name in ("ann", "busy", "bob", "dot", "cat"):
        scripted.add(name, idle=0 if name in ("busy", "dot") else LONG_AGO, age=LONG_AGO, user_idle=LONG_AGO)
    scripted.add_user("zoe", idle=LONG_AGO)
    return scripted


@pytest.mark.parametrize("case", list(cases()))
def test_a_fault_keeps_what_is_in_doubt_and_nothing_else(
    cull_scripted: Cull, six_users: ScriptedHub, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    given: list[str] = []
    ports: set[int] = set()
    connect = socket.socket.connect

    def reply(exchange: Exchange) -> Answer:
        given.append(case.fault)
        return case.reply(exchange)

    def note(self: socket.socket, address: Any) -> None:
        ports.add(address[1])
        try:
            connect(self, address)
        except ConnectionRefusedError:
            if not case.lasting:
                six_users.resume()
            raise

    monkeypatch.setattr(socket.socket, "connect", note)
    six_users.fault(*PLACES[case.place], reply, times=None if case.lasting else 1)
    seconds = "1" if case.fault in ("no answer", "a drip of the body") else "60"
    flags = ("--cull-users", "--api-page-size=2", "--concurrency=1", f"--request-timeout={seconds}")
    result = cull_scripted("--timeout=1h", *flags)

    users = {"ann", "busy", "bob", "dot", "cat", "zoe"}
    stopped, deleted = users - {"zoe"} - six_users.running(), users - six_users.users.keys()
    ended = Pass(" ".join(sorted(stopped)), " ".join(sorted(deleted)), result.exit_code, len(result.errors))
    assert ended == case.expected, result.err
    assert ports == {six_users.port}, "nobody asks another host"
    assert len(set(result.lines)) == len(result.lines), "nothing is said twice"
    assert given
    if case.expected.errors and case.reply is not go_down:
        assert len(given) == (TRIES if case.retried else 1)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("retry_after", "expected"),
    [
        (None, [1, 1, 2]),
        ("2", [2, 2, 2]),
        ("600", [30, 30, 30]),
        ("9" * 400, [30, 30, 30]),
        *((text, [1, 1, 2]) for text in ("0", "-600", "soon\x85;", "", "Fri, 31 Dec 2999 23:59:59 GMT", "\u00b2")),
    ],
    ids=ascii,
)
def test_pauses_grow_and_are_as_long_as_the_hub_asks_but_not_longer_than_half_a_minute(
    play: Play, pauses: list[float], status: int, retry_after: str | None, expected: list[float]
) -> None:
    reply = respond(status, headers={} if retry_after is None else {"Retry-After": retry_after})
    sick = fault("DELETE", "/users/ann/server", reply, times=None)
    play(Scene("", [idle("ann"), sick], becomes={"ann": "failed"}, deletes=["ann"] * TRIES, exit=1))
    assert pauses == expected


@pytest.mark.parametrize("threads", [0, 3])
def test_all_that_is_due_is_done_by_the_threads_there_are(
    play: Play, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    names = [f"user-{number}" for number in range(30)]
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def start_some(thread: threading.Thread) -> None:
        if thread.name == "cull_idle":
            if len(started) >= threads:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    play(Scene("", [idle(*names)], becomes=dict.fromkeys(names, "culled")))
    assert len(started) == threads
