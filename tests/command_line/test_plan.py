"""The plan of a dry run: a table in plain columns, and the bars that help to choose a timeout."""

from __future__ import annotations

import re

import pytest
from hub import RealHub
from runs import Cull
from scripted_hub import HOUR, ScriptedHub
from terminal import in_pipe, in_terminal

import cull_idle

DAY = 24 * HOUR
LONG = "maximiliane@example.edu"
CJK = "山田太郎と佐藤花子"


# On the real Hub


def last(idle: int, age: int) -> dict[str, float]:
    """Half a minute more: the minutes that are shown do not depend on how long a test takes."""
    return {"idle_seconds": idle + 90, "age_seconds": age + 90}


def user_last(idle: int) -> dict[str, float]:
    return {"user_idle_seconds": idle + 90, "user_age_seconds": 500 * DAY + 90}


@pytest.fixture
def school(hub: RealHub) -> RealHub:
    """Users with a long, a wide and plain names; one has no server, the server of one will soon be due."""
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

PLAN = """
SERVER                                    IDLE   AGE    WOULD BE
user gone                                 40d    500d   deleted: idle 40d, limit 30d
maximiliane@example.edu/machine-learning  9d     400d   stopped: idle 9d, limit 6h
山田太郎と佐藤花子                                 7h01m  7h01m  stopped: idle 7h01m, limit 6h
bob                                       4h01m  5h01m  warned: idle 4h01m, limit 6h; due in 1h58m
ann                                       1h01m  2d     kept: idle 1h01m, no limit by rule 2: user=ann timeout=never
2 of 4 running servers would be stopped, 1 of 5 users deleted.
But on Kubernetes, what is deleted or removed takes its storage along (KubeSpawner.delete_pvc).
But rule 1, user=ann server=thesis keep, applies to nobody now.

idle for at least, whatever rules and an arbiter say
    10m  ######################################## 4
    30m  ######################################## 4
     1h  ######################################## 4
     2h  ############################## 3
     4h  ############################## 3
     6h  #################### 2  <- --timeout
     8h  ########## 1
     1d  ########## 1
     7d  ########## 1
"""


def test_a_plan(school: RealHub) -> None:
    env = {"JUPYTERHUB_API_TOKEN": school.user_culler_token}
    out, err = in_pipe(school, "--dry-run", "-v", *ARGUMENTS, env=env)
    assert out.decode().strip() == PLAN.strip()
    assert err == b""


def test_only_a_terminal_cuts_a_long_name_and_it_gets_no_colours(scripted: ScriptedHub) -> None:
    scripted.add("x" * 50, idle=2 * HOUR + 30)
    args = ["--dry-run", "--timeout=1h"]
    written = in_terminal(scripted, 120, *args).written
    assert f"\n{'x' * 39}…  2h".encode() in written
    assert b"\x1b" not in written
    assert f"\n{'x' * 50}  2h".encode() in in_pipe(scripted, *args)[0]


# What cannot be shown as it is


def test_a_terminal_without_these_characters_gets_their_codes(scripted: ScriptedHub) -> None:
    scripted.add(CJK[:2], idle=9 * HOUR + 30)
    plan = in_terminal(scripted, 80, "--dry-run", "--timeout=7h30m", env={"PYTHONIOENCODING": "latin-1"})
    assert plan.rows[1].startswith(r"\u5c71\u7530")
    assert f"  7h30m  {'#' * 40} 1  <- --timeout" in plan.rows


def test_control_characters_are_escaped(scripted: ScriptedHub) -> None:
    scripted.add("ann\x1b[2J\n", "g\N{RIGHT-TO-LEFT OVERRIDE}pu\t", idle=2 * HOUR + 30, age=3 * HOUR + 30)
    plan = in_terminal(scripted, 80, "--dry-run", "--timeout=1h")
    assert plan.rows[1] == r"ann\x1b[2J\n/g\u202epu\t  2h    3h   stopped: idle 2h, limit 1h"


# The bars


def idle_for(scripted: ScriptedHub, *seconds: int) -> None:
    for number, idle in enumerate(seconds):
        scripted.add(f"user{number}", idle=idle + 30, age=30 * DAY)


def bars_of(out: str) -> list[str]:
    return re.split("\nidle for at least.*\n", out)[1].splitlines()


def test_the_bars_count_the_running_servers_whatever_rules_say(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    idle_for(scripted, 0, 10 * 60, 30 * 60, HOUR, 2 * HOUR, 4 * HOUR, 8 * HOUR, DAY, 7 * DAY)
    scripted.add("user0", "starting", idle=9 * DAY, pending="spawn", ready=False)
    scripted.add("user0", "odd", idle=9 * DAY, extra={"last_activity": None, "started": None})
    assert bars_of(cull_scripted("--dry-run", "--timeout=1d", "--rule=user=* keep").out) == [
        "    10m  ######################################## 8",
        "    30m  ################################### 7",
        "     1h  ############################## 6",
        "     2h  ######################### 5",
        "     4h  #################### 4",
        "     8h  ############### 3",
        "     1d  ########## 2  <- --timeout",
        "     7d  ##### 1",
    ]


def test_there_are_no_bars_if_nothing_is_idle(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    idle_for(scripted, 0, 65)
    assert cull_scripted("--dry-run", "--timeout=1h").out.splitlines() == [
        "0 of 2 running servers would be stopped.",
        "-v shows all of them, and for how long they have been idle.",
    ]


@pytest.mark.parametrize(
    ("timeout", "row", "marked"),
    [
        ("0", 0, "     0s  ######################################## 2  <- --timeout"),
        ("90s", 0, "  1m30s  ######################################## 1  <- --timeout"),
        ("1w", 7, "     7d  0  <- --timeout"),
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


def test_without_a_timeout_the_bars_have_no_mark(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    idle_for(scripted, 20 * 60)
    bars = bars_of(cull_scripted("--dry-run", "--timeout=never").out)
    assert len(bars) == len(cull_idle.IDLE_STEPS)
    assert "<-" not in "".join(bars)


def test_the_smallest_count_still_has_a_bar(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    idle_for(scripted, HOUR, *[10 * 60] * 99)
    bars = bars_of(cull_scripted("--dry-run", "--timeout=1h").out)
    assert bars[0].endswith("# 100")
    assert bars[2:4] == ["     1h  # 1  <- --timeout", "     2h  0"]


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
