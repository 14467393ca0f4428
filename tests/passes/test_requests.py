"""What a request carries, and what it must not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import Cull
from scripted_hub import LONG_AGO, Reply, ScriptedHub, raw, redirect, respond

import cull_idle
from cull_idle import Hub, HubError


def test_the_token_is_in_one_header_of_each_request(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    assert cull_scripted("--timeout", "1h", "--cull-users").exit_code == 0
    assert len(scripted.requests) == 6
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
    def with_cookie() -> Reply:
        def reply(exchange):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            answer = exchange.normal()
            return type(answer)(
                answer.status, answer.body, {**answer.headers, "Set-Cookie": "jupyterhub-session-id=1; Path=/"}
            )

        return reply

    scripted.fault("*", ".*", with_cookie(), times=None)
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
    assert any("removed" in line for line in result.lines) == (arguments == ["--remove-named-servers"])


def test_a_user_is_deleted_without_a_body(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add_user("ann", idle=LONG_AGO)
    cull_scripted("--timeout", "1h", "--cull-users", "--remove-named-servers")
    (delete,) = [request for request in scripted.requests if request.method == "DELETE"]
    assert delete.body == b""


def test_a_hub_that_only_lists_and_deletes_is_enough(cull_scripted: Cull, scripted: ScriptedHub) -> None:
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


def test_requests_in_flight_are_as_many_as_told(cull_scripted: Cull, scripted: ScriptedHub) -> None:
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


def test_connections_are_closed_with_the_pass(scripted: ScriptedHub) -> None:
    with Hub(scripted.url, scripted.token, timedelta(seconds=9)) as hub:
        hub.identity()
        assert scripted.connections_open == 1
    wait_until(lambda: scripted.connections_open == 0)
    assert hub  # is still there, as it may be in a traceback


def test_what_is_too_large_is_not_read_on(scripted: ScriptedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cull_idle, "LARGEST_BODY", 1000)
    scripted.fault("GET", "/users", respond(200, b" " * 10_000_000))
    with Hub(scripted.url, scripted.token, timedelta(seconds=9)) as hub:
        with pytest.raises(HubError, match="the answer has more than") as failure:
            hub.page(0, size=200, ready_only=True)
        wait_until(lambda: scripted.connections_open == 0)
    assert failure  # which still has the answer in its traceback


def test_a_url_may_have_no_path(scripted: ScriptedHub) -> None:
    scripted.fault("*", ".*", respond(404), times=None)
    with Hub(scripted.url.removesuffix("/hub/api"), scripted.token, timedelta(seconds=9)) as hub:
        hub.identity()
    assert [request.target for request in scripted.requests] == ["/user"]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 9
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_answer_that_ends_with_its_connection_is_read_whole(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    """As from HTTP/1.0 proxies, and with `Connection: close`: nothing else tells where the body ends."""
    moment = "2026-01-01T00:00:00Z"
    server = {"ready": True, "pending": None, "last_activity": moment, "started": moment}
    users = [{"name": f"user{number}", "servers": {"": server}} for number in range(2000)]
    head = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"
    scripted.fault("GET", "/users", raw(head + json.dumps(users).encode()))
    result = cull_scripted("--timeout", "1h", "--dry-run")
    assert result.exit_code == 0
    assert result.table[-1] == "2000 of 2000 running servers would be stopped."
    assert len(scripted.lines("GET")) == 2
