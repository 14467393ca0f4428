"""A Hub with internal_ssl: its certificates are used, and wrong ones get a sentence each."""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer

import pytest
from hub import IDLE, RealHub
from runs import Cull, Result


@pytest.fixture(scope="module")
def tls_hub() -> Iterator[RealHub]:
    with RealHub(internal_ssl=True) as hub:
        hub.spawn_many([("idle", "", IDLE), ("busy", "", {"idle_seconds": 60})])
        yield hub


@pytest.fixture
def hub(tls_hub: RealHub) -> RealHub:
    """A Hub that speaks TLS only, with an idle server and a busy one."""
    if "idle" not in tls_hub.running():
        tls_hub.spawn("idle", **IDLE)
    return tls_hub


@pytest.fixture
def certificates(hub: RealHub, tmp_path: Path) -> Path:
    """A copy of the Hub's."""
    return Path(shutil.copytree(hub.certificates, tmp_path / "certificates"))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Certificates of another Hub, under the same names."""
    certipy = import_module("certipy").Certipy(store_dir=str(tmp_path / "another"))
    certipy.create_ca("hub-ca")
    certipy.create_signed_pair("hub-internal", "hub-ca", alt_names=["IP:127.0.0.1"])
    return tmp_path / "another"


def handed_over(hub: RealHub) -> dict[str, str]:
    """The environment of a service that the Hub starts. Its certificate is made like that of a user's server."""
    own = hub.certificates / "user-busy/user-busy"
    return {
        "JUPYTERHUB_API_URL": hub.url,
        "JUPYTERHUB_SSL_KEYFILE": f"{own}.key",
        "JUPYTERHUB_SSL_CERTFILE": f"{own}.crt",
        "JUPYTERHUB_SSL_CLIENT_CA": str(hub.certificates / "notebooks-ca_trust.crt"),
    }


def test_an_idle_server_is_culled(hub: RealHub, cull: Cull) -> None:
    location = f"--internal-certs-location={hub.certificates}"
    result = cull("--once", "--timeout=1h", "--url", hub.url, "--ssl-enabled", location, token=hub.culler_token)
    assert result.exit_code == 0
    assert result.outcomes == {"idle": "culled"}
    assert hub.running() == {"busy"}


def test_certificates_are_in_internal_ssl_by_default(hub: RealHub, cull: Cull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub.certificates.parent)
    result = cull("--once", "--timeout=1h", "--url", hub.url, "--ssl-enabled=true", token=hub.culler_token)
    assert (result.exit_code, hub.running()) == (0, {"busy"})


def test_a_service_uses_the_certificates_that_the_hub_hands_over(hub: RealHub, cull: Cull) -> None:
    result = cull("--once", "--timeout=1h", token=hub.culler_token, env=handed_over(hub))
    assert (result.exit_code, hub.running()) == (0, {"busy"})


def test_the_certificates_that_the_hub_hands_over_come_before_the_options(hub: RealHub, cull: Cull) -> None:
    options = ("--ssl-enabled", "--internal-certs-location=nowhere")
    result = cull("--once", "--timeout=1h", *options, token=hub.culler_token, env=handed_over(hub))
    assert (result.exit_code, hub.running()) == (0, {"busy"})


class Tunnel(StreamRequestHandler):
    """An HTTP proxy that knows CONNECT only, and lets TLS through."""

    seen: list[bytes]

    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.rfile.readline()
        self.seen.append(head)
        host, _, port = head.split()[1].decode().partition(":")
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with socket.create_connection((host, int(port))) as hub:
            back = threading.Thread(target=pump, args=(hub, self.connection))
            back.start()
            pump(self.connection, hub)
            back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):  # the other side is gone already
        while chunk := source.recv(1 << 16):
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingTCPServer]:
    monkeypatch.setattr(Tunnel, "seen", [], raising=False)
    with ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


def test_a_proxy_for_https_is_used_and_sees_no_token(hub: RealHub, cull: Cull, proxy: ThreadingTCPServer) -> None:
    location = f"--internal-certs-location={hub.certificates}"
    through = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.server_address[1]}", "NO_PROXY": "", "no_proxy": ""}
    options = ("--once", "--timeout=1h", "--url", hub.url, "--ssl-enabled", location)
    result = cull(*options, token=hub.culler_token, env=through)
    assert (result.exit_code, hub.running()) == (0, {"busy"})
    assert len(Tunnel.seen) == 1
    assert hub.culler_token.encode() not in Tunnel.seen[0]


Spoil = Callable[[Path, Path], object]  # takes the Hub's certificates, and foreign ones
CA, CERTIFICATE, KEY = "hub-ca/hub-ca.crt", "hub-internal/hub-internal.crt", "hub-internal/hub-internal.key"
# From TLS 1.3 on, a client that is refused hears why only if it is not too busy sending its request.
REFUSED = "TLS|connection"
WRONG: Mapping[str, tuple[Spoil, str]] = {
    "no folder": (lambda hubs, foreign: shutil.rmtree(hubs), CA),
    "no CA": (lambda hubs, foreign: (hubs / CA).unlink(), CA),
    "no certificate": (lambda hubs, foreign: (hubs / CERTIFICATE).unlink(), CERTIFICATE),
    "no key": (lambda hubs, foreign: (hubs / KEY).unlink(), KEY),
    "a CA that is not one": (lambda hubs, foreign: (hubs / CA).write_text("CA"), "TLS"),
    "a certificate that is not one": (lambda hubs, foreign: (hubs / CERTIFICATE).write_text("cert"), "TLS"),
    "a key that is not one": (lambda hubs, foreign: (hubs / KEY).write_text("key"), "TLS"),
    "a key of another certificate": (lambda hubs, foreign: shutil.copy(foreign / KEY, hubs / KEY), "mismatch"),
    "another Hub's CA": (lambda hubs, foreign: shutil.copy(foreign / CA, hubs / CA), "certificate verify failed"),
    "another Hub's certificate": (
        lambda hubs, foreign: [shutil.copy(foreign / file, hubs / file) for file in (CERTIFICATE, KEY)],
        REFUSED,
    ),
}


@pytest.mark.parametrize(("spoil", "part"), WRONG.values(), ids=WRONG.keys())
def test_wrong_certificates_get_a_sentence(
    hub: RealHub, cull: Cull, certificates: Path, foreign: Path, spoil: Spoil, part: str
) -> None:
    spoil(certificates, foreign)
    location = f"--internal-certs-location={certificates}"
    result = cull("--once", "--url", hub.url, "--ssl-enabled", location, token=hub.culler_token)
    assert_one_sentence(result, part)


def test_wrong_certificates_of_a_service_get_a_sentence(hub: RealHub, cull: Cull) -> None:
    variables = {**handed_over(hub), "JUPYTERHUB_SSL_KEYFILE": "/nowhere/cull-idle.key"}
    assert_one_sentence(cull("--once", token=hub.culler_token, env=variables), "/nowhere/cull-idle.key")


def test_without_its_ca_the_hub_is_not_trusted(hub: RealHub, cull: Cull) -> None:
    result = cull("--once", "--url", hub.url, token=hub.culler_token)
    assert_one_sentence(result, "certificate verify failed")


def test_without_a_client_certificate_the_hub_refuses(hub: RealHub, cull: Cull) -> None:
    trusted = {"REQUESTS_CA_BUNDLE": str(hub.certificates / CA)}
    result = cull("--once", "--url", hub.url, token=hub.culler_token, env=trusted)
    assert_one_sentence(result, REFUSED)


def test_a_hub_with_internal_ssl_does_not_answer_http(hub: RealHub, cull: Cull) -> None:
    result = cull("--once", "--url", hub.url.replace("https:", "http:"), token=hub.culler_token)
    assert_one_sentence(result, f"connection.*--url {hub.url}")


def assert_one_sentence(result: Result, part: str) -> None:
    assert result.exit_code == 3
    (line,) = result.lines
    assert line.startswith("ERROR ")
    assert re.search(part, line)
