"""The processes of Hubs and servers, forked from one that has imported JupyterHub: that takes most of a start.

Hubs use this too, for their servers; see real_servers.py.
"""

import atexit
import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Runs in the Hub's Python, of any version since 3.6. It starts a process for each line that it reads, and says its pid.
FORK = """
import importlib, json, os, signal, sys

sys.modules["rfc3987_syntax"] = None  # an optional import of jsonschema that takes a second
main = importlib.import_module(sys.argv[1]).main

stdin, held_open = os.pipe()  # the configuration ends a Hub whose stdin is closed
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that ended
for line in sys.stdin:
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.argv, directory, log, environment = json.loads(line)
    os.setsid()  # Ctrl-C ends the tests first, then the Hub
    os.chdir(directory)
    log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for ours, standard in [(stdin, 0), (log, 1), (log, 2)]:
        os.dup2(ours, standard)
    os.close(held_open)
    os.environ.clear()
    os.environ.update(environment)
    main()
    sys.exit()
"""


def free_ports(count: int) -> list[int]:
    """Ports that the system gives to nobody who asks for any: they are still free when a Hub or server starts."""
    found: set[int] = set()
    while len(found) < count:
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.socket() as each:
            each.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


_lock = threading.Lock()


@functools.cache
def _forking(python: str, module: str) -> subprocess.Popen[str]:
    """The process that forks those that run `main` of a module, in one Python."""
    command = [python, "-c", FORK, module]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    atexit.register(process.communicate)  # it ends with its stdin
    return process


class ForkedProcess:
    """A process that nobody waits for. A Hub's ends also when this one is killed, because its stdin is closed."""

    def __init__(
        self, python: str, module: str, argv: Sequence[str], directory: Path, log: Path, environment: Mapping[str, str]
    ) -> None:
        """Run `main` of a module in a directory. To the file `log` it adds what it writes."""
        with _lock:
            forking = _forking(python, module)
            assert forking.stdin
            assert forking.stdout
            forking.stdin.write(json.dumps([argv, str(directory), str(log), environment]) + "\n")
            forking.stdin.flush()
            answer = forking.stdout.readline()
        if not answer:
            raise RuntimeError(f"{python} cannot import {module}")
        self.pid = int(answer)

    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._signal(0)

    def stop(self) -> None:
        """Have it stop its servers, which would outlive it if it were killed, and end."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        try:
            while self.runs() and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it at once, if it still runs."""
        while self._signal(signal.SIGKILL):
            time.sleep(0.01)

    def _signal(self, number: int) -> bool:
        """Whether there is a process that it reached."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True
