"""--explain: everything that decides about one server, and the verdict of a pass."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hub import RealHub
from runs import Cull, Result
from scripted_hub import DROP, HOUR, LONG_AGO, ScriptedHub

DAY = 24 * HOUR


def facts(result: Result) -> dict[str, str]:
    """The text beside each label; the first one if a label is there twice."""
    assert result.exit_code == 0
    assert result.err == ""
    found: dict[str, str] = {}
    for line in result.out.splitlines():
        found.setdefault(line[:9].rstrip(), line[9:])
    return found


def ago(text: str) -> str:
    """A fact with its timestamps replaced."""
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "WHEN", text)


# The same verdict as a dry run's

RULES = ["--rule=group=gpu server=?* timeout=30m", "--rule=user=svc-* keep", "--rule=user=cat timeout=never"]
OPTIONS = ["--timeout=1h", "--max-age=20d", "--cull-users", "--user-timeout=3h", *RULES]


@pytest.fixture
def school(hub: RealHub) -> RealHub:
    """Servers that are idle, busy, old, starting or under a rule, and users with and without one."""
    idle = {"idle_seconds": 2 * HOUR + 90, "age_seconds": 5 * HOUR + 90}
    busy = {"idle_seconds": 60 * 45 + 30, "age_seconds": 5 * HOUR + 90}
    old = {"idle_seconds": 60 * 45 + 30, "age_seconds": 30 * DAY + 90}
    user_idle = {"user_idle_seconds": 4 * HOUR + 90, "user_age_seconds": 9 * DAY + 90}
    hub.add_user("ann", groups=["gpu"])
    hub.spawn_many(
        [
            ("ann", "", {**busy, **user_idle}),
            ("ann", "gpu", {**busy, **user_idle}),
            ("bob", "", {**idle, **user_idle}),
            ("cat", "", {**idle, **user_idle}),
            ("fay", "", {**old, "user_idle_seconds": HOUR + 90, "user_age_seconds": 19 * DAY + 90}),
            ("svc-db", "", {**idle, **user_idle}),
        ]
    )
    hub.spawn("eve", wait=False, start_seconds=60)
    hub.add_user("gus", idle_seconds=4 * HOUR + 90, age_seconds=9 * DAY + 90)
    hub.add_user("hal", idle_seconds=HOUR + 90, age_seconds=9 * DAY + 90)
    return hub


def verdicts(explained: Result) -> list[str]:
    """Why a server, or a user, would be what."""
    found = [line.removeprefix("verdict").strip() for line in explained.out.splitlines() if line.startswith("verdict")]
    return [verdict.removeprefix("would be ") for verdict in found]


def test_the_verdict_is_that_of_a_dry_run(school: RealHub, cull_real: Cull) -> None:
    token = school.user_culler_token
    rows = [re.split("  +", line, maxsplit=3) for line in cull_real("--dry-run", "-v", *OPTIONS, token=token).table[1:]]
    planned = {row[0]: row[3] for row in rows if len(row) == 4}
    explained: dict[str, str] = {}
    for name in ("ann", "ann/gpu", "bob", "cat", "eve", "fay", "gus", "hal", "svc-db"):
        verdict, *of_user = verdicts(cull_real("--explain", name, *OPTIONS, token=token))
        explained |= {name: verdict} | {f"user {name}": each for each in of_user}
    # In the plan, a user is called so only if no server is there.
    without_server = {explained.pop("gus"), explained.pop("hal")}
    with_server = [explained.pop(f"user {name}") for name in ("ann", "bob", "cat", "eve", "fay", "svc-db")]
    assert without_server == {"nothing to stop"}
    assert all(verdict.startswith("kept: ") for verdict in with_server)
    assert explained.pop("eve") == planned.pop("eve")
    assert {name: untimed(text) for name, text in explained.items()} == {n: untimed(t) for n, t in planned.items()}
    assert {text.split(":")[0] for text in explained.values()} == {"stopped", "deleted", "kept"}


def untimed(text: str) -> str:
    return re.sub(r"(?<=m)\d\ds", "", text)


# What it says

OUT_OF_RANGE = ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"]  # in UTC, they have no year from 1 to 9999


@pytest.mark.parametrize("moment", OUT_OF_RANGE)
@pytest.mark.parametrize("field", ["last_activity", "started", "created"])
def test_a_time_that_utc_cannot_express_is_shown_as_the_hub_wrote_it(
    cull_scripted: Cull, scripted: ScriptedHub, moment: str, field: str
) -> None:
    if field == "created":
        scripted.add_user("ann", created=moment)
    else:
        setattr(scripted.add("ann", idle=60), field, moment)
    result = cull_scripted("--explain=ann", "--cull-users", "--timeout=1h", "--max-age=365d")
    assert result.exit_code == 0
    assert moment in result.out


@pytest.mark.parametrize("moment", OUT_OF_RANGE)
@pytest.mark.parametrize("field", ["last_activity", "started"])
@pytest.mark.parametrize("form", [["--dry-run", "-v"], ["--dry-run", "--json"], ["--json"]], ids=str)
def test_a_time_that_utc_cannot_express_ends_no_pass(
    cull_scripted: Cull, scripted: ScriptedHub, moment: str, field: str, form: list[str]
) -> None:
    setattr(scripted.add("ann", idle=60), field, moment)
    scripted.add("bob", idle=LONG_AGO)
    for limits in (["--timeout=1h", "--warn-before=30m"], ["--timeout=never", "--max-age=9d", "--warn-before=8d"]):
        assert cull_scripted(*limits, *form).exit_code == 0


def test_an_idle_server_that_a_rule_applies_to(hub: RealHub, cull_real: Cull) -> None:
    hub.add_user("ann", groups=["gpu", "staff"])
    hub.spawn("ann", "gpu", idle_seconds=LONG_AGO, age_seconds=5 * HOUR + 30)
    rules = ["--rule=group=physics keep", "--rule=group=gpu timeout=1h30m", "--rule=server=* keep"]
    token = hub.user_culler_token
    found = facts(cull_real("--explain=ann/gpu", "--timeout=10m", "--max-age=1d", *rules, token=token))
    assert list(found) == [
        *("hub", "clock", "server", "ready", "active", "born", "rule 1", "rule 2", "timeout", "max-age", "verdict")
    ]
    assert found["hub"] == f"{hub.url}, JupyterHub 6.1.1"
    assert (found["server"], found["ready"]) == ("ann/gpu", "yes")
    assert re.fullmatch(r"WHEN, 2h00m\d\ds ago", ago(found["active"]))
    assert re.fullmatch(r"WHEN, 5h00m\d\ds ago", ago(found["born"]))
    assert found["rule 1"].startswith("group=physics keep: ")
    assert "gpu, staff" in found["rule 1"]
    assert found["rule 2"].startswith("group=gpu timeout=1h30m: ")
    assert re.match("limit 1h30m by rule 2: .* WHEN$", ago(found["timeout"]))
    assert re.match("limit 1d, .* WHEN$", ago(found["max-age"]))
    assert re.search(" stopped: .* 2h, .* 1h30m .* rule 2", found["verdict"])


def test_a_limit_is_reached_at_exactly_its_idle_time(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.now = datetime(2026, 11, 22, 21, 0, 0, tzinfo=UTC)
    scripted.add("ann", idle=HOUR, age=2 * HOUR)
    found = facts(cull_scripted("--explain=ann", "--timeout=1h", "--max-age=1d"))
    assert re.fullmatch(r"2026-11-22T20:00:00Z, 1h(00m\d\ds)? ago", found["active"])
    assert re.fullmatch("limit 1h, .* 2026-11-22T21:00:00Z", found["timeout"])
    assert re.fullmatch("limit 1d, .* 2026-11-23T19:00:00Z", found["max-age"])
    later = facts(cull_scripted("--explain=ann", "--timeout=1h1m", "--max-age=never"))
    assert re.fullmatch("limit 1h01m, .* 2026-11-22T21:01:00Z", later["timeout"])
    assert later["max-age"] == "no limit"
    assert later["verdict"].startswith("kept: ")


def test_a_server_that_is_starting_is_kept(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("ann", wait=False, start_seconds=60)
    found = facts(cull_real("--explain=ann", "--timeout=0"))
    assert found["ready"] == "pending spawn"
    assert re.match("kept: .*spawn", found["verdict"])


def test_the_running_servers_are_named_if_the_one_asked_for_is_not_running(hub: RealHub, cull_real: Cull) -> None:
    hub.add_user("bob")
    hub.spawn("ann", "gpu")
    assert facts(cull_real("--explain=bob"))["server"].startswith("bob ")
    found = facts(cull_real("--explain=ann"))
    assert re.match("ann .*ann/gpu$", found["server"])
    assert "stop" in found["verdict"]
    assert facts(cull_real("--explain=ann/gp\x1b"))["server"].startswith(r"ann/gp\x1b ")


@pytest.mark.parametrize("says", ["cull", "keep"])
def test_the_decision_of_an_arbiter_is_shown(hub: RealHub, cull_real: Cull, tmp_path: Path, says: str) -> None:
    file = tmp_path / "arbiter.py"
    file.write_text(f"def decide(inactive): return {says == 'cull'}")
    hub.spawn("ann", idle_seconds=LONG_AGO)
    found = facts(cull_real("--explain=ann", "--timeout=1h", f"--arbiter={file}:decide"))
    assert "timeout" in found["arbiter"]
    verb = {"cull": "would be stopped", "keep": "kept"}[says]
    assert re.fullmatch(f"{verb}: .* {says}, .* 2h", found["verdict"])


def test_a_named_server_would_be_removed_where_that_is_asked_for(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", "gpu", idle=LONG_AGO)
    found = facts(cull_scripted("--explain=ann/gpu", "--timeout=1h", "--remove-named-servers"))
    assert found["verdict"].startswith("would be removed: ")


def test_a_user_with_a_server_is_kept(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("ann", idle_seconds=LONG_AGO, user_idle_seconds=LONG_AGO, user_age_seconds=3 * DAY)
    result = cull_real("--explain=ann", "--timeout=1h", "--cull-users", token=hub.user_culler_token)
    of_server, of_user = verdicts(result)
    assert of_server.startswith("stopped: ")
    assert of_user.startswith("kept: ")
    assert facts(result)["user"] == "ann"


def test_rules_keep_their_numbers_for_users(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO, admin=True)
    rules = ["--rule=server=* keep", "--rule=user=bob timeout=5h", "--rule=admin=true keep"]
    result = cull_scripted("--explain=ann", "--cull-users", "--timeout=1h", *rules)
    found = facts(result)
    assert found["user"] == "ann"
    assert {label: fact.partition(":")[0] for label, fact in found.items() if label.startswith("rule")} == {
        "rule 2": "user=bob timeout=5h",
        "rule 3": "admin=true keep",
    }
    assert verdicts(result)[-1] == "kept: rule 3: admin=true keep"


def test_the_limits_of_a_rule_for_servers_do_not_count_for_users(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    rules = ["--rule=user=a* timeout=5h", "--rule=user=ann keep"]
    result = cull_scripted("--explain=ann", "--cull-users", "--timeout=1h", *rules)
    assert facts(result)["rule 1"].startswith("user=a* timeout=5h: ")
    assert "rule 2" not in facts(result)
    assert facts(result)["timeout"].startswith("limit 1h, ")
    assert verdicts(result)[-1].startswith("deleted: ")


# Doubts


@pytest.mark.parametrize(
    ("off", "says"),
    [(2 * HOUR + 30, ", 2h ahead .*"), (-40 * DAY - 30, ", 40d behind .*"), (0, "")],
    ids=["ahead", "behind", "right"],
)
def test_a_clock_that_is_wrong_is_shown_and_the_hubs_clock_counts(
    cull_scripted: Cull, scripted: ScriptedHub, off: float, says: str
) -> None:
    scripted.clock = lambda: datetime.now(UTC) + timedelta(seconds=off)
    scripted.add("ann", idle=3 * HOUR + 30)
    found = facts(cull_scripted("--explain=ann", "--timeout=2h59m"))
    assert re.fullmatch(f"WHEN{says}", ago(found["clock"]))
    assert re.match("would be stopped: .* 3h, .* 2h59m$", found["verdict"])


def test_a_server_without_activity_counts_from_its_start(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", last_activity=None, age=LONG_AGO)
    found = facts(cull_scripted("--explain=ann", "--timeout=1h"))
    assert found["active"] == found["born"]
    assert re.fullmatch(r"WHEN, 2h00m\d\ds ago", ago(found["active"]))


def test_unknown_values_are_shown_as_unknown(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO, started=None)
    found = facts(cull_scripted("--explain=ann", "--timeout=1h", "--max-age=1d"))
    assert (found["born"], found["max-age"]) == ("unknown", "limit 1d")
    scripted.add("bob", last_activity="yesterday")
    found = facts(cull_scripted("--explain=bob", "--timeout=1h"))
    assert (found["ready"], found["active"]) == ("unknown", "unknown")
    assert found["timeout"] == "limit 1h"
    assert re.match("kept: .*last_activity.*'yesterday'", found["verdict"])
    with_rule = facts(cull_scripted("--explain=bob", "--timeout=1h", "--rule=option.x=y keep"))
    assert with_rule | {"clock": ""} == found | {"clock": ""}
    scripted.users["bob"].extra["servers"] = DROP
    assert re.match("kept: .*servers", facts(cull_scripted("--explain=bob"))["verdict"])


# What fails


@pytest.mark.parametrize("name", ["", "/gpu"])
def test_no_user_name_is_a_usage_error_and_nothing_is_culled(
    cull_scripted: Cull, scripted: ScriptedHub, name: str
) -> None:
    scripted.add("ann", idle=9 * HOUR)
    result = cull_scripted("--explain", name, "--timeout=1h")
    assert result.exit_code == 2
    assert "--explain" in result.err
    assert scripted.running() == {"ann"}


def test_an_unknown_user_is_a_usage_error(hub: RealHub, cull_real: Cull) -> None:
    result = cull_real("--explain=nobody")
    assert (result.exit_code, result.out) == (2, "")
    (line,) = result.lines
    for word in ("--explain", hub.url, "'nobody'"):
        assert word in line


def test_a_hub_that_is_down_exits_with_3(cull: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cull_idle.PAUSES", ())
    scripted.pause_listening()
    result = cull("--explain=ann", "--url", scripted.url, token=scripted.token)
    assert (result.exit_code, result.out) == (3, "")
    assert scripted.url in result.err


@pytest.mark.parametrize(
    ("scopes", "args", "missing"),
    [
        (["list:users"], [], "read:servers"),
        (["list:users", "read:servers"], ["--rule=group=gpu keep"], "read:users:groups"),
        (["list:users", "read:servers"], ["--idle-by=both"], "tokens"),
    ],
)
def test_a_missing_scope_is_named(
    hub: RealHub, cull_real: Cull, scopes: list[str], args: list[str], missing: str
) -> None:
    hub.spawn("ann")
    result = cull_real("--explain=ann", *args, token=hub.token_with(*scopes))
    assert (result.exit_code, result.out) == (3, "")
    assert f" {missing} and delete:servers;" in result.err.partition("jupyterhub_config.py")[0]


def test_an_explanation_needs_no_scope_to_delete(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("ann", idle_seconds=LONG_AGO)
    token = hub.token_with("list:users", "read:servers", "read:users:activity")
    (verdict,) = verdicts(cull_real("--explain=ann", "--timeout=1h", token=token))
    assert verdict.startswith("stopped: ")
    assert hub.running() == {"ann"}


@pytest.mark.parametrize("scopes", [["delete:servers"], []], ids=str)
def test_it_says_what_the_token_lacks_for_a_real_pass(
    cull_scripted: Cull, scripted: ScriptedHub, scopes: list[str]
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.scopes = ["list:users", "read:users:activity", "read:servers", *scopes]
    found = facts(cull_scripted("--explain=ann", "--timeout=1h"))
    assert found["verdict"].startswith("would be stopped: ")
    assert ("the token lacks delete:servers:" in found.get("but", "")) == (not scopes)


@pytest.mark.parametrize("looks", ["--dry-run", "--explain=ann"])
def test_a_wrong_servers_url_is_found_before_a_server_is_asked(
    cull_scripted: Cull, scripted: ScriptedHub, looks: str
) -> None:
    scripted.scopes.append("tokens")
    scripted.add("ann", idle=LONG_AGO)
    result = cull_scripted(looks, "--timeout=1h", "--idle-by=both", f"--servers-url={scripted.url}/elsewhere")
    assert (result.exit_code, result.out) == (3, "")
    assert "--servers-url must be" in result.err
    assert not [line for line in scripted.lines() if line.startswith("GET /user/")]
