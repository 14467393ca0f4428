"""The README says of the program what is true of it."""

from __future__ import annotations

import re
import shlex
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from conftest import TIMESTAMP, Cull
from readme_text import BLOCKS, PYPROJECT, README, ROOT, rows, section
from scripted_hub import ScriptedHub
from settings import settings_from

import cull_idle


class Row(NamedTuple):
    """An option, as --help and the README's tables have it."""

    option: str
    default: str


def blocks(*languages: str) -> list[Any]:
    chosen = [block for block in BLOCKS if block.language in languages]
    assert chosen, f"the README has no block of {languages}"
    return [pytest.param(block.text, id=f"{block.language}-{number}") for number, block in enumerate(chosen, 1)]


def sample(command: str) -> str:
    """What the README shows that a command of `console` prints."""
    console = "".join(block.text for block in BLOCKS if block.language == "console")
    match = re.search(rf"^\$ {re.escape(command)}\n(.*?)(?=^\$ |\Z)", console, re.MULTILINE | re.DOTALL)
    assert match, f"the README does not show {command}"
    return match[1].strip()


def real_options() -> dict[str, list[Row]]:
    """The options by their headings in --help."""
    command = cull_idle.make_command()
    ctx = click.Context(command, **command.context_settings)
    found: dict[str, list[Row]] = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        assert record
        default = re.search(r"\[default: ([^];]*)", record[1])
        row = Row(record[0].replace(" [=", "[="), default[1] if default else "")
        found.setdefault(getattr(param, "heading", cull_idle.OUTPUT), []).append(row)
    return found


def option_names() -> set[str]:
    command = cull_idle.make_command()
    ctx = click.Context(command, **command.context_settings)
    return {name for param in command.get_params(ctx) for name in param.opts}


@pytest.mark.parametrize("heading", real_options())
def test_the_readme_lists_every_option(heading: str) -> None:
    listed = [Row(option, default) for option, default, _ in rows(heading)]
    assert listed == real_options()[heading]


def test_the_readme_lists_every_exit_code() -> None:
    assert [int(code) for code, _ in rows("Exit codes")] == list(cull_idle.Exit)


def test_the_readme_explains_every_word_of_the_log() -> None:
    assert [word for word, _ in rows("What the log says")] == [*cull_idle.Outcome, "deleted"]


def test_commands_in_the_readme_use_options_that_exist() -> None:
    commands = [
        command for block in BLOCKS for command in re.findall(r"(?:cull-idle|cull_idle\.py)(?=\W+-).*", block.text)
    ]
    used = {option for command in commands for option in re.findall(r"(?<=[\s\"'])--?[a-z][\w-]*", command)}
    assert used >= {"--once", "--dry-run", "--timeout", "--token-file", "-q", "-v"}
    assert used <= option_names()


def test_options_named_in_the_text_of_the_readme_exist() -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = {name.replace("IdleCuller.", "").replace("_", "-") for name in re.findall(r"`(--\w[\w.-]*)", text)}
    assert named <= option_names()


@pytest.mark.parametrize("text", blocks("toml"))
def test_configuration_in_the_readme_is_taken(text: str, tmp_path: Path) -> None:
    file = tmp_path / "cull-idle.toml"
    file.write_text(text)
    settings = settings_from("--config", str(file))
    assert settings.timeout == timedelta(hours=1)
    assert [rule.text for rule in settings.rule] == tomllib.loads(text)["rule"]


def test_rules_in_the_readme_are_taken() -> None:
    shown = [rule for rule, _ in rows("Exceptions")]
    assert shown
    for rule in [*shown, *re.findall(r"--rule '(.*?)'", README)]:
        cull_idle.parse_rule(rule)


def test_the_readme_lists_all_that_rules_match_and_the_scopes_for_it() -> None:
    listed = {name: scope for name, _, scope in rows("What rules match and set")}
    needed = {name: settings_from(f"--rule={name}=true keep").rule_scopes for name in cull_idle.MATCHES}
    assert listed == {name: "".join(scopes) for name, scopes in needed.items()}


def test_the_arbiter_in_the_readme_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "arbiter.py"
    file.write_text(next(block.text for block in BLOCKS if "def my_cull_arbiter" in block.text))
    arbiter = cull_idle.load_arbiter(f"{file}:my_cull_arbiter")
    given = {"inactive": timedelta(hours=2), "inactive_limit": 3600, "user": {}}
    assert arbiter(**given, server={"state": {"profile_name": "small"}})
    assert not arbiter(**given, server={"state": {"profile_name": "unlimited"}})


def test_the_readme_lists_what_an_arbiter_is_given() -> None:
    assert {keyword for keyword, _ in rows("A decision of your own")} == cull_idle.ARBITER_ARGUMENTS


@pytest.mark.parametrize("text", blocks("python"))
def test_python_in_the_readme_compiles(text: str) -> None:
    compile(text, "README.md", "exec")


def test_the_scopes_in_the_readme_are_those_the_program_asks_for() -> None:
    role = cull_idle.role_for(settings_from(), None)
    wanted = re.findall(r'"([a-z]+:[a-z:]+)"', role)
    assert wanted
    assert re.findall(r'"([a-z]+:[a-z:]+)"', section("A first real run")) == wanted


def test_the_script_needs_the_same_as_the_package() -> None:
    source = (ROOT / "cull_idle.py").read_text("utf-8")
    match = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source, re.MULTILINE)
    assert match
    script = tomllib.loads(re.sub(r"^# ?", "", match[1], flags=re.MULTILINE))
    project = PYPROJECT["project"]
    assert script == {key: project[key] for key in ("requires-python", "dependencies")}
    for requirement in project["dependencies"]:
        assert f"'{requirement}'" in section("Install")


def test_the_sample_of_a_dry_run_is_what_the_program_prints(cull: Cull, scripted: ScriptedHub) -> None:
    shown = sample("cull_idle.py --dry-run --timeout 1h")
    add_shown(scripted, shown)
    counts = re.search(r"^(\d+) of (\d+) running", shown, re.MULTILINE)
    assert counts
    for number in range(int(counts[2]) - int(counts[1])):
        scripted.add(f"busy{number}")
    result = cull("--dry-run", "--timeout", "1h", "--url", scripted.url, token=scripted.token)
    assert result.out.strip() == shown


def test_the_sample_of_a_pass_is_what_the_program_logs(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    shown = sample("cull_idle.py --once --timeout 1h")
    add_shown(scripted, sample("cull_idle.py --dry-run --timeout 1h"))
    for name in re.findall(r"WARNING +stopping (\w+):", shown):
        scripted.users[name].servers[""].stop_seconds = 60
    scripted.slow_stop = 0
    counts = re.search(r"(\d+) running, (\d+) due", shown)
    assert counts
    for number in range(int(counts[1]) - int(counts[2])):
        scripted.add(f"busy{number}")
    assert len(TIMESTAMP.findall(shown)) == len(shown.splitlines())
    assert sorted(untimed(cull_scripted("--timeout", "1h").err)) == sorted(untimed(shown))


def test_the_sample_of_an_explanation_is_what_the_program_prints(cull: Cull, scripted: ScriptedHub) -> None:
    command = 'cull_idle.py --explain ann/gpu --timeout 1h --rule "group=gpu timeout=30m"'
    shown = sample(command)
    clock = cull_idle.parse_time(re.findall(r"^clock +(.*)$", shown, re.MULTILINE)[0])
    assert clock
    scripted.now = clock
    idle, age = (
        cull_idle.parse_duration(ago).total_seconds() for ago in re.findall(r", (\w+) ago$", shown, re.MULTILINE)
    )
    scripted.add("ann", "gpu", idle=idle, age=age)
    scripted.users["ann"].groups = ["gpu"]
    result = cull(*shlex.split(command)[1:], "--url", scripted.url, token=scripted.token)
    printed = re.sub(", .* this machine's$", "", result.out, flags=re.MULTILINE)
    assert printed.strip().replace(scripted.url, "http://127.0.0.1:8081/hub/api") == shown


def add_shown(scripted: ScriptedHub, table: str) -> None:
    """Put the servers of a dry run's table on the Hub."""
    for line in table.partition("\n\n")[0].splitlines()[1:-1]:
        full_name, idle, age, _ = re.split("  +", line)
        name, _, server = full_name.partition("/")
        seconds = (cull_idle.parse_duration(text).total_seconds() + 30 for text in (idle, age))
        scripted.add(name, server, **dict(zip(("idle", "age"), seconds, strict=True)))


def untimed(lines: str) -> list[str]:
    """Lines of the log, without what time does to them."""
    return re.sub(
        r"(?<= in )[\d.]+s$|(?<=down after )\w+", "…", TIMESTAMP.sub("", lines), flags=re.MULTILINE
    ).splitlines()
