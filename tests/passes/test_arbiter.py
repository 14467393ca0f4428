"""--arbiter: the administrator's own function decides in place of --timeout. It is `f` of each source below."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scenes import Play, Scene, active, idle, server
from scripted_hub import HOUR

# The example of jupyterhub-idle-culler's documentation, below the line with which its --generate-config begins.
DOCUMENTED = """
c = get_config()  #noqa

def f(inactive, inactive_limit, server):
    if server['state']['profile_name'] == 'unlimited':
        return False
    return inactive.total_seconds() >= inactive_limit
c.IdleCuller.cull_arbiter_hook = f
"""
POSTPONED = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Decision:
    cull: bool

def f():
    return Decision(cull=True).cull
"""
ONE_LOOP = """
import asyncio
loops = set()

async def f():
    loops.add(asyncio.get_running_loop())
    return len(loops) == 1
"""
NOT_FOR_THREADS = """
import time
running = []

def f():
    running.append(1)
    time.sleep(0.01)
    alone = len(running) == 1
    running.pop()
    return alone
"""
ANN_ENDS = "import asyncio, sys\n{}def f(user):\n    if user['name'] == 'ann': {}\n    return True"

PROFILES = [
    idle("ann", state={"profile_name": "unlimited"}),
    idle("bob", state={"profile_name": "small"}),
    active("cat", state={"profile_name": "small"}),
    lambda hub: hub.scopes.append("admin:server_state"),
]
CULL = [
    "def f(): return True",
    "def f(*, user): return user['name'] == 'ann' and user['servers']['']['ready']",
    "def f(**given): return sorted(given) == ['inactive', 'inactive_limit', 'server', 'user']",
    "def f(inactive, inactive_limit, x=7): return inactive.total_seconds() < inactive_limit == 3600",
    "import asyncio\nasync def f(server): return await asyncio.sleep(0, server['name'] == '')",
    "class F:\n    def __call__(self, server): return True\nf = F()",
    POSTPONED,
]
KEEP = ["def f(): return False", "def f(): return None"]
TWELVE = {f"user-{number}": "culled" for number in range(12)}
ARBITERS: list[tuple[str, Scene]] = [
    (DOCUMENTED, Scene("the reference's documented example", PROFILES, becomes={"bob": "culled"}, says=True)),
    (DOCUMENTED.replace("def f", "async def f"), Scene("the example made async", PROFILES, becomes={"bob": "culled"})),
    *(
        (source, Scene(f"an active server is culled by {source!r}", [active("ann")], becomes={"ann": "culled"}))
        for source in CULL
    ),
    *((source, Scene(f"an idle server is kept by {source!r}", [idle("ann")])) for source in KEEP),
    (
        "def f(server): return 1 / server['user_options']['x'] > 0",
        Scene(
            "an arbiter that fails keeps that server, and it is said",
            [idle("ann", user_options={"x": 0}), idle("bob", user_options={"x": 1})],
            becomes={"bob": "culled"},
            doubts=1,
            says=True,
        ),
    ),
    (
        "def f(user): return user['name'] != 'old'",
        Scene(
            "an arbiter replaces neither the maximum age nor the flags nor the rules",
            [server("old", age=10 * HOUR), idle("ann/gpu", "bob", "kim"), idle("pat", pending="stop")],
            options="--max-age=9h --cull-named-servers=false --rule='user=kim keep'",
            becomes={"old": "culled", "bob": "culled"},
        ),
    ),
    (
        "asked = []\ndef f(): asked.append(1); return len(asked) == 1",
        Scene("the second look asks the arbiter again", [idle("ann")], becomes={"ann": "spared"}, says=True),
    ),
    (
        "asked = []\ndef f(): asked.append(1); return 1 / (2 - len(asked)) > 0",
        Scene("an arbiter that fails in the second look", [idle("ann")], becomes={"ann": "spared"}, says=True),
    ),
    (
        "asked = []\ndef f(): asked.append(1); return len(asked) == 1 or exit(0)",
        Scene("an arbiter that tries to end the program in the second look", [idle("ann")], becomes={"ann": "spared"}),
    ),
    (ONE_LOOP, Scene("all calls are in one event loop", [active(*TWELVE)], becomes=TWELVE)),
    (NOT_FOR_THREADS, Scene("an arbiter is called once at a time", [active(*TWELVE)], becomes=TWELVE)),
    *(
        (
            ANN_ENDS.format(prefix, end),
            Scene(
                f"an arbiter that {prefix}tries to end the program by {end} keeps that server",
                [idle("ann", "bob")],
                becomes={"bob": "culled"},
                doubts=1,
            ),
        )
        for prefix in ("", "async ")
        for end in ("sys.exit(0)", "raise SystemExit", "raise asyncio.CancelledError")
    ),
]


@pytest.mark.parametrize(("source", "scene"), [pytest.param(*each, id=each[1].name) for each in ARBITERS])
def test_an_arbiter_decides(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, scene: Scene
) -> None:
    (tmp_path / "arbiter.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    play(replace(scene, options=f"--arbiter=arbiter.py:f {scene.options}"))


def test_an_arbiter_may_be_in_a_module(play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our_arbiter.py").write_text("def f(): return True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "our_arbiter", raising=False)
    importlib.invalidate_caches()
    play(Scene("", [active("ann")], options="--arbiter=our_arbiter:f", becomes={"ann": "culled"}))
