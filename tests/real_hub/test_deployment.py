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
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
import requests
from hub import CONFIG, IDLE, IDLE_USER, RealHub
from readme_text import BLOCKS, PYPROJECT, README, ROOT, prose, section

import cull_idle

COMMAND = "/opt/cull-idle/bin/cull-idle"
yaml = import_module("yaml")  # they have no types
kubernetes_validate = import_module("kubernetes_validate")


def shown(language: str, heading: str) -> list[str]:
    """The blocks of a language under a heading of the README."""
    found = [block.text for block in BLOCKS if block.language == language and block.text in section(heading)]
    assert found, f"no {language} under {heading}"
    return found


def quoted(pattern: str, heading: str) -> str:
    """What a pattern finds under a heading, once."""
    (text,) = re.findall(pattern, prose(heading))
    return str(text)


class Machine:
    """A directory that stands for the root of a machine with cull-idle and its token, as the README installs them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pids_file = root / "pids"
        command = Path(self.under(COMMAND))
        command.parent.mkdir(parents=True)
        words = shlex.join([sys.executable, cull_idle.__file__])
        command.write_text(f'#!/bin/sh\necho $$ >> {shlex.quote(str(self.pids_file))}\nexec {words} "$@"\n')
        command.chmod(0o755)
        self.token = Path(self.under("/etc/cull-idle/token"))
        self.token.parent.mkdir(parents=True)
        self.bin = root / "usr/local/bin"
        self.bin.mkdir(parents=True)
        (link,) = re.findall(r"^ln .*?(?= && )", section("Install and a first look"), re.MULTILINE)
        assert self.run(link.replace("/usr/local/bin", str(self.bin))).returncode == 0

    def under(self, text: str) -> str:
        """The text with the README's paths below this directory."""
        return re.sub(r"/(opt|etc)/cull-idle\b", lambda path: f"{self.root}{path[0]}", text)

    def run(
        self, command: str, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """What a shell makes of a command, with nothing else in its environment."""
        return subprocess.run(
            ["/bin/sh", "-c", self.under(command)],
            env=env or {"PATH": f"{self.bin}:/usr/bin:/bin"},
            cwd=self.root,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def write_config(self) -> None:
        """The file that a service and a shell share."""
        (toml,) = shown("toml", "A service of the Hub")
        Path(self.under(toml.splitlines()[0].removeprefix("# "))).write_text(toml)

    def alive(self) -> list[int]:
        """The processes that cull-idle was started as and that have not ended, the latest one last."""
        pids = self.pids_file.read_text().split() if self.pids_file.exists() else []
        return [int(pid) for pid in pids if is_alive(int(pid))]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")  # where there is none, nobody has ended one that nobody waits for
        return not status.parent.parent.exists() or ") Z " not in status.read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# A first look, recipes and explanations


class Look(NamedTuple):
    """A machine with the token that the README's command makes in a shell, and the Hub that it is for."""

    machine: Machine
    hub: RealHub

    def shows_what_is_idle(self, command: str, machine: Machine | None = None) -> bool:
        """Whether a command that only looks says so, and changes nothing."""
        result = (machine or self.machine).run(f"{command} --url {self.hub.url}")
        assert result.returncode == 0, result.stderr
        assert self.hub.running() == {"idle", "admin"}
        return re.search(r"^idle +2h0\dm |: idle 2h0\dm\b", result.stdout, re.MULTILINE) is not None


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Look]:
    with RealHub(extra_config='c.Authenticator.admin_users = {"admin"}\n') as hub:
        hub.spawn_many([("idle", "", IDLE), ("admin", "", {"idle_seconds": 60})])
        machine = Machine(tmp_path_factory.mktemp("machine"))
        make_token_in_a_shell(machine, hub)
        yield Look(machine, hub)


def make_token_in_a_shell(machine: Machine, hub: RealHub) -> None:
    command = quoted(r"`(\(umask 077 && jupyterhub token .*?)`", "A first look")
    command = command.replace("/etc/jupyterhub/jupyterhub_config.py", str(CONFIG))
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    reader, writer = os.pipe()  # the tests' configuration ends a process whose stdin is closed
    with os.fdopen(reader), os.fdopen(writer, "w"):
        subprocess.run(
            ["/bin/sh", "-c", f"{command} && mv hub-token {machine.root}"],
            cwd=hub.directory,
            env={**hub.environment, "REAL_HUB_SERVER_PORT": "0", "PATH": path},
            stdin=reader,
            timeout=60,
            check=True,
        )
    assert (machine.root / "hub-token").stat().st_mode & 0o777 == 0o600


(FIRST_LOOK,) = (text.strip() for text in shown("sh", "A first look") if "--dry-run" in text)
LOOKS = re.findall(r"^cull-idle .*", README.partition("## Recipes")[2], re.MULTILINE)


@pytest.mark.parametrize("command", [FIRST_LOOK, *LOOKS], ids=str)
def test_a_command_that_only_looks_shows_what_is_idle(command: str, look: Look) -> None:
    look.machine.write_config()
    command += "" if "--token-file" in command else " --token-file hub-token"
    assert look.shows_what_is_idle(command.replace("ann/gpu", "idle"))


def test_a_token_of_the_token_page_is_enough_for_a_first_look_and_for_no_more(machine: Machine, look: Look) -> None:
    page = f"{look.hub.url}/users/admin/tokens"  # what the page asks
    owner = {"Authorization": f"token {look.hub.api('POST', '/users/admin/tokens').json()['token']}"}
    asked = {"scopes": quoted(r"enter `(.*?)`", "A first look").split(), "expires_in": 3600}
    token = requests.post(page, headers=owner, json=asked, timeout=30).json()["token"]
    paste = quoted(r"`(\(umask 077 && cat .*?)`", "A first look")
    assert machine.run(paste, stdin=f"{token}\n").returncode == 0
    assert (machine.root / "hub-token").stat().st_mode & 0o777 == 0o600
    assert look.shows_what_is_idle(FIRST_LOOK, machine)
    refused = machine.run(f"cull-idle --once --timeout 1h --token-file hub-token --url {look.hub.url}")
    assert refused.returncode == cull_idle.Exit.NO_HUB
    assert look.hub.running() == {"idle", "admin"}


# A service of the Hub

(SNIPPET,) = shown("python", "A service of the Hub")
FIRST_LINE, _, OTHER_LINES = SNIPPET.partition("\n")
ROLE = SNIPPET.splitlines()[-1]
# RealHub's configuration says who the admins are, where there are roles.
LIST_ADMIN = """
if jupyterhub.version_info >= (2,):
    c.JupyterHub.load_roles[0]["services"].append("idle-stopper")
"""


def before_roles() -> str:
    """The snippet without its role, and with what the README says to write after the name."""
    assert "leave out the last line, and" in prose("A service of the Hub")
    assert "load_roles" in ROLE
    admin = quoted(r"write `([^`]*)` after the name", "A service of the Hub")
    return SNIPPET.replace(ROLE, LIST_ADMIN).replace('"idle-stopper", ', f'"idle-stopper", {admin}, ', 1)


def in_the_hubs_environment() -> str:
    (old,) = re.findall(r'\["/opt.*?\]', SNIPPET)
    return "import sys\n" + SNIPPET.replace(old, quoted(r"`(\[sys\.executable.*?\])`", "A service of the Hub"))


def with_a_file() -> str:
    """The snippet with the options from a file, and the scope that the rule in it needs."""
    new, old = re.findall(r"write `(--config=[^`]*)` in place of `([^`]*)`", prose("A service of the Hub"))[0]
    return SNIPPET.replace(old, new).replace('"delete:servers"', '"delete:servers", "read:users:groups"')


def of_the_chart() -> str:
    """What Zero to JupyterHub's chart makes of the values: it names each entry of a list by its key."""
    lists = {
        key: [{"name": name, **entry} for name, entry in VALUES["hub"][of_values].items()]
        for key, of_values in (("services", "services"), ("load_roles", "loadRoles"))
    }
    text = "".join(f"c.JupyterHub.{key} += {entries!r}\n" for key, entries in lists.items())
    for old, new in (("'python3'", repr(sys.executable)), (":8081/hub/api'", ":' + env['REAL_HUB_PORT'] + '/hub/api'")):
        assert old in text
        text = text.replace(old, new)
    return text


class Managed:
    """A Hub that starts cull-idle as the README says, but looks every second."""

    def __init__(self, machine: Machine, text: str, **options: Any) -> None:
        self.machine = machine
        machine.write_config()
        environment = {"CULL_IDLE_CULL_EVERY": "1s", "PYTHONPATH": str(ROOT)}
        often = f'c.JupyterHub.services[-1]["environment"] = {environment!r}\n'
        self.hub = RealHub(extra_config=machine.under(text) + often, **options)

    def __enter__(self) -> Self:
        self.hub.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hub.__exit__(*error)
        for pid in self.machine.alive():
            os.kill(pid, signal.SIGKILL)

    def culls(self, *culled: str) -> bool:
        """Whether these are culled, and no other server."""
        before = len(self.hub.log())
        servers = {"idle": 7290, "busy": 60, "dan": 45 * 60, "svc-dan": 45 * 60}
        for name in ("dan", "svc-dan"):
            self.hub.add_user(name, groups=["gpu"])
        self.hub.spawn_many([(n, "", {"idle_seconds": idle}) for n, idle in servers.items()], wait=False)
        lines = [f"cull.idle: culled {name}:" for name in culled]  # among the Hub's own
        self.hub.wait_until(lambda: all(re.search(line, self.hub.log()[before:]) for line in lines), f"{culled} culled")
        self.hub.wait_until(lambda: self.hub.running() >= servers.keys() - {*culled}, "the others run")
        left = self.hub.running()
        self.hub.clear()
        return left == servers.keys() - {*culled}

    def ends(self) -> bool:
        """Whether it ends, told to, with the Hub."""
        passes = self.hub.log().count(" pass: ")  # before the first, a SIGTERM just ends it
        self.hub.wait_until(lambda: self.hub.log().count(" pass: ") > passes, "a pass")
        said = self.hub.log().count("told to stop")
        self.hub.stop()
        self.hub.wait_until(lambda: not self.machine.alive(), "it has ended")
        return self.hub.log().count("told to stop") == said + 1


@pytest.mark.parametrize(
    ("text", "internal_ssl", "culled"),
    [
        (lambda: SNIPPET, False, ["idle"]),
        (lambda: SNIPPET, True, ["idle"]),
        (before_roles, False, ["idle"]),
        (in_the_hubs_environment, False, ["idle"]),
        (with_a_file, False, ["idle", "dan"]),
        (of_the_chart, False, ["idle"]),
    ],
    ids=["as shown", "internal_ssl", "before roles", "in the Hub's environment", "options in a file", "the chart"],
)
def test_a_hub_starts_it_and_it_culls_and_ends_with_the_hub(
    machine: Machine, pytestconfig: pytest.Config, text: Callable[[], str], internal_ssl: bool, culled: list[str]
) -> None:
    """Hubs with roles take the snippet for those without; --hub-python shows it for an old one."""
    with Managed(machine, text(), internal_ssl=internal_ssl, python=pytestconfig.getoption("hub_python")) as managed:
        assert managed.culls(*culled)
        assert managed.ends()


def test_it_survives_a_hub_that_is_killed_and_is_there_again_after_a_restart(machine: Machine) -> None:
    with Managed(machine, SNIPPET) as managed:
        assert managed.culls("idle")
        (old,) = machine.alive()
        managed.hub.kill()
        managed.hub.wait_until(lambda: "is the Hub running" in managed.hub.log(), "it misses the Hub")
        managed.hub.start()
        os.kill(machine.alive()[-1], signal.SIGKILL)  # the new one: the Hub knows nothing of the old one
        assert managed.culls("idle")
        os.kill(old, signal.SIGKILL)
        managed.hub.restart()
        assert managed.culls("idle")
        (new,) = machine.alive()
        assert new != old


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SNIPPET.replace(COMMAND, "/nowhere/cull-idel"), "No such file"),
        (f"{SNIPPET.replace(COMMAND, '/bin/true')}\n{ROLE}\n", "multiply defined"),
    ],
    ids=["a wrong path", "two roles of the same name"],
)
def test_what_keeps_a_hub_from_starting_as_the_readme_says(text: str, says: str) -> None:
    with pytest.raises(RuntimeError, match=says), RealHub(extra_config=text):
        pass


def test_the_littlest_jupyterhub_takes_the_same_snippet_as_a_file_of_its_own(tmp_path: Path) -> None:
    """It sets the services itself, then loads each file of a directory with `load_subconfig`."""
    snippet = tmp_path / quoted(r"into `/opt/tljh/config/(jupyterhub_config\.d/\w+\.py)`", "The Littlest JupyterHub")
    snippet.parent.mkdir()
    snippet.write_text(SNIPPET)
    main = tmp_path / "jupyterhub_config.py"
    main.write_text(f"c = get_config()\nc.JupyterHub.services = []\nload_subconfig({str(snippet)!r})\n")
    loaded = import_module("traitlets.config").PyFileConfigLoader(str(main)).load_config().JupyterHub
    (service,), (role,) = loaded.services, loaded.load_roles.get_value([])
    assert (service["name"], role["services"]) == ("idle-stopper", ["idle-stopper"])


# A token of its own, and the role that is printed when a scope is missing


def test_a_token_of_its_own_culls_and_the_role_that_is_printed_for_more_starts_a_hub(machine: Machine) -> None:
    (make,) = (text for text in shown("sh", "A token of its own") if "openssl" in text)
    shutil.rmtree(machine.token.parent)
    assert machine.run(make).returncode == 0
    modes = [path.stat().st_mode & 0o777 for path in (machine.token, machine.token.parent)]
    assert modes == [0o600, 0o700]

    (line,) = shown("python", "A token of its own")
    assert FIRST_LINE.startswith("service = ")
    text = machine.under(line) + OTHER_LINES
    command = cron_command().replace(" -q", "")
    more = "--cull-users '--rule=group=gpu keep'"
    with RealHub(extra_config=text) as hub:
        hub.spawn("idle", **IDLE_USER)
        refused = machine.run(f"{command} {more} --url {hub.url}")
        assert (refused.returncode, hub.running()) == (cull_idle.Exit.NO_HUB, {"idle"})
        assert machine.run(f"{command} --url {hub.url}").returncode == 0
        assert hub.running() == set()
    (role,) = re.findall(r"c\.JupyterHub\.load_roles\.append\(.*\)", refused.stderr)
    with RealHub(extra_config=f"{text}\n{role}\n") as hub:
        hub.spawn("idle", **IDLE_USER)
        result = machine.run(f"{command} {more} --url {hub.url}")
        assert (result.returncode, hub.running()) == (0, set()), result.stderr


# cron

CRONTAB = {"HOME": "/root", "LOGNAME": "root", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}  # all that cron sets


def cron_command(number: int = 0) -> str:
    """The first one culls, the second one looks."""
    text = shown("crontab", "cron")[number]
    match = re.fullmatch(r"(?:(?:\*(?:/\d+)?|\d+) ){5}([^%\n]*)\n", text)  # in a crontab a % ends the command
    assert match
    return match[1]


def test_one_cron_line_looks_and_the_other_culls_and_says_only_what_failed(machine: Machine, hub: RealHub) -> None:
    hub.spawn_many([("idle", "", IDLE), ("busy", "", {"idle_seconds": 60})])
    machine.token.write_text(f"{hub.culler_token}\n")
    look = machine.run(f"{cron_command(1)} --url {hub.url}", env=CRONTAB)
    assert (look.returncode, look.stderr, hub.running()) == (0, "", {"idle", "busy"})
    assert re.search(r"^idle +2h", look.stdout, re.MULTILINE)
    cull = machine.run(f"{cron_command()} --url {hub.url}", env=CRONTAB)
    assert (cull.returncode, cull.stdout + cull.stderr, hub.running()) == (0, "", {"busy"})
    machine.token.write_text("unknown\n")
    failed = machine.run(f"{cron_command()} --url {hub.url}", env=CRONTAB)
    assert (failed.returncode, len(failed.stderr.splitlines())) == (cull_idle.Exit.NO_HUB, 1)


# systemd

FILES = {text.splitlines()[0].removeprefix("# /etc/systemd/system/"): text for text in shown("ini", "systemd")}
SERVICE, TIMER = "cull-idle.service", "cull-idle.timer"


def directives(name: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in FILES[name].splitlines() if "=" in line)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here, and pip cannot install it")
def test_systemd_takes_the_units_and_finds_the_service_well_hardened(machine: Machine) -> None:
    for name, text in FILES.items():
        (machine.root / name).write_text(machine.under(text))
    verified = machine.run(f"systemd-analyze verify --man=no ./{SERVICE} ./{TIMER}")
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    hardened = machine.run(f"systemd-analyze security --offline=true --threshold=30 ./{SERVICE}")  # exposed: 3.0
    assert hardened.returncode == 0, hardened.stdout + hardened.stderr


def test_each_unit_is_pasted_where_systemd_looks_and_started_by_its_name() -> None:
    started = re.findall(r"systemctl (start|enable --now) ([\w.-]+\w)", prose("systemd"))
    assert started == [("start", SERVICE), ("enable --now", TIMER)]
    assert FILES.keys() == {SERVICE, TIMER}
    assert directives(TIMER)["WantedBy"] == "timers.target"


def test_a_service_of_a_timer_culls_with_the_token_it_is_handed(machine: Machine, hub: RealHub) -> None:
    hub.spawn("idle", **IDLE)
    service = directives(SERVICE)
    name, _, source = service["LoadCredential"].partition(":")
    assert Path(machine.under(source)) == machine.token
    (machine.root / name).write_text(hub.culler_token)
    command = service["ExecStart"].replace("${CREDENTIALS_DIRECTORY}", str(machine.root))
    assert (machine.run(f"{command} --url {hub.url}").returncode, hub.running()) == (0, set())
    assert service["Type"] == "oneshot"


# Kubernetes

CRON_JOB = yaml.safe_load(shown("yaml", "A Kubernetes CronJob")[0])
VALUES = yaml.safe_load(shown("yaml", "Zero to JupyterHub")[0])
POD = CRON_JOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
DOCKERFILE = dict(line.split(" ", maxsplit=1) for line in shown("dockerfile", "Zero to JupyterHub")[0].splitlines())


@pytest.mark.parametrize("version", ["1.25", "1.37"])
def test_kubernetes_takes_the_manifest(version: str) -> None:
    assert kubernetes_validate.validate(CRON_JOB, version, strict=True) == version


def test_a_pod_may_do_nothing_but_ask_the_hub() -> None:
    assert CRON_JOB["spec"]["concurrencyPolicy"] == "Forbid"
    assert POD["securityContext"]["runAsNonRoot"]
    assert not POD["automountServiceAccountToken"]
    assert CONTAINER["resources"]["limits"].keys() == {"cpu", "memory"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_a_pod_culls_with_the_token_it_is_handed(machine: Machine, hub: RealHub) -> None:
    hub.spawn("idle", **IDLE)
    (mount,), (volume,), (service,) = CONTAINER["volumeMounts"], POD["volumes"], VALUES["hub"]["services"]
    (item,) = volume["secret"]["items"]
    assert (mount["name"], volume["secret"]["secretName"]) == (volume["name"], "hub")
    assert item["key"] == f"hub.services.{service}.apiToken"  # as the chart calls it
    Path(machine.under(mount["mountPath"]), item["path"]).write_text(hub.culler_token)
    assert CONTAINER["command"][:3] == ["python3", "-m", "cull_idle"]
    args = shlex.join(CONTAINER["command"][3:]).replace("http://hub:8081/hub/api", hub.url)
    assert (machine.run(f"cull-idle {args}").returncode, hub.running()) == (0, set())


def test_the_image_gets_all_that_an_installation_needs_and_runs_as_the_pods_user() -> None:
    *files, folder = DOCKERFILE["COPY"].split()
    project = PYPROJECT["project"]
    version = PYPROJECT["tool"]["hatch"]["version"]["path"]
    assert {*files} == {"pyproject.toml", project["readme"], *project["license-files"], version}
    assert all((ROOT / file).is_file() for file in files)
    assert f"{DOCKERFILE['RUN']}/" == f"pip install --no-cache-dir {folder}"
    assert DOCKERFILE["USER"] == str(POD["securityContext"]["runAsUser"])


def test_the_image_is_one_of_one_version_and_the_charts_own_culler_is_off() -> None:
    image = VALUES["hub"]["image"]
    assert image["tag"] == DOCKERFILE["FROM"].partition(":")[2]
    assert CONTAINER["image"] == f"{image['name']}:{image['tag']}"
    assert set(re.findall(r"registry\.example\.org/hub:[\d.]+\d", README)) == {CONTAINER["image"]}
    assert VALUES["cull"] == {"enabled": False}
