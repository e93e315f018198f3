from hypothesis import given
from hypothesis import strategies as st

from tests.twin.stage import run
from tokenworks.metrics.attribution import Split, attribute
from tokenworks.twin.replay import summary_of
from tokenworks.twin.run import Twin
from tokenworks.twin.trouble import Trouble
from tokenworks.units import NJ_PER_J, NS_PER_S
from tokenworks.workload import Request

AMOUNT = st.integers(0, 10**15)


@given(AMOUNT, st.integers(-(10**6), 10**15), st.lists(AMOUNT, max_size=20), AMOUNT)
def test_the_parts_are_the_total_and_none_is_negative(
    total: int, idle: int, weights: list[int], nobodys: int
) -> None:
    split = attribute(total, idle, weights, nobodys)
    assert sum(split.shares_nj) + split.idle_nj + split.unattributed_nj == total
    assert min([*split.shares_nj, split.idle_nj, split.unattributed_nj]) >= 0
    assert len(split.shares_nj) == len(weights)
    assert split.idle_nj == min(max(idle, 0), total)


@given(AMOUNT, st.lists(AMOUNT, max_size=20), AMOUNT)
def test_each_share_is_its_weights(total: int, weights: list[int], nobodys: int) -> None:
    split = attribute(total, 0, weights, nobodys)
    whole = sum(weights) + nobodys
    for share, weight in zip(split.shares_nj, weights, strict=True):
        assert abs(share * whole - total * weight) <= whole * len(weights)
        assert weight or not share
    if whole and not nobodys:
        assert not split.unattributed_nj


@given(st.lists(AMOUNT, max_size=20), AMOUNT, AMOUNT)
def test_a_meter_that_reads_what_was_modelled_gives_the_model_back(
    weights: list[int], nobodys: int, idle: int
) -> None:
    total = idle + sum(weights) + nobodys
    assert attribute(total, idle, weights, nobodys) == Split(weights, idle, nobodys)


def test_without_anybody_to_charge_the_rest_is_nobodys() -> None:
    assert attribute(100, 30, []) == Split([], 30, 70)
    assert attribute(100, 30, [0, 0]) == Split([0, 0], 30, 70)
    assert attribute(20, 30, [5]) == Split([0], 20, 0)
    assert attribute(100, 40, [1, 2], 3) == Split([10, 20], 40, 30)


# The twin


def requests() -> list[Request]:
    return [
        Request(number * NS_PER_S // 2, 400 + 37 * number, 40 + 11 * (number % 5))
        for number in range(20)
    ]


def troubled() -> Twin:
    pool = '[[pools]]\nname = "gpu"\nprocessor = "h100"\ndevices = 1\nreplicas = 2\n'
    troubles = [
        Trouble(2 * NS_PER_S + 123_456_789, "crash", 0),
        Trouble(3 * NS_PER_S, "slow", 1, permille=1700),
        Trouble(5 * NS_PER_S, "up", 0),
    ]
    return run(f'model = "llama-3.1-8b"\n{pool}', requests(), troubles)[0]


def test_the_twin_splits_what_its_fleet_drew_by_the_same_function() -> None:
    twin = troubled()
    summary = summary_of(twin)
    meters = [meter for unit in twin.units for meter in unit.engine.meters]
    worked = sum(meter.energy_nj for meter in meters)
    waste = sum(meter.unclaimed_nj for meter in meters)
    waste += sum(unit.engine.unshared_nj for unit in twin.units)
    assert waste > 0  # the step that the crash cut short
    idle = round(summary.idle_j * NJ_PER_J)
    charged = [outcome.energy_nj for outcome in twin.outcomes]
    # Its engines charge by the step; the split of the whole run gives the same, to the nanojoule.
    assert attribute(worked + idle, idle, charged, waste) == Split(charged, idle, waste)
    assert abs(summary.wasted_j * NJ_PER_J - waste) < 1e-3
    assert abs(summary.energy_j * NJ_PER_J - worked - idle) < 10
