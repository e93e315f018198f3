"""A few requests beforehand: what the endpoint takes, and how it counts tokens."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Final

from msgspec.structs import replace

from tokenworks.errors import UserError
from tokenworks.load.bins import Bins
from tokenworks.load.check import Check, problem
from tokenworks.load.dial import Dial
from tokenworks.load.endpoint import Accepted, Endpoint
from tokenworks.load.line import Exchange, Line
from tokenworks.load.prompts import WORD_BYTES, Prompts
from tokenworks.workload import Request

# The service_tier of a class: OpenAI's word, then Groq's.
_TIERS: Final[Mapping[str, tuple[str, ...]]] = {
    "realtime": ("priority", "performance"),
    "flex": ("flex",),
    "batch": ("batch", "flex"),
}
_SHORT_WORDS: Final = 16
_LONG_WORDS: Final = 400
_TRIES: Final = 5
_PATIENCE_S: Final = 120.0
_NOT_NOW: Final = (429, 498, 503)
_FIELD: Final = re.compile(
    r"max_completion_tokens|max_tokens|ignore_eos|stream_options|service_tier"
)


class Probed:
    """What was found out, with what should be told of it."""

    def __init__(self) -> None:
        self.accepted = Accepted()
        self.notes: list[str] = []
        self.requests = 0


async def probe(
    endpoint: Endpoint,
    model: str,
    keys: Mapping[str, str],
    requests: Sequence[Request],
    seed: int,
    *,
    stream: bool,
) -> Probed:
    """Ask the endpoint some small things; UserError if it can't be asked at all."""
    prober = _Prober(await Dial.found(endpoint), endpoint, model, keys, seed, stream=stream)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await prober.fields()
            await prober.tiers(sorted({request.service_class for request in requests}))
            await prober.lengths(max(request.prompt_tokens for request in requests))
    except TimeoutError:
        told = f"{endpoint.url} did not answer a few small requests within {_PATIENCE_S:g} s"
        raise UserError(told, "Is it overloaded?") from None
    return prober.found


class _Prober:
    def __init__(
        self,
        dial: Dial,
        endpoint: Endpoint,
        model: str,
        keys: Mapping[str, str],
        seed: int,
        *,
        stream: bool,
    ) -> None:
        self._dial, self._endpoint, self._model, self._keys = dial, endpoint, model, keys
        self._seed, self._stream = seed, stream
        self._loop = asyncio.get_running_loop()
        self.soon = self._loop.call_soon
        self.found = Probed()

    async def fields(self) -> None:
        """Leave out what the endpoint refuses, one field after the other."""
        left = ["ignore_eos", *(["stream_options"] if self._stream else [])]
        accepted = self.found.accepted
        while True:
            exchange = await self._patiently(accepted, _SHORT_WORDS)
            if exchange.status == 200:
                break
            code, words = problem(exchange.body)
            named = _FIELD.search(words)
            if named and "tokens" in named[0] and accepted.limit == "max_tokens":
                accepted = replace(accepted, limit="max_completion_tokens")
                continue
            if exchange.status not in (400, 422) or not left:
                raise self._unusable(exchange.status, code, words)
            field = named[0] if named and named[0] in left else left[0]
            left.remove(field)
            name = "include_usage" if field == "stream_options" else field
            accepted = replace(accepted, **{name: False})
        if not accepted.ignore_eos:
            self.found.notes.append(
                "The endpoint refuses ignore_eos: answers end when the model ends them, and may be "
                "shorter than the trace's."
            )
        if self._stream and not accepted.include_usage:
            self.found.notes.append(
                "The endpoint refuses stream_options: where a stream has no usage, chunks count as "
                "tokens."
            )
        self.found.accepted = accepted

    async def tiers(self, classes: Sequence[str]) -> None:
        """Which service_tier each class may ask for. A refusal for lack of room is an answer."""
        for name in classes:
            for tier in _TIERS.get(name, ()):
                tried = replace(self.found.accepted, tiers={name: tier})
                exchange = await self._asked(tried, _SHORT_WORDS, name)
                if exchange.status in (200, *_NOT_NOW):
                    tiers = {**self.found.accepted.tiers, name: tier}
                    self.found.accepted = replace(self.found.accepted, tiers=tiers)
                    if name == "batch" and tier == "flex":
                        self.found.notes.append("batch requests were sent as flex.")
                    break
            else:
                if name in _TIERS:
                    told = f"The endpoint refuses a service_tier for {name}: sent without one."
                    self.found.notes.append(told)

    async def lengths(self, most_tokens: int) -> None:
        """How many tokens words are, from a short prompt and a longer one."""
        found = self.found
        long_words = max(min(_LONG_WORDS, most_tokens), 2 * _SHORT_WORDS)
        sizes = [(words, await self._read_tokens(words)) for words in (_SHORT_WORDS, long_words)]
        (few, short), (many, long) = sizes
        if short is None or long is None or long <= short:
            found.notes.append(
                "The endpoint reports no usable prompt_tokens: a word was taken for a token."
            )
            return
        rate = (many - few) / (long - short)
        base = max(short - few / rate, 0.0)
        found.accepted = replace(found.accepted, words_per_token=rate, base_tokens=base)
        found.notes.append(
            f"Prompts are filler of {rate * WORD_BYTES:.2f} bytes a token, with {base:.0f} tokens "
            f"of the model's own around it (learned from {found.requests} requests beforehand)."
        )

    async def _read_tokens(self, words: int) -> int | None:
        exchange = await self._patiently(self.found.accepted, words)
        if exchange.status != 200:
            return None
        usage = exchange.check.usage
        return usage.prompt_tokens if usage is not None and usage.prompt_tokens > 0 else None

    def _unusable(self, status: int, code: str, words: str) -> UserError:
        said = " ".join(f"{status} {code}: {words}".split())[:300].rstrip(".")
        remedy = "Check --url, --model and --key-env."
        if status == 401:
            remedy = "Name the variable that holds a key with --key-env."
        return UserError(f"{self._endpoint.url} refused a small request: {said}", remedy)

    async def _patiently(self, accepted: Accepted, words: int) -> Exchange:
        """Once more, a little later, where there is no room at the moment."""
        for attempt in range(_TRIES):
            exchange = await self._asked(accepted, words)
            if exchange.status not in _NOT_NOW:
                break
            await asyncio.sleep(min(2.0**attempt / 4, 2.0))
        return exchange

    async def _asked(self, accepted: Accepted, words: int, name: str = "standard") -> Exchange:
        """One request of two tokens, on a connection of its own."""
        accepted = replace(accepted, words_per_token=1.0, base_tokens=0.0)
        prompts = Prompts(
            self._endpoint, self._model, accepted, self._keys, self._seed, stream=self._stream
        )
        self.found.requests += 1
        data = prompts.request(-self.found.requests, Request(0, words, 2, name))
        over = self._loop.create_future()

        def ended(_exchange: Exchange, reason: str) -> None:
            if not over.done():
                over.set_result(reason)

        check = Check(2, Bins(), lambda _kind, _seen: None, is_stream=self._stream)
        exchange = Exchange(-1, data, check, ended)
        try:
            line = await self._dial.line(self)
        except OSError as error:
            told = f"cannot connect to {self._endpoint.url}: {error}"
            raise UserError(told, "Is it up? Check --url.") from None
        line.send(exchange)
        try:
            reason = await over
        finally:
            line.drop()
        if exchange.status == 0:
            told = f"{self._endpoint.url} gave no HTTP answer ({reason})"
            raise UserError(told, "Check --url: http or https, host, port.")
        return exchange

    def free(self, line: Line) -> None:
        """Not kept."""

    def lost(self, line: Line) -> None:
        """Not kept."""

    def tell(self, number: int, kind: str, seen: bytes) -> None:
        """The run itself will show it."""
