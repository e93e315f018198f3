"""Who makes room for a real-time request that would otherwise be refused: flex and batch work."""

from collections.abc import Sequence

from tokenworks.sched.job import Job, Stage
from tokenworks.sched.offers import Offer, Offers
from tokenworks.sched.power import Power
from tokenworks.sched.replica import Replica


def make_room(
    job: Job, replicas: Sequence[Replica], offers: Offers, power: Power, now_ns: int
) -> tuple[Offer, list[Job]] | None:
    """An offer that meets the request's bounds, and whose work must stop for it; those are off
    their replica already. None: nobody's going would help.
    """
    hits = offers.hits(job)
    for replica in sorted(replicas, key=lambda each: len(each.jobs)):
        # The youngest first: they lose least.
        yielding = [other for other in reversed(replica.jobs.values()) if _yields(other)]
        if replica.state != "up" or not yielding:
            continue
        for count in sorted({max(len(yielding) // 2, 1), len(yielding)}):
            before, gone = replica.saved(), yielding[:count]
            for other in gone:
                replica.remove(other, now_ns)
            fits = replica.has_room(job) and power.allows(replica)
            offer = offers.of(job, replica, hits.get(replica.index, 0), now_ns)
            if fits and offer.keeps(job):
                return offer, gone
            replica.put_back(before)
    return _free_watts(job, replicas, offers, power, now_ns) if power.cap_w is not None else None


def _free_watts(
    job: Job, replicas: Sequence[Replica], offers: Offers, power: Power, now_ns: int
) -> tuple[Offer, list[Job]] | None:
    """An offer of a replica that lacks only watts, and the work that stops elsewhere for them."""
    hits = offers.hits(job)
    idle = [r for r in replicas if r.has_room(job) and not power.allows(r)]
    found = [offers.of(job, r, hits.get(r.index, 0), now_ns) for r in idle]
    keeping = [offer for offer in found if offer.keeps(job)]
    donors = [r for r in replicas if r.jobs and all(map(_yields, r.jobs.values()))]
    donors.sort(key=lambda each: len(each.jobs))
    for offer in sorted(keeping, key=lambda each: each.cost):
        before = [donor.saved() for donor in donors]
        gone: list[Job] = []
        for donor in donors:
            for other in reversed(list(donor.jobs.values())):
                gone.append(other)
                donor.remove(other, now_ns)
            if power.allows(offer.replica):
                return offer, gone
        for donor, saved in zip(donors, before, strict=True):
            donor.put_back(saved)
    return None


def _yields(job: Job) -> bool:
    """Batch work goes on later from where it was; flex only loses what nobody has seen yet."""
    name = job.arrived.service_class
    if job.stage is Stage.STOPPING:
        return False
    return name == "batch" or (name == "flex" and job.stage is Stage.READING)
