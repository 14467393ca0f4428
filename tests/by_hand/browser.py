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
from typing import Any, NamedTuple

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
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
NOTEBOOK = {"cells": [], "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}

# The Hub hears of activity every few seconds, instead of every five minutes.
CONFIG = """
c.JupyterHub.last_activity_interval = 5
c.JupyterHub.activity_resolution = 1
"""


class Browser:
    """A Chromium, told what to do by the DevTools protocol, which leaves a hidden tab hidden."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self._count = 0

    def tell(self, method: str, session: str = "", **params: object) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        self.socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while (answer := json.loads(self.socket.recv())).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, url: str, profile: str) -> Tab:
        target = self.tell("Target.createTarget", url=url, browserContextId=profile)["targetId"]
        return Tab(self, target, self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])


class Tab(NamedTuple):
    """One tab of a browser."""

    browser: Browser
    target: str
    session: str

    def run(self, script: str) -> Any:
        result = self.browser.tell("Runtime.evaluate", self.session, expression=script, returnByValue=True)
        return result["result"].get("value")


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
            browser = Browser(f"ws://127.0.0.1:{port}{path}")
            with contextlib.closing(browser.socket):
                yield browser
                browser.tell("Browser.close")
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
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
    browser.tell("Page.navigate", tab.session, url=f"{hub.public_url}/user/{user}/lab/tree/n.ipynb")
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
    profiles = {user: browser.tell("Target.createBrowserContext")["browserContextId"] for user in USERS}
    tabs = {user: open_notebook(hub, browser, user, profiles[user]) for user in USERS}
    browser.open("about:blank", profiles[HIDDEN])
    browser.tell("Target.closeTarget", targetId=tabs[CLOSED].target)
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
