"""The requests: what they carry, what they must not carry, and their connections."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from runs import Cull, RunLoop
from scripted_hub import LONG_AGO, Answer, Exchange, ScriptedHub, normal, raw, redirect, reset, respond

import cull_idle


def test_the_token_is_in_one_header_of_each_request(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    assert cull_scripted("--timeout", "1h", "--cull-users").exit_code == 0
    assert {request.method for request in scripted.requests} == {"GET", "DELETE"}
    for request in scripted.requests:
        assert request.headers["authorization"] == f"token {scripted.token}"
        assert request.headers["user-agent"] == f"cull_idle/{cull_idle.__version__}"  # for the log of the Hub's proxy
        carried = [name for name, value in request.headers.items() if scripted.token in value]
        assert carried == ["authorization"]
        assert scripted.token not in request.target
        assert scripted.token.encode() not in request.body


def test_credentials_in_netrc_are_not_used(cull_scripted: Cull, scripted: ScriptedHub, tmp_path: Path) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login ann password secret\ndefault login ann password secret\n")
    netrc.chmod(0o600)
    scripted.add("ann", idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h", env={"NETRC": str(netrc), "HOME": str(tmp_path)})
    assert result.exit_code == 0
    assert {request.headers["authorization"] for request in scripted.requests} == {f"token {scripted.token}"}


def test_cookies_are_not_kept(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    def with_cookie(exchange: Exchange) -> Answer:
        answer = exchange.normal()
        cookie = {"Set-Cookie": "jupyterhub-session-id=1; Path=/"}
        return replace(answer, headers={**answer.headers, **cookie})

    scripted.fault("*", ".*", with_cookie, times=None)
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("ann", "gpu", idle=LONG_AGO)
    assert cull_scripted("--timeout", "1h", "--cull-users", "--concurrency", "1").exit_code == 0
    assert len(scripted.requests) > 5
    assert [request for request in scripted.requests if "cookie" in request.headers] == []


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"])
def test_an_http_proxy_is_not_given_the_token(
    cull_scripted: Cull, scripted: ScriptedHub, elsewhere: ScriptedHub, variable: str
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    proxy = {variable: f"http://127.0.0.1:{elsewhere.port}", "NO_PROXY": "", "no_proxy": ""}
    assert cull_scripted("--timeout", "1h", env=proxy).exit_code == 0
    assert scripted.running() == set()


@pytest.mark.parametrize("status", [302, 308])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/user"), ("GET", "/users"), ("GET", "/users/ann"), ("DELETE", "/users/ann/server")],
    ids=lambda text: text,
)
def test_no_redirect_is_followed(
    cull_scripted: Cull, scripted: ScriptedHub, elsewhere: ScriptedHub, *, method: str, path: str, status: int
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault(method, path, redirect(f"{elsewhere.url}{path}", status), times=None)
    result = cull_scripted("--timeout", "1h")
    assert scripted.lines(method).count(f"{method} {path}") <= 1
    assert result.exit_code == {"/user": 0, "/users": 3}.get(path, 1)


@pytest.mark.parametrize(
    ("arguments", "bodies"),
    [
        pytest.param([], {"/users/ann/server": b"", "/users/ann/servers/gpu": b""}, id="stop"),
        pytest.param(
            ["--remove-named-servers"],
            {"/users/ann/server": b"", "/users/ann/servers/gpu": {"remove": True}},
            id="remove",
        ),
        pytest.param(
            ["--remove-named-servers=false"], {"/users/ann/server": b"", "/users/ann/servers/gpu": b""}, id="do not"
        ),
    ],
)
def test_only_named_servers_are_removed_and_only_when_told(
    cull_scripted: Cull, scripted: ScriptedHub, arguments: list[str], bodies: dict[str, object]
) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("ann", "gpu", idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h", *arguments)
    assert result.exit_code == 0
    deletes = {request.path: request for request in scripted.requests if request.method == "DELETE"}
    assert {path: json.loads(request.body) if request.body else b"" for path, request in deletes.items()} == bodies
    assert all(
        ("application/json" in request.headers.get("content-type", "")) == bool(request.body)
        for request in deletes.values()
    )
    assert ("gpu" in scripted.users["ann"].servers) == (arguments != ["--remove-named-servers"])
    assert result.outcomes == {"ann": "culled", "ann/gpu": "culled"}
    assert ("removed" in result.said["ann/gpu"].reason) == (arguments == ["--remove-named-servers"])
    assert "removed" not in result.said["ann"].reason


def test_a_user_is_deleted_without_a_body(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    cull_scripted("--timeout", "1h", "--cull-users", "--remove-named-servers")
    (delete,) = [request for request in scripted.requests if request.method == "DELETE"]
    assert delete.body == b""


def test_an_api_that_only_lists_and_deletes_is_enough(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.fault("GET", "/user|/users/.*|/", respond(405), times=None)
    scripted.add("ann", idle=LONG_AGO)
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert scripted.running() == set()


def test_a_url_may_end_in_a_slash(cull: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    assert cull("--once", "--timeout", "1h", "--url", f"{scripted.url}/", token=scripted.token).exit_code == 0
    assert scripted.running() == set()


def test_a_dry_run_changes_nothing(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    result = cull_scripted("--timeout", "1h", "--cull-users", "--dry-run")
    assert result.exit_code == 0
    assert {request.method for request in scripted.requests} == {"GET"}
    assert "ann" in result.out


def test_concurrency_bounds_the_stops_in_flight(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for index in range(12):
        scripted.add(f"user-{index}", idle=LONG_AGO, stop_seconds=0.1)
    assert cull_scripted("--timeout", "1h", "--concurrency", "4").exit_code == 0
    assert scripted.in_flight_max == 4
    assert scripted.running() == set()


def test_each_worker_keeps_its_connection(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    for index in range(200):
        scripted.add(f"user-{index}", idle=LONG_AGO, stop_seconds=0.05)
    assert cull_scripted("--timeout", "1h", "--concurrency", "20", "--api-page-size", "10").exit_code == 0
    assert scripted.running() == set()
    assert 10 < scripted.connection_count <= 20


def test_connections_are_closed_at_the_end_of_each_pass(loop: RunLoop, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users", normal(), respond(500), reset())

    def all_closed() -> None:
        deadline = time.monotonic() + 9
        while scripted.connections_open:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    assert loop(scripted, "--timeout=1h", between=[all_closed] * 4).exit_code == 0
    assert scripted.connection_count >= 5


def test_an_answer_that_is_too_large_is_not_read_to_its_end(
    cull_scripted: Cull, scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cull_idle, "WHOLE_LIST", (1000, 1000))
    scripted.version = "1.5.1"
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"
    # Who reads on finds the connection lost, and would try again.
    scripted.fault("GET", "/users", raw(head + b"[" + b" " * 1_000_000), times=None)
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 3
    assert scripted.lines() == ["GET /user", "GET /users?state=ready&limit=200"]


@pytest.mark.parametrize("path", ["", "/"])
def test_a_url_without_a_path_is_asked_at_its_root(cull: Cull, scripted: ScriptedHub, path: str) -> None:
    scripted.fault("*", ".*", respond(404), times=None)
    url = scripted.url.removesuffix("/hub/api") + path
    assert cull("--once", "--url", url, token=scripted.token).exit_code == 3
    assert [request.target.partition("?")[0] for request in scripted.requests] == ["/user", "/users"]


def test_an_answer_that_ends_with_its_connection_is_read_whole(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    """HTTP/1.0 proxies answer so, and `Connection: close` does: nothing else tells where the body ends."""
    scripted.version = "1.5.1"
    moment = "2026-01-01T00:00:00Z"
    server = {"ready": True, "pending": None, "last_activity": moment, "started": moment}
    users = [{"name": f"user{number}", "servers": {"": server}} for number in range(2000)]
    head = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"
    scripted.fault("GET", "/users", raw(head + json.dumps(users).encode()))
    result = cull_scripted("--timeout", "1h", "--dry-run")
    assert result.exit_code == 0
    assert result.table[-1].startswith("2000 of 2000 ")
    assert len(scripted.lines("GET")) == 2
