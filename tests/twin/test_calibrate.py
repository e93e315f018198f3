"""Constants from streams: of an engine that is played here step by step, in the plainest way."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import ModuleType

import msgspec
import pytest

from tests.docs.test_docs import ROOT
from tokenworks.cost import Batch, Chunk
from tokenworks.cost.measured import Constants, Measured
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.work import Limits
from tokenworks.errors import UserError
from tokenworks.twin.calibrate import Stream, calibrated, steps
from tokenworks.twin.validate import errors, replayed

TRUTH = Constants((10e6, 21e6, 35e6, 38e6), 12_500.0, 300_000.0, 5.2e6, 7_000.0)
LIMITS = Limits(sequences=4, step_tokens=64, prefix_cache=False)
ROOM = 4 * 8192


class Seat:
    """A request at work."""

    def __init__(self, arrival_ns: int, prompt_tokens: int, output_tokens: int) -> None:
        self.arrival_ns, self.prompt_tokens = arrival_ns, prompt_tokens
        self.output_tokens, self.read = output_tokens, 0
        self.token_ns: list[int] = []


def served(truth: Constants, asked: Sequence[tuple[int, int, int]]) -> list[Stream]:
    """Requests (arrival, prompt and output tokens) on an engine without any shortcut."""
    prepared = Measured(truth, ROOM)
    waiting = [Seat(*each) for each in sorted(asked)]
    everyone, seated, now_ps = list(waiting), list[Seat](), 0
    while waiting or seated:
        if not seated:
            now_ps = max(now_ps, waiting[0].arrival_ns * 1000)
        while waiting and len(seated) < 4 and waiting[0].arrival_ns * 1000 <= now_ps:
            seated.append(waiting.pop(0))
        decoding = [seat for seat in seated if seat.token_ns]
        budget, reading = 64 - len(decoding), list[tuple[Seat, Chunk]]()
        for seat in seated:
            size = min(seat.prompt_tokens - seat.read, budget)
            if size:
                reading.append((seat, Chunk(size, seat.read)))
                budget -= size
        contexts = [seat.prompt_tokens + len(seat.token_ns) - 1 for seat in decoding]
        now_ps += prepared.step(Batch(contexts, [chunk for _, chunk in reading])).time_ps
        for seat, chunk in reading:
            seat.read += chunk.tokens
        for seat in decoding + [seat for seat, _ in reading if seat.read == seat.prompt_tokens]:
            seat.token_ns.append(-(-now_ps // 1000))
        seated = [seat for seat in seated if len(seat.token_ns) < seat.output_tokens]
    return [Stream(s.arrival_ns, s.prompt_tokens, tuple(s.token_ns)) for s in everyone]


def requests(per_s: float, count: int = 60) -> list[tuple[int, int, int]]:
    chance, at_ns, found = Random(11), 0, []
    for _ in range(count):
        found.append((at_ns, chance.randint(20, 300), chance.randint(10, 80)))
        at_ns += round(chance.expovariate(per_s) * 1e9)
    return found


@pytest.mark.parametrize("per_s", [0.2, 0.5, 2.0])
def test_the_modelled_engine_does_what_single_steps_do(per_s: float) -> None:
    run = served(TRUTH, requests(per_s))
    told = replayed(
        ContinuousBatch(Measured(TRUTH, ROOM), LIMITS), [stream.served for stream in run]
    )
    for stream, each in zip(run, told, strict=True):
        assert each == stream.served


@pytest.mark.parametrize("per_s", [0.2, 0.5])
def test_the_constants_are_found(per_s: float) -> None:
    found = calibrated([served(TRUTH, requests(per_s))], LIMITS)
    assert found.decode_ns == pytest.approx(TRUTH.decode_ns, rel=1e-6)
    rest = [found.seen_ns, found.chunk_ns, found.prompt_token_ns, found.pair_ns]
    assert rest == pytest.approx([12_500, 300_000, 5.2e6, 7_000], rel=1e-4)


def test_the_steps_are_those_that_were() -> None:
    """Each is what it says it took, with the true constants; and few are left out."""
    run = served(TRUTH, requests(0.4))
    found, prepared = steps(run, LIMITS), Measured(TRUTH, ROOM)
    for step in found:
        told_ns = prepared.mixed(step.sequences, [step.seen], step.chunks).time_ns
        assert step.time_ns == pytest.approx(told_ns, rel=1e-6)
    read = sum(chunk.tokens for step in found for chunk in step.chunks)
    assert read > 0.5 * sum(stream.prompt_tokens for stream in run)


def test_tokens_that_come_late_and_apart_do_little_harm() -> None:
    chance, late = Random(5), []
    for stream in served(TRUTH, requests(0.4)):
        stamps = sorted(at + round(chance.expovariate(1 / 300_000)) for at in stream.token_ns)
        late.append(stream._replace(token_ns=tuple(stamps)))
    found = calibrated([late], LIMITS)
    assert found.decode_ns == pytest.approx(TRUTH.decode_ns, rel=0.03)
    assert found.prompt_token_ns == pytest.approx(TRUTH.prompt_token_ns, rel=0.05)


def test_requests_that_reached_the_engine_late_give_no_wrong_steps() -> None:
    """Sent before a step began, seen by the engine only after: what they read is not known then."""
    asked = [(0, 20, 300), *((at * 10**9, 69, 5) for at in (1, 2, 3, 4))]
    late_ns = 12_000_000  # a step and a bit
    run = [
        each._replace(arrival_ns=max(each.arrival_ns - late_ns, 0)) for each in served(TRUTH, asked)
    ]
    found, prepared = steps(run, LIMITS), Measured(TRUTH, ROOM)
    assert len(found) > 200
    for step in found:
        told_ns = prepared.mixed(step.sequences, [step.seen], step.chunks).time_ns
        assert step.time_ns == pytest.approx(told_ns, rel=1e-6)


def test_an_engine_that_works_otherwise_is_not_forced_into_steps() -> None:
    """Prompts all at once, or one token a step too late: what read is left out."""
    run = served(TRUTH, requests(0.4))
    other = Limits(sequences=4, step_tokens=200, prefix_cache=False)
    mixed = [step for step in steps(run, other) if step.sequences and step.chunks]
    honest = [step for step in steps(run, LIMITS) if step.sequences and step.chunks]
    assert len(mixed) < 0.3 * len(honest)


def test_a_run_of_nobody_teaches_nothing() -> None:
    with pytest.raises(UserError, match="not enough to learn from"):
        calibrated([[]], LIMITS)


def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("embedded", ROOT / "bench/validate_embedded.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_meets_what_our_own_engine_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = command()
    runs = [
        # With slots in the order of arrival, the order of slots is the engine's own.
        [[bench.Seen(each, each, n) for n, each in enumerate(served(TRUTH, requests(per_s, 30)))]]
        for per_s in (0.2, 0.5)
    ]
    kept = tmp_path / "kept.json"
    kept.write_bytes(msgspec.json.encode(bench.Recording(4, 8192, 0.7, runs[0][0][:2], runs)))
    monkeypatch.setattr("sys.argv", ["validate_embedded.py", "--from", str(kept)])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("  calibrated on", "  the same"))]
    assert ["predicted" in row for row in rows] == [False, True, False] * 4
    for row in rows:
        assert all(abs(float(cell[:-1])) < 0.1 for cell in row.split() if cell.endswith("%")), row
    recording = msgspec.json.decode(kept.read_bytes(), type=bench.Recording)
    double = msgspec.structs.replace(TRUTH, decode_ns=tuple(2 * d for d in TRUTH.decode_ns))
    run = recording.by("own")[1]
    for each in errors(bench.flat(run), bench.played(double, recording, run)):
        assert each.of_mean > 0.2
