"""A throw-away Hub: real, on loopback, with doubles for what it would start and talk to."""

import contextlib
import functools
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import requests

from .process import ForkedProcess, free_ports

CONFIG = Path(__file__).with_name("jupyterhub_config.py")

# What not every Hub since 0.6 has, and the first version that has it.
SINCE = {
    "named servers": (0, 8),
    "a server's own times": (0, 9),  # nor is it known when it started or its user was created
    "sight of pending named servers": (0, 9),
    "removal of named servers": (1, 0),
    "pages": (2, 0),
    "scopes": (2, 0),
    "tokens that a narrowed scope allows": (5, 0),  # before, `tokens!group=…` of a service covered no user
}

# To Hub 0.6, which has no services, all tokens are this user's.
TOKEN_OWNER = "token-owner"

HOUR = 3600
# What `spawn` takes. Half a minute over: times are written in whole minutes, and a test may take some seconds.
IDLE: dict[str, Any] = {"idle_seconds": 2 * HOUR + 90}
IDLE_USER: dict[str, Any] = {**IDLE, "user_idle_seconds": 2 * HOUR + 90, "user_age_seconds": 9 * HOUR + 90}


def full_name(name: str, server: str = "") -> str:
    return f"{name}/{server}" if server else name


def api_path(*segments: str) -> str:
    return "".join("/" + quote(s, safe="") if s.strip(".") else "/" + s.replace(".", "%2E") for s in segments)


def server_path(name: str, server: str) -> str:
    return api_path("users", name, *(["servers", server] if server else ["server"]))


def servers_of(user: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The servers in a user's model by their names, each with at least `ready` and `pending`."""
    # Hub 0.8 lists the ready ones and says no more, those before 0.9 say of the default one what the user's keys do.
    servers = {name: {"ready": True, "pending": None, **server} for name, server in user.get("servers", {}).items()}
    if "created" not in user and (user["server"] or user["pending"]):
        servers[""] = {"ready": not user["pending"], "pending": user["pending"]}
    return servers


class RealHub:
    """A Hub in a process of its own, from __enter__ to __exit__.

    Its database is in a temporary directory, its servers exist only in its own process, and they outlive it: after
    restart() they still run. It ends also when this process is killed.
    """

    def __init__(
        self,
        *,
        slow_stop_timeout: float = 10,  # seconds until it answers 202 to a DELETE
        python: str = sys.executable,  # the interpreter that has the Hub, of any version since 0.6
        named_servers: bool = True,  # whether they are allowed
        internal_ssl: bool = False,  # it and its servers speak TLS only
        base_url: str = "/",  # what comes before hub/ in its paths, with slashes around it
        extra_config: str = "",  # Python, run at the end of its configuration
    ) -> None:
        self._named_servers, self._internal_ssl = named_servers, internal_ssl
        self.admin_token, self.culler_token, self.user_culler_token = (secrets.token_hex(16) for _ in range(3))
        port, public_port, server_port = free_ports(3)
        self.url = f"http{'s' * internal_ssl}://127.0.0.1:{port}{base_url}hub/api"
        self.public_url = f"http://127.0.0.1:{public_port}{base_url}".rstrip("/")  # if extra_config has a proxy there
        self._python = python
        self.environment = {
            **{key: value for key, value in os.environ.items() if "JUPYTERHUB" not in key},
            "REAL_HUB_PORT": str(port),
            "REAL_HUB_PUBLIC_PORT": str(public_port),
            "REAL_HUB_SERVER_PORT": str(server_port),
            "REAL_HUB_NAMED_SERVERS": "yes" * named_servers,
            "REAL_HUB_SLOW_STOP_TIMEOUT": str(slow_stop_timeout),
            "REAL_HUB_ADMIN_TOKEN": self.admin_token,
            "REAL_HUB_CULLER_TOKEN": self.culler_token,
            "REAL_HUB_USER_CULLER_TOKEN": self.user_culler_token,
            "REAL_HUB_EXTRA_CONFIG": "c.JupyterHub.internal_ssl = True\n" * internal_ssl
            + f"c.JupyterHub.base_url = {base_url!r}\n{extra_config}",
            "REAL_HUB_TOKEN_OWNER": TOKEN_OWNER,
        }
        self._process: ForkedProcess | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            directory = tempfile.TemporaryDirectory(prefix="real-hub-", ignore_cleanup_errors=True)
            self.directory = Path(stack.enter_context(directory))  # where the Hub runs
            self.certificates = self.directory / "internal-ssl"  # all of a Hub with internal_ssl
            self._pool = stack.enter_context(ThreadPoolExecutor(10))
            stack.callback(self.stop)
            self.start()
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    # Its process

    def start(self) -> None:
        """Start the Hub, on the same port every time, and wait until it answers."""
        session = requests.Session()
        session.trust_env = False
        session.headers["Authorization"] = f"token {self.admin_token}"
        session.mount(self.url, requests.adapters.HTTPAdapter(pool_maxsize=10))
        if self._internal_ssl:
            session.verify = str(self.certificates / "hub-ca/hub-ca.crt")
            own = self.certificates / "hub-internal/hub-internal"
            session.cert = (f"{own}.crt", f"{own}.key")
        self._session = session
        argv, log = ["jupyterhub", "-f", str(CONFIG)], self.directory / "log"
        self._process = ForkedProcess(self._python, "jupyterhub.app", argv, self.directory, log, self.environment)
        self.wait_until(self._answers, "answers", pause=0.1)

    def stop(self) -> None:
        """Stop the Hub's process; its servers stay, as far as it is concerned."""
        process, self._process = self._process, None
        if process:
            process.stop()
            self._session.close()

    def kill(self) -> None:
        """End the Hub's process, which cleans nothing up."""
        assert self._process
        self._process.kill()
        self.stop()

    def restart(self) -> None:
        self.stop()
        self.start()

    def log(self) -> str:
        """All that the Hub has logged since the first start."""
        return (self.directory / "log").read_text("utf-8", "replace")

    def cpu_seconds(self) -> float:
        """What the Hub's process has used of the processor."""
        assert self._process
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @functools.cached_property
    def version(self) -> tuple[int, ...]:
        return tuple(self._backdoor("about")["version"])

    def lacks(self, feature: str) -> bool:
        """Whether this Hub does not have one of SINCE."""
        return self.version < SINCE[feature] or (feature.endswith("named servers") and not self._named_servers)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):  # not up yet, or it has no certificates yet
            return self._session.get(f"{self.url}/users", timeout=30).ok
        return False

    def wait_until(self, condition: Callable[[], object], what: str, *, pause: float = 0.02) -> None:
        """Wait for a minute at most. An error shows the end of the Hub's log."""
        deadline = time.monotonic() + 60
        while not condition():
            if self._process and not self._process.runs():
                raise RuntimeError(f"the Hub ended:\n{self.log()[-4000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not after a minute: {what}\n{self.log()[-4000:]}")
            time.sleep(pause)

    # Its API, as the admin service

    def api(self, method: str, path: str, *, json: object = None, allow: Sequence[int] = ()) -> requests.Response:
        """One request; raises requests.HTTPError for a status above 399 that is not in `allow`."""
        headers = {"Accept": "application/jupyterhub-pagination+json"}
        request = self._session.prepare_request(requests.Request(method, self.url, headers, json=json))
        request.url = self.url + path  # not before: requests would take the %2E in it for a dot
        answer = self._session.send(request, timeout=60)
        if answer.status_code not in allow:
            answer.raise_for_status()
        return answer

    def models(self, what: str) -> list[dict[str, Any]]:
        """The models of all "users" or "groups", from all pages; without those that the tests' own tokens need."""
        found: list[dict[str, Any]] = []
        while True:
            page = self.api("GET", f"/{what}?limit=200&offset={len(found)}").json()
            if isinstance(page, list):  # Hubs before 2.0
                return [model for model in page if model["name"] != TOKEN_OWNER]
            found += page["items"]
            if not page["_pagination"]["next"]:
                return found

    def users(self) -> set[str]:
        return {user["name"] for user in self.models("users")}

    def running(self) -> set[str]:
        """The full names of all servers that are ready, such as "ann" and "ann/gpu"."""
        return {
            full_name(user["name"], server)
            for user in self.models("users")
            for server, model in servers_of(user).items()
            if model["ready"]
        }

    def server(self, name: str, server: str = "") -> dict[str, Any] | None:
        """The Hub's model of a server that is not stopped."""
        answer = self.api("GET", api_path("users", name), allow=[404])
        if answer.status_code == 404:
            return None
        return servers_of(answer.json()).get(server)

    def named_servers(self, name: str) -> list[str]:
        """The names of a user's named servers, stopped ones too."""
        found: list[str] = self._backdoor("named_servers", name=name)
        return found

    def most_stopping(self) -> int:
        """How many servers were stopping at the same time, at most, since the Hub was empty."""
        return int(self._backdoor("about")["most_stopping"])

    def token_with(self, *scopes: str) -> str:
        """A new token with just these scopes; needs a Hub since 2.0."""
        token: str = self._backdoor("token", scopes=scopes)
        return token

    # Its users and servers

    def add_user(
        self,
        name: str,
        *,
        admin: bool = False,
        idle_seconds: float | None = None,  # None: never active
        age_seconds: float | None = None,
        groups: Sequence[str] = (),
    ) -> None:
        """A user without a server, last active and created that long ago."""
        self.api("POST", api_path("users", name), json={"admin": admin})
        self._backdoor("user", name=name, last_activity=idle_seconds, created=age_seconds)
        for group in groups:
            self.api("POST", api_path("groups", group), allow=[409])
            self.api("POST", api_path("groups", group, "users"), json={"users": [name]})

    def spawn(self, name: str, server: str = "", *, wait: bool = True, **user_options: object) -> None:
        """Start a server, of a user who need not exist yet, and wait until it is ready.

        user_options are the server's; of these the double that stands for it takes note:

        - idle_seconds, age_seconds: it was last active, it started that long ago
          (without age_seconds, it was last active when it started)
        - user_idle_seconds, user_age_seconds: its user was last active, was created
        - start_seconds, stop_seconds: it takes that long to start, to stop
        - then_active: the default server of this user becomes active when it is about to stop

        Without any, the Hub takes those of the last time.
        """
        self.spawn_many([(name, server, user_options)], wait=wait)

    def spawn_many(self, servers: Iterable[tuple[str, str, Mapping[str, object]]], *, wait: bool = True) -> None:
        """Start servers, given as (user, server, user_options), all at the same time.

        Doubles that are ready at once are not started by a Hub since 6.0: it finds them and their users in its
        database, as after its own restart, in half of the time. Not so real servers, and those with certificates.
        """
        servers = list(servers)
        ready = wait and not any("start_seconds" in options for *_, options in servers)
        real = self._internal_ssl or "spawner_class" in self.environment["REAL_HUB_EXTRA_CONFIG"]
        if ready and not real and self.version >= (6,):
            self._backdoor("run", servers=servers)
            return

        names = sorted({name for name, _, _ in servers})
        self.api("POST", "/users", json={"usernames": names}, allow=[400, 409])  # all are there: 400 before 0.9

        def start(server: tuple[str, str, Mapping[str, object]]) -> None:
            self.api("POST", server_path(*server[:2]), json=server[2])

        list(self._pool.map(start, servers))
        if wait:
            wanted = {full_name(name, server) for name, server, _ in servers}
            self.wait_until(lambda: wanted <= self.running(), f"{sorted(wanted)} are ready")
            if self.version < (0, 8):  # ready comes before the last step, see DoubleSpawner.add_poll_callback
                self.wait_until(lambda: bool(self._backdoor("about")["settled"]), "they are as old as they should be")

    def inherit(self, users: Iterable[tuple[str, float, Mapping[str, Mapping[str, object]]]]) -> list[str]:
        """What an older Hub has left, of names that a new one may refuse; needs a Hub since 6.0.

        Users are given as (name, idle_seconds, user_options of their running servers by name), the options with
        idle_seconds. Who is known already is only made idle that long. Returns which users this Hub refuses.
        """
        refused: list[str] = self._backdoor("inherit", users=list(users))
        return refused

    def touch(self, name: str, server: str = "", *, idle_seconds: float = 0) -> None:
        """Make a server last active that long ago, as if it or its proxy had told the Hub."""
        self._backdoor("server", name=name, server=server, last_activity=idle_seconds)

    def make_idle(self, *names: str) -> None:
        """Make users last active hours ago, as if they had not been there since their servers were stopped."""
        for name in names:
            self._backdoor("user", name=name, last_activity=IDLE["idle_seconds"])

    def clear(self) -> None:
        """Delete every user, server and group, whatever is pending; returns when they are gone."""
        self.wait_until(self._cleared, "everything is deleted")
        if self.version < (0, 7):  # no groups
            return
        for group in self.models("groups"):
            self.api("DELETE", api_path("groups", group["name"]))

    def _cleared(self) -> bool:
        users = self.models("users")
        if users:
            self._backdoor("hurry")
            list(self._pool.map(self._delete, users))
        return not users

    def _delete(self, user: Mapping[str, Any]) -> None:
        """Try to, at least: what is pending is left for the next time."""
        servers = servers_of(user)
        if any(server["pending"] for server in servers.values()):
            return
        for server in servers:
            self.api("DELETE", server_path(user["name"], server), allow=[400, 404])
        self.api("DELETE", api_path("users", user["name"]), allow=[400, 404, 500])

    def _backdoor(self, action: str, **arguments: object) -> Any:
        """See BackdoorHandler in doubles.py."""
        return self.api("POST", f"/testing/{action}", json=arguments).json()
