"""Thousands of passes over a Hub that fails at random, and whether memory, open files or threads grow. By hand:

    python tests/by_hand/soak.py --passes 2000

The Hub is a process of its own, so that what is measured is the program alone. It prints a table and exits with 1 if
memory, files or threads grew from the second quarter of the passes to the last.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import scripted_hub as scripted

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cull_idle  # noqa: E402

TOKEN = "scripted-token"
OPTIONS = ["--timeout=1h", "--cull-users", "--api-page-size=20", "--request-timeout=0.2s", "--json"]
OPTIONS.append("--log-level=critical")  # which nothing is logged at
USERS = 60
FAULTS: list[scripted.Reply] = [
    scripted.respond(429, headers={"Retry-After": "0"}),
    *map(scripted.respond, (500, 502, 503)),
    scripted.reset(),
    scripted.reset_in_body(),
    scripted.done_but_lost(),
    scripted.truncated(),
    scripted.html(),
    scripted.redirect("http://127.0.0.1:1/"),
    scripted.hang(0.3),
]
PLACES = [
    ("GET", "/user"),
    ("GET", r"/users(\?.*)?"),
    ("GET", "/users/.*"),
    ("DELETE", "/users/.*/server.*"),
    ("DELETE", "/users/[^/]*"),
]
ALLOWED = {"RSS MiB": 2.0, "files": 0.0, "threads": 0.0}  # what may grow by how much
ROW = ("{:>10}" * 6).format


def serve(orders: Connection, seed: int) -> None:
    """Be the Hub; at each order let users come back and fail in new ways, until the other end is closed."""
    chance = random.Random(seed)
    with scripted.ScriptedHub(TOKEN) as hub, suppress(EOFError):
        hub.recording = False
        orders.send(hub.url)
        while True:
            orders.recv()
            live_on(hub, chance)
            orders.send(None)


def live_on(hub: scripted.ScriptedHub, chance: random.Random) -> None:
    """Some users come back, idle or not, and the faults of the last pass give way to others."""
    hub._faults.clear()
    for _ in range(chance.randrange(20)):
        idle = chance.choice([0.0, 60.0, scripted.LONG_AGO, scripted.LONG_AGO])
        hub.add(f"user-{chance.randrange(USERS)}", chance.choice(["", "gpu"]), idle=idle)
    for _ in range(chance.randrange(4)):
        before = [scripted.normal()] * chance.randrange(5)
        hub.fault(*chance.choice(PLACES), *before, *[chance.choice(FAULTS)] * chance.randrange(1, 6))


def sample() -> tuple[float, ...]:
    """What this process holds, in the order of ALLOWED."""
    gc.collect()  # closes connections that failed, which would otherwise wait for their turn
    status = Path("/proc/self/status").read_text()
    [rss] = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(rss) / 1024, len([*Path("/proc/self/fd").iterdir()]), threading.active_count()


def soak(passes: int, seed: int) -> list[tuple[float, ...]]:
    """Make the passes of one loop and print a row of the table every tenth of them; returns a sample of each."""
    here, there = multiprocessing.Pipe()
    hub = multiprocessing.get_context("spawn").Process(target=serve, args=(there, seed), daemon=True)
    hub.start()
    there.close()
    samples: list[tuple[float, ...]] = []
    total: Counter[str] = Counter()
    table, run = sys.stdout, cull_idle.Pass.run

    def live_on_and_run(self: cull_idle.Pass) -> None:
        here.send(None)
        here.recv()
        run(self)
        total.update(culled=self.figures["culled"] + self.figures["deleted"], failures=bool(self.exit_code))

    def between(stop: threading.Event, seconds: float) -> bool:
        """In place of the pause after a pass; after the last one comes a SIGTERM."""
        samples.append(sample())
        rss, files, threads = samples[-1]
        if len(samples) in (1, passes) or len(samples) % max(passes // 10, 1) == 0:
            row = ROW(len(samples), f"{rss:.1f}", files, threads, total["failures"], total["culled"])
            print(row, file=table, flush=True)
        if len(samples) == passes:
            signal.raise_signal(signal.SIGTERM)
        return stop.is_set()

    cull_idle.Pass.run = live_on_and_run  # type: ignore[method-assign]
    cull_idle.wait_in_slices = between
    print(ROW("passes", *ALLOWED, "failures", "culled"))
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        assert cull_idle.main([f"--url={here.recv()}", *OPTIONS]) == 0
    here.close()
    hub.join(15)
    return samples


def growth(samples: Sequence[tuple[float, ...]]) -> list[str]:
    """What grew from the second quarter to the last."""
    quarter = len(samples) // 4
    grew = []
    for (what, allowed), column in zip(ALLOWED.items(), zip(*samples, strict=True), strict=True):
        before, after = median(column[quarter : 2 * quarter]), median(column[-quarter:])
        print(f"{what}: {before:.1f} in the second quarter, {after:.1f} in the last; at most {max(column):.1f}")
        grew += [what] if after > before + allowed else []
    return grew


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=2000, metavar="N", help="8 or more (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the faults (%(default)s)")
    options = parser.parse_args()
    os.environ["JUPYTERHUB_API_TOKEN"] = TOKEN
    cull_idle.PAUSES = (0, 0, 0)
    began = time.monotonic()
    samples = soak(max(options.passes, 8), options.seed)
    print(f"{len(samples)} passes in {time.monotonic() - began:.0f}s, seed {options.seed}")
    grew = growth(samples)
    print(f"GREW: {', '.join(grew)}" if grew else "flat")
    return bool(grew)


if __name__ == "__main__":
    sys.exit(main())
