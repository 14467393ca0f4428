"""--warn-before: a server that is kept now, and due soon if nothing happens, is warned once for each idle spell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from runs import Cull, Result, RunLoop
from scenes import Play, Scene, active, fault, idle, server
from scripted_hub import (
    ALL_SCOPES,
    HOUR,
    NEARLY_DUE,
    FakeJupyter,
    ScriptedHub,
    normal,
    respond,
    respond_json,
)

Step = Callable[[ScriptedHub], object]
NOW = datetime(2026, 11, 22, 20, tzinfo=UTC)
SECOND, MINUTE = 1, 60
OPTIONS = ("--timeout=1h", "--warn-before=15m")


def nearly(*names: str) -> Step:
    """Servers that are due in nine minutes."""
    return lambda hub: [server(name, NEARLY_DUE, age=9 * HOUR)(hub) for name in names]


# Which server is due soon: dry runs with a clock that stands still

Plan = Callable[..., tuple[str, float]]


@pytest.fixture
def plan(cull_scripted: Cull, scripted: ScriptedHub) -> Plan:
    """Make a dry run for one server. Returns its outcome, and in how many seconds it is due."""

    def run(options: str, idle: float = 0, age: float | None = 2 * HOUR, **fields: Any) -> tuple[str, float]:
        scripted.now = NOW
        started = None if age is None else NOW - timedelta(seconds=age)
        scripted.add("ann", idle=idle, **{"started": started, **fields})
        result = cull_scripted("--dry-run", "--json", *shlex.split(options))
        assert result.exit_code == 0, result.err
        *events, _ = map(json.loads, result.out.splitlines())
        due = [datetime.fromisoformat(event["due"]) - scripted.now for event in events if event["due"]]
        return "".join(event["outcome"] for event in events), sum(each.total_seconds() for each in due)

    return run


def refuse_to_cull() -> bool:
    """An arbiter."""
    return False


ARBITER = f"--arbiter={__name__}:refuse_to_cull"
NOT_SOON = ("", 0)
# --warn-before is 15 minutes, --timeout an hour, and the server runs for two; when is it due?
DUE: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "idle for long": ("", {"idle": 50 * MINUTE}, 10 * MINUTE),
    "idle for exactly as long": ("", {"idle": 45 * MINUTE}, 15 * MINUTE),
    "a second less": ("", {"idle": 45 * MINUTE - SECOND}, None),
    "a second before it is due": ("", {"idle": HOUR - SECOND}, SECOND),
    "since nobody knows": ("", {"idle": 50 * MINUTE, "age": None}, 10 * MINUTE),
    "in use": ("", {}, None),
    "no timeout": ("--timeout=never", {"idle": 50 * MINUTE}, None),
    "old": ("--timeout=never --max-age=8h", {"age": 8 * HOUR - MINUTE}, MINUTE),
    "not so old": ("--timeout=never --max-age=8h", {"age": 7 * HOUR}, None),
    "of unknown age": ("--timeout=never --max-age=8h", {"age": None}, None),
    "the age comes first": ("--max-age=8h", {"idle": 50 * MINUTE, "age": 8 * HOUR - MINUTE}, MINUTE),
    "the idle time comes first": ("--max-age=8h", {"idle": 58 * MINUTE, "age": 8 * HOUR - 5 * MINUTE}, 2 * MINUTE),
    "both come at once": ("--max-age=8h", {"idle": 55 * MINUTE, "age": 8 * HOUR - 5 * MINUTE}, 5 * MINUTE),
    "only the age comes soon": ("--max-age=8h", {"idle": 10 * MINUTE, "age": 8 * HOUR - 5 * MINUTE}, 5 * MINUTE),
    "a rule is shorter": ("--timeout=2h --rule='user=ann timeout=1h'", {"idle": 50 * MINUTE}, 10 * MINUTE),
    "a rule is longer": ("--rule='user=ann timeout=2h'", {"idle": 50 * MINUTE}, None),
    "a rule is endless": ("--rule='user=ann timeout=never'", {"idle": 50 * MINUTE}, None),
    "a rule keeps it": ("--rule='user=ann keep'", {"idle": 50 * MINUTE}, None),
    "started in the future": ("--timeout=never --max-age=10m --warn-before=15m", {"age": -5 * MINUTE}, 15 * MINUTE),
    "active in the future": ("", {"idle": -400 * 24 * HOUR, "age": None}, None),
    "stopping": ("", {"idle": 50 * MINUTE, "pending": "stop"}, None),
    "starting": ("", {"idle": 50 * MINUTE, "pending": "spawn"}, None),
    "not ready": ("", {"idle": 50 * MINUTE, "extra": {"ready": False}}, None),
    "perhaps not ready": ("", {"idle": 50 * MINUTE, "extra": {"ready": None}}, None),
    "without times": ("", {"last_activity": None, "age": None}, None),
    "a default server, spared": ("--cull-default-servers=false", {"idle": 50 * MINUTE}, None),
    "a named server, spared": ("--cull-named-servers=false", {"idle": 50 * MINUTE, "server": "gpu"}, None),
    "an arbiter decides": (ARBITER, {"idle": 50 * MINUTE}, None),
    "an arbiter, and old": (f"{ARBITER} --max-age=8h", {"idle": 50 * MINUTE, "age": 8 * HOUR - MINUTE}, MINUTE),
}


@pytest.mark.parametrize("what", DUE)
def test_when_a_server_is_due(plan: Plan, what: str) -> None:
    options, fields, due_in = DUE[what]
    timeout = "" if "--timeout" in options else "--timeout=1h "
    assert plan(f"--warn-before=15m {timeout}{options}", **fields) == ("warned" if due_in else "", due_in or 0)


@pytest.mark.parametrize("limit", ["never", "36525d", "1h"])
@pytest.mark.parametrize(
    ("moment", "planned"),
    [
        ("0001-01-01T00:00:00Z", True),
        ("9999-12-31T23:59:59Z", False),
        ("0001-01-01T00:00:00+14:00", False),  # before the first date
        ("9999-12-31T23:00:00-14:00", False),
    ],
)
def test_a_far_date_and_a_long_limit_are_no_trouble(plan: Plan, moment: str, planned: bool, limit: str) -> None:
    found = plan(f"--timeout={limit} --max-age={limit} --warn-before=59m", last_activity=moment, started=moment)
    assert found == ("planned" if planned and limit != "never" else "", 0)


# What a pass says


def fail_to_decide() -> bool:
    """An arbiter."""
    raise OSError("no answer")


WARNED = {"ann": "warned"}
SOON = server("ann/gpu", 7 * HOUR + 30, age=9 * HOUR + 30)
SCENES = [
    Scene("what is due soon is warned, what is due is culled", [SOON, active("bob"), server("cat", 10 * HOUR + 30)],
          "--timeout=9h --warn-before=3h", {"ann/gpu": "warned", "cat": "culled"}, says=True),
    Scene("without --warn-before nothing is warned", [nearly("ann")]),
    Scene("with --warn-before=0 nothing is warned", [nearly("ann")], "--warn-before=0"),
    Scene("a fuse that blows does not suppress warnings", [nearly("ann"), idle("bob")],
          "--warn-before=15m --max-culls=0", WARNED, exit=1),
    Scene("an arbiter that fails is reported beside the warning for the age", [server("ann", 60, age=8 * HOUR - 30)],
          f"--warn-before=15m --max-age=8h --arbiter={__name__}:fail_to_decide", WARNED, doubts=1),
]  # fmt: skip


@pytest.mark.parametrize("scene", SCENES, ids=Scene.__str__)
def test_scene(scene: Scene, play: Play) -> None:
    play(scene)


# In a loop: who is warned in each pass


def nothing(hub: ScriptedHub) -> None:
    """Time does not matter here."""


def ann_is_idle_for(seconds: float) -> Step:
    return server("ann", seconds, age=9 * HOUR)


def ann_says(seconds: float) -> Step:
    """That she has been idle for so long."""

    def say(hub: ScriptedHub) -> None:
        says = FakeJupyter(datetime.now(UTC) - timedelta(seconds=seconds))
        server("ann", age=9 * HOUR, says=says)(hub)

    return say


def the_due_time_passes(hub: ScriptedHub) -> None:
    """But she was active 25 seconds later than was known."""
    now = hub.now
    ann_is_idle_for(NEARLY_DUE - 25)(hub)
    hub.now = now + timedelta(seconds=HOUR - NEARLY_DUE + 10)


def both_are_active(hub: ScriptedHub) -> None:
    """For ten minutes."""
    for name in ("ann", "bob"):
        hub.touch(name)
    hub.now = datetime.now(UTC) + timedelta(minutes=10)


def forty_minutes_pass(hub: ScriptedHub) -> None:
    hub.now += timedelta(minutes=40)


BOTH = ["ann", "bob"]
TROUBLES: dict[str, Step] = {
    "the list ends after the first user": fault("GET", "/users", normal(), respond(500)),
    "there is no list": fault("GET", "/users", respond(500)),
    "there is no connection": ScriptedHub.pause_listening,
    # Pages shift while servers start and stop.
    "the list looks whole, but bob is not on it": fault("GET", "/users", normal(), respond_json(200, [])),
    "the list's entry for bob is garbage": fault(
        "GET", "/users", normal(), respond_json(200, [{"name": "bob", "servers": 5}])
    ),
}
LOOPS: dict[str, tuple[list[Step], list[list[str]]]] = {
    "once until it was active and is idle again": (
        [nothing, nothing, ann_is_idle_for(0), ann_is_idle_for(NEARLY_DUE - 60), nothing],
        [BOTH, [], [], [], ["ann"], []],
    ),
    "not again if the due time is over when the next one differs a little": ([the_due_time_passes], [BOTH, []]),
    "again if it is idle again after its time was over": ([both_are_active, forty_minutes_pass], [BOTH, [], BOTH]),
    **{
        f"not again because a pass did not see it: {what}": (
            [trouble, ScriptedHub.resume, ann_is_idle_for(NEARLY_DUE + 60)],
            [BOTH, [], [], ["ann"]],
        )
        for what, trouble in TROUBLES.items()
    },
}


@pytest.mark.parametrize("when", LOOPS)
def test_a_server_is_warned(loop: RunLoop, scripted: ScriptedHub, when: str) -> None:
    steps, expected = LOOPS[when]
    scripted.page_max = 1
    nearly("ann", "bob")(scripted)
    passes = loop(scripted, *OPTIONS, between=[partial(step, scripted) for step in steps]).passes
    assert list(map(warned, passes)) == expected


def warned(result: Result) -> list[str]:
    """Those that a pass warns of."""
    return sorted(name for name, said in result.said.items() if said.outcome == "warned")


def test_what_a_server_says_a_few_seconds_off_causes_no_second_warning(loop: RunLoop, scripted: ScriptedHub) -> None:
    scripted.scopes = [*ALL_SCOPES, "tokens"]
    ann_says(NEARLY_DUE)(scripted)
    between = [partial(ann_says(NEARLY_DUE + more), scripted) for more in (-9, 9, -120)]
    passes = loop(scripted, *OPTIONS, "--idle-by=server", between=between).passes
    assert list(map(warned, passes)) == [["ann"], [], [], ["ann"]]


def test_a_server_that_was_warned_is_kept_and_then_culled_when_it_is_due(loop: RunLoop, scripted: ScriptedHub) -> None:
    nearly("ann", "bob")(scripted)
    between: list[Callable[[], object]] = [bool, partial(ann_is_idle_for(HOUR + 60), scripted)]
    passes = loop(scripted, *OPTIONS, "-v", between=between).passes
    outcomes = [{name: f"{said.level} {said.outcome}" for name, said in each.said.items()} for each in passes]
    assert outcomes == [
        {"ann": "INFO warned", "bob": "INFO warned"},
        {"ann": "DEBUG kept", "bob": "DEBUG kept"},
        {"ann": "INFO culled", "bob": "DEBUG kept"},
    ]


def test_servers_whose_names_look_alike_are_both_warned(loop: RunLoop, scripted: ScriptedHub) -> None:
    nearly("eve/a\n", r"eve/a\n")(scripted)
    first, second = loop(scripted, *OPTIONS, between=[bool]).passes
    assert (first.counts["warned"], len(first.lines)) == (2, 3)
    assert warned(second) == []


# The option: test_options.py has what is refused


@pytest.mark.parametrize(
    ("options", "exit_code"),
    [
        ("--timeout=1h --warn-before=59m", 0),
        ("--warn-before=15m", 2),  # --timeout is 10m
        ("--timeout=never --max-age=1h --warn-before=2h", 0),
        ("--timeout=0 --warn-before=15m", 0),
        ("--timeout=1h --warn-before=15m --rule='group=gpu timeout=16m' --rule='user=a keep'", 0),
        ("--timeout=1h --warn-before=15m --rule='group=gpu timeout=0'", 0),
        (f"--timeout=10m --warn-before=15m {ARBITER}", 0),  # which stands in place of --timeout
        ("--timeout=2w --warn-before=never", 2),
    ],
)
def test_warn_before_is_shorter_than_every_timeout(cull_scripted: Cull, options: str, exit_code: int) -> None:
    assert cull_scripted(*shlex.split(options)).exit_code == exit_code
