"""The loop, as a process: passes one after another, whatever the Hub does meanwhile."""

import signal
import time
from itertools import pairwise

from hub import RealHub
from processes import LOOP, Running, Start
from runs import Result
from scripted_hub import HOUR, LONG_AGO, ScriptedHub, normal, then_do


def culled(culler: Running) -> set[str]:
    outcomes = Result(0, "", culler.said()).outcomes
    return {name for name, outcome in outcomes.items() if outcome == "culled"}


def test_the_first_pass_starts_at_once_and_the_next_after_cull_every(hub: RealHub, start: Start) -> None:
    hub.spawn("ann", idle_seconds=LONG_AGO)
    culler = start(hub, *LOOP)
    culler.wait_for(lambda: culled(culler) == {"ann"})
    hub.spawn("bob", wait=False, idle_seconds=LONG_AGO)
    culler.wait_for(lambda: culled(culler) == {"ann", "bob"})
    assert hub.running() == set()


def test_passes_start_cull_every_apart_and_never_overlap(scripted: ScriptedHub, start: Start) -> None:
    scripted.fault("GET", "/users", then_do(lambda: time.sleep(1.5)), normal(), times=None)
    culler = start(scripted, *LOOP)
    culler.wait_for(lambda: scripted.lines().count("GET /users?state=ready&limit=200") >= 4)
    times = [request.time for request in scripted.requests if request.path.startswith("/users")]
    long, short, again = (later - earlier for earlier, later in pairwise(times[:4]))
    assert long >= 1.5  # the pass took longer than --cull-every; the next one started right after it
    assert short >= 0.9
    assert again >= 1.5


def test_the_loop_survives_a_hub_that_is_down_for_a_while(hub: RealHub, start: Start) -> None:
    hub.spawn("ann", idle_seconds=60)
    culler = start(hub, *LOOP)
    culler.wait_for(lambda: " pass: " in culler.said())
    hub.stop()
    culler.wait_for(lambda: "ERROR" in culler.said())
    hub.start()
    hub.touch("ann", idle_seconds=2 * HOUR)
    culler.wait_for(lambda: culled(culler) == {"ann"})
    assert culler.end(signal.SIGTERM) == 0
