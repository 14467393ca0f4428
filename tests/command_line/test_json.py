"""--json: one JSON object per line, as the README documents it, as soon as the event happens."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, get_args
from unittest.mock import patch

import pytest
from hub import IDLE, RealHub
from processes import RUN
from readme_text import section
from runs import TIMESTAMP, Cull, Result
from scripted_hub import (
    HOUR,
    LONG_AGO,
    Answer,
    Exchange,
    Reply,
    ScriptedHub,
    edited,
    normal,
    of_hub,
    respond,
    respond_json,
    slow,
    then_do,
)

import cull_idle

# The schemas: what the README's section "For programs" says

Schema = dict[str, Any]
COUNT: Schema = {"type": "integer", "minimum": 0}
MAYBE_COUNT: Schema = {"type": ["integer", "null"], "minimum": 0}
NAME: Schema = {"type": "string"}
TEXT: Schema = {"type": "string", "minLength": 1}
MAYBE_TEXT: Schema = {"type": ["string", "null"], "minLength": 1}
NOTHING: Schema = {"type": "null"}
TIME: Schema = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"}


def objects(**properties: Schema) -> Schema:
    """Objects that have all of these and no others."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def events(**properties: Schema) -> list[Schema]:
    """Events. Only warned servers have a due time, and only failures, also those to come, have an error."""
    measured = {"reason": TEXT, "idle_seconds": MAYBE_COUNT, "age_seconds": MAYBE_COUNT}
    return [
        objects(**properties, outcome={"enum": outcomes}, **measured, due=due, error=error)
        for outcomes, due, error in (
            (["culled", "stopping", "gone", "spared"], NOTHING, NOTHING),
            (["planned"], NOTHING, MAYBE_TEXT),
            (["warned"], TIME, NOTHING),
            (["failed"], NOTHING, TEXT),
        )
    ]


REPORTED = [outcome for outcome in get_args(cull_idle.Outcome) if outcome != "kept"]
SERVER = events(event={"const": "server"}, user=NAME, server=NAME, action={"enum": ["stop", "remove"]})
USER = events(event={"const": "user"}, user=NAME, server=NOTHING, action={"const": "delete"})
COUNTS = ("culled", "stopping", "gone", "spared", "failed", "deleted", "left_undone", "warned")
ASKED = ("asked", "busy", "no_answer")
PASS = objects(
    event={"const": "pass"},
    started=TIME,
    hub={"type": "string", "pattern": "^https?://"},
    version=MAYBE_TEXT,
    running=COUNT,
    idle=COUNT,
    planned=COUNT,
    **dict.fromkeys((*COUNTS, *ASKED), COUNT),
    seconds={"type": "number", "minimum": 0},
    dry_run={"type": "boolean"},
    error=MAYBE_TEXT,
)


@cache
def validator() -> Any:
    schema = {"oneOf": [*SERVER, *USER, PASS]}
    modules: Any = {"rfc3987_syntax": None}  # takes a second to import, for formats that are not used
    with patch.dict(sys.modules, modules):
        validators: Any = importlib.import_module("jsonschema.validators")
    validators.Draft202012Validator.check_schema(schema)
    return validators.Draft202012Validator(schema)


def no_json(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is no JSON")


def valid(line: str) -> dict[str, Any]:
    """The object on a line, checked against the schemas."""
    facts: dict[str, Any] = json.loads(line, parse_constant=no_json)
    validator().validate(facts)
    return facts


class Told(NamedTuple):
    """The output of one pass."""

    result: Result
    events: list[dict[str, Any]]
    total: dict[str, Any]
    """The pass object."""

    @property
    def outcomes(self) -> dict[str, tuple[str, str]]:
        """Action and outcome of `ann`, `ann/gpu` and `user ann`."""
        names = {"user": "user {user}", "server": "{user}/{server}"}
        return {
            names[event["event"]].format(**event).removesuffix("/"): (event["action"], event["outcome"])
            for event in self.events
        }


def told(result: Result) -> Told:
    """The output of one pass. Checks each line, and that the pass comes last and counts them."""
    assert result.out == "" or result.out.endswith("\n")
    *lines, total = map(valid, result.out.splitlines())
    assert total["event"] == "pass"
    assert {line["event"] for line in lines} <= {"server", "user"}
    counted = Counter(
        "deleted" if (line["event"], line["outcome"]) == ("user", "culled") else line["outcome"] for line in lines
    )
    due = counted.pop("planned", 0) if total["dry_run"] else counted.total() - counted["warned"] + total["left_undone"]
    assert total["planned"] == due
    assert total["left_undone"] == 0 or not total["dry_run"]
    assert {what: total[what] for what in COUNTS if what != "left_undone" and total[what]} == +counted
    return Told(result, lines, total)


# What the lines say


@pytest.mark.parametrize(("number", "schemas"), [(0, [*SERVER, *USER]), (1, [PASS])], ids=["server and user", "pass"])
def test_the_readme_names_each_field_and_no_other(number: int, schemas: list[Schema]) -> None:
    lists = section("For programs").split("\nIf ")[1:]
    named = ["event", *re.findall(r"`(\w+)`", " ".join(re.findall(r"^- (.*?):", lists[number], re.MULTILINE)))]
    for schema in schemas:
        assert named == list(schema["properties"])


def test_the_readme_names_each_outcome() -> None:
    words = re.findall(r"^- `(\w+)`:", section("What the log says"), re.MULTILINE)
    assert [word for word in words if word not in ("kept", "deleted")] == REPORTED
    assert {word for each in SERVER for word in each["properties"]["outcome"]["enum"]} == set(REPORTED)


def test_a_line_for_each_server_and_user_and_one_for_the_pass(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn_many(
        [
            ("ann", "", IDLE),
            ("ann", "gpu", IDLE),
            ("bob", "", {"idle_seconds": 90}),
            ("cat", "", {**IDLE, "stop_seconds": 30}),
            ("dan", "", {"idle_seconds": HOUR - 300}),
        ]
    )
    hub.add_user("eve", idle_seconds=LONG_AGO, age_seconds=LONG_AGO)
    args = ["--json", "--timeout=1h", "--warn-before=10m", "--cull-users", "--remove-named-servers"]
    planned = told(cull_real("--dry-run", *args, token=hub.user_culler_token))
    assert planned.outcomes == {
        "ann": ("stop", "planned"),
        "ann/gpu": ("remove", "planned"),
        "cat": ("stop", "planned"),
        "dan": ("stop", "warned"),
        "user eve": ("delete", "planned"),
    }
    assert planned.total["dry_run"] is True
    assert hub.running() == {"ann", "ann/gpu", "bob", "cat", "dan"}
    done = told(cull_real(*args, token=hub.user_culler_token))
    assert done.outcomes == {
        "ann": ("stop", "culled"),
        "ann/gpu": ("remove", "culled"),
        "cat": ("stop", "stopping"),
        "dan": ("stop", "warned"),
        "user eve": ("delete", "culled"),
    }
    assert (done.total["running"], done.total["idle"], done.total["planned"]) == (5, 3, 4)
    assert (done.total["hub"], done.total["version"][:2], done.total["error"]) == (hub.url, "6.", None)
    assert done.result.outcomes == {
        "ann": "culled",
        "ann/gpu": "culled",
        "cat": "stopping",
        "dan": "warned",
        "user eve": "deleted",
    }


def test_a_line_has_the_times_and_the_reason_of_the_log(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("ann", "gpu", idle_seconds=2 * HOUR + 90, age_seconds=20 * HOUR + 90)
    done = told(cull_real("--json", "--timeout=1h"))
    (event,) = done.events
    assert event.pop("idle_seconds") == pytest.approx(2 * HOUR + 90, abs=25)
    assert event.pop("age_seconds") == pytest.approx(20 * HOUR + 90, abs=25)
    assert event == {
        "event": "server",
        "user": "ann",
        "server": "gpu",
        "action": "stop",
        "outcome": "culled",
        "reason": done.result.said["ann/gpu"].reason,
        "due": None,
        "error": None,
    }


def test_a_warning_has_the_time_when_the_server_is_due(scripted: ScriptedHub, cull_scripted: Cull) -> None:
    scripted.now = scripted.now.replace(hour=12, minute=0, second=0, microsecond=0)
    scripted.add("ann", idle=HOUR - 600)
    (event,) = told(cull_scripted("--json", "--timeout=1h", "--warn-before=15m")).events
    assert event["due"] == f"{scripted.now:%Y-%m-%d}T12:10:00Z"


def test_a_pass_without_events_is_one_line(hub: RealHub, cull_real: Cull) -> None:
    hub.spawn("bob", idle_seconds=90)
    pass_alone = told(cull_real("--json", "--timeout=1h"))
    assert pass_alone.events == []
    assert (pass_alone.total["running"], pass_alone.total["idle"]) == (1, 0)


def active_again(exchange: Exchange) -> Answer:
    exchange.hub.touch("ann")
    return exchange.normal()


def stopped_by_another(exchange: Exchange) -> Answer:
    exchange.hub.users["ann"].servers.clear()
    return of_hub(404)(exchange)


def deleted_by_another(exchange: Exchange) -> Answer:
    del exchange.hub.users["eve"]
    return of_hub(404)(exchange)


FAULTS = {
    "server spared": (("GET", "/users/ann", active_again), {"ann": ("stop", "spared")}),
    "server gone": (("DELETE", "/users/ann/server", stopped_by_another), {"ann": ("stop", "gone")}),
    "server failed": (
        ("DELETE", "/users/ann/server", respond_json(500, {"message": "no\nway"})),
        {"ann": ("stop", "failed")},
    ),
    "server stopping": (("DELETE", "/users/ann/server", respond(202)), {"ann": ("stop", "stopping")}),
    "user gone": (("DELETE", "/users/eve", deleted_by_another), {"user eve": ("delete", "gone")}),
    "user failed": (("DELETE", "/users/eve", respond_json(500, {})), {"user eve": ("delete", "failed")}),
    "user stopping": (("DELETE", "/users/eve", respond(202)), {"user eve": ("delete", "stopping")}),
    "user spared": (("DELETE", "/users/eve", of_hub(400)), {"user eve": ("delete", "spared")}),
}


@pytest.mark.parametrize(("fault", "expected"), FAULTS.values(), ids=FAULTS)
def test_each_outcome_of_a_server_and_of_a_user(
    scripted: ScriptedHub, cull_scripted: Cull, fault: tuple[str, str, Reply], expected: dict[str, tuple[str, str]]
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add_user("eve", idle=LONG_AGO)
    scripted.fault(*fault, times=None)
    done = told(cull_scripted("--json", "--timeout=1h", "--cull-users"))
    assert done.outcomes == {"ann": ("stop", "culled"), "user eve": ("delete", "culled"), **expected}
    for event in done.events:
        assert (event["outcome"] == "failed") == ("500" in (event["error"] or ""))


def test_failures_of_one_kind_are_counted_in_the_log_and_have_a_line_each(
    scripted: ScriptedHub, cull_scripted: Cull
) -> None:
    for number in range(5):
        scripted.add(f"user{number}", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", respond_json(500, {}), times=None)
    done = told(cull_scripted("--json", "-q", "--timeout=1h"))
    assert done.result.exit_code == 1
    assert len(done.result.lines) == 2
    assert [event["outcome"] for event in done.events] == ["failed"] * 5


def test_unknown_times_are_null(scripted: ScriptedHub, cull_scripted: Cull) -> None:
    scripted.add("ann", idle=LONG_AGO, started=None)
    (event,) = told(cull_scripted("--json", "--timeout=1h")).events
    assert event["age_seconds"] is None


def test_a_clock_that_runs_back_makes_no_time_negative(scripted: ScriptedHub, cull_scripted: Cull) -> None:
    scripted.add("ann", idle=-HOUR, age=9 * HOUR)
    (event,) = told(cull_scripted("--json", "--timeout=1h", "--max-age=8h")).events
    assert event["idle_seconds"] == 0


ODD_NAMES = [
    pytest.param("a\x00\x1b[2J\x07\x7f\x9b", id="control characters"),
    pytest.param('a"b\\c/d', id="quotes"),
    pytest.param("a\n{}\r\n\u2028\u2029\x85b", id="line ends"),
    pytest.param("\u00fcn\u00ef \U0001f600 \u202e", id="Unicode"),
    pytest.param("a\ud800", id="lone surrogate"),
    pytest.param("\udc80\ud83d", id="two lone surrogates"),
    pytest.param("", id="nothing"),
    pytest.param("NaN", id="NaN"),
]


def test_a_dry_run_logs_what_is_kept_and_why_a_real_pass_would_do_less(
    cull_scripted: Cull, scripted: ScriptedHub
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=60)
    scripted.scopes = ["list:users", "read:users:activity", "read:servers"]
    result = cull_scripted("--timeout=1h", "--dry-run", "--json", "-v")
    kept, lacks = (line for line in result.lines if re.search("kept|lacks", line))
    assert kept.startswith("DEBUG    kept bob: idle ")
    assert lacks.startswith("WARNING  the token lacks delete:servers: a real pass would stop nothing; add to ")


def test_a_first_look_says_what_is_missing_though_nothing_is_due(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.scopes = ["list:users", "read:users:activity", "read:servers"]
    assert any("the token lacks delete:servers" in line for line in cull_scripted("--dry-run").table)


def test_a_dry_run_says_that_a_narrow_scope_covers_some_users_only(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.scopes = ["list:users", "read:users:activity", "read:servers", "delete:servers!group=gpu"]
    (line,) = [line for line in cull_scripted("--dry-run", "--timeout=1h").table if line.startswith("But ")]
    assert line.startswith("But the token has only delete:servers!group=gpu: ")


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["once", "dry run"])
@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_is_printed_as_the_hub_has_it(
    scripted: ScriptedHub, cull_scripted: Cull, name: str, dry_run: list[str]
) -> None:
    def rename(page: dict[str, Any]) -> dict[str, Any]:
        (user,) = page["items"]
        servers = {name: {**user["servers"]["lab"], "name": name}}
        return {**page, "items": [{**user, "name": name, "servers": servers}]}

    scripted.add("ann", "lab", idle=LONG_AGO)
    scripted.fault("GET", "/users", edited(rename))
    scripted.fault("*", "/users/.*", respond_json(404, {"message": f"No user {name}"}), times=None)
    done = told(cull_scripted("--json", "-v", "--timeout=1h", *dry_run))
    for event in done.events:
        assert (event["user"], event["server"]) == (name, name)
    assert len(done.events) == done.total["planned"] == bool(name)
    assert done.result.out.isascii()


# A pass that failed


class Failing(NamedTuple):
    """A way for a pass to fail, the exit code, and a part of the error."""

    arguments: list[str]
    break_it: Callable[[ScriptedHub], object]
    exit_code: int
    error: str


PASSES = {
    "Hub down": Failing([], lambda hub: hub.pause_listening(), 3, "http://127.0.0.1:"),
    "token refused": Failing([], lambda hub: setattr(hub, "token", "another"), 3, "403"),
    "scope missing": Failing([], lambda hub: hub.scopes.remove("delete:servers"), 3, "delete:servers"),
    "no API": Failing([], lambda hub: hub.fault("*", ".*", respond(200, b"hello"), times=None), 3, "--url"),
    "list breaks off": Failing(
        ["--api-page-size=1"], lambda hub: hub.fault("GET", "/users", normal(), respond(500), times=None), 1, "500"
    ),
    "fuse": Failing(["--max-culls=1"], lambda hub: None, 1, "--max-culls"),
    "unreadable rule": Failing(
        ["--rule=group=x keep"], lambda hub: hub.scopes.remove("read:users:groups"), 3, "read:users:groups"
    ),
}


@pytest.mark.parametrize("failing", PASSES.values(), ids=PASSES)
def test_a_failed_pass_has_its_error_in_the_last_line(
    scripted: ScriptedHub, cull_scripted: Cull, failing: Failing
) -> None:
    token = scripted.token
    for name in ("ann", "bob"):
        scripted.add(name, idle=LONG_AGO)
    failing.break_it(scripted)
    done = told(cull_scripted("--json", "-q", "--timeout=1h", *failing.arguments, token=token))
    assert done.result.exit_code == failing.exit_code
    assert failing.error in done.total["error"]
    assert done.result.lines[0] == f"ERROR    {done.total['error']}"
    assert len(done.events) == done.total["culled"] == (1 if "--api-page-size=1" in failing.arguments else 0)


def test_a_pass_without_a_list_counts_nothing(scripted: ScriptedHub, cull_scripted: Cull) -> None:
    scripted.scopes.remove("list:users")
    done = told(cull_scripted("--json", "-q", "--timeout=1h"))
    counts = {name: count for name, count in done.total.items() if type(count) is int}
    assert counts == dict.fromkeys(counts, 0)
    assert counts.keys() >= {"running", "idle", "planned", "culled", "left_undone"}


def test_a_pass_without_permission_leaves_the_rest_undone(scripted: ScriptedHub, cull_scripted: Cull) -> None:
    for number in range(4):
        scripted.add(f"user{number}", idle=LONG_AGO)
    scripted.fault("DELETE", ".*", of_hub(403), times=None)
    done = told(cull_scripted("--json", "-q", "--timeout=1h", "--concurrency=1"))
    assert (done.total["failed"], done.total["left_undone"]) == (1, 3)
    assert done.result.exit_code == 3


@pytest.mark.parametrize("args", [["--timeout=x"], ["--token-file=/nowhere/token"]], ids=str)
def test_a_wrong_option_prints_nothing_on_stdout(scripted: ScriptedHub, cull_scripted: Cull, args: list[str]) -> None:
    result = cull_scripted("--json", *args)
    assert (result.exit_code, result.out) == (2, "")


# As a process: lines come at once, and somebody may stop reading


class Piped:
    """A cull_idle.py whose output goes through pipes."""

    def __init__(self, hub: ScriptedHub, *args: str, stdout: int | IO[bytes] = subprocess.PIPE) -> None:
        self.process = subprocess.Popen(
            [*RUN, "--url", hub.url, "--timeout=1h", *args],
            env={**os.environ, "JUPYTERHUB_API_TOKEN": hub.token, "PYTHONUNBUFFERED": ""},
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
        self.deadline = threading.Timer(20, self.process.kill)
        self.deadline.start()

    def line(self) -> dict[str, Any]:
        assert self.process.stdout
        return valid(self.process.stdout.readline().decode())

    def stop_reading(self) -> None:
        assert self.process.stdout
        self.process.stdout.close()

    def end(self) -> tuple[int, list[str]]:
        """Its exit code, and the lines of the log."""
        assert self.process.stderr
        log = TIMESTAMP.sub("", self.process.stderr.read().decode()).splitlines()
        return self.process.wait(), log


Start = Callable[..., Piped]


@pytest.fixture
def start(scripted: ScriptedHub) -> Iterator[Start]:
    """Start cull_idle.py against the scripted Hub with arguments."""
    started: list[Piped] = []

    def run(*args: str, **more: Any) -> Piped:
        started.append(Piped(scripted, *args, **more))
        return started[-1]

    yield run
    for each in started:
        each.deadline.cancel()
        each.process.kill()
        each.process.wait()
        for pipe in (each.process.stdout, each.process.stderr):
            if pipe:
                pipe.close()


class Gate:
    """Requests that the Hub answers only when it is opened."""

    def __init__(self, hub: ScriptedHub, method: str, pattern: str) -> None:
        self.arrived, self.opened = threading.Event(), threading.Event()
        hub.fault(method, pattern, self._reply, times=None)

    def _reply(self, exchange: Exchange) -> Answer:
        self.arrived.set()
        assert self.opened.wait(20)
        return exchange.normal()


LOOP_AND_ONCE = pytest.mark.parametrize("once", [["--cull-every=1s"], ["--once"]], ids=["loop", "once"])


@LOOP_AND_ONCE
def test_a_line_is_printed_before_the_pass_ends(scripted: ScriptedHub, start: Start, once: list[str]) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    gate = Gate(scripted, "DELETE", "/users/bob/server")
    culler = start("--json", "-q", *once)
    assert culler.line()["user"] == "ann"
    assert gate.arrived.wait(20)
    assert culler.process.poll() is None
    gate.opened.set()
    assert culler.line()["user"] == "bob"
    assert culler.line()["culled"] == 2
    if once == ["--once"]:
        assert culler.end() == (0, [])


def test_a_loop_prints_failed_passes_too_and_ends_when_its_output_is_closed(
    scripted: ScriptedHub, start: Start, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(scripted.token)
    scripted.fault("GET", "/users", then_do(lambda: token.write_text("wrong")))
    culler = start("--json", "-q", "--cull-every=1s", f"--token-file={token}")
    assert culler.line()["error"] is None
    error = culler.line()["error"]
    assert "403" in error
    token.write_text(scripted.token)
    assert culler.line()["error"] is None
    culler.stop_reading()
    exit_code, (line,) = culler.end()
    assert (exit_code, line.startswith(f"ERROR    {error}")) == (1, True)


@LOOP_AND_ONCE
def test_when_its_output_is_closed_requests_in_flight_finish_and_no_other_starts(
    scripted: ScriptedHub, start: Start, once: list[str], tmp_path: Path
) -> None:
    names = [f"user{number}" for number in range(30)]
    for name in names:
        scripted.add(name, idle=LONG_AGO)
    scripted.fault("DELETE", ".*", normal())
    scripted.fault("DELETE", ".*", slow(0.3), times=None)
    metrics = tmp_path / "cull_idle.prom"
    culler = start("--json", "--concurrency=3", f"--metrics-file={metrics}", *once)
    assert culler.line()["outcome"] == "culled"
    culler.stop_reading()
    exit_code, log = culler.end()
    assert exit_code == 1
    begun = {f"user{number}" for number in re.findall(r"/users/user(\d+)/", "\n".join(scripted.lines("DELETE")))}
    assert scripted.in_flight == 0
    assert set(names) - scripted.running() == begun
    assert 3 <= len(begun) < len(names)
    said = Result(exit_code, "", "\n".join(log))
    assert said.outcomes == dict.fromkeys(begun, "culled")
    assert (said.counts["culled"], said.counts["left undone"]) == (len(begun), 30 - len(begun))
    assert f"cull_idle_culled {len(begun)}\n" in metrics.read_text()


@pytest.mark.parametrize("form", [["-v"], ["--json"]], ids=["table", "JSON"])
def test_a_long_dry_run_ends_quietly_when_its_output_is_closed(
    scripted: ScriptedHub, start: Start, form: list[str]
) -> None:
    for number in range(300):
        scripted.add(f"user{number}-{'x' * 500}", idle=LONG_AGO)
    culler = start("--dry-run", *form)
    assert culler.process.stdout
    assert culler.process.stdout.readline()
    culler.stop_reading()
    assert culler.end() == (1, [])


@pytest.mark.parametrize("args", [["--dry-run"], ["--once", "--json", "-q"], ["--help"]], ids=str)
def test_a_full_disk_is_one_error(scripted: ScriptedHub, start: Start, args: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        culler = start(*args, stdout=full)
    exit_code, (line,) = culler.end()
    assert exit_code == 1
    assert "stdout" in line
    assert line.endswith("No space left on device")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("args", [["--dry-run"], ["--once", "--json", "-v"]], ids=str)
def test_a_closed_stream_does_not_stop_the_program(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, args: list[str], stream: str
) -> None:
    for number in range(12):
        scripted.add(f"user{number}", idle=LONG_AGO)
    monkeypatch.setattr(sys, stream, None)
    assert cull_scripted("--timeout=1h", *args).exit_code == 0
    getattr(sys, stream).close()
    assert len(scripted.running()) == (0 if "--once" in args else 12)


def test_nothing_but_json_goes_to_stdout(hub: RealHub, cull_real: Cull, tmp_path: Path) -> None:
    hub.spawn_many([("ann", "", IDLE), ("bob", "", {"idle_seconds": 90})])
    notify: Mapping[str, str] = {"CULL_IDLE_NOTIFY": "sh -c 'cat; echo heard'", "FORCE_COLOR": "1"}
    more = ["--warn-before=10m", "--max-culls=50%", f"--metrics-file={tmp_path / 'cull_idle.prom'}"]
    assert told(cull_real("--json", "-v", "--timeout=1h", *more, env=notify)).total["culled"] == 1
