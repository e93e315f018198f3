"""What the gateway changes in an answer: usage, tool calls, the shape of logprobs. No sockets.

Most events of a stream never come here: the relay forwards them as bytes. What comes is the tail,
which carries usage, and the streams whose every event must be read (`Edit.plain` is false).
"""

import re
from collections.abc import Callable, Mapping
from math import ceil
from typing import Any, Final

import msgspec

from tokenworks.gateway.framing import FramingError, payload_of, split
from tokenworks.gateway.intake import Call, Route
from tokenworks.gateway.problem import Problem
from tokenworks.gateway.resume import Said
from tokenworks.gateway.speech import speaks

# In a JSON text these can only be keys: inside a string their quotes would be escaped.
USAGE_KEY: Final = b'"usage":'
PROGRESS_KEY: Final = b'"prompt_progress":'
_DONE: Final = b"[DONE]"
_SECONDS: Final = re.compile(rb"\d{1,7}(\.\d*)?")
# OpenAI's word for what engines call otherwise.
_CODES: Final = {"exceed_context_size_error": "context_length_exceeded"}


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int = 0


class Usage(msgspec.Struct, gc=False):
    """Tokens as an answer reports them; /v1/responses calls them input and output."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    cycles: int = 0  # of a deterministic engine: exact

    @property
    def tokens_cached(self) -> int:
        """Tokens of the prompt that were in the engine's cache."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else 0

    @property
    def tokens_in(self) -> int:
        """Tokens read."""
        return self.prompt_tokens or self.input_tokens

    @property
    def tokens_out(self) -> int:
        """Tokens written."""
        return self.completion_tokens or self.output_tokens


class _WithUsage(msgspec.Struct, gc=False):
    usage: Usage | None = None


_usage_decoder = msgspec.json.Decoder(_WithUsage)


def usage_of(document: bytes) -> Usage | None:
    """The usage that a whole answer reports; None where there is none to be read."""
    try:
        return _usage_decoder.decode(document).usage
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class Edit:
    """The changes to one call's answer."""

    # What an edit begins with; for most calls it stays so.
    usage: Usage | None = None
    _usage: dict[str, Any] | None = None  # as the engine said it
    _read = 0  # tokens, summed over the parts of a usage that comes in parts
    _wrote = 0
    _whole: "_Assembly | None" = None
    _last: Mapping[str, Any] | None = None

    has_begun = False  # whether it saw a word, of a stream whose events it reads
    _receipt: "Receipt | None" = None
    _heard = ""
    _cached_tokens: int | None = None

    def __init__(
        self,
        call: Call,
        receipt: "Receipt | None" = None,
        said: Said | None = None,
        *,
        heard: str = "",
        cached_tokens: int | None = None,
    ) -> None:
        """`heard`: what the engine says again, and the client has; `cached_tokens`: of the prompt,
        where another engine has read it.
        """
        self._call = call
        if heard or cached_tokens is not None:
            self._heard, self._cached_tokens = heard, cached_tokens
        self._said = said  # by an engine before this one
        if receipt is not None and call.stream and call.wants_usage:
            self._receipt = receipt
        # Whether events may be forwarded unread as long as they carry no usage.
        self.plain = not (
            call.tools or call.assemble or call.chat_logprobs or call.sum_usage or said is not None
        )
        self.is_text = call.route in ("chat/completions", "completions")
        if call.shows_progress and not self.is_text:
            self.plain = False  # its progress may come after its first event
        if self.plain:
            return
        self._offsets: dict[int, int] = {}  # by choice, how long its text is so far
        if call.assemble:
            self._whole = _Assembly()
            if said is not None:
                self._whole.add(_as_said(said, call.route == "completions"))

    def events(self, events: bytes) -> bytes:
        """Complete events as they came, and what of them the client shall see."""
        if self.plain and USAGE_KEY not in events and PROGRESS_KEY not in events:
            return events
        return b"".join([self._event(event) for event in split(events)])

    def _event(self, event: bytes) -> bytes:
        payload = payload_of(event)
        if payload is None:
            return event
        if PROGRESS_KEY in payload:
            return b""
        if payload == _DONE:
            return self._tail() + event
        try:
            document = msgspec.json.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return event
        if not isinstance(document, dict):
            return event
        return self._chunk(event, document) if self.is_text else self._step(event, document)

    def _chunk(self, event: bytes, document: dict[str, Any]) -> bytes:
        """One event of chat or completions."""
        usage = document.get("usage")
        if self.plain:
            return event if usage is None else self._last_of_plain(event, document, usage)
        document.pop("usage", None)
        if usage is not None:
            self._count(usage)
        if self._said is not None:
            _go_on(document, self._said, is_completion=self._call.route == "completions")
        if self._heard and self._unsay(document):
            return b""
        self.has_begun = self.has_begun or speaks(event, self._call.route)
        if self._whole is not None:
            self._whole.add(document)
            return b""
        if not document.get("choices") and "error" not in document:
            self._last = document
            return b""
        if usage is not None:
            self._last = {**document, "choices": []}
        if self._call.chat_logprobs:
            _legacy_logprobs(document, self._offsets)
        edited = self._call.tools.event(document) if self._call.tools else [document]
        return b"".join([_as_event(each) for each in edited])

    def _unsay(self, document: dict[str, Any]) -> bool:
        """Take what the client has out of a chunk; whether nothing is left of it."""
        for choice in document.get("choices") or ():
            part = choice.get("delta", choice)
            name = "text" if "text" in part else "content"
            text = part.get(name)
            if text:
                size = min(len(text), len(self._heard))
                if text[:size] != self._heard[:size]:
                    raise FramingError("it says another first token than the one it was to repeat")
                self._heard, part[name] = self._heard[size:], text[size:]
                return not part[name] and choice.get("finish_reason") is None
        return False

    def _last_of_plain(
        self, event: bytes, document: dict[str, Any], usage: dict[str, Any]
    ) -> bytes:
        """The event with usage, of a stream whose other events pass unread (the end's too)."""
        self._count(usage)
        usage = self._usage or usage
        if self._call.wants_each_usage:
            return event
        if not document.get("choices"):  # as OpenAI says it
            return self._usage_event(document, usage) if self._call.wants_usage else b""
        del document["usage"]
        said = _as_event(document)
        if self._call.wants_usage:
            said += self._usage_event(document, usage)
        return said

    def _usage_event(self, document: Mapping[str, Any], usage: dict[str, Any]) -> bytes:
        """The event that tells the usage, with what the gateway knows besides."""
        told = {**document, "choices": [], "usage": usage}
        if self._receipt is not None and self.usage is not None:
            tier, more = self._receipt(self.usage)
            told.update(service_tier=tier, usage={**usage, **more})
        return _as_event(told)

    def _step(self, event: bytes, document: dict[str, Any]) -> bytes:
        """One event of /v1/responses; the last carries the whole response."""
        response = document.get("response") or {}
        if response.get("usage"):
            self._count(response["usage"])
        self.has_begun = self.has_begun or speaks(event, "responses")
        if self._whole is None:
            return event
        if "error" in document:
            raise engine_refusal(502, msgspec.json.encode(document))
        if response:
            self._whole.response = response
        return b""

    def _count(self, usage: dict[str, Any]) -> None:
        try:
            said = msgspec.convert(usage, Usage)
        except msgspec.ValidationError:
            return  # the client may make something of it
        if self._said is not None:  # it read what was said, and said the rest
            said.prompt_tokens = max(said.prompt_tokens - self._said.tokens, 0)
            said.completion_tokens += self._said.tokens
            usage = {
                **usage,
                "prompt_tokens": said.prompt_tokens,
                "completion_tokens": said.completion_tokens,
            }
        if self._cached_tokens is not None:
            said.prompt_tokens_details = _Details(self._cached_tokens)
            usage = {**usage, "prompt_tokens_details": {"cached_tokens": self._cached_tokens}}
        if self._is_too_much(said):
            usage = {**usage, **_at_most(said, self._call.max_tokens or 0)}
        if self._call.sum_usage:
            self._read += said.prompt_tokens
            self._wrote += said.completion_tokens
            # Each of a prompt's choices reports the prompt again.
            if self._call.several_prompts:
                said.prompt_tokens = self._read // self._call.choices
            said.completion_tokens = self._wrote
            usage = {
                "prompt_tokens": said.prompt_tokens,
                "completion_tokens": said.completion_tokens,
                "total_tokens": said.prompt_tokens + said.completion_tokens,
            }
        self.usage, self._usage = said, usage

    def _tail(self) -> bytes:
        """The usage event of a stream whose own was held back."""
        if not self._last or not self._call.wants_usage or self._whole or self._usage is None:
            return b""
        return self._usage_event(self._last, self._usage)

    def whole(self, body: bytes) -> bytes:
        """A whole answer of the engine's, changed where the call needs it."""
        self.usage = said = usage_of(body)
        if said is not None and self._is_too_much(said):
            document = msgspec.json.decode(body)
            document["usage"].update(_at_most(said, self._call.max_tokens or 0))
            return self._edited(document)
        return body if self.plain else self._edited(msgspec.json.decode(body))

    def _is_too_much(self, said: Usage) -> bool:
        """Whether an engine says to have made more than it was let: nobody pays for that."""
        call = self._call
        if call.max_tokens is None or said.completion_tokens <= call.max_tokens:
            return False
        return not (call.width > 1 or call.choices > 1 or call.several_prompts)

    def assembled(self) -> bytes:
        """The whole answer made of the events seen."""
        assert self._whole is not None
        if not self.is_text:
            return msgspec.json.encode(self._whole.response)
        document = self._whole.document(self._call.route == "completions")
        return self._edited(document if self._usage is None else {**document, "usage": self._usage})

    def _edited(self, document: dict[str, Any]) -> bytes:
        if self._call.tools:
            document = self._call.tools.whole(document)
        if self._call.chat_logprobs:
            _legacy_logprobs(document, {})
        return msgspec.json.encode(document)


def _at_most(said: Usage, most: int) -> dict[str, int]:
    """Cut a usage to so many tokens written; its fields that change."""
    said.completion_tokens = most
    return {"completion_tokens": most, "total_tokens": said.prompt_tokens + most}


# From the usage an engine reports to the tier really used, and what usage says besides.
Receipt = Callable[[Usage], tuple[str, dict[str, Any]]]


def _go_on(document: dict[str, Any], said: Said, *, is_completion: bool) -> None:
    """Make a chunk of a second engine one of the stream that a first one began; a chat goes on as
    a plain prompt where that is in token ids.
    """
    document.update(id=said.id, model=said.model, created=said.created)
    for choice in document.get("choices") or ():
        if not is_completion and "text" in choice:
            document["object"] = "chat.completion.chunk"
            choice["delta"] = {"content": choice.pop("text")}
        if said.role_sent:
            (choice.get("delta") or {}).pop("role", None)


def _as_said(said: Said, is_completion: bool) -> dict[str, Any]:
    """What a first engine said, as one chunk."""
    delta = {"role": "assistant", "content": said.text}
    choice = {"index": 0, "text": said.text} if is_completion else {"index": 0, "delta": delta}
    return {"id": said.id, "model": said.model, "created": said.created, "choices": [choice]}


class _Assembly:
    """A whole answer, put together from the chunks of a stream."""

    def __init__(self) -> None:
        self.response: dict[str, Any] = {}  # of /v1/responses, which says it itself
        self._rest: dict[str, Any] = {}  # id, model and the like; the last event's win
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, document: dict[str, Any]) -> None:
        """Take one chunk in; raises Problem where it tells of an error."""
        if "error" in document:
            raise engine_refusal(502, msgspec.json.encode(document))
        self._rest.update((key, value) for key, value in document.items() if key != "choices")
        for piece in document["choices"]:
            index = piece["index"]
            fresh = {"index": index, "message": {}, "logprobs": None, "finish_reason": None}
            choice = self._choices.setdefault(index, fresh)
            said = piece["delta"] if "delta" in piece else {"text": piece.get("text") or ""}
            _merge(choice["message"], said)
            choice["finish_reason"] = piece.get("finish_reason") or choice["finish_reason"]
            if piece.get("logprobs"):
                choice["logprobs"] = choice["logprobs"] or {"content": []}
                choice["logprobs"]["content"] += piece["logprobs"].get("content") or []

    def document(self, is_completion: bool) -> dict[str, Any]:
        """The answer as OpenAI's API gives it whole."""
        choices = [choice for _, choice in sorted(self._choices.items())]
        for choice in choices:
            message = choice.pop("message")
            if is_completion:
                choice["text"] = message["text"]
            else:
                text = None if "tool_calls" in message else ""
                choice["message"] = {"role": "assistant", "content": text} | message
        kind = "text_completion" if is_completion else "chat.completion"
        return {**self._rest, "object": kind, "choices": choices}


def _merge(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Append a delta to what was said so far: texts to texts, calls to the calls they go on."""
    for key, value in delta.items():
        if key == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for call in value:
                index = call.get("index", 0)
                if index >= len(calls):
                    calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
                _merge(calls[index]["function"], call.get("function") or {})
                calls[index].update((k, v) for k, v in call.items() if k in ("id", "type") and v)
        elif isinstance(value, str) and isinstance(message.get(key), str) and key != "role":
            message[key] += value
        elif value is not None:
            message[key] = value


def engine_refusal(status: int, body: bytes, retry_after: bytes = b"") -> Problem:
    """What an engine's error answer means to the client, in OpenAI's shape.

    The engine's 4xx about the request stay; what is between gateway and engine (its keys, its
    missing routes, its failures) is the gateway's own trouble: 502, or 503 where it is busy.
    `retry_after`: its header; a date is passed over.
    """
    message, param, code = complaint(body)
    code = _CODES.get(code or "", code)
    if status in (400, 404, 413, 422, 429):
        waits = status == 429 and _SECONDS.fullmatch(retry_after)
        retry_s = max(ceil(float(retry_after)), 1) if waits else None
        return Problem(status, message, param=param, code=code, retry_after_s=retry_s)
    if status == 503:
        return Problem(503, f"The engine is not ready: {message}", code=code, retry_after_s=1)
    return Problem(502, f"The engine failed ({status}): {message}", code="engine_error")


def complaint(body: bytes) -> tuple[str, str | None, str | None]:
    """What an engine's error says: its message, the field, a word for programs."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:500].decode("utf-8", "replace").strip() or "no reason given", None, None
    error = document.get("error", document) if isinstance(document, dict) else document
    if not isinstance(error, dict):
        return str(error)[:500], None, None
    message = error.get("message") or error.get("detail") or error.get("error") or "no reason given"
    param, kind = error.get("param"), error.get("type")
    code = error.get("code") if isinstance(error.get("code"), str) else kind
    return (
        message if isinstance(message, str) else str(message)[:500],
        param if isinstance(param, str) else None,
        code if isinstance(code, str) else None,
    )


def cut_off(said: Said, route: Route) -> bytes:
    """The event that ends a text which has got as long as it may."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
    if route == "completions":
        choice["text"] = ""
    else:
        choice["delta"] = {}
    kind = "text_completion" if route == "completions" else "chat.completion.chunk"
    told = {"id": said.id, "object": kind, "created": said.created, "model": said.model}
    return _as_event({**told, "choices": [choice]})


def _legacy_logprobs(document: dict[str, Any], lengths: dict[int, int]) -> None:
    """Turn the chat API's logprobs into those of /v1/completions.

    `lengths` is how long each choice's text was before this, and is after it.
    """
    for choice in document.get("choices", []):
        content = (choice.get("logprobs") or {}).get("content")
        if content is None:
            continue
        offsets, offset = [], lengths.get(choice["index"], 0)
        for token in content:
            offsets.append(offset)
            offset += len(token["token"])
        lengths[choice["index"]] = offset
        choice["logprobs"] = {
            "tokens": [token["token"] for token in content],
            "token_logprobs": [token["logprob"] for token in content],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in token.get("top_logprobs", [])}
                for token in content
            ],
            "text_offset": offsets,
        }


def _as_event(document: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"
