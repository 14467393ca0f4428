"""Where a small slip would go unnoticed: exact sentences, the last of several conditions, orders of events."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import Cull
from scripted_hub import (
    DROP,
    LONG_AGO,
    ScriptedHub,
    and_do,
    edited,
    normal,
    reset,
    respond,
    respond_json,
    slow,
    then_do,
)

import cull_idle
from cull_idle import (
    Culler,
    Culling,
    Hub,
    HubError,
    Outcome,
    Page,
    PassResult,
    Scan,
    Server,
    Settings,
    UsageError,
    User,
    parse_duration,
    parse_http_date,
    parse_time,
    read_user,
)

MOMENT = "2026-11-22T20:00:00Z"
WHEN = datetime(2026, 11, 22, 20, tzinfo=UTC)
SERVER = {"last_activity": MOMENT, "started": MOMENT, "pending": None, "ready": True, "url": "/user/ann/"}
ANN = {"name": "ann", "admin": False, "created": MOMENT, "last_activity": MOMENT}
NOT_SHOWN = "its last_activity is not shown: that takes the scope read:users:activity"


def settings_of(*args: str) -> Settings:
    """What the command line would make of these arguments."""
    with cull_idle.make_command().make_context("cull_idle.py", list(args)) as context:
        return Settings(**{name: value for name, value in context.params.items() if name != "version"})


# Durations and times


def test_a_duration_beyond_all_time_is_refused_in_these_words() -> None:
    with pytest.raises(ValueError, match=r"^'999999999999d' is too long a duration\.$"):
        parse_duration("999999999999d")


def test_what_is_not_a_time_is_refused_in_these_words() -> None:
    with pytest.raises(ValueError, match=r"^'yesterday or so' is not a time$"):
        parse_time("yesterday or so")


@pytest.mark.parametrize("text", ["2026-11-22T20", "20261122T20Z", "2026-11-22T20Z"])
def test_an_hour_is_a_moment_however_short_its_text(text: str) -> None:
    assert parse_time(text) == WHEN


@pytest.mark.parametrize("zone", ["-0000", "+0000", "GMT", ""])
def test_the_hubs_clock_is_in_utc_whatever_it_says_of_its_zone(zone: str) -> None:
    moment = parse_http_date(f"Sun, 22 Nov 2026 20:00:00 {zone}")
    assert (moment, moment.tzinfo) == (WHEN, UTC)


# Models


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"created": "x"}, "created or last_activity: 'x' is not a time"),
        ({"last_activity": "x"}, "created or last_activity: 'x' is not a time"),
        ({"last_activity": None, "created": None}, "neither last_activity nor created is known"),
        ({"last_activity": DROP}, NOT_SHOWN),
        ({"last_activity": "x", "admin": None}, "created or last_activity: 'x' is not a time"),
        ({"last_activity": DROP, "created": "x"}, NOT_SHOWN),
        ({"admin": None}, "the Hub does not say whether it is an admin"),
    ],
)
def test_the_doubt_about_a_user_is_said_in_these_words(changes: dict[str, object], doubt: str) -> None:
    model = {key: value for key, value in {**ANN, "servers": {}, **changes}.items() if value is not DROP}
    assert read_user(model).doubt == doubt


@pytest.mark.parametrize(
    ("changes", "doubt"),
    [
        ({"started": "x"}, "started or last_activity: 'x' is not a time"),
        ({"last_activity": "x"}, "started or last_activity: 'x' is not a time"),
        ({"last_activity": None, "started": None}, "neither last_activity nor started is known"),
        ({"last_activity": None, "started": None, "ready": None}, "neither last_activity nor started is known"),
        ({"ready": None}, "ready is neither true nor false"),
    ],
)
def test_the_doubt_about_a_server_is_said_in_these_words(changes: dict[str, object], doubt: str) -> None:
    (server,) = read_user({**ANN, "servers": {"": {**SERVER, **changes}}}).servers
    assert server.doubt == doubt


@pytest.mark.parametrize("model", [None, {"name": ""}])
def test_a_user_without_a_name_is_refused_in_these_words(model: object) -> None:
    with pytest.raises(ValueError, match=r"^answered a user without a name$"):
        read_user(model)


def test_what_is_not_understood_at_all_has_no_times_and_no_state() -> None:
    model = {"name": "ann", "admin": True, "created": "x", "last_activity": MOMENT, "servers": {"gpu": 7}}
    assert read_user(model) == User(
        "ann",
        True,
        None,
        None,
        [Server("ann", "gpu", False, "", None, None, "its model is not a JSON object", {}, model)],
        "created or last_activity: 'x' is not a time",
        model,
    )


def test_servers_that_are_not_shown_are_one_without_a_name_times_and_state() -> None:
    doubt = "its servers are not shown: that takes the scope read:servers"
    assert read_user(ANN).servers == [Server("ann", "", False, "", None, None, doubt, {}, ANN)]


def test_a_server_whose_time_is_garbage_has_no_times() -> None:
    (server,) = read_user({**ANN, "servers": {"": {**SERVER, "started": "x"}}}).servers
    assert (server.started, server.last_activity) == (None, None)


@pytest.mark.parametrize(
    ("model", "doubt"),
    [
        ({**SERVER, "started": "x"}, "started or last_activity: 'x' is not a time"),
        ({"ready": True, "last_activity": MOMENT}, "pending is missing"),
        ({"ready": True, "url": "/user/ann/"}, "last_activity is missing"),
        ({"pending": None, "url": "/user/ann/"}, "last_activity is missing"),
        ({"last_activity": MOMENT, "url": "/user/ann/"}, "ready is missing"),
    ],
)
def test_a_server_in_doubt_has_no_times_and_no_state(model: dict[str, object], doubt: str) -> None:
    (server,) = read_user({**ANN, "servers": {"gpu": model}}).servers
    assert server[:7] == ("ann", "gpu", False, "", None, None, doubt)


@pytest.mark.parametrize("servers", [None, [], "none"], ids=str)
def test_servers_that_are_garbage_are_not_read_from_the_keys_of_old(servers: object) -> None:
    model = {"name": "ann", "admin": False, "last_activity": MOMENT, "server": "/user/ann/", "servers": servers}
    (server,) = read_user(model).servers
    assert server.doubt == "its servers are not shown: that takes the scope read:servers"


def test_only_what_is_called_stopped_is_left_out() -> None:
    servers = {str(value): {**SERVER, "stopped": value} for value in (True, False, None, 1, "true")}
    assert {server.name for server in read_user({**ANN, "servers": servers}).servers} == set(servers) - {"True"}


# Sentences


def test_a_pagination_that_jumps_back_is_told_in_these_words(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", respond_json(200, {"items": [], "_pagination": {"next": {"offset": 0}}}))
    result = cull_scripted("--timeout", "1h")
    assert "GET /users: the page after offset 0 would start at 0; the rest is not read" in result.lines[0]


def test_a_nameless_user_is_told_in_these_words(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", respond_json(200, [{}, {"name": ""}]))
    assert cull_scripted("--timeout", "1h").lines[0] == (
        "WARNING  kept 2 in doubt; the first: the user list: answered a user without a name"
    )


def test_verbose_says_what_is_kept_and_why(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("busy", idle=LONG_AGO)
    scripted.add_user("awake", idle=LONG_AGO)
    assert cull_scripted("--timeout", "30d", "--cull-users", "-v").lines[:2] == [
        "DEBUG    kept busy: idle 2h, limit 30d",
        "DEBUG    kept user awake: idle 2h, limit 30d",
    ]


def test_a_verbose_dry_run_says_what_is_kept_in_its_table_only(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("busy", idle=LONG_AGO)
    result = cull_scripted("--timeout", "30d", "--dry-run", "-v")
    assert result.err == ""
    assert "kept: idle 2h, limit 30d" in result.out


EVENTS = [
    pytest.param(lambda hub: hub.users["ann"].servers.clear(), "INFO     gone ann: not running any more", id="down"),
    pytest.param(
        lambda hub: setattr(hub.users["ann"].servers[""], "pending", "stop"),
        "WARNING  stopping ann: the Hub is stopping it already",
        id="stopping",
    ),
    pytest.param(
        lambda hub: setattr(hub.users["ann"].servers[""], "started", hub.now),
        "INFO     spared ann: it was started anew",
        id="new",
    ),
    pytest.param(lambda hub: hub.users.clear(), "INFO     gone ann: the Hub answered 404", id="no such user"),
]


@pytest.mark.parametrize(("change", "line"), EVENTS)
def test_what_the_second_look_finds_is_told_in_these_words(
    cull_scripted: Cull, scripted: ScriptedHub, change: Any, line: str
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", then_do(lambda: change(scripted)))
    assert cull_scripted("--timeout", "1h").lines[0] == line


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (202, "WARNING  stopping user ann: idle 2h, limit 1h; a server is not down yet"),
        (400, "INFO     spared user ann: the Hub answered 400"),
        (404, "INFO     gone user ann: the Hub answered 404"),
    ],
)
def test_what_becomes_of_a_user_is_told_in_these_words(
    cull_scripted: Cull, scripted: ScriptedHub, status: int, line: str
) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann", respond(status))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert (result.exit_code, result.lines[0]) == (0, line)


def test_a_user_made_anew_is_told_in_these_words(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", then_do(lambda: scripted.add_user("ann", idle=LONG_AGO, age=LONG_AGO)))
    assert cull_scripted("--timeout", "1h", "--cull-users").lines[0] == "INFO     spared user ann: it was created anew"


def test_who_is_spared_is_told_in_two_units(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    server = scripted.add("ann", idle=4 * 86400)
    seen = scripted.now - timedelta(days=1, hours=2, minutes=3, seconds=30)
    scripted.fault("GET", "/users/ann", then_do(lambda: setattr(server, "last_activity", seen)))
    assert cull_scripted("--timeout", "3d").lines[0] == "INFO     spared ann: active again 1d02h ago"


def test_only_a_named_server_is_said_to_be_removed(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("ann", "gpu", idle=LONG_AGO)
    assert sorted(cull_scripted("--timeout", "1h", "--remove-named-servers").lines[:2]) == [
        "INFO     culled ann/gpu: idle 2h, limit 1h; removed",
        "INFO     culled ann: idle 2h, limit 1h",
    ]


def test_how_long_the_hub_waited_is_told_in_seconds(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.slow_stop = 0.7
    scripted.add("ann", idle=LONG_AGO, stop_seconds=9)
    result = cull_scripted("--timeout", "1h")
    assert result.lines[0] == "WARNING  stopping ann: idle 2h, limit 1h; not down after 1s"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_scope_in_these_words(cull_scripted: Cull, scripted: ScriptedHub, status: int) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", respond(status))
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 3
    assert result.lines[0].startswith(
        f"ERROR    failed ann: idle 2h, limit 1h; the Hub answered {status}; the token needs the scope delete:servers,"
        " or before JupyterHub 2.0 to be an admin's: c.JupyterHub.load_roles.append("
    )


def test_a_500_for_nobody_is_told_in_these_words(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", then_do(scripted.users.clear, respond(500)))
    assert cull_scripted("--timeout", "1h").lines[0] == "INFO     gone ann: the Hub answered 500"


# Orders of events


def test_only_a_500_is_looked_into(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("DELETE", "/users/ann/server", then_do(scripted.users.clear, respond(418)))
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 1
    assert scripted.lines()[-1] == "DELETE /users/ann/server"


def test_a_stop_that_works_after_a_403_does_not_revive_the_pass(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    scripted.add_user("cat", idle=LONG_AGO)
    bob_is_stopping = threading.Event()
    scripted.fault("DELETE", "/users/ann/server", then_do(lambda: bob_is_stopping.wait(5), respond(403)))
    scripted.fault("DELETE", "/users/bob/server", then_do(bob_is_stopping.set, slow(0.1)))
    assert cull_scripted("--timeout", "1h", "--cull-users", "--concurrency", "2").exit_code == 3
    assert scripted.running() == {"ann"}
    assert set(scripted.users) == {"ann", "bob", "cat"}


@pytest.mark.parametrize("which", [0, 1], ids=["before the stop", "after it"])
def test_a_user_of_unclear_rank_at_either_look_is_spared(
    cull_scripted: Cull, scripted: ScriptedHub, which: int
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    unclear = edited(lambda model: {**model, "admin": None})
    scripted.fault("GET", "/users/ann", *[normal()] * which, unclear)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert "ann" in scripted.users
    assert "INFO     spared user ann: the Hub does not say whether it is an admin" in result.lines


def a_pass(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedHub, stop: threading.Event, *args: str
) -> cull_idle.PassResult:
    """What a pass comes to that may be told to stop."""
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", scripted.token)
    return Culler(settings_of(*args, f"--url={scripted.url}"), stop).make_pass()


def test_told_to_stop_a_pass_begins_nothing_new_and_says_what_is_undone(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedHub
) -> None:
    for number in range(5):
        scripted.add(f"user{number}", idle=LONG_AGO)
    stop = threading.Event()
    scripted.fault("DELETE", ".*", and_do(stop.set))
    result = a_pass(monkeypatch, scripted, stop, "--timeout=1h", "--concurrency=1")
    assert len(scripted.lines("DELETE")) == 1
    assert (result.due, result.undone, result.exit_code) == (5, 4, 1)


@pytest.mark.parametrize("server", [True, False], ids=["server", "user"])
def test_told_to_stop_after_a_look_nothing_is_deleted(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedHub, server: bool
) -> None:
    if server:
        scripted.add("ann", idle=LONG_AGO)
    else:
        scripted.add_user("ann", idle=LONG_AGO)
    stop = threading.Event()
    scripted.fault("GET", "/users/ann", and_do(stop.set))
    result = a_pass(monkeypatch, scripted, stop, "--timeout=1h", "--cull-users")
    assert scripted.lines()[-1] == "GET /users/ann"
    assert (result.undone, result.exit_code) == (result.due, 1)


def test_told_to_stop_a_scan_asks_for_no_other_page(monkeypatch: pytest.MonkeyPatch, scripted: ScriptedHub) -> None:
    for number in range(5):
        scripted.add(f"user{number}", idle=LONG_AGO)
    stop = threading.Event()
    scripted.fault("GET", "/users", and_do(stop.set))
    result = a_pass(monkeypatch, scripted, stop, "--timeout=1h", "--api-page-size=2")
    assert scripted.lines() == ["GET /user", "GET /users?state=ready&limit=2"]
    assert (result.running, result.due, result.undone) == (2, 2, 2)


def test_told_to_stop_nothing_is_tried_again(monkeypatch: pytest.MonkeyPatch, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    stop = threading.Event()
    scripted.fault("DELETE", ".*", then_do(stop.set, reset()), times=None)
    result = a_pass(monkeypatch, scripted, stop, "--timeout=1h")
    assert scripted.lines()[2:] == ["GET /users/ann", "DELETE /users/ann/server"]
    assert result.exit_code == 1


def test_whoever_stops_listening_to_a_culling_ends_it(scripted: ScriptedHub) -> None:
    for number in range(9):
        scripted.add(f"user{number}", idle=LONG_AGO)
    settings, stop = settings_of("--timeout=1h", "--concurrency=1"), threading.Event()
    scripted.fault("DELETE", ".*", slow(0.05), times=None)
    with Hub(scripted.url, scripted.token, timedelta(seconds=9)) as hub:
        events = Culling(hub, cull_idle.scan_hub(hub, cull_idle.Scan(settings), stop), stop).events()
        next(iter(events))
        events.close()  # type: ignore[attr-defined]
    assert len(scripted.lines("DELETE")) <= 3


@pytest.mark.parametrize(
    ("servers", "line"),
    [
        (None, "INFO     spared ann/gpu: its servers are not shown: that takes the scope read:servers"),
        ({"": None}, "INFO     spared ann/gpu: its model is not a JSON object"),
        ({"": SERVER}, "INFO     gone ann/gpu: not running any more"),
        ({}, "INFO     gone ann/gpu: not running any more"),
    ],
)
def test_a_server_that_a_look_does_not_show_is_gone_only_if_all_is_clear(
    cull_scripted: Cull, scripted: ScriptedHub, servers: object, line: str
) -> None:
    scripted.add("ann", "gpu", idle=LONG_AGO)
    scripted.fault("GET", "/users/ann", edited(lambda model: {**model, "servers": servers}))
    assert cull_scripted("--timeout", "1h").lines[0] == line
    assert scripted.running() == {"ann/gpu"}


# Pages and clocks


@pytest.mark.parametrize(
    ("following", "total", "where"),
    [
        (None, 4, None),
        ({"offset": 3}, 4, 3),
        ({"offset": 3}, None, 3),
        ({"offset": 3}, "few", 3),
        ({"offset": 4}, 4, HubError),
        ({"offset": 2}, 4, HubError),
        ({"offset": True}, 4, HubError),
        ({}, 4, HubError),
        ("", 4, HubError),
    ],
)
def test_the_next_page_starts_after_this_one_and_before_the_end(following: object, total: object, where: Any) -> None:
    page = Page([], WHEN, 2, following, total)
    if where is HubError:
        with pytest.raises(HubError, match="the page after offset 2 would start at"):
            page.next_offset()
    else:
        assert page.next_offset() == where


def test_no_second_look_is_later_than_the_scan_and_the_seconds_since() -> None:
    scan = Scan(settings_of())
    scan.clock = (WHEN, time.monotonic() - 10)
    latest = scan.not_after(WHEN + timedelta(hours=1))
    assert timedelta(seconds=10) <= latest - WHEN < timedelta(seconds=20)
    assert scan.not_after(WHEN + timedelta(seconds=5)) == WHEN + timedelta(seconds=5)


def test_a_server_idle_for_exactly_a_step_is_counted_by_it() -> None:
    times = {"started": WHEN.isoformat(), "last_activity": WHEN.isoformat()}
    model = {"name": "ann", "servers": {"": {"ready": True, "pending": None, **times}}}
    hour = timedelta(hours=1)
    scan = Scan(settings_of(), idle_for={hour: 0, hour + timedelta(seconds=1): 0})
    scan.add(Page([model], WHEN + hour, 0))
    assert [*scan.idle_for.values()] == [1, 0]


@pytest.mark.parametrize(
    ("outcomes", "due", "said", "exit_code"),
    [
        ({}, 0, "9 running, 0 due in 1.3s", 0),
        ({Outcome.CULLED: 2, Outcome.GONE: 1}, 3, "9 running, 3 due, 2 culled, 1 gone in 1.3s", 0),
        ({Outcome.CULLED: 2}, 3, "9 running, 3 due, 2 culled, 1 left undone in 1.3s", 1),
        ({Outcome.CULLED: 2, Outcome.FAILED: 1}, 3, "9 running, 3 due, 2 culled, 1 failed in 1.3s", 1),
    ],
)
def test_a_pass_says_what_it_came_to(outcomes: dict[Outcome, int], due: int, said: str, exit_code: int) -> None:
    result = PassResult(dry_run=False, listed=True, running=9, due=due, outcomes=Counter(outcomes), seconds=1.26)
    assert (str(result), result.exit_code) == (said, exit_code)


# The loop


class Pauses(threading.Event):
    """A stop that is told after so many pauses, none of which takes time."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(round(timeout or 0, 1))
        if len(self.seconds) >= self.left:
            self.set()
        return self.is_set()


def loop_over(scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch, passes: int, *args: str) -> list[float]:
    """Loop for so many passes; returns the pauses after them."""
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", scripted.token)
    stop = Pauses(passes)
    assert Culler(settings_of("--timeout=1h", f"--url={scripted.url}", *args), stop).run() == 0
    return stop.seconds


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was logged at info or louder, without when it was and how long it took."""
    lines = re.sub(r" in \d\.\ds", "", capsys.readouterr().err).splitlines()
    return [line.split(maxsplit=3)[3] for line in lines if " DEBUG " not in line]


def test_each_pass_says_when_the_next_one_starts(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedHub, capsys: pytest.CaptureFixture[str]
) -> None:
    loop_over(scripted, monkeypatch, 2, "--cull-every=20s")
    assert said(capsys) == [*["pass: 0 running, 0 due; next in 20s"] * 2, "told to stop"]


def test_a_pass_that_is_told_to_stop_says_nothing_of_a_next_one(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedHub, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = threading.Event()
    scripted.fault("GET", "/users", and_do(stop.set))
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", scripted.token)
    assert Culler(settings_of("--timeout=1h", f"--url={scripted.url}"), stop).run() == 0
    assert said(capsys) == ["pass: 0 running, 0 due", "told to stop"]


def test_passes_that_work_are_cull_every_apart(monkeypatch: pytest.MonkeyPatch, scripted: ScriptedHub) -> None:
    seconds = loop_over(scripted, monkeypatch, 3, "--cull-every=20s")
    assert all(19 <= each <= 20 for each in seconds)
    assert scripted.lines() == ["GET /user", *["GET /users?state=ready&limit=200"] * 3]


def test_a_pass_that_overruns_is_followed_at_once(monkeypatch: pytest.MonkeyPatch, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", slow(1.1))
    assert loop_over(scripted, monkeypatch, 1, "--cull-every=1s") == [0]


def test_pauses_grow_while_passes_fail_and_shrink_when_one_works(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedHub
) -> None:
    scripted.fault("GET", "/users", *[respond(403)] * 4, normal(), respond(403))
    assert [round(each) for each in loop_over(scripted, monkeypatch, 6, "--cull-every=10s")] == [2, 4, 8, 10, 10, 2]


def test_scopes_are_asked_for_until_a_pass_works(monkeypatch: pytest.MonkeyPatch, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", respond(403), normal(), respond(403), normal())
    loop_over(scripted, monkeypatch, 4)
    assert scripted.lines("GET").count("GET /user") == 2


def test_a_loop_does_not_begin_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUPYTERHUB_API_TOKEN", raising=False)
    stop = threading.Event()
    stop.set()
    with pytest.raises(UsageError):
        Culler(settings_of(), stop).run()


def test_the_line_of_a_pass_says_how_long_it_took(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/users", slow(0.2))
    assert re.fullmatch(r"INFO     pass: 0 running, 0 due in 0\.[2-9]s", cull_scripted("--timeout", "1h").lines[-1])
