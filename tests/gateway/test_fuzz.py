"""Whatever is thrown at the running gateway gets an answer: 200, or a 4xx in OpenAI's shape.

The real engine is behind it, because half of what a fuzzer finds is in what passes the gateway.
"""

import copy
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import MODEL, Answer, Client, Running, exchange, request_bytes

pytestmark = pytest.mark.engine

# Each example talks to a process: what it takes says nothing about the test.
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

PATHS = {
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Say hi."}]},
        ],
        "max_tokens": 1,
        "stream": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "n": 1,
        "stop": ["x"],
        "logprobs": True,
        "top_logprobs": 1,
        "logit_bias": {"5": 1},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}},
        },
        "stream_options": None,
        "user": "u",
    },
    "/openai/v1/chat/completions": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Weather?"}],
        "max_completion_tokens": 1,
        "tools": [
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    },
    "/v1/completions": {
        "model": MODEL,
        "prompt": ["One", "Two"],
        "max_tokens": 1,
        "logprobs": 1,
        "top_k": 3,
        "min_p": 0.1,
    },
    "/v1/responses": {
        "model": MODEL,
        "input": [{"role": "user", "content": "Say hi."}],
        "max_output_tokens": 1,
        "instructions": "Be brief.",
    },
    "/v1/embeddings": {"model": MODEL, "input": "hello"},
}

LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [
            *(0, -1, 1, 2**31 - 1, 2**31, 2**63, -(2**64), 10**40, 1e308, -1e-300, 0.1, 1.5),
            *("", "\0", "\ufffd", "é" * 300, "x" * 5000, "null", "-1", " ", "<|im_end|>"),
            *([], {}, [[]], [None], [{}], {"": None}, {"type": "object"}, [[1, 2], [3]]),
        ]
    ),
    st.text(max_size=20),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=6,
    ),
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document where something can be changed."""
    found = [path] if path else []
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in entries:
        found += places(value, (*path, key)) if isinstance(value, dict | list) else [(*path, key)]
    return found


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, Any]:
    """A good request with up to three things wrong with it."""
    path = draw(st.sampled_from(sorted(PATHS)))
    document: Any = copy.deepcopy(PATHS[path])
    for _ in range(draw(st.integers(1, 3))):
        spots = places(document)
        if not spots:
            break
        *outer, last = draw(st.sampled_from(spots))
        holder = document
        for key in outer:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "delete", "add"]))
        if how == "replace":
            holder[last] = copy.deepcopy(draw(ODD))
        elif how == "delete":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = copy.deepcopy(draw(ODD))
        else:
            holder.append(copy.deepcopy(draw(ODD)))
    limits = [document.get(name) for name in LIMITS if document.get(name) is not None]
    if limits in ([], [2**31 - 1]):
        document["stream"] = True  # it may be right, and long: the head comes with the first token
    return path, document


def check(answer: Answer) -> None:
    assert answer.status in (200, 400, 401, 403, 404, 405, 408, 413, 415, 431), answer
    if answer.status != 200:
        assert answer.error["type"] in ("invalid_request_error", "permission_error")


def ask(running: Running, request: bytes) -> Answer:
    """Send it, and read no more of a long answer than its head."""
    with Client(running.address, timeout_s=30) as client:
        client.send(request)
        answer = client.head()
        if answer.status != 200:
            answer.body = client._exactly(int(answer.headers["content-length"]))
        return answer


@FUZZ
@given(request_=mutated())
def test_requests_that_are_not_quite_right(
    live_gateway: Running, request_: tuple[str, Any]
) -> None:
    path, document = request_
    check(ask(live_gateway, request_bytes(json.dumps(document).encode(), path)))


@FUZZ
@given(st.sampled_from(sorted(PATHS)), st.binary(max_size=200), st.integers(0, 400))
def test_bodies_that_are_no_json(live_gateway: Running, path: str, junk: bytes, at: int) -> None:
    whole = json.dumps(PATHS[path]).encode()
    check(ask(live_gateway, request_bytes(whole[:at] + junk + whole[at + len(junk) :], path)))
    check(ask(live_gateway, request_bytes(junk, path)))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"model":' * 50_000,
        b'{"metadata":' + b"[" * 900 + b"]" * 900 + b"}",
        b'\xef\xbb\xbf{"model":"x"}',
        b'{"model":"\xff\xfe"}',
        b'{"model":"\\ud800"}',
        b'{"model":"a","model":"b"}',
        b"\x00" * 1000,
        b" " * 1_000_000,
        b'{"model":NaN}',
        b'{"temperature":1e400}',
    ],
    ids=lambda body: repr(body[:16]),
)
@pytest.mark.parametrize("path", sorted(PATHS))
def test_bodies_known_to_break_parsers(live_gateway: Running, path: str, body: bytes) -> None:
    answer = ask(live_gateway, request_bytes(body, path))
    # A model that isn't there is said first: which fields there are depends on its engines.
    assert answer.status == (404 if body.startswith(b'{"model":"a"') else 400)
    assert answer.error


GOOD = request_bytes(PATHS["/v1/embeddings"], "/v1/embeddings")


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(max_size=8)), max_size=4))
def test_messages_that_are_not_quite_http(
    live_gateway: Running, edits: list[tuple[int, bytes]]
) -> None:
    message = GOOD
    for at, junk in edits:
        message = message[:at] + junk + message[at + len(junk) :]
    with Client(live_gateway.address, timeout_s=30) as client:
        client.send(message)
        client.socket.shutdown(1)  # whoever waits for more of it learns that no more comes
        # A truncated message has nobody left to answer.
        with suppress(EOFError, ConnectionResetError):
            check(client.answer())
    assert exchange(live_gateway.address, b"GET /health HTTP/1.0\r\n\r\n").status == 200


@FUZZ
@given(st.binary(min_size=1, max_size=300))
def test_bytes(live_gateway: Running, junk: bytes) -> None:
    with Client(live_gateway.address, timeout_s=30) as client:
        client.send(junk + b"\r\n\r\n")
        client.socket.shutdown(1)
        with suppress(EOFError, ConnectionResetError):
            check(client.answer())


@FUZZ
@given(st.lists(mutated(), min_size=2, max_size=5), st.data())
def test_pipelined_and_torn_requests(
    live_gateway: Running, requests: list[tuple[str, Any]], data: st.DataObject
) -> None:
    short = [{**document, "model": "none"} for _, document in requests]
    stream = b"".join(
        request_bytes(document, path) for document, (path, _) in zip(short, requests, strict=True)
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=3)))
    with Client(live_gateway.address, timeout_s=30) as client:
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            client.send(stream[start:stop])
        for _ in requests:
            answer = client.answer()
            check(answer)
            assert answer.status in (400, 404)


def test_the_engine_never_died_of_it(live_gateway: Running) -> None:
    """Last in this file: after all of the above it is still the first process."""
    assert live_gateway.figures()["tokenworks_engine_restarts_total"] == 0
