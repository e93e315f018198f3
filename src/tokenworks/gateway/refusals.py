"""What the scheduler's refusals mean to a client: status, reason, and when to try again."""

from math import ceil
from typing import TYPE_CHECKING, Final

from tokenworks.gateway.engine import State
from tokenworks.gateway.problem import Problem
from tokenworks.sched.messages import Reject
from tokenworks.units import NS_PER_S

if TYPE_CHECKING:
    from tokenworks.gateway.relay import Exchange

_WHY: Final = {
    "no_room": "Every engine is full of work that is as urgent.",
    "ttft_bound": "No engine would say the first token within {ttft}.",
    "tpot_bound": "No engine would keep up a token every {tpot}.",
    "power_cap": "The power cap holds back the engines that would keep its bounds.",
    "queue_wait": "The queue is longer than the class {name} may wait.",
    "flex_full": "There is no headroom for flex now.",
    "flex_yielded": "It made room for more urgent work.",
    "no_replica": "No engine of the model {model!r} is up.",
    "prompt_too_long": "Its prompt is longer than the engines of {model!r} take.",
    "model_not_served": "No engine serves the model {model!r}.",
}
# What is full may also not be there.
_FULL: Final = ("no_room", "flex_full")
# OpenAI's words where it has them.
_CODES: Final = {
    "prompt_too_long": "context_length_exceeded",
    "model_not_served": "model_not_found",
}


def refusal(command: Reject, exchange: "Exchange") -> Problem:
    """The problem that a client is told."""
    reason, status = command.reason, command.status
    if reason in _FULL and not any(e.state is State.READY for e in exchange.served.engines):
        reason, status = "no_replica", 503
    ttft_ns, tpot_ns = exchange.factory.bounds_of(exchange)
    told = _WHY.get(reason, reason).format(
        ttft=_ms(ttft_ns),
        tpot=_ms(tpot_ns),
        name=exchange.service_class,
        model=exchange.served.name,
    )
    retry_s = None
    if command.retry_after_ns is not None:
        retry_s = max(ceil(command.retry_after_ns / NS_PER_S), 1)
        told += f" Try again in {retry_s} s."
    elif status == 429:
        told += " Waiting won't help: ask for less, or in another class."
    code = _CODES.get(reason, reason if reason in _WHY else "engine_refused")
    return Problem(status, told, code=code, retry_after_s=retry_s)


def _ms(bound_ns: int) -> str:
    return f"{bound_ns / 1e6:g} ms"
