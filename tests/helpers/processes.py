"""The program as a process of its own, for signals, streams and terminals. The one way to wait for something."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyte
from hub import RealHub
from runs import Result
from scripted_hub import ScriptedHub

AnyHub = RealHub | ScriptedHub
PROGRAM = Path(__file__).parents[2] / "cull_idle.py"
RUN = (sys.executable, "-m", "cull_idle")  # compiled only once, as it is where it is installed
LOOP = ("--timeout=1h", "--cull-every=1s")
PATIENCE = 60  # seconds after which a test that waits fails; on a loaded machine a start takes several
ROWS = 60  # of a terminal: more than any test needs, so that nothing is scrolled away
NOT_KEPT = ("CULL_IDLE_", "JUPYTERHUB_", "COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM", "PYTHONUNBUFFERED")


def wait_for(condition: Callable[[], object], said: Callable[[], str] = lambda: "it does not come true") -> None:
    """Wait until something that another thread or process does is true; fail with what is `said` if that takes long."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.005)


def token_of(hub: AnyHub) -> str:
    """The token of a culler."""
    return hub.token if isinstance(hub, ScriptedHub) else hub.culler_token


def environment(hub: AnyHub, env: Mapping[str, str]) -> dict[str, str]:
    """Nothing of ours but the token, and nothing that changes how output is written but `env`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_KEPT)}
    return {**kept, "TERM": "xterm", "JUPYTERHUB_API_TOKEN": token_of(hub), **env}


class Running:
    """A cull_idle.py that runs, and what it has logged so far."""

    def __init__(self, hub: AnyHub, *args: str, log: Path, run: Sequence[str] = RUN, **streams: Any) -> None:
        """Its stdout and stderr go to the log; `streams` says otherwise, as subprocess has it."""
        self.log = log
        with log.open("wb") as output:
            streams = {"stdout": output, "stderr": output, **streams}
            self.process = subprocess.Popen([*run, "--url", hub.url, *args], env=environment(hub, {}), **streams)

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until something is true while the program runs."""

        def holds() -> bool:
            if condition():
                return True
            assert self.process.poll() is None, self.said()
            return False

        wait_for(holds, self.said)

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(PATIENCE)

    def end(self, number: signal.Signals) -> int:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        return self.wait()


Start = Callable[..., Running]
"""Starts the program with a Hub and arguments."""


# In a terminal


class Screen:
    """What a terminal shows of the bytes that it has got: its rows, from the top to the last that is not blank."""

    def __init__(self, columns: int, written: bytes) -> None:
        screen = pyte.Screen(columns, ROWS)
        pyte.ByteStream(screen).feed(written)
        self.rows = "\n".join(row.rstrip() for row in screen.display).rstrip().split("\n")


class Session(NamedTuple):
    """A run of the program in a terminal: what it has written there, and what that looks like."""

    exit_code: int
    written: bytes
    screen: Screen


def open_terminal(columns: int) -> tuple[int, int]:
    """A terminal of so many columns, and the end of it that a program writes to."""
    terminal, its_end = os.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return terminal, its_end


def read_some(terminal: int) -> bytes:
    """What is written next, nothing once the other end is closed."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # EIO: how Linux says so
        return b""


def in_terminal(hub: AnyHub, columns: int, *args: str, env: Mapping[str, str] | None = None) -> Session:
    """Run `cull_idle.py --once --url HUB ARGS` in a terminal of so many columns."""
    terminal, its_end = open_terminal(columns)
    command, written = [*RUN, "--once", "--url", hub.url, *args], b""
    with subprocess.Popen(
        command, env=environment(hub, env or {}), stdin=its_end, stdout=its_end, stderr=its_end
    ) as process:
        os.close(its_end)
        while chunk := read_some(terminal):
            written += chunk
    os.close(terminal)
    assert b"Traceback" not in written, written.decode()
    return Session(process.returncode, written, Screen(columns, written))


# How much memory it takes

# Runs the program; at its end, notes its peak memory. That of wait4 also counts the process that it comes from.
NOTE_PEAK = """
import atexit, pathlib, runpy, sys

def note():
    status = pathlib.Path("/proc/self/status").read_text()
    pathlib.Path(file).write_text(status.partition("VmHWM:")[2].split()[0])

_, file, *sys.argv = sys.argv
atexit.register(note)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_measured(hub: ScriptedHub, folder: Path, *args: str) -> tuple[Result, int]:
    """Run `cull_idle.py --once --url HUB ARGS` as a process; returns its peak memory in bytes, too."""
    command = [sys.executable, "-c", NOTE_PEAK, str(folder / "peak"), str(PROGRAM), "--once", "--url", hub.url, *args]
    done = subprocess.run(command, env=environment(hub, {}), capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return Result(done.returncode, done.stdout, done.stderr), int((folder / "peak").read_text()) * 1024
