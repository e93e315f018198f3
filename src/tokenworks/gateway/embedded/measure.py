"""How fast the machine at hand multiplies and reads: asked of the engine at work.

The engine runs in its own process as under `tokenworks up`, with one slot, and tells its timings
with its answers. The rates are effective ones: all that the engine does beside is in them.
"""

import asyncio
import contextlib
import http.client
import platform
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from tokenworks.assets import host, store
from tokenworks.catalog import models
from tokenworks.catalog.book import Catalog, catalog
from tokenworks.errors import UserError
from tokenworks.gateway import remote
from tokenworks.gateway.address import Address, socket_folder, socket_in
from tokenworks.gateway.embedded.launch import cores, memory_bytes, plan, spare_threads
from tokenworks.gateway.embedded.supervisor import supervised
from tokenworks.gateway.engine import Engine
from tokenworks.gateway.settings import EngineSettings
from tokenworks.gateway.traits import EMBEDDED
from tokenworks.model import from_gguf
from tokenworks.model.gguf import Gguf

Say = Callable[[str], None]

_SETTINGS: Final = EngineSettings(slots=1, prompt_cache_mib=0)
_PROMPT_TOKENS: Final = 512
_SHORT_TOKENS: Final = 32
_WRITTEN_TOKENS: Final = 64
_TIMES: Final = 3
_ANSWER_S: Final = 120.0
_FIRST_TOKEN: Final = 1000  # prompts are the ids from here on: what they say takes no time


class _Timings(msgspec.Struct):
    prompt_n: int
    predicted_n: int
    prompt_per_second: float
    predicted_per_second: float


class _Answer(msgspec.Struct):
    timings: _Timings


class Rates(msgspec.Struct, frozen=True):
    """What the engine told: medians, in tokens per second."""

    prompt_tokens_per_s: float
    written_tokens_per_s: float


def with_cpu(known: Catalog, again: bool, say: Say) -> Catalog:
    """`known` with the processor at hand: as kept, or measured now and kept.

    It is measured where nothing is kept, `again` is asked for, or what is kept is of another
    processor (a cache may be shared between machines). UserError for a kept file that is broken.
    """
    where = str(host.path())
    raw = None if again else host.kept()
    if raw is not None:
        found = known.with_user(raw, where)
        title = found.processor(host.NAME).title
        if title == _title():
            return found
        say(f"{where} is of another processor ({title}).")
    raw = record(say)
    host.check(raw)
    host.keep(raw)
    say(f"Kept in {where}.")
    return known.with_user(raw, where)


def record(say: Say) -> bytes:
    """Measure the processor at hand: its record, as TOML. KeyboardInterrupt if told to stop."""
    model = models.model(models.DEFAULT)
    said: set[str] = set()

    def progress(what: str, _done: int, _total: int) -> None:
        if what not in said:
            said.add(what)
            say(f"{what} …")

    path = store.ensure(model, progress)
    header = store.read_header(path)
    say(f"Measuring this processor with {model.name} (once, for some ten seconds) …")
    try:
        with _signals_kept():
            rates = asyncio.run(_rates(path, model.name, header, say))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    return _toml(path, model.name, header, rates)


async def _rates(path: Path, name: str, header: Gguf, say: Say) -> Rates:
    _stop_when_told()
    async with _engine(path, name, header) as engine:
        read = await _timings(engine, _PROMPT_TOKENS, 1)
        prompt = _middle([each.prompt_per_second for each in read])
        say(f"Prompts of {_PROMPT_TOKENS} tokens: {prompt:.1f} tokens/s.")
        written = await _timings(engine, _SHORT_TOKENS, _WRITTEN_TOKENS)
        answer = _middle([each.predicted_per_second for each in written])
        say(f"Answers of {_WRITTEN_TOKENS} tokens: {answer:.1f} tokens/s.")
    return Rates(prompt, answer)


@contextlib.asynccontextmanager
async def _engine(path: Path, name: str, header: Gguf) -> AsyncIterator[Engine]:
    """The engine; its process is there as long as the block is."""
    with socket_folder() as folder:
        launch = plan(path, name, header, _SETTINGS, socket_in(folder, name))
        engine = Engine(name, EMBEDDED, Address(path=launch.socket_path), slots=launch.slots)
        supervisor = supervised(engine, launch, lambda: None)
        try:
            await supervisor.start()
            yield engine
        finally:
            engine.close()
            await supervisor.stop()


async def _timings(engine: Engine, prompt_tokens: int, written_tokens: int) -> list[_Timings]:
    """The engine's timings of equal requests, one after the other."""
    asked = {
        "prompt": list(range(_FIRST_TOKEN, _FIRST_TOKEN + prompt_tokens)),
        "n_predict": written_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    found = []
    for _ in range(_TIMES):
        # If we are told to stop, the engine ends, and with it what this thread waits for.
        timings = await asyncio.to_thread(_ask, engine, asked)
        if (timings.prompt_n, timings.predicted_n) != (prompt_tokens, written_tokens):
            raise _untold(f"it worked on {timings.prompt_n} and {timings.predicted_n} tokens")
        found.append(timings)
    return found


def _ask(engine: Engine, asked: dict[str, Any]) -> _Timings:
    try:
        status, raw = remote.ask(engine, "/completion", msgspec.json.encode(asked), _ANSWER_S)
        if status != http.client.OK:
            raise _untold(f"it answered {status}: {raw[:200].decode('utf-8', 'replace')}")
        return msgspec.json.decode(raw, type=_Answer).timings
    except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
        raise _untold(str(error) or type(error).__name__) from error


def _middle(rates: list[float]) -> float:
    found = median(rates)
    if not 0 < found < float("inf"):
        raise _untold(f"it told of {found} tokens/s")
    return found


def _untold(told: str) -> UserError:
    return UserError(
        f"this processor could not be measured with the embedded engine: {told}", "Try again."
    )


def _title() -> str:
    return f"{_processor()}, {_threads()}"


def _threads() -> str:
    threads = spare_threads()
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _toml(path: Path, name: str, header: Gguf, rates: Rates) -> bytes:
    """The record: each number with what was run."""
    shape = from_gguf.shape(header, name)
    # A prompt's tokens meet all matrices but the output head, which only its last token meets.
    met = sum(group.count * m.parameters for group in shape.groups for m in group.layer.matrices)
    # And on average it attends to half of the prompt.
    pairs = sum(group.count * group.layer.attention.prefill_flops for group in shape.groups)
    flops = (2 * met + pairs * _PROMPT_TOKENS / 2) * rates.prompt_tokens_per_s
    file_bytes = path.stat().st_size
    per_s = file_bytes * rates.written_tokens_per_s
    source = f"tokenworks, {datetime.now(UTC).date().isoformat()}"
    run = f"{path.name}, {_threads()}, median of {_TIMES}"
    read = (
        f"Effective: prompts of {_PROMPT_TOKENS} tokens at {rates.prompt_tokens_per_s:.1f} "
        f"tokens/s, 2 flop for each of {met} numbers of the layers' matrices, and attention. {run}."
    )
    written = (
        f"Effective: {_WRITTEN_TOKENS} greedy tokens at {rates.written_tokens_per_s:.1f} tokens/s, "
        f"the file's {file_bytes} bytes for each. {run}."
    )
    system = "As the operating system tells."
    numbers: dict[str, tuple[float, str]] = {
        "flops.bf16": (flops, read),
        "flops.fp32": (flops, f"Not measured in 32 bits: taken from the same run. {read}"),
        "memory.ddr.bytes": (memory_bytes(), system),
        "memory.ddr.bytes_per_s": (per_s, written),
        "units.cores": (cores(), system),
    }
    lines = [
        "# Measured by tokenworks. Measure again: tokenworks catalog cpu --measure",
        f"[processor.{host.NAME}]",
        f"title = {_text(_title())}",
        f"kind = {_text(host.NAME)}",
    ]
    for key, (value, note) in numbers.items():
        words = f'grade = "measured", source = {_text(source)}, note = {_text(note)}'
        lines.append(f"{key} = {{ value = {value!r}, {words} }}")
    lines.append(host.power(catalog(), cores(), source))
    return "\n".join(lines).encode()


def _text(words: str) -> str:
    """A TOML text; JSON's are, once they have nothing in them that can't be printed."""
    return msgspec.json.encode("".join(c if c.isprintable() else " " for c in words)).decode()


def _stop_when_told() -> None:
    """Make SIGINT and SIGTERM cancel the task at hand, so that the engine is ended first."""
    if threading.current_thread() is not threading.main_thread():
        return
    task = asyncio.current_task()
    assert task is not None

    def stop() -> None:
        if not task.cancelling():  # told twice, it still cleans up once
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """What signals do now they will do after the block: a loop that ends forgets it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
