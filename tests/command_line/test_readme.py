"""The README says of the program what is true of it."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from conftest import TIMESTAMP, Cull
from scripted_hub import ScriptedHub

import cull_idle

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
OF_TESTS = (ROOT / "tests/README.md").read_text("utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


class Block(NamedTuple):
    """A block of code in the README, or a file of deploy."""

    language: str
    text: str


class Row(NamedTuple):
    """An option, as --help and the README's tables have it."""

    option: str
    default: str


def code_blocks() -> list[Block]:
    found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
    return [Block(language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]


BLOCKS = code_blocks()
DEPLOY = {file.name: file.read_text("utf-8") for file in sorted((ROOT / "deploy").iterdir())}
SCOPES = ["list:users", "read:users:activity", "read:servers", "delete:servers"]  # what every pass needs


def blocks(*languages: str) -> list[Any]:
    chosen = [block for block in BLOCKS if block.language in languages]
    assert chosen, f"the README has no block of {languages}"
    return [pytest.param(block.text, id=f"{block.language}-{number}") for number, block in enumerate(chosen, 1)]


def section(heading: str) -> str:
    """What stands under a heading, up to the next one."""
    parts = re.split(r"^#+ (.*)\n", README, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert heading in found, f"the README has no heading {heading}"
    return found[heading]


def prose(heading: str) -> str:
    """The same, wherever its lines are broken."""
    return " ".join(section(heading).split())


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two rows."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [
        [cell.strip().strip("`").replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines[2:]
    ]


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


def settings_from(*args: str) -> cull_idle.Settings:
    ctx = cull_idle.make_command().make_context(cull_idle.PROGRAM, list(args))
    return cull_idle.Settings(**ctx.params)


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
    texts = [*(block.text for block in BLOCKS), *DEPLOY.values()]
    commands = [
        command
        for text in texts
        for command in re.findall(
            r"(?:bin/cull-idle|^cull-idle|&& cull-idle|cull_idle\.py)(?=\W+-)[^|&]*", text, re.MULTILINE
        )
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
    shown = [rule for rule, _ in rows("Rules")]
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
    listed, _, _ = prose("Your own decision: an arbiter").partition("A `cull_arbiter_hook`")
    assert (
        set(re.findall(r"`([a-z_]+)`", listed.partition("arguments that it takes:")[2])) - {"timedelta"}
        == cull_idle.ARBITER_ARGUMENTS
    )


@pytest.mark.parametrize("text", blocks("python"))
def test_python_in_the_readme_compiles(text: str) -> None:
    compile(text, "README.md", "exec")


def scopes_in(text: str) -> list[str]:
    """The scopes in a snippet, in quotes or without, in order."""
    return re.findall(r"\b(?:list|read|delete|admin):[a-z:_]+", text)


@pytest.mark.parametrize("text", [block.text for block in BLOCKS if "scopes" in block.text])
def test_each_role_in_the_readme_has_the_scopes_that_a_pass_needs(text: str) -> None:
    """That they suffice, tests on a real Hub show."""
    assert scopes_in(text) == SCOPES


@pytest.mark.parametrize("scope", [scope for scope in SCOPES if scope != "read:users:activity"])
def test_the_program_names_a_scope_of_the_readme_that_is_missing(
    cull_scripted: Cull, scripted: ScriptedHub, scope: str
) -> None:
    scripted.scopes = [each for each in SCOPES if each != scope]
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == cull_idle.Exit.NO_HUB
    assert f"lacks {scope}" in result.err


def test_a_token_for_a_first_look_has_no_scope_to_change_anything(cull: Cull, scripted: ScriptedHub) -> None:
    (line,) = re.findall(r"enter `(.*?)`", prose("A first look"))
    assert line.split() == [scope for scope in SCOPES if not scope.startswith("delete")]
    scripted.scopes = line.split()
    scripted.add("ann", idle=7230)
    result = cull("--dry-run", "--timeout", "1h", "--url", scripted.url, token=scripted.token)
    assert result.exit_code == 0
    assert "1 of 1 running" in result.out


def test_the_extra_scope_is_named_beside_the_first_rule(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    before, _, _ = prose("Rules").partition("--rule 'group=")
    (extra,) = re.findall(r"needs the scope `(.*?)`", before)
    scripted.scopes = SCOPES
    result = cull_scripted("--rule", "group=gpu timeout=30m")
    assert result.exit_code == cull_idle.Exit.NO_HUB
    assert f"lacks {extra}" in result.err


def test_the_script_needs_the_same_as_the_package() -> None:
    source = (ROOT / "cull_idle.py").read_text("utf-8")
    match = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source, re.MULTILINE)
    assert match
    script = tomllib.loads(re.sub(r"^# ?", "", match[1], flags=re.MULTILINE))
    project = PYPROJECT["project"]
    assert script == {key: project[key] for key in ("requires-python", "dependencies")}
    for requirement in project["dependencies"]:
        assert f"'{requirement}'" in section("Install")


def test_the_sample_of_a_dry_run_is_what_the_demo_shows(cull: Cull, scripted: ScriptedHub) -> None:
    shown = sample("cull-idle --dry-run --timeout 1h")
    add_the_demos(scripted)
    result = cull("--dry-run", "--timeout", "1h", "--url", scripted.url, token=scripted.token)
    assert result.out.strip() == shown


def test_the_sample_of_a_pass_is_what_the_demo_shows(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    shown = sample("cull-idle --once --timeout 1h")
    add_the_demos(scripted)
    scripted.slow_stop = 0
    assert len(TIMESTAMP.findall(shown)) == len(shown.splitlines())
    assert sorted(untimed(cull_scripted("--timeout", "1h").err)) == sorted(untimed(shown))


def test_the_sample_of_an_explanation_is_what_the_program_prints(cull: Cull, scripted: ScriptedHub) -> None:
    command = 'cull-idle --explain ann/gpu --timeout 1h --rule "group=gpu timeout=30m"'
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


def demo() -> Any:
    """The demo, as a module."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tests/by_hand/demo.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # where its classes are looked for
    spec.loader.exec_module(module)
    return module


def add_the_demos(scripted: ScriptedHub) -> None:
    """Put the demo's servers on the Hub, but for the one that is still starting."""
    for each in demo().SERVERS:
        if each.after != "starting":
            scripted.add(
                each.name, each.server, idle=each.options["idle_seconds"], age=each.options["age_seconds"]
            ).stop_seconds = 60 * (each.after == "stopping")


def untimed(lines: str) -> list[str]:
    """Lines of the log, without what time does to them."""
    return re.sub(
        r"(?<= in )[\d.]+s$|(?<=down after )\w+", "…", TIMESTAMP.sub("", lines), flags=re.MULTILINE
    ).splitlines()


# What a reader clicks, and what a shell reads


def anchors(markdown: str) -> set[str]:
    """What GitHub makes of the headings."""
    text = re.sub(r"^ *```.*?^ *```$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("file", ["README.md", "tests/README.md"])
def test_links_lead_somewhere(file: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    links = [link for link in re.findall(r"\]\((.*?)\)", text) if not link.startswith("https:")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = ROOT / Path(file).parent / path if path else ROOT / file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


def test_the_table_of_contents_lists_every_section() -> None:
    contents, _, rest = README.partition("\n## ")
    listed = re.findall(r"\]\(#(.*?)\) ?(?:·|\\?$)", contents, re.MULTILINE)
    titles = re.findall(r"^## (.*)$", f"## {rest}", re.MULTILINE)
    assert set(listed) == anchors("\n".join(f"# {title}" for title in titles)) - {"license"}
    assert len(listed) == len(set(listed))


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 640
    assert max(map(len, README.splitlines())) <= 250


@pytest.mark.parametrize("text", [*blocks("sh"), *(pytest.param(DEPLOY[name], id=name) for name in ("notify-mail",))])
def test_a_shell_can_read_it(text: str) -> None:
    result = subprocess.run(["/bin/sh", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_files_that_the_readme_copies_exist_and_none_is_forgotten() -> None:
    named = set(re.findall(r"deploy/([\w@.-]+\w)", README))
    assert named == set(DEPLOY)


def test_the_service_has_one_name_and_not_the_littlest_jupyterhubs() -> None:
    """That has a service called cull-idle, with its admin role in the database."""
    texts = "\n".join([*(block.text for block in BLOCKS), *DEPLOY.values()])
    names = re.findall(r'"name": "([\w-]+)"|hub\.services\.([\w-]+)\.|services: \[([\w-]+)\]', texts)
    assert {"".join(name) for name in names} == {"idle-stopper"}
