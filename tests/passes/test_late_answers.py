"""What an adversary found in version 0.2.0: answers that come late, unknown times, names, and what nobody can print."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from runs import Cull
from scripted_hub import HOUR, LONG_AGO, FakeJupyter, ScriptedHub, and_do, edited, reset, respond_json

import cull_idle

NOW = datetime.now(UTC)


@pytest.mark.parametrize("args", [[], ["--cull-users"]], ids=["server", "user"])
def test_who_comes_back_while_the_second_look_is_on_its_way_is_kept(
    cull_scripted: Cull, scripted: ScriptedHub, args: list[str]
) -> None:
    """The Hub answers what was true when it made the answer up."""

    def come_back() -> None:
        scripted.add("ann", idle=0)
        time.sleep(cull_idle.OLD_DECISION + 0.1)

    if args:
        scripted.add_user("ann", idle=LONG_AGO)
    else:
        scripted.add("ann", idle=LONG_AGO)
        scripted.users["ann"].servers[""].started = scripted.users["ann"].created
    scripted.fault("GET", "/users/ann", and_do(come_back))
    result = cull_scripted("--timeout=1h", *args)
    assert scripted.running() == {"ann"}
    assert [request.method for request in scripted.requests if request.method == "DELETE"] == []
    assert list(result.outcomes.values()) == ["spared"]


def test_a_name_that_leads_to_a_server_that_has_just_come_is_not_stopped(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    def start_namesake() -> None:
        scripted.add("ann", "a", idle=0)

    scripted.add("ann", "a?x", idle=LONG_AGO)
    scripted.fault("GET", "/users(/ann)?.*", and_do(start_namesake))
    result = cull_scripted("--timeout=1h")
    assert (result.exit_code, scripted.running()) == (1, {"ann/a", "ann/a?x"})
    assert cull_idle.MISLEADING in result.err


@pytest.mark.parametrize("name", ["a?x", "a#1", "a%3Fx"])
def test_a_server_with_an_odd_name_is_stopped_but_not_removed(
    cull_scripted: Cull, scripted: ScriptedHub, name: str
) -> None:
    """Behind a proxy that decodes paths, the stopped server `a` would be removed, with its storage."""
    scripted.add("ann", name, idle=LONG_AGO)
    scripted.add("ann", "plain", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", "--remove-named-servers")
    assert scripted.running() == set()
    bodies = {request.segments[-1]: request.body for request in scripted.requests if request.method == "DELETE"}
    assert (bodies[name], bodies["plain"]) == (b"", b'{"remove": true}')
    assert result.said[f"ann/{name}"].reason == "idle 2h, limit 1h"
    assert result.said["ann/plain"].reason == "idle 2h, limit 1h; removed"


@pytest.mark.parametrize("name", [".. ", ".\t.", "..\n", "..\0"])
def test_dots_and_blanks_are_no_name_to_send(cull_scripted: Cull, scripted: ScriptedHub, name: str) -> None:
    scripted.add("ann", name, idle=LONG_AGO)
    assert cull_scripted("--timeout=1h").exit_code == 1
    assert scripted.running() == {f"ann/{name}"}


UNKNOWN: list[dict[str, Any]] = [
    {"execution_state": "idle"},
    {"execution_state": "idle", "last_activity": "x"},
    {"execution_state": "busy", "last_activity": "x"},
]


@pytest.mark.parametrize("first", UNKNOWN)
def test_a_busy_kernel_counts_whatever_the_others_say(
    cull_scripted: Cull, scripted: ScriptedHub, first: dict[str, Any]
) -> None:
    scripted.scopes.append("tokens")
    busy = {"execution_state": "busy", "last_activity": NOW}
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(NOW, [first, busy]))
    result = cull_scripted("--timeout=1h", "--idle-by=both")
    assert scripted.running() == {"ann"}
    assert "1 busy" in result.err


@pytest.mark.parametrize(
    ("mode", "path", "answer"),
    [
        ("server", "/user/ann/api/status", {"last_activity": None}),
        ("kernels", "/user/ann/api/kernels", [{"execution_state": "idle", "last_activity": None}]),
    ],
)
def test_an_activity_that_is_unknown_is_now(
    cull_scripted: Cull, scripted: ScriptedHub, mode: str, path: str, answer: object
) -> None:
    scripted.scopes.append("tokens")
    scripted.add("ann", idle=60, age=9 * HOUR)
    scripted.fault("GET", path, respond_json(200, answer), times=None)
    result = cull_scripted("--timeout=1h", f"--idle-by={mode}")
    assert (result.exit_code, scripted.running()) == (0, {"ann"})


@pytest.mark.parametrize("path", ["/{x}/hub/api", "/{}/hub/api", "/{url}/hub/api"])
@pytest.mark.parametrize("scheme", ["http:", "https:"])
def test_braces_in_the_url_are_no_traceback(cull: Cull, scripted: ScriptedHub, path: str, scheme: str) -> None:
    """As in a template that was not filled in."""
    scripted.fault("*", ".*", reset(), times=None)
    url = scripted.url.replace("/hub/api", path).replace("http:", scheme)
    result = cull("--once", "--url", url, token=scripted.token)
    assert result.exit_code == 3
    assert path in result.err


@pytest.mark.parametrize(
    "code",
    [
        "class X:\n  def __repr__(self): raise ValueError\ndef f(): return X()",
        "class X:\n  def __repr__(self): return 5\ndef f(): return X()",
        "class bool_:\n  def __bool__(self): raise ValueError\ndef f(): return bool_()",
        "class E(Exception):\n  def __str__(self): raise ValueError\ndef f(): raise E",
        "class E(Exception):\n  __str__ = None\ndef f(): raise E",
    ],
)
def test_what_an_arbiter_returns_or_raises_need_not_be_printable(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, code: str
) -> None:
    (tmp_path / "arbiter.py").write_text(code)
    scripted.add("ann", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", f"--arbiter={tmp_path / 'arbiter.py'}:f")
    assert scripted.running() == {"ann"}
    assert "kept 1 in doubt; the first: ann: the arbiter " in result.err


@pytest.mark.parametrize("scopes", [5, True, {"a": 1}])
def test_scopes_that_are_no_list_make_no_token(cull_scripted: Cull, scripted: ScriptedHub, scopes: object) -> None:
    scripted.scopes.append("tokens")
    change: Callable[[Any], object] = lambda model: {**model, "scopes": scopes}  # noqa: E731
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    scripted.fault("POST", "/users/ann/tokens", edited(change), times=None)
    result = cull_scripted("--timeout=1h", "--idle-by=both")
    assert (result.exit_code, scripted.tokens_made) == (1, 1)
    assert scripted.running() == {"ann"}


def test_a_config_file_nested_too_deeply_is_not_read(cull: Cull, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f"timeout = {'[' * 9000}{']' * 9000}")
    result = cull("--once", "--config", str(tmp_path / "config.toml"), token="secret")
    assert result.exit_code == 2
    assert "is not TOML" in result.err
