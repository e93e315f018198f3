"""`tokenworks emulate`: a modelled replica in real time, behind the OpenAI API."""

import sys
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from tokenworks.cli.book import Files, Settings, open_model, opened
from tokenworks.cli.console import ERR, OUT
from tokenworks.engine.work import Limits
from tokenworks.errors import UserError
from tokenworks.gateway.emulated.replica import Replica
from tokenworks.gateway.emulated.server import serve
from tokenworks.workload import named


def emulate(  # noqa: PLR0913 - one argument a flag
    processor: str,
    model: str,
    *,
    port: int = 8100,
    host: str = "127.0.0.1",
    socket: Path | None = None,
    replicas: int = 1,
    devices: int | None = None,
    precision: str | None = None,
    kv: str = "bf16",
    decode_on: str | None = None,
    other_devices: int | None = None,
    sequences: int = 256,
    step_tokens: int = 8192,
    kv_blocks: int | None = None,
    context_tokens: int | None = None,
    prefix_cache: bool = True,
    async_scheduling: bool = False,
    slow: float = 1.0,
    served_as: str = "",
    lengths: str = "azure-conversation",
    faults: bool = False,
    catalog: Files = None,
    set_: Settings = None,
) -> None:
    """Emulate an engine: the twin's model of it in real time, behind the OpenAI API.

    It takes as long as modelled and says words that mean nothing; each reply tells so. A token of a
    prompt is 4 bytes of its messages' contents; a word is a token of an answer.

    Example: tokenworks emulate h100 llama-3.1-8b --port 8100

    Parameters
    ----------
    processor
        A name of the catalogue (tokenworks catalog).
    model
        A name of the catalogue, or the path of a config.json or a .gguf file.
    port
        Port to listen on; 0 takes any that is free. More replicas take the ports after it.
    host
        Address to listen on. There are no keys.
    socket
        Listen at this socket file instead; more replicas at PATH.1, PATH.2 …
    replicas
        How many of them, each with an address of its own.
    devices
        Of the processor in each replica; as many as the weights need if left out.
    precision
        Of the weights: bf16, fp8, int8, nvfp4, mxfp4, int4.
    kv
        Precision of the cache.
    decode_on
        Decode there, after a transfer of the cache; PROCESSOR reads the prompts.
    other_devices
        How many of the second processor.
    sequences
        Sequences at once.
    step_tokens
        Tokens a step may work on.
    kv_blocks
        Blocks of 16 tokens in the cache; what fits beside the weights if left out.
    context_tokens
        Longest request; as long as the model and the cache allow if left out.
    prefix_cache
        Keep prompts' beginnings for those that begin alike.
    async_scheduling
        Decide on a step while the one before runs, as vLLM does since 0.14.
    slow
        Times as long as modelled.
    served_as
        What clients call the model; its own name if left out.
    lengths
        The workload whose answers are as long as those that have no end of their own
        (`ignore_eos`).
    faults
        Take orders for trouble at POST /emulate/fault.
    """
    if replicas < 1:
        raise UserError(f"--replicas is {replicas}", "Ask for 1 or more.")
    named(lengths)  # raises before anything is built
    first = Replica(
        processor,
        model=model,
        devices=devices,
        precision=precision,
        kv=kv,
        decode_on=decode_on,
        other_devices=other_devices,
        limits=Limits(
            sequences=sequences,
            step_tokens=step_tokens,
            kv_blocks=kv_blocks,
            prefix_cache=prefix_cache,
            async_scheduling=async_scheduling,
        ),
        context_tokens=context_tokens,
        slow=slow,
        served_as=served_as or _name(model),
        lengths=lengths,
        faults=faults,
        socket=None if socket is None else str(socket),
        host=host,
        port=port,
    )
    known = opened(catalog, set_, (processor, decode_on))
    all_of_them = [_at(first, index) for index in range(replicas)]
    serve(
        all_of_them,
        known,
        open_model,
        on_ready=lambda addresses: _announce(first, addresses),
    )


def _name(model: str) -> str:
    """What a model is called that is given as a file."""
    path = Path(model)
    return path.stem if path.suffix in (".json", ".gguf") else model


def _at(first: Replica, index: int) -> Replica:
    """The replica with that number: at the next address."""
    if not index:
        return first
    if first.socket is not None:
        return replace(first, socket=f"{first.socket}.{index}")
    return replace(first, port=first.port + index if first.port else 0)


def _announce(first: Replica, addresses: Sequence[str]) -> None:
    ERR.print(
        f"Emulating {first.served_as} on {first.processor}: real in time, not in text. "
        "Stop with Ctrl-C.",
        soft_wrap=True,
        markup=False,
    )
    shown = " ".join(address + "/v1" if "://" in address else address for address in addresses)
    OUT.print(f"Tokenworks is ready: {shown}", soft_wrap=True, markup=False)
    sys.stdout.flush()
