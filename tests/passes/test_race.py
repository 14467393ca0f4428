"""Races: during a pass users come back, servers are started anew, and a second culler works."""

from __future__ import annotations

import re
import threading

import pytest
from hub import RealHub
from processes import Running, Start
from runs import Cull
from scripted_hub import HOUR, LONG_AGO, Answer, Exchange, ScriptedHub, then_do


class Deletes:
    """Counts the DELETEs; with each comes a chance to change what is on the Hub, while it is being handled.

    Servers are taken in the list's order and at most 10 at a time: when the k-th DELETE arrives, no server from the
    place k + 9 of the list on has been looked at.
    """

    def __init__(self, scripted: ScriptedHub) -> None:
        self.count = 0
        self._lock = threading.Lock()
        self._changes: dict[int, list[str]] = {}
        scripted.fault("DELETE", ".*", self._reply, times=None)

    def come_back_at(self, number: int, name: str) -> None:
        """Let a user become active while the DELETE of this number is handled."""
        self._changes.setdefault(number, []).append(name)

    def _reply(self, exchange: Exchange) -> Answer:
        with self._lock:
            self.count += 1
            for name in self._changes.get(self.count, ()):
                exchange.hub.touch(name)
        return exchange.normal()


@pytest.fixture
def _in_list_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.sample", lambda items, _: items)


@pytest.mark.usefixtures("_in_list_order")
def test_of_200_users_the_99_who_come_back_during_the_pass_keep_their_servers(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    names = [f"user-{index:03}" for index in range(200)]
    for name in names:
        scripted.add(name, idle=LONG_AGO, stop_seconds=0.01)
    leave, come_back = names[:101], names[101:]
    deletes = Deletes(scripted)
    for index, name in enumerate(come_back):
        deletes.come_back_at(1 if index < 50 else index, name)  # half of them at once, then one by one

    result = cull_scripted("--timeout", "1h", "--concurrency", "10")

    assert scripted.running() == set(come_back)
    assert sorted(scripted.lines("DELETE")) == [f"DELETE /users/{name}/server" for name in leave]
    assert result.exit_code == 0
    assert result.counts == {"running": 200, "due": 200, "culled": 101, "spared": 99}


@pytest.mark.usefixtures("_in_list_order")
def test_of_200_users_the_99_who_come_back_are_not_deleted_either(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    names = [f"user-{index:03}" for index in range(200)]
    for name in names:
        scripted.add_user(name, idle=LONG_AGO)
    deletes = Deletes(scripted)
    for index, name in enumerate(names[101:]):
        deletes.come_back_at(1 if index < 50 else index, name)
    result = cull_scripted("--timeout", "1h", "--cull-users", "--concurrency", "10")
    assert set(scripted.users) == set(names[101:])
    assert sorted(scripted.lines("DELETE")) == [f"DELETE /users/{name}" for name in names[:101]]
    assert result.exit_code == 0


@pytest.mark.usefixtures("_in_list_order")
def test_a_server_that_is_stopped_and_started_again_meanwhile_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    names = [f"user-{index:02}" for index in range(40)]
    for name in names:
        scripted.add(name, idle=LONG_AGO)
    new = names[20:]

    def start_anew() -> None:
        for name in new:
            scripted.users[name].servers.clear()
            scripted.add(name)

    scripted.fault("DELETE", ".*", then_do(start_anew))
    result = cull_scripted("--timeout", "0", "--concurrency", "10")  # 0: all that is ready is due
    assert scripted.running() == set(new)
    assert not {f"DELETE /users/{name}/server" for name in new} & set(scripted.lines())
    assert {result.outcomes[name] for name in new} == {"spared"}
    assert result.exit_code == 0


# Two cullers


def culled(cullers: list[Running]) -> set[str]:
    """The servers that any of the cullers says it culled; a busy machine may need longer to stop them."""
    return {name for culler in cullers for name in re.findall(r" (?:culled|stopping) ([^:]+): idle", culler.said())}


@pytest.mark.parametrize("arguments", [[], ["--cull-users"]], ids=["servers", "users too"])
def test_two_passes_at_the_same_moment_do_no_harm(scripted: ScriptedHub, start: Start, arguments: list[str]) -> None:
    idle = [f"idle-{index:02}" for index in range(40)]
    for name in idle:
        scripted.add(name, idle=LONG_AGO, stop_seconds=0.05)
    for index in range(5):
        scripted.add(f"busy-{index}", user_idle=LONG_AGO)
    both = threading.Barrier(2, timeout=20)
    scripted.fault("GET", "/users", then_do(both.wait), times=2)  # neither has the list before the other asks for it
    cullers = [start(scripted, "--once", "--timeout=1h", *arguments) for _ in range(2)]
    assert [culler.process.wait(30) for culler in cullers] == [0, 0]
    assert scripted.running() == {f"busy-{index}" for index in range(5)}
    assert scripted.stopped_count == len(idle)
    assert not [line for line in scripted.lines("DELETE") if "busy" in line]
    assert {f"busy-{index}" for index in range(5)} <= scripted.users.keys()
    assert "ERROR" not in "".join(culler.said() for culler in cullers)


def test_two_passes_at_the_same_moment_do_no_harm_to_a_real_hub(hub: RealHub, start: Start) -> None:
    idle = {f"idle-{index:02}" for index in range(20)}
    busy = {f"busy-{index}" for index in range(3)}
    hub.spawn_many(
        [(name, "", {"idle_seconds": 2 * HOUR, "stop_seconds": 0.3}) for name in sorted(idle)]
        + [(name, "", {"idle_seconds": 60, "age_seconds": 3 * HOUR, "user_idle_seconds": 60}) for name in sorted(busy)]
    )
    cullers = [start(hub, "--once", "--timeout=1h") for _ in range(2)]
    assert [culler.process.wait(60) for culler in cullers] == [0, 0], [culler.said() for culler in cullers]
    assert hub.running() == busy
    assert hub.users() == idle | busy
    assert culled(cullers) == idle
    assert not [name for name in busy for culler in cullers if f" {name}:" in culler.said()]
    assert "ERROR" not in "".join(culler.said() for culler in cullers)
