"""What is written of a replica makes the same data sheet again."""

from pathlib import Path

import msgspec
import pytest

from tokenworks.catalog.book import catalog
from tokenworks.fleet.sheet import Sheet, Sheets, sheet
from tokenworks.gateway.fleet import Means, units_of
from tokenworks.gateway.settings import PoolSettings
from tokenworks.model import library
from tokenworks.sched.forecast import Forecast


@pytest.mark.parametrize(
    "pool",
    [
        PoolSettings("llama-3.1-8b", "emulated", processor="h100", slots=64),
        PoolSettings("llama-3.1-70b", "emulated", processor="h100", devices=4, tp=4),
        # Slots that are as long as its few chips can afford.
        PoolSettings("llama-3.1-8b", "emulated", processor="groq-3-lpu"),
        PoolSettings("llama-3.1-8b", "emulated", processor="groq-3-lpu", context_tokens=1024),
    ],
    ids=["gpu", "tp", "lpu", "short"],
)
def test_a_sheet_on_file_is_the_same_again(pool: PoolSettings) -> None:
    means = Means(catalog(), library.shape, {}, Path("unused"))
    (unit,) = units_of(pool, means, "default")
    told = msgspec.json.encode(sheet(unit.spec, unit.wish, pool.model))
    again = Sheets(catalog(), library.shape).spec(msgspec.json.decode(told, type=Sheet))
    names = [name for name in unit.spec.__struct_fields__ if name != "forecast"]
    for name in names:
        assert getattr(again, name) == getattr(unit.spec, name), name
    before, after = unit.spec.forecast, again.forecast
    assert isinstance(before, Forecast)
    assert isinstance(after, Forecast)
    assert after.seats == before.seats
    assert after.alone(700) == before.alone(700)
    for count in (1, 5):
        assert after.step_ns(count, 900.0) == before.step_ns(count, 900.0)
        assert after.energy_j(count, 900.0) == before.energy_j(count, 900.0)
