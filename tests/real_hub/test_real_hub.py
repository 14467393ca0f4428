"""The main job on a real JupyterHub: the current one, or any since 0.6 that tests/by_hand/matrix.py chooses.

`behaviour` is a column of its table; a Hub without what a test `needs` gets a dash there.
"""

import json
import re
import threading
import time
from typing import Any

import pytest
from hub import HOUR, IDLE, IDLE_USER, RealHub, full_name, servers_of
from runs import Cull

BUSY: dict[str, Any] = {"idle_seconds": 90, "age_seconds": 20 * HOUR + 90}
OWN_TIMES = "a server's own times"


@pytest.mark.behaviour("idle stopped, busy kept")
def test_the_idle_server_is_stopped_and_the_busy_one_is_not(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many([("ann", "", IDLE), ("bob", "", BUSY)])
    result = cull_real("--timeout=1h")
    assert hub.running() == {"bob"}
    assert result.exit_code == 0
    assert result.said == {"ann": ("INFO", "culled", "idle 2h01m, limit 1h")}
    assert result.counts == {"running": 2, "due": 1, "culled": 1}
    assert result.out == ""


@pytest.mark.behaviour("idle stopped, busy kept")
def test_nothing_due_is_fine(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("bob", **BUSY)
    result = cull_real("--timeout=1h")
    assert (result.exit_code, hub.running()) == (0, {"bob"})
    assert result.counts == {"running": 1, "due": 0}


@pytest.mark.behaviour("idle stopped, busy kept")
def test_a_timeout_of_0_stops_every_ready_server(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many([("ann", "", {}), ("bob", "", BUSY)])
    assert cull_real("--timeout=0").exit_code == 0
    assert hub.running() == set()


@pytest.mark.behaviour("starting kept")
def test_a_server_that_is_starting_is_left_alone(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("ann", wait=False, start_seconds=60, **IDLE)
    assert cull_real("--timeout=0").exit_code == 0
    server = hub.server("ann")
    assert server is not None
    assert server["pending"] == "spawn"


@pytest.mark.behaviour("starting kept")
@pytest.mark.parametrize("server", ["", pytest.param("gpu", marks=pytest.mark.needs("sight of pending named servers"))])
def test_a_user_whose_server_is_starting_is_not_deleted(hub: RealHub, cull_real: Cull, server: str) -> None:
    hub.spawn("ann", server, wait=False, start_seconds=60, **IDLE_USER)
    assert cull_real("--timeout=1h", "--cull-users", token=hub.user_culler_token).exit_code == 0
    assert hub.users() == {"ann"}


@pytest.mark.behaviour("--max-age")
@pytest.mark.needs(OWN_TIMES)
def test_an_old_server_is_stopped_though_it_is_active(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many([("ann", "", BUSY), ("bob", "", {"idle_seconds": 60})])
    result = cull_real("--timeout=1h", "--max-age=8h")
    assert hub.running() == {"bob"}
    assert result.said == {"ann": ("INFO", "culled", "age 20h01m, limit 8h")}


@pytest.mark.behaviour("named servers")
@pytest.mark.needs("named servers")
@pytest.mark.parametrize(
    ("flags", "left"),
    [
        ([], set()),
        (["--cull-named-servers=false"], {"ann/gpu"}),
        (["--cull-default-servers=false"], {"ann"}),
        (["--cull_default_servers=no", "--cull_named_servers", "false"], {"ann", "ann/gpu"}),
        (["--cull-default-servers", "--cull-named-servers"], set()),
    ],
)
def test_default_and_named_servers_can_be_left_alone(
    hub: RealHub, cull_real: Cull, flags: list[str], left: set[str]
) -> None:
    hub.spawn_many([("ann", "", IDLE), ("ann", "gpu", IDLE)])
    assert cull_real("--timeout=1h", *flags).exit_code == 0
    assert hub.running() == left


@pytest.mark.behaviour("--remove-named-servers")
@pytest.mark.needs("removal of named servers")
@pytest.mark.parametrize(("flags", "left"), [([], ["gpu"]), (["--remove-named-servers"], [])])
def test_a_named_server_is_removed_only_with_remove_named_servers(
    hub: RealHub, cull_real: Cull, flags: list[str], left: list[str]
) -> None:
    hub.spawn_many([("ann", "", IDLE), ("ann", "gpu", IDLE)])
    result = cull_real("--timeout=1h", *flags)
    assert hub.named_servers("ann") == left
    assert result.outcomes == {"ann": "culled", "ann/gpu": "culled"}
    assert ("removed" in result.said["ann/gpu"].reason) == bool(flags)


@pytest.mark.behaviour("slow stop")
def test_a_server_that_is_slow_to_stop_is_reported_and_no_failure(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("cat", stop_seconds=30, **IDLE)
    result = cull_real("--timeout=1h")
    assert result.exit_code == 0
    assert result.said["cat"][:2] == ("WARNING", "stopping")
    assert "1s" in result.said["cat"].reason
    assert cull_real("--timeout=1h").counts == {"running": 0, "due": 0}


@pytest.mark.behaviour("messages")
def test_quiet_says_nothing_when_all_is_well(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many([("ann", "", IDLE), ("cat", "", {"stop_seconds": 30, **IDLE})])
    result = cull_real("--timeout=5m", "-q")
    assert (result.exit_code, result.out, result.err) == (0, "", "")
    assert hub.running() == set()


@pytest.mark.behaviour("messages")
def test_quiet_says_what_failed(hub: RealHub, cull_real: Cull) -> None:
    result = cull_real("-q", token="wrong")
    assert result.exit_code == 3
    assert len(result.lines) == 1
    assert "403" in result.lines[0]


ODD_NAMES = ["alice?x", "bob#1", "back\\slash", "carol%2fdave", "dave smith", "ünï", "a+b", "eve@x.org"]


@pytest.mark.behaviour("odd names")
def test_odd_names_are_culled_and_deleted_and_their_neighbour_is_not(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many([(name, "", IDLE_USER) for name in ODD_NAMES])
    hub.spawn("alice", user_idle_seconds=60, **BUSY)
    hub.add_user("carol", idle_seconds=60, age_seconds=60)
    for users in ({"alice", "carol", *ODD_NAMES}, {"alice", "carol"}):
        result = cull_real("--timeout=1h", "--cull-users", token=hub.user_culler_token)
        assert (result.exit_code, hub.running(), hub.users()) == (0, {"alice"}, users)
        hub.make_idle(*users & {*ODD_NAMES})


@pytest.mark.behaviour("--cull-users")
@pytest.mark.parametrize("server", ["", pytest.param("gpu", marks=pytest.mark.needs("sight of pending named servers"))])
def test_a_user_whose_server_is_stopped_is_deleted_by_a_later_pass(hub: RealHub, cull_real: Cull, server: str) -> None:
    slow = {**IDLE_USER, "stop_seconds": 30}
    hub.spawn_many([("ann", server, IDLE_USER), ("bob", server, BUSY), ("slow", server, slow)])
    hub.add_user("long-gone", idle_seconds=2 * HOUR)
    hub.add_user("new", idle_seconds=60)
    flags = ("--timeout=1h", "--cull-users")
    first = cull_real(*flags, token=hub.user_culler_token)
    assert (first.exit_code, hub.running()) == (0, {full_name("bob", server)})
    assert hub.users() == {"ann", "bob", "slow", "new"}
    hub.make_idle("ann", "slow")
    second = cull_real(*flags, token=hub.user_culler_token)
    assert (second.exit_code, hub.users()) == (0, {"bob", "slow", "new"})
    assert second.said == {"user ann": ("INFO", "deleted", "idle 2h01m, limit 1h")}


@pytest.mark.behaviour("--cull-users")
@pytest.mark.needs("named servers", OWN_TIMES)
def test_users_are_deleted_only_when_none_of_their_servers_is_left(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many(
        [
            ("all-idle", "", IDLE_USER),
            ("all-idle", "gpu", IDLE_USER),
            ("one-busy", "", IDLE_USER),
            ("one-busy", "gpu", {**BUSY, "user_idle_seconds": 2 * HOUR}),
            ("slow", "gpu", {**IDLE_USER, "stop_seconds": 30}),
            ("seen-lately", "", {**IDLE, "user_idle_seconds": 60}),
        ]
    )
    hub.add_user("never-came", age_seconds=9 * HOUR)
    hub.add_user("new", age_seconds=60)
    kept = {"one-busy", "slow", "seen-lately", "new"}
    for users in (kept | {"all-idle"}, kept):
        result = cull_real("--timeout=1h", "--cull-users", token=hub.user_culler_token)
        assert (result.exit_code, hub.running(), hub.users()) == (0, {"one-busy/gpu"}, users)
        hub.make_idle(*users - {"seen-lately", "new"})


@pytest.mark.behaviour("--cull-users")
def test_users_are_not_deleted_without_cull_users(hub: RealHub, cull_real: Cull) -> None:
    hub.add_user("long-gone", idle_seconds=9 * HOUR, age_seconds=9 * HOUR)
    assert cull_real("--timeout=1h", token=hub.user_culler_token).exit_code == 0
    assert hub.users() == {"long-gone"}


@pytest.mark.behaviour("--cull-users")
@pytest.mark.parametrize(("flags", "left"), [([], set()), (["--cull-admin-users=false"], {"root"})])
def test_admins_can_be_left_alone(hub: RealHub, cull_real: Cull, flags: list[str], left: set[str]) -> None:
    hub.add_user("root", admin=True, idle_seconds=9 * HOUR, age_seconds=9 * HOUR)
    hub.add_user("ann", idle_seconds=9 * HOUR, age_seconds=9 * HOUR)
    result = cull_real("--timeout=1h", "--max-age=1h", "--cull-users", *flags, token=hub.user_culler_token)
    assert result.exit_code == 0
    assert hub.users() == left


@pytest.mark.behaviour("10 at a time")
def test_60_slow_servers_are_stopped_10_at_a_time_and_the_busy_ones_stay(hub: RealHub, cull_real: Cull) -> None:
    idle = {f"idle{n}" for n in range(60)}
    busy = {f"busy{n}" for n in range(5)}
    hub.spawn_many([(name, "", {**IDLE, "stop_seconds": 0.5}) for name in idle] + [(name, "", BUSY) for name in busy])
    with Stops(hub) as counts:
        result = cull_real("--timeout=1h", "--concurrency=10")
    assert hub.running() == busy
    assert result.exit_code == 0
    assert result.counts == {"running": 65, "due": 60, "culled": 60}
    stopped = re.findall(r"DELETE /hub/api/users/(idle\d+)/server", hub.log())
    assert sorted(stopped) == sorted(idle)
    assert 8 <= max(counts) <= 10


class Stops:
    """How many servers the Hub is stopping, seen again and again while in its `with`."""

    def __init__(self, hub: RealHub) -> None:
        self.hub = hub
        self.counts = [0]
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        while not self.ended.wait(0.2):
            servers = [server for user in self.hub.models("users") for server in servers_of(user).values()]
            self.counts.append(sum(server["pending"] == "stop" for server in servers))

    def __enter__(self) -> list[int]:
        self.thread.start()
        return self.counts

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


@pytest.mark.behaviour("--dry-run")
@pytest.mark.needs("named servers", OWN_TIMES)
def test_a_dry_run_shows_what_would_be_stopped_the_longest_idle_first(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many([("ann", "gpu", IDLE), ("bob", "", BUSY), ("cat", "", {"idle_seconds": 4 * HOUR + 90})])
    result = cull_real("--dry-run", "--timeout=1h")
    assert result.exit_code == 0
    _, *rows, total = map(str.split, result.table)
    assert [row[:4] for row in rows] == [
        ["cat", "4h01m", "4h01m", "stopped:"],
        ["ann/gpu", "2h01m", "2h01m", "stopped:"],
    ]
    assert total[:3] == ["2", "of", "3"]
    assert result.err == ""
    assert hub.running() == {"ann/gpu", "bob", "cat"}


@pytest.mark.behaviour("--dry-run")
def test_a_verbose_dry_run_shows_the_kept_servers_too(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many([("ann", "", IDLE), ("bob", "", BUSY)])
    result = cull_real("--dry-run", "--timeout=1h", "-v")
    bob_age, ann_age = ("-", "-") if hub.lacks(OWN_TIMES) else ("20h01m", "2h01m")
    assert re.search(rf"^ann +2h01m +{ann_age} +stopped: ", result.out, re.MULTILINE)
    assert re.search(rf"^bob +1m\d\ds +{bob_age} +kept: ", result.out, re.MULTILINE)
    assert hub.running() == {"ann", "bob"}


@pytest.mark.behaviour("--dry-run")
@pytest.mark.needs("named servers", OWN_TIMES)
def test_a_dry_run_shows_the_users_who_would_be_deleted(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("ann", "gpu", **IDLE_USER)
    hub.add_user("bob", idle_seconds=3 * HOUR + 90, age_seconds=9 * HOUR + 90)
    result = cull_real(
        "--dry-run", "--timeout=1h", "--cull-users", "--remove-named-servers", token=hub.user_culler_token
    )
    _, *rows, total, storage = (re.split("  +", line) for line in result.table)
    assert [[*row[:3], row[3].partition(":")[0]] for row in rows] == [
        ["user bob", "3h01m", "9h01m", "deleted"],
        ["ann/gpu", "2h01m", "2h01m", "removed"],
    ]
    assert re.findall(r"\d+", total[0]) == ["1", "1", "1", "2"]
    assert "Kubernetes" in storage[0]
    assert hub.users() == {"ann", "bob"}


@pytest.mark.behaviour("--dry-run")
def test_a_dry_run_of_nothing_says_so_in_a_line(hub: RealHub, cull_real: Cull) -> None:
    (line,) = cull_real("--dry-run").out.splitlines()
    assert line.startswith("0 of 0 ")


@pytest.mark.behaviour("pages")
@pytest.mark.needs("pages")
def test_all_pages_are_read(hub: RealHub, cull_real: Cull) -> None:
    names = {f"user{n}" for n in range(7)}
    hub.spawn_many([(name, "", IDLE) for name in names])
    hub.spawn("user3", "gpu", **BUSY)
    assert cull_real("--timeout=1h", "--api-page-size=2").exit_code == 0
    assert hub.running() == {"user3/gpu"}


@pytest.mark.behaviour("scopes")
@pytest.mark.needs("scopes")
@pytest.mark.parametrize(
    ("scopes", "flags", "missing"),
    [
        (["list:users", "read:servers"], [], {"delete:servers"}),
        (["read:servers", "delete:servers"], [], {"list:users"}),
        (["list:users", "delete:servers"], [], {"read:servers"}),
        (["read:users:name"], [], {"list:users", "read:servers", "delete:servers"}),
        (["list:users", "read:servers", "delete:servers"], ["--cull-users"], {"admin:users", "read:users:activity"}),
    ],
)
def test_a_missing_scope_is_named_with_the_role_that_grants_it(
    hub: RealHub, cull_real: Cull, scopes: list[str], flags: list[str], missing: set[str]
) -> None:
    hub.spawn("ann", **IDLE)
    result = cull_real("--timeout=1h", *flags, token=hub.token_with(*scopes))
    assert result.exit_code == 3
    (line,) = result.lines
    sentence, _, role = line.partition("c.JupyterHub.load_roles.append")
    assert sentence.startswith("ERROR ")
    assert "service admin" in sentence
    assert set(re.findall(r"[a-z]+:[a-z:]+\b", sentence)) - {"jupyterhub_config.py:"} == missing
    role = json.loads(role.removeprefix("(").removesuffix(")"))
    assert role.keys() == {"name", "scopes", "services"}
    assert role["name"] not in ("culler", "cull-idle")  # a Hub refuses a role that it has already
    assert (set(role["scopes"]), role["services"]) == (missing, ["admin"])
    assert hub.running() == {"ann"}


@pytest.mark.behaviour("scopes")
@pytest.mark.needs("scopes")
def test_a_dry_run_needs_no_scope_to_stop_anything_but_names_what_a_pass_lacks(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("ann", **IDLE)
    reading = ["list:users", "read:users:activity", "read:servers"]
    for scopes, missing in [
        (reading, {"delete:servers", "admin:users"}),
        ([*reading, "delete:servers"], {"admin:users"}),
        ([*reading, "delete:servers", "admin:users"], set()),
    ]:
        result = cull_real("--dry-run", "--timeout=1h", "--cull-users", token=hub.token_with(*scopes))
        assert (result.exit_code, result.err) == (0, "")
        assert "1 of 1 running" in result.out
        assert set(re.findall(r"(?:delete|admin):\w+", result.out)) == missing


@pytest.mark.behaviour("scopes")
@pytest.mark.needs("scopes")
def test_a_filtered_scope_is_enough(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many([("ann", "", IDLE), ("bob", "", IDLE)])
    token = hub.token_with("list:users!user=ann", "read:servers!user=ann", "delete:servers!user=ann")
    assert cull_real("--timeout=1h", token=token).exit_code == 0
    assert hub.running() == {"bob"}


@pytest.mark.behaviour("scopes")
@pytest.mark.needs("scopes")
def test_a_user_whose_servers_the_token_may_not_see_is_never_deleted(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("ann", **IDLE_USER)
    token = hub.token_with("admin:users", "read:servers!user=bob", "delete:servers")
    result = cull_real("--timeout=1h", "--cull-users", token=token)
    assert result.exit_code == 0
    assert hub.running() == {"ann"}
    assert result.doubts.number == 1
    assert result.doubts.first.startswith("ann: ")
    assert "read:servers" in result.doubts.first


@pytest.mark.behaviour("second look")
def test_a_server_that_becomes_active_during_the_pass_is_spared(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many([("ann", "", {**IDLE, "stop_seconds": 0.5}), ("bob", "", {**IDLE, "stop_seconds": 0.5})])
    with OtherBecomesActive(hub) as other:
        result = cull_real("--timeout=1h", "--concurrency=1")
    assert hub.running() == {other[0]}
    assert result.outcomes[other[0]] == "spared"
    assert (result.counts["culled"], result.counts["spared"]) == (1, 1)


class OtherBecomesActive:
    """While one of ann's and bob's servers is being stopped, the other becomes active."""

    def __init__(self, hub: RealHub) -> None:
        self.hub = hub
        self.other: list[str] = []
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for name, other in (("ann", "bob"), ("bob", "ann")):
                server = self.hub.server(name)
                if server is None or server["pending"] == "stop":
                    self.hub.touch(other)
                    self.other.append(other)
                    return

    def __enter__(self) -> list[str]:
        self.thread.start()
        return self.other

    def __exit__(self, *_: object) -> None:
        self.thread.join()


@pytest.mark.behaviour("messages")
def test_https_is_given_up_soon_and_http_is_suggested(hub: RealHub, cull_real: Cull) -> None:
    """Such a Hub answers nothing to the first message of TLS."""
    began = time.monotonic()
    result = cull_real("--url", hub.url.replace("http:", "https:"))
    assert time.monotonic() - began < 10  # not the minute of --request-timeout
    assert result.exit_code == 3
    (line,) = result.lines
    assert f"--url {hub.url}" in line


@pytest.mark.behaviour("messages")
@pytest.mark.parametrize("path", ["", "/hub"])
def test_a_url_without_the_api_gets_a_sentence(hub: RealHub, cull_real: Cull, path: str) -> None:
    result = cull_real("--url", hub.url.removesuffix("/hub/api") + path)
    assert result.exit_code == 3
    (line,) = result.lines
    assert f"--url {hub.url}" in line
