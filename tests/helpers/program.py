"""A run of the program in this process, and what it came to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

TIMESTAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", re.MULTILINE)


class Result(NamedTuple):
    """What a run of the program came to."""

    exit_code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines on stderr, without their timestamps."""
        return TIMESTAMP.sub("", self.err).splitlines()

    @property
    def table(self) -> list[str]:
        """What a dry run shows above the bars."""
        return self.out.partition("\n\n")[0].splitlines()


class Cull(Protocol):
    """Runs the program."""

    def __call__(self, *args: str, token: str | None = None, env: Mapping[str, str] | None = None) -> Result: ...
