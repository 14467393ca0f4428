"""The config file: where it stands among the sources of a value, and what is wrong with it."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Cull
from test_command_line import settings_of

__all__ = ["settings_of"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "cull.toml"


def test_a_config_file_comes_after_the_environment_and_before_the_default(settings_of: Any, config: Path) -> None:
    config.write_text('timeout = "1h"\nmax_age = 7200\ncull-every = 90\ncull_users = true\nconcurrency = 3\n')
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


def test_rules_come_as_a_list_or_in_a_variable_separated_by_semicolons(settings_of: Any, config: Path) -> None:
    config.write_text('rule = ["group=gpu timeout=30m", "user=svc-* keep"]\n')
    in_file = settings_of(f"--config={config}")
    in_variable = settings_of(env={"CULL_IDLE_RULE": "group=gpu timeout=30m; user=svc-* keep; "})
    on_command_line = settings_of("--rule=group=gpu timeout=30m", "--rule", "user=svc-* keep")
    assert len(in_file.rule) == 2
    assert [(rule.matches, rule.timeout) for rule in in_variable.rule] == [
        (rule.matches, rule.timeout) for rule in in_file.rule
    ]
    assert on_command_line.rule == in_file.rule


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("timeot = 1", ["'timeot'", "no option"]),
        ("config = 'x'", ["'config'", "no option"]),
        ("[timeout]\nx = 1", ["timeout must be one value"]),
        ("timeout = [1, 2]", ["timeout must be one value"]),
        ("timeout = '1x'", ["timeout in ", "'1x' is not a duration"]),
        ("cull-users = 'maybe'", ["cull-users in ", "'maybe' is not a valid boolean"]),
        ("concurrency = 0", ["concurrency in ", "0 is not in the range"]),
        ("rule = ['user=x']", ["rule in ", "needs timeout="]),
        ("timeout = ", ["is not TOML"]),
        ("c.IdleCuller.timeout = foo()", ["is not TOML"]),
    ],
)
def test_what_is_wrong_in_a_config_file_is_named_with_the_file(
    cull: Cull, config: Path, text: str, words: list[str]
) -> None:
    config.write_text(text)
    result = cull(f"--config={config}")
    assert result.exit_code == 2
    (line,) = result.lines
    for word in [str(config), *words]:
        assert word in line


def test_a_config_file_that_is_not_there_or_not_text(cull: Cull, config: Path) -> None:
    assert f"{config} cannot be read: No such file or directory." in cull(f"--config={config}").err
    config.write_bytes(b"\xff\xfe")
    assert f"{config} is not TOML" in cull(f"--config={config}").err


def test_the_generated_file_uncommented_gives_the_defaults_back(cull: Cull, settings_of: Any, config: Path) -> None:
    result = cull("--generate-config")
    assert (result.exit_code, result.err) == (0, "")
    assert tomllib.loads(result.out) == {}
    config.write_text(re.sub(r"^# (?=[\w-]+ = )", "", result.out, flags=re.MULTILINE))
    assert len(tomllib.loads(config.read_text())) >= 18
    assert replace(settings_of(f"--config={config}"), config=None) == settings_of()


def test_a_file_is_generated_whatever_the_other_options_and_nothing_else_is_done(cull: Cull) -> None:
    result = cull("--timeout=wrong", "--generate-config", env={"CULL_IDLE_MAX_AGE": "wrong"})
    assert (result.exit_code, result.err) == (0, "")
    assert result.out == cull("--generate-config").out


def test_the_generated_file_has_every_option_with_its_help(cull: Cull, settings_of: Any) -> None:
    out = cull("--generate-config").out
    named = set(re.findall(r"^##? ([\w-]+) = ", out, re.MULTILINE))
    assert named == {name.replace("_", "-") for name in vars(settings_of()) if name != "config"}
    assert "## Stop servers idle for at least this long; 0 stops every ready server." in out
    assert max(map(len, out.splitlines())) <= 120


def test_settings_in_the_references_long_form_are_taken(settings_of: Any) -> None:
    settings = settings_of("--IdleCuller.timeout=7200", "--IdleCuller.cull_users=true")
    assert settings.timeout.total_seconds() == 7200
    assert settings.cull_users
