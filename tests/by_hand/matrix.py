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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
YES, NO, CANNOT = "yes", "**no**", "\N{EN DASH}"
DEFAULT_TESTS = "all default ones"
HUB_MINUTES, PYTHON_MINUTES = 5, 15  # after which a hanging run is ended


class Environment(NamedTuple):
    """What is installed for an interpreter, in a directory of this name."""

    name: str
    python: str
    requirements: tuple[str, ...]


class Row(NamedTuple):
    """A Hub to be tried: its version, which may end in .*, how it differs, and how pytest is told of it."""

    version: str
    environment: Environment
    note: str = ""
    options: tuple[str, ...] = ()
    tests: tuple[str, ...] = ("test_real_hub.py",)

    @property
    def name(self) -> str:
        return self.version + self.note


class Tried(NamedTuple):
    """A row of a table."""

    title: str
    python: str
    cells: dict[str, str]
    fine: bool
    skipped: bool = False


def hub(version: str, python: str, *requirements: str) -> Environment:
    return Environment(f"hub-{version}".rstrip(".*"), python, (f"jupyterhub=={version}", *requirements))


# The last versions that these Hubs run with.
TEMPLATES = ("jinja2<3", "markupsafe<2.1")
OLDEST = ("sqlalchemy<1.3", "tornado<5", "traitlets<5", *TEMPLATES)
HUB_0_8 = hub("0.8.1", "3.6", *OLDEST)

# Real servers and their proxy. They can be asked from JupyterHub 3 on.
SERVERS = ("configurable-http-proxy", "ipykernel", "jupyter_server")
WITH_SERVERS = ("test_real_hub.py", "test_servers_asked.py")

HUBS = [
    Row("0.6.1", hub("0.6.1", "3.6", *OLDEST)),
    Row("0.7.2", hub("0.7.2", "3.6", *OLDEST)),
    Row("0.8.1", HUB_0_8, ", named servers off", ("--hub-without-named-servers",)),
    Row("0.8.1", HUB_0_8, ", named servers on"),
    Row("0.9.6", hub("0.9.6", "3.7", "sqlalchemy<1.4", "tornado<6", *TEMPLATES)),
    Row("1.0.0", hub("1.0.0", "3.7", "sqlalchemy<2", *TEMPLATES)),
    Row("1.5.1", hub("1.5.1", "3.11", "sqlalchemy<2")),
    Row("2.3.1", hub("2.3.1", "3.11", "sqlalchemy<2")),
    Row("3.1.1", hub("3.1.1", "3.11", *SERVERS), tests=WITH_SERVERS),
    Row("4.1.6", hub("4.1.6", "3.11", *SERVERS), tests=WITH_SERVERS),
    Row("5.5.*", hub("5.5.*", "3.11", *SERVERS), tests=WITH_SERVERS),
    Row("6.*", hub("6.*", "3.11", *SERVERS), tests=WITH_SERVERS),
]

ALL_TESTS = ("--editable", f"{ROOT}[test]")
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
# The oldest that may be beside the program; urllib3 comes with requests, and can read in steps since 2.2.
OLDEST_PACKAGES = Environment(
    "python-3.11-oldest-packages",
    "3.11",
    (*ALL_TESTS, *(package.replace(">=", "==") for package in PACKAGES), "urllib3==2.2.*"),
)
PYTHONS = [Environment(f"python-{version}", version, ALL_TESTS) for version in ("3.11", "3.12", "3.13", "3.14")]
PYTHONS.append(OLDEST_PACKAGES)


# ---- Environments


class NoPython(Exception):
    """This machine lacks an interpreter."""


class NoEnvironment(Exception):
    """An environment could not be made: what uv said."""


def find_python(version: str) -> str:
    """Look for an interpreter: this one, on the PATH, pyenv's, and where else uv looks."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places: list[Callable[[], Iterable[str | Path | None]]] = [
        lambda: [sys.executable, shutil.which(f"python{version}")],
        lambda: pyenv.glob(f"versions/{version}.*/bin/python"),
        lambda: [run_uv("python", "find", "--no-project", "--system", version).stdout.strip()],
    ]
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for place in places:
        for path in map(str, filter(None, place())):
            answer = subprocess.run([path, "-c", ask], capture_output=True, text=True, check=False)
            if answer.stdout.strip() == version:
                return path
    raise NoPython(f"no Python {version}")


def run_uv(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "uv", "--quiet", "--no-python-downloads", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def prepare(environment: Environment, directory: Path) -> Path:
    """Make an environment, or mend it or bring it up to date, and return its interpreter."""
    path = directory / environment.name
    python = path / "bin/python"
    steps = [["pip", "install", "--python", str(python), *environment.requirements]]
    if any("*" in requirement for requirement in environment.requirements):
        steps[0].append("--upgrade-package=jupyterhub")
    if not python.exists():
        steps.insert(0, ["venv", "--clear", "--python", find_python(environment.python), str(path)])
    for step in steps:
        result = run_uv(*step)
        if result.returncode:
            raise NoEnvironment(result.stderr.strip())
    return python


# ---- Runs of pytest


class Log(NamedTuple):
    """What a run of pytest came to."""

    passed: bool
    text: str

    @property
    def last_line(self) -> str:
        return self.text.splitlines()[-1].strip("= ") if self.text else "nothing"


def run_pytest(python: str | Path, *args: str, minutes: float) -> Log:
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "--quiet", "--tb=short", *args]
    foreign = ("PYTEST_", "COV_", "PYTHONPATH", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            text, _ = process.communicate(timeout=minutes * 60)
        except BaseException as error:
            process.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return Log(False, f"not done after {minutes} minutes")
    return Log(process.returncode == 0, text.strip())


def try_hub(row: Row, python: Path, scratch: Path) -> Tried:
    report = scratch / f"{row.name}.xml"
    log = run_pytest(
        sys.executable,
        "-n0",
        f"--junitxml={report}",
        f"--hub-python={python}",
        *row.options,
        *(f"tests/real_hub/{name}" for name in row.tests),
        minutes=HUB_MINUTES,
    )
    cells, versions = read_report(report)
    right = [version for version in versions if f"{version}.".startswith(row.version.rstrip("*"))]
    fine = log.passed and right == list(versions) != []
    say(f"JupyterHub {row.name}, seen as {' and '.join(versions) or 'nothing'}: {log.last_line}")
    if not fine:
        say(log.text)
    return Tried((versions or [row.version])[0] + row.note, row.environment.python, cells, fine)


def read_report(report: Path) -> tuple[dict[str, str], list[str]]:
    """The cells by their columns, and the versions of the Hubs that answered, from what --junitxml wrote."""
    cells: dict[str, str] = {}
    versions: set[str] = set()
    for test in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        properties = {each.get("name", ""): each.get("value", "") for each in test.iter("property")}
        versions |= {value for name, value in properties.items() if name == "hub"}
        column = properties.get("behaviour", "other")
        cells[column] = max(outcome(test), cells.get(column, CANNOT), key=(CANNOT, YES, NO).index)
    return cells, sorted(versions)


def outcome(test: ElementTree.Element) -> str:
    if (skipped := test.find("skipped")) is not None and "this Hub lacks " in skipped.get("message", ""):
        return CANNOT
    return NO if any(test.find(kind) is not None for kind in ("skipped", "failure", "error")) else YES


def try_python(environment: Environment, python: Path, _: Path) -> Tried:
    log = run_pytest(python, minutes=PYTHON_MINUTES)
    say(f"{environment.name}: {log.last_line}")
    if not log.passed:
        say(log.text)
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    title = f"{DEFAULT_TESTS}, the oldest packages" if environment is OLDEST_PACKAGES else DEFAULT_TESTS
    return Tried(title, version, {"pass": YES if log.passed else NO, "pytest": log.last_line}, log.passed)


# ---- The table


class Attempt(NamedTuple):
    """What becomes a row of a table, once its environment is there."""

    name: str
    environment: Environment
    run: Callable[[Path, Path], Tried]


def try_it(attempt: Attempt, directory: Path, scratch: Path, installing: threading.Lock) -> Tried:
    try:
        with installing:
            python = prepare(attempt.environment, directory)
    except NoPython as missing:
        return Tried(attempt.name, f"skipped: {missing}", {}, fine=True, skipped=True)
    except NoEnvironment as error:
        say(f"{attempt.name}: {error}")
        return Tried(attempt.name, f"{NO}: not installed", {}, fine=False)
    return attempt.run(python, scratch)


def table(first: str, rows: list[Tried]) -> str:
    columns = list(dict.fromkeys(column for row in rows[::-1] for column in row.cells))
    cells = [[first, "Python", *columns], ["---"] * (2 + len(columns))]
    cells += [
        [row.title, row.python, *(row.cells.get(column, CANNOT if row.cells else "") for column in columns)]
        for row in rows
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

    if options.pythons:
        first = "tests"
        attempts = [Attempt(DEFAULT_TESTS, each, partial(try_python, each)) for each in PYTHONS]
    else:
        first = "JupyterHub"
        attempts = [Attempt(row.name, row.environment, partial(try_hub, row)) for row in HUBS]
    if options.only:
        attempts = [
            each for each in attempts if each.environment.name.partition("-")[2].startswith(tuple(options.only))
        ]
        if not attempts:
            parser.error(f"none begins with {' or '.join(options.only)}")
    if run_uv("--version").returncode:
        parser.error("needs uv: pip install uv")

    began, installing = time.monotonic(), threading.Lock()
    jobs = options.jobs or (1 if options.pythons else os.cpu_count())
    with tempfile.TemporaryDirectory(prefix="matrix-") as scratch, ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(lambda each: try_it(each, options.environments, Path(scratch), installing), attempts))
    print(table(first, rows))
    skipped, failed = sum(row.skipped for row in rows), sum(not row.fine for row in rows)
    say(f"{len(rows) - skipped} tried, {skipped} skipped, {failed} failed, in {time.monotonic() - began:.0f}s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
