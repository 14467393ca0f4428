"""Thousands of passes over a Hub that fails at random, and whether memory, open files or threads grow. By hand:

    python tests/by_hand/soak.py --passes 2000

The Hub is a process of its own, so that what is measured is the program alone. It prints a table and exits with 1 if
memory or files grew from the second quarter of the passes to the last.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

from scripted_hub import (
    LONG_AGO,
    Reply,
    ScriptedHub,
    done_but_lost,
    hang,
    html,
    normal,
    redirect,
    reset,
    reset_in_body,
    respond,
    truncated,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cull_idle  # noqa: E402

TOKEN = "scripted-token"
OPTIONS = ["--timeout=1h", "--cull-users", "--api-page-size=20", "--request-timeout=0.2s", "--json"]
OPTIONS.append("--log-level=critical")  # which nothing is logged at
USERS = 60
ALLOWED_MIB = 2.0
FAULTS: list[Reply] = [
    respond(429, headers={"Retry-After": "0"}),
    respond(500),
    respond(502),
    respond(503),
    reset(),
    reset_in_body(),
    done_but_lost(),
    truncated(),
    html(),
    redirect("http://127.0.0.1:1/"),
    hang(0.3),
]
PLACES = [
    ("GET", "/user"),
    ("GET", r"/users(\?.*)?"),
    ("GET", "/users/.*"),
    ("DELETE", "/users/.*/server.*"),
    ("DELETE", "/users/[^/]*"),
]


class Sample(NamedTuple):
    """What the process held after a pass."""

    rss: float  # MiB
    files: int
    threads: int


def serve(orders: Connection, seed: int) -> None:
    """Be the Hub; at each order let users come back and fail in new ways, until the other end is closed."""
    chance = random.Random(seed)
    with ScriptedHub(TOKEN) as hub:
        hub.recording = False
        orders.send(hub.url)
        while True:
            try:
                orders.recv()
            except EOFError:
                return
            live_on(hub, chance)
            orders.send(None)


def live_on(hub: ScriptedHub, chance: random.Random) -> None:
    """Some users come back, idle or not, and the faults of the last pass give way to others."""
    hub._faults.clear()
    for _ in range(chance.randrange(20)):
        name = f"user-{chance.randrange(USERS)}"
        hub.add(name, chance.choice(["", "gpu"]), idle=chance.choice([0.0, 60.0, LONG_AGO, LONG_AGO]))
    for _ in range(chance.randrange(4)):
        method, pattern = chance.choice(PLACES)
        before = [normal()] * chance.randrange(5)
        hub.fault(method, pattern, *before, *[chance.choice(FAULTS)] * chance.randrange(1, 6))


def sample() -> Sample:
    gc.collect()  # closes connections that failed, which would otherwise wait for their turn
    status = Path("/proc/self/status").read_text()
    rss = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert rss
    return Sample(int(rss[1]) / 1024, len(list(Path("/proc/self/fd").iterdir())), threading.active_count())


def soak(passes: int, seed: int) -> list[Sample]:
    """Make the passes of one loop and print a row of the table every tenth of them; returns a sample of each."""
    here, there = multiprocessing.Pipe()
    hub = multiprocessing.get_context("spawn").Process(target=serve, args=(there, seed), daemon=True)
    hub.start()
    there.close()
    url = here.recv()
    here.send(None)
    here.recv()
    samples: list[Sample] = []
    failures = culled = 0
    table, output = sys.stdout, io.BytesIO()
    row = "{:>8}  {:>8}  {:>5}  {:>7}  {:>8}  {:>7}".format
    print(row("passes", "RSS MiB", "files", "threads", "failures", "culled"))

    def between(stop: threading.Event, seconds: float) -> None:
        """In place of the pause after a pass; after the last one comes a SIGTERM."""
        nonlocal failures, culled
        sys.stdout.flush()
        done = json.loads(output.getvalue().splitlines()[-1])
        output.seek(0)
        output.truncate()
        failures += bool(done["error"] or done["failed"] or done["left_undone"])
        culled += done["culled"] + done["deleted"]
        samples.append(sample())
        number, now = len(samples), samples[-1]
        if number in (1, passes) or number % max(passes // 10, 1) == 0:
            cells = (number, f"{now.rss:.1f}", now.files, now.threads, failures, culled)
            print(row(*cells), file=table, flush=True)
        if number == passes:
            signal.raise_signal(signal.SIGTERM)
        else:
            here.send(None)
            here.recv()

    cull_idle.wait_in_slices = between
    sys.stdout = io.TextIOWrapper(output)
    exit_code = cull_idle.main([f"--url={url}", *OPTIONS])
    sys.stdout = table
    assert exit_code == 0
    here.close()
    hub.join(15)
    return samples


def growth(samples: Sequence[Sample]) -> list[str]:
    """What grew from the second quarter to the last."""
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    grew = []
    for what, index, allowed in (("memory (MiB)", 0, ALLOWED_MIB), ("open files", 1, 0.0), ("threads", 2, 0.0)):
        before, after = [median(each[index] for each in part) for part in (early, late)]
        print(f"{what}: median {before:.1f} in the second quarter, {after:.1f} in the last", end="; ")
        print(f"at most {max(each[index] for each in samples):.1f}")
        if after > before + allowed:
            grew.append(what)
    return grew


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Many passes with random faults: do memory, files or threads grow?")
    parser.add_argument("--passes", type=int, default=2000, metavar="N", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the faults (%(default)s)")
    options = parser.parse_args(arguments)
    if options.passes < 8:
        parser.error("--passes must be at least 8, two for each quarter")
    os.environ["JUPYTERHUB_API_TOKEN"] = TOKEN
    cull_idle.PAUSES = (0, 0, 0)
    began = time.monotonic()
    samples = soak(options.passes, options.seed)
    print(f"{options.passes} passes in {time.monotonic() - began:.0f}s, seed {options.seed}")
    grew = growth(samples)
    print(f"GREW: {', '.join(grew)}" if grew else "flat")
    return bool(grew)


if __name__ == "__main__":
    sys.exit(main())
