"""Scenes: one pass each, as rows of a table. A new decision is a new row."""

from __future__ import annotations

import pytest
from scenes import Play, Scene, active, fault, having, idle, server, user
from scripted_hub import LONG_AGO, respond

DECISIONS = [
    Scene(
        "a server that is idle for longer than the timeout is stopped",
        [idle("ann"), active("bob")],
        becomes={"ann": "culled"},
        says=True,
    ),
    Scene(
        "a user is deleted if no server is there",
        [user("ann"), user("bob", idle=0), idle("cat"), having(page_max=2)],
        options="--cull-users",
        becomes={"user ann": "deleted", "cat": "culled"},
    ),
    Scene(
        "a stop that fails once is tried again",
        [idle("ann"), fault("DELETE", "/users/ann/server", respond(503))],
        becomes={"ann": "culled"},
        deletes=["ann", "ann"],
    ),
    Scene(
        "a server that reached --max-age is stopped although it is in use",
        [server("ann", age=LONG_AGO)],
        options="--max-age=90m",
        becomes={"ann": "culled"},
        says=True,
    ),
]


@pytest.mark.parametrize("scene", DECISIONS, ids=Scene.__str__)
def test_scene(scene: Scene, play: Play) -> None:
    play(scene)
