"""The exact words of what a pass says: of servers and users, of the pass itself, of what it does not understand."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Cull, Result, RunLoop
from scripted_hub import (
    DROP,
    LONG_AGO,
    ScriptedHub,
    and_do,
    edited,
    normal,
    respond,
    respond_json,
    slow,
    then_do,
)

from cull_idle import parse_duration, parse_time, read_user

MOMENT = "2026-11-22T20:00:00Z"
SERVER = {"last_activity": MOMENT, "started": MOMENT, "pending": None, "ready": True, "url": "/user/ann/"}
ANN = {"name": "ann", "admin": False, "created": MOMENT, "last_activity": MOMENT}


def untimed(line: str) -> str:
    """A line about a pass without its seconds."""
    return re.sub(r" in \d+\.\ds", "", line)


# What cannot be read


@pytest.mark.parametrize(
    ("parse", "text", "sentence"),
    [
        (parse_duration, "1x", "'1x' is not a duration: write seconds, or like 90s, 15m, 1.5h, 1h30m, 2d, 1w."),
        (parse_duration, "999999999999d", "'999999999999d' is too long a duration."),
        (parse_time, "yesterday or so", "'yesterday or so' is not a time"),
        (read_user, None, "answered a user without a name"),
        (read_user, {"name": ""}, "answered a user without a name"),
    ],
)
def test_what_is_refused(parse: Callable[[Any], object], text: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        parse(text)


NOT_SHOWN = "its last_activity is not shown: that takes the scope read:users:activity"


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"created": "x"}, "created or last_activity: 'x' is not a time"),
        ({"created": 7}, "created or last_activity: '7' is not a time"),
        ({"last_activity": "x"}, "created or last_activity: 'x' is not a time"),
        ({"last_activity": None, "created": None}, "neither last_activity nor created is known"),
        ({"last_activity": DROP}, NOT_SHOWN),
        ({"last_activity": "x", "admin": None}, "created or last_activity: 'x' is not a time"),
        ({"last_activity": DROP, "created": "x"}, NOT_SHOWN),
        ({"admin": None}, "the Hub does not say whether it is an admin"),
        ({"admin": DROP}, "the Hub does not say whether it is an admin"),
    ],
)
def test_the_doubt_about_a_user(changes: dict[str, object], doubt: str) -> None:
    model = {key: value for key, value in {**ANN, "servers": {}, **changes}.items() if value is not DROP}
    assert read_user(model).doubt == doubt


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"started": "x"}, "started or last_activity: 'x' is not a time"),
        ({"last_activity": "x"}, "started or last_activity: 'x' is not a time"),
        ({"last_activity": None, "started": None}, "neither last_activity nor started is known"),
        ({"last_activity": None, "started": None, "ready": None}, "neither last_activity nor started is known"),
        ({"ready": None}, "ready is neither true nor false"),
        ({"pending": DROP}, "pending is missing"),
        ({"last_activity": DROP}, "last_activity is missing"),
        ({"ready": DROP}, "ready is missing"),
    ],
)
def test_the_doubt_about_a_server(changes: dict[str, object], doubt: str) -> None:
    model = {key: value for key, value in {**SERVER, **changes}.items() if value is not DROP}
    (server,) = read_user({**ANN, "servers": {"gpu": model}}).servers
    assert server.doubt == doubt


@pytest.mark.parametrize(
    ("user", "doubt"),
    [
        (ANN, "its servers are not shown: that takes the scope read:servers"),
        ({**ANN, "servers": None}, "its servers are not shown: that takes the scope read:servers"),
        ({**ANN, "servers": {"": 7}}, "its model is not a JSON object"),
    ],
)
def test_the_doubt_about_servers_that_are_not_shown(user: dict[str, object], doubt: str) -> None:
    (server,) = read_user(user).servers
    assert server.doubt == doubt


def test_users_without_a_name(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", respond_json(200, [{}, {"name": ""}]))
    assert cull_scripted("--timeout", "1h").warnings == [
        "WARNING  kept 2 in doubt; the first: the user list: answered a user without a name"
    ]


# Servers


def test_kept_servers_and_users(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("busy", idle=LONG_AGO)
    scripted.add_user("awake", idle=LONG_AGO)
    assert cull_scripted("--timeout", "30d", "--cull-users", "-v").lines[:2] == [
        "DEBUG    kept busy: idle 2h, limit 30d",
        "DEBUG    kept user awake: idle 2h, limit 30d",
    ]


@pytest.mark.parametrize(
    ("fields", "arguments", "reason"),
    [
        ({"pending": "spawn"}, [], "pending spawn"),
        ({"pending": "stop"}, [], "pending stop"),
        ({"pending": "\x1b[31m"}, [], r"pending \x1b[31m"),
        ({"extra": {"ready": False}}, [], "not ready"),
        ({}, ["--cull-default-servers=false"], "default servers are not culled"),
        ({"server": "gpu"}, ["--cull-named-servers=false"], "named servers are not culled"),
        ({}, ["--rule=user=a* keep"], "rule 1: user=a* keep"),
        ({}, ["--rule=user=a* timeout=3h"], "idle 2h, limit 3h by rule 1: user=a* timeout=3h"),
        ({}, ["--timeout=never"], "idle 2h, no limit"),
    ],
)
def test_why_a_server_is_kept(
    cull_scripted: Cull, scripted: ScriptedHub, fields: dict[str, Any], arguments: list[str], reason: str
) -> None:
    scripted.add("ann", idle=LONG_AGO, **fields)
    (said,) = cull_scripted("--timeout", "1h", "-v", *arguments).said.values()
    assert (said.level, said.outcome, said.reason) == ("DEBUG", "kept", reason)


CHANGES = [
    pytest.param(lambda hub: hub.users["ann"].servers.clear(), "INFO     gone ann: not running any more", id="down"),
    pytest.param(
        lambda hub: setattr(hub.users["ann"].servers[""], "pending", "stop"),
        "WARNING  stopping ann: the Hub is stopping it already",
        id="stopping",
    ),
    pytest.param(
        lambda hub: setattr(hub.users["ann"].servers[""], "started", hub.now),
        "INFO     spared ann: it was started anew",
        id="new",
    ),
    pytest.param(lambda hub: hub.users.clear(), "INFO     gone ann: the Hub answered 404", id="no such user"),
]


@pytest.mark.parametrize(("change", "line"), CHANGES)
def test_what_the_second_look_finds(
    cull_scripted: Cull, scripted: ScriptedHub, change: Callable[[ScriptedHub], object], line: str
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", then_do(lambda: change(scripted)))
    assert cull_scripted("--timeout", "1h").lines[0] == line


@pytest.mark.parametrize(
    ("servers", "line"),
    [
        (None, "INFO     spared ann/gpu: its servers are not shown: that takes the scope read:servers"),
        ({"": None}, "INFO     spared ann/gpu: its model is not a JSON object"),
        ({"": SERVER}, "INFO     gone ann/gpu: not running any more"),
    ],
)
def test_a_second_look_that_does_not_show_the_server(
    cull_scripted: Cull, scripted: ScriptedHub, servers: object, line: str
) -> None:
    scripted.add("ann", "gpu", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", edited(lambda model: {**model, "servers": servers}))
    assert cull_scripted("--timeout", "1h").lines[0] == line


def test_an_active_server_in_two_units(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    server = scripted.add("ann", idle=4 * 86400)
    seen = scripted.now - timedelta(days=1, hours=2, minutes=3, seconds=30)
    scripted.fault("GET", "/users/ann", then_do(lambda: setattr(server, "last_activity", seen)))
    assert cull_scripted("--timeout", "3d").lines[0] == "INFO     spared ann: active again 1d02h ago"


def test_a_named_server_that_is_removed(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("ann", "gpu", idle=LONG_AGO)
    assert sorted(cull_scripted("--timeout", "1h", "--remove-named-servers").lines[:2]) == [
        "INFO     culled ann/gpu: idle 2h, limit 1h; removed",
        "INFO     culled ann: idle 2h, limit 1h",
    ]


def test_a_server_that_is_slow_to_stop(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.slow_stop = 0.7
    scripted.add("ann", idle=LONG_AGO, stop_seconds=9)
    result = cull_scripted("--timeout", "1h")
    assert result.lines[0] == "WARNING  stopping ann: idle 2h, limit 1h; not down after 1s"


@pytest.mark.parametrize("status", [401, 403])
def test_a_stop_that_is_refused(cull_scripted: Cull, scripted: ScriptedHub, status: int) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", respond(status))
    result = cull_scripted("--timeout", "1h")
    assert result.lines[0].startswith(
        f"ERROR    failed ann: idle 2h, limit 1h; the Hub answered {status}; the token needs the scope delete:servers,"
        " or before JupyterHub 2.0 to be an admin's: c.JupyterHub.load_roles.append("
    )


def test_a_stop_that_takes_too_long(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", slow(0.5))
    assert cull_scripted("--timeout", "1h", "--request-timeout", "0.2").lines[0] == (
        f"ERROR    failed ann: idle 2h, limit 1h; DELETE /users/ann/server: {scripted.url} did not answer within 0.2s"
        " (--request-timeout)"
    )


def test_a_500_for_a_user_that_no_longer_exists(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", then_do(scripted.users.clear, respond(500)))
    assert cull_scripted("--timeout", "1h").lines[0] == "INFO     gone ann: the Hub answered 500"


def test_a_server_that_will_be_due_soon(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.now = scripted.now.replace(microsecond=0)
    scripted.add("ann", idle=50 * 60 + 30)
    result = cull_scripted("--timeout", "1h", "--warn-before", "15m")
    assert result.lines[0] == "INFO     warned ann: idle 50m30s, limit 1h; due in 9m30s"


# Users


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (202, "WARNING  stopping user ann: idle 2h, limit 1h; a server is not down yet"),
        (400, "INFO     spared user ann: the Hub answered 400"),
        (404, "INFO     gone user ann: the Hub answered 404"),
    ],
)
def test_the_delete_of_a_user(cull_scripted: Cull, scripted: ScriptedHub, status: int, line: str) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann", respond(status))
    assert cull_scripted("--timeout", "1h", "--cull-users").lines[0] == line


def promote(hub: ScriptedHub) -> None:
    hub.users["ann"].admin = True


def create_anew(hub: ScriptedHub) -> None:
    hub.add_user("ann", idle=LONG_AGO, age=LONG_AGO)


def start_a_server(hub: ScriptedHub) -> None:
    hub.add("ann", idle=LONG_AGO)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (promote, "admins are not deleted"),
        (create_anew, "it was created anew"),
        (start_a_server, "a server is there again"),
        (lambda hub: hub.touch("ann"), "active again 0s ago"),
        (lambda hub: hub.users["ann"].extra.update(admin=None), "the Hub does not say whether it is an admin"),
    ],
)
def test_why_a_user_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub, change: Callable[[ScriptedHub], object], reason: str
) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", then_do(lambda: change(scripted)))
    result = cull_scripted("--timeout", "1h", "--cull-users", "--cull-admin-users=false")
    assert result.lines[0] == f"INFO     spared user ann: {reason}"


def test_a_user_with_a_server_that_is_still_stopping(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", respond(202))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.lines[1] == "INFO     spared user ann: a server is still there"


# The arbiter, rules and the fuse


def test_what_the_arbiter_says(cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path) -> None:
    arbiter = tmp_path / "arbiter.py"
    arbiter.write_text("asked = []\ndef f(): asked.append(1); return len(asked) in (1, 2, 3)")
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", "--concurrency=1", f"--arbiter={arbiter}:f")
    assert result.lines[:2] == [
        "INFO     culled ann: the arbiter says cull, idle 2h",
        "INFO     spared bob: the arbiter says keep, idle 2h",
    ]


def test_an_arbiter_that_fails(cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path) -> None:
    arbiter = tmp_path / "arbiter.py"
    arbiter.write_text("def f(): return 1 / 0")
    scripted.add("ann", idle=LONG_AGO)
    assert cull_scripted("--timeout=1h", f"--arbiter={arbiter}:f").lines[0] == (
        "WARNING  kept 1 in doubt; the first: ann: the arbiter failed: ZeroDivisionError: division by zero"
    )


def test_an_arbiter_that_cannot_be_loaded(cull: Cull) -> None:
    assert cull("--arbiter=operator:nothing").err == (
        "cull_idle.py: Invalid value for '--arbiter': 'operator:nothing' cannot be loaded:"
        " AttributeError: module 'operator' has no attribute 'nothing'.\n"
    )


def test_an_arbiter_with_an_unknown_argument(cull: Cull, tmp_path: Path) -> None:
    arbiter = tmp_path / "arbiter.py"
    arbiter.write_text("def f(server, mood): return True")
    assert cull(f"--arbiter={arbiter}:f").err.endswith(
        ":f' wants 'mood', and is given only inactive, inactive_limit, server, user.\n"
    )


RULE_HELP = (
    "write matches (user=, group=, server=, admin=, option.KEY=, state.KEY=) and settings (timeout=, max-age=, keep)"
)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("user=ann kep", f"'kep' in 'user=ann kep' is not understood: {RULE_HELP}."),
        ("user=ann", f"'user=ann' needs timeout= or max-age=, or keep in their place: {RULE_HELP}."),
        (
            "timeout=1x",
            "'timeout=1x': '1x' is not a duration: write seconds, or like 90s, 15m, 1.5h, 1h30m, 2d, 1w.",
        ),
        ("'user=ann keep", '"\'user=ann keep": No closing quotation.'),
    ],
)
def test_a_rule_that_is_wrong(cull: Cull, rule: str, sentence: str) -> None:
    assert cull("--rule", rule).err == f"cull_idle.py: Invalid value for '--rule': {sentence}\n"


def test_a_rule_on_a_field_that_the_hub_does_not_show(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.users["ann"].extra = {"groups": DROP}
    assert cull_scripted("--timeout=1h", "--rule=group=gpu keep").lines[0] == (
        "ERROR    a rule matches group=, which the Hub does not show of ann; that takes the scope read:users:groups,"
        " or a newer Hub"
    )


BLOWN = (
    "nothing is culled, because 1 of 1 servers are due and --max-culls is 0;"
    " look with --dry-run and, if they should go, raise it"
)


def test_a_fuse_that_blows(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    assert cull_scripted("--timeout=1h", "--max-culls=0").lines[0] == f"ERROR    {BLOWN}"
    assert cull_scripted("--timeout=1h", "--max-culls=0", "--dry-run").table[-1] == f"But {BLOWN}."


def test_a_fuse_that_is_neither_a_number_nor_a_percentage(cull: Cull) -> None:
    assert cull("--max-culls=x").err == (
        "cull_idle.py: Invalid value for '--max-culls': 'x' is neither a number, such as 20, nor a percentage,"
        " such as 10%.\n"
    )


def test_a_warning_time_that_is_too_long(cull: Cull) -> None:
    assert cull("--timeout=1h", "--warn-before=1h").err == (
        "cull_idle.py: --warn-before must be shorter than --timeout and each rule's timeout=,"
        " or it would warn of servers in use.\n"
    )


# The pass


def test_a_list_that_does_not_go_on(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", respond_json(200, {"items": [], "_pagination": {"next": {"offset": 0}}}))
    result = cull_scripted("--timeout", "1h")
    assert result.errors == ["ERROR    GET /users: the page after offset 0 would start at 0; the rest is not read"]


def test_a_proxy_that_decodes_names(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("a/b", idle=LONG_AGO)
    scripted.fault("GET", "%2Fusers.*", respond_json(200, []))
    assert cull_scripted("--timeout", "1h").errors[0] == (
        f"ERROR    failed a/b: idle 2h, limit 1h; a proxy on the way to {scripted.url} rewrites %2F in paths, so that"
        " this name may come to mean another's; it must pass paths on unchanged, or --url lead past it"
    )


def summary(result: Result) -> str:
    return untimed(result.lines[-1])


def test_a_pass_with_nothing_to_do(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann")
    assert summary(cull_scripted("--timeout", "1h")) == "INFO     pass: 1 running, 0 due"


def test_a_pass_that_does_all(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for name in ("ann", "bob", "cat", "eve"):
        scripted.add(name, idle=LONG_AGO)
    scripted.add_user("dan", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", then_do(scripted.users["ann"].servers.clear))
    scripted.fault("GET", "/users/bob", then_do(lambda: scripted.touch("bob")))
    scripted.fault("DELETE", "/users/cat/server", respond(202))
    assert summary(cull_scripted("--timeout", "1h", "--cull-users", "--concurrency=1")) == (
        "INFO     pass: 4 running, 9 due, 1 culled, 1 stopping, 1 gone, 3 spared, 3 deleted"
    )


def test_a_pass_with_a_failure(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", respond(418))
    assert summary(cull_scripted("--timeout", "1h")) == "INFO     pass: 2 running, 2 due, 1 culled, 1 failed"


def test_a_pass_that_leaves_something_undone(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h", "--max-culls=1")
    assert summary(result) == "INFO     pass: 2 running, 2 due, 2 left undone"


def test_how_long_a_pass_took(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", slow(0.2))
    assert re.fullmatch(r"INFO     pass: 0 running, 0 due in 0\.[2-9]s", cull_scripted("--timeout", "1h").lines[-1])


def test_when_the_next_pass_starts(loop: RunLoop, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", normal(), respond(403))
    worked, failed = loop(scripted, "--timeout=1h", "--cull-every=20s", between=[lambda: None]).passes
    assert summary(worked) == "INFO     pass: 0 running, 0 due; next in 20s"
    assert failed.lines[-1].endswith("; next in 2s")


def test_a_loop_that_is_told_to_stop(cull: Cull, scripted: ScriptedHub, tell_to_stop: Callable[[], None]) -> None:
    scripted.fault("GET", "/users", and_do(tell_to_stop))
    result = cull("--timeout=1h", "--url", scripted.url, token=scripted.token)
    assert [untimed(line) for line in result.lines] == ["INFO     pass: 0 running, 0 due", "INFO     told to stop"]
