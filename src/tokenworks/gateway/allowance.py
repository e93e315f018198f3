"""What a tenant or a key may use, and what it has used: records only."""

import math

import msgspec

from tokenworks.sched.config import ServiceClass


class Allowance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be used; None sets no limit. Limits hold for all keys of a tenant together."""

    requests_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_minute: int | None = None  # read and written
    tokens_per_day: int | None = None
    concurrent: int | None = None  # requests at once, waiting ones too
    classes: tuple[ServiceClass, ...] | None = None  # that may be asked for
    models: tuple[str, ...] | None = None
    budget_usd_per_day: float | None = None
    budget_usd_per_month: float | None = None
    budget_j_per_day: float | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, tuple):
                if not value:
                    raise ValueError(f"{name} is empty: name at least one, or leave it out")
            elif value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: it must be above zero")


class TenantSettings(Allowance, frozen=True, kw_only=True):
    """`[tenants.NAME]`: one tenant. `[tenants.default]` holds for each that is not listed."""

    weight: float = 1.0  # its share where tenants compete for the fleet


class Used(msgspec.Struct, frozen=True):
    """What a key has used on one day, without its batches' requests and tokens."""

    tenant: str
    key: str  # its id
    day: int  # since 1970, UTC
    requests: int = 0
    tokens: int = 0
    usd: float = 0.0
    energy_j: float = 0.0
