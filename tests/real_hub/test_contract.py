"""The scripted Hub, on which most tests rest, answers as the real one does.

In each row both get the same users and servers, then the same requests. Statuses, headers and JSON are compared. Of
what must differ (times, ids, tokens, ports) only the shape is.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import pytest
import requests
from hub import RealHub
from scripted_hub import ALL_SCOPES, LEAST_SCOPES, PAGINATION, ScriptedHub

# Of these words the Hub of a row is made: `ann` is a server that runs, `ann/gpu` a named one, `ann/gpu:slow` another.
SERVERS: dict[str, dict[str, float]] = {
    "": {"gpus": 4},
    "slow": {"stop_seconds": 60},
    "starting": {"start_seconds": 60},
}
USERS: dict[str, dict[str, Any]] = {  # without a server
    "user": {},
    "admin": {"admin": True},
    "student": {"groups": ["people", "students"]},
}
SCHOOL = "ann, ann/gpu, bob/lab, dave smith, eve:user, root:admin, sue:student"

CULLER = ("list:users", "read:users:activity", "read:servers", "delete:servers")
USER_CULLER = (*CULLER, "admin:users")
DELETES = (*CULLER, "read:users:groups", "delete:users")
ASKS = (*CULLER, "tokens")


class Row(NamedTuple):
    """What is asked of Hubs with these servers."""

    name: str
    hub: str
    requests: str  # one after the other; {id} is the one in the last answer that had one
    scopes: tuple[str, ...] = DELETES  # of the token; it is a wrong one without any


def for_token(server: str) -> str:
    """The request for a token that opens only this server."""
    body = {"scopes": [f"access:servers!server={server}"], "expires_in": 60, "note": f"Server at /user/{server}"}
    return f"POST /users/{server.partition('/')[0]}/tokens {json.dumps(body)}"


def lists(*queries: str) -> str:
    return "; ".join(f"GET /users?{query}" for query in queries)


LOOK = "GET /users/ann"
STATES = lists("state=ready", "state=active", "state=inactive", "state=", "state=wrong")
PAGES = lists("limit=2", "limit=2&offset=4", "limit=2&offset=100", "limit=3&offset=3", "limit=2&offset=2&state=ready")
ODD_PAGES = lists("limit=100000", "limit=0", "limit=-1", "offset=-1", "limit=many", "offset=some")
MODELS = "; ".join(
    ["GET /users", *(f"GET /users/{name}" for name in ("ann", "bob", "dave%20smith", "eve", "root", "sue", "no"))]
)
STOP, STOP_GPU, DELETE = "DELETE /users/ann/server", "DELETE /users/ann/servers/gpu", "DELETE /users/ann"
REMOVE_GPU = STOP_GPU + ' {"remove": true}'

ROWS = [
    Row("the version needs no token", "", "GET /; GET ", ()),
    Row("a wrong token is refused", "ann", f"GET /users; {LOOK}; {STOP}; {STOP_GPU}; {DELETE}", ()),
    Row("a wrong token is nobody's", "", "GET /user", ()),
    Row("a token says whose it is and what it may do", "", "GET /user", CULLER),
    Row("users are listed by their state", f"late:starting, {SCHOOL}", STATES),
    Row("users are listed in pages", f"late:starting, {SCHOOL}", f"{PAGES}; {ODD_PAGES}"),
    Row("a page has 50 users, and a plain list more", ", ".join(f"user{n}" for n in range(51)), "GET /users"),
    Row("each user has a model", SCHOOL, MODELS),
    Row("a culler without --cull-users sees less", SCHOOL, MODELS, CULLER),
    Row("a token that may see everything", f"late:starting, {SCHOOL}", MODELS, USER_CULLER),
    Row("a token that sees the state of servers", "ann", LOOK, (*CULLER, "admin:server_state")),
    Row("without read:servers there are no servers", SCHOOL, f"GET /users; {LOOK}", CULLER[:2]),
    Row("without a scope to read there are names", SCHOOL, f"GET /users; {LOOK}", CULLER[:1]),
    Row("without list:users there is no list", "ann", f"GET /users; {LOOK}", ("read:servers",)),
    Row("a server is stopped", "ann, ann/gpu", f"{STOP}; {LOOK}; {STATES}; {STOP}"),
    Row("a named server is stopped", "ann, ann/gpu", f"{STOP_GPU}; {LOOK}; {STATES}; {STOP_GPU}"),
    Row("a named server is removed", "ann/gpu", f"{REMOVE_GPU}; {LOOK}; {STOP_GPU}"),
    Row("a stopped named server is removed", "ann/gpu", f"{STOP_GPU}; {REMOVE_GPU}; {STOP_GPU}"),
    Row("a named server is not removed", "ann/gpu", STOP_GPU + ' {"remove": false}; ' + STOP_GPU),
    Row("a default server cannot be removed", "ann", STOP + ' {"remove": true}; ' + LOOK),
    Row("a body is not JSON", "ann", f"{STOP} {{; {LOOK}"),
    Row("a server is slow to stop", "ann:slow, ann/gpu", f"{STOP}; {LOOK}; {STOP}; {STATES}; {DELETE}"),
    Row("a named server is slow to stop", "ann/gpu:slow", f"{STOP_GPU}; {LOOK}; {STOP_GPU}; {REMOVE_GPU}; {STATES}"),
    Row("a server is starting", "ann:starting", f"{LOOK}; {STOP}; {LOOK}"),
    Row("there is no such server", "ann/gpu, eve:user", "DELETE /users/ann/servers/no; DELETE /users/eve/server"),
    Row("there is no such user", "", f"{LOOK}; {STOP}; {STOP_GPU}; {DELETE}"),
    Row("a user is deleted", "ann, eve:user", f"{DELETE}; DELETE /users/eve; GET /users"),
    Row("a user whose server is slow to stop is not deleted", "ann:slow", f"{DELETE}; {LOOK}"),
    Row("a user with a named server is not deleted", "ann, ann/gpu", f"{DELETE}; {LOOK}"),
    Row("a user whose server is starting is not deleted", "ann:starting", f"{DELETE}; {LOOK}"),
    Row("a scope is missing to stop or delete", "ann, ann/gpu", f"{STOP}; {STOP_GPU}; {DELETE}", CULLER[:3]),
    Row(
        "a filter of the scopes to stop and delete",
        "ann, ann/gpu, sue:student",
        f"{STOP}; {STOP_GPU}; {DELETE}; DELETE /users/no/server; DELETE /users/sue/server; DELETE /users/sue",
        (*CULLER[:3], "delete:servers!group=students", "delete:users!group=students"),
    ),
    Row(
        "a filter of the scopes to see",
        "ann, ann/gpu, bob",
        f"GET /users; {LOOK}; GET /users/bob",
        ("list:users!user=ann", "read:servers!user=ann"),
    ),
    Row(
        "a filter of the scope to see servers",
        "ann, ann/gpu, bob",
        f"GET /users; {LOOK}; GET /users/bob",
        ("list:users", "read:servers!user=ann"),
    ),
    Row(
        "a token for one server",
        "ann, ann/gpu",
        f"{for_token('ann/gpu')}; {for_token('ann/')}; " + "DELETE /users/ann/tokens/{id}; " * 2 + LOOK,
        ASKS,
    ),
    Row("a token of nobody", "", f"{for_token('no/')}; DELETE /users/no/tokens/a1", ASKS),
    Row("a scope is missing for a token", "ann", for_token("ann/"), CULLER),
    Row(
        "a filter of the scope for tokens",
        "ann, sue:student",
        f"{for_token('ann/')}; {for_token('sue/')}",
        (*CULLER, "tokens!group=students"),
    ),
    Row("what is not of the API", "ann", "GET /nothing; GET /users/ann/no"),
    Row("a page of the Hub that there is not", "", "GET //hub/nothing; GET //hub/apis"),
    Row("all else leads to the Hub", "ann", "GET //; GET //nothing?a=b; GET //user/no/api/status"),
]


def add(hub: RealHub | ScriptedHub, word: str) -> None:
    """A server, or a user without one."""
    full_name, _, kind = word.partition(":")
    name, _, server = full_name.partition("/")
    if kind in USERS:
        never: dict[str, Any] = {} if isinstance(hub, RealHub) else {"idle": None}
        hub.add_user(name, **USERS[kind], **never)
    elif isinstance(hub, RealHub):
        hub.spawn(name, server, wait=kind != "starting", **SERVERS[kind])
    else:
        state: dict[str, Any] = {"pending": "spawn", "ready": False} if kind == "starting" else {}
        options = SERVERS[kind]
        made = hub.add(name, server, user_options=options, state={"options": options}, **state)
        made.stop_seconds = options.get("stop_seconds", 0)


def answers(hub: RealHub | ScriptedHub, row: Row, token: str) -> list[object]:
    """What a Hub answers to each request; to each GET in both forms."""
    found: list[object] = []
    origin = hub.url.removesuffix("/hub/api")
    token_id = ""
    with requests.Session() as session:
        for line in row.requests.split("; "):
            method, path, body = [*line.split(" ", 2), ""][:3]
            url = origin + (path[1:] if path.startswith("//") else f"/hub/api{path}").format(id=token_id)
            for accept in ("*/*", PAGINATION) if method == "GET" else ("*/*",):
                headers = {"Authorization": f"token {token}", "Accept": accept}
                answer = session.request(method, url, data=body, headers=headers, allow_redirects=False, timeout=30)
                content = content_of(answer)
                token_id = content["id"] if isinstance(content, dict) and "id" in content else token_id
                found.append({"request": line, "accept": accept, **seen(answer, content)})
    return found


def content_of(answer: requests.Response) -> Any:
    """JSON, or the type of what is none."""
    kind = answer.headers.get("Content-Type", "").partition(";")[0]
    return (answer.json() if kind == "application/json" else kind) if answer.content else ""


def seen(answer: requests.Response, content: object) -> dict[str, object]:
    return {
        "status": answer.status_code,
        "location": answer.headers.get("Location"),
        "version": answer.headers.get("X-JupyterHub-Version"),
        "has a Date": "Date" in answer.headers,
        "content": shape(content),
    }


MUST_DIFFER = {"id", "token", "token_id"}
DIFFERENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z|(?<=127\.0\.0\.1:)\d+|(?<=No such token )a\d+")


def shape(value: Any) -> Any:
    """A value without what must differ."""
    if isinstance(value, dict):
        parts = {key: sorted(each) if key == "scopes" else each for key, each in value.items()}
        return {key: type(each) if key in MUST_DIFFER else shape(each) for key, each in parts.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return DIFFERENT.sub("...", value) if isinstance(value, str) else value


def scopes_of(hub: RealHub, token: str) -> list[str]:
    """What the Hub makes of a token's scopes: it adds those that they bring with them."""
    answer = requests.get(f"{hub.url}/user", headers={"Authorization": f"token {token}"}, timeout=30)
    scopes: list[str] = answer.json()["scopes"]
    return scopes


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_both_hubs_answer_the_same(hub: RealHub, scripted: ScriptedHub, row: Row) -> None:
    scripted.slow_stop = 0
    for word in filter(None, row.hub.split(", ")):
        add(hub, word)
        add(scripted, word)
    token = hub.culler_token if row.scopes == CULLER else hub.token_with(*row.scopes)
    scripted.scopes = scopes_of(hub, token)
    tokens = (token, scripted.token) if row.scopes else ("wrong", "wrong")
    assert answers(scripted, row, tokens[1]) == answers(hub, row, tokens[0])


def test_the_scripted_hub_grants_the_scopes_of_cullers(hub: RealHub) -> None:
    assert sorted(LEAST_SCOPES) == scopes_of(hub, hub.culler_token)
    assert sorted(ALL_SCOPES) == scopes_of(hub, hub.user_culler_token)
