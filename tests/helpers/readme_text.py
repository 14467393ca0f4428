"""The README, taken apart: its blocks of code, its sections and their tables."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


class Block(NamedTuple):
    """A block of code in the README."""

    language: str
    text: str


def code_blocks() -> list[Block]:
    found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
    return [Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]


BLOCKS = code_blocks()


def section(heading: str) -> str:
    """What stands under a heading, up to the next one."""
    parts = re.split(r"^##+ (.*)\n", README, flags=re.MULTILINE)  # one # is a comment in a block of code
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert heading in found, f"the README has no heading {heading}"
    return found[heading]


def prose(heading: str) -> str:
    """The same, wherever its lines are broken."""
    return " ".join(section(heading).split())


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two rows."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [
        [cell.strip().strip("`").replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines[2:]
    ]
