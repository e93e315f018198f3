"""`tokenworks reload` and `tokenworks cap`: a running gateway changed."""

import re
from typing import Final

from tokenworks.cli.ask import KEY, URL, KeyEnv, Url, ask
from tokenworks.cli.console import OUT
from tokenworks.errors import UserError

_WATTS: Final = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*([kKmM]?)[wW]?$")
_TIMES: Final = {"": 1.0, "k": 1e3, "m": 1e6}


def reload(*, url: Url = URL, key_env: KeyEnv = KEY) -> None:
    """Have a running gateway read its fleet file again; no stream is cut.

    Example: tokenworks reload

    A file that can't be used changes nothing, and is told of. The same as SIGHUP.
    """
    OUT.print(ask(url, "/admin/reload", key_env, {})["reloaded"], soft_wrap=True, markup=False)


def cap(watts: str | None = None, /, *, url: Url = URL, key_env: KeyEnv = KEY) -> None:
    """Set what the fleet of a running gateway may draw, or show it.

    Example: tokenworks cap 2.5kW

    It holds until the gateway stops, or the fleet file's [power] changes and is read again.

    Parameters
    ----------
    watts
        As 900W or 2.5kW; none for no cap. Left out: shows how things are.
    """
    if watts is None:
        power = ask(url, "/admin/cap", key_env)
    else:
        power = ask(url, "/admin/cap", key_env, {"cap_w": watts_of(watts)})
    OUT.print(told(power), markup=False)


def watts_of(text: str) -> float | None:
    """The power that an operator means; None for no cap."""
    if text == "none":
        return None
    match = _WATTS.match(text)
    watts = float(match[1]) * _TIMES[match[2].lower()] if match is not None else 0.0
    if not watts > 0:
        raise UserError(
            f"{text!r} is no power", "Give watts above zero, as 900W or 2.5kW, or none."
        )
    return watts


def told(power: dict[str, float | None]) -> str:
    """The cap and what is drawn, in one line."""
    cap_w = power["cap_w"]
    parts = ["no cap" if cap_w is None else f"cap {cap_w:,g} W"]
    if power.get("reserved_w") is not None:
        parts.append(f"{power['reserved_w']:,.0f} W reserved")
    parts.append(f"{power['drawn_w']:,.0f} W drawn")
    return ", ".join(parts)
