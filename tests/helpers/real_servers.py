"""Real Jupyter servers of a real Hub, behind a proxy, and what their users do with them."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any
from uuid import uuid4

import requests
import websocket
from hub import RealHub, api_path
from hub.process import free_ports

COMPUTE_SILENTLY = "import time; time.sleep(600)"

# The proxy is PyPI's configurable-http-proxy, which tracks activity as the original does.
PROXY = """
from jupyterhub.proxy import ConfigurableHTTPProxy

c.JupyterHub.proxy_class = ConfigurableHTTPProxy
c.Proxy.should_start = True
c.ConfigurableHTTPProxy.command = [os.path.join(os.path.dirname(sys.executable), "configurable-http-proxy")]
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:PORT"
c.JupyterHub.load_roles.append({"name": "asker", "services": ["culler"], "scopes": ["tokens"]})
"""

SERVERS = """
from jupyterhub.spawner import SimpleLocalProcessSpawner
from process import ForkedProcess, free_ports

class ServerSpawner(SimpleLocalProcessSpawner):
    home_dir_template = os.getcwd() + "/home-{username}"

    async def start(self):
        # What jupyterhub-singleuser runs, without importing it for each server.
        (self.port,) = free_ports(1)
        os.makedirs(self.home_dir, exist_ok=True)
        argv = ["jupyterhub-singleuser"] + self.get_args()
        log = os.path.abspath("log")
        env = self.get_env()
        self.pid = ForkedProcess(sys.executable, "jupyterhub.singleuser", argv, self.home_dir, log, env).pid
        return "127.0.0.1", self.port

    def get_env(self):
        directory = os.getcwd()
        return {
            "IPYTHONDIR": directory,
            "JUPYTER_DATA_DIR": directory,
            "JUPYTER_CONFIG_DIR": directory + "/config-" + self.user.name,
            "JUPYTER_RUNTIME_DIR": directory + "/runtime-" + self.user.name + self.name,
            "JUPYTERHUB_SINGLEUSER_APP": "jupyter_server.serverapp.ServerApp",
            "JUPYTERHUB_ACTIVITY_INTERVAL": str(self.user_options.get("activity_interval", 3600)),
            **super().get_env(),
        }

c.JupyterHub.spawner_class = ServerSpawner
c.JupyterHub.cleanup_servers = True
c.Spawner.args = ["--allow-root"]
"""


def behind_proxy() -> str:
    """RealHub's `extra_config` for a proxy at its `public_url`, and for a culler that may ask servers."""
    return PROXY.replace("PORT", str(free_ports(1)[0]))


def real_servers() -> str:
    """RealHub's `extra_config` for real servers behind a proxy. The Hub hears nothing of what they do.

    Of a server's `user_options`, activity_interval is how often it tells the Hub, in seconds.
    """
    return behind_proxy() + SERVERS


class JupyterServer:
    """A user's default server, as its user's browser uses it."""

    def __init__(self, hub: RealHub, user: str) -> None:
        self._url = hub.public_url + api_path("user", user)
        self._headers = {"Authorization": f"token {hub.api('POST', api_path('users', user, 'tokens')).json()['token']}"}

    def request(self, method: str, path: str) -> Any:
        answer = requests.request(method, f"{self._url}/{path}", headers=self._headers, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def execute(self, code: str, *, until: str) -> None:
        """Run code in a new kernel, and wait until it is "busy" with it, or "idle" again. Then close the tab."""
        header = {"msg_id": uuid4().hex, "msg_type": "execute_request", "session": uuid4().hex, "version": "5.3"}
        request = {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": {"code": code}}
        state = None
        address = (
            f"{self._url.replace('http:', 'ws:')}/api/kernels/{self.request('POST', 'api/kernels')['id']}/channels"
        )
        with closing(websocket.create_connection(address, header=self._headers, timeout=60)) as tab:
            tab.send(json.dumps(request))
            while state != until:
                message = json.loads(tab.recv())
                if message["parent_header"].get("msg_id") == header["msg_id"]:
                    state = message["content"].get("execution_state")
