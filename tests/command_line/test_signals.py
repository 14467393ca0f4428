"""SIGTERM in every phase of a pass: requests in flight finish, nothing else starts, and the process ends soon."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import RUN, Running, Start
from runs import Cull, Result
from scripted_hub import LONG_AGO, Answer, Exchange, Reply, ScriptedHub, drip, hang, normal, respond, slow
from terminal import read_some

IN_FLIGHT = 0.3  # seconds that a slow request takes after the signal
SOON = 2.0  # seconds for everything else that the program does before it ends

Interrupt = Callable[[str, str, Reply], "Interrupted"]
"""Interrupts a pass while requests of this method and path get this reply."""


class Phase(NamedTuple):
    """A phase of a pass, which is held up by slow requests of one or both of two workers, and the outcome."""

    slow: tuple[str, str]
    workers: int
    culled: int
    undone: int


PHASES = [
    pytest.param(Phase(("GET", "/user"), 1, 0, 0), id="whose token is it"),
    pytest.param(Phase(("GET", r"/users\?limit=2"), 1, 0, 0), id="first page"),
    pytest.param(Phase(("GET", r"/users\?limit=2&offset=4"), 1, 0, 4), id="middle page"),
    pytest.param(Phase(("GET", r"/users\?limit=2&offset=8"), 1, 0, 8), id="last page"),
    pytest.param(Phase(("GET", "/users/.*"), 2, 0, 10), id="second look"),
    pytest.param(Phase(("DELETE", ".*"), 2, 2, 8), id="DELETE"),
]


class Gate:
    """The slow replies of a phase: once both workers wait for one, a signal is sent. They come IN_FLIGHT later."""

    def __init__(self, scripted: ScriptedHub, phase: Phase, send_signal: Callable[[], object]) -> None:
        self.lines_before: list[str] = []  # the requests until then
        self.sent_at = 0.0
        self._scripted = scripted
        self._workers = phase.workers
        self._send_signal = send_signal
        self._lock = threading.Lock()
        self._sent = threading.Event()
        scripted.fault(*phase.slow, self._reply, times=None)

    def _reply(self, exchange: Exchange) -> Answer:
        with self._lock:
            self._workers -= 1
            if self._workers == 0:
                self.lines_before = self._scripted.lines()
                self.sent_at = time.monotonic()
                self._send_signal()
                self._sent.set()
        assert self._sent.wait(20)
        return slow(IN_FLIGHT)(exchange)


@pytest.fixture
def ten_users(scripted: ScriptedHub) -> ScriptedHub:
    """Five idle servers, whose users were active just now, and five idle users without a server."""
    for index in range(5):
        scripted.add(f"idle{index}", idle=LONG_AGO, user_idle=0)
    for index in range(5):
        scripted.add_user(f"empty{index}", idle=LONG_AGO)
    return scripted


def arguments(workers: int = 2) -> list[str]:
    return ["--timeout=1h", "--cull-users", "--api-page-size=2", f"--concurrency={workers}"]


def seconds_to_end(culler: Running, number: signal.Signals = signal.SIGTERM) -> float:
    began = time.monotonic()
    culler.end(number)
    return time.monotonic() - began


def assert_what_was_in_flight_is_done(gate: Gate, hub: ScriptedHub, phase: Phase, said: Result) -> None:
    assert IN_FLIGHT / 2 < time.monotonic() - gate.sent_at < IN_FLIGHT + SOON
    assert hub.lines() == gate.lines_before
    deleted = 10 - len(hub.users)
    assert hub.stopped_count + deleted == phase.culled
    assert [*said.outcomes.values()].count("culled") == hub.stopped_count
    assert [*said.outcomes.values()].count("deleted") == deleted
    assert said.counts.get("left undone", 0) == phase.undone


@pytest.mark.parametrize("phase", PHASES)
def test_requests_in_flight_finish_and_nothing_starts_after_the_signal(
    ten_users: ScriptedHub, start: Start, phase: Phase
) -> None:
    started: list[Running] = []
    gate = Gate(ten_users, phase, lambda: started[0].process.send_signal(signal.SIGTERM))
    started.append(start(ten_users, *arguments()))
    exit_code = started[0].process.wait(15)
    said = Result(exit_code, "", started[0].said())
    assert_what_was_in_flight_is_done(gate, ten_users, phase, said)
    assert (exit_code, said.errors) == (0, [])


@pytest.mark.parametrize("fault", [normal(), respond(403)], ids=["between two passes", "after a failure"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_the_pause_between_passes_ends_with_the_signal(
    scripted: ScriptedHub, start: Start, fault: Reply, number: signal.Signals
) -> None:
    scripted.fault("GET", "/users", fault, times=None)
    culler = start(scripted, "--timeout=1h")
    culler.wait_for(culler.said)  # the only line, at the end of the pass
    before = scripted.lines()
    assert seconds_to_end(culler, number) < SOON
    assert culler.process.returncode == 0
    assert scripted.lines() == before


def test_a_ctrl_c_while_an_arbiter_is_loaded_ends_it(scripted: ScriptedHub, start: Start, tmp_path: Path) -> None:
    arbiter, loading = tmp_path / "arbiter.py", tmp_path / "loading"
    arbiter.write_text(f"import pathlib, time\npathlib.Path({str(loading)!r}).touch()\ntime.sleep(20)\n")
    culler = start(scripted, f"--arbiter={arbiter}:f")
    culler.wait_for(loading.exists)
    assert seconds_to_end(culler, signal.SIGINT) < SOON
    assert culler.process.returncode == 1
    assert len(culler.said().strip().splitlines()) == 1
    assert scripted.requests == []


def test_a_ctrl_c_in_a_terminal_says_at_once_that_a_second_one_quits(scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, stop_seconds=9)
    terminal, its_end = os.openpty()
    with subprocess.Popen(
        [*RUN, "--once", "--url", scripted.url, "--timeout=1h"],
        env={**os.environ, "JUPYTERHUB_API_TOKEN": scripted.token},
        stderr=its_end,
    ) as process:
        os.close(its_end)
        deadline = time.monotonic() + 20
        while scripted.in_flight != 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert b"Ctrl-C again" in read_some(terminal)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    os.close(terminal)
    assert process.returncode == -signal.SIGINT


# As PID 1, which the kernel spares from each signal that it does not handle: a container without an init

AS_PID_1 = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]


def can_be_pid_1() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*AS_PID_1, "true"], check=False).returncode == 0


@pytest.mark.skipif(not can_be_pid_1(), reason="no process may become PID 1 here")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_pid_1_at_once(scripted: ScriptedHub, number: signal.Signals) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", hang(), times=None)
    outer = subprocess.Popen(
        [*AS_PID_1, *RUN, "--url", scripted.url, "--timeout=1h"],
        env={**os.environ, "JUPYTERHUB_API_TOKEN": scripted.token},
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 20
        while not scripted.lines("DELETE"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (inner,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        os.kill(int(inner), number)
        time.sleep(0.3)
        assert outer.poll() is None
        os.kill(int(inner), number)
        assert outer.wait(SOON) == 128 + number
    finally:
        outer.kill()
        outer.communicate()


def test_a_second_signal_ends_the_process_at_once(scripted: ScriptedHub, start: Start) -> None:
    scripted.add("ann", idle=LONG_AGO, stop_seconds=9)
    culler = start(scripted, "--timeout=1h")
    culler.wait_for(lambda: scripted.in_flight == 1)
    culler.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert culler.process.poll() is None
    began = time.monotonic()
    assert culler.end(signal.SIGTERM) == -signal.SIGTERM
    assert time.monotonic() - began < SOON


# In this process


@pytest.mark.parametrize("phase", PHASES)
def test_once_requests_in_flight_finish_too_and_no_thread_or_handler_is_left(
    cull_scripted: Cull, ten_users: ScriptedHub, tell_to_stop: Callable[[], None], phase: Phase
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    threads = set(threading.enumerate())
    gate = Gate(ten_users, phase, tell_to_stop)
    said = cull_scripted(*arguments())
    assert_what_was_in_flight_is_done(gate, ten_users, phase, said)
    assert (said.exit_code, len(said.errors)) == (1, 1)  # the interruption is an error
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    ten_users.pause_listening()
    for thread in set(threading.enumerate()) - threads:
        thread.join(0 if "ThreadPool" in thread.name else 5)  # the Hub's own threads end now
    assert set(threading.enumerate()) <= threads


class Interrupted(NamedTuple):
    """What a pass has done when it was interrupted."""

    exit_code: int
    seconds: float  # since the signal
    requests: int  # since then


@pytest.fixture
def interrupt(cull_scripted: Cull, ten_users: ScriptedHub, tell_to_stop: Callable[[], None]) -> Interrupt:
    """Make a pass that gets the same reply again and again, and send a SIGTERM 0.2 s after the first one."""

    def run(method: str, pattern: str, reply: Reply) -> Interrupted:
        sent_at = 0.0
        requests_before = 0

        def tell() -> None:
            nonlocal sent_at, requests_before
            sent_at, requests_before = time.monotonic(), len(ten_users.lines())
            tell_to_stop()

        timer = threading.Timer(0.2, tell)

        def first_reply(exchange: Exchange) -> Answer:
            timer.start()
            return reply(exchange)

        ten_users.fault(method, pattern, first_reply)
        ten_users.fault(method, pattern, reply, times=None)
        exit_code = cull_scripted(*arguments(workers=1), "--request-timeout=0.6s").exit_code
        ended = time.monotonic()
        timer.join()
        return Interrupted(exit_code, ended - sent_at, len(ten_users.lines()) - requests_before)

    return run


INTERRUPTED = [
    pytest.param("GET", "/user", 3, id="whose token is it"),
    pytest.param("GET", r"/users\?limit=2", 3, id="first page"),
    pytest.param("GET", r"/users\?limit=2&offset=4", 1, id="middle page"),
    pytest.param("GET", "/users/idle0", 1, id="second look at a server"),
    pytest.param("DELETE", "/users/idle0/server", 1, id="DELETE of a server"),
    pytest.param("DELETE", "/users/empty0", 1, id="DELETE of a user"),
]


@pytest.mark.parametrize(("method", "pattern", "exit_code"), INTERRUPTED)
def test_the_pause_before_another_try_ends_with_the_signal(
    interrupt: Interrupt, method: str, pattern: str, exit_code: int
) -> None:
    interrupted = interrupt(method, pattern, respond(503, headers={"Retry-After": "25"}))
    assert (interrupted.exit_code, interrupted.requests) == (exit_code, 0)
    assert 0 < interrupted.seconds < SOON


@pytest.mark.parametrize(
    "silence",
    [
        pytest.param(hang(), id="no answer"),
        pytest.param(drip(0.05, of=respond(200, b"x" * 999)), id="a drip of the body"),
    ],
)
@pytest.mark.parametrize(("method", "pattern", "exit_code"), INTERRUPTED)
def test_a_silent_hub_delays_the_end_by_one_request_timeout_at_most(
    interrupt: Interrupt, method: str, pattern: str, exit_code: int, silence: Reply
) -> None:
    interrupted = interrupt(method, pattern, silence)
    assert (interrupted.exit_code, interrupted.requests) == (exit_code, 0)
    assert 0 < interrupted.seconds < 0.6 + SOON


def signal_beside_the_main_thread() -> None:
    """As when it comes just before the main thread begins to wait: the signal does not interrupt the wait."""
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)


@pytest.mark.usefixtures("tell_to_stop")
def test_a_signal_that_does_not_interrupt_the_wait_for_a_worker_is_noticed(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    for name in "abc":
        scripted.add(name, idle=LONG_AGO)

    def reply(exchange: Exchange) -> Answer:
        signal_beside_the_main_thread()
        deadline = time.monotonic() + 10
        while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # what its handler sets
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return exchange.normal()

    scripted.fault("DELETE", ".*", reply)
    assert cull_scripted("--timeout=1h", "--concurrency=1").counts["left undone"] == 2


@pytest.mark.usefixtures("tell_to_stop")
def test_a_signal_that_does_not_interrupt_the_pause_is_noticed(cull: Cull, scripted: ScriptedHub) -> None:
    timer = threading.Timer(0.5, signal_beside_the_main_thread)
    timer.start()
    began = time.monotonic()
    assert cull("--url", scripted.url, "--timeout=1h", token=scripted.token).exit_code == 0
    assert time.monotonic() - began < 0.5 + SOON
