"""--notify runs a command for each event. Whatever the command does, the pass goes on."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub import RealHub
from processes import Start
from readme_text import BLOCKS
from runs import Cull, Result, RunLoop
from scripted_hub import LONG_AGO, NEARLY_DUE, ScriptedHub, edited, normal, respond, then_do

import cull_idle

WARN = ("--timeout=1h", "--warn-before=15m")
TOKEN, OTHER_TOKEN = "7oken-of-the-f1le", "0ther-token-of-the-variable"


def write_script(path: Path, text: str) -> str:
    """An executable file; returns it as a word for --notify."""
    path.write_text(text)
    path.chmod(0o755)
    return shlex.quote(str(path))


class Notice(NamedTuple):
    """What one run of the recorder got."""

    arguments: list[str]
    environment: dict[str, str]
    stdin: str

    @property
    def facts(self) -> dict[str, Any]:
        return dict(json.loads(self.stdin))

    @property
    def variables(self) -> dict[str, str]:
        return {name: self.environment[f"CULL_IDLE_{name.upper()}"] for name in ("event", "user", "server", "due")}


class Recorder:
    """A command for --notify that writes down what it gets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "notices"
        self.folder.mkdir()
        program = (
            f"#!{sys.executable} -IS\n"
            "import json, os, sys\n"
            f"with open(os.path.join({str(self.folder)!r}, str(os.getpid())), 'w') as file:\n"
            "    json.dump([sys.argv[1:], dict(os.environ), sys.stdin.read()], file)\n"
        )
        self.command = write_script(folder / "record it", program)

    @property
    def notices(self) -> list[Notice]:
        return [Notice(*json.loads(path.read_text())) for path in self.folder.iterdir()]


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


# What the command gets


def test_the_command_runs_for_each_server_warned_culled_and_stopping(
    hub: RealHub, cull_real: Cull, recorder: Recorder
) -> None:
    hub.spawn_many(
        [
            ("ann", "gpu", {"idle_seconds": LONG_AGO}),
            ("bob", "", {"idle_seconds": 90}),
            ("cat", "", {"idle_seconds": LONG_AGO, "stop_seconds": 30}),
            ("dan", "", {"idle_seconds": NEARLY_DUE}),
        ]
    )
    result = cull_real(*WARN, "--json", "--notify", recorder.command)
    assert result.exit_code == 0
    found = {notice.variables["user"]: notice for notice in recorder.notices}
    assert {user: notice.variables["event"] for user, notice in found.items()} == {
        "ann": "culled", "cat": "stopping", "dan": "warned",
    }  # fmt: skip
    assert [notice.variables["server"] for notice in (found["ann"], found["cat"])] == ["gpu", ""]
    printed = [line for line in map(json.loads, result.out.splitlines()) if line["event"] == "server"]
    assert [found[line["user"]].facts for line in printed] == printed
    assert [bool(found[user].variables["due"]) for user in ("ann", "cat", "dan")] == [False, False, True]
    assert found["dan"].variables["due"] == found["dan"].facts["due"]
    assert all(notice.stdin.endswith("}\n") for notice in found.values())


def test_the_command_runs_for_a_deleted_user(hub: RealHub, cull_real: Cull, recorder: Recorder) -> None:
    hub.add_user("ann", idle_seconds=LONG_AGO, age_seconds=LONG_AGO)
    cull_real("--timeout=1h", "--cull-users", "--notify", recorder.command, token=hub.user_culler_token)
    (notice,) = recorder.notices
    assert notice.variables == {"event": "culled", "user": "ann", "server": "", "due": ""}
    assert (notice.facts["event"], notice.facts["action"], notice.facts["server"]) == ("user", "delete", None)


def test_the_command_runs_for_failures_but_not_for_gone_or_spared_servers(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder
) -> None:
    for name in ("failing", "gone", "spared"):
        scripted.add(name, idle=LONG_AGO)
    scripted.fault("DELETE", "/users/failing/server", respond(418))
    scripted.fault("GET", "/users/gone", then_do(scripted.users["gone"].servers.clear))
    scripted.fault("GET", "/users/spared", then_do(lambda: scripted.touch("spared")))
    result = cull_scripted("--timeout=1h", "--notify", recorder.command)
    assert result.outcomes == {"failing": "failed", "gone": "gone", "spared": "spared"}
    found = {notice.variables["event"]: notice for notice in recorder.notices}
    assert found.keys() == {"failed", "pass_failed"}
    assert found["failed"].variables["user"] == "failing"
    assert "418" in found["failed"].facts["error"]


def test_a_loop_tells_once_of_what_lasts_for_three_passes(
    scripted: ScriptedHub, loop: RunLoop, recorder: Recorder
) -> None:
    """A Hub that restarts is no alarm. A sick server does not hide a Hub that is gone."""
    told: list[list[str]] = []

    def note() -> None:
        notices = [notice for notice in recorder.notices if notice.facts["event"] == "pass"]
        told.append([f"{notice.variables['event']}: {notice.facts['error']}"[:16] for notice in notices])
        for path in recorder.folder.iterdir():
            path.unlink()

    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users", *[respond(403)] * 2, normal(), *[respond(403)] * 4)
    scripted.fault("DELETE", ".*", *[respond(500)] * 4)
    loop(scripted, "--timeout=1h", "--notify", recorder.command, between=[note] * 13)
    assert {number: each for number, each in enumerate(told, 1) if each} == {
        6: ["pass_failed: GET"],
        10: ["pass_failed: Non"],
        13: ["pass_recovered: "],
    }


def test_a_dry_run_runs_nothing(cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("dan", idle=NEARLY_DUE)
    for more in ([], ["--json"]):
        assert cull_scripted("--dry-run", *WARN, "--notify", recorder.command, *more).exit_code == 0
    assert recorder.notices == []


def test_the_command_is_split_like_in_a_shell_but_not_run_by_one(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    words = r""" 'two words' one\ word "it's" '' $HOME "$HOME" `id` $(id) ; id & > x | * ~ # y"""
    assert cull_scripted("--timeout=1h", "--notify", recorder.command + words).exit_code == 0
    (notice,) = recorder.notices
    assert notice.arguments == [
        "two words", "one word", "it's", "", "$HOME", "$HOME", "`id`", "$(id)", ";", "id", "&", ">", "x", "|", "*", "~",
        "#", "y",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "command", ["", "  ", "'unclosed", "/no/such/command", "no-such-command here", "/", "$HOME/notify", __file__]
)
def test_a_command_that_cannot_be_run_is_a_usage_error(
    cull_scripted: Cull, scripted: ScriptedHub, command: str
) -> None:
    result = cull_scripted("--notify", command)
    assert result.exit_code == 2
    (line,) = result.lines
    assert "--notify" in line
    assert scripted.requests == []


def test_the_command_may_come_from_a_variable_or_the_config_file(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder, tmp_path: Path
) -> None:
    scripted.add("dan", idle=NEARLY_DUE)
    config = tmp_path / "config.toml"
    config.write_text(f"notify = {json.dumps(recorder.command + ' from-file')}\n")
    cull_scripted(*WARN, "--config", str(config))
    cull_scripted(*WARN, env={"CULL_IDLE_NOTIFY": f"{recorder.command} from-variable"})
    assert {notice.arguments[0] for notice in recorder.notices} == {"from-file", "from-variable"}


ODD_NAMES = [
    "dave smith",
    "-rf",
    "line\nfeed",
    "tab\tbell\a",
    "quote\"'`$(id);",
    "back\\slash",
    "ünï-日本-🙂",
    "a=b",
    "x" * 5000,
]


def test_odd_names_are_passed_unchanged(cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder) -> None:
    for name in ODD_NAMES:
        scripted.add(name, name[::-1], idle=NEARLY_DUE)
    result = cull_scripted(*WARN, "--notify", recorder.command)
    assert result.errors == []
    variables = {(notice.variables["user"], notice.variables["server"]) for notice in recorder.notices}
    assert variables == {(name, name[::-1]) for name in ODD_NAMES}
    assert {(notice.facts["user"], notice.facts["server"]) for notice in recorder.notices} == variables


@pytest.mark.parametrize(
    ("name", "shown", "why"),
    [
        ("nul\0", r"nul\x00", "embedded null byte"),
        ("half\ud800", r"half\ud800", "surrogates not allowed"),
        ("x" * 300_000, "x" * 250, "Argument list too long"),
    ],
    ids=["NUL", "half a character", "too long"],
)
def test_a_name_that_no_variable_can_hold_costs_only_its_own_notice(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder, name: str, shown: str, why: str
) -> None:
    scripted.add("odd", idle=NEARLY_DUE)
    scripted.add("ann", idle=NEARLY_DUE)
    scripted.fault(
        "GET", "/users", edited(lambda page: {**page, "items": [{**page["items"][0], "name": name}, page["items"][1]]})
    )
    result = cull_scripted(*WARN, "--notify", recorder.command)
    assert result.exit_code == 0
    (error,) = result.errors
    assert "--notify" in error
    assert shown in error
    assert why in error
    assert [notice.variables["user"] for notice in recorder.notices] == ["ann"]


# The token


@pytest.mark.parametrize("in_variable", [None, TOKEN, OTHER_TOKEN], ids=["no variable", "the same", "another"])
def test_no_token_is_in_the_environment_the_input_or_the_log(
    cull: Cull,
    scripted: ScriptedHub,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_variable: str | None,
) -> None:
    scripted.token = TOKEN
    scripted.add("dan", idle=NEARLY_DUE)
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    monkeypatch.setenv("JPY_API_TOKEN", in_variable or TOKEN)
    monkeypatch.setenv("CURL_HEADER", f"Authorization: token {TOKEN}")
    monkeypatch.setenv("HARMLESS", "seen")
    env = {"JUPYTERHUB_API_TOKEN": in_variable} if in_variable else {}
    result = cull(
        *("--once", "--url", scripted.url, "--token-file", str(file), "--json", "-v"),
        *WARN,
        *("--notify", recorder.command),
        env=env,
    )
    assert not [token for token in (TOKEN, OTHER_TOKEN) if token in result.out + result.err]
    (notice,) = recorder.notices
    assert notice.environment["HARMLESS"] == "seen"
    assert not [token for token in (TOKEN, OTHER_TOKEN) if token in str(notice)]


def test_the_token_of_the_variable_is_not_passed_on(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.add("dan", idle=NEARLY_DUE)
    monkeypatch.setenv("JPY_API_TOKEN", scripted.token)
    cull_scripted(*WARN, "--notify", recorder.command)
    assert scripted.token not in str(recorder.notices[0])


# Commands that do not behave


QUIET_ENDS = {
    "reads nothing": "exit 0",
    "closes its input": "exec <&-; exit 0",
    "writes much to stdout": "head -c 4M /dev/zero",
}


@pytest.mark.parametrize("script", [pytest.param(script, id=name) for name, script in QUIET_ENDS.items()])
def test_a_command_that_exits_with_0_is_not_mentioned(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, script: str
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    result = cull_scripted(
        "--timeout=1h", "-q", "--notify", write_script(tmp_path / "script", f"#!/bin/sh\n{script}\n")
    )
    assert (result.exit_code, result.out, result.err) == (0, "", "")


def test_what_a_command_prints_is_dropped_and_its_stderr_is_that_of_the_program(
    scripted: ScriptedHub, start: Start
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    culler = start(scripted, "--once", "-q", "--timeout=1h", "--notify", "sh -c 'echo printed; echo complained >&2'")
    assert culler.process.wait(15) == 0
    assert culler.said() == "complained\n"


@pytest.mark.parametrize(("script", "code"), [("exit 3", "3"), ("kill -9 $$", "9")])
def test_a_command_that_fails_is_one_error_and_changes_nothing_else(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, script: str, code: str
) -> None:
    scripted.add("ann", "gpu", idle=LONG_AGO)
    path = tmp_path / "script"
    result = cull_scripted("--timeout=1h", "-q", "--notify", write_script(path, f"#!/bin/sh\n{script}\n"))
    assert (result.exit_code, scripted.running()) == (0, set())
    (line,) = result.lines
    for word in ("ERROR", "--notify", "ann/gpu", str(path), code):
        assert word in line


def remove(path: Path) -> None:
    path.unlink()


def forbid(path: Path) -> None:
    path.chmod(0o644)


def spoil(path: Path) -> None:
    path.write_bytes(b"\x7fNOT")


def misname(path: Path) -> None:
    path.write_text("#!/no/such/interpreter\n")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (remove, "No such file or directory"),
        (forbid, "Permission denied"),
        (spoil, "Exec format error"),
        (misname, "No such file or directory"),
    ],
)
def test_a_command_that_cannot_be_run_any_more_is_one_error(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    path = tmp_path / "script"
    script = write_script(path, "#!/bin/sh\n")
    scripted.fault("DELETE", ".*", then_do(lambda: spoil(path)))
    result = cull_scripted("--timeout=1h", "-q", "--notify", script)
    assert result.exit_code == 0
    (error,) = result.lines
    assert f"--notify for ann: {path}" in error
    assert why in error


def test_a_command_that_hangs_is_killed(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.3)
    scripted.add("ann", idle=LONG_AGO)
    fifo, path = tmp_path / "fifo", tmp_path / "script"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    script = write_script(path, f"#!/bin/sh\nexec 3> '{fifo}'\necho up >&3\nexec sleep 60\n")
    result = cull_scripted("--timeout=1h", "-q", "--notify", script)
    assert result.exit_code == 0
    (line,) = result.lines
    assert f"--notify for ann: {path}" in line
    assert "0.3s" in line
    until_closed = select.poll()
    until_closed.register(reader, select.POLLHUP)  # comes when nobody has it open for writing
    assert os.read(reader, 9) == b"up\n"
    assert until_closed.poll(10_000)
    os.close(reader)


@pytest.mark.filterwarnings("ignore:subprocess [0-9]+ is still running", "ignore:Exception ignored in.*Popen")
def test_a_command_that_may_not_be_killed_is_left_alone(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sudo, which runs as root."""

    def refuse(_process: object) -> None:
        raise PermissionError

    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.1)
    monkeypatch.setattr("subprocess.Popen.kill", refuse)
    scripted.add("ann", idle=LONG_AGO)
    done = tmp_path / "done"
    script = write_script(tmp_path / "script", f"#!/bin/sh\nsleep 3\ntouch '{done}'\n")
    result = cull_scripted("--timeout=1h", "-q", "--notify", script)
    assert result.exit_code == 0
    (line,) = result.lines
    assert "0.1s" in line
    assert not done.exists()


@pytest.mark.parametrize("stream", ["1", "2"], ids=["stdout", "stderr"])
def test_processes_that_a_command_leaves_behind_are_not_waited_for(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, stream: str
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"#!/bin/sh\n{{ cat '{fifo}' >&{stream}; }} &\n"  # until the end of the test
    result = cull_scripted("--timeout=1h", "-q", "--notify", write_script(tmp_path / "script", script))
    fifo.write_text("the end\n")
    assert (result.exit_code, result.err) == (0, "")


def test_failures_of_one_kind_are_counted(cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path) -> None:
    for number in range(20):
        scripted.add(f"user{number}", idle=LONG_AGO)
    path = tmp_path / "script"
    script = write_script(path, "#!/bin/sh\nexit 1\n")
    result = cull_scripted("--timeout=1h", "-q", "--notify", script)
    first, more = result.errors
    assert re.search(rf"--notify for user\d+: {path} exited with 1$", first)
    assert " 19 more " in more


def test_verbose_shows_each_failure(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for number in range(5):
        scripted.add(f"user{number}", idle=LONG_AGO)
    assert cull_scripted("--timeout=1h", "-v", "--notify", "false").err.count(" --notify for user") == 5


def test_after_ten_timeouts_no_other_command_is_started(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.05)
    for number in range(30):
        scripted.add(f"user{number}", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", "-q", "--notify", "sleep 60")
    assert result.exit_code == 0
    assert scripted.running() == set()
    first, left_out, more = result.errors
    assert "0.05s" in first
    skipped, late = map(int, re.findall(r" (\d+)\b", left_out))
    assert 10 <= late < 10 + cull_idle.NOTICES_AT_ONCE
    assert skipped == 30 - late
    assert f" {late - 1} more " in more


# Side by side


class Held:
    """A command for --notify that starts, and ends when it is let go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = write_script(
            folder / "held",
            f"#!/bin/sh\ncd '{folder}'\n: > $$.begun\nuntil [ -e go ]; do sleep 0.02; done\n: > $$.done\n",
        )

    def count(self, what: str) -> int:
        return len(list(self.folder.glob(f"*.{what}")))

    def wait_until_begun(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while self.count("begun") < count and time.monotonic() < deadline:
            time.sleep(0.01)

    def let_go(self) -> None:
        (self.folder / "go").touch()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    folder = tmp_path / "held notices"
    folder.mkdir()
    held = Held(folder)
    yield held
    held.let_go()


def test_four_commands_run_at_a_time_during_culling(cull_scripted: Cull, scripted: ScriptedHub, held: Held) -> None:
    for number in range(9):
        scripted.add(f"user{number}", idle=LONG_AGO)
    begun: list[int] = []

    def look() -> None:
        held.wait_until_begun(4)
        begun.append(held.count("begun"))
        held.let_go()

    scripted.fault("DELETE", ".*", *[normal()] * 8, then_do(look))
    result = cull_scripted("--timeout=1h", "--concurrency=1", "--notify", held.command)
    assert begun == [4]
    assert held.count("done") == 9
    assert result.counts == {"running": 9, "due": 9, "culled": 9}
    assert result.errors == []


@pytest.mark.parametrize(("once", "exit_code"), [([], 0), (["--once"], 1)], ids=["loop", "once"])
def test_after_a_signal_running_commands_finish_and_no_other_starts(
    scripted: ScriptedHub, start: Start, held: Held, once: list[str], exit_code: int
) -> None:
    for number in range(9):
        scripted.add(f"user{number}", idle=LONG_AGO)
    culler = start(scripted, "--timeout=1h", *once, "--notify", held.command)
    culler.wait_for(lambda: len(Result(0, "", culler.said()).outcomes) == 9 and held.count("begun") == 4)
    culler.tell_to_stop()
    assert culler.process.poll() is None
    held.let_go()
    assert culler.process.wait(15) == exit_code
    assert (held.count("begun"), held.count("done")) == (4, 4)
    assert len(re.findall(r" ERROR +--notify: 5 ", culler.said())) == culler.said().count("--notify") == 1


def zombies() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def test_passes_leave_no_processes_files_or_threads_behind(
    scripted: ScriptedHub, loop: RunLoop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.2)
    script = "#!/bin/sh\ncase $CULL_IDLE_USER in good) exit 0 ;; bad) exit 1 ;; late) sleep 60 ;; esac\n"
    left = []

    def add_servers() -> None:
        for name in ("good", "bad", "late", "nul\0"):
            scripted.add(name, idle=LONG_AGO)

    def count() -> None:
        scripted.pause_listening()  # the Hub's files and threads do not count
        for thread in scripted._old_threads:
            thread.join(10)
        left.append((len(os.listdir("/dev/fd")), set(threading.enumerate())))  # noqa: PTH208
        scripted.resume()
        add_servers()

    add_servers()
    command = write_script(tmp_path / "script", script)
    done = loop(scripted, "--timeout=1h", "--notify", command, between=[count] * 3)
    assert [len(each.errors) for each in done.passes] == [3] * 4
    assert left[0] == left[1] == left[2]
    assert not zombies()


# The README's example


def example(word: str) -> str:
    """The script in the README that has this word in it."""
    (text,) = (block.text for block in BLOCKS if word in block.text and block.text.startswith("#!"))
    return text


@pytest.fixture
def mails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets the arguments and the text of each mail."""
    written, bin_ = tmp_path / "written", tmp_path / "bin"
    bin_.mkdir()
    write_script(bin_ / "mail", f"#!/bin/sh\nprintf '%s|' \"$@\" >> '{written}'\ncat >> '{written}'\n")
    monkeypatch.setenv("PATH", str(bin_), prepend=os.pathsep)
    monkeypatch.setenv("TZ", "XYZ-2")  # two hours ahead of UTC
    return written


@pytest.mark.parametrize(
    ("user", "server", "named"), [("dan", "gpu", "server 'gpu' will"), ("d@x.org", "", "server will")]
)
def test_the_readmes_mail_goes_to_the_warned_user(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, mails: Path, user: str, server: str, named: str
) -> None:
    scripted.add(user, server, idle=NEARLY_DUE)
    scripted.add("ann", idle=LONG_AGO)
    script = write_script(tmp_path / "script", example("mail -s"))
    result = cull_scripted(*WARN, "--notify", script)
    assert result.errors == []
    last_activity = scripted.users[user].servers[server].last_activity
    assert isinstance(last_activity, datetime)
    due = f"{last_activity + timedelta(hours=1 + 2):%H:%M} XYZ"
    assert mails.read_text() == (
        f"-s|Your Jupyter server is idle|{user}|Your {named} be stopped at {due} unless you use it.\n"
    )


def test_the_readmes_mail_tells_root_of_a_pass_that_failed(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, mails: Path
) -> None:
    script = write_script(tmp_path / "script", example("mail -s"))
    assert cull_scripted(*WARN, "--notify", script, token="another").exit_code == 3
    arguments, _, text = mails.read_text().rpartition("|")
    assert arguments == "-s|cull-idle: pass_failed|root"
    assert "another" not in text
    assert json.loads(text)["event"] == "pass"


@pytest.mark.parametrize("name", ["-fdan", "dan eve", "|id", "/etc/passwd", "dan,eve", "a\nb", "dän"])
def test_the_readmes_mail_is_not_sent_to_a_name_that_is_no_address(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, mails: Path, name: str
) -> None:
    scripted.add(name, idle=NEARLY_DUE)
    script = write_script(tmp_path / "script", example("mail -s"))
    assert len(cull_scripted(*WARN, "--notify", script).errors) == 1
    assert not mails.exists()
