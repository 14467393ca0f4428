"""Which servers are stopped and which users deleted: pure decisions, as tables."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cull_idle import (
    NEVER,
    IdleBy,
    Limit,
    OwnActivity,
    Policy,
    Server,
    Source,
    User,
    is_worth_asking,
    judge_server,
    judge_user,
    with_own_activity,
)

NOW = datetime(2026, 11, 22, 20, tzinfo=UTC)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
POLICY = Policy(timeout=Limit(HOUR), max_age=Limit(NEVER))


def server(idle: timedelta = 2 * HOUR, age: timedelta | None = 3 * HOUR, **fields: Any) -> Server:
    started = None if age is None else NOW - age
    values: dict[str, Any] = {
        "user": "ann",
        "name": "",
        "ready": True,
        "pending": "",
        "doubt": "",
        "model": {},
        "user_model": {},
    }
    return Server(**{**values, "started": started, "last_activity": NOW - idle, **fields})


def user(idle: timedelta = 2 * HOUR, age: timedelta | None = 3 * HOUR, **fields: Any) -> User:
    created = None if age is None else NOW - age
    values: dict[str, Any] = {"name": "ann", "admin": False, "servers": [], "doubt": "", "model": {}}
    return User(**{**values, "created": created, "last_activity": NOW - idle, **fields})


@pytest.mark.parametrize(
    ("idle", "age", "policy", "cull", "reason"),
    [
        (2 * HOUR, 3 * HOUR, {}, True, "idle 2h, limit 1h"),
        (HOUR, 3 * HOUR, {}, True, "idle 1h, limit 1h"),
        (HOUR - SECOND, 3 * HOUR, {}, False, "idle 59m59s, limit 1h"),
        (2 * HOUR, None, {}, True, "idle 2h, limit 1h"),
        (2 * HOUR, 3 * HOUR, {"timeout": NEVER}, False, "idle 2h, no limit"),
        (SECOND, 3 * HOUR, {"timeout": NEVER, "max_age": 3 * HOUR}, True, "age 3h, limit 3h"),
        (SECOND, 3 * HOUR, {"max_age": 3 * HOUR}, True, "age 3h, limit 3h"),
        (SECOND, 3 * HOUR - SECOND, {"max_age": 3 * HOUR}, False, "idle 1s, limit 1h"),
        (SECOND, None, {"max_age": 3 * HOUR}, False, "idle 1s, limit 1h"),
        (2 * HOUR, 4 * HOUR, {"max_age": 3 * HOUR}, True, "idle 2h, limit 1h"),
        (timedelta(0), timedelta(0), {"timeout": timedelta(0)}, True, "idle 0s, limit 0s"),
        (-SECOND, -SECOND, {"timeout": timedelta(0)}, True, "idle 0s, limit 0s"),
        (-2 * HOUR, -2 * HOUR, {}, False, "idle 0s, limit 1h"),
    ],
)
def test_the_limits_decide_about_servers_and_users_alike(
    idle: timedelta, age: timedelta | None, policy: dict[str, Any], cull: bool, reason: str
) -> None:
    limits: dict[str, Any] = {name: Limit(duration) for name, duration in policy.items()}
    limited = POLICY._replace(**limits)
    for verdict in (
        judge_server(server(idle, age), limited, NOW),
        judge_user(user(idle, age), limited, NOW),
    ):
        assert (verdict.cull, verdict.reason) == (cull, reason)


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({"pending": "spawn", "ready": False}, {}),
        ({"pending": "stop"}, {}),
        ({"ready": False}, {}),
        ({"doubt": "ready is neither true nor false"}, {}),
        ({"last_activity": None}, {}),
        ({}, {"default_servers": False}),
        ({"name": "gpu"}, {"named_servers": False}),
        ({}, {"kept_by": "rule 1"}),
    ],
)
@pytest.mark.parametrize("limits", [{}, {"timeout": Limit(NEVER), "max_age": Limit(HOUR)}], ids=["idle", "old"])
def test_a_server_past_a_limit_is_kept_for_another_reason(
    fields: dict[str, Any], policy: dict[str, Any], limits: dict[str, Any]
) -> None:
    assert judge_server(server(), POLICY._replace(**limits), NOW).cull
    assert not judge_server(server(**fields), POLICY._replace(**limits, **policy), NOW).cull


@pytest.mark.parametrize("name", ["", "gpu"])
def test_a_flag_for_the_other_kind_of_server_changes_nothing(name: str) -> None:
    policy = POLICY._replace(default_servers=bool(not name), named_servers=bool(name))
    assert judge_server(server(name=name), policy, NOW).cull


@pytest.mark.parametrize("limits", [{}, {"timeout": Limit(NEVER), "max_age": Limit(HOUR)}], ids=["idle", "old"])
def test_an_admin_is_kept_where_admins_are_not_deleted(limits: dict[str, Any]) -> None:
    policy = POLICY._replace(admins=False, **limits)
    assert not judge_user(user(admin=True), policy, NOW).cull
    assert judge_user(user(admin=False), policy, NOW).cull
    assert judge_user(user(admin=True), policy._replace(admins=True), NOW).cull


@pytest.mark.parametrize("fields", [{"doubt": "who knows"}, {"last_activity": None}])
def test_a_user_in_doubt_is_kept(fields: dict[str, Any]) -> None:
    assert not judge_user(user(**fields), POLICY, NOW).cull


def test_a_user_whom_a_rule_keeps_is_kept() -> None:
    assert not judge_user(user(), POLICY._replace(kept_by="rule 1"), NOW).cull


DURATIONS = st.timedeltas(timedelta(days=-400), timedelta(days=400))
LIMITS = st.builds(Limit, st.just(NEVER) | st.timedeltas(timedelta(0), timedelta(days=400)))


@given(
    st.builds(server, DURATIONS, st.none() | DURATIONS, ready=st.booleans(), pending=st.sampled_from(["", "stop"])),
    st.builds(Policy, LIMITS, LIMITS, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["", "rule 1"])),
)
def test_a_server_is_never_stopped_before_a_limit_nor_while_it_is_not_ready(server: Server, policy: Policy) -> None:
    verdict = judge_server(server, policy, NOW)
    if verdict.cull:
        assert server.ready
        assert not server.pending
        assert policy.default_servers
        assert not policy.kept_by
        assert verdict.limit is not None
        measured = verdict.idle if verdict.decided_by == "idle" else verdict.age
        assert measured is not None
        assert measured >= verdict.limit.duration


@pytest.mark.parametrize(
    ("idle_by", "own", "idle", "source"),
    [
        (IdleBy.BOTH, OwnActivity(Source.SERVER, HOUR), HOUR, Source.SERVER),
        (IdleBy.BOTH, OwnActivity(Source.SERVER, 2.5 * HOUR), 2 * HOUR, Source.HUB),
        (IdleBy.SERVER, OwnActivity(Source.SERVER, 2.5 * HOUR), 2.5 * HOUR, Source.SERVER),
        (IdleBy.SERVER, OwnActivity(Source.SERVER, 4 * HOUR), 3 * HOUR, Source.SERVER),
        (IdleBy.KERNELS, OwnActivity(Source.KERNEL), 3 * HOUR, Source.KERNEL),
        (IdleBy.KERNELS, OwnActivity(Source.BUSY_KERNEL, timedelta(0)), timedelta(0), Source.BUSY_KERNEL),
        (IdleBy.SERVER, OwnActivity(Source.NO_ANSWER), 2 * HOUR, Source.NO_ANSWER),
    ],
)
def test_what_the_server_says_becomes_its_last_activity(
    idle_by: IdleBy, own: OwnActivity, idle: timedelta, source: Source
) -> None:
    asked = with_own_activity(server(2 * HOUR, 3 * HOUR), own, idle_by, NOW)
    assert (asked.last_activity, asked.source) == (NOW - idle, source)


def test_a_server_whose_start_is_not_known_runs_since_the_last_activity_that_the_hub_knows() -> None:
    asked = with_own_activity(server(2 * HOUR, None), OwnActivity(Source.KERNEL), IdleBy.KERNELS, NOW)
    assert asked.last_activity == NOW - 2 * HOUR


@pytest.mark.parametrize(
    ("age", "fields", "policy", "worth"),
    [
        (3 * HOUR, {}, {}, True),
        (HOUR - SECOND, {}, {}, False),
        (3 * HOUR, {"ready": False}, {}, False),
        (3 * HOUR, {"pending": "stop"}, {}, False),
        (3 * HOUR, {"doubt": "unknown"}, {}, False),
        (3 * HOUR, {}, {"kept_by": "rule 1"}, False),
        (3 * HOUR, {}, {"timeout": Limit(NEVER)}, False),
        (3 * HOUR, {}, {"timeout": Limit(timedelta(0))}, False),  # due, whatever it says
        (3 * HOUR, {}, {"max_age": Limit(2 * HOUR)}, False),
        (None, {}, {}, True),
    ],
)
def test_a_server_is_asked_only_if_its_word_can_decide(
    age: timedelta | None, fields: dict[str, Any], policy: dict[str, Any], worth: bool
) -> None:
    assert is_worth_asking(server(2 * HOUR, age, **fields), POLICY._replace(**policy), NOW) == worth
