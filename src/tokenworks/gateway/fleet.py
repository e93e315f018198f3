"""From the fleet file to engines, and to what the scheduler may know of each."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from tokenworks.catalog.book import Catalog
from tokenworks.cost.answer import placed
from tokenworks.engine.build import build
from tokenworks.engine.work import Limits as EngineLimits
from tokenworks.errors import UserError
from tokenworks.fleet.placed import Known, Wish, fitted, known, prepared
from tokenworks.gateway import traits
from tokenworks.gateway.address import Address, socket_in
from tokenworks.gateway.embedded.launch import Launch
from tokenworks.gateway.embedded.launch import plan as plan_embedded
from tokenworks.gateway.emulated.replica import Replica as Emulated
from tokenworks.gateway.engine import Engine
from tokenworks.gateway.lpu.launch import LpuLaunch
from tokenworks.gateway.settings import LIVE_CLASSES, EngineSettings, PoolSettings, Settings
from tokenworks.gateway.traits import Traits
from tokenworks.model.gguf import Gguf
from tokenworks.model.shape import Shape
from tokenworks.sched.config import BASELINES, Rules, Tenant
from tokenworks.sched.prior import Prior
from tokenworks.sched.spec import Spec

ENGINE_KEY_VARIABLE = "TOKENWORKS_ENGINE_API_KEY"
# Of engines nobody has said anything of: those we know batch as many as these, the others may be
# whole clouds.
_SEATS = {"vllm": 1024, "sglang": 1024, "trtllm": 1024}
_MANY_SEATS = 16_384
_CONTEXT_TOKENS = 131_072
_KV_TOKENS = 1 << 22
# A small model on a processor core: each answer more slows all others by as much again, and a
# prompt is read hardly faster than an answer is written.
_EMBEDDED = Prior(2e6, 8e6, 400.0, 3e6, 64, 30.0)
# The machine in software reads as it writes, token by token.
_MACHINE = Prior(200e6, 0.0, 0.0, 200e6, 1, 30.0)
_S_PER_H = 3600


class Model(NamedTuple):
    """A model file to serve, or a compiled program: opened and read by whoever starts the gateway.

    `context_tokens`: of a program, the longest.
    """

    path: Path
    name: str
    header: Gguf
    context_tokens: int = 0


class Unit(NamedTuple):
    """One replica: its engine here, and the scheduler's data sheet. `launch`: what its process is
    told, if it is started here. `number`: which of its pool it is. `wish`: how it is placed, if its
    times come from that.
    """

    engine: Engine
    spec: Spec
    pool: PoolSettings
    launch: Launch | LpuLaunch | Emulated | None
    number: int = 0
    wish: Wish | None = None


class Means(NamedTuple):
    """What building a fleet needs from outside."""

    catalog: Catalog
    open_shape: Callable[[str], Shape]
    models: Mapping[str, Model]  # of embedded pools, by what the pool calls them
    folder: Path  # for socket files


def pools_of(settings: Settings) -> tuple[PoolSettings, ...]:
    """The fleet's pools, named; the one of `[engine]` if there are none."""
    if settings.pools:
        pools = settings.pools
    else:
        own = settings.engine
        kept = {name: getattr(own, name) for name in ("slots", "context_tokens", "allow_fields")}
        if own.url is not None:
            pools = (PoolSettings("", urls=(own.url,), key_env=ENGINE_KEY_VARIABLE, **kept),)
        else:
            cache_mib = own.prompt_cache_mib
            pools = (
                PoolSettings(
                    own.model, "embedded", threads=own.threads, prompt_cache_mib=cache_mib, **kept
                ),
            )
    _check_roles(pools)
    return tuple(replace(pool, name=pool.name or pool.kind) for pool in pools)


def _check_roles(pools: tuple[PoolSettings, ...]) -> None:
    """Whoever reads needs somebody who writes, and a way to him."""
    for pool in pools:
        if pool.role == "both":
            continue
        place = f"pools.{pool.name or pool.kind}"
        way = traits.KINDS[pool.kind].kv_handover
        if not way:
            told = f"{place}.role: a cache can't be handed over by {pool.kind} engines"
            raise UserError(told, "Leave it out, or see docs/operate.md for the kinds that can.")
        if way == "slots" and pool.kv_folder is None:
            told = f"{place}.kv_folder is missing: a pool that does {pool.role} only hands over"
            raise UserError(told, "Give a folder that all engines of the model share.")
        other = "decode" if pool.role == "prefill" else "prefill"
        if not any(each.role == other and each.model == pool.model for each in pools):
            told = f"{place}.role is {pool.role!r}, and no pool of {pool.model} does {other}"
            raise UserError(told, f"Add one with `role = {other!r}`, or leave the role out.")


def rules_of(settings: Settings) -> Rules:
    """How the scheduler is to run the fleet."""
    pools = pools_of(settings)
    rules = Rules(
        {**LIVE_CLASSES, **settings.classes},
        settings.policy,
        {name: Tenant(tenant.weight) for name, tenant in settings.tenants.items()},
        settings.power.cap_w,
        {pool.name: pool.scale for pool in pools if pool.scale is not None},
    )
    rules.check()
    route = rules.policy.route
    if route in BASELINES:  # silence would be taken for consent
        for key, value in (("power.cap_w", rules.cap_w), ("pools.scale", rules.scale)):
            if value:
                told = f"{key} means nothing to policy.route {route}"
                raise UserError(told, "Leave it out, or take another route.")
    return rules


def checked(settings: Settings, place: str) -> Settings:
    """The same; UserError, naming `place` and the key, where its rules contradict themselves."""
    try:
        rules_of(settings)
    except UserError as error:
        raise UserError(f"{place}: {error.message}", error.remedy) from None
    return settings


def units_of(pool: PoolSettings, means: Means, tariff: str) -> list[Unit]:
    """The replicas of a pool; UserError, naming it, where one can't be."""
    try:
        spot = None if pool.processor is None else _spot(pool, means, tariff)
        return [_unit(pool, number, means, spot) for number in range(pool.count)]
    except UserError as error:
        raise UserError(f"pools.{pool.name}: {error.message}", error.remedy) from None


def _unit(pool: PoolSettings, number: int, means: Means, spot: tuple[Wish, Known] | None) -> Unit:
    name = f"{pool.name}-{number}"
    launch: Launch | LpuLaunch | Emulated | None = None
    slots, context_tokens, kv_tokens = pool.slots, pool.context_tokens, pool.kv_tokens
    its_traits = _traits(pool)
    if pool.kind == "embedded":
        model = means.models[pool.model]
        launch = _launch(pool, model, socket_in(means.folder, name))
        slots, context_tokens = launch.slots, launch.context_tokens
        kv_tokens = slots * context_tokens
        its_traits = its_traits.for_model(
            native_tools="tools" in (model.header.chat_template or ""),
            is_embedder=launch.is_embedder,
        )
        address = Address(path=launch.socket_path)
    elif pool.kind == "lpu":
        model = means.models[pool.model]
        launch = LpuLaunch(str(model.path), model.name, socket_in(means.folder, name))
        slots, context_tokens, kv_tokens = 1, model.context_tokens, model.context_tokens
        address = Address(path=launch.socket_path)
    elif pool.kind == "emulated":
        launch = _emulated(pool, socket_in(means.folder, name))
        address = Address(path=launch.socket or "")
    else:
        address = Address.of_url(pool.urls[number])
    try:
        engine = Engine(
            name,
            its_traits,
            address,
            slots=slots,
            api_key=_key(pool),
            ca_file=pool.ca_file,
            allow_fields=pool.allow_fields,
            kv_folder=_kv_folder(pool),
        )
    except OSError as error:  # TLS is read when it is made
        told = f"ca_file: cannot use {pool.ca_file}: {error.strerror or error}"
        raise UserError(told, "Give a file of PEM certificates.") from None
    engine.model, engine.served_as = name_of(pool, means), pool.served_as
    wish, found = (None, None) if spot is None else spot
    spec = _spec(pool, name, engine.model, found, (slots, context_tokens, kv_tokens))
    engine.processor = spec.processor
    return Unit(engine, spec, pool, launch, number, wish)


def _traits(pool: PoolSettings) -> Traits:
    found = traits.KINDS[pool.kind]
    if pool.continuation is not None:
        found = found.carried_on_like(traits.KINDS[pool.continuation])
    return found


def _kv_folder(pool: PoolSettings) -> str | None:
    """Where a pool's engines save caches for each other; UserError where it isn't."""
    if pool.kv_folder is None:
        return None
    folder = Path(pool.kv_folder).expanduser().absolute()
    if pool.kind != "embedded" and not folder.is_dir():
        remedy = "Give the folder that the engines were started with (--slot-save-path)."
        raise UserError(f"kv_folder: there is no folder {folder}", remedy)
    return str(folder)


def _launch(pool: PoolSettings, model: Model, socket: str) -> Launch:
    settings = EngineSettings(
        slots=pool.slots,
        threads=pool.threads,
        context_tokens=pool.context_tokens,
        prompt_cache_mib=pool.prompt_cache_mib,
    )
    return plan_embedded(
        model.path,
        model.name,
        model.header,
        settings,
        socket,
        sharers=pool.replicas,
        kv_folder=_kv_folder(pool) or "",
    )


def _emulated(pool: PoolSettings, socket: str) -> Emulated:
    return Emulated(
        pool.processor or "",
        model=pool.shape or pool.model,
        context_tokens=pool.context_tokens,
        slow=pool.slow,
        served_as=pool.served_as or pool.model,
        faults=pool.faults,
        socket=socket,
        **_placing(pool),
    )


def _key(pool: PoolSettings) -> str | None:
    """The engine's API key; UserError where it is said to be somewhere and isn't."""
    if pool.key_env is not None:
        key = os.environ.get(pool.key_env)
        if key is None and pool.key_env != ENGINE_KEY_VARIABLE:
            raise UserError(f"key_env: {pool.key_env} is not set", "Set it to the engine's key.")
        return key
    if pool.key_file is None:
        return None
    try:
        return Path(pool.key_file).expanduser().read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        told = f"key_file: cannot read {pool.key_file}: {why}"
        raise UserError(told, "Give a file with the engine's key.") from None


def name_of(pool: PoolSettings, means: Means) -> str:
    """What clients call a pool's model."""
    return means.models[pool.model].name if pool.kind in ("embedded", "lpu") else pool.model


def _spec(
    pool: PoolSettings,
    name: str,
    model: str,
    found: Known | None,
    room: tuple[int | None, int | None, int | None],
) -> Spec:
    """`room`: slots, the longest context, and tokens in the cache, as far as they are known."""
    slots, context_tokens, kv_tokens = room
    usd = None if pool.usd_per_h is None else pool.usd_per_h / _S_PER_H
    is_here = pool.kind in ("embedded", "lpu")
    if found is None:
        usual = {"embedded": _EMBEDDED, "lpu": _MACHINE}.get(pool.kind, Prior())
        prior = pool.prior or usual
        return Spec(
            name, pool.name, pool.kind, prior,
            slots or _SEATS.get(pool.kind, _MANY_SEATS), kv_tokens or _KV_TOKENS,
            context_tokens or _CONTEXT_TOKENS,
            usd_per_s=usd, is_on=False, model=model, role=pool.role, is_exclusive=is_here,
            can_hand_over=pool.kv_folder is not None,
        )  # fmt: skip
    return Spec(
        name, pool.name, found.processor, found.forecast,
        min(slots or found.seats, found.seats), kv_tokens or found.kv_tokens,
        context_tokens or found.context_tokens,
        found.idle_w, found.usd_per_s if usd is None else usd, found.tokens_per_step, False,
        model=model, role=pool.role, is_exclusive=is_here,
        can_hand_over=pool.kv_folder is not None,
    )  # fmt: skip


def _spot(pool: PoolSettings, means: Means, tariff: str) -> tuple[Wish, Known]:
    """How a pool's replicas are placed, and what is known of one."""
    means.catalog.tariff(tariff)  # raises where there is none
    wish = Wish(pool.processor or "", **_placing(pool))
    shape = means.open_shape(pool.shape or pool.model)
    place = prepared(wish, shape, means.catalog, means.open_shape)
    wish = replace(wish, limits=fitted(wish.limits, placed(place), pool.context_tokens))
    return wish, known(place, build(place, wish.limits), wish.limits, tariff)


def _placing(pool: PoolSettings) -> dict[str, Any]:
    """What a pool says of where its replicas are, beside the processor."""
    names = ("devices", "tp", "pp", "precision", "kv", "decode_on")
    limits = EngineLimits() if pool.slots is None else EngineLimits(sequences=pool.slots)
    return {"limits": limits, **{name: getattr(pool, name) for name in names}}
