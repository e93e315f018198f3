"""The relay against an engine that cuts, bends and breaks its streams."""

import json
import time
from typing import Any

import pytest

from tests.gateway.scripted import USAGE, ScriptedEngine
from tests.support import Client, Running, exchange, request_bytes, wait_for


def ask(scene: str, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": scene}], **fields}


def openais(usage: dict[str, Any]) -> dict[str, Any]:
    """Without what the gateway adds: the receipt."""
    return {name: usage[name] for name in USAGE}


STREAM: dict[str, Any] = {"stream": True}
WITH_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        ("good", "one two three"),
        ("bytewise", "one two thré "),
        ("uneven", "one two three"),
        ("by_length", "one two"),
        ("until_close", "one two"),
        ("crlf_events", "one two"),
        ("null_usage", "one two"),
        ("usage_with_choice", "one two"),
    ],
)
@pytest.mark.parametrize("options", [STREAM, WITH_USAGE], ids=["without usage", "with usage"])
def test_any_way_of_cutting_a_stream_gives_the_same_text(
    relay: Running, scene: str, text: str, options: dict[str, Any]
) -> None:
    answer = relay.post(ask(scene, **options))
    assert answer.status == 200
    events: list[Any] = [
        json.loads(line[6:]) if line[6:] != "[DONE]" else line[6:]
        for line in answer.body.decode().splitlines()
        if line.startswith("data: ")
    ]
    chunks = [e["choices"][0]["delta"] for e in events if e != "[DONE]" and e["choices"]]
    assert "".join(c.get("content", "") for c in chunks) == text
    assert events[-1] == "[DONE]"
    usages = [e["usage"] for e in events if e != "[DONE]" and e.get("usage")]
    assert [openais(usage) for usage in usages] == ([USAGE] if options is WITH_USAGE else [])


def test_usage_is_always_asked_of_the_engine(
    relay: Running, scripted_engine: ScriptedEngine
) -> None:
    for options in (STREAM, WITH_USAGE, {"stream": True, "stream_options": None}):
        relay.post(ask("good", **options))
        assert scripted_engine.seen[-1]["stream_options"]["include_usage"] is True
    relay.post(ask("good"))
    assert "stream_options" not in scripted_engine.seen[-1]


def test_text_that_looks_like_the_tail_is_only_text(relay: Running) -> None:
    answer = relay.post(ask("talks_of_usage", **STREAM))
    assert answer.text == '{"usage":{"a":1}}data: [DONE]\n\n"usage":"usage"'
    assert not [e for e in answer.events if e != "[DONE]" and "usage" in e]


def test_whole_answers_pass_unchanged(relay: Running) -> None:
    answer = relay.post(ask("good"))
    assert answer.json["choices"][0]["message"]["content"] == "one two three"
    assert openais(answer.json["usage"]) == USAGE
    assert answer.headers["x-request-id"].startswith("req_")


def test_http_1_0_gets_a_stream_without_chunks_that_ends_with_the_connection(
    relay: Running,
) -> None:
    request = request_bytes(ask("good", **STREAM)).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    answer = exchange(relay.address, request)
    assert "transfer-encoding" not in answer.headers
    assert answer.text == "one two three"


def test_an_answer_that_is_nonsense_still_ends(relay: Running) -> None:
    for options in (STREAM, WITH_USAGE):
        answer = relay.post(ask("nonsense", **options))
        assert answer.status == 200
        assert answer.events
    wait_for(lambda: relay.working() == 0)


@pytest.mark.parametrize("scene", ["dies", "bad_chunk"])
def test_an_engine_that_breaks_in_mid_stream_is_seen_by_the_client(
    relay: Running, scene: str
) -> None:
    with Client(relay.address) as client:
        client.send(request_bytes(ask(scene, **STREAM)))
        answer = client.answer()  # the framing is whole: no client waits for more
        assert answer.status == 200
        error = answer.events[-1]["error"]
        assert error["code"] == "not_resumable"
        assert answer.text in ("one", "one two")  # whole events only
        assert "[DONE]" not in answer.events
        assert client.ended()


@pytest.mark.parametrize("scene", ["dies_silently", "babbles"])
def test_an_engine_that_never_answers_is_a_502(relay: Running, scene: str) -> None:
    for options in ({}, STREAM):
        answer = relay.post(ask(scene, **options))
        assert answer.status == 502
        assert answer.error["code"] == "engine_lost"


def test_an_engines_refusal_comes_in_openais_shape(relay: Running) -> None:
    answer = relay.post(ask("refuses", **STREAM))
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded"
    answer = relay.post(ask("fails"))
    assert answer.status == 502
    assert "boom" in answer.error["message"]


@pytest.mark.parametrize("scene", ["waits", "drips"])
def test_a_client_that_hangs_up_frees_the_engine(
    relay: Running, scripted_engine: ScriptedEngine, scene: str
) -> None:
    for options in (STREAM,) if scene == "drips" else (STREAM, {}):
        before = scripted_engine.hung_up
        with Client(relay.address) as client:
            client.send(request_bytes(ask(scene, **options)))
            wait_for(lambda: scripted_engine.open == 1)
            if scene == "drips":
                client.head()
        wait_for(lambda: scripted_engine.open == 0)
        assert scripted_engine.hung_up == before + 1
        wait_for(lambda: relay.working() == 0)


def test_clients_that_stop_reading_cost_no_memory(relay: Running) -> None:
    for _ in range(12_000):  # the ledger keeps its last rows at hand
        relay.post(ask("good"))
    before = relay.memory_bytes()
    clients = [Client(relay.address) for _ in range(20)]
    try:
        for client in clients:
            client.send(request_bytes(ask("floods", **STREAM)))
            assert client.head().status == 200
        # Long enough for a relay without back-pressure to take all 20 x 64 MB.
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert relay.post(ask("good", **STREAM)).text == "one two three"
        # A megabyte each: what was said is kept, in case the engine dies.
        assert relay.memory_bytes() - before < 24e6
        # And nothing is lost for whoever reads on.
        text = b"".join(clients[0].chunks())
        assert text.count(b'"content":"x') == 64_000
        assert text.endswith(b"data: [DONE]\n\n")
    finally:
        for client in clients:
            client.socket.close()
    wait_for(lambda: relay.working() == 0)


def test_requests_in_one_packet_are_answered_in_their_order(relay: Running) -> None:
    requests = [
        request_bytes(ask("good", **STREAM)),
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n",
        request_bytes(ask("good")),
        request_bytes(b"{}"),
        b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n",
        request_bytes(ask("good", **STREAM)),
    ]
    with Client(relay.address) as client:
        client.send(b"".join(requests))
        answers = [client.answer() for _ in requests]
    assert [a.status for a in answers] == [200, 200, 200, 400, 404, 200]
    assert answers[0].text == answers[5].text == "one two three"
    assert answers[1].json["data"][0]["id"] == "scripted"


def test_a_broken_request_does_not_harm_those_before_it(relay: Running) -> None:
    with Client(relay.address) as client:
        client.send(request_bytes(ask("good", **STREAM)) * 2 + b"rubbish\r\n\r\n")
        assert [client.answer().text for _ in range(2)] == ["one two three"] * 2
        last = client.answer()
        assert last.status == 400
        assert last.error["code"] == "invalid_http"
        assert client.ended()


def test_a_kept_connection_that_the_engine_closed_is_no_error(
    relay: Running, scripted_engine: ScriptedEngine
) -> None:
    # The engine closes the connection when it sees this, just as the gateway takes it again.
    for _ in range(5):
        assert relay.post(ask("good")).status == 200
        assert relay.post(ask("until_close", **STREAM)).text == "one two"


def test_the_socket_of_the_client_is_kept(relay: Running) -> None:
    with Client(relay.address) as client:
        for options in (STREAM, {}, WITH_USAGE):
            client.send(request_bytes(ask("good", **options)))
            assert client.answer().status == 200


def test_a_reader_that_stalls_at_the_end_does_no_harm_to_the_next(relay: Running) -> None:
    """The engine's connection goes back to the pool reading, whatever its last client did."""
    for _ in range(3):
        with Client(relay.address) as slow:
            slow.send(request_bytes(ask("large", **STREAM)))
            slow.head()
            time.sleep(0.3)
            for _ in range(3):
                assert relay.post(ask("good", **STREAM)).text == "one two three"
            assert b"".join(slow.chunks()).endswith(b"data: [DONE]\n\n")


def test_back_pressure_holds_for_a_request_behind_an_unread_answer(
    relay: Running, scripted_engine: ScriptedEngine
) -> None:
    before = relay.memory_bytes()
    with Client(relay.address) as client:
        client.send(request_bytes(ask("large", **STREAM)) + request_bytes(ask("floods", **STREAM)))
        time.sleep(2)
        assert relay.memory_bytes() - before < 16e6
    wait_for(lambda: scripted_engine.open == 0)


def test_a_thousand_refusals_in_one_packet_are_answered(relay: Running) -> None:
    with Client(relay.address) as client:
        client.send(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" + request_bytes(b"{") * 1000)
        assert client.answer().status == 200
        assert {client.answer().status for _ in range(1000)} == {400}
        client.send(request_bytes(ask("good")))
        assert client.answer().status == 200


def test_a_pipelining_client_that_hangs_up_is_noticed(
    relay: Running, scripted_engine: ScriptedEngine
) -> None:
    with Client(relay.address) as client:
        client.send(request_bytes(ask("waits")) * 2)
        wait_for(lambda: scripted_engine.open == 1)
    wait_for(lambda: scripted_engine.open == 0)
    wait_for(lambda: relay.working() == 0)


def test_a_cut_answer_without_length_is_no_answer(relay: Running) -> None:
    answer = relay.post(ask("cut_short"))
    assert answer.status == 502
    assert answer.error["code"] == "engine_lost"
