"""What is known of all replicas of a pool: how promises fare there, and whether there is room."""

from typing import Final

from tokenworks.sched.promise import Calibrator, Conditional
from tokenworks.units import NS_PER_S

# How full a replica is, is a condition of promises: the fuller, the less one request more matters.
# Classes are apart: real-time is let in where it is well served, flex when there is little else, so
# that more is to come. A condition is `Replica.level + Job.level`.
FILLS: Final = 5
_CONDITIONS: Final = 3 * FILLS
_CALM_NS: Final = 60 * NS_PER_S  # without a refusal, after which saving goes first again


class Pool:
    """Calibrators of times to the first token, by whether it queued, and of times per token."""

    __slots__ = ("judged_ns", "made", "name", "tight_ns", "tpot", "ttft", "ttft_queued")

    def __init__(self, name: str, confidence: float) -> None:
        self.name = name
        self.ttft, self.ttft_queued = Calibrator(confidence), Calibrator(confidence)
        self.tpot = Conditional(confidence, _CONDITIONS)
        self.made = 0  # promises
        self.judged_ns = 0  # when it was last seen what became of one; 0: never
        self.tight_ns = -_CALM_NS  # when somebody was last refused for want of room

    def aim(self, confidence: float) -> None:
        """Promises hold as often as this from now on."""
        self.ttft.aim(confidence)
        self.ttft_queued.aim(confidence)
        self.tpot.aim(confidence)

    def is_tight(self, now_ns: int) -> bool:
        """Whether somebody was refused lately for want of room: saving goes second then."""
        return now_ns - self.tight_ns < _CALM_NS
