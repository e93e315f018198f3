"""What an engine says of itself: how busy it is, whether it is well. Bytes in, records out.

Called every second or so for each replica, on the loop's thread: only the lines that matter are
looked at, of the hundreds in a Prometheus page.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, Final, Literal

import msgspec

from tokenworks.gateway.traits import Traits


class Telemetry(msgspec.Struct, frozen=True):
    """An engine's load, summed over the engines that answer under one address; -1: not told."""

    running: int = -1  # requests in work
    waiting: int = -1  # requests in its own queue
    kv_fraction: float = -1.0  # of the KV cache in use, 0 to 1; the mean of several engines


class Health(msgspec.Struct, frozen=True):
    """What the answer to a health check means.

    `unready`: it is there, and may be well later; `absent`: it has no such path, try the next.
    """

    state: Literal["ready", "unready", "down", "absent"]
    detail: str = ""


def read(traits: Traits, page: bytes) -> Telemetry | None:
    """Read the answer to one of `traits.gauges.paths`; None where it tells nothing known."""
    gauges = traits.gauges
    if page[:1] in (b"[", b"{"):
        return _iteration(page)
    running = _first(page, gauges.running)
    waiting = _first(page, gauges.waiting)
    kv = _first(page, gauges.kv)
    if not (running or waiting or kv):
        return None
    queued = round(sum(waiting)) if waiting else -1
    working = round(sum(running)) if running else -1
    if gauges.running_has_waiting and working >= 0:
        working = max(working - max(queued, 0), 0)
    return Telemetry(working, queued, sum(kv) / len(kv) if kv else -1.0)


def read_slots(page: bytes) -> Telemetry | None:
    """Read llama.cpp's /slots, which tells no queue; None where it isn't that."""
    slots = _decoded(page)
    if not isinstance(slots, list) or not slots:
        return None
    working = [slot for slot in slots if isinstance(slot, dict) and slot.get("is_processing")]
    room = sum(_number(slot, "n_ctx") for slot in slots)
    # A slot at rest keeps its last prompt, but gives it up for the next.
    used = sum(_number(slot, "n_prompt_tokens") for slot in working)
    return Telemetry(len(working), -1, min(used / room, 1.0) if room else -1.0)


def health(status: int, body: bytes) -> Health:
    """What a health check's answer means; 401 and 403 are the key's fault, and said to be."""
    if status == 200:
        word = _status_word(body)
        if word in _NOT_YET:
            return Health("unready", f"it says it is {word}")
        return Health("ready")
    if status == 429:
        return Health("ready", "it limits our requests")
    if status in (404, 405, 501):
        return Health("absent", f"it has no such path ({status})")
    if status in (401, 403):
        return Health("down", f"it refuses the key ({status})")
    if status == 503:
        return Health("unready", "it is not ready (503)")
    return Health("down", f"its health check answers {status}")


# Dynamo's frontend is there before its workers are, and some versions say so with 200.
_NOT_YET: Final = ("unhealthy", "notready", "loading model", "error")


def _status_word(body: bytes) -> str:
    document = _decoded(body)
    word = document.get("status") if isinstance(document, dict) else None
    return word.lower() if isinstance(word, str) else ""


def _first(page: bytes, names: tuple[str, ...]) -> list[float]:
    """The values of the first of `names` that the page has."""
    for name in names:
        # Exporters write a colon or an underscore after their own name.
        for written in (name.replace("_", ":", 1), name):
            found = list(_values(page, written.encode()))
            if found:
                return found
    return []


def _values(page: bytes, name: bytes) -> Iterator[float]:
    """The values of one metric, one for each set of labels."""
    at = -1
    while (at := page.find(name, at + 1)) >= 0:
        after = at + len(name)
        if (at and page[at - 1 : at] != b"\n") or page[after : after + 1] not in _AFTER_NAME:
            continue
        end = page.find(b"\n", after)
        value = _sample(page[after:] if end < 0 else page[after:end])
        if value is not None:
            yield value


_AFTER_NAME: Final = (b"{", b" ", b"\t")
_PRIORITY: Final = re.compile(rb'[{,]priority="([^"]*)"')


def _sample(line: bytes) -> float | None:
    """The value of one sample, whose name has been read; None where it is a part of another.

    With its priorities on, SGLang tells a queue's parts beside the whole, which has an empty label.
    """
    labels, brace, rest = line.rpartition(b"}")
    part = _PRIORITY.search(labels)
    if part is not None and part[1]:
        return None
    words = (rest if brace else line).split()
    try:
        value = float(words[0])  # a time stamp may follow
    except (IndexError, ValueError):
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _iteration(page: bytes) -> Telemetry | None:
    """TensorRT-LLM's own page, where Prometheus isn't turned on: a list of its last steps."""
    steps = _decoded(page)
    last = steps[-1] if isinstance(steps, list) and steps else None
    if not isinstance(last, dict) or "numActiveRequests" not in last:
        return None
    cache = last.get("kvCacheStats")
    most = _number(cache, "maxNumBlocks")
    return Telemetry(
        _number(last, "numActiveRequests"),
        _number(last, "numQueuedRequests"),
        _number(cache, "usedNumBlocks") / most if most else -1.0,
    )


def _number(record: Any, name: str) -> int:
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, int) and value >= 0 else 0


def _decoded(page: bytes) -> Any:
    try:
        return msgspec.json.decode(page)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
