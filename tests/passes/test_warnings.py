"""--warn-before: a server that is kept now, and due soon if nothing happens, is reported once for each idle spell."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub import RealHub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import Cull, Result, RunLoop
from scripted_hub import (
    ALL_SCOPES,
    HOUR,
    LONG_AGO,
    NEARLY_DUE,
    FakeJupyter,
    ScriptedHub,
    normal,
    respond,
    respond_json,
    user_model,
)

NOW = datetime(2026, 11, 22, 20, tzinfo=UTC)
SECOND, MINUTE = 1, 60
ARGS = ("--timeout=1h", "--warn-before=15m")

# Which server is due soon, by a clock that stands still


class Plan(NamedTuple):
    """The outcome of one server in a dry run, and when it is due if that is soon."""

    outcome: str  # planned, warned, or empty
    due_in: float = 0  # seconds
    reason: str = ""


Ask = Callable[..., Plan]


@pytest.fixture
def plan(cull_scripted: Cull, scripted: ScriptedHub) -> Ask:
    """Make a dry run for one server. `at` is in seconds from now, `age` None if the Hub does not know it."""

    def run(*args: str, idle: float = 0, age: float | None = None, at: float = 0, **fields: Any) -> Plan:
        scripted.now = NOW
        started = None if age is None else NOW - timedelta(seconds=age)
        scripted.users.clear()
        scripted.add("ann", idle=idle, **{"started": started, **fields})
        scripted.now = NOW + timedelta(seconds=at)
        result = cull_scripted("--dry-run", "--json", *args)
        assert result.exit_code == 0, result.err
        *events, _ = map(json.loads, result.out.splitlines())
        if not events:
            return Plan("")
        (event,) = events
        due_in = (datetime.fromisoformat(event["due"]) - scripted.now).total_seconds() if event["due"] else 0
        return Plan(event["outcome"], due_in, event["reason"])

    return run


AGED = ("--timeout=never", "--max-age=8h")
BOTH = ("--timeout=1h", "--max-age=8h")


@pytest.mark.parametrize(
    ("args", "idle", "age", "due_in", "reason"),
    [
        # the idle limit
        (["--timeout=1h"], 50 * MINUTE, 2 * HOUR, 10 * MINUTE, "idle 50m, limit 1h"),
        (["--timeout=1h"], 45 * MINUTE, 2 * HOUR, 15 * MINUTE, "idle 45m, limit 1h"),
        (["--timeout=1h"], 45 * MINUTE - SECOND, 2 * HOUR, None, ""),
        (["--timeout=1h"], HOUR - SECOND, 2 * HOUR, SECOND, "idle 59m59s, limit 1h"),
        (["--timeout=1h"], 50 * MINUTE, None, 10 * MINUTE, "idle 50m, limit 1h"),
        (["--timeout=1h"], 0, 2 * HOUR, None, ""),
        (["--timeout=never"], 50 * MINUTE, 2 * HOUR, None, ""),
        # the age
        (AGED, 0, 8 * HOUR - MINUTE, MINUTE, "age 7h59m, limit 8h"),
        (AGED, 0, 7 * HOUR, None, ""),
        (AGED, 0, None, None, ""),
        # both: whichever comes first
        (BOTH, 50 * MINUTE, 8 * HOUR - MINUTE, MINUTE, "age 7h59m, limit 8h"),
        (BOTH, 58 * MINUTE, 8 * HOUR - 5 * MINUTE, 2 * MINUTE, "idle 58m, limit 1h"),
        (BOTH, 55 * MINUTE, 8 * HOUR - 5 * MINUTE, 5 * MINUTE, "idle 55m, limit 1h"),
        (BOTH, 10 * MINUTE, 8 * HOUR - 5 * MINUTE, 5 * MINUTE, "age 7h55m, limit 8h"),
        # the limit of a rule
        (["--timeout=2h", "--rule=user=ann timeout=1h"], 50 * MINUTE, 2 * HOUR, 10 * MINUTE,
         "idle 50m, limit 1h by rule 1: user=ann timeout=1h"),
        (["--timeout=1h", "--rule=user=ann timeout=2h"], 50 * MINUTE, 2 * HOUR, None, ""),
        # times in the future
        (["--timeout=never", "--max-age=10m"], 0, -5 * MINUTE, 15 * MINUTE, "age 0s, limit 10m"),
        (["--timeout=1h"], -400 * 24 * HOUR, None, None, ""),
    ],
)  # fmt: skip
def test_a_server_is_due_when_it_reaches_the_first_of_its_limits(
    plan: Ask, args: list[str], idle: float, age: float | None, due_in: float | None, reason: str
) -> None:
    found = plan("--warn-before=15m", *args, idle=idle, age=age)
    if due_in is None:
        assert found == Plan("")
    else:
        assert found[:2] == ("warned", due_in)
        assert found.reason.startswith(f"{reason}; ")


@pytest.mark.parametrize(
    ("fields", "args"),
    [
        ({"pending": "stop"}, []),
        ({"pending": "spawn"}, []),
        ({"extra": {"ready": False}}, []),
        ({"extra": {"ready": None}}, []),
        ({"last_activity": None, "started": None}, []),
        ({}, ["--cull-default-servers=false"]),
        ({"server": "gpu"}, ["--cull-named-servers=false"]),
        ({}, ["--rule=user=ann keep"]),
        ({}, ["--timeout=never"]),
        ({"idle": 50 * MINUTE}, ["--rule=user=ann timeout=never"]),
    ],
)
def test_a_server_that_is_kept_for_another_reason_is_not_due_soon(
    plan: Ask, fields: dict[str, Any], args: list[str]
) -> None:
    assert plan(*ARGS, idle=50 * MINUTE, age=2 * HOUR).outcome == "warned"
    assert plan(*ARGS, *args, **{"idle": 50 * MINUTE, "age": 2 * HOUR, **fields}) == Plan("")


def test_with_an_arbiter_only_the_age_makes_a_server_due_soon(plan: Ask, tmp_path: Path) -> None:
    (tmp_path / "arbiter.py").write_text("def decide(): return False")
    args = (*ARGS, f"--arbiter={tmp_path}/arbiter.py:decide")
    assert plan(*args, idle=50 * MINUTE) == Plan("")
    assert plan(*args, "--max-age=8h", idle=50 * MINUTE, age=8 * HOUR - MINUTE)[:2] == ("warned", MINUTE)


FAR = ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:00:00-14:00"]


@pytest.mark.parametrize("moment", FAR)
@pytest.mark.parametrize("limit", ["never", "36525d", "1h"])
def test_a_far_date_and_a_long_limit_are_no_trouble(plan: Ask, moment: str, limit: str) -> None:
    args = (f"--timeout={limit}", f"--max-age={limit}", "--warn-before=59m")
    expected = "planned" if moment == "0001-01-01T00:00:00Z" and limit == "1h" else None
    found = plan(*args, last_activity=moment, started=moment)
    assert found.outcome in ([expected] if expected else ["", "warned", "planned"])
    assert 0 <= found.due_in <= 59 * MINUTE


SECONDS = st.integers(-HOUR, 9 * HOUR)
LIMITS = st.sampled_from(["never", "1h", "2h", "7000s"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SECONDS, st.none() | SECONDS, LIMITS, LIMITS, st.integers(SECOND, HOUR - SECOND))
def test_a_server_is_due_at_the_moment_that_is_said_and_not_before(
    plan: Ask, idle: int, age: int | None, timeout: str, max_age: str, within: int
) -> None:
    args = (f"--timeout={timeout}", f"--max-age={max_age}", f"--warn-before={within}s")
    now = plan(*args, idle=idle, age=age)
    then = plan(*args, idle=idle, age=age, at=within)
    assert (now.outcome in ("planned", "warned")) == (then.outcome == "planned")
    if now.outcome == "warned":
        assert 0 < now.due_in <= within
        assert plan(*args, idle=idle, age=age, at=now.due_in).outcome == "planned"
        assert plan(*args, idle=idle, age=age, at=now.due_in - 1).outcome == "warned"


# What a pass says


def test_a_server_that_is_due_soon_is_warned_and_one_that_is_due_is_culled(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many(
        [
            ("ann", "gpu", {"idle_seconds": NEARLY_DUE}),
            ("bob", "", {"idle_seconds": 60}),
            ("cat", "", {"idle_seconds": 7290}),
        ]
    )
    result = cull_real(*ARGS)
    assert result.exit_code == 0
    assert hub.running() == {"ann/gpu", "bob"}
    assert result.outcomes == {"ann/gpu": "warned", "cat": "culled"}
    assert result.said["ann/gpu"].level == "INFO"
    for words in ("idle 50m", "limit 1h", " 9m"):
        assert words in result.said["ann/gpu"].reason
    assert result.counts == {"running": 3, "due": 1, "culled": 1, "warned": 1}


def test_json_says_when_a_server_is_due(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("ann", "gpu", idle_seconds=NEARLY_DUE)
    result = cull_real(*ARGS, "--json", "-q")
    warned, summary = map(json.loads, result.out.splitlines())
    assert {key: warned[key] for key in ("event", "user", "server", "action", "outcome", "error")} == {
        "event": "server", "user": "ann", "server": "gpu", "action": "stop", "outcome": "warned", "error": None,
    }  # fmt: skip
    model = hub.server("ann", "gpu")
    assert model
    due = datetime.fromisoformat(warned["due"])
    assert due == datetime.fromisoformat(model["last_activity"]).replace(microsecond=0) + timedelta(hours=1)
    assert (summary["planned"], summary["warned"]) == (0, 1)
    assert result.err == ""


def test_each_run_of_once_warns_again(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=NEARLY_DUE)
    for _ in range(2):
        assert cull_scripted(*ARGS).outcomes == {"ann": "warned"}


def test_a_dry_run_shows_the_warning_in_its_table(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=NEARLY_DUE)
    scripted.add("bob", idle=60)
    for more in ([], ["-v"]):
        table = cull_scripted("--dry-run", *ARGS, *more).table
        (row,) = (line for line in table if line.startswith("ann"))
        for words in ("warned", "idle 50m", "limit 1h", " 9m"):
            assert words in row
        assert table[-1].startswith("0 of 2 ")


def test_a_rule_decides_who_is_warned(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for name in ("ann", "bob", "kept"):
        scripted.add(name, idle=NEARLY_DUE)
    result = cull_scripted(*ARGS, "--rule=user=bob timeout=2h", "--rule=user=kept keep")
    assert result.outcomes == {"ann": "warned"}


def test_a_server_on_two_pages_is_warned_once(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=NEARLY_DUE)
    page = scripted.users["ann"], scripted.scopes

    def body(following: object) -> dict[str, object]:
        return {"items": [user_model(*page)], "_pagination": {"offset": 0, "limit": 1, "total": 2, "next": following}}

    scripted.fault("GET", "/users", respond_json(200, body({"offset": 1})), respond_json(200, body(None)))
    result = cull_scripted(*ARGS)
    assert result.counts["warned"] == 1
    assert result.err.count("warned ann") == 1


def test_a_fuse_that_blows_does_not_suppress_warnings(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=NEARLY_DUE)
    scripted.add("bob", idle=LONG_AGO)
    result = cull_scripted(*ARGS, "--max-culls=0")
    assert result.exit_code == 1
    assert result.outcomes == {"ann": "warned"}
    assert scripted.running() == {"ann", "bob"}


def test_an_arbiter_that_fails_is_reported_beside_the_warning_for_the_age(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path
) -> None:
    file = tmp_path / "failing_arbiter.py"
    file.write_text("def decide(): raise OSError('no answer')\n")
    scripted.add("ann", idle=60, age=8 * 3600 - 30)
    result = cull_scripted("--timeout=10m", "--warn-before=15m", "--max-age=8h", f"--arbiter={file}:decide")
    assert result.doubts.number == 1
    assert result.doubts.first.startswith("ann: ")
    assert result.outcomes == {"ann": "warned"}
    assert result.said["ann"].reason.startswith("age 7h59m, limit 8h; ")
    assert result.counts == {"running": 1, "due": 0, "warned": 1}


# In a loop


def nothing() -> None:
    pass


def warned(result: Result) -> list[str]:
    """The servers that a pass warns of."""
    return sorted(name for name, said in result.said.items() if said.outcome == "warned")


@pytest.fixture
def nearly(scripted: ScriptedHub) -> ScriptedHub:
    """The scripted Hub, whose servers ann and bob will be due soon, a user on each page."""
    scripted.add("ann", idle=NEARLY_DUE)
    scripted.add("bob", idle=NEARLY_DUE)
    scripted.page_max = 1
    return scripted


def test_a_server_is_warned_once_until_it_was_active_and_is_idle_again(hub: RealHub, loop: RunLoop) -> None:
    hub.spawn_many([("ann", "", {"idle_seconds": NEARLY_DUE}), ("ann", "gpu", {"idle_seconds": NEARLY_DUE})])
    passes = loop(
        hub,
        *ARGS,
        between=[
            nothing,
            nothing,
            lambda: hub.touch("ann", "gpu"),
            lambda: hub.touch("ann", "gpu", idle_seconds=NEARLY_DUE - 60),
            nothing,
        ],
    ).passes
    assert [warned(each) for each in passes] == [["ann", "ann/gpu"], [], [], [], ["ann/gpu"], []]


def test_what_a_server_says_a_few_seconds_off_causes_no_second_warning(loop: RunLoop, scripted: ScriptedHub) -> None:
    scripted.scopes = [*ALL_SCOPES, "tokens"]
    says = FakeJupyter(NOW)
    scripted.add("ann", age=3 * HOUR, says=says)

    def idle_for(seconds: float) -> Callable[[], None]:
        return lambda: setattr(says, "last_activity", datetime.now(UTC) - timedelta(seconds=seconds))

    idle_for(NEARLY_DUE)()
    between = [idle_for(NEARLY_DUE - 9), idle_for(NEARLY_DUE + 9), idle_for(NEARLY_DUE - 120)]
    passes = loop(scripted, *ARGS, "--idle-by=server", between=between).passes
    assert [warned(each) for each in passes] == [["ann"], [], [], ["ann"]]


def test_a_due_time_that_is_over_when_the_next_differs_a_little_causes_no_second_warning(
    loop: RunLoop, scripted: ScriptedHub
) -> None:
    scripted.add("ann", idle=NEARLY_DUE)
    now = scripted.now

    def the_due_time_passes() -> None:
        server = scripted.users["ann"].servers[""]
        assert isinstance(server.last_activity, datetime)
        server.last_activity += timedelta(seconds=25)
        scripted.now = now + timedelta(seconds=3600 - NEARLY_DUE + 10)

    passes = loop(scripted, *ARGS, between=[the_due_time_passes]).passes
    assert [warned(each) for each in passes] == [["ann"], []]


def test_a_server_that_was_warned_is_kept_from_then_on(loop: RunLoop, nearly: ScriptedHub) -> None:
    first, *others = loop(nearly, *ARGS, "-v", between=[nothing, nothing]).passes
    assert first.outcomes == {"ann": "warned", "bob": "warned"}
    for each in others:
        assert each.outcomes == {"ann": "kept", "bob": "kept"}
        assert each.said["ann"].level == "DEBUG"
        assert "idle 50m" in each.said["ann"].reason


def test_a_server_that_was_warned_is_culled_when_it_is_due(loop: RunLoop, nearly: ScriptedHub) -> None:
    def ten_minutes_pass() -> None:
        server = nearly.users["ann"].servers[""]
        assert isinstance(server.last_activity, datetime)
        server.last_activity -= timedelta(minutes=10)

    first, second = loop(nearly, *ARGS, between=[ten_minutes_pass]).passes
    assert warned(first) == ["ann", "bob"]
    assert second.outcomes == {"ann": "culled"}


def break_off(scripted: ScriptedHub) -> None:
    """The list ends after the first user."""
    scripted.fault("GET", "/users", normal(), respond(500))


def fail(scripted: ScriptedHub) -> None:
    """There is no list."""
    scripted.fault("GET", "/users", respond(500))


def refuse(scripted: ScriptedHub) -> None:
    """There is no connection."""
    scripted.pause_listening()


def skip_bob(scripted: ScriptedHub) -> None:
    """The list looks whole, but bob is not on it: pages shift while servers start and stop."""
    scripted.fault("GET", "/users", normal(), respond_json(200, []))


def bob_in_doubt(scripted: ScriptedHub) -> None:
    """The list's entry for bob is garbage."""
    scripted.fault("GET", "/users", normal(), respond_json(200, [{"name": "bob", "servers": 5}]))


@pytest.mark.parametrize("trouble", [break_off, fail, refuse, skip_bob, bob_in_doubt])
def test_a_pass_that_does_not_see_a_server_causes_no_second_warning(
    loop: RunLoop, nearly: ScriptedHub, trouble: Callable[[ScriptedHub], None]
) -> None:
    passes = loop(
        nearly, *ARGS, between=[lambda: trouble(nearly), nearly.resume, lambda: nearly.add("ann", idle=NEARLY_DUE + 60)]
    ).passes
    assert [warned(each) for each in passes] == [["ann", "bob"], [], [], ["ann"]]


def test_a_server_that_is_idle_again_after_its_time_was_over_is_warned_again(
    loop: RunLoop, nearly: ScriptedHub
) -> None:
    def both_are_active_for_ten_minutes() -> None:
        nearly.touch("ann")
        nearly.touch("bob")
        nearly.now = datetime.now(UTC) + timedelta(minutes=10)

    def fifty_minutes_pass() -> None:
        nearly.now += timedelta(minutes=40)

    passes = loop(nearly, *ARGS, between=[both_are_active_for_ten_minutes, fifty_minutes_pass]).passes
    assert [warned(each) for each in passes] == [["ann", "bob"], [], ["ann", "bob"]]


def test_servers_whose_names_look_alike_are_both_warned(loop: RunLoop, nearly: ScriptedHub) -> None:
    nearly.add("eve", "a\n", idle=NEARLY_DUE)
    nearly.add("eve", r"a\n", idle=NEARLY_DUE + 60)
    first, second = loop(nearly, *ARGS, between=[nothing]).passes
    assert first.err.count(r"warned eve/a\n:") == 2
    assert first.counts["warned"] == 4
    assert warned(second) == []


# The option


@pytest.mark.parametrize(
    ("args", "exit_code"),
    [
        (["--timeout=1h", "--warn-before=59m"], 0),
        (["--timeout=1h", "--warn-before=1h"], 2),
        (["--timeout=1h", "--warn-before=2h"], 2),
        (["--warn-before=15m"], 2),  # --timeout is 10m
        (["--timeout=never", "--max-age=1h", "--warn-before=2h"], 0),
        (["--timeout=0", "--warn-before=15m"], 0),
        (["--timeout=1h", "--warn-before=15m", "--rule=group=gpu timeout=15m"], 2),
        (["--timeout=1h", "--warn-before=15m", "--rule=group=gpu timeout=16m", "--rule=user=a keep"], 0),
        (["--timeout=1h", "--warn-before=15m", "--rule=group=gpu timeout=0"], 0),
        (["--timeout=10m", "--warn-before=15m", "--arbiter=contextlib:nullcontext"], 0),  # instead of --timeout
    ],
)
def test_warn_before_must_be_shorter_than_every_timeout(cull_scripted: Cull, args: list[str], exit_code: int) -> None:
    result = cull_scripted(*args)
    assert result.exit_code == exit_code
    if exit_code:
        assert len(result.lines) == 1
        assert "--warn-before" in result.lines[0]


@pytest.mark.parametrize("value", ["never", "soon", "-1", "400d"])
def test_a_value_that_is_not_a_duration_of_at_most_a_year_is_refused(cull_scripted: Cull, value: str) -> None:
    assert cull_scripted(f"--warn-before={value}").exit_code == 2


def test_without_warn_before_or_with_0_nothing_is_warned(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=3570)
    for args in (["--timeout=1h"], ["--timeout=1h", "--warn-before=0"]):
        assert cull_scripted(*args).outcomes == {}
