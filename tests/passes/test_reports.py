"""What people reported, and what adversaries tried: odd answers, names, proxies, clocks.

Each section says where it comes from. Of --idle-by, test_asking.py has what was brought.
"""

from __future__ import annotations

import gzip
import os
import shlex
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from email.utils import format_datetime
from functools import partial
from itertools import product
from pathlib import Path
from posixpath import normpath
from typing import NamedTuple
from urllib.parse import quote, unquote

import pytest
from by_hand.bulk_hub import BulkHub
from messages import Says
from processes import RUN, run_measured
from runs import Cull, RunLoop
from scenes import Given, Play, Scene, active, change, fault, having, idle, meanwhile, server, user
from scripted_hub import (
    ALL_SCOPES,
    HOUR,
    LONG_AGO,
    PREFIX,
    Answer,
    Exchange,
    FakeJupyter,
    Reply,
    Request,
    ScriptedHub,
    edited,
    html,
    of_hub,
    redirect,
    respond,
    respond_json,
    slow,
    swapped,
    then_do,
)

import cull_idle

MEBIBYTE = 1 << 20
CULLED = {"ann": "culled"}
always = partial(fault, times=None)


def lists(hub: ScriptedHub) -> int:
    """How often the user list, or a part of it, was asked for."""
    return sum(request.method == "GET" and request.path == "/users" for request in hub.requests)


def leaves(name: str) -> Given:
    return lambda hub: hub.users.pop(name)


# An ingress, a firewall or a proxy answers in place of the Hub (an adversary's review).

BODIES = {
    "text": (b"404 page not found\n", "text/plain"),
    "HTML": (b"<html><h1>nginx</h1></html>", "text/html"),
    "nothing": (b"", "text/plain"),
    "JSON": (b'{"error": "no such route"}', "application/json"),
    "Kubernetes": (b'{"kind": "Status", "status": "Failure", "message": "no", "code": 404}', "application/json"),
}


def foreign(status: int, what: str = "text") -> Reply:
    """As something between us and the Hub says it."""
    body, content_type = BODIES[what]
    return respond(status, body, {"Content-Type": content_type})


def back(*names: str, answer: Reply) -> list[Given]:
    """No look at a user is answered by the Hub; at the first of all, these become active."""

    def come_back(hub: ScriptedHub) -> None:
        for name in names:
            hub.touch(name)

    return [fault("GET", "/users/.*", meanwhile(come_back, answer)), always("GET", "/users/.*", answer)]


INGRESS = [
    *(Scene(f"who is back is spared though an ingress answers the look: {status}, {what}",
            [idle("ann", "bob"), user("cat"), user("dan"), *back("ann", "cat", answer=foreign(status, what))],
            "--concurrency=1 --cull-users",
            {"ann": "spared", "bob": "culled", "user cat": "spared", "user dan": "deleted"})
      for status in (404, 405) for what in BODIES),
    *(Scene(f"user {due} of 204 is found in the user list again",
            [active(*(f"u{number}" for number in range(due))), idle("ann"),
             active(*(f"u{number}" for number in range(due, 203))), always("GET", "/users/.*", foreign(404))],
            "", CULLED) for due in (0, 60, 150, 199, 203)),
    Scene("who is not on the user list any more is gone",
          [idle("ann"), active("bob"), fault("GET", "/users/ann", meanwhile(leaves("ann"), foreign(404)))], "",
          {"ann": "gone"}),
    *(Scene(f"a DELETE that something else refuses has failed: {status}, {what}",
            [idle("ann"), user("bob"), always("DELETE", ".*", foreign(status, what))], "--cull-users -v",
            {"ann": "failed", "user bob": "failed"}, deletes=["ann", "user bob"], exit=1)
      for status in (400, 404) for what in BODIES),
    *(Scene(f"a server that is down when the DELETE comes is gone: {status}",
            [idle("ann"), fault("DELETE", ".*", meanwhile(change("ann", ready=False), of_hub(status)))], "",
            {"ann": "gone"}, deletes=["ann"]) for status in (400, 404)),
    Scene("a user who is no more when the DELETE comes is gone",
          [user("ann"), fault("DELETE", ".*", meanwhile(leaves("ann"), of_hub(404)))], "--cull-users",
          {"user ann": "gone"}, deletes=["user ann"]),
    Scene("a server that a filtered scope does not cover has failed, and the scope is named",
          [having(scopes=[*ALL_SCOPES[1:], "delete:servers!group=students"]), idle("ann"), idle("bob"),
           lambda hub: hub.users["bob"].groups.append("students")], "", {"ann": "failed", "bob": "culled"},
          deletes=["ann", "bob"], exit=1, says=True),
]  # fmt: skip


# Answers that are too large or nested: jhub-apps keeps a picture for each dashboard; the rest is an adversary's.


def due(count: int, odd: Sequence[int] = (), data: bytes = b"") -> list[Given]:
    """So many due users, user-000 and so on; the options of the odd ones are this JSON."""
    options = [{"user_options": {"profile": "ODD" if number in odd else "small"}} for number in range(count)]
    users = [idle(f"user-{number:03}", **each) for number, each in enumerate(options)]
    return [*users, always("GET", r"/users\b.*", swapped(b'"ODD"', data))]


def all_but(count: int, odd: Sequence[int]) -> dict[str, str]:
    return {f"user-{number:03}": "culled" for number in range(count) if number not in odd}


DEEP = b"[" * 100_000 + b"]" * 100_000  # for the parsers of all Pythons
pictures = {"jhub_app": True, "thumbnail": "iVBORw0K" * 44_000}
dashboards = [f"ann/dashboard-{number}" for number in range(6)]
LARGE = Scene("six servers with a picture each are culled", [idle(*dashboards, user_options=pictures)], "",
              dict.fromkeys(dashboards, "culled"))  # fmt: skip


@pytest.mark.parametrize("odd", [(0,), (49,), (50,), (5, 25, 45, 59)], ids="users {} are nested too deeply".format)
def test_users_whose_options_are_nested_too_deeply_are_left_out(
    play: Play, says: Says, scripted: ScriptedHub, odd: Sequence[int]
) -> None:
    becomes = {**all_but(60, odd), "user zoe": "deleted"}
    scene = Scene("", [*due(60, odd, DEEP), user("zoe")], "--api-page-size=50 --cull-users", becomes, exit=1)
    says("\n".join(play(scene).errors))
    assert lists(scripted) <= 2 + 61


def test_who_is_left_out_is_said_once_however_often_the_user_list_is_read(play: Play) -> None:
    given = [always("GET", "/users/.*", foreign(404)), *due(20, [17], DEEP)]
    assert len(play(Scene("", given, "--concurrency=1", all_but(20, [17]), exit=1)).errors) == 1


def test_many_users_who_are_left_out_end_the_list(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cull_idle, "MOST_LEFT_OUT", 4)
    odd = range(2, 7)
    play(Scene("", due(10, odd, DEEP), "--api-page-size=5", all_but(2, []), exit=1))


def test_a_hub_without_pages_and_with_deep_options_is_not_asked_for_ever(play: Play, scripted: ScriptedHub) -> None:
    def whole_list(exchange: Exchange) -> Answer:
        """As an old Hub answers: without offset and limit."""
        request = replace(exchange.request, query={"state": "ready"})
        return swapped(b'"ODD"', DEEP, of=edited(lambda body: body["items"]))(replace(exchange, request=request))

    given = [having(version="1.5.1"), always("GET", "/users", whole_list), *due(20, [7])]
    play(Scene("", given, exit=3))
    assert lists(scripted) < 20


BRACKETS = {"nested": b"[" * MEBIBYTE + b"]" * MEBIBYTE, "side by side": b"[%s[]]" % (b"[]," * 4_000_000)}


@pytest.mark.parametrize("data", BRACKETS.values(), ids=BRACKETS)
def test_a_user_who_is_all_brackets_is_left_out_in_little_memory(
    scripted: ScriptedHub, tmp_path: Path, data: bytes
) -> None:
    for given in due(50, [20], data):
        given(scripted)
    result, peak = run_measured(scripted, tmp_path, "--timeout=1h")
    assert (result.exit_code, result.outcomes, len(result.errors)) == (1, all_but(50, [20]), 1)
    assert peak < 128 * MEBIBYTE


def test_20000_due_servers_take_at_most_80_megabytes(tmp_path: Path) -> None:
    options = {"profile": "gpu", "image": "registry.example/notebook:2026-11", "resources": {"cpu": 4, "memory": "16G"}}
    with BulkHub(20_000, due=20_000, groups=["students", "physics"], user_options=options) as hub:
        result, peak = run_measured(hub, tmp_path, "--timeout=1h", "--dry-run", "--json")
    assert (result.exit_code, len(result.out.splitlines())) == (0, 20_001)
    assert peak <= 80e6


# Answers that are printed: an adversary puts the token, control characters, or a megabyte into them.

TOKEN = "5ec2e7f00dfeedc0ffee0ddba11ca5cade5ca1ab1e"
TEXTS = {
    "the token": TOKEN * 100,  # wherever it is cut, a token is on the edge
    "control characters": "a\x1b[2J\x1b]0;owned\x07\r\nERROR    forged\n\x9b31m\u202e\u2028\x00",
    "a megabyte": "x" * 1_000_000,
}
Surface = Callable[[str], Sequence[Given]]


def field(key: str) -> Surface:
    """A field of the server."""
    return lambda text: [idle("ann", extra={key: text})]


def field_at_a_look(key: str) -> Surface:
    """The same, but only in the second look."""
    return lambda text: [idle("ann"), fault("GET", "/users/ann", meanwhile(change("ann", extra={key: text})))]


def error(method: str, pattern: str, status: int) -> Surface:
    """The message of an error."""
    return lambda text: [idle("ann"), user("bob"), always(method, pattern, of_hub(status, text))]


def in_header(text: str) -> str:
    """As far as a header can hold it."""
    return "".join(char for char in text[:60_000] if char not in "\r\n" and ord(char) < 256)


def location(method: str, pattern: str) -> Surface:
    """The target of a redirect."""
    return lambda text: [idle("ann"), always(method, pattern, redirect(f"http://elsewhere/{in_header(text)}"))]


def owner(key: str) -> Surface:
    """The owner of a token that lacks scopes."""
    model = {"kind": "service", "name": "culler", "scopes": ["list:users"]}
    return lambda text: [always("GET", "/user", respond_json(200, {**model, key: text}))]


def on_at(offset: str) -> Reply:
    """The list, which goes on there."""
    page = {"offset": 0, "limit": 50, "total": 2, "next": {"offset": offset, "limit": 50}}
    return edited(lambda body: {**body, "_pagination": page})


LISTED: dict[str, Surface] = {
    "message of the list's 500": error("GET", "/users", 500), "message of the list's 403": error("GET", "/users", 403),
    "Location of the list": location("GET", "/users"), "owner's kind": owner("kind"), "owner's name": owner("name"),
    "next offset": lambda text: [idle("ann"), always("GET", "/users", on_at(text))],
    "version": lambda text: [idle("ann"), having(version=in_header(text))],
    **{key: field(key) for key in ("pending", "last_activity", "started")},
}  # fmt: skip
LATER: dict[str, Surface] = {
    "Location of a look": location("GET", "/users/.*"), "Location of a stop": location("DELETE", ".*"),
    "pending at a look": field_at_a_look("pending"), "last_activity at a look": field_at_a_look("last_activity"),
    **{f"message of a look's {status}": error("GET", "/users/.*", status) for status in (403, 500)},
    **{f"message of a stop's {status}": error("DELETE", ".*/server", status) for status in (400, 403, 404, 418, 503)},
    **{f"message of a deletion's {status}": error("DELETE", "/users/bob", status) for status in (400, 418)},
}  # fmt: skip
PRINTED = [
    *product({**LISTED, **LATER}, ["-v --json --cull-users"]),
    *product(LISTED, ["-v --dry-run", "-v --dry-run --json"]),
]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(("surface", "options"), PRINTED)
def test_what_is_printed_of_an_answer_is_escaped_cut_and_without_the_token(
    cull: Cull, scripted: ScriptedHub, surface: str, options: str, text: str
) -> None:
    scripted.token = TOKEN
    for given in {**LISTED, **LATER}[surface](text):
        given(scripted)
    result = cull("--once", "--timeout=1h", "--url", scripted.url, *options.split(), token=TOKEN)
    printed = result.out + result.err
    assert not any(TOKEN[start : start + 8] in printed for start in range(len(TOKEN) - 7))
    assert [char for char in printed if char != "\n" and not char.isprintable()] == []
    assert not any(line.startswith("ERROR    forged") for line in [*result.lines, *result.out.splitlines()])
    assert max(map(len, printed.splitlines()), default=0) <= 4_000


def test_an_offset_of_4000_digits_is_printed_cut(play: Play, scripted: ScriptedHub) -> None:
    digits = always("GET", "/users", swapped(b'"DIGITS"', b"9" * 4000, of=on_at("DIGITS")))
    result = play(Scene("", [idle("ann"), digits], "", CULLED, exit=1))
    assert max(map(len, result.err.splitlines())) <= 2_000
    assert lists(scripted) < 20


# Clocks, and decisions that take long (an adversary).


def dated(shift: timedelta) -> Reply:
    """The answer with a Date that is off the Hub's own clock."""

    def reply(exchange: Exchange) -> Answer:
        answer, date = exchange.normal(), format_datetime(exchange.hub.now + shift, usegmt=True)
        return replace(answer, headers={**answer.headers, "Date": date})

    return reply


AHEAD = {
    "the first page": ("/users", 1),
    "the second page": (r"/users\?.*offset=2.*", 1),
    "the first look": ("/users/.*", 1),
    "all but the first page": (r"/users(/.*|\?.*offset=[24].*)", None),
}


@pytest.mark.parametrize("options", ["", "--cull-users", "--idle-by=both"])
@pytest.mark.parametrize("which", AHEAD)
def test_a_date_that_is_ahead_endangers_nobody(play: Play, which: str, options: str) -> None:
    pattern, times = AHEAD[which]
    in_use = [server(f"active-{number}", 60, age=9 * HOUR, says=FakeJupyter()) for number in range(5)]
    given = [
        having(page_max=2, scopes=[*ALL_SCOPES, "tokens"]),
        *in_use,
        idle("ann", age=9 * HOUR),
        fault("GET", pattern, dated(timedelta(hours=2)), times=times),
    ]
    play(Scene("", given, options, CULLED))


@pytest.mark.parametrize(("mode", "outcome"), [("both", "spared"), ("server", "culled"), ("kernels", "culled")])
def test_who_comes_back_while_a_server_is_asked_is_spared_if_the_hubs_word_counts(
    play: Play, mode: str, outcome: str
) -> None:
    given = [
        having(scopes=[*ALL_SCOPES, "tokens"]),
        idle("ann", "bob", age=9 * HOUR),
        lambda hub: hub.fault(
            "GET", "/user/ann/api/kernels", then_do(lambda: hub.touch("ann"), of=slow(1.2)), times=None
        ),
    ]
    play(Scene("", given, f"--idle-by={mode}", {"ann": outcome, "bob": "culled"}))


# What an arbiter may answer (an adversary).

FUTURE = """
import asyncio

def f():
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    future.set_result(True)
    loop.close()
    return future
"""
AWAITABLE = """
class Later:
    def __await__(self):
        yield from ()
        return True

def f():
    return Later()
"""
CULLED_BY = {"a future": FUTURE, "an object": AWAITABLE}
IN_DOUBT = {
    "a number": "def f(): return 1",
    "a generator": "def f(): yield True",
    "an async generator": "async def f(): yield True",
    "text, later": AWAITABLE.replace("True", "'keep'"),
    "GeneratorExit": "def f(): raise GeneratorExit",
    "GeneratorExit, later": "async def f(): raise GeneratorExit",
    "what cannot be printed": "class X:\n  def __repr__(self): 1 / 0\ndef f(): return X()",
    "what prints as a number": "class X:\n  def __repr__(self): return 5\ndef f(): return X()",
    "what is no boolean": "class bool_:\n  def __bool__(self): 1 / 0\ndef f(): return bool_()",
    "an error that cannot be printed": "class E(Exception):\n  def __str__(self): 1 / 0\ndef f(): raise E",
    "an error without a text": "class E(Exception):\n  __str__ = None\ndef f(): raise E",
}


@pytest.mark.parametrize("answer", [*CULLED_BY, *IN_DOUBT])
def test_what_an_arbiter_may_answer(play: Play, tmp_path: Path, answer: str) -> None:
    is_culled = answer in CULLED_BY
    (tmp_path / "arbiter.py").write_text({**CULLED_BY, **IN_DOUBT}[answer])
    options = f"--arbiter={tmp_path}/arbiter.py:f"
    play(Scene("", [idle("ann")], options, CULLED if is_culled else {}, doubts=not is_culled))


# A process that lacks something: streams, threads, a place for files (an adversary; a CronJob's read-only root).


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("flags", [["--once"], ["--once", "--json"], ["--dry-run"]], ids=" ".join)
def test_closed_streams_do_no_harm(scripted: ScriptedHub, tmp_path: Path, flags: list[str], closed: str) -> None:
    scripted.add("ann", idle=LONG_AGO)
    metrics = tmp_path / "cull.prom"
    program = [*RUN, "--url", scripted.url, "--timeout=1h", f"--metrics-file={metrics}", "--notify=true", *flags]
    env = {**os.environ, "JUPYTERHUB_API_TOKEN": scripted.token}
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *program]
    done = subprocess.run(command, env=env, capture_output=True, timeout=60, check=False)
    is_dry = "--dry-run" in flags
    assert (done.returncode, scripted.running(), metrics.exists()) == (0, {"ann"} if is_dry else set(), not is_dry)
    assert b"Traceback" not in done.stderr


def test_a_command_runs_where_no_file_can_be_made(play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    told = tmp_path / "told"
    script = f'echo "$CULL_IDLE_EVENT $CULL_IDLE_USER" >> {shlex.quote(str(told))}'
    command = shlex.quote(shlex.join(["sh", "-c", script]))
    play(Scene("", [idle("ann")], f"--notify={command}", CULLED))
    assert told.read_text() == "culled ann\n"


# Packed answers, redirects, rules for nobody, a private CA (an adversary; reports).


NO_USERS = b'{"items": [], "_pagination": {"next": null}}'
PACKED = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
LISTS = [
    Scene("a list that is packed is refused", [fault("GET", "/users", respond(200, gzip.compress(NO_USERS), PACKED))],
          exit=3, says=True),
    Scene("a redirect to https: names that address",
          [always("GET", f"/{path}", redirect(f"https://hub.example.org/hub/api/{path}?limit=200", 308))
           for path in ("user", "users")], exit=3, says=True),
]  # fmt: skip


@pytest.mark.parametrize("scene", [*INGRESS, LARGE, *LISTS], ids=Scene.__str__)
def test_scene(scene: Scene, play: Play) -> None:
    play(scene)


@pytest.mark.parametrize(
    ("path", "stays"),
    [("/users", {"ann", "bob"}), ("/users/ann", {"ann"}), ("/user/ann/api/kernels", set())],
)
def test_an_answer_is_not_unpacked_without_a_bound(
    scripted: ScriptedHub, tmp_path: Path, path: str, stays: set[str]
) -> None:
    bomb = gzip.compress(b" " * (64 * MEBIBYTE)) * 16  # a GiB
    idle("ann", "bob", age=9 * HOUR)(scripted)
    scripted.scopes.append("tokens")
    scripted.fault("GET", path, respond(200, bomb, PACKED), times=None)
    result, peak = run_measured(scripted, tmp_path, "--timeout=1h", "--idle-by=both")
    assert peak < 256 * MEBIBYTE
    assert scripted.running() == stays
    assert (result.exit_code == 0) == (not stays)


@pytest.mark.parametrize(
    ("setting", "passes"),
    [("keep", [1, 0, 0]), ("timeout=never", [1, 0, 0]), ("max-age=never", [1, 0, 0]), ("timeout=30m", [0, 0, 0])],
)
def test_a_rule_that_keeps_and_applies_to_nobody_is_said_once(
    loop: RunLoop, cull_scripted: Cull, scripted: ScriptedHub, setting: str, passes: list[int]
) -> None:
    """Once by a loop, and by each single pass: a group was renamed. With -v, that of any rule."""
    active("ann")(scripted)
    options = ("--timeout=1h", f"--rule=group=gpu-long {setting}")
    done = loop(scripted, *options, between=[bool] * 2)
    assert [sum("gpu-long" in line for line in each.lines) for each in done.passes] == passes
    for more, number in (([], passes[0]), (["-v"], 1)):
        assert sum("gpu-long" in line for line in cull_scripted(*options, *more).lines) == number
    scripted.users["ann"].groups = ["gpu-long"]
    assert not any("gpu-long" in line for line in cull_scripted(*options).lines)


@pytest.fixture
def secure(certificates: Path) -> Iterator[ScriptedHub]:
    """A Hub that speaks TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server/server.crt", certificates / "server/server.key")
    with ScriptedHub() as hub:
        assert hub._listener
        plain = hub._listener.socket
        hub._listener.socket = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        yield hub


CA = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


@pytest.mark.parametrize("names", [*((name,) for name in CA), (CA[0], CA[2]), (CA[1], CA[2])], ids=" before ".join)
def test_a_private_ca_is_trusted(cull: Cull, secure: ScriptedHub, certificates: Path, names: Sequence[str]) -> None:
    secure.add("ann", idle=LONG_AGO)
    env = dict.fromkeys(names, "/no/such/file") | {names[0]: str(certificates / "ca/ca.crt")}
    url = secure.url.replace("http:", "https:")
    assert cull("--once", "--timeout=1h", f"--url={url}", token=secure.token, env=env).outcomes == CULLED


# Names (an adversary): a proxy that decodes paths makes other paths of them.

HARMLESS = ["test #2", "50%", "what?", "a b", "\u00fcn\u00ef", "a;b", "x.", "...x"]
DANGEROUS = [
    "a?x", "a#x", "a%3Fx", "a%23", "?x", "#", "%3f", ".", "..", "...", "%2e%2e", "%252e%252e", "../../bob/servers/s1",
    "..%2f..%2fbob%2fservers%2fs1", "%2e%2e%2f%2e%2e%2fbob%252fservers%2fs1", r"..\..\bob\servers\s1", "x/../a", "a/",
    "%61", "%2561", "..?x", "../..", "../../bob", "../../bob/server", "../server", "%2F..%2Fa", "a/../../servers/s1",
    "%252E%252E", "%25731",
]  # fmt: skip


class Proxy(NamedTuple):
    """What a proxy makes of a path, as nginx does where its proxy_pass ends in $uri."""

    decodes: int
    normalizes: bool
    backslashes: bool
    only_users: bool = False  # only below /users

    def rewrite(self, target: str) -> str:
        path, mark, query = target.partition("?")
        if self.only_users and not path.startswith(f"{PREFIX}/users/"):
            return target
        for _ in range(self.decodes):
            path = unquote(path)
        if self.backslashes:
            path = path.replace("%5C", "/").replace("\\", "/")
        path, more, _ = path.partition("?")
        path = path.partition("#")[0]
        if self.normalizes:
            path = normpath(path) + "/" * path.endswith(("/", "/.", "/.."))
        return path + (mark or more) + query


class ProxiedHub(ScriptedHub):
    """A Hub of a version that takes all names, behind a proxy."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__()
        self.version = "5.4.0"
        self._proxy = proxy

    def answer(self, request: Request) -> Answer:
        path, mark, query = self._proxy.rewrite(request.target).partition("?")
        segments = tuple(unquote(part) for part in path.removeprefix(f"{PREFIX}/").split("/"))
        return super().answer(replace(request, target=quote(path, safe="/%") + mark + query, segments=segments))


PROXIES = [Proxy(*each) for each in product((0, 1, 2), (False, True), (False, True), (False, True))]


@pytest.mark.parametrize("flags", [[], ["--remove-named-servers", "--cull-users"]], ids=["stop", "remove"])
@pytest.mark.parametrize("proxy", PROXIES, ids=str)
def test_behind_a_proxy_that_decodes_only_that_very_server_is_touched(
    cull: Cull, proxy: Proxy, flags: list[str]
) -> None:
    with ProxiedHub(proxy) as hub:
        in_use = ("ann", "ann/a", "ann/s1", "ann/server", "bob", "bob/s1")
        active(*in_use, age=9 * HOUR)(hub)
        idle(*(f"ann/{name}" for name in [*DANGEROUS, *HARMLESS, "plain"]), age=9 * HOUR)(hub)
        before = hub.running()
        result = cull("--once", "--timeout=1h", "--url", hub.url, *flags, token=hub.token)
        stopped = before - hub.running()
        assert hub.running() >= set(in_use)
        assert set(hub.users) == {"ann", "bob"}
        assert stopped == {name for name, outcome in result.outcomes.items() if outcome == "culled"}
        assert "ann/plain" in stopped


NO_SUCH_REQUEST = {"404": of_hub(404), "405": of_hub(405), "HTML 404": html(404), "HTML 405": html(405)}


@pytest.mark.parametrize("name", [r"bob\server", r"bob\servers\s1"])
@pytest.mark.parametrize("make", [user, idle], ids=["a user", "a server"])
@pytest.mark.parametrize("only_users", [False, True], ids=["all paths", "paths below /users"])
@pytest.mark.parametrize("how", NO_SUCH_REQUEST)
def test_a_backslash_that_becomes_a_slash_leads_to_nobody_else(
    cull: Cull, name: str, make: Callable[[str], Given], only_users: bool, how: str
) -> None:
    with ProxiedHub(Proxy(0, normalizes=False, backslashes=True, only_users=only_users)) as hub:
        for given in (active("bob", "bob/s1"), make(name), always("GET", "/users/bob/server.*", NO_SUCH_REQUEST[how])):
            given(hub)
        cull("--once", "--timeout=1h", "--cull-users", "--url", hub.url, token=hub.token)
        assert hub.lines("DELETE") == []
        assert hub.running() >= {"bob", "bob/s1"}


# Commands of published configurations


def test_white_space_around_what_the_environment_sets_does_not_count(
    cull: Cull, scripted: ScriptedHub, tmp_path: Path
) -> None:
    """As a file of a secret, with a line end, gives it."""
    idle("ann")(scripted)
    (tmp_path / "cull.toml").write_text('timeout = "1h"')
    names = {"JUPYTERHUB_API_URL": scripted.url, "CULL_IDLE_CONFIG": tmp_path / "cull.toml"}
    env = {name: f" {value}\n" for name, value in names.items()}
    assert cull("--once", token=f"{scripted.token}\n", env=env).outcomes == CULLED


def test_without_packages_the_old_command_says_what_to_install(says: Says) -> None:
    """The published command is `[sys.executable, "cull_idle_servers.py", …]`: Python is the Hub's own."""
    script = Path(sys.executable).with_name("cull_idle_servers.py")
    command = [sys.executable, "-I", "-S", str(script), "--timeout=3600"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    says(done.stderr.replace(str(script), "SCRIPT").replace(sys.executable, "PYTHON"))
