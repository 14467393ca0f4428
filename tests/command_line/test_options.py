"""Options: what their values mean, where these come from, and what is refused. What is said then: test_messages.py."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import pytest
from processes import PROGRAM
from runs import Cull, Result, RunLoop
from scripted_hub import LONG_AGO, ScriptedHub
from settings import SettingsOf

import cull_idle
from cull_idle import NEVER, Arbiter, Fuse, Settings

TOKEN = "5ecre7-token-0f-the-cu11er"
ZERO, MINUTE, DAY = timedelta(0), timedelta(minutes=1), timedelta(days=1)
NAMES = [field.name.replace("_", "-") for field in fields(Settings)]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Each option, from each source

EACH = [
    ("timeout", "1h", 60 * MINUTE),
    ("max-age", "1.5d", 1.5 * DAY),
    ("idle-by", "Both", "both"),
    ("rule", "user=svc-* keep", (cull_idle.parse_rule("user=svc-* keep"),)),
    ("cull-default-servers", "false", False),
    ("cull-named-servers", "no", False),
    ("remove-named-servers", "True", True),
    ("cull-users", "1", True),
    ("cull-admin-users", "off", False),
    ("user-timeout", "90d", 90 * DAY),
    ("user-max-age", "never", NEVER),
    ("max-culls", "5%", Fuse(5, "%")),
    ("arbiter", "logging:basicConfig", Arbiter(logging.basicConfig, cull_idle.ARBITER_ARGUMENTS)),
    ("dry-run", "true", True),
    ("once", "true", True),
    ("cull-every", "7", MINUTE * 7 / 60),
    ("explain", "ann/gpu", "ann/gpu"),
    ("url", "HTTPS://Hub.Example:8081/Jhub/hub/api/", "https://Hub.Example:8081/Jhub/hub/api"),
    ("token-file", "/Etc/Token", "/Etc/Token"),
    ("servers-url", "http://proxy-public", "http://proxy-public"),
    ("concurrency", "1000", 1000),
    ("api-page-size", "0", 0),
    ("request-timeout", "1m30s", 1.5 * MINUTE),
    ("ssl-enabled", "yes", True),
    ("internal-certs-location", "/srv/x", "/srv/x"),
    ("verbose", "true", True),
    ("quiet", "true", True),
    ("log-level", "WARNING", "warning"),
    ("json", "true", True),
    ("warn-before", "5m", 5 * MINUTE),
    ("notify", "sh -c 'exit 1'", ("sh", "-c", "exit 1")),
    ("metrics-file", "cull.prom", "cull.prom"),
]
SWITCHES = {"dry-run", "once", "verbose", "quiet", "json"}
SOURCES = ["command line", "variable", "file"]


def test_the_table_has_each_option() -> None:
    assert [option for option, *_ in EACH] == [name for name in NAMES if name != "config"]


def given(source: str, option: str, text: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and variables that set an option to a text."""
    if source == "variable":
        return [], {f"CULL_IDLE_{option.replace('-', '_').upper()}": text}
    if source == "file":
        Path("cull.toml").write_text(f"{option} = {json.dumps(text)}\n", "utf-8-sig")
        return ["--config=cull.toml"], {}
    return [f"--{option}" if option in SWITCHES else f"--{option}={text}"], {}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("option", "text", "value"), EACH)
def test_each_source_sets_each_option(
    settings_of: SettingsOf, option: str, text: str, value: object, source: str
) -> None:
    others = [] if option == "timeout" else ["--timeout=2h"]  # --cull-users needs it
    args, env = given(source, option, f" {text}\t")  # white space around it does not count
    found, default = settings_of(*others, *args, env=env), settings_of("--timeout=2h")
    changed = {name: each for name, each in vars(found).items() if vars(default)[name] != each and name != "config"}
    assert changed == {option.replace("-", "_"): value}


def test_the_command_line_comes_first_then_variables_then_the_file(settings_of: SettingsOf) -> None:
    Path("cull.toml").write_text('timeout = "1h"\ncull-users = true\nurl = "http://file"\n')
    file, line = "--config=cull.toml", "--timeout=3h"
    variable = {"CULL_IDLE_TIMEOUT": "2h", "CULL_IDLE_CULL_USERS": "no"}
    found = [settings_of(), settings_of(file), settings_of(file, env=variable), settings_of(file, line, env=variable)]
    assert [each.timeout / MINUTE for each in found] == [10, 60, 120, 180]
    assert [each.cull_users for each in found] == [False, True, False, False]
    assert not settings_of(file, "--cull-users=false").cull_users
    assert settings_of(env={"CULL_IDLE_CONFIG": "cull.toml"}).timeout == 60 * MINUTE
    hubs = {"JUPYTERHUB_API_URL": "http://hub", "JUPYTERHUB_REQUEST_TIMEOUT": "90"}
    assert settings_of(file, env=hubs).url == "http://hub"
    assert settings_of(env=hubs).request_timeout == 1.5 * MINUTE
    assert settings_of(env=hubs | {"CULL_IDLE_URL": "http://own"}).url == "http://own"
    assert settings_of("--timeout=1h", env={"CULL_IDLE_TIMEOUT": "wrong"}).timeout == 60 * MINUTE


@pytest.mark.parametrize("option", ["cull-users", "remove-named-servers", "ssl-enabled"])
def test_a_boolean_without_a_value_is_true(settings_of: SettingsOf, option: str) -> None:
    settings = settings_of(f"--{option}", "--once", "--timeout=1h")
    assert vars(settings)[option.replace("-", "_")]
    assert settings.once


def test_there_may_be_several_rules(settings_of: SettingsOf) -> None:
    texts = ["group=gpu timeout=30m", "user=svc-* keep"]
    Path("cull.toml").write_text(f"rule = {json.dumps(texts)}\n")
    for settings in (
        settings_of(*(f"--rule={text}" for text in texts)),
        settings_of(env={"CULL_IDLE_RULE": "; ".join([*texts, ""])}),
        settings_of("--config=cull.toml"),
    ):
        assert [(rule.text.strip(), rule.timeout, rule.keep) for rule in settings.rule] == [
            (texts[0], 30 * MINUTE, False),
            (texts[1], None, True),
        ]


@pytest.mark.parametrize(
    ("option", "toml", "value"),
    [
        ("timeout", "7200", 120 * MINUTE),
        ("timeout", "1.5", MINUTE / 40),
        ("max_age", "7200", 120 * MINUTE),  # with _, as well
        ("concurrency", '"3"', 3),
        ("quiet", "1", True),
        ("cull-admin-users", "false", False),
        ("json", "true", True),
        ("cull-named-servers", "0", False),
        ("max-culls", "5", Fuse(5, "")),
        ("rule", '"user=a keep"', (cull_idle.parse_rule("user=a keep"),)),
        ("quiet", "2", None),
        ("timeout", "true", None),
        ("timeout", "12:00:00", None),
        ("timeout", "[1]", None),
        ("rule", "[false]", None),
        ("token-file", "2", None),
        ("metrics-file", "2026-11-22", None),
        ("internal-certs-location", r'"a\u0000b"', None),
        ("config", '"x"', None),
        ("timeot", "1", None),
        ("token", '"x"', None),
    ],
)
def test_a_value_in_a_file_is_as_on_the_command_line_or_refused(
    cull: Cull, settings_of: SettingsOf, option: str, toml: str, value: object
) -> None:
    Path("cull.toml").write_text(f"{option} = {toml}\n")
    if value is None:
        assert_usage_error(cull("--once", "--config=cull.toml", token=TOKEN), option)
    else:
        assert getattr(settings_of("--config=cull.toml"), option.replace("-", "_")) == value


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"[timeout]\nx = 1", b"timeout = 1h", b"x = " + b"[" * 9999, None], ids=ascii
)
def test_a_file_that_is_no_config_file_is_refused(cull: Cull, text: bytes | None) -> None:
    if text is not None:
        Path("cull.toml").write_bytes(text)
    assert_usage_error(cull("--once", "--config=cull.toml", token=TOKEN), "cull.toml")


def assert_usage_error(result: Result, name: str) -> None:
    """The program says in one sentence what is wrong, with the name of that."""
    assert (result.exit_code, result.out, len(result.lines)) == (2, "", 1)
    assert name in result.err


# The reference


@pytest.fixture(scope="session")
def reference() -> dict[str, str]:
    """The options of jupyterhub-idle-culler, and their defaults, as its own --help says."""
    command = [sys.executable, "-m", "jupyterhub_idle_culler", "--help-all"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^--(\S+)=<(?:.*\n)+?    Default: '?(.*?)'?\n    Equivalent", text, re.MULTILINE)
    return {name: default for name, default in found if name not in ("config", "url")}  # --config is TOML here


def test_the_defaults_are_those_of_the_reference(settings_of: SettingsOf, reference: dict[str, str]) -> None:
    assert len(reference) == 12
    ours, theirs = settings_of(), settings_of(*(f"--{name}={default}" for name, default in reference.items()))
    assert theirs.interval == ours.interval
    # 0 is no limit, or what the program chooses: a test below, and that of the interval. The README names the 200.
    assert (theirs.max_age, theirs.cull_every, theirs.api_page_size) == (ZERO, ZERO, 0)
    assert (ours.max_age, ours.cull_every, ours.api_page_size) == (NEVER, None, 200)
    assert replace(theirs, max_age=NEVER, cull_every=None, api_page_size=200) == ours


def test_all_spellings_of_the_reference_are_taken(settings_of: SettingsOf, reference: dict[str, str]) -> None:
    for name, default in reference.items():
        value, field = "0" if default == "True" else "1", name.replace("-", "_")
        for spelled in (f"--{name}", f"--{field}", f"--IdleCuller.{field}"):
            assert vars(settings_of("--user-timeout=9", f"{spelled}={value}"))[field] != vars(settings_of())[field]


@pytest.mark.parametrize("value", ["0", "0h0m", "never"])
def test_an_age_of_0_is_no_limit(cull_scripted: Cull, scripted: ScriptedHub, value: str) -> None:
    scripted.add("ann", idle=LONG_AGO)
    assert cull_scripted("--timeout=never", f"--max-age={value}").counts == {"running": 1, "due": 0}
    assert cull_scripted("--timeout=never", "--max-age=1").outcomes == {"ann": "culled"}


# What follows from several options


@pytest.mark.parametrize(
    ("args", "minutes"),
    [
        ("--timeout=1h", 30),
        ("--timeout=never", 5),
        ("--timeout=0", 5),
        ("--timeout=1d --max-age=1h", 30),
        ("--timeout=0 --max-age=1h", 30),
        ("--timeout=1d --rule=timeout=40m --rule=keep", 20),
        ("--timeout=1d --rule=max-age=2h", 60),
        ("--timeout=1d --cull-users --user-timeout=40m", 20),
        ("--timeout=1d --cull-users --user-max-age=40m", 20),
        ("--timeout=1d --user-timeout=40m", 720),
        ("--timeout=1h --warn-before=10m", 10),
        ("--timeout=1h --warn-before=0.1s", 1 / 60),
        ("--timeout=1h --warn-before=10m --cull-every=20m", 20),
        ("--timeout=1h --cull-every=0", 30),
        ("--timeout=1h --cull-every=0.5", 1 / 60),
        ("--timeout=1", 1 / 60),
    ],
)
def test_the_time_between_two_passes(settings_of: SettingsOf, args: str, minutes: float) -> None:
    assert settings_of(*args.split()).interval == minutes * MINUTE


@pytest.mark.parametrize(
    ("file", "variable", "args", "level"),
    [
        ("", "", "", "info"),
        ("", "", "-v -q", "debug"),
        ("", "", "-v --log-level=warning", "warning"),
        ('log-level = "info"', "", "-v", "debug"),
        ("verbose = true", "", "", "debug"),
        ("verbose = true", "", "-q", "error"),
        ("", "LOG_LEVEL=info", "-v", "debug"),
        ("verbose = true", "QUIET=true", "", "error"),
    ],
)
def test_the_level_of_the_log_comes_from_the_first_source_that_names_one(
    settings_of: SettingsOf, file: str, variable: str, args: str, level: str
) -> None:
    Path("cull.toml").write_text(file)
    env = {f"CULL_IDLE_{variable.partition('=')[0]}": variable.partition("=")[2]} if variable else {}
    assert settings_of("--config=cull.toml", *args.split(), env=env).level == level


def test_the_client_certificate_is_that_of_the_hub_if_it_names_all_of_it(
    settings_of: SettingsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    without, with_internal_ssl = settings_of(), settings_of("--ssl-enabled", "--internal-certs-location=/x")
    internal = ("/x/hub-internal/hub-internal.key", "/x/hub-internal/hub-internal.crt", "/x/hub-ca/hub-ca.crt")
    of_hub = {"KEYFILE": "/ssl/own.key", "CERTFILE": "/ssl/own.crt", "CLIENT_CA": "/ssl/ca.crt"}
    for name, path in of_hub.items():
        assert (*without.client_certificate, *with_internal_ssl.client_certificate) == internal
        monkeypatch.setenv(f"JUPYTERHUB_SSL_{name}", path)
    for settings in (without, with_internal_ssl):
        assert list(settings.client_certificate) == list(of_hub.values())


# What is refused, whatever it comes from

REFUSED = {
    "timeout": ["1x", "", "-5", "nan", "1h-30m", "30m1h", "1e-3", "e3", "1M", "36526d"],
    "cull-every": ["never", "100000w"],
    "request-timeout": ["never"],
    "warn-before": ["x"],
    "idle-by": ["me"],
    "rule": ["user=ann", "user=ann kep", "admin=yes keep", "keep timeout=1h", "'user=ann keep"],
    "cull-users": ["maybe"],
    "dry-run": ["maybe"],
    "max-culls": ["x", "101%", "-1", "1.5", ""],
    "arbiter": ["/etc/arbiter.py", "operator:nothing", "no_such_module:f", "none.py:f", "x\0.py:f"],
    "explain": ["", "/gpu", "--once"],
    "url": [
        *("", "nonsense", "localhost:8081", "//127.0.0.1/hub/api", "ftp://127.0.0.1/hub/api", "file:///etc/passwd"),
        *("http://", "http:///hub/api", "http://h:99999/hub/api", "http://h:0/hub/api", "http://h:port/hub/api"),
        *("http://[::1/hub/api", "http://ho st/hub/api", "http+unix://%2Fhub.sock/hub/api"),
        *("http://ann:s3cret@h/hub/api", "http://s3cret@h/hub/api", "http://h/?token=s3cret", "http://h/#s3cret"),
    ],
    "servers-url": ["nonsense"],
    "concurrency": ["0", "1001", "-1", "many", "1.5"],
    "api-page-size": ["-1", "all"],
    "log-level": ["loud"],
    "notify": ["", "'unclosed", "no-such-command here", "/", "x\0y"],
    "token-file": ["", "nul\0nul"],
    "internal-certs-location": [""],
    "metrics-file": ["", "\0"],
}
CASES = [
    (source, option, text)
    for option, texts in REFUSED.items()
    for text in texts
    for source in SOURCES
    if not (source == "variable" and (not text or "\0" in text))  # an empty one counts as none
    and not (source == "command line" and option in SWITCHES)
]


@pytest.mark.parametrize(("source", "option", "text"), CASES)
def test_a_wrong_value_is_refused_and_its_source_is_named(cull: Cull, source: str, option: str, text: str) -> None:
    args, env = given(source, option, text)
    result = cull("--once", *args, token=TOKEN, env=env)
    name = {"command line": f"--{option}", "variable": f"${next(iter(env), '')}", "file": f"{option} in cull.toml"}
    assert_usage_error(result, name[source])
    assert "s3cret" not in result.err


@pytest.mark.parametrize("limit", ["--max-age=1h", "--user-max-age=1h", "--dry-run"])
def test_users_are_deleted_only_after_a_time_that_somebody_has_chosen(
    cull: Cull, settings_of: SettingsOf, limit: str
) -> None:
    assert_usage_error(cull("--once", "--cull-users", limit, token=TOKEN), "--cull-users")
    for chosen in ("--timeout=1h", "--user-timeout=1h"):
        assert settings_of("--cull-users", limit, chosen).cull_users


@pytest.mark.parametrize("args", ["--warn-before=1h", "--warn-before=30m --rule=timeout=30m"])
def test_a_warning_must_come_before_each_timeout(cull: Cull, args: str) -> None:
    assert_usage_error(cull("--once", "--timeout=1h", *args.split(), token=TOKEN), "--warn-before")


@pytest.mark.parametrize("host", [".example", "a..b", "a" * 64 + ".example", "%zz"])
def test_a_host_that_cannot_be_is_no_hub(cull: Cull, host: str) -> None:
    result = cull("--once", "--url", f"http://{host}/hub/api", token=TOKEN)
    assert (result.exit_code, len(result.errors)) == (3, 1)


def test_the_longest_durations_do(loop: RunLoop, scripted: ScriptedHub) -> None:
    done = loop(scripted, "--cull-every=36525d", "--request-timeout=36525d", "--timeout=36525d")
    assert [each.errors for each in done.passes] == [[]]


@pytest.mark.parametrize(
    ("args", "count"),
    [
        ("--timeout=5m29s", 1),
        ("--timeout=5m30s", 0),
        ("--timeout=0", 0),
        ("--timeout=5m --idle-by=both", 0),
        ("--max-age=5m", 1),
        ("--max-age=0", 0),
        ("--timeout=1h --rule=timeout=1m --rule=keep", 1),
        ("--user-max-age=1d", 1),
        ("--user-max-age=1d --cull-users --timeout=1h", 0),
        ("--timeout=1h --warn-before=10m --cull-every=20m", 1),
        ("--timeout=1h --warn-before=10m --cull-every=20m --once", 0),
        ("--timeout=1h --warn-before=10m --cull-every=20m --dry-run", 0),
    ],
)
def test_what_is_probably_a_mistake_is_a_warning(cull: Cull, settings_of: SettingsOf, args: str, count: int) -> None:
    env = {"CULL_IDLE_EVENT": "culled", "CULL_IDLE_IDLE_BY": "hub", "IDLE": "1"}  # none of these is a mistake
    assert len(cull(*args.split(), env=env).warnings) == count
    assert len(cull(*args.split(), env={"CULL_IDLE_TIEMOUT": "1"}).warnings) == count + 1


# The token

NO_TOKENS = ["", " \n\t", "zw\u00f6lf-zeichen", "two words", "first\nsecond", "bell\x07bell", "half\udcffhalf"]
NO_TOKEN_FILES = [b"", b"\n \n", b"\x80\xff\x00" * 9, b"\xef\xbb\xbftoken", "token".encode("utf-16"), b"token=t # mine"]


@pytest.mark.parametrize("token", [None, *NO_TOKENS], ids=ascii)
def test_a_variable_without_a_token_is_refused(cull: Cull, token: str | None) -> None:
    assert_usage_error(cull("--once", token=token), "$JUPYTERHUB_API_TOKEN")


@pytest.mark.parametrize("text", [None, *NO_TOKEN_FILES], ids=ascii)
def test_a_file_without_a_token_is_refused_and_not_shown(cull: Cull, text: bytes | None) -> None:
    if text is not None:
        Path("file").write_bytes(text)
    result = cull("--once", "--token-file=file", token=TOKEN)
    assert_usage_error(result, "--token-file file")
    assert "token=t" not in result.err


@pytest.mark.parametrize("path", [".", "0123456789abcdef" * 2])
def test_a_token_file_is_a_file_and_what_may_be_a_token_is_not_shown(cull: Cull, path: str) -> None:
    result = cull("--once", f"--token-file={path}", token=TOKEN)
    assert_usage_error(result, "--token-file")
    assert "0123456789abcdef" not in result.err


def test_the_token_of_a_file_comes_before_that_of_the_variable(cull: Cull, scripted: ScriptedHub) -> None:
    Path("file").write_text(f" {scripted.token}\n")
    assert cull("--once", "--url", scripted.url, "--token-file=file", token=TOKEN).exit_code == 0
    assert {request.headers["authorization"] for request in scripted.requests} == {f"token {scripted.token}"}


def test_a_loop_reads_the_file_again_for_each_pass_and_keeps_the_last_token(
    loop: RunLoop, scripted: ScriptedHub
) -> None:
    file = Path("file")
    file.write_text("old")
    texts = [scripted.token, "", "two words", "another"]
    steps = [file.unlink, *(lambda text=text: file.write_text(text) for text in texts)]
    done = loop(scripted, "--timeout=1h", "--token-file=file", between=steps)
    assert [(len(each.errors), len(each.warnings)) for each in done.passes] == [
        (1, 0), (1, 1), (0, 0), (0, 1), (0, 1), (1, 0),
    ]  # fmt: skip


def test_a_loop_reads_a_pipe_once(loop: RunLoop, scripted: ScriptedHub) -> None:
    reader, writer = os.pipe()
    os.write(writer, scripted.token.encode())
    os.close(writer)
    done = loop(scripted, f"--token-file=/dev/fd/{reader}", between=[lambda: None, lambda: None])
    os.close(reader)
    assert [(len(each.errors), len(each.warnings)) for each in done.passes] == [(0, 0), (0, 1), (0, 0)]


# --help


@pytest.mark.parametrize("columns", [50, 60, 200])
def test_the_help_fits_the_terminal_and_breaks_no_word(
    cull: Cull, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    def words(columns: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        text = cull("-h").out
        assert max(map(len, text.splitlines())) <= min(columns, 80)
        return re.sub(r"-\n +", "-", text).split()  # also those that are broken after a hyphen

    assert words(columns) == words(80)


@pytest.mark.parametrize("name", ["cull-idle", "cull_idle_servers.py"])
def test_the_program_calls_itself_as_it_was_called(name: str) -> None:
    Path(name).symlink_to(PROGRAM)
    for option in ("--version", "--help", "--timeout=x"):
        done = subprocess.run([sys.executable, name, option], capture_output=True, text=True, check=False)
        assert name in (done.stdout + done.stderr).splitlines()[0]
