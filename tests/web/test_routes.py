"""The page's files as a client gets them."""

import asyncio
import re
from importlib.resources import files
from typing import Any

import pytest
from starlette.applications import Starlette

from tokenworks.web import routes

KINDS = {
    "/": "text/html; charset=utf-8",
    "/static/chat.css": "text/css; charset=utf-8",
    "/static/chat.js": "text/javascript; charset=utf-8",
    "/favicon.svg": "image/svg+xml",
}


def get(path: str, tag: str = "", method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Ask the routes directly: status, headers, body."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"if-none-match", tag.encode())] if tag else [],
    }
    asyncio.run(Starlette(routes=routes())(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(part.get("body", b"") for part in sent[1:])


@pytest.mark.parametrize(("path", "kind"), KINDS.items())
def test_each_file_says_what_it_is(path: str, kind: str) -> None:
    status, headers, body = get(path)
    assert (status, headers["content-type"]) == (200, kind)
    assert int(headers["content-length"]) == len(body) > 0


@pytest.mark.parametrize("path", KINDS)
def test_nothing_foreign_is_let_in(path: str) -> None:
    headers = get(path)[1]
    policy = dict(
        part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", KINDS)
def test_a_browser_asks_each_time_and_is_told_when_nothing_changed(path: str) -> None:
    headers = get(path)[1]
    assert headers["cache-control"] == "no-cache"
    for tag in (headers["etag"], f"W/{headers['etag']}", f'"older", {headers["etag"]}'):
        status, again, body = get(path, tag)
        assert (status, again["etag"], body) == (304, headers["etag"], b"")
        assert "content-security-policy" in again
    assert get(path, '"older"')[0] == 200


def test_files_differ_and_so_do_their_tags() -> None:
    assert len({get(path)[1]["etag"] for path in KINDS}) == len(KINDS)


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "POST", 405),
        ("/", "HEAD", 200),
        ("/static/", "GET", 404),
        ("/static/x.js", "GET", 404),
    ],
)
def test_nothing_else_is_served(path: str, method: str, status: int) -> None:
    assert get(path, method=method)[0] == status


def test_every_file_is_served() -> None:
    """A file that is packed but has no route would be dead weight, or a page half loaded."""
    packed = {file.name for file in (files("tokenworks.web") / "static").iterdir()}
    assert packed == {path.rsplit("/", 1)[-1] or "chat.html" for path in KINDS}


@pytest.mark.parametrize("path", KINDS)
def test_no_file_names_another_place(path: str) -> None:
    # The name of the SVG language looks like an address; nobody goes there.
    text = get(path)[2].decode().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert re.findall(r"\w+://\S*|[\"'(]//\w\S*|@import|data:\w+/", text) == []


def test_the_page_has_nothing_inline() -> None:
    text = get("/")[2].decode()
    assert re.findall(r"<style|<script(?![^>]*\ssrc=)|\sstyle=|\son\w+=|javascript:", text) == []


def test_answers_can_never_become_markup() -> None:
    text = get("/static/chat.js")[2].decode()
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text) == []
