"""Public reports, published configurations and other people's code: inputs that once failed, each with what is right.

The numbers are those of the issue that collects them; test_attacks.py has the rest.
"""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub.process import free_ports
from processes import PROGRAM, run_measured
from runs import Cull, RunLoop
from scripted_hub import (
    HOUR,
    LONG_AGO,
    PREFIX,
    Answer,
    FakeJupyter,
    Reply,
    Request,
    ScriptedHub,
    drip,
    hang,
    html,
    redirect,
    respond,
    respond_json,
    swapped,
)

BUSY = {"id": "1", "execution_state": "busy", "last_activity": "2026-01-01T00:00:00Z"}
MEBIBYTE = 1 << 20


# 1. Ordinary data


def add_dashboards(hub: ScriptedHub) -> set[str]:
    """Six dashboards of jhub-apps: each has a picture among its options."""
    names = {f"dashboard-{number}" for number in range(6)}
    for name in names:
        hub.add("ann", name, idle=LONG_AGO, user_options={"jhub_app": True, "thumbnail": "iVBORw0K" * 44_000})
    return {f"ann/{name}" for name in names}


@pytest.mark.parametrize("limit", ["--timeout=1h", "--max-age=1h"])
def test_servers_with_a_picture_each_are_culled(cull_scripted: Cull, scripted: ScriptedHub, limit: str) -> None:
    names = add_dashboards(scripted)
    result = cull_scripted("--timeout=never", limit)
    assert result.exit_code == 0
    assert result.outcomes == dict.fromkeys(names, "culled")
    assert result.warnings == []


def test_a_server_with_a_picture_is_explained(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    add_dashboards(scripted)
    result = cull_scripted("--timeout=1h", "--explain=ann/dashboard-3")
    assert result.exit_code == 0
    assert "stopped: idle 2h" in result.out


def add_one_with(hub: ScriptedHub, data: bytes) -> None:
    """Four idle users, three with a server; the second one's options are this JSON."""
    hub.add("ann", idle=LONG_AGO)
    hub.add("bob", idle=LONG_AGO, user_options={"data": "DATA"})
    hub.add("cat", idle=LONG_AGO)
    hub.add_user("dan", idle=LONG_AGO)
    hub.fault("GET", r"/users\b.*", swapped(b'"DATA"', data), times=None)


@pytest.mark.parametrize("flags", [[], ["--cull-users"]], ids=str)
def test_a_user_of_80_mebibytes_is_left_out_and_named(
    cull_scripted: Cull, scripted: ScriptedHub, flags: list[str]
) -> None:
    add_one_with(scripted, b'"%s"' % (b"x" * (80 * MEBIBYTE)))
    result = cull_scripted("--timeout=1h", *flags)
    deleted = {"user dan": "deleted"} if flags else {}
    assert result.outcomes == {"ann": "culled", "cat": "culled", **deleted}
    assert (result.exit_code, scripted.running()) == (1, {"bob"})
    assert re.search("user 2 .*left out", result.err)


ALL_BRACKETS = {
    "side by side": b"[%s[]]" % (b"[]," * (2 * MEBIBYTE // 3)),
    "nested": b"[" * MEBIBYTE + b"]" * MEBIBYTE,
    "pairs": b"[%s[]]" % (b"[[]]," * (2 * MEBIBYTE // 5)),
}


@pytest.mark.parametrize("data", ALL_BRACKETS.values(), ids=ALL_BRACKETS)
def test_a_user_who_is_all_brackets_is_left_out_in_little_memory(
    scripted: ScriptedHub, tmp_path: Path, data: bytes
) -> None:
    add_one_with(scripted, data)
    result, peak = run_measured(scripted, tmp_path, "--timeout=1h")
    assert result.outcomes == {"ann": "culled", "cat": "culled"}
    assert (result.exit_code, scripted.running()) == (1, {"bob"})
    assert re.search("user 2 .*left out", result.err)
    assert peak < 256 * MEBIBYTE


# 2. A server with a login of its own. The answers are those of a Jupyter server that was started with its own token.

OWN_LOGIN: dict[str, Reply] = {
    "403": respond_json(403, {"message": "Forbidden", "reason": None}),
    "401": respond(401),
    "404": html(404),
    "garbage": html(200),
}


@pytest.mark.parametrize("how", OWN_LOGIN)
@pytest.mark.parametrize("mode", ["both", "server"])
@pytest.mark.parametrize("names", [["ann"], ["ann", "bob", "cat"]])
def test_of_a_server_with_its_own_login_the_hubs_word_counts(
    cull_scripted: Cull, scripted: ScriptedHub, names: list[str], mode: str, how: str
) -> None:
    scripted.scopes.append("tokens")
    for name in names:
        scripted.add(name, idle=LONG_AGO, age=9 * HOUR)
    scripted.add("zoe", idle=60, age=9 * HOUR)
    scripted.fault("GET", "/user/.*", OWN_LOGIN[how], times=None)
    result = cull_scripted("--timeout=1h", "--idle-by", mode)
    assert result.outcomes == dict.fromkeys(names, "culled")
    assert (result.exit_code, scripted.running()) == (0, {"zoe"})
    number = len(names) + (mode == "server")  # which asks zoe's, too
    said = [line for line in result.lines if " culled " not in line and " pass: " not in line]
    assert any(re.search(rf"(?<![\d.:]){number}(?![\d.:])", line) and "Hub" in line for line in said), result.err
    assert scripted.tokens == {}


def test_the_hubs_own_port_as_servers_url_is_an_error(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.leads_to_servers = False
    scripted.scopes.append("tokens")
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR)
    own_port = scripted.url.removesuffix("/hub/api")
    result = cull_scripted("--timeout=1h", "--idle-by=both", "--servers-url", own_port)
    assert (result.exit_code, scripted.running()) == (3, {"ann"})
    assert "--servers-url" in result.err


# 3. A published configuration


@pytest.mark.parametrize("zero", ["--cull-every=0", "--cull_every=0", "--IdleCuller.cull_every=0", "--cull-every=0s"])
def test_cull_every_0_is_the_default(loop: RunLoop, scripted: ScriptedHub, zero: str) -> None:
    done = loop(scripted, "--timeout=1h", zero)
    assert [round(pause, -2) for pause in done.pauses] == [1800]
    assert done.exit_code == 0


# 4. A read-only root


def test_a_command_runs_where_no_file_can_be_made(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    told = tmp_path / "told"
    script = f'echo "$CULL_IDLE_EVENT $CULL_IDLE_USER" >> {shlex.quote(str(told))}'
    result = cull_scripted("--timeout=1h", "--notify", shlex.join(["sh", "-c", script]))
    assert told.read_text() == "culled ann\n"
    assert (result.exit_code, result.errors) == (0, [])


# 5. White space

SPACED = {
    "$CULL_IDLE_TIMEOUT": "1h\n", "$CULL_IDLE_CULL_USERS": " false\n", "$CULL_IDLE_RULE": " user=x keep ;\n",
    "$JUPYTERHUB_REQUEST_TIMEOUT": "30\n", "--timeout": " 1h\n", "--max-age": "never ", "--max-culls": " 5\n",
    "--concurrency": "3\n", "--cull-named-servers": " yes\n", "--notify": " true\n",
    "$JUPYTERHUB_API_URL": "URL\n", "$CULL_IDLE_URL": "\tURL/ ", "--url": " URL ", "--servers-url": " URL\n",
    "$CULL_IDLE_CONFIG": "FOLDER/cull.toml\n", "--config": " FOLDER/cull.toml", "--token-file": "FOLDER/token\n",
    "--idle-by": "hub\n", "--log-level": " info ",
}  # fmt: skip


@pytest.mark.parametrize(("where", "value"), SPACED.items())
def test_white_space_around_a_value_is_ignored(
    cull: Cull, scripted: ScriptedHub, tmp_path: Path, where: str, value: str
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    (tmp_path / "token").write_text(f" {scripted.token}\n")
    (tmp_path / "cull.toml").write_text('timeout = " 1h "\nmax-culls = "5 "\ncull-users = " no "\n')
    value = value.replace("URL", scripted.url).replace("FOLDER", str(tmp_path))
    env = {"JUPYTERHUB_API_URL": scripted.url}
    options = ["--once"]
    if where.startswith("$"):
        env[where[1:]] = value
    else:
        options.append(f"{where}={value}")
    result = cull(*options, token=f"{scripted.token}\n", env=env)
    assert (result.exit_code, scripted.running()) == (0, set()), result.err


# 6. Where the API is


class BelowJupyter(ScriptedHub):
    """A Hub with base_url /jupyter; as a real one, it sends all other paths there."""

    def answer(self, request: Request) -> Answer:
        path, _, query = request.target.partition("?")
        if not path.startswith("/jupyter/"):
            return Answer(302, headers={"Location": f"/jupyter/hub{path}"})
        below = path.removeprefix("/jupyter")
        segments = tuple(below.removeprefix(PREFIX + "/").split("/"))
        return super().answer(replace(request, target=f"{below}?{query}", segments=segments))


@pytest.mark.parametrize("path", ["", "/", "/hub/api", "/api"])
def test_a_redirect_to_the_base_url_becomes_an_address_that_works(cull: Cull, path: str) -> None:
    with BelowJupyter() as hub:
        hub.add("ann", idle=LONG_AGO)
        host = f"http://127.0.0.1:{hub.port}"
        result = cull("--once", "--timeout=1h", f"--url={host}{path}", token=hub.token)
        assert result.exit_code == 3
        advice = re.search(rf"{host}/jupyter/hub/api(?![\w/?])", result.err)
        assert advice
        assert cull("--once", "--timeout=1h", f"--url={advice[0]}", token=hub.token).outcomes == {"ann": "culled"}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_https_names_that_address(cull_scripted: Cull, scripted: ScriptedHub, status: int) -> None:
    scripted.add("ann", idle=LONG_AGO)
    for path in ("/user", "/users"):
        scripted.fault("GET", path, redirect(f"https://hub.example.org/hub/api{path}?limit=200", status), times=None)
    result = cull_scripted("--timeout=1h")
    assert result.exit_code == 3
    assert re.search(r"https://hub\.example\.org/hub/api(?![/?\w])", result.err), result.err


# 7. Rules that apply to nobody

RULE = "--rule=group=gpu-long keep"


def test_a_keep_rule_that_applies_to_nobody_is_said_once_by_a_loop(loop: RunLoop, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=60)
    scripted.users["ann"].groups = ["gpu-very-long"]
    done = loop(scripted, "--timeout=1h", RULE, between=[bool] * 2)
    assert [sum("gpu-long" in line for line in each.lines) for each in done.passes] == [1, 0, 0]


@pytest.mark.parametrize(
    ("setting", "level"),
    [("keep", "INFO"), ("timeout=never", "INFO"), ("max-age=never", "INFO"), ("timeout=30m", "DEBUG")],
)
def test_a_rule_that_applies_to_nobody_is_said_by_each_single_pass(
    cull_scripted: Cull, scripted: ScriptedHub, setting: str, level: str
) -> None:
    scripted.add("ann", idle=60)
    rule = f"--rule=group=gpu-long {setting}"
    for _ in range(2):
        lines = [line for line in cull_scripted("--timeout=1h", "-v", rule).lines if "gpu-long" in line]
        assert [line.split()[0] for line in lines] == [level]
    assert ("gpu-long" in cull_scripted("--timeout=1h", rule).err) == (level == "INFO")
    scripted.users["ann"].groups = ["gpu-long"]
    assert "gpu-long" not in cull_scripted("--timeout=1h", rule).err


# 8. Hours meant


@pytest.mark.parametrize(
    ("age", "warned"), [("12", True), ("5m29s", True), ("5m30s", False), ("12h", False), ("0", False), ("never", False)]
)
def test_a_small_maximum_age_is_a_warning(cull_scripted: Cull, age: str, warned: bool) -> None:
    result = cull_scripted("--timeout=1h", f"--max-age={age}")
    assert result.exit_code == 0
    assert ["--max-age" in line for line in result.warnings] == [True] * warned


# 9. A slow user list


@pytest.mark.parametrize("how", [hang(), drip(0.05)], ids=["silent", "drips"])
def test_a_page_that_times_out_names_the_size_of_a_page(cull_scripted: Cull, scripted: ScriptedHub, how: Reply) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users", how, times=None)
    result = cull_scripted("--timeout=1h", "--request-timeout=0.4s")
    assert result.exit_code == 3
    assert any("--api-page-size" in line for line in result.errors)


# 10. Certificates and byte order marks


@pytest.fixture
def secure(certificates: Path) -> Iterator[ScriptedHub]:
    """A Hub that speaks TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server/server.crt", certificates / "server/server.key")
    with ScriptedHub() as hub:
        assert hub._listener
        plain = hub._listener.socket
        hub._listener.socket = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        yield hub


@pytest.mark.parametrize(
    "names",
    [
        *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"),
        *("REQUESTS_CA_BUNDLE SSL_CERT_FILE", "CURL_CA_BUNDLE SSL_CERT_FILE"),
    ],
)
def test_a_private_ca_is_trusted(cull: Cull, secure: ScriptedHub, certificates: Path, names: str) -> None:
    """If the variables differ, the first one counts."""
    secure.add("ann", idle=LONG_AGO)
    first, *others = names.split()
    env = {first: str(certificates / "ca/ca.crt"), **dict.fromkeys(others, "/no/such/file")}
    url = secure.url.replace("http:", "https:")
    result = cull("--once", "--timeout=1h", f"--url={url}", token=secure.token, env=env)
    assert (result.exit_code, secure.running()) == (0, set()), result.err


def test_a_byte_order_mark_in_a_config_file_is_skipped(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    config = tmp_path / "cull.toml"
    config.write_text('timeout = "1h"\n', "utf-8-sig")
    result = cull_scripted(f"--config={config}")
    assert (result.exit_code, scripted.running()) == (0, set()), result.err


# 11. Commands and files of the reference


@pytest.mark.parametrize("copied", [False, True])
def test_without_packages_the_old_command_says_what_to_install(tmp_path: Path, copied: bool) -> None:
    """The published command is `[sys.executable, "cull_idle_servers.py", …]`: Python is the Hub's own."""
    script = Path(sys.executable).with_name("cull_idle_servers.py")
    if copied:
        script = Path(shutil.copy(PROGRAM, tmp_path / script.name))
    command = [sys.executable, "-I", "-S", str(script), "--timeout=3600"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "packages" in line
    assert "pip install" in line


@pytest.mark.parametrize(
    "text",
    [
        "c.IdleCuller.timeout = 3600\n",
        "c = get_config()  # noqa\nc.IdleCuller.timeout = 3600\n",
        "def my_arbiter(inactive):\n    return True\n\nc.IdleCuller.cull_arbiter_hook = my_arbiter\n",
        "import os\n\nc.IdleCuller.timeout = 3600\n",
        "from datetime import timedelta\n",
        "async def my_arbiter(inactive):\n    return True\n",
        '"""The culler."""\n\nimport os\n',
    ],
)
def test_a_python_file_as_config_is_answered_with_what_to_do(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, text: str
) -> None:
    config = tmp_path / "idle_culler_config.py"
    config.write_text(text)
    result = cull_scripted(f"--config={config}")
    assert (result.exit_code, scripted.requests) == (2, [])
    (line,) = result.lines
    assert str(config) in line
    assert "--arbiter" in line


# 12. A unix socket


@pytest.mark.parametrize("where", ["--url", "$JUPYTERHUB_API_URL"])
def test_a_unix_socket_is_said_to_be_unsupported(cull: Cull, where: str) -> None:
    url = "http+unix://%2Fsrv%2Fjupyterhub%2Fhub.sock/hub/api"
    option = [f"--url={url}"] if where == "--url" else []
    result = cull("--once", "--timeout=1h", *option, token="a-token", env={"JUPYTERHUB_API_URL": url})
    assert result.exit_code == 2
    (line,) = result.lines
    assert "unix" in line.replace(url, "").lower()
    assert "support" in line


# 13. A Hub with a host for each user


@pytest.mark.parametrize("wrong", ["a port that refuses", "the Hub's own port"])
def test_with_subdomains_a_wrong_servers_url_should_be_left_out(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **kw: resolve("127.0.0.1", *more, **kw))
    scripted.scopes.append("tokens")
    full_url = {"full_url": f"http://ann.hub.example.org:{scripted.port}/user/ann/"}
    scripted.add("ann", idle=LONG_AGO, age=9 * HOUR, says=FakeJupyter(kernels=[BUSY]), extra=full_url)
    port = scripted.port if "Hub" in wrong else free_ports(1)[0]
    scripted.leads_to_servers = port != scripted.port
    result = cull_scripted("--timeout=1h", "--idle-by=both", f"--servers-url=http://hub.example.org:{port}")
    assert (result.exit_code, scripted.running()) == (3, {"ann"})
    (line,) = result.errors
    assert re.search("[Ll]eave (.* )?out", line)
    assert "--servers-url" in line
