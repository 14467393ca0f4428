"""--notify: a command of the administrator's own, for each event; whatever it does, the pass does the same."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Cull
from hub import RealHub
from scripted_hub import ScriptedHub, edited, respond, respond_json, then_do
from test_loop import Start
from test_loop import start as start  # noqa: PLC0414 -- a fixture: used by its name
from test_readme import DEPLOY
from test_warnings import Loop

import cull_idle

IDLE, NEARLY = 7290.0, 50 * 60.0 + 30  # seconds
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


def errors(lines: list[str]) -> list[str]:
    return [line.removeprefix("ERROR    ") for line in lines if line.startswith("ERROR")]


# What the command gets


def test_it_is_run_for_each_server_warned_culled_and_stopping(
    hub: RealHub, cull_real: Cull, recorder: Recorder
) -> None:
    hub.spawn_many(
        [
            ("ann", "gpu", {"idle_seconds": IDLE}),
            ("bob", "", {"idle_seconds": 90}),
            ("cat", "", {"idle_seconds": IDLE, "stop_seconds": 30}),
            ("dan", "", {"idle_seconds": NEARLY}),
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


def test_it_is_run_for_a_user_who_is_deleted(hub: RealHub, cull_real: Cull, recorder: Recorder) -> None:
    hub.add_user("ann", idle_seconds=IDLE, age_seconds=IDLE)
    cull_real("--timeout=1h", "--cull-users", "--notify", recorder.command, token=hub.user_culler_token)
    (notice,) = recorder.notices
    assert notice.variables == {"event": "culled", "user": "ann", "server": "", "due": ""}
    assert (notice.facts["event"], notice.facts["action"], notice.facts["server"]) == ("user", "delete", None)


def test_it_is_run_for_what_failed_and_not_for_what_is_gone_or_spared(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder
) -> None:
    for name in ("failing", "gone", "spared"):
        scripted.add(name, idle=IDLE)
    scripted.fault("DELETE", "/users/failing/server", respond(418))
    scripted.fault("DELETE", "/users/gone/server", respond(404))
    scripted.fault("GET", "/users/spared", then_do(lambda: scripted.touch("spared")))
    result = cull_scripted("--timeout=1h", "--notify", recorder.command)
    assert [word in result.err for word in ("failed failing", "gone gone", "spared spared")] == [True] * 3
    (notice,) = recorder.notices
    assert (notice.variables["event"], notice.variables["user"]) == ("failed", "failing")
    assert notice.facts["error"] == "the Hub answered 418"


def test_a_dry_run_runs_nothing(cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder) -> None:
    scripted.add("ann", idle=IDLE)
    scripted.add("dan", idle=NEARLY)
    for more in ([], ["--json"]):
        assert cull_scripted("--dry-run", *WARN, "--notify", recorder.command, *more).exit_code == 0
    assert recorder.notices == []


def test_the_words_are_split_as_a_shell_would_and_no_shell_reads_them(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder
) -> None:
    scripted.add("ann", idle=IDLE)
    words = r""" 'two words' one\ word "it's" '' $HOME "$HOME" `id` $(id) ; id & > x | * ~ # y"""
    assert cull_scripted("--timeout=1h", "--notify", recorder.command + words).exit_code == 0
    (notice,) = recorder.notices
    assert notice.arguments == [
        "two words", "one word", "it's", "", "$HOME", "$HOME", "`id`", "$(id)", ";", "id", "&", ">", "x", "|", "*", "~",
        "#", "y",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "'' is no program that can be run"),
        ("  ", "is no program that can be run"),
        ("'unclosed", "No closing quotation"),
        ("/no/such/command", "'/no/such/command' is no program that can be run"),
        ("no-such-command here", "'no-such-command' is no program that can be run"),
        ("/", "'/' is no program that can be run"),
        ("$HOME/notify", "'$HOME/notify' is no program that can be run"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(
    cull_scripted: Cull, scripted: ScriptedHub, command: str, words: str
) -> None:
    result = cull_scripted("--notify", command)
    assert result.exit_code == 2
    assert len(result.lines) == 1
    assert words in result.err
    assert scripted.requests == []


def test_a_file_that_is_not_executable_is_refused_at_once(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path
) -> None:
    file = tmp_path / "script"
    file.write_text("#!/bin/sh\n")
    assert "is no program that can be run" in cull_scripted("--notify", str(file)).err
    assert scripted.requests == []


def test_the_variable_and_the_file_are_taken_as_well(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder, tmp_path: Path
) -> None:
    scripted.add("dan", idle=NEARLY)
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


def test_odd_names_come_as_they_are(cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder) -> None:
    for name in ODD_NAMES:
        scripted.add(name, name[::-1], idle=NEARLY)
    result = cull_scripted(*WARN, "--notify", recorder.command)
    assert errors(result.lines) == []
    variables = {(notice.variables["user"], notice.variables["server"]) for notice in recorder.notices}
    assert variables == {(name, name[::-1]) for name in ODD_NAMES}
    assert {(notice.facts["user"], notice.facts["server"]) for notice in recorder.notices} == variables


@pytest.mark.parametrize(
    ("name", "shown", "why"),
    [
        ("nul\0", r"nul\x00", "embedded null byte"),
        ("half\ud800", r"half\ud800", "surrogates not allowed"),
        ("x" * 300_000, "x" * 300_000, "Argument list too long"),
    ],
    ids=["NUL", "half a character", "too long"],
)
def test_a_name_that_no_variable_can_hold_is_one_line(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder, name: str, shown: str, why: str
) -> None:
    scripted.add("odd", idle=NEARLY)
    scripted.add("ann", idle=NEARLY)
    scripted.fault(
        "GET", "/users", edited(lambda page: {**page, "items": [{**page["items"][0], "name": name}, page["items"][1]]})
    )
    result = cull_scripted(*WARN, "--notify", recorder.command)
    assert result.exit_code == 0
    (error,) = errors(result.lines)
    assert error.startswith(f"--notify for {shown}: ")
    assert "cannot be run: " in error
    assert error.endswith(why)
    assert [notice.variables["user"] for notice in recorder.notices] == ["ann"]


# The token

TELL_ALL = """#!/bin/sh
{ env; cat; } | tr '\\n' ' ' >&2
exit 1
"""


@pytest.mark.parametrize("in_variable", [None, TOKEN, OTHER_TOKEN], ids=["no variable", "the same", "another"])
def test_no_token_is_in_its_environment_its_input_or_the_log(
    cull: Cull,
    scripted: ScriptedHub,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_variable: str | None,
) -> None:
    scripted.token = TOKEN
    scripted.add("dan", idle=NEARLY)
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    monkeypatch.setenv("JPY_API_TOKEN", in_variable or TOKEN)
    monkeypatch.setenv("CURL_HEADER", f"Authorization: token {TOKEN}")
    monkeypatch.setenv("HARMLESS", "seen")
    monkeypatch.setattr(cull_idle, "shorten", lambda text: text)
    env = {"JUPYTERHUB_API_TOKEN": in_variable} if in_variable else {}
    for command in (recorder.command, write_script(tmp_path / "tell", TELL_ALL)):
        result = cull(
            *("--once", "--url", scripted.url, "--token-file", str(file), "--json", "-v"),
            *WARN,
            *("--notify", command),
            env=env,
        )
        assert "HARMLESS=seen" in result.err or command == recorder.command
        assert not [token for token in (TOKEN, OTHER_TOKEN) if token in result.out + result.err]
    (notice,) = recorder.notices
    assert notice.environment["HARMLESS"] == "seen"
    assert not [token for token in (TOKEN, OTHER_TOKEN) if token in str(notice)]


def test_the_token_of_the_variable_is_not_passed_on(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.add("dan", idle=NEARLY)
    monkeypatch.setenv("JPY_API_TOKEN", scripted.token)
    cull_scripted(*WARN, "--notify", recorder.command)
    assert scripted.token not in str(recorder.notices[0])


def test_a_command_that_finds_the_token_and_tells_it_is_not_quoted(
    cull: Cull, scripted: ScriptedHub, tmp_path: Path
) -> None:
    scripted.add("dan", idle=NEARLY)
    file = tmp_path / "token"
    file.write_text(scripted.token)
    script = write_script(tmp_path / "tell", f'#!/bin/sh\necho "curl: token $(cat {file}) refused" >&2\nexit 22\n')
    result = cull("--once", "--url", scripted.url, *WARN, "--token-file", str(file), "--notify", script)
    assert "exited with 22: curl: token … refused" in result.err
    assert scripted.token not in result.err


# Commands that do not behave


MEBIBYTE = 1 << 20
QUIET_ENDS = {
    "reads nothing": "exit 0",
    "closes its input": "exec <&-; exit 0",
    "writes much to stdout": f"head -c {4 * MEBIBYTE} /dev/zero",
    "writes much to stderr": f"head -c {4 * MEBIBYTE} /dev/zero >&2",
    "complains, and is done": "echo 'never mind' >&2",
}
BAD_ENDS = {
    "exits with 3": ("exit 3", "exited with 3: no word of why"),
    "says why": ("echo 'no such address' >&2; exit 75", "exited with 75: no such address"),
    "says why at last": ("echo usage >&2; echo >&2; echo 'bad word' >&2; echo >&2; exit 1", "exited with 1: bad word"),
    "says it to stdout": ("echo oh; exit 1", "exited with 1: no word of why"),
    "says no text": (r"printf '\033[31m\377\n' >&2; exit 1", "exited with 1: \\x1b[31m�"),
    "says much": (f"head -c {4 * MEBIBYTE} /dev/zero | tr '\\0' x >&2; exit 1", "exited with 1: " + "x" * 199 + "…"),
    "is killed": ("kill -9 $$", "was killed (9): no word of why"),
}  # fmt: skip


@pytest.mark.parametrize("script", [pytest.param(script, id=name) for name, script in QUIET_ENDS.items()])
def test_a_command_that_is_done_is_not_mentioned(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, script: str
) -> None:
    scripted.add("ann", idle=IDLE)
    result = cull_scripted(
        "--timeout=1h", "-q", "--notify", write_script(tmp_path / "script", f"#!/bin/sh\n{script}\n")
    )
    assert (result.exit_code, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize(
    ("script", "end"), [pytest.param(script, end, id=name) for name, (script, end) in BAD_ENDS.items()]
)
def test_a_command_that_fails_is_one_line_and_changes_nothing_else(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, script: str, end: str
) -> None:
    scripted.add("ann", "gpu", idle=IDLE)
    path = tmp_path / "script"
    result = cull_scripted("--timeout=1h", "-q", "--notify", write_script(path, f"#!/bin/sh\n{script}\n"))
    assert result.exit_code == 0
    assert result.lines == [f"ERROR    --notify for ann/gpu: {path} {end}"]
    assert scripted.running() == set()


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
def test_a_command_that_cannot_be_run_any_more_is_one_line(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    scripted.add("ann", idle=IDLE)
    path = tmp_path / "script"
    script = write_script(path, "#!/bin/sh\n")
    scripted.fault("DELETE", ".*", then_do(lambda: spoil(path)))
    result = cull_scripted("--timeout=1h", "-q", "--notify", script)
    assert result.exit_code == 0
    assert result.lines == [f"ERROR    --notify for ann: {path} cannot be run: {why}"]


def test_without_a_place_for_temporary_files_it_is_one_line(
    cull_scripted: Cull, scripted: ScriptedHub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    scripted.add("ann", idle=IDLE)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    result = cull_scripted("--timeout=1h", "-q", "--notify", recorder.command)
    assert result.exit_code == 0
    (line,) = result.lines
    assert line.endswith("cannot be run: No usable temporary directory found")


def test_a_command_that_hangs_is_killed_with_all_that_it_started(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.3)
    scripted.add("ann", idle=IDLE)
    fifo, path = tmp_path / "fifo", tmp_path / "script"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    script = write_script(path, f"#!/bin/sh\nexec 3> '{fifo}'\necho up >&3\nsleep 60 &\nsleep 60\n")
    result = cull_scripted("--timeout=1h", "-q", "--notify", script)
    assert result.exit_code == 0
    assert result.lines == [f"ERROR    --notify for ann: {path} was not done after 0.3s, and is given up"]
    until_closed = select.poll()
    until_closed.register(reader, select.POLLHUP)  # comes when nobody has it open for writing
    assert os.read(reader, 9) == b"up\n"
    assert until_closed.poll(10_000)
    os.close(reader)


@pytest.mark.filterwarnings("ignore:subprocess [0-9]+ is still running", "ignore:Exception ignored in.*Popen")
def test_a_command_that_may_not_be_killed_is_left_alone(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def refuse(group: int, _number: int) -> None:
        started.append(group)
        raise PermissionError

    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", refuse)
        scripted.add("ann", idle=IDLE)
        result = cull_scripted(
            "--timeout=1h", "-q", "--notify", write_script(tmp_path / "script", "#!/bin/sh\nsleep 60\n")
        )
    assert result.exit_code == 0
    (line,) = result.lines
    assert line.endswith("was not done after 0.1s, and is given up")
    os.killpg(started[0], signal.SIGKILL)
    os.waitpid(started[0], 0)


@pytest.mark.parametrize("stream", ["1", "2"], ids=["stdout", "stderr"])
def test_what_a_command_leaves_running_is_not_waited_for(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, stream: str
) -> None:
    scripted.add("ann", idle=IDLE)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"#!/bin/sh\n{{ cat '{fifo}' >&{stream}; }} &\n"  # until the end of the test
    result = cull_scripted("--timeout=1h", "-q", "--notify", write_script(tmp_path / "script", script))
    fifo.write_text("the end\n")
    assert (result.exit_code, result.err) == (0, "")


def test_failures_of_one_kind_are_counted_whatever_the_command_says_of_each(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path
) -> None:
    for number in range(20):
        scripted.add(f"user{number}", idle=IDLE)
    path = tmp_path / "script"
    script = write_script(path, '#!/bin/sh\necho "no such address: $CULL_IDLE_USER" >&2\nexit 1\n')
    result = cull_scripted("--timeout=1h", "-q", "--notify", script)
    first, more = errors(result.lines)
    assert re.fullmatch(rf"--notify for (user\d+): {path} exited with 1: no such address: \1", first)
    assert more == f"19 more failed in the same way: --notify: {path} exited with 1"


def test_with_v_each_failure_has_a_line(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for number in range(5):
        scripted.add(f"user{number}", idle=IDLE)
    assert cull_scripted("--timeout=1h", "-v", "--notify", "false").err.count("false exited with 1") == 6


def test_after_ten_that_were_late_no_other_is_begun(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.05)
    for number in range(30):
        scripted.add(f"user{number}", idle=IDLE)
    result = cull_scripted("--timeout=1h", "-q", "--notify", "sleep 60")
    assert result.exit_code == 0
    assert scripted.running() == set()
    first, left_out, more = errors(result.lines)
    assert first.endswith(": sleep was not done after 0.05s, and is given up")
    late = int(re.findall(r"because (\d+) were not done in time$", left_out)[0])
    assert 10 <= late < 10 + cull_idle.NOTICES_AT_ONCE
    assert left_out.startswith(f"--notify: {30 - late} left out")
    assert more.startswith(f"{late - 1} more failed in the same way: --notify: sleep was not done after")


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


def test_four_run_at_a_time_while_culling_goes_on(cull_scripted: Cull, scripted: ScriptedHub, held: Held) -> None:
    for number in range(9):
        scripted.add(f"user{number}", idle=IDLE)
    begun: list[int] = []

    def look() -> None:
        held.wait_until_begun(4)
        begun.append(held.count("begun"))
        held.let_go()

    scripted.fault("DELETE", "/users/user8/server", then_do(look))
    result = cull_scripted("--timeout=1h", "--concurrency=1", "--notify", held.command)
    assert begun == [4]
    assert held.count("done") == 9
    assert "9 due, 9 culled" in result.lines[-1]
    assert errors(result.lines) == []


@pytest.mark.parametrize(("once", "exit_code"), [([], 0), (["--once"], 1)], ids=["loop", "once"])
def test_a_signal_lets_those_that_run_finish_and_begins_no_other(
    scripted: ScriptedHub, start: Start, held: Held, once: list[str], exit_code: int
) -> None:
    for number in range(9):
        scripted.add(f"user{number}", idle=IDLE)
    culler = start(scripted, "--timeout=1h", *once, "--notify", held.command)
    culler.wait_for(lambda: culler.said().count("culled user") == 9 and held.count("begun") == 4)
    culler.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert culler.process.poll() is None
    held.let_go()
    assert culler.process.wait(15) == exit_code
    assert (held.count("begun"), held.count("done")) == (4, 4)
    assert "ERROR    --notify: 5 left out, because told to stop\n" in culler.said()
    assert culler.said().count("--notify") == 1


def zombies() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def test_passes_leave_no_process_file_or_thread_behind(
    scripted: ScriptedHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", scripted.token)
    monkeypatch.setattr(cull_idle, "NOTICE_SECONDS", 0.2)
    script = "#!/bin/sh\ncase $CULL_IDLE_USER in good) exit 0 ;; bad) exit 1 ;; late) sleep 60 ;; esac\n"
    loop = Loop(scripted, capsys, "--notify", write_script(tmp_path / "script", script))
    counts = []
    for _ in range(3):
        for name in ("good", "bad", "late", "nul\0"):
            scripted.add(name, idle=IDLE)
        assert len(errors(loop.make_pass())) == 3
        scripted.pause_listening()  # the Hub's files and threads do not count
        for thread in scripted._old_threads:
            thread.join(10)
        counts.append((len(os.listdir("/dev/fd")), set(threading.enumerate())))  # noqa: PTH208
        scripted.resume()
    assert counts[0] == counts[1] == counts[2]
    assert not zombies()


# The examples in deploy


def test_the_mail_is_written_to_who_is_warned(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, bin_ = tmp_path / "written", tmp_path / "bin"
    bin_.mkdir()
    write_script(bin_ / "mail", f"#!/bin/sh\nprintf '%s|' \"$@\" >> '{written}'\ncat >> '{written}'\n")
    monkeypatch.setenv("PATH", str(bin_), prepend=os.pathsep)
    scripted.add("dan", "gpu", idle=NEARLY)
    scripted.add("ann", idle=IDLE)
    script = write_script(tmp_path / "script", DEPLOY["notify-mail"])
    result = cull_scripted(*WARN, "--notify", script)
    assert errors(result.lines) == []
    last_activity = scripted.users["dan"].servers["gpu"].last_activity
    assert re.fullmatch(
        r"-s\|Your Jupyter server is idle\|dan\|It will be stopped at \S+Z unless you use it.\n", written.read_text()
    )
    assert isinstance(last_activity, datetime)
    assert cull_idle.format_time(last_activity + timedelta(hours=1)) in written.read_text()


@pytest.mark.parametrize("name", ["-fdan", "dan eve", "|id", "/etc/passwd", "dan,eve", "a\nb", "dän"])
def test_the_mail_goes_to_nobody_whose_name_is_no_address(
    cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    written, bin_ = tmp_path / "written", tmp_path / "bin"
    bin_.mkdir()
    write_script(bin_ / "mail", f"#!/bin/sh\ncat > '{written}'\n")
    monkeypatch.setenv("PATH", str(bin_), prepend=os.pathsep)
    scripted.add(name, idle=NEARLY)
    (error,) = errors(cull_scripted(*WARN, "--notify", write_script(tmp_path / "script", DEPLOY["notify-mail"])).lines)
    assert "exited with 1: " in error
    assert not written.exists()


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ScriptedHub, str]]:
    """Something that takes POST, and the script of deploy, which posts to it."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    text = DEPLOY["notify-webhook"]
    url = "https://chat.example.org/hooks/xyz"
    assert url in text
    with ScriptedHub() as chat:
        chat.fault("POST", "/hooks/xyz", respond_json(200, "ok"), times=None)
        yield chat, write_script(tmp_path / "script", text.replace(url, f"{chat.url}/hooks/xyz"))


def test_the_webhook_posts_everything(
    cull_scripted: Cull, scripted: ScriptedHub, chat: tuple[ScriptedHub, str]
) -> None:
    scripted.add("dan", "gpu", idle=NEARLY)
    scripted.add('ünï "x"', idle=IDLE)
    scripted.add("bob", idle=IDLE)
    scripted.fault("DELETE", "/users/bob/server", respond(418))
    scripted.add_user("eve", idle=IDLE)
    result = cull_scripted(*WARN, "--cull-users", "--notify", chat[1])
    assert [line for line in errors(result.lines) if "notify" in line] == []
    texts = sorted(json.loads(request.body)["text"] for request in chat[0].requests)
    assert [re.sub(r"\d\ds", "…", text) for text in texts] == [
        "culled eve: idle 2h01m, limit 1h",
        'culled ünï "x": idle 2h01m, limit 1h',
        'culled ünï "x": idle 2h01m, limit 1h',
        "failed bob: the Hub answered 418",
        "warned dan/gpu: idle 50m…, limit 1h; due in 9m…",
    ]
    assert {request.headers["content-type"] for request in chat[0].requests} == {"application/json"}


def test_a_webhook_that_refuses_is_a_line_that_says_so(
    cull_scripted: Cull, scripted: ScriptedHub, chat: tuple[ScriptedHub, str]
) -> None:
    chat[0].fault("POST", "/hooks/xyz", respond(403))
    chat[0]._faults.reverse()
    scripted.add("dan", idle=NEARLY)
    (error,) = errors(cull_scripted(*WARN, "--notify", chat[1]).lines)
    assert error.endswith("script exited with 1: urllib.error.HTTPError: HTTP Error 403: Forbidden")
