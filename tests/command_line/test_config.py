"""The config file: its place among the sources of a value, and its errors."""

from dataclasses import fields
from pathlib import Path

import pytest
from runs import Cull
from scripted_hub import ScriptedHub
from settings import SettingsOf

from cull_idle import Settings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "cull.toml"


def test_a_config_file_comes_after_the_environment_and_before_the_default(
    settings_of: SettingsOf, config: Path
) -> None:
    config.write_text('\ufefftimeout = " 1h\t"\nmax_age = 7200\ncull-every = 90\ncull_users = true\nconcurrency = 3\n')
    args = f"--config={config}"
    settings = settings_of(args)
    assert settings.timeout.total_seconds() == 3600
    assert settings.max_age.total_seconds() == 7200
    assert settings.interval.total_seconds() == 90
    assert settings.cull_users
    assert settings.concurrency == 3
    assert settings_of(args, env={"CULL_IDLE_TIMEOUT": "2h"}).timeout.total_seconds() == 7200
    assert settings_of(args, "--timeout=3h", env={"CULL_IDLE_TIMEOUT": "2h"}).timeout.total_seconds() == 10_800
    assert not settings_of(args, "--cull-users=false").cull_users
    assert settings_of(env={"CULL_IDLE_CONFIG": str(config)}).concurrency == 3


def test_rules_come_as_a_list_or_in_a_variable_separated_by_semicolons(settings_of: SettingsOf, config: Path) -> None:
    config.write_text('rule = ["group=gpu timeout=30m", "user=svc-* keep"]\n')
    in_file = settings_of(f"--config={config}")
    in_variable = settings_of(env={"CULL_IDLE_RULE": "group=gpu timeout=30m; user=svc-* keep; "})
    on_command_line = settings_of("--rule=group=gpu timeout=30m", "--rule", "user=svc-* keep")
    assert len(in_file.rule) == 2
    assert [(rule.matches, rule.timeout) for rule in in_variable.rule] == [
        (rule.matches, rule.timeout) for rule in in_file.rule
    ]
    assert on_command_line.rule == in_file.rule


def test_one_rule_needs_no_list(settings_of: SettingsOf, config: Path) -> None:
    config.write_text('rule = "user=a keep"\n')
    (rule,) = settings_of(f"--config={config}").rule
    assert rule.keep


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("timeot = 1", ["'timeot'", "timeout"]),
        ("cull_user = true", ["'cull-user'", "cull-users"]),
        ("config = 'x'", ["'config'"]),
        ("[timeout]\nx = 1", ["timeout"]),
        ("timeout = [1, 2]", ["timeout"]),
        ("timeout = '1x'", ["timeout", "'1x'"]),
        ("cull-users = 'maybe'", ["cull-users", "'maybe'"]),
        ("concurrency = 0", ["concurrency", "0"]),
        ("rule = ['user=x']", ["rule", "user=x"]),
        ("timeout = ", ["TOML"]),
        ("timeout = 1h", ["quotes", '"1h"']),
        ("c.IdleCuller.timeout = foo()", ["jupyterhub-idle-culler", "--arbiter"]),
        (None, ["No such file or directory"]),
        (b"\xff\xfe", ["TOML"]),
    ],
)
def test_an_error_in_a_config_file_names_the_file_and_the_key(
    cull: Cull, config: Path, text: str | bytes | None, words: list[str]
) -> None:
    if text is not None:
        config.write_bytes(text.encode() if isinstance(text, str) else text)
    result = cull(f"--config={config}")
    assert result.exit_code == 2
    (line,) = result.lines
    for word in [str(config), *words]:
        assert word in line


ODD_VALUES = [
    "2",
    "-1",
    "2.5",
    "nan",
    "inf",
    "true",
    "false",
    "2026-11-22",
    "12:00:00",
    r'"a\u0000b"',
    "[2]",
    "[false]",
]


@pytest.mark.parametrize("name", [field.name.replace("_", "-") for field in fields(Settings)])
@pytest.mark.parametrize("value", ODD_VALUES)
def test_a_value_of_another_kind_is_taken_as_on_the_command_line_or_refused(
    cull_scripted: Cull, scripted: ScriptedHub, config: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.chdir(config.parent)
    config.write_text(f"{name} = {value}\n")
    result = cull_scripted("--config=cull.toml")
    if result.exit_code == 2 and not scripted.requests:
        assert len(result.lines) == 1
        assert name in result.err
    assert [path.name for path in config.parent.iterdir()] == [config.name]


@pytest.mark.parametrize("name", ["token-file", "internal-certs-location", "metrics-file", "config"])
@pytest.mark.parametrize("value", ["2", "false", "true", "2026-11-22", r'"a\u0000b"'])
def test_a_path_in_a_config_file_is_a_text_without_nul(
    cull_scripted: Cull, scripted: ScriptedHub, config: Path, name: str, value: str
) -> None:
    config.write_text(f"{name} = {value}\n")
    result = cull_scripted(f"--config={config}")
    assert result.exit_code == 2
    (line,) = result.lines
    assert name in line
    assert scripted.requests == []


@pytest.mark.parametrize(("value", "exit_code"), [("true", 0), ("false", 0), ("1", 0), ("0", 0), ("2", 2), ("2.5", 2)])
def test_a_flag_in_a_config_file_is_a_boolean(
    cull_scripted: Cull, scripted: ScriptedHub, config: Path, value: str, exit_code: int
) -> None:
    config.write_text(f"quiet = {value}\n")
    result = cull_scripted("--timeout=1h", f"--config={config}")
    assert result.exit_code == exit_code
    assert (result.err == "") == (value in ("true", "1"))


def test_a_text_in_a_config_file_stays_as_it_is_written(settings_of: SettingsOf, config: Path) -> None:
    config.write_text('token-file = "/Etc/Token"\nurl = "http://Hub.Example:8081/Jhub/hub/api/"\n')
    settings = settings_of(f"--config={config}")
    assert settings.token_file == "/Etc/Token"
    assert settings.url == "http://Hub.Example:8081/Jhub/hub/api"


SSL_VARIABLES = {
    "JUPYTERHUB_SSL_KEYFILE": "/ssl/own.key",
    "JUPYTERHUB_SSL_CERTFILE": "/ssl/own.crt",
    "JUPYTERHUB_SSL_CLIENT_CA": "/ssl/ca.crt",
}


def test_the_client_certificate_comes_from_the_hub_if_it_names_all_of_it(settings_of: SettingsOf) -> None:
    assert not settings_of().client_certificate
    own = settings_of("--ssl-enabled", "--internal-certs-location=/x").client_certificate
    assert own == ("/x/hub-internal/hub-internal.key", "/x/hub-internal/hub-internal.crt", "/x/hub-ca/hub-ca.crt")


@pytest.mark.parametrize("without", [None, *SSL_VARIABLES])
def test_a_part_of_the_hubs_client_certificate_is_none(
    settings_of: SettingsOf, monkeypatch: pytest.MonkeyPatch, without: str | None
) -> None:
    settings = settings_of()
    for name, value in SSL_VARIABLES.items():
        if name != without:
            monkeypatch.setenv(name, value)
    assert list(settings.client_certificate) == ([] if without else ["/ssl/own.key", "/ssl/own.crt", "/ssl/ca.crt"])


@pytest.mark.parametrize(
    ("config", "variables", "args", "level"),
    [
        ('log-level = "info"', {}, ["-v"], "debug"),
        ('log-level = "info"', {}, ["-q"], "error"),
        ("verbose = true", {}, ["-q"], "error"),
        ("quiet = true", {}, ["-v"], "debug"),
        ("", {"CULL_IDLE_LOG_LEVEL": "info"}, ["-v"], "debug"),
        ("verbose = true", {"CULL_IDLE_QUIET": "true"}, [], "error"),
        ("verbose = true", {"CULL_IDLE_LOG_LEVEL": "warning"}, [], "warning"),
        ("verbose = true", {}, [], "debug"),
        ("", {}, ["-v", "--log-level=warning"], "warning"),
    ],
)
def test_what_says_the_level_on_the_command_line_counts_first(
    settings_of: SettingsOf, tmp_path: Path, config: str, variables: dict[str, str], args: list[str], level: str
) -> None:
    file = tmp_path / "cull-idle.toml"
    file.write_text(config)
    assert settings_of("--config", str(file), *args, env=variables).level == level


def test_the_long_names_of_the_reference_are_options_too(settings_of: SettingsOf) -> None:
    settings = settings_of("--IdleCuller.timeout=7200", "--IdleCuller.cull_users=true")
    assert settings.timeout.total_seconds() == 7200
    assert settings.cull_users
