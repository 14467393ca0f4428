"""Stands for many Jupyter servers, idle since noon: what bench.py asks through a real proxy.

Prints its port, and at the end of its input how many questions it was asked. As real ones do, it checks each token it
has not seen before with the Hub.
"""

from __future__ import annotations

import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

NOON = b"2026-11-22T12:00:00Z"
WORDS = {
    "kernels": b'[{"id": "1", "name": "python3", "execution_state": "idle", "last_activity": "%s"}]' % NOON,
    "terminals": b"[]",
    "status": b'{"connections": 0, "kernels": 1, "last_activity": "%s", "started": "%s"}' % (NOON, NOON),
}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub_url: ClassVar = ""
    seen: ClassVar[set[str]] = set()
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        words = WORDS.get(self.path.partition("?")[0].rpartition("/")[2], b"{}")
        token = self.headers.get("Authorization")
        if token:
            self.asked.append(self.path)
            if token not in self.seen:
                self.seen.add(token)
                with urllib.request.urlopen(
                    urllib.request.Request(f"{self.hub_url}/user", headers={"Authorization": token})
                ) as answer:
                    answer.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(words)))
        self.end_headers()
        self.wfile.write(words)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_port, flush=True)
        Handler.hub_url = sys.stdin.readline().strip()
        sys.stdin.read()
        server.shutdown()
    print(len(Handler.asked), flush=True)


if __name__ == "__main__":
    main()
