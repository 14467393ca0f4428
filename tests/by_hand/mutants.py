"""Change cull_idle.py in one place at a time and see whether a test fails. A change that no test notices survives.

    nice python tests/by_hand/mutants.py --section rules --section arbiter
    nice python tests/by_hand/mutants.py --function judge --lines 100-150
    nice python tests/by_hand/mutants.py --sample 300 --seed 7

First it runs all tests once, to learn which test runs which lines and how long it takes; the result is kept in the
temporary directory until a file changes. Then, for each mutant, it runs the tests of the changed line, the quickest
first, until one fails. Tests run in forks of this process, which has imported all but cull_idle.py already, and in a
copy of the tree, where only cull_idle.py differs.

Not changed are docstrings, annotations, decorators, f-strings, and texts with a space in them.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import coverage
import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = "cull_idle.py"
COPIED = (MODULE, "README.md", "LICENSE", "pyproject.toml", "tests")
# Without the options of pyproject.toml: no other processes, and nothing is written into the tree.
PYTEST = (
    *("-o", "addopts=", "-q", "-x", "-W", "ignore::pytest.PytestAssertRewriteWarning"),
    *("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler"),
)
FIRST = 40  # tests, before all others of a line: most mutants need no more
MEMORY = 4 << 30  # bytes, for a mutant that allocates without end

OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
NOT_CHANGED = {"annotation", "returns", "decorator_list", "bases", "type_comment"}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


# ---- Mutants


class Mutant(NamedTuple):
    """The module, with one place changed."""

    line: int
    section: str
    function: str  # qualified; of a constant its name
    lines: frozenset[int]  # a test that runs any of these may notice
    imported: bool  # an import runs the line itself
    source: str

    def difference(self, original: str) -> str:
        """The lines that differ."""
        lines = difflib.unified_diff(original.splitlines(), self.source.splitlines(), n=0, lineterm="")
        return "\n".join(f"{line[0]} {line[1:].strip()}" for line in lines if not line.startswith(("---", "+++", "@@")))


class Finder(ast.NodeVisitor):
    """Finds all places to change."""

    def __init__(self, source: str) -> None:
        self.bytes = source.encode()
        self.mutants: list[Mutant] = []
        lines = source.splitlines(keepends=True)
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line.encode()))
        self._sections = {number: line for number, line in enumerate(lines, 1) if line.startswith("# ---- ")}
        self._names: list[str] = []  # of the classes and functions around
        self._functions: list[ast.FunctionDef | ast.AsyncFunctionDef] = []  # around
        self._lines: frozenset[int] = frozenset()
        self._tree = ast.parse(source)
        self._uses = find_uses(self._tree)
        self.visit(self._tree)

    # What is visited, and what is not

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            self._visit_statement(node)
        elif not isinstance(node, ast.JoinedStr) and not is_type_variable(node):
            self._visit_children(node)

    def _visit_children(self, node: ast.AST) -> None:
        self._change(node)
        for name, value in ast.iter_fields(node):
            if name in NOT_CHANGED:
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    def _visit_statement(self, node: ast.stmt) -> None:
        if is_docstring(node) or (isinstance(node, ast.If) and is_for_others(node)):
            return
        around = self._lines
        self._lines = self._run_by(node)
        names, functions = self._names, self._functions
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            self._names = [*names, node.name]
        elif not functions:
            self._names = [*names, *targets(node)]
        if isinstance(node, FUNCTION):
            self._functions = [*functions, node]
        self._visit_children(node)
        self._lines, self._names, self._functions = around, names, functions

    def _run_by(self, node: ast.stmt) -> frozenset[int]:
        """The lines that run with a statement; of what an import runs, the lines that use it."""
        if isinstance(node, FUNCTION):
            return frozenset(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
        if self._functions:
            return header(node)
        return frozenset(self._uses(targets(node)))

    # Changes

    def _change(self, node: ast.AST) -> None:
        if change := getattr(self, f"_change_{type(node).__name__.lower()}", None):
            change(node)
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            self._negate(node.test)
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                self._negate(test)

    def _change_compare(self, node: ast.Compare) -> None:
        for (left, right), operator in zip(pairwise([node.left, *node.comparators]), node.ops, strict=True):
            self._change_operator(left, right, operator)

    def _change_boolop(self, node: ast.BoolOp) -> None:
        for left, right in pairwise(node.values):
            self._change_operator(left, right, node.op)

    def _change_binop(self, node: ast.BinOp) -> None:
        self._change_operator(node.left, node.right, node.op)

    def _change_unaryop(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.USub)):
            self._replace(node, f"({self._text(node.operand)})")

    def _change_constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._replace(node, str(not value))
        elif isinstance(value, (int, float)):
            self._replace(node, repr(value + 1))
        elif isinstance(value, str) and not re.search(r"\s", value):
            self._replace(node, repr(f"XX{value}"))
        elif isinstance(value, bytes):
            self._replace(node, repr(b"XX" + value))

    def _change_call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            self._replace(node.func, FUNCTIONS[node.func.id])

    def _change_return(self, node: ast.Return) -> None:
        if node.value is None:
            self._replace(node, "pass")
        elif not isinstance(node.value, ast.Constant):
            returns = self._functions[-1].returns
            is_bool = isinstance(returns, ast.Name) and returns.id == "bool"
            self._replace(node.value, f"not ({self._text(node.value)})" if is_bool else "None")

    def _change_raise(self, node: ast.Raise) -> None:
        self._replace(node, "pass")

    def _change_delete(self, node: ast.Delete) -> None:
        self._replace(node, "pass")

    def _change_continue(self, node: ast.Continue) -> None:
        self._replace(node, "break")

    def _change_break(self, node: ast.Break) -> None:
        self._replace(node, "continue")

    def _change_expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, (ast.Call, ast.Await)):
            self._replace(node, "pass")

    def _change_augassign(self, node: ast.AugAssign) -> None:
        self._replace(node, "pass")
        self._change_operator(node.target, node.value, node.op)

    def _change_assign(self, node: ast.Assign) -> None:
        """Leave out an assignment, unless that would leave a name without a value."""
        (target, *others) = node.targets
        if others or not self._functions:
            return
        if isinstance(target, (ast.Attribute, ast.Subscript)) or (
            isinstance(target, ast.Name) and self._has_value(target, node.lineno)
        ):
            self._replace(node, "pass")

    def _has_value(self, name: ast.Name, before: int) -> bool:
        return any(
            each.arg == name.id
            if isinstance(each, ast.arg)
            else isinstance(each, ast.Name) and each.id == name.id and each.lineno < before
            for each in ast.walk(self._functions[-1])
        )

    def _negate(self, test: ast.expr) -> None:
        """Turn a condition that has no operator to change."""
        is_not = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        if not is_not and not isinstance(test, (ast.Compare, ast.BoolOp, ast.Constant)):
            self._replace(test, f"(not ({self._text(test)}))")

    def _change_operator(self, left: ast.expr, right: ast.expr, operator: ast.AST) -> None:
        if type(operator) not in OPERATORS:
            return
        old, new = OPERATORS[type(operator)]
        start, end = self._span(left)[1], self._span(right)[0]
        between = self.bytes[start:end].decode()
        changed = re.sub(r"\s+".join(map(re.escape, old.split())), lambda _: new, between, count=1)
        self._add(left, start, end, changed)

    def _replace(self, node: ast.expr | ast.stmt, text: str) -> None:
        self._add(node, *self._span(node), text)

    def _add(self, node: ast.expr | ast.stmt, start: int, end: int, text: str) -> None:
        source = (self.bytes[:start] + text.encode() + self.bytes[end:]).decode()
        section = max((number for number in self._sections if number < node.lineno), default=0)
        title = re.split(r"[:,]", self._sections.get(section, "# ---- The top")[7:].strip())[0]
        self.mutants.append(Mutant(node.lineno, title, ".".join(self._names), self._lines, not self._functions, source))

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """Where the text of a node starts and ends, in bytes."""
        end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or node.col_offset
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[end_line - 1] + end_column

    def _text(self, node: ast.expr) -> str:
        start, end = self._span(node)
        return self.bytes[start:end].decode()


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_type_variable(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "TypeVar"


def is_for_others(node: ast.If) -> bool:
    """What only a type checker runs, or only a shell."""
    return any(isinstance(each, ast.Name) and each.id in ("TYPE_CHECKING", "__name__") for each in ast.walk(node.test))


def targets(node: ast.stmt) -> list[str]:
    """The names that an assignment gives a value."""
    assigned = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return [each.id for target in assigned for each in ast.walk(target) if isinstance(each, ast.Name)]


def header(node: ast.stmt) -> frozenset[int]:
    """The lines of a statement, without those of the statements in it."""
    inner = [child.lineno for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.ExceptHandler))]
    inner += [case.pattern.lineno for case in getattr(node, "cases", ())]
    return frozenset(range(node.lineno, max(min(inner, default=(node.end_lineno or 0) + 1), node.lineno + 1)))


def find_uses(tree: ast.Module) -> Callable[[Iterable[str]], set[int]]:
    """A function that tells which lines of functions use names, themselves or through constants made of them."""
    lines: dict[str, set[int]] = defaultdict(set)
    constants: dict[str, set[str]] = defaultdict(set)

    def look(node: ast.AST, names: Sequence[str], in_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Name, ast.Attribute)):
                name = child.id if isinstance(child, ast.Name) else child.attr
                if in_function:
                    lines[name] |= set(range(child.lineno, (child.end_lineno or 0) + 1))
                else:
                    constants[name] |= set(names)
            inner = targets(child) if isinstance(child, ast.stmt) else []
            look(child, inner or names, in_function or isinstance(child, (*FUNCTION, ast.Lambda)))

    def uses(names: Iterable[str]) -> set[int]:
        found: set[str] = set()
        todo = list(names)
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += constants[name]
        return set().union(*(lines[name] for name in found))

    look(tree, [], False)
    return uses


# ---- Runs of pytest, each in a fork


class Recorder:
    """Learns how long each test takes, which ones fail and which ones start processes, and what an import runs."""

    def __init__(self, module: Path) -> None:
        self.module = str(module)
        self.imported: list[int] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.starters: set[str] = set()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, _: object) -> None:
        if event == "subprocess.Popen":
            self.starters.add(os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0])

    def pytest_collection_finish(self) -> None:
        if measuring := coverage.Coverage.current():
            self.imported = measuring.get_data().lines(self.module) or []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)


class Chosen:
    """Runs some tests in their order; the first failure ends the process."""

    def __init__(self, tests: Sequence[str], killer: Path) -> None:
        self.place = {test: number for number, test in enumerate(tests)}
        self.killer = killer

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda item: self.place[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.killer.write_text(report.nodeid)
            os._exit(1)


def fork(task: Callable[[], int], log: Path) -> int:
    """Do a task in a process of its own, the leader of a group; its exit code is what the task returns."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(stream, descriptor)
        code = task()
    finally:
        os._exit(code)


def run_pytest(tree: Path, *args: str, plugins: Sequence[object] = ()) -> int:
    os.chdir(tree)
    return int(pytest.main([*PYTEST, f"--basetemp={tree.parent / 'tmp'}", *args], plugins=list(plugins)))


def copy_tree(directory: Path) -> Path:
    tree = directory / "tree"
    tree.mkdir(parents=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, tree)
    return tree


def warm_up(tree: Path, tests: Sequence[str]) -> None:
    """Import what the tests import, and compile them, but forget what is of the tree: a fork imports that anew."""
    path = sys.path[:]
    with redirect_stdout(io.StringIO()) as output:
        exit_code = run_pytest(tree, "--collect-only", *tests)
    if exit_code:
        sys.exit(output.getvalue())
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tree)):
            del sys.modules[name]
    # Python could take the bytecode of one mutant for that of the next, made in the same second.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    shutil.rmtree(tree / "__pycache__", ignore_errors=True)
    profile = {"phases": [hypothesis.Phase.explicit, hypothesis.Phase.generate], "database": None}
    hypothesis.settings.register_profile("mutants", **profile)  # type: ignore[arg-type]
    hypothesis.settings.load_profile("mutants")


# ---- Which test runs which lines


class Tests:
    """What a run of all tests has shown."""

    def __init__(
        self, seconds: dict[str, float], starters: list[str], imported: list[int], lines: dict[str, list[str]]
    ) -> None:
        self.seconds = seconds
        self._starters = {*starters}
        self._imported = {*imported}
        self._by_line = {int(line): {*tests} for line, tests in lines.items()}
        self._kills: dict[str, Counter[str]] = defaultdict(Counter)  # by group

    def of(self, mutant: Mutant, budget: float) -> list[str]:
        """The tests of a mutant: what killed others in the same function, then the quickest."""
        ran_by = set().union(*(self._by_line.get(line, set()) for line in mutant.lines))
        found = ran_by & self.seconds.keys()
        if mutant.imported or (not found and mutant.lines & self._imported):
            found = {*self.seconds}  # any test may notice, most of all one that uses what was changed
        elif ran_by and not found:  # by a process that a test starts
            found = self._starters
        kills = self._kills[group(mutant)]

        def place(test: str) -> tuple[int, bool, float]:
            return -kills[test], test in self._starters, self.seconds[test] * (1 if test in ran_by else 3)

        chosen: list[str] = []
        for test in sorted(found, key=place):
            budget -= self.seconds[test]
            if budget < 0 and chosen:
                break
            chosen.append(test)
        return chosen

    def count_kill(self, mutant: Mutant, test: str) -> None:
        self._kills[group(mutant)][test] += 1


def group(mutant: Mutant) -> str:
    """What is likely to be noticed by the same tests: a function, or all constants of a class."""
    return mutant.function.rpartition(".")[0] if mutant.imported else mutant.function


def record(tree: Path, files: Sequence[str], result: Path) -> int:
    """Run all tests under coverage, and write what they show."""
    recorder = Recorder(tree / MODULE)
    os.environ["COVERAGE_FILE"] = str(tree.parent / "coverage")
    os.environ["COVERAGE_CORE"] = "ctrace"  # the others know no contexts
    options = ["--cov", "--cov-context=test", "--cov-report=", "--maxfail=1000000"]
    run_pytest(tree, *options, *files, plugins=[recorder])
    measured = coverage.CoverageData(os.environ["COVERAGE_FILE"])
    measured.read()
    contexts = measured.contexts_by_lineno(str(tree / MODULE))
    fine = {test: seconds for test, seconds in recorder.seconds.items() if test not in recorder.failed}
    lines = {line: sorted({context.rpartition("|")[0] for context in found}) for line, found in contexts.items()}
    result.write_text(json.dumps([fine, sorted(recorder.starters & fine.keys()), recorder.imported, lines]))
    return 0


def learn(directory: Path, files: Sequence[str]) -> Tests:
    """Run all tests once, or remember what they showed when they were last run like this."""
    tested_by = (path for path in sorted((ROOT / "tests").rglob("*.py")) if path.parent != Path(__file__).parent)
    digest = hashlib.sha256(
        b"".join([repr(files).encode(), *(path.read_bytes() for path in [ROOT / MODULE, *tested_by])])
    ).hexdigest()
    known = Path(tempfile.gettempdir()) / f"mutants-{os.getuid()}-{digest[:16]}.json"
    if not known.exists():
        say("running all tests once")
        os.waitpid(fork(lambda: record(directory / "tree", files, directory / "map"), directory / "log"), 0)
        if not (directory / "map").exists():
            sys.exit((directory / "log").read_text())
        shutil.move(directory / "map", known)
    tests = Tests(*json.loads(known.read_text()))
    say(f"{len(tests.seconds)} tests pass, in {sum(tests.seconds.values()):.0f} s")
    return tests


# ---- The mutants' trials


class Trial:
    """A mutant in a copy of the tree, and the tests that it is still to meet."""

    def __init__(self, mutant: Mutant, directory: Path, tests: Tests, budget: float) -> None:
        self.mutant = mutant
        self.directory = directory
        self.killer = directory / "killer"
        self.outcome = ""
        self._seconds = tests.seconds
        chosen = tests.of(mutant, budget)
        self._batches = [batch for batch in (chosen[:FIRST], chosen[FIRST:]) if batch]
        (directory / "tree" / MODULE).write_text(mutant.source)
        if not self._batches:
            self.outcome = "run by no test"
        else:
            self._start()

    def _start(self) -> None:
        batch = self._batches.pop(0)
        files = sorted({test.partition("::")[0] for test in batch})
        tree = self.directory / "tree"

        def task() -> int:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            return run_pytest(tree, *files, plugins=[Chosen(batch, self.killer)])

        self.killer.unlink(missing_ok=True)
        self._pid = fork(task, self.directory / "log")
        self._end = time.monotonic() + 10 + 4 * sum(self._seconds[test] for test in batch)

    def is_over(self) -> bool:
        """Look how far it is; a batch that passed is followed by the next."""
        if self.outcome:
            return True
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        late = time.monotonic() > self._end + 3 * waited_for_cpu(self._pid)
        if not pid and not late:
            return False
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        if not pid:
            os.waitpid(self._pid, 0)
            self.outcome = "timeout"
        elif os.waitstatus_to_exitcode(status) not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            self.outcome = "killed"
        elif self._batches:
            self._start()
        else:
            self.outcome = "survived"
        return bool(self.outcome)


def waited_for_cpu(pid: int) -> float:
    """How many seconds a process was kept waiting because the machine was busy; Linux tells."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    return 0


def wait_for_cpu() -> None:
    """Wait until this process is not kept waiting: tests that measure time would fail, whatever the mutant."""
    while True:
        start, used = time.monotonic(), time.process_time()
        while time.process_time() < used + 0.01:
            pass
        if time.monotonic() < start + 0.04:
            return
        time.sleep(0.5)


def try_all(mutants: Sequence[Mutant], tests: Tests, places: list[Path], budget: float) -> Iterator[Trial]:
    """Try mutants, as many at a time as there are places."""
    todo = list(mutants)[::-1]
    running: list[Trial] = []
    while todo or running:
        while todo and len(running) < len(places):
            wait_for_cpu()
            (free, *_) = [place for place in places if place not in [trial.directory for trial in running]]
            running.append(Trial(todo.pop(), free, tests, budget))
        for trial in running[:]:
            if trial.is_over():
                running.remove(trial)
                if trial.killer.exists():
                    tests.count_kill(trial.mutant, trial.killer.read_text())
                yield trial
        time.sleep(0.01)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def summary(outcomes: dict[str, Counter[str]]) -> Iterator[str]:
    """A table, one line a section."""
    yield "| section | mutants | killed | by a timeout | survived | run by no test | killed, % |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for section, counts in [*outcomes.items(), ("all", sum(outcomes.values(), Counter()))]:
        killed = counts["killed"] + counts["timeout"]
        cells = [counts.total(), killed, counts["timeout"], counts["survived"], counts["run by no test"]]
        yield f"| {section} | {' | '.join(map(str, cells))} | {100 * killed / max(counts.total(), 1):.1f} |"


def choose(mutants: Sequence[Mutant], options: argparse.Namespace) -> list[Mutant]:
    first, _, last = options.lines.partition("-")
    chosen = [
        mutant
        for mutant in mutants
        if (not options.section or any(word.lower() in mutant.section.lower() for word in options.section))
        and (not options.function or not {*options.function}.isdisjoint([mutant.function, *mutant.function.split(".")]))
        and (not first or int(first) <= mutant.line <= int(last or first))
    ]
    if options.sample and options.sample < len(chosen):
        places = sorted(random.Random(options.seed).sample(range(len(chosen)), options.sample))
        chosen = [chosen[place] for place in places]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", help="only of sections whose comment line has this word; repeat")
    parser.add_argument("--function", action="append", help="only of this function, method or class; repeat")
    parser.add_argument("--lines", default="", metavar="FROM-TO", help="only of these lines")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many of them, at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at the same time")
    parser.add_argument("--seconds", type=float, default=60, help="of tests for one mutant, at most; default: 60")
    parser.add_argument("--list", action="store_true", help="show the mutants, and run nothing")
    parser.add_argument("tests", nargs="*", default=["tests/unit", "tests/passes", "tests/command_line"])
    options = parser.parse_args()
    original = (ROOT / MODULE).read_text()
    chosen = choose(Finder(original).mutants, options)
    if options.list:
        for mutant in chosen:
            print(f"{mutant.line} {mutant.function}\n{mutant.difference(original)}")
        print(f"{len(chosen)} mutants")
        return
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        places = [Path(scratch) / str(number) for number in range(options.jobs)]
        copy_tree(places[0])
        warm_up(places[0] / "tree", options.tests)
        tests = learn(places[0], options.tests)
        for place in places[1:]:
            shutil.copytree(places[0] / "tree", place / "tree")
        outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        for number, trial in enumerate(try_all(chosen, tests, places, options.seconds), 1):
            mutant = trial.mutant
            outcomes[mutant.section][trial.outcome] += 1
            if trial.outcome != "killed":
                print(f"{mutant.line} {mutant.function}: {trial.outcome}\n{mutant.difference(original)}", flush=True)
            if number % 50 == 0:
                say(f"{number} of {len(chosen)}")
    print("\n".join(["", *summary(outcomes)]))


if __name__ == "__main__":
    main()
