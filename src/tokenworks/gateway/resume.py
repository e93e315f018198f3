"""How a broken-off answer goes on elsewhere: what was said, and the request that carries it on.

Pure functions, used when an engine fails or must be left; no other request comes here.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from tokenworks.gateway.framing import cut, payload_of
from tokenworks.gateway.intake import Route
from tokenworks.gateway.traits import Traits

_BLANK_LINE: Final = re.compile(rb"\r?\n\r?\n")
_raw_decoder: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])

# A grammar would begin anew in the middle of what it has let through already.
_GRAMMARS: Final = (
    "ebnf",
    "grammar",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "regex",
    "structural_tag",
    "structured_outputs",
)
# What is told of each token would be told twice or not at all.
_PER_TOKEN: Final = (
    "echo",
    "logprobs",
    "n_probs",
    "prompt_logprobs",
    "return_hidden_states",
    "return_token_ids",
)


class Said(msgspec.Struct):
    """What one engine's stream has said, up to its last complete event."""

    text: str = ""
    tokens: int = 0  # written; as the engine counts, or else the events with text
    role_sent: bool = False
    finish_reason: str | None = None
    has_tool_calls: bool = False
    has_reasoning: bool = False  # in a channel of its own, which no request can carry on
    choices: int = 0
    is_done: bool = False  # its last event, [DONE], has come
    has_error: bool = False
    id: str = ""
    model: str = ""
    created: int = 0

    @property
    def stuck(self) -> str | None:
        """Why an answer that has said this can't go on elsewhere; None if it can.

        One with a finish_reason is over: only the end of its stream is missing.
        """
        if self.has_tool_calls:
            return "a tool call had begun"
        if self.has_reasoning:
            return "the model had reasoned in a channel of its own"
        if self.choices > 1:
            return "it has several choices"
        return None


def said(raw: bytes, route: Route) -> Said:
    """Read the bytes of one engine's stream; what is no event of an answer is passed over."""
    found = Said()
    reported = 0
    for event in _BLANK_LINE.split(raw[: cut(raw)]):
        payload = payload_of(event)
        if payload is None:
            continue
        if payload == b"[DONE]":
            found.is_done = True
            continue
        try:
            document = msgspec.json.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(document, dict):
            reported = _tokens_of(document) or reported
            _take(found, document, route)
    found.tokens = reported or found.tokens
    return found


def joined(before: Said, more: Said) -> Said:
    """What one engine said and, where it broke off, another."""
    return msgspec.structs.replace(
        more,
        text=before.text + more.text,
        tokens=before.tokens + more.tokens,
        role_sent=before.role_sent or more.role_sent,
        has_tool_calls=before.has_tool_calls or more.has_tool_calls,
        has_reasoning=before.has_reasoning or more.has_reasoning,
        choices=max(before.choices, more.choices),
        has_error=before.has_error or more.has_error,
        id=before.id or more.id,
        model=before.model or more.model,
        created=before.created or more.created,
    )


def _take(found: Said, document: Mapping[str, Any], route: Route) -> None:
    found.has_error = found.has_error or bool(document.get("error"))
    if route == "responses":
        kind = document.get("type")
        if kind == "response.output_text.delta":
            _say(found, document.get("delta"))
        elif isinstance(kind, str) and kind.endswith(".delta"):
            found.has_reasoning |= ".reasoning" in kind
            found.has_tool_calls |= ".reasoning" not in kind
            found.tokens += 1
        return
    for name in ("id", "model", "created"):
        value = document.get(name)
        if isinstance(value, type(getattr(found, name))) and not getattr(found, name):
            setattr(found, name, value)
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            continue
        index = choice.get("index", 0)
        found.choices = max(found.choices, index + 1 if isinstance(index, int) else 1)
        delta = choice.get("delta")
        if route == "completions":
            _say(found, choice.get("text"))
        elif isinstance(delta, dict):
            found.role_sent = found.role_sent or bool(delta.get("role"))
            found.has_tool_calls = found.has_tool_calls or bool(delta.get("tool_calls"))
            _say(found, delta.get("content"))
            if delta.get("reasoning_content") or delta.get("reasoning"):
                found.has_reasoning = True
                found.tokens += 1
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason != "abort":  # an engine's word for its own giving up
            found.finish_reason = reason


def _say(found: Said, text: object) -> None:
    if isinstance(text, str) and text:
        found.text += text
        found.tokens += 1


def _tokens_of(document: Mapping[str, Any]) -> int:
    """Tokens written as an event's usage has them; 0 without."""
    usage = document.get("usage")
    if usage is None and isinstance(document.get("response"), dict):
        usage = document["response"].get("usage")
    if not isinstance(usage, dict):
        return 0
    tokens = usage.get("completion_tokens", usage.get("output_tokens"))
    return tokens if isinstance(tokens, int) else 0


def can_continue(traits: Traits, route: Route, document: Mapping[str, Any]) -> str | None:
    """Why an engine of this kind can't carry on an answer to `document`; None if it can."""
    if route not in ("chat/completions", "completions"):
        return f"an answer of /v1/{route} can't be carried on"
    if route == "chat/completions" and traits.continuation is None:
        return f"{traits.title} has no way to carry on a chat answer"
    if document.get("tools") and document.get("tool_choice") != "none":
        return "it has tools"
    form = document.get("response_format")
    if isinstance(form, dict) and form.get("type") not in (None, "text"):
        return f"it has a response_format of type {form['type']}"
    for name in _GRAMMARS:
        if document.get(name):
            return f"it has {name}"
    for name in _PER_TOKEN:
        value = document.get(name)
        if value is not None and value is not False:  # 0 of them is an order too
            return f"it has {name}"
    if max(document.get("n") or 1, document.get("best_of") or 1) > 1:
        return "it has several choices"
    if document.get("use_beam_search"):
        return "it has use_beam_search"
    if route == "completions":
        return _prompt_stuck(document)
    return None


def _prompt_stuck(document: Mapping[str, Any]) -> str | None:
    prompt = document.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return "it has several prompts" if several else "its prompt is in token ids"
    return "it has suffix" if document.get("suffix") else None


def left(traits: Traits, route: Route, document: Mapping[str, Any], tokens: int) -> int | None:
    """Tokens that may still be written after `tokens`, 0 if none; None where there is no bound."""
    bounds = [document.get("max_tokens"), document.get("max_completion_tokens")]
    given = [bound for bound in bounds if bound is not None]
    if not given and route == "completions" and traits.completion_tokens is not None:
        given = [traits.completion_tokens]
    return max(min(given) - tokens, 0) if given else None


def continued(route: Route, body: bytes, traits: Traits, said: str, tokens: int) -> bytes:
    """The request that goes on from `said`, of `tokens`, where an answer to `body` broke off.

    `body` is what the engine would be sent for the whole answer. Where `can_continue` is None and
    something is `left`; ValueError if nothing is.
    """
    if not said:
        return body
    raw = _raw_decoder.decode(body)
    rest = left(traits, route, {name: _value(raw, name) for name in _BOUNDS}, tokens)
    if rest == 0:
        raise ValueError("nothing is left to say")
    bounds = {name: value for name in _BOUNDS if (value := _value(raw, name)) is not None}
    for name, bound in bounds.items():
        raw[name] = _encoded(max(bound - tokens, 0))
    if rest is not None and bounds.keys().isdisjoint(_MOST):
        raw["max_tokens"] = _encoded(rest)
    if route == "completions":
        prompt = _value(raw, "prompt")
        raw["prompt"] = _encoded([prompt[0] + said] if isinstance(prompt, list) else prompt + said)
    else:
        _carry_on(raw, traits, said)
    return msgspec.json.encode(raw)


_MOST: Final = ("max_tokens", "max_completion_tokens")
_BOUNDS: Final = (*_MOST, "min_tokens")


def _carry_on(raw: dict[str, msgspec.Raw], traits: Traits, said: str) -> None:
    """Put what was said last in a chat, as the message that the engine goes on with."""
    way = traits.continuation
    assert way is not None  # else can_continue had a reason
    messages = msgspec.json.decode(raw["messages"], type=list[msgspec.Raw])
    last = msgspec.json.decode(messages[-1])
    if last["role"] == "assistant" and (way.always or _value(raw, "continue_final_message")):
        # The client had begun the answer itself.
        last["content"] = _longer(last.get("content"), said)
        messages[-1] = _encoded(last)
    else:
        messages.append(_encoded({"role": "assistant", "content": said}))
    raw["messages"] = _encoded(messages)
    if way.by_flag:
        raw["continue_final_message"] = _encoded(True)
        raw["add_generation_prompt"] = _encoded(False)


def _longer(content: Any, said: str) -> Any:
    """A message's content with `said` after it: in its last part, since engines join parts."""
    if not isinstance(content, list):
        return (content or "") + said
    if not content or content[-1].get("type") != "text":
        return [*content, {"type": "text", "text": said}]
    return [*content[:-1], {**content[-1], "text": content[-1]["text"] + said}]


def _value(raw: Mapping[str, msgspec.Raw], name: str) -> Any:
    return msgspec.json.decode(raw[name]) if name in raw else None


def _encoded(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
