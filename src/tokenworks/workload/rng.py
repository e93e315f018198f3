"""Where chance comes from: an argument, never a module. `random.Random(seed)` is one."""

from typing import Protocol


class Rng(Protocol):
    """What this room asks of a source of chance; the names are those of `random.Random`."""

    def random(self) -> float:
        """A number from 0 up to, not including, 1."""
        ...

    def gauss(self, mu: float, sigma: float, /) -> float:
        """A normal number."""
        ...

    def expovariate(self, lambd: float, /) -> float:
        """An exponential number with mean 1 / `lambd`."""
        ...

    def gammavariate(self, alpha: float, beta: float, /) -> float:
        """A gamma number with mean `alpha` * `beta`."""
        ...
