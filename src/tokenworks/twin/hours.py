"""How long each replica was on, and what that cost: prices may change in between."""

from typing import Final

from tokenworks.units import NS_PER_S

_OFF: Final = -1


class Hours:
    """One replica's. `usd_per_s` None: no price is known, and so no cost."""

    def __init__(self, *, is_on: bool, usd_per_s: float | None) -> None:
        self.usd_per_s = usd_per_s
        self._since_ns = 0 if is_on else _OFF
        self._paid_ns = 0  # until when it is in `_usd`
        self._spans: list[tuple[int, int]] = []  # that are over
        self._usd = 0.0

    @property
    def is_on(self) -> bool:
        """Whether it is on."""
        return self._since_ns != _OFF

    def turn(self, now_ns: int, *, on: bool) -> None:
        """It is turned on or off."""
        if on == self.is_on:
            return
        self._pay(now_ns)
        if not on:
            self._spans.append((self._since_ns, now_ns))
        self._since_ns = now_ns if on else _OFF

    def price(self, usd_per_s: float, now_ns: int) -> None:
        """From now on it costs so much."""
        self._pay(now_ns)
        self.usd_per_s = usd_per_s

    def on_s(self, from_ns: float, to_ns: float, now_ns: int) -> float:
        """Seconds that it was on between two times; `now_ns`: when the run ended."""
        spans = [*self._spans, (self._since_ns, now_ns)] if self.is_on else self._spans
        inside = (min(end, to_ns) - max(begin, from_ns) for begin, end in spans)
        return sum(each for each in inside if each > 0) / NS_PER_S

    def usd(self, now_ns: int) -> float | None:
        """What it has cost so far."""
        self._pay(now_ns)
        return None if self.usd_per_s is None else self._usd

    def _pay(self, now_ns: int) -> None:
        if self.is_on and self.usd_per_s is not None:
            self._usd += (now_ns - max(self._paid_ns, self._since_ns)) / NS_PER_S * self.usd_per_s
        self._paid_ns = now_ns
