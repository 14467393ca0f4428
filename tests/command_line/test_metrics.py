"""--metrics-file: after each pass, a complete file that Prometheus reads."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from messages import Says
from prometheus_client.parser import text_string_to_metric_families
from readme_text import README, section
from runs import Cull, RunLoop
from scenes import Play, Scene, active, fault, idle, server, user
from scripted_hub import NEARLY_DUE, ScriptedHub, normal, respond, then_do


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A metrics file in a directory of its own."""
    folder = tmp_path / "node_exporter"
    folder.mkdir()
    return folder / "cull_idle.prom"


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


def test_the_readmes_alerts_and_queries_use_existing_metrics(cull_scripted: Cull, file: Path) -> None:
    cull_scripted(f"--metrics-file={file}")
    queries = re.findall(r"expr: (.*)", README) + re.findall(r"`(.*?)`", section("Metrics").rpartition("Queries")[2])
    used = {name for query in queries for name in re.findall(r"cull_idle_(\w+)", query)}
    assert used
    assert used <= figures(file).keys()


PASSES = [
    Scene(
        "a pass that does everything",
        [idle("ann", "ann/gpu"), active("bob"), server("dan", NEARLY_DUE), user("eve")],
        "--cull-users --warn-before=15m",
        becomes={"ann": "culled", "ann/gpu": "culled", "dan": "warned", "user eve": "deleted"},
    ),
    Scene("a pass that fails before it sees anything", [ScriptedHub.pause_listening], exit=3),
    Scene(
        "a pass that does not see everything",
        [active("ann", "bob"), fault("GET", "/users", normal(), respond(500), times=None)],
        "--api-page-size=1",
        exit=1,
    ),
    Scene("a pass that may not do what is due", [idle("ann", "bob")], "--max-culls=1", exit=1),
]


@pytest.mark.parametrize("scene", PASSES, ids=Scene.__str__)
def test_the_metrics_are_the_numbers_of_the_json(scene: Scene, play: Play, file: Path) -> None:
    result = play(replace(scene, options=f"--json --metrics-file={file} {scene.options}"))
    found = figures(file)
    assert abs(found.pop("last_pass_timestamp_seconds") - file.stat().st_mtime) < 60
    assert found.pop("exit_code") == scene.exit
    fields = json.loads(result.out.splitlines()[-1])
    assert found == {name: value for name, value in fields.items() if isinstance(value, (int, float))}


@pytest.mark.parametrize("option", ["--dry-run", "--explain=ann"])
def test_a_dry_run_and_an_explanation_write_none(
    scripted: ScriptedHub, cull_scripted: Cull, file: Path, option: str
) -> None:
    idle("ann")(scripted)
    assert cull_scripted(option, f"--metrics-file={file}").exit_code == 0
    assert not file.exists()


# How it is written


def test_each_pass_writes_a_new_file_which_all_may_read_and_renames_it(
    scripted: ScriptedHub, loop: RunLoop, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever reads the old file at that moment reads all of it. node_exporter runs as another user."""
    really_replace = os.replace
    renamed: list[Path] = []

    def look_and_replace(unfinished: str, path: str) -> None:
        renamed.append(Path(unfinished))
        assert stat.S_IMODE(renamed[-1].stat().st_mode) == 0o644
        seen = figures(renamed[-1])
        if file.exists():
            assert figures(file).keys() == seen.keys()
            assert (figures(file)["culled"], seen["culled"]) == (1, 0)
        really_replace(unfinished, path)

    monkeypatch.setattr(os, "replace", look_and_replace)
    idle("ann")(scripted)
    before = os.umask(0o077)
    loop(scripted, "--timeout=1h", f"--metrics-file={file}", between=[lambda: None])
    os.umask(before)
    first, second = renamed
    assert first.name != second.name  # nobody can prepare a symlink there
    assert {first.parent, second.parent} == {file.parent}
    assert ".prom" not in (first.suffix, second.suffix)
    assert [each.name for each in file.parent.iterdir()] == [file.name]


OURS = b"# HELP cull_idle_passes_total Passes.\n"


@pytest.mark.parametrize("old", [OURS, OURS[:20], OURS + b"rest \xff\x00"], ids=["whole", "cut", "spoilt"])
def test_what_it_wrote_before_is_replaced_and_not_read(cull_scripted: Cull, file: Path, old: bytes) -> None:
    file.write_bytes(old)
    assert cull_scripted(f"--metrics-file={file}").exit_code == 0
    assert figures(file)["exit_code"] == 0


# What cannot be written


def write(text: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(text)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(write(b"# HELP node_load1 1m load average.\nnode_load1 0.21\n"), id="another program's metrics"),
        pytest.param(write(b"\xff\xfe\x00"), id="binary"),
        pytest.param(Path.touch, id="an empty file"),
        pytest.param(Path.mkdir, id="a folder"),
        pytest.param(lambda file: file.symlink_to(os.devnull), id="a device"),
        pytest.param(lambda file: shutil.rmtree(file.parent), id="no folder"),
    ],
)
def test_what_must_not_or_cannot_be_replaced_is_one_error_after_the_pass(
    scripted: ScriptedHub, cull_scripted: Cull, file: Path, make: Callable[[Path], object]
) -> None:
    def which(path: Path) -> tuple[int, int]:
        status = path.lstat()
        return status.st_ino, status.st_ctime_ns  # when it was changed, not when it was read

    made: list[tuple[int, int]] = []
    idle("ann")(scripted)
    scripted.fault("GET", "/users", then_do(lambda: make(file)))
    scripted.fault("DELETE", ".*", then_do(lambda: made.extend(map(which, file.parent.glob("*")))))
    result = cull_scripted("-q", "--timeout=1h", f"--metrics-file={file}")
    assert (result.exit_code, scripted.running()) == (0, set())
    assert len(result.errors) == len(result.lines) == 1
    assert [which(each) for each in file.parent.glob("*")] == made


def test_what_is_said_of_a_file_of_another_program(cull_scripted: Cull, file: Path, says: Says) -> None:
    file.write_text("node_load1 0.21\n")
    says(cull_scripted("-q", f"--metrics-file={file}").err.replace(str(file), "FILE"))


def test_a_full_disk_changes_neither_the_old_file_nor_the_pass(
    scripted: ScriptedHub, cull_scripted: Cull, file: Path, says: Says
) -> None:
    arguments = ("-q", "--timeout=1h", f"--metrics-file={file}")
    cull_scripted(*arguments)
    before = file.read_text()
    idle("ann")(scripted)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        result = cull_scripted(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (result.exit_code, scripted.running()) == (0, set())
    says(result.err.replace(str(file), "FILE"))
    assert file.read_text() == before
    assert [each.name for each in file.parent.iterdir()] == [file.name]
