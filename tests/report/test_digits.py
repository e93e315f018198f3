"""Numbers as text: what is read back is what was meant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenworks.report import digits
from tokenworks.units import NS_PER_S

from .reading import number


@given(st.floats(1e-12, 9e11))
def test_a_measure_is_read_back_to_three_digits(value: float) -> None:
    assert number(digits.measure(value, "J")) == pytest.approx(value, rel=0.0051)


@given(st.floats(1e-9, 119.0))
def test_a_short_latency_is_read_back_to_three_digits(value_s: float) -> None:
    assert number(digits.latency(value_s * NS_PER_S)) == pytest.approx(value_s, rel=0.0051)


@given(st.floats(120.0, 1e7))
def test_a_long_latency_is_told_in_minutes_hours_or_days(value_s: float) -> None:
    text = digits.latency(value_s * NS_PER_S)
    assert "k" not in text
    assert number(text) == pytest.approx(value_s, rel=0.04)


@given(st.floats(0.0, 1.0))
def test_all_and_none_are_said_of_all_and_none_only(value: float) -> None:
    text = digits.share(value)
    assert (text == "100 %") == (value == 1.0)
    assert (text == "0 %") == (value == 0.0)
    if text[0] not in "<>":
        assert text in {"100 %", "0 %"} or 0.0 < number(text) < 1.0
        assert number(text) == pytest.approx(value, abs=0.00051)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "$0.00"), (0.000123, "$0.000123"), (0.5, "$0.500"), (12.345, "$12.35"),
     (999.999, "$1,000"), (1234.5, "$1,234"), (None, digits.DASH)],
)  # fmt: skip
def test_dollars(value: float | None, text: str) -> None:
    assert digits.usd(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 s"), (1.5, "1.50 s"), (119.4, "119 s"), (120, "2 min"), (3599.6, "1 h"),
     (5400, "1 h 30 min"), (86_399, "23 h 59 min"), (90_000, "1 d 1 h"), (86_460, "1 d")],
)  # fmt: skip
def test_durations(value: float, text: str) -> None:
    assert digits.duration(value) == text


def test_a_dash_stands_where_there_is_none() -> None:
    texts = {digits.measure(None, "J"), digits.latency(None), digits.rate(None), digits.share(None)}
    assert texts == {digits.DASH}
