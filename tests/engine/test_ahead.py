"""With async_scheduling a step is decided on when the one before begins."""

import pytest

from tests.engine.drive import drive, placements
from tokenworks.cost import Chunk
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.work import Limits, Work

DENSE = placements()["dense"]
READING_PS = DENSE.mixed(0, (), [Chunk(100)]).time_ps


def first_ns(ahead: bool, at_ns: int) -> int:
    """When a request that comes while another works says its first token."""
    engine = ContinuousBatch(DENSE, Limits(async_scheduling=ahead))
    told = drive(engine, [(0, Work(0, 100, 50)), (at_ns, Work(1, 100, 5))])
    (found,) = [notice.at_ns for notice in told if notice.kind == "first" and notice.id == 1]
    return found


def after(steps_ps: list[int]) -> int:
    return -(-sum(steps_ps) // 1000)


# During the first step, and at the very end of it, which is the second's beginning.
@pytest.mark.parametrize(("at_ps", "over"), [(READING_PS // 2, 0), (READING_PS + 999, 1)])
def test_who_comes_joins_the_step_after_the_next(at_ps: int, over: int) -> None:
    alone = [READING_PS, *(DENSE.decoding(1, (101 + k,)).time_ps for k in range(3))]
    both = [DENSE.mixed(1, (101 + k,), [Chunk(100)]).time_ps for k in range(3)]
    at_ns = at_ps // 1000
    assert first_ns(False, at_ns) == after([*alone[: over + 1], both[over]])
    assert first_ns(True, at_ns) == after([*alone[: over + 2], both[over + 1]])


def test_an_idle_engine_begins_at_once() -> None:
    engine = ContinuousBatch(DENSE, Limits(async_scheduling=True))
    told = drive(engine, [(7, Work(0, 100, 1)), (10**9, Work(1, 100, 1))])
    firsts = [notice.at_ns for notice in told if notice.kind == "first"]
    assert firsts == [after([7000, READING_PS]), after([10**12, READING_PS])]


def test_who_comes_during_the_last_step_begins_after_it() -> None:
    engine = ContinuousBatch(DENSE, Limits(async_scheduling=True))
    told = drive(engine, [(0, Work(0, 100, 1)), (READING_PS // 2000, Work(1, 100, 1))])
    firsts = [notice.at_ns for notice in told if notice.kind == "first"]
    assert firsts == [after([READING_PS]), after([READING_PS, READING_PS])]
