"""--metrics-file: after each pass, a complete file that Prometheus reads."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub import RealHub
from processes import Start
from prometheus_client.parser import text_string_to_metric_families
from readme_text import README, section
from runs import Cull, Result
from scripted_hub import HOUR, LONG_AGO, ScriptedHub, normal, respond, respond_json, then_do

OLD = "# HELP cull_idle_passes_total Passes.\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A metrics file in a directory of its own."""
    folder = tmp_path / "node_exporter"
    folder.mkdir()
    return folder / "cull_idle.prom"


@pytest.fixture
def cull_measured(cull_scripted: Cull, file: Path) -> Cull:
    """Run `cull_idle.py --once --url SCRIPTED --timeout 1h --metrics-file FILE ARGS`."""

    def run(*args: str, token: str | None = None, env: Mapping[str, str] | None = None) -> Result:
        return cull_scripted("--timeout=1h", f"--metrics-file={file}", *args, token=token, env=env)

    return run


def figures(file: Path) -> dict[str, float]:
    """The samples by name, without what they all begin with. Checks help, type and names of all metrics."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(file.read_text()):
        assert family.documentation.endswith(".")
        assert family.type == "gauge"
        (sample,) = family.samples
        assert sample.labels == {}
        found[sample.name.removeprefix("cull_idle_")] = sample.value
    return found


# What is in it


def test_the_metrics_are_the_numbers_of_the_pass_in_its_json(hub: RealHub, cull_real: Cull, file: Path) -> None:
    idle = {"idle_seconds": LONG_AGO}
    hub.spawn_many([("ann", "", idle), ("ann", "gpu", idle), ("cat", "", {**idle, "stop_seconds": 30})])
    hub.spawn("dan", idle_seconds=HOUR - 300)
    hub.add_user("eve", idle_seconds=LONG_AGO, age_seconds=LONG_AGO)
    arguments = ["--timeout=1h", "--cull-users", "--warn-before=10m", "--json", f"--metrics-file={file}"]
    result = cull_real(*arguments, token=hub.user_culler_token)
    found = figures(file)
    assert abs(found.pop("last_pass_timestamp_seconds") - file.stat().st_mtime) < 60
    assert found.pop("exit_code") == result.exit_code == 0
    fields = json.loads(result.out.splitlines()[-1])
    assert found == {name: value for name, value in fields.items() if isinstance(value, (int, float))}
    assert {name: found[name] for name in ("running", "planned", "culled", "stopping", "deleted", "warned")} == {
        "running": 4,
        "planned": 4,
        "culled": 2,
        "stopping": 1,
        "deleted": 1,
        "warned": 1,
    }


def test_the_readmes_alerts_and_queries_use_existing_metrics(cull_measured: Cull, file: Path) -> None:
    cull_measured()
    queries = re.findall(r"expr: (.*)", README) + re.findall(r"`(.*?)`", section("Metrics").rpartition("Queries")[2])
    used = {name for query in queries for name in re.findall(r"cull_idle_(\w+)", query)}
    assert used
    assert used <= figures(file).keys()


# From pass to pass


def test_each_pass_of_the_loop_writes_the_whole_file_anew(scripted: ScriptedHub, start: Start, file: Path) -> None:
    scripted.add("ann", idle=LONG_AGO)
    culler = start(scripted, "--timeout=1h", "--cull-every=1s", f"--metrics-file={file}")
    culler.wait_for(file.exists)
    first = figures(file)
    assert (first["running"], first["culled"]) == (1, 1)

    def another_pass() -> bool:
        found = figures(file)  # at any moment the old ones, or all
        assert found.keys() == first.keys()
        return (found["running"], found["culled"]) == (0, 0)

    culler.wait_for(another_pass)
    assert culler.end(signal.SIGTERM) == 0
    assert [each.name for each in file.parent.iterdir()] == [file.name]


Break = Callable[[ScriptedHub], object]
FAILURES: dict[str, tuple[Break, list[str], int, int]] = {
    "Hub down": (lambda hub: hub.pause_listening(), [], 3, 0),
    "token refused": (lambda hub: setattr(hub, "token", "another"), [], 3, 0),
    "scope missing": (lambda hub: hub.scopes.remove("delete:servers"), [], 3, 0),
    "list breaks off": (
        lambda hub: hub.fault("GET", "/users", normal(), respond(500), times=None),
        ["--api-page-size=1"],
        1,
        1,
    ),
    "fuse": (lambda hub: None, ["--timeout=0", "--max-culls=1"], 1, 2),
    "failed": (lambda hub: hub.fault("DELETE", ".*", respond_json(500, {}), times=None), ["--timeout=0"], 1, 2),
    "told to stop": (
        lambda hub: hub.fault("GET", "/users", then_do(lambda: os.kill(os.getpid(), signal.SIGTERM))),
        [],
        1,
        0,
    ),
}


@pytest.mark.parametrize(("break_it", "arguments", "exit_code", "running"), FAILURES.values(), ids=FAILURES)
def test_a_pass_that_fails_has_its_exit_code_and_what_it_has_seen(
    scripted: ScriptedHub,
    cull_measured: Cull,
    file: Path,
    break_it: Break,
    arguments: list[str],
    exit_code: int,
    running: int,
) -> None:
    token = scripted.token
    scripted.add("ann", idle=60)
    scripted.add("bob", idle=60)
    assert cull_measured().exit_code == 0
    good = figures(file)
    break_it(scripted)
    assert cull_measured(*arguments, token=token).exit_code == exit_code
    failed = figures(file)
    assert failed.keys() == good.keys()
    assert (failed["exit_code"], failed["running"]) == (exit_code, running)


@pytest.mark.parametrize("option", ["--dry-run", "--explain=ann"])
def test_a_dry_run_and_an_explanation_write_no_metrics(
    scripted: ScriptedHub, cull_measured: Cull, file: Path, option: str
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    assert cull_measured(option).exit_code == 0
    assert not file.exists()
    cull_measured()
    before = file.read_text()
    scripted.add("ann", idle=LONG_AGO)
    assert cull_measured(option).exit_code == 0
    assert file.read_text() == before


# What was there before


@pytest.mark.parametrize("old", [OLD, OLD[:20], f"{OLD}rest \udcff\x00"], ids=ascii)
def test_what_it_wrote_before_is_replaced_and_not_read(cull_measured: Cull, file: Path, old: str) -> None:
    file.write_bytes(old.encode(errors="surrogateescape"))
    assert cull_measured().exit_code == 0
    assert figures(file)["exit_code"] == 0


def foreign(path: Path) -> None:
    path.write_bytes(b"# HELP node_load1 1m load average.\nnode_load1 0.21\n")


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    "make", [foreign, binary, Path.touch, Path.mkdir], ids=["another's metrics", "binary", "empty", "folder"]
)
def test_a_file_of_another_program_is_one_error_and_left_alone(
    cull_measured: Cull, file: Path, make: Callable[[Path], object]
) -> None:
    make(file)
    before = changed(file)
    result = cull_measured("-q")
    assert result.exit_code == 0
    (line,) = result.lines
    assert f"--metrics-file {file}" in line
    assert changed(file) == before


def changed(path: Path) -> tuple[int, int]:
    """Which file it is, and when it was changed last; not when it was read."""
    status = path.stat()
    return status.st_ino, status.st_ctime_ns


def test_a_device_is_not_replaced_by_a_file(cull_scripted: Cull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("as root, this breaks the machine"))
    (line,) = cull_scripted("-q", "--metrics-file=/dev/null").lines
    assert "--metrics-file /dev/null" in line


# How it is written


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_other_users_may_read_the_file(cull_measured: Cull, file: Path, umask: int) -> None:
    """Whatever the umask: node_exporter runs as another user."""
    before = os.umask(umask)
    try:
        cull_measured()
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_the_file_is_written_under_another_name_and_then_renamed(
    cull_measured: Cull, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cull_measured()
    before = figures(file)
    really_replace = os.replace
    replaced: list[Path] = []

    def replace(unfinished: str, path: str) -> None:
        replaced.append(Path(unfinished))
        assert figures(file) == before
        assert figures(Path(unfinished)).keys() == before.keys()
        really_replace(unfinished, path)

    monkeypatch.setattr(os, "replace", replace)
    cull_measured("--timeout=2h")
    before = figures(file)
    cull_measured("--timeout=3h")
    first, second = replaced
    assert first.name != second.name  # nobody can prepare a symlink there
    assert first.parent == second.parent == file.parent
    assert first.suffix != ".prom"


@contextmanager
def full_disk() -> Iterator[None]:
    """Limit all files to a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_changes_neither_the_old_file_nor_the_pass(
    scripted: ScriptedHub, cull_measured: Cull, file: Path
) -> None:
    cull_measured()
    before = file.read_text()
    scripted.add("ann", idle=LONG_AGO)
    with full_disk():
        result = cull_measured()
    assert (result.exit_code, scripted.running()) == (0, set())
    (error,) = result.errors
    assert f"--metrics-file {file}" in error
    assert error.endswith("File too large")
    assert result.outcomes == {"ann": "culled"}
    assert file.read_text() == before
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    cull_measured()
    assert figures(file)["running"] == 0


def turned_into_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def taken_by_another(file: Path) -> None:
    file.write_text("node_load1 0.21\n")


@pytest.mark.parametrize(
    "become",
    [lambda file: shutil.rmtree(file.parent), turned_into_a_folder, taken_by_another],
    ids=["folder gone", "folder in its place", "another's file in its place"],
)
def test_a_file_that_cannot_be_replaced_after_a_pass_is_one_error(
    scripted: ScriptedHub, cull_measured: Cull, file: Path, become: Callable[[Path], object]
) -> None:
    cull_measured()
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users", then_do(lambda: become(file)))
    result = cull_measured("-q")
    assert (result.exit_code, scripted.running()) == (0, set())
    (line,) = result.lines
    assert line.startswith(f"ERROR    --metrics-file {file} ")
    assert not file.parent.exists() or [each.name for each in file.parent.iterdir()] == [file.name]
