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
from typing import Any, get_args

import click
import pytest
from readme_text import BLOCKS, PYPROJECT, README, ROOT, prose, rows, section
from runs import Cull
from scripted_hub import ScriptedHub
from settings import settings_from
from terminal import LOGGED_AT, in_terminal

import cull_idle

SCOPES = ["list:users", "read:users:activity", "read:servers", "delete:servers"]  # what every pass needs


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


def listed(heading: str) -> list[str]:
    """The words that begin the items of the list under a heading."""
    return re.findall(r"^- `(\w+)`:", section(heading), re.MULTILINE)


def option_names() -> set[str]:
    command = cull_idle.make_command()
    ctx = click.Context(command, **command.context_settings)
    return {name for param in command.get_params(ctx) for name in param.opts}


def test_the_readme_lists_every_exit_code() -> None:
    assert [int(code) for code in listed("Exit codes")] == list(cull_idle.Exit)


def test_the_readme_explains_every_word_of_the_log() -> None:
    assert listed("What the log says") == [*get_args(cull_idle.Outcome), "deleted"]


def test_commands_in_the_readme_use_options_that_exist() -> None:
    commands = re.findall(r"(?:bin/cull-idle|[`$\n] ?cull-idle|cull_idle\.py|cull_idle,)(?=\W+-)[^|&`\n]*", README)
    used = {option for command in commands for option in re.findall(r"(?<=[\s\"'\[])--?[a-z][\w-]*", command)}
    assert used >= {"--once", "--dry-run", "--timeout", "--token-file", "-q", "-v"}
    assert used <= option_names()


def test_options_named_in_the_text_of_the_readme_exist() -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = {name.replace("IdleCuller.", "").replace("_", "-") for name in re.findall(r"`(--\w[\w.-]*)", text)}
    assert named - {"--reinstall"} <= option_names()  # which is uv's


def test_configuration_in_the_readme_is_taken(tmp_path: Path) -> None:
    (text,) = (block.text for block in BLOCKS if block.language == "toml")
    file = tmp_path / "cull-idle.toml"
    file.write_text(text)
    settings = settings_from("--config", str(file))
    assert settings.timeout == timedelta(hours=1)
    assert [rule.text for rule in settings.rule] == tomllib.loads(text)["rule"]


RULES = "Exempt users and groups, limit GPU servers"


def test_rules_in_the_readme_are_taken() -> None:
    shown = re.findall(r"--rule[ =]?(['\"])(.*?)\1|\"--rule=(.*?)\"", README)
    assert len(shown) >= 4
    for _, quoted, in_a_list in shown:
        cull_idle.parse_rule(quoted or in_a_list)


def test_the_readme_lists_all_that_rules_match() -> None:
    items = re.findall(r"^- (.*?):", section(RULES), re.MULTILINE)
    found = [re.match(r"(\w+)(\.KEY)?=", name) for item in items for name in re.findall("`(.*?)`", item)]
    assert {match[1] for match in found if match} == cull_idle.RULE_FIELDS.keys()


# What uses the features in the README's table of scopes, in its order.
FEATURES = [["--rule=group=gpu keep"], ["--rule=state.pod_name=x keep"], ["--idle-by=both"], ["--cull-users"]]


def test_the_readme_has_the_scope_of_each_feature() -> None:
    nobody = cull_idle.Identity("service", "x", frozenset())
    scopes = [scope for _, scope in rows("A service of the Hub")]
    for args, scope in zip(FEATURES, scopes, strict=True):
        missing = cull_idle.missing_scopes(nobody, settings_from("--timeout=1h", *args), to_cull=True)
        assert set(missing) - set(SCOPES) == {scope}
    assert {field.scope for field in cull_idle.RULE_FIELDS.values()} <= {*SCOPES, *scopes}


def test_the_arbiter_in_the_readme_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "arbiter.py"
    file.write_text(next(block.text for block in BLOCKS if "def my_cull_arbiter" in block.text))
    arbiter = cull_idle.load_arbiter(f"{file}:my_cull_arbiter")
    given = {"inactive": timedelta(hours=2), "inactive_limit": 3600, "user": {}}
    for name, culled in [("small", True), ("unlimited", False)]:
        arguments = {**given, "server": {"state": {"profile_name": name}}}
        assert arbiter.function(**{name: arguments[name] for name in arbiter.arguments}) == culled


def test_the_readme_lists_what_an_arbiter_is_given() -> None:
    listed, _, _ = prose("Your own decision: an arbiter").partition("A `cull_arbiter_hook`")
    assert (
        set(re.findall(r"`([a-z_]+)`", listed.partition("take these arguments:")[2])) - {"timedelta"}
        == cull_idle.ARBITER_ARGUMENTS
    )


@pytest.mark.parametrize("text", blocks("python"))
def test_python_in_the_readme_compiles(text: str) -> None:
    compile(text, "README.md", "exec")


def scopes_in(text: str) -> list[str]:
    """The scopes in a snippet, in quotes or without, in order."""
    return re.findall(r"\b(?:list|read|delete|admin):[a-z:_]+[a-z]", text)


@pytest.mark.parametrize("text", [block.text for block in BLOCKS if "scopes" in block.text])
def test_each_role_in_the_readme_has_the_scopes_that_a_pass_needs(text: str) -> None:
    """That they suffice, tests on a real Hub show."""
    assert scopes_in(text) == SCOPES


def test_the_program_checks_the_scopes_of_the_readme() -> None:
    """The Hub only leaves times out if it may not show them; so the program does not ask for that scope."""
    nobody = cull_idle.Identity("service", "x", frozenset())
    missing = cull_idle.missing_scopes(nobody, settings_from("--timeout", "1h"), to_cull=True)
    assert {*missing, "read:users:activity"} == set(SCOPES)


@pytest.mark.parametrize("scope", [scope for scope in SCOPES if scope != "read:users:activity"])
def test_the_program_names_a_scope_of_the_readme_that_is_missing(
    cull_scripted: Cull, scripted: ScriptedHub, scope: str
) -> None:
    scripted.scopes = [each for each in SCOPES if each != scope]
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == cull_idle.Exit.NO_HUB
    assert scopes_in(result.err)[0] == scope


def test_a_token_for_a_first_look_has_no_scope_to_change_anything(cull: Cull, scripted: ScriptedHub) -> None:
    (line,) = re.findall(r"enter `(.*?)`", prose("A first look"))
    assert line.split() == [*(scope for scope in SCOPES if not scope.startswith("delete")), "read:users:groups"]
    scripted.scopes = line.split()
    scripted.add("ann", idle=7230)
    result = cull("--dry-run", "--timeout", "1h", "--url", scripted.url, token=scripted.token)
    assert result.exit_code == 0
    assert "1 of 1 running" in result.out
    assert set(scopes_in(result.out)) == {"delete:servers"}


def test_the_script_needs_the_same_as_the_package() -> None:
    source = (ROOT / "cull_idle.py").read_text("utf-8")
    match = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source, re.MULTILINE)
    assert match
    script = tomllib.loads(re.sub(r"^# ?", "", match[1], flags=re.MULTILINE))
    project = PYPROJECT["project"]
    assert script == {key: project[key] for key in ("requires-python", "dependencies")}
    assert [*cull_idle.PACKAGES[:-1]] == project["dependencies"]  # and urllib3, which comes with requests


def test_the_sample_of_a_dry_run_is_what_the_demo_shows(cull: Cull, scripted: ScriptedHub) -> None:
    shown = sample("cull-idle --dry-run --timeout 1h")
    add_the_demos(scripted)
    result = cull("--dry-run", "--timeout", "1h", "--url", scripted.url, token=scripted.token)
    assert result.out.strip() == shown


def test_the_sample_of_a_pass_is_what_the_demo_shows_in_80_columns(scripted: ScriptedHub) -> None:
    shown = sample("cull-idle --once --timeout 1h")
    add_the_demos(scripted)
    scripted.slow_stop = 0
    screen = in_terminal(scripted, 80, "--timeout=1h").screen
    assert sorted(untimed(screen.rows)) == sorted(untimed(shown.splitlines()))


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


def untimed(lines: list[str]) -> list[str]:
    """Lines of the log in a terminal, without what time does to them."""
    return [re.sub(r"(?<= in )[\d.]+s$|(?<=down after )\w+", "…", LOGGED_AT.sub("…", line)) for line in lines]


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


def test_the_contents_list_every_section() -> None:
    contents, _, rest = README.partition("\n## ")
    titles = re.findall(r"^## (.*)$", f"## {rest}", re.MULTILINE)
    assert set(re.findall(r"\]\(#(.*?)\)", contents)) == anchors("\n".join(f"# {title}" for title in titles))


def test_the_readme_stays_short() -> None:
    assert len(README.split()) <= 3000
    assert max(map(len, README.splitlines())) <= 200


@pytest.mark.parametrize("text", blocks("sh"))
def test_a_shell_can_read_it(text: str) -> None:
    result = subprocess.run(["/bin/sh", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_service_has_one_name_and_not_the_littlest_jupyterhubs() -> None:
    """That has a service called cull-idle, with its admin role in the database."""
    texts = "\n".join(block.text for block in BLOCKS)
    names = re.findall(r'"name": "([\w-]+)"|hub\.services\.([\w-]+)\.|services: \[([\w-]+)\]', texts)
    assert {"".join(name) for name in names} == {"idle-stopper"}


# Completion

COMPLETED = r"""
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_cull_idle_completion cull-idle
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """An environment where cull-idle is on the PATH, and nothing else of ours."""
    command = tmp_path / "cull-idle"
    script = f"import sys; sys.argv[0] = {str(command)!r}; import cull_idle; sys.exit(cull_idle.main())"
    command.write_text(f"""#!/bin/sh\nexec {shlex.join([sys.executable, "-c", script])} "$@"\n""")
    command.chmod(0o755)
    return {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}


def completion_line() -> str:
    (line,) = re.findall(r"`(eval .*?)`", prose("Reference"))
    return str(line)


def test_bash_completes_options_after_the_line_of_the_readme(installed: dict[str, str]) -> None:
    def completed(*words: str) -> list[str]:
        command = ["bash", "--norc", "-c", completion_line() + COMPLETED, "bash", "cull-idle", *words]
        result = subprocess.run(command, env=installed, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.split()

    assert completed("--time") == ["--timeout"]
    assert completed("--once", "--cull-us") == ["--cull-users"]
    assert completed("--log-level", "warn") == ["warning"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_their_completion_by_the_words_of_the_readme(shell: str, installed: dict[str, str]) -> None:
    assert f"{shell}_source" in prose("Reference")
    result = subprocess.run(
        ["cull-idle"],
        env=installed | {"_CULL_IDLE_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert {"zsh": "compdef", "fish": "complete"}[shell] in result.stdout
