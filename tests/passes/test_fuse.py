"""The fuse: a pass that would cull too much culls nothing."""

import pytest
from runs import Cull
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
def test_a_pass_that_would_stop_more_servers_stops_none_and_fails(
    cull_scripted: Cull, scripted: ScriptedHub, fuse: str, blows: bool
) -> None:
    fill(scripted, due=3, busy=7)
    result = cull_scripted("--timeout=1h", f"--max-culls={fuse}")
    assert result.exit_code == (1 if blows else 0)
    assert len(scripted.running()) == (10 if blows else 7)
    if blows:
        (error,) = result.errors
        assert "3 of 10 servers" in error
        assert "--max-culls" in error
        assert f" {fuse}" in error
        assert result.counts == {"running": 10, "due": 3, "left undone": 3}


def test_a_pass_that_would_delete_more_users_stops_no_server_either(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, due=1, busy=7)
    for number in range(12):
        scripted.add_user(f"gone{number}", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", "--cull-users", "--max-culls=50%")
    assert result.exit_code == 1
    (error,) = result.errors
    assert "12 of 20 users" in error
    assert "--max-culls" in error
    assert "50%" in error
    assert scripted.lines("DELETE") == []


def test_a_pass_with_nothing_due_never_blows_the_fuse(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, due=0, busy=2)
    assert cull_scripted("--timeout=1h", "--max-culls=0").exit_code == 0


def test_of_a_list_that_breaks_off_the_part_that_was_read_counts(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, due=3, busy=7)
    scripted.fault("GET", "/users", normal(), respond(500), times=None)
    result = cull_scripted("--timeout=1h", "--max-culls=50%", "--api-page-size=4")
    assert result.exit_code == 1
    listing, fuse = result.errors
    assert "GET /users" in listing
    assert "3 of 4 servers" in fuse
    assert scripted.lines("DELETE") == []


def test_a_dry_run_says_that_the_fuse_would_blow(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    fill(scripted, due=3, busy=7)
    result = cull_scripted("--dry-run", "--timeout=1h", "--max-culls=2")
    assert result.exit_code == 0
    assert "3 of 10 servers" in result.table[-1]
    assert "--max-culls" in result.table[-1]


@pytest.mark.parametrize("value", ["", "-1", "x", "1.5", "101%", "%", "5 %", "5%%"])
def test_a_fuse_that_is_neither_a_number_nor_a_percentage_is_refused(cull_scripted: Cull, value: str) -> None:
    result = cull_scripted(f"--max-culls={value}")
    assert result.exit_code == 2
    assert "--max-culls" in result.err
