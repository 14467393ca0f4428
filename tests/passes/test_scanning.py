"""The scan: the user list is read page after page, to its end, before anything is stopped."""

from __future__ import annotations

from typing import Any

import pytest
from runs import Cull
from scripted_hub import DROP, LONG_AGO, Reply, ScriptedHub, drip, edited, html, reset, respond, respond_json, truncated


def add_many(scripted: ScriptedHub, count: int, **fields: Any) -> set[str]:
    names = [f"user-{index}" for index in range(count)]
    for name in names:
        scripted.add(name, **{"idle": LONG_AGO, **fields})
    return set(names)


def pages(scripted: ScriptedHub) -> list[dict[str, str]]:
    """The queries of the requests for pages."""
    return [request.query for request in scripted.requests if request.path == "/users"]


def with_next(following: object) -> Reply:
    """A page that says this of the next one."""
    return edited(lambda body: {**body, "_pagination": {**body["_pagination"], "next": following}})


def test_pages_are_followed_by_their_offset(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    add_many(scripted, 7)
    result = cull_scripted("--timeout", "1h", "--api-page-size", "3")
    assert result.exit_code == 0
    assert [(page.get("offset", "0"), page["limit"]) for page in pages(scripted)] == [
        ("0", "3"),
        ("3", "3"),
        ("6", "3"),
    ]
    assert all(page["state"] == "ready" for page in pages(scripted))
    assert scripted.running() == set()
    assert result.counts == {"running": 7, "due": 7, "culled": 7}


def test_the_url_of_the_next_page_is_never_asked(
    cull_scripted: Cull, scripted: ScriptedHub, elsewhere: ScriptedHub
) -> None:
    add_many(scripted, 3)
    scripted.page_max = 2
    scripted.fault("GET", "/users", with_next({"offset": 2, "limit": 1, "url": f"{elsewhere.url}/users?offset=1"}))
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert [page.get("offset") for page in pages(scripted)] == [None, "2"]
    assert scripted.running() == set()


def test_an_offset_is_enough_to_read_on(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    add_many(scripted, 3)
    scripted.page_max = 2
    scripted.fault("GET", "/users", with_next({"offset": 2}))
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert scripted.running() == set()


def test_the_hub_may_cap_the_page_size(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    add_many(scripted, 5)
    scripted.page_max = 2
    assert cull_scripted("--timeout", "1h", "--api-page-size", "1000").exit_code == 0
    assert [(page.get("offset"), page["limit"]) for page in pages(scripted)] == [
        (None, "1000"),
        ("2", "1000"),
        ("4", "1000"),
    ]
    assert scripted.running() == set()


@pytest.mark.parametrize(
    ("arguments", "query"),
    [
        pytest.param([], {"state": "ready", "limit": "200"}, id="by default"),
        pytest.param(["--api-page-size", "0"], {"state": "ready"}, id="size of the Hub's choice"),
        pytest.param(["--cull-users"], {"limit": "200"}, id="users without servers too"),
    ],
)
def test_what_the_user_list_is_asked_for(
    cull_scripted: Cull, scripted: ScriptedHub, arguments: list[str], query: dict[str, str]
) -> None:
    assert cull_scripted("--timeout", "1h", *arguments).exit_code == 0
    assert pages(scripted) == [query]
    (request,) = [request for request in scripted.requests if request.path == "/users"]
    assert "application/jupyterhub-pagination+json" in request.headers["accept"]


def test_short_and_empty_pages_are_not_the_end(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.page_max = 2
    for name in ("ann", "bob", "cat", "dan", "eve"):
        ready = name in ("ann", "eve")
        scripted.add(name, idle=LONG_AGO, ready=ready, pending=None if ready else "spawn")
    result = cull_scripted("--timeout", "1h")
    assert result.exit_code == 0
    assert len(pages(scripted)) == 3
    assert {"DELETE /users/ann/server", "DELETE /users/eve/server"} == set(scripted.lines("DELETE"))


def pending(scripted: ScriptedHub, *names: str) -> None:
    for name in names:
        scripted.add(name, ready=False, pending="spawn")


def test_many_pages_without_a_ready_server_are_not_the_end(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    """A class that logs in: the Hub leaves its users out of the pages, but counts them."""
    pending(scripted, *(f"starting-{n}" for n in range(20)))
    names = add_many(scripted, 3)
    result = cull_scripted("--timeout=1h", "--api-page-size=4")
    assert result.exit_code == 0
    assert result.outcomes == dict.fromkeys(names, "culled")


@pytest.mark.parametrize("limit", ["45", "50", "200", "1000"])
def test_a_page_shorter_than_asked_for_may_end_with_a_server_that_starts(
    cull_scripted: Cull, scripted: ScriptedHub, limit: str
) -> None:
    scripted.page_max = 45
    for n in range(100):
        if n == 44:
            pending(scripted, "starting")
        else:
            scripted.add(f"user-{n}", idle=LONG_AGO if n >= 90 else 60)
    result = cull_scripted("--timeout=1h", "--api-page-size", limit)
    assert result.exit_code == 0
    assert result.outcomes == {f"user-{n}": "culled" for n in range(90, 100)}
    assert result.counts["running"] == 99
    assert len(pages(scripted)) <= 5


def test_an_old_hub_that_answers_with_a_plain_list_is_read(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.version = "1.5.1"
    names = add_many(scripted, 3)
    scripted.fault("GET", "/user", respond(404), times=None)
    scripted.fault("GET", "/users", edited(lambda body: body["items"]), times=None)
    scripted.add_user("zoe", idle=LONG_AGO)
    assert cull_scripted("--timeout", "1h", "--cull-users").exit_code == 0
    assert scripted.running() == set()
    assert scripted.users.keys() == names
    assert len(pages(scripted)) == 1
    assert len(scripted.lines("DELETE")) == 4


def test_a_user_on_two_pages_is_culled_once(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.page_max = 2
    scripted.add("ann", idle=LONG_AGO)
    scripted.add_user("bob", idle=LONG_AGO)
    scripted.add("cat", idle=LONG_AGO)
    first: list[Any] = []

    def remember(body: dict[str, Any]) -> dict[str, Any]:
        first.extend(body["items"])
        return body

    scripted.fault("GET", "/users", edited(remember))
    scripted.fault("GET", "/users", edited(lambda body: {**body, "items": first + body["items"]}))
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 0
    assert len(scripted.lines("DELETE")) == 3
    assert (result.counts["culled"], result.counts["deleted"]) == (2, 1)


def test_everything_is_listed_before_anything_is_stopped(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.page_max = 1
    add_many(scripted, 5)
    assert cull_scripted("--timeout", "1h", "--cull-users").exit_code == 0
    order = [request.path == "/users" for request in scripted.requests if request.path != "/user"]
    assert order[:5] == [True] * 5
    assert True not in order[5:]


@pytest.mark.parametrize(
    "following",
    [
        pytest.param({"offset": 2, "limit": 2}, id="the same page"),
        pytest.param({"offset": 0}, id="the first page"),
        pytest.param({"offset": -2}, id="negative"),
        pytest.param({"offset": "4"}, id="text"),
        pytest.param({"offset": None}, id="null"),
        pytest.param({"offset": 4.5}, id="a fraction"),
        pytest.param({"offset": True}, id="true"),
        pytest.param({"limit": 2, "url": "http://127.0.0.1:1/hub/api/users?offset=4"}, id="only a URL"),
        pytest.param({}, id="nothing"),
        pytest.param("http://127.0.0.1:1/hub/api/users?offset=4", id="a string"),
        pytest.param(4, id="a number"),
    ],
)
def test_a_pagination_that_does_not_advance_ends_the_list(
    cull_scripted: Cull, scripted: ScriptedHub, following: object
) -> None:
    scripted.page_max = 2
    names = sorted(add_many(scripted, 6))
    scripted.add_user("zoe", idle=LONG_AGO)
    scripted.fault("GET", r"/users\?(.*&)?offset=2.*", with_next(following), times=5)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == 1
    assert len(pages(scripted)) == 2
    assert scripted.running() == set(names[4:])
    assert len(scripted.users) == 7
    (error,) = result.errors
    assert "GET /users" in error
    assert "offset 2" in error


@pytest.mark.parametrize("total", [None, "few", DROP])
def test_the_next_page_is_read_even_if_the_total_is_unknown(
    cull_scripted: Cull, scripted: ScriptedHub, total: object
) -> None:
    scripted.page_max = 2
    add_many(scripted, 6)

    def set_total(body: dict[str, Any]) -> dict[str, Any]:
        pagination = {**body["_pagination"], "total": total}
        return {**body, "_pagination": {key: value for key, value in pagination.items() if value is not DROP}}

    scripted.fault("GET", "/users", edited(set_total), times=None)
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert scripted.running() == set()


BAD_PAGES = [
    pytest.param(respond_json(500, {"message": "Oops"}), "500 (Oops)", id="500"),
    pytest.param(respond(503), "503", id="503"),
    pytest.param(respond_json(403, {"message": "no more"}), "403 (no more)", id="403"),
    pytest.param(reset(), "connection", id="reset"),
    pytest.param(truncated(), "JSON", id="half an answer"),
    pytest.param(html(), "HTML", id="HTML"),
    pytest.param(respond_json(200, {"items": 5, "_pagination": {"next": None}}), "user list", id="a number"),
    pytest.param(respond_json(200, {"items": []}), "user list", id="no pagination"),
    pytest.param(respond_json(200, {"items": [], "_pagination": 5}), "user list", id="a number as pagination"),
    pytest.param(respond_json(200, None), "user list", id="null"),
    pytest.param(respond_json(200, {"items": [None], "_pagination": {"next": None}}), "user list", id="nobody"),
]


@pytest.mark.parametrize(("bad", "words"), BAD_PAGES)
def test_after_a_page_that_fails_what_was_read_is_culled_but_no_user_deleted(
    cull_scripted: Cull, scripted: ScriptedHub, bad: Reply, words: str
) -> None:
    scripted.page_max = 2
    names = sorted(add_many(scripted, 6))
    scripted.fault("GET", r"/users\?(.*&)?offset=2.*", bad, times=None)
    result = cull_scripted("--timeout", "1h", "--cull-users")
    assert result.exit_code == (3 if "403" in words else 1)
    assert scripted.running() == set(names[2:])
    assert len(scripted.users) == 6
    (error,) = result.errors
    assert words in error
    assert result.counts == {"running": 2, "due": 2, "culled": 2}


@pytest.mark.parametrize("bad", [pytest.param(respond(503), id="503"), pytest.param(reset(), id="reset")])
def test_a_page_that_fails_for_a_moment_is_read_again(cull_scripted: Cull, scripted: ScriptedHub, bad: Reply) -> None:
    scripted.page_max = 2
    add_many(scripted, 6)
    scripted.fault("GET", r"/users\?(.*&)?offset=2.*", bad, times=2)
    assert cull_scripted("--timeout", "1h", "--cull-users").exit_code == 0
    assert scripted.running() == set()


def test_an_answer_that_comes_byte_by_byte_is_read(cull_scripted: Cull, scripted: ScriptedHub) -> None:
    scripted.add("ann", idle=LONG_AGO)
    scripted.fault("GET", "/users", drip(0.0001))
    assert cull_scripted("--timeout", "1h").exit_code == 0
    assert scripted.running() == set()
