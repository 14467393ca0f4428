"""The loop, and what signals do to it: whole processes, and the pauses between passes."""

import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hub import RealHub
from processes import Start
from scripted_hub import HOUR, ScriptedHub, normal, respond, then_do


def test_the_first_pass_comes_at_once_and_the_next_after_cull_every(hub: RealHub, start: Start) -> None:
    hub.spawn("ann", idle_seconds=2 * HOUR)
    culler = start(hub, "--timeout=1h", "--cull-every=1s")
    culler.wait_for(lambda: "culled ann" in culler.said())
    hub.spawn("bob", idle_seconds=2 * HOUR)
    culler.wait_for(lambda: "culled bob" in culler.said())
    assert hub.running() == set()
    assert "; next in 1s" in culler.said()


def test_passes_start_cull_every_apart_and_never_overlap(scripted: ScriptedHub, start: Start) -> None:
    scripted.fault("GET", "/users", then_do(lambda: time.sleep(1.5)), normal(), times=None)
    culler = start(scripted, "--timeout=1h", "--cull-every=1s")
    culler.wait_for(lambda: scripted.lines().count("GET /users?state=ready&limit=200") >= 4)
    times = [request.time for request in scripted.requests if request.path.startswith("/users")]
    long, short, again = (later - earlier for earlier, later in pairwise(times[:4]))
    assert long >= 1.5  # the pass overran; the next one came right after
    assert short >= 0.9
    assert again >= 1.5


def test_the_loop_survives_a_hub_that_is_down_for_a_while(hub: RealHub, start: Start) -> None:
    hub.spawn("ann", idle_seconds=60)
    culler = start(hub, "--timeout=1h", "--cull-every=1s")
    culler.wait_for(lambda: "1 running, 0 due" in culler.said())
    hub.stop()
    culler.wait_for(lambda: "refuses the connection" in culler.said())
    hub.start()
    hub.touch("ann", idle_seconds=2 * HOUR)
    culler.wait_for(lambda: "culled ann" in culler.said())
    assert culler.end(signal.SIGTERM) == 0


def test_the_pause_after_failures_grows_up_to_cull_every(scripted: ScriptedHub, start: Start) -> None:
    scripted.fault("GET", "/users", respond(403), times=None)
    culler = start(scripted, "--timeout=1h", "--cull-every=3s")
    culler.wait_for(lambda: culler.said().count("ERROR") >= 3)
    assert re.findall(r"; next in (\w+)$", culler.said(), re.MULTILINE)[:3] == ["2s", "3s", "3s"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_loop_in_its_pause(scripted: ScriptedHub, start: Start, number: signal.Signals) -> None:
    culler = start(scripted, "--timeout=1h")
    culler.wait_for(lambda: "next in" in culler.said())
    assert culler.end(number) == 0
    assert culler.said().endswith("told to stop\n")


def test_a_signal_in_a_pass_lets_the_stops_in_flight_finish_and_starts_no_other(
    scripted: ScriptedHub, start: Start
) -> None:
    for number in range(6):
        scripted.add(f"user{number}", idle=2 * HOUR, stop_seconds=1)
    culler = start(scripted, "--timeout=1h", "--concurrency=2")
    culler.wait_for(lambda: scripted.in_flight == 2)
    assert culler.end(signal.SIGTERM) == 0
    assert len(scripted.running()) == 4
    assert culler.said().count("culled user") == 2
    assert "6 due, 2 culled, 4 left undone" in culler.said()


def test_a_signal_during_the_scan_stops_nothing(scripted: ScriptedHub, start: Start) -> None:
    for number in range(4):
        scripted.add(f"user{number}", idle=2 * HOUR)
    scripted.fault("GET", "/users", then_do(lambda: time.sleep(1)), times=None)
    culler = start(scripted, "--timeout=1h", "--api-page-size=1")
    culler.wait_for(lambda: "GET /users?state=ready&limit=1" in scripted.lines())
    assert culler.end(signal.SIGTERM) == 0
    assert scripted.lines("DELETE") == []
    assert len(scripted.lines()) == 2  # GET /user, and the page that was asked for


def test_once_interrupted_exits_1(scripted: ScriptedHub, start: Start) -> None:
    for number in range(4):
        scripted.add(f"user{number}", idle=2 * HOUR, stop_seconds=1)
    culler = start(scripted, "--once", "--timeout=1h", "--concurrency=2")
    culler.wait_for(lambda: scripted.in_flight == 2)
    assert culler.end(signal.SIGINT) == 1
    assert len(scripted.running()) == 2
    assert "ERROR    told to stop before the pass was over" in culler.said()


def test_a_second_signal_ends_it_at_once(scripted: ScriptedHub, start: Start) -> None:
    scripted.add("ann", idle=2 * HOUR, stop_seconds=9)
    culler = start(scripted, "--timeout=1h")
    culler.wait_for(lambda: scripted.in_flight == 1)
    culler.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert culler.process.poll() is None
    began = time.monotonic()
    assert culler.end(signal.SIGTERM) == -signal.SIGTERM
    assert time.monotonic() - began < 3


def test_a_token_file_is_read_again_for_each_pass(scripted: ScriptedHub, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    culler = start(scripted, "--timeout=1h", "--cull-every=1s", "--token-file", str(file))
    culler.wait_for(lambda: "answered 403" in culler.said())
    file.unlink()
    culler.wait_for(lambda: "cannot be read: No such file or directory" in culler.said())
    file.write_text(f"{scripted.token}\n")
    culler.wait_for(lambda: "pass: 0 running" in culler.said())


@pytest.mark.parametrize("content", [None, "", "two words"], ids=["gone", "empty", "no token"])
def test_a_loop_keeps_the_last_token_while_the_file_has_none(
    scripted: ScriptedHub, start: Start, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "token"
    file.write_text(scripted.token)
    culler = start(scripted, "--timeout=1h", "--cull-every=1s", "--token-file", str(file))
    culler.wait_for(lambda: "pass: " in culler.said())
    file.unlink()
    if content is not None:
        file.write_text(content)
    culler.wait_for(lambda: culler.said().count("pass: ") >= 4)
    assert culler.said().count("WARNING") == 1
    assert "ERROR" not in culler.said()
    file.write_text("another")
    culler.wait_for(lambda: "answered 403" in culler.said())


@pytest.mark.parametrize("args", [["--once"], ["--dry-run"], ["--explain=ann"], ["--cull-every=1s"]], ids=str)
@pytest.mark.parametrize("path", ["<(…)", "/dev/stdin"])
def test_a_token_comes_through_a_pipe(scripted: ScriptedHub, args: list[str], path: str) -> None:
    scripted.add("ann", idle=60)
    reader, writer = os.pipe()
    os.write(writer, scripted.token.encode())
    os.close(writer)
    path = path if path == "/dev/stdin" else f"/dev/fd/{reader}"
    with subprocess.Popen(
        [sys.executable, PROGRAM, "--url", scripted.url, "--timeout=1h", *args, "--token-file", path],
        stdin=reader,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[reader],
    ) as culler:
        os.close(reader)
        if "--cull-every=1s" in args:
            deadline = time.monotonic() + 20
            while len(scripted.lines()) < 3 and time.monotonic() < deadline:
                time.sleep(0.02)
            culler.send_signal(signal.SIGTERM)
        assert culler.wait(20) == 0
    assert len(scripted.lines()) >= 2


def test_a_fifo_that_nobody_writes_into_is_given_up_soon(scripted: ScriptedHub, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = subprocess.run(
        [sys.executable, PROGRAM, "--once", "--url", scripted.url, "--token-file", fifo],
        check=False,
        capture_output=True,
        timeout=15,
    )
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert str(fifo).encode() in process.stderr
    assert scripted.requests == []


def test_a_signal_ends_the_wait_for_a_hub_that_said_try_again_later(scripted: ScriptedHub, start: Start) -> None:
    scripted.fault("GET", "/user.*", respond(503, b"", {"Retry-After": "25"}), times=None)
    culler = start(scripted, "--timeout=1h")
    culler.wait_for(scripted.lines)
    assert culler.end(signal.SIGTERM) == 0
    assert len(scripted.lines()) == 1
