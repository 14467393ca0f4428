"""What all tests share: the program, run in this process; one real Hub; a scripted Hub for each test."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import messages
import pytest
from hub import RealHub
from messages import Says
from processes import AnyHub, Running, Start, token_of, wait_for
from runs import Cull, Loop, Result, RunLoop
from scenes import Play, Scene
from scripted_hub import DROP, ScriptedHub
from settings import SettingsOf

import cull_idle

sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]  # an optional import of jsonschema that takes a second

make_command = functools.cache(cull_idle.make_command)  # else made anew for each run, which takes a tenth of it

CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")  # a machine may have set them for all


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private CA, `ca`, and the certificate of a Hub or a proxy on loopback that it vouches for, `server`."""
    folder = tmp_path_factory.mktemp("certificates")
    certipy = import_module("certipy").Certipy(store_dir=str(folder))
    certipy.create_ca("ca")
    certipy.create_signed_pair("server", "ca", alt_names=["IP:127.0.0.1"])
    return folder


@pytest.fixture
def cull(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cull:
    """Run `cull_idle.py ARGS` with a token and nothing else of ours in the environment; no run may print the token."""

    def run(*args: str, token: str | None = None, env: Mapping[str, str] | None = None) -> Result:
        for name in os.environ:
            if name.startswith(("CULL_IDLE_", "JUPYTERHUB_")) or name in CA_VARIABLES:
                monkeypatch.delenv(name)
        for name, value in (env or {}).items():
            monkeypatch.setenv(name, value)
        if token is not None:
            monkeypatch.setenv("JUPYTERHUB_API_TOKEN", token)
        monkeypatch.setattr(cull_idle, "make_command", make_command)
        capsys.readouterr()
        exit_code = cull_idle.main(list(args))
        result = Result(exit_code, *capsys.readouterr())
        assert "Traceback" not in result.out + result.err
        assert not token or not token.strip() or token not in result.out + result.err
        return result

    return run


@pytest.fixture
def loop(cull: Cull, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunLoop:
    """Run the program as a loop whose pauses take no time: in each of them, the next of `between` is called.

    In the last pause comes a SIGTERM. No request is tried twice.
    """

    def run(hub: AnyHub, *args: str, between: Sequence[Callable[[], object]] = ()) -> Loop:
        steps: Iterator[Callable[[], object]] = iter([*between, functools.partial(signal.raise_signal, signal.SIGTERM)])
        pauses: list[float] = []
        said: list[tuple[str, str]] = []

        def next_step(_stop: threading.Event, seconds: float) -> None:
            pauses.append(seconds)
            said.append(capsys.readouterr())
            next(steps)()

        handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with monkeypatch.context() as patch:
            patch.setattr(cull_idle, "wait_in_slices", next_step)
            patch.setattr(cull_idle, "PAUSES", ())
            end = cull("--url", hub.url, *args, token=token_of(hub))
        signal.signal(signal.SIGTERM, handler)
        return Loop(end.exit_code, [Result(0, *streams) for streams in said], pauses, end.err)

    return run


@pytest.fixture
def tell_to_stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Send this process a SIGTERM, and wait until the program, which runs in it, has taken it.

    A signal that comes just before the main thread begins to wait does not interrupt that. Others, which nobody minds,
    see to it that this one is taken; `beside` the main thread, the program has to notice it by itself.
    """
    stops: list[threading.Event] = []
    stop_signals = cull_idle.stop_signals

    @contextmanager
    def noted() -> Iterator[threading.Event]:
        with stop_signals() as stop:
            stops.append(stop)
            yield stop

    def tell(*, beside: bool = False) -> None:
        main_thread = threading.main_thread().ident
        assert main_thread
        signal.pthread_kill(threading.get_ident() if beside else main_thread, signal.SIGTERM)

        def taken() -> bool:
            if not beside:
                signal.pthread_kill(main_thread, signal.SIGWINCH)
            return stops[-1].is_set()

        wait_for(taken)

    monkeypatch.setattr(cull_idle, "stop_signals", noted)
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        signal.SIGWINCH: signal.signal(signal.SIGWINCH, lambda number, frame: None),
    }
    yield tell
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program tries again at once where it runs in this process."""
    monkeypatch.setattr(cull_idle, "PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Remove what a run leaves in this process: the tokens to hide, and a log that writes to what pytest closes."""
    yield
    cull_idle.SECRETS.clear()
    logging.getLogger("cull_idle").handlers.clear()


@pytest.fixture
def scripted() -> Iterator[ScriptedHub]:
    """A Hub that misbehaves on command."""
    with ScriptedHub() as hub:
        yield hub


@pytest.fixture
def elsewhere() -> Iterator[ScriptedHub]:
    """Another host. The test fails if anything is asked of it."""
    with ScriptedHub() as hub:
        yield hub
    assert hub.requests == []


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `cull_idle.py --url HUB ARGS`, with other streams as Running takes them; it is killed if it still runs."""
    started: list[Running] = []

    def run(hub: AnyHub, *args: str, **streams: Any) -> Running:
        started.append(Running(hub, *args, log=tmp_path / f"log{len(started)}", **streams))
        return started[-1]

    yield run
    for each in started:
        each.process.kill()
        each.process.wait()
        assert "Traceback" not in each.said()


@pytest.fixture
def settings_of(cull: Cull, monkeypatch: pytest.MonkeyPatch) -> SettingsOf:
    """Read the arguments and the environment as the program does, but cull nothing."""
    seen: list[cull_idle.Settings] = []

    def run(loop: cull_idle.Loop) -> int:
        seen.append(loop.settings)
        return 0

    monkeypatch.setattr(cull_idle.Loop, "run", run)
    monkeypatch.setattr(cull_idle, "read_token", lambda path: "unused")

    def settings(*args: str, env: Mapping[str, str] | None = None) -> cull_idle.Settings:
        assert cull(*args, env=env).exit_code == 0
        return seen.pop()

    return settings


@pytest.fixture
def cull_scripted(cull: Cull, scripted: ScriptedHub) -> Cull:
    """Run `cull_idle.py --once --url SCRIPTED ARGS`."""
    return once(cull, scripted)


def once(cull: Cull, hub: AnyHub) -> Cull:
    """Runs one pass over a Hub, with the token of a culler."""

    def run(*args: str, token: str | None = None, env: Mapping[str, str] | None = None) -> Result:
        return cull("--once", "--url", hub.url, *args, token=token_of(hub) if token is None else token, env=env)

    return run


@pytest.fixture
def play(cull_scripted: Cull, scripted: ScriptedHub, says: Says) -> Play:
    """Play a scene: prepare the scripted Hub, run the program once, compare what came of it."""

    def run(scene: Scene) -> Result:
        for given in scene.given:
            given(scripted)
        result = cull_scripted(*scene.arguments, env=scene.env)
        scene.check(result, scripted.requests)
        if scene.says:  # servers are culled in random order
            said = messages.steady(result.err).splitlines()
            says("\n".join([*sorted(said[:-1]), *said[-1:], *result.out.splitlines()]))
        return result

    return run


@pytest.fixture
def says(request: pytest.FixtureRequest) -> Says:
    """Compare a text with the section of this test in tests/messages.txt; helpers/messages.py says how to update it."""
    node = request.node
    row = node.callspec.id if hasattr(node, "callspec") else node.name.removeprefix("test_").replace("_", " ")
    head = f"{node.path.stem.removeprefix('test_')}: {row}"

    def compare(text: str) -> None:
        if request.config.getoption("update_messages"):
            messages.write(head, messages.steady(text))
        assert messages.steady(text) == messages.read().get(head), f"{head}: see helpers/messages.py"

    return compare


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let tests/by_hand/matrix.py choose the real Hub, and a developer take over new messages."""
    parser.addoption("--update-messages", action="store_true", help="write tests/messages.txt anew")
    group = parser.getgroup("the real Hub")
    group.addoption("--hub-python", default=sys.executable, metavar="PYTHON", help="the interpreter that has it")
    group.addoption("--hub-without-named-servers", action="store_true", help="do not allow them")


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts the tests in the background lets them, and the programs that they start, ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers", "behaviour(name): the column of tests/by_hand/matrix.py's table that the test is for"
    )
    config.addinivalue_line("markers", "needs(feature, ...): those of hub.SINCE that the real Hub must have")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes longest first. Tell the report of --junitxml the behaviour that each test is for."""
    items.sort(key=lambda item: (item.path.parent.name != "real_hub", item.path))
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
    """Run `cull_idle.py --once --url HUB ARGS`."""
    return once(cull, hub)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Ids that are the same in every process, so that several can share the tests."""
    if val is DROP:
        return "missing"
    if isinstance(val, set):
        return str(sorted(val)) if val else "nothing"
    return str(val) if isinstance(val, list) and all(isinstance(each, str) for each in val) else None
