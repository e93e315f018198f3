"""What a number means: its unit is the suffix of its name. Imports nothing of this project.

Time is an integer of nanoseconds outside, and of picoseconds where step times are summed; energy an
integer of nanojoules there. `bytes` are decimal (80 GB = 80e9), rates are per second.
"""

from typing import Final

PS_PER_NS: Final = 1000
NS_PER_S: Final = 10**9
PS_PER_S: Final = 10**12
NJ_PER_J: Final = 10**9
J_PER_KWH: Final = 3.6e6
S_PER_H: Final = 3600

# Suffix of a name, the unit it stands for, and the unit with its SI prefix left open ("" if the
# number is shown as it is). Longest first: `_usd_per_h` before `_h`.
_UNITS: Final = (
    ("bytes_per_s", "B/s"),
    ("usd_per_kwh", "$/kWh"),
    ("usd_per_h", "$/h"),
    ("j_per_flop", "J/flop"),
    ("j_per_byte", "J/B"),
    ("fraction", ""),
    ("exponent", ""),
    ("cycles", "cycles"),
    ("tokens", "tokens"),
    ("devices", "devices"),
    ("bytes", "B"),
    ("usd", "$"),
    ("hz", "Hz"),
    ("ns", "ns"),
    ("years", "years"),
    ("w", "W"),
)
_PREFIXES: Final = (
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
    (1e-9, "n"),
    (1e-12, "p"),
)
_WITH_PREFIX: Final = frozenset({"B/s", "B", "Hz", "flop/s", "W", "J/flop", "J/B", "s", "J"})


def unit_of(path: str) -> str:
    """The unit of the number called `path` ("link.nvlink.bytes_per_s": "B/s"); "" for a count."""
    if ".flops." in f".{path}":
        return "flop/s"
    last = path.rpartition(".")[2]
    for suffix, unit in _UNITS:
        if last == suffix or last.endswith("_" + suffix):
            return unit
    return ""


def show(value: float, unit: str = "") -> str:
    """`value` for a person: three or four digits, an SI prefix where the unit takes one."""
    if unit == "ns":
        value, unit = value / NS_PER_S, "s"
    if unit in _WITH_PREFIX and value:
        for scale, prefix in _PREFIXES:
            if abs(value) >= scale * 0.9995:
                return f"{_digits(value / scale)} {prefix}{unit}"
    text = _digits(value)
    return f"{text} {unit}" if unit else text


def _digits(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
