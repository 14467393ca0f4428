"""--idle-by on real servers with kernels and terminals, behind a real proxy, and a Hub that hears of nothing."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hub import RealHub, api_path, full_name
from readme_text import BLOCKS
from real_servers import COMPUTE_SILENTLY, JupyterServer, real_servers
from runs import Cull, Result

pytestmark = pytest.mark.behaviour("--idle-by")

TIMEOUT = 4  # seconds; an idle server's age when it is due

# Terminals print all the time, and what the Hub learns of activity counts at once.
CONFIG = """
import json

shell = ["sh", "-c", "while echo x; do sleep 0.2; done"]
c.Spawner.args.append("--ServerApp.terminado_settings=" + json.dumps({"shell_command": shell}))
c.JupyterHub.activity_resolution = 0
"""

# The Hub does not ask the proxy. Only what servers tell it counts.
OF_HUB = "c.JupyterHub.last_activity_interval = 0\n"
# What the README says for those who may not ask: a server tells the Hub that it is busy.
(OF_SERVERS,) = (block.text for block in BLOCKS if "MappingKernelManager" in block.text)


@pytest.fixture(scope="module")
def people(request: pytest.FixtureRequest) -> Iterator[RealHub]:
    """A Hub, and servers that have been up for long enough to be due. The Hub has heard nothing since their start."""
    python = request.config.getoption("hub_python")
    with RealHub(slow_stop_timeout=30, python=python, extra_config=real_servers() + CONFIG + OF_HUB) as hub:
        (hub.directory / "config-honest").mkdir()
        (hub.directory / "config-honest/jupyter_server_config.py").write_text(OF_SERVERS)
        options = {"honest": {"activity_interval": 1}}
        servers = [("busy", ""), ("busy", "lab"), ("calm", ""), ("typist", ""), ("back", ""), ("honest", "")]
        hub.spawn_many([(user, server, options.get(user, {})) for user, server in servers])
        JupyterServer(hub, "calm").execute("1 + 1", until="idle")
        for user in ("honest", "busy"):
            JupyterServer(hub, user).execute(COMPUTE_SILENTLY, until="busy")
        JupyterServer(hub, "typist").request("POST", "api/terminals")
        time.sleep(TIMEOUT + 1)
        yield hub


@pytest.fixture
def ask(cull: Cull, people: RealHub) -> Cull:
    """Run `cull_idle.py ARGS` a moment after `back` came back."""

    def run(*args: str, token: str | None = None, env: Mapping[str, str] | None = None) -> Result:
        JupyterServer(people, "back").request("GET", "api/contents")
        common = (f"--timeout={TIMEOUT}s", "--url", people.url, "--servers-url", people.public_url)
        return cull(*common, *args, token=people.culler_token if token is None else token, env=env)

    return run


def outcomes(result: Result) -> dict[str, str]:
    """What became of each server."""
    events = [json.loads(line) for line in result.out.splitlines()]
    return {full_name(e["user"], e["server"]): e["outcome"] for e in events if e["event"] == "server"}


def total(result: Result) -> dict[str, Any]:
    """The line of the pass."""
    line: dict[str, Any] = json.loads(result.out.splitlines()[-1])
    return line


EVERYONE = {"busy", "busy/lab", "calm", "typist", "back", "honest"}


@pytest.mark.parametrize(
    ("idle_by", "due"),
    [
        # What its own server tells it every second keeps `honest`.
        ("hub", {"busy", "busy/lab", "calm", "typist", "back"}),
        # Due by the Hub's word; looking does not ask.
        ("both", {"busy", "busy/lab", "calm", "typist", "back"}),
        ("server", {"busy/lab", "calm"}),
        ("kernels", {"busy/lab", "calm", "back"}),
    ],
)
def test_who_is_due(ask: Cull, idle_by: str, due: set[str]) -> None:
    result = ask("--dry-run", "--json", "--idle-by", idle_by)
    assert result.exit_code == 0
    assert set(outcomes(result)) == due
    asks = idle_by in ("server", "kernels")
    assert (total(result)["asked"], total(result)["busy"]) == ((6, 2) if asks else (0, 0))
    assert total(result)["no_answer"] == 0, result.err


def test_what_keeps_a_tab_active_for_the_hub_does_not_count(ask: Cull, people: RealHub) -> None:
    people.touch("calm")
    assert "calm" not in outcomes(ask("--dry-run", "--json", "--idle-by=both"))
    assert "calm" in outcomes(ask("--dry-run", "--json", "--idle-by=server"))
    people.touch("calm", idle_seconds=60)


@pytest.mark.parametrize(
    ("name", "words"), [("busy", "kernel busy"), ("typist", "say its terminals"), ("back", "says the server")]
)
def test_a_reason_says_what_was_active(ask: Cull, name: str, words: str) -> None:
    assert words in ask("--explain", name, "--idle-by=server").out


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_settings_of_the_readme_work_without_any_new_right(people: RealHub) -> None:
    """A server tells the Hub that its kernel is busy."""
    soon = datetime.now(UTC) + timedelta(seconds=2)

    def the_hub_hears() -> bool:
        model = people.server("honest")
        assert model
        return datetime.fromisoformat(model["last_activity"]) > soon

    wait_for(the_hub_hears)


def test_the_hubs_own_port_does_not_lead_to_servers(ask: Cull, people: RealHub) -> None:
    result = ask("--once", "--idle-by=both", "--servers-url", people.url.removesuffix("/hub/api"))
    assert result.exit_code == 3
    assert "--servers-url" in result.err
    assert people.running() == EVERYONE


def test_the_scope_is_named_that_is_missing(ask: Cull, people: RealHub) -> None:
    result = ask("--once", "--idle-by=both", token=people.user_culler_token)
    assert result.exit_code == 3
    assert '"tokens"' in result.err
    assert people.running() == EVERYONE


def test_a_filtered_scope_leaves_the_others_to_the_hub(ask: Cull, people: RealHub) -> None:
    """As the README narrows it: only `busy` is in the group."""
    if people.lacks(feature := "tokens that a narrowed scope allows"):
        pytest.skip(f"this Hub lacks {feature}")
    people.api("POST", "/groups/computing")
    people.api("POST", "/groups/computing/users", json={"users": ["busy"]})
    scopes = ["list:users", "read:users:activity", "read:servers", "delete:servers", "tokens!group=computing"]
    result = ask("--dry-run", "--json", "--idle-by=server", token=people.token_with(*scopes))
    assert result.exit_code == 0
    assert [total(result)[what] for what in ("asked", "busy", "no_answer")] == [6, 1, 0], result.err
    assert set(outcomes(result)) == {"busy/lab", "calm", "typist", "back"}


def settled_log(people: RealHub) -> str:
    """All that the Hub has logged: it logs a request after it has answered."""
    log = people.log()
    for _ in range(25):
        time.sleep(0.2)
        log, earlier = people.log(), log
        if log == earlier:
            break
    return log


def test_both_stops_only_what_nobody_uses(ask: Cull, people: RealHub) -> None:
    before = settled_log(people)
    result = ask("--once", "--json", "--idle-by=both")
    assert result.exit_code == 0
    assert outcomes(result) == {
        "busy": "spared",
        "busy/lab": "culled",
        "calm": "culled",
        "typist": "spared",
        "back": "spared",
    }
    assert people.running() == {"busy", "typist", "back", "honest"}
    assert (total(result)["asked"], total(result)["busy"], total(result)["no_answer"]) == (5, 1, 0), result.err
    # A token for each, by the Hub's own account, and none is left.
    log = settled_log(people).removeprefix(before)
    assert len(re.findall(r" 201 POST \S+/tokens .*culler@", log)) == 5
    assert len(re.findall(r" 204 DELETE \S+/tokens/", log)) == 5
    # About kernels, terminals and all else; about kernels alone where one is busy.
    assert len(re.findall(r" GET /user/\S+/api/\w+\?no_track_activity=1", log)) == 4 * 3 + 1
    for user in people.users():
        tokens = people.api("GET", api_path("users", user, "tokens")).json()["api_tokens"]
        assert [token["note"] for token in tokens if "idle?" in (token["note"] or "")] == []
