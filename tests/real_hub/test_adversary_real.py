"""Filtered scopes on a real Hub: roles that show a culler everybody, but let it stop or delete only some."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hub import HOUR, IDLE, RealHub
from runs import Cull, Result

TOKENS = {"of-servers": "filtered-token-of-servers", "of-users": "filtered-token-of-users"}
SEE = ["list:users", "read:users:activity", "read:servers"]
ROLES = [
    {"name": "of-servers", "services": ["of-servers"], "scopes": [*SEE, "delete:servers!group=students"]},
    {"name": "of-users", "services": ["of-users"], "scopes": [*SEE, "delete:servers", "delete:users!group=students"]},
]
CONFIG = f"""
c.JupyterHub.services += [dict(name=name, api_token=token) for name, token in {TOKENS!r}.items()]
c.JupyterHub.load_roles += {ROLES!r}
"""


@pytest.fixture(scope="module")
def filtered_hub() -> Iterator[RealHub]:
    with RealHub(extra_config=CONFIG) as hub:
        yield hub


@pytest.fixture
def hub(filtered_hub: RealHub) -> Iterator[RealHub]:
    """A Hub with two students and two teachers, all idle."""
    for name in ("ann", "bob", "cat", "dan"):
        groups = ["students"] if name in ("ann", "bob") else []
        filtered_hub.add_user(name, groups=groups, idle_seconds=2 * HOUR + 90, age_seconds=9 * HOUR)
    yield filtered_hub
    filtered_hub.clear()


def events(result: Result) -> dict[str, str]:
    """The outcome of each server and user."""
    lines = [json.loads(line) for line in result.out.splitlines()]
    return {
        f"{event['event']} {event['user']}" + (f"/{event['server']}" if event["server"] else ""): event["outcome"]
        for event in lines
        if event["event"] != "pass"
    }


def test_a_server_that_the_tokens_filter_leaves_out_has_failed(hub: RealHub, cull: Cull) -> None:
    hub.spawn_many([(name, "", IDLE) for name in ("ann", "bob", "cat", "dan")] + [("dan", "gpu", IDLE)])
    result = cull("--once", "--timeout=1h", "--json", "--url", hub.url, token=TOKENS["of-servers"])
    assert hub.running() == {"cat", "dan", "dan/gpu"}
    assert events(result) == {
        "server ann": "culled",
        "server bob": "culled",
        "server cat": "failed",
        "server dan": "failed",
        "server dan/gpu": "failed",
    }
    assert result.exit_code in (1, 3)
    assert "delete:servers!group=students" in result.err
    # One line for the first of them, another for how many more there are.
    assert len([line for line in result.lines if line.startswith("ERROR")]) <= 2


def test_a_user_whom_the_tokens_filter_leaves_out_has_failed(hub: RealHub, cull: Cull) -> None:
    result = cull("--once", "--timeout=1h", "--json", "--cull-users", "--url", hub.url, token=TOKENS["of-users"])
    assert hub.users() == {"cat", "dan"}
    assert events(result) == {"user ann": "culled", "user bob": "culled", "user cat": "failed", "user dan": "failed"}
    assert result.exit_code in (1, 3)
    assert "delete:users!group=students" in result.err
    assert len([line for line in result.lines if line.startswith("ERROR")]) <= 2


def test_a_user_whose_server_the_tokens_filter_leaves_out_stays(hub: RealHub, cull: Cull) -> None:
    scopes = [*SEE, "delete:servers!group=students", "admin:users"]
    hub.spawn_many([("ann", "", IDLE), ("cat", "", IDLE)])
    result = cull("--once", "--timeout=1h", "--json", "--cull-users", "--url", hub.url, token=hub.token_with(*scopes))
    assert hub.running() == {"cat"}
    assert events(result)["server cat"] == "failed"
    assert "cat" in hub.users()
    assert "delete:servers!group=students" in result.err


@pytest.mark.parametrize("path", ["/users/nobody", "/users/nobody/server"])
def test_a_hubs_own_404_has_its_status_and_perhaps_no_message(hub: RealHub, path: str) -> None:
    """By this a culler tells the Hub's own word from a proxy's."""
    answer = hub.api("DELETE" if "server" in path else "GET", path, allow=[404])
    assert answer.status_code == 404
    assert answer.json() == {"status": 404, "message": None}
