"""--idle-by on real servers: a Hub that hears of nothing, a real proxy, and Jupyter servers with kernels and terminals.

The proxy is PyPI's configurable-http-proxy, which tracks activity as the original does.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests
from hub import RealHub, api_path, free_ports, full_name
from jupyter_client.blocking.client import BlockingKernelClient
from readme_text import BLOCKS
from runs import Cull, Result

BIN = Path(sys.executable).parent
TIMEOUT = 4  # seconds; an idle server's age when it is due
RUNS_ON = "import time; time.sleep(600)"

# As jupyterhub-singleuser does, but without an optional import of jsonschema that takes two seconds.
START_SERVER = """
import sys
sys.modules["rfc3987_syntax"] = None
from jupyterhub.singleuser import main
main()
"""

# Neither the proxy nor the servers tell the Hub of activity, but for the server of `honest`.
CONFIG = f"""
import json
from jupyterhub.proxy import ConfigurableHTTPProxy
from jupyterhub.spawner import SimpleLocalProcessSpawner

class Spawner(SimpleLocalProcessSpawner):
    home_dir_template = os.getcwd() + "/home-{{username}}"

    def get_env(self):
        directory = os.getcwd()
        return {{
            **super().get_env(),
            "IPYTHONDIR": directory,
            "JUPYTER_DATA_DIR": directory,
            "JUPYTER_CONFIG_DIR": directory + "/config-" + self.user.name,
            "JUPYTER_RUNTIME_DIR": directory + "/runtime-" + self.user.name + self.name,
            "JUPYTERHUB_SINGLEUSER_APP": "jupyter_server.serverapp.ServerApp",
            "JUPYTERHUB_ACTIVITY_INTERVAL": str(self.user_options.get("activity_interval", 3600)),
        }}

    def get_args(self):
        shell = ["sh", "-c", "while echo x; do sleep 0.2; done"]
        return ["--allow-root", "--ServerApp.terminado_settings=" + json.dumps({{"shell_command": shell}})]

c.JupyterHub.spawner_class = Spawner
c.Spawner.cmd = [{sys.executable!r}, "-c", {START_SERVER!r}]
c.JupyterHub.cleanup_servers = True
c.JupyterHub.last_activity_interval = 0
c.JupyterHub.proxy_class = ConfigurableHTTPProxy
c.Proxy.should_start = True
c.ConfigurableHTTPProxy.command = [{str(BIN / "configurable-http-proxy")!r}]
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:" + "PROXY_API_PORT_NUMBER"
c.JupyterHub.load_roles.append({{"name": "asker", "services": ["culler"], "scopes": ["tokens"]}})
"""

# What the README says for those who may not ask: the Hub's own word becomes true.
(HONEST,) = (block.text for block in BLOCKS if "BusyIsActive" in block.text)
SHUTS_DOWN_IDLE_KERNELS = """
c.MappingKernelManager.cull_idle_timeout = 5
c.MappingKernelManager.cull_interval = 1
"""


class JupyterServer:
    """One server, as its user's browser uses it."""

    def __init__(self, hub: RealHub, user: str, server: str = "") -> None:
        self._url = f"{hub.public_url}{api_path('user', *filter(None, [user, server]))}"
        self._runtime = hub.directory / f"runtime-{user}{server}"
        self._headers = {"Authorization": f"token {hub.api('POST', api_path('users', user, 'tokens')).json()['token']}"}

    def request(self, method: str, path: str) -> Any:
        answer = requests.request(method, f"{self._url}/{path}", headers=self._headers, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def start_kernel(self) -> Path:
        """Start a kernel; returns its connection file."""
        return self._runtime / f"kernel-{self.request('POST', 'api/kernels')['id']}.json"


def execute(kernel: Path, code: str, *, wait: bool) -> None:
    client = BlockingKernelClient(connection_file=str(kernel))
    client.load_connection_file()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        if wait:
            client.execute_interactive(code, timeout=60)
        else:
            client.execute(code)
    finally:
        client.stop_channels()


@pytest.fixture(scope="module")
def people() -> Iterator[RealHub]:
    """A Hub, and servers that have been up for long enough to be due. The Hub has heard nothing since their start."""
    config = CONFIG.replace("PROXY_API_PORT_NUMBER", str(free_ports(1)[0]))
    with RealHub(extra_config=config) as hub:
        (hub.directory / "config-honest").mkdir()
        (hub.directory / "config-honest/jupyter_server_config.py").write_text(HONEST + SHUTS_DOWN_IDLE_KERNELS)
        options = {"honest": {"activity_interval": 1}}
        servers = [("busy", ""), ("busy", "lab"), ("calm", ""), ("typist", ""), ("back", ""), ("honest", "")]
        hub.spawn_many([(user, server, options.get(user, {})) for user, server in servers])
        execute(JupyterServer(hub, "calm").start_kernel(), "1 + 1", wait=True)
        calm_since = time.monotonic()
        for user in ("honest", "busy"):
            execute(JupyterServer(hub, user).start_kernel(), RUNS_ON, wait=False)
        JupyterServer(hub, "honest").start_kernel()  # and never uses it
        JupyterServer(hub, "typist").request("POST", "api/terminals")
        time.sleep(max(calm_since + TIMEOUT + 1 - time.monotonic(), 0))
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
    assert total(result)["no_answer"] == 0


def test_what_keeps_a_tab_active_for_the_hub_does_not_count(ask: Cull, people: RealHub) -> None:
    people.touch("calm")
    assert "calm" not in outcomes(ask("--dry-run", "--json", "--idle-by=both"))
    assert "calm" in outcomes(ask("--dry-run", "--json", "--idle-by=server"))
    people.touch("calm", idle_seconds=60)


@pytest.mark.parametrize(
    ("name", "words"), [("busy", "kernel busy"), ("typist", "terminal active"), ("back", "says the server")]
)
def test_a_reason_says_what_was_active(ask: Cull, name: str, words: str) -> None:
    assert words in ask("--explain", name, "--idle-by=server").out


def test_idle_kernels_can_be_shut_down_beside_busy_ones(people: RealHub) -> None:
    """The README's settings for servers, in `honest`."""
    deadline = time.monotonic() + 30
    while len(kernels := JupyterServer(people, "honest").request("GET", "api/kernels")) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [kernel["execution_state"] for kernel in kernels] == ["busy"]


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
    people.api("POST", "/groups/computing")
    people.api("POST", "/groups/computing/users", json={"users": ["busy"]})
    scopes = ["list:users", "read:users:activity", "read:servers", "delete:servers", "tokens!group=computing"]
    result = ask("--dry-run", "--json", "--idle-by=server", token=people.token_with(*scopes))
    assert result.exit_code == 0
    assert [total(result)[what] for what in ("asked", "busy", "no_answer")] == [6, 1, 4]
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
    assert (total(result)["asked"], total(result)["busy"], total(result)["no_answer"]) == (5, 1, 0)
    # A token for each, by the Hub's own account, and none is left.
    log = settled_log(people).removeprefix(before)
    assert len(re.findall(r" 201 POST \S+/tokens .*culler@", log)) == 5
    assert len(re.findall(r" 204 DELETE \S+/tokens/", log)) == 5
    # About kernels, terminals and all else; about kernels alone where one is busy.
    assert len(re.findall(r" GET /user/\S+/api/\w+\?no_track_activity=1", log)) == 4 * 3 + 1
    for user in people.users():
        tokens = people.api("GET", api_path("users", user, "tokens")).json()["api_tokens"]
        assert [token["note"] for token in tokens if "idle?" in (token["note"] or "")] == []
