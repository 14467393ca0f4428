"""Options, the sources of their values, and --help."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from runs import Cull
from scripted_hub import LONG_AGO, ScriptedHub
from settings import SettingsOf

import cull_idle
from cull_idle import NEVER, Settings

MINUTE = timedelta(minutes=1)


def test_the_defaults_are_those_of_the_reference(settings_of: SettingsOf) -> None:
    settings = settings_of()
    assert settings == Settings(
        timeout=10 * MINUTE,
        max_age=NEVER,
        cull_default_servers=True,
        cull_named_servers=True,
        remove_named_servers=False,
        cull_users=False,
        cull_admin_users=True,
        user_timeout=None,
        user_max_age=None,
        rule=(),
        arbiter=None,
        idle_by="hub",
        max_culls=None,
        once=False,
        cull_every=None,
        dry_run=False,
        url="http://127.0.0.1:8081/hub/api",
        servers_url=None,
        token_file=None,
        concurrency=10,
        api_page_size=200,
        request_timeout=MINUTE,
        ssl_enabled=False,
        internal_certs_location="internal-ssl",
        verbose=False,
        quiet=False,
        log_level=None,
        json=False,
        explain=None,
        warn_before=None,
        notify=None,
        metrics_file=None,
        config=None,
    )
    assert settings.interval == 5 * MINUTE


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--timeout=never"], "timeout", NEVER),
        (["--timeout", "0"], "timeout", timedelta(0)),
        (["--timeout=3600"], "timeout", 60 * MINUTE),
        (["--max_age=1d"], "max_age", timedelta(days=1)),
        (["--cull-users", "--timeout=1h"], "cull_users", True),
        (["--cull_users", "--user-timeout=1h"], "cull_users", True),
        (["--cull-users=true", "--user-timeout=1h"], "cull_users", True),
        (["--cull-users", "--once", "--user-timeout=1h"], "cull_users", True),
        (["--cull-users=True", "--user-timeout=1h"], "cull_users", True),
        (["--cull-users=1", "--user-timeout=1h"], "cull_users", True),
        (["--cull-users=false"], "cull_users", False),
        (["--cull_users=no"], "cull_users", False),
        (["--remove-named-servers"], "remove_named_servers", True),
        (["--cull-admin-users=false"], "cull_admin_users", False),
        (["--cull_every=90s"], "interval", 1.5 * MINUTE),
        (["--cull-every=0"], "interval", 5 * MINUTE),
        (["--cull-every=0.5"], "interval", MINUTE / 60),
        (["--timeout=1h"], "interval", 30 * MINUTE),
        (["--timeout=never", "--max-age=1h"], "interval", 30 * MINUTE),
        (["--timeout=never"], "interval", 5 * MINUTE),
        (["--timeout=0"], "interval", 5 * MINUTE),
        (["--timeout=0", "--max-age=1h"], "interval", 30 * MINUTE),
        (["--timeout=1d", "--max-age=1h"], "interval", 30 * MINUTE),
        (["--timeout=1d", "--rule=group=gpu timeout=40m", "--rule=user=x keep"], "interval", 20 * MINUTE),
        (["--timeout=1d", "--rule=group=gpu max-age=2h timeout=0"], "interval", 60 * MINUTE),
        (["--timeout=1d", "--cull-users", "--user-timeout=40m"], "interval", 20 * MINUTE),
        (["--timeout=1d", "--cull-users", "--user-max-age=40m"], "interval", 20 * MINUTE),
        (["--timeout=1d", "--user-timeout=40m"], "interval", 720 * MINUTE),
        (["--timeout=1h", "--warn-before=10m"], "interval", 10 * MINUTE),
        (["--timeout=1h", "--warn-before=0.1s"], "interval", MINUTE / 60),
        (["--timeout=1h", "--warn-before=10m", "--cull-every=20m"], "interval", 20 * MINUTE),
        (["--timeout=1"], "interval", MINUTE / 60),
        (["--concurrency=1"], "concurrency", 1),
        (["--concurrency=1000"], "concurrency", 1000),
        (["--request-timeout=0.001"], "request_timeout", MINUTE / 60_000),
        (["--request-timeout=1d"], "request_timeout", timedelta(days=1)),
        (["--url=https://hub.example.org/hub/api/"], "url", "https://hub.example.org/hub/api"),
        (["--api-page-size=0"], "api_page_size", 0),
        (["-v"], "level", "debug"),
        (["-q"], "level", "error"),
        (["--log-level=WARNING"], "level", "warning"),
        (["-q", "--log-level=info"], "level", "info"),
    ],
)
def test_an_option_sets_its_value(settings_of: SettingsOf, args: list[str], name: str, value: object) -> None:
    assert getattr(settings_of(*args), name) == value


@pytest.mark.parametrize("arg", ["--concurrency=0", "--concurrency=1001", "--warn-before=36526d"])
def test_a_number_outside_its_bounds_is_refused(cull: Cull, arg: str) -> None:
    result = cull(arg)
    assert result.exit_code == 2
    assert arg.partition("=")[0] in result.err


def test_a_metrics_file_may_be_a_name_in_the_current_directory(
    settings_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings_of("--metrics-file=cull.prom").metrics_file == "cull.prom"


@pytest.mark.parametrize("value", ["0", "0s", "0h0m", "never"])
def test_a_maximum_age_of_0_means_no_limit(cull_scripted: Cull, scripted: ScriptedHub, value: str) -> None:
    scripted.add("ann", idle=LONG_AGO)
    assert cull_scripted("--timeout=never", f"--max-age={value}").counts == {"running": 1, "due": 0}
    assert cull_scripted("--timeout=never", "--max-age=1").counts["culled"] == 1


def test_the_command_line_comes_before_the_environment_and_the_default(settings_of: SettingsOf) -> None:
    env = {"CULL_IDLE_TIMEOUT": "1h", "CULL_IDLE_CULL_USERS": "true"}
    assert settings_of("--timeout=2h", env=env).timeout == 120 * MINUTE
    assert settings_of(env=env).timeout == 60 * MINUTE
    assert settings_of(env=env).cull_users
    assert not settings_of("--cull-users=false", env=env).cull_users


def test_the_hubs_own_variables_come_after_those_of_the_program(settings_of: SettingsOf) -> None:
    hubs = {"JUPYTERHUB_API_URL": "http://hub:8081/hub/api", "JUPYTERHUB_REQUEST_TIMEOUT": "90"}
    assert settings_of(env=hubs).url == "http://hub:8081/hub/api"
    assert settings_of(env=hubs).request_timeout == 1.5 * MINUTE
    assert settings_of(env={**hubs, "CULL_IDLE_URL": "http://other/hub/api"}).url == "http://other/hub/api"
    assert settings_of("--url=http://third/hub/api", env=hubs).url == "http://third/hub/api"


def test_every_option_is_an_environment_variable(settings_of: SettingsOf) -> None:
    values = {
        "TIMEOUT": "2h", "MAX_AGE": "3h", "CULL_DEFAULT_SERVERS": "no", "CULL_NAMED_SERVERS": "no",
        "REMOVE_NAMED_SERVERS": "yes", "CULL_USERS": "yes", "CULL_ADMIN_USERS": "no", "MAX_CULLS": "5%",
        "ONCE": "1", "CULL_EVERY": "7",
        "DRY_RUN": "1", "URL": "http://h/hub/api", "TOKEN_FILE": "x", "CONCURRENCY": "3", "API_PAGE_SIZE": "4",
        "REQUEST_TIMEOUT": "5", "VERBOSE": "1", "QUIET": "1", "LOG_LEVEL": "error",
    }  # fmt: skip
    default = settings_of()
    changed = settings_of(env={f"CULL_IDLE_{name}": value for name, value in values.items()})
    assert {name.upper() for name, value in vars(default).items() if vars(changed)[name] != value} == set(values)


def test_a_mistyped_variable_is_a_warning_that_names_the_right_one(cull: Cull, settings_of: SettingsOf) -> None:
    (line,) = cull("--timeout=1h", env={"CULL_IDLE_TIEMOUT": "2h"}).warnings
    assert "CULL_IDLE_TIEMOUT" in line
    assert "$CULL_IDLE_TIMEOUT" in line


def test_other_variables_are_no_warning(cull: Cull, settings_of: SettingsOf) -> None:
    notice = {"CULL_IDLE_EVENT": "culled"}  # what a command of --notify gets
    assert cull("--timeout=1h", env={"CULL_IDLE_MAX_AGE": "1d", "IDLE": "1", **notice}).err == ""


@pytest.mark.parametrize("timeout", ["1s", "5m", "5m29s"])
def test_a_timeout_below_the_activity_interval_of_the_hub_is_a_warning(
    cull: Cull, settings_of: SettingsOf, timeout: str
) -> None:
    (line,) = cull(f"--timeout={timeout}").warnings
    assert f"--timeout {timeout} " in line


def test_so_is_a_timeout_of_a_rule(cull: Cull, settings_of: SettingsOf) -> None:
    (line,) = cull("--timeout=1h", "--rule=user=x keep", "--rule=user=y timeout=1m").warnings
    assert "rule 2" in line
    assert "1m" in line


@pytest.mark.parametrize("limit", ["--user-timeout=1d", "--user-max-age=1d"])
def test_limits_of_users_who_are_never_deleted_are_a_warning(cull: Cull, settings_of: SettingsOf, limit: str) -> None:
    (line,) = cull(limit).warnings
    assert limit.partition("=")[0] in line
    assert cull(limit, "--cull-users", "--timeout=1h") == (0, "", "")


@pytest.mark.parametrize(("flags", "warned"), [([], True), (["--once"], False), (["--dry-run"], False)])
def test_passes_too_rare_to_warn_of_every_stop_are_a_warning(
    cull: Cull, settings_of: SettingsOf, flags: list[str], warned: bool
) -> None:
    lines = cull("--timeout=1h", "--warn-before=10m", "--cull-every=20m", *flags).warnings
    assert [("--cull-every" in line, "--warn-before" in line) for line in lines] == [(True, True)] * warned


@pytest.mark.parametrize("timeout", ["0", "5m30s", "1h", "never"])
def test_other_timeouts_are_no_warning(cull: Cull, settings_of: SettingsOf, timeout: str) -> None:
    assert cull(f"--timeout={timeout}").err == ""


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_is_grouped_and_fits_80_columns(cull: Cull, flag: str) -> None:
    result = cull(flag)
    assert (result.exit_code, result.err) == (0, "")
    headings = [line for line in result.out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["What to cull:", "When:", "The Hub:", "Output:"]
    assert max(map(len, result.out.splitlines())) <= 80
    assert "--cull-users[=BOOL]" in result.out


@pytest.mark.parametrize("columns", [50, 60, 80, 200])
def test_the_help_fits_the_terminal_and_breaks_no_word(
    cull: Cull, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    usual = cull("--help").out
    monkeypatch.setenv("COLUMNS", str(columns))
    out = cull("--help").out
    assert max(map(len, out.splitlines())) <= min(columns, 80)
    assert joined(out) == joined(usual)


def joined(text: str) -> list[str]:
    """The words of a text, also of those that are broken after a hyphen."""
    return re.sub(r"-\n +", "-", text).split()


def test_the_help_shows_what_a_value_looks_like_and_the_defaults(cull: Cull) -> None:
    words = " ".join(cull("--help").out.split())
    for usage in ("--timeout DURATION|never", "--cull-every DURATION ", "--cull-users[=BOOL]", "--max-culls N|N%"):
        assert f" {usage}" in words
    for default in ("10m", "never", "true", "false", "http://127.0.0.1:8081/hub/api"):
        assert f"[default: {default}" in words


def test_every_option_has_a_help_that_is_a_sentence() -> None:
    for param in cull_idle.make_command().params:
        assert isinstance(param, click.Option)
        assert param.help
        assert param.help.split("  [")[0].endswith(".")


def test_the_version_option_ignores_the_environment(cull: Cull) -> None:
    assert cull("--version").out == f"cull_idle.py {cull_idle.__version__}\n"
    assert cull("--timeout=x", env={"CULL_IDLE_VERSION": "1"}).exit_code == 2
