"""A scene: one pass over the scripted Hub, as a row of a table.

    Scene(
        "a server that is idle for longer than the timeout is stopped",
        [idle("ann"), active("bob")],
        becomes={"ann": "culled"},
    )

Play a table of them with the fixture `play`:

    @pytest.mark.parametrize("scene", SCENES, ids=Scene.__str__)
    def test_scene(scene: Scene, play: Play) -> None:
        play(scene)
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runs import Result
from scripted_hub import LONG_AGO, Answer, Exchange, Reply, Request, ScriptedHub, edited

Given = Callable[[ScriptedHub], object]
"""Makes something true of a Hub."""
Play = Callable[["Scene"], Result]


@dataclass(frozen=True)
class Scene:
    """Who is on the Hub and what goes wrong, how the program is called, and what becomes of whom."""

    name: str  # a sentence, unique in its file
    given: Sequence[Given]
    options: str = ""  # besides --once, --url and --timeout=1h
    becomes: Mapping[str, str] = field(default_factory=dict)  # outcomes in the log: {"ann/gpu": "culled"}; no others
    deletes: Sequence[str] | None = None  # who got a DELETE, once for each; None: those culled, deleted and stopping
    doubts: int = 0  # how many are kept in doubt
    exit: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    says: bool = False  # what it says is in tests/messages.txt

    def __str__(self) -> str:
        return self.name

    @property
    def arguments(self) -> list[str]:
        """The command line."""
        words = shlex.split(self.options)
        return words if any(word.startswith("--timeout") for word in words) else ["--timeout=1h", *words]

    def check(self, result: Result, requests: Sequence[Request]) -> None:
        """Compare what came of it."""
        stopped = [name for name, outcome in self.becomes.items() if outcome in ("culled", "deleted", "stopping")]
        expected = stopped if self.deletes is None else self.deletes
        assert (result.exit_code, result.outcomes, result.doubts.number) == (self.exit, self.becomes, self.doubts), (
            result.err
        )
        assert deleted(requests) == sorted(expected), result.err


def server(name: str, idle: float = 0.0, **fields: Any) -> Given:
    """A ready server, `ann` or `ann/gpu`, idle for so many seconds; `fields` as ScriptedHub.add takes them."""
    user, _, server_name = name.partition("/")
    return lambda hub: hub.add(user, server_name, idle=idle, **fields)


def idle(*names: str, **fields: Any) -> Given:
    """Servers that are idle for two hours."""
    return lambda hub: [server(name, LONG_AGO, **fields)(hub) for name in names]


def active(*names: str, **fields: Any) -> Given:
    """Servers that are in use."""
    return lambda hub: [server(name, **fields)(hub) for name in names]


def user(name: str, idle: float | None = LONG_AGO, **fields: Any) -> Given:
    """A user without a server, last active so many seconds ago (None: never); `fields` as ScriptedHub.add_user."""
    return lambda hub: hub.add_user(name, idle=idle, **fields)


def fault(method: str, pattern: str, *replies: Reply, times: int | None = 1) -> Given:
    """Replies to what matches, as ScriptedHub.fault has them."""
    return lambda hub: hub.fault(method, pattern, *replies, times=times)


def change(name: str, **attributes: Any) -> Given:
    """A server, `ann` or `ann/gpu`, or a user, `user ann`, has these attributes: those of FakeServer and FakeUser."""
    user_name, _, server_name = name.removeprefix("user ").partition("/")

    def do(hub: ScriptedHub) -> None:
        owner = hub.users[user_name]
        for attribute, value in attributes.items():
            setattr(owner if name.startswith("user ") else owner.servers[server_name], attribute, value)

    return do


def edit(request: str, new: Callable[[Any], object]) -> Given:
    """The Hub's next answer to that request, such as `GET /users`, is the JSON that `new` makes of it."""
    method, pattern = request.split()
    return fault(method, pattern, edited(new))


def meanwhile(given: Given, answer: Reply = Exchange.normal) -> Reply:
    """This becomes true, and then the Hub answers."""

    def reply(exchange: Exchange) -> Answer:
        given(exchange.hub)
        return answer(exchange)

    return reply


def having(**attributes: Any) -> Given:
    """A Hub with these attributes: `having(version="1.5.1", page_max=2)`."""

    def change(hub: ScriptedHub) -> None:
        for name, value in attributes.items():
            assert hasattr(hub, name)
            setattr(hub, name, value)

    return change


def deleted(requests: Sequence[Request]) -> list[str]:
    """Who got a DELETE, sorted, once for each: `ann`, `ann/gpu`, `user ann`."""
    names = []
    for request in requests:
        if request.method == "DELETE" and "tokens" not in request.segments:
            _, name, *rest = request.segments
            names.append({0: f"user {name}", 1: name}.get(len(rest)) or f"{name}/{rest[-1]}")
    return sorted(names)
