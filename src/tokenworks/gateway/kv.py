"""What engines are told so that a request's KV cache goes from one to another. Pure functions.

One engine reads the prompt and says one token (`first_token`), or is stopped in mid-answer; another
goes on. llama.cpp saves a slot to a file, which says whose tokens it holds (`ids_in`), and goes on
from token ids (`from_ids`). Others, as vLLM, answer with parameters that the next one is given
unchanged (`with_params`), and say the first token again.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from tokenworks.gateway.intake import Call, Route
from tokenworks.gateway.traits import Traits

_raw_decoder: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MAGIC: Final = 0x67677371  # "ggsq": a sequence's state
_MARK: Final = (-1, 1)  # of the newer form, whose tokens have their number before them
_READS: Final = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# What a chat has and a plain prompt doesn't.
_OF_CHATS: Final = (
    "add_generation_prompt", "chat_template_kwargs", "continue_final_message", "logprobs",
    "max_completion_tokens", "messages", "parallel_tool_calls", "reasoning_effort",
    "reasoning_format", "response_format", "tool_choice", "tools", "top_logprobs",
)  # fmt: skip


def unable(call: Call) -> str | None:
    """Why a call can't be read by one engine and written by another; None if it can."""
    if call.route not in ("chat/completions", "completions"):
        return f"/v1/{call.route} is not read by one engine and written by another"
    if call.choices > 1 or call.several_prompts:
        return "several answers at once are not read by one engine and written by another"
    return None


def first_token(call: Call, traits: Traits) -> Call:
    """The call whose answer is one token, as a whole, and leaves its cache behind."""
    raw = _raw_decoder.decode(call.body)
    for name in ("max_completion_tokens", "min_tokens", "stream", "stream_options"):
        raw.pop(name, None)
    raw["max_tokens"] = _encoded(1)
    is_stream = traits.kv_handover == "slots"  # so that it stops when its client leaves
    if is_stream:
        raw["stream"] = _encoded(True)
        raw["stream_options"] = _encoded({"include_usage": True})
    else:
        raw["kv_transfer_params"] = _encoded(_READS)
    return replace(
        call,
        body=msgspec.json.encode(raw),
        stream=False,
        assemble=is_stream,
        wants_usage=True,
        wants_each_usage=False,
        tools=None,
        chat_logprobs=False,
    )


def as_events(document: Mapping[str, Any], route: Route, *, ends: bool) -> bytes:
    """A whole answer as the events of a stream, up to its last word or up to its end."""
    names = ("id", "created", "model", "system_fingerprint")
    head = {name: document[name] for name in names if name in document}
    head["object"] = "text_completion" if route == "completions" else "chat.completion.chunk"
    choice = document["choices"][0]
    first = {"index": 0, "logprobs": choice.get("logprobs"), "finish_reason": None}
    last: dict[str, Any] = {"index": 0, "finish_reason": choice.get("finish_reason")}
    if route == "completions":
        first["text"], last["text"] = choice.get("text") or "", ""
    else:
        first["delta"], last["delta"] = _delta(choice.get("message") or {}), {}
    documents = [{**head, "choices": [first]}]
    if ends:
        usage = {**head, "choices": [], "usage": document.get("usage") or {}}
        documents += [{**head, "choices": [last]}, usage]
    events = b"".join(b"data: %b\n\n" % msgspec.json.encode(each) for each in documents)
    return events + b"data: [DONE]\n\n" if ends else events


def _delta(message: Mapping[str, Any]) -> dict[str, Any]:
    delta = {name: value for name, value in message.items() if value is not None}
    calls = delta.get("tool_calls")
    if calls:
        delta["tool_calls"] = [{"index": at, **each} for at, each in enumerate(calls)]
    return {"role": "assistant", **delta}


def repeats(call: Call, traits: Traits) -> bool:
    """Whether an engine of this kind that is asked again says the same first token."""
    raw = _raw_decoder.decode(call.body)
    if traits.repeats or "seed" in raw:
        return True
    return "temperature" in raw and msgspec.json.decode(raw["temperature"]) == 0


def with_params(call: Call, params: object) -> Call:
    """The call at an engine that fetches its prompt's cache; always as a stream, so that it is
    seen when the cache has come.
    """
    raw = _raw_decoder.decode(call.body)
    raw["kv_transfer_params"] = _encoded(params)
    if not call.stream:
        raw["stream"] = _encoded(True)
        raw["stream_options"] = _encoded({"include_usage": True})
    return replace(call, body=msgspec.json.encode(raw), assemble=not call.stream)


# llama.cpp's slots


def in_slot(body: bytes, slot: int) -> bytes:
    """The body of a request for one slot."""
    return b'%b,"id_slot":%d}' % (body[: body.rindex(b"}")], slot)


def ids_in(raw: bytes) -> tuple[int, ...]:
    """The tokens that a saved slot holds the cache of; ValueError where it is no such file."""
    try:
        magic, _, count = struct.unpack_from("<III", raw)
        words: tuple[int, ...] = struct.unpack_from(f"<{count}i", raw, 12)
    except struct.error as error:
        raise ValueError(f"the saved slot can't be read: {error}") from None
    if magic != _MAGIC:
        raise ValueError("the saved slot is no file of llama.cpp's")
    if words[:1] != (-1,):
        return words
    if words[:2] != _MARK:
        raise ValueError(f"the saved slot is of form {words[1]}, which is not known here")
    return words[3 : 3 + words[2]]


def document_of(call: Call) -> dict[str, Any]:
    """A call's body, as what its prompt is made of has it."""
    document: dict[str, Any] = msgspec.json.decode(call.body)
    for name in ("return_progress", "stream", "stream_options"):
        document.pop(name, None)
    return document


def prompt_of(call: Call) -> str:
    """The prompt of a call to /v1/completions."""
    prompt = msgspec.json.decode(_raw_decoder.decode(call.body)["prompt"])
    return str(prompt[0] if isinstance(prompt, list) else prompt)


def from_ids(call: Call, ids: Sequence[int], done: int) -> Call:
    """The call that goes on after these tokens, the last `done` of which are its answer's."""
    raw = _raw_decoder.decode(call.body)
    bounds = [
        msgspec.json.decode(raw[name])
        for name in ("max_tokens", "max_completion_tokens")
        if name in raw
    ]
    for name in _OF_CHATS:
        raw.pop(name, None)
    given = [bound for bound in bounds if bound is not None]
    if given:
        raw["max_tokens"] = _encoded(max(min(given) - done, 1))
    raw["prompt"] = _encoded(list(ids))
    raw["cache_prompt"] = _encoded(True)
    return replace(call, route="completions", body=msgspec.json.encode(raw))


def _encoded(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
