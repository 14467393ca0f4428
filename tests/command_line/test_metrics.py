"""--metrics-file: after each pass, a complete file that Prometheus reads."""

from __future__ import annotations

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
from readme_text import README, rows, section
from runs import Cull, Result
from scripted_hub import HOUR, LONG_AGO, ScriptedHub, normal, respond, respond_json, then_do

import cull_idle

OUTCOMES = ("culled", "stopping", "gone", "spared", "failed")
OLD = """\
# HELP cull_idle_passes_total Passes.
# TYPE cull_idle_passes_total counter
cull_idle_passes_total """
OF_THE_LIST = {"cull_idle_running_servers", "cull_idle_idle_servers", "cull_idle_planned"}


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
    """The samples by `name`, or `name:outcome`. Checks help, type and names of all metrics."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(file.read_text()):
        assert family.documentation.endswith(".")
        assert (family.type == "counter") == family.samples[0].name.endswith("_total")
        assert family.type in ("counter", "gauge")
        for sample in family.samples:
            name = ":".join([sample.name, *sample.labels.values()])
            assert name not in found
            found[name] = sample.value
    return found


def names(file: Path) -> set[str]:
    return {name.partition(":")[0] for name in figures(file)}


def outcomes(file: Path) -> dict[str, float]:
    """The outcomes that are not 0. All must be there."""
    all_figures = figures(file)
    counts = {outcome: all_figures[f"cull_idle_outcomes_total:{outcome}"] for outcome in OUTCOMES}
    return {outcome: count for outcome, count in counts.items() if count}


# What is in it


def test_a_pass_writes_its_metrics(hub: RealHub, cull_real: Cull, file: Path) -> None:
    idle = {"idle_seconds": LONG_AGO}
    of_user = {**idle, "user_idle_seconds": LONG_AGO, "user_age_seconds": LONG_AGO}
    hub.spawn_many(
        [
            ("ann", "", of_user),
            ("ann", "gpu", idle),
            ("bob", "", {"idle_seconds": 90, "user_idle_seconds": 90}),
            ("cat", "", {**of_user, "stop_seconds": 30}),
            ("dan", "", {"idle_seconds": HOUR - 300, "user_idle_seconds": 90}),
        ]
    )
    result = cull_real(
        "--timeout=1h", "--cull-users", "--warn-before=10m", f"--metrics-file={file}", token=hub.user_culler_token
    )
    assert result.exit_code == 0
    found = figures(file)
    seconds = found.pop("cull_idle_pass_duration_seconds")
    ended = found.pop("cull_idle_last_pass_timestamp_seconds")
    assert 0 < seconds < 60
    assert abs(ended - file.stat().st_mtime) < 60
    assert found.pop("cull_idle_last_success_timestamp_seconds") == ended
    assert found == {
        "cull_idle_passes_total": 1,
        "cull_idle_failed_passes_total": 0,
        "cull_idle_outcomes_total:culled": 2,
        "cull_idle_outcomes_total:stopping": 1,
        "cull_idle_outcomes_total:gone": 0,
        "cull_idle_outcomes_total:spared": 1,
        "cull_idle_outcomes_total:failed": 0,
        "cull_idle_deleted_users_total": 1,
        "cull_idle_warned_servers_total": 1,
        "cull_idle_asked_servers": 0,
        "cull_idle_busy_servers": 0,
        "cull_idle_no_answer_servers": 0,
        "cull_idle_running_servers": 5,
        "cull_idle_idle_servers": 3,
        "cull_idle_planned": 5,
    }


def test_the_readme_names_each_metric_and_no_other(cull_measured: Cull, file: Path) -> None:
    cull_measured()
    named = [name for cell, _ in rows("Metrics") for name in re.findall(r"cull_idle_\w+", cell)]
    assert sorted(named) == sorted(names(file))
    outcome_row = next(meaning for cell, meaning in rows("Metrics") if "outcome" in cell)
    assert re.findall("`(.*?)`", outcome_row) == list(OUTCOMES)


def test_the_readmes_alert_and_queries_use_existing_metrics(cull_measured: Cull, file: Path) -> None:
    cull_measured()
    queries = re.findall(r"expr: (.*)", README) + re.findall(r"`(.*?)`", section("Metrics").rpartition("Queries")[2])
    used = {name for query in queries for name in re.findall(r"cull_idle_\w+", query)}
    assert len(queries) == 4
    assert "cull_idle_last_success_timestamp_seconds" in used
    assert used <= names(file)


def test_the_readmes_queries_use_existing_labels(cull_measured: Cull, file: Path) -> None:
    cull_measured()
    (label,) = re.findall(r"sum by \((\w+)\)", section("Metrics"))
    assert f'{{{label}="culled"}}' in file.read_text()


# From pass to pass


def test_counters_continue_from_one_run_to_the_next(scripted: ScriptedHub, cull_measured: Cull, file: Path) -> None:
    for count in (1, 2, 3):
        scripted.add("ann", idle=LONG_AGO)
        cull_measured()
        found = figures(file)
        assert found["cull_idle_passes_total"] == found["cull_idle_outcomes_total:culled"] == count
        assert (found["cull_idle_running_servers"], found["cull_idle_failed_passes_total"]) == (1, 0)
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_counters_continue_in_the_loop(scripted: ScriptedHub, start: Start, file: Path) -> None:
    scripted.add("ann", idle=LONG_AGO)
    file.write_text(OLD + "5\n")

    def passes() -> float:
        found = figures(file)  # at any moment the old ones, or all
        assert len(found) in (1, 18)
        return found["cull_idle_passes_total"]

    culler = start(scripted, "--timeout=1h", "--cull-every=1s", f"--metrics-file={file}")
    culler.wait_for(lambda: passes() == 7)
    assert culler.end(signal.SIGTERM) == 0
    found = figures(file)
    assert found["cull_idle_outcomes_total:culled"] == 1
    assert found["cull_idle_running_servers"] == 0


Break = Callable[[ScriptedHub], object]
FAILURES: dict[str, tuple[Break, list[str]]] = {
    "Hub down": (lambda hub: hub.pause_listening(), []),
    "token refused": (lambda hub: setattr(hub, "token", "another"), []),
    "scope missing": (lambda hub: hub.scopes.remove("delete:servers"), []),
    "list breaks off": (
        lambda hub: hub.fault("GET", "/users", normal(), respond(500), times=None),
        ["--api-page-size=1"],
    ),
}


@pytest.mark.parametrize(("break_it", "arguments"), FAILURES.values(), ids=FAILURES)
def test_a_failed_pass_counts_and_has_no_metrics_of_the_list(
    scripted: ScriptedHub, cull_measured: Cull, file: Path, break_it: Break, arguments: list[str]
) -> None:
    token = scripted.token
    scripted.add("ann", idle=60)
    scripted.add("bob", idle=60)
    assert cull_measured().exit_code == 0
    good = figures(file)
    assert good.keys() >= OF_THE_LIST
    break_it(scripted)
    assert cull_measured(*arguments, token=token).exit_code == 3
    failed = figures(file)
    assert failed.keys() == good.keys() - OF_THE_LIST
    assert (failed["cull_idle_passes_total"], failed["cull_idle_failed_passes_total"]) == (2, 1)
    success = "cull_idle_last_success_timestamp_seconds"
    assert failed[success] == good[success] < failed["cull_idle_last_pass_timestamp_seconds"]


def test_the_last_success_is_0_before_the_first(cull_measured: Cull, file: Path) -> None:
    """The README's alert must fire."""
    cull_measured(token="wrong")
    assert figures(file)["cull_idle_last_success_timestamp_seconds"] == 0


@pytest.mark.parametrize("undone", ["failed", "fuse"])
def test_a_pass_that_left_something_undone_is_no_success_but_has_all_metrics(
    scripted: ScriptedHub, cull_measured: Cull, file: Path, undone: str
) -> None:
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", respond_json(500, {}), times=None)
    assert cull_measured(*(["--max-culls=1"] if undone == "fuse" else [])).exit_code == 1
    found = figures(file)
    assert found["cull_idle_failed_passes_total"] == 1
    assert found["cull_idle_last_success_timestamp_seconds"] == 0
    assert (found["cull_idle_running_servers"], found["cull_idle_planned"]) == (2, 2)
    assert outcomes(file) == ({} if undone == "fuse" else {"culled": 1, "failed": 1})


def test_a_list_that_a_signal_cuts_off_is_not_counted(scripted: ScriptedHub, cull_measured: Cull, file: Path) -> None:
    for name in ("ann", "bob"):
        scripted.add(name, idle=60)
    scripted.fault("GET", "/users", then_do(lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert cull_measured("--api-page-size=1").exit_code == 1
    found = figures(file)
    assert found.keys().isdisjoint(OF_THE_LIST)
    assert (found["cull_idle_failed_passes_total"], found["cull_idle_last_success_timestamp_seconds"]) == (1, 0)


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


@pytest.mark.parametrize(
    ("old", "passes"),
    [
        pytest.param("", 1, id="empty"),
        pytest.param(OLD + "41\n", 42, id="whole number"),
        pytest.param(OLD + "41.0\n", 42, id="with a point"),
        pytest.param(OLD + "1e+16\n", 1e16, id="1e+16"),
        pytest.param(OLD + "2.5e+01\n", 26, id="exponent"),
        pytest.param(OLD + "-5\n", -4, id="negative"),
        pytest.param(OLD + "41", 1, id="cut in a number"),
        pytest.param(OLD[:-7], 1, id="cut in a name"),
        pytest.param(OLD[:20], 1, id="cut in a comment"),
        pytest.param(OLD + "1.2.3\n", 1, id="no number"),
        pytest.param(OLD + "NaN\n", 1, id="NaN"),
        pytest.param(OLD + "+Inf\n", 1, id="infinite"),
        pytest.param(OLD + "41\nrest \udcff\udcfe\n", 42, id="not UTF-8"),
        pytest.param(OLD + "41\n\x00\x00\x00", 42, id="zeros"),
    ],
)
def test_a_damaged_file_is_used_up_to_the_damage(cull_measured: Cull, file: Path, old: str, passes: float) -> None:
    file.write_bytes(old.encode(errors="surrogateescape"))
    assert cull_measured().exit_code == 0
    assert figures(file)["cull_idle_passes_total"] == passes


def test_metrics_are_read_back_as_they_were_written(scripted: ScriptedHub, cull_measured: Cull, file: Path) -> None:
    scripted.add("ann", idle=LONG_AGO)
    cull_measured()
    samples = dict(line.rsplit(" ", 1) for line in file.read_text().splitlines() if not line.startswith("#"))
    assert cull_idle.read_metrics(str(file)) == {name: float(value) for name, value in samples.items()}


def foreign(path: Path) -> None:
    path.write_bytes(b"# HELP node_load1 1m load average.\nnode_load1 0.21\n")


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("make", [foreign, binary, Path.mkdir], ids=["another's metrics", "binary", "folder"])
def test_a_file_of_another_program_is_refused_and_left_alone(
    scripted: ScriptedHub, cull_measured: Cull, file: Path, make: Callable[[Path], object]
) -> None:
    make(file)
    before = changed(file)
    result = cull_measured()
    assert result.exit_code == 2
    (line,) = result.lines
    assert "--metrics-file" in line
    assert str(file) in line
    assert (changed(file), scripted.requests) == (before, [])


def changed(path: Path) -> tuple[int, int]:
    """Which file it is, and when it was changed last; not when it was read."""
    status = path.stat()
    return status.st_ino, status.st_ctime_ns


def test_a_device_is_not_replaced_by_a_file(cull_scripted: Cull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("as root, this breaks the machine"))
    assert cull_scripted("--metrics-file=/dev/null").exit_code == 2


def test_a_directory_that_does_not_exist_is_a_usage_error(cull_scripted: Cull, tmp_path: Path) -> None:
    result = cull_scripted(f"--metrics-file={tmp_path / 'none' / 'cull_idle.prom'}")
    assert result.exit_code == 2
    assert "--metrics-file" in result.err


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
    really_replace = os.replace
    replaced: list[Path] = []

    def replace(unfinished: str, path: str) -> None:
        replaced.append(Path(unfinished))
        assert figures(file)["cull_idle_passes_total"] == 1
        assert figures(Path(unfinished))["cull_idle_passes_total"] == 2
        really_replace(unfinished, path)

    monkeypatch.setattr(os, "replace", replace)
    cull_measured()
    (unfinished,) = replaced
    assert unfinished.parent == file.parent
    assert unfinished.suffix != ".prom"


def a_symlink(path: Path) -> None:
    path.symlink_to(path.parents[1] / "precious")


def a_file(path: Path) -> None:
    path.write_text("precious")


@pytest.mark.parametrize("make", [a_symlink, a_file, os.mkfifo], ids=["symlink", "file", "FIFO"])
def test_what_others_put_where_its_temporary_file_might_be_is_left_alone(
    cull_measured: Cull, file: Path, make: Callable[[Path], object]
) -> None:
    precious = file.parents[1] / "precious"
    precious.write_text("precious")
    in_the_way = file.with_name(f"{file.name}.{os.getpid()}")
    make(in_the_way)
    reader = os.open(in_the_way, os.O_RDONLY | os.O_NONBLOCK)  # who writes into the FIFO is not to hang the test
    try:
        before = in_the_way.lstat()
        assert cull_measured().exit_code == 0
        assert (in_the_way.lstat(), precious.read_text()) == (before, "precious")
        assert file.is_file()
        assert not file.is_symlink()
        assert figures(file)["cull_idle_passes_total"] == 1
    finally:
        os.close(reader)


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
    assert figures(file)["cull_idle_passes_total"] == 2


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


@pytest.mark.parametrize("mode", [["--dry-run"], ["--explain=ann"]], ids=str)
def test_a_file_that_is_not_written_need_not_be_writable(
    cull: Cull, scripted: ScriptedHub, tmp_path: Path, mode: list[str]
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    args = [f"--metrics-file={tmp_path / 'missing' / 'cull_idle.prom'}", "--timeout=1h", "--url", scripted.url]
    assert cull("--once", *args, token=scripted.token).exit_code == 2
    assert cull(*mode, *args, token=scripted.token).exit_code == 0
