"""What README.md says of the program is true. Its snippets are run by tests/real_hub/test_deployment.py."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import get_args

import click
import pytest
from readme_text import BLOCKS, PYPROJECT, README, ROOT, prose, rows, section
from runs import Cull
from scripted_hub import LONG_AGO, ScriptedHub
from settings import SettingsOf

import cull_idle

SCOPES = ["list:users", "read:users:activity", "read:servers", "delete:servers"]  # what every pass needs
RULES = "Exempt users and groups, limit GPU servers"


def listed(heading: str) -> list[str]:
    """The words that begin the items of the list under a heading."""
    return re.findall(r"^- `(\w+)`:", section(heading), re.MULTILINE)


def test_it_has_3000_words_at_most() -> None:
    assert len(README.split()) <= 3000


def test_it_lists_the_exit_codes_and_the_words_of_the_log() -> None:
    assert listed("Exit codes") == [str(int(code)) for code in cull_idle.Exit]
    assert listed("What the log says") == [*get_args(cull_idle.Outcome), "deleted"]


def test_all_options_that_it_names_exist() -> None:
    command = cull_idle.make_command()
    ctx = click.Context(command, **command.context_settings)
    known = {name for param in command.get_params(ctx) for name in param.opts}
    commands = re.findall(r"(?:bin/cull-idle|[`$\n] ?cull-idle|cull_idle\.py|cull_idle,)(?=\W+-)[^|&`\n]*", README)
    used = {option for command in commands for option in re.findall(r"(?<=[\s\"'\[])--?[a-z][\w-]*", command)}
    text = re.sub(r"^ *```.*?^ *```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`(--\w[\w.-]*)", text))
    assert len(used) > 10
    assert len(named) > 20
    assert (used | named) - known == {"--reinstall"}  # which is uv's


def test_its_numbers_are_those_of_the_program(cull: Cull, settings_of: SettingsOf) -> None:
    def number(pattern: str) -> str:
        (found,) = re.findall(pattern, README)
        return str(found)

    settings = settings_of()
    assert settings.timeout == timedelta(minutes=int(number(r"`--timeout` \(default: (\d+) minutes\)")))
    assert settings.api_page_size == int(number(r"`--api-page-size` is (\d+)"))
    least = cull_idle.parse_duration(number(r"Set no timeout below (\w+)\."))
    assert not cull(f"--timeout={least.total_seconds()}").warnings
    assert cull(f"--timeout={least.total_seconds() - 1}").warnings
    timeout, interval = re.findall(r"With `--timeout=(\w+)`, a pass starts every (\d+) minutes", README)[0]
    assert settings_of(f"--timeout={timeout}").interval == timedelta(minutes=int(interval))


# Rules, scopes, arbiters


def test_its_rules_are_taken() -> None:
    shown = re.findall(r"--rule[ =]?(['\"])(.*?)\1|\"--rule=(.*?)\"", README)
    assert len(shown) >= 4
    for _, quoted, in_a_list in shown:
        cull_idle.parse_rule(quoted or in_a_list)


def test_it_lists_all_that_rules_match() -> None:
    items = re.findall(r"^- (.*?):", section(RULES), re.MULTILINE)
    found = [re.match(r"(\w+)(\.KEY)?=", name) for item in items for name in re.findall("`(.*?)`", item)]
    assert {match[1] for match in found if match} == cull_idle.RULE_FIELDS.keys()


FEATURES = ["--rule=group=gpu keep", "--rule=state.pod_name=x keep", "--idle-by=both", "--cull-users"]  # of its table
OF_FEATURES = [scope for _, scope in rows("A service of the Hub")]
NEEDED = [(None, scope) for scope in SCOPES if scope != "read:users:activity"]  # without which a Hub leaves times out


@pytest.mark.parametrize(("option", "scope"), [*zip(FEATURES, OF_FEATURES, strict=True), *NEEDED])
def test_a_scope_that_it_names_is_needed(
    cull_scripted: Cull, scripted: ScriptedHub, option: str | None, scope: str
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    options = ["--timeout=1h", *([option] if option else [])]
    scripted.scopes = [each for each in (*SCOPES, "read:users:name") if each != scope]
    failed = cull_scripted(*options)
    assert failed.exit_code == 3
    assert json.loads(failed.err.rpartition("load_roles.append")[2].strip("()\n"))["scopes"] == [scope]
    scripted.scopes.append(scope)
    assert cull_scripted(*options).outcomes == {"ann": "culled"}


def test_its_table_has_the_scope_of_all_that_a_rule_matches() -> None:
    assert {field.scope for field in cull_idle.RULE_FIELDS.values()} <= {*SCOPES, *OF_FEATURES}


@pytest.mark.parametrize("text", [block.text for block in BLOCKS if "scopes" in block.text])
def test_each_role_has_the_scopes_of_a_pass_and_no_more(text: str) -> None:
    assert re.findall(r"\b(?:list|read|delete|admin):[a-z:_]+[a-z]", text) == SCOPES


def test_its_arbiter_decides(cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path) -> None:
    file = tmp_path / "arbiter.py"
    file.write_text(next(block.text for block in BLOCKS if "def my_cull_arbiter" in block.text))
    scripted.scopes.append("admin:server_state")
    for name, state, idle in (("ann", "small", LONG_AGO), ("bob", "unlimited", LONG_AGO), ("cat", "small", 60)):
        scripted.add(name, idle=idle, state={"profile_name": state})
    result = cull_scripted("--timeout=1h", f"--arbiter={file}:my_cull_arbiter", "-v")
    assert result.outcomes == {"ann": "culled", "bob": "kept", "cat": "kept"}


def test_it_lists_what_an_arbiter_is_given() -> None:
    listed, _, _ = prose("Your own decision: an arbiter").partition("```")
    names = set(re.findall(r"`([a-z_]+)`", listed.partition("take these arguments:")[2]))
    assert names - {"timedelta"} == cull_idle.ARBITER_ARGUMENTS


# Samples


def demo() -> ModuleType:
    """The demo, as a module."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tests/by_hand/demo.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # where its classes are looked for
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", ["--dry-run --timeout 1h", "--once --timeout 1h"])
def test_its_samples_are_what_the_demo_shows(cull_scripted: Cull, scripted: ScriptedHub, command: str) -> None:
    console = "".join(block.text for block in BLOCKS if block.language == "console")
    shown = console.partition(f"$ cull-idle {command}\n")[2].partition("\n$ ")[0].strip().splitlines()
    for each in demo().SERVERS:
        if each.after != "starting":
            idle, age = each.options["idle_seconds"], each.options["age_seconds"]
            slow = 60 if each.after == "stopping" else 0
            scripted.add(each.name, each.server, idle=idle, age=age, stop_seconds=slow)
    scripted.slow_stop = 0
    result = cull_scripted(*command.split())
    if "--dry-run" in command:
        assert result.out.splitlines() == shown
    else:
        assert untimed(result.lines) == untimed(shown)
        assert max(map(len, shown)) <= 80


def untimed(lines: list[str]) -> list[str]:
    """Lines of the log without what time does to them, sorted."""
    return sorted(re.sub(r"^[\d:]{8} |(?<= in )[\d.]+s$|(?<=down after )\w+", "", line) for line in lines)


# What a reader clicks, installs and pastes


def anchors(markdown: str) -> set[str]:
    """What GitHub makes of the headings."""
    text = re.sub(r"^ *```.*?^ *```$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


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


def test_the_service_has_one_name_and_not_the_littlest_jupyterhubs() -> None:
    """That has a service called cull-idle, with its admin role in the database."""
    texts = "\n".join(block.text for block in BLOCKS)
    names = re.findall(r'"name": "([\w-]+)"|hub\.services\.([\w-]+)\.|services: \[([\w-]+)\]', texts)
    assert {"".join(name) for name in names} == {"idle-stopper"}


def test_the_script_needs_the_same_as_the_package() -> None:
    source = (ROOT / "cull_idle.py").read_text("utf-8")
    (metadata,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", source, re.MULTILINE)
    script = tomllib.loads(re.sub(r"^# ?", "", metadata, flags=re.MULTILINE))
    assert script == {key: PYPROJECT["project"][key] for key in ("requires-python", "dependencies")}
    assert [*cull_idle.PACKAGES[:-1]] == script["dependencies"]  # and urllib3, which comes with requests


COMPLETED = """
COMP_WORDS=(cull-idle "$@") COMP_CWORD=$#
_cull_idle_completion cull-idle
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """An environment where cull-idle is on the PATH, and nothing else of ours."""
    command = tmp_path / "cull-idle"
    script = f"import sys; sys.argv[0] = {str(command)!r}; import cull_idle; sys.exit(cull_idle.main())"
    command.write_text(f"""#!/bin/sh\nexec {shlex.join([sys.executable, "-c", script])} "$@"\n""")
    command.chmod(0o755)
    return {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("words", "completed"),
    [("--time", "--timeout"), ("--once --cull-us", "--cull-users"), ("--log-level warn", "warning")],
)
def test_bash_completes_after_its_line(installed: dict[str, str], words: str, completed: str) -> None:
    (line,) = re.findall(r"`(eval .*?)`", prose("Reference"))
    command = ["bash", "--norc", "-c", line + COMPLETED, "bash", *words.split()]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [completed], "")


@pytest.mark.parametrize(("shell", "word"), [("zsh", "compdef"), ("fish", "complete")])
def test_other_shells_get_their_completion(installed: dict[str, str], shell: str, word: str) -> None:
    assert f"`{shell}_source`" in prose("Reference")
    env = installed | {"_CULL_IDLE_COMPLETE": f"{shell}_source"}
    done = subprocess.run(["cull-idle"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, word in done.stdout, done.stderr) == (0, True, "")
