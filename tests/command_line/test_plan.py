"""The plan of a dry run: a table that fits the terminal, and the bars that help to choose a timeout."""

from __future__ import annotations

import re
from datetime import timedelta

import click
import pytest
import wcwidth
from hub import RealHub
from hypothesis import given
from hypothesis import strategies as st
from runs import Cull
from scripted_hub import HOUR, ScriptedHub
from settings import settings_from
from terminal import in_pipe, in_terminal

import cull_idle

DAY = 24 * HOUR
LONG = "maximiliane@example.edu"
CJK = "山田太郎と佐藤花子"
ACCENTED = "e\N{COMBINING ACUTE ACCENT}" * 12


# On the real Hub, at three widths


def last(idle: int, age: int) -> dict[str, float]:
    """Half a minute more: the minutes that are shown do not depend on how long a test takes."""
    return {"idle_seconds": idle + 90, "age_seconds": age + 90}


def user_last(idle: int) -> dict[str, float]:
    return {"user_idle_seconds": idle + 90, "user_age_seconds": 500 * DAY + 90}


@pytest.fixture
def school(hub: RealHub) -> RealHub:
    """Users with long, wide and plain names; one has no server, the server of one will soon be due."""
    hub.spawn_many(
        [
            (LONG, "machine-learning", {**last(9 * DAY, 400 * DAY), **user_last(3 * HOUR)}),
            (CJK, "", {**last(7 * HOUR, 7 * HOUR), **user_last(2 * HOUR)}),
            ("bob", "", {**last(4 * HOUR, 5 * HOUR), **user_last(0)}),
            ("ann", "", {**last(HOUR, 2 * DAY), **user_last(0)}),
        ]
    )
    hub.add_user("gone", idle_seconds=40 * DAY + 90, age_seconds=500 * DAY + 90)
    return hub


ARGUMENTS = ["--timeout=6h", "--warn-before=3h", "--cull-users", "--user-timeout=30d"]
ARGUMENTS += ["--rule=user=ann server=thesis keep", "--rule=user=ann timeout=never"]

PLANS = {
    40: """
SERVER                      IDLE   AGE
  WOULD BE
user gone                   40d    500d
  deleted: idle 40d, limit 30d
maximiliane@e…ine-learning  9d     400d
  stopped: idle 9d, limit 6h
山田太郎と佐藤花子          7h01m  7h01m
  stopped: idle 7h01m, limit 6h
bob                         4h01m  5h01m
  warned: idle 4h01m, limit 6h; due in
  1h58m
user maximili…@example.edu  3h01m  500d
  kept: idle 3h01m, limit 30d
user 山田太郎と佐藤花子     2h01m  500d
  kept: idle 2h01m, limit 30d
ann                         1h01m  2d
  kept: idle 1h01m, no limit by rule 2:
  user=ann timeout=never
2 of 4 running servers would be stopped,
1 of 5 users deleted.
But rule 1, user=ann server=thesis keep,
applies to nobody now.

idle for at least
    10m  ███████████████ 4
    30m  ███████████████ 4
     1h  ███████████████ 4
     2h  ███████████▎ 3
     4h  ███████████▎ 3
     6h  ███████▌ 2  <- --timeout
     8h  ███▊ 1
     1d  ███▊ 1
     1w  ███▊ 1
""",
    80: """
SERVER                      IDLE   AGE    WOULD BE
user gone                   40d    500d   deleted: idle 40d, limit 30d
maximiliane@e…ine-learning  9d     400d   stopped: idle 9d, limit 6h
山田太郎と佐藤花子          7h01m  7h01m  stopped: idle 7h01m, limit 6h
bob                         4h01m  5h01m  warned: idle 4h01m, limit 6h; due in
                                          1h58m
user maximili…@example.edu  3h01m  500d   kept: idle 3h01m, limit 30d
user 山田太郎と佐藤花子     2h01m  500d   kept: idle 2h01m, limit 30d
ann                         1h01m  2d     kept: idle 1h01m, no limit by rule 2:
                                          user=ann timeout=never
2 of 4 running servers would be stopped, 1 of 5 users deleted.
But rule 1, user=ann server=thesis keep, applies to nobody now.

idle for at least
    10m  ████████████████████████████████████████ 4
    30m  ████████████████████████████████████████ 4
     1h  ████████████████████████████████████████ 4
     2h  ██████████████████████████████ 3
     4h  ██████████████████████████████ 3
     6h  ████████████████████ 2  <- --timeout
     8h  ██████████ 1
     1d  ██████████ 1
     1w  ██████████ 1
""",
    200: """
SERVER                                    IDLE   AGE    WOULD BE
user gone                                 40d    500d   deleted: idle 40d, limit 30d
maximiliane@example.edu/machine-learning  9d     400d   stopped: idle 9d, limit 6h
山田太郎と佐藤花子                        7h01m  7h01m  stopped: idle 7h01m, limit 6h
bob                                       4h01m  5h01m  warned: idle 4h01m, limit 6h; due in 1h58m
user maximiliane@example.edu              3h01m  500d   kept: idle 3h01m, limit 30d
user 山田太郎と佐藤花子                   2h01m  500d   kept: idle 2h01m, limit 30d
ann                                       1h01m  2d     kept: idle 1h01m, no limit by rule 2: user=ann timeout=never
2 of 4 running servers would be stopped, 1 of 5 users deleted.
But rule 1, user=ann server=thesis keep, applies to nobody now.

idle for at least
    10m  ████████████████████████████████████████ 4
    30m  ████████████████████████████████████████ 4
     1h  ████████████████████████████████████████ 4
     2h  ██████████████████████████████ 3
     4h  ██████████████████████████████ 3
     6h  ████████████████████ 2  <- --timeout
     8h  ██████████ 1
     1d  ██████████ 1
     1w  ██████████ 1
""",
}


def test_a_plan_fits_the_terminal(school: RealHub) -> None:
    env = {"JUPYTERHUB_API_TOKEN": school.user_culler_token}
    for columns, shown in PLANS.items():
        plan = in_terminal(school, columns, "--dry-run", "-v", *ARGUMENTS, env=env)
        assert "\n".join(plan.rows) == shown.strip()


def test_a_pipe_gets_whole_names_and_no_colours(school: RealHub) -> None:
    env = {"JUPYTERHUB_API_TOKEN": school.user_culler_token, "COLUMNS": "40"}
    out, err = in_pipe(school, "--dry-run", "-v", *ARGUMENTS, env=env)
    assert out.decode().strip() == PLANS[200].strip()
    assert err == b""


# Colours


def test_a_terminal_gets_colours(school: RealHub) -> None:
    env = {"JUPYTERHUB_API_TOKEN": school.user_culler_token}
    screen = in_terminal(school, 80, "--dry-run", *ARGUMENTS, env=env).screen
    assert [screen.colour(word) for word in ("stopped", "deleted", "warned")] == ["red", "red", "brown"]
    assert screen.colour("idle 7h01m") == screen.colour("山") == screen.colour("2 of 4") == "default"


def one_idle(scripted: ScriptedHub) -> list[str]:
    scripted.add("ann", idle=2 * HOUR)
    return ["--dry-run", "--timeout=1h"]


def test_no_color_turns_colours_off(scripted: ScriptedHub) -> None:
    args = one_idle(scripted)
    for env in ({"NO_COLOR": "1"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}):
        assert b"\x1b" not in in_terminal(scripted, 80, *args, env=env).written
    assert b"\x1b[31mstopped\x1b[0m: idle" in in_terminal(scripted, 80, *args, env={"NO_COLOR": ""}).written


def test_a_dumb_terminal_gets_no_colours(scripted: ScriptedHub) -> None:
    args = one_idle(scripted)
    written = in_terminal(scripted, 80, *args, env={"TERM": "dumb"}).written
    assert b"stopped: idle" in written
    assert b"\x1b" not in written


def test_force_color_turns_colours_on(scripted: ScriptedHub) -> None:
    args = one_idle(scripted)
    assert b"\x1b[31mstopped\x1b[0m: idle" in in_pipe(scripted, *args, env={"FORCE_COLOR": "1"})[0]
    assert b"\x1b" not in in_pipe(scripted, *args, env={"FORCE_COLOR": ""})[0]


# What cannot be shown as it is


def test_an_ascii_terminal_gets_an_ascii_plan_that_fits(scripted: ScriptedHub) -> None:
    scripted.add(CJK, idle=9 * HOUR + 30)
    scripted.add("ann", idle=2 * HOUR + 30, age=3 * HOUR + 30)
    plan = in_terminal(scripted, 40, "--dry-run", "--timeout=7h30m", env={"PYTHONIOENCODING": "ascii"})
    assert plan.written.isascii()
    assert plan.rows == [
        "SERVER                       IDLE  AGE",
        "  WOULD BE",
        r"\u5c71\u7530\~4\u82b1\u5b50  9h    9h01m",
        "  stopped: idle 9h, limit 7h30m",
        "1 of 2 running servers would be stopped.",
        "",
        "idle for at least",
        "    10m  ############### 2",
        "    30m  ############### 2",
        "     1h  ############### 2",
        "     2h  ############### 2",
        "     4h  ######## 1",
        "  7h30m  ######## 1  <- --timeout",
        "     8h  ######## 1",
        "     1d  0",
        "     1w  0",
    ]


def test_control_characters_are_escaped(scripted: ScriptedHub) -> None:
    scripted.add("ann\x1b[2J\n", "g\N{RIGHT-TO-LEFT OVERRIDE}pu\t", idle=2 * HOUR + 30, age=3 * HOUR + 30)
    plan = in_terminal(scripted, 80, "--dry-run", "--timeout=1h")
    assert plan.rows[1] == r"ann\x1b[2J\n/g\u202epu\t  2h    3h   stopped: idle 2h, limit 1h"


def test_an_accent_stays_with_its_letter(scripted: ScriptedHub) -> None:
    scripted.add(ACCENTED, "x" * 30, idle=2 * HOUR + 30, age=3 * HOUR + 30)
    plan = in_terminal(scripted, 40, "--dry-run", "--timeout=1h")
    assert plan.rows[2] == f"{'é' * 12}/x…{'x' * 14}  2h    3h"
    assert cull_idle.cut_middle(ACCENTED, 7) == f"{ACCENTED[:6]}…{ACCENTED[-6:]}"
    assert cull_idle.cut_middle(f"{CJK}{ACCENTED}", 7) == f"{CJK[:1]}…{ACCENTED[-6:]}"


# Any plan fits

CHARACTERS = st.one_of(
    st.characters(max_codepoint=0x17F),  # control characters, Latin
    st.sampled_from("山田とカ\N{HANGUL SYLLABLE HAN}\N{FULLWIDTH LATIN SMALL LETTER A}\N{SLOTH}"),  # two columns
    st.sampled_from("\N{COMBINING ACUTE ACCENT}\N{COMBINING ENCLOSING CIRCLE}\N{ZERO WIDTH JOINER}\udc80"),
)
NAMES = st.text(CHARACTERS, min_size=1, max_size=80)
PRINTABLE = NAMES.map(cull_idle.printable)
DURATIONS = st.one_of(st.none(), st.timedeltas(timedelta(0), timedelta(days=700_000)))
OUTCOMES = st.sampled_from([cull_idle.Outcome.PLANNED, cull_idle.Outcome.WARNED, cull_idle.Outcome.KEPT])


def width_of(text: str) -> int:
    """Columns, as terminals count them; what is drawn over another character takes none."""
    return sum(max(wcwidth.wcwidth(char), 0) for char in text)


SETTINGS = settings_from()


@given(
    rows=st.lists(st.tuples(NAMES, DURATIONS, DURATIONS, OUTCOMES, PRINTABLE), min_size=1, max_size=5),
    width=st.integers(40, 250),
)
def test_a_table_of_any_names_fits_and_has_every_number(
    rows: list[tuple[str, timedelta | None, timedelta | None, cull_idle.Outcome, str]], width: int
) -> None:
    events = [
        cull_idle.Event(server_named(name), outcome, reason, cull_idle.Verdict(False, "", reason, idle, age))
        for name, idle, age, outcome, reason in rows
    ]
    lines = click.unstyle("\n".join(cull_idle.table(events, SETTINGS, width))).splitlines()
    assert max(map(width_of, lines)) <= width
    below = iter(lines)
    for _, idle, age, *_ in rows:
        assert any(re.search(f"  {written(idle)} +{written(age)}(?: |$)", line) for line in below)


def server_named(name: str) -> cull_idle.Server:
    return cull_idle.Server(name, "", True, "", None, None, "", {}, {})


def written(duration: timedelta | None) -> str:
    return "-" if duration is None else cull_idle.format_duration(duration, units=2)


@given(name=PRINTABLE, width=st.integers(3, 130))
def test_a_long_name_is_cut_in_the_middle_to_fit_exactly(name: str, width: int) -> None:
    cut = cull_idle.cut_middle(name, width)
    if width_of(name) <= width:
        assert cut == name
    else:
        head, _, tail = cut.partition("…") if "…" not in name else (cut, "", "")
        assert name.startswith(head)
        assert name.endswith(tail)
        assert width - 2 <= width_of(cut) <= width


@given(text=PRINTABLE, width=st.integers(2, 130))
def test_wrapping_loses_nothing_but_blanks(text: str, width: int) -> None:
    lines = cull_idle.wrap(text, width)
    assert max(map(width_of, lines)) <= width
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


# The bars


def idle_for(scripted: ScriptedHub, *seconds: int) -> None:
    for number, idle in enumerate(seconds):
        scripted.add(f"user{number}", idle=idle + 30, age=30 * DAY)


def bars_of(out: str) -> list[str]:
    return out.partition("idle for at least\n")[2].splitlines()


def test_the_bars_count_the_running_servers_whatever_rules_say(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    idle_for(scripted, 0, 10 * 60, 30 * 60, HOUR, 2 * HOUR, 4 * HOUR, 8 * HOUR, DAY, 7 * DAY)
    scripted.add("user0", "starting", idle=9 * DAY, pending="spawn", ready=False)
    scripted.add("user0", "odd", idle=9 * DAY, extra={"last_activity": None, "started": None})
    assert bars_of(cull_scripted("--dry-run", "--timeout=1d", "--rule=user=* keep").out) == [
        "    10m  ████████████████████████████████████████ 8",
        "    30m  ███████████████████████████████████ 7",
        "     1h  ██████████████████████████████ 6",
        "     2h  █████████████████████████ 5",
        "     4h  ████████████████████ 4",
        "     8h  ███████████████ 3",
        "     1d  ██████████ 2  <- --timeout",
        "     1w  █████ 1",
    ]


def test_there_are_no_bars_if_nothing_is_idle(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    idle_for(scripted, 0, 60)
    assert cull_scripted("--dry-run", "--timeout=1h").out == "0 of 2 running servers would be stopped.\n"


@pytest.mark.parametrize(
    ("timeout", "row", "marked"),
    [
        ("0", 0, "     0s  ████████████████████████████████████████ 2  <- --timeout"),
        ("90s", 0, "  1m30s  ████████████████████████████████████████ 1  <- --timeout"),
        ("1w", 7, "     1w  0  <- --timeout"),
        ("1w1s", 8, "7d00h00m01s  0  <- --timeout"),
    ],
)
def test_the_configured_timeout_is_among_the_bars(
    cull_scripted: Cull, scripted: ScriptedHub, timeout: str, row: int, marked: str
) -> None:
    idle_for(scripted, 0, 20 * 60)
    bars = bars_of(cull_scripted("--dry-run", f"--timeout={timeout}").out)
    assert bars[row] == marked
    assert [bar for bar in bars if "<-" in bar] == [marked]
    assert len({len(re.sub(r"(?<=\w)  .*", "", bar)) for bar in bars}) == 1  # all labels end in one column


def test_without_a_timeout_the_bars_have_no_mark(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    idle_for(scripted, 20 * 60)
    bars = bars_of(cull_scripted("--dry-run", "--timeout=never").out)
    assert len(bars) == len(cull_idle.IDLE_STEPS)
    assert "<-" not in "".join(bars)


def test_the_smallest_count_still_has_a_bar() -> None:
    counts = {timedelta(minutes=10): 99_999, timedelta(hours=1): 1}
    assert list(cull_idle.bars(counts, timedelta(hours=1), 40)) == [
        "idle for at least",
        "    10m  ███████████ 99999",
        "     1h  ▏ 1  <- --timeout",
    ]


@given(counts=st.lists(st.integers(0, 10**5), min_size=1), timeout=st.timedeltas(timedelta(0), timedelta(days=100_000)))
def test_no_bar_is_wider_than_the_terminal(counts: list[int], timeout: timedelta) -> None:
    steps = {timeout: counts[0], **{timedelta(hours=number): count for number, count in enumerate(counts)}}
    assert max(map(len, cull_idle.bars(steps, timeout, 40))) <= 40


# What the rules apply to


@pytest.mark.parametrize(
    ("rules", "unused"),
    [
        (["user=ann keep"], []),
        (["user=bob keep"], []),  # who is idle, but has no server
        (["user=an keep"], [1]),
        (["user=ann keep", "user=a* timeout=2h"], [2]),  # the first that matches applies
        (["server=gpu timeout=2h", "user=x timeout=1d", "user=a* timeout=2h"], [1, 2]),
    ],
)
def test_a_rule_that_applies_to_nobody_is_named(
    cull_scripted: Cull, scripted: ScriptedHub, rules: list[str], unused: list[int]
) -> None:
    scripted.add("ann", idle=HOUR)
    scripted.add_user("bob", idle=HOUR)
    result = cull_scripted("--dry-run", "--cull-users", "--timeout=10m", *(f"--rule={rule}" for rule in rules))
    assert re.findall(r"^But rule (\d), (.*), applies to nobody now\.$", result.out, re.MULTILINE) == [
        (str(number), rules[number - 1]) for number in unused
    ]
