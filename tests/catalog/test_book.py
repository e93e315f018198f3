"""The catalogue: every number has unit, source and grade; a user's own numbers come over it."""

import re
from collections.abc import Iterator

import pytest

from tokenworks.catalog.book import Catalog, Record, catalog
from tokenworks.catalog.quantity import Quantity
from tokenworks.errors import UserError
from tokenworks.units import show, unit_of

BOOK = catalog()


def numbers() -> Iterator[tuple[Record, str, Quantity]]:
    for records in BOOK.tables.values():
        for record in records.values():
            for path, number in record.numbers.items():
                yield record, path, number


def test_every_number_has_source_grade_and_unit() -> None:
    assert len(list(numbers())) > 250
    for record, path, number in numbers():
        place = f"{record.table}.{record.name}.{path}"
        assert number.source in BOOK.sources, place
        assert number.grade != "user", place
        for other in number.others:
            assert other.source in BOOK.sources, place
        if record.table == "processor" and not path.startswith("units."):
            assert unit_of(path), place


def test_every_source_is_used_and_can_be_found() -> None:
    used = {number.source for _, _, number in numbers()}
    used |= {other.source for _, _, number in numbers() for other in number.others}
    used |= {"aic-perf"}  # of data/measured.toml
    assert used == set(BOOK.sources)
    for name, source in BOOK.sources.items():
        assert source.title, name
        assert source.address.startswith(("https://", "bench/", "docs/")), name


def test_assumptions_say_why_and_what_they_move() -> None:
    for record in BOOK.tables["assumption"].values():
        assert record.moves, record.name
        assert len(record.need("value").note) > 20, record.name


def test_what_was_asked_for_is_there() -> None:
    for name in (
        *("a100", "h100", "h200", "b200", "gb200", "b300", "gb300", "rubin", "l40s", "rtx-4090"),
        *("rtx-pro-6000", "mi300x", "mi325x", "mi355x", "mi455x", "tpu-v5e", "tpu-v5p", "tpu-v6e"),
        *("tpu-v7x", "trainium2", "trainium3", "maia-100", "maia-200", "groq-lpu-v1"),
        *("groq-3-lpu", "wse-3", "sn40l"),
    ):
        assert BOOK.processor(name).name == name
    assert BOOK.processor("H100-SXM").name == "h100"
    # Undisclosed stays absent.
    for path in ("tdp_w", "clock_hz", "price_usd"):
        assert BOOK.processor("groq-3-lpu").get(path) is None


def test_a_users_numbers_come_over_the_packaged_ones() -> None:
    raw = b"""
    [processor.h100]
    tdp_w = 650
    memory.hbm.bytes_per_s = { value = 3.0e12, note = "as we measured it" }
    [processor.mine]
    kind = "gpu"
    flops.bf16 = 1e14
    memory.gddr.bytes = 24e9
    [assumption.idle_fraction]
    value = 0.1
    """
    book = BOOK.with_user(raw, "my.toml").with_set("processor.h100.idle_w=99")
    changed = book.processor("h100")
    assert changed.need("tdp_w") == Quantity(650, "user", "my.toml")
    assert changed.need("memory.hbm.bytes_per_s").note == "as we measured it"
    assert changed.need("idle_w").value == 99
    assert changed.need("flops.bf16") == BOOK.processor("h100").need("flops.bf16")
    assert book.processor("mine").names("memory") == ("gddr",)
    assert book.assumed("idle_fraction").value == 0.1
    assert book.with_set("assumption.idle_fraction=0.3").assumed("idle_fraction").value == 0.3
    assert BOOK.processor("h100").need("tdp_w").value == 700
    # A fit of all processors can be set for one of them, and names may be written large.
    fitted = BOOK.with_set("fit.H100.layer_ns=1").with_set("processor.H100.tdp_w=2")
    assert fitted.fit(fitted.processor("h100"), "layer_ns").value == 1
    assert fitted.fit(fitted.processor("b200"), "layer_ns").value > 1
    assert fitted.processor("H100").need("tdp_w").value == 2


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ("a = [", "x.toml is not valid TOML"),
        (
            "[procesor.h100]\ntdp_w=1",
            "x.toml: there is no table 'procesor'. Did you mean processor",
        ),
        ("processor = 3", "x.toml: processor is no table"),
        ("[processor]\nh100 = 3", "x.toml: processor.h100 is no table"),
        ("[processor.h100]\ntpd_w = 3", "'tpd_w'. Did you mean tdp_w"),
        ("[processor.h100]\ntdp_w = 'much'", "x.toml: processor.h100.tdp_w: Expected `object`"),
        ("[processor.h100]\ntdp_w = true", "x.toml: processor.h100.tdp_w"),
        ("[processor.h100]\ntdp_w = -3", "processor.h100.tdp_w is -3"),
        ("[processor.h100]\ntdp_w = nan", "processor.h100.tdp_w is nan"),
        ("[processor.h100]\ntdp_w = {value = 3, grade = 'good'}", "Invalid enum value 'good'"),
        ("[processor.h100]\ntitle = 3", "processor.h100.title is 3"),
        ("[assumption.idle_fractoin]\nvalue = 3", "Did you mean idle_fraction"),
        ("[tariff.default]\nusd_kwh = 3", "Did you mean usd_per_kwh"),
        ("[tariff.default]\nactive_w = 3", "no number of tariff.default 'active_w'"),
    ],
)
def test_a_broken_table_is_one_clear_error(raw: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        BOOK.with_user(raw.encode(), "x.toml")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("h100", "is no setting"),
        ("processor.h100.tdp_w", "is no setting"),
        ("processor.h100.tdp_w=", "is no setting"),
        ("processor=3", "is no setting"),
        ("processor.h10.tdp_w=3", "Did you mean h100"),
        ("processor.h100.tpd_w=3", "Did you mean tdp_w"),
        ("gpu.h100.tdp_w=3", "no table 'gpu'"),
        ("processor.h100.tdp_w=-1", "is -1"),
        ("processor.h100.tdp_w=inf", "is inf"),
        ("assumption.nothing=3", "no assumption 'nothing'"),
        ("processor.h100.memory.hbm.bytes_per_s=0", "bytes_per_s is 0. It must be above zero"),
        ("processor.h100.flops.bf16=0", "flops.bf16 is 0"),
        ("fit.h100.weights_fraction=0", "weights_fraction is 0"),
        ("fit.h100.weights_fraction=1.5", "A share is at most 1"),
        ("fit.any.roofline_exponent=0", "roofline_exponent is 0"),
        ("assumption.amortisation_years=0", "amortisation_years is 0"),
    ],
)
def test_a_broken_setting_is_one_clear_error(assignment: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        BOOK.with_set(assignment)


def test_unknown_names_suggest() -> None:
    with pytest.raises(UserError, match="Did you mean h100"):
        BOOK.processor("h10")
    with pytest.raises(UserError, match=re.escape("--set processor.wse-3.clock_hz=NUMBER")):
        BOOK.processor("wse-3").need("clock_hz")


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (3.35e12, "B/s", "3.35 TB/s"),
        (700, "W", "700 W"),
        (1.2e-10, "J/B", "120 pJ/B"),
        (0.000999999, "s", "1 ms"),
        (42_100, "ns", "42.1 µs"),
        (0, "B", "0 B"),
        (989e12, "flop/s", "989 Tflop/s"),
        (12345.6, "", "12,346"),
        (0.09, "$/kWh", "0.09 $/kWh"),
    ],
)
def test_numbers_for_people(value: float, unit: str, told: str) -> None:
    assert show(value, unit) == told


def test_the_catalogue_is_not_changed_by_what_is_made_of_it() -> None:
    before = Catalog(BOOK.tables, BOOK.sources)
    BOOK.with_set("processor.h100.tdp_w=1")
    assert before == BOOK
