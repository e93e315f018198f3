"""Numbers as a person reads them, the same everywhere on a page. A dash where there is none."""

from typing import Final

from tokenworks.units import NS_PER_S, S_PER_H, show

DASH: Final = "\u2013"
_DAY_S: Final = 24 * S_PER_H


def measure(value: float | None, unit: str, places: int = 3) -> str:
    """So many digits that tell, a prefix and the unit: 1.50 ms."""
    if value is None:
        return DASH
    text, space, unit = show(float(f"{value:.{places}g}"), unit).partition(" ")
    number = float(text.replace(",", ""))
    if number and abs(number) < 1000:
        text = f"{number:#.{places}g}".rstrip(".") if abs(number) < 10**places else text
    return f"{text}{space}{unit}"


def latency(value_ns: float | None) -> str:
    """A time that a request took, of nanoseconds; batches may take hours."""
    return DASH if value_ns is None else duration(value_ns / NS_PER_S)


def rate(value_per_s: float | None, places: int = 3) -> str:
    """So many a second."""
    return DASH if value_per_s is None else f"{measure(value_per_s, '', places)}/s"


def count(value: int) -> str:
    """All digits."""
    return f"{value:,}"


def share(value: float | None) -> str:
    """Per cent; all and none are said of all and none only."""
    if value is None:
        return DASH
    if value in {0.0, 1.0}:
        return f"{value:.0%}".replace("%", " %")
    for digits in (1, 2, 3):
        text = f"{value:.{digits}%}"
        if float(text[:-1]) not in {0.0, 100.0}:
            return text.replace("%", " %")
    return "< 0.001 %" if value < 0.5 else "> 99.999 %"


def usd(value: float | None) -> str:
    """Dollars and cents; three digits of what is less than one."""
    if value is None:
        return DASH
    if value >= 999.995:
        return f"${value:,.0f}"
    return f"${value:.2f}" if value >= 1 or value == 0 else f"${value:#.3g}"


def duration(value_s: float) -> str:
    """A stretch of time in the two largest units that it has."""
    if value_s < 120:
        return measure(value_s, "s")
    seconds = round(value_s)
    for name, size, part, smaller in (
        ("d", _DAY_S, "h", S_PER_H),
        ("h", S_PER_H, "min", 60),
        ("min", 60, "s", 1),
    ):
        if seconds >= size:
            whole, rest = divmod(seconds, size)
            return f"{whole} {name}" + (f" {rest // smaller} {part}" if rest >= smaller else "")
    raise AssertionError(value_s)
