"""-q, as for cron: nothing on success; on failure what an admin needs to act, in a line for each kind of problem."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from conftest import Cull, Result, RunLoop
from hub import RealHub
from scripted_hub import (
    LONG_AGO,
    Answer,
    Exchange,
    Reply,
    ScriptedHub,
    error,
    hang,
    raw,
    reset,
    respond,
    respond_json,
    then_do,
)

QUIET = ("-q", "--timeout=1h")


def fill(scripted: ScriptedHub, due: int) -> None:
    for number in range(due):
        scripted.add(f"user{number}", idle=LONG_AGO)


def sentences(result: Result) -> list[str]:
    """What is said, all of it failures."""
    assert all(line.startswith("ERROR    ") for line in result.lines)
    return [line.removeprefix("ERROR    ") for line in result.lines]


# Success


def test_nothing_is_said_of_what_is_culled_stopping_warned_spared_and_deleted(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many(
        [
            ("ann", "gpu", {"idle_seconds": LONG_AGO, "user_idle_seconds": LONG_AGO, "user_age_seconds": LONG_AGO}),
            ("bob", "", {"idle_seconds": 400}),
            ("cat", "", {"idle_seconds": LONG_AGO, "stop_seconds": 30}),
        ]
    )
    args = ("-q", "--timeout=10m", "--warn-before=9m", "--cull-users", "--remove-named-servers", "--notify=true")
    result = cull_real(*args, token=hub.user_culler_token)
    assert (result.exit_code, result.out, result.err) == (0, "", "")
    assert hub.running() == {"bob"}
    assert "ann" not in hub.users()


@pytest.mark.parametrize("more", [[], ["--timeout=1m"], ["--cull-users"], ["--max-culls=5"]])
def test_nothing_is_said_where_nothing_is_due_or_something_is_in_doubt(
    cull_scripted: Cull, scripted: ScriptedHub, more: list[str]
) -> None:
    scripted.add("ann", idle=1, extra={"pending": 5, "ready": "who knows"})
    scripted.add("gone", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/gone/server", respond(404))
    result = cull_scripted(*QUIET, *more)
    assert (result.exit_code, result.out, result.err) == (0, "", "")


# Failures


def test_2000_failures_of_one_kind_are_two_lines(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, 2000)
    scripted.recording = False
    scripted.fault("GET", "/users/.*", respond_json(500, {"message": "disk full"}), times=None)
    result = cull_scripted(*QUIET)
    assert result.exit_code == 1
    first, more = sentences(result)
    told = r"failed (user\d+): idle 2h, limit 1h; GET /users/\1: the Hub answered 500 \(disk full\)"
    assert re.fullmatch(told, first)
    assert more == "1999 more failed in the same way: GET /users/…: the Hub answered 500"


def test_what_the_hub_says_of_just_one_makes_no_kind(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    def fail(exchange: Exchange) -> Answer:
        return error(500, f"{exchange.request.segments[1]} is stuck (pod a-{id(exchange)} of b)")

    fill(scripted, 20)
    scripted.fault("DELETE", ".*", fail, times=None)
    first, more = sentences(cull_scripted(*QUIET))
    assert re.search(r"failed (user\d+): .* 500 \(\1 is stuck", first)
    assert more == "19 more failed in the same way: the Hub answered 500"


def test_kinds_are_told_apart(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, 9)
    scripted.fault("DELETE", "/users/user[0-2]/server", respond(500), times=None)
    scripted.fault("DELETE", "/users/user[34]/server", respond(418), times=None)
    scripted.fault("GET", "/users/user[56]", respond(500), times=None)
    scripted.fault("GET", "/users/user7", reset(), times=None)
    result = cull_scripted(*QUIET)
    assert result.exit_code == 1
    assert scripted.running() == {f"user{number}" for number in range(8)}
    said = sentences(result)
    assert len(said) == 4 + 3
    assert {line for line in said if "more failed" in line} == {
        "2 more failed in the same way: the Hub answered 500",
        "1 more failed in the same way: the Hub answered 418",
        "1 more failed in the same way: GET /users/…: the Hub answered 500",
    }
    (lost,) = (line for line in said if "user7" in line)
    assert "the connection was lost" in lost


def test_more_than_ten_kinds_are_only_counted(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    statuses = count(600)
    fill(scripted, 50)
    scripted.fault("DELETE", ".*", lambda exchange: Answer(next(statuses)), times=None)
    result = cull_scripted(*QUIET)
    assert result.exit_code == 1
    *said, more = sentences(result)
    assert len(said) == 10
    assert more == "40 more failed in other ways; -v says each"
    scripted.fault("DELETE", ".*", lambda exchange: Answer(next(statuses)), times=None)
    assert cull_scripted("--timeout=1h", "-v").err.count(" failed user") == 50


def test_with_v_each_failure_has_a_line(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, 20)
    scripted.fault("DELETE", ".*", respond(500), times=None)
    result = cull_scripted("-v", "--timeout=1h")
    assert {name for line in result.lines for name in re.findall(r"failed (user\d+): ", line)} == scripted.running()


def test_each_pass_of_a_loop_counts_anew(scripted: ScriptedHub, loop: RunLoop) -> None:
    fill(scripted, 5)
    scripted.fault("DELETE", ".*", respond(500), times=None)
    for each in loop(scripted, *QUIET, between=[lambda: None]).passes:
        first, more = each.lines
        assert first.startswith("ERROR    failed user")
        assert more.startswith("ERROR    4 more failed in the same way")


# A Hub that is gone while servers are being stopped


def go_down(scripted: ScriptedHub) -> Reply:
    def reply(exchange: Exchange) -> Answer:
        scripted.pause_listening()
        return Answer(raw=b"", end="close")

    return reply


GONE: dict[str, tuple[str, Callable[[ScriptedHub], Reply], str]] = {
    "refused connections": ("DELETE", go_down, "refuses the connection; is the Hub running, and --url right?"),
    "lost connections": ("*", lambda _: raw(b""), "the connection was lost before the whole answer had come"),
    "a proxy without a Hub": ("*", lambda _: respond(503), "the Hub answered 503"),
    "no answers": ("*", lambda _: hang(), "did not answer within 0.5s"),
}


@pytest.mark.parametrize(
    ("how", "concurrency"), [(how, number) for how in GONE for number in (1, 8) if (how, number) != ("no answers", 1)]
)
def test_a_hub_that_is_gone_ends_the_pass(
    cull_scripted: Cull, scripted: ScriptedHub, how: str, concurrency: int
) -> None:
    method, make, words = GONE[how]
    fill(scripted, 200)
    for number in range(20):
        scripted.add_user(f"empty{number}", idle=LONG_AGO)
    scripted.fault(method, "/users/.*", make(scripted), times=None)
    last = max(10, 2 * concurrency)
    result = cull_scripted("--timeout=1h", "--cull-users", "--request-timeout=0.5", f"--concurrency={concurrency}")
    assert result.exit_code == 1
    assert len(scripted.running()) >= 200 - concurrency
    said = [line for line in result.lines if line.startswith("ERROR")]
    assert len(said) <= 5  # the first ones may have had a connection, and lost it
    (end,) = (line for line in said if "the pass ends" in line)
    assert f"; the pass ends, because the last {last} all failed so: " in end
    assert words in end
    summary = result.lines[-1]
    failed, undone = (int(re.findall(rf" (\d+) {what}", summary)[0]) for what in ("failed", "left undone"))
    assert last <= failed < 100  # without pauses, a few more fail until that is seen
    assert undone >= 420 - 2 * failed - 2 * concurrency
    assert {user for user in scripted.users if user.startswith("empty")} == {f"empty{number}" for number in range(20)}


def test_when_it_is_back_the_next_pass_does_the_rest(scripted: ScriptedHub, loop: RunLoop) -> None:
    fill(scripted, 50)
    scripted.fault("DELETE", "/users/user25/server", go_down(scripted))
    first, _ = loop(scripted, "--timeout=1h", "--concurrency=1", between=[scripted.resume]).passes
    assert first.counts["culled"] == 25
    assert first.counts["failed"] >= 10  # without pauses, a few more fail until that is seen
    assert first.counts["failed"] + first.counts["left undone"] == 25
    assert scripted.running() == set()


@pytest.mark.parametrize(
    ("method", "fault", "bad"),
    [
        pytest.param("*", reset(), 9, id="nine in a row without an answer"),
        pytest.param("GET", respond(500), 30, id="any number that are answered, with an error"),
    ],
)
def test_bad_users_do_not_keep_the_others_from_being_culled(
    cull_scripted: Cull, scripted: ScriptedHub, method: str, fault: Reply, bad: int
) -> None:
    fill(scripted, 100)
    numbers = "|".join(map(str, [*range(bad), *range(60, 60 + bad)]))
    scripted.fault(method, rf"/users/user({numbers})(/server)?", fault, times=None)
    result = cull_scripted(*QUIET, "--concurrency=1")
    assert result.exit_code == 1
    assert len(scripted.running()) == 2 * bad
    assert "the pass ends" not in result.err


def test_stops_that_take_too_long_are_all_tried(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, 21)
    scripted.fault("DELETE", ".*", hang(), times=None)
    first, more = sentences(cull_scripted(*QUIET, "--request-timeout=0.5"))
    assert "did not answer within 0.5s" in first
    assert more.startswith("20 more failed in the same way: DELETE /users/…: ")


def test_a_file_that_is_not_written_is_a_line(cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path) -> None:
    metrics = tmp_path / "cull_idle.prom"
    scripted.fault("GET", "/users", then_do(metrics.mkdir))
    (line,) = sentences(cull_scripted(*QUIET, "--metrics-file", str(metrics)))
    assert line.startswith(f"--metrics-file {metrics} is not written: ")
