"""The twin against the embedded engine at hand: calibrated on one load, it predicts another.

    python bench/validate_embedded.py                # some five minutes
    python bench/validate_embedded.py --keep FILE    # and keep what was recorded
    python bench/validate_embedded.py --from FILE    # what was kept, again

Needs psutil. The engine is started as `tokenworks up` does (llama.cpp in its own process, four
slots) and gets Poisson arrivals at two loads, in turns, so that what else happens on the machine
meets both alike. What clients saw at one load gives the constants; with them, the other load's
requests are played on the modelled engine.

Everything is stamped by two clocks: the wall's, and one that stands still while the engine waits
for a core that another process has (Linux counts that; elsewhere both are the same). On a machine
that is not shared they agree. docs/validation.md has the results.
"""

import argparse
import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import IO, Final, Literal, NamedTuple

import msgspec
import psutil

from tokenworks.assets import store
from tokenworks.catalog import models
from tokenworks.cost import Batch, Chunk
from tokenworks.cost.measured import Constants, Measured
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.work import Limits
from tokenworks.gateway.address import Address, socket_folder, socket_in
from tokenworks.gateway.embedded.launch import STEP_TOKENS, Launch, plan
from tokenworks.gateway.embedded.supervisor import supervised
from tokenworks.gateway.engine import Engine
from tokenworks.gateway.settings import EngineSettings
from tokenworks.gateway.traits import EMBEDDED
from tokenworks.twin.calibrate import Stream, calibrated, steps
from tokenworks.twin.validate import METRICS, Served, errors, replayed
from tokenworks.units import PS_PER_NS

Which = Literal["wall", "own"]

LOADS: Final = (0.35, 0.7)  # of what the engine can do
ROUNDS, A_ROUND = 4, 15  # requests of each load in each round
BURST: Final = 16  # requests at once, to see what the engine can do
PROBE: Final = (32, 24)  # a lone request between the runs, to see how steady the machine is
CLOCKS: Final[dict[Which, str]] = {
    "wall": "By the wall's clock",
    "own": "Without the engine's waits for a core",
}
TOKEN_IDS: Final = (1000, 20_000)  # prompts are any of these: what they say takes no time


class Lengths(NamedTuple):
    """Tokens, from the fewest to the most, evenly over their logarithm."""

    prompt: tuple[int, int] = (20, 300)
    output: tuple[int, int] = (10, 120)

    def draw(self, chance: Random) -> tuple[int, int]:
        """Of one request."""
        low, high = self.prompt
        fewest, most = self.output
        prompt = round(low * (high / low) ** chance.random())
        return prompt, round(fewest * (most / fewest) ** chance.random())


# Recording


class Stamp(NamedTuple):
    """A moment by both clocks, in nanoseconds."""

    wall_ns: int
    own_ns: int

    def since(self, begin: "Stamp") -> "Stamp":
        """From there on."""
        return Stamp(self.wall_ns - begin.wall_ns, self.own_ns - begin.own_ns)


class Clock:
    """The wall's clock, and what is left of it without the engine's waits for a core."""

    def __init__(self, pid: int) -> None:
        self._threads = Path(f"/proc/{pid}/task")
        self._file: IO[bytes] | None = None

    def find(self) -> None:
        """Look for the thread that computes: the one that has worked most so far."""
        found = {path: self._read(path) for path in self._threads.glob("*/schedstat")}
        if found:
            busiest = max(found, key=lambda path: found[path][0])
            self._file = busiest.open("rb", buffering=0)

    def now(self) -> Stamp:
        """The moment."""
        waited_ns = 0
        if self._file is not None:
            self._file.seek(0)
            waited_ns = int(self._file.read(100).split()[1])
        now_ns = time.monotonic_ns()
        return Stamp(now_ns, now_ns - waited_ns)

    def close(self) -> None:
        """Let go of the thread."""
        if self._file is not None:
            self._file.close()

    @staticmethod
    def _read(path: Path) -> list[int]:
        return [int(word) for word in path.read_bytes().split()]


class Seen(NamedTuple):
    """One request by both clocks, and the slot it had in the engine."""

    wall: Stream
    own: Stream
    slot: int


class _Event(msgspec.Struct):
    """What counts here of an event of llama.cpp's /completion."""

    tokens_predicted: int
    id_slot: int  # told with the last one only


@contextlib.asynccontextmanager
async def embedded() -> AsyncIterator[tuple[Launch, Clock]]:
    """The engine at work, as `tokenworks up` starts it, as long as the block is."""
    before = set(psutil.Process().children())
    model = models.model(models.DEFAULT)
    path = store.ensure(model, lambda _what, _done, _total: None)
    with socket_folder() as folder:
        socket_path = socket_in(folder, model.name)
        launch = plan(path, model.name, store.read_header(path), EngineSettings(), socket_path)
        address = Address(path=launch.socket_path)
        engine = Engine(model.name, EMBEDDED, address, slots=launch.slots)
        supervisor = supervised(engine, launch, lambda: None)
        try:
            await supervisor.start()
            (process,) = set(psutil.Process().children()) - before
            with contextlib.closing(Clock(process.pid)) as clock:
                yield launch, clock
        finally:
            engine.close()
            await supervisor.stop()


async def ask(
    socket_path: str, prompt: list[int], output_tokens: int, clock: Clock
) -> tuple[int, list[Stamp]]:
    """One streamed request: its slot; when it was sent, and when each of its tokens came."""
    asked = {
        "prompt": prompt,
        "n_predict": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }
    body = msgspec.json.encode(asked)
    head = f"POST /completion HTTP/1.1\r\nHost: e\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
    slot, stamps = -1, [clock.now()]
    reader, writer = await asyncio.open_unix_connection(socket_path)
    with contextlib.closing(writer):
        writer.write(head.encode() + body)
        while line := await reader.readline():
            if line.startswith(b"data: "):
                now = clock.now()
                # A character of several tokens comes with its last one.
                event = msgspec.json.decode(line[6:], type=_Event)
                stamps += [now] * (event.tokens_predicted + 1 - len(stamps))
                slot = event.id_slot
    if len(stamps) != output_tokens + 1:
        raise RuntimeError(f"{len(stamps) - 1} tokens instead of {output_tokens}")
    return slot, stamps


async def record(
    socket_path: str,
    lengths: Sequence[tuple[int, int]],
    per_s: float | None,
    chance: Random,
    clock: Clock,
) -> list[Seen]:
    """Requests of these lengths as they come, by chance so many a second (None: all at once)."""
    begin = clock.now()
    due_s, asked = 0.0, []
    for prompt_tokens, output_tokens in lengths:
        prompt = [chance.randrange(*TOKEN_IDS) for _ in range(prompt_tokens)]
        # By the engine's own clock: when others slow it down, the load stays what it is.
        while (left_s := due_s - clock.now().since(begin).own_ns / 1e9) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left_s)
        asked.append(asyncio.create_task(ask(socket_path, prompt, output_tokens, clock)))
        due_s += chance.expovariate(per_s) if per_s else 0.0
    found = []
    answers = await asyncio.gather(*asked)
    for (tokens, _), (slot, stamps) in zip(lengths, answers, strict=True):
        wall, own = zip(*(stamp.since(begin) for stamp in stamps), strict=True)
        by_wall, by_own = (Stream(each[0], tokens, each[1:]) for each in (wall, own))
        found.append(Seen(by_wall, by_own, slot))
    return found


class Recording(msgspec.Struct, frozen=True):
    """Runs at each load, in turns. `probes`: a lone request in between, always the same."""

    slots: int
    context_tokens: int
    capacity_per_s: float
    probes: list[Seen]
    runs: list[list[list[Seen]]]

    @property
    def limits(self) -> Limits:
        """The modelled engine's, as the real one is set."""
        return Limits(sequences=self.slots, step_tokens=STEP_TOKENS, prefix_cache=False)

    def by(self, clock: Which) -> list[list[list[Stream]]]:
        """The runs at each load, by one of the clocks."""
        return [[[getattr(seen, clock) for seen in run] for run in runs] for runs in self.runs]

    def slots_of(self, load: int) -> list[list[int]]:
        """Of the runs at a load, the slot of each request."""
        return [[seen.slot for seen in run] for run in self.runs[load]]


async def recorded(
    rounds: int, sizes: Sequence[int], loads: Sequence[float], lengths: Lengths, burst: int
) -> Recording:
    """`rounds` runs of so many requests at each load."""
    chance = Random(7)

    def draw(count: int) -> list[tuple[int, int]]:
        return [lengths.draw(chance) for _ in range(count)]

    async with embedded() as (launch, clock):

        async def run(drawn: list[tuple[int, int]], per_s: float | None = None) -> list[Seen]:
            return await record(launch.socket_path, drawn, per_s, chance, clock)

        await run([PROBE])  # the first is slower than any later one
        clock.find()
        at_once = await run(draw(burst))
        capacity = burst * 1e9 / max(seen.own.token_ns[-1] for seen in at_once)
        probes = await run([PROBE])
        runs: list[list[list[Seen]]] = [[] for _ in loads]
        for _ in range(rounds):
            for kept, load, size in zip(runs, loads, sizes, strict=True):
                kept.append(await run(draw(size), load * capacity))
                probes += await run([PROBE])
    return Recording(launch.slots, launch.context_tokens, capacity, probes, runs)


# Predicting


def played(
    constants: Constants, recording: Recording, runs: Iterable[list[Stream]]
) -> list[Served]:
    """The same requests on the modelled engine; each run begins with it empty."""
    prepared = Measured(constants, recording.slots * recording.context_tokens)
    return [
        served
        for run in runs
        for served in replayed(
            ContinuousBatch(prepared, recording.limits), [stream.served for stream in run]
        )
    ]


class _Seat:
    """A request at work."""

    def __init__(self, stream: Stream, slot: int) -> None:
        self.stream, self.slot = stream, slot
        self.read = 0
        self.token_ns: list[int] = []


def by_slots(
    constants: Constants, recording: Recording, run: list[Stream], slots: list[int]
) -> list[Served]:
    """A run step by step, where prompts are read in the order of these slots, not of arrival."""
    limits, prepared = recording.limits, Measured(constants, 1)
    seats = [_Seat(stream, slot) for stream, slot in zip(run, slots, strict=True)]
    waiting, seated, now_ps = deque(seats), list[_Seat](), 0
    while waiting or seated:
        if not seated:
            now_ps = max(now_ps, waiting[0].stream.arrival_ns * PS_PER_NS)
        while waiting and waiting[0].stream.arrival_ns * PS_PER_NS <= now_ps:
            if len(seated) == limits.sequences:
                break
            seated.append(waiting.popleft())
        seated.sort(key=lambda seat: seat.slot)
        decoding = [seat for seat in seated if seat.token_ns]
        budget, chunks = limits.step_tokens - len(decoding), []
        contexts = [s.stream.prompt_tokens + len(s.token_ns) - 1 for s in decoding]
        for seat in seated:
            if size := min(seat.stream.prompt_tokens - seat.read, budget):
                chunks.append(Chunk(size, seat.read))
                seat.read += size
                budget -= size
                if seat.read == seat.stream.prompt_tokens:
                    decoding.append(seat)
        now_ps += prepared.step(Batch(contexts, chunks)).time_ps
        for seat in decoding:
            seat.token_ns.append(-(-now_ps // PS_PER_NS))
        seated = [seat for seat in seated if len(seat.token_ns) < len(seat.stream.token_ns)]
    return [seat.stream._replace(token_ns=tuple(seat.token_ns)).served for seat in seats]


def flat(runs: Iterable[list[Stream]]) -> list[Served]:
    """All their requests, as they were."""
    return [stream.served for run in runs for stream in run]


def told(constants: Constants) -> str:
    """The constants, for a line of text."""
    decode = ", ".join(f"{each / 1e6:.1f}" for each in constants.decode_ns)
    return (
        f"decode {decode} ms; chunk {constants.chunk_ns / 1e6:.2f} ms, prompt token "
        f"{constants.prompt_token_ns / 1e6:.2f} ms; a token attended to "
        f"{constants.seen_ns / 1e3:.1f} us, by one of a prompt {constants.pair_ns / 1e3:.1f} us"
    )


def show(recording: Recording) -> None:
    """What each load's constants say of both loads, by both clocks."""
    print(f"{recording.slots} slots, {recording.capacity_per_s:.3g} requests/s at most")
    for clock, title in CLOCKS.items():
        lone_s = sorted(getattr(seen, clock).served.e2e_ns / 1e9 for seen in recording.probes)
        print(
            f"\n{title}. A lone request in between: {median(lone_s):.3g} s, from "
            f"{lone_s[0]:.3g} to {lone_s[-1]:.3g}"
        )
        show_by(recording, recording.by(clock))


def show_by(recording: Recording, loads: list[list[list[Stream]]]) -> None:
    """By one of them: constants, then each load as measured and as predicted."""
    tuned = [calibrated(runs, recording.limits) for runs in loads]
    for load, runs, constants in zip(LOADS, loads, tuned, strict=True):
        known = sum(len(steps(run, recording.limits)) for run in runs)
        print(f"fitted to {known} steps at load {load}: {told(constants)}")
    for index, (load, runs) in enumerate(zip(LOADS, loads, strict=True)):
        measured = flat(runs)
        means = ", ".join(
            f"{name} {mean(map(of, measured)) / 1e9:.3g} s" for name, of in METRICS.items()
        )
        print(f"load {load}: {len(measured)} requests, measured means: {means}")
        heads = "  ".join(f"{metric:>7}{'p99':>8}{'each':>7}" for metric in METRICS)
        print(f"  {'errors of the mean, of the p99, of each':44}{heads}")
        other = 1 - index
        itself = played(tuned[index], recording, runs)
        print(row("calibrated on itself: no prediction", measured, itself))
        title = f"calibrated on load {LOADS[other]}: predicted"
        print(row(title, measured, played(tuned[other], recording, runs)))
        slotted = [
            served
            for run, slots in zip(runs, recording.slots_of(index), strict=True)
            for served in by_slots(tuned[other], recording, run, slots)
        ]
        print(row("the same, reading in the order of slots", measured, slotted))


def row(title: str, measured: Sequence[Served], predicted: Sequence[Served]) -> str:
    """One row of a table of errors."""
    found = errors(measured, predicted)
    cells = "  ".join(f"{e.of_mean:+7.1%}{e.of_p99:+8.1%}{e.each:7.1%}" for e in found)
    return f"  {title:44}{cells}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--keep", type=Path, help="where to keep what is recorded")
    parser.add_argument("--from", type=Path, dest="source", help="show what was kept")
    options = parser.parse_args()
    if options.source is not None:
        recording = msgspec.json.decode(options.source.read_bytes(), type=Recording)
    else:
        sizes = [A_ROUND] * len(LOADS)
        recording = asyncio.run(recorded(ROUNDS, sizes, LOADS, Lengths(), BURST))
    if options.keep is not None:
        options.keep.write_bytes(msgspec.json.encode(recording))
    show(recording)


if __name__ == "__main__":
    main()
