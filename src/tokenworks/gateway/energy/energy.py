"""All replicas' meters and accounts: asks each meter once a second, in a thread, and tells what
requests took. Everything else happens on the loop's thread.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from tokenworks.gateway.energy.account import Account, Part, Totals
from tokenworks.gateway.energy.meters import Meter, MeterSettings, Modelled, Rapl, amd, nvml
from tokenworks.gateway.energy.prometheus import Page, Prometheus
from tokenworks.units import NJ_PER_J

_EVERY_S: Final = 1.0
_THREADS: Final = 4  # a meter that doesn't answer holds one of them, for some seconds

Tell = Callable[[str, float, str], None]


class _Replica:
    """A meter, its account, and whether it is being read at the moment."""

    __slots__ = ("account", "is_asked", "meter")

    def __init__(self, meter: Meter, account: Account) -> None:
        self.meter, self.account = meter, account
        self.is_asked = False


class _Moved:
    """A request that was at more than one replica, or more than once: the sum."""

    __slots__ = ("energy_nj", "is_measured", "is_over", "waits")

    def __init__(self) -> None:
        self.energy_nj = 0  # the best figure so far
        self.waits = 0  # for so many final figures
        self.is_measured, self.is_over = True, False

    @property
    def grade(self) -> str:
        """Of the figure: measured once all of it is."""
        return "measured" if self.is_measured and not self.waits else "modelled"


class Energy:
    """One gateway's. `tell(id, energy_j, grade)` hears the final figure of each request whose
    figure is another one than `ended` said; `tokens_of(id)` is asked how many tokens a request has.
    """

    def __init__(
        self,
        tell: Tell,
        tokens_of: Callable[[str], int],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._tell, self._tokens_of, self._now_ns = tell, tokens_of, now_ns
        self._replicas: dict[int, _Replica] = {}
        self._moved: dict[str, _Moved] = {}
        self._pages: dict[str, Page] = {}
        self._threads = ThreadPoolExecutor(_THREADS, "meter")

    # Replicas

    def open(self, settings: MeterSettings, place: str) -> Meter:
        """The meter of the replica called `place`; UserError where there can't be one."""
        match settings.kind:
            case "nvml":
                return nvml(settings.devices, place)
            case "amd":
                return amd(settings.devices, place)
            case "rapl":
                return Rapl(settings.devices, place)
            case "prometheus":
                return Prometheus(settings, place, self._pages)
        return Modelled()

    def add(self, replica: int, meter: Meter, *, idle_w: float, busy_w: float = 0.0) -> None:
        """One more; watts as `Account` takes them."""
        is_metered = meter.grade != "modelled"
        account = Account(self._now_ns(), idle_w=idle_w, busy_w=busy_w, is_metered=is_metered)
        self._replicas[replica] = _Replica(meter, account)

    def remove(self, replica: int) -> None:
        """One is gone: who was there lately gets a modelled figure."""
        gone = self._replicas.pop(replica, None)
        if gone is not None:
            now_ns = self._now_ns()
            for ident in gone.account.open:
                self._leave(gone, ident, self._tokens_of(ident), now_ns)
            self._settled(gone.account.close(now_ns))

    def totals(self) -> Iterator[tuple[int, Totals, float]]:
        """Each replica's sums, and its watts lately."""
        for replica, one in self._replicas.items():
            yield replica, one.account.totals, one.account.watts

    @property
    def watts(self) -> float:
        """What all draw, lately."""
        return sum(one.account.watts for one in self._replicas.values())

    # Requests

    def began(
        self,
        replica: int,
        ident: str,
        read_j: float,
        token_j: float,
        now_ns: int,
        tokens: int = 0,
    ) -> None:
        """A request was given to a replica; joules as a promise has them. `tokens`: it has."""
        one = self._replicas.get(replica)
        if one is not None:
            one.account.began(ident, read_j, token_j, now_ns, tokens)

    def left(self, replica: int, ident: str, tokens: int, now_ns: int) -> None:
        """It is off that replica and not at its end: moved, paused, or the hedge that lost."""
        one = self._replicas.get(replica)
        if one is not None:
            self._leave(one, ident, tokens, now_ns)

    def ended(self, replica: int | None, ident: str, tokens: int, now_ns: int) -> tuple[float, str]:
        """It ended, at that replica or at none: joules and their grade as known by now.

        It must have `left` all others before. Without a grade: it never was at any.
        """
        one = None if replica is None else self._replicas.get(replica)
        told_nj = None if one is None else one.account.ended(ident, tokens, now_ns)
        moved = self._moved.get(ident) if self._moved else None
        if moved is None:
            return (0.0, "") if told_nj is None else (told_nj / NJ_PER_J, "modelled")
        if told_nj is not None and one is not None:
            moved.energy_nj += told_nj
            moved.waits += one.account.is_metered
        moved.is_over = True
        if not moved.waits:
            del self._moved[ident]
        return moved.energy_nj / NJ_PER_J, moved.grade

    def _leave(self, one: _Replica, ident: str, tokens: int, now_ns: int) -> None:
        told_nj = one.account.ended(ident, tokens, now_ns)
        if told_nj is not None:
            moved = self._moved.setdefault(ident, _Moved())
            moved.energy_nj += told_nj
            moved.waits += one.account.is_metered
            moved.is_measured &= one.account.is_metered

    def _settled(self, finals: list[Part]) -> None:
        for final in finals:
            moved = self._moved.get(final.id)
            if moved is None:
                if final.is_measured or final.energy_nj != final.told_nj:
                    grade = "measured" if final.is_measured else "modelled"
                    self._tell(final.id, final.energy_nj / NJ_PER_J, grade)
                continue
            moved.energy_nj += final.energy_nj - final.told_nj
            moved.is_measured &= final.is_measured
            moved.waits -= 1
            if moved.is_over and not moved.waits:
                del self._moved[final.id]
                self._tell(final.id, moved.energy_nj / NJ_PER_J, moved.grade)

    # Readings

    async def run(self) -> None:
        """Read all meters once a second, for ever."""
        while True:
            await asyncio.sleep(_EVERY_S)
            for replica, one in list(self._replicas.items()):
                self._ask(replica, one)
                await asyncio.sleep(0)  # what each takes grows with the requests there

    def close(self) -> None:
        """No reading is asked for any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, replica: int, one: _Replica) -> None:
        if one.meter.grade == "modelled" or one.is_asked:
            self.read(replica, None)
            return
        one.is_asked = True
        asked = asyncio.get_running_loop().run_in_executor(self._threads, one.meter.joules)
        asked.add_done_callback(lambda answer: self._answered(replica, one, answer))

    def _answered(
        self, replica: int, one: _Replica, answer: "asyncio.Future[float | None]"
    ) -> None:
        if not answer.cancelled() and self._replicas.get(replica) is one:
            total_j = answer.result()
            one.is_asked = False
            self.read(replica, total_j)

    def read(self, replica: int, total_j: float | None) -> None:
        """A replica's meter was read (None: it could not be)."""
        account = self._replicas[replica].account
        for ident in account.open:
            account.progress(ident, self._tokens_of(ident))
        self._settled(account.tick(total_j, self._now_ns()))
