"""Try cull_idle.py on real JupyterHubs from 0.6 to 6, or run the default tests on several Pythons, and print a table.

Each Hub and each Python has an environment of its own, made by uv and kept for the next run. Hubs are tried with the
tests of test_real_hub.py, those since 3 with those of test_servers_asked.py too: a cell says yes if tests for it ran
with this Hub, and all of them passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
YES, NO, CANNOT = "yes", "**no**", "\N{EN DASH}"
MINUTES = 15  # after which a hanging run is ended


class Attempt(NamedTuple):
    """What becomes a row: an environment, and what pytest is told of it."""

    title: str
    environment: str  # the name of its directory, which attempts may share
    python: str
    requirements: tuple[str, ...]
    hub: str = ""  # its version, which may end in .*; empty if the environment runs the default tests
    options: tuple[str, ...] = ()


class Row(NamedTuple):
    """What an attempt came to."""

    title: str
    python: str
    cells: dict[str, str]
    failed: bool = False
    skipped: bool = False


def hub(version: str, python: str, *requirements: str, note: str = "", options: tuple[str, ...] = ()) -> Attempt:
    """A Hub, with what was current in its time. Those since 3 have real servers, too, which can be asked."""
    tests: tuple[str, ...] = ("tests/real_hub/test_real_hub.py",)
    if version.startswith(("3", "4", "5", "6")):
        requirements += ("configurable-http-proxy", "ipykernel", "jupyter_server")
        tests += ("tests/real_hub/test_servers_asked.py",)
    requirements = (f"jupyterhub=={version}", *requirements)
    return Attempt(version + note, f"hub-{version}".rstrip(".*"), python, requirements, version, (*options, *tests))


# The last versions that these Hubs run with.
TEMPLATES = ("jinja2<3", "markupsafe<2.1")
OLDEST = ("sqlalchemy<1.3", "tornado<5", "traitlets<5", *TEMPLATES)
HUBS = [
    hub("0.6.1", "3.6", *OLDEST),
    hub("0.7.2", "3.6", *OLDEST),
    hub("0.8.1", "3.6", *OLDEST, note=", named servers off", options=("--hub-without-named-servers",)),
    hub("0.8.1", "3.6", *OLDEST, note=", named servers on"),
    hub("0.9.6", "3.7", "sqlalchemy<1.4", "tornado<6", *TEMPLATES),
    hub("1.0.0", "3.7", "sqlalchemy<2", *TEMPLATES),
    hub("1.5.1", "3.11", "sqlalchemy<2"),
    hub("2.3.1", "3.11", "sqlalchemy<2"),
    *(hub(version, "3.11") for version in ("3.1.1", "4.1.6", "5.5.*", "6.*")),
]

ALL_TESTS = ("--editable", f"{ROOT}[test]")
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
# The oldest that may be beside the program; urllib3 comes with requests, and can read in steps since 2.2.
OLDEST_PACKAGES = (*ALL_TESTS, *(package.replace(">=", "==") for package in PACKAGES), "urllib3==2.2.*")
PYTHONS = [
    *(Attempt("all default ones", f"python-{each}", each, ALL_TESTS) for each in ("3.11", "3.12", "3.13", "3.14")),
    Attempt("all default ones, the oldest packages", "python-3.11-oldest-packages", "3.11", OLDEST_PACKAGES),
]


# ---- Environments


class NoPython(Exception):
    """This machine lacks an interpreter."""


class NoEnvironment(Exception):
    """An environment could not be made: what uv said."""


def find_python(version: str) -> str:
    """Look for an interpreter: this one, on the PATH, pyenv's, and where else uv looks."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
    found = run_uv("python", "find", "--no-project", "--system", version).stdout.strip()
    for path in filter(None, [sys.executable, shutil.which(f"python{version}"), *map(str, pyenv), found]):
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if answer.stdout.startswith(f"Python {version}."):
            return path
    raise NoPython(f"no Python {version}")


def run_uv(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "uv", "--quiet", "--no-python-downloads", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def prepare(attempt: Attempt, directory: Path) -> Path:
    """Make an environment, or mend it or bring it up to date, and return its interpreter."""
    path = directory / attempt.environment
    python = path / "bin/python"
    steps = [["pip", "install", "--python", str(python), *attempt.requirements]]
    if "*" in attempt.hub:
        steps[0].append("--upgrade-package=jupyterhub")
    if not python.exists():
        steps.insert(0, ["venv", "--clear", "--python", find_python(attempt.python), str(path)])
    for step in steps:
        if (result := run_uv(*step)).returncode:
            raise NoEnvironment(result.stderr.strip())
    return python


# ---- Runs of pytest


def run_pytest(python: str | Path, *args: str) -> tuple[bool, str]:
    """Whether all tests passed, and what it printed."""
    foreign = ("PYTEST_", "COV_", "PYTHONPATH", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "--quiet", "--tb=short", *args]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60 * MINUTES
        )
    except subprocess.TimeoutExpired:
        return False, f"not done after {MINUTES} minutes"
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def try_hub(attempt: Attempt, python: Path, scratch: Path) -> Row:
    report = scratch / f"{attempt.title}.xml"
    passed, text = run_pytest(sys.executable, "-n0", f"--junitxml={report}", f"--hub-python={python}", *attempt.options)
    cells: dict[str, str] = {}
    versions: set[str] = set()  # of the Hubs that answered
    for test in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        properties = {each.get("name", ""): each.get("value", "") for each in test.iter("property")}
        versions |= {value for name, value in properties.items() if name == "hub"}
        column = properties.get("behaviour", "other")
        cells[column] = max(outcome(test), cells.get(column, CANNOT), key=(CANNOT, YES, NO).index)
    seen = " and ".join(sorted(versions))
    fine = passed and len(versions) == 1 and f"{seen}.".startswith(attempt.hub.rstrip("*"))
    say(f"JupyterHub {attempt.title}, seen as {seen or 'nothing'}: {text.splitlines()[-1] if fine else text}")
    return Row(attempt.title.replace(attempt.hub, seen or attempt.hub), attempt.python, cells, not fine)


def outcome(test: ElementTree.Element) -> str:
    if (skipped := test.find("skipped")) is not None and "this Hub lacks " in skipped.get("message", ""):
        return CANNOT
    return NO if any(test.find(kind) is not None for kind in ("skipped", "failure", "error")) else YES


def try_python(attempt: Attempt, python: Path, _: Path) -> Row:
    passed, text = run_pytest(python)
    last = text.splitlines()[-1].strip("= ")
    say(f"{attempt.environment}: {last if passed else text}")
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    return Row(attempt.title, version, {"pass": YES if passed else NO, "pytest": last}, not passed)


# ---- The table


def try_it(attempt: Attempt, directory: Path, scratch: Path, installing: threading.Lock) -> Row:
    try:
        with installing:
            python = prepare(attempt, directory)
    except NoPython as missing:
        return Row(attempt.title, f"skipped: {missing}", {}, skipped=True)
    except NoEnvironment as error:
        say(f"{attempt.title}: {error}")
        return Row(attempt.title, f"{NO}: not installed", {}, failed=True)
    return (try_hub if attempt.hub else try_python)(attempt, python, scratch)


def table(first: str, rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(column for row in rows[::-1] for column in row.cells))
    cells = [[first, "Python", *columns], ["---"] * (2 + len(columns))]
    cells += [
        [row.title, row.python, *(row.cells.get(each, CANNOT * bool(row.cells)) for each in columns)] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", action="store_true", help="run the default tests on each Python, and no Hubs")
    parser.add_argument("--only", nargs="+", metavar="VERSION", help="only those whose version begins like this")
    parser.add_argument("--jobs", type=int, metavar="N", help="this many at a time (default: CPUs; Pythons one by one)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--environments", type=Path, metavar="DIR", default=cache / "cull_idle-matrix")
    options = parser.parse_args()
    begins = tuple(options.only or [""])
    attempts = [
        each for each in (PYTHONS if options.pythons else HUBS) if each.environment.partition("-")[2].startswith(begins)
    ]
    if run_uv("--version").returncode or not attempts:
        parser.error("no version begins so" if options.only else "needs uv: pip install uv")

    began, installing = time.monotonic(), threading.Lock()
    jobs = options.jobs or (1 if options.pythons else os.cpu_count())
    with tempfile.TemporaryDirectory(prefix="matrix-") as scratch, ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(lambda each: try_it(each, options.environments, Path(scratch), installing), attempts))
    print(table("tests" if options.pythons else "JupyterHub", rows))
    skipped, failed = sum(row.skipped for row in rows), sum(row.failed for row in rows)
    say(f"{len(rows) - skipped} tried, {skipped} skipped, {failed} failed, in {time.monotonic() - began:.0f}s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
