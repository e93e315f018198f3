"""Time stamps as text to nanoseconds since 1970. By hand: the standard library's parser keeps
microseconds only, and Azure's stamps have seven digits.
"""

import math
from typing import Final

from tokenworks.units import NS_PER_S

_DAYS: Final = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_SCALES: Final[tuple[int, ...]] = tuple(int(10 ** (10 - length)) for length in range(11))


class Stamps:
    """Reads stamps, and keeps what was worked out up to the second: a trace has many in each."""

    def __init__(self) -> None:
        self._seconds: dict[str, int] = {}

    def ns(self, text: str) -> int:
        """Of `2023-11-16 18:15:46.6805900`, with or without a zone; ValueError otherwise."""
        second = self._seconds.get(text[:19])
        if second is None:
            second = self._seconds[text[:19]] = _second_ns(text[:19])
        rest = text[19:]
        if rest[:1] == "." and rest[1:].isdecimal() and len(rest) <= 10:
            return second + int(rest[1:]) * _SCALES[len(rest)]
        for mark in "Z+-":
            rest, found, zone = rest.partition(mark)
            if found:
                second -= _zone_ns(found + zone)
                break
        if not rest:
            return second
        if rest[0] != "." or not rest[1:].isdecimal():
            raise ValueError(text)
        return second + int(rest[1:10].ljust(9, "0"))


def seconds_ns(text: str) -> int:
    """Of seconds since whenever, like `5` or `5.25`; ValueError for what is no such number."""
    if text.isdecimal() and len(text) < 20:
        return int(text) * NS_PER_S
    seconds = float(text.replace("_", "?"))  # Python's 1_000 is nobody's CSV
    if not math.isfinite(seconds):
        raise ValueError(text)
    return round(seconds * NS_PER_S)


def _second_ns(text: str) -> int:
    if text[16:17] != ":":
        raise ValueError(text)
    return _minute_ns(text[:16]) + _number(text[17:].rjust(2, "x"), 60) * NS_PER_S


def _minute_ns(text: str) -> int:
    date, time = text[:10], text[11:]
    if len(text) != 16 or date[4] + date[7] + time[2] != "--:" or text[10] not in " T":
        raise ValueError(text)
    year, month, day = _number(date[:4], 9999), _number(date[5:7], 12), _number(date[8:], 31)
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    if not month or not 1 <= day <= _DAYS[month - 1] + (leap and month == 2):
        raise ValueError(text)
    before = year - 1
    days = before * 365 + before // 4 - before // 100 + before // 400
    days += sum(_DAYS[: month - 1]) + (leap and month > 2) + day - 1
    minutes = (days - 719_162) * 1440 + _number(time[:2], 23) * 60 + _number(time[3:], 59)
    return minutes * 60 * NS_PER_S


def _zone_ns(zone: str) -> int:
    if zone == "Z":
        return 0
    hours, _, minutes = zone[1:].partition(":")
    shift = (_number(hours, 23) * 60 + _number(minutes or "0", 59)) * 60 * NS_PER_S
    return shift if zone[0] == "+" else -shift


def _number(text: str, most: int) -> int:
    if not text.isdecimal() or int(text) > most:
        raise ValueError(text)
    return int(text)
