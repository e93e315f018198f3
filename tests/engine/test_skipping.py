"""Taking many steps at once is exactly taking one by one, whatever happens in between."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.drive import DISTURBANCES, disturb, placements, spread, total_nj
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.work import Limits, Work

GPUS = ("dense", "windows", "chunks", "experts", "attention and ffn", "drafted")


class OneByOne(ContinuousBatch):
    """The same engine, without skipping."""

    def _steps_that_fit(self, most: int) -> int:
        return min(super()._steps_that_fit(most), 1)


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[int, Work]]:
    """Requests with short prompts, shared prefixes and all kinds of lengths."""
    works, at_ns = [], 0
    for ident in range(draw(st.integers(1, 14))):
        at_ns += draw(st.one_of(st.just(0), st.integers(0, 300_000_000), st.integers(0, 5 * 10**9)))
        prompt = draw(st.integers(1, 300))
        prefix = draw(st.sampled_from([(), (1,), (1, 2), (1, 2, 3), (9,)]))
        done = draw(st.sampled_from([0, 0, 0, 3]))
        works.append(
            (
                at_ns,
                Work(
                    ident,
                    prompt,
                    done + draw(st.integers(1, 120)),
                    group=draw(st.integers(0, 3)),
                    priority=draw(st.integers(0, 1)),
                    done_tokens=done,
                    is_read=done > 0 and draw(st.booleans()),
                    prefix=prefix[: prompt // 32],
                    prefix_block_tokens=32,
                ),
            )
        )
    return works


LIMITS = st.builds(
    Limits,
    sequences=st.integers(1, 8),
    step_tokens=st.sampled_from([8, 64, 512]),
    block_tokens=st.sampled_from([4, 16]),
    # Small enough that sequences are preempted, large enough for each alone (or it is refused).
    kv_blocks=st.sampled_from([30, 60, 120, 100_000]),
    prefix_cache=st.booleans(),
    async_scheduling=st.booleans(),
)


@pytest.mark.parametrize("name", GPUS)
@settings(max_examples=60, report_multiple_bugs=False)
@given(traffic(), LIMITS, DISTURBANCES)
def test_skipping_changes_nothing(
    name: str, works: list[tuple[int, Work]], limits: Limits, disturbances: list[tuple[int, str]]
) -> None:
    prepared = placements()[name]
    if limits.step_tokens < limits.sequences:
        return
    skips, steps = ContinuousBatch(prepared, limits), OneByOne(prepared, limits)
    told, lost = disturb(skips, works, disturbances)
    expected, expected_lost = disturb(steps, works, disturbances)
    assert told == expected
    assert lost == expected_lost
    for one, other in zip(skips.meter.gaps, steps.meter.gaps, strict=True):
        assert spread(one) == spread(other)
    for field in ("busy_ps", "energy_nj", "steps", "made_tokens", "read_tokens", "preemptions"):
        assert getattr(skips.meter, field) == getattr(steps.meter, field), field
    # Exactly one end for each, all blocks free, and every joule charged to someone.
    ends = [n.id for n in told if n.kind in ("finished", "refused")] + [each.id for each in lost]
    assert sorted(ends) == [work.id for _, work in works]
    assert skips.blocks.used == 0
    spent, charged = total_nj(skips, told)
    assert spent == charged + sum(each.energy_nj for each in lost)
