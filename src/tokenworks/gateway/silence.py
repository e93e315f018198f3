"""Engines and streams that have gone silent with their connections open, found by looking.

How long is too long is learned of each engine: it may be so many times the longest silence that
ended well.
"""

from collections.abc import Iterable
from typing import Final

from tokenworks.gateway.engine import Engine, State
from tokenworks.units import NS_PER_S

LOOK_NS: Final = 250_000_000
# With an engine all of whose streams are silent, and with one stream while others go on (it may
# wait for room in the cache): looks, at least.
_PATIENCE: Final = 12
_LONE_PATIENCE: Final = 48
_PATIENT: Final = 4
_FADES: Final = 0.999  # of what was the longest, from look to look


def watch(engines: Iterable[Engine]) -> None:
    """Look at all streams; to be called each LOOK_NS. What is lost by it goes on elsewhere."""
    for engine in engines:
        engine.longest_silence *= _FADES
        engine.longest_pause *= _FADES
        is_open = _watch_legs(engine)
        said = engine.packets_done + sum(leg.packets for leg in engine.legs)
        if said != engine.said or not is_open:
            if is_open:
                engine.longest_silence = max(engine.longest_silence, engine.silent)
            engine.said, engine.silent = said, 0
            continue
        engine.silent += 1
        if engine.silent > max(_PATIENCE, _PATIENT * engine.longest_silence):
            _hung(engine)


def _watch_legs(engine: Engine) -> bool:
    """Look at each of an engine's streams; whether there are any that should say something."""
    most = max(_LONE_PATIENCE, _PATIENT * engine.longest_pause)
    is_open = False
    for leg in list(engine.legs):
        if not leg.is_open or leg.exchange.paused:
            continue
        is_open = True
        packets = leg.packets
        if packets != leg.seen:
            leg.seen = packets
            engine.longest_pause = max(engine.longest_pause, leg.silent)
            leg.silent = 0
            continue
        leg.silent += 1
        if leg.silent > most:
            leg.exchange.lost(leg, _told(leg.silent))
    return is_open


def _hung(engine: Engine) -> None:
    """All its streams have been silent for too long."""
    told = _told(engine.silent)
    engine.longest_silence = max(engine.longest_silence, engine.silent)  # if it was too soon
    engine.silent = 0
    if engine.on_hung is not None:
        engine.on_hung(engine)
        engine.set_state(State.DOWN, told)
        return
    for leg in list(engine.legs):
        if leg.is_open and not leg.exchange.paused:
            leg.exchange.lost(leg, told)


def _told(looks: int) -> str:
    return f"it has said nothing for {looks * LOOK_NS / NS_PER_S:.1f} s"
