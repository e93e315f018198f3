"""Promises made, and what became of them: what each verdict teaches."""

from tokenworks.sched.job import Job
from tokenworks.sched.messages import Promise
from tokenworks.sched.offers import Offer, Offers, fill
from tokenworks.sched.replica import Replica


class Promises:
    """Made from offers; each pool numbers its own, so that it is known how late a verdict comes."""

    def __init__(self, offers: Offers, confidence: float) -> None:
        self._offers = offers
        self.confidence = confidence
        self._made: dict[str, int] = {}

    def offered(self, job: Job, offer: Offer) -> None:
        """The promise of an offer that is taken; batch work gets none."""
        reader, writer = offer.replica, offer.writer
        job.forecast_ttft_ns = offer.ttft_prior_ns * reader.ttft_drift.factor
        job.forecast_tpot_ns = offer.tpot_forecast_ns
        if job.arrived.service_class != "batch":
            self._number(job, reader, writer)
            job.promise = Promise(
                int(offer.ttft_ns), int(offer.tpot_ns), self.confidence, offer.read_j, offer.token_j
            )

    def queued(self, job: Job, wait_ns: float, now_ns: int) -> None:
        """The promise of the one that would do best once there is room on it, after a wait."""
        group = job.group
        there = [r for r in (*group.whole, *group.readers) if r.is_there]
        reader = self._soonest(there, job, now_ns)
        if reader is None:
            return
        writer = reader
        if reader.spec.role == "prefill":
            there = [r for r in group.writers if r.is_there]
            if not there:
                return
            writer = min(there, key=lambda each: len(each.jobs))
        ttft_ns = reader.ttft_ns(job.read_tokens, now_ns) * reader.ttft_drift.factor
        job.was_queued = True
        job.forecast_ttft_ns = wait_ns + ttft_ns
        # As full as it gets: the place it will have was somebody's.
        tpot_ns = writer.tpot_ns(job.context, now_ns, without=1) * writer.tpot_drift.factor
        if writer is not reader:
            tpot_ns += writer.transfer_ns(reader, job.read_tokens) / job.output_tokens
        job.forecast_tpot_ns = tpot_ns
        self._number(job, reader, writer)
        job.promise = Promise(
            int(job.forecast_ttft_ns * self._offers.ttft[reader.spec.pool, True].factor),
            int(tpot_ns * self._offers.tpot[writer.spec.pool].factor(job.fill)),
            self.confidence,
            reader.forecast.alone(job.read_tokens)[1],
            writer.more_j(job),
        )

    def _soonest(self, replicas: list[Replica], job: Job, now_ns: int) -> Replica | None:
        return min(
            replicas,
            key=lambda r: r.ttft_ns(job.read_tokens, now_ns) * r.ttft_drift.factor,
            default=None,
        )

    def _number(self, job: Job, reader: Replica, writer: Replica) -> None:
        job.fill = fill(writer, job)
        pool = other = reader.spec.pool
        self._made[pool] = number = self._made.get(pool, 0) + 1
        own = number
        if writer is not reader:
            other = writer.spec.pool
            self._made[other] = number = self._made.get(other, 0) + 1
        job.promised = (pool, own, other, number)

    def first_token(self, job: Job, now_ns: int) -> None:
        """It has its first token."""
        if job.promise is not None and not job.done_tokens:
            pool, number, _, _ = job.promised
            self._offers.judged(pool, now_ns)
            self._offers.ttft[pool, job.was_queued].learn(
                job.forecast_ttft_ns,
                job.promise.ttft_ns,
                now_ns - job.arrived_ns,
                self._made[pool] - number,
            )

    def finished(self, job: Job, tpot_ns: float, now_ns: int) -> None:
        """It took so long per token, after the first."""
        if job.promise is not None:
            _, _, pool, number = job.promised
            self._offers.judged(pool, now_ns)
            self._offers.tpot[pool].learn(
                job.fill,
                job.forecast_tpot_ns,
                job.promise.tpot_ns,
                tpot_ns,
                self._made[pool] - number,
            )
