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
