"""What the README says of running it is run or checked.

Its paths are put below a directory of the test's; but for that, and the Hub's URL, everything is used as it stands.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import requests
from hub import IDLE, IDLE_USER, RealHub
from readme_text import BLOCKS, PYPROJECT, README, ROOT, prose, section
from settings import settings_from

import cull_idle

CONFIG = ROOT / "tests/helpers/hub/jupyterhub_config.py"
SCRIPT = Path(cull_idle.__file__)
COMMAND = "/opt/cull-idle/bin/cull-idle"

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
        self.bin = root / "usr/local/bin"
        self.bin.mkdir(parents=True)
        (link,) = (
            line
            for text in shown("sh", "Install and a first look")
            for line in text.splitlines()
            if line.startswith("ln ")
        )
        link = self.under(link.partition(" && ")[0]).replace("/usr/local/bin", str(self.bin))
        assert self.run(link, PATH="/usr/bin:/bin").returncode == 0

    def under(self, text: str) -> str:
        """The text with the README's paths below this directory."""
        return re.sub(r"/(opt|etc)/cull-idle\b", lambda path: f"{self.root}{path[0]}", text)

    def run(self, command: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """What a shell makes of a command, with nothing else in its environment."""
        return subprocess.run(
            ["/bin/sh", "-c", command],
            env=environment,
            cwd=self.root,
            input=stdin,
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


# A first look


@pytest.fixture(scope="module")
def hub_with_an_admin() -> Iterator[RealHub]:
    with RealHub(extra_config='c.Authenticator.admin_users = {"admin"}\n') as hub:
        hub.spawn("idle", **IDLE)
        hub.spawn("admin", idle_seconds=60)
        yield hub


def assert_first_look(machine: Machine, hub: RealHub) -> None:
    """The README's first dry run shows what is idle."""
    (command,) = (text for text in shown("sh", "A first look") if "--dry-run" in text)
    result = machine.run(f"{command.strip()} --url {hub.url}", PATH=f"{machine.bin}:/usr/bin:/bin")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^idle +2h0\dm ", result.stdout, re.MULTILINE)
    assert hub.running() == {"idle", "admin"}


def test_a_token_of_the_token_page_is_enough_for_a_first_look(machine: Machine, hub_with_an_admin: RealHub) -> None:
    hub = hub_with_an_admin
    (scopes,) = re.findall(r"enter `(.*?)`", prose("A first look"))
    page = "/users/admin/tokens"  # what the page asks
    owner = {"Authorization": f"token {hub.api('POST', page).json()['token']}"}
    asked = {"scopes": scopes.split(), "expires_in": 3600}
    token = requests.post(hub.url + page, headers=owner, json=asked, timeout=30).json()["token"]
    (command,) = re.findall(r"`(\(umask 077 && cat .*?)`", prose("A first look"))
    assert machine.run(command, stdin=f"{token}\n").returncode == 0
    assert (machine.root / "hub-token").stat().st_mode & 0o777 == 0o600
    assert_first_look(machine, hub)
    refused = machine.run(
        f"cull-idle --once --timeout 1h --token-file hub-token --url {hub.url}", PATH=f"{machine.bin}:/usr/bin:/bin"
    )
    assert refused.returncode == cull_idle.Exit.NO_HUB
    assert hub.running() == {"idle", "admin"}


def hub_token(machine: Machine, hub: RealHub) -> str:
    """What the README's command for the Hub's machine leaves in its file, while the Hub runs."""
    (command,) = re.findall(r"`(\(umask 077 && jupyterhub token .*?)`", prose("A first look"))
    command = command.replace("/etc/jupyterhub/jupyterhub_config.py", str(CONFIG))
    reader, writer = os.pipe()  # the tests' configuration ends a process whose stdin is closed
    try:
        result = subprocess.run(
            ["/bin/sh", "-c", f"{command} && mv hub-token {machine.root}"],
            cwd=hub._directory,
            env={
                **hub._environment,
                "REAL_HUB_SERVER_PORT": "0",
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            },
            stdin=reader,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert result.returncode == 0, result.stderr
    return (machine.root / "hub-token").read_text().strip()


def test_a_token_made_on_the_hubs_machine_is_enough_for_a_first_look(
    machine: Machine, hub_with_an_admin: RealHub
) -> None:
    assert hub_token(machine, hub_with_an_admin)
    assert (machine.root / "hub-token").stat().st_mode & 0o777 == 0o600
    assert_first_look(machine, hub_with_an_admin)


# A service of the Hub

# RealHub's configuration says who the admins are, where there are roles.
LIST_ADMIN = """
if jupyterhub.version_info >= (2,):
    c.JupyterHub.load_roles[0]["services"].append("idle-stopper")
"""


def managed_snippet() -> str:
    (text,) = shown("python", "A service of the Hub")
    return text


def before_roles() -> str:
    """The snippet without its role, and with what the README says to write after the name."""
    text = prose("A service of the Hub")
    assert "leave out the last line, and" in text
    (admin,) = re.findall(r"write `(.*?)` after the name", text)
    *lines, role = managed_snippet().splitlines(keepends=True)
    assert "load_roles" in role
    return "".join(lines).replace('"idle-stopper", ', f'"idle-stopper", {admin}, ')


def write_config(machine: Machine) -> None:
    """The file that a service and a shell share."""
    (toml,) = shown("toml", "A service of the Hub")
    Path(machine.under(toml.splitlines()[0].removeprefix("# "))).write_text(toml)


class Managed:
    """A Hub that starts cull-idle as the README says, but looks every second."""

    def __init__(self, root: Path, text: str, more_config: str = "", **options: Any) -> None:
        self.machine = Machine(root)
        often = 'c.JupyterHub.services[-1]["environment"] = {"CULL_IDLE_CULL_EVERY": "1s"}\n'
        self.hub = RealHub(extra_config=self.machine.under(text) + often + more_config, **options)

    def __enter__(self) -> Managed:
        self.hub.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hub.__exit__(*error)
        for pid in self.machine.alive():
            os.kill(pid, signal.SIGKILL)

    def assert_culls(self) -> None:
        culled = "culled idle: idle 2h01m, limit 1h"
        before = self.hub.log().count(culled)
        self.hub.spawn("busy", idle_seconds=60)
        self.hub.spawn("idle", wait=False, **IDLE)
        wait_until(lambda: self.hub.log().count(culled) > before, self.hub)
        assert self.hub.running() == {"busy"}
        self.hub.clear()

    def assert_stops(self) -> None:
        """It takes 5 seconds at most; on a machine with more to do they may be 10."""
        passes = self.hub.log().count(" pass: ")
        wait_until(lambda: self.hub.log().count(" pass: ") > passes, self.hub)  # before that, a SIGTERM just ends it
        said = self.hub.log().count("told to stop")
        began = time.monotonic()
        self.hub.stop()
        wait_until(lambda: not self.machine.alive(), self.hub, began + 10 - time.monotonic())
        assert self.hub.log().count("told to stop") == said + 1


@pytest.fixture(scope="module", params=[False, True], ids=["http", "internal_ssl"])
def managed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    with Managed(tmp_path_factory.mktemp("machine"), managed_snippet(), internal_ssl=request.param) as managed:
        yield managed


def test_the_hub_starts_it_and_it_culls(managed: Managed) -> None:
    managed.assert_culls()
    assert len(managed.machine.alive()) == 1
    assert re.search(r"\bcull.idle: culled idle:", managed.hub.log())  # among the Hub's own lines


@pytest.mark.parametrize("managed", [False], ids=["http"], indirect=True)
def test_it_survives_a_hub_that_is_killed_and_started_again(managed: Managed) -> None:
    (old,) = managed.machine.alive()
    managed.hub.kill()
    wait_until(lambda: "is the Hub running" in managed.hub.log(), managed.hub)
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
    with Managed(tmp_path, before_roles(), LIST_ADMIN, python=python) as managed:
        managed.assert_culls()
        managed.assert_stops()


def test_the_same_snippet_runs_what_is_installed_in_the_hubs_own_environment(tmp_path: Path) -> None:
    (command,) = re.findall(r"`(\[sys\.executable.*?\])`", prose("A service of the Hub"))
    (old,) = re.findall(r'\["/opt.*?\]', managed_snippet())
    text = "import sys\n" + managed_snippet().replace(old, command)
    path = f'import os\nos.environ["PYTHONPATH"] = {str(ROOT)!r}\n'
    environment = 'c.JupyterHub.services[-1]["environment"] = {**os.environ, "CULL_IDLE_CULL_EVERY": "1s"}\n'
    with Managed(tmp_path, path + text, environment) as managed:
        managed.assert_culls()


def test_the_service_and_a_shell_take_their_options_from_one_file(tmp_path: Path) -> None:
    """With the scope that the rule in it needs."""
    words = re.search(r"write `(--config=[^`]*)` in place of `([^`]*)`", prose("A service of the Hub"))
    assert words
    text = (
        managed_snippet()
        .replace(words[2], words[1])
        .replace('"delete:servers"', '"delete:servers", "read:users:groups"')
    )
    managed = Managed(tmp_path, text)
    write_config(managed.machine)
    with managed:
        hub = managed.hub
        for name in ("dan", "svc-dan"):
            hub.add_user(name, groups=["gpu"])
        hub.spawn_many([(name, "", {"idle_seconds": 45 * 60}) for name in ("ann", "dan", "svc-dan")])
        wait_until(lambda: hub.running() == {"ann", "svc-dan"}, hub)
        managed.assert_stops()


def test_a_wrong_path_keeps_the_hub_from_starting_as_the_readme_says(tmp_path: Path) -> None:
    wrong = managed_snippet().replace(COMMAND, str(tmp_path / "cull-idel"))
    with pytest.raises(RuntimeError, match="No such file"), RealHub(extra_config=wrong):
        pass


# The Littlest JupyterHub


def test_the_littlest_jupyterhub_takes_the_same_snippet_as_a_file_of_its_own(machine: Machine) -> None:
    """It sets the services itself, then loads each file of a directory with `load_subconfig`."""
    (file,) = re.findall(r"into `/opt/tljh/(config/jupyterhub_config\.d/\w+\.py)`", prose("The Littlest JupyterHub"))
    snippet = machine.root / file
    snippet.parent.mkdir(parents=True)
    snippet.write_text(managed_snippet())
    main = machine.root / "jupyterhub_config.py"
    main.write_text(f"c = get_config()\nc.JupyterHub.services = []\nload_subconfig({str(snippet)!r})\n")
    loaded = import_module("traitlets.config").PyFileConfigLoader(str(main)).load_config().JupyterHub
    (service,), (role,) = loaded.services, loaded.load_roles.get_value([])
    assert (service["name"], role["services"]) == ("idle-stopper", ["idle-stopper"])


# A token of its own, and the role that is printed when a scope is missing


def own_token_snippet(machine: Machine) -> str:
    """What the README says: its lines in place of the first one of the managed service."""
    (text,) = shown("python", "A token of its own")
    first, _, rest = managed_snippet().partition("\n")
    assert first.startswith("service = ")
    return machine.under(text) + rest


def make_token(machine: Machine) -> None:
    (command,) = (text for text in shown("sh", "A token of its own") if "openssl" in text)
    shutil.rmtree(machine.token.parent)
    result = machine.run(machine.under(command), PATH="/usr/local/bin:/usr/bin:/bin")
    assert result.returncode == 0, result.stderr
    assert machine.token.stat().st_mode & 0o777 == 0o600
    assert machine.token.parent.stat().st_mode & 0o777 == 0o700


@pytest.fixture(scope="module")
def machine_with_token(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    make_token(machine)
    return machine


@pytest.fixture(scope="module")
def hub_with_own_token(machine_with_token: Machine) -> Iterator[RealHub]:
    with RealHub(extra_config=own_token_snippet(machine_with_token)) as hub:
        yield hub


def test_a_token_of_its_own_culls(machine_with_token: Machine, hub_with_own_token: RealHub) -> None:
    machine, hub = machine_with_token, hub_with_own_token
    command = cron_command().replace(" -q", "")
    hub.spawn("idle", **IDLE)
    result = machine.run(f"{machine.under(command)} --url {hub.url}", PATH="/usr/bin:/bin")
    assert (result.returncode, hub.running()) == (0, set()), result.stderr


def test_a_token_from_a_pipe_culls(machine: Machine, hub: RealHub) -> None:
    command = "cull-idle --once --timeout 1h --token-file <(pass show hub)"
    hub.spawn("idle", **IDLE)
    (machine.bin / "pass").write_text(f"#!/bin/sh\necho {hub.culler_token}\n")
    (machine.bin / "pass").chmod(0o755)
    line = shlex.join(["bash", "-c", f"{command} --url {hub.url}"])
    result = machine.run(line, PATH=f"{machine.bin}:/usr/bin:/bin")
    assert (result.returncode, hub.running()) == (0, set()), result.stderr


@pytest.mark.parametrize("args", [["--rule=group=gpu keep"], ["--cull-users"]], ids=["group", "users"])
def test_the_role_that_is_printed_below_the_readmes_snippet_starts_a_hub_and_culls(
    args: list[str], machine_with_token: Machine, hub_with_own_token: RealHub
) -> None:
    machine, hub = machine_with_token, hub_with_own_token
    words = ["cull-idle", "--once", "--timeout=1h", "--token-file", str(machine.token), *args]
    hub.spawn("idle", **IDLE_USER)
    result = machine.run(shlex.join([*words, "--url", hub.url]), PATH=f"{machine.bin}:/usr/bin:/bin")
    assert result.returncode == cull_idle.Exit.NO_HUB
    assert hub.running() == {"idle"}
    hub.clear()
    (line,) = re.findall(r"c\.JupyterHub\.load_roles\.append\(.*\)", result.stderr)
    with RealHub(extra_config=f"{own_token_snippet(machine)}\n{line}\n") as hub:
        hub.spawn("idle", **IDLE_USER)
        result = machine.run(shlex.join([*words, "--url", hub.url]), PATH=f"{machine.bin}:/usr/bin:/bin")
        assert (result.returncode, hub.running()) == (0, set()), result.stderr


def test_a_role_of_the_same_name_stops_a_hub_as_the_readme_says() -> None:
    role = managed_snippet().splitlines(keepends=True)[-1]
    text = managed_snippet().replace(COMMAND, "true")
    with pytest.raises(RuntimeError, match="multiply defined"), RealHub(extra_config=text + role):
        pass


# cron

CRONTAB = {"HOME": "/root", "LOGNAME": "root", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}  # all that cron sets


def cron_command(number: int = 0) -> str:
    """The first one culls, the second one looks."""
    text = shown("crontab", "cron")[number]
    match = re.fullmatch(r"(?:(?:\*(?:/\d+)?|\d+) ){5}([^%\n]*)\n", text)  # in a crontab a % ends the command
    assert match
    return match[1]


def test_the_cron_line_culls_and_says_nothing(machine: Machine, hub: RealHub) -> None:
    hub.spawn("idle", **IDLE)
    hub.spawn("busy", idle_seconds=60)
    machine.token.write_text(f"{hub.culler_token}\n")
    result = machine.run(f"{machine.under(cron_command())} --url {hub.url}", **CRONTAB)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    assert hub.running() == {"busy"}


def test_the_cron_line_for_a_look_prints_the_table(machine: Machine, hub: RealHub) -> None:
    hub.spawn("idle", **IDLE)
    machine.token.write_text(f"{hub.culler_token}\n")
    result = machine.run(f"{machine.under(cron_command(1))} --url {hub.url}", **CRONTAB)
    assert (result.returncode, result.stderr) == (0, "")
    assert "1 of 1 running servers would be stopped" in result.stdout
    assert hub.running() == {"idle"}


def test_the_cron_line_says_what_failed(machine: Machine, hub: RealHub) -> None:
    machine.token.write_text("unknown\n")
    result = machine.run(f"{machine.under(cron_command())} --url {hub.url}", **CRONTAB)
    assert result.returncode == cull_idle.Exit.NO_HUB
    assert len(result.stderr.splitlines()) == 1


# systemd

Unit = dict[str, dict[str, list[str]]]  # sections, directives, and their values
KNOWN = {
    "Timer": {"OnCalendar"},
    "Install": {"WantedBy"},
    "Service": {
        "CapabilityBoundingSet",
        "DynamicUser",
        "ExecStart",
        "LoadCredential",
        "PrivateDevices",
        "ProtectHome",
        "RestrictAddressFamilies",
        "RestrictNamespaces",
        "SystemCallFilter",
        "Type",
    },
}


def parse_unit(text: str) -> Unit:
    unit: Unit = {}
    for line in text.splitlines():
        if line.startswith("["):
            current = unit.setdefault(line[1:-1], {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            current.setdefault(key, []).append(value)
    return unit


SYSTEM = "/etc/systemd/system/"
FILES = {text.splitlines()[0].removeprefix(f"# {SYSTEM}"): text for text in shown("ini", "systemd")}
SERVICE = "cull-idle.service"
TIMER = "cull-idle.timer"


def words(credentials: str = "/credentials") -> list[str]:
    """What the service executes."""
    (line,) = parse_unit(FILES[SERVICE])["Service"]["ExecStart"]
    return [word.replace("${CREDENTIALS_DIRECTORY}", credentials) for word in line.split()]


@pytest.fixture
def units(machine: Machine) -> list[Path]:
    """The service and its timer. The command in them exists."""
    for name, text in FILES.items():
        (machine.root / name).write_text(machine.under(text))
    return [machine.root / SERVICE, machine.root / TIMER]


def systemd_analyze(*args: str | Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which("systemd-analyze"):
        pytest.skip("this machine has no systemd-analyze, and pip cannot install it")
    return subprocess.run(["systemd-analyze", *args], capture_output=True, text=True, timeout=60, check=False)


def test_systemd_takes_the_units(units: list[Path]) -> None:
    result = systemd_analyze("verify", "--man=no", *units)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_systemd_finds_the_service_well_hardened(units: list[Path]) -> None:
    result = systemd_analyze("security", "--offline=true", "--threshold=30", units[0])  # an exposure of 3.0
    assert result.returncode == 0, result.stdout + result.stderr


def test_units_have_no_line_that_systemd_would_ignore() -> None:
    for name, text in FILES.items():
        for title, directives in parse_unit(text).items():
            assert directives.keys() <= KNOWN[title], name


def test_each_unit_is_pasted_where_systemd_looks_and_started_by_its_name() -> None:
    assert FILES.keys() == {SERVICE, TIMER}
    assert re.findall(r"systemctl (start|enable --now) ([\w.-]+\w)", prose("systemd")) == [
        ("start", SERVICE),
        ("enable --now", TIMER),
    ]
    assert parse_unit(FILES[TIMER])["Install"] == {"WantedBy": ["timers.target"]}


def test_a_service_is_handed_what_its_command_reads(machine: Machine) -> None:
    command, *args = words(str(machine.root / "credentials"))
    assert command == COMMAND
    (machine.root / "credentials").mkdir()
    service = parse_unit(FILES[SERVICE])["Service"]
    for credential in service["LoadCredential"]:
        (machine.root / "credentials" / credential.split(":")[0]).write_text("")
    settings = settings_from(*args)
    assert settings.token_file
    assert Path(settings.token_file).exists()
    assert settings.once
    assert service["Type"] == ["oneshot"]


def test_a_service_of_a_timer_culls(machine: Machine, hub: RealHub) -> None:
    hub.spawn("idle", **IDLE)
    machine.token.write_text(hub.culler_token)
    command = machine.under(shlex.join(words("/etc/cull-idle")))
    result = machine.run(f"{command} --url {hub.url}", PATH="/usr/bin:/bin")
    assert (result.returncode, hub.running()) == (0, set())


# Kubernetes

CRON_JOB = yaml.safe_load(shown("yaml", "A Kubernetes CronJob")[0])
VALUES = yaml.safe_load(shown("yaml", "Zero to JupyterHub")[0])


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = CRON_JOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("version", ["1.25", "1.37"])
def test_kubernetes_takes_the_manifest(version: str) -> None:
    assert kubernetes_validate.validate(CRON_JOB, version, strict=True) == version


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


def test_a_pod_culls_with_the_token_it_is_handed(machine: Machine, hub: RealHub) -> None:
    hub.spawn("idle", **IDLE)
    (container,) = pod()["containers"]
    (mount,) = container["volumeMounts"]
    (volume,) = pod()["volumes"]
    assert mount["name"] == volume["name"]
    (item,) = volume["secret"]["items"]
    (service,) = VALUES["hub"]["services"]
    assert item["key"] == f"hub.services.{service}.apiToken"  # as the chart calls it
    assert volume["secret"]["secretName"] == "hub"
    Path(machine.under(mount["mountPath"]), item["path"]).write_text(hub.culler_token)

    assert container["command"][:3] == ["python3", "-m", "cull_idle"]
    args = machine.under(shlex.join(container["command"][3:])).replace("http://hub:8081/hub/api", hub.url)
    result = machine.run(f"{machine.under(COMMAND)} {args}", PATH="/usr/bin:/bin")
    assert (result.returncode, hub.running()) == (0, set())


DOCKERFILE = dict(line.split(" ", maxsplit=1) for line in shown("dockerfile", "Zero to JupyterHub")[0].splitlines())


def test_the_image_gets_all_that_an_installation_needs() -> None:
    *files, folder = DOCKERFILE["COPY"].split()
    project = PYPROJECT["project"]
    needed = {
        "pyproject.toml",
        project["readme"],
        *project["license-files"],
        PYPROJECT["tool"]["hatch"]["version"]["path"],
    }
    assert set(files) == needed
    assert all((ROOT / file).is_file() for file in files)
    assert f"{DOCKERFILE['RUN']}/" == f"pip install --no-cache-dir {folder}"


def test_the_image_is_one_and_has_one_version() -> None:
    _, _, tag = DOCKERFILE["FROM"].partition(":")
    (container,) = pod()["containers"]
    image = VALUES["hub"]["image"]
    assert image["tag"] == tag
    assert container["image"] == f"{image['name']}:{image['tag']}"
    assert set(re.findall(r"registry\.example\.org/hub:[\d.]+\d", README)) == {container["image"]}


def test_a_container_runs_as_the_user_that_its_pod_names() -> None:
    assert DOCKERFILE["USER"] == str(pod()["securityContext"]["runAsUser"])


# Zero to JupyterHub: what its chart makes of the values


def of_the_chart(values: dict[str, Any]) -> str:
    """The lists of JupyterHub's configuration: the chart names each entry by its key."""
    listed = {
        key: [{"name": name, **entry} for name, entry in values["hub"][of_values].items()]
        for key, of_values in (("services", "services"), ("load_roles", "loadRoles"))
    }
    return "".join(f"c.JupyterHub.{key} += {entries!r}\n" for key, entries in listed.items())


def chart_config(hub: RealHub, command: list[str]) -> str:
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(VALUES))
    (service,) = values["hub"]["services"].values()
    service["command"] = [word.replace("http://localhost:8081/hub/api", hub.url) for word in command]
    service["environment"] = {"CULL_IDLE_CULL_EVERY": "1s", "PYTHONPATH": str(ROOT)}
    return of_the_chart(values)


def assert_the_chart_culls(command: list[str]) -> None:
    hub = RealHub()
    hub._environment["REAL_HUB_EXTRA_CONFIG"] += chart_config(hub, command)
    with hub:
        hub.spawn("busy", idle_seconds=60)
        hub.spawn("idle", wait=False, **IDLE)
        wait_until(lambda: "culled idle: idle 2h01m, limit 1h" in hub.log(), hub)
        assert hub.running() == {"busy"}


def chart_command() -> list[str]:
    (service,) = VALUES["hub"]["services"].values()
    command: list[str] = service["command"]
    return command


def test_the_charts_values_run_the_culler_in_the_hubs_pod() -> None:
    args = chart_command()[1:]
    assert args[:2] == ["-m", "cull_idle"]
    assert settings_from(*args[2:]).url == "http://localhost:8081/hub/api"
    assert_the_chart_culls([sys.executable, *args])


def test_the_charts_own_culler_is_off() -> None:
    assert VALUES["cull"] == {"enabled": False}


# Recipes and explanations


def looks() -> list[str]:
    """The commands under Recipes and under the question why, which change nothing."""
    after = README.partition("## Recipes")[2]
    lines = [
        line for block in BLOCKS if block.language == "sh" and block.text in after for line in block.text.splitlines()
    ]
    return [line for line in lines if line.startswith("cull-idle ")]


@pytest.mark.parametrize("command", looks())
def test_a_command_that_only_looks_says_what_would_be_done(
    command: str, machine: Machine, hub_with_an_admin: RealHub
) -> None:
    hub = hub_with_an_admin
    write_config(machine)
    assert hub_token(machine, hub)
    line = machine.under(command).replace("ann/gpu", "idle")
    line += "" if "--token-file" in line else " --token-file hub-token"
    result = machine.run(f"{line} --url {hub.url}", PATH=f"{machine.bin}:/usr/bin:/bin")
    assert result.returncode == 0, result.stderr
    assert "stopped: idle 2h0" in result.stdout
    assert hub.running() == {"idle", "admin"}
