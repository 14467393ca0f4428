"""What JupyterLab's tabs do to idle servers: whom does each --idle-by stop?

Three users, each with a notebook whose kernel is idle: in a visible tab, in a hidden one, and in one that was closed.
A real Hub, proxy and Chromium, with a window on a virtual screen: takes five minutes, and `xvfb-run`. The Hub's
environment needs JupyterLab and ipykernel.

    python tests/by_hand/browser.py --hub-python lab/bin/python --proxy node_modules/.bin/configurable-http-proxy
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import requests
import websocket
from hub import RealHub
from real_servers import JupyterServer, real_servers

ROOT = Path(__file__).parents[2]
MODES = ["hub", "server", "kernels"]
VISIBLE, HIDDEN, CLOSED = "ann", "bob", "cat"
USERS = {VISIBLE: "visible tab", HIDDEN: "hidden tab", CLOSED: "closed tab"}
SETTLES = 150  # seconds; JupyterLab saves the notebook that it has opened, once, after two minutes
OPTIONS = ["--no-sandbox", "--no-first-run", "--remote-debugging-port=0"]
NOTEBOOK = {
    "cells": [],
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}

# The Hub hears of activity every few seconds, instead of every five minutes.
CONFIG = """
c.JupyterHub.last_activity_interval = 5
c.JupyterHub.activity_resolution = 1
"""


class Browser:
    """A Chromium, told what to do by the DevTools protocol, which leaves a hidden tab hidden."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.tell("Browser.close")
        self._socket.close()

    def tell(self, method: str, session: str | None = None, **params: object) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, "sessionId": session}
        self._socket.send(json.dumps({key: value for key, value in message.items() if value is not None}))
        while (answer := json.loads(self._socket.recv())).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def new_profile(self) -> str:
        name: str = self.tell("Target.createBrowserContext")["browserContextId"]
        return name

    def open(self, url: str, profile: str) -> Tab:
        target = self.tell("Target.createTarget", url=url, browserContextId=profile)["targetId"]
        return Tab(self, target, self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])


class Tab:
    """One tab of a browser."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self._browser, self._target, self._session = browser, target, session

    def run(self, script: str) -> Any:
        result = self._browser.tell("Runtime.evaluate", self._session, expression=script, returnByValue=True)
        return result["result"].get("value")

    def go(self, url: str) -> None:
        self._browser.tell("Page.navigate", self._session, url=url)

    def close(self) -> None:
        self._browser.tell("Target.closeTarget", targetId=self._target)


@contextlib.contextmanager
def chromium(command: str) -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as directory:
        process = subprocess.Popen(
            ["xvfb-run", "--auto-servernum", command, *OPTIONS, f"--user-data-dir={directory}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            address = Path(directory) / "DevToolsActivePort"
            wait_for(address.exists, "Chromium")
            port, path = address.read_text().split()
            with Browser(f"ws://127.0.0.1:{port}{path}") as browser:
                yield browser
        finally:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not after {seconds:g}s: {what}")
        time.sleep(0.5)


def open_notebook(hub: RealHub, browser: Browser, user: str, profile: str) -> Tab:
    """Log in, and wait until the notebook's kernel is connected and idle."""
    (hub.directory / f"home-{user}/n.ipynb").write_text(json.dumps(NOTEBOOK))
    tab = browser.open(f"{hub.public_url}/hub/login", profile)
    wait_for(lambda: tab.run("!!document.querySelector('#username_input')"), "the login page")
    tab.run(f"""
        document.querySelector('#username_input').value = '{user}'
        document.querySelector('#password_input').value = 'x'
        document.querySelector('#login_submit').click()
    """)
    wait_for(lambda: "/hub/login" not in tab.run("location.pathname"), f"{user} is logged in")
    tab.go(f"{hub.public_url}/user/{user}/lab/tree/n.ipynb")
    server = JupyterServer(hub, user)

    def ready() -> bool:
        with contextlib.suppress(requests.HTTPError):  # 500 while it starts, seen once
            kernels = server.request("GET", "api/kernels?no_track_activity=1")
            return [(each["execution_state"], each["connections"] > 0) for each in kernels] == [("idle", True)]
        return False

    wait_for(ready, f"the kernel of {user}")
    return tab


def cull_idle(hub: RealHub, *args: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if "CULL_IDLE" not in name}
    environment |= {"JUPYTERHUB_API_URL": hub.url, "JUPYTERHUB_API_TOKEN": hub.culler_token}
    command = [sys.executable, str(ROOT / "cull_idle.py"), "--json", "--quiet", "--servers-url", hub.public_url, *args]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [event for event in map(json.loads, output.splitlines()) if event["event"] == "server"]


def observe(hub: RealHub, browser: Browser, seconds: float) -> None:
    hub.spawn_many([(user, "", {"activity_interval": 5}) for user in USERS])
    profiles = {user: browser.new_profile() for user in USERS}
    tabs = {user: open_notebook(hub, browser, user, profiles[user]) for user in USERS}
    browser.open("about:blank", profiles[HIDDEN])
    tabs[CLOSED].close()
    time.sleep(1)
    for user in (VISIBLE, HIDDEN):
        print(f"{user}: document.visibilityState is {tabs[user].run('document.visibilityState')}")

    timeout = f"--timeout={seconds:g}s"
    time.sleep(SETTLES + seconds)
    judged = {mode: cull_idle(hub, timeout, "--dry-run", "--idle-by", mode) for mode in MODES}
    print("\n| server | " + " | ".join(f"`{mode}`" for mode in MODES) + " |\n" + "| --- " * (len(MODES) + 1) + "|")
    for user, about in USERS.items():
        reasons = {mode: event["reason"] for mode in MODES for event in judged[mode] if event["user"] == user}
        cells = (f"stopped: {reasons[mode]}" if mode in reasons else "kept" for mode in MODES)
        print(f"| {user}, {about} | {' | '.join(cells)} |")
    print()
    for mode in MODES:
        cull_idle(hub, timeout, "--once", "--idle-by", mode)
        print(f"after --once --idle-by {mode}: {' '.join(sorted(hub.running())) or 'none'} left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--proxy", metavar="COMMAND", help="instead of PyPI's in the Hub's environment")
    parser.add_argument("--chromium", default="chromium", metavar="COMMAND")
    parser.add_argument("--timeout", type=float, default=90, metavar="SECONDS")
    options = parser.parse_args()

    config = real_servers() + CONFIG
    if options.proxy:
        config += f"c.ConfigurableHTTPProxy.command = [{str(Path(options.proxy).absolute())!r}]\n"
    with RealHub(python=options.hub_python, extra_config=config) as hub, chromium(options.chromium) as browser:
        print(f"JupyterHub {'.'.join(map(str, hub.version))}, {browser.tell('Browser.getVersion')['product']}")
        observe(hub, browser, options.timeout)


if __name__ == "__main__":
    main()
