"""The parts without sockets: framing, heads, tool calls, requests."""

import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenworks.gateway import framing
from tokenworks.gateway.address import socket_folder, socket_in
from tokenworks.gateway.heads import KnownHead
from tokenworks.gateway.intake import Intake
from tokenworks.gateway.problem import Problem
from tokenworks.gateway.schema import ChatRequest
from tokenworks.gateway.tools import Emulation
from tokenworks.gateway.traits import EMBEDDED, REMOTE
from tokenworks.gateway.upstream import is_plain

SIZES = st.lists(st.integers(0, 400), max_size=30)


def torn(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=10), SIZES)
def test_chunks_decode_however_they_are_torn(payloads: list[bytes], sizes: list[int]) -> None:
    wire = b"".join(framing.chunk(payload) for payload in payloads)
    wire += b"0\r\nx-trailer: 1\r\n\r\n"
    decoder = framing.Chunked()
    found = b""
    for piece in torn(wire, sizes):
        assert not decoder.done or not piece
        found += decoder.feed(piece)
    assert found == b"".join(payloads)
    assert decoder.done
    assert not decoder.between


@given(st.binary(max_size=60), SIZES)
def test_junk_is_an_error_or_no_end(junk: bytes, sizes: list[int]) -> None:
    decoder = framing.Chunked()
    try:
        for piece in torn(junk, sizes):
            decoder.feed(piece)
    except framing.FramingError:
        return
    assert decoder.done == (b"0\r\n" in junk and decoder.done)


@pytest.mark.parametrize("size", [b"-5", b"+5", b"0x5", b"5_0", b"", b" ", b"g"])
def test_what_int_takes_but_http_does_not(size: bytes) -> None:
    with pytest.raises(framing.FramingError):
        framing.Chunked().feed(size + b"\r\nhello\r\n")


def head(length: str, more: str = "") -> bytes:
    return f"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def test_a_known_head_is_known_with_another_length() -> None:
    known: KnownHead[str] = KnownHead()
    body = 12 * b"x"
    known.learn(head("12") + body, 12, "meaning")
    assert known.find(head("12") + body) == ("meaning", body)
    assert known.find(head("4") + b"more") == ("meaning", b"more")
    for other in (
        head("12", "X: y\r\n"),
        head("12").replace(b"/x", b"/y"),
        head("+12"),
        head("1 2"),
        head(""),
        head("9" * 12),
        head("12")[:-2],
        b"",
        b"\r\n\r\n",
        head("11"),  # something follows
        head("13"),  # not all is there
    ):
        assert known.find(other + body) is None


@pytest.mark.parametrize(
    "odd",
    [
        head("12", "content-length: 12\r\n"),  # twice
        head("12", "X-Content-Length: 12\r\n"),
        head("13"),  # not what the parser read
        b"POST /x HTTP/1.1\r\nContent-length: 12\r\n\r\n",  # another spelling
        head("12", "X: " + "y" * 9000 + "\r\n"),
    ],
)
def test_an_odd_head_is_never_learnt(odd: bytes) -> None:
    known: KnownHead[str] = KnownHead()
    known.learn(odd, 12, "meaning")
    assert known.find(odd + 12 * b"x") is None


def chat(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "hi"}]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def test_a_request_goes_on_as_it_came() -> None:
    body = chat(seed=12345678901234567890 // 10, temperature=0.30000000000000004)
    assert Intake(REMOTE).call("chat/completions", body).body == body


@given(
    st.sampled_from([None, {}, {"include_usage": False}, {"include_usage": True}]),
    st.sampled_from(["", " ", "\n\t"]),
)
def test_usage_is_asked_for_exactly_once(options: dict[str, Any] | None, space: str) -> None:
    body = space.encode() + chat(stream=True, stream_options=options)
    sent = Intake(REMOTE).call("chat/completions", body).body
    assert sent.count(b'"stream_options"') == 1
    assert json.loads(sent)["stream_options"]["include_usage"] is True
    assert json.loads(sent)["messages"] == json.loads(body)["messages"]


def test_a_text_that_names_the_field_is_no_field() -> None:
    messages = [{"role": "user", "content": 'say "stream_options": null'}]
    body = json.dumps({"model": "m", "messages": messages, "stream": True}).encode()
    sent = json.loads(Intake(REMOTE).call("chat/completions", body).body)
    assert sent["stream_options"] == {"include_usage": True}
    assert sent["messages"] == messages


def test_fields_can_be_let_through_by_name() -> None:
    body = chat(brand_new=1)
    with pytest.raises(Problem, match="Unknown field 'brand_new'"):
        Intake(REMOTE).call("chat/completions", body)
    assert Intake(REMOTE, ["brand_new"]).call("chat/completions", body).body == body


def emulation(choice: Any = None) -> Emulation:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = chat(tools=[tool], tool_choice=choice)
    return Emulation(msgspec.json.decode(body, type=ChatRequest))


def stream_of(text: str, sizes: list[int], reason: str = "stop") -> list[dict[str, Any]]:
    """What the client sees of a stream in which the engine writes `text`."""
    tools = emulation()
    found = []
    for piece in torn_text(text, sizes):
        chunk = {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
        found += tools.event(chunk)
    found += tools.event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    return [event["choices"][0] for event in found]


def torn_text(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
SMALL = st.lists(st.integers(0, 9), max_size=40)


@given(st.dictionaries(st.text(max_size=5), JSON), SMALL, st.booleans())
def test_a_call_streams_whole_however_it_is_torn(
    arguments: dict[str, Any], sizes: list[int], ascii_only: bool
) -> None:
    text = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=ascii_only)
    choices = stream_of(text, sizes)
    calls = [c["delta"]["tool_calls"][0] for c in choices if "tool_calls" in c["delta"]]
    assert calls[0]["function"]["name"] == "f"
    assert calls[0]["id"].startswith("call_")
    assert json.loads("".join(c["function"]["arguments"] for c in calls)) == arguments
    assert choices[-1]["finish_reason"] == "tool_calls"


@given(st.text(max_size=40), SMALL, st.booleans())
def test_a_text_streams_whole_however_it_is_torn(
    said: str, sizes: list[int], ascii_only: bool
) -> None:
    text = json.dumps({"content": said}, ensure_ascii=ascii_only)
    choices = stream_of(text, sizes)
    assert "".join(c["delta"].get("content", "") for c in choices) == said
    assert choices[-1]["finish_reason"] == "stop"


def test_a_call_cut_off_keeps_every_brace_it_has() -> None:
    choices = stream_of('{"name":"f","arguments":{"a":{"b":1}', [5, 5, 9], reason="length")
    calls = [c["delta"]["tool_calls"][0] for c in choices if "tool_calls" in c["delta"]]
    assert "".join(c["function"]["arguments"] for c in calls) == '{"a":{"b":1}'
    assert choices[-1]["finish_reason"] == "length"


def test_what_can_not_go_with_tools_is_told() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    for fields, param in (
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ):
        intake = Intake(EMBEDDED.for_model(native_tools=False, is_embedder=False))
        with pytest.raises(Problem) as caught:
            intake.call("chat/completions", chat(tools=[tool], **fields))
        assert caught.value.param == param


def test_half_a_surrogate_pair_silences_nothing() -> None:
    for text in (
        r"hi \ud83d there",
        r"hi \udc00 there",
        r"hi \ud83d\u0041 there",
        r"hi \ud83d\n there",
    ):
        for sizes in ([], [1] * 60):
            choices = stream_of('{"content": "' + text + '"}', sizes)
            said = "".join(c["delta"].get("content", "") for c in choices)
            assert said.startswith("hi \N{REPLACEMENT CHARACTER}")
            assert said.endswith(" there")


@pytest.mark.parametrize(
    ("events", "is_well"),
    [
        ([b'data: {"choices":[]}'], True),
        ([b'data: {"choices":[]}', b'data: {"choices":[1]}'], True),
        ([b'data: {"cho', b'data: {"choices":[]}'], False),  # the broken one comes first
        ([b'data: {"error":{"code":500}}', b'data: {"choices":[]}'], False),
        ([b'data: {"choices":[],"usage":{}}'], False),
        ([b"data: [DONE]"], False),
    ],
)
def test_what_is_forwarded_unread_is_whole_events(events: list[bytes], is_well: bool) -> None:
    whole = [event + b"\n\n" for event in events]
    assert is_plain(framing.chunk(b"".join(whole))) is is_well
    assert is_plain(b"".join(map(framing.chunk, whole))) is is_well


@pytest.mark.parametrize("place", ["t", "t" * 100])
def test_socket_files_can_be_bound_wherever_temporary_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / place).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / place))
    with socket_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_in(folder, "a pool / of a very long name " * 9))
        assert len(list(folder.iterdir())) == 1
    assert not folder.exists()
