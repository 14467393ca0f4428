"""--token-file: a file that changes while a loop runs, a pipe, a FIFO."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import LOOP, RUN, Start
from runs import RunLoop
from scripted_hub import ScriptedHub


def test_a_token_file_is_read_again_for_each_pass(scripted: ScriptedHub, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    culler = start(scripted, *LOOP, "--token-file", str(file))
    culler.wait_for(lambda: " 403 " in culler.said())
    file.unlink()
    culler.wait_for(lambda: f"--token-file {file}" in culler.said())
    file.write_text(f"{scripted.token}\n")
    culler.wait_for(lambda: " pass: " in culler.said())
    assert {request.headers["authorization"] for request in scripted.requests} == {
        "token old",
        f"token {scripted.token}",
    }


def test_the_scopes_of_a_new_token_are_checked(loop: RunLoop, scripted: ScriptedHub, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(scripted.token)

    def new_token() -> None:
        scripted.token = "another-token"
        scripted.scopes = ["list:users", "read:users:activity"]
        file.write_text(scripted.token)

    first, second = loop(scripted, "--timeout=1h", "--token-file", str(file), between=[new_token]).passes
    assert (len(first.errors), len(second.errors)) == (0, 1)
    assert "lacks" in second.errors[0]
    assert "read:servers" in second.errors[0]


@pytest.mark.parametrize("content", [None, "", "two words"], ids=["gone", "empty", "no token"])
def test_a_loop_keeps_the_last_token_while_the_file_has_none(
    scripted: ScriptedHub, start: Start, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "token"
    file.write_text(scripted.token)
    culler = start(scripted, *LOOP, "--token-file", str(file))
    culler.wait_for(lambda: "pass: " in culler.said())
    file.unlink()
    if content is not None:
        file.write_text(content)
    culler.wait_for(lambda: culler.said().count("pass: ") >= 3)
    assert culler.said().count("WARNING") == 1
    assert "ERROR" not in culler.said()
    file.write_text("another")
    culler.wait_for(lambda: "answered 403" in culler.said())


@pytest.mark.parametrize("args", [["--once"], ["--dry-run"], ["--explain=ann"], ["--cull-every=1s"]], ids=str)
@pytest.mark.parametrize("path", ["<(…)", "/dev/stdin"])
def test_a_token_comes_through_a_pipe(scripted: ScriptedHub, args: list[str], path: str) -> None:
    scripted.add("ann", idle=60)
    reader, writer = os.pipe()
    os.write(writer, scripted.token.encode())
    os.close(writer)
    path = path if path == "/dev/stdin" else f"/dev/fd/{reader}"
    with subprocess.Popen(
        [*RUN, "--url", scripted.url, "--timeout=1h", *args, "--token-file", path],
        stdin=reader,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[reader],
    ) as culler:
        os.close(reader)
        if "--cull-every=1s" in args:
            deadline = time.monotonic() + 20
            while len(scripted.lines()) < 3 and time.monotonic() < deadline:
                time.sleep(0.02)
            culler.send_signal(signal.SIGTERM)
        assert culler.wait(20) == 0
    assert len(scripted.lines()) >= 2
