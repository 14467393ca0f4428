"""The fuse: a pass that would cull too much culls nothing."""

import pytest
from conftest import Cull
from scripted_hub import LONG_AGO, ScriptedHub, normal, respond


def fill(scripted: ScriptedHub, *, due: int, busy: int) -> None:
    for number in range(due):
        scripted.add(f"idle{number}", idle=LONG_AGO)
    for number in range(busy):
        scripted.add(f"busy{number}", idle=60)


@pytest.mark.parametrize(
    ("fuse", "blows"),
    [("0", True), ("2", True), ("3", False), ("4", False), ("0%", True), ("29%", True), ("30%", False), ("29.9%", True),
     ("100%", False)],
)  # fmt: skip
def test_a_pass_that_would_stop_more_stops_nothing_and_fails(
    cull_scripted: Cull, scripted: ScriptedHub, fuse: str, blows: bool
) -> None:
    fill(scripted, due=3, busy=7)
    result = cull_scripted("--timeout=1h", f"--max-culls={fuse}")
    assert result.exit_code == (1 if blows else 0)
    assert len(scripted.running()) == (10 if blows else 7)
    if blows:
        error, line = result.lines
        assert error == (
            f"ERROR    nothing is culled, because 3 of 10 servers are due and --max-culls is {fuse};"
            " look with --dry-run and, if they should go, raise it"
        )
        assert "10 running, 3 due, 3 left undone" in line


def test_users_blow_the_fuse_as_well_and_then_no_server_is_stopped(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, due=1, busy=7)
    for number in range(12):
        scripted.add_user(f"gone{number}", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", "--cull-users", "--max-culls=50%")
    assert result.exit_code == 1
    assert "13 of 20 users are due and --max-culls is 50%" in result.lines[0]
    assert scripted.lines("DELETE") == []


def test_nothing_due_blows_no_fuse(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, due=0, busy=2)
    assert cull_scripted("--timeout=1h", "--max-culls=0").exit_code == 0


def test_a_list_that_breaks_off_is_measured_by_what_was_read(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, due=3, busy=7)
    scripted.fault("GET", "/users", normal(), respond(500), times=None)
    result = cull_scripted("--timeout=1h", "--max-culls=50%", "--api-page-size=4")
    assert result.exit_code == 3
    assert "GET /users: " in result.lines[0]
    assert "3 of 4 servers are due" in result.lines[1]
    assert scripted.lines("DELETE") == []


def test_a_dry_run_tells_that_the_fuse_would_blow(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, due=3, busy=7)
    result = cull_scripted("--dry-run", "--timeout=1h", "--max-culls=2")
    assert result.exit_code == 0
    assert "But nothing is culled, because 3 of 10 servers are due and --max-culls is 2;" in result.table[-1]


@pytest.mark.parametrize("value", ["", "-1", "x", "1.5", "101%", "%", "5 %", "5%%"])
def test_what_is_no_number_and_no_percentage_is_refused(cull_scripted: Cull, value: str) -> None:
    result = cull_scripted(f"--max-culls={value}")
    assert result.exit_code == 2
    assert "is neither a number, such as 20, nor a percentage, such as 10%." in result.err
