"""The main job on a real JupyterHub: the current one, or any since 0.6 that tests/by_hand/matrix.py chooses.

`behaviour` is a column of its table; a Hub without what a row `needs` gets a dash there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
import requests
from hub import HOUR, IDLE, IDLE_USER, RealHub, full_name
from runs import Cull

OWN_TIMES, SIGHT = "a server's own times", "sight of pending named servers"
BUSY: dict[str, Any] = {"idle_seconds": 90, "age_seconds": 20 * HOUR + 90}
LONG_GONE: dict[str, Any] = {"idle_seconds": 2 * HOUR + 90, "age_seconds": 9 * HOUR}
# Of these words the Hub of a row is made: `ann: busy` is a server, `ann/gpu: busy` a named one, `ann: new` a user.
SERVERS: dict[str, dict[str, Any]] = {
    "idle": IDLE_USER,
    "busy": BUSY,
    "new one": {"idle_seconds": 60},
    "starting": {**IDLE_USER, "start_seconds": 60},
    "slow": {**IDLE_USER, "stop_seconds": 30},
}
USERS: dict[str, dict[str, Any]] = {  # without a server
    "long gone": LONG_GONE,
    "never came": {"age_seconds": 9 * HOUR},
    "new": {"idle_seconds": 60, "age_seconds": 60},
    "idle admin": {**LONG_GONE, "admin": True},
    "idle student": {**LONG_GONE, "groups": ["students"]},
}
ODD = ["alice?x", "bob#1", "back\\slash", "carol%2fdave", "dave smith", "\u00fcn\u00ef", "a+b", "eve@x.org"]


def words(text: str) -> list[str]:
    return [word for word in text.split(", ") if word]


@dataclass(frozen=True)
class Row:
    """One pass. Who is not said to be culled, stopping or deleted is still there after it."""

    behaviour: str
    name: str
    there: str
    options: str = ""  # besides --timeout=1h
    culled: str = ""
    stopping: str = ""
    deleted: str = ""
    later: str = ""  # users whom another pass deletes, hours after those stops
    needs: str = ""

    def marked(self) -> Any:
        marks = [pytest.mark.behaviour(self.behaviour), pytest.mark.needs(*words(self.needs))]
        return pytest.param(self, id=self.name, marks=marks)


MAIN, STARTING, NAMED, DELETED = "idle stopped, busy kept", "starting kept", "named servers", "--cull-users"
BOTH = "ann: idle, ann/gpu: idle"
ROWS = [
    Row(MAIN, "an idle server is stopped and a busy one is not", "ann: idle, bob: busy", culled="ann"),
    Row(MAIN, "a timeout of 0 stops every ready server", "ann: idle, bob: busy", "--timeout=0", culled="ann, bob"),
    Row(STARTING, "a server that is starting is left alone", "ann: starting", "--timeout=0"),
    Row(STARTING, "a user whose server is starting is not deleted", "ann: starting", "--cull-users"),
    Row(STARTING, "nor one whose named server is starting", "ann/gpu: starting", "--cull-users", needs=SIGHT),
    Row("--max-age", "an old server is stopped", "ann: busy, bob: new one", "--max-age=8h", "ann", needs=OWN_TIMES),
    Row(NAMED, "default and named servers are stopped", BOTH, culled="ann, ann/gpu", needs=NAMED),
    Row(NAMED, "named servers can be left alone", BOTH, "--cull-named-servers=false", culled="ann", needs=NAMED),
    Row(NAMED, "default servers can, too", BOTH, "--cull-default-servers=false", culled="ann/gpu", needs=NAMED),
    Row(
        "odd names",
        "odd names are culled and deleted, and their neighbours are not",
        ", ".join(["alice: busy", "carol: new", *(f"{name}: idle" for name in ODD)]),
        "--cull-users",
        culled=", ".join(ODD),
        later=", ".join(ODD),
    ),
    Row(
        DELETED,
        "a user whose server is stopped is deleted by a later pass",
        "ann: idle, bob: busy, cat: slow, dan: long gone, eve: new",
        "--cull-users",
        culled="ann",
        stopping="cat",
        deleted="dan",
        later="ann",
    ),
    Row(
        DELETED,
        "so is one whose named server is stopped",
        "ann/gpu: idle, bob/gpu: busy, cat/gpu: slow",
        "--cull-users",
        culled="ann/gpu",
        stopping="cat/gpu",
        later="ann",
        needs=SIGHT,
    ),
    Row(
        DELETED,
        "a user is deleted only when none of their servers is left",
        "ann: idle, ann/gpu: idle, bob: idle, bob/gpu: busy",
        "--cull-users",
        culled="ann, ann/gpu, bob",
        later="ann",
        needs=f"{NAMED}, {OWN_TIMES}",
    ),
    Row(DELETED, "a user who never came is deleted", "ann: never came", "--cull-users", deleted="ann", needs=OWN_TIMES),
    Row(
        DELETED,
        "admins can be left alone",
        "ann: idle admin, dan: long gone",
        "--cull-users --cull-admin-users=false --max-age=1h",
        deleted="dan",
    ),
    Row(
        "pages",
        "all pages are read",
        "a: idle, b: idle, c: idle, c/gpu: busy, d: idle, e: idle, f: idle, g: idle",
        "--api-page-size=2",
        culled="a, b, c, d, e, f, g",
        needs="pages",
    ),
]


def bring(hub: RealHub, there: str) -> None:
    """Make users and servers as in a row."""
    kinds = dict(word.split(": ") for word in words(there))
    for name, kind in kinds.items():
        if kind in USERS:
            hub.add_user(name, **USERS[kind])
    for starting in (False, True):
        names = [name for name, kind in kinds.items() if kind in SERVERS and (kind == "starting") == starting]
        hub.spawn_many([(*name.partition("/")[::2], SERVERS[kinds[name]]) for name in names], wait=not starting)


@pytest.mark.parametrize("row", [row.marked() for row in ROWS])
def test_what_becomes_of_servers_and_users(hub: RealHub, cull_real: Cull, row: Row) -> None:
    bring(hub, row.there)
    options = ["--timeout=1h", *row.options.split()]
    token = hub.user_culler_token if "--cull-users" in options else hub.culler_token
    stops = {**dict.fromkeys(words(row.culled), "culled"), **dict.fromkeys(words(row.stopping), "stopping")}
    passes = [(stops, words(row.deleted))] + [({}, words(row.later))] * bool(row.later)
    for stopped, deleted in passes:
        running, users = hub.running(), hub.users()
        result = cull_real(*options, token=token)
        becomes = {**stopped, **{f"user {name}": "deleted" for name in deleted}}
        assert (result.exit_code, result.outcomes, result.out) == (0, becomes, ""), result.err
        assert (hub.running(), hub.users()) == (running - {*stopped}, users - {*deleted})
        assert (result.counts["running"], result.counts["due"]) == (len(running), len(becomes))
        hub.make_idle(*{name.partition("/")[0] for name in stopped})
    for name in re.findall(r"([a-z/]+): starting", row.there):
        assert (hub.server(*name.partition("/")[::2]) or {})["pending"] == "spawn"


@pytest.mark.behaviour("--remove-named-servers")
@pytest.mark.needs("removal of named servers")
@pytest.mark.parametrize(("flags", "left"), [([], ["gpu"]), (["--remove-named-servers"], [])], ids=["without", "with"])
def test_a_named_server_is_removed_only_with_remove_named_servers(
    hub: RealHub, cull_real: Cull, flags: list[str], left: list[str]
) -> None:
    hub.spawn_many([("ann", "", IDLE), ("ann", "gpu", IDLE)])
    assert cull_real("--timeout=1h", *flags).outcomes == {"ann": "culled", "ann/gpu": "culled"}
    assert (hub.named_servers("ann"), hub.running()) == (left, set())


@pytest.mark.behaviour("slow stop")
def test_a_server_that_is_slow_to_stop_is_no_failure_and_not_stopped_again(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("cat", stop_seconds=30, **IDLE)
    result = cull_real("--timeout=1h")
    assert (result.exit_code, result.outcomes, result.said["cat"].level) == (0, {"cat": "stopping"}, "WARNING")
    assert cull_real("--timeout=1h").counts == {"running": 0, "due": 0}


@pytest.mark.behaviour("10 at a time")
def test_60_slow_servers_are_stopped_10_at_a_time_and_the_busy_ones_stay(hub: RealHub, cull_real: Cull) -> None:
    idle = {f"idle{n}" for n in range(60)}
    busy = {f"busy{n}" for n in range(5)}
    hub.spawn_many([(name, "", {**IDLE, "stop_seconds": 0.5}) for name in idle] + [(name, "", BUSY) for name in busy])
    before = len(hub.log())
    result = cull_real("--timeout=1h", "--concurrency=10")
    assert (result.exit_code, hub.running()) == (0, busy)
    assert result.counts == {"running": 65, "due": 60, "culled": 60}
    stopped = re.findall(r"DELETE /hub/api/users/(idle\d+)/server", hub.log()[before:])
    assert sorted(stopped) == sorted(idle)
    assert 5 < hub.most_stopping() <= 10  # they overlap as far as the machine's other work lets them


@pytest.mark.behaviour("--dry-run")
def test_a_verbose_dry_run_shows_the_kept_servers_too(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many([("ann", "", IDLE), ("bob", "", BUSY)])
    result = cull_real("--dry-run", "--timeout=1h", "-v")
    bob_age, ann_age = ("-", "-") if hub.lacks(OWN_TIMES) else ("20h01m", "2h01m")
    assert re.search(rf"^ann +2h01m +{ann_age} +stopped: ", result.out, re.MULTILINE)
    assert re.search(rf"^bob +1m\d\ds +{bob_age} +kept: ", result.out, re.MULTILINE)
    assert (result.exit_code, result.err, hub.running()) == (0, "", {"ann", "bob"})


@pytest.mark.behaviour("--dry-run")
@pytest.mark.needs("named servers", OWN_TIMES)
def test_a_dry_run_shows_what_would_be_culled_the_longest_idle_first(hub: RealHub, cull_real: Cull) -> None:
    bring(hub, "ann/gpu: idle, cat: busy")
    hub.add_user("bob", idle_seconds=3 * HOUR + 90, age_seconds=9 * HOUR)
    flags = ("--cull-users", "--remove-named-servers")
    result = cull_real("--dry-run", "--timeout=1h", *flags, token=hub.user_culler_token)
    _, *rows, total, _ = (re.split("  +", line) for line in result.table)
    assert [[row[0], row[1], row[3].partition(":")[0]] for row in rows] == [
        ["user bob", "3h01m", "deleted"],
        ["ann/gpu", "2h01m", "removed"],
    ]
    assert re.findall(r"\d+", total[0]) == ["1", "2", "1", "3"]
    assert (result.exit_code, result.err) == (0, "")
    assert (hub.running(), hub.users()) == ({"ann/gpu", "cat"}, {"ann", "bob", "cat"})


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
    ids=["to stop", "to list", "to see servers", "all of them", "to delete users"],
)
def test_a_missing_scope_is_named_with_the_role_that_grants_it(
    hub: RealHub, cull_real: Cull, scopes: list[str], flags: list[str], missing: set[str]
) -> None:
    hub.spawn("ann", **IDLE)
    result = cull_real("--timeout=1h", *flags, token=hub.token_with(*scopes))
    assert result.exit_code == 3
    (line,) = result.errors
    sentence, _, role = line.partition("c.JupyterHub.load_roles.append")
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
        assert result.table[1].startswith("ann ")
        assert set(re.findall(r"(?:delete|admin):\w+", result.out)) == missing


EVERYBODY = "ann, cat, cat/gpu, user bob, user eve"
SEE = ["list:users", "read:users:activity", "read:servers"]


@pytest.mark.behaviour("scopes")
@pytest.mark.needs("scopes")
@pytest.mark.parametrize(
    ("scopes", "due", "failed"),
    [
        (["list:users!user=ann", "read:servers!user=ann", "delete:servers!user=ann"], "ann", ""),
        ([*SEE, "delete:servers!group=students", "admin:users"], EVERYBODY, "cat, cat/gpu"),
        ([*SEE, "delete:servers", "delete:users!group=students"], EVERYBODY, "user eve"),
    ],
    ids=["of all scopes", "of that to stop", "of that to delete"],
)
def test_what_a_filter_leaves_out_is_not_seen_or_has_failed(
    hub: RealHub, cull_real: Cull, scopes: list[str], due: str, failed: str
) -> None:
    bring(hub, "ann: idle student, bob: idle student, eve: long gone")
    bring(hub, "ann: idle, cat: idle, cat/gpu: idle")
    options = ["--json", "--timeout=1h", *(["--cull-users"] if "user" in due else [])]
    result = cull_real(*options, token=hub.token_with(*scopes))
    events = [json.loads(line) for line in result.out.splitlines()][:-1]
    names = [f"user {e['user']}" if e["server"] is None else full_name(e["user"], e["server"]) for e in events]
    becomes = {name: "failed" if name in words(failed) else "culled" for name in words(due)}
    assert dict(zip(names, [event["outcome"] for event in events], strict=True)) == becomes
    gone = {name for name, outcome in becomes.items() if outcome == "culled"}
    assert hub.running() == {"ann", "cat", "cat/gpu"} - gone
    assert {f"user {name}" for name in hub.users()} == {f"user {name}" for name in ("ann", "bob", "cat", "eve")} - gone
    assert result.exit_code == (1 if failed else 0)
    assert all(scope in result.err for scope in scopes if "!group" in scope)


@pytest.mark.behaviour("scopes")
@pytest.mark.needs("scopes")
def test_a_user_whose_servers_the_token_may_not_see_is_never_deleted(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("ann", **IDLE_USER)
    token = hub.token_with("admin:users", "read:servers!user=bob", "delete:servers")
    result = cull_real("--timeout=1h", "--cull-users", token=token)
    assert (result.exit_code, hub.running()) == (0, {"ann"})
    assert result.doubts.number == 1
    assert re.fullmatch(r"ann: .*\bread:servers\b.*", result.doubts.first)


@pytest.mark.behaviour("second look")
def test_a_server_that_becomes_active_during_the_pass_is_spared(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many([("ann", "", {**IDLE, "then_active": "bob"}), ("bob", "", {**IDLE, "then_active": "ann"})])
    result = cull_real("--timeout=1h", "--concurrency=1")
    assert sorted(result.outcomes.values()) == ["culled", "spared"]
    assert hub.running() == {name for name, outcome in result.outcomes.items() if outcome == "spared"}


@pytest.mark.behaviour("messages")
def test_https_is_given_up_soon_and_http_is_suggested(
    hub: RealHub, cull_real: Cull, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a Hub answers nothing to the first message of TLS."""
    send = requests.adapters.HTTPAdapter.send
    timeouts = []

    def send_at_once(adapter: Any, request: Any, **how: Any) -> requests.Response:
        timeouts.append(how.pop("timeout"))
        return send(adapter, request, timeout=0.2, **how)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send_at_once)
    result = cull_real("--url", hub.url.replace("http:", "https:"), "--request-timeout=1h")
    assert timeouts
    assert all(to_connect <= 10 and for_answer == HOUR for to_connect, for_answer in timeouts)
    assert (result.exit_code, len(result.lines)) == (3, 1)
    assert f"--url {hub.url}" in result.lines[0]
