"""The pauses between the passes of a loop. The loop runs in this process, and its pauses take no time."""

from __future__ import annotations

import pytest
from runs import Cull, Loop, RunLoop
from scripted_hub import LONG_AGO, ScriptedHub, normal, respond, slow


def nothing() -> None:
    pass


def test_passes_that_work_are_cull_every_apart(loop: RunLoop, scripted: ScriptedHub) -> None:
    pauses = loop(scripted, "--cull-every=20s", between=[nothing] * 2).pauses
    assert len(pauses) == 3
    assert all(19 <= each <= 20 for each in pauses)


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        (["--timeout=1h"], 1800),
        ([], 300),
        (["--timeout=1s"], 1),
        (["--timeout=0"], 300),
        (["--timeout=0", "--max-age=4h"], 7200),
        (["--timeout=never", "--max-age=4h"], 7200),
        (["--timeout=never"], 300),
    ],
)
def test_cull_every_is_half_the_timeout_or_the_maximum_age(
    loop: RunLoop, scripted: ScriptedHub, arguments: list[str], seconds: int
) -> None:
    (pause,) = loop(scripted, *arguments).pauses
    assert seconds - 1 <= pause <= seconds


def test_a_pass_that_takes_longer_than_cull_every_is_followed_at_once(loop: RunLoop, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", slow(1.1))
    assert loop(scripted, "--cull-every=1s").pauses == [0]


def test_pauses_grow_while_passes_fail_and_shrink_when_one_works(loop: RunLoop, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", *[respond(403)] * 4, normal(), respond(403))
    pauses = loop(scripted, "--cull-every=10s", between=[nothing] * 5).pauses
    assert [round(each) for each in pauses] == [2, 4, 8, 10, 10, 2]


def test_a_pass_says_in_how_many_seconds_the_next_one_starts(loop: RunLoop, scripted: ScriptedHub) -> None:
    result: Loop = loop(scripted, "--cull-every=20s", between=[nothing])
    assert [each.lines[-1].endswith(" 20s") for each in result.passes] == [True, True]
    assert result.exit_code == 0


def test_a_scope_that_is_taken_away_is_named(loop: RunLoop, scripted: ScriptedHub) -> None:
    """Without read:servers no server is shown, which is a doubt about each user, but no failure."""
    scripted.add("ann", idle=LONG_AGO)

    def take_away() -> None:
        scripted.scopes = [scope for scope in scripted.scopes if scope != "read:servers"]

    *_, last = loop(scripted, "--timeout=9h", between=[take_away, nothing]).passes
    assert len(last.errors) == 1
    assert "read:servers" in last.errors[0]


def test_a_loop_does_not_begin_without_a_token(cull: Cull, scripted: ScriptedHub) -> None:
    assert cull("--url", scripted.url).exit_code == 2
    assert scripted.requests == []
