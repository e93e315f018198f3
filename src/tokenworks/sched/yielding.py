"""Who makes room for a request that would otherwise be refused, or wait: flex and batch work."""

from collections.abc import Callable

from tokenworks.sched.job import Job, Stage
from tokenworks.sched.offers import Offer, Offers
from tokenworks.sched.power import Power


def make_room(
    job: Job, offers: Offers, power: Power, fits: Callable[[Offer], bool], now_ns: int,
    blocked: int = 0,
) -> tuple[Offer, list[Job]] | None:  # fmt: skip
    """An offer that fits the request, and whose work must stop for it; those are off that replica
    already. None: nobody's going would help, but on `blocked` pools.
    """
    able = [r for r in job.group.whole if r.spare]
    reader = None
    if job.group.readers:
        able += [r for r in job.group.writers if r.spare]
    able = [r for r in able if r.state == "up" and not r.bit & blocked]
    if not able and power.cap_w is None:
        return None
    hits = offers.hits(job)
    if job.group.readers:
        reader = offers.reader(job, hits, blocked, now_ns)
        if reader is None:
            able = [r for r in able if r.spec.role == "both"]
    for replica in sorted(able, key=lambda each: len(each.jobs)):
        # The youngest first: they lose least.
        yielding = [other for other in reversed(replica.jobs.values()) if yields(other)]
        for count in _counts(len(yielding)):
            before, gone = replica.saved(), yielding[:count]
            replica.clear(gone, now_ns)
            if replica.has_seat(job):
                if reader is not None and replica.spec.role == "decode":
                    allowed, first, target = power.allows(reader, replica), reader, replica
                    offer = offers.of(job, first, hits.get(first.index, 0), now_ns, target)
                else:
                    allowed = power.allows(replica)
                    offer = offers.of(job, replica, hits.get(replica.index, 0), now_ns)
                if allowed and fits(offer):
                    return offer, gone
            replica.put_back(before)
    if power.cap_w is None:
        return None
    return _free_watts(job, offers, power, fits, now_ns, blocked)


def _counts(most: int) -> list[int]:
    """How many to stop at once: one may be enough, where only a seat is missing."""
    return sorted({1, max(most // 2, 1), most}) if most else []


def _free_watts(
    job: Job, offers: Offers, power: Power, fits: Callable[[Offer], bool], now_ns: int,
    blocked: int,
) -> tuple[Offer, list[Job]] | None:  # fmt: skip
    """An offer of a replica that lacks only watts, and the work that stops elsewhere for them."""
    hits = offers.hits(job)
    idle = [
        r
        for r in job.group.whole
        if not r.bit & blocked and r.has_seat(job) and not power.allows(r)
    ]
    found = [offers.of(job, r, hits.get(r.index, 0), now_ns) for r in idle]
    fitting = [offer for offer in found if fits(offer)]
    donors = [r for r in power.replicas if r.jobs and all(map(yields, r.jobs.values()))]
    donors.sort(key=lambda each: len(each.jobs))
    for offer in fitting:
        offer.price(job, now_ns, offers.route)
    for offer in sorted(fitting, key=lambda each: each.cost):
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


def yields(job: Job) -> bool:
    """Batch work goes on later from where it was; flex only loses what nobody has seen yet."""
    if job.stage is Stage.STOPPING:
        return False
    name = job.arrived.service_class
    return name == "batch" or (name == "flex" and job.stage is Stage.READING)
