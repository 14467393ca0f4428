"""A Hub with up to ten million servers, in a process of its own, to measure against.

    python tests/by_hand/bulk_hub.py --servers 100000

It prints its URL and serves until SIGTERM or SIGINT; then it prints, as JSON, what was asked of it.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import timedelta

from scripted_hub import LEAST_SCOPES, Answer, FakeServer, FakeUser, ScriptedHub, user_model

DAY = 86400.0


class BulkHub(ScriptedHub):
    """A Hub of `count` users with a server each: `due` are idle for a day, the others are active.

    Idle times are up to two minutes more. Nothing is kept of a user who is not asked for by name: pages are written
    from a template. When the list was read to its end for the first time, `coming_back` of the due users become active.
    """

    def __init__(
        self,
        count: int,
        *,
        due: int = 0,
        stop_seconds: float = 0.0,
        coming_back: int = 0,
        groups: Sequence[str] = (),
        user_options: Mapping[str, object] | None = None,
        token: str = "scripted-token",
    ) -> None:
        super().__init__(token)
        self.scopes = [*LEAST_SCOPES, "admin:users", "delete:users", *(["read:users:groups"] if groups else [])]
        self.recording = False
        self.count = count
        self.stop_seconds = stop_seconds
        indexes = [i * count // due for i in range(due)]
        self.due = frozenset(indexes)
        self.coming_back = {self._name(indexes[i * due // coming_back]) for i in range(coming_back)}
        self.are_back = False
        self._deleted: set[int] = set()
        self._yesterday = self._minute(DAY)
        options = dict(user_options or ({"profile": "small"} if groups else {}))
        server = FakeServer("", last_activity="SEEN", started="STARTED", user_options=options)
        user = FakeUser("NAME", last_activity="SEEN", servers={"": server}, groups=list(groups))
        text = json.dumps(user_model(user, self.scopes)).replace("%", "%%")
        self._template = re.sub(r"\b(NAME|SEEN|STARTED)\b", r"%(\1)s", text)

    def summary(self) -> dict[str, int]:
        down = {user.name for user in list(self.users.values()) if not user.active}
        down |= {self._name(index) for index in self._deleted}
        return {
            "requests": self.request_count,
            "deleted": len(down),
            "deleted_come_back": len(down & self.coming_back),
        }

    @staticmethod
    def _name(index: int) -> str:
        return f"user-{index:07d}"

    def _minute(self, idle: float = 0.0) -> str:
        """The beginning of a time at least so many seconds ago."""
        return (self.now - timedelta(seconds=idle + 60)).strftime("%Y-%m-%dT%H:%M:")

    def _times(self, index: int, minute: str) -> tuple[str, str]:
        """When a server was last active, in `minute` unless it is due, and when it started."""
        rest = f"{index * 7 % 60:02d}.{index * 7919 % 999983 + 1:06d}Z"
        return (self._yesterday if index in self.due else minute) + rest, self._yesterday + rest

    def _page(self, state: str | None, offset: int, limit: int) -> tuple[list[str], int]:
        kept = {int(name[5:]): user for name, user in list(self.users.items())}
        unlisted = {index for index, user in kept.items() if not self._in_state(user, state)}
        hidden = sorted(unlisted | self._deleted)
        total = self.count - len(hidden)
        index = offset + bisect_right(range(len(hidden)), offset, key=lambda i: hidden[i] - i)
        models: list[str] = []
        minute, skipped = self._minute(), set(hidden)
        for _ in range(min(limit, total - offset)):
            while index in skipped:
                index += 1
            if index in kept:
                models.append(json.dumps(user_model(kept[index], self.scopes)))
            else:
                seen, started = self._times(index, minute)
                models.append(self._template % {"NAME": self._name(index), "SEEN": seen, "STARTED": started})
            index += 1
        if offset + limit >= total:
            self._come_back()
        return models, total

    def _come_back(self) -> None:
        with self._lock:
            names = set() if self.are_back else self.coming_back
            self.are_back = True
        for name in names:
            if self._find(name):
                self.touch(name)

    def _find(self, name: str) -> FakeUser | None:
        known = re.fullmatch(r"user-(\d{7})", name)
        index = int(known[1]) if known else self.count
        if index >= self.count or index in self._deleted:
            return None
        with self._lock:
            if name not in self.users:
                seen, started = self._times(index, self._minute())
                server = FakeServer("", seen, started, stop_seconds=self.stop_seconds)
                self.users[name] = FakeUser(name, last_activity=seen, servers={"": server})
            return self.users[name]

    def _delete_user(self, name: str) -> Answer:
        answer = super()._delete_user(name)
        if answer.status == 204:
            self._deleted.add(int(name[5:]))
        return answer

    def _settle(self) -> None:
        if self.stop_seconds > self.slow_stop:
            super()._settle()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=200, metavar="N", help="each of a user of its own (%(default)s)")
    parser.add_argument("--due", type=int, default=0, metavar="N", help="of them, idle for a day")
    parser.add_argument("--coming-back", type=int, default=0, metavar="N", help="of these, active once all is read")
    parser.add_argument("--stop-seconds", type=float, default=0.0, metavar="SECONDS", help="what a DELETE takes")
    parser.add_argument("--groups", default="", help="which every user is in; servers then have a profile, too")
    parser.add_argument("--token", default="scripted-token", help="(%(default)s)")
    options = parser.parse_args()
    if not options.coming_back <= options.due <= options.servers <= 10**7:
        parser.error("--coming-back <= --due <= --servers <= 10000000 does not hold")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    with BulkHub(
        options.servers,
        due=options.due,
        stop_seconds=options.stop_seconds,
        coming_back=options.coming_back,
        groups=options.groups.split(",") if options.groups else (),
        token=options.token,
    ) as hub:
        print(hub.url, flush=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    print(json.dumps(hub.summary()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
