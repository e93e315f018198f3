"""The live factory put together: from its settings to engines at work under one scheduler.

What can be changed while it runs is changed here too: the fleet file read again, replicas started
and stopped by the operator's own commands.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

import msgspec
from msgspec.structs import replace

from tokenworks import __version__
from tokenworks.catalog.book import Catalog
from tokenworks.errors import UserError
from tokenworks.fleet.sheet import Fleet, Sheet, sheet
from tokenworks.gateway.allowance import Used
from tokenworks.gateway.batch.service import BatchService
from tokenworks.gateway.changes import changes, meter_of, wanted
from tokenworks.gateway.embedded.launch import Launch
from tokenworks.gateway.embedded.supervisor import Supervisor, supervised
from tokenworks.gateway.energy.energy import Energy
from tokenworks.gateway.energy.meters import Meter
from tokenworks.gateway.engine import Engine, State
from tokenworks.gateway.factory import Driven, Factory
from tokenworks.gateway.fleet import Means, Model, Unit, pools_of, rules_of
from tokenworks.gateway.gateway import Gateway
from tokenworks.gateway.gauges import Gauges
from tokenworks.gateway.handover import Handover
from tokenworks.gateway.inside import Insider
from tokenworks.gateway.ledger.ledger import Ledger
from tokenworks.gateway.ledger.usage import used_by_day
from tokenworks.gateway.logs import note_request
from tokenworks.gateway.lpu.launch import LpuLaunch
from tokenworks.gateway.recording import EventLog, Recording
from tokenworks.gateway.relay import Exchange
from tokenworks.gateway.remote import PATIENCE_S, Contact, follow, unreachable
from tokenworks.gateway.served import Models, Served
from tokenworks.gateway.settings import PoolSettings, PowerSettings, Settings
from tokenworks.gateway.switch import Switch
from tokenworks.gateway.tenancy import DEFAULT, Tenancy
from tokenworks.gateway.tracing import Tracing
from tokenworks.model.shape import Shape
from tokenworks.sched.baseline import Baseline
from tokenworks.sched.config import BASELINES, Rules
from tokenworks.sched.core import Scheduler
from tokenworks.sched.messages import PowerCapChanged, SendKv
from tokenworks.sched.prior import Prior
from tokenworks.sched.spec import Spec
from tokenworks.units import NS_PER_S

_log = logging.getLogger(__name__)

_MONTH_NS: Final = 31 * 86_400 * NS_PER_S
_EMULATED: Final = "tokenworks.gateway.emulated.child"
_LPU: Final = "tokenworks.gateway.lpu.child"


def scheduler_of(specs: list[Spec], rules: Rules) -> Driven:
    """The scheduler that the rules ask for."""
    if rules.policy.route in BASELINES:
        return Baseline(specs, rules, Random(0))  # noqa: S311
    return Scheduler(specs, rules)


class Plant:
    """Everything behind the sockets. `folder`: for socket files; `state`: the ledger's."""

    gateway: Gateway
    batches: BatchService
    gauges: Gauges

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        open_shape: Callable[[str], Shape],
        models: Mapping[str, Model],
        folder: Path,
        state: Path,
    ) -> None:
        self.settings = settings
        self._read = settings  # as read last; what was set by hand since is not in it
        self._changing = asyncio.Lock()
        self._means = Means(catalog, open_shape, models, folder)
        self.state = state
        self._units: list[Unit] = []
        self._contacts: dict[Engine, Contact] = {}
        self._supervisors: dict[str, Supervisor] = {}  # by pool
        self._tasks: set[asyncio.Task[None]] = set()
        self._models = Models()
        self._events: EventLog | None = None
        self._tracing: Tracing | None = None

    async def start(self) -> None:
        """Start what is to be started here, and find what runs elsewhere; UserError where the
        factory could not serve anything.
        """
        settings = self.settings
        rules = rules_of(settings)
        pools = pools_of(settings)
        self._units = list(wanted(settings, self._means).values())
        ledger = Ledger(self.state, keep_days=settings.ledger.keep_days)
        ledger.open()
        energy = Energy(ledger.amend, self._tokens_of)
        engines = [unit.engine for unit in self._units]
        specs = [unit.spec for unit in self._units]
        factory = Factory(scheduler_of(specs, rules), rules, engines, ledger, energy, self)
        tenancy = Tenancy(settings.tenants)
        since_ns = time.time_ns() - _MONTH_NS
        used = ledger.books.read(lambda connection: used_by_day(connection, since_ns))
        tenancy.restore(Used(**{**one, "tenant": one["tenant"] or DEFAULT}) for one in used)
        self._switch = Switch(factory, self._units, self._contacts, self._begin)
        self.gateway = Gateway(self._models, factory, ledger, tenancy, settings.limits)
        self.handover = Handover(factory)
        self._record()
        for index, unit in enumerate(self._units):
            self._take_in(index, unit, meter_of(unit, energy))
        await self._bring_up(pools)
        self.batches = BatchService(
            ledger.books, self.state, Insider(self.gateway), settings.batches
        )
        await self.batches.start()
        self.gauges = Gauges(factory, ledger, self.batches.summary)
        self.gateway.figures.more.append(self.gauges)
        self._begin(energy.run())

    def _tokens_of(self, name: str) -> int:
        return self.gateway.factory.tokens_of(name)

    def _take_in(self, index: int, unit: Unit, meter: Meter) -> None:
        """Wire one replica to the factory."""
        engine, pool = unit.engine, unit.pool
        factory = self.gateway.factory
        engine.on_state = factory.engine_changed
        forecast = unit.spec.forecast
        busy_w = 0.0 if isinstance(forecast, Prior) else forecast.peak_w  # a prior's is a guess
        factory.energy.add(index, meter, idle_w=unit.spec.idle_w, busy_w=busy_w)
        engine.usd_per_s = unit.spec.usd_per_s or 0.0
        engine.uses_priority = pool.priority
        if unit.launch is None:
            contact = self._contacts[engine] = Contact(engine)
            engine.on_unreachable = lambda _: self._unreachable(engine, contact)
            engine.on_lost = lambda _: contact.look_soon()
            engine.on_hung = lambda _: contact.doubt()
        elif engine.traits.gauges.paths:
            self._begin(follow(engine))

    def _unreachable(self, engine: Engine, contact: Contact) -> None:
        if engine.state is State.READY:
            engine.set_state(State.DOWN, "it takes no connection")
        contact.look_soon()

    async def _bring_up(self, pools: tuple[PoolSettings, ...]) -> None:
        """Start engines and meet those that run; those that don't come up are told of."""
        here = ("embedded", "emulated", "lpu")
        waits = [self._start_pool(pool) for pool in pools if pool.kind in here]
        met = [
            self._contacts[unit.engine].first(_patience_s(unit))
            for unit in self._units
            if unit.engine in self._contacts
        ]
        results = await asyncio.gather(*waits, *met, return_exceptions=True)
        trouble = [error for error in results if isinstance(error, BaseException)]
        if trouble:
            raise trouble[0]
        lost = [
            unit.engine
            for unit in self._units
            if unit.engine in self._contacts
            and unit.engine.state is not State.READY
            and unit.pool.start is None
        ]
        if lost and len(lost) == len(self._units):
            raise unreachable(lost[0])
        for engine in lost:
            _log.warning("%s at %s: %s", engine.name, engine.address, engine.detail)
        for unit in self._units:
            self._list_models(unit)

    def _list_models(self, unit: Unit) -> None:
        """What clients may ask for."""
        engine = unit.engine
        if engine.model:
            served = self._models.add(engine.model, engine)
            known, name = engine.models, engine.served_as or engine.model
            served.facts = known.get(name, served.facts)
            if known and name not in known:
                told = f"{engine.name} does not list {name!r}"
                _log.warning("%s; it has: %s", told, ", ".join(known))
            return
        for name, facts in engine.models.items():
            self._models.add(name, engine, "").facts = facts
        if not engine.models:
            self._models.default = Served("", "")
            self._models.default.engines.append(engine)

    async def _start_pool(self, pool: PoolSettings) -> None:
        """The process that is home of a pool's engines."""
        units = [unit for unit in self._units if unit.pool.name == pool.name]
        engines = [unit.engine for unit in units]
        restart = self.gateway.figures.note_restart
        for unit in units[:1] if pool.kind == "emulated" else units:
            if isinstance(unit.launch, Launch):
                meta = _facts(unit.launch, self._means.models[pool.model])
                unit.engine.models = {unit.engine.model: {"meta": meta}}
                supervisor = supervised(unit.engine, unit.launch, restart)
            elif isinstance(unit.launch, LpuLaunch):
                told = msgspec.json.encode(unit.launch)
                mine = [unit.engine]
                supervisor = Supervisor(mine, _LPU, told, restart, partial(_no_start, pool))
            else:
                told = msgspec.json.encode([each.launch for each in units])
                supervisor = Supervisor(engines, _EMULATED, told, restart, partial(_no_start, pool))
            self._supervisors[unit.engine.name] = supervisor
            await supervisor.start()

    def _record(self) -> None:
        watch, gateway = self.settings.watch, self.gateway
        if watch.record is not None:
            gateway.recording = Recording(watch.record, time.time_ns(), self._fleet())
        if watch.events is not None:
            self._events = EventLog(watch.events, __version__, self._fleet())
            gateway.factory.record = self._events.note
        if watch.otlp is not None:
            self._tracing = Tracing(watch.otlp)
            gateway.hearers.append(self._tracing.note)
        if watch.log_requests:
            gateway.hearers.append(note_request)

    def _fleet(self) -> Fleet:
        """The fleet as it is written to files."""
        return Fleet(rules_of(self.settings), tuple(map(_sheet, self._units)))

    def sweep(self) -> None:
        """What is done some times a second."""
        gateway = self.gateway
        gateway.factory.vigil.sweep()
        if gateway.recording is not None:
            gateway.recording.flush()
        if self._events is not None:
            self._events.flush()
        if self._tracing is not None:
            self._tracing.flush()

    async def stop(self) -> None:
        """End everything that was started."""
        if hasattr(self, "batches"):
            await self.batches.stop()
        if hasattr(self, "handover"):
            self.handover.close()
        for contact in self._contacts.values():
            contact.close()
        for task in self._tasks:
            task.cancel()
        for unit in self._units:
            unit.engine.close()
        await asyncio.gather(*(each.stop() for each in self._supervisors.values()))
        if hasattr(self, "gateway"):
            self.gateway.factory.energy.close()
            if self.gateway.recording is not None:
                self.gateway.recording.close()
            if self._events is not None:
                self._events.close()
            self.gateway.ledger.close()
        if self._tracing is not None:
            self._tracing.close()

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The factory's hands

    def start_replica(self, replica: int) -> None:
        """Bring a replica up."""
        self._switch.on(replica)

    def stop_replica(self, replica: int) -> None:
        """A replica is empty: turn it off, or let it go if it is not of the fleet any more."""
        unit = self._units[replica]
        if unit.engine.is_wanted:
            self._switch.off(replica)
            return
        _log.warning("%s at %s is drained", unit.engine.name, unit.engine.address)
        self.gateway.factory.energy.remove(replica)
        if unit.engine in self._contacts:
            self._contacts.pop(unit.engine).close()
        if isinstance(unit.launch, Launch | LpuLaunch):
            self._begin(self._supervisors.pop(unit.engine.name).stop())
        unit.engine.close()

    def send_kv(self, exchange: "Exchange", command: SendKv) -> None:
        """Move a request's cache."""
        self.handover.send(exchange, command)

    # While it runs

    def cap(self, cap_w: float | None) -> None:
        """What the fleet may draw from now on."""
        self.gateway.factory.tell(PowerCapChanged(cap_w))
        self.settings = replace(self.settings, power=replace(self.settings.power, cap_w=cap_w))

    async def reload(self, settings: Settings) -> str:
        """Run the factory by other settings, without a stream cut; what was changed, in words.

        New replicas are met before those that are gone drain. UserError, naming the key, where the
        new fleet can't be; then nothing is changed.
        """
        async with self._changing:
            return await self._change(settings)

    async def _change(self, settings: Settings) -> str:
        factory, gateway = self.gateway.factory, self.gateway
        changed = changes(self._read, settings, self._units, self._means, factory.energy)
        rules, before = changed.rules, self._read
        cap_w = self.settings.power.cap_w
        is_by_hand = settings.power == before.power and cap_w != before.power.cap_w
        if is_by_hand:
            rules = replace(rules, cap_w=cap_w)
        # What takes a restart is told of at each reload until then.
        self._read = replace(settings, **{name: getattr(before, name) for name in changed.waiting})
        self.settings = replace(self._read, power=PowerSettings(rules.cap_w))
        gateway.limits = settings.limits
        gateway.tenancy.reload(settings.tenants)
        factory.change(rules)
        for number, pool in changed.kept.items():
            self._units[number] = self._units[number]._replace(pool=pool)
        for unit, meter in changed.fresh:
            index = factory.add(unit.engine, unit.spec)
            if self._events is not None:
                self._events.added(_sheet(unit))
            self._units.append(unit)
            self._take_in(index, unit, meter)
        await asyncio.gather(*(self._meet(unit) for unit, _ in changed.fresh))
        for unit in changed.gone:
            unit.engine.is_wanted = False
            self._models.remove(unit.engine)
            factory.drain(unit.engine)
        if gateway.recording is not None:
            gateway.recording.again(self._fleet())
        told = (
            f"{len(changed.fresh)} replicas added, {len(changed.gone)} draining, "
            f"{len(changed.kept)} kept"
        )
        if is_by_hand:
            told += f"; the power cap stays as set by hand ({_cap(cap_w)})"
        if changed.waiting:
            told += f"; as before until a restart: {', '.join(changed.waiting)}"
        return told

    async def _meet(self, unit: Unit) -> None:
        """Get to know a new replica."""
        if unit.engine.model:
            self._list_models(unit)  # its clients may wait for it
        await self._contacts[unit.engine].first(_patience_s(unit))
        if unit.engine.state is not State.READY:
            _log.warning("%s at %s: %s", unit.engine.name, unit.engine.address, unit.engine.detail)
        self._list_models(unit)


def _patience_s(unit: Unit) -> float:
    """How long to wait for an engine; not at all for one that is started when it is needed."""
    return 0.0 if unit.pool.start is not None else PATIENCE_S


def _cap(cap_w: float | None) -> str:
    return "none" if cap_w is None else f"{cap_w:,g} W"


def _sheet(unit: Unit) -> Sheet:
    pool = unit.pool
    return sheet(unit.spec, unit.wish, pool.shape or pool.model)


def _facts(launch: Launch, model: Model) -> dict[str, object]:
    return {
        "architecture": model.header.architecture,
        "context_tokens": launch.context_tokens,
        "slots": launch.slots,
        "threads": launch.threads,
    }


def _no_start(pool: PoolSettings, why: str) -> UserError:
    return UserError(f"pools.{pool.name} could not be started: {why}", "Mend what it names.")
