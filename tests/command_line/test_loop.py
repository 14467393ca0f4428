"""The loop: its pauses, what it does while passes fail, whom it tells, the token, and how signals end it.

Most of it runs in this process, with pauses that take no time (the fixture `loop`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from hub import RealHub
from messages import Says
from processes import LOOP, PATIENCE, RUN, Start, open_terminal, read_some
from runs import Cull, Result, RunLoop
from scenes import idle, user
from scripted_hub import (
    LONG_AGO,
    Answer,
    Exchange,
    Reply,
    ScriptedHub,
    hang,
    normal,
    raw,
    reset,
    respond,
    then_do,
)

import cull_idle

Tell = Callable[..., None]


def nothing() -> None:
    """To be done between two passes."""


def crowd(count: int) -> list[str]:
    return [f"user{number}" for number in range(count)]


# Passes and pauses


def test_a_loop_culls_at_once_and_again_and_survives_a_hub_that_is_down(hub: RealHub, start: Start) -> None:
    hub.spawn("ann", idle_seconds=LONG_AGO)
    culler = start(hub, *LOOP)
    culler.wait_for(lambda: Result(0, "", culler.said()).outcomes == {"ann": "culled"})
    hub.stop()
    culler.wait_for(lambda: "ERROR" in culler.said())
    hub.start()
    hub.spawn("bob", wait=False, idle_seconds=LONG_AGO)
    culler.wait_for(lambda: Result(0, "", culler.said()).outcomes == {"ann": "culled", "bob": "culled"})
    assert hub.running() == set()
    assert culler.end(signal.SIGTERM) == 0


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The last of these is what the program takes for the time."""
    times = [0.0]
    monkeypatch.setattr(cull_idle, "monotonic", lambda: times[-1])
    return times


@pytest.mark.usefixtures("watch")
@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        ("", 300),
        ("--timeout=1h", 1800),
        ("--timeout=1s", 1),
        ("--timeout=0", 300),
        ("--timeout=never", 300),
        ("--timeout=0 --max-age=4h", 7200),
        ("--timeout=never --max-age=4h", 7200),
        ("--timeout=1h --cull-every=20s", 20),
    ],
)
def test_a_pass_starts_cull_every_after_the_last_or_half_of_the_limit(
    loop: RunLoop, scripted: ScriptedHub, arguments: str, seconds: int
) -> None:
    assert loop(scripted, *arguments.split(), between=[nothing]).pauses == [seconds, seconds]


def test_what_a_pass_takes_is_a_part_of_the_pause(loop: RunLoop, scripted: ScriptedHub, watch: list[float]) -> None:
    scripted.fault("GET", "/users", *(then_do(partial(watch.append, ends)) for ends in (0, 7, 32, 32)))
    assert loop(scripted, "--cull-every=20s", between=[nothing] * 3).pauses == [20, 13, 0, 20]


@pytest.mark.usefixtures("watch")
def test_pauses_grow_while_passes_fail_and_are_short_again_after_one_that_works(
    loop: RunLoop, scripted: ScriptedHub
) -> None:
    scripted.fault("GET", "/users", *[respond(403)] * 4, normal(), respond(403))
    assert loop(scripted, "--cull-every=10s", between=[nothing] * 5).pauses == [2, 4, 8, 10, 10, 2]


@pytest.mark.usefixtures("watch")
def test_a_pause_is_slept_in_slices_and_a_signal_ends_it_after_one(
    cull: Cull, scripted: ScriptedHub, tell_to_stop: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that comes just before a wait does not interrupt it: no wait may be long."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 25:
            tell_to_stop()

    monkeypatch.setattr(cull_idle, "sleep", sleep)
    assert cull("--url", scripted.url, "--cull-every=20s", token=scripted.token).exit_code == 0
    assert slept == [1] * 25
    assert scripted.lines().count("GET /user") == 2


@pytest.mark.usefixtures("watch")
def test_what_a_loop_says(loop: RunLoop, scripted: ScriptedHub, tmp_path: Path, says: Says) -> None:
    token = tmp_path / "token"
    token.write_text(scripted.token)
    idle("ann")(scripted)
    scripted.fault("GET", "/users", normal(), respond(403))
    arguments = ("--timeout=1h", "--rule=user=eve keep", f"--token-file={token}")
    done = loop(scripted, *arguments, between=[nothing, token.unlink, nothing])
    says("".join([*(each.err for each in done.passes), done.end]).replace(str(token), "TOKEN"))


# Passes that fail


def test_each_pass_reports_its_own_failures(loop: RunLoop, scripted: ScriptedHub) -> None:
    idle(*crowd(5))(scripted)
    scripted.fault("DELETE", ".*", respond(500), times=None)
    for each in loop(scripted, "-q", "--timeout=1h", between=[nothing]).passes:
        assert list(each.outcomes.values()) == ["failed"]
        assert len(each.errors) == 2  # the first, and how many more


def test_a_scope_that_is_taken_away_is_an_error(loop: RunLoop, scripted: ScriptedHub, says: Says) -> None:
    """Without read:servers no server is shown, which is a doubt about each user, but no failure."""
    idle("ann")(scripted)
    *_, last = loop(scripted, "--timeout=9h", between=[lambda: scripted.scopes.remove("read:servers")]).passes
    (error,) = last.errors
    says(error)


def go_down(exchange: Exchange) -> Answer:
    exchange.hub.pause_listening()
    return Answer(raw=b"", end="close")


GONE: dict[str, tuple[str, Reply]] = {
    "connections are refused": ("DELETE", go_down),
    "connections are lost": ("*", raw(b"")),
    "a proxy answers for it": ("*", respond(503)),
    "no answer comes": ("GET", hang()),
}


@pytest.mark.parametrize(
    ("how", "concurrency"), [*((how, 1) for how in GONE if how != "no answer comes"), *((how, 8) for how in GONE)]
)
def test_a_hub_that_is_gone_ends_the_pass(
    cull_scripted: Cull, scripted: ScriptedHub, how: str, concurrency: int
) -> None:
    method, reply = GONE[how]
    idle(*crowd(100))(scripted)
    for number in range(10):
        user(f"empty{number}")(scripted)
    scripted.fault(method, "/users/.*", reply, times=None)
    result = cull_scripted("--timeout=1h", "--cull-users", "--request-timeout=2s", f"--concurrency={concurrency}")
    assert result.exit_code == 1
    assert (len(scripted.running()), len(scripted.users)) == (100, 110)
    # There are no pauses, so a few more fail before the pass ends.
    assert max(10, 2 * concurrency) <= result.counts["failed"] <= max(10, 2 * concurrency) + concurrency
    assert result.counts["failed"] + result.counts["left undone"] == 110


def test_the_next_pass_does_the_rest_once_the_hub_is_back(loop: RunLoop, scripted: ScriptedHub) -> None:
    idle(*crowd(100))(scripted)
    scripted.fault("DELETE", ".*", *[normal()] * 25, go_down)
    first, second = loop(scripted, "--timeout=1h", "--concurrency=1", between=[scripted.resume]).passes
    assert (first.counts["culled"], first.counts["culled"] + second.counts["culled"]) == (25, 100)
    assert scripted.running() == set()


@pytest.mark.parametrize(
    ("method", "reply", "bad"),
    [
        pytest.param("*", reset(), 9, id="nine in a row without an answer"),
        pytest.param("GET", respond(500), 30, id="any number that are answered, with an error"),
    ],
)
def test_bad_users_do_not_keep_the_others_from_being_culled(
    cull_scripted: Cull, scripted: ScriptedHub, method: str, reply: Reply, bad: int
) -> None:
    names = crowd(50)
    idle(*names)(scripted)
    scripted.fault(method, rf"/users/({'|'.join(names[:bad])})(/server)?", reply, times=None)
    result = cull_scripted("-q", "--timeout=1h", "--concurrency=1")
    assert result.exit_code == 1
    assert scripted.running() == set(names[:bad])


def test_stops_that_take_too_long_are_all_tried(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    """They say nothing about the Hub: a pass would end after 16 that do."""
    idle(*crowd(24))(scripted)
    scripted.fault("DELETE", ".*", hang(), times=None)
    result = cull_scripted("--timeout=1h", "--concurrency=8", "--request-timeout=2s")
    assert (result.exit_code, result.counts) == (1, {"running": 24, "due": 24, "failed": 24})


def test_notify_is_told_once_of_what_lasts_for_three_passes(
    loop: RunLoop, scripted: ScriptedHub, tmp_path: Path
) -> None:
    """A Hub that restarts is no alarm. A sick server does not hide a Hub that is gone."""
    notices = tmp_path / "notices"
    told: list[list[tuple[str, bool]]] = []

    def note() -> None:
        lines = map(json.loads, notices.read_text().splitlines())
        told.append([(line["outcome"], bool(line["error"])) for line in lines if line["event"] == "pass"])
        notices.write_text("")

    notices.touch()
    idle("ann")(scripted)
    scripted.fault("GET", "/users", *[respond(403)] * 2, normal(), *[respond(403)] * 4)
    scripted.fault("DELETE", ".*", *[respond(500)] * 4)
    loop(scripted, "--timeout=1h", "--notify", f"tee -a {notices}", between=[note] * 13)
    assert {number: each for number, each in enumerate(told, 1) if each} == {
        6: [("pass_failed", True)],
        10: [("pass_failed", False)],
        13: [("pass_recovered", False)],
    }


# The token


def test_a_loop_does_not_begin_without_a_token(cull: Cull, scripted: ScriptedHub) -> None:
    assert cull("--url", scripted.url).exit_code == 2
    assert scripted.requests == []


def test_a_token_file_is_read_again_for_each_pass(loop: RunLoop, scripted: ScriptedHub, tmp_path: Path) -> None:
    """While it holds no token, the last one stays in use, which is said once for each reason."""
    file = tmp_path / "token"
    file.write_text("old\n")
    steps: list[Callable[[], object]] = [
        lambda: file.write_text(f"{scripted.token}\n"),
        file.unlink,
        nothing,
        lambda: file.write_text(""),
        lambda: file.write_text("two words"),
        lambda: file.write_text("new"),
    ]
    passes = loop(scripted, f"--token-file={file}", between=steps).passes
    asked = [request.headers["authorization"] for request in scripted.requests if request.path == "/user"]
    assert asked == ["token old", *[f"token {scripted.token}"] * 5, "token new"]
    assert [len(each.errors) for each in passes] == [1, 0, 0, 0, 0, 0, 1]
    assert [len(each.warnings) for each in passes] == [0, 0, 1, 0, 1, 1, 0]


def test_the_scopes_of_a_new_token_are_checked(loop: RunLoop, scripted: ScriptedHub, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(scripted.token)

    def new_token() -> None:
        scripted.token = "another-token"
        scripted.scopes = ["list:users", "read:users:activity"]
        file.write_text(scripted.token)

    first, second = loop(scripted, "--timeout=1h", f"--token-file={file}", between=[new_token]).passes
    assert (len(first.errors), len(second.errors)) == (0, 1)
    assert "read:servers" in second.errors[0]


# A signal in each phase of a pass


@pytest.fixture
def ten_users(scripted: ScriptedHub) -> ScriptedHub:
    """Five idle servers, whose users were active just now, and five idle users without a server."""
    for number in range(5):
        scripted.add(f"idle{number}", idle=LONG_AGO, user_idle=0)
        user(f"empty{number}")(scripted)
    return scripted


class Phase(NamedTuple):
    """A phase of a pass: its requests, and how many are sent at the same time."""

    method: str
    pattern: str
    at_once: int
    fails: int  # the exit code if they fail
    culled: int  # if they do not
    undone: int


PHASES = {
    "whose token is it": Phase("GET", "/user", 1, 3, 0, 0),
    "first page": Phase("GET", r"/users\?limit=2", 1, 3, 0, 0),
    "middle page": Phase("GET", r"/users\?limit=2&offset=4", 1, 1, 0, 4),
    "last page": Phase("GET", r"/users\?limit=2&offset=8", 1, 1, 0, 8),
    "second look": Phase("GET", "/users/.*", 2, 1, 0, 10),
    "DELETE": Phase("DELETE", ".*", 2, 1, 2, 8),
}
REPLIES = {
    "they work": normal(),
    "another try may help": respond(503, headers={"Retry-After": "25"}),
    "their answers are lost": raw(b""),
}


@pytest.mark.usefixtures("watch")  # a decision that takes more than a second is looked at again
@pytest.mark.parametrize("once", [[], ["--once"]], ids=["loop", "once"])
@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_requests_in_flight_finish_and_no_other_is_sent_after_a_signal(
    cull: Cull, ten_users: ScriptedHub, tell_to_stop: Tell, phase: Phase, reply: str, once: list[str]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    lines_before: list[str] = []

    def tell() -> None:
        lines_before.extend(ten_users.lines())
        tell_to_stop()

    all_are_there = threading.Barrier(phase.at_once, tell, timeout=PATIENCE)
    ten_users.fault(phase.method, phase.pattern, then_do(all_are_there.wait, REPLIES[reply]), times=None)
    arguments = ("--timeout=1h", "--cull-users", "--api-page-size=2", "--concurrency=2", *once)
    result = cull("--url", ten_users.url, *arguments, token=ten_users.token)
    assert ten_users.lines() == lines_before
    if reply == "they work":
        assert ten_users.stopped_count + 10 - len(ten_users.users) == phase.culled
        assert [*result.outcomes.values()].count("culled") == ten_users.stopped_count
        assert result.counts.get("left undone", 0) == phase.undone
        assert len(result.errors) == len(once)  # of a loop it is no error
    assert result.exit_code == (0 if not once else 1 if reply == "they work" else phase.fails)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not [thread for thread in threading.enumerate() if thread.name == "cull_idle"]


def test_once_is_interrupted_even_if_all_is_done(cull: Cull, scripted: ScriptedHub, tell_to_stop: Tell) -> None:
    idle("ann")(scripted)
    scripted.fault("DELETE", ".*", then_do(tell_to_stop))
    result = cull("--once", "--url", scripted.url, "--timeout=1h", token=scripted.token)
    assert (result.exit_code, result.outcomes) == (1, {"ann": "culled"})


def test_a_signal_ends_the_pause_before_another_try(
    cull: Cull, scripted: ScriptedHub, tell_to_stop: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeps: list[float] = []

    def sleep_and_tell(seconds: float) -> None:
        sleeps.append(seconds)
        tell_to_stop()

    monkeypatch.setattr(cull_idle, "sleep", sleep_and_tell)
    idle("ann")(scripted)
    scripted.fault("DELETE", ".*", respond(503, headers={"Retry-After": "25"}), times=None)
    result = cull("--once", "--url", scripted.url, "--timeout=1h", token=scripted.token)
    assert (result.exit_code, len(scripted.lines("DELETE"))) == (1, 1)
    assert sleeps == [1]


def test_a_signal_that_does_not_interrupt_the_wait_for_a_worker_is_noticed(
    cull: Cull, scripted: ScriptedHub, tell_to_stop: Tell
) -> None:
    idle("ann", "bob", "cat")(scripted)
    scripted.fault("DELETE", ".*", then_do(lambda: tell_to_stop(beside=True)))
    result = cull("--once", "--url", scripted.url, "--timeout=1h", "--concurrency=1", token=scripted.token)
    assert result.counts["left undone"] == 2


# Signals of a process

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


@pytest.mark.parametrize("reply", [normal(), respond(403)], ids=["between two passes", "after a failure"])
@SIGNALS
def test_a_signal_ends_the_pause_between_passes(
    scripted: ScriptedHub, start: Start, reply: Reply, number: signal.Signals
) -> None:
    scripted.fault("GET", "/users", reply, times=None)
    culler = start(scripted, "--timeout=1h")
    culler.wait_for(culler.said)  # the only line, at the end of the pass
    before = scripted.lines()
    assert culler.end(number) == 0
    assert scripted.lines() == before


def test_a_ctrl_c_while_an_arbiter_is_loaded_is_one_line(scripted: ScriptedHub, start: Start, tmp_path: Path) -> None:
    arbiter, loading = tmp_path / "arbiter.py", tmp_path / "loading"
    arbiter.write_text(
        f"import pathlib, time\npathlib.Path({str(loading)!r}).touch()\nwhile True:\n    time.sleep(0.01)\n"
    )
    culler = start(scripted, f"--arbiter={arbiter}:f")
    culler.wait_for(loading.exists)
    assert culler.end(signal.SIGINT) == 1
    assert len(culler.said().strip().splitlines()) == 1
    assert scripted.requests == []


# The kernel spares PID 1 from each signal that it does not handle: a container without an init.
AS_PID_1 = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


def can_be_pid_1() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*AS_PID_1, "true"], check=False).returncode == 0


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal, and the end of it that a program writes to."""
    ends = open_terminal(80)
    yield ends
    for each in ends:
        os.close(each)


@SIGNALS
@pytest.mark.parametrize(
    "pid_1",
    [
        pytest.param(False, id="as any process"),
        pytest.param(True, id="as PID 1", marks=pytest.mark.skipif(not can_be_pid_1(), reason="unshare is missing")),
    ],
)
def test_a_ctrl_c_says_that_another_one_quits_and_a_second_signal_does(
    scripted: ScriptedHub, start: Start, terminal: tuple[int, int], number: signal.Signals, *, pid_1: bool
) -> None:
    idle("ann")(scripted)
    scripted.fault("DELETE", ".*", hang(), times=None)
    screen, its_end = terminal
    culler = start(scripted, "--timeout=1h", run=[*(AS_PID_1 if pid_1 else ()), *RUN], stdout=its_end, stderr=its_end)
    culler.wait_for(lambda: scripted.lines("DELETE"))
    pid = culler.process.pid
    if pid_1:
        (pid,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    os.kill(pid, signal.SIGINT)
    assert b"Ctrl-C again" in read_some(screen)
    assert culler.process.poll() is None
    os.kill(pid, number)
    assert culler.wait() == (128 + number if pid_1 else -number)
