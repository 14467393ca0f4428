"""--arbiter: the administrator's own function decides in place of --timeout."""

import importlib
import sys
from pathlib import Path

import pytest
from runs import Cull
from scripted_hub import LONG_AGO, ScriptedHub

# The example of jupyterhub-idle-culler's documentation, below the line with which its --generate-config begins.
DOCUMENTED = """
c = get_config()  #noqa

def my_cull_arbiter(inactive, inactive_limit, server):
    if server['state']['profile_name'] == 'unlimited':
        return False
    return inactive.total_seconds() >= inactive_limit
c.IdleCuller.cull_arbiter_hook = my_cull_arbiter
"""


POSTPONED = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Decision:
    cull: bool

def f():
    return Decision(cull=True).cull
"""


@pytest.fixture
def arbiter(tmp_path: Path) -> Path:
    return tmp_path / "arbiter.py"


@pytest.mark.parametrize("prefix", ["", "async "])
def test_the_references_documented_example_works(
    cull_scripted: Cull, scripted: ScriptedHub, arbiter: Path, prefix: str
) -> None:
    scripted.scopes.append("admin:server_state")
    arbiter.write_text(DOCUMENTED.replace("def ", f"{prefix}def ", 1))
    scripted.add("ann", idle=LONG_AGO, extra={"state": {"profile_name": "unlimited"}})
    scripted.add("bob", idle=LONG_AGO, extra={"state": {"profile_name": "small"}})
    scripted.add("cat", idle=60, extra={"state": {"profile_name": "small"}})
    result = cull_scripted("--timeout=1h", f"--arbiter={arbiter}:my_cull_arbiter")
    assert result.exit_code == 0
    assert scripted.running() == {"ann", "cat"}
    assert result.outcomes == {"bob": "culled"}
    assert "arbiter" in result.said["bob"].reason
    assert "idle 2h" in result.said["bob"].reason


def test_a_setting_of_the_reference_that_has_no_effect_is_refused(cull_scripted: Cull, arbiter: Path) -> None:
    """Or servers would be stopped after the timeout that is the default here."""
    arbiter.write_text(f"{DOCUMENTED}c.IdleCuller.cull_every = 60\n")
    result = cull_scripted("--dry-run", f"--arbiter={arbiter}:my_cull_arbiter")
    assert result.exit_code == 2
    assert "c.IdleCuller.cull_every" in result.err


@pytest.mark.parametrize(
    ("source", "culls"),
    [
        ("def f(): return True", True),
        ("def f(): return 0", False),
        ("def f(*, user): return user['name'] == 'ann' and user['servers']['']['ready']", True),
        ("def f(**given): return sorted(given) == ['inactive', 'inactive_limit', 'server', 'user']", True),
        ("def f(inactive, inactive_limit, extra=7): return inactive.total_seconds() < inactive_limit == 36000", True),
        ("import asyncio\nasync def f(server):\n    await asyncio.sleep(0)\n    return server['name'] == ''", True),
        (POSTPONED, True),
        ("class F:\n    def __call__(self, server): return True\nf = F()", True),
    ],
)
def test_an_arbiter_gets_what_its_signature_takes(
    cull_scripted: Cull, scripted: ScriptedHub, arbiter: Path, source: str, culls: bool
) -> None:
    arbiter.write_text(source)
    scripted.add("ann", idle=60)
    assert cull_scripted("--timeout=10h", f"--arbiter={arbiter}:f").exit_code == 0
    assert scripted.running() == (set() if culls else {"ann"})


def test_an_arbiter_may_be_in_a_module(
    cull_scripted: Cull, scripted: ScriptedHub, arbiter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arbiter.with_name("our_arbiter.py").write_text("def f(): return True")
    monkeypatch.syspath_prepend(arbiter.parent)
    importlib.invalidate_caches()
    scripted.add("ann", idle=60)
    cull_scripted("--timeout=1h", "--arbiter=our_arbiter:f")
    assert scripted.running() == set()
    del sys.modules["our_arbiter"]


def test_an_arbiter_that_fails_keeps_that_server_and_is_reported(
    cull_scripted: Cull, scripted: ScriptedHub, arbiter: Path
) -> None:
    arbiter.write_text("def f(server): return 1 / (server['user_options']['x']) > 0")
    scripted.add("ann", idle=LONG_AGO, user_options={"x": 0})
    scripted.add("bob", idle=LONG_AGO, user_options={"x": 1})
    result = cull_scripted("--timeout=1h", f"--arbiter={arbiter}:f")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert result.outcomes == {"bob": "culled"}
    assert result.doubts.number == 1
    assert result.doubts.first.startswith("ann: ")
    assert "ZeroDivisionError: division by zero" in result.doubts.first


def test_an_arbiter_replaces_neither_max_age_nor_the_flags_nor_the_rules(
    cull_scripted: Cull, scripted: ScriptedHub, arbiter: Path
) -> None:
    arbiter.write_text("def f(user): return user['name'] != 'old'")
    scripted.add("old", idle=60, age=36_000)
    scripted.add("ann", "gpu", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    scripted.add("pat", idle=LONG_AGO, pending="stop")
    scripted.add("kim", idle=LONG_AGO)
    options = ["--max-age=9h", "--cull-named-servers=false", "--rule=user=kim keep"]
    cull_scripted("--timeout=1h", f"--arbiter={arbiter}:f", *options)
    assert set(scripted.lines("DELETE")) == {"DELETE /users/old/server", "DELETE /users/bob/server"}


def test_the_second_look_asks_the_arbiter_again(cull_scripted: Cull, scripted: ScriptedHub, arbiter: Path) -> None:
    arbiter.write_text("asked = []\ndef f(): asked.append(1); return len(asked) == 1")
    scripted.add("ann", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", f"--arbiter={arbiter}:f")
    assert scripted.running() == {"ann"}
    assert result.outcomes == {"ann": "spared"}
    assert "arbiter" in result.said["ann"].reason


def test_an_arbiter_that_fails_in_the_second_look_is_reported(
    cull_scripted: Cull, scripted: ScriptedHub, arbiter: Path
) -> None:
    arbiter.write_text("asked = []\ndef f(): asked.append(1); return 1 / (2 - len(asked)) > 0")
    scripted.add("ann", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", f"--arbiter={arbiter}:f")
    assert result.said == {"ann": ("WARNING", "spared", "the arbiter failed: ZeroDivisionError: division by zero")}


LOCKED = """
import asyncio

lock = asyncio.Lock()

async def f():
    async with lock:
        await asyncio.sleep(0.01)
    return True
"""

COUNTED = """
import time

running = []

def f():
    running.append(1)
    time.sleep(0.01)
    alone = len(running) == 1
    running.pop()
    return alone
"""


@pytest.mark.parametrize("source", [LOCKED, COUNTED], ids=["an asyncio lock", "not for threads"])
def test_an_arbiter_is_called_once_at_a_time_and_in_one_event_loop(
    cull_scripted: Cull, scripted: ScriptedHub, arbiter: Path, source: str
) -> None:
    arbiter.write_text(source)
    for n in range(12):
        scripted.add(f"user-{n}", idle=60)
    result = cull_scripted(f"--arbiter={arbiter}:f")
    assert result.outcomes == {f"user-{n}": "culled" for n in range(12)}


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("", "f", ["AttributeError", "'f'"]),
        ("f = 7", "f", ["TypeError"]),
        ("1/0", "f", ["ZeroDivisionError"]),
        ("def f(server, mood): return True", "f", ["'mood'", "inactive, inactive_limit, server, user"]),
        (None, "f", ["No such file"]),
    ],
)
def test_an_arbiter_that_cannot_be_loaded_gets_a_sentence(
    cull: Cull, arbiter: Path, source: str | None, name: str, words: list[str]
) -> None:
    if source is not None:
        arbiter.write_text(source)
    result = cull(f"--arbiter={arbiter}:{name}")
    assert result.exit_code == 2
    (line,) = result.lines
    for word in ["--arbiter", *words]:
        assert word in line


def test_an_arbiter_that_quotes_the_token_while_it_is_loaded_shows_it_to_nobody(cull: Cull, tmp_path: Path) -> None:
    file = tmp_path / "arbiter.py"
    file.write_text("import os\nraise ValueError('no login with ' + os.environ['JUPYTERHUB_API_TOKEN'])\n")
    result = cull("--once", f"--arbiter={file}:decide", token="token-of-the-hub")  # which looks for it
    assert "ValueError: no login with …" in result.err


@pytest.mark.parametrize("name", ["nonsense", "no_such_module:f", ":f", "os:", "x.py", "/etc/arbiter.py"])
def test_a_text_that_names_no_arbiter_gets_a_sentence(cull: Cull, name: str) -> None:
    result = cull(f"--arbiter={name}")
    assert result.exit_code == 2
    assert len(result.lines) == 1
    assert "--arbiter" in result.err
    assert f"'{name}'" in result.err


# An arbiter that ends the program


@pytest.mark.parametrize("end", ["sys.exit(0)", "raise SystemExit", "raise asyncio.CancelledError"])
@pytest.mark.parametrize("prefix", ["", "async "])
def test_an_arbiter_that_tries_to_end_the_program_has_failed(
    cull_scripted: Cull, scripted: ScriptedHub, arbiter: Path, prefix: str, end: str
) -> None:
    source = f"{prefix}def f(user):\n    if user['name'] == 'ann': {end}\n    return True"
    arbiter.write_text(f"import asyncio, sys\n{source}\n")
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", f"--arbiter={arbiter}:f")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert "kept 1 in doubt" in result.err


def test_an_arbiter_that_tries_to_end_the_program_in_the_second_look_has_failed(
    cull_scripted: Cull, scripted: ScriptedHub, arbiter: Path
) -> None:
    arbiter.write_text(
        "import sys\nasked = []\n"
        "def f(user): asked.append(user['name']); return asked.count('ann') < 2 or user['name'] != 'ann' or sys.exit(0)"
    )
    scripted.add("ann", idle=LONG_AGO)
    scripted.add("bob", idle=LONG_AGO)
    result = cull_scripted("--timeout=1h", f"--arbiter={arbiter}:f")
    assert result.exit_code == 0
    assert scripted.running() == {"ann"}
    assert "spared ann" in result.err
    assert "culled bob" in result.err


def test_a_file_that_replaces_the_references_settings_gets_a_sentence(cull_scripted: Cull, arbiter: Path) -> None:
    arbiter.write_text(f"{DOCUMENTED}c.IdleCuller = 5\n")
    result = cull_scripted("--dry-run", f"--arbiter={arbiter}:my_cull_arbiter")
    assert (result.exit_code, len(result.lines)) == (2, 1)


@pytest.mark.parametrize("source", ["import sys; sys.exit(0)", "raise SystemExit('bye')"])
def test_an_arbiter_that_tries_to_end_the_program_while_it_is_loaded_gets_a_sentence(
    cull_scripted: Cull, scripted: ScriptedHub, arbiter: Path, source: str
) -> None:
    arbiter.write_text(source)
    result = cull_scripted(f"--arbiter={arbiter}:f")
    assert result.exit_code == 2
    (line,) = result.lines
    assert "--arbiter" in line
    assert "SystemExit" in line
    assert scripted.requests == []
