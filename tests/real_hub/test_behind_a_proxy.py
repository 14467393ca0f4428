"""The Hub's API behind a proxy: another port, prefix and host name, a certificate of a private CA, rewritten paths."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from posixpath import normpath
from typing import Any, ClassVar, Self
from urllib.parse import quote, unquote, urlsplit

import pytest
import requests
from hub import IDLE, IDLE_USER, RealHub
from runs import Cull

BUSY: dict[str, Any] = {"idle_seconds": 60}
# How a proxy passes a path on, once its own prefix is cut off.
Rewrite = Callable[[str], str]


def unchanged(path: str) -> str:
    return path


def dots_resolved(path: str) -> str:
    """configurable-http-proxy 5.3: `%2E` is a dot, and a segment of dots leads up or nowhere."""
    return resolved("/".join(unquote(part) if not unquote(part).strip(".") else part for part in path.split("/")))


def decoded(path: str) -> str:
    """nginx whose proxy_pass ends in a path: decoded, resolved, and some of it encoded again."""
    return quote(resolved(unquote(path)), safe="/;+&'@[]!$()*,:=~")


def backslashes_merged(path: str) -> str:
    """Envoy with DECODE_AND_MERGE_SLASHES."""
    return resolved(re.sub("%2F|%5C", "/", path))


def decoded_for_good(path: str) -> str:
    """nginx whose proxy_pass ends in $uri."""
    return resolved(unquote(path))


def resolved(path: str) -> str:
    return normpath(path) + ("/" if path.endswith(("/", "/.", "/..")) else "")


class ReverseProxy(ThreadingHTTPServer):
    """Speaks TLS, and passes requests on to the Hub under a host name that nobody knows."""

    daemon_threads = True
    request_queue_size = 64
    prefix: ClassVar = "/outside"

    def __init__(self, hub: RealHub, certificates: Path, rewrite: Rewrite = unchanged) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificates / "server/server.crt", certificates / "server/server.key")
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        inside = urlsplit(hub.url)
        self.hub = f"{inside.hostname}:{inside.port}"
        self.rewrite = rewrite
        self.url = f"https://127.0.0.1:{self.server_port}{self.prefix}{inside.path}"
        self.trusted = {"REQUESTS_CA_BUNDLE": str(certificates / "ca/ca.crt")}

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: of clients that do not trust it, it hears nothing but the end."""


class Handler(BaseHTTPRequestHandler):
    """One connection to the proxy."""

    server: ReverseProxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, question_mark, query = self.path.partition("?")
        path = self.server.rewrite(path.removeprefix(self.server.prefix))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {**self.headers, "Host": "hub.invalid", "Connection": "close"}
        inside = HTTPConnection(self.server.hub, timeout=30)
        inside.request(self.command, path + question_mark + query, body, headers)
        answer = inside.getresponse()
        content = answer.read()
        inside.close()
        self.send_response_only(answer.status)
        for name in ("Date", "Content-Type"):
            self.send_header(name, answer.getheader(name, ""))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def prefixed_hub() -> Iterator[RealHub]:
    with RealHub(base_url="/jhub/") as hub:
        yield hub


@pytest.fixture
def hub(prefixed_hub: RealHub) -> Iterator[RealHub]:
    """A Hub below /jhub/, with an idle server and a busy one."""
    prefixed_hub.spawn_many([("idle", "", IDLE_USER), ("busy", "", BUSY)])
    yield prefixed_hub
    prefixed_hub.clear()


@pytest.fixture
def proxy(hub: RealHub, certificates: Path) -> Iterator[ReverseProxy]:
    """A proxy that passes paths on as they are."""
    with ReverseProxy(hub, certificates) as proxy:
        yield proxy


def test_a_hub_below_a_base_url_is_culled_and_not_found_without_it(hub: RealHub, cull: Cull) -> None:
    assert urlsplit(hub.url).path == "/jhub/hub/api"
    lost = cull("--once", "--timeout=1h", "--url", hub.url.replace("/jhub", ""), token=hub.culler_token)
    assert (lost.exit_code, len(lost.lines), hub.running()) == (3, 1, {"idle", "busy"})
    assert "--url" in lost.lines[0]
    result = cull("--once", "--timeout=1h", "--url", hub.url, token=hub.culler_token)
    assert (result.exit_code, result.outcomes, hub.running()) == (0, {"idle": "culled"}, {"busy"})


def test_a_hub_behind_a_proxy_is_culled_if_its_private_ca_is_trusted(
    hub: RealHub, proxy: ReverseProxy, cull: Cull
) -> None:
    assert urlsplit(proxy.url).path == "/outside/jhub/hub/api"
    flags = ("--once", "--timeout=1h", "--cull-users")
    for url in (proxy.url, proxy.url.replace("https:", "HTTPS:")):
        refused = cull(*flags, "--url", url, token=hub.user_culler_token)
        assert (refused.exit_code, len(refused.lines), hub.running()) == (3, 1, {"idle", "busy"})
        assert "$REQUESTS_CA_BUNDLE" in refused.lines[0]
    for outcomes in ({"idle": "culled"}, {"user idle": "deleted"}):
        result = cull(*flags, "--url", proxy.url, token=hub.user_culler_token, env=proxy.trusted)
        assert (result.exit_code, result.outcomes, hub.running()) == (0, outcomes, {"busy"})
        hub.make_idle(*hub.users() - {"busy"})


def test_all_pages_are_read_though_the_hub_says_that_the_next_one_is_on_another_host(
    hub: RealHub, proxy: ReverseProxy, cull: Cull
) -> None:
    hub.spawn_many([(f"idle{number}", "", IDLE) for number in range(5)])
    first = requests.get(
        f"{proxy.url}/users?limit=2",
        headers={"Authorization": f"token {hub.culler_token}", "Accept": "application/jupyterhub-pagination+json"},
        verify=proxy.trusted["REQUESTS_CA_BUNDLE"],
        timeout=30,
    ).json()
    assert first["_pagination"]["next"]["url"].startswith("http://hub.invalid/jhub/hub/api/users?")
    flags = ("--once", "--timeout=1h", "--api-page-size=2", "--url", proxy.url)
    result = cull(*flags, token=hub.culler_token, env=proxy.trusted)
    assert result.counts == {"running": 7, "due": 6, "culled": 6}
    assert (result.exit_code, hub.running()) == (0, {"busy"})


# Names that differ from others only by characters that a proxy may decode. Older Hubs took those of servers.
ODD_USERS = {"ann?x", "bob#1", "carol%2fdave", "dave smith", "\u00fcn\u00ef", "100%"}
WITHOUT_SERVER = "ann%2Fserver"
BACK = r"..\..\ann\server"
MISLEADING = {".", "..", "...", "gpu?x", "gpu#x", "%2E", "g%70u", "a/b", "x/../gpu", "../../ann/server", "../ann", BACK}
HARMLESS = {"test #2", "50%", "what?"}
BUSY_SERVERS = {"ann", "bob", "bob/gpu", "bob/a", "busy"}


@pytest.fixture
def odd_hub(hub: RealHub) -> RealHub:
    """Whatever has an odd name is idle, and all others are busy."""
    hub.inherit(
        [
            ("ann", 60, {"": BUSY}),
            ("bob", 60, {**dict.fromkeys(["", "gpu", "a"], BUSY), **dict.fromkeys(MISLEADING | HARMLESS, IDLE)}),
            *((name, IDLE["idle_seconds"], {"": IDLE}) for name in ODD_USERS),
            (WITHOUT_SERVER, IDLE["idle_seconds"], {}),
        ]
    )
    return hub


@pytest.mark.parametrize(
    ("rewrite", "kept"),
    [
        (unchanged, set()),
        (dots_resolved, set()),
        (backslashes_merged, set()),
        (decoded, set()),
        # Where it leads to another user or server, or to none.
        (decoded_for_good, {*ODD_USERS - {"100%", "bob#1"}, WITHOUT_SERVER, "bob/test #2", "bob/what?"}),
    ],
    ids=["unchanged", "dots resolved", "backslashes merged", "decoded", "decoded for good"],
)
def test_behind_any_proxy_nothing_but_what_has_the_name_is_culled(
    odd_hub: RealHub, certificates: Path, cull: Cull, rewrite: Rewrite, kept: set[str]
) -> None:
    with ReverseProxy(odd_hub, certificates, rewrite) as proxy:
        flags = ("--once", "--timeout=1h", "--cull-users", "--url", proxy.url)
        for _ in range(2):
            result = cull(*flags, token=odd_hub.user_culler_token, env=proxy.trusted)
            odd_hub.make_idle(*odd_hub.users() & ODD_USERS)
            assert "gone" not in result.outcomes.values()
    assert odd_hub.running() == BUSY_SERVERS | {f"bob/{name}" for name in MISLEADING} | (kept - {WITHOUT_SERVER})
    assert odd_hub.users() == {"ann", "bob", "busy", "idle"} | (kept & {*ODD_USERS, WITHOUT_SERVER})
    assert result.exit_code == 1
    assert any(error.startswith("ERROR    failed bob/") for error in result.errors)
