"""What a run of the program comes to, and how tests run it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from hub import RealHub
from scripted_hub import ScriptedHub

TIMESTAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", re.MULTILINE)
# The log's formats, read in this one place. Other tests compare names, outcomes and numbers.
OUTCOME = re.compile(r"([A-Z]+) +(culled|deleted|stopping|gone|spared|failed|warned|kept) (\D[^:]*): (.*)")
DOUBTS = re.compile(r"WARNING +kept (\d+) .*?: (.*)")
COUNT = re.compile(r"(\d+) ([a-z]+(?: [a-z]+)?)(?=,| in )")


class Said(NamedTuple):
    """One line of the log about a server or a user."""

    level: str
    outcome: str
    reason: str


class Doubts(NamedTuple):
    """The line of the log about what is kept in doubt."""

    number: int
    first: str  # "NAME: why"


class Result(NamedTuple):
    """The exit code and the output of one run of the program."""

    exit_code: int
    out: str
    err: str

    @property
    def said(self) -> dict[str, Said]:
        """The last line about each server (`ann`, `ann/gpu`) and user (`user ann`)."""
        matches = filter(None, map(OUTCOME.fullmatch, self.lines))
        return {match[3]: Said(match[1], match[2], match[4]) for match in matches}

    @property
    def outcomes(self) -> dict[str, str]:
        """The outcome of each server and user: {"ann": "culled", "user ann": "deleted"}."""
        return {name: said.outcome for name, said in self.said.items()}

    @property
    def counts(self) -> dict[str, int]:
        """The numbers in the last line about a pass: {"running": 2, "due": 1, "culled": 1}."""
        *_, line = [line for line in self.lines if " pass: " in line]
        return {what: int(count) for count, what in COUNT.findall(line)}

    @property
    def doubts(self) -> Doubts:
        """How many are kept in doubt, and the first of them."""
        found = [Doubts(int(match[1]), match[2]) for match in map(DOUBTS.fullmatch, self.lines) if match]
        assert len(found) <= 1
        return found[0] if found else Doubts(0, "")

    @property
    def errors(self) -> list[str]:
        """The lines at level ERROR."""
        return [line for line in self.lines if line.startswith("ERROR ")]

    @property
    def warnings(self) -> list[str]:
        """The lines at level WARNING."""
        return [line for line in self.lines if line.startswith("WARNING ")]

    @property
    def lines(self) -> list[str]:
        """The lines on stderr, without their timestamps."""
        return TIMESTAMP.sub("", self.err).splitlines()

    @property
    def table(self) -> list[str]:
        """The part of a dry run's output above the bars."""
        return self.out.partition("\n\n")[0].splitlines()


class Cull(Protocol):
    """Runs the program."""

    def __call__(self, *args: str, token: str | None = None, env: Mapping[str, str] | None = None) -> Result: ...


class Loop(NamedTuple):
    """What a loop did."""

    exit_code: int
    passes: list[Result]  # without an exit code of their own
    pauses: list[float]  # seconds, after each pass
    end: str  # what stderr got after the last pause


class RunLoop(Protocol):
    """Runs the program as a loop on a Hub, for one pass more than there are `between`."""

    def __call__(
        self, hub: RealHub | ScriptedHub, *args: str, between: Sequence[Callable[[], object]] = ()
    ) -> Loop: ...
