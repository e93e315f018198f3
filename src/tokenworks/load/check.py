"""Reads answers as they come and says what is wrong with them. Pure: bytes and times in."""

from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec

from tokenworks.load.bins import Bins
from tokenworks.units import NJ_PER_J

# What can be wrong with an answer, and how it is told.
KINDS: Final = {
    "not_a_stream": "a stream was asked for, and something else came",
    "malformed_event": "lines that are no server-sent event",
    "malformed_json": "an event or an answer that is no JSON object",
    "wrong_shape": "JSON that is no answer: a field of another type",
    "no_done": "no [DONE] at the end",
    "after_done": "something after [DONE]",
    "no_finish": "no finish_reason",
    "text_after_finish": "text after a finish_reason",
    "no_usage": "no usage",
    "wrong_usage": "a usage that doesn't add up, or counts fewer tokens than came",
    "too_long": "more tokens than were asked for",
    "id_changed": "an id that changes within a stream",
    "bytes_after_end": "bytes after the end of the answer",
    "cut_after_done": "a connection cut between [DONE] and the end of the answer",
}
_SHOWN: Final = 160


# No number of tokens is longer; one that is would not fit where outcomes are kept.
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=10**15)]


class Details(msgspec.Struct, gc=False):
    """Of the prompt: what came from a cache."""

    cached_tokens: _Tokens | None = None


class Usage(msgspec.Struct, gc=False):
    """Tokens and joules as the endpoint reports them."""

    prompt_tokens: _Tokens = 0
    completion_tokens: _Tokens = 0
    total_tokens: _Tokens | None = None
    prompt_tokens_details: Details | None = None
    energy_j: float | None = None
    replica: str | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: msgspec.Raw | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None


class _Answer(msgspec.Struct, gc=False):
    """A whole answer, or one event of a stream."""

    id: str | None = None
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None


class _Problem(msgspec.Struct, gc=False):
    error: Any = None
    message: Any = None


_decode: Final = msgspec.json.Decoder(_Answer).decode
_decode_problem: Final = msgspec.json.Decoder(_Problem).decode

# Told of a violation: its kind and what was seen.
Tell = Callable[[str, bytes], None]


class Check:
    """One answer. `chunks` counts those with something for the reader in them."""

    __slots__ = (
        "_end_ns", "_gaps", "_held", "_id", "_limit", "_tell",
        "chunks", "error", "finish", "first_ns", "is_done", "is_stream", "last_ns", "usage",
    )  # fmt: skip

    def __init__(self, limit: int, gaps: Bins, tell: Tell, *, is_stream: bool) -> None:
        self.is_stream = is_stream
        self.first_ns = self.last_ns = -1
        self.chunks = 0
        self.usage: Usage | None = None
        self.finish = ""
        self.error = ""
        self.is_done = False
        self._limit, self._gaps, self._tell = limit, gaps, tell
        self._held = b""
        self._id: str | None = None

    def feed(self, data: bytes, now_ns: int) -> None:
        """A part of the body, as it came."""
        if not self.is_stream:
            self._held += data
            return
        # What nearly always comes: one event, whole.
        if not self._held and data[:6] == b"data: " and data.find(b"\n\n") == len(data) - 2:
            self._payload(data[6:-2], now_ns)
            return
        held = (self._held + data) if self._held else data
        if b"\r" in held:
            held = held.replace(b"\r\n", b"\n")
        events = held.split(b"\n\n")
        self._held = events.pop()
        for event in events:
            self._event(event, now_ns)

    def _event(self, event: bytes, now_ns: int) -> None:
        parts = []
        for line in event.split(b"\n"):
            if line.startswith(b"data:"):
                parts.append(line[5:].removeprefix(b" "))
            elif line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                self._tell("malformed_event", line)
        if parts:
            self._payload(b"\n".join(parts), now_ns)

    def _payload(self, payload: bytes, now_ns: int) -> None:
        if self.is_done:
            self._tell("after_done", payload)
            return
        if payload == b"[DONE]":
            self.is_done = True
            return
        answer = self._decoded(payload)
        if answer is None:
            return
        if answer.error is not None:
            self.error = _code(answer.error) or "error"
            return
        if answer.id != self._id and answer.id is not None:
            if self._id is not None:
                self._tell("id_changed", payload)
            self._id = answer.id
        if answer.usage is not None:
            self.usage = answer.usage
        for choice in answer.choices or ():
            delta = choice.delta
            if delta is not None and (
                delta.content
                or delta.reasoning_content
                or delta.reasoning
                or delta.tool_calls is not None
                or delta.refusal
            ):
                if self.finish:
                    self._tell("text_after_finish", payload)
                self._came(now_ns)
            if choice.finish_reason is not None:
                self.finish = choice.finish_reason

    def _came(self, now_ns: int) -> None:
        if self.chunks:
            self._gaps.add(now_ns - self.last_ns)
        else:
            self.first_ns = now_ns
        self.last_ns = now_ns
        self.chunks += 1

    def end(self, now_ns: int) -> bool:
        """The body has come to its end as HTTP has it; whether that was an answer."""
        if self.is_stream:
            if self._held.strip():
                self._tell("malformed_event", self._held)
            if self.error or not (self.finish or self.is_done):
                return False
            if not self.is_done:
                self._tell("no_done", b"")
        else:
            answer = self._decoded(self._held)
            if answer is None:
                return False
            if answer.error is not None:
                self.error = _code(answer.error) or "error"
                return False
            self.usage = answer.usage
            self.finish = next(
                (c.finish_reason for c in answer.choices or () if c.finish_reason), ""
            )
            self.last_ns = now_ns
        self._ended()
        return True

    def _ended(self) -> None:
        """What can only be said of a whole answer."""
        if not self.finish:
            self._tell("no_finish", b"")
        usage = self.usage
        if usage is None:
            self._tell("no_usage", b"")
            return
        read, wrote, total = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
        if wrote < self.chunks or read < 1 or total not in (None, read + wrote):
            seen = f"{self.chunks} chunks, {msgspec.json.encode(usage).decode()}"
            self._tell("wrong_usage", seen.encode())
        if wrote > self._limit:
            self._tell("too_long", f"{wrote} tokens, {self._limit} asked for".encode())

    def _decoded(self, payload: bytes) -> _Answer | None:
        try:
            return _decode(payload)
        except msgspec.ValidationError as error:
            self._tell("wrong_shape", f"{error}: ".encode() + payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._tell("malformed_json", payload)
        return None

    @property
    def output_tokens(self) -> int:
        """As reported, or else the chunks."""
        return self.chunks if self.usage is None else self.usage.completion_tokens

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the endpoint had already read."""
        details = None if self.usage is None else self.usage.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0

    @property
    def energy_nj(self) -> int:
        """As reported; 0 if it isn't."""
        joules = None if self.usage is None else self.usage.energy_j
        return round(joules * NJ_PER_J) if joules is not None and 0 <= joules < 1e9 else 0


def problem(body: bytes) -> tuple[str, str]:
    """The code and the words of an error's body; empty where it has none."""
    try:
        found = _decode_problem(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "", body[:_SHOWN].decode("utf-8", "replace").strip()
    error = found.error if found.error is not None else found.message
    words = error.get("message") if isinstance(error, dict) else error
    return _code(error), str(words or "")


def shown(data: bytes) -> str:
    """Bytes as an example, short and on one line."""
    text = data[:_SHOWN].decode("utf-8", "backslashreplace")
    text = "".join(each if each.isprintable() else "?" for each in text)
    return f"{text}…" if len(data) > _SHOWN else text


def _code(error: Any) -> str:
    """One word for an error: its code, or else its type; empty where it has none."""
    if isinstance(error, dict):
        for key in ("code", "type"):
            word = error.get(key)
            if isinstance(word, str | int) and str(word):
                return shown(str(word).encode())[:40]
    return ""
