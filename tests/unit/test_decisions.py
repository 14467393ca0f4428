"""What is culled: pure decisions about servers and users, as tables."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from settings import settings_from

from cull_idle import NEVER, Judge, Limit, Policy, Target, Verdict, judge

NOW = datetime(2026, 11, 22, 20, tzinfo=UTC)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)


def server(
    idle: timedelta = 2 * HOUR, age: timedelta | None = 3 * HOUR, name: str | None = "", **fields: Any
) -> Target:
    """A server, or a user if the name is None."""
    born = None if age is None else NOW - age
    return Target(
        "ann", name, **{"ready": True, "born": born, "active": NOW - idle, "user_model": {"name": "ann"}, **fields}
    )


def decide(target: Target, *args: str) -> Verdict:
    return Judge(settings_from("--timeout=1h", *args)).decide(target, NOW)


@pytest.mark.parametrize(
    ("idle", "age", "args", "cull", "reason"),
    [
        (2 * HOUR, 3 * HOUR, [], True, "idle 2h, limit 1h"),
        (HOUR, 3 * HOUR, [], True, "idle 1h, limit 1h"),
        (HOUR - SECOND, 3 * HOUR, [], False, "idle 59m59s, limit 1h"),
        (2 * HOUR, None, [], True, "idle 2h, limit 1h"),
        (2 * HOUR, 3 * HOUR, ["--timeout=never"], False, "idle 2h, no limit"),
        (SECOND, 3 * HOUR, ["--timeout=never", "--max-age=3h"], True, "age 3h, limit 3h"),
        (SECOND, 3 * HOUR, ["--max-age=3h"], True, "age 3h, limit 3h"),
        (SECOND, 3 * HOUR - SECOND, ["--max-age=3h"], False, "idle 1s, limit 1h"),
        (SECOND, 3 * HOUR, ["--max-age=0"], False, "idle 1s, limit 1h"),
        (SECOND, None, ["--max-age=3h"], False, "idle 1s, limit 1h"),
        (2 * HOUR, 4 * HOUR, ["--max-age=3h"], True, "idle 2h, limit 1h"),
        (0 * HOUR, 0 * HOUR, ["--timeout=0"], True, "idle 0s, limit 0s"),
        (-SECOND, -SECOND, ["--timeout=0"], True, "idle 0s, limit 0s"),
        (-2 * HOUR, -2 * HOUR, [], False, "idle 0s, limit 1h"),
    ],
)
@pytest.mark.parametrize("name", ["", "gpu", None], ids=["default server", "named server", "user"])
def test_the_limits_decide_about_servers_and_users_alike(
    idle: timedelta, age: timedelta | None, args: list[str], cull: bool, reason: str, name: str | None
) -> None:
    verdict = decide(server(idle, age, name), *args)
    assert (verdict.cull, verdict.reason) == (cull, reason)


LIMITS = pytest.mark.parametrize("limits", [[], ["--timeout=never", "--max-age=1h"]], ids=["idle", "old"])


@LIMITS
@pytest.mark.parametrize(
    ("fields", "args"),
    [
        ({"pending": "spawn", "ready": False}, []),
        ({"pending": "stop"}, []),
        ({"ready": False}, []),
        ({"doubt": "ready is neither true nor false"}, []),
        ({"active": None}, []),
        ({}, ["--cull-default-servers=false"]),
        ({"name": "gpu"}, ["--cull-named-servers=false"]),
        ({}, ["--rule=user=a* keep"]),
        ({"name": None, "admin": True}, ["--cull-admin-users=false"]),
        ({"name": None, "doubt": "who knows"}, []),
        ({"name": None, "active": None}, []),
        ({"name": None}, ["--rule=user=a* keep"]),
        ({"name": None}, ["--user-timeout=3h", "--user-max-age=4h"]),
    ],
)
def test_what_is_past_a_limit_is_kept_for_another_reason(
    fields: dict[str, Any], args: list[str], limits: list[str]
) -> None:
    assert decide(server(name=fields.get("name", "")), *limits).cull
    assert not decide(server(**fields), *limits, *args).cull


@LIMITS
@pytest.mark.parametrize(
    ("fields", "args"),
    [
        ({}, ["--cull-named-servers=false", "--cull-admin-users=false"]),
        ({"name": "gpu"}, ["--cull-default-servers=false"]),
        ({"name": None}, ["--cull-admin-users=false", "--cull-default-servers=false"]),
        ({"name": None, "admin": True}, []),
        ({"name": None}, ["--rule=user=a* timeout=never max-age=never", "--rule=user=a* keep"]),
        ({}, ["--rule=user=b* keep", "--user-timeout=never", "--user-max-age=never"]),
    ],
)
def test_what_is_for_others_changes_nothing(fields: dict[str, Any], args: list[str], limits: list[str]) -> None:
    assert decide(server(**fields), *limits, *args).cull


DURATIONS = st.timedeltas(timedelta(days=-400), timedelta(days=400))
LIMIT_DURATIONS = st.just(NEVER) | st.timedeltas(timedelta(0), timedelta(days=400))
POLICIES = st.builds(
    Policy,
    st.builds(Limit, st.just("idle"), LIMIT_DURATIONS),
    st.builds(Limit, st.just("age"), LIMIT_DURATIONS),
    st.sampled_from(["", "rule 1"]),
)


@given(
    st.builds(server, DURATIONS, st.none() | DURATIONS, ready=st.booleans(), pending=st.sampled_from(["", "stop"])),
    POLICIES,
)
def test_a_server_is_never_stopped_before_a_limit_nor_while_it_is_not_ready(target: Target, policy: Policy) -> None:
    verdict = judge(target, policy, NOW)
    if verdict.cull:
        assert target.ready
        assert not target.pending
        assert not policy.keep
        assert verdict.limit is not None
        measured = verdict.idle if verdict.limit.of == "idle" else verdict.age
        assert measured is not None
        assert measured >= verdict.limit.duration


@pytest.mark.parametrize(
    ("age", "fields", "args", "worth"),
    [
        (3 * HOUR, {}, [], True),
        (HOUR - SECOND, {}, [], False),
        (3 * HOUR, {"ready": False}, [], False),
        (3 * HOUR, {"pending": "stop"}, [], False),
        (3 * HOUR, {"doubt": "unknown"}, [], False),
        (3 * HOUR, {}, ["--rule=user=a* keep"], False),
        (3 * HOUR, {}, ["--timeout=never"], False),
        (3 * HOUR, {}, ["--timeout=0"], False),  # due, whatever it says
        (3 * HOUR, {}, ["--max-age=2h"], False),
        (None, {}, [], True),
    ],
)
def test_a_server_is_asked_only_if_its_word_can_decide(
    age: timedelta | None, fields: dict[str, Any], args: list[str], worth: bool
) -> None:
    judge_of = Judge(settings_from("--timeout=1h", *args))
    assert judge_of.worth_asking(server(2 * HOUR, age, **fields), NOW) == worth
