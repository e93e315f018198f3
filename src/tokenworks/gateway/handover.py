"""Running requests from engine to engine with their KV caches, as the scheduler says.

A reader's one token has been said, or an answer is stopped in the middle; the cache goes to the
target, and the request goes on there in the same stream. Whatever goes wrong on the way is told to
the scheduler, and the request is read again elsewhere.
"""

import asyncio
import logging
from pathlib import Path
from time import monotonic_ns
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from tokenworks.gateway import kv
from tokenworks.gateway.asking import ask
from tokenworks.gateway.engine import Engine, State
from tokenworks.gateway.factory import Factory
from tokenworks.gateway.intake import Call
from tokenworks.gateway.leg import Leg
from tokenworks.gateway.passage import Passage
from tokenworks.gateway.problem import Problem
from tokenworks.gateway.stage import Stage
from tokenworks.gateway.stream import Edit
from tokenworks.sched.config import CLASSES
from tokenworks.sched.messages import SendKv

if TYPE_CHECKING:
    from tokenworks.gateway.relay import Exchange

_log = logging.getLogger(__name__)

_PATIENCE_S: Final = 30.0
# Tokens that a stopped answer may have beyond what was seen of it.
_MOST_UNSEEN: Final = 256


class Handover:
    """Moves caches."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._tasks: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Move nothing any more."""
        for task in self._tasks:
            task.cancel()

    def send(self, exchange: "Exchange", command: SendKv) -> None:
        """Move a request with its cache. An answer that can't be moved in the middle stays where
        it is, and nothing is told: it will end there.
        """
        leg, target = exchange.leg, self._factory.engines[command.target]
        if leg is None or leg.number != command.id:  # it is over
            return
        passage, why = leg.passage, _unable(leg.engine, target)
        if not leg.is_reader:
            why = why or exchange.stays(leg)
            if why is not None:
                _log.info("%s stays at %s: %s", exchange.name, leg.engine.name, why)
                return
            passage = exchange.hold(leg)
        assert passage is not None
        passage.command, passage.since_ns = command, monotonic_ns()
        if why is not None:
            self._fail(exchange, leg, why)
        elif leg.engine.traits.kv_handover == "slots":
            task = asyncio.get_running_loop().create_task(self._move(exchange, leg, passage))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._point(exchange, leg, passage)

    def _fail(self, exchange: "Exchange", leg: Leg, why: str) -> None:
        _log.warning("%s: its cache did not leave %s: %s", exchange.name, leg.engine.name, why)
        exchange.lost(leg, why)

    # By the engines themselves

    def _point(self, exchange: "Exchange", leg: Leg, passage: Passage) -> None:
        """Tell the target where the cache is: it fetches it, and says the first token again."""
        command = passage.command
        assert command is not None
        target, before = self._factory.engines[command.target], passage.before
        try:
            call = exchange.call_at(target, _priority(exchange), before)
        except Problem as problem:
            self._fail(exchange, leg, problem.message)
            return
        params = passage.params
        size = params.get("remote_bytes") if isinstance(params, dict) else None
        exchange.handover_bytes += size if isinstance(size, int) else 0
        said, heard, call = before, "", kv.with_params(call, params)
        if exchange.said is not before:  # the client has the first token
            done = 0 if before is None else before.tokens
            assert exchange.said is not None
            said, heard = replace(exchange.said, text="", tokens=done), passage.first.text
        edit = Edit(call, exchange.receipt, said, heard=heard, cached_tokens=passage.cached_tokens)
        fresh = Leg(exchange, target, leg.number, call, edit)
        fresh.passage = onward = Passage(call)
        onward.command, onward.since_ns = command, passage.since_ns
        exchange.go_on(leg, fresh)

    # By llama.cpp's slots

    async def _move(self, exchange: "Exchange", leg: Leg, passage: Passage) -> None:
        """Save the slot, restore it at the target, and let the request go on from there."""
        command = passage.command
        assert command is not None
        target = self._factory.engines[command.target]
        name = f"{exchange.name}-{command.id}-{command.target}.kv"
        assert leg.engine.kv_folder is not None
        place = Path(leg.engine.kv_folder) / name
        slot, fresh = -1, None
        try:
            async with asyncio.timeout(_PATIENCE_S):
                saved = await ask(leg.engine, f"/slots/{leg.slot}?action=save", {"filename": name})
                ids = kv.ids_in(await asyncio.to_thread(_beginning, place))
                if _is_off(exchange, leg):
                    return
                assert target.seats is not None
                slot = target.seats.oldest()
                if slot < 0:
                    raise OSError(f"{target.name} has no slot free")
                await ask(target, f"/slots/{slot}?action=restore", {"filename": name})
                fresh = await self._onward(exchange, leg, target, ids)
                fresh.slot = slot
        except (OSError, ValueError, KeyError, TypeError, Problem) as error:
            if not _is_off(exchange, leg):
                self._fail(exchange, leg, str(error) or type(error).__name__)
        else:
            if not _is_off(exchange, leg):
                slot = -1
                exchange.handover_ns += monotonic_ns() - passage.since_ns
                exchange.handover_bytes += saved.get("n_written") or 0
                passage.command = None
                exchange.go_on(leg, fresh)
                self._factory.kv_sent(command)
        finally:
            place.unlink(missing_ok=True)
            if slot >= 0 and target.seats is not None:
                target.seats.give(slot, b"")

    async def _onward(
        self, exchange: "Exchange", leg: Leg, target: Engine, ids: tuple[int, ...]
    ) -> Leg:
        """The leg at the target, from the tokens whose cache came, and what was said."""
        call, exchange.warning = target.prepare(exchange.call, _priority(exchange))
        said, passage = exchange.said, leg.passage
        assert passage is not None
        if said is not None and said.text:
            prompt = await _prompt(target, call)
            if ids[: len(prompt)] != prompt:
                raise ValueError("the slot has the cache of another prompt")
            made = await _made(target, ids, len(prompt), said.text)
            said = replace(said, tokens=len(made))
            follows = kv.from_ids(call, prompt + made, len(made))
        else:
            said, follows = None, call
        edit = Edit(call, exchange.receipt, said, cached_tokens=passage.cached_tokens)
        fresh = Leg(exchange, target, leg.number, follows, edit)
        fresh.passage = Passage(call)
        return fresh


def _unable(source: Engine, target: Engine) -> str | None:
    """Why no cache can go from one to the other; None if it can."""
    way = source.traits.kv_handover
    if not way or way != target.traits.kv_handover:
        return f"{source.name} and {target.name} have no common way"
    if way == "slots" and (source.kv_folder is None or source.kv_folder != target.kv_folder):
        return f"{source.name} and {target.name} share no kv_folder"
    if target.state is not State.READY:
        return f"{target.name} is {target.state.value}"
    return None


def _priority(exchange: "Exchange") -> int:
    return CLASSES.index(exchange.service_class)


def _is_off(exchange: "Exchange", leg: Leg) -> bool:
    """Whether the request is not on this way any more."""
    return exchange.leg is not leg or exchange.stage is Stage.DONE


def _beginning(place: Path) -> bytes:
    """Of a saved slot, as much as its tokens may take."""
    with place.open("rb") as file:
        return file.read(16 * 1024 * 1024)


# What llama.cpp's own tokenizer makes of it


async def _prompt(engine: Engine, call: Call) -> tuple[int, ...]:
    """The tokens of a call's prompt."""
    if call.route == "completions":
        text = kv.prompt_of(call)
    else:
        text = (await ask(engine, "/apply-template", kv.document_of(call)))["prompt"]
    return await _tokens(engine, text, is_prompt=True)


async def _made(engine: Engine, ids: tuple[int, ...], start: int, said: str) -> tuple[int, ...]:
    """The tokens of an answer's text: those in the slot, as far as their text was said, and those
    of the rest (mostly the last one, which is in no cache yet).
    """
    made = ids[start:]
    for count in range(len(made), max(len(made) - _MOST_UNSEEN, -1), -1):
        text = await _text(engine, made[:count])
        if said.startswith(text):
            rest = await _tokens(engine, said[len(text) :], is_prompt=False)
            if await _text(engine, rest) == said[len(text) :]:
                return made[:count] + rest
            break
    raise ValueError("what the slot says is not what was said")


async def _tokens(engine: Engine, text: str, *, is_prompt: bool) -> tuple[int, ...]:
    if not text:
        return ()
    told = {"content": text, "add_special": is_prompt, "parse_special": is_prompt}
    return tuple((await ask(engine, "/tokenize", told))["tokens"])


async def _text(engine: Engine, ids: tuple[int, ...]) -> str:
    if not ids:
        return ""
    return str((await ask(engine, "/detokenize", {"tokens": ids}))["content"])
