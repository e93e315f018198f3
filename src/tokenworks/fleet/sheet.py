"""A fleet on file: its rules, and of each replica what makes its data sheet again.

A forecast can't be written. What it was made of can: a placement of a model, or a prior.
"""

from collections.abc import Callable

import msgspec

from tokenworks.catalog.book import Catalog
from tokenworks.engine.build import build
from tokenworks.fleet.placed import Wish, known, prepared
from tokenworks.model.shape import Shape
from tokenworks.sched.config import Rules
from tokenworks.sched.forecast import Forecast
from tokenworks.sched.prior import Prior
from tokenworks.sched.spec import Role, Spec


class Sheet(msgspec.Struct, frozen=True, omit_defaults=True):
    """`Spec` as it is written. `prior`: what its times are assumed to be; else they are those of
    `shape` placed as `wish` says.
    """

    name: str
    pool: str
    processor: str
    seats: int
    kv_tokens: int
    context_tokens: int
    idle_w: float = 0.0
    usd_per_s: float | None = None
    tokens_per_step: float = 1.0
    is_on: bool = True
    model: str = ""
    role: Role = "both"
    is_exclusive: bool = False
    can_hand_over: bool = False
    transfer_ns_per_token: float = 0.0
    prior: Prior | None = None
    wish: Wish | None = None
    shape: str = ""

    @property
    def step_tokens(self) -> int:
        """The most tokens that a step of its engine works on."""
        if self.wish is not None:
            return self.wish.limits.step_tokens
        return (self.prior or Prior()).step_tokens


class Fleet(msgspec.Struct, frozen=True):
    """What a scheduler is made of. The order of the replicas is that of their numbers."""

    rules: Rules
    replicas: tuple[Sheet, ...]


def sheet(spec: Spec, wish: Wish | None, shape: str) -> Sheet:
    """To be written; `wish` and `shape`: where its forecast comes from, if it is no prior."""
    prior = spec.forecast if isinstance(spec.forecast, Prior) else None
    kept = {name: getattr(spec, name) for name in Spec.__struct_fields__ if name != "forecast"}
    if prior is not None:
        return Sheet(**kept, prior=prior)
    return Sheet(**kept, wish=wish, shape=shape)


class Sheets:
    """Makes data sheets of what was written; UserError where the catalogue doesn't have it now."""

    def __init__(self, catalog: Catalog, open_shape: Callable[[str], Shape]) -> None:
        self._catalog, self._open_shape = catalog, open_shape
        self._forecasts: dict[bytes, Forecast] = {}

    def spec(self, told: Sheet) -> Spec:
        """The replica's data sheet."""
        forecast = told.prior or self._forecast(told.wish or Wish(told.processor), told.shape)
        kept = {name: getattr(told, name) for name in Spec.__struct_fields__ if name != "forecast"}
        return Spec(forecast=forecast, **kept)

    def _forecast(self, wish: Wish, shape: str) -> Forecast:
        key = msgspec.json.encode((wish, shape))
        if key not in self._forecasts:
            place = prepared(wish, self._open_shape(shape), self._catalog, self._open_shape)
            engine = build(place, wish.limits)
            self._forecasts[key] = known(place, engine, wish.limits, "default").forecast
        return self._forecasts[key]
