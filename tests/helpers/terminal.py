"""A terminal of any width, to see what an administrator sees."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import termios
from collections.abc import Mapping
from typing import NamedTuple

import pyte
from hub import RealHub
from processes import RUN
from scripted_hub import ScriptedHub

LOGGED_AT = re.compile(r"\d\d:\d\d:\d\d (?=DEBUG|INFO|WARNING|ERROR)")
ROWS = 60  # more than any test needs, so that nothing is scrolled away


class Screen:
    """What a terminal shows of the bytes that it has got."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.screen = pyte.Screen(columns, ROWS)
        self._stream = pyte.ByteStream(self.screen)

    def feed(self, written: bytes) -> None:
        self._stream.feed(written)

    @property
    def rows(self) -> list[str]:
        """The rows from the top to the last that is not blank."""
        return "\n".join(row.rstrip() for row in self.screen.display).rstrip().split("\n")


class Session(NamedTuple):
    """A run of the program in a terminal."""

    exit_code: int
    written: bytes  # to the terminal
    columns: int

    @property
    def screen(self) -> Screen:
        """What it looks like at the end."""
        screen = Screen(self.columns)
        screen.feed(self.written)
        return screen

    @property
    def rows(self) -> list[str]:
        """The rows of the screen at the end; every line of the program's had room in one."""
        rows = self.screen.rows
        assert len(rows) == len(self.written.rstrip().split(b"\n")), rows
        return rows


def environment(hub: RealHub | ScriptedHub, env: Mapping[str, str]) -> dict[str, str]:
    """Nothing of ours but the token, and nothing that says what a terminal is like but `env`."""
    token = hub.token if isinstance(hub, ScriptedHub) else hub.culler_token
    ours = ("CULL_IDLE_", "JUPYTERHUB_", "COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "TERM": "xterm", "JUPYTERHUB_API_TOKEN": token, **env}


def open_terminal(columns: int) -> tuple[int, int]:
    """A terminal of so many columns, and the end of it that a program writes to."""
    terminal, its_end = os.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return terminal, its_end


def in_terminal(hub: RealHub | ScriptedHub, columns: int, *args: str, env: Mapping[str, str] | None = None) -> Session:
    """Run `cull_idle.py --once --url HUB ARGS` in a terminal of so many columns."""
    terminal, its_end = open_terminal(columns)
    try:
        process = subprocess.Popen(
            [*RUN, "--once", "--url", hub.url, *args],
            env=environment(hub, env or {}),
            stdin=its_end,
            stdout=its_end,
            stderr=its_end,
        )
        os.close(its_end)
        written = b""
        with process:
            while chunk := read_some(terminal):
                written += chunk
    finally:
        os.close(terminal)
    assert b"Traceback" not in written, written.decode()
    return Session(process.returncode, written, columns)


def read_some(terminal: int) -> bytes:
    """What is written next, nothing once the other end is closed."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # EIO: how Linux says so
        return b""


def in_pipe(hub: RealHub | ScriptedHub, *args: str, env: Mapping[str, str] | None = None) -> tuple[bytes, bytes]:
    """Run `cull_idle.py --once --url HUB ARGS` without a terminal; returns its stdout and its stderr."""
    done = subprocess.run(
        [*RUN, "--once", "--url", hub.url, *args], env=environment(hub, env or {}), capture_output=True, check=True
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.stdout, done.stderr
