"""Names: they reach the Hub as they are, and the log and the tables escaped."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable
from urllib.parse import quote, unquote

import pytest
from hub import RealHub, full_name
from runs import Cull
from scripted_hub import LONG_AGO, PREFIX, ScriptedHub, edited, redirect, respond_json

import cull_idle

ESCAPE = "\x1b[2J\x1b]0;owned\x07"
ODD_NAMES = [
    pytest.param("alice?x", id="query"),
    pytest.param("alice#1", id="fragment"),
    pytest.param("alice/server", id="slash"),
    pytest.param("alice/../bob", id="dots inside"),
    pytest.param("alice%2fserver", id="percent"),
    pytest.param("alice%", id="lone percent"),
    pytest.param("alice;x=1", id="semicolon"),
    pytest.param("alice\\bob", id="backslash"),
    pytest.param("alice+bob", id="plus"),
    pytest.param("alice@example.org", id="at"),
    pytest.param("alice bob", id="space"),
    pytest.param(" alice", id="leading space"),
    pytest.param("..", id="dotdot"),
    pytest.param(".", id="dot"),
    pytest.param("...", id="three dots"),
    pytest.param("%2e%2e", id="encoded dotdot"),
    pytest.param("%252e", id="twice encoded dot"),
    pytest.param("~alice", id="tilde"),
    pytest.param("alice\nINFO     culled bob", id="newline"),
    pytest.param("alice\r\nX-Header: 1", id="carriage return"),
    pytest.param(f"alice{ESCAPE}", id="escape"),
    pytest.param("alice\x9b31m", id="C1 escape"),
    pytest.param("alice\u202eecila", id="RTL override"),
    pytest.param("alice\u2028bob", id="line separator"),
    pytest.param("alice\x00", id="NUL"),
    pytest.param("\u00fcn\u00ef", id="umlauts"),
    pytest.param("alice\U0001f600", id="emoji"),
    pytest.param("\U0001f468\u200d\U0001f469", id="joined emoji"),
    pytest.param("x" * 1000, id="long"),
]
# As names of servers they can lead elsewhere: to another path, or to the server alice.
BY_HAND = {"alice?x", "alice#1", "alice/server", "alice/../bob", "alice%2fserver", "alice\\bob"}
BY_HAND |= {"..", ".", "...", "%2e%2e", "%252e"}
VICTIMS = ("alice", "bob", "server", "alice/server2", "x", "users", "server/")


def raw_deletes(scripted: ScriptedHub) -> list[str]:
    return [request.target.removeprefix(PREFIX) for request in scripted.requests if request.method == "DELETE"]


def raw_looks(scripted: ScriptedHub) -> list[str]:
    targets = [request.target.removeprefix(PREFIX) for request in scripted.requests if request.method == "GET"]
    return [target for target in targets if target.startswith("/users/")]


def segments(target: str) -> list[str]:
    """The decoded segments of a raw target in which nothing could mean more than itself, neither a dot nor a slash."""
    encoded = target.removeprefix("/").split("/")
    assert all(re.fullmatch(r"(?:[A-Za-z0-9_~.-]|%[0-9A-F]{2})+", segment) for segment in encoded), target
    assert not {".", ".."} & set(encoded), target
    return [unquote(segment, errors="surrogatepass") for segment in encoded]


def escaped(name: str) -> str:
    """The name as the log shows it."""
    name = name if len(name) <= cull_idle.LONGEST_TEXT else name[: cull_idle.LONGEST_TEXT - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def assert_harmless(text: str) -> None:
    """Text on a terminal moves no cursor, colours nothing and begins no line by itself."""
    assert [char for char in text if char != "\n" and not char.isprintable()] == []


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_user_and_nobody_else_is_culled(cull_scripted: Cull, scripted: ScriptedHub, name: str) -> None:
    for victim in VICTIMS:
        scripted.add(victim)
        scripted.add(victim, "gpu")
    scripted.add(name, idle=LONG_AGO)
    results = [cull_scripted("--timeout=1h", "--cull-users", "--user-timeout=0") for _ in range(2)]
    assert [result.exit_code for result in results] == [0, 0]
    assert [segments(target) for target in raw_deletes(scripted)] == [["users", name, "server"], ["users", name]]
    assert {tuple(segments(target)) for target in raw_looks(scripted)} == {("users", name)}
    assert scripted.running() >= {*VICTIMS, *(f"{victim}/gpu" for victim in VICTIMS)}
    assert set(scripted.users) >= set(VICTIMS)
    assert [len(result.lines) for result in results] == [2, 2]
    assert_harmless(results[0].err + results[1].err)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_server_and_no_other_is_stopped(cull_scripted: Cull, scripted: ScriptedHub, name: str) -> None:
    for server in ("", "alice", "bob", "server"):
        scripted.add("ann", server)
    scripted.add("ann", name, idle=LONG_AGO)
    scripted.add("alice")
    result = cull_scripted("--timeout", "1h", "--remove-named-servers")
    stopped = [] if name in BY_HAND else [["users", "ann", "servers", name]]
    assert [segments(target) for target in raw_deletes(scripted)] == stopped
    (said,) = result.said.values()
    assert (result.exit_code, said.outcome) == ((0, "culled") if stopped else (1, "failed"))
    assert stopped or "stop it by hand" in said.reason
    assert scripted.running() >= {"ann", "ann/alice", "ann/bob", "ann/server", "alice"}
    assert len(result.lines) == 2
    assert_harmless(result.err)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_table_with_odd_names_is_harmless(cull_scripted: Cull, scripted: ScriptedHub, name: str) -> None:
    scripted.add(name, idle=LONG_AGO)
    scripted.add("ann", name, idle=LONG_AGO + 600)
    scripted.add(f"{name}2", extra={"last_activity": f"garbage{ESCAPE}"})
    result = cull_scripted("--timeout", "1h", "--dry-run", "--cull-users", "-v")
    assert result.exit_code == 0
    assert scripted.lines("DELETE") == []
    assert_harmless(result.out + result.err)
    assert [line.split("  ")[0].startswith("ann/") for line in result.out.splitlines()[1:3]] == [True, False]


def test_a_name_with_half_a_character_is_culled_under_that_name(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    half = "alice\ud800"
    scripted.add("alice\N{REPLACEMENT CHARACTER}")
    scripted.add("HALF", idle=LONG_AGO)
    scripted.fault("GET", "/users", edited(lambda body: json.loads(json.dumps(body).replace("HALF", r"alice\ud800"))))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert {tuple(segments(target)) for target in raw_looks(scripted)} == {("users", half)}
    assert raw_deletes(scripted) == []
    assert result.outcomes[r"alice\ud800"] == "gone"
    assert_harmless(result.err)


def test_an_odd_name_is_shown_so_that_it_can_be_recognized(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("bob\x1b[31m\n\u202e\u00fc\U0001f600", idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h")
    assert result.outcomes == {"bob\\x1b[31m\\n\\u202e\u00fc\U0001f600": "culled"}


@pytest.mark.parametrize("status", [404, 418, 500])
def test_a_message_of_the_hub_is_shown_escaped_and_on_one_line(
    cull_scripted: Cull, scripted: ScriptedHub, status: int
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    message = f"no{ESCAPE}\nINFO     culled everybody\u202e\ud800"
    scripted.fault("DELETE", ".*", respond_json(status, {"message": message}))
    result = cull_scripted("--timeout", "1h")
    assert len(result.lines) == 2
    assert "culled everybody" in result.lines[0]
    assert_harmless(result.err)


def test_the_target_of_a_redirect_is_shown_escaped(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", redirect(f"http://elsewhere/{ESCAPE}"))
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 3
    assert_harmless(result.err)


@pytest.mark.parametrize("key", ["last_activity", "started", "pending"])
def test_garbage_in_a_model_is_shown_escaped(cull_scripted: Cull, scripted: ScriptedHub, key: str) -> None:
    scripted.add("ann", idle=LONG_AGO, extra={key: f"a{ESCAPE}\nb"})
    result = cull_scripted("--timeout", "1h", "--dry-run", "-v")
    assert result.exit_code == 0
    assert len([line for line in result.table if line.startswith("ann ")]) == 1
    assert_harmless(result.out + result.err)


def test_the_name_of_the_tokens_owner_is_shown_escaped(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    owner = {"kind": "service", "name": f"culler{ESCAPE}\n", "scopes": ["list:users"]}
    scripted.fault("GET", "/user", respond_json(200, owner))
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 3
    assert len(result.lines) == 1
    assert r"culler\x1b" in result.lines[0]
    assert_harmless(result.err)


@pytest.mark.parametrize(
    "name", ["alice?x", "bob#1", "carol%2fdave", "dave smith", "\u00fcn\u00ef", "a+b", "eve@x.org"]
)
def test_a_name_is_percent_encoded_with_nothing_safe(cull_scripted: Cull, scripted: ScriptedHub, name: str) -> None:
    scripted.add(name, idle=LONG_AGO)
    for _ in range(2):
        cull_scripted("--timeout=1h", "--cull-users", "--user-timeout=0")
    assert raw_deletes(scripted) == [f"/users/{quote(name, safe='')}/server", f"/users/{quote(name, safe='')}"]


# Letters, marks, digits and signs, a few of each: the more alike, the better can one be taken for another.
SCRIPTS = [
    "abcABC019-_.",
    "\u00e4\u00f6\u00fc\u00df\u0130\u0131\u01c5\ufb01\u212b\u00c5",  # of several cases, or none, or compatible only
    "\u03b1\u03b2\u03c3\u03c2\u03a3\u1fb3",  # Greek
    "\u0430\u0431\u0432\u0451\u0419",  # Cyrillic
    "\u05d0\u05d1\u05b0\u05e9\u05c1",  # Hebrew, right to left
    "\u0627\u0644\u0628\u064e\u0661\ufefb",  # Arabic
    "\u0915\u094d\u0937\u093f",  # Devanagari
    "\u0e01\u0e33\u0e49",  # Thai
    "\u1100\u1161\u11a8\uac01",  # Hangul, in parts and whole
    "\u3042\u30ab\u3099\uff76\u6f22\u5b57",  # Kana of several widths, Han
    "\U00010330\U00010400\U0001d49c\U00020000",  # beyond the 16 bits
    "\U0001f600\U0001f468\u200d\U0001f469\u2764\ufe0f\U0001f1e9\U0001f3fd",  # emoji and their joints
    "e\u0301o\u0308\u0323\u20dd",  # combining marks
    "%?#&+;=@:,!$()*[]{}<>|\\^`~'\" /",
    "\t\n\r\x00\x1b\x7f\x9b\u00a0\u200b\u2028\u202e\ufeff\ufffd",
]
# Each turns a name into a twin: another name that is taken for it by code that normalizes, decodes or cuts off.
TWINS: list[Callable[[str], str]] = [
    str.upper,
    str.lower,
    str.casefold,
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: unicodedata.normalize("NFD", name),
    lambda name: unicodedata.normalize("NFKC", name),
    lambda name: quote(name, safe=""),
    lambda name: quote(quote(name, safe="")),
    lambda name: f"{name}?x",
    lambda name: f"{name}#x",
    lambda name: f"{name};x",
    lambda name: f"{name}%00",
    lambda name: f"{name}%2Fserver",
    lambda name: f"{name}%2F..",
    lambda name: f"{name}/server",
    lambda name: f" {name}",
    lambda name: f"{name}.",
]
SPECIAL = [
    *[".", "..", "...", "%2e", "%2E%2E", "/", "../..", "server", "servers", "users", "user", "null", "0"],
    "x" * 2000,
]


def generated_names(count: int) -> list[str]:
    """So many different names, the same every time; twins stand side by side."""
    chance = random.Random(2026)
    names = dict.fromkeys(SPECIAL)
    while len(names) < count:
        scripts = chance.sample(SCRIPTS, chance.randint(1, 3))
        length = 400 if chance.random() < 0.02 else chance.randint(1, 12)
        name = "".join(chance.choice(chance.choice(scripts)) for _ in range(length))
        names |= dict.fromkeys([name, chance.choice(TWINS)(name)])
    return list(names)[:count]


def leads_elsewhere(server: str) -> bool:
    """Whether a path with the name of a user's only server could lead elsewhere behind a proxy that decodes."""
    decoded = (server, unquote(server), unquote(unquote(server)))
    return any(re.match(r"\.*([?#]|\Z)|[^?#]*[/\\]", name) for name in decoded)


def test_of_200_generated_names_the_idle_ones_and_no_others_are_culled(cull: Cull) -> None:
    """Each name stands beside its twin in the list; one of the two is idle."""
    names = generated_names(260)  # some of them are refused
    servers = dict(zip(names, reversed(names), strict=True))  # of what names an older Hub took
    with RealHub() as hub:
        refused = hub.inherit(
            (name, 60, {servers[name]: {"idle_seconds": LONG_AGO if number % 2 else 60}})
            for number, name in enumerate(names)
        )
        taken = [(number % 2 == 1, name) for number, name in enumerate(names) if name not in refused]
        assert hub.users() == {name for _, name in taken}
        assert len(taken) >= 200
        assert 0 < len(refused) < 100
        idle, busy = ({name for due, name in taken if due is wanted} for wanted in (True, False))
        by_hand = {name for name in idle if leads_elsewhere(servers[name])}
        assert min(len(idle - by_hand), len(busy)) >= 60

        def full_names(users: set[str]) -> set[str]:
            return {full_name(name, servers[name]) for name in users}

        result = cull("--once", "--timeout=1h", "--url", hub.url, "-v", token=hub.culler_token)
        assert hub.running() == full_names(busy | by_hand)
        for outcome, users in (("culled", idle - by_hand), ("failed", by_hand)):
            said = [line.partition(f" {outcome} ")[2] for line in result.lines if f" {outcome} " in line]
            said = [each.rpartition(": idle ")[0] for each in said if ": idle " in each]
            assert sorted(said) == sorted(map(escaped, full_names(users)))
        counts = {"culled": len(idle - by_hand), "failed": len(by_hand)}
        assert result.counts == {"running": len(taken), "due": len(idle), **counts}
        assert result.exit_code == 1
        assert_harmless(result.err)

        hub.inherit((name, LONG_AGO if due else 60, {}) for due, name in taken)
        result = cull("--once", "--timeout=1h", "--cull-users", "--url", hub.url, token=hub.user_culler_token)
        assert hub.users() == busy | by_hand
        assert hub.running() == full_names(busy | by_hand)
        assert result.counts["deleted"] == len(idle - by_hand)
        assert_harmless(result.err)
