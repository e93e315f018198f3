"""Replicas come and go, fail, hang, and are let back in carefully."""

from typing import Final

from tokenworks.sched.desk import TICK_NS, Desk
from tokenworks.sched.job import Stage
from tokenworks.sched.messages import Drain, Log, ReplicaDown, ReplicaUp, Stop
from tokenworks.sched.replica import Replica
from tokenworks.units import NS_PER_S

_WATCHED: Final = ("up", "trial", "draining", "leaving")


class Watch(Desk):
    """What is done about replicas, by the clock and by what is heard of them."""

    def next_wakeup_ns(self) -> int | None:
        """When it wants to be called with None, if nothing happens before."""
        if self.jobs or self._retries or self._wanted or self._scale.is_due or self._is_hoping():
            tick_ns = self._tick_ns + TICK_NS
            return tick_ns if self._late_ns is None else min(tick_ns, self._late_ns)
        return None

    def _is_hoping(self) -> bool:
        """Whether a wake-up may bring a replica on for those who were refused."""
        return bool(self.rules.scale) and self.offers.tight_mask(self._now_ns) != 0

    def _wake(self, now_ns: int) -> None:
        self._tick_ns = now_ns
        policy = self.rules.policy
        suspect_ns = policy.suspect_s * NS_PER_S
        for replica in self.replicas:
            if replica.retry_ns and now_ns >= replica.retry_ns and replica.state == "down":
                replica.state, replica.trial = "trial", 1
                self._forget_retry(replica)
            elif (
                replica.is_busy
                and replica.state in _WATCHED
                and now_ns - replica.heard_ns > suspect_ns + replica.silence_ns
            ):
                self._out.append(Log(f"{replica.spec.name} is silent: taken for hung"))
                self._lose(replica, now_ns + round(policy.retry_s * NS_PER_S))
            elif replica.state == "leaving":
                for job in list(replica.jobs.values()):
                    self._hand_over(job, replica, now_ns)
        pressed, wanted = self.waiting.wanted()
        pressed |= self.offers.tight_mask(now_ns)
        wanted |= self._wanted
        self._wanted = 0
        for command in self._scale.decide(now_ns, pressed=pressed, wanted=wanted):
            self._out.append(command)
            if isinstance(command, Stop):
                self.offers.lost(self.replicas[command.replica])
        self._pump(now_ns)
        self._give_up(now_ns)

    def _give_up(self, now_ns: int) -> None:
        """Who has waited for long enough for replicas that aren't there is refused."""
        for group in self.places.groups.values():
            group.note(now_ns)
        late, self._late_ns = self.waiting.late(self._waits_ns, now_ns)
        for job in late:
            self.waiting.left(job)
            self._reject(job, 503, "no_replica", self._seat_in_ns(job.group, now_ns))

    def _forget_retry(self, replica: Replica) -> None:
        replica.retry_ns = 0
        self._retries.discard(replica.index)

    def _lose(self, replica: Replica, retry_ns: int) -> None:
        """Its requests go elsewhere; those on their way here go on, or are sent elsewhere."""
        is_leaving = replica.state == "leaving"
        self._gone(replica)
        for job in list(replica.jobs.values()):
            if job.id in replica.incoming and job.stage is Stage.READING:
                job.target = -1
            elif job.stage is not Stage.STOPPING:
                job.was_lost = True
                self._stop(job)
        replica.forget()
        if is_leaving:
            self._see_off(replica)
        else:
            replica.retry_ns = retry_ns
            self._retries.add(replica.index)

    def _gone(self, replica: Replica) -> None:
        """Nothing is to be expected of it, nor is anything left in its cache."""
        if replica.state != "leaving":
            replica.state = "down"
        replica.trial = 0
        self._forget_retry(replica)
        self.offers.lost(replica)

    def _let_in(self, replica: Replica) -> None:
        """A replica on trial did something well: it may have twice as much."""
        if replica.state == "trial":
            replica.trial *= 2
            if replica.trial >= replica.spec.seats:
                replica.state, replica.trial = "up", 0

    def _see_off(self, replica: Replica) -> None:
        """A replica that is to leave, and is empty, may."""
        if replica.state == "leaving" and not replica.jobs:
            replica.state, replica.trial = "gone", 0
            self.offers.lost(replica)
            self._out.append(Stop(replica.index))

    def _drain(self, event: Drain, now_ns: int) -> None:
        replica = self.replicas[event.replica]
        if replica.state in ("leaving", "gone"):
            return
        replica.state = "leaving"
        self._forget_retry(replica)
        for job in list(replica.jobs.values()):
            self._hand_over(job, replica, now_ns)
        self._see_off(replica)
        self._give_up(now_ns)

    def _replica_up(self, event: ReplicaUp, now_ns: int) -> None:
        if self.next_wakeup_ns() is None:
            self._tick_ns = now_ns
        replica = self.replicas[event.replica]
        if replica.state == "down":
            replica.state, replica.trial = "trial", 1
            self._forget_retry(replica)
        elif replica.state in ("off", "starting", "leaving", "gone"):
            replica.state = "up"
        replica.heard_ns = now_ns
        self._pump(now_ns)

    def _replica_down(self, event: ReplicaDown, now_ns: int) -> None:
        replica = self.replicas[event.replica]
        self._out.append(Log(f"{replica.spec.name} is down"))
        self._gone(replica)
        replica.heard_ns = now_ns
        for ident in replica.incoming:
            if replica.jobs[ident].stage is Stage.READING:
                replica.jobs[ident].target = -1
        replica.forget()
        self._see_off(replica)
        self._give_up(now_ns)
