"""--idle-by: whose word counts, who is asked, with which token, and what servers and administrators get wrong.

The scripted Hub is its own proxy here: what is below /user/ goes to its servers.
"""

from __future__ import annotations

import gc
import json
import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hub.process import free_ports
from messages import Says
from runs import Cull, Result, RunLoop
from scenes import Given, Play, Scene, change, fault, having, meanwhile, server
from scripted_hub import (
    ALL_SCOPES,
    HOUR,
    LONG_AGO,
    Answer,
    Exchange,
    FakeJupyter,
    Reply,
    Request,
    ScriptedHub,
    drip,
    edited,
    hang,
    html,
    of_hub,
    raw,
    redirect,
    reset,
    reset_in_body,
    respond,
    respond_json,
    slow,
    then_do,
    truncated,
)

BUSY = {"id": "1", "execution_state": "busy", "last_activity": "2026-01-01T00:00:00Z"}
PATHS = ("kernels", "terminals", "status")
CULLED = {"ann": "culled"}
SPARED = {"ann": "spared"}
FAILED = {"ann": "failed"}


@pytest.fixture
def scripted(scripted: ScriptedHub) -> ScriptedHub:
    """A Hub whose culler may make tokens."""
    scripted.scopes = [*ALL_SCOPES, "tokens"]
    return scripted


@pytest.fixture
def play(play: Play, scripted: ScriptedHub) -> Play:
    """Play a scene: no token is left, ours goes to no server. In its options, PORT is the Hub's, CLOSED nobody's."""

    def run(scene: Scene) -> Result:
        options = scene.options.replace("PORT", str(scripted.port)).replace("CLOSED", str(free_ports(1)[0]))
        result = play(replace(scene, options=options))
        assert scripted.tokens == {}
        assert not any(scripted.token in str(request.headers) for request in asked(scripted))
        return result

    return run


@pytest.fixture
def subdomains(scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch) -> ScriptedHub:
    """All hosts are this one."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **kw: resolve("127.0.0.1", *more, **kw))
    return scripted


def asked(hub: ScriptedHub) -> list[Request]:
    """The requests that servers got."""
    return [request for request in list(hub.requests) if request.target.startswith("/user/")]


def figures(result: Result, *names: str) -> list[int]:
    """Figures of the pass."""
    line = json.loads(result.out.splitlines()[-1])
    return [line[name] for name in names]


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def part(seconds: float = LONG_AGO, **more: object) -> dict[str, Any]:
    """A kernel or a terminal, last active that long ago."""
    return {"id": "1", "name": "1", "last_activity": ago(seconds), **more}


def jupyter(*names: str, says: Sequence[Any] = (), idle: float = LONG_AGO, **more: Any) -> Given:
    """Servers, started long ago and idle for so long by the Hub's word. `says` is what FakeJupyter takes."""
    fields = {"age": 9 * HOUR, "says": FakeJupyter(*says), **more}
    return lambda hub: [server(name, idle, **fields)(hub) for name in names]


busy = partial(jupyter, says=[None, [BUSY]])  # what the Hub does not notice
always = partial(fault, times=None)


def answers(path: str, reply: Reply) -> Given:
    """What a server says there."""
    return always("GET", f"/user/{path}", reply)


def in_modes(modes: str, *scenes: Scene) -> list[Scene]:
    """These scenes in each of the modes; the first one says what is in tests/messages.txt.

    Who is in use is spared by the second look of `both`, and kept by the scan of the others, which counts the doubts.
    """
    made = []
    for scene in scenes:
        for mode in modes.split():
            kept = replace(scene, name=f"{scene.name} ({mode})", options=f"--idle-by={mode} {scene.options}")
            if mode == "both":
                made.append(replace(kept, doubts=0))
            else:
                becomes = {name: word for name, word in scene.becomes.items() if word != "spared"}
                made.append(replace(kept, becomes=becomes, says=scene.says and modes.startswith(mode)))
    return made


# What counts

# What a server says, its answers, and the modes that keep it. By the Hub's word it is idle, unless that is said.
WORDS: dict[str, tuple[Given, list[Given], str]] = {
    "nothing but its start": (jupyter("ann", "bob/gpu"), [], ""),
    "an activity of its own": (jupyter("ann", "bob/gpu", says=[ago(10)]), [], "both server"),
    "a busy kernel": (busy("ann", "bob/gpu"), [], "both server kernels"),
    "a busy kernel beside an idle one": (jupyter("ann", says=[None, [part(), BUSY]]), [], "both server kernels"),
    "a kernel that was active": (jupyter("ann", says=[None, [part(), part(10), part()]]), [], "both server kernels"),
    "a terminal": (jupyter("ann", says=[None, [], [part(10)]]), [], "both server kernels"),
    "the latest terminal": (jupyter("ann", says=[None, [part()], [part(), part(10)]]), [], "both server kernels"),
    "only the server": (jupyter("ann", says=[ago(10), [part()], [part()]]), [], "both server"),
    "a busy kernel after one without a time": (
        jupyter("ann", says=[None, [{"execution_state": "idle"}, BUSY]]), [], "both server kernels"),
    "a busy kernel before one with an odd time": (
        jupyter("ann", says=[None, [BUSY, part(last_activity="x")]]), [], "both server kernels"),
    "an activity that is unknown": (
        jupyter("ann"), [answers(".*/status", respond_json(200, {"last_activity": None}))], "both server"),
    "a kernel whose activity is unknown": (jupyter("ann", says=[None, [part(last_activity=None)]]), [],
        "both server kernels"),
    "a kernel that starts": (jupyter("ann", says=[None, [part(execution_state="starting")], [part()]]), [], ""),
    "a time in the future": (jupyter("ann", says=["2999-01-01T00:00:00Z"]), [], "both server"),
    "a terminal in the future": (jupyter("ann", says=[None, [], [part(-LONG_AGO)]]), [], "both server kernels"),
    "only the Hub": (jupyter("ann", idle=10), [], "hub both"),
    "only the Hub; terminals are switched off": (
        jupyter("ann", idle=10), [answers("ann/api/terminals", html(404))], "hub both"),
    "a kernel; the terminals fail": (
        jupyter("ann", says=[None, [part(10)]]), [answers(".*/terminals", respond(500))], "both server kernels"),
    "nothing; the terminals fail": (
        jupyter("ann", says=[None, [part()]]), [answers(".*/terminals", respond(500))], ""),
    "only the Hub; the terminals fail": (
        jupyter("ann", idle=10, says=[None, [part()]]), [answers(".*/terminals", respond(500))],
        "hub both server kernels"),
    "a kernel; the status fails": (
        jupyter("ann", says=[None, [part(10)], [part()]]), [answers(".*/status", respond(503))], "both server kernels"),
    "a terminal; the status fails": (
        jupyter("ann", says=[None, [part()], [part(10)]]), [answers(".*/status", respond(503))], "both server kernels"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["hub", "both", "server", "kernels"])
@pytest.mark.parametrize("what", WORDS)
def test_what_keeps_a_server_in_which_mode(cull_scripted: Cull, scripted: ScriptedHub, what: str, mode: str) -> None:
    given, faults, modes = WORDS[what]
    for make in (given, *faults):
        make(scripted)
    before = scripted.running()
    assert cull_scripted("--timeout=1h", "--idle-by", mode).exit_code == 0
    assert scripted.running() == (before if mode in modes.split() else set())


# Scenes


def a_day_behind(exchange: Exchange) -> Answer:
    """An activity 65 seconds ago, by a clock that is a day behind."""
    now = datetime.now(UTC) - timedelta(days=1)
    model = {"last_activity": (now - timedelta(seconds=65)).isoformat()}
    return respond_json(200, model, {"Date": format_datetime(now, usegmt=True)})(exchange)


def moved(to: str) -> Reply:
    """A redirect to the same path there."""
    return lambda exchange: redirect(to + exchange.request.target, 308)(exchange)


def at(address: str, *names: str) -> list[Given]:
    """Busy servers that are there by the Hub's word."""

    def place(name: str) -> Given:
        return lambda hub: busy(name, extra={"full_url": f"{address}/user/{name}/".replace("PORT", str(hub.port))})(hub)

    return [place(name) for name in names]


def proxy_fails(pattern: str, how: Reply) -> Given:
    """From the first request on that matches, neither these servers nor the Hub are reached through the proxy."""

    def arrange(hub: ScriptedHub) -> None:
        failing = then_do(lambda: hub.fault("GET", "", how, times=None), how)
        hub.fault("GET", pattern, failing, times=None)

    return arrange


def over_half_an_hour(inactive: timedelta) -> bool:
    """An arbiter."""
    return inactive > timedelta(minutes=30)


lost = [answers(f"{path}/api/{path}", moved("/hub")) for path in PATHS]
lost_ones = dict.fromkeys((*PATHS, *(f"lost{number}" for number in range(12))), "spared")
own_login = {"401": respond(401), "403": of_hub(403, "Forbidden"), "404": html(404), "garbage": html()}
https = "https://127.0.0.1:PORT"
proxied = {"HTTPS_PROXY": "socks5://127.0.0.1:1", "NO_PROXY": ""}
SCENES = [
    *in_modes(
        "both server",
        Scene("a busy kernel spares", [busy("ann"), jupyter("bob")], "", {"bob": "culled", **SPARED}, says=True),
        Scene("only the server's own clock counts for what it says",
              [jupyter("ann"), answers("ann/api/status", a_day_behind)], "", SPARED),
        Scene("a connection that is reset once hides no busy kernel",
              [busy("ann"), fault("GET", "/user/ann/api/kernels", reset())], "", SPARED, doubts=1),
        Scene("a server that is gone meanwhile, so that its address leads to the Hub",
              [jupyter("ann", "bob"), fault("POST", "/users/ann/tokens", meanwhile(change("ann", ready=False)))],
              "--concurrency=1", {"bob": "culled", **SPARED}, doubts=1),
        Scene("15 servers that are redirected, before one answers, do not end the pass",
              [jupyter(*lost_ones, "ann"), *lost, answers("lost.*", moved("/hub"))], "--concurrency=1",
              {"ann": "culled", **lost_ones}, doubts=15),
        Scene("a proxy that hangs during a pass costs no busy server",
              [busy("ann", "bob"), proxy_fails("/user/.*", hang())], "--request-timeout=1s",
              {"bob": "spared", **SPARED}, doubts=2),
        Scene("where the Hub refuses a token, as outside a filtered scope, its own word counts",
              [busy("ann", "bob"), always("POST", "/users/ann/tokens", of_hub(403, "no permissions"))], "",
              {"ann": "culled", "bob": "spared"}, says=True),
        *(Scene(f"what hinders us is no answer of the server: {what}", at(where, "ann"), "", SPARED, doubts=1, env=env)
          for what, where, env in [
              ("a CA file that is not there", https, {"REQUESTS_CA_BUNDLE": "/no-such-directory/ca.pem"}),
              ("a proxy that requests cannot use", https, proxied),
              ("an address that is no URL", "http://[hub.example.org", {})]),
    ),
    Scene("a proxy that fails during a pass costs no busy server",
          [busy("ann"), proxy_fails("/user/.*", respond(503))], "--idle-by=both", FAILED, exit=1),
    Scene("a proxy that fails during a scan ends the pass",
          [jupyter("ann"), busy("bob"), proxy_fails("/user/bob/.*", respond(503))], "--idle-by=server", exit=1),
    Scene("a Hub that limits how long a token lives (JupyterHub.token_expires_in_max_seconds)",
          [busy("ann"), always("POST", ".*", of_hub(400, "token expires_in: 3660 must not exceed 3600"))],
          "--idle-by=both", FAILED, exit=1, says=True),
    Scene("an ingress that refuses tokens is not the Hub",
          [busy("ann"), always("POST", "/users/ann/tokens", html(403))], "--idle-by=both", FAILED, exit=1),
    Scene("while scanning, a token that is not made keeps one server only",
          [jupyter("ann", "bob"), always("POST", "/users/ann/tokens", respond(500))], "--idle-by=server",
          {"bob": "culled"}, doubts=1),
    Scene("a Hub without a second look is asked for tokens all the same",
          [busy("ann"), always("GET", "/users/ann", respond(405))], "--idle-by=both", SPARED),
    Scene("a server that was never active is idle for as long as it runs",
          [jupyter("ann", idle=60, age=HOUR + 90, says=["0001-01-01T00:00:00Z"])], "--idle-by=server", CULLED,
          says=True),
    Scene("a server without kernels is idle for as long as it runs",
          [jupyter("ann", idle=10, age=5 * HOUR + 30, says=[ago(10)])], "--idle-by=kernels", CULLED, says=True),
    Scene("a server that is slow on purpose has one timeout for all its answers",
          [jupyter("ann"), answers("ann/api/.*", slow(0.8))], "--idle-by=both --request-timeout=1.5s", SPARED),
    Scene("busy for ever ends with --max-age", [busy("ann", age=50 * HOUR)], "--idle-by=both --max-age=2d", CULLED),
    Scene("who is due is asked again before the stop",
          [jupyter("ann"), fault("GET", "/users/ann", meanwhile(change("ann", says=FakeJupyter(ago(15)))))],
          "--idle-by=server", SPARED),
    Scene("an arbiter gets the idle time that counts, also of a server that is younger than --timeout",
          [jupyter("ann", idle=10, says=[ago(1900)]), jupyter("bob", says=[ago(1700)]),
           jupyter("cat", idle=10, age=HOUR - 600, says=[ago(1900)])],
          f"--idle-by=server --arbiter={__name__}:over_half_an_hour", {"ann": "culled", "cat": "culled"}),
    # From a report: BinderHub without authentication starts servers with a login of their own.
    Scene("of servers with a login of their own the Hub's word counts, and the log says of how many",
          [jupyter("ann", "bob"), jupyter("zoe", idle=60), answers(".*", own_login["403"])],
          "--idle-by=server --concurrency=1", {"ann": "culled", "bob": "culled"}, says=True),
    *(scene for how, reply in own_login.items() for scene in in_modes("both server", Scene(
        f"of a lone server with a login of its own the Hub's word counts: {how}",
        [jupyter("ann"), answers(".*", reply)], "", CULLED))),
]  # fmt: skip

# What an administrator got wrong: nothing is culled, and the sentence says what to set.
own_port = having(leads_to_servers=False)
no_scope = having(scopes=list(ALL_SCOPES))
MISTAKES = [
    *in_modes(
        "both server kernels",
        Scene("the Hub's own port", [own_port, busy("ann")], "", SPARED, doubts=1, exit=3, says=True),
        Scene("a token without the scope", [no_scope, jupyter("ann")], exit=3, says=True),
    ),
    *in_modes("server kernels",
              Scene("the Hub's own port, where nobody is due", [own_port, jupyter("ann", idle=9)], doubts=1, exit=3)),
    *in_modes(
        "both server",
        Scene("the Hub's own port, given", [own_port, jupyter("ann")], "--servers-url=http://127.0.0.1:PORT", SPARED,
              doubts=1, exit=3, says=True),
        Scene("the port of a Hub with a base_url",
              [busy("ann"), always("GET", "/jhub/hub/api", respond_json(200, {"version": "6.1.1"})),
               always("GET", "/jhub/user/.*", redirect("/jhub/hub/user/ann/api/kernels"))],
              "--servers-url=http://127.0.0.1:PORT/jhub", SPARED, doubts=1, exit=3),
        Scene("a public_url with http: before an ingress that wants https:",
              [*at("http://127.0.0.1:PORT", "ann"), answers(".*", moved("https://hub.example.org"))], "", SPARED,
              doubts=1, exit=3),
        Scene("a port that refuses", [jupyter("ann")], "--servers-url=http://127.0.0.1:CLOSED", exit=3, says=True),
        Scene("https: in place of http:", [jupyter("ann")], "--servers-url=https://127.0.0.1:PORT", exit=3),
        Scene("a version that is no number", [jupyter("ann"), always("GET", "", respond_json(200, {"version": "dev"}))],
              exit=3),
        Scene("a Hub that is too old", [having(version="2.3.1"), jupyter("ann")], exit=3, says=True),
        Scene("an ingress that does not let GET /user pass, so that the scopes are unknown",
              [no_scope, busy("ann"), always("GET", "/user", html(404))], exit=3, says=True),
        *(Scene(f"a filtered scope of a service, which covers nobody on JupyterHub {version}",
                [having(version=version, scopes=[*ALL_SCOPES, "tokens!group=students"]), jupyter("ann")], exit=3,
                says=version == "4.1.6") for version in ("3.1.1", "4.1.6")),
        *(Scene(f"no mistake: the scope {scope} on JupyterHub {version}",
                [having(version=version, scopes=[*ALL_SCOPES, scope]), jupyter("ann")], "", CULLED)
          for version, scope in [("4.1.6", "tokens"), ("5.0.0", "tokens!group=a"), ("6.1.1", "tokens!group=a")]),
    ),
    Scene("no mistake: nobody is asked", [no_scope, jupyter("ann")], "--idle-by=hub", CULLED),
]  # fmt: skip


@pytest.mark.parametrize("scene", [*SCENES, *MISTAKES], ids=Scene.__str__)
def test_scene(scene: Scene, play: Play) -> None:
    play(scene)


@pytest.mark.parametrize("scopes", [["self"], ["access:servers!server=ann/", "delete:servers!user=ann"], None, []])
@pytest.mark.parametrize("mode", ["both", "server"])
def test_a_token_that_can_do_more_is_revoked_and_never_used(
    scopes: list[str] | None, mode: str, scripted: ScriptedHub, play: Play
) -> None:
    """JupyterHub 2 ignores the scopes."""
    more = always("POST", "/users/ann/tokens", edited(lambda model: {**model, "scopes": scopes}))
    play(Scene("", [jupyter("ann"), more], f"--idle-by={mode}", FAILED if mode == "both" else {}, exit=3))
    assert (scripted.tokens_made, asked(scripted)) == (1, [])


@pytest.mark.parametrize("scopes", [5, True, {"a": 1}])
def test_scopes_that_are_no_list_make_no_token(cull_scripted: Cull, scripted: ScriptedHub, scopes: object) -> None:
    busy("ann")(scripted)
    scripted.fault("POST", ".*", edited(lambda model: {**model, "scopes": scopes}))
    assert cull_scripted("--timeout=1h", "--idle-by=both").outcomes == FAILED


@pytest.mark.parametrize(
    "port", ["CLOSED", "PORT"], ids=["a --servers-url that refuses", "a --servers-url that is the Hub's own port"]
)
@pytest.mark.usefixtures("subdomains")
def test_with_subdomains_a_wrong_servers_url_should_be_left_out(play: Play, says: Says, port: str) -> None:
    """From a report."""
    given, options = at("http://ann.hub.example.org:PORT", "ann"), f"--servers-url=http://hub.example.org:{port}"
    is_hub = port == "PORT"
    scene = Scene("", [*given, own_port] if is_hub else given, options, SPARED if is_hub else {}, exit=3)
    says(re.sub(r"(?<=:)\d+(?=/)", port, "\n".join(play(*in_modes("both", scene)).errors)))


def test_a_proxy_that_has_lost_its_routes_costs_no_busy_server(loop: RunLoop, scripted: ScriptedHub) -> None:
    """As after a restart of the proxy: until the Hub adds the routes again, it sends all requests to the Hub."""
    busy("ann")(scripted)
    first, second = loop(scripted, "--timeout=1h", "--idle-by=both", between=[lambda: own_port(scripted)]).passes
    assert (first.outcomes, second.outcomes) == (SPARED, SPARED)
    assert (len(first.errors), len(second.errors)) == (0, 1)


# Who is asked, and what it costs


def test_who_explains_a_server_asks_only_that_one(cull: Cull, scripted: ScriptedHub) -> None:
    for given in (jupyter("ann", idle=10, user_idle=LONG_AGO), busy("ann/gpu")):
        given(scripted)
    args = ("--url", scripted.url, "--timeout=1h", "--idle-by=server", "--cull-users", "--explain=ann")
    explained = [line.split(maxsplit=1) for line in cull(*args, token=scripted.token).out.splitlines()]
    assert ["asked", "yes"] in explained
    verdicts = [fact.partition(":")[0] for label, fact in explained if label == "verdict"]
    assert verdicts == ["would be stopped", "kept"]  # the server, the user
    assert not any("/gpu/" in request.target for request in asked(scripted))


@pytest.mark.parametrize(
    ("mode", "look", "asks"),
    [
        ("both", "--dry-run", 0),
        ("both", "--explain=ann", 1),
        ("server", "--dry-run", 1),
        ("server", "--explain=ann", 1),
    ],
)
def test_a_dry_run_asks_only_where_the_hubs_word_does_not_count_and_who_explains_always(
    cull: Cull, scripted: ScriptedHub, mode: str, look: str, asks: int
) -> None:
    busy("ann")(scripted)
    options = ("--timeout=1h", "--idle-by", mode, look)
    assert cull("--url", scripted.url, *options, token=scripted.token).exit_code == 0
    assert (len(asked(scripted)), scripted.tokens_made, scripted.tokens) == (asks, asks, {})


@pytest.mark.parametrize(("mode", "kernels", "most"), [("both", [], 5), ("kernels", [], 4), ("both", [BUSY], 3)])
def test_a_server_costs_at_most_five_requests(
    play: Play, scripted: ScriptedHub, mode: str, kernels: list[dict[str, Any]], most: int
) -> None:
    outcome = SPARED if mode == "both" else {}
    play(Scene("", [jupyter("ann", says=[ago(1), kernels, [part(1)]])], f"--idle-by={mode}", outcome))
    tokens = [request for request in scripted.requests if "tokens" in request.segments]
    assert len(tokens) + len(asked(scripted)) == most
    assert all(request.query == {"no_track_activity": "1"} for request in asked(scripted))
    assert all(request.headers["accept-encoding"] == "identity" for request in asked(scripted))


@pytest.mark.parametrize("mode", ["both", "server"])
def test_servers_are_asked_side_by_side(cull_scripted: Cull, scripted: ScriptedHub, mode: str) -> None:
    """None shows its kernels before three are asked at the same time."""
    three = threading.Barrier(3, timeout=9)
    for given in (busy(*map(str, range(9))), answers(".*/kernels", then_do(three.wait))):
        given(scripted)
    result = cull_scripted("--timeout=1h", "--idle-by", mode, "--concurrency=3", "--json")
    assert figures(result, "asked", "busy") == [9, 9]


def test_servers_with_hosts_of_their_own_leave_few_connections_open(play: Play, subdomains: ScriptedHub) -> None:
    given = [server(f"u{n}", age=9 * HOUR, extra={"full_url": f"http://u{n}.hub:{subdomains.port}/user/u{n}/"})
             for n in range(60)]  # fmt: skip
    counts: list[int] = []
    counting = answers(".*", then_do(lambda: counts.append(subdomains.connections_open)))
    becomes = {f"u{n}": "culled" for n in range(60)}
    play(Scene("", [*given, counting], "--idle-by=server --concurrency=4 --quiet", {}, deletes=list(becomes)))
    assert 4 < max(counts) < 30


@pytest.mark.parametrize("where", ["--servers-url", "full_url", "url", "$JUPYTERHUB_PUBLIC_HUB_URL"])
def test_the_address_is_as_given_or_as_the_hub_knows_it(play: Play, scripted: ScriptedHub, where: str) -> None:
    """The Hub's own port leads nowhere here; another one is the proxy's."""
    with ScriptedHub() as proxy:
        proxy.users, proxy.tokens = scripted.users, scripted.tokens
        public = f"http://127.0.0.1:{proxy.port}"
        given = where.startswith("--")  # which counts for more than the Hub's word
        extra = {"full_url" if given else where: f"{'http://no-such-host.invalid' if given else public}/user/ann/"}
        options = f"--idle-by=both --servers-url={public}" if given else "--idle-by=both"
        env = {where[1:]: f"{public}/hub/"} if where.startswith("$") else {}
        play(Scene("", [own_port, busy("ann", extra={} if env else extra)], options, SPARED, env=env))
        assert len(asked(proxy)) == 1


# Tokens


def test_a_token_opens_one_server_for_a_short_time_and_is_no_activity(play: Play, scripted: ScriptedHub) -> None:
    names = ("ann", "dave smith/\u00fcn\u00ef")
    play(Scene("", [busy(*names)], "--idle-by=both --request-timeout=30s", dict.fromkeys(names, "spared")))
    made = [json.loads(request.body) for request in scripted.requests if request.method == "POST"]
    scopes = sorted(body["scopes"] for body in made)
    assert scopes == [["access:servers!server=ann/"], [f"access:servers!server={names[1]}"]]
    assert all(30 < body["expires_in"] <= 300 and body["note"].startswith("Server at ") for body in made)


def test_a_token_is_revoked_when_the_culler_is_told_to_stop_and_nobody_else_is_asked(
    play: Play, scripted: ScriptedHub, tell_to_stop: Callable[[], None]
) -> None:
    stopping = fault("GET", "/user/ann/api/kernels", then_do(tell_to_stop))
    play(Scene("", [jupyter("ann", "bob", "cat"), stopping], "--idle-by=server --concurrency=1", exit=1))
    assert scripted.tokens_made == 1


def test_a_token_that_cannot_be_revoked_is_left_to_expire(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    jupyter("ann")(scripted)
    scripted.fault("DELETE", "/users/ann/tokens/.*", respond(500), reset(), times=None)
    result = cull_scripted("--timeout=1h", "--idle-by=both")
    assert (result.exit_code, result.outcomes, len(scripted.tokens)) == (0, CULLED, 1)


def test_nothing_that_a_server_or_the_environment_plants_is_sent_and_no_redirect_followed(
    play: Play, scripted: ScriptedHub, elsewhere: ScriptedHub, tmp_path: Path
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login ann password secret\n")
    planted = respond_json(200, [], {"Set-Cookie": "planted=1; Path=/"})
    env = {"HOME": str(tmp_path), "HTTP_PROXY": f"http://127.0.0.1:{elsewhere.port}", "NETRC": str(netrc)}
    stolen = redirect(f"{elsewhere.url}/steal")
    given = [jupyter("ann", "bob"), answers("ann/api/kernels", planted), answers("bob/api/terminals", stolen)]
    play(Scene("", given, "--idle-by=both --concurrency=1", {"ann": "culled", "bob": "culled"}, env=env))
    assert all(request.headers["authorization"].startswith("token token-a") for request in asked(scripted))
    assert not any("cookie" in request.headers for request in asked(scripted))


# Hostile servers

# Of these the Hub's word counts.
ANSWERS: dict[str, Reply] = {
    **{str(code): respond(code) for code in (503, 502, 504, 500, 429, 404, 401, 403, 424)},
    "words": respond_json(418, {"message": "call us"}, {"X-Why": "call us"}),
    "HTML": html(),
    "nothing": respond(200),
    "2 MiB": respond_json(200, [{"id": "x" * (2 << 20)}]),
    "4 GiB": respond(200, b"[" * (2 << 20), {"Content-Length": str(4 << 30)}),
    "zipped": respond(200, b"\x1f\x8b" + b"\0" * 100, {"Content-Encoding": "gzip"}),
    "deep": respond(200, b"[" * 100_000),
    "an object": respond_json(200, {}),
    "a number": respond_json(200, 5),
    "an odd redirect": redirect("http://[/user/ann"),
    "an odd cookie": respond(500, headers={"Set-Cookie": f"a=b; expires=Mon, 01-Jan-{'9' * 5000} 00:00:00 GMT"}),
    "null": respond_json(200, None),
    "numbers": respond_json(200, [1]),
    "no time": respond_json(200, [{"id": "1"}]),
    "a wrong time": respond_json(200, [{"last_activity": "soon"}]),
    "an odd time": respond_json(200, [{"last_activity": {}}]),
    "no such day": respond_json(200, [{"last_activity": "2026-02-30T00:00:00Z"}]),
    "cut off": truncated(of=respond_json(200, [])),
}
# These are kept: a computation may starve its server.
NO_ANSWERS: dict[str, Reply] = {
    "no HTTP": raw(b"\x00" * 100),
    "headers without end": raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000),
    "reset": reset(),
    "reset in the body": reset_in_body(of=respond_json(200, [])),
    "silence": hang(),
    "drip": drip(0.05, of=respond_json(200, ["x" * 1000])),
}


@pytest.mark.parametrize("how", [*ANSWERS, *NO_ANSWERS])
def test_a_hostile_server_affects_only_itself(cull_scripted: Cull, scripted: ScriptedHub, how: str) -> None:
    """One server for each path that answers so. A 404 for terminals is no attack: they are switched off."""
    hostile = [path for path in PATHS if (how, path) != ("404", "terminals")]
    given = [answers(f"{path}/api/{path}", {**ANSWERS, **NO_ANSWERS}[how]) for path in hostile]
    for make in (jupyter(*hostile, says=[ago(1)]), jupyter("bob"), busy("cat"), *given):
        make(scripted)
    result = cull_scripted("--timeout=1h", "--idle-by=both", "--json", "-v", "--request-timeout=2s")
    kept = set(hostile if how in NO_ANSWERS else [])
    assert (result.exit_code, scripted.running(), scripted.tokens) == (0, {"cat", *kept}, {})
    expected = [len(hostile) + 2, 1, len(kept), 0]
    assert figures(result, "asked", "busy", "no_answer", "failed") == expected
    assert len(result.warnings) == len(kept) + 1
    assert "call us" not in result.out + result.err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # urllib3 leaves a socket open then
def test_a_hostile_server_with_two_lengths_is_kept(play: Play) -> None:
    two_lengths = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n[]")
    play(Scene("", [jupyter("ann", "bob"), answers("ann/.*", two_lengths)], "--idle-by=both",
               {"ann": "spared", "bob": "culled"}))  # fmt: skip
    gc.collect()
