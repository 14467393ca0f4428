"""The exact words of messages, and of the facts of --explain. No other test of the command line knows them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import Cull, Result, RunLoop
from processes import PROGRAM
from scripted_hub import (
    HOUR,
    LEAST_SCOPES,
    LONG_AGO,
    Answer,
    Reply,
    ScriptedHub,
    drip,
    empty,
    hang,
    html,
    raw,
    redirect,
    reset,
    reset_in_body,
    respond,
    respond_json,
    then_do,
    truncated,
)
from settings import SettingsOf

import cull_idle

TOKEN = "5ecre7-token-0f-the-cu11er"
TO_API = "usually ends in /hub/api"


def assert_one_sentence(result: Result, exit_code: int, *words: str) -> None:
    assert result.exit_code == exit_code
    assert result.out == ""
    assert len(result.lines) == 1, result.err
    for word in words:
        assert word in result.lines[0]


# The token


@pytest.mark.parametrize(
    ("env", "words"),
    [
        pytest.param({}, ["$JUPYTERHUB_API_TOKEN", "not set", "put an API token"], id="none"),
        pytest.param({"JUPYTERHUB_API_TOKEN": ""}, ["$JUPYTERHUB_API_TOKEN", "empty", "put an API token"], id="empty"),
        pytest.param({"JUPYTERHUB_API_TOKEN": " \n\t"}, ["$JUPYTERHUB_API_TOKEN", "empty"], id="blank"),
    ],
)
def test_without_a_token(cull: Cull, scripted: ScriptedHub, env: dict[str, str], words: list[str]) -> None:
    result = cull("--once", "--url", scripted.url, env=env)
    assert_one_sentence(result, 2, *words)
    assert scripted.requests == []


@pytest.mark.parametrize(
    "token",
    ["zw\u00f6lf-zeichen", "two words", "first\nsecond", "bell\x07bell", "snow\u2603man", "half\udcffhalf"],
    ids=ascii,
)
def test_a_token_that_is_not_one_word(cull_scripted: Cull, scripted: ScriptedHub, token: str) -> None:
    result = cull_scripted(token=token)
    assert_one_sentence(result, 2, "$JUPYTERHUB_API_TOKEN", "does not hold an API token", "one word")
    assert scripted.requests == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", ["is empty", "put an API token"], id="empty"),
        pytest.param(b"\n \n", ["is empty", "put an API token"], id="blank"),
        pytest.param(b"\x80\xff\x00" * 9, ["does not hold an API token", "one word"], id="binary"),
        pytest.param(b"\xef\xbb\xbf" + TOKEN.encode(), ["does not hold an API token"], id="byte order mark"),
        pytest.param(TOKEN.encode("utf-16"), ["does not hold an API token"], id="UTF-16"),
        pytest.param(f"{TOKEN}\n{TOKEN}\n".encode(), ["does not hold an API token"], id="two lines"),
        pytest.param(f"token={TOKEN} # mine".encode(), ["does not hold an API token"], id="a setting"),
    ],
)
def test_a_token_file_without_a_token(
    cull: Cull, scripted: ScriptedHub, tmp_path: Path, content: bytes, words: list[str]
) -> None:
    file = tmp_path / "api-token"
    file.write_bytes(content)
    result = cull("--once", "--url", scripted.url, "--token-file", str(file), token=scripted.token)
    assert_one_sentence(result, 2, f"--token-file {file}", *words)
    assert TOKEN not in result.err
    assert scripted.requests == []


@pytest.mark.parametrize(("name", "why"), [("none", "No such file"), ("", "directory")])
def test_a_token_file_that_cannot_be_read(
    cull: Cull, scripted: ScriptedHub, tmp_path: Path, name: str, why: str
) -> None:
    file = str(tmp_path / name)
    result = cull("--once", "--url", scripted.url, "--token-file", file, token=scripted.token)
    assert_one_sentence(result, 2, f"--token-file {file}", "cannot be read", why)
    assert scripted.requests == []


def test_a_token_file_comes_before_the_variable_and_may_end_in_a_newline(
    cull: Cull, scripted: ScriptedHub, tmp_path: Path
) -> None:
    file = tmp_path / "api-token"
    file.write_text(f"{scripted.token}\n")
    assert cull("--once", "--url", scripted.url, "--token-file", str(file), token="another").exit_code == 0
    assert {request.headers["authorization"] for request in scripted.requests} == {f"token {scripted.token}"}


def test_a_token_that_is_refused(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    assert_one_sentence(cull_scripted(token=TOKEN), 3, "403", "token", scripted.url)


def test_a_token_that_is_refused_with_401(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", ".*", respond_json(401, {"message": "Login required"}), times=None)
    assert_one_sentence(cull_scripted(), 3, "401 (Login required)", "token")


# The URL


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "localhost:8081",
        "127.0.0.1:8081/hub/api",
        "//127.0.0.1/hub/api",
        "ftp://127.0.0.1/hub/api",
        "file:///etc/passwd",
        "http://",
        "http:///hub/api",
        "http://127.0.0.1:99999/hub/api",
        "http://127.0.0.1:0/hub/api",
        "http://127.0.0.1:port/hub/api",
        "http://[::1/hub/api",
        "http://ho st/hub/api",
        "http://127.0.0.1/hub/api\n",
    ],
)
def test_a_url_that_is_not_valid(cull: Cull, url: str) -> None:
    assert_one_sentence(cull("--once", "--url", url, token=TOKEN), 2, "--url", "not a URL like http://127.0.0.1:8081")


@pytest.mark.parametrize(
    "url",
    [
        "http://.example/hub/api",
        "http://*.example/hub/api",
        "http://a..b/hub/api",
        f"http://{'a' * 64}.example/hub/api",
        "http://%zz/hub/api",
        "https://.example/hub/api",
    ],
)
def test_a_url_with_an_impossible_host(cull: Cull, url: str) -> None:
    result = cull("--once", "--url", url, token=TOKEN)
    assert result.exit_code in (2, 3)
    assert_one_sentence(result, result.exit_code, url)


@pytest.mark.parametrize(
    "url",
    [
        f"http://ann:{TOKEN}@127.0.0.1:1/hub/api",
        f"http://{TOKEN}@127.0.0.1:1/hub/api",
        f"http://127.0.0.1:1/hub/api?token={TOKEN}",
        f"http://127.0.0.1:1/hub/api#{TOKEN}",
    ],
)
def test_a_url_with_a_secret_in_it_is_not_shown(cull: Cull, url: str) -> None:
    assert_one_sentence(cull("--once", "--url", url, token=TOKEN), 2, "--url")


@pytest.mark.parametrize("path", ["", "/", "/hub", "/hub/", "/hub/home", "/hub/api/users"])
def test_a_url_without_hub_api(cull: Cull, scripted: ScriptedHub, path: str) -> None:
    url = f"http://127.0.0.1:{scripted.port}{path}"
    result = cull("--once", "--url", url, token=scripted.token)
    assert_one_sentence(result, 3, url.rstrip("/"), TO_API)
    assert scripted.lines("DELETE") == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(html(), ["HTML", TO_API], id="HTML"),
        pytest.param(html(404), ["404", TO_API], id="HTML, 404"),
        pytest.param(html(500), ["500"], id="HTML, 500"),
        pytest.param(respond(200, b"hello"), [TO_API], id="text"),
        pytest.param(respond(200, b"\xff\xfe\x00"), [TO_API], id="binary"),
        pytest.param(respond(200, b"[" * 100_000), [TO_API], id="deep"),
        pytest.param(respond(200, b"9" * 10_000), [TO_API], id="a long number"),
        pytest.param(empty(), ["nothing", TO_API], id="nothing"),
        pytest.param(empty(204), ["204", TO_API], id="204"),
        pytest.param(respond_json(200, {"version": "6.1.1"}), [TO_API], id="another JSON"),
        pytest.param(respond_json(200, "users"), [TO_API], id="a string"),
        pytest.param(respond_json(500, {"message": "Oops"}), ["500 (Oops)"], id="500"),
        pytest.param(truncated(), [TO_API], id="half an answer"),
        pytest.param(reset(), ["connection was lost"], id="reset"),
        pytest.param(reset_in_body(), ["connection was lost"], id="reset in the body"),
        pytest.param(raw(b"SSH-2.0-OpenSSH_9.6\r\n"), ["connection was lost", "(BadStatusLine)"], id="not HTTP"),
        pytest.param(
            raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\n[]\r\n0\r\n\r\n"),
            ["GET /users"],
            id="less than nothing",
        ),
        pytest.param(raw(b""), ["connection was lost"], id="nothing at all"),
        pytest.param(respond(200, b"x", {"Content-Encoding": "gzip"}), ["GET /users"], id="not gzip"),
    ],
)
def test_an_answer_that_is_not_a_user_list(
    cull_scripted: Cull, scripted: ScriptedHub, answer: Reply, words: list[str]
) -> None:
    scripted.fault("GET", "/users", answer, times=None)
    assert_one_sentence(cull_scripted(), 3, "GET /users", scripted.url, *words)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_hub_that_is_unavailable(cull_scripted: Cull, scripted: ScriptedHub, status: int) -> None:
    scripted.fault("GET", "/users", respond_json(status, {"message": "Restarting"}), times=None)
    assert_one_sentence(cull_scripted(), 3, f"GET /users: the Hub answered {status} (Restarting)")
    assert len(scripted.lines()) == 1 + len(cull_idle.PAUSES) + 1


@pytest.mark.parametrize("answer", [html(), html(404), reset(), hang(0.1), respond(500), empty()])
def test_a_server_that_is_not_a_hub(cull_scripted: Cull, scripted: ScriptedHub, answer: Reply) -> None:
    scripted.fault("*", ".*", answer, times=None)
    assert_one_sentence(cull_scripted("--cull-users"), 3, scripted.url)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_another_host(
    cull_scripted: Cull, scripted: ScriptedHub, elsewhere: ScriptedHub, status: int
) -> None:
    scripted.fault("*", ".*", redirect(f"{elsewhere.url}/users", status), times=None)
    assert_one_sentence(
        cull_scripted(), 3, scripted.url, f"redirects to {elsewhere.url}/users", "not followed", "--url", TO_API
    )


@pytest.mark.parametrize(
    "location",
    [
        "http://[::1",
        "http://.example/",
        "http://%zz/",
        "//",
        "http://127.0.0.1:port/",
        "caf\u00e9",
        "\xff\xfe",
        "\x1b[2J",
        "",
    ],
    ids=ascii,
)
def test_a_redirect_to_something_that_is_not_a_url(cull_scripted: Cull, scripted: ScriptedHub, location: str) -> None:
    scripted.fault("GET", "/users", redirect(location), times=None)
    assert_one_sentence(cull_scripted(), 3, scripted.url, "redirects to", TO_API)


def test_a_redirect_without_a_location(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("*", ".*", respond(302), times=None)
    assert_one_sentence(cull_scripted(), 3, scripted.url, "redirects to nowhere")


def test_a_hub_that_refuses_the_connection(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.pause_listening()
    assert_one_sentence(cull_scripted(), 3, scripted.url, "refuses the connection", "is the Hub running", "--url")


def test_a_host_that_does_not_resolve(cull: Cull, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    result = cull("--once", "--url", "http://hub.example/hub/api", token=TOKEN)
    assert_one_sentence(result, 3, "http://hub.example/hub/api", "does not resolve", "--url")


def test_a_package_that_is_missing(cull_scripted: Cull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "requests", None)
    assert_one_sentence(cull_scripted(), 2, "requests is missing", "README")


def test_a_click_that_is_too_old(cull_scripted: Cull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(click, "NoSuchCommand")
    assert_one_sentence(cull_scripted(), 2, "click is too old", "pip install --upgrade click")


def test_a_hub_without_a_route(cull: Cull) -> None:
    url = "http://255.255.255.255/hub/api"  # everybody's address
    assert_one_sentence(cull("--once", "--url", url, token=TOKEN), 3, url, "cannot be reached", "--url")


def test_a_hub_that_times_out(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("*", ".*", hang(), times=None)
    result = cull_scripted("--request-timeout", "0.2")
    assert_one_sentence(result, 3, scripted.url, "did not answer within 0.2s", "--request-timeout")


def test_an_answer_that_stops_halfway_times_out(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", drip(5), times=None)
    result = cull_scripted("--request-timeout", "0.2")
    assert_one_sentence(result, 3, scripted.url, "within 0.2s", "--request-timeout")


def test_https_where_the_hub_speaks_http(cull: Cull, scripted: ScriptedHub) -> None:
    url = scripted.url.replace("http:", "https:")
    assert_one_sentence(cull("--once", "--url", url, token=TOKEN), 3, url, "TLS")


def test_a_dry_run_fails_in_the_same_way(cull: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", html(), times=None)
    result = cull("--dry-run", "--url", scripted.url, token=scripted.token)
    assert result.exit_code == 3
    assert len(result.lines) == 1
    assert "HTML" in result.lines[0]


def test_quiet_does_not_silence_a_failure(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", html(), times=None)
    assert_one_sentence(cull_scripted("-q"), 3, "HTML")


# Scopes


@pytest.mark.parametrize(
    ("granted", "arguments", "missing"),
    [
        pytest.param(set(LEAST_SCOPES) - {"list:users"}, [], "list:users", id="list"),
        pytest.param(set(LEAST_SCOPES) - {"read:servers"}, [], "read:servers", id="read"),
        pytest.param(set(LEAST_SCOPES) - {"delete:servers"}, [], "delete:servers", id="stop"),
        pytest.param(set(LEAST_SCOPES), ["--cull-users"], "admin:users", id="delete users"),
        pytest.param(set(LEAST_SCOPES) - {"read:servers"}, ["--dry-run"], "read:servers", id="dry run"),
    ],
)
def test_a_scope_that_is_missing_is_named_with_the_role_that_grants_it(
    cull_scripted: Cull, scripted: ScriptedHub, granted: set[str], arguments: list[str], missing: str
) -> None:
    scripted.scopes = sorted(granted)
    scripted.add("ann", idle=7200)
    scripted.add_user("bob", idle=7200)
    result = cull_scripted("--timeout", "1h", *arguments)
    assert_one_sentence(result, 3, missing, "jupyterhub_config.py", "c.JupyterHub.load_roles", f'"{missing}"', "culler")
    said, _, role = result.lines[0].partition("load_roles")
    assert [scope for scope in (*LEAST_SCOPES, "admin:users") if scope in said] == [missing]
    assert ("admin:users" in role) == ("--cull-users" in arguments)
    assert scripted.lines("DELETE") == []


def test_all_scopes_that_are_missing_are_named(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.scopes = ["read:users:name"]
    result = cull_scripted("--cull-users")
    said = result.lines[0].partition("load_roles")[0]
    assert_one_sentence(result, 3)
    assert all(scope in said for scope in ("list:users", "read:servers", "delete:servers", "admin:users"))


def test_the_role_is_for_the_user_whose_token_it_is(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/user", respond_json(200, {"kind": "user", "name": "ann", "scopes": []}))
    assert_one_sentence(cull_scripted(), 3, '"users": ["ann"]')


def test_a_dry_run_needs_no_scope_to_delete(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.scopes = [scope for scope in LEAST_SCOPES if scope != "delete:servers"]
    assert cull_scripted("--dry-run", "--cull-users").exit_code == 0


@pytest.mark.parametrize(
    "scopes", [["delete:users"], ["admin:users"], ["admin:users!group=gpu"]], ids=lambda value: value[0]
)
def test_users_may_be_deleted_with_either_scope(cull_scripted: Cull, scripted: ScriptedHub, scopes: list[str]) -> None:
    scripted.scopes = [*LEAST_SCOPES, *scopes]
    assert cull_scripted("--cull-users").exit_code == 0


# Options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(
            pytest.param([option, value], [option, "not a duration", "1h30m"], id=f"{option} {value!r}")
            for option in ("--timeout", "--max-age", "--cull-every", "--request-timeout")
            for value in ("1x", "", "-5", "nan", "1h-30m", "30m1h", "1e3")
        ),
        pytest.param(["--timeout", "99999999999w"], ["--timeout", "too long"], id="a duration too long"),
        pytest.param(["--cull-every", "0"], ["--cull-every", "too short", "1s"], id="no pause"),
        pytest.param(["--cull-every", "never"], ["--cull-every", "not a duration"], id="cull never"),
        pytest.param(["--request-timeout", "0"], ["--request-timeout", "too short"], id="no time"),
        pytest.param(["--request-timeout", "never"], ["--request-timeout", "not a duration"], id="unending"),
        pytest.param(["--concurrency", "0"], ["--concurrency", "1<=x<=1000"], id="nothing in flight"),
        pytest.param(["--concurrency", "-1"], ["--concurrency", "1<=x<=1000"], id="less than nothing"),
        pytest.param(["--concurrency", "many"], ["--concurrency", "'many'", "not a valid integer"], id="no number"),
        pytest.param(["--concurrency", "1.5"], ["--concurrency", "not a valid integer"], id="a fraction"),
        pytest.param(["--api-page-size", "-1"], ["--api-page-size", ">=0"], id="a page of less than nothing"),
        pytest.param(["--log-level", "loud"], ["--log-level", "'loud'", "'debug', 'info'"], id="level"),
        pytest.param(["--cull-users=maybe"], ["--cull-users", "'maybe'", "true"], id="neither true nor false"),
        pytest.param(["--once=1"], ["--once", "does not take a value"], id="a flag with a value"),
        pytest.param(["--timeout"], ["--timeout", "requires an argument"], id="no value"),
        pytest.param(["--tiemout", "1h"], ["No such option", "--tiemout", "'--timeout'"], id="typo"),
        pytest.param(["--token", TOKEN], ["No such option", "--token", "'--token-file'"], id="token"),
        pytest.param([f"--token={TOKEN}"], ["No such option", "--token", "'--token-file'"], id="token="),
        pytest.param(["-x"], ["No such option", "-x"], id="letter"),
        pytest.param(["3600"], ["unexpected", "3600"], id="argument"),
    ],
)
def test_an_option_that_is_wrong(cull: Cull, arguments: list[str], words: list[str]) -> None:
    result = cull("--once", *arguments, token=TOKEN)
    assert_one_sentence(result, 2, *words)


@pytest.mark.parametrize("timeout", ["999999999d", "9999w", "1000000000s"])
def test_a_very_long_request_timeout_is_no_traceback(cull_scripted: Cull, scripted: ScriptedHub, timeout: str) -> None:
    result = cull_scripted("--request-timeout", timeout)
    assert result.exit_code in (0, 2)
    assert len(result.lines) == 1


@pytest.fixture
def _soon_told_to_stop() -> Iterator[None]:
    """Sends this process a SIGTERM in a moment; where the program does not take it, it is lost."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    yield
    timer.join()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("arguments", [["--cull-every", "100000w"], ["--timeout", "40000w"]], ids=" ".join)
@pytest.mark.usefixtures("_soon_told_to_stop")
def test_a_very_long_interval_is_no_traceback(cull: Cull, scripted: ScriptedHub, arguments: list[str]) -> None:
    result = cull("--url", scripted.url, *arguments, token=scripted.token)
    assert result.exit_code in (0, 2)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CULL_IDLE_TIMEOUT", "1x"),
        ("CULL_IDLE_MAX_AGE", "old"),
        ("CULL_IDLE_CULL_EVERY", "0"),
        ("CULL_IDLE_CONCURRENCY", "0"),
        ("CULL_IDLE_API_PAGE_SIZE", "all"),
        ("CULL_IDLE_CULL_USERS", "maybe"),
        ("CULL_IDLE_DRY_RUN", "maybe"),
        ("CULL_IDLE_LOG_LEVEL", "loud"),
        ("CULL_IDLE_REQUEST_TIMEOUT", "soon"),
        ("JUPYTERHUB_REQUEST_TIMEOUT", "soon"),
        ("CULL_IDLE_URL", "nonsense"),
        ("JUPYTERHUB_API_URL", "nonsense"),
    ],
)
def test_a_variable_that_is_wrong_is_named(cull: Cull, variable: str, value: str) -> None:
    result = cull("--once", token=TOKEN, env={variable: value})
    assert_one_sentence(result, 2, variable, value)


def test_the_command_line_wins_over_a_variable_that_is_wrong(cull_scripted: Cull) -> None:
    assert cull_scripted("--timeout", "1h", env={"CULL_IDLE_TIMEOUT": "1x"}).exit_code == 0


def test_the_wrong_value_on_the_command_line_is_not_blamed_on_the_variable(cull_scripted: Cull) -> None:
    result = cull_scripted("--timeout", "1x", env={"CULL_IDLE_TIMEOUT": "1h"})
    assert_one_sentence(result, 2, "--timeout", "'1x'")


# The environment of requests


def test_a_ca_bundle_that_is_not_there(cull_scripted: Cull) -> None:
    result = cull_scripted("--url=https://127.0.0.1:1/hub/api", env={"REQUESTS_CA_BUNDLE": "/nowhere.pem"})
    assert_one_sentence(result, 3, "Could not find a suitable TLS CA certificate bundle", "/nowhere.pem")


def test_a_proxy_that_is_down(cull_scripted: Cull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cull_idle, "PAUSES", (0.0,))
    env = {"HTTPS_PROXY": "http://127.0.0.1:1", "NO_PROXY": "", "no_proxy": ""}
    result = cull_scripted("--url=https://hub.example.org/hub/api", env=env)
    assert_one_sentence(result, 3, "hub.example.org", "$HTTPS_PROXY", "ConnectionRefusedError")


# What no path or command can hold


@pytest.mark.parametrize(
    "option", ["--token-file", "--internal-certs-location", "--metrics-file", "--config", "--arbiter", "--notify"]
)
@pytest.mark.parametrize("value", ["\0", "/tmp/nul\0nul", "sh \0", "x\0.py:f"])
def test_a_nul(cull_scripted: Cull, scripted: ScriptedHub, option: str, value: str) -> None:
    assert_one_sentence(cull_scripted(f"{option}={value}"), 2, option)
    assert scripted.requests == []


# A stderr that cannot be written


@pytest.mark.parametrize(
    ("args", "token", "exit_code"),
    [
        pytest.param(["--timeout=x"], TOKEN, 2, id="wrong option"),
        pytest.param(["--token-file=/nowhere/token"], TOKEN, 2, id="no token"),
        pytest.param(["-v"], "wrong", 3, id="token refused"),
        pytest.param(["-v", "--max-culls=0"], TOKEN, 1, id="fuse blown"),
        pytest.param(["-v"], TOKEN, 0, id="all done"),
        pytest.param(["-v", "--dry-run"], TOKEN, 0, id="dry run"),
    ],
)
def test_a_full_disk_under_stderr_changes_no_exit_code(
    scripted: ScriptedHub, args: list[str], token: str, exit_code: int
) -> None:
    scripted.token = TOKEN
    scripted.add("ann", idle=7230)
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            [sys.executable, PROGRAM, "--once", "--url", scripted.url, "--timeout=1h", *args],
            env={**os.environ, "JUPYTERHUB_API_TOKEN": token},
            stdout=subprocess.PIPE,
            stderr=full,
            check=False,
            timeout=30,
        )
    assert process.returncode == exit_code
    assert scripted.running() == (set() if exit_code == 0 and "--dry-run" not in args else {"ann"})


# The config file


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("timeot = 1", "FILE has a key 'timeot', which is no option."),
        ("[timeout]\nx = 1", "timeout must be one value"),
        ("timeout = '1x'", "timeout in FILE: '1x' is not a duration"),
        ("cull-users = 'maybe'", "cull-users in FILE: 'maybe' is not a valid boolean"),
        ("concurrency = 0", "concurrency in FILE: 0 is not in the range"),
        ("rule = ['user=x']", "needs timeout="),
        ("timeout = ", "FILE is not TOML"),
        (None, "FILE cannot be read: No such file or directory."),
    ],
)
def test_a_config_file_with_an_error(cull: Cull, tmp_path: Path, text: str | None, sentence: str) -> None:
    file = tmp_path / "cull.toml"
    if text is not None:
        file.write_text(text)
    assert sentence.replace("FILE", str(file)) in cull(f"--config={file}").err


def test_the_help_of_an_option_in_the_generated_config_file(cull: Cull) -> None:
    out = cull("--generate-config").out
    assert "## Stop servers idle for at least this long; 0 stops every ready server." in out


def test_a_timeout_below_the_activity_interval(cull: Cull, settings_of: SettingsOf) -> None:
    (line,) = cull("--timeout=5m").lines
    assert line.startswith("WARNING  --timeout 5m may stop servers in use: ")


# Failures of a pass, summed up


def test_failures_of_one_kind(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for number in range(20):
        scripted.add(f"user{number}", idle=LONG_AGO)
    scripted.fault("GET", "/users/.*", respond_json(500, {"message": "disk full"}), times=None)
    first, more = cull_scripted("-q", "--timeout=1h").lines
    assert re.fullmatch(
        r"ERROR    failed (user\d+): idle 2h, limit 1h; GET /users/\1: the Hub answered 500 \(disk full\)", first
    )
    assert more == "ERROR    19 more failed in the same way: GET /users/…: the Hub answered 500"


def test_failures_of_many_kinds(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    statuses = iter(range(600, 699))
    for number in range(20):
        scripted.add(f"user{number}", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", lambda exchange: Answer(next(statuses)), times=None)
    result = cull_scripted("-q", "--timeout=1h")
    assert result.lines[-1] == "ERROR    10 more failed in other ways; -v says each"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (raw(b""), "the connection was lost before the whole answer had come"),
        (respond(503), "the Hub answered 503"),
    ],
)
def test_a_hub_that_is_gone_during_the_pass(
    cull_scripted: Cull, scripted: ScriptedHub, fault: Reply, words: str
) -> None:
    for number in range(100):
        scripted.add(f"user{number}", idle=LONG_AGO)
    scripted.fault("*", "/users/.*", fault, times=None)
    (end,) = [line for line in cull_scripted("--timeout=1h", "--concurrency=1").errors if "the pass ends" in line]
    assert "; the pass ends, because the last 10 all failed so: " in end
    assert words in end


# Signals and streams


def test_once_that_is_told_to_stop(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", then_do(lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert cull_scripted().lines[-1] == "ERROR    told to stop before the pass was over"


def test_a_loop_that_is_told_to_stop_in_its_pause(scripted: ScriptedHub, loop: RunLoop) -> None:
    done = loop(scripted, "--cull-every=90s")
    assert done.passes[0].lines[-1].endswith("; next in 1m30s")
    assert done.end.endswith("INFO     told to stop\n")


def test_a_token_file_that_disappears(scripted: ScriptedHub, loop: RunLoop, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(scripted.token)
    done = loop(scripted, "--cull-every=5s", f"--token-file={token}", between=[token.unlink])
    why = "No such file or directory; it must be a file that this user may read."
    assert done.passes[1].lines == [f"ERROR    --token-file {token} cannot be read: {why}; next in 2s"]


def test_a_stdout_that_is_full(scripted: ScriptedHub) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, PROGRAM, "--help"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b"cull_idle.py: stdout cannot be written: No space left on device\n"


# --notify


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "'' is no program that can be run"),
        ("'unclosed", "No closing quotation"),
        ("no-such-command here", "'no-such-command' is no program that can be run"),
        ("/", "'/' is no program that can be run"),
    ],
)
def test_a_command_that_cannot_be_run(cull_scripted: Cull, command: str, sentence: str) -> None:
    assert_one_sentence(cull_scripted("--notify", command), 2, "--notify", sentence)


MEBIBYTE = 1 << 20


@pytest.mark.parametrize(
    ("script", "end"),
    [
        pytest.param("exit 3", "exited with 3: no word of why", id="exits with 3"),
        pytest.param("echo 'no such address' >&2; exit 75", "exited with 75: no such address", id="says why"),
        pytest.param(
            "echo usage >&2; echo >&2; echo 'bad word' >&2; echo >&2; exit 1", "exited with 1: bad word", id="last line"
        ),
        pytest.param("echo oh; exit 1", "exited with 1: no word of why", id="writes to stdout"),
        pytest.param(r"printf '\033[31m\377\n' >&2; exit 1", "exited with 1: \\x1b[31m\ufffd", id="writes no text"),
        pytest.param(
            f"head -c {4 * MEBIBYTE} /dev/zero | tr '\\0' x >&2; exit 1",
            "exited with 1: " + "x" * 199 + "…",
            id="writes much",
        ),
        pytest.param("kill -9 $$", "was killed (9): no word of why", id="is killed"),
        pytest.param("exec sleep 60", "was not done after 0.3s, and is given up", id="hangs"),
    ],
)
def test_a_command_that_fails(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, script: str, end: str
) -> None:
    if "sleep" in script:
        monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.3)
    scripted.add("ann", "gpu", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", "-q", "--notify", shlex.join(["sh", "-c", script]))
    assert result.lines == [f"ERROR    --notify for ann/gpu: sh {end}"]


def test_commands_that_are_left_out(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.05)
    for number in range(30):
        scripted.add(f"user{number}", idle=LONG_AGO)
    _, left_out, more = cull_scripted("--timeout=1h", "-q", "--notify", "sleep 60").lines
    assert re.fullmatch(r"ERROR    --notify: \d+ left out, because \d+ were not done in time", left_out)
    assert re.match(r"ERROR    \d+ more failed in the same way: --notify: sleep was not done after", more)


# --metrics-file


def test_a_metrics_file_of_another_program(cull_scripted: Cull, tmp_path: Path) -> None:
    file = tmp_path / "node.prom"
    file.write_text("node_load1 0.21\n")
    why = f"{file} is there already: it is not one of cull_idle.py's, and is not overwritten."
    result = cull_scripted(f"--metrics-file={file}")
    assert result.lines == [f"cull_idle.py: Invalid value for '--metrics-file': {why}"]


def test_a_metrics_file_in_a_directory_that_does_not_exist(cull_scripted: Cull, tmp_path: Path) -> None:
    result = cull_scripted(f"--metrics-file={tmp_path / 'none' / 'cull_idle.prom'}")
    assert "cannot be written: its folder must exist and be writable." in result.err


def test_a_metrics_file_that_cannot_be_written(cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path) -> None:
    file = tmp_path / "cull_idle.prom"
    scripted.fault("GET", "/users", then_do(lambda: file.write_text("node_load1 0.21\n")))
    assert cull_scripted("-q", f"--metrics-file={file}").lines == [
        f"ERROR    --metrics-file {file} is not written: it is not one of cull_idle.py's, and is not overwritten"
    ]


# --explain


def explained(cull_scripted: Cull, *args: str) -> list[str]:
    """The facts of an explanation from the server on, without its timestamps."""
    out = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "WHEN", cull_scripted(*args).out)
    return re.sub(r"(?<=m)\d\ds", "", out).splitlines()[2:]


def test_an_explanation(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", "gpu", idle=LONG_AGO, age=5 * HOUR + 30)
    scripted.users["ann"].groups = ["gpu", "staff"]
    rules = ["--rule=group=physics keep", "--rule=group=gpu timeout=1h30m", "--rule=server=* keep"]
    assert explained(cull_scripted, "--explain=ann/gpu", "--max-age=1d", *rules) == [
        "server   ann/gpu",
        "ready    yes",
        "active   WHEN, 2h00m ago",
        "started  WHEN, 5h00m ago",
        "rule 1   group=physics keep: does not apply, group is gpu, staff",
        "rule 2   group=gpu timeout=1h30m: applies",
        "timeout  1h30m by rule 2, reached at WHEN",
        "max-age  1d, not reached before WHEN, in 18h59m",
        "verdict  would be stopped: idle 2h, limit 1h30m by rule 2: group=gpu timeout=1h30m",
    ]


def test_an_explanation_of_a_user(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO, admin=True)
    rules = ["--rule=user=bob keep", "--rule=user=a* timeout=5h"]
    lines = explained(cull_scripted, "--explain=ann", "--cull-users", *rules)
    assert {line for line in lines if line.startswith(("server", "user", "rule", "verdict"))} == {
        "server   ann is not running",
        "verdict  nothing to stop",
        "user     ann, an admin",
        "rule 1   user=bob keep: does not apply, user is ann",
        "rule 2   user=a* timeout=5h: applies, its limits only to servers",
        "verdict  would be deleted: idle 2h, limit 10m",
    }


def test_an_explanation_of_what_is_unknown(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", last_activity="yesterday")
    assert explained(cull_scripted, "--explain=ann", "--timeout=1h")[1:] == [
        "ready    unknown",
        "active   unknown",
        "started  unknown",
        "timeout  1h, not reached: unknown since when",
        "max-age  never",
        "verdict  kept: started or last_activity: 'yesterday' is not a time",
    ]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "cull_idle.py: --explain: write USER, or USER/SERVER for a named server."),
        ("nobody", "cull_idle.py: --explain: URL knows no user 'nobody'."),
    ],
)
def test_an_explanation_of_nobody(cull_scripted: Cull, scripted: ScriptedHub, name: str, sentence: str) -> None:
    assert_one_sentence(cull_scripted("--explain", name), 2, sentence.replace("URL", scripted.url))
