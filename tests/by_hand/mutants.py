"""Change cull_idle.py in one place at a time and see whether a test fails. A change that no test notices survives.

    nice python tests/by_hand/mutants.py                                  # the hundred of mutants.toml
    nice python tests/by_hand/mutants.py --sample 300 --seed 7            # places at random, changed by cosmic-ray
    nice python tests/by_hand/mutants.py --sample 50 --part rules --part arbiter

A run of all tests shows which of them run which lines. A mutant meets those of its lines first, what killed others
before them; if it survives, all tests but those on real Hubs and, with --real-hubs, these. Tests run in a copy of the
tree. A mutant that hangs is ended, and counts as killed. On a busy machine tests may fail by themselves: then more
mutants are killed than should be.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = "cull_idle.py"
COPIED = (MODULE, "README.md", "LICENSE", "pyproject.toml", "tests")
LIST = Path(__file__).with_name("mutants.toml")
# Without the options of pyproject.toml: one process, which ends with the first failure.
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "-p", "no_shrinking"]
NO_SHRINKING = """
from hypothesis import Phase, settings
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
settings.load_profile("mutants")
"""
FAST, REAL_HUBS = ["tests", "--ignore=tests/real_hub"], ["tests/real_hub"]
SECONDS = 60  # of tests that run a mutant's lines, before all others
MEMORY = 4 << 30  # bytes, for a mutant that allocates without end


# ---- Mutants


class Mutant(NamedTuple):
    """The module, with one place changed."""

    line: int
    part: str
    what: str  # is broken; empty for a random change
    source: str

    def difference(self, original: str) -> str:
        lines = difflib.unified_diff(original.splitlines(), self.source.splitlines(), n=0, lineterm="")
        return "\n".join([f"{self.part}, line {self.line}: {self.what}", *list(lines)[3:], ""])


def part_of(source: str, line: int) -> str:
    """The heading above a line, up to its first colon or bracket."""
    above = source.splitlines()[:line]
    headings = [text.removeprefix("# ---- ") for text in above if text.startswith("# ---- ")]
    return re.split(" ?[:(]", headings[-1])[0] if headings else "The top"


def listed(source: str) -> Iterator[Mutant]:
    """Those of mutants.toml. Raises ValueError if the module has changed too much."""
    for mutants in tomllib.loads(LIST.read_text()).values():
        for what, (old, new) in mutants.items():
            if source.count(old) != 1:
                raise ValueError(f"{LIST}: {what!r}: its text is {source.count(old)} times in {MODULE}")
            line = source[: source.index(old)].count("\n") + 1
            yield Mutant(line, part_of(source, line), what, source.replace(old, new))


def at_random(source: str, parts: Sequence[str], seed: int) -> Iterator[Mutant]:
    """One change for each place that cosmic-ray can change, in random order."""
    plugins, tree = import_module("cosmic_ray.plugins"), import_module("cosmic_ray.ast").get_ast(source)
    mutate_code = import_module("cosmic_ray.mutating").mutate_code
    nodes = list(import_module("cosmic_ray.ast").ast_nodes(tree))
    places: dict[tuple[int, int, str], list[tuple[str, int]]] = defaultdict(list)  # the changes by place and kind
    for name in plugins.operator_names():
        if re.search("_(Eq|NotEq)_Is", name):  # of small texts and numbers that is the same
            continue
        if not (operator := plugins.get_operator(name)).arguments():
            positions = [start for node in nodes for start, _ in operator().mutation_positions(node)]
            for number, (line, column) in enumerate(positions):
                places[line, column, name.partition("_")[0]].append((name, number))
    chance = random.Random(seed)
    unchanged = without_annotations(source)
    for place in chance.sample(sorted(places), len(places)):
        if is_in(part := part_of(source, place[0]), parts):
            name, number = chance.choice(sorted(places[place]))
            mutated = mutate_code(source, plugins.get_operator(name)(), number)
            with suppress(SyntaxError):  # cosmic-ray 8.7 puts `not` before `name := value`
                if without_annotations(mutated) != unchanged:
                    yield Mutant(place[0], part, "", mutated)


def without_annotations(source: str) -> str:
    """What runs of a module: an annotation does not."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in {"annotation", "returns"}.intersection(node._fields):
            setattr(node, name, ast.Constant(None))
    return ast.dump(tree)


def is_in(part: str, words: Sequence[str]) -> bool:
    return not words or any(word.lower() in part.lower() for word in words)


# ---- Runs of pytest


class Tests:
    """Runs the tests in copies of the tree, and knows which test runs which lines."""

    def __init__(self, scratch: Path, jobs: int, chosen: Sequence[str]) -> None:
        self._chosen = chosen
        self._kills: Counter[str] = Counter()
        self._trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            self._trees.put(copy_tree(scratch / str(number)))
        self._learn()

    def _learn(self) -> None:
        """Run all tests once, with coverage."""
        tree = self._trees.get()
        options = ["--cov", "--cov-context=test", "--cov-report=", "--cov-fail-under=0", "--durations=0", "-vv"]
        began = time.monotonic()
        _, output = run_pytest(tree, *options, "--durations-min=0", *self._chosen, seconds=7200)
        self.seconds = time.monotonic() - began
        self._durations: dict[str, float] = defaultdict(float)
        for seconds, test in re.findall(r"^([0-9.]+)s (?:setup|call|teardown) +(\S.*)$", output, re.MULTILINE):
            self._durations[test] += float(seconds)
        failed = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.MULTILINE)
        self._without = [f"--deselect={test}" for test in failed]
        say(f"{len(self._durations)} tests in {self.seconds:.0f}s; fail without a mutant, left out: {failed}")
        measured = import_module("coverage").CoverageData(str(tree / ".coverage"))
        measured.read()
        self._by_line = {
            line: {context.rpartition("|")[0] for context in contexts} & self._durations.keys() - set(failed)
            for line, contexts in measured.contexts_by_lineno(str(tree / MODULE)).items()
        }
        self._trees.put(tree)

    def kill(self, mutant: Mutant, *, real_hubs: bool) -> bool:
        """True if a test fails or hangs."""
        tree = self._trees.get()
        (tree / MODULE).write_text(mutant.source)
        try:
            near = list(self._near(mutant))
            if near and self._fails(tree, near, 60 + 5 * sum(self._durations[test] for test in near)):
                return True
            rest = [self._chosen, REAL_HUBS] if real_hubs else [self._chosen]
            return any(self._fails(tree, [*paths, *self._without], 60 + 2 * self.seconds) for paths in rest)
        finally:
            self._trees.put(tree)

    def _near(self, mutant: Mutant) -> Iterator[str]:
        """The tests that run the line, or the start of its statement: what killed others, then the quickest."""
        line = max((line for line in self._by_line if line <= mutant.line), default=0)
        tests = self._by_line.get(line, set())
        budget = float(SECONDS)
        for test in sorted(tests, key=lambda test: (-self._kills[test], self._durations[test])):
            budget -= self._durations[test]
            if budget > 0:
                yield test

    def _fails(self, tree: Path, arguments: Sequence[str], seconds: float) -> bool:
        exit_code, output = run_pytest(tree, "-x", *arguments, seconds=seconds)
        self._kills.update(re.findall(r"^FAILED (\S.*?)(?: - .*)?$", output, re.MULTILINE))
        return exit_code not in (pytest.ExitCode.OK, pytest.ExitCode.USAGE_ERROR)  # the latter: no test has this name


def copy_tree(tree: Path) -> Path:
    tree.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tree / name)
    (tree / "no_shrinking.py").write_text(NO_SHRINKING)
    return tree


def run_pytest(tree: Path, *arguments: str, seconds: float) -> tuple[int, str]:
    """The exit code of pytest, -9 if it took too long, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "COVERAGE_CORE": "ctrace", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*PYTEST, f"--basetemp={tree}.tmp", *arguments]
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            output = ""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


# ---- Results


def summary(outcomes: Collection[tuple[Mutant, bool]]) -> str:
    """A table, one line a part."""
    lines = ["| part | mutants | killed | survived | killed, % |", "| --- | ---: | ---: | ---: | ---: |"]
    for part in [*dict.fromkeys(mutant.part for mutant, _ in sorted(outcomes)), "all"]:
        killed = [is_killed for mutant, is_killed in outcomes if part in (mutant.part, "all")]
        share = 100 * sum(killed) / len(killed)
        lines.append(f"| {part} | {len(killed)} | {sum(killed)} | {killed.count(False)} | {share:.0f} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="so many at random, instead of the list")
    parser.add_argument("--seed", type=int, default=1, help="of the sample; default: 1")
    parser.add_argument("--part", action="append", default=[], help="only of parts with this in their heading; repeat")
    parser.add_argument("--real-hubs", action="store_true", help="let what survives meet the tests on real Hubs, too")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at the same time; default: 1")
    parser.add_argument("--show", action="store_true", help="show the mutants, and run nothing")
    parser.add_argument("tests", nargs="*", help="files or directories; default: all but those on real Hubs")
    options = parser.parse_args()
    original = (ROOT / MODULE).read_text()
    if options.sample:
        found = at_random(original, options.part, options.seed)
        mutants = list(islice(found, options.sample))
    else:
        mutants = [mutant for mutant in listed(original) if is_in(mutant.part, options.part)]
    if options.show or not mutants:
        print("\n".join(mutant.difference(original) for mutant in mutants), f"{len(mutants)} mutants", sep="\n")
        return 0

    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch, ThreadPoolExecutor(options.jobs) as pool:
        tests = Tests(Path(scratch), options.jobs, options.tests or FAST)
        outcomes: list[tuple[Mutant, bool]] = []
        killed = pool.map(lambda mutant: tests.kill(mutant, real_hubs=options.real_hubs), mutants)
        for mutant, is_killed in zip(mutants, killed, strict=True):
            outcomes.append((mutant, is_killed))
            if not is_killed:
                print(mutant.difference(original), flush=True)
            say(f"{len(outcomes)} of {len(mutants)}: line {mutant.line} {'killed' if is_killed else 'survived'}")
    print(summary(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
