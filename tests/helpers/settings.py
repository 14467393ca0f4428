"""The settings that the program makes of its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import cull_idle


def settings_from(*args: str) -> cull_idle.Settings:
    """The settings of a command line, without a run."""
    ctx = cull_idle.make_command().make_context(cull_idle.PROGRAM, list(args))
    return cull_idle.Settings(**ctx.params)


class SettingsOf(Protocol):
    """Returns the settings that the program would run with."""

    def __call__(self, *args: str, env: Mapping[str, str] | None = None) -> cull_idle.Settings: ...
