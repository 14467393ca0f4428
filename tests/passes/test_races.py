"""Races: users come back, servers start anew, the program is told to stop, or a second culler works, during a pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import RealHub
from processes import Running, Start
from runs import Cull, Result
from scenes import Given, Play, Scene, fault, idle, server, user
from scripted_hub import (
    HOUR,
    LONG_AGO,
    Answer,
    Exchange,
    ScriptedHub,
    and_do,
    reset,
    then_do,
)

# Users come back


class ComeBack:
    """With each DELETE some users come back, while it is being handled.

    Servers are taken in the list's order and at most 10 at a time: when the k-th DELETE arrives, no server from the
    place k + 9 of the list on has been looked at.
    """

    def __init__(self, names: list[str]) -> None:
        self.at = {
            name: 1 if index < 50 else index for index, name in enumerate(names)
        }  # half at once, then one by one
        self._count = 0
        self._lock = threading.Lock()

    def __call__(self, exchange: Exchange) -> Answer:
        with self._lock:
            self._count += 1
            for name in (name for name, number in self.at.items() if number == self._count):
                exchange.hub.touch(name)
        return exchange.normal()


NAMES = [f"user-{index:03}" for index in range(200)]


@pytest.mark.parametrize(
    "due", [idle(*NAMES), lambda hub: [user(name)(hub) for name in NAMES]], ids=["servers", "users"]
)
def test_of_200_due_the_99_who_come_back_during_the_pass_are_spared(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, due: Given
) -> None:
    monkeypatch.setattr("random.sample", lambda items, _: items)
    due(scripted)
    of = "" if scripted.running() else "user "
    scripted.fault("DELETE", ".*", ComeBack(NAMES[101:]), times=None)
    result = cull_scripted("--timeout=1h", "--cull-users", "--concurrency=10")
    gone, back = [f"{of}{name}" for name in NAMES[:101]], [f"{of}{name}" for name in NAMES[101:]]
    assert result.outcomes == dict.fromkeys(gone, "deleted" if of else "culled") | dict.fromkeys(back, "spared")
    assert len(scripted.lines("DELETE")) == len(gone)
    assert set(back) == ({f"user {name}" for name in scripted.users} if of else scripted.running())
    assert result.exit_code == 0


@pytest.mark.parametrize(("due", "name"), [(idle("ann"), "ann"), (user("ann", age=9 * HOUR), "user ann")])
def test_who_comes_back_while_the_second_look_is_on_its_way_is_kept(
    play: Play, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, due: Given, name: str
) -> None:
    """The Hub answers what was true when it made the answer up. If that takes a while, there is another look."""
    monkeypatch.setattr("cull_idle.OLD_DECISION", 0.0)
    back = fault("GET", "/users/ann", and_do(lambda: scripted.touch("ann")))
    play(Scene("", [due, back], "--cull-users", {name: "spared"}))


# The program is told to stop


def test_once_told_to_stop_no_slow_arbiter_is_called(
    cull_scripted: Cull, scripted: ScriptedHub, tell_to_stop: Callable[[], None], tmp_path: Path
) -> None:
    """For requests, see test_loop.py."""
    calls, arbiter = tmp_path / "calls", tmp_path / "arbiter.py"
    arbiter.write_text(f"def decide(user): open({str(calls)!r}, 'a').write(user['name'])")
    idle("ann", "bob")(scripted)
    scripted.fault("GET", "/users", and_do(tell_to_stop))
    assert cull_scripted("--timeout=1h", f"--arbiter={arbiter}:decide").exit_code == 1
    assert not calls.exists()


# Two cullers


def culled(cullers: list[Running]) -> set[str]:
    """The servers that any of the cullers says it stops."""
    said = [Result(0, "", culler.said()).outcomes for culler in cullers]
    return {name for outcomes in said for name, outcome in outcomes.items() if outcome in ("culled", "stopping")}


@pytest.mark.parametrize("arguments", [[], ["--cull-users"]], ids=["servers", "users too"])
def test_two_passes_at_the_same_moment_do_no_harm(scripted: ScriptedHub, start: Start, arguments: list[str]) -> None:
    due = [f"idle-{index:02}" for index in range(40)]
    busy = {f"busy-{index}" for index in range(5)}
    idle(*due, stop_seconds=0.05)(scripted)
    for name in busy:
        scripted.add(name, user_idle=LONG_AGO)
    both = threading.Barrier(2, timeout=60)
    scripted.fault("GET", "/users", then_do(both.wait), times=2)  # neither has the list before the other asks for it
    cullers = [start(scripted, "--once", "--timeout=1h", *arguments) for _ in range(2)]
    assert [culler.process.wait(60) for culler in cullers] == [0, 0]
    assert (scripted.running(), scripted.stopped_count, culled(cullers)) == (busy, len(due), set(due))
    assert not [line for line in scripted.lines("DELETE") if "busy" in line]
    assert busy <= scripted.users.keys()


def test_two_passes_at_the_same_moment_do_no_harm_to_a_real_hub(hub: RealHub, start: Start) -> None:
    due, busy = {f"idle-{index:02}" for index in range(20)}, {f"busy-{index}" for index in range(3)}
    in_use = {"idle_seconds": 60, "age_seconds": 3 * HOUR, "user_idle_seconds": 60}
    hub.spawn_many(
        [(name, "", {"idle_seconds": 2 * HOUR, "stop_seconds": 0.3}) for name in sorted(due)]
        + [(name, "", in_use) for name in sorted(busy)]
    )
    cullers = [start(hub, "--once", "--timeout=1h") for _ in range(2)]
    assert [culler.process.wait(60) for culler in cullers] == [0, 0], [culler.said() for culler in cullers]
    assert (hub.running(), hub.users(), culled(cullers)) == (busy, due | busy, due)


# What else an adversary found: odd names, unknown times, and what nobody can print


SCENES = [
    Scene(
        "a name that leads to a server that has just come is not stopped",
        [
            server("ann/a?x", LONG_AGO),
            lambda hub: hub.fault("GET", "/users(/ann)?.*", and_do(lambda: hub.add("ann", "a"))),
        ],
        becomes={"ann/a?x": "failed"},
        exit=1,
    ),
    *(
        Scene(f"the name {name!r} is not sent", [idle(f"ann/{name}")], becomes={f"ann/{shown}": "failed"}, exit=1)
        for name, shown in {".. ": ".. ", ".\t.": ".\\t.", "..\n": "..\\n", "..\0": "..\\x00"}.items()
    ),
]


@pytest.mark.parametrize("scene", SCENES, ids=Scene.__str__)
def test_scene(scene: Scene, play: Play) -> None:
    play(scene)


@pytest.mark.parametrize("name", ["a?x", "a#1", "a%3Fx"])
def test_a_server_with_an_odd_name_is_stopped_but_not_removed(
    cull_scripted: Cull, scripted: ScriptedHub, name: str
) -> None:
    """Behind a proxy that decodes paths, the stopped server `a` would be removed, with its storage."""
    idle(f"ann/{name}", "ann/plain")(scripted)
    assert set(cull_scripted("--timeout=1h", "--remove-named-servers").outcomes.values()) == {"culled"}
    bodies = {request.segments[-1]: request.body for request in scripted.requests if request.method == "DELETE"}
    assert bodies == {name: b"", "plain": b'{"remove": true}'}


@pytest.mark.parametrize("path", ["/{x}/hub/api", "/{}/hub/api", "/{url}/hub/api"])
@pytest.mark.parametrize("scheme", ["http:", "https:"])
def test_braces_in_the_url_are_shown(cull: Cull, scripted: ScriptedHub, path: str, scheme: str) -> None:
    """As in a template that was not filled in."""
    scripted.fault("*", ".*", reset(), times=None)
    result = cull("--once", "--url", scripted.url.replace("/hub/api", path).replace("http:", scheme), token="token")
    assert (result.exit_code, path in result.err) == (3, True)
