"""For tests of what only the redesigned module does."""

from __future__ import annotations

import pytest
from _pytest.mark import ParameterSet


def red(why: str, *parameters: object) -> list[ParameterSet]:
    """Parameters, tuples for several, with which a test fails on the module before its redesign, and why it does."""
    marks = pytest.mark.xfail(strict=True, reason=why)
    return [pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=marks) for each in parameters]
