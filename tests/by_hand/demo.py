"""See cull_idle.py at work: starts throw-away Hubs, fills them, and culls them."""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hub import RealHub, full_name
from real_servers import COMPUTE_SILENTLY, JupyterServer, real_servers

ROOT = Path(__file__).parents[2]
MINUTE, HOUR, DAY = 60, 3600, 24 * 3600
REAL_TIMEOUT = 5  # seconds: real servers cannot be made to look old


class Server(NamedTuple):
    """A server of the demo, and what is to become of it: running, starting, stopping or gone."""

    name: str
    server: str
    about: str
    options: dict[str, float]
    after: str

    @property
    def full_name(self) -> str:
        return full_name(self.name, self.server)


def idle(seconds: float, age: float, **options: float) -> dict[str, float]:
    """Half a minute more than asked for, so that the program shows round numbers."""
    return {"idle_seconds": seconds + 30, "age_seconds": age + 30, **options}


SERVERS = [
    Server("ann", "", "busy", idle(0, 2 * HOUR), "running"),
    Server("ann", "gpu", "idle for 2h, beside a busy one", idle(2 * HOUR, DAY), "gone"),
    Server("alice", "", "busy", idle(20, 3 * HOUR), "running"),
    Server("kim", "", "idle for 9h", idle(9 * HOUR, 10 * HOUR), "gone"),
    Server("bob", "", "idle for 72m", idle(72 * MINUTE, 5 * HOUR), "gone"),
    Server("cat", "", "idle for 3h, slow to stop", idle(3 * HOUR, DAY, stop_seconds=5), "stopping"),
    Server("dan", "", "idle for 58m", idle(58 * MINUTE, 4 * HOUR), "running"),
    Server("eve", "", "still starting", idle(8 * HOUR, 8 * HOUR, start_seconds=60), "starting"),
    Server("fay", "", "old, but busy", idle(2 * MINUTE, 20 * DAY), "running"),
    Server("gus", "train", "busy, a named one", idle(5, 6 * HOUR), "running"),
    Server("hal", "notes", "idle for 3 days, a named one", idle(3 * DAY, 4 * DAY), "gone"),
]
COMPUTING = Server("ivy", "", "computes and prints nothing", {}, "running")
WAITING = Server("jon", "", "an idle kernel", {}, "gone")


def states(hub: RealHub) -> dict[str, str]:
    """Of each server by its full name; those that are gone are left out."""
    words = {None: "running", "spawn": "starting", "stop": "stopping"}
    return {
        full_name(user["name"], server): words[model["pending"]]
        for user in hub.models("users")
        for server, model in user["servers"].items()
    }


def cull_idle(hub: RealHub, *arguments: str) -> int:
    """Run the program as a user would, and return its exit code."""
    print(f"\n$ {shlex.join(['cull-idle', *arguments])}", flush=True)
    environment = {key: value for key, value in os.environ.items() if "CULL_IDLE" not in key}
    environment |= {"JUPYTERHUB_API_URL": hub.url, "JUPYTERHUB_API_TOKEN": hub.culler_token}
    command = [sys.executable, str(ROOT / "cull_idle.py"), *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def demo(hub: RealHub) -> bool:
    """Whether all went as it should."""
    print(f"Starting {len(SERVERS)} servers on it, doubles that do nothing and look old.")
    for slow in (True, False):
        servers = [each for each in SERVERS if (each.after == "starting") is slow]
        hub.spawn_many([(each.name, each.server, each.options) for each in servers], wait=not slow)
    before = states(hub)
    print("\nFirst a look at what a timeout of one hour would stop:")
    codes = [cull_idle(hub, "--dry-run", "--timeout", "1h")]
    print("\nNow for real:")
    codes.append(cull_idle(hub, "--once", "--timeout", "1h"))
    return as_expected(hub, SERVERS, before, codes)


def demo_of_real_servers(hub: RealHub) -> bool:
    """The same, where servers compute. --idle-by asks them."""
    print("\nStarting two real Jupyter servers behind a proxy, on a second Hub, each with a kernel.")
    hub.spawn_many([(each.name, each.server, each.options) for each in (COMPUTING, WAITING)])
    JupyterServer(hub, COMPUTING.name).execute(COMPUTE_SILENTLY, until="busy")
    JupyterServer(hub, WAITING.name).execute("1 + 1", until="idle")
    time.sleep(REAL_TIMEOUT + 1)
    before, timeout = states(hub), f"{REAL_TIMEOUT}s"
    print(f"\nBy the Hub's word both are idle, although {COMPUTING.name}'s kernel computes:")
    codes = [cull_idle(hub, "--dry-run", "--timeout", timeout)]
    print("\nNow for real, but ask each server before it is stopped:")
    codes.append(cull_idle(hub, "--once", "--timeout", timeout, "--idle-by", "both", "--servers-url", hub.public_url))
    return as_expected(hub, [COMPUTING, WAITING], before, codes)


def as_expected(hub: RealHub, servers: Sequence[Server], before: dict[str, str], codes: list[int]) -> bool:
    """Show what became of the servers, and return whether that is what was to become of them."""
    row = "{:<12}{:<32}{:<10}{}".format
    after = states(hub)
    print("\nWhat that did:\n\n" + row("SERVER", "", "BEFORE", "AFTER"))
    for each in servers:
        print(row(each.full_name, each.about, before.get(each.full_name, "gone"), after.get(each.full_name, "gone")))
    fine = after == {each.full_name: each.after for each in servers if each.after != "gone"} and not any(codes)
    if not fine:
        print(f"\nNot as expected: see the source of this demo. The exit codes are {codes}.")
    return fine


def keep(hub: RealHub) -> None:
    print(f"""
The Hub is up until Ctrl-C. In another terminal:

export JUPYTERHUB_API_URL={hub.url}
export JUPYTERHUB_API_TOKEN={hub.culler_token}
python {shlex.quote(str(ROOT / "cull_idle.py"))} --dry-run --timeout 1h""")
    with contextlib.suppress(SystemExit):
        signal.pause()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the Hub running until Ctrl-C")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    print("Starting a JupyterHub of its own, on loopback, to be thrown away.")
    # The Hub waits 10 seconds for a server to stop: too long for one that is slow on purpose, too short when busy.
    with RealHub(slow_stop_timeout=2) as hub:
        fine = demo(hub)
        with RealHub(slow_stop_timeout=30, extra_config=real_servers()) as second:
            fine &= demo_of_real_servers(second)
        if arguments.keep:
            keep(hub)
    print("\nThe Hubs are gone again.")
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
