"""Promises made, and what became of them: what each verdict teaches."""

from tokenworks.sched.job import Job
from tokenworks.sched.messages import Promise
from tokenworks.sched.offers import Offer
from tokenworks.sched.replica import Replica


class Promises:
    """Made from offers; each pool numbers its own, so that it is known how late a verdict comes."""

    def __init__(self, confidence: float) -> None:
        self.confidence = confidence

    def offered(self, job: Job, offer: Offer, token_j: float) -> None:
        """The promise of an offer that is taken; batch work gets none."""
        reader, writer = offer.replica, offer.writer
        job.forecast_ttft_ns = offer.ttft_forecast_ns
        job.forecast_tpot_ns = offer.tpot_forecast_ns
        if job.arrived.service_class != "batch":
            self._number(job, reader, writer)
            job.promise = Promise(
                int(offer.ttft_ns), int(offer.tpot_ns), self.confidence, offer.read_j, token_j
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
        job.was_queued = True
        job.forecast_ttft_ns = wait_ns + reader.first_ns(job.read_tokens, now_ns)
        # As full as it gets: the place it will have was somebody's.
        tpot_ns = writer.tpot_ns(job.context, now_ns, without=1) * writer.tpot_drift.factor
        if writer is not reader:
            tpot_ns += writer.transfer_ns(reader, job.read_tokens) / job.output_tokens
        job.forecast_tpot_ns = tpot_ns
        self._number(job, reader, writer)
        job.promise = Promise(
            int(job.forecast_ttft_ns * reader.pool.ttft_queued.factor),
            int(tpot_ns * writer.pool.tpot.factor(job.fill)),
            self.confidence,
            reader.forecast.alone(job.read_tokens)[1],
            writer.more_j(job),
        )

    def _soonest(self, replicas: list[Replica], job: Job, now_ns: int) -> Replica | None:
        return min(replicas, key=lambda r: r.first_ns(job.read_tokens, now_ns), default=None)

    def _number(self, job: Job, reader: Replica, writer: Replica) -> None:
        job.fill = writer.level + job.level
        first = further = reader.pool
        first.made += 1
        number = first.made
        if writer is not reader:
            further = writer.pool
            further.made += 1
        job.promised = (first, number, further, further.made)

    def first_token(self, job: Job, now_ns: int) -> None:
        """It has its first token."""
        self._heard(job, now_ns - job.arrived_ns, now_ns)

    def whole(self, job: Job, said: int, now_ns: int) -> None:
        """All of it came at once, `said` tokens after the first: see `Scheduler._learn_whole`."""
        read_ns, write_ns = job.forecast_ttft_ns, said * job.forecast_tpot_ns
        ratio = (now_ns - job.arrived_ns) / max(read_ns + write_ns, 1.0)
        if write_ns <= read_ns:
            self._heard(job, ratio * read_ns, now_ns)
        else:
            self.finished(job, ratio * job.forecast_tpot_ns, now_ns)

    def _heard(self, job: Job, took_ns: float, now_ns: int) -> None:
        promise, promised = job.promise, job.promised
        if promise is not None and promised is not None and not job.done_tokens:
            pool, number = promised[0], promised[1]
            pool.judged_ns = now_ns
            calibrator = pool.ttft_queued if job.was_queued else pool.ttft
            calibrator.learn(job.forecast_ttft_ns, promise.ttft_ns, took_ns, pool.made - number)

    def finished(self, job: Job, tpot_ns: float, now_ns: int) -> None:
        """It took so long per token, after the first."""
        promise, promised = job.promise, job.promised
        if promise is not None and promised is not None:
            pool, number = promised[2], promised[3]
            pool.judged_ns = now_ns
            late = pool.made - number
            pool.tpot.learn(job.fill, job.forecast_tpot_ns, promise.tpot_ns, tpot_ns, late)
