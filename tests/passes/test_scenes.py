"""Scenes: one pass each, as rows of tables: scan, decide, fuse, look, DELETE; then rules. A new decision is a new row.

In these scenes, what is due is culled in the order of the user list. What `check_always` says holds in each of them.
"""

from __future__ import annotations

import json
import re
import shlex
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from processes import wait_for
from runs import Result, RunLoop
from scenes import Given, Play, Scene, active, change, edit, fault, having, idle, meanwhile, server, user
from scripted_hub import (
    DROP,
    HOUR,
    LEAST_SCOPES,
    LONG_AGO,
    NEARLY_DUE,
    PAGINATION,
    Answer,
    Exchange,
    Reply,
    ScriptedHub,
    done_but_lost,
    drip,
    edited,
    html,
    normal,
    of_hub,
    raw,
    redirect,
    reset,
    respond,
    respond_json,
    then_do,
)

import cull_idle

# More that can be true of a Hub, from the start or from a moment on


def comes_back(seconds: float = 0.0) -> Given:
    """Ann and all of her servers become active again, so many seconds ago."""

    def do(hub: ScriptedHub) -> None:
        ann = hub.users["ann"]
        ann.last_activity = hub.now - timedelta(seconds=seconds)
        for each in ann.servers.values():
            each.last_activity = ann.last_activity

    return do


def vanish(hub: ScriptedHub) -> None:
    """Somebody else deletes ann."""
    hub.users.pop("ann")


def starting(*names: str) -> Given:
    """Servers that are about to start."""
    return idle(*names, ready=False, pending="spawn")


def scope(name: str) -> Given:
    """The token has this scope, too."""
    return lambda hub: hub.scopes.append(name)


def old_hub(hub: ScriptedHub) -> None:
    """A Hub before 2.0: no pages, and no scopes."""
    hub.version = "1.5.1"
    hub.fault("GET", "/user", respond(404), times=None)
    hub.fault("GET", "/users", edited(lambda body: body["items"]), times=None)


def without_a_length(exchange: Exchange) -> Answer:
    """What proxies of HTTP/1.0 send: nothing but the end of the connection tells where the body ends."""
    return raw(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + exchange.normal().body)(exchange)


def first_in_the_list(model: object) -> Callable[[dict[str, Any]], object]:
    return lambda body: {**body, "items": [model, *body["items"]]}


def with_a_cookie(exchange: Exchange) -> Answer:
    answer = exchange.normal()
    return replace(answer, headers={**answer.headers, "Set-Cookie": "jupyterhub-session-id=1; Path=/"})


def all_culled(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "culled")


# The scan: page after page, to the end of the list

NEXT_IS_2 = {"next": {"offset": 2}}
SECOND_PAGE = r"/users\?(.*&)?offset=2.*"
SCAN = [
    Scene(
        "an offset is enough to read on",
        [idle(*"abc"), having(page_max=2), edit("GET /users", lambda body: {**body, "_pagination": NEXT_IS_2})],
        becomes=all_culled(*"abc"),
    ),
    Scene(
        "a page without a ready server is not the last one",
        [idle("ann"), starting("bob", "cat", "dan"), idle("eve"), having(page_max=2)],
        becomes=all_culled("ann", "eve"),
    ),
    Scene(
        "a Hub before 2.0 sends a list without pages",
        [idle("ann"), user("bob"), old_hub],
        options="--cull-users",
        becomes={"ann": "culled", "user bob": "deleted"},
    ),
    Scene(
        "who is listed twice is culled once",
        [idle("ann"), user("bob"), edit("GET /users", lambda body: {**body, "items": body["items"] * 2})],
        options="--cull-users",
        becomes={"ann": "culled", "user bob": "deleted"},
    ),
    *(
        Scene(
            f"an answer that {words} is read whole",
            [idle("ann", user_options={"picture": "x" * length}), fault("GET", "/users", reply)],
            becomes={"ann": "culled"},
        )
        for words, length, reply in (
            ("comes byte by byte", 9, drip(0.0001)),
            ("ends with its connection", 300_000, without_a_length),
        )
    ),
    Scene(
        "after a page that fails, what was read is culled, but no user is deleted",
        [idle("ann"), user("bob"), idle("cat"), having(page_max=2), fault("GET", SECOND_PAGE, of_hub(500, "Oops"))],
        options="--cull-users",
        becomes={"ann": "culled"},
        exit=1,
        says=True,
    ),
    Scene(
        "an API that only lists and deletes is enough",
        [idle("ann"), user("bob"), fault("GET", "/user|/users/.*|/", respond(405), times=None)],
        options="--cull-users",
        becomes={"ann": "culled", "user bob": "deleted"},
    ),
]

# What the user list is asked for: all of it, before anything is stopped
PAGES = [
    (
        Scene("pages are followed by their offset", [idle(*"abcde")], "--api-page-size=2", all_culled(*"abcde")),
        ["state=ready&limit=2", "state=ready&limit=2&offset=2", "state=ready&limit=2&offset=4"],
    ),
    (
        Scene("the Hub may send smaller pages", [idle(*"abc"), having(page_max=2)], becomes=all_culled(*"abc")),
        ["state=ready&limit=200", "state=ready&limit=200&offset=2"],
    ),
    (Scene("the Hub may choose the size of a page", [], "--api-page-size=0"), ["state=ready"]),
    (Scene("with --cull-users the list is of all users", [], "--cull-users"), ["limit=200"]),
    (Scene("a Hub without pages is asked once", [active("ann"), old_hub]), ["state=ready&limit=200"]),
]

# Which servers are due
SERVERS = [
    Scene(
        "a server that is idle for longer than the timeout is stopped",
        [idle("ann"), server("bob", NEARLY_DUE), active("cat")],
        becomes={"ann": "culled"},
        says=True,
    ),
    Scene(
        "a server that reached --max-age is stopped although it is in use",
        [server("ann", age=LONG_AGO)],
        options="--max-age=90m",
        becomes={"ann": "culled"},
        says=True,
    ),
    Scene(
        "who was never active is judged from the start, or the creation",
        [
            *(server("new", age=60, last_activity=None), server("old", age=LONG_AGO, last_activity=None)),
            *(user("ann", None, age=60), user("bob", None, age=LONG_AGO)),
        ],
        options="--cull-users",
        becomes={"old": "culled", "user bob": "deleted"},
    ),
    Scene(
        "a server that is active in the future is not idle",
        [server("ann", -LONG_AGO, age=LONG_AGO), server("bob", last_activity="9999-12-31T23:59:59Z")],
    ),
    *(
        Scene(
            f"a server that is {words} is kept, and so is its user",
            [idle("ann", extra=extra)],
            options="--timeout=0 --max-age=1h --cull-users",
        )
        for words, extra in {
            "not ready": {"ready": False},
            "starting": {"ready": False, "pending": "spawn"},
            "stopping": {"ready": False, "pending": "stop"},
            "ready, but pending": {"pending": "spawn"},
        }.items()
    ),
    *(
        Scene(
            f"with {flag} one kind of server is stopped, and the user kept",
            [idle("ann", "ann/gpu")],
            options=f"--cull-users {flag}",
            becomes={culled: "culled"},
        )
        for flag, culled in {"--cull-default-servers=false": "ann/gpu", "--cull-named-servers=false": "ann"}.items()
    ),
]

# Which users are due: those without a server, if --cull-users says so
ADMINS = [user("root", admin=True), idle("boss"), change("user boss", admin=True), user("ann")]
USERS = [
    Scene(
        "a user is deleted if no server is there",
        [user("ann"), user("bob", NEARLY_DUE), idle("cat"), starting("dan"), having(page_max=2)],
        options="--cull-users",
        becomes={"user ann": "deleted", "cat": "culled"},
    ),
    Scene(
        "a user with a stopped named server is deleted",
        [idle("ann/gpu", ready=False, extra={"stopped": True})],
        options="--cull-users",
        becomes={"user ann": "deleted"},
    ),
    Scene("without --cull-users no user is deleted", [user("ann"), idle("bob")], becomes={"bob": "culled"}),
    Scene(
        "admins are deleted, too",
        ADMINS,
        options="--cull-users",
        becomes={"user root": "deleted", "user ann": "deleted", "boss": "culled"},
    ),
    Scene(
        "admins are kept when told, but their servers are not",
        ADMINS,
        options="--cull-users --cull-admin-users=false",
        becomes={"user ann": "deleted", "boss": "culled"},
    ),
    *(
        Scene(
            f"with {flags} a user of two hours is {'deleted' if is_due else 'kept'}",
            [idle("bob"), user("ann")],
            options=f"--cull-users {flags}",
            becomes={"bob": "culled", "user ann": "deleted"} if is_due else {"bob": "culled"},
            says=flags == "--user-timeout=30m",
        )
        for flags, is_due in {
            "--user-timeout=30m": True,
            "--user-timeout=3h": False,
            "--user-timeout=never": False,
            "--user-timeout=never --user-max-age=2h": True,
            "--user-timeout=never --max-age=2h": True,
            "--user-timeout=never --max-age=2h --user-max-age=0": False,
            "--user-timeout=3h --user-max-age=9h": False,
        }.items()
    ),
]

# What the Hub describes unclearly is kept, and the rest is culled
NO_TIMES: list[Any] = [5, "", "yesterday", "2026-13-45T99:99:99Z", "2026-11-22", [], {}]
NO_BOOLEANS: list[Any] = [None, 1, "no", []]
NO_MODELS: list[Any] = [None, [], "up", 5, True]
NO_SERVERS: list[Any] = [*({"": model} for model in NO_MODELS), None, [], [{"name": ""}], "none", 0, False]
UNCLEAR_SERVERS: dict[str, Given] = {
    **{f"last_activity is {value!r}": change("ann", extra={"last_activity": value}) for value in NO_TIMES},
    **{f"started is {value!r}": change("ann", extra={"started": value}) for value in NO_TIMES},
    **{f"ready is {value!r}": change("ann", extra={"ready": value}) for value in NO_BOOLEANS},
    **{f"{key} is missing": change("ann", extra={key: DROP}) for key in ("last_activity", "ready", "pending")},
    "both times are null": change("ann", extra={"last_activity": None, "started": None}),
    "one time is null and one missing": change("ann", extra={"last_activity": None, "started": DROP}),
    **{f"her servers are {servers!r}": change("user ann", extra={"servers": servers}) for servers in NO_SERVERS},
    "her servers are missing": change("user ann", extra={"servers": DROP}),
}
UNCLEAR_USERS: dict[str, dict[str, Any]] = {
    **{f"{key} {value!r}": {key: value} for key in ("last_activity", "created") for value in NO_TIMES},
    **{f"admin {value!r}": {"admin": value} for value in NO_BOOLEANS},
    **{f"no {key}": {key: DROP} for key in ("last_activity", "admin")},
    "neither time": {"last_activity": None, "created": None},
    "one time null and one missing": {"last_activity": None, "created": DROP},
}
DOUBTS = [
    *(
        Scene(
            f"ann's server is kept if {words}; the options are {options}",
            [idle("ann", "bob"), given],
            options=options,
            becomes={"bob": "culled"},
            doubts=1,
        )
        for words, given in UNCLEAR_SERVERS.items()
        for options in ("--timeout=1h", "--timeout=0 --max-age=1h --cull-users")
    ),
    *(
        Scene(
            f"a user with {words} is not deleted, but servers of such a user are stopped",
            [user("ann", extra=extra), user("bob"), idle("cat"), change("user cat", extra=extra)],
            options="--cull-users",
            becomes={"user bob": "deleted", "cat": "culled"},
            doubts=1,
        )
        for words, extra in UNCLEAR_USERS.items()
    ),
    *(
        Scene(
            f"{model!r} in place of a user is reported",
            [idle("ann"), edit("GET /users", first_in_the_list(model))],
            options="--cull-users",
            becomes={"ann": "culled"},
            doubts=1,
        )
        for model in [*NO_MODELS, {}, {"name": ""}, {"name": None}, {"name": 5}, {"name": ["ann"]}]
    ),
    Scene(
        "many doubts make one line with their number and the first",
        [*(idle(name, extra={"started": f"{name}'s"}) for name in ("ann", "bob", "cat")), idle("dan")],
        options="--api-page-size=2",
        becomes={"dan": "culled"},
        doubts=3,
        says=True,
    ),
]

# The fuse, where three of ten servers are due
TEN = [idle("ann", "bob", "cat"), active(*"defghij")]
FUSE = [
    *(
        Scene(
            f"with --max-culls={fuse} a pass {'culls nothing' if blows else 'goes on'}",
            TEN,
            options=f"--max-culls={fuse}",
            becomes={} if blows else all_culled("ann", "bob", "cat"),
            exit=1 if blows else 0,
            says=fuse == "29.9%",
        )
        for blows, fuses in {True: "0 2 0% 29% 29.9%", False: "3 4 30% 100%"}.items()
        for fuse in fuses.split()
    ),
    Scene(
        "a pass that would delete too many users stops no server either",
        [*TEN, *map(user, "klmnop")],
        options="--cull-users --max-culls=37%",
        exit=1,
        says=True,
    ),
    Scene("where nothing is due, no fuse blows", [active("ann")], options="--max-culls=0"),
    Scene(
        "of a list that breaks off, the part that was read counts",
        [*TEN, fault("GET", SECOND_PAGE, respond(500))],
        options="--max-culls=50% --api-page-size=2",
        exit=1,
        says=True,
    ),
    Scene("a dry run says that the fuse would blow", TEN, options="--dry-run --max-culls=2", says=True),
]

# The second look, right before each DELETE: what has changed since the scan is spared
STARTED = {"last_activity": None, "started": "2026-11-22T20:00:00Z", "pending": None, "ready": True}
BEFORE_THE_LOOK: list[tuple[str, str, Given, str]] = [
    ("ann", "ann is back", comes_back(), "spared"),
    ("ann", "it was started anew", server("ann", LONG_AGO, age=LONG_AGO), "spared"),
    ("ann", "it is stopping", change("ann", pending="stop"), "stopping"),
    ("ann", "it is down", change("ann", ready=False), "gone"),
    ("ann", "it is starting", change("ann", pending="spawn"), "spared"),
    ("ann", "its activity is garbage", change("ann", last_activity="x"), "spared"),
    ("ann", "it may not be ready", change("ann", extra={"ready": None}), "spared"),
    ("ann", "ann is gone", vanish, "gone"),
    *(
        (name, f"the servers are {servers!r}", change("user ann", extra={"servers": servers}), outcome)
        for name, servers, outcome in (
            ("ann", [1], "spared"),
            ("ann", {"": 5}, "spared"),
            ("ann/gpu", None, "spared"),
            ("ann/gpu", [1], "spared"),
            ("ann/gpu", {"": None}, "spared"),
            ("ann/gpu", {"": STARTED}, "gone"),
            ("ann/gpu", {}, "gone"),
        )
    ),
    ("user ann", "ann is back", comes_back(), "spared"),
    ("user ann", "ann has a server", idle("ann"), "spared"),
    ("user ann", "ann has a server that starts", starting("ann"), "spared"),
    ("user ann", "ann has a server that stops", idle("ann", ready=False, pending="stop"), "spared"),
    ("user ann", "ann was created anew", user("ann", age=LONG_AGO), "spared"),
    ("user ann", "ann is an admin", change("user ann", admin=True), "spared"),
    ("user ann", "ann may be an admin", change("user ann", extra={"admin": None}), "spared"),
    ("user ann", "her activity is garbage", change("user ann", extra={"last_activity": "garbage"}), "spared"),
    ("user ann", "ann is gone", vanish, "gone"),
]
NO_LOOK = [active("ann", "bob"), idle("cat"), having(page_max=2), fault("GET", "/users/.*", html(404), times=None)]
LOOK = [
    *(
        Scene(
            f"{name}: {outcome} if {words} by then",
            [user("ann") if name == "user ann" else idle(name), fault("GET", "/users/ann", meanwhile(given))],
            options="--cull-users --cull-admin-users=false",
            becomes={name: outcome},
            deletes=[],
            says=words in ("it was started anew", "it is stopping", "it may not be ready"),
        )
        for name, words, given, outcome in BEFORE_THE_LOOK
    ),
    Scene(
        "a server that has been in use meanwhile is spared, and the others are stopped",
        [
            *(server(name, 2 * LONG_AGO) for name in ("ann", "bob")),
            fault("GET", "/users/ann", meanwhile(comes_back(LONG_AGO))),
        ],
        options="--timeout=3h",
        becomes={"ann": "spared", "bob": "culled"},
        says=True,
    ),
    Scene(
        "of two servers of a user one is spared",
        [idle("ann", "ann/gpu"), fault("GET", "/users/ann", meanwhile(change("ann/gpu", pending="spawn")))],
        options="--cull-users",
        becomes={"ann": "culled", "ann/gpu": "spared"},
    ),
    Scene(
        "a user whose second look fails is kept",
        [user("ann"), fault("GET", "/users/ann", of_hub(500, "Oops"))],
        options="--cull-users",
        becomes={"user ann": "failed"},
        exit=1,
        says=True,
    ),
    Scene(
        "a look that shows another user is none",
        [idle("ann", "bob"), edit("GET /users/ann", lambda model: {**model, "name": "bob"})],
        becomes={"ann": "failed", "bob": "culled"},
        exit=1,
    ),
    Scene("where no user can be looked at, the user list is read again", NO_LOOK, becomes={"cat": "culled"}),
    Scene(
        "if the user list breaks off when it is read again, the server is kept",
        [*NO_LOOK, fault("GET", SECOND_PAGE, normal(), respond(500))],
        becomes={"cat": "failed"},
        exit=1,
    ),
]

# Names: they reach the Hub as they are, and the log escaped
ESCAPE = "\x1b[2J\x1b]0;owned\x07"
ODD = {
    **{f"a {character!r}": f"alice{character}bob" for character in "+;@~ \n\x00\x9b\u202e\u2028\u00fc\U0001f600"},
    "a blank first": " alice",
    "a percent sign": "alice%",
    "a line of a header": "alice\r\nHost",
    "what looks like a line": "alice\nINFO     culled bob",
    "an escape sequence": f"alice{ESCAPE}",
    "a joined emoji": "\U0001f468\u200d\U0001f469",
    "a thousand letters": "x" * 1000,
}
MISLEADING = {  # as the name of a server: to another path, or to the server alice
    "a query": "alice?x",
    "a fragment": "alice#1",
    "a slash": "alice/server",
    "a backslash": "alice\\bob",
    "dots inside": "alice/../bob",
    "an encoded slash": "alice%2fserver",
    "an encoded dot": "%2e%2e",
    "a dot encoded twice": "%252e",
    "one dot": ".",
    "two dots": "..",
    "three dots": "...",
}
VICTIMS = active(
    "x", "server", "users", "ann", "alice", "bob", "alice/gpu", "ann/alice", "ann/bob", "ann/server", "server/gpu"
)


def escaped(name: str) -> str:
    """The name as the log shows it."""
    name = name if len(name) <= cull_idle.LONGEST_TEXT else name[: cull_idle.LONGEST_TEXT - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def due(name: str, server_name: str = "", **fields: Any) -> Given:
    """An idle server; there may be slashes in the names."""
    return lambda hub: hub.add(name, server_name, idle=LONG_AGO, **fields)


def scenes_of_a_name(words: str, name: str) -> Iterator[Scene]:
    yield Scene(
        f"the server of a user whose name has {words} is stopped",
        [VICTIMS, due(name)],
        becomes={escaped(name): "culled"},
        deletes=[name],
    )
    yield Scene(
        f"a user whose name has {words} is deleted",
        [VICTIMS, user(name)],
        options="--cull-users",
        becomes={f"user {escaped(name)}": "deleted"},
        deletes=[f"user {name}"],
    )
    by_hand = words in MISLEADING
    yield Scene(
        f"a server whose name has {words} is {'to be stopped by hand' if by_hand else 'stopped'}",
        [VICTIMS, due("ann", name)],
        options="--remove-named-servers",
        becomes={escaped(f"ann/{name}"): "failed" if by_hand else "culled"},
        deletes=[] if by_hand else [f"ann/{name}"],
        exit=1 if by_hand else 0,
        says=words == "a slash",
    )


NAME = "Ann\u00e4e\u0301\ufb01\u212b\u0130"  # each of its last letters is another one to code that normalizes names
TWINS = {
    *(NAME.upper(), NAME.lower(), NAME.casefold(), quote(NAME, safe=""), quote(quote(NAME)), f" {NAME}"),
    *(unicodedata.normalize(form, NAME) for form in ("NFC", "NFD", "NFKC", "NFKD")),
    *(f"{NAME}{end}" for end in ("?x", "#x", ";x", "%00", "%2Fserver", "%2F..", "/server", ".", " ")),
}
NAMES = [
    *(scene for words, name in {**ODD, **MISLEADING}.items() for scene in scenes_of_a_name(words, name)),
    Scene("of names that look alike one is due", [idle(NAME), active(*TWINS)], becomes={NAME: "culled"}),
    Scene("of names that look alike all but one are due", [active(NAME), idle(*TWINS)], becomes=all_culled(*TWINS)),
    *(
        Scene(
            f"of users whose names look alike {words} due",
            [*map(user, gone), *(user(name, 0) for name in kept)],
            options="--cull-users",
            becomes={f"user {name}": "deleted" for name in gone},
        )
        for words, gone, kept in (("one is", {NAME}, TWINS), ("all but one are", TWINS, {NAME}))
    ),
    Scene(
        "a name with half a character is looked up under that name",
        [
            active("alice\N{REPLACEMENT CHARACTER}", "alice"),
            idle("HALF"),
            edit("GET /users", lambda body: json.loads(json.dumps(body).replace("HALF", r"alice\ud800"))),
        ],
        becomes={r"alice\ud800": "gone"},
    ),
    Scene(
        "names are shown escaped by a dry run, too",
        [idle(f"alice{ESCAPE}", f"ann/{ESCAPE}")],
        options="--dry-run -v",
    ),
    Scene(
        "the name of the token's owner is shown escaped",
        [fault("GET", "/user", respond_json(200, {"kind": "user", "name": f"c{ESCAPE}\n", "scopes": ["list:users"]}))],
        exit=3,
        says=True,
    ),
]

# The answers to DELETE, of a server and of a user
STOPPED, FAILED = ("culled", "deleted"), ("failed", "failed")


def answered(
    words: str, outcomes: tuple[str, str], *replies: Reply, exit: int = 1, tries: int = 1, says: Sequence[str] = ()
) -> Iterator[Scene]:
    """The scenes of a server and of a user. The last reply is given again and again. exit: if that fails."""
    both = {"ann": (idle("ann"), "/users/ann/server"), "user ann": (user("ann"), "/users/ann")}
    for (name, (given, path)), outcome in zip(both.items(), outcomes, strict=True):
        yield Scene(
            f"{name}: {outcome} if the Hub answers {words}",
            [given, fault("DELETE", path, *replies), fault("DELETE", path, replies[-1], times=None)],
            options="--cull-users",
            becomes={name: outcome},
            deletes=[name] * tries,
            exit=exit if outcome == "failed" else 0,
            says=name in says,
        )


BOTH = ["ann", "user ann"]
ANSWERS = [
    *answered("202", ("stopping", "stopping"), respond(202), says=BOTH),
    *answered("503, reset, 429 and then 204", STOPPED, respond(503), reset(), respond(429), normal(), tries=4),
    *answered("503 each time", FAILED, of_hub(503, "busy"), tries=4, says=["ann"]),
    *answered("nothing, but does it", STOPPED, done_but_lost(), says=BOTH),
    *answered("503, and ann is back", ("spared", "spared"), meanwhile(comes_back(), respond(503))),
    *answered("503, and ann starts a server", ("spared", "spared"), meanwhile(idle("ann"), respond(503))),
    *answered("500, and ann is gone", ("gone", "gone"), meanwhile(vanish, respond(500))),
    *(
        each
        for words, look in {"500": respond(500), "418": respond(418), "reset": reset()}.items()
        for no_look in [fault("GET", "/users/ann", look, times=None)]
        for each in answered(f"500, and then {words} to a look", FAILED, meanwhile(no_look, respond(500)))
    ),
    *answered("418, after which nobody looks", FAILED, meanwhile(vanish, of_hub(418, "a teapot"))),
    *answered("403", FAILED, of_hub(403, "you may not"), exit=3, says=BOTH),
    *answered("409 without a message", FAILED, of_hub(409)),
    *answered("507 with a list", FAILED, respond_json(507, ["full"])),
    *answered("200", FAILED, respond(200), says=["ann"]),
    *answered("451 with a novel", FAILED, of_hub(451, "word " * 999), says=["ann"]),
    *answered("a redirect", FAILED, redirect("http://127.0.0.1:1/elsewhere"), says=["ann"]),
    *answered("400", ("failed", "spared"), of_hub(400, "not now"), says=BOTH),
    Scene(
        "after a 403 of the Hub nothing else is started",
        [idle("ann", "bob", "cat"), user("dan"), fault("DELETE", ".*", of_hub(403), times=None)],
        options="--cull-users --concurrency=1",
        becomes={"ann": "failed"},
        deletes=["ann"],
        exit=3,
        says=True,
    ),
    Scene(
        "after ten in a row that got no answer nothing else is started",
        [idle(*"abcdefghijkl"), fault("DELETE", ".*", reset(), times=None)],
        options="--concurrency=1 -v",
        becomes=dict.fromkeys("abcdefghij", "failed"),
        deletes=[*"abcdefghij"] * 4,
        exit=1,
    ),
    *(
        Scene(
            f"a {status} of a firewall to {method} concerns one server only",
            [idle("eve/.env", "ann"), fault(method, path, html(status), times=None)],
            options="--concurrency=1",
            becomes={"eve/.env": "failed", "ann": "culled"},
            deletes=["ann", "eve/.env"] if method == "DELETE" else ["ann"],
            exit=1,
            says=(status, method) == (403, "GET"),
        )
        for status in (401, 403)
        for method, path in {"GET": "/users/eve", "DELETE": "/users/eve/servers/.env"}.items()
    ),
]

# The requests: nothing in the environment changes them
REQUESTS = [
    Scene(
        "cookies are not kept",
        [idle("ann", "bob"), fault("*", ".*", with_a_cookie, times=None)],
        options="--concurrency=1",
        becomes=all_culled("ann", "bob"),
    ),
    *(
        Scene(
            f"a proxy in ${variable} is not given the token",
            [idle("ann")],
            env={variable: "http://127.0.0.1:1", "NO_PROXY": "", "no_proxy": ""},
            becomes={"ann": "culled"},
        )
        for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY")
    ),
]

# Rules: of three idle servers and an old one, who stays?
RULED = [
    idle("ann"),
    idle("ann/gpu", user_options={"profile": "large", "gpus": 2, "spot": True, "image": None}),
    change("user ann", groups=["gpu-users", "staff", "Old"]),
    idle("bob smith", state={"pod": "big-7"}, user_options={"display": "a b", "max_age": "x"}),
    change("user bob smith", admin=True),
    active("zoe", age=10 * HOUR - 30),
    scope("admin:server_state"),
]
ANN, GPU, BOB, ZOE = "ann", "ann/gpu", "bob smith", "zoe"
RULES_AND_WHO_STAYS: list[tuple[Sequence[str], set[str]]] = [
    (["user=ann keep"], {ANN, GPU}),
    (["user=a* keep"], {ANN, GPU}),
    (["user=[!a]* keep"], {BOB, ZOE}),
    (["user=A* keep"], set()),
    (["'user=bob smith' keep"], {BOB}),
    (["server=gpu keep"], {GPU}),
    (["server= keep"], {ANN, BOB, ZOE}),
    (["server=?* keep"], {GPU}),
    (["group=staff keep"], {ANN, GPU}),
    (["group=st* group=gpu* keep"], {ANN, GPU}),
    (["group=staff group=nobody keep"], set()),
    (["group=Old keep"], {ANN, GPU}),
    (["group=old keep"], set()),
    (["admin=true keep"], {BOB}),
    (["admin=false keep"], {ANN, GPU, ZOE}),
    (["option.profile=large keep"], {GPU}),
    (["option.profile=* keep"], {GPU}),
    (["option.gpus=2 keep"], {GPU}),
    (["option.spot=true keep"], {GPU}),
    (["option.nothing=* keep"], set()),
    (["option.image=* keep"], set()),
    (["option.max_age=x keep"], {BOB}),
    (['option.display="a b" keep'], {BOB}),
    (["state.pod=big-* keep"], {BOB}),
    (["user=ann server=gpu keep"], {GPU}),
    (["user=bob* server=gpu keep"], set()),
    (["timeout=never"], {ANN, GPU, BOB}),
    (["user=ann timeout=3h"], {ANN, GPU}),
    (["user=ann timeout=3h max-age=90m"], set()),
    (["user=ann timeout=3h max_age=9h"], {ANN, GPU}),
    (["max-age=90m"], set()),
    (["max-age=11h"], {ZOE}),
    (["max-age=0"], {ZOE}),
    (["max-age=never"], {ZOE}),
    (["user=ann timeout=1m", "user=ann keep"], set()),
    (["user=ann keep", "user=ann timeout=1m"], {ANN, GPU}),
]


def options(*rules: str) -> str:
    return shlex.join(f"--rule={rule}" for rule in rules)


RULES = [
    *(
        Scene(
            f"kept with the rules {rules}: {', '.join(sorted(stays)) or 'nobody'}",
            RULED,
            options="--max-age=8h " + options(*rules),
            becomes=all_culled(*{ANN, GPU, BOB, ZOE} - stays),
            says=rules == ["max-age=90m"],
        )
        for rules, stays in RULES_AND_WHO_STAYS
    ),
    Scene(
        "a rule stops what the options would keep",
        [server("ann", NEARLY_DUE), server("bob", NEARLY_DUE)],
        options=options("user=ann timeout=50m"),
        becomes={"ann": "culled"},
    ),
    Scene(
        "a dry run names the rules that decide about servers and users",
        [idle("ann", "bob"), user("bot"), user("cat", 2 * LONG_AGO)],
        options="--dry-run -v --timeout=3h --cull-users " + options("user=bo* keep", "user=a* timeout=90m"),
        says=True,
    ),
    Scene(
        "the second look obeys the rules, too",
        [idle("ann"), fault("GET", "/users/ann", meanwhile(change("user ann", groups=["staff"])))],
        options=options("group=staff keep"),
        becomes={"ann": "spared"},
        says=True,
    ),
    Scene(
        "a rule that keeps a user, or a server of a user, keeps that user",
        [user("svc-1"), user("ann"), user("bob"), idle("bob/gpu")],
        options="--cull-users " + options("user=svc-* keep", "server=gpu keep"),
        becomes={"user ann": "deleted"},
    ),
    *(
        Scene(
            f"the rule {rule} is not for users",
            [user("ann"), scope("admin:server_state")],
            options="--cull-users " + options(rule),
            becomes={"user ann": "deleted"},
        )
        for rule in ("server=* keep", "option.x=* keep", "state.x=* keep", "user=ann timeout=never max-age=never")
    ),
    *(
        Scene(
            f"the rule {rule} ends the pass where the Hub does not show that",
            [idle("ann", "bob"), scope("admin:server_state"), change(of, extra=extra)],
            options=options(rule),
            exit=3,
            says=rule.startswith("group"),
        )
        for rule, of, extra in (
            ("group=gpu keep", "user bob", {"groups": DROP}),
            ("admin=true keep", "user bob", {"admin": DROP}),
            ("option.x=1 keep", "bob", {"user_options": DROP}),
            ("state.x=1 keep", "bob", {"state": DROP}),
        )
    ),
    Scene(
        "what a rule needs and the second look does not show ends the pass",
        [idle("ann", "bob"), fault("GET", "/users/ann", meanwhile(change("user ann", extra={"groups": DROP})))],
        options="--concurrency=1 " + options("group=gpu keep"),
        becomes={"ann": "failed"},
        deletes=[],
        exit=3,
    ),
    Scene(
        "a rule needs a scope",
        [idle("ann"), having(scopes=[*LEAST_SCOPES])],
        options=options("group=gpu keep", "state.pod=x keep"),
        exit=3,
        says=True,
    ),
]


@pytest.fixture(autouse=True)
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.sample", lambda items, _: items)


def check_always(result: Result, hub: ScriptedHub) -> None:
    """What holds in each scene, about requests and output."""
    looks: Counter[str] = Counter()
    for request in hub.requests:
        assert request.headers["authorization"] == f"token {hub.token}"
        assert [name for name, value in request.headers.items() if hub.token in value] == ["authorization"]
        assert hub.token not in request.target + request.body.decode()
        assert (request.headers["accept"], request.headers["cache-control"]) == (PAGINATION, "no-cache")
        assert request.headers["user-agent"] == f"cull_idle/{cull_idle.__version__}"  # for the log of the Hub's proxy
        assert "cookie" not in request.headers
        # Nothing in a path can mean more than itself.
        segments = request.path.removeprefix("/").split("/")
        assert all(re.fullmatch(r"(?:[A-Za-z0-9_~.-]|%[0-9A-F]{2})+", segment) for segment in segments)
        assert not {".", ".."} & set(segments)
        if len(segments) > 1:
            looks[segments[1]] += {"GET": 1, "DELETE": -1}[request.method]
    assert min(looks.values(), default=0) >= 0, "each DELETE comes after a look of its own"
    assert [c for c in result.out + result.err if c != "\n" and not c.isprintable()] == []
    assert all(re.match(r"(DEBUG|INFO|WARNING|ERROR) +\S", line) for line in result.lines), "one line for each sentence"


SCENES = [*SCAN, *SERVERS, *USERS, *DOUBTS, *FUSE, *LOOK, *NAMES, *ANSWERS, *REQUESTS, *RULES]


@pytest.mark.parametrize("scene", SCENES, ids=Scene.__str__)
def test_scene(scene: Scene, play: Play, scripted: ScriptedHub) -> None:
    check_always(play(scene), scripted)


@pytest.mark.parametrize(("scene", "pages"), PAGES, ids=[scene.name for scene, _ in PAGES])
def test_pages_asked_for(scene: Scene, pages: list[str], play: Play, scripted: ScriptedHub) -> None:
    check_always(play(scene), scripted)
    asked = ["GET /user", *(f"GET /users?{page}" for page in pages)]
    assert scripted.lines()[: len(asked)] == asked
    assert not [line for line in scripted.lines()[len(asked) :] if line.startswith("GET /users?")]


@pytest.mark.parametrize(
    ("options", "body"),
    [("", b""), ("--remove-named-servers=false", b""), ("--remove-named-servers", b'{"remove": true}')],
)
def test_only_named_servers_are_removed_and_only_when_told(
    play: Play, scripted: ScriptedHub, options: str, body: bytes
) -> None:
    becomes = {"ann": "culled", "ann/gpu": "culled", "user bob": "deleted"}
    play(Scene("", [idle("ann", "ann/gpu"), user("bob")], options=f"--cull-users {options}", becomes=becomes))
    deletes = {request.path: request for request in scripted.requests if request.method == "DELETE"}
    bodies = {"/users/ann/server": b"", "/users/ann/servers/gpu": body, "/users/bob": b""}
    assert {path: request.body for path, request in deletes.items()} == bodies
    assert deletes["/users/ann/servers/gpu"].headers.get("content-type") == ("application/json" if body else None)


def test_credentials_in_netrc_are_not_used(play: Play, scripted: ScriptedHub, tmp_path: Path) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login ann password secret\ndefault login ann password secret\n")
    netrc.chmod(0o600)
    env = {"NETRC": str(netrc), "HOME": str(tmp_path)}
    check_always(play(Scene("", [idle("ann")], env=env, becomes={"ann": "culled"})), scripted)


def test_four_at_a_time_is_four_stops_in_flight_and_four_connections_for_all(play: Play, scripted: ScriptedHub) -> None:
    names = "abcdefghijkl"
    four = threading.Barrier(4)
    stops = fault("DELETE", ".*", then_do(lambda: four.wait(30)), times=None)
    play(Scene("", [idle(*names), stops], options="--concurrency=4", becomes=all_culled(*names)))
    assert (scripted.in_flight_max, scripted.connection_count) == (4, 4)


def test_connections_are_closed_at_the_end_of_each_pass(loop: RunLoop, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users", normal(), respond(500), reset())
    all_closed = partial(wait_for, lambda: not scripted.connections_open)
    assert loop(scripted, "--timeout=1h", between=[all_closed] * 4).exit_code == 0
    assert scripted.connection_count >= 5
