"""The way to the scheduler for requests that come from no connection: what batches need of it."""

import time
from collections.abc import Callable
from typing import Protocol

from tokenworks.gateway.batch.job import Flight
from tokenworks.gateway.batch.lines import ENDPOINTS
from tokenworks.gateway.intake import Route
from tokenworks.gateway.ledger.row import Row
from tokenworks.gateway.problem import Problem


class Inside(Protocol):
    """What runs one request as if a client had sent it."""

    def run(
        self,
        *,
        id: str,  # noqa: A002
        route: Route,
        body: bytes,
        tenant: str,
        key: str,
        batch: str,
        deadline_unix_s: float,
        on_done: Callable[[int, bytes, Row], None],
    ) -> Callable[[], None]:
        """Run one request of class batch. `on_done` hears its status, body and row exactly once,
        on the loop; its row is not in the ledger. Returns what cancels it.
        """
        ...


def mistake(flight: Flight) -> tuple[int, bytes, Row]:
    """How a line ends that could not even be run, by a mistake of ours."""
    batch = flight.job.batch
    row = Row(
        flight.id,
        time.time_ns(),
        tenant=batch.tenant,
        key=batch.key,
        route=ENDPOINTS[batch.endpoint],
        service_class="batch",
        outcome="failed",
        reason="internal_error",
        status=500,
        batch=batch.id,
    )
    problem = Problem(500, "The gateway made a mistake.", code="internal_error")
    return 500, problem.body(), row
