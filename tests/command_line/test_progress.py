"""How far a pass is: the same in a terminal, a pipe and a journal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time

import pytest
from processes import RUN
from runs import Cull
from scripted_hub import LONG_AGO, NEARLY_DUE, ScriptedHub, respond
from terminal import environment, in_pipe, in_terminal, open_terminal

TIME = r"\d\d:\d\d:\d\d"


def many_idle(scripted: ScriptedHub, count: int = 12) -> None:
    for number in range(count):
        scripted.add(f"user{number}", idle=LONG_AGO)


def progress(lines: list[str]) -> list[str]:
    """How far each line says that the pass is."""
    return [match[1] for line in lines if (match := re.search(r" \((\d+ of \d+)\)$", line.rstrip()))]


def test_each_line_counts_if_more_than_ten_are_due(scripted: ScriptedHub) -> None:
    many_idle(scripted)
    scripted.add("soon", idle=NEARLY_DUE)
    args = ["--timeout=1h", "--warn-before=15m"]
    out, log = in_pipe(scripted, *args)
    assert out == b""
    assert progress(log.decode().splitlines()) == [f"{number} of 12" for number in range(1, 13)]
    many_idle(scripted)
    session = in_terminal(scripted, 80, *args)
    assert progress(session.rows) == [f"{number} of 12" for number in range(1, 13)]
    assert b"\r" not in session.written.replace(b"\r\n", b"")
    assert b"\x1b" not in session.written


@pytest.mark.parametrize(("due", "args"), [(10, []), (12, ["-q"]), (12, ["--dry-run"])], ids=str)
def test_nothing_counts_for_a_handful_or_with_other_output(
    cull_scripted: Cull, scripted: ScriptedHub, due: int, args: list[str]
) -> None:
    many_idle(scripted, due)
    result = cull_scripted("--timeout=1h", *args)
    assert progress([*result.lines, *result.out.splitlines()]) == []


def test_the_json_has_no_counts(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    many_idle(scripted)
    result = cull_scripted("--timeout=1h", "--json")
    assert {json.loads(line)["reason"] for line in result.out.splitlines()[:-1]} == {"idle 2h, limit 1h"}


def test_failures_that_have_no_line_of_their_own_count_too(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    many_idle(scripted)
    scripted.fault("DELETE", "/users/user1?[0-9]/server", *[respond(418)] * 11)
    result = cull_scripted("--timeout=1h", "-v")
    assert progress(result.lines) == [f"{number} of 12" for number in range(1, 13)]
    assert result.counts["failed"] == 11


def test_reading_a_long_list_says_how_far_it_is(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    many_idle(scripted, 5)
    args = ["--timeout=3h", "--api-page-size=2"]
    assert len(cull_scripted(*args).lines) == 1
    monkeypatch.setattr("cull_idle.PROGRESS_SECONDS", 0)
    assert cull_scripted(*args).lines[:2] == ["INFO     2 users read so far", "INFO     4 users read so far"]


def test_a_pass_takes_one_line_of_80_columns(scripted: ScriptedHub) -> None:
    many_idle(scripted, 50)
    last = in_terminal(scripted, 80, "--timeout=1h").screen.rows[-1]
    assert re.fullmatch(rf"{TIME} INFO     pass: 50 running, 50 due, 50 culled in \d+\.\ds", last)
    assert len(f"{last}; next in 4m59s") <= 80


def test_lines_outside_a_terminal_have_the_date(scripted: ScriptedHub) -> None:
    many_idle(scripted, 1)
    _, log = in_pipe(scripted, "--timeout=1h")
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d {TIME} INFO     culled .*", log.decode().splitlines()[0])


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
    while b" of 30)" not in os.read(terminal, 1 << 16):
        pass
    os.close(terminal)
    deadline = time.monotonic() + 15
    while scripted.running():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    assert process.wait(15) == 0
