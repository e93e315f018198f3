"""The modelled engine beside measured serving: what was recorded, replayed, and how far apart.

A recorded run is replayed request by request, with its own arrivals and lengths; a benchmark that
only left averages is played again as clients in a closed loop. Files arrive as bytes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Final, NamedTuple

import msgspec

from tokenworks.engine.work import Engine, Limits, Notice, Work
from tokenworks.errors import UserError
from tokenworks.units import NS_PER_S

ASYNC_SINCE: Final = (0, 14)  # the vLLM from which on async scheduling is the default


class Served(NamedTuple):
    """One request that was served, in nanoseconds since the run began."""

    arrival_ns: int
    prompt_tokens: int
    output_tokens: int
    first_ns: int
    last_ns: int

    @property
    def ttft_ns(self) -> int:
        """From arrival to the first token, queueing included."""
        return self.first_ns - self.arrival_ns

    @property
    def tpot_ns(self) -> float:
        """Time per token after the first; of an answer of one token there is none, so zero."""
        return (self.last_ns - self.first_ns) / max(self.output_tokens - 1, 1)

    @property
    def e2e_ns(self) -> int:
        """From arrival to the last token."""
        return self.last_ns - self.arrival_ns


METRICS: Final[dict[str, Callable[[Served], float]]] = {
    "TTFT": lambda served: served.ttft_ns,
    "TPOT": lambda served: served.tpot_ns,
    "E2E": lambda served: served.e2e_ns,
}


class Recorded(NamedTuple):
    """A run of a real engine: its settings, and its requests in order of arrival."""

    model: str
    devices: int
    limits: Limits
    requests: tuple[Served, ...]


class _Line(msgspec.Struct):
    """A line of requests.jsonl. Arrival is by the wall clock, all else by a steady one."""

    input_toks: int
    output_toks: int
    arrival_time: float
    queued_ts: float
    first_token_ts: float
    last_token_ts: float


class _Settings(msgspec.Struct):
    """vLLM's, by its own names."""

    tensor_parallel_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    async_scheduling: bool | None = None


class _Meta(msgspec.Struct):
    """What of meta.json counts here."""

    model: str
    vllm_version: str
    engine_kwargs: _Settings


def recorded(meta: bytes, requests: bytes, place: str) -> Recorded:
    """A run from its meta.json and requests.jsonl; UserError naming `place` if they are not that.

    The two clocks are aligned where a request was queued soonest after it arrived. What tokenising
    took there (a millisecond or two) is missing from every time to first token.
    """
    try:
        about = msgspec.json.decode(meta, type=_Meta)
        lines = msgspec.json.Decoder(_Line).decode_lines(requests)
        release = tuple(map(int, about.vllm_version.split(".")[:2]))
    except (msgspec.DecodeError, ValueError) as error:
        told = f"{place} is no recorded run: {error}"
        raise UserError(
            told, "Give meta.json and requests.jsonl as vLLM's runs have them."
        ) from None
    if not lines:
        raise UserError(f"{place} has no requests", "Give a run with some.")
    lines.sort(key=lambda line: line.arrival_time)
    begin = lines[0].arrival_time
    ahead = min(line.queued_ts - line.arrival_time for line in lines)
    settings = about.engine_kwargs

    def ns(stamp: float) -> int:
        return round((stamp - ahead - begin) * NS_PER_S)

    served = tuple(
        Served(
            round((line.arrival_time - begin) * NS_PER_S),
            line.input_toks,
            line.output_toks,
            ns(line.first_token_ts),
            ns(line.last_token_ts),
        )
        for line in lines
    )
    ahead_of_time = settings.async_scheduling
    limits = Limits(
        sequences=settings.max_num_seqs,
        step_tokens=settings.max_num_batched_tokens,
        async_scheduling=release >= ASYNC_SINCE if ahead_of_time is None else ahead_of_time,
    )
    return Recorded(about.model, settings.tensor_parallel_size, limits, served)


class _Watch:
    """Keeps when each request's first and last token were there."""

    def __init__(self) -> None:
        self.first_ns: dict[int, int] = {}
        self.last_ns: dict[int, int] = {}

    def hear(self, notices: Iterable[Notice]) -> int:
        """Take notices in; how many requests ended with them."""
        ended = 0
        for notice in notices:
            if notice.kind == "refused":
                told = f"request {notice.id} can never fit into the engine's cache"
                raise UserError(told, "Give it more devices or kv_blocks.")
            if notice.kind == "first":
                self.first_ns[notice.id] = notice.at_ns
            else:
                self.last_ns[notice.id] = notice.at_ns
                ended += 1
        return ended

    def served(self, asked: Iterable[tuple[int, Work]]) -> list[Served]:
        """All requests, in the order in which they were asked."""
        return [
            Served(
                at_ns,
                work.prompt_tokens,
                work.output_tokens,
                self.first_ns[work.id],
                self.last_ns[work.id],
            )
            for at_ns, work in asked
        ]


def replayed(engine: Engine, requests: Sequence[Served]) -> list[Served]:
    """The same arrivals and lengths on a modelled engine, one by one."""
    watch = _Watch()
    asked = [
        (request.arrival_ns, Work(ident, request.prompt_tokens, request.output_tokens))
        for ident, request in enumerate(requests)
    ]
    for now_ns, work in asked:
        while (at_ns := engine.next_ns()) is not None and at_ns <= now_ns:
            watch.hear(engine.advance(at_ns))
        watch.hear(engine.advance(now_ns))
        engine.submit(work, now_ns)
    while (at_ns := engine.next_ns()) is not None:
        watch.hear(engine.advance(at_ns))
    return watch.served(asked)


def closed_loop(engine: Engine, lengths: Sequence[tuple[int, int]], clients: int) -> list[Served]:
    """Clients that ask all at once, and each again as soon as it has its answer.

    `lengths`: prompt and output tokens of one request after the other.
    """
    watch = _Watch()
    asked: list[tuple[int, Work]] = []

    def ask(now_ns: int, count: int) -> None:
        for prompt, output in lengths[len(asked) : len(asked) + count]:
            work = Work(len(asked), prompt, output)
            asked.append((now_ns, work))
            engine.submit(work, now_ns)

    ask(0, clients)
    while (at_ns := engine.next_ns()) is not None:
        ask(at_ns, watch.hear(engine.advance(at_ns)))
    return watch.served(asked)


class Errors(NamedTuple):
    """How far a prediction is off, relative to what was measured.

    `of_mean` and `of_p99`: of the mean and of the 99th percentile over all requests, with their
    signs; `each`: the mean over requests of each one's own error, without its sign.
    """

    metric: str
    measured_ns: float
    predicted_ns: float
    of_mean: float
    of_p99: float
    each: float


def errors(measured: Sequence[Served], predicted: Sequence[Served]) -> list[Errors]:
    """Of the same requests, in the same order."""
    found = []
    for metric, of in METRICS.items():
        truth, told = [of(each) for each in measured], [of(each) for each in predicted]
        found.append(
            Errors(
                metric,
                mean(truth),
                mean(told),
                mean(told) / mean(truth) - 1,
                _p99(told) / _p99(truth) - 1,
                mean(abs(b / a - 1) for a, b in zip(truth, told, strict=True) if a > 0),
            )
        )
    return found


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]
