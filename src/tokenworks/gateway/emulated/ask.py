"""A request's bytes to what an emulated engine does with them. Touches no socket.

A token of a prompt is 4 bytes of its messages' contents in UTF-8, rounded up: whoever sends knows
how many there are. What an engine may well ignore is ignored; what would have to show in the answer
and does not is refused.
"""

from statistics import NormalDist
from typing import Final

import msgspec

from tokenworks.gateway.emulated import words
from tokenworks.gateway.emulated.replica import Built
from tokenworks.gateway.emulated.words import Voice
from tokenworks.gateway.problem import Problem, invalid
from tokenworks.workload.lengths import tokens

BYTES_PER_TOKEN: Final = 4
_score: Final = NormalDist().inv_cdf
_NULL: Final = msgspec.Raw(b"null")


class _Part(msgspec.Struct, gc=False):
    text: str | None = None


class _Message(msgspec.Struct, gc=False):
    role: str
    content: str | list[_Part] | None = None

    def data(self) -> bytes:
        """Its content as bytes."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content).encode()
        return (self.content or "").encode()


class _StreamOptions(msgspec.Struct, gc=False):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Transfer(msgspec.Struct, gc=False):
    """What vLLM's connectors are told of a cache's way; the rest is between the two engines."""

    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None


class _Format(msgspec.Struct, gc=False):
    type: str = "text"


class _Common(msgspec.Struct, kw_only=True, gc=False):
    model: str = ""
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    seed: int | None = None
    n: int | None = None
    logprobs: bool | int | None = None
    response_format: _Format | None = None
    kv_transfer_params: _Transfer | None = None


class _Chat(_Common, kw_only=True, gc=False):
    messages: list[_Message]
    max_completion_tokens: int | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    tools: msgspec.Raw = _NULL  # (`Raw | None` takes nothing but null.)


class _Completion(_Common, kw_only=True, gc=False):
    prompt: str | list[str | int | list[int]]


class Ask(msgspec.Struct, frozen=True, gc=False):
    """A request, understood. The answer is words `done` to `end` of its voice.

    `ends_early`: its own end comes before what it was limited to. `leaves`, `comes`: its cache goes
    elsewhere when the prompt is read, or was read elsewhere.
    """

    is_chat: bool
    is_stream: bool
    shows_usage: bool
    shows_progress: bool
    voice: Voice
    prompt_tokens: int
    prefix: tuple[int, ...]
    done: int
    end: int
    ends_early: bool
    priority: int
    leaves: bool
    comes: bool


class Intake:
    """Understands requests for one replica."""

    def __init__(self, built: Built) -> None:
        self._built = built
        self._block_bytes = BYTES_PER_TOKEN * built.block_tokens
        self._chat = msgspec.json.Decoder(_Chat)
        self._completion = msgspec.json.Decoder(_Completion)

    def ask(self, is_chat: bool, body: bytes) -> Ask:
        """What a request's body asks for; Problem where it can't be had."""
        try:
            request: _Chat | _Completion = (self._chat if is_chat else self._completion).decode(
                body
            )
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise invalid(f"The body: {error}.", code="invalid_value") from None
        self._check(request)
        seed = request.seed or 0
        if isinstance(request, _Chat):
            prompt, roles, done = _conversation(request)
            limit = request.max_completion_tokens or request.max_tokens
        else:
            prompt, done = words.continued(_prompt(request), seed)
            roles, limit = b"", request.max_tokens
        prompt_tokens = max(-(-len(prompt) // BYTES_PER_TOKEN), 1)
        voice = words.voice(prompt + roles, seed)
        transfer = request.kv_transfer_params or _Transfer()
        if transfer.do_remote_decode:
            if request.stream:
                told = "kv_transfer_params come with a whole answer: leave out `stream`."
                raise invalid(told, "stream", "unsupported_field")
            limit = 1
        end, ends_early = self._end(request, prompt_tokens, done, limit, voice)
        options = request.stream_options or _StreamOptions()
        return Ask(
            is_chat,
            bool(request.stream),
            bool(options.include_usage),
            bool(options.continuous_usage_stats),
            voice,
            prompt_tokens,
            self._prefix(prompt),
            done,
            end,
            ends_early,
            request.priority or 0,
            bool(transfer.do_remote_decode),
            bool(transfer.do_remote_prefill),
        )

    def _check(self, request: _Common) -> None:
        if request.model and request.model != self._built.model:
            told = f"The model {request.model!r} is not here: it is {self._built.model!r}."
            raise Problem(404, told, param="model", code="model_not_found")
        for name in ("max_tokens", "max_completion_tokens"):
            limit = getattr(request, name, None)
            if limit is not None and limit < 1:
                raise invalid(f"{name} is {limit}: it must be at least 1.", name, "invalid_value")
        if request.n is not None and request.n != 1:
            raise _unheard("n", "gives one choice")
        if request.logprobs is not None and request.logprobs is not False:
            raise _unheard("logprobs", "knows no probabilities")
        if request.response_format is not None and request.response_format.type != "text":
            raise _unheard("response_format", "says words only")

    def _end(
        self, request: _Common, prompt_tokens: int, done: int, limit: int | None, voice: Voice
    ) -> tuple[int, bool]:
        """Words that there will be with those that are done, and whether that is its own end."""
        context = self._built.context_tokens
        room = context - prompt_tokens - done
        if room < 1 or (limit is not None and limit > room):
            asked = f"{prompt_tokens + done} in the messages"
            if limit is not None:
                asked += f", {limit} in the completion"
            told = f"This model's maximum context length is {context} tokens, and you ask for "
            told += f"{prompt_tokens + done + (limit or 1)} ({asked}). Please shorten one of them."
            raise invalid(told, "messages", "context_length_exceeded")
        most = done + (limit or room)
        if request.ignore_eos:
            return most, False
        own = max(tokens(self._built.lengths, _score(voice.share)), done)
        own = max(own, done + (request.min_tokens or 0))
        return min(own, most), own <= most

    def _prefix(self, prompt: bytes) -> tuple[int, ...]:
        """Chained hashes of the prompt's leading whole blocks."""
        size, chained, found = self._block_bytes, 0, []
        for at in range(0, len(prompt) - size + 1, size):
            chained = hash((chained, prompt[at : at + size]))
            found.append(chained)
        return tuple(found)


def _conversation(request: _Chat) -> tuple[bytes, bytes, int]:
    """The prompt, who says what of it, and the words of its last message that are already said."""
    messages, done = request.messages, 0
    if not messages:
        raise invalid("messages is empty: give one.", "messages", "invalid_value")
    if request.continue_final_message:
        if request.add_generation_prompt is not False:
            told = "continue_final_message needs `add_generation_prompt: false`."
            raise invalid(told, "add_generation_prompt", "invalid_value")
        if messages[-1].role != "assistant":
            told = "continue_final_message needs an assistant's message at the end."
            raise invalid(told, "messages", "invalid_value")
        done = len(messages[-1].data().split())
        messages = messages[:-1]
    contents = [message.data() for message in messages]
    roles = "".join(f"{m.role}{len(c)}" for m, c in zip(messages, contents, strict=True))
    if bytes(request.tools) != b"null":  # as templates have them: before all else
        contents.insert(0, bytes(request.tools))
    return b"".join(contents), roles.encode(), done


def _prompt(request: _Completion) -> bytes:
    """The prompt as bytes; a token's number as 4 of them."""
    prompt: object = request.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        (prompt,) = prompt
    if isinstance(prompt, str):
        return prompt.encode()
    assert isinstance(prompt, list)
    if not all(isinstance(number, int) for number in prompt):
        raise _unheard("prompt", "takes one prompt")
    return b"".join((number & 0xFFFFFFFF).to_bytes(4, "little") for number in prompt)


def _unheard(field: str, reason: str) -> Problem:
    return invalid(f"{field}: an emulated engine {reason}.", field, "unsupported_field")
