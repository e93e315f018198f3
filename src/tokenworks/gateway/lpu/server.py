"""The OpenAI API in front of one machine: one conversation at a time, greedy, exact cycles told.

It is behind the gateway, which has checked its requests and always asks for a stream.
"""

import asyncio
import codecs
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tokenworks.gateway.problem import Problem, invalid
from tokenworks.lpu.answer import Said, answer
from tokenworks.lpu.machine import Machine
from tokenworks.model.tokens import Tokenizer, Vocabulary, conversation

_MOST_TOKENS: Final = 1 << 30


class _Message(msgspec.Struct):
    role: str
    content: Any = None

    @property
    def text(self) -> str:
        """Its content, of whatever parts."""
        if isinstance(self.content, list):
            return "".join(part.get("text") or "" for part in self.content)
        return self.content or ""


class _Ask(msgspec.Struct):
    messages: list[_Message] = []
    prompt: str | list[str] = ""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    continue_final_message: bool = False
    stop: str | list[str] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which the answer ends, without them."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def text(self, words: Vocabulary) -> str:
        """What the machine reads."""
        if not self.messages:
            return self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        said = [(message.role, message.text) for message in self.messages]
        begun = said.pop()[1] if self.continue_final_message else ""
        return conversation(words, said) + begun


class _Cut:
    """Text up to the first of some stops; what may be the beginning of one is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held, self.is_over = stops, "", False
        self._most = max((len(stop) for stop in stops), default=1) - 1

    def feed(self, text: str) -> str:
        """What may be said of `text` and what was held."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held, self.is_over = "", True
            return text[: min(found)]
        keep = len(text) - self._most
        self._held = text[keep:] if keep > 0 else text
        return text[: max(keep, 0)]

    def rest(self) -> str:
        """What was held, at the end."""
        return self._held


class Host:
    """The machine and who is being answered by it."""

    def __init__(self, machine: Machine, name: str) -> None:
        self._machine, self.name = machine, name
        self._words = msgspec.msgpack.decode(machine.loaded.tokenizer, type=Vocabulary)
        self._tokenizer = Tokenizer(self._words)
        self._turn, self._pass = asyncio.Lock(), threading.Lock()
        self.room = machine.program.parts[0].buckets[-1].tokens

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions and /v1/completions."""
        try:
            ask = msgspec.json.decode(await request.body(), type=_Ask)
            tokens = self._tokenizer.encode(ask.text(self._words))
            if not tokens:
                raise invalid("The prompt is empty.", "messages")
            if len(tokens) >= self.room:
                told = f"The prompt has {len(tokens)} tokens; the program takes {self.room}."
                raise invalid(told, "messages", "context_length_exceeded")
        except Problem as problem:
            return Response(problem.body(), problem.status, media_type="application/json")
        most = min(ask.max_tokens or _MOST_TOKENS, ask.max_completion_tokens or _MOST_TOKENS)
        events = self._events(tokens, min(most, self.room - len(tokens)), ask)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _events(self, tokens: list[int], most: int, ask: _Ask) -> AsyncIterator[bytes]:
        """The answer's events; whoever stops reading stops the machine after its pass."""
        is_chat, cut = bool(ask.messages), _Cut(ask.stops)
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        record: dict[str, Any] = {
            "id": f"lpu-{secrets.token_hex(8)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
            "system_fingerprint": f"{self._machine.program.chip.name}-machine",
        }
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        count = cycles = 0
        async with self._turn:
            saying = answer(self._machine, tokens, most, self._tokenizer.end)
            while (said := await asyncio.to_thread(self._following, saying)) is not None:
                cycles += said.cycles
                if said.token is None:
                    continue
                text = cut.feed(decoder.decode(self._tokenizer.bytes_of(said.token)))
                count += 1
                yield _event(record, _choice(text, None, is_chat, first=count == 1))
                if cut.is_over:
                    break
        reason = "length" if count == most and not cut.is_over else "stop"
        yield _event(record, _choice(cut.rest(), reason, is_chat, first=not count))
        usage = {
            "prompt_tokens": len(tokens),
            "completion_tokens": count,
            "total_tokens": len(tokens) + count,
            "cycles": cycles,
        }
        yield _event({**record, "usage": usage}, None) + b"data: [DONE]\n\n"

    def _following(self, saying: Iterator[Said]) -> Said | None:
        """The next pass. Who left in the middle of one has given up his turn, but not this lock."""
        with self._pass:
            return next(saying, None)

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        program = self._machine.program
        facts = {
            "id": self.name,
            "object": "model",
            "owned_by": f"{len(program.parts)} x {program.chip.name}, a machine in software",
        }
        body = msgspec.json.encode({"object": "list", "data": [facts]})
        return Response(body, media_type="application/json")


def app(host: Host) -> Starlette:
    """The application."""
    paths = ("/v1/chat/completions", "/v1/completions")
    routes = [Route(path, host.complete, methods=["POST"]) for path in paths]
    return Starlette(routes=[*routes, Route("/v1/models", host.models)])


def _choice(text: str, reason: str | None, is_chat: bool, *, first: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
    if not is_chat:
        return {**choice, "text": text}
    delta = {"role": "assistant", "content": text} if first else {"content": text}
    return {**choice, "delta": delta if reason is None or first or text else {}}


def _event(record: dict[str, Any], choice: dict[str, Any] | None) -> bytes:
    document = {**record, "choices": [] if choice is None else [choice]}
    return b"data: " + msgspec.json.encode(document) + b"\n\n"
