"""The progress bar of a pass that stops many servers: only in a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import time

import pytest
from hub import RealHub
from processes import RUN
from runs import Result
from scripted_hub import HOUR, LONG_AGO, ScriptedHub, respond
from terminal import Session, environment, in_pipe, in_terminal, open_terminal

NAMES = [f"user{number}" for number in range(9)] + ["maximiliane@students.example.edu", "山田太郎と佐藤花子"]
TIME = r"\d\d:\d\d:\d\d"
LINE = re.compile(r"(?:INFO     culled|WARNING  stopping) (\S+): idle 2h.*")  # stopping if the Hub is busy
BAR = re.compile(r"^  \[#*-*\]  (\d+)/\d+(?:  [\d:]+)?$")


def progress(session: Session) -> list[int]:
    """How far the bar is on each screen that has one. It is always the last row."""
    seen = []
    for rows in session.screens():
        bars = [row for row in rows if "[#" in row or "[-" in row]
        assert bars in ([], [rows[-1]]), rows
        for bar in bars:
            match = BAR.match(bar)
            assert match, bar
            seen.append(int(match[1]))
    return seen


def many_idle(scripted: ScriptedHub, count: int = 12) -> None:
    for number in range(count):
        scripted.add(f"user{number}", idle=LONG_AGO)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_bar_grows_below_the_log_and_tears_no_line_of_it(hub: RealHub, columns: int) -> None:
    hub.spawn_many([(name, "", {"idle_seconds": LONG_AGO}) for name in NAMES])
    hub.spawn("soon", idle_seconds=LONG_AGO - HOUR - 900)
    session = in_terminal(hub, columns, "--timeout=1h", "--warn-before=30m")
    assert hub.running() == {"soon"}
    assert sorted(set(progress(session))) == list(range(len(NAMES) + 1))
    warned, *culled, summary = session.screen.log
    assert "warned soon: " in warned
    lines = [LINE.fullmatch(line) for line in culled]
    assert sorted(line[1] if line else "torn" for line in lines) == sorted(NAMES), culled
    counts = Result(0, "", summary).counts
    assert (counts["running"], counts["due"], counts["warned"]) == (12, 11, 1)


def test_a_pass_takes_one_line_of_80_columns(scripted: ScriptedHub) -> None:
    many_idle(scripted, 60)
    session = in_terminal(scripted, 80, "--timeout=1h")
    assert re.fullmatch(rf"{TIME} INFO     pass: 60 running, 60 due, 60 culled in \d+\.\ds", session.screen.rows[-1])
    in_a_loop = f"{session.screen.rows[-1]}; next in 4m59s"
    assert len(in_a_loop) <= 80


def test_lines_outside_a_terminal_have_the_date(scripted: ScriptedHub) -> None:
    many_idle(scripted, 1)
    _, log = in_pipe(scripted, "--timeout=1h")
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d {TIME} INFO     culled .*", log.decode().splitlines()[0])


def test_the_bar_shows_the_time_that_is_left(scripted: ScriptedHub) -> None:
    many_idle(scripted)
    for name in ("user0", "user1"):
        scripted.users[name].servers[""].stop_seconds = 1.1
    session = in_terminal(scripted, 40, "--timeout=1h", "--concurrency=1")
    progress(session)
    assert re.search(rb"  \[#+-+\]  \d+/12  00:00:\d\d\r", session.written)


def test_the_bar_counts_failures_that_have_no_line_of_their_own(scripted: ScriptedHub) -> None:
    many_idle(scripted)
    scripted.fault("DELETE", "/users/.*", respond(418), times=None)
    session = in_terminal(scripted, 80, "--timeout=1h")
    assert sorted(set(progress(session))) == list(range(13))
    first, others, summary = session.screen.log
    assert first.startswith("ERROR    failed user")
    assert " 11 more " in others
    assert Result(0, "", summary).counts["failed"] == 12


def test_nothing_is_left_of_the_bar_when_the_fuse_blows(scripted: ScriptedHub) -> None:
    many_idle(scripted)
    session = in_terminal(scripted, 40, "--timeout=1h", "--max-culls=1")
    progress(session)
    assert [line.split()[0] for line in session.screen.log] == ["ERROR", "INFO"]


def test_a_terminal_that_goes_away_does_not_end_a_loop(scripted: ScriptedHub) -> None:
    """As after `cull-idle & disown`, when the connection to the machine is lost."""
    many_idle(scripted, 30)
    terminal, its_end = open_terminal(80)
    process = subprocess.Popen(
        [*RUN, "--timeout=1h", "--concurrency=1", "--url", scripted.url],
        env=environment(scripted, {}),
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
    )
    os.close(its_end)
    while b"/30" not in os.read(terminal, 1 << 16):
        pass
    os.close(terminal)
    deadline = time.monotonic() + 15
    while scripted.running():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    assert process.wait(15) == 0


def test_the_cursor_is_never_hidden(scripted: ScriptedHub) -> None:
    # A second Ctrl-C ends the program at once, and would leave the cursor hidden.
    many_idle(scripted)
    assert b"?25l" not in in_terminal(scripted, 80, "--timeout=1h").written


@pytest.mark.parametrize(
    ("servers", "args", "env"),
    [
        pytest.param(10, [], {}, id="a handful"),
        pytest.param(12, ["-q"], {}, id="quiet"),
        pytest.param(12, ["--json"], {}, id="JSON"),
        pytest.param(12, [], {"TERM": "dumb"}, id="a terminal that cannot erase"),
        pytest.param(12, ["--dry-run"], {"NO_COLOR": "1"}, id="dry run"),
    ],
)
def test_there_is_no_bar_for_few_servers_or_with_other_output(
    scripted: ScriptedHub, servers: int, args: list[str], env: dict[str, str]
) -> None:
    many_idle(scripted, servers)
    session = in_terminal(scripted, 80, "--timeout=1h", *args, env=env)
    assert b"\r" not in session.written.replace(b"\r\n", b"")
    assert b"\x1b" not in session.written


def test_there_is_no_bar_in_a_pipe_a_file_or_a_journal(scripted: ScriptedHub) -> None:
    many_idle(scripted)
    out, err = in_pipe(scripted, "--timeout=1h", env={"FORCE_COLOR": "1"})
    assert out == b""
    assert len(err.splitlines()) == 13
    assert err.replace(b"\n", b"").decode().isprintable()
