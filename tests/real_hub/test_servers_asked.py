"""--idle-by on real servers with kernels and terminals, behind a real proxy, and a Hub that hears of nothing."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol

import pytest
from hub import RealHub, api_path, full_name
from readme_text import BLOCKS
from real_servers import COMPUTE_SILENTLY, JupyterServer, real_servers
from runs import Cull

pytestmark = pytest.mark.behaviour("--idle-by")

TIMEOUT = 4  # seconds; an idle server's age when it is due

# Terminals print all the time. What the Hub learns of activity counts at once, but it does not ask the proxy: only what
# servers tell it counts.
CONFIG = """
import json

shell = ["sh", "-c", "while echo x; do sleep 0.2; done"]
c.Spawner.args.append("--ServerApp.terminado_settings=" + json.dumps({"shell_command": shell}))
c.JupyterHub.activity_resolution = 0
c.JupyterHub.last_activity_interval = 0
"""

# What the README says for those who may not ask: a server tells the Hub that it is busy.
(OF_SERVERS,) = (block.text for block in BLOCKS if "MappingKernelManager" in block.text)
EVERYONE = {"busy", "busy/lab", "calm", "typist", "back", "honest"}


@pytest.fixture(scope="module")
def people(pytestconfig: pytest.Config) -> Iterator[RealHub]:
    """A Hub, and servers that have been up for long enough to be due. The Hub has heard nothing since their start."""
    python = pytestconfig.getoption("hub_python")
    with RealHub(slow_stop_timeout=30, python=python, extra_config=real_servers() + CONFIG) as hub:
        (hub.directory / "config-honest").mkdir()
        (hub.directory / "config-honest/jupyter_server_config.py").write_text(OF_SERVERS)
        servers = [name.partition("/")[::2] for name in sorted(EVERYONE)]
        hub.spawn_many([(*name, {"activity_interval": 1 if "honest" in name else 3600}) for name in servers])
        JupyterServer(hub, "calm").execute("1 + 1", until="idle")
        for user in ("honest", "busy"):
            JupyterServer(hub, user).execute(COMPUTE_SILENTLY, until="busy")
        JupyterServer(hub, "typist").request("POST", "api/terminals")
        time.sleep(TIMEOUT + 1)  # servers cannot be made to look old
        yield hub


class Asked(NamedTuple):
    """What a run said."""

    exit_code: int
    becomes: dict[str, str]  # outcomes of servers
    figures: dict[str, int]  # of the pass: asked, busy, no_answer
    text: str


class Ask(Protocol):
    """Runs `cull_idle.py ARGS` a moment after `back` came back."""

    def __call__(self, *args: str, token: str | None = None) -> Asked: ...


@pytest.fixture
def ask(cull: Cull, people: RealHub) -> Ask:
    def run(*args: str, token: str | None = None) -> Asked:
        JupyterServer(people, "back").request("GET", "api/contents")
        common = (f"--timeout={TIMEOUT}s", "--url", people.url, "--servers-url", people.public_url)
        result = cull(*common, *args, token=people.culler_token if token is None else token)
        lines = [json.loads(line) for line in result.out.splitlines()] if "--json" in args else []
        becomes = {full_name(e["user"], e["server"]): e["outcome"] for e in lines if e["event"] == "server"}
        figures = {what: lines[-1][what] for what in ("asked", "busy", "no_answer")} if lines else {}
        return Asked(result.exit_code, becomes, figures, result.out + result.err)

    return run


def activity(people: RealHub) -> dict[str, str]:
    """When users were active by the Hub's word, but for those who are all the time."""
    return {u["name"]: u["last_activity"] for u in people.models("users") if u["name"] not in ("back", "honest")}


@pytest.mark.parametrize(
    ("idle_by", "due", "asked", "busy"),
    [
        # What its own server tells it every second keeps `honest`.
        ("hub", EVERYONE - {"honest"}, 0, 0),
        ("both", EVERYONE - {"honest"}, 0, 0),  # due by the Hub's word; looking does not ask
        ("server", {"busy/lab", "calm"}, 6, 2),
        ("kernels", {"busy/lab", "calm", "back"}, 6, 2),
    ],
)
def test_who_is_due(ask: Ask, people: RealHub, idle_by: str, due: set[str], asked: int, busy: int) -> None:
    before = activity(people)
    result = ask("--dry-run", "--json", "--idle-by", idle_by)
    assert activity(people) == before  # being asked is no activity of the user
    assert (result.exit_code, {*result.becomes}) == (0, due), result.text
    assert result.figures == {"asked": asked, "busy": busy, "no_answer": 0}, result.text


def test_what_keeps_a_tab_active_for_the_hub_does_not_count(ask: Ask, people: RealHub) -> None:
    people.touch("calm")
    assert "calm" not in ask("--dry-run", "--json", "--idle-by=both").becomes
    assert "calm" in ask("--dry-run", "--json", "--idle-by=server").becomes
    people.touch("calm", idle_seconds=60)


def test_the_settings_of_the_readme_work_without_any_new_right(people: RealHub) -> None:
    """A server tells the Hub that its kernel is busy."""
    soon = datetime.now(UTC) + timedelta(seconds=2)

    def last_activity() -> datetime:
        return datetime.fromisoformat((people.server("honest") or {})["last_activity"])

    people.wait_until(lambda: last_activity() > soon, "the Hub hears of it")


@pytest.mark.parametrize("lacks", ["--servers-url", '"tokens"'], ids=["the way to servers", "the scope"])
def test_what_is_missing_to_ask_is_named_and_nothing_is_stopped(ask: Ask, people: RealHub, lacks: str) -> None:
    """The Hub's own port does not lead to servers."""
    token = people.user_culler_token if "tokens" in lacks else people.culler_token
    more = ["--servers-url", people.url.removesuffix("/hub/api")] if "url" in lacks else []
    result = ask("--once", "--idle-by=both", *more, token=token)
    assert (result.exit_code, people.running()) == (3, EVERYONE)
    assert lacks in result.text


def test_a_filtered_scope_leaves_the_others_to_the_hub(ask: Ask, people: RealHub) -> None:
    """As the README narrows it: only `busy` is in the group."""
    if people.lacks(feature := "tokens that a narrowed scope allows"):
        pytest.skip(f"this Hub lacks {feature}")
    people.api("POST", "/groups/computing")
    people.api("POST", "/groups/computing/users", json={"users": ["busy"]})
    scopes = ["list:users", "read:users:activity", "read:servers", "delete:servers", "tokens!group=computing"]
    result = ask("--dry-run", "--json", "--idle-by=server", token=people.token_with(*scopes))
    assert (result.exit_code, {*result.becomes}) == (0, {"busy/lab", "calm", "typist", "back"}), result.text
    assert result.figures == {"asked": 6, "busy": 1, "no_answer": 0}


def counted(people: RealHub) -> list[int]:
    """What the Hub and the servers have logged: tokens made and revoked, questions to servers."""
    patterns = (
        r" 201 POST \S+/tokens .*culler@",  # by the Hub's own account
        r" 204 DELETE \S+/tokens/",
        r" GET /user/\S+/api/\w+\?no_track_activity=1",
    )
    return [len(re.findall(pattern, people.log())) for pattern in patterns]


def test_both_stops_only_what_nobody_uses(ask: Ask, people: RealHub) -> None:
    people.users()  # by now all is logged that was answered before
    before = counted(people)
    result = ask("--once", "--json", "--idle-by=both")
    becomes = {"busy": "spared", "busy/lab": "culled", "calm": "culled", "typist": "spared", "back": "spared"}
    assert (result.exit_code, result.becomes) == (0, becomes)
    assert people.running() == {"busy", "typist", "back", "honest"}
    assert result.figures == {"asked": 5, "busy": 1, "no_answer": 0}, result.text
    # A token for each, and none is left. Questions about kernels, terminals and all else; about kernels alone where one
    # is busy. A request is logged after it was answered.
    expected = [count + more for count, more in zip(before, (5, 5, 4 * 3 + 1), strict=True)]
    people.wait_until(lambda: counted(people) == expected, f"not {counted(people)} but {expected}")
    for user in people.users():
        tokens: list[dict[str, Any]] = people.api("GET", api_path("users", user, "tokens")).json()["api_tokens"]
        assert [token["note"] for token in tokens if "idle?" in (token["note"] or "")] == []
