"""--explain: everything that decides about one server, and the verdict of a pass."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from runs import Cull, Result
from scenes import Play, Scene, active, fault, file, having, idle, server, user
from scripted_hub import ALL_SCOPES, DROP, HOUR, LEAST_SCOPES, LONG_AGO, NEARLY_DUE, FakeJupyter, ScriptedHub, html

TOKENS = [*ALL_SCOPES, "tokens"]
ASKS = "--explain=ann --timeout=1h --idle-by=both"
BUSY = {"says": FakeJupyter(kernels=[{"execution_state": "busy"}]), "age": 5 * HOUR + 30}
EXPLAINED = [
    Scene(
        "an idle server that the second rule applies to",
        [user("ann", groups=["gpu", "staff"]), server("ann/gpu", LONG_AGO, age=5 * HOUR + 30)],
        "--explain=ann/gpu --max-age=1d --remove-named-servers"
        " --rule='group=physics keep' --rule='group=gpu timeout=90m' --rule='server=* keep'",
    ),
    Scene("a server that is kept, and so is not asked", [having(scopes=TOKENS), idle("ann")], f"{ASKS} --timeout=1d"),
    Scene("a busy server that is asked", [having(scopes=TOKENS), idle("ann", **BUSY)], ASKS),
    Scene(
        "a server that is asked and gives no usable answer",
        [having(scopes=TOKENS), idle("ann"), fault("GET", "/user/ann/.*", html())],
        ASKS,
    ),
    Scene("a server that is starting", [idle("ann", pending="spawn", ready=False)], "--explain=ann --timeout=0"),
    Scene("a server whose name leads elsewhere", [idle("ann/..")], "--explain=ann/.."),
    Scene("a server that is not running, and one that is", [active("ann/gpu")], "--explain=ann"),
    Scene("a name with an escape sequence", [user("ann")], "--explain='ann/gp\x1b'"),
    Scene("a server whose times cannot be read", [server("ann", last_activity="yesterday")], "--explain=ann"),
    Scene("a server that was started nobody knows when", [idle("ann", started=None)], "--explain=ann --max-age=1d"),
    Scene(
        "servers that are not shown, to which no rule is applied",
        [user("ann", extra={"servers": DROP})],
        "--explain=ann --rule='option.x=y keep'",
    ),
    Scene(
        "an arbiter that keeps",
        [file("arbiter.py", "def f(): return False"), idle("ann")],
        "--explain=ann --arbiter=arbiter.py:f",
    ),
    Scene(
        "a user who would be deleted, with the rules for users",
        [user("ann", admin=True)],
        "--explain=ann --cull-users --rule='server=* keep' --rule='user=bob keep' --rule='user=a* timeout=5h'",
    ),
    Scene("a user whom a rule keeps", [user("ann", admin=True)], "--explain=ann --cull-users --rule='admin=true keep'"),
    Scene("a user who is kept because of a server", [idle("ann")], "--explain=ann --cull-users"),
    Scene(
        "a Hub of an unknown version whose clock is ahead",
        [having(version="", clock=lambda: datetime.now(UTC) + timedelta(hours=2, seconds=30)), user("ann")],
        "--explain=ann",
    ),
    Scene("a token that may not stop anything", [having(scopes=list(LEAST_SCOPES[1:])), user("ann")], "--explain=ann"),
    Scene("a user whom the Hub does not know", [], "--explain=nobody", exit=2),
]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("scene", EXPLAINED, ids=Scene.__str__)
def test_explanation(play: Play, scene: Scene) -> None:
    result = play(replace(scene, says=True))
    assert bool(result.out) != bool(result.err)  # all that decides, or why nobody knows


FAILURES = [
    Scene("a Hub that is down", [ScriptedHub.pause_listening], "--explain=ann", exit=3),
    Scene("a scope to see servers", [having(scopes=["list:users"]), active("ann")], "--explain=ann", exit=3),
    Scene(
        "a scope that a rule needs", [having(scopes=list(LEAST_SCOPES))], "--explain=ann --rule='group=a keep'", exit=3
    ),
    Scene("a scope to ask", [active("ann")], ASKS, exit=3),
]


@pytest.mark.parametrize("scene", FAILURES, ids=Scene.__str__)
def test_nothing_is_explained_after_a_failure(play: Play, scene: Scene) -> None:
    result = play(scene)
    assert (result.out, len(result.lines)) == ("", 1)


@pytest.mark.parametrize("looks", ["--dry-run", "--explain=ann"])
def test_a_wrong_servers_url_is_found_before_a_server_is_asked(
    cull_scripted: Cull, scripted: ScriptedHub, looks: str
) -> None:
    scripted.scopes = TOKENS
    scripted.add("ann", idle=LONG_AGO)
    result = cull_scripted(looks, "--timeout=1h", "--idle-by=both", f"--servers-url={scripted.url}/elsewhere")
    assert (result.exit_code, result.out, len(result.lines)) == (3, "", 1)
    assert [request.path for request in scripted.requests if request.path.startswith("/user/")] == []


def test_when_a_limit_is_reached(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.now = datetime(2026, 11, 22, 21, tzinfo=UTC)
    scripted.add("ann", idle=HOUR, age=2 * HOUR)
    result = cull_scripted("--explain=ann", "--timeout=1h", "--max-age=1d")
    found = dict(re.findall(r"^(\S+) .*?(\d+T[\d:]+Z)", result.out, re.MULTILINE))
    assert (found["active"], found["born"]) == ("22T20:00:00Z", "22T19:00:00Z")
    assert (found["timeout"], found["max-age"]) == ("22T21:00:00Z", "23T19:00:00Z")


# The verdict of a dry run

OPTIONS = ["--timeout=1h", "--max-age=20d", "--cull-users", "--user-timeout=3h"]
RULES = ["--rule=group=gpu server=?* timeout=30m", "--rule=user=svc-* keep", "--rule=user=cat timeout=never"]
SCHOOL = [
    user("ann", groups=["gpu"]),
    *(server(name, NEARLY_DUE, age=5 * HOUR + 30) for name in ("ann", "ann/gpu")),
    *(server(name, LONG_AGO, age=5 * HOUR + 30) for name in ("bob", "cat", "svc-db")),
    server("eve", pending="spawn", ready=False),
    server("fay", NEARLY_DUE, age=30 * 24 * HOUR + 30),
    user("gus", idle=4 * HOUR + 30),
    user("hal", idle=HOUR + 30),
]


def verdicts(result: Result) -> list[str]:
    """What would become of the server, and of the user."""
    found = re.findall("^verdict  (?:would be )?(.*)$", result.out, re.MULTILINE)
    return [re.sub(r"(?<=m)\d\ds", "", verdict) for verdict in found]


def test_the_verdict_is_that_of_a_dry_run(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for given in SCHOOL:
        given(scripted)
    table = cull_scripted("--dry-run", "-v", *OPTIONS, *RULES).table[1:]
    rows = [re.split("  +", line, maxsplit=3) for line in table]
    planned = {row[0]: re.sub(r"(?<=m)\d\ds", "", row[3]) for row in rows if len(row) == 4}
    assert len(planned) == 9
    assert {verdict.partition(":")[0] for verdict in planned.values()} == {"stopped", "deleted", "kept"}
    for name, verdict in planned.items():
        asked = name.removeprefix("user ")
        explained = verdicts(cull_scripted("--explain", asked, *OPTIONS, *RULES))
        assert explained[asked != name] == verdict
        assert asked == name or explained[0] == "nothing to stop"
