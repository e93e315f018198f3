"""The deterministic replica, and those joined of two: nothing varies, nothing is lost."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.drive import DISTURBANCES, disturb, drive, on, placements, spread, total_nj
from tokenworks.cost.static import Static
from tokenworks.engine.build import build
from tokenworks.engine.pipeline import StaticPipeline
from tokenworks.engine.work import Limits, Notice, Work
from tokenworks.errors import UserError


def lpu(**limits: Any) -> StaticPipeline:
    prepared = placements()["lpu"]
    assert isinstance(prepared, Static)
    return StaticPipeline(prepared, Limits(**{"context_tokens": 2048, **limits}))


def test_the_time_of_a_token_is_a_constant_whoever_else_is_there() -> None:
    alone, crowd = lpu(), lpu()
    (first, finished) = drive(alone, [(0, Work(0, 500, 101))])
    assert finished.at_ns - first.at_ns == pytest.approx(100 * alone.pass_ps / 1000, abs=1)
    assert spread(alone.meter.gaps[0]) == {alone.pass_ps: 100}
    others = [(0, Work(ident, 900, 300)) for ident in range(1, crowd.slots)]
    told = drive(crowd, [(0, Work(0, 500, 101)), *others])
    assert [n.at_ns for n in told if n.id == 0] == [first.at_ns, finished.at_ns]


def test_prompts_are_read_one_after_the_other_and_slots_waited_for() -> None:
    engine = lpu(sequences=2)
    told = drive(engine, [(0, Work(ident, 1000, 50)) for ident in range(3)])
    at = {(n.kind, n.id): n.at_ns for n in told}
    read_ns, pass_ns = engine.read_ps(1000) / 1000, engine.pass_ps / 1000
    assert at["first", 0] == pytest.approx(read_ns + pass_ns, abs=2)
    assert at["first", 1] == pytest.approx(2 * read_ns + pass_ns, abs=2)
    assert at["first", 2] == pytest.approx(at["finished", 0] + read_ns + pass_ns, abs=2)


def test_what_is_aborted_unread_is_not_read() -> None:
    """Those behind it come sooner by all that was left of its prompt."""
    engine = lpu(sequences=8)
    for ident in range(4):
        engine.submit(Work(ident, 1000, 50), 0)
    read_ns, pass_ns = engine.read_ps(1000) / 1000, engine.pass_ps / 1000
    half_ns = round(1.5 * read_ns)
    told = {(notice.kind, notice.id): notice.at_ns for notice in engine.advance(half_ns)}
    for ident in (1, 2):  # one is half read, of the other nothing is
        lost = engine.abort(ident, half_ns)
        assert lost is not None
        assert lost.done_tokens == 0
    while (at_ns := engine.next_ns()) is not None:
        told |= {(notice.kind, notice.id): notice.at_ns for notice in engine.advance(at_ns)}
    assert told["first", 0] == pytest.approx(read_ns + pass_ns, abs=2)
    assert told["first", 3] == pytest.approx(half_ns + read_ns + pass_ns, abs=3)
    assert engine.meter.read_tokens == pytest.approx(2500, abs=2)


def test_what_no_slot_holds_is_refused() -> None:
    (told,) = drive(lpu(), [(7, Work(1, 2000, 100))])
    assert told == Notice("refused", 1, 7)
    with pytest.raises(UserError, match="no context of 1000000000"):
        lpu(context_tokens=10**9)


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[int, Work]]:
    works, at_ns = [], 0
    for ident in range(draw(st.integers(1, 14))):
        at_ns += draw(st.integers(0, 10**9))
        done = draw(st.sampled_from([0, 0, 3]))
        output = done + draw(st.integers(1, 200))
        is_read = done > 0 and draw(st.booleans())
        prompt = draw(st.integers(1, 1500))
        since_ns = at_ns if is_read else 0
        works.append(
            (at_ns, Work(ident, prompt, output, ident % 4, 0, done, is_read, since_ns=since_ns))
        )
    return works


@pytest.mark.parametrize("name", ["lpu", "prefill, decode"])
@settings(max_examples=80)
@given(traffic(), st.integers(1, 6), DISTURBANCES)
def test_every_request_ends_once_and_every_joule_is_charged(
    name: str, works: list[tuple[int, Work]], sequences: int, disturbances: list[tuple[int, str]]
) -> None:
    engine = build(placements()[name], Limits(sequences=sequences, context_tokens=2048))
    told, lost = disturb(engine, works, disturbances)
    ends = [n.id for n in told if n.kind in ("finished", "refused")] + [each.id for each in lost]
    assert sorted(ends) == [work.id for _, work in works]
    spent, charged = total_nj(engine, told)
    assert spent == charged + sum(each.energy_nj for each in lost)
    assert [n.at_ns for n in told] == sorted(n.at_ns for n in told)
    assert engine.load().running == engine.load().waiting == 0
    # Tokens: what was said; and who is taken off a batch takes part in its last step for nothing.
    by_id = {work.id: work for _, work in works}
    said = sum(
        by_id[n.id].output_tokens - by_id[n.id].done_tokens for n in told if n.kind == "finished"
    ) + sum(each.done_tokens - by_id[each.id].done_tokens for each in lost)
    assert 0 <= sum(meter.made_tokens for meter in engine.meters) - said <= len(lost)


def test_the_cache_travels_between_the_first_token_and_the_second() -> None:
    engine = build(placements()["prefill, decode"], Limits(context_tokens=4096))
    (first, finished) = drive(engine, [(0, Work(0, 2000, 11))])
    gaps = [gap for meter in engine.meters for gap in spread(meter.gaps[0])]
    assert len(gaps) == 2
    assert sum(
        gap * count for meter in engine.meters for gap, count in spread(meter.gaps[0]).items()
    ) == pytest.approx(1000 * (finished.at_ns - first.at_ns), abs=2000)


def test_reading_elsewhere_leaves_the_answers_even() -> None:
    alone = on("llama-3.1-8b", "h100", 1)
    joined = build(placements()["prefill, decode"], Limits(context_tokens=4096))
    works = [(ident * 30_000_000, Work(ident, 3000, 200)) for ident in range(40)]
    mixed = build(alone, Limits())
    drive(joined, works)
    drive(mixed, works)
    longest = max(max(spread(meter.gaps[0]), default=0) for meter in mixed.meters)
    writer = joined.meters[1]
    usual = max(spread(writer.gaps[0]).items(), key=lambda item: item[1])[0]
    assert longest > 2 * usual
