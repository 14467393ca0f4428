"""What the README says under "Keep it running" is taken out of it, and run or checked.

Its paths are put below a directory of the test's; but for that, and the Hub's URL, everything is used as it stands.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hub import RealHub
from readme_text import BLOCKS, PYPROJECT, ROOT, section
from settings import settings_from

import cull_idle

SCRIPT = Path(cull_idle.__file__)
COMMAND = "/opt/cull-idle/bin/cull-idle"
IDLE = 2 * 3600 + 90

yaml = import_module("yaml")  # they have no types
kubernetes_validate = import_module("kubernetes_validate")


def shown(language: str, heading: str) -> list[str]:
    """The blocks of a language under a heading of the README."""
    found = [block.text for block in BLOCKS if block.language == language and block.text in section(heading)]
    assert found, f"no {language} under {heading}"
    return found


class Machine:
    """A directory that stands for the root of a machine with cull-idle and its token, as the README installs them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pids_file = root / "pids"
        command = Path(self.under(COMMAND))
        command.parent.mkdir(parents=True)
        words = shlex.join([sys.executable, str(SCRIPT)])
        command.write_text(f'#!/bin/sh\necho $$ >> {shlex.quote(str(self.pids_file))}\nexec {words} "$@"\n')
        command.chmod(0o755)
        self.token = Path(self.under("/etc/cull-idle/token"))
        self.token.parent.mkdir(parents=True)

    def under(self, text: str) -> str:
        """The text with the README's paths below this directory."""
        return re.sub(r"/(opt|etc)/cull-idle\b", lambda path: f"{self.root}{path[0]}", text)

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """What a shell makes of a command, with nothing else in its environment."""
        return subprocess.run(
            ["/bin/sh", "-c", command],
            env=environment,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def pids(self) -> list[int]:
        """The processes that cull-idle was started as, the latest one last."""
        return [int(pid) for pid in self.pids_file.read_text().split()] if self.pids_file.exists() else []

    def alive(self) -> list[int]:
        return [pid for pid in self.pids() if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")  # where there is none, nobody has ended one that nobody waits for
        return not status.parent.parent.exists() or ") Z " not in status.read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until(condition: Callable[[], object], hub: RealHub, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, hub.log()[-4000:]
        time.sleep(0.05)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# A service that the Hub manages

WITH_ROLE, WITHOUT_ROLES = range(2)  # the blocks, in the README's order

# RealHub's configuration says who the admins are, where there are roles.
LIST_ADMIN = """
if jupyterhub.version_info >= (2,):
    c.JupyterHub.load_roles[0]["services"].append("cull-idle")
"""


class Managed:
    """A Hub that starts cull-idle as the README says, but looks every second."""

    def __init__(self, root: Path, block: int, more_config: str = "", **options: Any) -> None:
        self.machine = Machine(root)
        text = shown("python", "A service that the Hub manages")[block]
        often = 'c.JupyterHub.services[-1]["environment"] = {"CULL_IDLE_CULL_EVERY": "1s"}\n'
        self.hub = RealHub(extra_config=self.machine.under(text) + often + more_config, **options)

    def __enter__(self) -> Managed:
        self.hub.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hub.__exit__(*error)
        for pid in self.machine.alive():
            os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the Hub, and let it clean nothing up."""
        assert self.hub._process
        self.hub._process.kill()
        self.hub.stop()

    def assert_culls(self) -> None:
        culled = "culled idle: idle 2h01m, limit 1h"
        before = self.hub.log().count(culled)
        self.hub.spawn("busy", idle_seconds=60)
        self.hub.spawn("idle", wait=False, idle_seconds=IDLE)
        wait_until(lambda: self.hub.log().count(culled) > before, self.hub)
        assert self.hub.running() == {"busy"}
        self.hub.clear()

    def assert_stops(self) -> None:
        """It takes 5 seconds at most; on a machine with more to do they may be 10."""
        said = self.hub.log().count("told to stop")
        began = time.monotonic()
        self.hub.stop()
        wait_until(lambda: not self.machine.alive(), self.hub, began + 10 - time.monotonic())
        assert self.hub.log().count("told to stop") == said + 1


@pytest.fixture(scope="module", params=[False, True], ids=["http", "internal_ssl"])
def managed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    with Managed(tmp_path_factory.mktemp("machine"), WITH_ROLE, internal_ssl=request.param) as managed:
        yield managed


def test_the_hub_starts_it_and_it_culls(managed: Managed) -> None:
    managed.assert_culls()
    assert len(managed.machine.alive()) == 1


@pytest.mark.parametrize("managed", [False], ids=["http"], indirect=True)
def test_it_survives_a_hub_that_is_killed_and_started_again(managed: Managed) -> None:
    (old,) = managed.machine.alive()
    managed.kill()
    wait_until(lambda: "refuses the connection" in managed.hub.log(), managed.hub)
    managed.hub.start()
    os.kill(managed.machine.pids()[-1], signal.SIGKILL)  # the new one: the Hub knows nothing of the old one
    managed.assert_culls()
    assert old in managed.machine.alive()
    os.kill(old, signal.SIGKILL)


def test_it_is_there_again_after_a_restart_of_the_hub(managed: Managed) -> None:
    before = managed.machine.pids()
    managed.hub.restart()
    managed.assert_culls()
    (new,) = managed.machine.alive()
    assert new not in before


def test_it_ends_when_the_hub_stops(managed: Managed) -> None:
    managed.assert_stops()


def test_before_roles_an_admin_service_does(tmp_path: Path) -> None:
    """Hubs with roles take it too; with HUB_PYTHON=/an/older/hubs/bin/python it is shown for one without."""
    python = os.environ.get("HUB_PYTHON", sys.executable)
    with Managed(tmp_path, WITHOUT_ROLES, LIST_ADMIN, python=python) as managed:
        managed.assert_culls()
        managed.assert_stops()


# cron

CRONTAB = {"HOME": "/root", "LOGNAME": "root", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}  # all that cron sets


def cron_command() -> str:
    (text,) = shown("crontab", "cron")
    match = re.fullmatch(r"(?:(?:\*(?:/\d+)?|\d+) ){5}([^%\n]*)\n", text)  # in a crontab a % ends the command
    assert match
    return match[1]


def test_the_cron_line_culls_and_says_nothing(machine: Machine, hub: RealHub) -> None:
    hub.spawn("idle", idle_seconds=IDLE)
    hub.spawn("busy", idle_seconds=60)
    machine.token.write_text(f"{hub.culler_token}\n")
    result = machine.run(f"{machine.under(cron_command())} --url {hub.url}", **CRONTAB)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    assert hub.running() == {"busy"}


def test_the_cron_line_says_what_failed(machine: Machine, hub: RealHub) -> None:
    machine.token.write_text("unknown\n")
    result = machine.run(f"{machine.under(cron_command())} --url {hub.url}", **CRONTAB)
    assert result.returncode == cull_idle.Exit.NO_HUB
    assert len(result.stderr.splitlines()) == 1


# systemd

Unit = dict[str, dict[str, list[str]]]  # sections, directives, and their values
KNOWN = {
    "Unit": {"Description"},
    "Timer": {"OnCalendar"},
    "Install": {"WantedBy"},
    "Service": {
        "CapabilityBoundingSet",
        "DynamicUser",
        "ExecStart",
        "LoadCredential",
        "LockPersonality",
        "MemoryDenyWriteExecute",
        "PrivateDevices",
        "PrivateUsers",
        "ProcSubset",
        "ProtectClock",
        "ProtectControlGroups",
        "ProtectHome",
        "ProtectHostname",
        "ProtectKernelLogs",
        "ProtectKernelModules",
        "ProtectKernelTunables",
        "ProtectProc",
        "Restart",
        "RestartPreventExitStatus",
        "RestartSec",
        "RestrictAddressFamilies",
        "RestrictNamespaces",
        "RestrictRealtime",
        "SystemCallArchitectures",
        "SystemCallErrorNumber",
        "SystemCallFilter",
        "Type",
        "UMask",
    },
}


def parse_unit(text: str) -> Unit:
    unit: Unit = {}
    for line in text.splitlines():
        if line.startswith("["):
            current = unit.setdefault(line[1:-1], {})
        elif line:
            key, _, value = line.partition("=")
            current.setdefault(key, []).append(value)
    return unit


def with_lines(unit: Unit, lines: Unit) -> Unit:
    """The same unit, with these lines in place of its own."""
    return {name: {**unit.get(name, {}), **lines.get(name, {})} for name in {**unit, **lines}}


def readme_units() -> Mapping[str, Unit]:
    service, timer = map(parse_unit, shown("ini", "A systemd timer"))
    (loop,) = map(parse_unit, shown("ini", "A systemd service"))
    (template,) = map(parse_unit, shown("ini", "Many Hubs, several replicas"))
    return {
        "cull-idle.service": service,
        "cull-idle.timer": timer,
        "cull-idle-loop.service": with_lines(service, loop),
        "cull-idle@.service": with_lines(service, template),
        "cull-idle@.timer": timer,
    }


UNITS = readme_units()
SERVICES = [name for name in UNITS if name.endswith(".service")]


def words_of(name: str, credentials: str = "/credentials") -> list[str]:
    """What a service executes."""
    (line,) = UNITS[name]["Service"]["ExecStart"]
    return [word.replace("${CREDENTIALS_DIRECTORY}", credentials) for word in line.split()]


@pytest.fixture
def unit_files(machine: Machine) -> dict[str, Path]:
    """The units, as files that systemd can read."""
    files = {}
    for name, unit in UNITS.items():
        lines = [
            line
            for title, directives in unit.items()
            for line in [f"[{title}]", *(f"{key}={value}" for key in directives for value in directives[key])]
        ]
        files[name] = machine.root / name
        files[name].write_text(machine.under("\n".join(lines)) + "\n")
    return files


def systemd_analyze(*args: str | Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which("systemd-analyze"):
        pytest.skip("this machine has no systemd-analyze, and pip cannot install it")
    return subprocess.run(["systemd-analyze", *args], capture_output=True, text=True, timeout=60, check=False)


def test_systemd_takes_the_units(unit_files: dict[str, Path]) -> None:
    result = systemd_analyze("verify", "--man=no", *unit_files.values())
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize("name", SERVICES)
def test_systemd_finds_a_service_as_hardened_as_the_readme_says(name: str, unit_files: dict[str, Path]) -> None:
    match = re.search(r"an exposure of (\d)\.(\d)", section("A systemd timer"))
    assert match
    result = systemd_analyze("security", "--offline=true", f"--threshold={match[1]}{match[2]}", unit_files[name])
    assert result.returncode == 0, result.stdout + result.stderr


def test_units_have_no_line_that_systemd_would_ignore() -> None:
    for name, unit in UNITS.items():
        for title, directives in unit.items():
            assert directives.keys() <= KNOWN[title], name


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_handed_what_its_command_reads(name: str, machine: Machine) -> None:
    command, *args = words_of(name, str(machine.root / "credentials"))
    assert command == COMMAND
    (machine.root / "credentials").mkdir()
    for credential in UNITS[name]["Service"]["LoadCredential"]:
        (machine.root / "credentials" / credential.split(":")[0]).write_text("")
    settings = settings_from(*args)
    assert settings.token_file
    assert Path(settings.token_file).exists()
    assert settings.once == (UNITS[name]["Service"]["Type"] == ["oneshot"])


def test_a_service_of_a_timer_culls(machine: Machine, hub: RealHub) -> None:
    hub.spawn("idle", idle_seconds=IDLE)
    machine.token.write_text(hub.culler_token)
    command = machine.under(shlex.join(words_of("cull-idle.service", "/etc/cull-idle")))
    result = machine.run(f"{command} --url {hub.url}", PATH="/usr/bin:/bin")
    assert (result.returncode, hub.running()) == (0, set())


def test_a_template_reads_the_configuration_of_its_hub(machine: Machine, hub: RealHub) -> None:
    hub.spawn("idle", idle_seconds=IDLE)
    loaded = dict(line.split(":") for line in UNITS["cull-idle@.service"]["Service"]["LoadCredential"])
    assert loaded == {"config": "/etc/cull-idle/%i.toml", "token": "/etc/cull-idle/%i.token"}
    machine.token.write_text(hub.culler_token)
    (machine.token.parent / "config").write_text(f'url = "{hub.url}"\ntimeout = "1h"\n')
    command = machine.under(shlex.join(words_of("cull-idle@.service", "/etc/cull-idle")))
    result = machine.run(command, PATH="/usr/bin:/bin")
    assert (result.returncode, hub.running()) == (0, set())


# Kubernetes

MANIFESTS, CHART, CHART_TOKEN = shown("yaml", "Kubernetes")
SECRET, CRON_JOB = yaml.safe_load_all(MANIFESTS)


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = CRON_JOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return spec


def with_token_of_the_chart() -> dict[str, Any]:
    """The cron job with the volume that the README shows for Zero to JupyterHub."""
    changed: dict[str, Any] = yaml.safe_load(yaml.safe_dump(CRON_JOB))
    changed["spec"]["jobTemplate"]["spec"]["template"]["spec"].update(yaml.safe_load(CHART_TOKEN))
    return changed


@pytest.mark.parametrize("version", ["1.25", "1.37"])
@pytest.mark.parametrize("manifest", [SECRET, CRON_JOB, with_token_of_the_chart()], ids=["secret", "job", "chart's"])
def test_kubernetes_takes_the_manifests(manifest: dict[str, Any], version: str) -> None:
    assert kubernetes_validate.validate(manifest, version, strict=True) == version


def test_a_pod_may_do_nothing_but_ask_the_hub() -> None:
    (container,) = pod()["containers"]
    assert CRON_JOB["spec"]["concurrencyPolicy"] == "Forbid"
    assert pod()["securityContext"]["runAsNonRoot"]
    assert not pod()["automountServiceAccountToken"]
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("token", ["Secret", "chart's"])
def test_a_pod_culls_with_the_token_it_is_handed(token: str, machine: Machine, hub: RealHub) -> None:
    hub.spawn("idle", idle_seconds=IDLE)
    (container,) = pod()["containers"]
    (mount,) = container["volumeMounts"]
    job = CRON_JOB if token == "Secret" else with_token_of_the_chart()
    (volume,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"]
    assert mount["name"] == volume["name"]
    if token == "Secret":
        assert volume["secret"] == {"secretName": SECRET["metadata"]["name"]}
        (file,) = SECRET["stringData"]
    else:
        (item,) = volume["secret"]["items"]
        (service,) = yaml.safe_load(CHART)["hub"]["services"]
        assert item["key"] == f"hub.services.{service}.apiToken"  # as the chart calls it
        file = item["path"]
    Path(machine.under(mount["mountPath"]), file).write_text(hub.culler_token)

    dockerfile, image_args = shown("dockerfile", "Kubernetes")[0], container["args"]
    entrypoint = ast.literal_eval(docker_lines(dockerfile)["ENTRYPOINT"])
    assert entrypoint == [Path(COMMAND).name]
    args = machine.under(shlex.join(image_args)).replace("http://hub:8081/hub/api", hub.url)
    result = machine.run(f"{machine.under(COMMAND)} {args}", PATH="/usr/bin:/bin")
    assert (result.returncode, hub.running()) == (0, set())


def docker_lines(dockerfile: str) -> dict[str, str]:
    return dict(line.split(" ", maxsplit=1) for line in dockerfile.splitlines())


def test_an_image_gets_all_that_an_installation_needs() -> None:
    lines = docker_lines(shown("dockerfile", "Kubernetes")[0])
    *files, folder = lines["COPY"].split()
    project = PYPROJECT["project"]
    needed = {
        "pyproject.toml",
        project["readme"],
        *project["license-files"],
        PYPROJECT["tool"]["hatch"]["version"]["path"],
    }
    assert set(files) == needed
    assert all((ROOT / file).is_file() for file in files)
    assert f"{lines['RUN']}/" == f"pip install --no-cache-dir {folder}"
    assert "cull-idle" in project["scripts"]
    user = pod()["securityContext"]
    assert lines["USER"] == f"{user['runAsUser']}:{user['runAsGroup']}"


def test_the_charts_values_name_a_service_and_its_role() -> None:
    values = yaml.safe_load(CHART)
    (service,) = values["hub"]["services"]
    (role,) = values["hub"]["loadRoles"].values()
    assert role == {"services": [service], "scopes": scopes(cull_idle.role_for(settings_from(), None))}


def test_a_managed_service_has_the_scopes_that_the_program_asks_for() -> None:
    shown_scopes = scopes(shown("python", "A service that the Hub manages")[WITH_ROLE])
    assert shown_scopes == scopes(cull_idle.role_for(settings_from(), None))


def scopes(text: str) -> list[str]:
    return re.findall(r'"([a-z]+:[a-z:]+)"', text)
