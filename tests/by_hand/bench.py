"""Measure cull_idle.py side by side with jupyterhub-idle-culler, the reference, and print a Markdown table.

    pip install -e '.[test,bench]'
    python tests/by_hand/bench.py

Both run as whole processes, in turn, with the same arguments, on the same Hub: a scripted one, or a real one.
RESULTS.md says what the rows mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from reference import REFERENCE_ONCE

if TYPE_CHECKING:
    from hub import RealHub

ROOT = Path(__file__).parents[2]
CONCURRENCY = 10
PAGE_SIZE = 200
PACKAGES = ["jupyterhub-idle-culler", "pycurl", "requests", "jupyterhub"]
ARGUMENTS = ["--timeout=3600", f"--concurrency={CONCURRENCY}", f"--api-page-size={PAGE_SIZE}"]

# Ours, which times its pass, and how much of that it waits for what the Hub sends.
OURS_TIMED = """
import socket, sys, time
import cull_idle
import requests

make_pass, receive = cull_idle.Pass.run, socket.socket.recv_into
waits = []

def timed_receive(*arguments):
    began = time.perf_counter()
    try:
        return receive(*arguments)
    finally:
        waits.append(time.perf_counter() - began)

def timed_pass(current):
    began = time.perf_counter()
    make_pass(current)
    print(time.perf_counter() - began, sum(waits), current.figures["running"])

socket.socket.recv_into = timed_receive
cull_idle.Pass.run = timed_pass
sys.exit(cull_idle.main(sys.argv[1:]))
"""

# The least that a program in Python can do with the user list.
BARE_LOOP = f"""
import json, os
import requests

session = requests.Session()
session.trust_env = False
session.headers["Authorization"] = "token " + os.environ["JUPYTERHUB_API_TOKEN"]
session.headers["Accept"] = "application/jupyterhub-pagination+json"
following = {{"offset": 0}}
while following:
    query = {{"state": "ready", "limit": {PAGE_SIZE}, "offset": following["offset"]}}
    page = json.loads(session.get(os.environ["JUPYTERHUB_API_URL"] + "/users", params=query).content)
    following = page["_pagination"]["next"]
"""

Command = Sequence[str]
PYTHON = sys.executable
OURS: Command = (PYTHON, "-m", "cull_idle", "--once", *ARGUMENTS)
RULES = [
    *(f"user=svc{n}-* keep" for n in range(12)),
    *(f"group=class-{n}* timeout=2h" for n in range(12)),
    *(f"server=gpu{n}* timeout=1h" for n in range(12)),
    *(f"option.profile=large{n}* timeout=30m" for n in range(13)),
    "user=* timeout=1d",  # the last of 50, and the one that fits
]
REFERENCE: Command = (PYTHON, "-c", REFERENCE_ONCE, *ARGUMENTS)

# The requests of --idle-by server, as requests' documentation shows them.
BARE_QUESTIONS = """
import os, sys, threading
from concurrent.futures import ThreadPoolExecutor
import requests

hub, servers, count, workers = os.environ["JUPYTERHUB_API_URL"], sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
own = {"Authorization": "token " + os.environ["JUPYTERHUB_API_TOKEN"]}
local = threading.local()

def ask(index):
    if not hasattr(local, "session"):
        local.session = requests.Session()
    user = f"user-{index}"
    tokens = f"{hub}/users/{user}/tokens"
    wanted = {"scopes": [f"access:servers!server={user}/"], "note": f"Server at {user}", "expires_in": 180}
    made = local.session.post(tokens, headers=own, json=wanted).json()
    headers = {"Authorization": "token " + made["token"]}
    for what in ("kernels", "terminals", "status"):
        local.session.get(f"{servers}/user/{user}/api/{what}?no_track_activity=1", headers=headers).json()
    assert local.session.delete(f"{tokens}/{made['id']}", headers=own).status_code == 204

with ThreadPoolExecutor(workers) as pool:
    list(pool.map(ask, range(count)))
"""


# One process


class Run(NamedTuple):
    """What a process took, and what the scripted Hub counted meanwhile."""

    wall: float  # seconds
    cpu: float  # seconds, user and system
    peak: float  # resident MB
    output: str
    hub: Mapping[str, int]


wall, cpu, peak = attrgetter("wall"), attrgetter("cpu"), attrgetter("peak")


def run(command: Command, url: str = "", token: str = "") -> Run:
    """Run a program to its end. Nothing of the caller's settings or directory reaches it."""
    # Nor do $PYTHONDONTWRITEBYTECODE and its like, without which what is installed is compiled only once.
    settings = ("CULL_IDLE", "JUPYTERHUB", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    environment |= {"JUPYTERHUB_API_URL": url, "JUPYTERHUB_API_TOKEN": token, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, cwd=directory, stdout=out, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        log.seek(0)
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}: {command}\n{log.read()[-4000:].decode()}")
        # In kB, and never less than the peak of this process, from which it was forked: so that has to be small.
        return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6, out.read().decode(), {})


def on_hub(options: Sequence[str], program: Command, *, deletes: int | None = 0) -> Run:
    """Run a program against a scripted Hub in a new process, some of whose servers are to be stopped."""
    script = [PYTHON, str(ROOT / "tests/by_hand/bulk_hub.py"), "--token=bench", *options]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as hub:
        assert hub.stdout
        try:
            result = run(program, hub.stdout.readline().strip(), "bench")
        finally:
            hub.send_signal(signal.SIGTERM)
            summary = json.loads(hub.stdout.read())
    assert deletes in (None, summary["deleted"]), "not all were stopped, or too many"
    assert summary["requests"] >= int(options[0].partition("=")[2]) / PAGE_SIZE, "not all was read"
    return result._replace(hub=summary)


def in_turn(*programs: tuple[int, Callable[[], Run]]) -> list[list[Run]]:
    """Run each program that many times, the programs in turn: a noisy moment hits them all."""
    results: list[list[Run]] = [[] for _ in programs]
    for turn in range(max(times for times, _ in programs)):
        for (times, program), runs in zip(programs, results, strict=True):
            if turn < times:
                runs.append(program())
                print(f"  {runs[-1].wall:.2f} s, {runs[-1].cpu:.2f} s CPU, {runs[-1].peak:.1f} MB", file=sys.stderr)
    return results


def middle(runs: Sequence[Run], what: Callable[[Run], float]) -> float:
    return median(map(what, runs))


# The table


class Line(NamedTuple):
    work: str
    measured: str
    ours: str
    other: str
    ratio: str = ""
    goal: str = ""
    met: bool | None = None


def amount(number: float, unit: str = "s") -> str:
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def ratio(number: float) -> str:
    return f"1/{1 / number:.3g}" if number < 1 else f"{number:.4g}"


def compare(
    work: str, measured: str, ours: float, other: float, most: float = 0, *, of: str = "", share: float = 0
) -> Line:
    """Ours is to be at most so many times the other, in seconds, which is the reference unless `of` names it.

    share: how many times it is, if that is not just the ratio of both.
    """
    share = share or ours / other
    line = Line(work, measured, amount(ours), amount(other) + (f" ({of})" if of else ""), ratio(share))
    return line._replace(goal=f"≤ {ratio(most)}", met=share <= most) if most else line


def within(work: str, measured: str, ours: float, most: float, unit: str = "s", other: str = "") -> Line:
    """Ours is to be at most so much."""
    return Line(work, measured, amount(ours, unit), other, "", f"≤ {amount(most, unit)}", ours <= most)


def as_markdown(lines: Sequence[Line]) -> str:
    words = {True: "yes", False: "**no**", None: ""}
    rows = [["work", "measured", "cull_idle.py", "reference", "ratio", "goal", "met"], ["---"] * 7]
    rows += [[*line[:-1], words[line.met]] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# What is measured


class Effort(NamedTuple):
    runs: int
    quick: bool

    def of(self, usual: int, quick: int) -> int:
        """A number of servers."""
        return quick if self.quick else usual

    @property
    def few(self) -> int:
        """Runs of what is slow."""
        return min(self.runs, 3)


def measure_start(effort: Effort) -> Iterator[Line]:
    runs = 3 * effort.runs
    script, module, reference = in_turn(
        (runs, lambda: run((PYTHON, str(ROOT / "cull_idle.py"), "--help"))),
        (runs, lambda: run((PYTHON, "-m", "cull_idle", "--help"))),
        (runs, lambda: run((PYTHON, "-m", "jupyterhub_idle_culler", "--help"))),
    )
    empty = partial(on_hub, ["--servers=0"])
    ours, theirs = in_turn((runs, lambda: empty(OURS)), (runs, lambda: empty(REFERENCE)))
    for work, one, other, most in (
        ("`--help`, the file", script, reference, 0),
        ("`--help`, installed", module, reference, 1.3),
        ("an empty pass", ours, theirs, 1.3),
    ):
        yield compare(work, "wall", middle(one, wall), middle(other, wall), most)
        yield compare(work, "CPU", middle(one, cpu), middle(other, cpu))


def measure_race(effort: Effort) -> Iterator[Line]:
    hub = ("--servers=200", "--due=200", "--coming-back=99", "--stop-seconds=0.05")
    programs = [(effort.few, partial(on_hub, hub, program, deletes=None)) for program in (OURS, REFERENCE)]
    ours, other = (max(result.hub["deleted_come_back"] for result in runs) for runs in in_turn(*programs))
    work = "200 idle servers, 99 come back during the pass"
    yield Line(work, "active servers stopped, at worst", str(ours), str(other), "", "0", ours == 0)


def measure_stops(effort: Effort) -> Iterator[Line]:
    servers, seconds = effort.of(100, 20), 1.0
    hub = [f"--servers={servers}", f"--due={servers}", f"--stop-seconds={seconds}"]
    stop_all = partial(on_hub, hub, deletes=servers)
    empty, ours, reference = in_turn(
        (3 * effort.runs, lambda: on_hub(["--servers=0"], OURS)),
        (effort.few, lambda: stop_all(OURS)),
        (1, lambda: stop_all(REFERENCE)),
    )
    work = f"{servers} idle servers that take {seconds:g} s to stop, scripted Hub"
    yield compare(work, "wall", middle(ours, wall), middle(reference, wall), 1 / 9.5)
    most = 1.05 * servers * seconds / CONCURRENCY + middle(empty, wall)
    yield within(work, "wall, against 1.05·N·d/c + start-up", middle(ours, wall), most)


def measure_scan(effort: Effort) -> Iterator[Line]:
    servers = effort.of(100_000, 10_000)
    scan = partial(on_hub, [f"--servers={servers}"])
    # More of the two that are quick and close to each other: a machine that others use, too, differs by 10 %.
    ours, bare, reference = in_turn(
        (5 * effort.runs, lambda: scan(OURS)),
        (5 * effort.runs, lambda: scan((PYTHON, "-c", BARE_LOOP))),
        (effort.few, lambda: scan(REFERENCE)),
    )
    work = f"a pass over {servers:,} running servers, none due"
    yield compare(work, "CPU", middle(ours, cpu), middle(reference, cpu), 1 / 8)
    share = median(cpu(one) / cpu(other) for one, other in zip(ours, bare, strict=True))  # of runs side by side
    yield compare(work, "CPU", middle(ours, cpu), middle(bare, cpu), of="bare loop", share=share)
    yield within(work, "peak memory", middle(ours, peak), 60, "MB", amount(middle(reference, peak), "MB"))


def measure_growth(effort: Effort) -> Iterator[Line]:
    servers = effort.of(100_000, 10_000)
    empty, few, many = in_turn(
        (effort.runs, lambda: on_hub(["--servers=0"], OURS)),
        (effort.runs, lambda: on_hub([f"--servers={servers}"], OURS)),
        (1, lambda: on_hub([f"--servers={10 * servers}"], OURS)),
    )
    work = f"from {servers:,} to {10 * servers:,} servers"
    before, after = middle(few, cpu) - middle(empty, cpu), middle(many, cpu) - middle(empty, cpu)
    yield compare(work, "CPU beyond start-up", after, before, 11.5, of="the fewer")
    yield within(work, "growth of peak memory", middle(many, peak) - middle(few, peak), 3, "MB")


def measure_rules(effort: Effort) -> Iterator[Line]:
    servers = effort.of(100_000, 10_000)
    scan = partial(on_hub, [f"--servers={servers}", "--groups=students,class-77"])
    with_rules = (*OURS, *(f"--rule={rule}" for rule in RULES))
    ours, without = in_turn((effort.runs, lambda: scan(with_rules)), (effort.runs, lambda: scan(OURS)))
    work = f"a pass over {servers:,} running servers, with {len(RULES)} rules"
    yield compare(work, "CPU", middle(ours, cpu), middle(without, cpu), 8, of="without")


def measure_due(effort: Effort) -> Iterator[Line]:
    servers = effort.of(20_000, 2_000)
    run = on_hub([f"--servers={servers}", f"--due={servers}"], OURS, deletes=servers)
    yield within(f"{servers:,} servers due", "peak memory", peak(run), 100, "MB")


def measure_real_stops(effort: Effort) -> Iterator[Line]:
    servers, seconds = effort.of(60, 20), 0.5
    options = {"idle_seconds": 7200, "stop_seconds": seconds}

    def stop_all(hub: RealHub, program: Command) -> Run:
        hub.spawn_many([(f"user-{index}", "", options) for index in range(servers)])
        result = run(program, hub.url, hub.culler_token)
        assert not hub.running(), "not all were stopped"
        return result

    with real_hub() as hub:
        ours, reference = in_turn(
            (effort.few, lambda: stop_all(hub, OURS)), (min(effort.runs, 2), lambda: stop_all(hub, REFERENCE))
        )
    work = f"{servers} idle servers that take {seconds:g} s to stop, real Hub"
    yield compare(work, "wall", middle(ours, wall), middle(reference, wall), 1 / 7.5)


def measure_real_scan(effort: Effort) -> Iterator[Line]:
    servers = effort.of(2_000, 400)
    timed = (PYTHON, "-c", OURS_TIMED, "--once", *ARGUMENTS)

    with real_hub() as hub:
        for first in range(0, servers, PAGE_SIZE):
            hub.spawn_many([(f"user-{first + index}", "", {"idle_seconds": 60}) for index in range(PAGE_SIZE)])
        ours, reference = in_turn(
            (3 * effort.runs, lambda: run(timed, hub.url, hub.culler_token)),
            (3 * effort.runs, lambda: run(REFERENCE, hub.url, hub.culler_token)),
        )
        assert len(hub.running()) == servers, "some were stopped"
    passes, waits, running = zip(*(map(float, each.output.split()) for each in ours), strict=True)
    assert {*running} == {servers}, "not all was read"
    share = median(whole / waiting for whole, waiting in zip(passes, waits, strict=True))
    work = f"a pass over {servers:,} running servers, none due, real Hub"
    theirs = median(float(each.output) for each in reference)
    yield Line(work, "the pass alone", amount(median(passes)), amount(theirs), ratio(median(passes) / theirs))
    hubs = f"{amount(median(waits))} (the Hub)"
    yield Line(work, "the pass alone", amount(median(passes)), hubs, ratio(share), "≤ 1.1", share <= 1.1)


def measure_questions(effort: Effort) -> Iterator[Line]:
    """--idle-by server: a real Hub, a real proxy, and a small server that answers as Jupyter does."""
    servers = effort.of(200, 50)
    small_jupyter = [PYTHON, str(ROOT / "tests/helpers/small_jupyter.py")]
    with subprocess.Popen(small_jupyter, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as small:
        assert small.stdin
        assert small.stdout
        with real_hub(servers_at(int(small.stdout.readline()))) as hub:
            small.stdin.write(f"{hub.url}\n")
            small.stdin.flush()
            hub.spawn_many([(f"user-{index}", "", {"idle_seconds": 7200}) for index in range(servers)])
            ask = (*OURS, "--dry-run", "--json", "--idle-by=server", "--servers-url", hub.public_url)
            bare = (PYTHON, "-c", BARE_QUESTIONS, hub.public_url, str(servers), str(CONCURRENCY))
            spent = hub.cpu_seconds()
            ours, other = in_turn(
                (effort.runs, lambda: run(ask, hub.url, hub.culler_token)),
                (effort.runs, lambda: run(bare, hub.url, hub.culler_token)),
            )
            spent = (hub.cpu_seconds() - spent) / (2 * effort.runs * servers)
            assert all(json.loads(each.output.splitlines()[-1])["asked"] == servers for each in ours)
            to_hub = len(re.findall(r" (?:POST|DELETE) \S+/tokens", hub.log()))
        to_servers, _ = small.communicate()
    each = (to_hub + int(to_servers)) / (2 * effort.runs * servers)
    work = f"{servers} servers asked, `--idle-by server`, real Hub and proxy"
    yield compare(work, "wall", middle(ours, wall), middle(other, wall), 1.3, of="a bare loop")
    yield within(work, "requests for each server", each, 5, "")
    yield Line(work, "the Hub's CPU for each server", amount(1000 * spent, "ms"), "")


def servers_at(port: int) -> str:
    """Configuration of a Hub whose servers are all at that port, behind a proxy."""
    from real_servers import behind_proxy

    return f"""{behind_proxy()}
class SmallSpawner(doubles.DoubleSpawner):
    async def start(self):
        await super().start()
        return "127.0.0.1", {port}

c.JupyterHub.spawner_class = SmallSpawner
"""


def real_hub(extra_config: str = "") -> RealHub:
    from hub import RealHub  # not before the memory of programs is measured: see run

    return RealHub(extra_config=extra_config)


ON_SCRIPTED = (measure_start, measure_race, measure_stops, measure_scan, measure_rules, measure_due, measure_growth)
ON_REAL = (measure_real_stops, measure_real_scan, measure_questions)
BY_NAME = {measure.__name__.removeprefix("measure_"): measure for measure in (*ON_SCRIPTED, *ON_REAL)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller numbers, for a first look")
    names = ", ".join(BY_NAME)
    parser.add_argument("--only", nargs="+", choices=BY_NAME, default=[*BY_NAME], metavar="NAME", help=names)
    parser.add_argument("--runs", type=int, default=5, help="of each program; fewer where it is slow (%(default)s)")
    options = parser.parse_args()
    if not (importlib.util.find_spec("jupyterhub_idle_culler") and importlib.util.find_spec("pycurl")):
        parser.error("the reference is not installed: pip install -e '.[test,bench]'")

    effort = Effort(max(options.runs, 1), options.quick)
    lines: list[Line] = []
    for name in options.only:
        print(name, file=sys.stderr)
        lines += BY_NAME[name](effort)
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(as_markdown(lines))
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, {packages}, {os.cpu_count()} CPUs.")
    return 0 if all(line.met is not False for line in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())
