"""-q, for cron: nothing on success; on failure one line for each kind of problem."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hub import RealHub
from runs import Cull, RunLoop
from scripted_hub import (
    LONG_AGO,
    Answer,
    Exchange,
    Reply,
    ScriptedHub,
    error,
    hang,
    normal,
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


# Success


def test_nothing_is_said_of_what_is_culled_stopping_warned_spared_and_deleted(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many(
        [
            ("ann", "gpu", {"idle_seconds": LONG_AGO}),
            ("bob", "", {"idle_seconds": 400}),
            ("cat", "", {"idle_seconds": LONG_AGO, "stop_seconds": 30}),
        ]
    )
    hub.add_user("eve", idle_seconds=LONG_AGO, age_seconds=LONG_AGO)
    args = ("-q", "--timeout=10m", "--warn-before=9m", "--cull-users", "--remove-named-servers", "--notify=true")
    result = cull_real(*args, token=hub.user_culler_token)
    assert (result.exit_code, result.out, result.err) == (0, "", "")
    assert hub.running() == {"bob"}
    assert hub.users() >= {"ann"}
    assert "eve" not in hub.users()


@pytest.mark.parametrize("more", [[], ["--timeout=1m"], ["--cull-users"], ["--max-culls=5"]])
def test_nothing_is_said_where_nothing_is_due_or_something_is_in_doubt(
    cull_scripted: Cull, scripted: ScriptedHub, more: list[str]
) -> None:
    scripted.add("ann", idle=1, extra={"pending": 5, "ready": "who knows"})
    scripted.add("gone", idle=LONG_AGO)
    scripted.fault("GET", "/users/gone", then_do(lambda: scripted.users.pop("gone")))
    result = cull_scripted(*QUIET, *more)
    assert (result.exit_code, result.out, result.err) == (0, "", "")


# Failures


def test_500_failures_of_one_kind_are_two_lines(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, 500)
    scripted.recording = False
    scripted.fault("GET", "/users/.*", respond_json(500, {"message": "disk full"}), times=None)
    result = cull_scripted(*QUIET)
    assert result.exit_code == 1
    first, more = result.errors
    assert len(result.lines) == 2
    assert re.search(r" failed (user\d+): .*GET /users/\1: .*500 \(disk full\) \(\d+ of 500\)$", first)
    assert " 499 more " in more
    assert "500" in more


def test_messages_of_the_hub_do_not_make_different_kinds(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    def fail(exchange: Exchange) -> Answer:
        return error(500, f"{exchange.request.segments[1]} is stuck (pod a-{id(exchange)} of b)")

    fill(scripted, 20)
    scripted.fault("DELETE", ".*", fail, times=None)
    first, more = cull_scripted(*QUIET).errors
    assert re.search(r" failed (user\d+): .* 500 \(\1 is stuck", first)
    assert " 19 more " in more


def test_kinds_are_told_apart(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, 9)
    scripted.fault("DELETE", "/users/user[0-2]/server", respond(500), times=None)
    scripted.fault("DELETE", "/users/user[34]/server", respond(418), times=None)
    scripted.fault("GET", "/users/user[56]", respond(500), times=None)
    scripted.fault("GET", "/users/user7", reset(), times=None)
    result = cull_scripted(*QUIET)
    assert result.exit_code == 1
    assert scripted.running() == {f"user{number}" for number in range(8)}
    assert len(result.outcomes) == 4
    assert len(result.errors) == 4 + 3
    more = [line for line in result.errors if " more " in line]
    kinds = [(*re.findall(r" (\d+) more .*(\d{3})$", line)[0], "GET" in line) for line in more]
    assert sorted(kinds) == [("1", "418", False), ("1", "500", True), ("2", "500", False)]
    assert "user7" in result.outcomes


def test_verbose_shows_each_failure(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, 20)
    scripted.fault("DELETE", ".*", respond(500), times=None)
    result = cull_scripted("-v", "--timeout=1h")
    assert result.outcomes == dict.fromkeys(scripted.running(), "failed")


def test_each_pass_of_a_loop_reports_its_own_failures(scripted: ScriptedHub, loop: RunLoop) -> None:
    fill(scripted, 5)
    scripted.fault("DELETE", ".*", respond(500), times=None)
    for each in loop(scripted, *QUIET, between=[lambda: None]).passes:
        assert list(each.outcomes.values()) == ["failed"]
        assert len(each.lines) == 2
        assert " 4 more " in each.lines[1]


# A Hub that is gone while servers are being stopped


def go_down(scripted: ScriptedHub) -> Reply:
    def reply(exchange: Exchange) -> Answer:
        scripted.pause_listening()
        return Answer(raw=b"", end="close")

    return reply


GONE: dict[str, tuple[str, Callable[[ScriptedHub], Reply]]] = {
    "refused connections": ("DELETE", go_down),
    "lost connections": ("*", lambda _: raw(b"")),
    "a proxy without a Hub": ("*", lambda _: respond(503)),
    "no answers": ("*", lambda _: hang()),
}


@pytest.mark.parametrize(
    ("how", "concurrency"), [(how, number) for how in GONE for number in (1, 8) if (how, number) != ("no answers", 1)]
)
def test_a_hub_that_is_gone_ends_the_pass(
    cull_scripted: Cull, scripted: ScriptedHub, how: str, concurrency: int
) -> None:
    method, make = GONE[how]
    fill(scripted, 1000)
    for number in range(20):
        scripted.add_user(f"empty{number}", idle=LONG_AGO)
    scripted.fault(method, "/users/.*", make(scripted), times=None)
    last = max(10, 2 * concurrency)
    result = cull_scripted("--timeout=1h", "--cull-users", "--request-timeout=0.5", f"--concurrency={concurrency}")
    assert result.exit_code == 1
    assert len(scripted.running()) >= 1000 - concurrency
    assert len(result.errors) <= 5  # the first requests may lose an open connection
    assert len([line for line in result.errors if f" {last} failures " in line]) == 1
    failed, undone = result.counts["failed"], result.counts["left undone"]
    assert last <= failed < 1000  # there are no pauses, so a few more fail before the pass ends
    assert undone >= 1020 - failed - concurrency
    assert {user for user in scripted.users if user.startswith("empty")} == {f"empty{number}" for number in range(20)}


def test_the_next_pass_does_the_rest_once_the_hub_is_back(scripted: ScriptedHub, loop: RunLoop) -> None:
    fill(scripted, 300)
    scripted.fault("DELETE", ".*", *[normal()] * 25, go_down(scripted))
    first, _ = loop(scripted, "--timeout=1h", "--concurrency=1", between=[scripted.resume]).passes
    assert first.counts["culled"] == 25
    assert first.counts["failed"] >= 10  # there are no pauses, so a few more fail before the pass ends
    assert first.counts["failed"] + first.counts["left undone"] == 275
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


def test_stops_that_take_too_long_are_all_tried(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, 21)
    scripted.fault("DELETE", ".*", hang(), times=None)
    first, more = cull_scripted(*QUIET, "--request-timeout=0.5").errors
    assert "0.5s" in first
    assert " 20 more " in more
