"""Requests made fit for each kind of engine, and answers carried on: no sockets."""

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.scripted import event
from tests.support import MODEL, Running
from tokenworks.gateway import adapter, resume, traits
from tokenworks.gateway.adapter import minds, named, rank, scrub, unable, warning
from tokenworks.gateway.intake import Intake, Route
from tokenworks.gateway.resume import can_continue, continued, left, said
from tokenworks.gateway.schema import ChatRequest, CompletionRequest
from tokenworks.gateway.traits import KINDS, Traits

CHAT: Route = "chat/completions"
TEXT: Route = "completions"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
ALL = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
PAGE = (Path(__file__).parents[2] / "docs/adapters.md").read_text()


def body(**more: Any) -> bytes:
    return json.dumps({**HELLO, **more}).encode()


def names_of(document: bytes, route: Route = CHAT) -> frozenset[str]:
    return named(Intake(KINDS["openai"], ["brand_new"])._decode(route, document))


def prepare(kind: Traits, document: bytes, **more: Any) -> tuple[bytes, list[str]]:
    return adapter.prepare(kind, CHAT, document, names_of(document), **more)


# What is refused


@pytest.mark.parametrize(
    ("kind", "more", "name"),
    [
        ("groq", {"logprobs": True}, "logprobs"),
        ("groq", {"n": 2}, "n"),
        ("groq", {"stop": list("abcde")}, "stop"),
        ("groq", {"top_k": 5}, "top_k"),
        ("groq", {"frequency_penalty": 0.5}, "frequency_penalty"),
        ("trtllm", {"continue_final_message": True}, "continue_final_message"),
        ("vllm", {"guided_json": {}, "grammar": "root ::= .*"}, "grammar"),
        ("vllm", {"kv_transfer_params": {"remote_host": "10.0.0.1"}}, "kv_transfer_params"),
        ("sglang", {"store": True}, "store"),
        ("llamacpp", {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ("emulated", {"response_format": {"type": "json_object"}}, "response_format"),
        ("embedded", {"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(
    kind: str, more: dict[str, Any], name: str
) -> None:
    document = {**HELLO, **more}
    reason = unable(KINDS[kind], CHAT, document)
    assert reason is not None
    assert reason.startswith(f"{name} is not supported here: ")
    assert minds(KINDS[kind], CHAT, names_of(json.dumps(document).encode()))
    assert unable(KINDS["openai"], CHAT, document) is None


@ALL
def test_a_field_that_asks_for_nothing_is_no_reason(kind: Traits) -> None:
    empty = {"logprobs": False, "n": 1, "store": None, "top_k": None, "stop": ["a"], "tools": []}
    assert unable(kind, CHAT, {**HELLO, **empty, "response_format": {"type": "text"}}) is None


def test_a_route_that_is_not_there() -> None:
    document = {"model": "m", "prompt": "Hello"}
    assert "/v1/completions is not available here" in str(unable(KINDS["groq"], TEXT, document))
    assert minds(KINDS["groq"], TEXT, frozenset())
    assert unable(KINDS["vllm"], TEXT, document) is None


def test_a_field_that_is_refused_on_one_route_only() -> None:
    asked = {"model": "m", "prompt": {"id": "p"}}
    assert "prompt is not supported" in str(unable(KINDS["llamacpp"], "responses", asked))
    assert unable(KINDS["llamacpp"], TEXT, {"model": "m", "prompt": "Hello"}) is None


def test_a_part_the_engine_does_not_read() -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {}}]
    document = {"model": "m", "messages": [{"role": "user", "content": parts}]}
    assert "'image_url'" in str(unable(KINDS["embedded"], CHAT, document))
    assert minds(KINDS["embedded"], CHAT, names_of(json.dumps(document).encode()))
    assert unable(KINDS["vllm"], CHAT, document) is None


def test_what_the_operator_let_in_passes() -> None:
    assert unable(KINDS["groq"], CHAT, {**HELLO, "brand_new": 1}) is None
    wider = KINDS["groq"].extra_fields | {"top_k"}
    allowed = msgspec.structs.replace(KINDS["groq"], extra_fields=wider)
    assert unable(allowed, CHAT, {**HELLO, "top_k": 3}) is None
    assert unable(KINDS["groq"], CHAT, {**HELLO, "top_k": 3}) is not None


def test_what_requests_of_each_route_name() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"},
        {"role": "assistant", "content": "Hello", "refusal": "no"},
    ]
    options = {"include_usage": True, "include_obfuscation": False}
    asked = {"model": "m", "messages": messages, "stream": True, "stream_options": options, "n": 1}
    inside = {"name", "refusal", "content.text", "include_obfuscation"}
    assert names_of(json.dumps(asked).encode()) == inside | {"n"}
    assert names_of(b'{"model":"m","prompt":"a","top_k":3,"brand_new":1}', TEXT) == {
        "prompt",
        "top_k",
    }
    assert names_of(b'{"model":"m","input":"a","dimensions":3}', "embeddings") == {"dimensions"}
    assert names_of(b'{"model":"m","input":"a"}', "embeddings") == set()
    assert names_of(b'{"model":"m","input":"a","store":false}', "responses") == {"store"}


# What is left out


def test_groq_gets_neither_names_nor_labels() -> None:
    messages = [
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": "Hello", "refusal": None, "annotations": []},
        {"role": "user", "content": "Bye"},
    ]
    asked = {
        "model": "m",
        "messages": messages,
        "metadata": {"a": "b"},
        "store": False,
        "top_k": None,
        "service_tier": "auto",
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }
    before = json.dumps(asked)
    made, names = scrub(KINDS["groq"], asked)
    assert names == ["messages[].name", "metadata"]
    assert made == {
        "model": "m",
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
        ],
        "stream_options": {"include_usage": True},
    }
    assert json.dumps(asked) == before
    assert warning(names) == (
        b"x-tokenworks-warning: ignored by the engine: messages[].name, metadata\r\n"
    )
    assert warning([]) == b""


@ALL
def test_no_engine_is_told_the_clients_tier_or_urgency(kind: Traits) -> None:
    made, names = prepare(kind, body(service_tier="auto", priority=-100))
    assert json.loads(made) == HELLO
    assert names == ["priority"]


@ALL
def test_a_plain_request_goes_through_as_it_came(kind: Traits) -> None:
    plain = body(stream=True, temperature=0.5, max_tokens=9, stream_options={"include_usage": True})
    if kind.kind == "lpu":  # it says the likeliest token, whatever the temperature
        assert prepare(kind, plain)[1] == ["temperature"]
        return
    assert prepare(kind, plain) == (plain, [])
    assert not minds(kind, CHAT, names_of(plain))


def test_a_null_is_taken_off_where_it_would_be_answered_with_400() -> None:
    nulls = body(metadata=None, grammar=None, max_tokens=None)
    assert json.loads(prepare(KINDS["trtllm"], nulls)[0]) == {**HELLO, "max_tokens": None}
    assert prepare(KINDS["trtllm"], nulls)[1] == []
    assert prepare(KINDS["vllm"], nulls) == (nulls, [])


def test_a_name_written_with_escapes_is_found() -> None:
    made, _ = prepare(KINDS["vllm"], body()[:-1] + rb',"\u0073ervice_tier":"auto"}')
    assert json.loads(made) == HELLO


SOME = st.one_of(st.none(), st.booleans(), st.integers(0, 9), st.just({"type": "x"}), st.just([1]))
NAMES = sorted({*ChatRequest.__struct_fields__, *KINDS["openai"].extra_fields} - {"messages"})


@given(st.sampled_from(list(KINDS.values())), st.dictionaries(st.sampled_from(NAMES), SOME))
def test_scrubbing_is_all_that_stands_between_a_request_and_its_engine(
    kind: Traits, more: dict[str, Any]
) -> None:
    document = {**HELLO, **more}
    made, names = scrub(kind, document)
    assert scrub(kind, made) == (made, [])
    assert unable(kind, CHAT, made) == unable(kind, CHAT, document)
    assert made.items() <= document.items() or names or "stream_options" in more
    if not minds(kind, CHAT, frozenset(n for n, value in document.items() if value is not None)):
        assert (names, unable(kind, CHAT, document)) == ([], None)
        assert {n: v for n, v in document.items() if v is not None}.items() <= made.items()


# What is added


def test_the_engines_own_name_for_the_model() -> None:
    made, names = prepare(KINDS["vllm"], body(seed=2**63 - 1), model="meta/llama")
    assert json.loads(made) == {**HELLO, "seed": 2**63 - 1, "model": "meta/llama"}
    assert names == []


@pytest.mark.parametrize(
    ("kind", "service_class", "tier"),
    [
        ("groq", "realtime", "performance"),
        ("groq", "batch", "flex"),
        ("groq", None, None),
        ("vllm", "realtime", None),
    ],
)
def test_the_tier_of_a_class(kind: str, service_class: str | None, tier: str | None) -> None:
    asked = body(service_tier="auto")
    made, _ = prepare(KINDS[kind], asked, service_class=service_class)
    assert json.loads(made).get("service_tier") == tier


@ALL
def test_more_urgent_goes_first_in_each_engines_own_way(kind: Traits) -> None:
    if kind.priority is None:
        assert prepare(kind, body(), urgency=2) == (body(), [])
        return
    values = [rank(kind.priority, urgency) for urgency in range(-2, 5)]
    assert values == sorted(values, reverse=not kind.priority.low_first)
    assert len(set(values)) == len(values)
    if kind.priority.is_share:
        assert rank(kind.priority, 0) == 0.5
        assert all(0 < value < 1 for value in values)
    found: Any = json.loads(prepare(kind, body(), urgency=2)[0])
    for key in kind.priority.field.split("."):
        found = found[key]
    assert found == rank(kind.priority, 2)


# What was said


def sse(*documents: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(document).encode() + b"\n\n" for document in documents)


def test_what_a_stream_has_said() -> None:
    opening = event("", id="chatcmpl-7", created=5, model="llama").replace(
        b'"content"', b'"role":"assistant","content"'
    )
    raw = opening + event("Once") + b": ping\r\n\r\n" + event(" upon").replace(b"\n", b"\r\n")
    found = said(raw + event(" a")[:-3], CHAT)
    assert (found.text, found.tokens) == ("Once upon", 2)
    assert (found.id, found.model, found.created) == ("chatcmpl-7", "llama", 5)
    assert (found.role_sent, found.choices, found.finish_reason) == (True, 1, None)
    assert found.stuck is None


def test_usage_knows_tokens_better_than_events_do() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
    assert said(event("Once upon a time") + event("!", usage=usage), CHAT).tokens == 7
    assert said(event("Once") + event(" upon", usage=None), CHAT).tokens == 2


def test_how_a_stream_has_ended() -> None:
    assert said(event("Hi") + event(), CHAT).finish_reason == "stop"
    assert said(event("Hi") + event() + b"data: [DONE]\n\n", CHAT).is_done
    given_up = sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]})
    assert said(event("Hi") + given_up, CHAT).finish_reason is None
    assert said(event("Hi") + sse({"error": {"message": "boom"}}), CHAT).has_error


def test_what_can_not_be_said_again() -> None:
    calls = {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0}]}}]}
    assert "tool call" in str(said(sse(calls), CHAT).stuck)
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": "Hm"}}]}
    found = said(sse(thought), CHAT)
    assert "reasoned" in str(found.stuck)
    assert (found.text, found.tokens) == ("", 1)
    second = {"choices": [{"index": 1, "delta": {"content": "B"}}]}
    assert "choices" in str(said(event("A") + sse(second), CHAT).stuck)


def test_the_other_routes() -> None:
    chunks = sse({"id": "cmpl-1", "choices": [{"index": 0, "text": "Once"}]})
    assert said(chunks, TEXT).text == "Once"
    steps = sse(
        {"type": "response.output_text.delta", "delta": "Once"},
        {"type": "response.output_text.delta", "delta": " upon"},
        {"type": "response.completed", "response": {"usage": {"output_tokens": 4}}},
    )
    assert said(steps, "responses").text == "Once upon"
    assert said(steps, "responses").tokens == 4


@given(st.integers(0, 400), st.binary(max_size=40), st.sampled_from(get_args(Route)))
def test_a_broken_stream_is_read_as_far_as_it_goes(at: int, junk: bytes, route: Route) -> None:
    whole = event("Once") + event(" upon") + event(" a") + event()
    found = said(whole[:at] + junk + whole[at:], route)
    if route == CHAT:
        assert found.text.startswith(said(whole[:at], CHAT).text)


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"[]",
        b"3",
        b'{"choices":3}',
        b'{"choices":[3]}',
        b'{"choices":[{"index":"a","delta":3}]}',
        b'{"choices":[{"delta":{"content":[]}}],"id":4,"created":"x"}',
        b'{"usage":{"completion_tokens":"many"}}',
        b'{"usage":[],"response":{"usage":3}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("route", [CHAT, TEXT, "responses"])
def test_malformed_events_are_passed_over(payload: bytes, route: Route) -> None:
    found = said(event("Once") + b"data: " + payload + b"\n\n" + event(" upon"), route)
    assert found.text == ("Once upon" if route == CHAT else "")


# Who can go on


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"grammar": "root ::= .*"}, "grammar"),
        ({"logprobs": True}, "logprobs"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"n": 2}, "several choices"),
    ],
)
def test_what_can_not_be_carried_on(more: dict[str, Any], reason: str) -> None:
    for kind in KINDS.values():
        if kind.continuation is not None:
            assert reason in str(can_continue(kind, CHAT, {**HELLO, **more}))


def test_what_can_be_carried_on() -> None:
    goes_on = {name for name, kind in KINDS.items() if can_continue(kind, CHAT, HELLO) is None}
    assert goes_on == set(KINDS) - {"trtllm", "openai"}
    quiet = {"tools": [{}], "tool_choice": "none", "response_format": {"type": "text"}, "n": 1}
    assert can_continue(KINDS["vllm"], CHAT, {**HELLO, **quiet, "logprobs": False}) is None
    like_vllm = KINDS["openai"].carried_on_like(KINDS["vllm"])
    assert can_continue(like_vllm, CHAT, HELLO) is None
    for route in ("responses", "embeddings"):
        assert route in str(can_continue(KINDS["vllm"], route, HELLO))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"prompt": ["a", "b"]}, "several prompts"),
        ({"prompt": [[1, 2]]}, "token ids"),
        ({"prompt": [1, 2]}, "token ids"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "logprobs": 0}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "several choices"),
        ({"prompt": "a"}, None),
        ({"prompt": ["a"]}, None),
    ],
)
def test_which_prompts_can_be_carried_on(more: dict[str, Any], reason: str | None) -> None:
    found = can_continue(KINDS["openai"], TEXT, {"model": "m", **more})
    assert found is None if reason is None else reason in str(found)


# How it goes on


def carried(kind: str, words: str = "Once upon", tokens: int = 2, **more: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(continued(CHAT, body(**more), KINDS[kind], words, tokens))
    return document


FLAGS: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.mark.parametrize(
    ("kind", "flags"), [("vllm", FLAGS), ("sglang", FLAGS), ("llamacpp", FLAGS), ("groq", {})]
)
def test_a_chat_goes_on_from_its_own_last_message(kind: str, flags: dict[str, Any]) -> None:
    said_so_far = {"role": "assistant", "content": "Once upon"}
    found = carried(kind, max_tokens=10, max_completion_tokens=5, seed=7, min_tokens=1)
    assert found == {
        "model": "m",
        "messages": [*HELLO["messages"], said_so_far],
        "max_tokens": 8,
        "max_completion_tokens": 3,
        "seed": 7,
        "min_tokens": 0,
        **flags,
    }


@pytest.mark.parametrize(
    ("content", "longer"),
    [
        ("It was: ", "It was: Once upon"),
        (None, "Once upon"),
        ([{"type": "text", "text": "It: "}], [{"type": "text", "text": "It: Once upon"}]),
        ([], [{"type": "text", "text": "Once upon"}]),
    ],
)
def test_an_answer_that_the_client_began_goes_on_in_the_same_message(
    content: Any, longer: Any
) -> None:
    messages = [*HELLO["messages"], {"role": "assistant", "content": content}]
    found = carried("vllm", messages=messages, **FLAGS)
    assert found["messages"] == [*HELLO["messages"], {"role": "assistant", "content": longer}]
    for kind in ("llamacpp", "groq"):  # they go on with such a message without being asked
        assert carried(kind, messages=messages)["messages"][1:] == found["messages"][1:]
    assert len(carried("vllm", messages=messages)["messages"]) == 3


def test_a_prompt_goes_on() -> None:
    asked = {"model": "m", "prompt": "Tell me: ", "max_tokens": 9}
    made = continued(TEXT, json.dumps(asked).encode(), KINDS["openai"], "Once", 1)
    assert json.loads(made) == {"model": "m", "prompt": "Tell me: Once", "max_tokens": 8}
    one = json.dumps({"model": "m", "prompt": ["Tell me: "], "max_tokens": None}).encode()
    made = continued(TEXT, one, KINDS["vllm"], "Once", 1)
    # 16 is what a vLLM says without being told.
    assert json.loads(made) == {"model": "m", "prompt": ["Tell me: Once"], "max_tokens": 15}


def test_nothing_said_is_nothing_changed() -> None:
    assert continued(CHAT, body(), KINDS["vllm"], "", 0) == body()


def test_an_answer_as_long_as_it_may_be_does_not_go_on() -> None:
    document = {**HELLO, "max_tokens": 4}
    assert left(KINDS["vllm"], CHAT, document, 3) == 1
    assert left(KINDS["vllm"], CHAT, document, 9) == 0
    assert left(KINDS["vllm"], CHAT, HELLO, 9) is None
    assert left(KINDS["vllm"], TEXT, {"prompt": "a"}, 9) == 7
    assert left(KINDS["llamacpp"], TEXT, {"prompt": "a"}, 9) is None
    with pytest.raises(ValueError, match="nothing is left"):
        continued(CHAT, body(max_tokens=4), KINDS["vllm"], "Once upon a time", 4)


@ALL
def test_what_goes_on_is_a_request_that_the_engine_takes(kind: Traits) -> None:
    if kind.continuation is None:
        return
    intake = Intake(kind)
    first = intake.call(CHAT, body(stream=True, max_tokens=9)).body
    again = continued(CHAT, first, kind, "Once", 1)
    kept = json.loads(again)
    assert unable(kind, CHAT, kept) is None
    assert kept["stream_options"] == {"include_usage": True}
    # And again from there, as after a second failure, from the first request.
    assert json.loads(continued(CHAT, first, kind, "Once upon", 2))["max_tokens"] == 7


@pytest.mark.engine
def test_llama_cpp_goes_on_where_it_stopped(live_gateway: Running) -> None:
    """Cut at a token's end, greedy text goes on as it would have; the stream repeats nothing."""
    asked = {"temperature": 0, "max_tokens": 24, "stream": True, "model": MODEL}
    question = [{"role": "user", "content": "Tell me a short story about a lighthouse."}]
    whole = live_gateway.post({**asked, "messages": question}).body
    events = whole.split(b"\n\n")
    part = said(b"\n\n".join(events[:10]) + b"\n\n", CHAT)
    first = json.dumps({**asked, "messages": question}).encode()
    rest = live_gateway.post(
        json.loads(continued(CHAT, first, KINDS["llamacpp"], part.text, part.tokens))
    )
    text, more = said(whole, CHAT), said(rest.body, CHAT)
    assert 4 < part.tokens < text.tokens
    assert part.text + more.text == text.text
    assert more.tokens == text.tokens - part.tokens


# The page and the names


def test_the_page_says_what_the_records_say() -> None:
    assert adapter.tables() in PAGE


def test_the_older_names_stay() -> None:
    assert traits.REMOTE is KINDS["openai"]
    assert traits.EMBEDDED.native_tools
    assert all(kind.kind == name for name, kind in KINDS.items())


@ALL
def test_every_record_names_fields_that_exist(kind: Traits) -> None:
    known = {
        *ChatRequest.__struct_fields__,
        *CompletionRequest.__struct_fields__,
        *KINDS["openai"].extra_fields,
        *("background", "conversation", "dimensions", "max_tool_calls", "previous_response_id"),
    }
    names = {name.rpartition(".")[2] for name in kind.refused} | kind.at_most.keys()
    assert names <= known
    assert {path.replace("[]", "").split(".")[0] for path in kind.dropped} <= known
    assert kind.extra_fields <= KINDS["openai"].extra_fields
    assert {*resume._GRAMMARS, *resume._PER_TOKEN} <= known | {"response_format"}
