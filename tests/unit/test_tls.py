"""Certificates: the Hub's own go to the Hub alone."""

from __future__ import annotations

import threading

import pytest
from settings import settings_from

import cull_idle


@pytest.mark.parametrize(
    ("to_hub", "certificate"),
    [
        pytest.param(
            True, ("internal/hub-internal/hub-internal.crt", "internal/hub-internal/hub-internal.key"), id="Hub"
        ),
        pytest.param(False, None, id="a user's server"),
    ],
)
def test_only_the_hub_gets_a_client_certificate(to_hub: bool, certificate: tuple[str, str] | None) -> None:
    settings = settings_from("--ssl-enabled", "--internal-certs-location=internal", "--url=https://hub/hub/api")
    hub = cull_idle.Hub("a token", settings, threading.Event())
    assert hub._tls("https://hub/user/ann/api/status", to_hub=to_hub)["cert"] == certificate
