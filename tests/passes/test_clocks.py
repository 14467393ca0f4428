"""Clocks: the Hub's timestamps and the Hub's clock decide what is due, whatever this machine's clock says."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import Cull, Result
from scripted_hub import HOUR, LONG_AGO, Answer, Exchange, Reply, ScriptedHub, normal, then_do

OFF = [
    pytest.param(timedelta(hours=2), id="2h ahead"),
    pytest.param(timedelta(hours=-2), id="2h behind"),
    pytest.param(timedelta(days=40), id="40 days ahead"),
    pytest.param(timedelta(days=-40), id="40 days behind"),
    pytest.param(timedelta(days=-20000), id="before 1980, like a machine without a clock battery"),
]


def populate(scripted: ScriptedHub) -> None:
    """Servers and users on both sides of each limit, as seen from the Hub."""
    scripted.add("idle", idle=LONG_AGO)
    scripted.add("almost", idle=HOUR - 30)
    scripted.add("just", idle=HOUR + 30)
    scripted.add("busy", idle=0)
    scripted.add("old", idle=0, age=9 * HOUR)
    scripted.add("young", idle=0, age=7 * HOUR)
    scripted.add("pair", idle=LONG_AGO + 1)  # not as idle as others: a table has no order among equals
    scripted.add("pair", "gpu", idle=60)
    scripted.add_user("asleep", idle=LONG_AGO + 2)
    scripted.add_user("awake", idle=60)


ARGUMENTS = ("--timeout", "1h", "--max-age", "8h", "--cull-users")


def plan(cull: Cull, off: timedelta, *arguments: str) -> Result:
    """A dry run for a Hub whose clock is off this machine's, and stands still."""
    with ScriptedHub() as hub:
        hub.now = (datetime.now(UTC) + off).replace(microsecond=0)
        populate(hub)
        return cull("--dry-run", "-v", "--url", hub.url, *ARGUMENTS, *arguments, token=hub.token)


def dated(shift: timedelta | None, of: Reply = Exchange.normal) -> Reply:
    """The answer with a Date that is off the Hub's own clock; None for no Date that could be read."""

    def reply(exchange: Exchange) -> Answer:
        answer = of(exchange)
        date = "" if shift is None else format_datetime(exchange.hub.now + shift, usegmt=True)
        return Answer(answer.status, answer.body, {**answer.headers, "Date": date})

    return reply


@pytest.mark.parametrize("off", OFF)
def test_a_hub_whose_clock_is_off_gets_the_same_decisions_for_the_same_reasons(cull: Cull, off: timedelta) -> None:
    expected, shown = plan(cull, timedelta(0)), plan(cull, off)
    assert (shown.exit_code, shown.out) == (expected.exit_code, expected.out)
    assert (len(expected.warnings), len(shown.warnings)) == (0, 1)
    would_be = {line.split()[0]: line for line in expected.table}
    assert "stopped: idle 2h" in would_be["idle"]
    assert "stopped: age 9h" in would_be["old"]
    assert "kept: idle 59m30s" in would_be["almost"]
    assert "kept: idle 0s" in would_be["busy"]


@pytest.mark.parametrize("off", OFF)
def test_a_hub_whose_clock_is_off_has_the_same_servers_stopped_and_users_deleted(
    cull_scripted: Cull, scripted: ScriptedHub, off: timedelta
) -> None:
    scripted.clock = lambda: datetime.now(UTC) + off
    populate(scripted)
    assert cull_scripted(*ARGUMENTS).exit_code == 0
    assert scripted.running() == {"almost", "busy", "young", "pair/gpu"}
    assert scripted.users.keys() == {"idle", "almost", "just", "busy", "old", "young", "pair", "awake"}


@pytest.mark.parametrize("off", OFF)
def test_who_comes_back_is_spared_whatever_the_hubs_clock(
    cull_scripted: Cull, scripted: ScriptedHub, off: timedelta
) -> None:
    scripted.clock = lambda: datetime.now(UTC) + off
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", then_do(lambda: scripted.touch("ann")))
    result = cull_scripted(*ARGUMENTS)
    assert scripted.running() == {"ann"}
    assert scripted.lines("DELETE") == []
    assert result.outcomes == {"ann": "spared"}


# The second look's Date is not the page's


@pytest.mark.parametrize(
    ("off", "shift"),
    [
        pytest.param(timedelta(0), timedelta(seconds=2), id="2s later"),
        pytest.param(timedelta(0), timedelta(seconds=-2), id="2s earlier"),
        pytest.param(timedelta(0), timedelta(hours=-2), id="2h earlier"),
        pytest.param(timedelta(0), timedelta(hours=2), id="2h later"),
        pytest.param(timedelta(hours=2), None, id="missing, the Hub 2h ahead"),
        pytest.param(timedelta(hours=-2), None, id="missing, the Hub 2h behind"),
    ],
)
def test_who_comes_back_is_spared_whatever_the_second_looks_date(
    cull_scripted: Cull, scripted: ScriptedHub, off: timedelta, shift: timedelta | None
) -> None:
    scripted.clock = lambda: datetime.now(UTC) + off
    scripted.add("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    for name in ("ann", "bob"):
        back = then_do(lambda name=name: scripted.touch(name), normal())  # type: ignore[misc]
        scripted.fault("GET", f"/users/{name}", dated(shift, of=back), times=None)
    assert cull_scripted(*ARGUMENTS).exit_code == 0
    assert scripted.lines("DELETE") == []


@pytest.mark.parametrize(
    ("off", "shift"),
    [
        pytest.param(timedelta(0), timedelta(seconds=2), id="2s later"),
        pytest.param(timedelta(0), timedelta(seconds=-2), id="2s earlier"),
        pytest.param(timedelta(0), timedelta(hours=2), id="2h later"),
        pytest.param(timedelta(hours=-2), None, id="missing, the Hub 2h behind"),
    ],
)
def test_who_stays_idle_is_culled_whatever_the_second_looks_date(
    cull_scripted: Cull, scripted: ScriptedHub, off: timedelta, shift: timedelta | None
) -> None:
    scripted.clock = lambda: datetime.now(UTC) + off
    scripted.add("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    scripted.fault("GET", "/users/.*", dated(shift), times=None)
    assert cull_scripted(*ARGUMENTS).exit_code == 0
    assert scripted.running() == set()
    assert "bob" not in scripted.users


# The Date header


@pytest.mark.parametrize("zone", ["GMT", "+0000", "-0000", "", "+0200", "-0530"])
def test_the_date_header_is_the_hubs_clock_in_any_zone(cull_scripted: Cull, scripted: ScriptedHub, zone: str) -> None:
    scripted.now = datetime(2026, 1, 1, 20, tzinfo=UTC)
    scripted.add("busy", idle=HOUR - 1)
    scripted.add("idle", idle=HOUR)
    offset = {"+0200": timedelta(hours=2), "-0530": -timedelta(hours=5, minutes=30)}.get(zone, timedelta(0))
    scripted.date_header = f"{scripted.now + offset:%a, %d %b %Y %H:%M:%S} {zone}"
    assert cull_scripted("--timeout", "1h", "--dry-run").table[-2].split()[:2] == ["idle", "1h"]
    assert cull_scripted("--timeout", "1h").outcomes == {"idle": "culled"}


def test_a_server_idle_for_exactly_the_timeout_is_counted_as_idle_and_culled(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.now = datetime(2026, 1, 1, 20, tzinfo=UTC)
    scripted.add("ann", idle=HOUR)
    for timeout, count in (("1h", 1), ("1h1s", 0)):
        summary = json.loads(cull_scripted("--json", "--dry-run", "--timeout", timeout).out.splitlines()[-1])
        assert (summary["idle"], summary["planned"]) == (count, count)


@pytest.mark.parametrize("minutes", [-20, 0, 20])
def test_without_a_date_the_local_clock_decides(cull_scripted: Cull, scripted: ScriptedHub, minutes: int) -> None:
    scripted.date_header = None
    scripted.clock = lambda: datetime.now(UTC) + timedelta(minutes=minutes)
    scripted.add("fresh", idle=1200)
    scripted.add("grey", idle=HOUR)  # due by the local clock unless the Hub's is ahead
    scripted.add("stale", idle=LONG_AGO)
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert scripted.running() == ({"fresh", "grey"} if minutes > 0 else {"fresh"})


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
    scripted.add("busy", idle=30 * 60)
    scripted.add("idle", idle=LONG_AGO)
    assert cull_scripted("--timeout", "1h", "--cull-users").exit_code == 0
    assert scripted.running() == {"busy"}


# A Date header may hold any of these. No date is read from them that would be years away, except by chance.
HEADER_TEXT = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HEADER_TEXT)
def test_any_date_header_is_a_clock_or_garbage(cull_scripted: Cull, scripted: ScriptedHub, date: str) -> None:
    scripted.date_header = date
    scripted.add("busy")
    scripted.add("idle", idle=LONG_AGO)
    assert cull_scripted("--timeout", "1h", "--dry-run").table[-2].split()[0] == "idle"
