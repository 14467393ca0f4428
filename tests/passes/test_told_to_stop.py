"""A pass that is told to stop: nothing new is begun, and what is left undone is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Cull
from scripted_hub import LONG_AGO, ScriptedHub, and_do, reset, then_do


def test_a_pass_told_to_stop_starts_no_other_stop(
    cull_scripted: Cull, scripted: ScriptedHub, tell_to_stop: Callable[[], None]
) -> None:
    for number in range(5):
        scripted.add(f"user{number}", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", and_do(tell_to_stop))
    result = cull_scripted("--timeout=1h", "--concurrency=1")
    assert len(scripted.lines("DELETE")) == 1
    assert (result.exit_code, result.counts) == (1, {"running": 5, "due": 5, "culled": 1, "left undone": 4})


@pytest.mark.parametrize("server", [True, False], ids=["server", "user"])
def test_a_pass_told_to_stop_during_a_second_look_deletes_nothing(
    cull_scripted: Cull, scripted: ScriptedHub, tell_to_stop: Callable[[], None], server: bool
) -> None:
    if server:
        scripted.add("ann", idle=LONG_AGO)
    else:
        scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", and_do(tell_to_stop))
    result = cull_scripted("--timeout=1h", "--cull-users")
    assert scripted.lines()[-1] == "GET /users/ann"
    assert result.exit_code == 1
    assert result.counts["left undone"] == result.counts["due"]


def test_a_pass_told_to_stop_during_the_scan_reads_no_other_page(
    cull_scripted: Cull, scripted: ScriptedHub, tell_to_stop: Callable[[], None]
) -> None:
    for number in range(5):
        scripted.add(f"user{number}", idle=LONG_AGO)
    scripted.fault("GET", "/users", and_do(tell_to_stop))
    result = cull_scripted("--timeout=1h", "--api-page-size=2")
    assert scripted.lines() == ["GET /user", "GET /users?state=ready&limit=2"]
    assert result.exit_code == 1


def test_a_pass_told_to_stop_asks_a_slow_arbiter_no_more(
    cull_scripted: Cull, scripted: ScriptedHub, tell_to_stop: Callable[[], None], tmp_path: Path
) -> None:
    for number in range(5):
        scripted.add(f"user{number}", idle=LONG_AGO)
    calls = tmp_path / "calls"
    arbiter = tmp_path / "arbiter.py"
    arbiter.write_text(f"def decide(user): open({str(calls)!r}, 'a').write(user['name'] + ' ')")
    scripted.fault("GET", "/users", and_do(tell_to_stop))
    result = cull_scripted("--timeout=1h", f"--arbiter={arbiter}:decide")
    assert (result.exit_code, calls.exists()) == (1, False)


def test_a_pass_told_to_stop_tries_nothing_again(
    cull_scripted: Cull, scripted: ScriptedHub, tell_to_stop: Callable[[], None]
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", then_do(tell_to_stop, reset()), times=None)
    result = cull_scripted("--timeout=1h")
    assert scripted.lines()[2:] == ["GET /users/ann", "DELETE /users/ann/server"]
    assert result.exit_code == 1
