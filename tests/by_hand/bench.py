"""Measure cull_idle.py side by side with jupyterhub-idle-culler, the reference, and print a Markdown table.

    pip install -e '.[test,bench]'
    python tests/by_hand/bench.py

Both run as whole processes, in turn, with the same arguments, on the same Hub: a scripted one, or a real one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
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


# One process


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


def on_scripted_hub(command: Command, *options: str) -> Run:
    """Run a program against a scripted Hub in a new process of its own."""
    script = [PYTHON, str(ROOT / "tests/helpers/scripted_hub.py"), "--token=bench", *options]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as hub:
        assert hub.stdout
        try:
            result = run(command, hub.stdout.readline().strip(), "bench")
        finally:
            hub.send_signal(signal.SIGTERM)
            summary = hub.stdout.read()
        return result._replace(hub=json.loads(summary))


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


def amount(number: float, unit: str) -> str:
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def ratio(number: float) -> str:
    return f"1/{1 / number:.3g}" if number < 1 else f"{number:.4g}"


def compare(
    work: str,
    measured: str,
    ours: float,
    other: float,
    most: float | None = None,
    unit: str = "s",
    of: str = "",
    share: float = 0,
) -> Line:
    """Ours is to be at most so many times the other, which is the reference unless `of` names it.

    share: how many times it is, if that is not just the ratio of both.
    """
    share = share or ours / other
    other_text = amount(other, unit) + (f" ({of})" if of else "")
    line = Line(work, measured, amount(ours, unit), other_text, ratio(share))
    return line if most is None else line._replace(goal=f"≤ {ratio(most)}", met=share <= most)


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

    def at_most(self, runs: int) -> int:
        return min(self.runs, runs)


@cache
def empty_pass(runs: int) -> list[list[Run]]:
    return in_turn(
        (runs, lambda: on_scripted_hub(OURS, "--servers=0")), (runs, lambda: on_scripted_hub(REFERENCE, "--servers=0"))
    )


@cache
def scan(servers: int, effort: Effort) -> list[list[Run]]:
    """Passes of ours and, but not over a million, the bare loop and the reference over servers none of which is due."""

    def passes(times: int, program: Command) -> tuple[int, Callable[[], Run]]:
        def one_pass() -> Run:
            result = on_scripted_hub(program, f"--servers={servers}")
            assert result.hub["requests"] >= servers / PAGE_SIZE, "not all was read"
            return result

        return times, one_pass

    if servers > 100_000:
        return in_turn(passes(1, OURS))
    # More of the two that are quick and close to each other: a machine that others use, too, differs by 10 %.
    quick = 5 * effort.runs
    return in_turn(passes(quick, OURS), passes(quick, (PYTHON, "-c", BARE_LOOP)), passes(effort.at_most(3), REFERENCE))


def measure_start(effort: Effort) -> Iterator[Line]:
    runs = 3 * effort.runs
    script, module, reference = in_turn(
        (runs, lambda: run((PYTHON, str(ROOT / "cull_idle.py"), "--help"))),
        (runs, lambda: run((PYTHON, "-m", "cull_idle", "--help"))),
        (runs, lambda: run((PYTHON, "-m", "jupyterhub_idle_culler", "--help"))),
    )
    for how, ours, most in (("the file", script, None), ("installed", module, 1.3)):
        yield compare(f"`--help`, {how}", "wall", middle(ours, wall), middle(reference, wall), most)
        yield compare(f"`--help`, {how}", "CPU", middle(ours, cpu), middle(reference, cpu))
    ours, reference = empty_pass(runs)
    yield compare("an empty pass", "wall", middle(ours, wall), middle(reference, wall), 1.3)
    yield compare("an empty pass", "CPU", middle(ours, cpu), middle(reference, cpu))


def measure_race(effort: Effort) -> Iterator[Line]:
    hub = ("--servers=200", "--coming-back=99", "--stop-seconds=0.05")
    several = effort.at_most(3)
    ours, reference = (
        max(result.hub["deleted_come_back"] for result in runs)
        for runs in in_turn(
            (several, lambda: on_scripted_hub(OURS, *hub)), (several, lambda: on_scripted_hub(REFERENCE, *hub))
        )
    )
    work = "200 idle servers, 99 come back during the pass"
    yield Line(work, "active servers stopped, at worst", str(ours), str(reference), "", "0", ours == 0)


def measure_stops(effort: Effort) -> Iterator[Line]:
    servers, seconds = (20, 0.5) if effort.quick else (100, 1.0)
    hub = (f"--servers={servers}", f"--due={servers}", f"--stop-seconds={seconds}")

    def stop_all(program: Command) -> Run:
        result = on_scripted_hub(program, *hub)
        assert result.hub["deleted"] == servers, "not all were stopped"
        return result

    work = f"{servers} idle servers that take {seconds:g} s to stop, scripted Hub"
    start_up = middle(empty_pass(3 * effort.runs)[0], wall)
    ours, reference = in_turn((effort.at_most(3), lambda: stop_all(OURS)), (1, lambda: stop_all(REFERENCE)))
    yield compare(work, "wall", middle(ours, wall), middle(reference, wall), 1 / 9.5)
    ideal = servers * seconds / CONCURRENCY
    yield within(work, "wall, against 1.05·N·d/c + start-up", middle(ours, wall), 1.05 * ideal + start_up)


def measure_scan(effort: Effort) -> Iterator[Line]:
    servers = 10_000 if effort.quick else 100_000
    ours, bare, reference = scan(servers, effort)
    work = f"a pass over {servers:,} running servers, none due"
    yield compare(work, "CPU", middle(ours, cpu), middle(reference, cpu), 1 / 8)
    share = median(cpu(one) / cpu(other) for one, other in zip(ours, bare, strict=True))  # of runs side by side
    yield compare(work, "CPU", middle(ours, cpu), middle(bare, cpu), of="bare loop", share=share)
    yield within(work, "peak memory", middle(ours, peak), 60, "MB", amount(middle(reference, peak), "MB"))


def measure_rules(effort: Effort) -> Iterator[Line]:
    servers = 10_000 if effort.quick else 100_000
    hub = [f"--servers={servers}", "--groups=students,class-77"]
    without, with_rules = in_turn(
        (effort.runs, lambda: on_scripted_hub(OURS, *hub)),
        (effort.runs, lambda: on_scripted_hub((*OURS, *(f"--rule={rule}" for rule in RULES)), *hub)),
    )
    work = f"a pass over {servers:,} running servers, with {len(RULES)} rules"
    yield compare(work, "CPU", middle(with_rules, cpu), middle(without, cpu), 8, of="without")


def measure_due(effort: Effort) -> Iterator[Line]:
    servers = 2_000 if effort.quick else 20_000
    (ours,) = in_turn((1, lambda: on_scripted_hub(OURS, f"--servers={servers}", f"--due={servers}")))
    assert ours[0].hub["deleted"] == servers, "not all were stopped"
    yield within(f"{servers:,} servers due", "peak memory", middle(ours, peak), 100, "MB")


def measure_growth(effort: Effort) -> Iterator[Line]:
    sizes = [1_000, 10_000, 100_000] + ([] if effort.quick else [1_000_000])
    start_up = middle(empty_pass(3 * effort.runs)[0], cpu)

    def cell(runs: Sequence[Run], servers: int) -> str:
        each = amount(middle(runs, cpu) / servers * 1e6, "µs")
        return f"{amount(middle(runs, wall), 's')}, {each}, {amount(middle(runs, peak), 'MB')}"

    for servers in sizes:
        ours, *others = scan(servers, effort)
        reference = cell(others[-1], servers) if others else "not run"
        share = ratio(middle(ours, cpu) / middle(others[-1], cpu)) if others else ""
        work = f"a pass over {servers:,}"
        yield Line(work, "wall, CPU for each, peak memory (ratio of CPU)", cell(ours, servers), reference, share)

    small, large = sizes[-2:]
    before, after = scan(small, effort)[0], scan(large, effort)[0]
    growth = (middle(after, cpu) - start_up) / (middle(before, cpu) - start_up) / (large / small)
    work = f"from {small:,} to {large:,}"
    yield Line(work, "growth of CPU beyond start-up, for each", f"{growth:.2f}", "", "", "≤ 1.15", growth <= 1.15)
    more = middle(after, peak) - middle(before, peak)
    yield Line(work, "growth of peak memory", f"{more:+.1f} MB", "", "", "≤ 3 MB", more <= 3)


def measure_real_stops(effort: Effort) -> Iterator[Line]:
    servers, seconds = (20 if effort.quick else 60), 0.5
    options = {"idle_seconds": 7200, "stop_seconds": seconds}

    def stop_all(hub: RealHub, program: Command) -> Run:
        hub.spawn_many([(f"user-{index}", "", options) for index in range(servers)])
        result = run(program, hub.url, hub.culler_token)
        assert not hub.running(), "not all were stopped"
        return result

    with real_hub() as hub:
        ours, reference = in_turn(
            (effort.at_most(3), lambda: stop_all(hub, OURS)), (effort.at_most(2), lambda: stop_all(hub, REFERENCE))
        )
    work = f"{servers} idle servers that take {seconds:g} s to stop, real Hub"
    yield compare(work, "wall", middle(ours, wall), middle(reference, wall), 1 / 7.5)


def measure_real_scan(effort: Effort) -> Iterator[Line]:
    servers = 400 if effort.quick else 2_000
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
    yield Line(work, "the pass alone", amount(median(passes), "s"), amount(theirs, "s"), ratio(median(passes) / theirs))
    hubs = f"{amount(median(waits), 's')} (the Hub)"
    yield Line(work, "the pass alone", amount(median(passes), "s"), hubs, ratio(share), "≤ 1.1", share <= 1.1)


def measure_questions(effort: Effort) -> Iterator[Line]:
    """--idle-by server: a real Hub, a real proxy, and a small server that answers as Jupyter does."""
    servers = 50 if effort.quick else 200
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


MEASURES: Mapping[str, Callable[[Effort], Iterator[Line]]] = {
    "start": measure_start,
    "race": measure_race,
    "stops": measure_stops,
    "scan": measure_scan,
    "rules": measure_rules,
    "due": measure_due,
    "growth": measure_growth,
    "real-stops": measure_real_stops,
    "real-scan": measure_real_scan,
    "questions": measure_questions,
}

NOTES = f"""
Medians, the programs in turn, concurrency {CONCURRENCY}, pages of {PAGE_SIZE}, whole processes with their start-up.
The reference has no --once: it is its whole program, with pycurl, ended after its first pass; a million servers, and
100 s of stopping more than once, are not asked of it. "The file" is compiled at each start, "installed" is not; all
passes are of what is installed. The
bare loop is requests and json.loads over the same pages. "The pass alone" is without start-up; "the Hub" is the part
of the same pass that was spent in waiting for what the Hub sends. Servers asked are one small program that answers as
Jupyter does, behind PyPI's configurable-http-proxy; the bare loop is requests sending the same.
"""


def about() -> str:
    packages = ["jupyterhub-idle-culler", "pycurl", "requests", "jupyterhub"]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{datetime.now(UTC):%Y-%m-%d}, Python {python}, {versions}, {os.cpu_count()} CPUs."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller numbers, for a first look")
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, default=[*MEASURES], metavar="NAME", help=", ".join(MEASURES)
    )
    parser.add_argument("--runs", type=int, default=5, help="of each program; fewer where it is slow (%(default)s)")
    options = parser.parse_args()
    if not (importlib.util.find_spec("jupyterhub_idle_culler") and importlib.util.find_spec("pycurl")):
        parser.error("the reference is not installed: pip install -e '.[test,bench]'")

    effort = Effort(max(options.runs, 1), options.quick)
    lines: list[Line] = []
    for name, measure in MEASURES.items():
        if name in options.only:
            print(name, file=sys.stderr)
            lines += measure(effort)
    print(as_markdown(lines))
    print(NOTES)
    print(about())
    return 0 if all(line.met is not False for line in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())
