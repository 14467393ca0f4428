"""Under systemd, log lines start with their priority and have no timestamp: the journal adds its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest
from processes import RUN
from runs import TIMESTAMP, Cull
from scripted_hub import LONG_AGO, ScriptedHub, respond, respond_json

import cull_idle

JOURNAL_STREAM = "{device}:{inode}"


class Logged(Protocol):
    """Runs the program and returns the lines of its log."""

    def __call__(self, *args: str, stream: str = JOURNAL_STREAM, token: str | None = None) -> list[str]: ...


@pytest.fixture
def logged(cull_scripted: Cull, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Logged:
    """Run `cull_idle.py --once --url SCRIPTED ARGS` with stderr in a file that $JOURNAL_STREAM names."""

    def run(*args: str, stream: str = JOURNAL_STREAM, token: str | None = None) -> list[str]:
        log = tmp_path / "log"
        with log.open("w") as file, monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", file)
            status = log.stat()
            stream = stream.format(device=status.st_dev, inode=status.st_ino)
            cull_scripted(*args, token=token, env={"JOURNAL_STREAM": stream})
        return log.read_text().splitlines()

    return run


def test_a_line_for_the_journal_has_a_priority_and_no_timestamp(scripted: ScriptedHub, logged: Logged) -> None:
    for name in ("ann", "bob", "cat"):
        scripted.add(name, idle=LONG_AGO)
    scripted.add("dan", idle=90)
    scripted.fault("DELETE", "/users/bob/server", respond(202))
    scripted.fault("DELETE", "/users/cat/server", respond_json(500, {"message": "no\n<7>way"}))
    lines = logged("-v", "--timeout=1h", "--concurrency=1")
    assert [line.partition(": ")[0] for line in sorted(lines)] == [
        "<3>failed cat",
        "<4>stopping bob",
        "<6>culled ann",
        "<6>pass",
        "<7>kept dan",
    ]
    assert "no <7>way" in min(lines)  # the message of the Hub is one line


@pytest.mark.parametrize(
    "arguments", [["--timeout=x"], ["--token-file=/nowhere/token"]], ids=["wrong option", "no token"]
)
def test_a_usage_error_is_an_error_in_the_journal(logged: Logged, arguments: list[str]) -> None:
    (line,) = logged(*arguments)
    assert line.startswith("<3>cull_idle.py: ")


def test_a_failed_pass_is_an_error_in_the_journal(logged: Logged) -> None:
    (line,) = logged(token="another")
    assert re.match("<3>.* 403", line)


@pytest.mark.parametrize(
    "stream",
    ["", ":", "garbage", "1:2:3", "{device}", "{device}:", ":{inode}", "{inode}:{device}", "{device}:0",
     "{device}:{inode}:0", "0:{inode}", "\u0663:\u0663", "-1:-1", "999999999999999999999:1"],
)  # fmt: skip
def test_another_stream_or_garbage_changes_nothing(logged: Logged, stream: str) -> None:
    (line,) = logged(stream=stream)
    assert TIMESTAMP.match(line)
    assert "INFO     pass: " in line


def test_a_usage_error_has_no_priority_elsewhere(logged: Logged) -> None:
    (line,) = logged("--timeout=x", stream="1:1")
    assert line.startswith("cull_idle.py: ")


def test_a_stderr_without_a_file_descriptor_is_not_the_journal(scripted: ScriptedHub, cull_scripted: Cull) -> None:
    assert TIMESTAMP.match(cull_scripted(env={"JOURNAL_STREAM": "1:1"}).err)


def test_each_level_has_a_priority() -> None:
    assert cull_idle.PRIORITIES == {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}


@pytest.mark.parametrize("journal", ["stderr", "stdout"])
def test_only_the_stream_that_systemd_names_is_the_journal(scripted: ScriptedHub, journal: str) -> None:
    """Results on stdout never get a priority."""
    scripted.add("ann", idle=LONG_AGO)
    pipes = {name: os.pipe() for name in ("stdout", "stderr")}
    status = os.fstat(pipes[journal][1])
    subprocess.run(
        [*RUN, "--url", scripted.url, "--once", "--json", "--timeout=1h"],
        env={
            **os.environ,
            "JUPYTERHUB_API_TOKEN": scripted.token,
            "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
        },
        stdout=pipes["stdout"][1],
        stderr=pipes["stderr"][1],
        check=True,
    )
    said = {}
    for name, (reader, writer) in pipes.items():
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said[name] = pipe.read().splitlines()
    assert all(line.startswith("{") for line in said["stdout"])
    culled, total = said["stderr"]
    if journal == "stderr":
        assert culled.startswith("<6>culled ann: ")
        assert total.startswith("<6>pass: ")
    else:
        assert TIMESTAMP.match(culled)


def test_under_a_hub_a_line_says_whose_it_is(scripted: ScriptedHub, cull_scripted: Cull) -> None:
    scripted.add("ann", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", env={"JUPYTERHUB_SERVICE_NAME": "idle-stopper"})
    assert [re.match(r"INFO +cull_idle: (culled ann|pass): ", line) is not None for line in result.lines] == [True] * 2
