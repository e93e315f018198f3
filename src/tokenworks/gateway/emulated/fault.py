"""Trouble on order, for tests of whoever relies on an engine: POST /emulate/fault says which."""

from typing import Literal

import msgspec

Kind = Literal["slow", "hang", "wake", "crash", "reset", "malformed", "wrong_usage", "refuse"]


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong.

    At once: `slow` (steps take `factor` times as long), `hang` (connections stay open, and silent)
    and `wake` from it, `crash`. To the next `times` requests: `refuse` (503), `wrong_usage`; to the
    next `times` streams, when they have said `after` words: `reset` (cut within a chunk) and
    `malformed` (the next word's event is broken, and the stream goes on).
    """

    kind: Kind
    factor: float = 2.0
    times: int = 1
    after: int = 3

    @property
    def is_in_stream(self) -> bool:
        """Whether it needs a stream to happen in."""
        return self.kind in ("reset", "malformed")

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1e6:
            raise ValueError("factor must be above 0")
        if self.times < 1 or self.after < 0:
            raise ValueError("times must be at least 1, and after 0")
