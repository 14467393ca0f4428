"""What an adversary brought: each attack with the right value.

The numbers are those of the issue that collects them; test_real_reports.py has the first ones.
"""

from __future__ import annotations

import gzip
import os
import shlex
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import product
from pathlib import Path
from posixpath import normpath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import pytest
from processes import RUN, run_measured
from runs import Cull, RunLoop
from scripted_hub import (
    HOUR,
    LONG_AGO,
    PREFIX,
    Answer,
    Exchange,
    FakeJupyter,
    Reply,
    Request,
    ScriptedHub,
    and_do,
    html,
    of_hub,
    respond,
    slow,
    then_do,
)

import cull_idle

MEBIBYTE = 1 << 20


# 14. Clocks


def dated(shift: timedelta) -> Reply:
    """The answer with a Date that is off the Hub's own clock."""

    def reply(exchange: Exchange) -> Answer:
        answer, date = exchange.normal(), format_datetime(exchange.hub.now + shift, usegmt=True)
        return replace(answer, headers={**answer.headers, "Date": date})

    return reply


@pytest.mark.parametrize("flags", [[], ["--cull-users"], ["--idle-by=both"]], ids=str)
@pytest.mark.parametrize(
    ("path", "times"),
    [
        ("/users?.*", 1),
        ("/users", 1),
        (r"/users\?.*offset=2.*", 1),
        ("/users/.*", 1),
        (r"/users(/.*|\?.*offset=[24].*)", None),
    ],
    ids=["the first", "the first page", "the second page", "the first look", "all but the first page"],
)
def test_a_date_that_is_ahead_endangers_nobody(
    cull_scripted: Cull, scripted: ScriptedHub, path: str, times: int | None, flags: list[str]
) -> None:
    scripted.page_max = 2
    scripted.scopes.append("tokens")
    active = {f"active-{number}" for number in range(5)}
    for name in sorted(active):
        scripted.add(name, idle=60, age=9 * HOUR, says=FakeJupyter())
    scripted.add("idle", idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("GET", path, dated(timedelta(hours=2)), times=times)
    result = cull_scripted("--timeout=1h", *flags)
    assert (result.exit_code, scripted.running()) == (0, active)
    assert active <= scripted.users.keys()


@pytest.mark.parametrize("minutes", [365 * 24 * 60, -365 * 24 * 60, 6, -6, 4, -4])
def test_a_clock_that_differs_is_a_warning(cull_scripted: Cull, scripted: ScriptedHub, minutes: int) -> None:
    scripted.clock = lambda: datetime.now(UTC) + timedelta(minutes=minutes)
    scripted.add("ann", idle=60)
    scripted.add("bob", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h")
    assert (result.exit_code, scripted.running()) == (0, {"ann"})
    assert ["clock" in line for line in result.warnings] == [True] * (abs(minutes) > 5)


# 15. Decisions that take long

SLOW_ARBITER = """
import time

seen = set()

def decide(user):  # at once while scanning; the second time, it takes long
    if user["name"] in seen:
        time.sleep(1.1)
    seen.add(user["name"])
    return True
"""


def test_who_comes_back_while_an_arbiter_thinks_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path
) -> None:
    (tmp_path / "arbiter.py").write_text(SLOW_ARBITER)
    for name in ("ann", "bob", "cat"):
        scripted.add(name, idle=LONG_AGO)
    for name in ("ann", "bob"):
        scripted.fault("GET", f"/users/{name}", and_do(lambda name=name: scripted.touch(name)))  # type: ignore[misc]
    result = cull_scripted("--timeout=1h", f"--arbiter={tmp_path}/arbiter.py:decide")
    assert result.outcomes == {"ann": "spared", "bob": "spared", "cat": "culled"}
    assert scripted.lines("DELETE") == ["DELETE /users/cat/server"]
    assert scripted.lines().count("GET /users/ann") == 2


@pytest.mark.parametrize(("mode", "stays"), [("both", {"ann"}), ("server", set()), ("kernels", set())])
def test_who_comes_back_while_a_server_is_asked_is_spared_if_the_hubs_word_counts(
    cull_scripted: Cull, scripted: ScriptedHub, mode: str, stays: set[str]
) -> None:
    scripted.scopes.append("tokens")
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    scripted.add("bob", idle=LONG_AGO, age=9 * HOUR)
    back = then_do(lambda: scripted.touch("ann"), of=slow(1.2))
    scripted.fault("GET", "/user/ann/api/kernels", back, times=None)
    result = cull_scripted("--timeout=1h", "--idle-by", mode)
    assert (result.exit_code, scripted.running()) == (0, stays)


# 16. Minutes or months


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--user-timeout", "6M"), ("--user-timeout", "1h30M"), ("--timeout", " 6M "), ("--max-age", "1.5M")],
        *[("--cull-every", "6M"), ("--rule", "user=ann timeout=6M"), ("$CULL_IDLE_USER_MAX_AGE", "6M")],
    ],
)
def test_a_capital_m_is_refused(cull_scripted: Cull, scripted: ScriptedHub, option: str, value: str) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    args = [f"{option}={value}"] if option.startswith("--") else []
    env = {option[1:]: value} if option.startswith("$") else {}
    result = cull_scripted("--timeout=1h", "--cull-users", *args, env=env)
    assert (result.exit_code, scripted.requests) == (2, [])
    (line,) = result.lines
    assert option in line


# 17. What an arbiter may answer

FUTURE = """
import asyncio

def f():
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    future.set_result(ANSWER)
    loop.close()
    return future
"""
AWAITABLE = """
class Later:
    def __await__(self):
        yield from ()
        return ANSWER

def f():
    return Later()
"""
WRONG = {
    "text": "def f(): return 'keep'",
    "a number": "def f(): return 1",
    "a list": "def f(): return [False]",
    "a generator": "def f(): yield True",
    "an async generator": "async def f(): yield True",
    "text, later": AWAITABLE.replace("ANSWER", "'keep'"),
    "CancelledError": "import asyncio\ndef f(): raise asyncio.CancelledError",
    "CancelledError, later": "import asyncio\nasync def f(): raise asyncio.CancelledError",
    "GeneratorExit": "def f(): raise GeneratorExit",
    "GeneratorExit, later": "async def f(): raise GeneratorExit",
    "SystemExit": "def f(): raise SystemExit(0)",
}


def with_bob_due(source: str) -> str:
    """An arbiter that answers as f does, but for bob, who is always due."""
    return f"{source}\n\ndef decide(user):\n    return True if user['name'] == 'bob' else f()\n"


@pytest.mark.parametrize("source", WRONG.values(), ids=WRONG)
def test_an_answer_that_is_no_boolean_keeps_that_server_and_is_said(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, source: str
) -> None:
    (tmp_path / "arbiter.py").write_text(with_bob_due(source))
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", f"--arbiter={tmp_path}/arbiter.py:decide")
    assert (result.outcomes, scripted.running()) == ({"bob": "culled"}, {"ann"})
    assert ["ann" in line for line in result.warnings] == [True]


@pytest.mark.parametrize("answer", [True, False, None])
@pytest.mark.parametrize(
    "source", [FUTURE, AWAITABLE, "async def f(): return ANSWER"], ids=["a future", "an object", "a coroutine"]
)
def test_what_can_be_awaited_is_awaited(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, source: str, answer: bool | None
) -> None:
    (tmp_path / "arbiter.py").write_text(with_bob_due(source.replace("ANSWER", str(answer))))
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", f"--arbiter={tmp_path}/arbiter.py:decide")
    assert (result.exit_code, scripted.running()) == (0, set() if answer else {"ann"})
    assert result.warnings == []


# 18. Bytes that are no text


@pytest.mark.parametrize("where", ["--rule", "$CULL_IDLE_RULE"])
def test_a_rule_in_latin_1_is_refused(cull_scripted: Cull, scripted: ScriptedHub, where: str) -> None:
    scripted.add("j\N{LATIN SMALL LETTER U WITH DIAERESIS}rgen", idle=LONG_AGO)
    rule = os.fsdecode(b"user=j\xfcrgen keep")
    option, env = ([f"--rule={rule}"], {}) if where == "--rule" else ([], {"CULL_IDLE_RULE": rule})
    result = cull_scripted("--timeout=1h", *option, env=env)
    assert (result.exit_code, scripted.requests) == (2, [])
    assert "UTF-8" in result.err


# 19. Closed streams


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("flags", [["--once"], ["--once", "--json"], ["--dry-run"]], ids=str)
def test_closed_streams_do_no_harm(scripted: ScriptedHub, tmp_path: Path, flags: list[str], closed: str) -> None:
    scripted.add("ann", idle=LONG_AGO)
    metrics = tmp_path / "cull.prom"
    program = [*RUN, "--url", scripted.url, "--timeout=1h", f"--metrics-file={metrics}", "--notify=true", *flags]
    env = {**os.environ, "JUPYTERHUB_API_TOKEN": scripted.token}
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *program]
    done = subprocess.run(command, env=env, capture_output=True, timeout=60, check=False)
    assert (done.returncode, scripted.running()) == (0, {"ann"} if "--dry-run" in flags else set()), done.stderr
    assert b"Traceback" not in done.stderr
    assert "--dry-run" in flags or metrics.read_text().startswith("# HELP cull_idle_")


# 20. No more threads


@pytest.mark.parametrize("allowed", [1, 3])
@pytest.mark.parametrize("late", [False, True], ids=["at the start", "in the middle"])
def test_where_threads_are_refused_the_others_do_all_and_report_it(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, allowed: int, late: bool
) -> None:
    names = {f"user-{number:02}" for number in range(40)}
    for name in names:
        scripted.add(name, idle=LONG_AGO)
    begin = threading.Thread.start
    started: list[threading.Thread] = []
    in_the_middle = threading.Event()
    scripted.fault("DELETE", ".*", then_do(in_the_middle.set))

    def start(thread: threading.Thread) -> None:
        if sys._getframe(1).f_globals["__name__"] != "scripted_hub":
            if len(started) >= allowed and (in_the_middle.is_set() or not late):
                raise RuntimeError("can't start new thread")
            started.append(thread)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    result = cull_scripted("--timeout=1h", "--concurrency=10")
    assert len(started) >= allowed
    assert sorted(scripted.lines("DELETE")) == [f"DELETE /users/{name}/server" for name in sorted(names)]
    assert result.outcomes == dict.fromkeys(names, "culled")
    assert result.exit_code == 0


# 21. Half a user list


@pytest.mark.parametrize(
    ("how", "exit_code"),
    [(respond(500), 1), (respond(200, b"{"), 1), (of_hub(403, "Forbidden"), 3)],
    ids=["500", "garbage", "403"],
)
def test_after_a_list_that_breaks_no_user_is_deleted(
    cull_scripted: Cull, scripted: ScriptedHub, how: Reply, exit_code: int
) -> None:
    scripted.page_max = 2
    scripted.add("ann", idle=LONG_AGO)
    for number in range(6):
        scripted.add_user(f"user-{number}", idle=LONG_AGO)
    scripted.fault("GET", r"/users\?(.*&)?offset=4.*", how, times=None)
    result = cull_scripted("--timeout=1h", "--cull-users")
    assert scripted.lines("DELETE") == ["DELETE /users/ann/server"]
    assert result.exit_code == exit_code


# 22. Sick servers at the head of the list


def test_sick_servers_that_stand_first_do_not_save_the_others(loop: RunLoop, scripted: ScriptedHub) -> None:
    sick = {f"sick-{number:02}" for number in range(45)}
    for name in sorted(sick):
        scripted.add(name, idle=LONG_AGO)
    for number in range(30):
        scripted.add(f"well-{number:02}", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/sick.*", html(504), times=None)
    loop(scripted, "--timeout=1h", between=[bool] * 4)
    assert scripted.running() == sick


# 23. Names


@pytest.mark.parametrize("name", ["test #2", "50%", "what?", "a b", "\u00fcn\u00ef", "a;b", "x.", "...x"])
def test_a_server_with_an_odd_but_harmless_name_is_culled(
    cull_scripted: Cull, scripted: ScriptedHub, name: str
) -> None:
    scripted.add("ann", name, idle=LONG_AGO)
    result = cull_scripted("--timeout=1h")
    assert (result.exit_code, scripted.running()) == (0, set())


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
DANGEROUS = [
    "a?x", "a#x", "a%3Fx", "a%23", "?x", "#", "%3f", ".", "..", "...", "%2e%2e", "%252e%252e", "../../bob/servers/s1",
    "..%2f..%2fbob%2fservers%2fs1", "%2e%2e%2f%2e%2e%2fbob%252fservers%2fs1", r"..\..\bob\servers\s1", "x/../a", "a/",
    "%61", "%2561", "..?x", "../..", "../../bob", "../../bob/server", "../server", "%2F..%2Fa", "a/../../servers/s1",
]  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--remove-named-servers", "--cull-users"]], ids=["stop", "remove"])
@pytest.mark.parametrize("proxy", PROXIES, ids=str)
def test_behind_a_proxy_that_decodes_only_that_very_server_is_touched(
    cull: Cull, proxy: Proxy, flags: list[str]
) -> None:
    with ProxiedHub(proxy) as hub:
        for name, server in [("ann", ""), ("ann", "a"), ("ann", "s1"), ("ann", "server"), ("bob", ""), ("bob", "s1")]:
            hub.add(name, server, idle=60, age=9 * HOUR)
        active = hub.running()
        for server in [*DANGEROUS, "test #2", "50%", "what?", "plain"]:
            hub.add("ann", server, idle=LONG_AGO, age=9 * HOUR)
        before = hub.running()
        result = cull("--once", "--timeout=1h", "--url", hub.url, *flags, token=hub.token)
        stopped = before - hub.running()
        assert active <= hub.running()
        assert set(hub.users) == {"ann", "bob"}
        assert stopped == {name for name, outcome in result.outcomes.items() if outcome == "culled"}
        assert "ann/plain" in stopped


NO_SUCH_REQUEST = {"404": of_hub(404), "405": of_hub(405), "HTML 404": html(404), "HTML 405": html(405)}


@pytest.mark.parametrize("name", [r"bob\server", r"bob\servers\s1"])
@pytest.mark.parametrize("with_server", [True, False], ids=["with a server", "without"])
@pytest.mark.parametrize("only_users", [False, True])
@pytest.mark.parametrize("how", NO_SUCH_REQUEST)
def test_a_backslash_that_becomes_a_slash_leads_to_nobody_else(
    cull: Cull, name: str, only_users: bool, how: str, with_server: bool
) -> None:
    with ProxiedHub(Proxy(0, normalizes=False, backslashes=True, only_users=only_users)) as hub:
        hub.add("bob", idle=60)
        hub.add("bob", "s1", idle=60)
        hub.add_user(name, idle=LONG_AGO)
        if with_server:
            hub.add(name, idle=LONG_AGO)
        hub.fault("GET", "/users/bob/server.*", NO_SUCH_REQUEST[how], times=None)
        cull("--once", "--timeout=1h", "--cull-users", "--url", hub.url, token=hub.token)
        assert hub.lines("DELETE") == []
        assert hub.running() >= {"bob", "bob/s1"}


# 24. Commands that misbehave


def test_gigabytes_of_a_command_are_dropped(scripted: ScriptedHub, tmp_path: Path) -> None:
    scripted.add("ann", idle=LONG_AGO)
    command = f"head -c {2048 * MEBIBYTE} /dev/zero"
    result, peak = run_measured(scripted, tmp_path, "--timeout=1h", "-q", "--notify", command)
    assert (result.exit_code, result.out, result.err) == (0, "", "")
    assert peak < 128 * MEBIBYTE


def test_a_child_that_a_command_leaves_behind_is_not_waited_for(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = f"cat {shlex.quote(str(fifo))} &"  # until the end of the test
    result = cull_scripted("--timeout=1h", "--notify", shlex.join(["sh", "-c", writer]))
    assert (result.exit_code, result.errors) == (0, [])
    fifo.write_text("the end\n")


def hurried(method: Callable[..., object]) -> Callable[..., object]:
    """A method that waits for a moment, whatever its timeout."""

    def call(*args: Any, **kwargs: Any) -> object:
        return method(*args, **{**kwargs, "timeout": 0.3} if kwargs.get("timeout") else kwargs)

    return call


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command gets no more than a moment, whatever the program would give it."""
    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.3, raising=False)
    for name in ("communicate", "wait"):
        monkeypatch.setattr(subprocess.Popen, name, hurried(getattr(subprocess.Popen, name)))


@pytest.mark.usefixtures("short_waits")
def test_of_300_commands_that_hang_few_are_started(cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path) -> None:
    names = {f"user-{number:03}" for number in range(300)}
    for name in names:
        scripted.add(name, idle=LONG_AGO)
    script = f"echo $$ >> {shlex.quote(str(tmp_path / 'started'))}; exec sleep 60"
    result = cull_scripted("--timeout=1h", "--notify", shlex.join(["sh", "-c", script]))
    assert (result.exit_code, scripted.running()) == (0, set())
    started = (tmp_path / "started").read_text().split()
    assert 0 < len(started) < 10 + 4
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert any("--notify" in line for line in result.errors)


# 25. What a metrics file may replace


@pytest.mark.parametrize("value", ["false", "true", "0"])
def test_a_metrics_file_in_toml_is_a_text(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cull.toml").write_text(f"metrics-file = {value}\n")
    result = cull_scripted("--timeout=1h", "--config=cull.toml")
    assert list(tmp_path.iterdir()) == [tmp_path / "cull.toml"]
    assert (result.exit_code, scripted.requests) == (2, [])
    assert "metrics-file" in result.err


def a_file(path: Path) -> None:
    path.write_text("# another program's\n")


def a_device(path: Path) -> None:
    """As /dev/null is; where that is not allowed, a FIFO stands in."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        os.mkfifo(path)


@pytest.mark.parametrize("make", [a_file, Path.mkdir, a_device, os.mkfifo])
def test_a_metrics_file_replaces_nothing_of_others(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "metrics"
    make(path)
    before = path.lstat()
    result = cull_scripted("--timeout=1h", f"--metrics-file={path}")
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)
    assert list(tmp_path.iterdir()) == [path]
    assert "--metrics-file" in result.err


# 26. Packed answers


def packed(body: bytes, encoding: str = "gzip") -> Reply:
    """These bytes, said to be packed."""
    return respond(200, body, {"Content-Type": "application/json", "Content-Encoding": encoding})


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "gzip, gzip", "deflate", "br", "no-such"])
@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize("path", ["/users", "/users/ann"])
def test_a_packed_answer_is_read_or_refused_in_a_sentence(
    cull_scripted: Cull, scripted: ScriptedHub, path: str, garbage: bool, encoding: str
) -> None:
    def reply(exchange: Exchange) -> Answer:
        body = gzip.compress(exchange.normal().body)
        return packed(body[: len(body) // 2] if garbage else body, encoding)(exchange)

    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", path, reply, times=None)
    result = cull_scripted("--timeout=1h")
    refused = 3 if path == "/users" else 1
    assert (result.exit_code, scripted.running()) in ((0, set()), (refused, {"ann"}))
    assert len(result.errors) == bool(result.exit_code)


@pytest.mark.parametrize("path", ["/users", "/users/ann", "/user/ann/api/kernels"])
def test_an_answer_is_not_unpacked_without_a_bound(scripted: ScriptedHub, tmp_path: Path, path: str) -> None:
    scripted.scopes.append("tokens")
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO, age=9 * HOUR)
    bomb = gzip.compress(b" " * (64 * MEBIBYTE)) * 16  # a GiB
    scripted.fault("GET", path, packed(bomb), times=None)
    result, peak = run_measured(scripted, tmp_path, "--timeout=1h", "--idle-by=both")
    assert peak < 256 * MEBIBYTE
    assert scripted.running() == {"/users": {"ann", "bob"}, "/users/ann": {"ann"}}.get(path, set())
    assert (result.exit_code == 0) == path.startswith("/user/")
