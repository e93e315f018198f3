"""What an operator asks of a running gateway: its state, a power cap, the fleet file read again.

The routes ask for an admin key where keys are asked for at all; on loopback without keys they are
open, as everything else there.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tokenworks.errors import UserError
from tokenworks.gateway.engine import Engine
from tokenworks.gateway.gauges import there
from tokenworks.gateway.plant import Plant
from tokenworks.gateway.problem import Problem, invalid
from tokenworks.gateway.settings import Settings
from tokenworks.sched.core import Scheduler

_log = logging.getLogger(__name__)


class _Cap(msgspec.Struct, forbid_unknown_fields=True):
    cap_w: float | None


class Admin:
    """One gateway's. `load`: reads its settings again, which come from `place`."""

    def __init__(self, plant: Plant, load: Callable[[], Settings], place: str) -> None:
        self.plant, self._load, self._place = plant, load, place
        self._started_s = time.time()

    async def reload(self) -> str:
        """Read the fleet file again and run the factory by it; what was changed, in words.

        UserError, naming the file and the key, where that can't be; then nothing is changed.
        """
        settings = self._load()
        try:
            told = await self.plant.reload(settings)
        except UserError as error:
            raise UserError(f"{self._place}: {error.message}", error.remedy) from None
        _log.warning("%s was read again: %s", self._place, told)
        return told

    def cap(self, body: bytes) -> dict[str, Any]:
        """Set the fleet's power cap; Problem where it is none."""
        try:
            wish = msgspec.json.decode(body, type=_Cap)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise invalid(f'Send {{"cap_w": WATTS}}, or null for none: {error}', "cap_w") from None
        if wish.cap_w is not None and not 0 < wish.cap_w < 1e12:
            raise invalid("cap_w must be above 0 W.", "cap_w", "invalid_value")
        if not isinstance(self.plant.gateway.factory.scheduler, Scheduler):
            route = self.plant.settings.policy.route
            raise Problem(409, f"policy.route {route} keeps no power cap.", code="no_power_cap")
        self.plant.cap(wish.cap_w)
        return self.power()

    def power(self) -> dict[str, Any]:
        """The cap, what is reserved by the scheduler, and what is drawn."""
        factory = self.plant.gateway.factory
        found: dict[str, Any] = {
            "cap_w": self.plant.settings.power.cap_w,
            "drawn_w": round(factory.energy.watts, 3),
        }
        if isinstance(factory.scheduler, Scheduler):
            found["reserved_w"] = round(factory.scheduler.power.reserved_w, 3)
        return found

    def state(self) -> dict[str, Any]:
        """The factory of this moment, for people and programs that watch it."""
        gateway = self.plant.gateway
        factory = gateway.factory
        totals = {index: (sums, watts) for index, sums, watts in factory.energy.totals()}
        engines = []
        present = there(factory)
        for index, engine in enumerate(factory.engines):
            if engine not in present:
                continue
            facts = _engine(engine)
            said = sum(leg.packets for leg in engine.legs)
            facts["tokens"] = gateway.figures.said_by(engine.name) + said
            if index in totals:
                sums, watts = totals[index]
                facts |= {
                    "watts": round(watts, 3),
                    "joules": {
                        "attributed": sums.attributed_nj / 1e9,
                        "idle": sums.idle_nj / 1e9,
                        "unattributed": sums.unattributed_nj / 1e9,
                        "meter": sums.meter_nj / 1e9,
                        "measured": sums.measured_nj / 1e9,
                    },
                }
            if isinstance(factory.scheduler, Scheduler):
                facts["scheduler"] = factory.scheduler.replicas[index].state
            engines.append(facts)
        return {
            "up_s": round(time.time() - self._started_s, 1),
            "draining": gateway.is_draining,
            "ledger": "broken" if gateway.ledger.is_broken else "ok",
            "waiting": factory.waiting,
            "power": self.power(),
            "engines": engines,
            "requests": gateway.figures.outcomes(),
            "classes": gateway.figures.classes(),
            "batches": msgspec.to_builtins(self.plant.batches.summary()),
            "log": list(factory.log)[-20:],
        }


def _engine(engine: Engine) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": engine.name,
        "model": engine.model,
        "kind": engine.traits.kind,
        "processor": engine.processor,
        "address": str(engine.address),
        "state": engine.state.value if engine.is_wanted else "draining",
        "running": len(engine.legs),
        "slots": engine.slots,
    }
    if engine.detail:
        facts["detail"] = engine.detail
    if engine.telemetry is not None:
        facts["telemetry"] = msgspec.to_builtins(engine.telemetry)
    return facts


def routes(admin: Admin) -> list[BaseRoute]:
    """The routes below /admin."""

    def allow(request: Request) -> None:
        kind = request.headers.get("content-type", "")
        if request.method == "POST" and not kind.startswith("application/json"):
            # Browsers let any page post to a loopback address, but not as JSON.
            told = "Send this with the header `content-type: application/json`."
            raise Problem(415, told, code="unsupported_media_type")
        keys = admin.plant.gateway.keys
        if keys is not None:
            problem = keys.check_admin(request.headers.get("authorization", "").encode("latin-1"))
            if problem is not None:
                raise problem

    async def state(request: Request) -> Response:
        allow(request)
        return _json(admin.state())

    async def cap(request: Request) -> Response:
        allow(request)
        if request.method == "GET":
            return _json(admin.power())
        return _json(admin.cap(await request.body()))

    async def reload(request: Request) -> Response:
        allow(request)
        try:
            return _json({"reloaded": await admin.reload()})
        except UserError as error:
            raise Problem(409, str(error), code="not_reloaded") from None

    return [
        Route("/admin/state", state),
        Route("/admin/cap", cap, methods=["GET", "POST"]),
        Route("/admin/reload", reload, methods=["POST"]),
    ]


def _json(document: object) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
