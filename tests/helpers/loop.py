"""A loop in this process, pass by pass."""

from __future__ import annotations

import re
import threading

import pytest
from hub import RealHub
from program import TIMESTAMP
from scripted_hub import ScriptedHub
from settings import settings_from

import cull_idle

WARN = ("--timeout=1h", "--warn-before=15m")


class Loop:
    """The passes of a loop, one at a time, and what each says."""

    def __init__(self, hub: RealHub | ScriptedHub, capsys: pytest.CaptureFixture[str], *args: str) -> None:
        self.culler = cull_idle.Culler(settings_from("--url", hub.url, *WARN, *args), threading.Event())
        self.capsys = capsys

    def make_pass(self) -> list[str]:
        cull_idle.open_log(self.culler.settings.level)  # where stderr is now
        self.capsys.readouterr()
        self.culler.report.result(self.culler.make_pass())
        return TIMESTAMP.sub("", self.capsys.readouterr().err).splitlines()

    def warned(self) -> list[str]:
        """The servers that a pass warns of."""
        return sorted(match[1] for line in self.make_pass() if (match := re.match(r"INFO +warned ([^:]+):", line)))
