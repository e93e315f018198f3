"""How to run a model on the machine at hand: slots, threads and context that fit it."""

import os
from pathlib import Path
from typing import Final

import msgspec

from tokenworks.errors import UserError
from tokenworks.gateway.settings import EngineSettings
from tokenworks.model.gguf import Gguf, GgufError

_SLOTS: Final = 4
_CONTEXT_TOKENS: Final = 8192
# What the KV caches may take of the machine's memory, together.
_MEMORY_SHARE: Final = 0.25
# Prompt tokens the engine reads in one go. A processor core is as fast with few as with many, and
# whoever waits meanwhile (the other slots, a request to stop) waits for no more than these.
STEP_TOKENS: Final = 64


class Launch(msgspec.Struct, frozen=True):
    """All that the engine's process is told."""

    model_path: str
    model_name: str
    socket_path: str
    parent_pid: int
    slots: int
    threads: int
    context_tokens: int  # per slot
    prompt_cache_mib: int
    is_embedder: bool
    kv_folder: str = ""  # where it saves its slots' caches for other engines


def plan(
    path: Path,
    name: str,
    header: Gguf,
    settings: EngineSettings,
    socket_path: str,
    *,
    sharers: int = 1,
    kv_folder: str = "",
) -> Launch:
    """Choose what `settings` leave open; UserError where the model can't be run so.

    `sharers`: engines that share the machine's memory and processor cores with this one.
    """
    try:
        trained = header.context_tokens
        kv_bytes = header.kv_bytes_per_token()
    except GgufError as error:
        raise UserError(f"{path}: {error}", "The file's metadata is incomplete.") from error
    slots = settings.slots or _SLOTS
    context = settings.context_tokens
    if context is None:
        affordable = int(memory_bytes() * _MEMORY_SHARE) // (slots * kv_bytes * sharers)
        # Whole thousands: nobody can remember 7319.
        context = min(trained, _CONTEXT_TOKENS, max(affordable // 1024 * 1024, 512))
    elif context > trained:
        raise UserError(
            f"{context} tokens of context are more than the {trained} that {name} was trained for",
            f"Take --context-tokens {trained} or fewer.",
        )
    return Launch(
        model_path=str(path),
        model_name=name,
        socket_path=socket_path,
        parent_pid=os.getpid(),
        slots=slots,
        threads=settings.threads or max(spare_threads() // sharers, 1),
        context_tokens=context,
        prompt_cache_mib=settings.prompt_cache_mib,
        is_embedder=header.is_embedder,
        kv_folder=kv_folder,
    )


def cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def spare_threads() -> int:
    """Threads the engine gets by default: one core is left for the gateway."""
    return max(1, cores() - 1)


def memory_bytes() -> int:
    """The machine's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
