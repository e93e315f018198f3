"""What a driver in real time asks an engine: each answer's tokens so far, the pace, the energy."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.drive import drive, placements
from tests.engine.test_skipping import traffic
from tokenworks.engine.build import build
from tokenworks.engine.work import Limits, Work

KINDS = ("dense", "windows", "lpu", "prefill, decode")
LIMITS = Limits(context_tokens=1024)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40)
@given(traffic(), st.lists(st.integers(0, 5 * 10**9), min_size=1, max_size=8), st.booleans())
def test_what_each_has_said_is_what_all_have_said(
    name: str, works: list[tuple[int, Work]], looks: list[int], slowed: bool
) -> None:
    engine = build(placements()[name], Limits(sequences=6, step_tokens=64, context_tokens=1024))
    if slowed:
        engine.slow(1700, 0)
    length = {work.id: work.output_tokens for _, work in works}
    said = {work.id: work.done_tokens for _, work in works}
    before = dict(said)
    todo: list[tuple[int, Work | None]] = [*works, *((at_ns, None) for at_ns in looks)]
    drawn = 0
    for at_ns, work in sorted(todo, key=lambda entry: entry[0]):
        told = drive(engine, [], at_ns)
        said |= {notice.id: length[notice.id] for notice in told if notice.kind == "finished"}
        now = engine.said(at_ns)
        assert all(now[ident] >= said[ident] for ident in now)  # never fewer than before
        said |= now
        if name != "prefill, decode" or not engine.load().running:
            assert sum(said.values()) - sum(before.values()) == engine.tokens(at_ns)
        assert engine.drawn_nj(at_ns) >= drawn
        drawn = engine.drawn_nj(at_ns)
        if work is not None:
            engine.submit(work, at_ns)


@pytest.mark.parametrize("name", KINDS)
def test_the_beat_is_when_the_next_token_comes(name: str) -> None:
    engine = build(placements()[name], LIMITS)
    assert engine.beat(0) is None
    engine.submit(Work(0, 100, 30), 0)
    first_ns = next(n.at_ns for n in drive(engine, [], 10**9) if n.kind == "first")
    engine = build(placements()[name], LIMITS)
    engine.submit(Work(0, 100, 30), 0)
    drive(engine, [], first_ns)
    now_ns, made = first_ns, engine.tokens(first_ns)
    while engine.beat(now_ns) is None:  # the cache is on its way
        at_ns = engine.next_ns()
        assert at_ns is not None
        now_ns = at_ns
        drive(engine, [], now_ns)
    made = engine.tokens(now_ns)
    for _ in range(5):
        beat = engine.beat(now_ns)
        assert beat is not None
        assert 0 < beat.at_ns - now_ns <= beat.step_ns + 1
        drive(engine, [], beat.at_ns - 1)
        assert engine.tokens(beat.at_ns - 1) == made
        drive(engine, [], beat.at_ns)
        assert engine.tokens(beat.at_ns) == made + 1
        now_ns, made = beat.at_ns, made + 1


def test_a_hung_engine_has_no_beat() -> None:
    for name in ("dense", "lpu"):
        engine = build(placements()[name], LIMITS)
        drive(engine, [(0, Work(0, 100, 300))], 50_000_000)
        assert engine.beat(50_000_000) is not None
        said = engine.said(50_000_000)
        engine.pause(50_000_000)
        engine.advance(90_000_000)
        assert engine.beat(90_000_000) is None
        assert engine.said(90_000_000) == said


@pytest.mark.parametrize("name", ["dense", "lpu"])
def test_energy_is_that_of_steps_and_of_doing_nothing(name: str) -> None:
    engine = build(placements()[name], LIMITS)
    (meter,) = engine.meters
    assert engine.drawn_nj(10**9) == meter.idle_mw * 10**6  # a second of it
    drive(engine, [(10**9, Work(0, 100, 30))])
    end_ns = 10 * 10**9
    engine.advance(end_ns)
    idle_s = 10 - meter.busy_ps / 1e12
    expected = meter.energy_nj + meter.idle_mw * idle_s * 1e6
    assert engine.drawn_nj(end_ns) == pytest.approx(expected, rel=1e-9)
