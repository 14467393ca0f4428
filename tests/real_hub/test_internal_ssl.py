"""A Hub with internal_ssl: its certificates are used, and wrong ones get a sentence each."""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import NamedTuple

import pytest
from hub import IDLE, RealHub
from runs import Cull

CA, CERTIFICATE, KEY = "hub-ca/hub-ca.crt", "hub-internal/hub-internal.crt", "hub-internal/hub-internal.key"


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
    """A copy of the Hub's, in a folder that is called as the Hub calls it."""
    return Path(shutil.copytree(hub.certificates, tmp_path / "internal-ssl"))


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


class Way(NamedTuple):
    """How the program is told of the certificates: {at} is where they are, {port} that of an HTTP proxy."""

    options: str = "--ssl-enabled --internal-certs-location={at}"
    env: str = ""

    def arguments(self, at: Path, hub: RealHub) -> list[str]:
        return ["--once", "--timeout=1h", "--url", hub.url, *self.options.format(at=at).split()]

    def environment(self, at: Path, port: object = "") -> dict[str, str]:
        return dict(word.partition("=")[::2] for word in self.env.format(at=at, port=port).split())


# What a service that the Hub starts finds in its environment. Its certificate is made like that of a user's server.
SERVICE = (
    "JUPYTERHUB_SSL_KEYFILE={at}/user-busy/user-busy.key JUPYTERHUB_SSL_CERTFILE={at}/user-busy/user-busy.crt "
    "JUPYTERHUB_SSL_CLIENT_CA={at}/notebooks-ca_trust.crt"
)


@pytest.mark.parametrize(
    "way",
    [
        Way(),
        Way("--ssl-enabled=true"),
        Way("", SERVICE),
        Way("--ssl-enabled --internal-certs-location=nowhere", SERVICE),
        Way(env="HTTPS_PROXY=http://127.0.0.1:{port} NO_PROXY= no_proxy="),
    ],
    ids=["by options", "in ./internal-ssl", "as a service", "as a service, whatever options say", "through a proxy"],
)
def test_an_idle_server_is_culled(
    hub: RealHub, cull: Cull, certificates: Path, monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    monkeypatch.setattr(Tunnel, "seen", [], raising=False)
    monkeypatch.chdir(certificates.parent)
    with ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.01,)).start()
        env = way.environment(certificates, proxy.server_address[1])
        result = cull(*way.arguments(certificates, hub), token=hub.culler_token, env=env)
        proxy.shutdown()
    assert (result.exit_code, result.outcomes, hub.running()) == (0, {"idle": "culled"}, {"busy"})
    assert len(Tunnel.seen) == ("HTTPS_PROXY" in way.env)
    assert not any(hub.culler_token.encode() in head for head in Tunnel.seen)


Spoil = Callable[[Path, Path], object]  # takes the Hub's certificates, and another Hub's under the same names
# From TLS 1.3 on, a client that is refused hears why only if it is not too busy sending its request.
REFUSED = "TLS|connection"


def removed(name: str) -> Spoil:
    return lambda hubs, another: (hubs / name).unlink()


def spoiled(name: str) -> Spoil:
    return lambda hubs, another: (hubs / name).write_text("?")


def of_another(*names: str) -> Spoil:
    return lambda hubs, another: [shutil.copy(another / name, hubs / name) for name in names]


@pytest.mark.parametrize(
    ("spoil", "way", "part"),
    [
        pytest.param(lambda hubs, another: shutil.rmtree(hubs), Way(), CA, id="no folder"),
        *(pytest.param(removed(part), Way(), part, id=f"no {part}") for part in (CA, CERTIFICATE, KEY)),
        *(pytest.param(spoiled(part), Way(), "TLS", id=f"a spoiled {part}") for part in (CA, CERTIFICATE, KEY)),
        pytest.param(of_another(KEY), Way(), "mismatch", id="a key of another certificate"),
        pytest.param(of_another(CA), Way(), "certificate verify failed", id="another Hub's CA"),
        pytest.param(of_another(CERTIFICATE, KEY), Way(), REFUSED, id="another Hub's certificate"),
        pytest.param(removed("user-busy/user-busy.key"), Way("", SERVICE), "user-busy.key", id="no key of a service"),
        pytest.param(of_another(), Way(""), "certificate verify failed", id="without its CA the Hub is not trusted"),
        pytest.param(of_another(), Way("", "REQUESTS_CA_BUNDLE={at}/" + CA), REFUSED, id="no client certificate"),
    ],
)
def test_wrong_certificates_get_a_sentence(
    hub: RealHub, cull: Cull, certificates: Path, tmp_path: Path, spoil: Spoil, way: Way, part: str
) -> None:
    certipy = import_module("certipy").Certipy(store_dir=str(tmp_path / "another"))
    certipy.create_ca("hub-ca")
    certipy.create_signed_pair("hub-internal", "hub-ca", alt_names=["IP:127.0.0.1"])
    spoil(certificates, tmp_path / "another")
    result = cull(*way.arguments(certificates, hub), token=hub.culler_token, env=way.environment(certificates))
    assert (result.exit_code, len(result.lines), len(result.errors)) == (3, 1, 1)
    assert re.search(part, result.lines[0])


def test_a_hub_with_internal_ssl_does_not_answer_http(hub: RealHub, cull: Cull) -> None:
    result = cull("--once", "--url", hub.url.replace("https:", "http:"), token=hub.culler_token)
    assert (result.exit_code, len(result.lines)) == (3, 1)
    assert f"--url {hub.url}" in result.lines[0]
