"""What people see: the table and the bars of a dry run, the log, -q and -v, how far a pass is, in a terminal or not."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence

import pytest
from messages import Says
from processes import Start, in_terminal, open_terminal, read_some
from runs import Cull
from scenes import Given, Play, Scene, active, fault, having, idle, server, user
from scripted_hub import (
    HOUR,
    LEAST_SCOPES,
    NEARLY_DUE,
    Answer,
    Exchange,
    ScriptedHub,
    error,
    reset,
    respond,
    then_do,
)

DAY = 24 * HOUR
CJK = "山田太郎と佐藤花子"


def crowd(count: int) -> Given:
    return idle(*(f"user{number}" for number in range(count)))


# The table of a dry run


TABLES = [
    Scene(
        "a dry run with -v shows all of them, the longest idle first",
        [
            server("maximiliane@example.edu/machine-learning", 9 * DAY + 30, age=400 * DAY + 30),
            server(CJK, 7 * HOUR + 30, age=7 * HOUR + 30),
            server("bob", 4 * HOUR + 30, age=5 * HOUR + 30),
            server("ann", HOUR + 30, age=2 * DAY + 30),
            server("eve", DAY + 30, pending="spawn", ready=False),
            server("zoe", extra={"last_activity": None, "started": None}),
            user("gone", 40 * DAY + 30, age=500 * DAY + 30),
        ],
        "--dry-run -v --timeout=6h --warn-before=3h --cull-users --user-timeout=30d"
        " --rule='user=ann server=thesis keep' --rule='user=ann timeout=never'",
        doubts=1,
        says=True,
    ),
    Scene(
        "a dry run shows only what would be done, and that storage goes with it",
        [idle("ann/gpu"), active("bob")],
        "--dry-run --remove-named-servers",
        says=True,
    ),
    Scene("a dry run says what a real pass would fail to stop", [idle("ann/..")], "--dry-run", says=True),
    Scene("where nothing is idle there are no bars", [active("ann", "bob")], "--dry-run", says=True),
    Scene(
        "a first look says which scope is missing, though nothing is due",
        [having(scopes=["list:users", "read:users:activity", "read:servers"])],
        "--dry-run",
        says=True,
    ),
    Scene(
        "a dry run says why a real pass would do less",
        [idle("ann", "bob"), having(scopes=[*LEAST_SCOPES[1:], "delete:servers!group=gpu", "tokens"])],
        "--dry-run --max-culls=1 --idle-by=both",
        says=True,
    ),
    Scene(
        "with --json the log says it, and with -v what is kept",
        [
            idle("ann"),
            server("bob", HOUR + 30),
            having(scopes=["list:users", "read:users:activity", "read:servers"]),
        ],
        "--dry-run --json -v --timeout=90m",
        becomes={"bob": "kept"},
        says=True,
    ),
]


@pytest.mark.parametrize("scene", TABLES, ids=Scene.__str__)
def test_dry_run(scene: Scene, play: Play) -> None:
    play(scene)


@pytest.mark.parametrize(
    ("timeout", "seconds", "expected"),
    [
        ("0", [0, 1200], {0: "     0s  ######################################## 2  <- --timeout"}),
        ("90s", [0, 1200], {0: "  1m30s  ######################################## 1  <- --timeout"}),
        ("1w", [0, 1200], {0: "    10m  ######################################## 1", 7: "     7d  0  <- --timeout"}),
        ("1w1s", [0, 1200], {7: "     7d  0", 8: "7d00h00m01s  0  <- --timeout"}),
        ("never", [1200], {0: "    10m  ######################################## 1", 7: "     7d  0"}),
        ("1h", [HOUR, *[600] * 99], {0: f"    10m  {'#' * 40} 100", 2: "     1h  # 1  <- --timeout", 3: "     2h  0"}),
    ],
)
def test_the_bars_show_the_timeout_and_even_a_single_server(
    cull_scripted: Cull, scripted: ScriptedHub, timeout: str, seconds: Sequence[int], expected: dict[int, str]
) -> None:
    for number, idle_for in enumerate(seconds):
        server(f"user{number}", idle_for + 30, age=30 * DAY)(scripted)
    bars = re.split("\nidle for at least.*\n", cull_scripted("--dry-run", f"--timeout={timeout}").out)[1].splitlines()
    assert {number: bars[number] for number in expected} == expected
    assert sum("<-" in bar for bar in bars) == (timeout != "never")


@pytest.mark.parametrize(
    ("rules", "unused"),
    [
        pytest.param(["user=ann keep"], [], id="a rule that applies is not named"),
        pytest.param(["user=bob keep"], [], id="nor one for a user without a server"),
        pytest.param(["user=an keep"], [1], id="one that applies to nobody is"),
        pytest.param(["user=ann keep", "user=a* timeout=2h"], [2], id="so is one whose users a rule before it takes"),
        pytest.param(["server=gpu timeout=2h", "user=x timeout=1d", "user=a* timeout=2h"], [1, 2], id="and each other"),
    ],
)
def test_rules_that_apply_to_nobody(
    cull_scripted: Cull, scripted: ScriptedHub, rules: list[str], unused: list[int]
) -> None:
    idle("ann")(scripted)
    user("bob")(scripted)
    result = cull_scripted("--dry-run", "--cull-users", "--timeout=10m", *(f"--rule={rule}" for rule in rules))
    assert list(map(int, re.findall(r"^But rule (\d)", result.out, re.MULTILINE))) == unused


# -q, for cron: nothing on success, on failure one line for each kind of problem


QUIET = [
    Scene(
        "what is culled, removed, stopping, deleted and warned",
        [
            idle("ann/gpu", "bob"),
            idle("cat", stop_seconds=30.0),
            server("dan", NEARLY_DUE),
            user("eve"),
            having(slow_stop=0.0),
        ],
        "-q --warn-before=15m --cull-users --remove-named-servers --notify=true",
        deletes=["ann/gpu", "bob", "cat", "user eve"],
    ),
    Scene("what is active", [active("ann")], "-q"),
    Scene("a timeout that is probably a mistake", [active("ann")], "-q --timeout=1m"),
    Scene("what is in doubt", [server("ann", 1.0, extra={"pending": 5, "ready": "who knows"})], "-q"),
    Scene("what is gone", [idle("ann"), lambda hub: hub.fault("GET", "/users/ann", then_do(hub.users.clear))], "-q"),
]


@pytest.mark.parametrize("scene", QUIET, ids=Scene.__str__)
def test_with_q_nothing_is_said_of(scene: Scene, play: Play) -> None:
    result = play(scene)
    assert (result.out, result.err) == ("", "")


def stuck(exchange: Exchange) -> Answer:
    """The Hub's words differ from user to user."""
    return error(500, f"{exchange.request.segments[1]} is stuck (pod a-{id(exchange)} of b)")


FAULTS = [
    fault("DELETE", "/users/user[0-2]/server", stuck, times=None),
    fault("DELETE", "/users/user[34]/server", respond(418), times=None),
    fault("GET", "/users/user[56]", respond(500), times=None),
    fault("GET", "/users/user7", reset(), times=None),
]


@pytest.mark.parametrize(("option", "failed"), [("-q", 4), ("-v", 8)])
def test_failures_of_one_kind_are_one_line_and_a_count_and_with_v_a_line_each(
    cull_scripted: Cull, scripted: ScriptedHub, option: str, failed: int
) -> None:
    for given in (crowd(9), *FAULTS):
        given(scripted)
    result = cull_scripted(option, "--timeout=1h")
    assert result.exit_code == 1
    assert len(scripted.running()) == 8
    assert [*result.outcomes.values()].count("failed") == failed
    more = re.findall(r" (\d+) more .* (\d{3})\b", "\n".join(result.errors))
    assert sorted(more) == [("1", "418"), ("1", "500"), ("2", "500")]
    assert len(result.errors) == 4 + len(more)


def test_many_failures_of_one_kind(cull_scripted: Cull, scripted: ScriptedHub, says: Says) -> None:
    crowd(20)(scripted)
    scripted.fault("DELETE", ".*", lambda each: error(500, f"{each.request.segments[1]} is stuck"), times=None)
    says(re.sub(r"user\d+", "…", cull_scripted("-q", "--timeout=1h").err))


# How far a pass is


def progress(lines: Sequence[str]) -> list[str]:
    """How far each line says that the pass is."""
    return [match[1] for line in lines if (match := re.search(r" \((\d+ of \d+)\)$", line.rstrip()))]


ALL_12 = [f"{number} of 12" for number in range(1, 13)]


@pytest.mark.parametrize(
    ("due", "arguments", "counts"),
    [
        pytest.param(12, "--warn-before=15m", ALL_12, id="each line counts if more than ten are due"),
        pytest.param(12, "-v", ALL_12, id="each failure counts, too"),
        pytest.param(12, "-q", [], id="nothing is said with -q"),
        pytest.param(12, "--dry-run", [], id="nothing counts in a dry run"),
        pytest.param(10, "", [], id="nothing counts if ten are due"),
    ],
)
def test_progress(cull_scripted: Cull, scripted: ScriptedHub, due: int, arguments: str, counts: list[str]) -> None:
    crowd(due)(scripted)
    server("soon", NEARLY_DUE)(scripted)
    if arguments == "-v":
        scripted.fault("DELETE", "/users/user1?[0-9]/server", *[respond(418)] * 11)
    result = cull_scripted("--timeout=1h", *arguments.split())
    assert progress([*result.lines, *result.out.splitlines()]) == counts


def test_reading_a_long_list_says_how_far_it_is(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, says: Says
) -> None:
    crowd(5)(scripted)
    args = ("--timeout=3h", "--api-page-size=2")
    assert len(cull_scripted(*args).lines) == 1
    monkeypatch.setattr("cull_idle.PROGRESS_SECONDS", 0)
    says(cull_scripted(*args).err)


# In a terminal, and outside


def test_the_log_in_a_terminal_is_lines_of_80_columns_without_dates_or_colours(scripted: ScriptedHub) -> None:
    crowd(12)(scripted)
    session = in_terminal(scripted, 80, "--timeout=1h")
    assert len(session.screen.rows) == 13
    assert all(re.match(r"\d\d:\d\d:\d\d INFO     ", row) for row in session.screen.rows)
    assert progress(session.screen.rows) == ALL_12
    assert b"\r" not in session.written.replace(b"\r\n", b"")
    assert b"\x1b" not in session.written
    assert len(f"{session.screen.rows[-1]}; next in 4m59s") <= 80


def test_the_log_outside_a_terminal_has_the_date(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    idle("ann")(scripted)
    log = cull_scripted("--timeout=1h").err.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO     ", line) for line in log)


def test_only_a_terminal_cuts_a_long_name_and_its_table_has_no_colours(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    idle("x" * 50)(scripted)
    args = ("--dry-run", "--timeout=1h")
    written = in_terminal(scripted, 120, *args).written
    assert f"\n{'x' * 39}…  2h".encode() in written
    assert b"\x1b" not in written
    assert f"\n{'x' * 50}  2h" in cull_scripted(*args).out


def test_what_a_terminal_cannot_show_is_escaped(scripted: ScriptedHub) -> None:
    idle(CJK[:2], "ann\x1b[2J\n/g\N{RIGHT-TO-LEFT OVERRIDE}pu\t")(scripted)
    session = in_terminal(scripted, 120, "--dry-run", "--timeout=1h", env={"PYTHONIOENCODING": "latin-1"})
    names = {row.split("  ")[0] for row in session.screen.rows[1:3]}
    assert names == {r"\u5c71\u7530", r"ann\x1b[2J\n/g\u202epu\t"}


def test_a_terminal_that_goes_away_does_not_end_a_loop(scripted: ScriptedHub, start: Start) -> None:
    """As after `cull-idle & disown`, when the connection to the machine is lost."""
    crowd(30)(scripted)
    terminal, its_end = open_terminal(80)
    culler = start(
        *(scripted, "--timeout=1h", "--concurrency=1"),
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
    )
    os.close(its_end)
    assert b"culled" in read_some(terminal)
    os.close(terminal)
    culler.wait_for(lambda: not scripted.running())
    assert culler.end(signal.SIGTERM) == 0
