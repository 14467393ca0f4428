"""What the program says: a row for each sentence that no scene says, with its text in tests/messages.txt."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from messages import Says
from processes import PROGRAM, RUN
from runs import Cull, Result
from scenes import Given, Play, Scene, active, fault, file, having, idle, server, user
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
    edited,
    empty,
    hang,
    html,
    normal,
    of_hub,
    raw,
    redirect,
    respond,
    respond_json,
    then_do,
)

import cull_idle


@pytest.fixture(autouse=True)
def _steady(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files have short names, and servers are culled in the order of the list."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(random, "sample", lambda population, k: list(population))
    monkeypatch.setenv("COLUMNS", "80")


def run_line(cull: Cull, line: str) -> Result:
    """Run the program with the words of a line; those in capitals are variables, as in a shell."""
    words = shlex.split(line)
    env = dict(word.split("=", 1) for word in words if word[0].isupper())
    return cull(*(word for word in words if not word[0].isupper()), env=env)


# What is wrong with an option

USAGE = {
    "no token": "--timeout=1h",
    "a token variable that is empty": "JUPYTERHUB_API_TOKEN=",
    "a token variable with two words": "JUPYTERHUB_API_TOKEN='two words'",
    "a token in place of its file": "--token-file=0123456789abcdef0123456789abcdef",
    "a token as an option": "--token=5ecre7",
    "a duration that is none": "--timeout=1x",
    "a capital M, which may mean months": "--timeout=1M",
    "a duration of more than a century": "--timeout=99999w",
    "a variable that is wrong": "CULL_IDLE_TIMEOUT=1x",
    "a variable of the Hub's that is wrong": "JUPYTERHUB_REQUEST_TIMEOUT=soon",
    "a rule with an unknown word": "--rule='user=ann kep'",
    "a rule that sets nothing": "--rule=user=ann",
    "a rule about admins that is neither true nor false": "--rule='admin=yes keep'",
    "a rule that keeps and has a limit": "--rule='keep timeout=1h'",
    "a rule whose quotes do not end": '--rule="\'user=ann keep"',
    "a rule that is not UTF-8": "--rule='user=\udcff keep'",
    "a fuse that is none": "--max-culls=x",
    "an arbiter without the name of its function": "--arbiter=/etc/arbiter.py",
    "an arbiter that cannot be loaded": "--arbiter=operator:nothing",
    "a command that is not there": "--notify=no-such-command",
    "a path that is empty": "--token-file=",
    "an explanation of nobody": "--explain=",
    "a unix socket": "--url=http+unix://%2Fsrv%2Fhub.sock/hub/api",
    "a URL with a password in it": "--url=http://ann:secret@hub:8081/hub/api",
    "a URL without http:": "--url=hub:8081",
    "a number that is too small": "--concurrency=0",
    "a number that is none": "--concurrency=many",
    "a level that there is not": "--log-level=loud",
    "a boolean that is none": "--cull-users=maybe",
    "a switch with a value": "--once=1",
    "an option without its value": "--timeout",
    "a misspelled option": "--tiemout=1h",
    "an option and its value in one word": "'--timeout 1h'",
    "a letter that is no option": "-x",
    "an argument": "3600",
    "users to be deleted by the default limit": "--cull-users --max-age=1h",
    "a warning that comes before a server is idle": "--timeout=1h --warn-before=1h",
}


@pytest.mark.parametrize("line", USAGE.values(), ids=USAGE)
def test_usage(cull: Cull, says: Says, line: str) -> None:
    result = run_line(cull, f"--once {line}")
    assert (result.exit_code, result.out, len(result.lines)) == (2, "", 1)
    says(result.err)


FILES: dict[str, tuple[str, str | None]] = {
    "a config file that is not there": ("--config=cull.toml", None),
    "a config file with a misspelled key": ("--config=cull.toml", "timeot = 1"),
    "a config file with an unknown key": ("--config=cull.toml", "token = 'x'"),
    "a config file with a section": ("--config=cull.toml", "[cull-idle]\ntimeout = '1h'"),
    "a config file with a wrong value": ("--config=cull.toml", "timeout = '1x'"),
    "a config file with a path that is no text": ("--config=cull.toml", "token-file = true"),
    "a config file with a duration without quotes": ("--config=cull.toml", "timeout = 1h"),
    "a config file of the reference": ("--config=cull.py", "c.IdleCuller.timeout = 3600"),
    "a config file of the reference that is no TOML": ("--config=cull.py", "c = get_config()"),
    "an arbiter with an unknown argument": ("--arbiter=arbiter.py:f", "def f(server, mood): return True"),
    "an arbiter that sets an option": ("--arbiter=arbiter.py:f", "c.IdleCuller.timeout = 1\ndef f(): return True"),
    "a token file that is not there": ("--token-file=token", None),
    "a token file that is empty": ("--token-file=token", "\n"),
    "a token file with more than a token": ("--token-file=token", "token=5ecre7 # mine"),
}


@pytest.mark.parametrize(("option", "text"), FILES.values(), ids=FILES)
def test_file(cull: Cull, says: Says, option: str, text: str | None) -> None:
    if text is not None:
        Path(re.split("[=:]", option)[1]).write_text(text)
    result = cull("--once", option, token="5ecre7-token")
    assert (result.exit_code, result.out, len(result.lines)) == (2, "", 1)
    says(result.err)


WARNINGS = {
    "a timeout below the activity interval": "--timeout=5m",
    "an age below the activity interval": "--max-age=12",
    "limits of a rule below the activity interval": "--rule='user=a timeout=1m max-age=2m'",
    "limits of users who are never deleted": "--user-timeout=1d",
    "passes too rare to warn of each stop": "--timeout=1h --warn-before=10m --cull-every=20m",
    "a misspelled variable": "CULL_IDLE_TIEMOUT=2h --timeout=1h",
    "a variable that is like no option": "CULL_IDLE_QQQQQQQQQQQQQQQ=2h --timeout=1h",
}


@pytest.mark.parametrize("line", WARNINGS.values(), ids=WARNINGS)
@pytest.mark.usefixtures("settings_of")  # which makes no pass
def test_warning_at_the_start(cull: Cull, says: Says, line: str) -> None:
    result = run_line(cull, line)
    assert (result.exit_code, result.out) == (0, "")
    says(result.err)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_about(cull: Cull, says: Says, option: str) -> None:
    result = cull(option)
    assert (result.exit_code, result.err) == (0, "")
    says(result.out)


# Passes

TOO_STRONG = respond_json(201, {"token": "5ecre7", "id": "a1", "scopes": ["admin:users"]})
ANN = {"name": "ann", "servers": {}}
NO_USERS = {"items": [], "_pagination": {"next": None}}
TOO_DEEP = respond(200, b"[" * 100_000)
OWN_GROUPS = [*LEAST_SCOPES, "read:users:groups!user=ann"]  # as JupyterHub adds to each token
HUB = [
    Scene("a Hub that is down", [ScriptedHub.pause_listening]),
    Scene("a Hub that is too slow", [fault("GET", "/users", hang())], "--request-timeout=1"),
    Scene("a Hub that closes the connection", [fault("GET", "/users", raw(b""), times=None)]),
    Scene("a Hub that restarts", [fault("GET", "/users", of_hub(503, "Restarting"), times=None)]),
    Scene("a host that cannot be", [], "--url=http://.example/hub/api"),
    Scene(
        "certificates that are not there",
        [],
        "--url=https://127.0.0.1:1/hub/api",
        env={"REQUESTS_CA_BUNDLE": "/nowhere.pem"},
    ),
    Scene(
        "a proxy that is down",
        [],
        "--url=https://hub.example.org/hub/api",
        env={"HTTPS_PROXY": "http://127.0.0.1:1", "NO_PROXY": "", "no_proxy": ""},
    ),
    Scene("HTML in place of the list", [fault("GET", "/users", html())]),
    Scene("nothing in place of the list", [fault("GET", "/users", empty())]),
    Scene("text in place of the list", [fault("GET", "/users", respond(200, b"hello"))]),
    Scene("another JSON in place of the list", [fault("GET", "/users", respond_json(200, {"version": "6.1.1"}))]),
    Scene("an error in place of the list", [fault("GET", "/users", of_hub(500, "Oops"))]),
    Scene("a redirect to another path", [fault("GET", "/users", redirect("/jhub/hub/api/users"))]),
    Scene("a redirect to another host", [fault("GET", "/users", redirect("https://example.org/login"))]),
    Scene("a redirect to nowhere", [fault("GET", "/users", respond(302))]),
    Scene("a token that is refused", [fault("GET", ".*", of_hub(403, "Not allowed."), times=None)]),
    Scene("a firewall that refuses", [fault("GET", "/users", html(403))]),
    Scene("scopes that are missing", [having(scopes=["list:users"])]),
    Scene(
        "a scope that a user's token lacks",
        [fault("GET", "/user", respond_json(200, {"kind": "user", "name": "ann", "scopes": OWN_GROUPS}))],
        "--rule='group=gpu keep'",
    ),
    Scene(
        "a rule about what the Hub does not show",
        [idle("ann", extra={}), lambda hub: hub.users["ann"].extra.update(groups=DROP)],
        "--rule='group=gpu keep'",
    ),
    Scene(
        "something else where servers should be",
        [having(scopes=[*ALL_SCOPES, "tokens"]), fault("GET", "[?].*", respond_json(200, []), times=None)],
        "--idle-by=both",
    ),
    Scene(
        "a Hub that makes a token that opens too much",
        [having(scopes=[*ALL_SCOPES, "tokens"]), idle("ann"), fault("POST", ".*", TOO_STRONG)],
        "--idle-by=server",
    ),
    Scene("a list that lost its pages", [idle("ann"), fault("GET", "/users", edited(lambda page: page["items"]))]),
    Scene(
        "a list that does not go on",
        [fault("GET", "/users", respond_json(200, {"items": [], "_pagination": {"next": {"offset": 0}}}))],
        exit=1,
    ),
    Scene(
        "a user whose data is too large",
        [
            active("ann", "bob"),
            fault("GET", "/users[?].*offset=1", lambda exchange: Answer(200, b" " * ((64 << 20) + 1))),
        ],
        "--api-page-size=1",
        exit=1,
    ),
    Scene(
        "a user whose data has too many values",
        [fault("GET", "/users", respond(200, b'{"items": [' + b"[]," * 500_000))],
        "--api-page-size=1",
        exit=1,
    ),
    Scene(
        "a user whose data is nested too deeply",
        [fault("GET", "/users", TOO_DEEP)],
        "--api-page-size=1",
        exit=1,
    ),
]


@pytest.mark.parametrize("scene", HUB, ids=Scene.__str__)
def test_hub(play: Play, scene: Scene) -> None:
    play(replace(scene, exit=scene.exit or 3, says=True))


GROUP_ONLY = ["list:users!group=gpu", *(scope for scope in ALL_SCOPES if scope != "list:users")]
PASSES = [
    Scene("a list that a filtered scope cuts short", [having(scopes=GROUP_ONLY)]),
    Scene("a clock that is wrong", [having(clock=lambda: datetime.now(UTC) + timedelta(hours=2, seconds=30))]),
    Scene(
        "a user without a name", [fault("GET", "/users", edited(lambda page: {**page, "items": [{}, ANN]}))], doubts=1
    ),
    Scene(
        "a Hub that is gone during the pass",
        [idle(*"abcdefghijklmn"), fault("GET", "/users/.*", of_hub(503), times=None)],
        "--concurrency=1",
        becomes={"a": "failed", "j": "failed"},
        exit=1,
    ),
    Scene("a command that fails", [idle("ann")], "--notify='sh -c \"exit 3\"'", becomes={"ann": "culled"}),
    Scene(
        "a command that cannot be run",
        [file("notify", "#!/nowhere/sh\n", 0o700), idle("ann")],
        "--notify=./notify",
        becomes={"ann": "culled"},
    ),
    Scene("metrics where there is no directory", [], "--metrics-file=none/cull_idle.prom"),
    Scene("metrics over another program's", [file("n.prom", "node_load1 0.21\n")], "--metrics-file=n.prom"),
]


@pytest.mark.parametrize("scene", PASSES, ids=Scene.__str__)
def test_pass(play: Play, scene: Scene) -> None:
    play(replace(scene, says=True))


def race(name: str, change: Callable[[ScriptedHub], object], *before: Reply) -> Given:
    """Something that happens while the program looks at a user again."""

    def reply(exchange: Exchange) -> Answer:
        change(exchange.hub)
        return exchange.normal()

    return fault("GET", f"/users/{name}", *before, reply)


STUCK = [{"last_activity": "2026-01-01T00:00:00Z"}]
SERVERS_AND_USERS = [
    Scene(
        "why servers and users are kept",
        [idle("ann", "bob/gpu"), idle("ann/gpu", extra={"ready": False}), user("root", admin=True)],
        "-v --cull-users --cull-admin-users=no --cull-default-servers=no --cull-named-servers=no",
        becomes={"ann": "kept", "ann/gpu": "kept", "bob/gpu": "kept", "user root": "kept"},
    ),
    Scene(
        "what is unclear about servers and users",
        [
            idle("ann", extra={"pending": DROP}),
            idle("bob", extra={"ready": None}),
            server("cat", last_activity=None, started=None),
            server("dan", started="soon"),
            user("eve", extra={"servers": {"": 7}}),
            user("fay", extra={"servers": DROP}),
            user("gus", extra={"last_activity": DROP}),
            user("hal", extra={"admin": None}),
        ],
        "-v --cull-users",
        becomes=dict.fromkeys(["ann", "bob", "cat", "dan", "eve", "fay", "user gus", "user hal"], "kept"),
        doubts=8,
    ),
    Scene(
        "what happens before a stop",
        [
            idle("ann", "bob", "gus"),
            user("cat"),
            user("dan"),
            race("ann", lambda hub: hub.users["ann"].servers.clear()),
            race("bob", lambda hub: hub.users.pop("bob")),
            race("cat", lambda hub: hub.add_user("cat", idle=LONG_AGO, age=LONG_AGO)),
            race("dan", lambda hub: hub.add("dan", idle=LONG_AGO)),
            race("gus", lambda hub: hub.touch("gus"), normal()),
        ],
        "--cull-users",
        becomes={"ann": "gone", "bob": "gone", "user cat": "spared", "user dan": "spared", "gus": "spared"},
    ),
    Scene(
        "looks and stops that fail",
        [
            idle("ann", "bob", "cat", "c?t"),
            fault("GET", "/users/ann", edited(lambda model: {**model, "name": "eve"})),
            fault("GET", "/users/bob", html(404)),
            fault("GET", "/users[?].*", normal(), TOO_DEEP, TOO_DEEP, respond_json(200, NO_USERS)),
            fault("GET", "/users/c%3Ft", html(404)),
            fault("DELETE", "/users/cat/server", of_hub(404)),
        ],
        "--concurrency=1",
        becomes={"ann": "failed", "bob": "failed", "cat": "failed", "c?t": "failed"},
        deletes=["cat"],
        exit=1,
    ),
    Scene("a named server that is removed", [idle("ann/gpu")], "--remove-named-servers", becomes={"ann/gpu": "culled"}),
    Scene(
        "an arbiter that returns neither true nor false",
        [file("arbiter.py", "def f(): return 'yes'"), idle("ann")],
        "--arbiter=arbiter.py:f",
        doubts=1,
    ),
    Scene(
        "what servers say that are asked",
        [
            having(scopes=[*ALL_SCOPES, "tokens"]),
            idle("ann", age=3 * HOUR + 30, says=FakeJupyter(terminals=STUCK)),
            idle("bob", age=3 * HOUR + 30, says=FakeJupyter(kernels=[{}])),
            idle("cat", age=3 * HOUR + 30),
            fault("GET", "/user/cat/.*", raw(b""), times=None),
        ],
        "--idle-by=kernels",
        becomes={"ann": "culled", "bob": "culled"},
        doubts=1,
    ),
]


@pytest.mark.parametrize("scene", SERVERS_AND_USERS, ids=Scene.__str__)
def test_server_or_user(play: Play, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cull_idle, "OLD_DECISION", -1.0 if "before a stop" in scene.name else 9.0)
    play(replace(scene, says=True))


def test_commands_that_hang(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.2)
    monkeypatch.setattr(cull_idle, "NOTICES_AT_ONCE", 1)
    monkeypatch.setattr(cull_idle, "LATE_NOTICES", 2)
    names = ["ann", "bob", "cat", "dan"]
    becomes = dict.fromkeys(names, "culled")
    play(Scene("", [idle(*names)], "--concurrency=1 --notify='sleep 60'", becomes=becomes, says=True))


def test_once_that_is_told_to_stop(play: Play, tell_to_stop: Callable[[], None]) -> None:
    play(Scene("", [fault("GET", "/users", then_do(tell_to_stop))], "--notify=true", exit=1, says=True))


def test_a_tls_that_fails(cull: Cull, scripted: ScriptedHub, says: Says) -> None:
    Path("ca.pem").write_text("no certificate")
    url = scripted.url.replace("http:", "https:")
    result = cull("--once", "--url", url, token=scripted.token, env={"REQUESTS_CA_BUNDLE": "ca.pem"})
    assert result.exit_code == 3
    says(result.err)


def test_a_ctrl_c_before_the_first_pass(cull: Cull, says: Says) -> None:
    Path("arbiter.py").write_text("raise KeyboardInterrupt")
    result = cull("--arbiter=arbiter.py:f", token="5ecre7")
    assert result.exit_code == 1
    says(result.err)


# Advice, taken


@pytest.mark.parametrize("path", ["", "/", "/hub", "/hub/", "/hub/home", "/hub/token", "/hub/api/users"])
def test_the_url_that_is_advised_works(cull: Cull, scripted: ScriptedHub, path: str) -> None:
    take_advice(cull, scripted, f"http://127.0.0.1:{scripted.port}{path}")


def test_http_is_advised_where_https_is_not_spoken(cull: Cull, scripted: ScriptedHub, says: Says) -> None:
    says(take_advice(cull, scripted, scripted.url.replace("http:", "https:")))


def take_advice(cull: Cull, hub: ScriptedHub, url: str) -> str:
    """Run with a URL that fails, then with the one that the message advises; returns the message."""
    hub.add("ann", idle=LONG_AGO)
    failed = cull("--once", "--timeout=1h", "--url", url, token=hub.token)
    assert (failed.exit_code, len(failed.lines), hub.running()) == (3, 1, {"ann"})
    (url,) = advised_urls(failed)
    assert cull("--once", "--timeout=1h", "--url", url, token=hub.token).outcomes == {"ann": "culled"}
    return failed.err


def advised_urls(result: Result) -> list[str]:
    return re.findall(r" try --url (.*)$", result.err, re.MULTILINE)


LOCATIONS = ["http://[::1", "http://%zz/", "//", "http://h:port/", "caf\u00e9", "\xff\xfe", "\x1b[2J", "/a b/hub/"]


@pytest.mark.parametrize("location", LOCATIONS, ids=ascii)
def test_nothing_is_advised_that_is_no_url(cull_scripted: Cull, scripted: ScriptedHub, location: str) -> None:
    scripted.fault("GET", "/users", redirect(location))
    result = cull_scripted()
    assert (result.exit_code, len(result.lines), advised_urls(result)) == (3, 1, [])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(play: Play, elsewhere: ScriptedHub, status: int) -> None:
    play(Scene("", [fault("*", ".*", redirect(f"{elsewhere.url}/users", status), times=None)], exit=3))


LACKING = [
    ("", "list:users"),
    ("", "read:servers"),
    ("", "delete:servers"),
    ("--cull-users", "admin:users"),
    ("--cull-users", "read:users:activity"),
    ("--rule='group=gpu keep'", "read:users:groups"),
    ("--rule='state.pod=x keep'", "admin:server_state"),
    ("--idle-by=both", "tokens"),
]


@pytest.mark.parametrize("kind", ["service", "user"])
@pytest.mark.parametrize(("options", "scope"), LACKING)
def test_the_role_that_is_advised_is_enough(
    cull_scripted: Cull, scripted: ScriptedHub, options: str, scope: str, kind: str
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/user", edited(lambda model: {**model, "kind": kind}), times=None)
    enough = {*LEAST_SCOPES, *(scope for option, scope in LACKING if option == options)}
    scripted.scopes = sorted(enough - {scope})
    failed = cull_scripted("--timeout=1h", *shlex.split(options))
    assert (failed.exit_code, len(failed.lines), scripted.running()) == (3, 1, {"ann"})
    role = json.loads(failed.err.rpartition("c.JupyterHub.load_roles.append")[2].strip("()\n"))
    assert role == {"name": role["name"], "scopes": [scope], f"{kind}s": ["culler"]}
    scripted.scopes += role["scopes"]
    assert cull_scripted("--timeout=1h", *shlex.split(options)).outcomes == {"ann": "culled"}


def test_each_role_that_is_advised_has_a_name_of_its_own() -> None:
    """A Hub does not start if a role is defined twice."""
    culler = cull_idle.Identity("service", "culler", frozenset())
    scopes = [[scope] for _, scope in LACKING] + [["list:users", "read:servers"]]
    advice = [cull_idle.advice_on_scopes(culler, each) for each in scopes]
    names = {json.loads(each.rpartition("append")[2].strip("()"))["name"] for each in advice}
    assert len(names) == len(scopes)


# As a process of its own


IN_A_VENV = "sys.prefix = '/venv'; "
STARTS = {  # statements that change Python before the program starts
    "a package that is missing": IN_A_VENV + "sys.modules['dateutil'] = None",
    "a package that is missing where pip may refuse to install": (
        "sys.prefix = sys.base_prefix; sys.modules['requests'] = None"
    ),
    "a click that is too old": IN_A_VENV + "import click; del click.NoSuchCommand",
    "a urllib3 that is too old": IN_A_VENV + "import urllib3; urllib3.HTTPResponse = object",
    "a Python that is too old": "sys.version_info = (3, 8, 20); sys.version = '3.8.20 (default)'",
    "a stdout that is full": "sys.stdout = open('/dev/full', 'w'); sys.argv[1:] = ['--help']",
}


@pytest.mark.parametrize("code", STARTS.values(), ids=STARTS)
def test_start(says: Says, code: str) -> None:
    code = f"import runpy, sys; {code}; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1 if "full" in code else 2, "")
    says(done.stderr.replace(sys.executable, "python").replace(str(PROGRAM), "cull_idle.py"))


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_a_real_python_that_is_too_old(version: str) -> None:
    """One of pyenv's, or one on the PATH."""
    ast.parse(PROGRAM.read_text(), feature_version=(3, 8))
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    python = next(pyenv.glob(f"versions/{version}.*/bin/python"), None) or shutil.which(f"python{version}")
    if not python:
        pytest.skip(f"this machine lacks Python {version}")
    done = subprocess.run([python, "-I", PROGRAM, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


@pytest.mark.parametrize(
    ("args", "token", "exit_code"),
    [("--timeout=x", "right", 2), ("-v", "wrong", 3), ("-v --max-culls=0", "right", 1), ("-v", "right", 0)],
)
def test_a_full_disk_under_stderr_changes_no_exit_code(
    scripted: ScriptedHub, args: str, token: str, exit_code: int
) -> None:
    scripted.token = "right"
    scripted.add("ann", idle=LONG_AGO)
    with Path("/dev/full").open("wb") as full:
        command = [*RUN, "--once", "--url", scripted.url, "--timeout=1h", *args.split()]
        env = {**os.environ, "JUPYTERHUB_API_TOKEN": token, "PYTHONPATH": str(PROGRAM.parent)}
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=full, check=False)
    assert (done.returncode, scripted.running()) == (exit_code, {"ann"} if exit_code else set())
