"""The program as a process of its own: for signals, loops, pipes and terminals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from runs import Result
from scripted_hub import ScriptedHub

PROGRAM = Path(__file__).parents[2] / "cull_idle.py"
RUN = (sys.executable, "-m", "cull_idle")  # compiled only once, as it is where it is installed
LOOP = ("--timeout=1h", "--cull-every=1s")


class Running:
    """A cull_idle.py that runs, and what it has logged so far."""

    def __init__(self, url: str, token: str, *args: str, log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*RUN, "--url", url, *args],
                env={**os.environ, "JUPYTERHUB_API_TOKEN": token},
                stdout=output,
                stderr=output,
            )

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, self.said()
            assert self.process.poll() is None, self.said()
            time.sleep(0.02)

    def tell_to_stop(self) -> None:
        """Send a SIGTERM, and wait until the program has taken it: a second one would end it at once."""
        self.process.send_signal(signal.SIGTERM)
        status = Path(f"/proc/{self.process.pid}/status")
        if status.exists():
            self.wait_for(lambda: not catches(status.read_text(), signal.SIGTERM))
        time.sleep(0.1)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(15)


def catches(status: str, number: signal.Signals) -> bool:
    """True if a process of this /proc/PID/status has a handler for a signal."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


Start = Callable[..., Running]
"""Starts the program with a Hub and arguments."""


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
    ours = ("CULL_IDLE", "JUPYTERHUB", "COV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-c", NOTE_PEAK, str(folder / "peak"), str(PROGRAM), "--once", "--url", hub.url, *args]
    done = subprocess.run(
        command,
        env={**environment, "JUPYTERHUB_API_TOKEN": hub.token},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Result(done.returncode, done.stdout, done.stderr), int((folder / "peak").read_text()) * 1024
