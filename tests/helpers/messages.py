"""tests/messages.txt: what the program says, in one file that is read as a diff.

A test shows its text to the fixture `says`, which compares it with the section of that test. Nothing else compares
wording. After a change, write the sections of the tests that you run anew, and read the diff. Remove the file first if
a section has lost its test.

    pytest --update-messages
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Callable
from pathlib import Path

FILE = Path(__file__).parents[1] / "messages.txt"
HEAD = "== "
CHANGING = (  # what differs from run to run, and what stands in place of it
    (re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", re.MULTILINE), ""),
    (re.compile(r"\b20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"), "TIME"),
    (re.compile(r"127\.0\.0\.1:\d+"), "HUB"),
    (re.compile(r"(?<= in )\d+\.\d+s\b|(?<=not down after )\d+s"), "N s"),
    (re.compile(r"(?<=[m ])\d+s(?= ago)"), "…s"),
    (re.compile(r'(?<=seconds": )\d+(\.\d+)?|(?<=_ssl\.c:)\d+'), "N"),
    (re.compile(r"/\S*/(popen-gw\d+|pytest-\d+)/[^\s:'\"]*?\d(?=/)"), "TMP"),
)
Says = Callable[[str], None]


def steady(text: str) -> str:
    """The text without what differs from run to run."""
    for pattern, replacement in CHANGING:
        text = pattern.sub(replacement, text)
    return text.rstrip("\n")


def read() -> dict[str, str]:
    """The sections by their heads."""
    text = "\n" + (FILE.read_text("utf-8") if FILE.exists() else "")
    parts = (part.partition("\n") for part in text.split("\n" + HEAD)[1:])
    return {head: body.rstrip("\n") for head, _, body in parts}


def write(head: str, body: str) -> None:
    """Write one section anew; several processes may do so at the same time."""
    with FILE.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sections = {**read(), head: body}
        FILE.write_text("".join(f"{HEAD}{head}\n{body}\n\n" for head, body in sorted(sections.items())), "utf-8")
