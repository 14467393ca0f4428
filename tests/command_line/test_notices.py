"""--notify runs a command for each event. Whatever the command does, the pass goes on."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from messages import Says
from processes import Start, wait_for
from readme_text import BLOCKS
from runs import Cull, RunLoop
from scenes import Play, Scene, idle, server, user
from scripted_hub import NEARLY_DUE, ScriptedHub, edited, respond, then_do

import cull_idle

WARN = ("--timeout=1h", "--warn-before=15m")
CULL = ("--timeout=1h", "-q")
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
    def variables(self) -> list[str]:
        return [self.environment[f"CULL_IDLE_{name}"] for name in ("EVENT", "USER", "SERVER", "DUE")]


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


def test_the_command_runs_for_what_is_warned_done_or_failed_and_for_a_pass_that_failed(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder
) -> None:
    """Its input is the line of JSON. What is gone, spared or kept is no news."""
    scripted.slow_stop = 0.0
    scripted.now = scripted.now.replace(hour=12, minute=0, second=0, microsecond=0)
    idle("ann/gpu", "failing", "gone", "spared")(scripted)
    idle("cat", stop_seconds=30.0)(scripted)
    scripted.add("bob")
    scripted.add("dan", idle=NEARLY_DUE - 30)
    user("eve")(scripted)
    scripted.fault("DELETE", "/users/failing/server", respond(418))
    scripted.fault("GET", "/users/gone", then_do(scripted.users["gone"].servers.clear))
    scripted.fault("GET", "/users/spared", then_do(lambda: scripted.touch("spared")))
    result = cull_scripted(*WARN, "--json", "--cull-users", "--notify", recorder.command)
    assert [result.outcomes[name] for name in ("gone", "spared")] == ["gone", "spared"]
    assert sorted(notice.variables for notice in recorder.notices) == [
        ["culled", "ann", "gpu", ""],
        ["culled", "eve", "", ""],
        ["failed", "failing", "", ""],
        ["pass_failed", "", "", ""],
        ["stopping", "cat", "", ""],
        ["warned", "dan", "", f"{scripted.now:%Y-%m-%d}T12:10:00Z"],
    ]
    *printed, total = map(json.loads, result.out.splitlines())
    assert all(notice.facts in [*printed, {**total, "outcome": "pass_failed"}] for notice in recorder.notices)
    assert all(notice.stdin.endswith("}\n") for notice in recorder.notices)


def test_a_dry_run_runs_nothing(cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder) -> None:
    idle("ann")(scripted)
    server("dan", NEARLY_DUE)(scripted)
    for more in ([], ["--json"]):
        assert cull_scripted("--dry-run", *WARN, "--notify", recorder.command, *more).exit_code == 0
    assert recorder.notices == []


def test_the_command_is_split_like_in_a_shell_but_not_run_by_one(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder
) -> None:
    idle("ann")(scripted)
    words = r""" 'two words' one\ word "it's" '' $HOME "$HOME" `id` $(id) ; id & > x | * ~ # y"""
    assert cull_scripted("--timeout=1h", "--notify", recorder.command + words).exit_code == 0
    (notice,) = recorder.notices
    assert notice.arguments == [
        "two words", "one word", "it's", "", "$HOME", "$HOME", "`id`", "$(id)", ";", "id", "&", ">", "x", "|", "*", "~",
        "#", "y",
    ]  # fmt: skip


ODD_NAMES = [
    *("dave smith", "-rf", "line\nfeed", "tab\tbell\a", "quote\"'`$(id);", "back\\slash", "ünï-日本-🙂", "a=b"),
    "x" * 5000,
]


def test_odd_names_are_passed_unchanged(cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder) -> None:
    for name in ODD_NAMES:
        scripted.add(name, name[::-1], idle=NEARLY_DUE)
    assert cull_scripted(*WARN, "--notify", recorder.command).errors == []
    named = {(notice.variables[1], notice.variables[2]) for notice in recorder.notices}
    assert named == {(name, name[::-1]) for name in ODD_NAMES}
    assert {(notice.facts["user"], notice.facts["server"]) for notice in recorder.notices} == named


def test_a_name_that_no_variable_can_hold_costs_only_its_own_notice(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder
) -> None:
    def rename(page: dict[str, Any]) -> dict[str, Any]:
        odd, ann = page["items"]
        return {**page, "items": [*({**odd, "name": name} for name in ("nul\0", "half\ud800", "x" * 300_000)), ann]}

    server("odd", NEARLY_DUE)(scripted)
    server("ann", NEARLY_DUE)(scripted)
    scripted.fault("GET", "/users", edited(rename))
    result = cull_scripted(*WARN, "-q", "--notify", recorder.command)
    assert (result.exit_code, len(result.errors), len(result.lines)) == (0, 3, 3)
    assert [notice.variables[1] for notice in recorder.notices] == ["ann"]


@pytest.mark.parametrize(
    ("in_file", "in_variable"),
    [
        pytest.param(True, "", id="of a file"),
        pytest.param(True, TOKEN, id="of a file and a variable"),
        pytest.param(True, OTHER_TOKEN, id="of a file, nor another of a variable"),
        pytest.param(False, TOKEN, id="of a variable"),
    ],
)
def test_no_token_is_in_the_environment_the_input_or_the_log(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder, tmp_path: Path, in_variable: str, *, in_file: bool
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    scripted.token = TOKEN
    server("dan", NEARLY_DUE)(scripted)
    env = {"JPY_API_TOKEN": TOKEN, "CURL_HEADER": f"Authorization: token {TOKEN}", "HARMLESS": "seen"}
    arguments = ("--json", "-v", *WARN, "--notify", recorder.command, *([f"--token-file={file}"] if in_file else []))
    result = cull_scripted(*arguments, token=in_variable, env=env)
    (notice,) = recorder.notices
    assert notice.environment["HARMLESS"] == "seen"
    assert not [token for token in (TOKEN, OTHER_TOKEN) if token in f"{notice} {result}"]


# Commands that do not behave


@pytest.mark.parametrize("command", ["", "'unclosed", "/no/such/command", "no-such-command here", "/", __file__])
def test_what_is_no_command_is_a_usage_error(cull_scripted: Cull, scripted: ScriptedHub, command: str) -> None:
    result = cull_scripted("--notify", command)
    assert (result.exit_code, len(result.lines)) == (2, 1)
    assert scripted.requests == []


SILENT = [
    Scene("a command that reads nothing", [idle("ann")], "-q --notify=true", deletes=["ann"]),
    Scene("a command that closes its input", [idle("ann")], """-q --notify="sh -c 'exec <&-'" """, deletes=["ann"]),
    Scene("a command that prints much", [idle("ann")], "-q --notify='head -c 4M /dev/zero'", deletes=["ann"]),
]
FAILING = [
    Scene("a command that fails", [idle("ann/gpu")], "-q --notify=false", deletes=["ann/gpu"], says=True),
    Scene("a command that is killed", [idle("a")], """-q --notify="sh -c 'kill -9 $$'" """, deletes=["a"], says=True),
]


@pytest.mark.parametrize("scene", [*SILENT, *FAILING], ids=Scene.__str__)
def test_only_a_command_that_fails_is_mentioned_and_nothing_else_changes(scene: Scene, play: Play) -> None:
    result = play(scene)
    assert (result.out, len(result.lines)) == ("", 1 if scene in FAILING else 0)


@pytest.mark.parametrize("stream", ["1", "2"], ids=["stdout", "stderr"])
def test_a_process_that_a_command_leaves_behind_is_not_waited_for(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, stream: str
) -> None:
    idle("ann")(scripted)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    result = cull_scripted(*CULL, "--notify", f"""sh -c "cat '{fifo}' >&{stream} &" """)
    fifo.write_text("the end\n")
    assert (result.exit_code, result.err) == (0, "")


def test_its_stderr_is_that_of_the_program(scripted: ScriptedHub, start: Start) -> None:
    idle("ann")(scripted)
    culler = start(scripted, "--once", *CULL, "--notify", "sh -c 'echo printed; echo complained >&2'")
    assert (culler.wait(), culler.said()) == (0, "complained\n")


def test_a_command_that_cannot_be_run_any_more(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, says: Says
) -> None:
    idle("ann")(scripted)
    script = tmp_path / "script"
    command = write_script(script, "#!/bin/sh\n")
    scripted.fault("DELETE", ".*", then_do(script.unlink))
    result = cull_scripted(*CULL, "--notify", command)
    assert (result.exit_code, scripted.running()) == (0, set())
    says(result.err)


@pytest.mark.parametrize(
    "may_kill",
    [True, False],
    ids=["a command that hangs is killed", "a command that hangs and may not be killed, as sudo"],
)
def test_a_command_that_hangs_is_given_up(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, says: Says, *, may_kill: bool
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            started.append(self)

        def kill(self) -> None:
            if not may_kill:
                raise PermissionError
            super().kill()

    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.1)
    monkeypatch.setattr("subprocess.Popen", Noted)
    idle("ann")(scripted)
    result = cull_scripted(*CULL, "--notify", "sleep 60")
    assert result.exit_code == 0
    says(result.err)
    (process,) = started
    assert process.returncode == (-signal.SIGKILL if may_kill else None)
    if not may_kill:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_failures_of_one_kind_are_counted_and_shown_with_v(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    idle(*(f"user{number}" for number in range(20)))(scripted)
    _, more = cull_scripted(*CULL, "--notify", "false").errors
    assert re.findall(r" (\d+) ", more) == ["19"]
    idle(*(f"user{number}" for number in range(5)))(scripted)
    assert cull_scripted("-v", "--timeout=1h", "--notify", "false").err.count(" --notify for user") == 5


def test_after_ten_timeouts_no_other_command_is_started(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.05)
    idle(*(f"user{number}" for number in range(30)))(scripted)
    result = cull_scripted(*CULL, "--notify", "sleep 60")
    assert (result.exit_code, scripted.running()) == (0, set())
    _, left_out, more = result.errors
    skipped, late = map(int, re.findall(r" (\d+)\b", left_out))
    assert 10 <= late < 10 + cull_idle.NOTICES_AT_ONCE
    assert skipped == 30 - late
    assert f" {late - 1} more " in more


@pytest.mark.parametrize("signalled", [False, True], ids=["without a signal all run", "after a signal no other starts"])
def test_four_commands_run_at_a_time(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, tell_to_stop: Callable[[], None], *, signalled: bool
) -> None:
    folder = tmp_path / "held"
    folder.mkdir()
    script = f"cd '{folder}'\n: > $$.begun\nuntil [ -e go ]; do sleep 0.02; done\n: > $$.done\n"
    begun: list[int] = []

    def count(what: str) -> int:
        return len(list(folder.glob(f"*.{what}")))

    def let_go() -> None:
        wait_for(lambda: scripted.stopped_count == 9 and count("begun") >= 4)
        begun.append(count("begun"))
        if signalled:
            tell_to_stop()
        (folder / "go").touch()

    idle(*(f"user{number}" for number in range(9)))(scripted)
    watcher = threading.Thread(target=let_go)
    watcher.start()
    command = write_script(tmp_path / "script", f"#!/bin/sh\n{script}")
    result = cull_scripted("--timeout=1h", "--notify", command)
    watcher.join()
    assert result.exit_code == signalled
    assert (begun, count("begun"), count("done")) == ([4], *([4, 4] if signalled else [9, 9]))
    assert [re.findall(r"--notify: (\d+) ", line) for line in result.errors] == ([["5"], []] if signalled else [])


def zombies() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def test_passes_leave_no_processes_files_or_threads_behind(
    scripted: ScriptedHub, loop: RunLoop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.5)
    script = "#!/bin/sh\ncase $CULL_IDLE_USER in good) exit 0 ;; bad) exit 1 ;; late) sleep 60 ;; esac\n"
    left = []

    def count() -> None:
        scripted.pause_listening()  # the Hub's files and threads do not count
        left.append((len(os.listdir("/dev/fd")), set(threading.enumerate())))  # noqa: PTH208
        scripted.resume()
        idle("good", "bad", "late", "nul\0")(scripted)

    idle("good", "bad", "late", "nul\0")(scripted)
    command = write_script(tmp_path / "script", script)
    done = loop(scripted, "--timeout=1h", "--notify", command, between=[count] * 2)
    assert all(len(each.errors) >= 3 for each in done.passes)
    assert left[0] == left[1]
    assert not zombies()


# The README's example


@pytest.fixture
def mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """The README's script that sends mails, and a file that gets the arguments and the text of each."""
    sent, programs = tmp_path / "sent", tmp_path / "bin"
    programs.mkdir()
    write_script(programs / "mail", f"#!/bin/sh\nprintf '%s|' \"$@\" >> '{sent}'\ncat >> '{sent}'\n")
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("TZ", "XYZ-2")  # two hours ahead of UTC
    (text,) = (block.text for block in BLOCKS if "mail -s" in block.text and block.text.startswith("#!"))
    return write_script(tmp_path / "script", text), sent


@pytest.mark.parametrize(
    ("user", "server", "named"), [("dan", "gpu", "server 'gpu' will"), ("d@x.org", "", "server will")]
)
def test_the_readmes_mail_goes_to_the_warned_user(
    cull_scripted: Cull, scripted: ScriptedHub, mail: tuple[str, Path], user: str, server: str, named: str
) -> None:
    script, sent = mail
    idle("ann")(scripted)
    scripted.now = scripted.now.replace(hour=12, minute=0, second=0, microsecond=0)
    scripted.add(user, server, idle=NEARLY_DUE - 30)
    assert cull_scripted(*WARN, "--notify", script).errors == []
    assert sent.read_text() == (
        f"-s|Your Jupyter server is idle|{user}|Your {named} be stopped at 14:10 XYZ unless you use it.\n"
    )


def test_the_readmes_mail_tells_root_of_a_pass_that_failed(cull_scripted: Cull, mail: tuple[str, Path]) -> None:
    script, sent = mail
    assert cull_scripted(*WARN, "--notify", script, token="another").exit_code == 3
    arguments, _, text = sent.read_text().rpartition("|")
    assert arguments == "-s|cull-idle: pass_failed|root"
    assert json.loads(text)["event"] == "pass"


def test_the_readmes_mail_is_not_sent_to_a_name_that_is_no_address(
    cull_scripted: Cull, scripted: ScriptedHub, mail: tuple[str, Path]
) -> None:
    script, sent = mail
    names = ["-fdan", "dan eve", "|id", "/etc/passwd", "dan,eve", "a\nb", "dän"]
    for name in names:
        scripted.add(name, idle=NEARLY_DUE)
    assert len(cull_scripted("-v", *WARN, "--notify", script).err.split("--notify for ")[1:]) == len(names)
    assert not sent.exists()
