"""The models that are served: which engines have each, how its requests are read."""

from typing import Any, Final

import msgspec

from tokenworks.gateway import resume
from tokenworks.gateway.engine import Engine
from tokenworks.gateway.intake import Call, Intake, Route
from tokenworks.gateway.problem import Problem
from tokenworks.gateway.traits import REMOTE

_LEARN: Final = 0.02
_TOKENS_PER_BYTE: Final = 0.25  # before anything is known of a model
_EXPECTED_TOKENS: Final = 256  # of an answer whose caller names no bound


class Served:
    """One model. `key`: what the scheduler calls it ("": any model of an engine that has many)."""

    expected_tokens = _EXPECTED_TOKENS

    def __init__(self, name: str, key: str) -> None:
        self.name, self.key = name, key
        self.engines: list[Engine] = []
        self.facts: dict[str, Any] = {}
        self._tokens_per_byte = _TOKENS_PER_BYTE

    @property
    def replicas(self) -> int:
        """Engines that have it."""
        return len(self.engines)

    @property
    def slots(self) -> int | None:
        """The most choices an engine of it works on at once; None: it queues by itself."""
        most = 0
        for engine in self.engines:
            if engine.slots is None:
                return None
            most = max(most, engine.slots)
        return most or None

    def tokens_in(self, body: bytes) -> int:
        """Tokens of a request's prompt, as its bytes tell: no tokenizer is asked."""
        return max(int(len(body) * self._tokens_per_byte), 1)

    def learn(self, size: int, tokens: int) -> None:
        """A request of `size` bytes had so many."""
        if tokens > 0:
            self._tokens_per_byte += _LEARN * (tokens / max(size, 1) - self._tokens_per_byte)

    def why_not_continued(self, call: Call) -> str | None:
        """Why a partial answer can't be carried on by any engine of it; None if it can."""
        reason, document = "no engine is left", msgspec.json.decode(call.raw)
        for engine in self.engines:
            found = resume.can_continue(engine.traits, call.route, document)
            if found is None:
                return None
            reason = found
        return reason


class _Named(msgspec.Struct):
    model: str


class Models:
    """All of them, by name. Without a single name known, any goes: it is the engine's business."""

    def __init__(self) -> None:
        self.by_name: dict[str, Served] = {}
        self._any = Intake(REMOTE)
        self.default: Served | None = None  # of an engine that lists no models

    def add(self, name: str, engine: Engine, key: str | None = None) -> Served:
        """An engine has the model."""
        served = self.by_name.get(name)
        if served is None:
            served = self.by_name[name] = Served(name, name if key is None else key)
        if engine not in served.engines:
            served.engines.append(engine)
        return served

    def remove(self, engine: Engine) -> None:
        """An engine is gone for good."""
        for name, served in list(self.by_name.items()):
            if engine in served.engines:
                served.engines.remove(engine)
                if not served.engines:
                    del self.by_name[name]

    def read(self, route: Route, body: bytes) -> tuple[Served, Call]:
        """The call in a request's body, and its model; raises Problem."""
        first = next(iter(self.by_name.values()), self.default)
        if first is None:
            raise Problem(503, "No engine is there yet.", code="not_ready", retry_after_s=1)
        intake = first.engines[0].intake if first.engines else self._any
        try:
            call = intake.call(route, body, slots=first.slots)
        except Problem as problem:
            # Another kind of engine may take other fields.
            return self._read_by_others(route, body, intake, problem)
        served = self.find(call.model)
        if served is first or not served.engines:
            return served, call
        if all(engine.traits is not intake.traits for engine in served.engines):
            return self._read_by_others(route, body, intake, None)
        return served, call

    def _read_by_others(
        self, route: Route, body: bytes, tried: Intake, problem: Problem | None
    ) -> tuple[Served, Call]:
        """The same, by the kinds of engines that have its model."""
        try:
            served = self.find(msgspec.json.decode(body, type=_Named).model)
        except (msgspec.DecodeError, UnicodeDecodeError):
            assert problem is not None
            raise problem from None
        problem = problem if any(e.intake is tried for e in served.engines) else None
        kinds = {id(engine.traits): engine.intake for engine in served.engines}
        for intake in kinds.values():
            try:
                return served, intake.call(route, body, slots=served.slots)
            except Problem as other:
                problem = problem or other
        assert problem is not None
        raise problem

    def find(self, name: str) -> Served:
        """The model; raises Problem (404) where no engine serves it."""
        served = self.by_name.get(name, self.default)
        if served is None:
            raise Problem(
                404,
                f"The model {name!r} does not exist here. There is: {', '.join(self.by_name)}.",
                param="model",
                code="model_not_found",
            )
        return served
