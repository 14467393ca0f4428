"""Servers, users and policies for tests of pure decisions."""

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st

from cull_idle import NEVER, Limit, Policy, Server, User

NOW = datetime(2026, 11, 22, 20, tzinfo=UTC)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
POLICY = Policy(timeout=Limit(HOUR), max_age=Limit(NEVER))


def server(idle: timedelta = 2 * HOUR, age: timedelta | None = 3 * HOUR, **fields: Any) -> Server:
    started = None if age is None else NOW - age
    return Server("ann", "", True, "", started, NOW - idle, "", {}, {})._replace(**fields)


def user(idle: timedelta = 2 * HOUR, age: timedelta | None = 3 * HOUR, **fields: Any) -> User:
    created = None if age is None else NOW - age
    return User("ann", False, created, NOW - idle, [], "", {})._replace(**fields)


DURATIONS = st.timedeltas(timedelta(days=-400), timedelta(days=400))
LIMITS = st.builds(Limit, st.just(NEVER) | st.timedeltas(timedelta(0), timedelta(days=400)))
