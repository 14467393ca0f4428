"""What all tests share: the program, run in this process, one real Hub, and a scripted one for each test."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hub import RealHub
from processes import Running, Start
from program import Cull, Result
from scripted_hub import ScriptedHub
from settings import SettingsOf

import cull_idle


@pytest.fixture
def cull(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cull:
    """Run `cull_idle.py ARGS` with a token and nothing else of ours in the environment; no run may print the token."""

    def run(*args: str, token: str | None = None, env: Mapping[str, str] | None = None) -> Result:
        for name in os.environ:
            if name.startswith(("CULL_IDLE_", "JUPYTERHUB_")):
                monkeypatch.delenv(name)
        for name, value in (env or {}).items():
            monkeypatch.setenv(name, value)
        if token is not None:
            monkeypatch.setenv("JUPYTERHUB_API_TOKEN", token)
        capsys.readouterr()
        exit_code = cull_idle.main(list(args))
        result = Result(exit_code, *capsys.readouterr())
        assert "Traceback" not in result.out + result.err
        assert not token or not token.strip() or token not in result.out + result.err
        return result

    return run


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program, where it runs in this process, try again at once."""
    monkeypatch.setattr(cull_idle, "PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture(autouse=True)
def _quiet_log() -> Iterator[None]:
    """Leave no handler behind that writes to a stream that pytest has closed."""
    yield
    logging.getLogger("cull_idle").handlers.clear()


@pytest.fixture
def scripted() -> Iterator[ScriptedHub]:
    """A Hub that misbehaves on command."""
    with ScriptedHub() as hub:
        yield hub


@pytest.fixture
def elsewhere() -> Iterator[ScriptedHub]:
    """Another host, which may not be asked anything."""
    with ScriptedHub() as hub:
        yield hub
    assert hub.requests == []


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `cull_idle.py --url HUB ARGS`, which is killed at the end if it still runs."""
    started: list[Running] = []

    def run(hub: RealHub | ScriptedHub, *args: str) -> Running:
        token = hub.token if isinstance(hub, ScriptedHub) else hub.culler_token
        started.append(Running(hub.url, token, *args, log=tmp_path / f"log{len(started)}"))
        return started[-1]

    yield run
    for each in started:
        each.process.kill()
        each.process.wait()
        assert "Traceback" not in each.said()


@pytest.fixture
def settings_of(cull: Cull, monkeypatch: pytest.MonkeyPatch) -> SettingsOf:
    """Read the arguments and the environment as the program does, but do not cull."""
    seen: list[cull_idle.Settings] = []

    def run(culler: cull_idle.Culler) -> int:
        seen.append(culler.settings)
        return 0

    monkeypatch.setattr(cull_idle.Culler, "run", run)

    def settings(*args: str, env: Mapping[str, str] | None = None) -> cull_idle.Settings:
        assert cull(*args, env=env).exit_code == 0
        return seen.pop()

    return settings


@pytest.fixture
def cull_scripted(cull: Cull, scripted: ScriptedHub) -> Cull:
    """Run `cull_idle.py --once --url SCRIPTED ARGS`."""

    def run(*args: str, token: str | None = None, env: Mapping[str, str] | None = None) -> Result:
        return cull("--once", "--url", scripted.url, *args, token=scripted.token if token is None else token, env=env)

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let tests/by_hand/matrix.py choose the real Hub."""
    group = parser.getgroup("the real Hub")
    group.addoption("--hub-python", default=sys.executable, metavar="PYTHON", help="the interpreter that has it")
    group.addoption("--hub-without-named-servers", action="store_true", help="do not allow them")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "behaviour(name): the column of tests/by_hand/matrix.py's table that the test is for"
    )
    config.addinivalue_line("markers", "needs(feature, ...): those of hub.SINCE that the real Hub must have")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put into the report of --junitxml what each test is for."""
    for item in items:
        item.user_properties += [("behaviour", marker.args[0]) for marker in item.iter_markers("behaviour")]


@pytest.fixture(scope="session")
def session_hub(request: pytest.FixtureRequest) -> Iterator[RealHub]:
    """The one real Hub; slow stops are answered with 202 after a second."""
    python, without = (request.config.getoption(name) for name in ("hub_python", "hub_without_named_servers"))
    with RealHub(slow_stop_timeout=1, python=python, named_servers=not without) as hub:
        yield hub


@pytest.fixture
def hub(session_hub: RealHub, request: pytest.FixtureRequest) -> Iterator[RealHub]:
    """The real Hub, empty; a test that it cannot do is skipped."""
    request.node.user_properties.append(("hub", ".".join(map(str, session_hub.version))))
    for feature in (feature for marker in request.node.iter_markers("needs") for feature in marker.args):
        if session_hub.lacks(feature):
            pytest.skip(f"this Hub lacks {feature}")
    yield session_hub
    session_hub.clear()


@pytest.fixture
def cull_real(cull: Cull, hub: RealHub) -> Cull:
    """Run `cull_idle.py --once --url HUB ARGS` with the token of a culler."""

    def run(*args: str, token: str | None = None, env: Mapping[str, str] | None = None) -> Result:
        return cull("--once", "--url", hub.url, *args, token=hub.culler_token if token is None else token, env=env)

    return run


def pytest_make_parametrize_id(val: object) -> str | None:
    """Ids that are the same in every process, so that several can share the tests."""
    if isinstance(val, set):
        return str(sorted(val)) if val else "nothing"
    return str(val) if isinstance(val, list) and all(isinstance(each, str) for each in val) else None
