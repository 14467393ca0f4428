"""The exact words of messages, and of the facts of --explain. No other test knows them."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from processes import PROGRAM, RUN
from runs import Cull, Result, RunLoop
from scripted_hub import (
    ALL_SCOPES,
    DROP,
    HOUR,
    LEAST_SCOPES,
    LONG_AGO,
    Answer,
    Exchange,
    FakeJupyter,
    Reply,
    ScriptedHub,
    and_do,
    drip,
    edited,
    empty,
    hang,
    html,
    normal,
    of_hub,
    raw,
    redirect,
    reset,
    reset_in_body,
    respond,
    respond_json,
    slow,
    then_do,
    truncated,
)
from settings import SettingsOf

import cull_idle
from cull_idle import parse_time, parse_user

TOKEN = "5ecre7-token-0f-the-cu11er"
TO_API = "usually ends in /hub/api"
MOMENT = "2026-11-22T20:00:00Z"
SERVER = {"last_activity": MOMENT, "started": MOMENT, "pending": None, "ready": True, "url": "/user/ann/"}
ANN = {"name": "ann", "admin": False, "created": MOMENT, "last_activity": MOMENT}


def untimed(line: str) -> str:
    """A line about a pass without its seconds."""
    return re.sub(r" in \d+\.\ds", "", line)


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
        pytest.param({}, ["$JUPYTERHUB_API_TOKEN", "not set", "put an API token", "--token-file"], id="none"),
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
    assert_one_sentence(result, 2, "$JUPYTERHUB_API_TOKEN", "holds no API token", "one word")
    assert scripted.requests == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", ["is empty", "put an API token"], id="empty"),
        pytest.param(b"\n \n", ["is empty", "put an API token"], id="blank"),
        pytest.param(b"\x80\xff\x00" * 9, ["holds no API token", "one word"], id="binary"),
        pytest.param(b"\xef\xbb\xbf" + TOKEN.encode(), ["holds no API token"], id="byte order mark"),
        pytest.param(TOKEN.encode("utf-16"), ["holds no API token"], id="UTF-16"),
        pytest.param(f"{TOKEN}\n{TOKEN}\n".encode(), ["holds no API token"], id="two lines"),
        pytest.param(f"token={TOKEN} # mine".encode(), ["holds no API token"], id="a setting"),
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


def test_a_token_in_place_of_its_file_is_not_shown(cull: Cull) -> None:
    result = cull("--once", "--token-file", "0123456789abcdef0123456789abcdef", token=TOKEN)
    assert_one_sentence(result, 2, "--token-file takes a file's name, and this looks like a token.")
    assert "0123456789abcdef" not in result.err


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
    scripted.fault("GET", ".*", of_hub(401, "Login required"), times=None)
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
    ],
)
def test_a_url_that_is_not_valid(cull: Cull, url: str) -> None:
    assert_one_sentence(
        cull("--once", "--url", url, token=TOKEN), 2, "--url", "not a URL: write http:// or https://, then a host."
    )


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


@pytest.mark.parametrize("path", ["", "/", "/hub", "/hub/", "/hub/home", "/hub/token", "/hub/api/users"])
def test_a_url_without_hub_api(cull: Cull, scripted: ScriptedHub, path: str) -> None:
    url = f"http://127.0.0.1:{scripted.port}{path}"
    result = cull("--once", "--url", url, token=scripted.token)
    assert_one_sentence(result, 3, url.rstrip("/"), TO_API)
    assert result.err.endswith(f" try --url http://127.0.0.1:{scripted.port}/hub/api\n")
    assert scripted.lines("DELETE") == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(html(), ["HTML", TO_API], id="HTML"),
        pytest.param(html(404), ["404", TO_API], id="HTML, 404"),
        pytest.param(html(500), ["500"], id="HTML, 500"),
        pytest.param(respond(200, b"hello"), [TO_API], id="text"),
        pytest.param(respond(200, b"\xff\xfe\x00"), [TO_API], id="binary"),
        pytest.param(empty(), ["nothing", TO_API], id="nothing"),
        pytest.param(empty(204), ["204", TO_API], id="204"),
        pytest.param(respond_json(200, {"version": "6.1.1"}), [TO_API], id="another JSON"),
        pytest.param(respond_json(200, "users"), [TO_API], id="a string"),
        pytest.param(respond_json(200, {"items": [1, 2], "_pagination": {}}), [TO_API], id="a list without a user"),
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


@pytest.mark.parametrize("body", [b"[" * 100_000, b"9" * 10_000], ids=["deep", "a long number"])
def test_pages_that_are_all_nested_too_deeply(cull_scripted: Cull, scripted: ScriptedHub, body: bytes) -> None:
    scripted.fault("GET", "/users", respond(200, body), times=None)
    assert_one_sentence(cull_scripted(), 3, "GET /users: the Hub answered JSON that is nested too deeply")


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_hub_that_is_unavailable(cull_scripted: Cull, scripted: ScriptedHub, status: int) -> None:
    scripted.fault("GET", "/users", respond_json(status, {"message": "Restarting"}), times=None)
    assert_one_sentence(cull_scripted(), 3, f"GET /users: the Hub answered {status} (Restarting)")
    assert len(scripted.lines()) == 1 + len(cull_idle.PAUSES) + 1


@pytest.mark.parametrize("answer", [html(), html(404), reset(), hang(0.1), respond(500), empty()])
def test_a_server_that_is_not_a_hub(cull_scripted: Cull, scripted: ScriptedHub, answer: Reply) -> None:
    scripted.fault("*", ".*", answer, times=None)
    assert_one_sentence(cull_scripted("--cull-users", "--timeout=1h"), 3, scripted.url)


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
    assert_one_sentence(cull_scripted(), 3, scripted.url, "Connection refused", "is the Hub running", "--url")


def test_a_host_that_does_not_resolve(cull: Cull, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    result = cull("--once", "--url", "http://hub.example/hub/api", token=TOKEN)
    assert_one_sentence(result, 3, "http://hub.example/hub/api", "Name or service not known", "--url")


def started_after(setup: str) -> subprocess.CompletedProcess[str]:
    """The program, started in a Python that these statements have changed."""
    code = f"import runpy, sys; {setup}; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


PIP_INSTALL = "pip install 'click>=8.4.1' 'python-dateutil>=2.9' 'requests>=2.32.2' 'urllib3>=2.2'"


@pytest.mark.parametrize("module", ["click", "dateutil", "requests"])
def test_a_package_that_is_missing(module: str) -> None:
    done = started_after(f"sys.prefix = '/venv'; sys.modules[{module!r}] = None")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"cull_idle needs more packages: {sys.executable} -m {PIP_INSTALL}\n"


def test_a_package_that_is_missing_where_pip_may_refuse_to_install() -> None:
    """Debian's own Python is managed by apt."""
    done = started_after("sys.prefix = sys.base_prefix; sys.modules['requests'] = None")
    assert done.returncode == 2
    assert done.stderr == (
        f"cull_idle needs more packages: {sys.executable} -m venv .venv && .venv/bin/{PIP_INSTALL}"
        f"  # then run .venv/bin/python {PROGRAM}\n"
    )


def test_a_python_that_is_too_old() -> None:
    ast.parse(PROGRAM.read_text(), feature_version=(3, 8))
    done = started_after("sys.version_info = (3, 8, 20); sys.version = '3.8.20 (default)'")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"cull_idle needs Python 3.11 or newer; this is 3.8.20 ({sys.executable}).\n"


OLD_PYTHONS = ["3.8", "3.9", "3.10"]


@pytest.mark.parametrize("version", OLD_PYTHONS)
def test_a_real_python_that_is_too_old(version: str) -> None:
    """One of pyenv's, or one on the PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    python = next(pyenv.glob(f"versions/{version}.*/bin/python"), None) or shutil.which(f"python{version}")
    if not python:
        pytest.skip(f"this machine lacks Python {version}")
    done = subprocess.run([python, "-I", PROGRAM, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"cull_idle needs Python 3\.11 or newer; this is {re.escape(version)}\..*\n", done.stderr)


@pytest.mark.parametrize("name", ["cull-idle", "cull_idle_servers.py", "other"])
def test_the_program_calls_itself_as_it_was_called(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(PROGRAM)
    for arguments, said in [
        (["--version"], f"{name} {cull_idle.__version__}\n"),
        (["--help"], f"Usage: {name} [OPTIONS]\n"),
        (["--timeout=x"], f"{name}: Invalid value for '--timeout'"),
    ]:
        command = [sys.executable, str(tmp_path / name), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.stdout + done.stderr).startswith(said)


@pytest.mark.parametrize(
    "setup",
    [
        "import click; del click.NoSuchCommand",
        "import urllib3; urllib3.HTTPResponse = object",  # reads no answer in steps
    ],
    ids=["click", "urllib3"],
)
def test_a_package_that_is_too_old(setup: str) -> None:
    done = started_after(f"sys.prefix = '/venv'; {setup}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"cull_idle needs newer packages: {sys.executable} -m {PIP_INSTALL}\n"


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
    result = cull("--once", "--url", url, token=TOKEN)
    assert_one_sentence(result, 3, url, "does not speak https", f"try --url {scripted.url}")


def test_a_dry_run_fails_in_the_same_way(cull: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", html(), times=None)
    result = cull("--dry-run", "--url", scripted.url, token=scripted.token)
    assert_one_sentence(result, 3, "HTML")  # and no table: nobody knows what would be stopped


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
        pytest.param(
            {*LEAST_SCOPES, "delete:users"} - {"read:users:activity"},
            ["--cull-users"],
            "read:users:activity",
            id="see when users were active",
        ),
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
    assert ("admin:users" in role) == (missing == "admin:users")
    assert scripted.lines("DELETE") == []


def test_all_scopes_that_are_missing_are_named(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.scopes = ["read:users:name"]
    result = cull_scripted("--cull-users", "--timeout=1h")
    said = result.lines[0].partition("load_roles")[0]
    assert_one_sentence(result, 3)
    assert all(scope in said for scope in ("list:users", "read:servers", "delete:servers", "admin:users"))


def test_the_role_is_for_the_user_whose_token_it_is(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/user", respond_json(200, {"kind": "user", "name": "ann", "scopes": []}))
    words = ["make a new token that may do this or, if ann may not do it at all, add to", '"users": ["ann"]']
    assert_one_sentence(cull_scripted(), 3, *words)  # JupyterHub 5 lets a user make a token that may do less


def test_a_dry_run_needs_no_scope_to_delete(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.scopes = [scope for scope in LEAST_SCOPES if scope != "delete:servers"]
    assert cull_scripted("--dry-run", "--cull-users", "--timeout=1h").exit_code == 0


@pytest.mark.parametrize(
    "scopes", [["delete:users"], ["admin:users"], ["admin:users!group=gpu"]], ids=lambda value: value[0]
)
def test_users_may_be_deleted_with_either_scope(cull_scripted: Cull, scripted: ScriptedHub, scopes: list[str]) -> None:
    scripted.scopes = [*LEAST_SCOPES, *scopes]
    assert cull_scripted("--cull-users", "--timeout=1h").exit_code == 0


# Options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(
            pytest.param([option, value], [option, "not a duration", "1h30m"], id=f"{option} {value!r}")
            for option in ("--timeout", "--max-age", "--cull-every", "--request-timeout")
            for value in ("1x", "", "-5", "nan", "1h-30m", "30m1h", "1e-3", "e3")
        ),
        pytest.param(["--timeout", "99999999999w"], ["--timeout", "too long"], id="a duration too long"),
        pytest.param(["--cull-every", "never"], ["--cull-every", "not a duration"], id="cull never"),
        pytest.param(["--request-timeout", "never"], ["--request-timeout", "not a duration"], id="unending"),
        pytest.param(["--concurrency", "0"], ["--concurrency", "1<=x<=1000"], id="nothing in flight"),
        pytest.param(["--concurrency", "-1"], ["--concurrency", "1<=x<=1000"], id="less than nothing"),
        pytest.param(["--concurrency", "many"], ["--concurrency", "'many'", "not a valid integer"], id="no number"),
        pytest.param(["--concurrency", "1.5"], ["--concurrency", "not a valid integer"], id="a fraction"),
        pytest.param(["--api-page-size", "-1"], ["--api-page-size", ">=0"], id="a page of less than nothing"),
        pytest.param(["--log-level", "loud"], ["--log-level", "'loud'", "'debug', 'info'"], id="level"),
        pytest.param(["--cull-users=maybe"], ["--cull-users", "'maybe'", ": 0, 1, f"], id="neither true nor false"),
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
        ("CULL_IDLE_CULL_EVERY", "often"),
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
    assert_one_sentence(result, 3, "hub.example.org", "$HTTPS_PROXY", "Connection refused")


# What no path or command can hold


@pytest.mark.parametrize(
    "option", ["--token-file", "--internal-certs-location", "--metrics-file", "--config", "--arbiter", "--notify"]
)
@pytest.mark.parametrize("value", ["\0", "/tmp/nul\0nul", "x\0.py:f"])
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
            [*RUN, "--once", "--url", scripted.url, "--timeout=1h", *args],
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
        ("timeot = 1", "FILE: 'timeot' is not an option; did you mean timeout?"),
        ("[cull-idle]\ntimeout = '1h'", "FILE: [cull-idle] is a section, but this file has no sections."),
        ("[timeout]\nx = 1", "FILE: [timeout] is a section"),
        ("c.IdleCuller.timeout = 3600", "a Python file of jupyterhub-idle-culler is not read"),
        ("timeout = ['1h']", "timeout in FILE: \"['1h']\" is not a duration"),
        ("timeout = '1x'", "timeout in FILE: '1x' is not a duration"),
        ("cull-users = 'maybe'", "cull-users in FILE: 'maybe' is not a valid boolean"),
        ("concurrency = 0", "concurrency in FILE: 0 is not in the range"),
        ("rule = ['user=x']", "rule in FILE: 'user=x' sets nothing"),
        ("timeout = ", "FILE is not TOML"),
        ("timeout = 1h", '(at line 1, column 12); texts and durations need quotes, such as timeout = "1h".'),
        ("once = true\nonce = true", "FILE is not TOML: Cannot overwrite a value (at end of document)"),
        (None, "FILE cannot be read: No such file or directory."),
    ],
)
def test_a_config_file_with_an_error(cull: Cull, tmp_path: Path, text: str | None, sentence: str) -> None:
    file = tmp_path / "cull.toml"
    if text is not None:
        file.write_text(text)
    assert sentence.replace("FILE", str(file)) in cull(f"--config={file}").err


CHOOSE = (
    "cull_idle.py: --cull-users needs --timeout or --user-timeout, such as --user-timeout=90d: by default it would"
    " delete users after 10 minutes.\n"
)


@pytest.mark.parametrize("arguments", [[], ["--max-age=1h"], ["--user-max-age=1h"], ["--dry-run"]], ids=str)
def test_users_without_a_limit_that_somebody_has_chosen(cull: Cull, arguments: list[str]) -> None:
    assert cull("--cull-users", *arguments) == (2, "", CHOOSE)


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        (
            "--timeout=5m",
            (
                "--timeout 5m may stop servers in use: a Hub refreshes last_activity every 5m by default"
                " (JupyterHub.last_activity_interval); set at least 5m30s"
            ),
        ),
        ("--max-age=12", "--max-age 12s stops all servers that are older than that, also those in use"),
        ("--rule=user=a max-age=9", "rule 1: max-age 9s stops all servers that are older than that, also those in use"),
    ],
)
def test_a_limit_below_the_activity_interval(cull: Cull, settings_of: SettingsOf, limit: str, sentence: str) -> None:
    assert cull(limit).lines == [f"WARNING  {sentence}"]


# What cannot be read


@pytest.mark.parametrize(
    ("parse", "text", "sentence"),
    [
        (parse_time, "yesterday or so", "'yesterday or so' is not a time"),
        (parse_user, None, "answered a user without a name"),
        (parse_user, {"name": ""}, "answered a user without a name"),
    ],
)
def test_what_is_refused(parse: Callable[[Any], object], text: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        parse(text)


NOT_SHOWN = "its last_activity is not shown; the token needs the scope read:users:activity"


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
        ({"admin": None}, "the Hub does not say whether the user is an admin"),
        ({"admin": DROP}, "the Hub does not say whether the user is an admin"),
    ],
)
def test_the_doubt_about_a_user(changes: dict[str, object], doubt: str) -> None:
    model = {key: value for key, value in {**ANN, "servers": {}, **changes}.items() if value is not DROP}
    assert parse_user(model)[0].doubt == doubt


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
    _, server = parse_user({**ANN, "servers": {"gpu": model}})
    assert server.doubt == doubt


@pytest.mark.parametrize(
    ("user", "doubt"),
    [
        (ANN, "its servers are not shown; the token needs the scope read:servers"),
        ({**ANN, "servers": None}, "its servers are not shown; the token needs the scope read:servers"),
        ({**ANN, "servers": {"": 7}}, "its model is not a JSON object"),
    ],
)
def test_the_doubt_about_servers_that_are_not_shown(user: dict[str, object], doubt: str) -> None:
    _, server = parse_user(user)
    assert server.doubt == doubt


def test_a_list_without_pages_from_a_hub_that_has_pages(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    """It is only the first 200 users. A content delivery network, such as CloudFront, may drop the header."""
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users", edited(lambda body: body["items"]))
    result = cull_scripted("--timeout", "1h")
    assert (result.exit_code, scripted.running()) == (3, {"ann"})
    (line,) = result.lines
    assert line == (
        f"ERROR    GET /users: {scripted.url} answered 200, a list without pages, perhaps only the first users: a proxy"
        " on the way drops the header Accept; it must pass it on, or --url must lead past it"
    )


def test_users_without_a_name(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.version = "1.5.1"
    scripted.fault("GET", "/users", respond_json(200, [{}, {**ANN, "servers": {}}, {"name": ""}]))
    assert cull_scripted("--timeout", "1h").warnings == [
        "WARNING  kept 2 in doubt; the first: the Hub: answered a user without a name"
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
        "INFO     spared ann: it was restarted",
        id="new",
    ),
    pytest.param(lambda hub: hub.users.clear(), "INFO     gone ann: the user is gone", id="no such user"),
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
        (None, "WARNING  spared ann/gpu: its servers are not shown; the token needs the scope read:servers"),
        ({"": None}, "WARNING  spared ann/gpu: its model is not a JSON object"),
        ({"": SERVER}, "INFO     gone ann/gpu: not running any more"),
    ],
)
def test_a_second_look_that_does_not_show_the_server(
    cull_scripted: Cull, scripted: ScriptedHub, servers: object, line: str
) -> None:
    scripted.add("ann", "gpu", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", edited(lambda model: {**model, "servers": servers}))
    assert cull_scripted("--timeout", "1h").lines[0] == line


@pytest.mark.parametrize(
    ("scopes", "named"),
    [
        (["delete:servers"], "a filtered scope, such as delete:servers!group=…"),
        (["delete:servers!group=a", "delete:servers!group=b"], "delete:servers!group=a and delete:servers!group=b"),
    ],
    ids=["no filter", "two filters"],
)
def test_a_server_that_the_token_does_not_cover(
    cull_scripted: Cull, scripted: ScriptedHub, scopes: list[str], named: str
) -> None:
    scripted.scopes = ["list:users", "read:servers", "read:users:activity", *scopes]
    scripted.add("ann", idle=2 * 3600 + 30)
    scripted.fault("DELETE", ".*", respond_json(404, {"status": 404, "message": "no access"}), times=None)
    (line, _) = cull_scripted("--timeout", "1h").lines
    assert line == (
        "ERROR    failed ann: idle 2h, limit 1h; the Hub answered 404 (no access): it is still there, so it is not"
        f" covered by {named}"
    )


def test_an_active_server_in_two_units(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    server = scripted.add("ann", idle=4 * 86400)
    seen = scripted.now - timedelta(days=1, hours=2, minutes=3, seconds=30)
    scripted.fault("GET", "/users/ann", then_do(lambda: setattr(server, "last_activity", seen)))
    assert cull_scripted("--timeout", "3d").lines[0] == "INFO     spared ann: idle 1d02h, limit 3d"


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


def test_a_stop_for_which_the_scope_is_missing(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", of_hub(403))
    assert (
        cull_scripted("--timeout", "1h")
        .lines[0]
        .startswith(
            "ERROR    failed ann: idle 2h, limit 1h; the Hub answered 403; the token needs the scope delete:servers;"
            " add to jupyterhub_config.py, and restart the Hub: c.JupyterHub.load_roles.append("
        )
    )


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (
            of_hub(401),
            (
                "401; the token must be of this Hub, not expired, and its owner must have a role (before Hub 2.0: be an"
                " admin)"
            ),
        ),
        (
            html(403),
            (
                "403; this is not the Hub's form of an answer, so perhaps a proxy or firewall on the way refuses the"
                " request"
            ),
        ),
    ],
    ids=["the Hub", "a firewall"],
)
def test_who_refuses_a_stop(cull_scripted: Cull, scripted: ScriptedHub, refusal: Reply, words: str) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", refusal)
    line = cull_scripted("--timeout", "1h").lines[0]
    assert line == f"ERROR    failed ann: idle 2h, limit 1h; the Hub answered {words}"


@pytest.mark.parametrize("path", ["/users", "/users/ann"])
def test_a_firewall_that_refuses_to_let_us_look(cull_scripted: Cull, scripted: ScriptedHub, path: str) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", path, html(403))
    (error,) = cull_scripted("--timeout", "1h").errors
    assert "firewall" in error
    assert "token" not in error


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
    scripted.add("ann", idle=LONG_AGO)
    result = cull_scripted("--timeout", "5h", "--warn-before", "4h")
    assert result.lines[0] == "INFO     warned ann: idle 2h, limit 5h; due in 2h59m"


# Users


def deleted_by_another(exchange: Exchange) -> Answer:
    exchange.hub.users.clear()
    return of_hub(404)(exchange)


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (respond(202), "WARNING  stopping user ann: idle 2h, limit 1h; a server is not down yet"),
        (of_hub(400), "INFO     spared user ann: the Hub answered 400"),
        (deleted_by_another, "INFO     gone user ann: the Hub answered 404"),
        (respond(404), "ERROR    failed user ann: idle 2h, limit 1h; the Hub answered 404"),
    ],
)
def test_the_delete_of_a_user(cull_scripted: Cull, scripted: ScriptedHub, answer: Reply, line: str) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann", answer)
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
        (create_anew, "the user was created anew"),
        (start_a_server, "a server is there again"),
        (lambda hub: hub.touch("ann"), "idle 0s, limit 1h"),
        (lambda hub: hub.users["ann"].extra.update(admin=None), "the Hub does not say whether the user is an admin"),
    ],
)
def test_why_a_user_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub, change: Callable[[ScriptedHub], object], reason: str
) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", then_do(lambda: change(scripted)))
    result = cull_scripted("--timeout", "1h", "--cull-users", "--cull-admin-users=false")
    level = "WARNING " if "does not say" in reason else "INFO    "  # a doubt is reported
    assert result.lines[0] == f"{level} spared user ann: {reason}"


# The arbiter, rules and the fuse


def test_what_the_arbiter_says(cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path) -> None:
    arbiter = tmp_path / "arbiter.py"
    arbiter.write_text(
        "asked = []\ndef f(user): asked.append(user['name']); return user['name'] == 'ann' or asked.count('bob') < 2"
    )
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", f"--arbiter={arbiter}:f")
    assert sorted(result.lines[:2]) == [
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


def test_an_arbiter_that_names_no_function(cull: Cull) -> None:
    assert cull("--arbiter=/etc/arbiter.py").err == (
        "cull_idle.py: Invalid value for '--arbiter': '/etc/arbiter.py' names no function: write MODULE:FUNC or"
        " FILE.py:FUNC.\n"
    )


def test_an_arbiter_with_an_unknown_argument(cull: Cull, tmp_path: Path) -> None:
    arbiter = tmp_path / "arbiter.py"
    arbiter.write_text("def f(server, mood): return True")
    assert cull(f"--arbiter={arbiter}:f").err.endswith(
        ":f' has an argument 'mood', but only these are passed: inactive, inactive_limit, server, user.\n"
    )


RULE_HELP = (
    "a rule has matches (user=, group=, server=, admin=, option.KEY=, state.KEY=) and timeout=, max-age= or keep"
)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("user=ann kep", f"'kep' in 'user=ann kep' is not understood: {RULE_HELP}."),
        ("user=ann", f"'user=ann' sets nothing: put quotes around the whole rule; {RULE_HELP}."),
        ("admin=yes keep", "'admin=yes': admin= is true or false."),
        (
            "timeout=1x",
            "'1x' is not a duration: write seconds, or numbers with units, such as 90s, 15m, 1.5h, 1h30m, 2d or 1w.",
        ),
        ("keep timeout=1h", "'keep timeout=1h' has both keep and a limit, but keep means no limit: leave one out."),
        ("'user=ann keep", '"\'user=ann keep": No closing quotation.'),
    ],
)
def test_a_rule_that_is_wrong(cull: Cull, rule: str, sentence: str) -> None:
    assert cull("--rule", rule).err == f"cull_idle.py: Invalid value for '--rule': {sentence}\n"


def test_a_rule_on_a_field_that_the_hub_does_not_show(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.users["ann"].extra = {"groups": DROP}
    assert cull_scripted("--timeout=1h", "--rule=group=gpu keep").lines[0] == (
        "ERROR    a rule matches group=, but the Hub does not show it for ann: the token needs the scope"
        " read:users:groups, or the Hub is too old"
    )


def test_a_scope_that_a_token_has_only_for_its_owner_is_missing(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    """JupyterHub adds read:users:groups!user=NAME to each token."""
    scopes = ["list:users", "read:servers", "delete:servers", "read:users:groups!user=boss"]
    scripted.fault("GET", "/user", respond_json(200, {"kind": "user", "name": "boss", "scopes": scopes}))
    result = cull_scripted("--rule=group=gpu keep")
    assert result.exit_code == 3
    assert "the token of user boss lacks read:users:groups; make a new token that may do this or, if boss" in result.err


BLOWN = "nothing is culled, because 1 of 1 servers are due and --max-culls is 0; raise it if they should go"


SERVERS_HINT = "--servers-url must be what precedes /user/… in a server's address: the proxy, not the Hub's own port"


def test_servers_that_give_no_answer(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.scopes = [*ALL_SCOPES, "tokens"]
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO, age=3 * HOUR, says=FakeJupyter())
    scripted.fault("GET", "/user/ann/.*", respond(503), times=None)
    assert cull_scripted("--timeout=1h", "--idle-by=both").warnings == [
        "WARNING  1 of 2 servers asked gave no usable answer, so the Hub's word counts; the first: ann answered 503"
    ]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (html(), " answered HTML"),
        (respond_json(200, []), " is not the API of a JupyterHub"),
        (respond(404), " answered 404"),
        (redirect("https://hub.example.org/hub/api"), " is redirected, to the Hub or to https:"),
        (respond(403), " answered 403"),
    ],
)
def test_an_address_that_leads_to_no_servers(
    cull_scripted: Cull, scripted: ScriptedHub, answer: Reply, why: str
) -> None:
    scripted.scopes = [*ALL_SCOPES, "tokens"]
    with ScriptedHub() as proxy:
        proxy.fault("GET", ".*", answer, times=None)
        url = f"http://127.0.0.1:{proxy.port}"
        result = cull_scripted("--timeout=1h", "--idle-by=both", "--servers-url", url)
    assert result.errors == [
        f"ERROR    servers cannot be asked: GET {url}/hub/api{why}; {SERVERS_HINT}; with subdomains, leave it out"
    ]


def test_a_fuse_that_blows(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    assert cull_scripted("--timeout=1h", "--max-culls=0").lines[0] == f"ERROR    {BLOWN}; --dry-run shows them"
    assert cull_scripted("--timeout=1h", "--max-culls=0", "--dry-run").table[-1] == f"But {BLOWN}."
    assert cull_scripted("--timeout=1h", "--max-culls=0", "--dry-run", "--json").lines[0] == f"WARNING  {BLOWN}"


def test_a_fuse_that_is_neither_a_number_nor_a_percentage(cull: Cull) -> None:
    assert cull("--max-culls=x").err == (
        "cull_idle.py: Invalid value for '--max-culls': 'x' is neither a number, such as 20, nor 0% to 100%.\n"
    )


def test_a_warning_time_that_is_too_long(cull: Cull) -> None:
    assert cull("--timeout=1h", "--warn-before=1h").err == (
        "cull_idle.py: --warn-before must be shorter than --timeout and each rule's timeout=.\n"
    )


# The pass


def test_a_list_that_does_not_go_on(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", respond_json(200, {"items": [], "_pagination": {"next": {"offset": 0}}}))
    result = cull_scripted("--timeout", "1h")
    assert result.errors == ["ERROR    GET /users: the page after offset 0 starts at 0; the rest is not read"]


def test_a_server_whose_name_may_lead_elsewhere(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", "a/b", idle=LONG_AGO)
    why = "a path with its name could lead a proxy to something else: stop it by hand"
    assert cull_scripted("--timeout=1h").lines[0] == f"ERROR    failed ann/a/b: idle 2h, limit 1h; {why}"
    assert cull_scripted("--timeout=1h", "--dry-run").table[1].endswith(f"failed: idle 2h, limit 1h; {why}")
    assert scripted.lines("DELETE") == []


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
        "INFO     pass: 4 running, 5 due, 1 culled, 1 stopping, 1 gone, 1 spared, 1 deleted"
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


def test_what_the_first_pass_of_a_loop_says(loop: RunLoop, scripted: ScriptedHub) -> None:
    scripted.scopes = ["list:users!group=gpu", *ALL_SCOPES[:1], *ALL_SCOPES[2:]]
    rules = ["user=nobody keep", "user=nobody timeout=1h", "user=nobody max-age=never"]
    first, second = loop(
        scripted, "-v", "--timeout=1h", *(f"--rule={rule}" for rule in rules), between=[lambda: None]
    ).passes
    assert first.lines[:-1] == [
        "INFO     the token has only list:users!group=gpu: only these users are seen",
        "INFO     rule 1, user=nobody keep, applies to nobody now",
        "DEBUG    rule 2, user=nobody timeout=1h, applies to nobody now",
        "INFO     rule 3, user=nobody max-age=never, applies to nobody now",
    ]
    assert len(second.lines) == 1


def test_a_loop_that_is_told_to_stop(cull: Cull, scripted: ScriptedHub, tell_to_stop: Callable[[], None]) -> None:
    scripted.fault("GET", "/users", and_do(tell_to_stop))
    result = cull("--timeout=1h", "--url", scripted.url, token=scripted.token)
    assert [untimed(line) for line in result.lines] == ["INFO     pass: 0 running, 0 due", "INFO     told to stop"]


# Failures of a pass, summed up


def test_failures_of_one_kind(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for number in range(20):
        scripted.add(f"user{number}", idle=LONG_AGO)
    scripted.fault("GET", "/users/.*", respond_json(500, {"message": "disk full"}), times=None)
    first, more = cull_scripted("-q", "--timeout=1h").lines
    assert re.fullmatch(
        r"ERROR    failed (user\d+): idle 2h, limit 1h; GET /users/\1: the Hub answered 500 \(disk full\) \(1 of 20\)",
        first,
    )
    assert more == "ERROR    19 more failed in the same way: GET /users/…: the Hub answered 500"


def test_failures_of_many_kinds(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    statuses = iter(range(600, 699))
    for number in range(20):
        scripted.add(f"user{number}", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", lambda exchange: Answer(next(statuses)), times=None)
    said = cull_scripted("-q", "--timeout=1h").lines
    assert [re.sub(r"user\d+|\d{3}", "…", line) for line in said] == [
        f"ERROR    failed …: idle 2h, limit 1h; the Hub answered … ({number} of 20)" for number in range(1, 21)
    ]


@pytest.mark.parametrize(
    ("fault", "words"),
    [(raw(b""), "the connection was lost before the whole answer had come"), (respond(503), "the Hub answered 503")],
)
def test_a_hub_that_is_gone_during_the_pass(
    cull_scripted: Cull, scripted: ScriptedHub, fault: Reply, words: str
) -> None:
    for number in range(100):
        scripted.add(f"user{number}", idle=LONG_AGO)
    scripted.fault("*", "/users/.*", fault, times=None)
    (end,) = [line for line in cull_scripted("--timeout=1h", "--concurrency=1").errors if "the pass ends" in line]
    assert "; the pass ends after 10 failures in a row; the last: " in end
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
    (warning,) = done.passes[1].warnings
    assert warning == f"WARNING  --token-file {token} cannot be read: {why} The last token stays in use."


def test_a_stdout_that_is_full(scripted: ScriptedHub) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, PROGRAM, "--help"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b"cull_idle.py: stdout cannot be written: No space left on device\n"


# --notify


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "'' is not a program that can be run: is it executable, and on the $PATH?"),
        ("'unclosed", "No closing quotation"),
        ("no-such-command here", "'no-such-command' is not a program that can be run"),
        ("/", "'/' is not a program that can be run"),
    ],
)
def test_a_command_that_cannot_be_run(cull_scripted: Cull, command: str, sentence: str) -> None:
    assert_one_sentence(cull_scripted("--notify", command), 2, "--notify", sentence)


@pytest.mark.parametrize(
    ("script", "end"),
    [
        pytest.param("exit 3", "exited with 3", id="exits with 3"),
        pytest.param("kill -9 $$", "exited with -9", id="is killed"),
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


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("node.prom", "what is there already is not a file of this program, so it is not overwritten"),
        ("none/cull_idle.prom", "No such file or directory"),
    ],
)
def test_a_metrics_file_that_cannot_be_written(cull_scripted: Cull, tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "node.prom").write_text("node_load1 0.21\n")
    file = tmp_path / name
    assert cull_scripted("-q", f"--metrics-file={file}").lines == [
        f"ERROR    --metrics-file {file} is not written: {why}"
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
        "born     WHEN, 5h00m ago",
        "rule 1   group=physics keep: does not apply, group is gpu, staff",
        "rule 2   group=gpu timeout=1h30m: applies",
        "timeout  limit 1h30m by rule 2: group=gpu timeout=1h30m, which is at WHEN",
        "max-age  limit 1d, which is at WHEN",
        "verdict  would be stopped: idle 2h, limit 1h30m by rule 2: group=gpu timeout=1h30m",
    ]


def test_an_explanation_of_a_user(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO, admin=True)
    rules = ["--rule=user=bob keep", "--rule=user=a* timeout=5h"]
    lines = explained(cull_scripted, "--explain=ann", "--cull-users", "--timeout=1h", *rules)
    assert {line for line in lines if line.startswith(("server", "user", "rule", "verdict"))} == {
        "server   ann is not running",
        "verdict  nothing to stop",
        "user     ann",
        "rule 1   user=bob keep: does not apply, user is ann",
        "rule 2   user=a* timeout=5h: applies, its limits only to servers",
        "verdict  would be deleted: idle 2h, limit 1h",
    }


def test_an_explanation_of_what_is_unknown(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", last_activity="yesterday")
    assert explained(cull_scripted, "--explain=ann", "--timeout=1h")[1:] == [
        "ready    unknown",
        "active   unknown",
        "born     unknown",
        "timeout  limit 1h",
        "max-age  no limit",
        "verdict  kept: started or last_activity: 'yesterday' is not a time",
    ]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "cull_idle.py: Invalid value for '--explain': write USER, or USER/SERVER for a named server."),
        ("nobody", "cull_idle.py: --explain: URL knows no user 'nobody'."),
    ],
)
def test_an_explanation_of_nobody(cull_scripted: Cull, scripted: ScriptedHub, name: str, sentence: str) -> None:
    assert_one_sentence(cull_scripted("--explain", name), 2, sentence.replace("URL", scripted.url))
