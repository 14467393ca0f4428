"""Clocks: the Hub's timestamps and the Hub's clock decide what is due, whatever this machine's clock says."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import Cull, Result
from scripted_hub import HOUR, LONG_AGO, Answer, Exchange, Reply, ScriptedHub, normal, then_do

NOW = datetime(2026, 1, 1, 20, tzinfo=UTC)
MINUTE = 60
ARGUMENTS = ("--timeout=1h", "--max-age=8h", "--cull-users")
OFF = pytest.mark.parametrize(
    "off",
    [
        pytest.param(timedelta(hours=2), id="2h ahead"),
        pytest.param(timedelta(hours=-2), id="2h behind"),
        pytest.param(timedelta(days=40), id="40 days ahead"),
        pytest.param(timedelta(days=-40), id="40 days behind"),
        pytest.param(timedelta(days=-20000), id="before 1980, like a machine without a clock battery"),
    ],
)


def dated(shift: timedelta | None, of: Reply = Exchange.normal) -> Reply:
    """The answer with a Date that is off the Hub's own clock; None for no Date that could be read."""

    def reply(exchange: Exchange) -> Answer:
        answer = of(exchange)
        date = "" if shift is None else format_datetime(exchange.hub.now + shift, usegmt=True)
        return replace(answer, headers={**answer.headers, "Date": date})

    return reply


def planned(result: Result) -> set[str]:
    """Who is due in a dry run with --json, by user."""
    assert result.exit_code == 0
    *events, _ = map(json.loads, result.out.splitlines())
    return {event["user"] for event in events}


PLAN = ("--dry-run", "--json", "--timeout=1h")


@OFF
def test_a_hub_whose_clock_is_off_gets_the_same_decisions(
    cull_scripted: Cull, scripted: ScriptedHub, off: timedelta
) -> None:
    """Servers and users are on both sides of each limit, as seen from the Hub."""
    scripted.clock = lambda: datetime.now(UTC) + off
    scripted.add("idle", idle=LONG_AGO)
    scripted.add("almost", idle=HOUR - 5 * MINUTE)
    scripted.add("just", idle=HOUR + 30)
    scripted.add("busy", idle=0)
    scripted.add("old", idle=0, age=9 * HOUR + 30)
    scripted.add("young", idle=0, age=7 * HOUR)
    scripted.add("pair", idle=LONG_AGO)
    scripted.add("pair", "gpu", idle=MINUTE)
    scripted.add_user("asleep", idle=LONG_AGO)
    scripted.add_user("awake", idle=MINUTE)
    result = cull_scripted(*ARGUMENTS)
    assert (result.exit_code, len(result.warnings)) == (0, 1)
    culled = dict.fromkeys(["idle", "just", "old", "pair"], "culled")
    assert result.outcomes == {**culled, "user asleep": "deleted"}
    reasons = {"idle": "idle 2h", "just": "idle 1h", "pair": "idle 2h", "old": "age 9h", "user asleep": "idle 2h"}
    assert {name: said.reason.partition(",")[0] for name, said in result.said.items()} == reasons
    assert scripted.running() == {"almost", "busy", "young", "pair/gpu"}
    assert scripted.users.keys() == {"idle", "almost", "just", "busy", "old", "young", "pair", "awake"}


@OFF
def test_who_comes_back_is_spared_whatever_the_hubs_clock(
    cull_scripted: Cull, scripted: ScriptedHub, off: timedelta
) -> None:
    scripted.clock = lambda: datetime.now(UTC) + off
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", then_do(lambda: scripted.touch("ann")))
    assert cull_scripted(*ARGUMENTS).outcomes == {"ann": "spared"}
    assert scripted.lines("DELETE") == []


@pytest.mark.parametrize("comes_back", [True, False], ids=["who comes back is spared", "who stays idle is culled"])
@pytest.mark.parametrize(
    ("off", "shift", "keeps"),
    [
        pytest.param(0, 2, False, id="2s later"),
        pytest.param(0, -2, False, id="2s earlier"),
        pytest.param(0, -2 * HOUR, True, id="2h earlier, which counts"),
        pytest.param(0, 2 * HOUR, False, id="2h later, which does not count"),
        pytest.param(2 * HOUR, None, False, id="missing, the Hub 2h ahead"),
        pytest.param(-2 * HOUR, None, False, id="missing, the Hub 2h behind"),
    ],
)
def test_the_date_of_the_second_look(
    cull_scripted: Cull, scripted: ScriptedHub, off: float, shift: float | None, keeps: bool, comes_back: bool
) -> None:
    scripted.clock = lambda: datetime.now(UTC) + timedelta(seconds=off)
    scripted.add("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    for name in ("ann", "bob"):
        back = then_do(lambda name=name: scripted.touch(name)) if comes_back else normal()  # type: ignore[misc]
        date = None if shift is None else timedelta(seconds=shift)
        scripted.fault("GET", f"/users/{name}", dated(date, of=back), times=None)
    result = cull_scripted(*ARGUMENTS)
    spared = comes_back or keeps
    assert result.outcomes == {"ann": "spared" if spared else "culled", "user bob": "spared" if spared else "deleted"}
    assert len(scripted.lines("DELETE")) == 2 * (not spared)


# The Date header


@pytest.mark.parametrize(
    ("zone", "hours"), [("GMT", 0), ("+0000", 0), ("-0000", 0), ("", 0), ("+0200", 2), ("-0530", -5.5)]
)
def test_the_date_header_is_the_hubs_clock_in_any_zone(
    cull_scripted: Cull, scripted: ScriptedHub, zone: str, hours: float
) -> None:
    scripted.now = NOW
    scripted.add("busy", idle=HOUR - 5 * MINUTE)
    scripted.add("idle", idle=HOUR)
    scripted.date_header = f"{NOW + timedelta(hours=hours):%a, %d %b %Y %H:%M:%S} {zone}"
    assert cull_scripted("--timeout=1h").outcomes == {"idle": "culled"}


def test_a_server_that_has_reached_the_timeout_is_counted_as_idle_and_planned(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.now = NOW
    scripted.add("ann", idle=HOUR)
    for timeout, count in (("1h", 1), ("1h5m", 0)):
        summary = json.loads(cull_scripted("--json", "--dry-run", f"--timeout={timeout}").out.splitlines()[-1])
        assert (summary["idle"], summary["planned"]) == (count, count)


@pytest.mark.parametrize(("minutes", "due"), [(-20, {"grey", "stale"}), (0, {"grey", "stale"}), (20, {"stale"})])
def test_without_a_date_the_local_clock_decides(
    cull_scripted: Cull, scripted: ScriptedHub, minutes: int, due: set[str]
) -> None:
    """The Hub's own clock, by which its times are written, is so many minutes ahead."""
    scripted.date_header = None
    scripted.clock = lambda: datetime.now(UTC) + timedelta(minutes=minutes)
    scripted.add("fresh", idle=20 * MINUTE)
    scripted.add("grey", idle=HOUR)
    scripted.add("stale", idle=LONG_AGO)
    assert planned(cull_scripted(*PLAN)) == due


@pytest.mark.parametrize(
    "date",
    [
        "",
        "now",
        "2026-11-22T21:00:00Z",
        "Mon, 99 Jan 2001 00:00:00 GMT",
        "Mon, 01 Jan 2001 00:00:00 +9999",
        "Mon, 01 Jan 2001 00:00:00 +999999999",
        "Mon, 01 Jan 2001 00:00:00 +99999999999999999999",
        "Mon, 01 Jan 99999999999 00:00:00 GMT",
        "Fri, 31 Dec 9999 23:59:59 GMT",
    ],
)
def test_a_date_header_that_is_garbage_is_the_same_as_none(
    cull_scripted: Cull, scripted: ScriptedHub, date: str
) -> None:
    scripted.date_header = date
    scripted.add("busy", idle=30 * MINUTE)
    scripted.add("idle", idle=LONG_AGO)
    assert cull_scripted("--timeout=1h", "--cull-users").outcomes == {"idle": "culled"}


# A Date header may hold any of these. No date is read from them that would be years away, except by chance.
HEADER_TEXT = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HEADER_TEXT)
def test_any_date_header_is_a_clock_or_garbage(cull_scripted: Cull, scripted: ScriptedHub, date: str) -> None:
    scripted.date_header = date
    scripted.add("busy")
    scripted.add("idle", idle=LONG_AGO)
    assert planned(cull_scripted(*PLAN)) == {"idle"}
