"""Durations and times: which texts are read, written and refused."""

import re
from datetime import UTC, datetime, timedelta, timezone

import pytest
from click import BadParameter
from hypothesis import given
from hypothesis import strategies as st

from cull_idle import NEVER, format_duration, parse_duration, parse_limit, parse_time

NOW = datetime(2026, 11, 22, 20, 39, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0), ("3600", 3600), ("0.5", 0.5), ("90s", 90), ("15m", 900), ("1.5h", 5400), ("1h30m", 5400),
        ("1h 30m", 5400), ("2d", 172_800), ("1w", 604_800), ("1w2d3h4m5s", 788_645), ("2H", 7200), ("60min", 3600),
        ("1hr", 3600), ("2days", 172_800), ("3 hours 1 minute", 10_860),
        ("1.2096e+06", 1_209_600),  # Helm writes large numbers so
    ],
)  # fmt: skip
def test_a_duration_is_seconds_or_numbers_with_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    ["1M", "", "x", "1x", "-1", "1h-1m", "30m1h", "1h30", "1 2", "1e", "1e-3", "nan", "inf", "٣", "s", ".5", "1,5h"],
)
def test_a_text_that_is_not_a_duration_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(BadParameter, match=re.escape(f"'{text}'")):
        parse_duration(text)


def test_a_duration_is_a_century_at_most() -> None:
    assert parse_duration("36525d") == timedelta(days=36525)
    for text in ("36525d1s", "999999999999d", "9" * 400):
        with pytest.raises(BadParameter, match=f"'{text[:39]}.*too long"):
            parse_duration(text)


def test_a_limit_is_a_duration_or_never() -> None:
    limits = [parse_limit(text) for text in ("never", "NEVER", "1h", "0")]
    assert limits == [NEVER, NEVER, timedelta(hours=1), timedelta(0)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.9, "0s"), (59.9, "59s"), (60, "1m"), (90, "1m30s"), (3600, "1h"), (3605, "1h"), (7380, "2h03m"),
        (11_400, "3h10m"), (100_800, "1d04h"), (86_460, "1d"), (40 * 86_400, "40d"),
    ],
)  # fmt: skip
def test_an_idle_time_is_written_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(timedelta(seconds=seconds), units=2) == text


@given(st.integers(0, 10**9))
def test_a_written_duration_reads_back_as_itself(seconds: int) -> None:
    duration = timedelta(seconds=seconds)
    assert parse_duration(format_duration(duration)) == duration


@given(st.text())
def test_any_text_is_a_duration_or_refused_with_a_sentence(text: str) -> None:
    try:
        duration = parse_duration(text)
    except BadParameter as refusal:
        sentence = refusal.message
    else:
        sentence = f"{duration}."
    assert sentence.isprintable()
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-22T20:39:05Z", NOW),
        ("2026-11-22T20:39:05.000000Z", NOW),
        ("2026-11-22T20:39:05", NOW),
        ("2026-11-22 20:39:05+00:00", NOW),
        ("2026-11-22T22:39:05+02:00", NOW),
        ("20261122T203905Z", NOW),
        *((text, NOW.replace(minute=0, second=0)) for text in ("2026-11-22T20", "2026-11-22T20Z", "20261122T20Z")),
        ("2026-11-22T24:00Z", datetime(2026, 11, 23, tzinfo=UTC)),
        ("2026-11-22T24:00+02:00", datetime(2026, 11, 22, 22, tzinfo=UTC)),
        (None, None),
    ],
)
def test_a_timestamp_is_iso_8601_and_without_a_zone_utc(text: object, moment: datetime | None) -> None:
    assert parse_time(text) == moment


@pytest.mark.parametrize(
    "value", ["", "yesterday", "2026-11-22", "2026", "2026-13-01T00:00:00Z", "20:39:05", 1_700_000_000, True, [], {}]
)
def test_a_value_that_is_not_a_timestamp_is_refused_and_quoted(value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"'{value}'")):
        parse_time(value)


@given(st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=-5, minutes=-30))])))
def test_a_written_timestamp_reads_back_as_itself(moment: datetime) -> None:
    assert parse_time(moment.isoformat()) == moment


@given(st.text())
def test_any_text_is_a_timestamp_or_refused(text: str) -> None:
    try:
        moment = parse_time(text)
    except ValueError:
        return
    assert moment is not None
    assert moment.tzinfo
