"""--json: one JSON object per line, as the README documents it, as soon as the event happens."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args
from unittest.mock import patch

import pytest
from messages import Says
from processes import Start, wait_for
from readme_text import section
from runs import Cull, Result, RunLoop
from scenes import Given, Play, Scene, active, fault, having, idle, server, user
from scripted_hub import (
    HOUR,
    LONG_AGO,
    NEARLY_DUE,
    Exchange,
    Reply,
    ScriptedHub,
    edited,
    normal,
    of_hub,
    respond,
    respond_json,
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
PASS = objects(
    event={"const": "pass"},
    started=TIME,
    hub={"type": "string", "pattern": "^https?://"},
    version=MAYBE_TEXT,
    **dict.fromkeys(("running", "idle", "planned", *COUNTS, "asked", "busy", "no_answer"), COUNT),
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
    """The events of one pass, and its last line."""

    events: list[dict[str, Any]]
    total: dict[str, Any]

    @property
    def outcomes(self) -> dict[str, str]:
        """Outcomes as the log has them: {"ann/gpu": "culled", "user eve": "deleted"}."""
        return {
            name_of(event): "deleted"
            if (event["action"], event["outcome"]) == ("delete", "culled")
            else event["outcome"]
            for event in self.events
        }


def name_of(event: dict[str, Any]) -> str:
    """`ann`, `ann/gpu` or `user ann`."""
    name = f"user {event['user']}" if event["event"] == "user" else f"{event['user']}/{event['server']}"
    return name.removesuffix("/")


def told(result: Result) -> Told:
    """The output of one pass. Checks each line, and that the pass comes last and counts them."""
    assert result.out.endswith("\n")
    assert result.out.isascii()
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
    return Told(lines, total)


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


# Each line is what the log says


EVERYBODY = [idle("ann", "ann/gpu"), active("bob"), server("dan", NEARLY_DUE), user("eve")]


def meanwhile(method: str, path: str, change: Callable[[ScriptedHub], object], of: Reply = Exchange.normal) -> Given:
    """Somebody else does something while a request is on its way."""
    return lambda hub: hub.fault(method, path, then_do(partial(change, hub), of))


SCENES = [
    Scene(
        "whatever is done",
        [*EVERYBODY, idle("cat", stop_seconds=30.0), having(slow_stop=0.0)],
        "--warn-before=15m --cull-users",
        becomes={"ann": "culled", "ann/gpu": "culled", "cat": "stopping", "dan": "warned", "user eve": "deleted"},
    ),
    Scene("nothing to do", [active("ann")], says=True),
    Scene("a server that is culled", [idle("ann/gpu")], becomes={"ann/gpu": "culled"}, says=True),
    Scene(
        "a server that cannot be stopped",
        [idle("ann"), fault("DELETE", "/users/ann/server", respond_json(500, {"message": "no\nway"}), times=None)],
        becomes={"ann": "failed"},
        deletes=["ann"],
        exit=1,
        says=True,
    ),
    Scene(
        "a server that is active again",
        [idle("ann"), meanwhile("GET", "/users/ann", lambda hub: hub.touch("ann"))],
        becomes={"ann": "spared"},
    ),
    Scene(
        "a server that somebody else stops",
        [idle("ann"), meanwhile("DELETE", ".*", lambda hub: hub.users["ann"].servers.clear(), of_hub(404))],
        becomes={"ann": "gone"},
        deletes=["ann"],
    ),
    Scene(
        "a user whom somebody else deletes",
        [user("eve"), meanwhile("DELETE", ".*", lambda hub: hub.users.clear(), of_hub(404))],
        "--cull-users",
        becomes={"user eve": "gone"},
        deletes=["user eve"],
    ),
    *(
        Scene(
            f"a user who is {outcome}",
            [user("eve"), fault("DELETE", "/users/eve", reply, times=None)],
            "--cull-users",
            becomes={"user eve": outcome},
            deletes=["user eve"],
            exit=exit_code,
        )
        for outcome, reply, exit_code in (
            ("failed", respond_json(500, {}), 1),
            ("stopping", respond(202), 0),
            ("spared", of_hub(400), 0),
        )
    ),
]


@pytest.mark.parametrize("scene", SCENES, ids=Scene.__str__)
def test_an_event_is_a_line(scene: Scene, play: Play) -> None:
    done = told(play(replace(scene, options=f"--json {scene.options}")))
    assert done.outcomes == scene.becomes
    assert done.total["error"] is None


FAILURES = [
    Scene("a Hub that is down", [ScriptedHub.pause_listening], exit=3),
    Scene("a token that is refused", [fault("*", ".*", of_hub(403), times=None)], exit=3),
    Scene(
        "a list that breaks off",
        [idle("ann", "bob"), fault("GET", "/users", normal(), respond(500), times=None)],
        "--api-page-size=1",
        becomes={"ann": "culled"},
        exit=1,
    ),
    Scene("a fuse that blows", [idle("ann", "bob")], "--max-culls=1", exit=1, says=True),
]


@pytest.mark.parametrize("scene", FAILURES, ids=Scene.__str__)
def test_the_last_line_says_why_a_pass_failed(scene: Scene, play: Play) -> None:
    result = play(replace(scene, options=f"--json {scene.options}"))
    done = told(result)
    assert done.outcomes == scene.becomes
    assert result.errors == [f"ERROR    {done.total['error']}"]


def test_each_failure_is_a_line_though_the_log_counts_them(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    idle(*"abcde")(scripted)
    scripted.fault("DELETE", ".*", respond_json(500, {}), times=None)
    result = cull_scripted("--json", "-q", "--timeout=1h")
    assert told(result).outcomes == dict.fromkeys("abcde", "failed")
    assert len(result.lines) == 2


def test_a_dry_run_tells_what_is_planned_and_a_pass_does_it(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for given in EVERYBODY:
        given(scripted)
    arguments = ("--json", "--timeout=1h", "--warn-before=15m", "--cull-users", "--remove-named-servers")
    planned, done = told(cull_scripted("--dry-run", *arguments)), told(cull_scripted(*arguments))
    for each, outcome in ((planned, "planned"), (done, "culled")):
        assert {name_of(event): (event["action"], event["outcome"]) for event in each.events} == {
            "ann": ("stop", outcome),
            "ann/gpu": ("remove", outcome),
            "dan": ("stop", "warned"),
            "user eve": ("delete", outcome),
        }
        assert [each.total[name] for name in ("running", "idle", "planned", "warned")] == [4, 2, 3, 1]
        assert each.total["dry_run"] == (each is planned)


def test_times(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    """A time that is not known is null. A clock that runs back makes no time negative."""
    scripted.now = scripted.now.replace(hour=12, minute=0, second=0, microsecond=0)
    scripted.add("ann", idle=LONG_AGO, age=3 * HOUR + 30)
    scripted.add("bob", idle=LONG_AGO, started=None)
    scripted.add("cat", idle=-HOUR, age=9 * HOUR + 30)
    scripted.add("dan", idle=HOUR - 600)
    found = told(cull_scripted("--json", "--timeout=1h", "--max-age=8h", "--warn-before=15m")).events
    assert {event["user"]: event["due"] for event in found if event["due"]} == {
        "dan": f"{scripted.now:%Y-%m-%d}T12:10:00Z"
    }
    minutes = {
        event["user"]: [event[f"{what}_seconds"] and event[f"{what}_seconds"] // 60 for what in ("idle", "age")]
        for event in found
    }
    assert minutes == {"ann": [120, 180], "bob": [120, None], "cat": [0, 540], "dan": [50, 51]}


ODD_NAMES = {
    "a\x00\x1b[2J\x07\x7f\x9b",
    'a"b\\c/d',
    "a\n{}\r\n\u2028\u2029\x85b",
    "\u00fcn\u00ef \U0001f600 \u202e",
    "a\ud800",  # half a character
    "\udc80\ud83d",
    "NaN",
    "",
}


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["once", "dry run"])
def test_an_odd_name_is_printed_as_the_hub_has_it(
    cull_scripted: Cull, scripted: ScriptedHub, dry_run: list[str]
) -> None:
    def rename(page: dict[str, Any]) -> dict[str, Any]:
        (user,) = page["items"]
        (model,) = user["servers"].values()
        named = [{**user, "name": name, "servers": {name: {**model, "name": name}}} for name in ODD_NAMES]
        return {**page, "items": named}

    idle("ann/lab")(scripted)
    scripted.fault("GET", "/users", edited(rename))
    scripted.fault("*", "/users/.*", respond_json(404, {"message": "No such user"}), times=None)
    done = told(cull_scripted("--json", "-v", "--timeout=1h", *dry_run))
    assert {(event["user"], event["server"]) for event in done.events} == {(name, name) for name in ODD_NAMES if name}


@pytest.mark.parametrize("args", [["--timeout=x"], ["--token-file=/nowhere/token"]], ids=str)
def test_a_wrong_option_prints_nothing_on_stdout(cull_scripted: Cull, args: list[str]) -> None:
    result = cull_scripted("--json", *args)
    assert (result.exit_code, result.out) == (2, "")


def test_a_pass_of_a_loop_that_fails_has_its_line_too(loop: RunLoop, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", normal(), of_hub(403), normal())
    passes = loop(scripted, "--json", between=[lambda: None] * 2).passes
    assert [told(each).total["error"] is None for each in passes] == [True, False, True]


# As a process: lines come at once, and somebody may stop reading

LOOP_AND_ONCE = pytest.mark.parametrize("once", [[], ["--once"]], ids=["loop", "once"])


@LOOP_AND_ONCE
def test_a_line_is_printed_before_the_pass_ends(scripted: ScriptedHub, start: Start, once: list[str]) -> None:
    opened = threading.Event()
    idle("ann", "bob")(scripted)
    scripted.fault("DELETE", "/users/bob/server", then_do(opened.wait))
    culler = start(scripted, "--json", "-q", "--timeout=1h", *once)
    culler.wait_for(culler.said)
    assert valid(culler.said())["user"] == "ann"
    opened.set()
    wait_for(lambda: culler.said().count("\n") == 3)
    assert told(Result(0, culler.said(), "")).outcomes == {"ann": "culled", "bob": "culled"}


def test_nothing_but_json_goes_to_stdout(scripted: ScriptedHub, start: Start, tmp_path: Path) -> None:
    for given in EVERYBODY:
        given(scripted)
    out, metrics = tmp_path / "out", tmp_path / "cull_idle.prom"
    arguments = ("--once", "--json", "-v", "--timeout=1h", "--warn-before=15m", f"--metrics-file={metrics}")
    with out.open("wb") as file:
        culler = start(scripted, *arguments, "--notify", "sh -c 'cat; echo heard'", stdout=file)
    assert culler.wait() == 0
    assert told(Result(0, out.read_text(), "")).total["culled"] == 2


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A reader and a writer. A test closes the reader."""
    reader, writer = os.pipe()
    yield reader, writer
    os.close(writer)


@LOOP_AND_ONCE
def test_when_its_output_is_closed_requests_in_flight_finish_and_no_other_starts(
    scripted: ScriptedHub, start: Start, once: list[str], pipe: tuple[int, int], tmp_path: Path
) -> None:
    names = {f"user{number}" for number in range(30)}
    idle(*names)(scripted)
    may_finish = threading.Semaphore(1)  # DELETEs
    scripted.fault("DELETE", ".*", then_do(may_finish.acquire), times=None)
    reader, writer = pipe
    metrics = tmp_path / "cull_idle.prom"
    arguments = ("--json", "--timeout=1h", "--concurrency=3", f"--metrics-file={metrics}", *once)
    culler = start(scripted, *arguments, stdout=writer)
    assert valid(os.read(reader, 1 << 16).decode())["outcome"] == "culled"
    culler.wait_for(lambda: scripted.in_flight == 3)
    os.close(reader)
    may_finish.release()
    culler.wait_for(lambda: len(Result(0, "", culler.said()).outcomes) == 2)  # the second after it could not be printed
    may_finish.release(30)
    assert culler.wait() == 1
    begun = {request.segments[1] for request in scripted.requests if request.method == "DELETE"}
    assert names - scripted.running() == begun
    assert len(begun) <= 5
    said = Result(1, "", culler.said())
    assert said.outcomes == dict.fromkeys(begun, "culled")
    assert (said.counts["culled"], said.counts["left undone"]) == (len(begun), 30 - len(begun))
    assert f"cull_idle_culled {len(begun)}\n" in metrics.read_text()


@pytest.mark.parametrize("form", ["-v", "--json"])
def test_a_long_dry_run_ends_quietly_when_its_output_is_closed(
    scripted: ScriptedHub, start: Start, form: str, pipe: tuple[int, int]
) -> None:
    idle(*(f"user{number}-{'x' * 500}" for number in range(300)))(scripted)  # more than a pipe holds
    reader, writer = pipe
    culler = start(scripted, "--timeout=1h", "--dry-run", form, stdout=writer)
    assert os.read(reader, 10)
    os.close(reader)
    assert (culler.wait(), culler.said()) == (1, "")


def test_a_full_disk_is_one_error(scripted: ScriptedHub, start: Start, says: Says) -> None:
    said = set()
    for args in ("--dry-run", "--once --json -q", "--help"):
        with Path("/dev/full").open("wb") as full:
            culler = start(scripted, *args.split(), stdout=full)
        assert culler.wait() == 1
        said.add(culler.said())
    says("".join(said))
    with Path("/dev/full").open("wb") as full:
        culler = start(scripted, "--dry-run", stdout=full, stderr=full)
    assert culler.wait() == 1  # not the 120 of a Python that cannot write at its end


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("args", [["--dry-run"], ["--json", "-v"]], ids=str)
def test_a_closed_stream_does_not_stop_the_program(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, args: list[str], stream: str
) -> None:
    idle("ann")(scripted)
    monkeypatch.setattr(sys, stream, None)
    assert cull_scripted("--timeout=1h", *args).exit_code == 0
    getattr(sys, stream).close()
    assert scripted.running() == ({"ann"} if "--dry-run" in args else set())
