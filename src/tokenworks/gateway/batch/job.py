"""A live batch in memory: which of its lines wait, and which are at work. Touches nothing but its
input file.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from tokenworks.gateway.batch.lines import Input
from tokenworks.gateway.batch.store import Batch

# How long a batch rests that was refused: ever longer, until a line of it gets through.
_FIRST_REST_S: Final = 0.05
_LONGEST_REST_S: Final = 5.0
_PROBE: Final = 1 / 8


def request_id(batch: Batch, number: int) -> str:
    """The id of a line's request: the same each time it is tried, so that it is charged once."""
    return f"batch_req_{batch.id.removeprefix('batch_')}_{number}"


class Flight:
    """A line at work. Over once its request has ended."""

    __slots__ = ("cancel", "custom_id", "is_over", "job", "number", "size")

    def __init__(self, job: "Job", number: int, custom_id: str, size: int) -> None:
        self.job = job
        self.number = number
        self.custom_id = custom_id
        self.size = size  # bytes of its request
        self.cancel: Callable[[], None] | None = None
        self.is_over = False

    @property
    def id(self) -> str:
        """The id of its request."""
        return request_id(self.job.batch, self.number)


class Job:
    """A live batch. `limit` bounds its lines at work: what the scheduler lately let in."""

    def __init__(self, batch: Batch, window: int) -> None:
        self.batch = batch
        self.deadline_s = batch.expires_at
        self.input: Input | None = None
        self.waiting: deque[int] = deque()
        self.flights: dict[int, Flight] = {}
        self.tries: dict[int, int] = {}  # of lines whose engine has failed
        self.undone = -1  # lines whose end is not written; -1: nobody has counted
        self.unsettled = 0  # lines at work, or ended but not written
        self.is_open = False  # lines may be sent
        self.is_late = False  # its deadline is over
        self.is_resting = False  # it was refused lately
        self.is_landing = False  # its status has moved on: what is still at work is cut short
        self.error: Exception | None = None
        self.wanted = asyncio.Event()  # there is room for its lines
        self.over = asyncio.Event()  # no more lines are to be sent
        self.settled = asyncio.Event()  # nothing is unsettled
        self.settled.set()
        self._window = window
        self._limit = float(window)
        self._rest_s = _FIRST_REST_S

    @property
    def may_send(self) -> bool:
        """Whether another line may go to the scheduler now."""
        return self.is_open and not self.is_resting and self.unsettled < int(self._limit)

    def accepted(self) -> None:
        """A line got through: the scheduler may have room for more than before."""
        self._rest_s = _FIRST_REST_S
        self._limit = min(self._limit + _PROBE, float(self._window))

    def refused(self) -> float | None:
        """A line was refused for now; how long to rest, in s, if this is not in a rest already."""
        self._limit = max(1.0, float(len(self.flights)))
        if self.is_resting:
            return None
        self.is_resting = True
        rest_s, self._rest_s = self._rest_s, min(2 * self._rest_s, _LONGEST_REST_S)
        return rest_s

    def depart(self, flight: Flight) -> None:
        """A line goes to work."""
        self.flights[flight.number] = flight
        self.unsettled += 1
        self.settled.clear()

    def settle(self) -> None:
        """A line that was at work waits again, or its end is written."""
        self.unsettled -= 1
        if not self.unsettled:
            self.settled.set()

    def land(self) -> None:
        """Cut short what is still at work."""
        for flight in list(self.flights.values()):
            if flight.cancel is not None:
                flight.cancel()

    def fail(self, error: Exception) -> None:
        """Something is wrong that is not a line's fault: begin again from what is written."""
        self.error = self.error or error
        self.close()

    def close(self) -> None:
        """Send no more lines."""
        self.is_open = False
        self.over.set()
