"""--rule: other limits for some servers, and servers and users that are kept."""

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from hub import RealHub
from runs import Cull
from scripted_hub import DROP, HOUR, LONG_AGO, ScriptedHub, respond, then_do

from cull_idle import NEVER, parse_rule


@pytest.mark.parametrize(
    ("text", "matches", "timeout", "max_age", "keep"),
    [
        ("group=gpu timeout=30m", ["group"], timedelta(minutes=30), None, False),
        ("user=svc-* keep", ["user"], None, None, True),
        ("server= timeout=never max-age=8h", ["server"], NEVER, timedelta(hours=8), False),
        ("admin=true option.profile=large state.pod=x max_age=1d", ["admin", "option.profile", "state.pod"], None,
         timedelta(days=1), False),
        ("'user=dave smith' keep", ["user"], None, None, True),
        ('option.display="a b" keep', ["option.display"], None, None, True),
        ("option.max_age=x keep", ["option.max_age"], None, None, True),
        ("timeout=1h", [], timedelta(hours=1), None, False),
        ("group=a group=b keep", ["group", "group"], None, None, True),
    ],
)  # fmt: skip
def test_a_rule_is_matches_and_settings(
    text: str, matches: list[str], timeout: timedelta | None, max_age: timedelta | None, keep: bool
) -> None:
    rule = parse_rule(text)
    assert [match.name for match in rule.matches] == matches
    assert (rule.timeout, rule.max_age, rule.keep) == (timeout, max_age, keep)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "usr=ann keep",
            ["'usr=ann'", "user=, group=, server=, admin=, option.KEY=, state.KEY=", "timeout=, max-age="],
        ),
        ("user=ann kep", ["'kep'", "keep"]),
        ("user=ann", ["timeout=", "max-age=", "keep"]),
        ("", ["timeout=", "max-age=", "keep"]),
        ("user=ann timeout=1x", ["'1x'"]),
        ("user=ann keep timeout=1h", ["'user=ann keep timeout=1h'"]),
        ("user=ann timeout=1h timeout=2h", ["'timeout=2h'"]),
        ("admin=yes keep", ["'admin=yes'"]),
        ("option=x keep", ["'option=x'"]),
        ("option.=x keep", ["'option.=x'"]),
        ("user.x=y keep", ["'user.x=y'"]),
        ("'user=ann keep", ["'user=ann keep"]),
        ("user=\udcfc* keep", ["udcfc* keep", "UTF-8"]),
    ],
)
def test_a_rule_that_is_wrong_gets_a_sentence_that_names_the_word(cull: Cull, text: str, words: list[str]) -> None:
    result = cull("--rule", text)
    assert result.exit_code == 2
    (line,) = result.lines
    for word in ["--rule", *words]:
        assert word in line


def rules(*texts: str) -> list[str]:
    return [f"--rule={text}" for text in texts]


OPTIONS = {"profile": "large", "gpus": 2, "spot": True}


def left(cull: Cull, scripted: ScriptedHub, *texts: str, timeout: str = "1h") -> set[str]:
    result = cull(f"--timeout={timeout}", *rules(*texts))
    assert result.exit_code == 0, result.err
    return scripted.running()


@pytest.mark.parametrize(
    ("texts", "stays"),
    [
        (["user=ann keep"], {"ann", "ann/gpu"}),
        (["user=a* keep"], {"ann", "ann/gpu"}),
        (["user=[!a]* keep"], {"bob"}),
        (["user=A* keep"], set()),
        (["server=gpu keep"], {"ann/gpu"}),
        (["server= keep"], {"ann", "bob"}),
        (["server=?* keep"], {"ann/gpu"}),
        (["group=staff keep"], {"ann", "ann/gpu"}),
        (["group=st* group=gpu* keep"], {"ann", "ann/gpu"}),
        (["group=nobody keep"], set()),
        (["group=Old keep"], {"ann", "ann/gpu"}),
        (["group=old keep"], set()),
        (["admin=true keep"], {"bob"}),
        (["admin=false keep"], {"ann", "ann/gpu"}),
        (["option.profile=large keep"], {"ann/gpu"}),
        (["option.profile=* keep"], {"ann/gpu"}),
        (["option.gpus=2 keep"], {"ann/gpu"}),
        (["option.spot=true keep"], {"ann/gpu"}),
        (["option.nothing=* keep"], set()),
        (["option.image=* keep"], set()),
        (["state.pod=big-* keep"], {"bob"}),
        (["user=ann server=gpu keep"], {"ann/gpu"}),
        (["user=bob server=gpu keep"], set()),
        (["timeout=never"], {"ann", "ann/gpu", "bob"}),
        (["user=ann timeout=3h"], {"ann", "ann/gpu"}),
        (["user=ann timeout=3h max-age=90m"], set()),
        (["user=ann timeout=1m", "user=ann keep"], set()),
        (["user=ann keep", "user=ann timeout=1m"], {"ann", "ann/gpu"}),
    ],
)
def test_the_first_rule_whose_matches_all_hold_applies(
    cull_scripted: Cull, scripted: ScriptedHub, texts: Sequence[str], stays: set[str]
) -> None:
    scripted.scopes.append("admin:server_state")
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("ann", "gpu", idle=LONG_AGO, user_options={**OPTIONS, "image": None})
    scripted.users["ann"].groups = ["gpu-users", "staff", "Old"]
    scripted.add("bob", idle=LONG_AGO, extra={"state": {"pod": "big-7"}})
    scripted.users["bob"].admin = True
    for server in scripted.users["ann"].servers.values():
        server.extra = {**server.extra, "state": {}}
    assert left(cull_scripted, scripted, *texts) == stays


def test_a_rule_with_a_timeout_leaves_the_maximum_age(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=60, age=9 * HOUR)
    scripted.add("bob", idle=LONG_AGO, age=9 * HOUR)
    scripted.add("cat", idle=60, age=HOUR)
    cull_scripted("--timeout=1h", "--max-age=8h", *rules("user=* timeout=3h"))
    assert scripted.running() == {"cat"}


@pytest.mark.parametrize(
    ("limit", "culled"),
    [
        ("90m", {"ann": "age, limit 1h30m by rule 1: user=* max-age=90m", "bob": "idle, limit 1h"}),
        ("0", {"bob": "idle, limit 1h"}),
        ("never", {"bob": "idle, limit 1h"}),
    ],
)
def test_a_rule_with_a_maximum_age_leaves_the_timeout(
    cull_scripted: Cull, scripted: ScriptedHub, limit: str, culled: dict[str, str]
) -> None:
    scripted.add("ann", idle=60, age=9 * HOUR)
    scripted.add("bob", idle=LONG_AGO, age=LONG_AGO)
    result = cull_scripted("--timeout=1h", "--max-age=8h", *rules(f"user=* max-age={limit}"))
    assert set(result.outcomes.values()) == {"culled"}
    assert {name: re.sub(r"(idle|age) \w+", r"\1", said.reason) for name, said in result.said.items()} == culled


def test_a_rule_can_stop_what_the_options_would_keep(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=31 * 60)
    scripted.users["ann"].groups = ["gpu"]
    scripted.add("bob", idle=31 * 60)
    result = cull_scripted("--timeout=1h", *rules("group=gpu timeout=30m"))
    assert scripted.running() == {"bob"}
    assert re.fullmatch(r"idle 3\dm\w*, limit 30m by rule 1: group=gpu timeout=30m", result.said["ann"].reason)


def test_the_dry_run_names_the_rule_that_decided(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=31 * 60)
    scripted.add("bob", idle=HOUR)
    result = cull_scripted("--dry-run", "-v", "--timeout=2h", *rules("user=bob keep", "user=a* timeout=30m"))
    ann, bob = sorted(line for line in result.table if line.startswith(("ann", "bob")))
    assert "stopped" in ann
    assert "rule 2: user=a* timeout=30m" in ann
    assert "kept" in bob
    assert "rule 1: user=bob keep" in bob


def test_the_dry_run_names_the_rule_that_keeps_a_user(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    result = cull_scripted("--dry-run", "-v", "--timeout=1h", "--cull-users", *rules("user=cat keep", "user=bob keep"))
    (line,) = [line for line in result.table if "bob" in line]
    assert "rule 2" in line
    assert "rule" not in next(line for line in result.table if "ann" in line)


def test_the_second_look_obeys_the_rules_too(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", then_do(lambda: setattr(scripted.users["ann"], "groups", ["staff"])))
    result = cull_scripted("--timeout=1h", *rules("group=staff keep"))
    assert scripted.running() == {"ann"}
    assert result.outcomes == {"ann": "spared"}
    assert "rule 1: group=staff keep" in result.said["ann"].reason


def test_a_keep_rule_protects_the_user_too(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("svc-1", idle=LONG_AGO)
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    scripted.add("bob", "gpu", idle=LONG_AGO, user_idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", "--cull-users", *rules("user=svc-* keep", "server=gpu keep"))
    assert set(scripted.users) == {"svc-1", "bob"}
    assert result.exit_code == 0


@pytest.mark.parametrize("rule", ["server=gpu keep", "option.profile=large keep", "state.node=a keep"])
def test_a_keep_rule_that_matches_a_field_of_servers_keeps_no_user(
    cull_scripted: Cull, scripted: ScriptedHub, rule: str
) -> None:
    scripted.scopes.append("admin:server_state")
    scripted.add_user("ann", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", "--cull-users", *rules(rule))
    assert (result.exit_code, set(scripted.users)) == (0, set())


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        ([], set()),
        (["--user-timeout=3h"], {"ann"}),
        (["--user-timeout=never"], {"ann"}),
        (["--user-timeout=never", "--user-max-age=2h"], set()),
        (["--user-timeout=never", "--max-age=2h"], set()),
        (["--user-timeout=never", "--max-age=2h", "--user-max-age=0"], {"ann"}),
        (["--user-timeout=3h", "--user-max-age=9h"], {"ann"}),
    ],
)
def test_users_have_limits_of_their_own(
    cull_scripted: Cull, scripted: ScriptedHub, flags: list[str], left: set[str]
) -> None:
    scripted.add("bob", idle=LONG_AGO)
    scripted.add_user("ann", idle=LONG_AGO)
    assert cull_scripted("--timeout=1h", "--cull-users", *flags).exit_code == 0
    assert scripted.running() == set()
    assert set(scripted.users) == left | {"bob"}


@pytest.mark.parametrize(
    ("rule", "scope", "extra"),
    [("group=gpu keep", "read:users:groups", {"groups": DROP}), ("admin=true keep", "list:users", {"admin": DROP})],
)
def test_a_rule_on_a_field_of_the_user_that_is_not_shown_ends_the_pass(
    cull_scripted: Cull, scripted: ScriptedHub, rule: str, scope: str, extra: dict[str, Any]
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    scripted.users["bob"].extra = extra
    result = cull_scripted("--timeout=1h", *rules(rule))
    assert result.exit_code == 3
    field = rule.partition("=")[0]
    (line,) = result.errors
    for word in (f"{field}=", "bob", scope):
        assert word in line
    assert scripted.lines("DELETE") == []


@pytest.mark.parametrize(
    ("rule", "scope"), [("option.x=1 keep", "read:servers"), ("state.x=1 keep", "admin:server_state")]
)
def test_a_rule_on_a_field_of_the_server_that_is_not_shown_ends_the_pass(
    cull_scripted: Cull, scripted: ScriptedHub, rule: str, scope: str
) -> None:
    scripted.fault("GET", "/user", respond(404), times=None)
    scripted.add("ann", idle=LONG_AGO, extra={"user_options": DROP, "state": DROP})
    result = cull_scripted("--timeout=1h", *rules(rule))
    assert result.exit_code == 3
    (line,) = result.lines
    for word in ("ann", scope):
        assert word in line
    assert scripted.lines("DELETE") == []


def test_a_field_of_a_rule_that_the_second_look_does_not_show_ends_the_pass(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", then_do(lambda: setattr(scripted.users["ann"], "extra", {"groups": DROP})))
    result = cull_scripted("--timeout=1h", *rules("group=gpu keep"))
    assert result.exit_code == 3
    assert scripted.lines("DELETE") == []


@pytest.mark.parametrize(
    ("rule", "scope"), [("group=gpu timeout=30m", "read:users:groups"), ("state.pod=x keep", "admin:server_state")]
)
def test_a_scope_that_a_rule_needs_is_named_at_once_with_the_role(
    hub: RealHub, cull_real: Cull, rule: str, scope: str
) -> None:
    hub.spawn("ann", idle_seconds=LONG_AGO)
    result = cull_real("--timeout=1h", *rules(rule))
    assert result.exit_code == 3
    (line,) = result.lines
    sentence, _, role = line.partition("load_roles")
    assert scope in sentence
    assert f'"{scope}"' in role
    assert hub.running() == {"ann"}


def test_rules_on_a_real_hub(hub: RealHub, cull_real: Cull) -> None:
    hub.add_user("gina", groups=["gpu"])
    hub.add_user("carl", groups=["class-1", "all"])
    hub.spawn_many(
        [
            ("gina", "", {"idle_seconds": 40 * 60 + 30}),
            ("carl", "", {"idle_seconds": LONG_AGO}),
            ("svc-bot", "", {"idle_seconds": 30 * 24 * HOUR}),
            ("pete", "", {"idle_seconds": LONG_AGO, "profile": "large"}),
            ("pete", "small", {"idle_seconds": LONG_AGO, "profile": "small"}),
            ("zoe", "", {"idle_seconds": 40 * 60 + 30}),
        ]
    )
    token = hub.token_with(
        "list:users", "read:users:activity", "read:servers", "delete:servers", "read:users:groups", "admin:server_state"
    )
    result = cull_real(
        "--timeout=1h",
        *rules(
            "user=svc-* keep", "group=gpu timeout=30m", "group=class-* timeout=4h", "option.profile=large timeout=4h"
        ),
        token=token,
    )
    assert result.exit_code == 0
    assert hub.running() == {"carl", "svc-bot", "pete", "zoe"}
    assert result.outcomes == {"gina": "culled", "pete/small": "culled"}
    assert result.said["gina"].reason.endswith("limit 30m by rule 2: group=gpu timeout=30m")
