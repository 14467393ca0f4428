"""--warn-before: a server that is kept, and due soon if nothing happens, is reported once per idle spell."""

from __future__ import annotations

import json
import re
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import TIMESTAMP, Cull
from hub import RealHub
from hypothesis import given
from hypothesis import strategies as st
from scripted_hub import ScriptedHub, normal, respond, respond_json, user_model
from servers_and_policies import DURATIONS, HOUR, LIMITS, NOW, POLICY, SECOND, server

import cull_idle
from cull_idle import NEVER, ZERO, Arbiter, Limit, Policy, due_soon, judge_server

MINUTE = timedelta(minutes=1)
QUARTER = 15 * MINUTE
LONG = 2 * HOUR

# Which server is due soon: pure decisions, as tables


def soon(within: timedelta = QUARTER, policy: Policy = POLICY, **fields: Any) -> tuple[timedelta, str] | None:
    """In how long the server will be due, and the reason that is given now."""
    it = server(**fields)
    found = due_soon(it, judge_server(it, policy, NOW), policy, NOW, within)
    return found and (found[0] - NOW, found[1].reason)


def limited(timeout: timedelta = HOUR, max_age: timedelta = NEVER, **fields: Any) -> Policy:
    return POLICY._replace(timeout=Limit(timeout), max_age=Limit(max_age), **fields)


@pytest.mark.parametrize(
    ("idle", "age", "policy", "due_in", "reason"),
    [
        # the idle limit
        (50 * MINUTE, LONG, limited(), 10 * MINUTE, "idle 50m, limit 1h"),
        (45 * MINUTE, LONG, limited(), 15 * MINUTE, "idle 45m, limit 1h"),
        (45 * MINUTE - SECOND, LONG, limited(), None, ""),
        (HOUR - SECOND, LONG, limited(), SECOND, "idle 59m59s, limit 1h"),
        (50 * MINUTE, None, limited(), 10 * MINUTE, "idle 50m, limit 1h"),
        (ZERO, LONG, limited(), None, ""),
        (50 * MINUTE, LONG, limited(NEVER), None, ""),
        # the age
        (ZERO, 8 * HOUR - MINUTE, limited(NEVER, 8 * HOUR), MINUTE, "age 7h59m, limit 8h"),
        (ZERO, 7 * HOUR, limited(NEVER, 8 * HOUR), None, ""),
        (ZERO, None, limited(NEVER, 8 * HOUR), None, ""),
        # both: whichever comes first
        (50 * MINUTE, 8 * HOUR - MINUTE, limited(HOUR, 8 * HOUR), MINUTE, "age 7h59m, limit 8h"),
        (58 * MINUTE, 8 * HOUR - 5 * MINUTE, limited(HOUR, 8 * HOUR), 2 * MINUTE, "idle 58m, limit 1h"),
        (55 * MINUTE, 8 * HOUR - 5 * MINUTE, limited(HOUR, 8 * HOUR), 5 * MINUTE, "idle 55m, limit 1h"),
        (10 * MINUTE, 8 * HOUR - 5 * MINUTE, limited(HOUR, 8 * HOUR), 5 * MINUTE, "age 7h55m, limit 8h"),
        # a limit of a rule
        (50 * MINUTE, LONG, POLICY._replace(timeout=Limit(HOUR, " by rule 1: x")), 10 * MINUTE,
         "idle 50m, limit 1h by rule 1: x"),
        # clocks that differ
        (-5 * MINUTE, LONG, limited(10 * MINUTE), 15 * MINUTE, "idle 0s, limit 10m"),
        (-timedelta(days=400), None, limited(), None, ""),
    ],
)  # fmt: skip
def test_when_it_is_due_and_why(
    idle: timedelta, age: timedelta | None, policy: Policy, due_in: timedelta | None, reason: str
) -> None:
    assert soon(idle=idle, age=age, policy=policy) == (due_in and (due_in, reason))


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({"pending": "stop"}, {}),
        ({"pending": "spawn", "ready": False}, {}),
        ({"ready": False}, {}),
        ({"doubt": "ready is neither true nor false"}, {}),
        ({"last_activity": None}, {}),
        ({}, {"default_servers": False}),
        ({"name": "gpu"}, {"named_servers": False}),
        ({}, {"kept_by": "rule 1: user=ann keep"}),
        ({}, {"timeout": Limit(NEVER)}),
    ],
)
def test_what_is_kept_for_another_reason_than_its_time_is_not_due_soon(
    fields: dict[str, Any], policy: dict[str, Any]
) -> None:
    assert soon(idle=50 * MINUTE) is not None
    assert soon(idle=50 * MINUTE, policy=POLICY._replace(**policy), **fields) is None


@pytest.mark.parametrize("says_now", [False, True])
def test_what_an_arbiter_will_say_nobody_knows_but_the_age_counts(says_now: bool) -> None:
    arbiter = Arbiter(lambda **_: says_now, frozenset())
    assert soon(idle=50 * MINUTE, policy=limited(arbiter=arbiter)) is None
    old = limited(max_age=8 * HOUR, arbiter=arbiter)
    assert soon(idle=50 * MINUTE, age=8 * HOUR - MINUTE, policy=old) == (MINUTE, "age 7h59m, limit 8h")


FAR = [
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC),
    datetime(1, 1, 1, tzinfo=timezone(14 * HOUR)),
    datetime(9999, 12, 31, 23, tzinfo=timezone(-14 * HOUR)),
]


@pytest.mark.parametrize("moment", FAR, ids=str)
@pytest.mark.parametrize("now", [NOW, datetime(1, 1, 1, tzinfo=UTC), datetime(cull_idle.LAST_YEAR, 12, 31, tzinfo=UTC)])
@pytest.mark.parametrize("limit", [NEVER, NEVER - SECOND, timedelta(days=9_000 * 365), HOUR], ids=str)
def test_far_dates_and_long_limits_are_no_trouble(moment: datetime, now: datetime, limit: timedelta) -> None:
    policy = limited(limit, limit)
    it = server(last_activity=moment, started=moment)
    verdict = judge_server(it, policy, now)
    if not verdict.cull:
        found = due_soon(it, verdict, policy, now, cull_idle.LONGEST)
        assert found is None or now < found[0] <= now + cull_idle.LONGEST


@given(
    st.builds(server, DURATIONS, st.none() | DURATIONS, ready=st.booleans(), pending=st.sampled_from(["", "stop"])),
    st.builds(
        Policy, LIMITS, LIMITS, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["", "rule 1"]), st.none()
    ),
    st.timedeltas(SECOND, timedelta(days=365)),
)
def test_it_is_culled_at_the_moment_that_is_told_and_not_before(
    it: cull_idle.Server, policy: Policy, within: timedelta
) -> None:
    now_kept = judge_server(it, policy, NOW)
    if now_kept.cull:
        return
    found = due_soon(it, now_kept, policy, NOW, within)
    assert (found is not None) == judge_server(it, policy, NOW + within).cull
    if found:
        due, _ = found
        assert NOW < due <= NOW + within
        assert judge_server(it, policy, due).cull
        assert not judge_server(it, policy, due - timedelta(microseconds=1)).cull


# What a pass says

ARGS = ("--timeout=1h", "--warn-before=15m")
NEARLY = 50 * 60.0 + 30  # seconds; half a minute over, as in the tests of the real Hub


def untimed(lines: list[str]) -> list[str]:
    return [re.sub(r" in \d+\.\ds$", "", line) for line in lines]


def test_it_is_reported_and_not_stopped_and_one_that_is_due_is_stopped_and_not_reported(
    hub: RealHub, cull_real: Cull
) -> None:
    hub.spawn_many(
        [
            ("ann", "gpu", {"idle_seconds": NEARLY}),
            ("bob", "", {"idle_seconds": 60}),
            ("cat", "", {"idle_seconds": 7290}),
        ]
    )
    result = cull_real(*ARGS)
    assert result.exit_code == 0
    assert hub.running() == {"ann/gpu", "bob"}
    warned, culled, summary = untimed(result.lines)
    assert re.fullmatch(r"INFO     warned ann/gpu: idle 50m\d\ds, limit 1h; due in 9m\d\ds", warned)
    assert culled == "INFO     culled cat: idle 2h01m, limit 1h"
    assert summary == "INFO     pass: 3 running, 1 due, 1 culled, 1 warned"


def test_json_says_when_it_is_due(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("ann", "gpu", idle_seconds=NEARLY)
    result = cull_real(*ARGS, "--json", "-q")
    warned, summary = map(json.loads, result.out.splitlines())
    assert {key: warned[key] for key in ("event", "user", "server", "action", "outcome", "error")} == {
        "event": "server", "user": "ann", "server": "gpu", "action": "stop", "outcome": "warned", "error": None,
    }  # fmt: skip
    model = hub.server("ann", "gpu")
    assert model
    due = datetime.fromisoformat(warned["due"])
    assert due == datetime.fromisoformat(model["last_activity"]).replace(microsecond=0) + HOUR
    assert (summary["planned"], summary["warned"]) == (0, 1)
    assert result.err == ""


def test_each_run_of_once_reports_it(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=NEARLY)
    for _ in range(2):
        assert "warned ann: idle 50m" in cull_scripted(*ARGS).err


def test_a_dry_run_shows_it_in_the_table_and_in_json(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=NEARLY)
    scripted.add("bob", idle=60)
    for more in ([], ["-v"]):
        table = cull_scripted("--dry-run", *ARGS, *more).table
        (row,) = (line for line in table if line.startswith("ann"))
        assert re.search(r"  warned: idle 50m\d\ds, limit 1h; due in 9m\d\ds$", row)
        assert table[-1] == "0 of 2 running servers would be stopped."
    warned, summary = map(json.loads, cull_scripted("--dry-run", "--json", *ARGS).out.splitlines())
    assert (warned["user"], warned["outcome"]) == ("ann", "warned")
    assert warned["due"]
    assert summary["event"] == "pass"


def test_the_limit_of_a_rule_counts(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for name in ("ann", "bob", "kept"):
        scripted.add(name, idle=NEARLY)
    result = cull_scripted(*ARGS, "--rule=user=bob timeout=2h", "--rule=user=kept keep")
    assert re.findall(r"warned (\w+):", result.err) == ["ann"]
    scripted.add("bob", idle=NEARLY + 3600)
    result = cull_scripted(*ARGS, "--rule=user=bob timeout=2h", "--rule=user=ann keep", "--rule=user=kept keep")
    (line,) = (line for line in result.lines if "warned bob" in line)
    assert "bob: idle 1h50m, limit 2h by rule 1: user=bob timeout=2h; due in 9m" in line


def test_a_server_on_two_pages_is_reported_once(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=NEARLY)
    page = scripted.users["ann"], scripted.scopes

    def body(following: object) -> dict[str, object]:
        return {"items": [user_model(*page)], "_pagination": {"offset": 0, "limit": 1, "total": 2, "next": following}}

    scripted.fault("GET", "/users", respond_json(200, body({"offset": 1})), respond_json(200, body(None)))
    assert cull_scripted(*ARGS).err.count("warned ann") == 1


def test_a_fuse_that_blows_does_not_keep_it_from_being_reported(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=NEARLY)
    scripted.add("bob", idle=7230)
    result = cull_scripted(*ARGS, "--max-culls=0")
    assert result.exit_code == 1
    assert "warned ann" in result.err
    assert scripted.running() == {"ann", "bob"}


def test_an_arbiter_that_fails_is_told_of_though_the_server_is_due_by_its_age(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path
) -> None:
    file = tmp_path / "failing_arbiter.py"
    file.write_text("def decide(): raise OSError('no answer')\n")
    scripted.add("ann", idle=60, age=8 * 3600 - 30)
    result = cull_scripted("--timeout=10m", "--warn-before=15m", "--max-age=8h", f"--arbiter={file}:decide")
    doubt, warned, summary = untimed(result.lines)
    assert doubt == "WARNING  kept 1 in doubt; the first: ann: the arbiter failed: OSError: no answer"
    assert warned.startswith("INFO     warned ann: age 7h59m, limit 8h; due in ")
    assert summary.endswith("1 running, 0 due, 1 warned")


# In a loop


class Loop:
    """The passes of a loop, one at a time, and what each says."""

    def __init__(self, hub: RealHub | ScriptedHub, capsys: pytest.CaptureFixture[str], *args: str) -> None:
        ctx = cull_idle.make_command().make_context(cull_idle.PROGRAM, ["--url", hub.url, *ARGS, *args])
        self.culler = cull_idle.Culler(cull_idle.Settings(**ctx.params), threading.Event())
        self.capsys = capsys

    def make_pass(self) -> list[str]:
        cull_idle.open_log(self.culler.settings.level)  # where stderr is now
        self.capsys.readouterr()
        self.culler.report.result(self.culler.make_pass())
        return TIMESTAMP.sub("", self.capsys.readouterr().err).splitlines()

    def warned(self) -> list[str]:
        """The servers that a pass warns of."""
        return sorted(match[1] for line in self.make_pass() if (match := re.match(r"INFO +warned ([^:]+):", line)))


@pytest.fixture
def loop(scripted: ScriptedHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Loop:
    """A loop on the scripted Hub, whose servers ann and bob will be due soon, a user on each page."""
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", scripted.token)
    monkeypatch.setattr(cull_idle, "PAUSES", ())
    scripted.add("ann", idle=NEARLY)
    scripted.add("bob", idle=NEARLY)
    return Loop(scripted, capsys, "--api-page-size=1", "-v")


def test_it_is_reported_once_until_it_was_active_and_is_idle_again(
    hub: RealHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", hub.culler_token)
    hub.spawn_many([("ann", "", {"idle_seconds": NEARLY}), ("ann", "gpu", {"idle_seconds": NEARLY})])
    loop = Loop(hub, capsys)
    assert loop.warned() == ["ann", "ann/gpu"]
    assert loop.warned() == loop.warned() == []
    hub.touch("ann", "gpu")
    assert loop.warned() == []
    hub.touch("ann", "gpu", idle_seconds=NEARLY)
    assert loop.warned() == ["ann/gpu"]
    assert loop.warned() == []


def test_one_that_was_reported_is_among_the_kept_from_then_on(loop: Loop) -> None:
    assert not [line for line in loop.make_pass() if "kept ann" in line]
    for _ in range(2):
        (line,) = (line for line in loop.make_pass() if "ann" in line)
        assert re.fullmatch(r"DEBUG    kept ann: idle 50m\d\ds, limit 1h", line)


def test_it_is_culled_when_its_time_has_come(loop: Loop, scripted: ScriptedHub) -> None:
    assert loop.warned() == ["ann", "bob"]
    server = scripted.users["ann"].servers[""]
    assert isinstance(server.last_activity, datetime)
    server.last_activity -= timedelta(minutes=10)
    assert [line for line in loop.make_pass() if "ann" in line] == ["INFO     culled ann: idle 1h, limit 1h"]


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
    """What the list says of bob makes no sense."""
    scripted.fault("GET", "/users", normal(), respond_json(200, [{"name": "bob", "servers": 5}]))


@pytest.mark.parametrize("trouble", [break_off, fail, refuse, skip_bob, bob_in_doubt])
def test_a_pass_that_does_not_see_it_makes_no_other_report_of_it(
    loop: Loop, scripted: ScriptedHub, trouble: Any
) -> None:
    assert loop.warned() == ["ann", "bob"]
    trouble(scripted)
    assert loop.warned() == []
    scripted.resume()
    assert loop.warned() == []
    scripted.add("ann", idle=NEARLY + 60)
    assert loop.warned() == ["ann"]


def test_nothing_is_remembered_of_what_is_over(loop: Loop, scripted: ScriptedHub) -> None:
    assert loop.warned() == ["ann", "bob"]
    assert len(loop.culler._warned) == 2
    scripted.touch("ann")
    scripted.touch("bob")
    scripted.now = datetime.now(UTC) + timedelta(minutes=10)
    loop.make_pass()
    assert loop.culler._warned == {}


def test_servers_whose_names_look_alike_are_told_apart(loop: Loop, scripted: ScriptedHub) -> None:
    scripted.add("eve", "a\n", idle=NEARLY)
    scripted.add("eve", r"a\n", idle=NEARLY + 60)
    assert loop.warned() == ["ann", "bob", r"eve/a\n", r"eve/a\n"]
    assert loop.warned() == []


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
def test_it_must_be_shorter_than_every_timeout(cull_scripted: Cull, args: list[str], exit_code: int) -> None:
    result = cull_scripted(*args)
    assert result.exit_code == exit_code
    if exit_code:
        assert len(result.lines) == 1


def test_the_sentence_says_what_is_wrong(cull_scripted: Cull) -> None:
    assert cull_scripted("--timeout=1h", "--warn-before=1h").err == (
        "cull_idle.py: --warn-before must be shorter than --timeout and each rule's timeout=,"
        " or it would warn of servers in use.\n"
    )


@pytest.mark.parametrize("value", ["never", "soon", "-1", "400d"])
def test_what_is_no_duration_of_at_most_a_year_is_refused(cull_scripted: Cull, value: str) -> None:
    assert cull_scripted(f"--warn-before={value}").exit_code == 2


def test_without_it_or_with_0_nothing_is_reported(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=3570)
    for args in (["--timeout=1h"], ["--timeout=1h", "--warn-before=0"]):
        assert "warned" not in cull_scripted(*args).err
