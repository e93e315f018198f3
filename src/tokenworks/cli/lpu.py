"""`tokenworks lpu`: compile a model for deterministic processors, run it, look at the schedule."""

import codecs
import time
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import msgspec
from cyclopts import Parameter
from rich.table import Table

from tokenworks.assets import checkpoint, store
from tokenworks.catalog.models import model as catalogue_model
from tokenworks.catalog.models import models
from tokenworks.cli.book import AsJson, Files, Settings, opened, print_json, write
from tokenworks.cli.console import ERR, OUT
from tokenworks.cli.fetch import with_progress
from tokenworks.errors import UserError
from tokenworks.lpu import compile as compiler
from tokenworks.lpu import graph, isa, program, timing
from tokenworks.lpu.answer import answer
from tokenworks.lpu.chip import Chip
from tokenworks.lpu.chip import chip as chip_of
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.machine import Machine
from tokenworks.lpu.program import Loaded, Program
from tokenworks.lpu.verify import verify
from tokenworks.model.checkpoint import Checkpoint
from tokenworks.model.tensors import Tensors
from tokenworks.model.tokens import Tokenizer, Vocabulary, vocabulary
from tokenworks.model.tokens import prompt as chat
from tokenworks.report import lpu_trace
from tokenworks.units import show

lpu = cyclopts.App(
    name="lpu",
    help="Compile a model for deterministic processors, to the cycle, and run it.\n\n"
    "Example: tokenworks lpu compile smollm2-135m-instruct --out smollm2.lpu",
)
Out = Annotated[Path, Parameter(help="The file to write.")]


@lpu.command(name="compile")
def compile_model(  # noqa: PLR0913 - one argument a flag
    model: str,
    *,
    out: Out,
    chips: str = "auto",
    group: int = 1,
    context: int | None = None,
    processor: str = "groq-lpu-v1",
    files: Files = None,
    assignments: Settings = None,
    json: AsJson = False,
) -> None:
    """Place a model on chips, schedule every instruction, prove it legal, and write the program.

    Example: tokenworks lpu compile smollm2-135m-instruct --chips 2 --out smollm2.lpu

    Parameters
    ----------
    model
        A name that `tokenworks model list` shows, a GGUF file of the Llama family, or a folder with
        config.json, tokenizer.json and safetensors of one.
    chips
        How many, as a pipeline of layers; auto: as few as hold it.
    group
        So many chips share each layer: its heads, inner numbers and words. The pipeline then is one
        of groups.
    context
        The longest context in tokens (1,280, or the model's if it is shorter); programs are made
        for several lengths up to it.
    processor
        A deterministic processor of the catalogue.
    """
    chip = chip_of(opened(files, assignments), processor)
    begun = time.perf_counter()
    name, tensors, words = _source(model)
    sizes = graph.sizes(tensors, name)
    most = sizes.context_tokens
    context = min(compiler.DEFAULT_CONTEXT, most) if context is None else context
    if not 1 <= context <= most:
        raise UserError(f"--context {context}: {name} takes 1 to {most}", "Give another.")
    count = _count(chips, group, chip, sizes, name, context)
    network = graph.network(tensors, name, _told)
    loaded = compiler.compile_network(
        chip, network, count, context, msgspec.msgpack.encode(words), _told, group=group
    )
    _told("Verifying", 0, 1)
    proof = verify(loaded.program)
    data = program.encode(loaded)
    try:
        store.put(out, data)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror or error}", "Give --out another path."
        ) from error
    spent = time.perf_counter() - begun
    if json:
        print_json({"seconds": spent, "proof": proof, **summary(loaded.program)})
        return
    OUT.print(
        f"{out}: {len(data) / 1e6:.0f} MB, compiled in {spent:.1f} s; proved legal:"
        f" {proof.instructions:,} instructions, {proof.operands:,} operands",
        soft_wrap=True,
    )
    _show_summary(loaded.program)


@lpu.command
def run(
    file: Path,
    *,
    prompt: Annotated[str, Parameter(name="--prompt")],
    max_tokens: int = 64,
    raw: Annotated[bool, Parameter(negative=())] = False,
    json: AsJson = False,
) -> None:
    """Run a program on the machine: real text, exact cycles.

    Example: tokenworks lpu run smollm2.lpu --prompt "What is a clock?"

    Parameters
    ----------
    prompt
        What to answer.
    max_tokens
        At most so many tokens; it ends by itself where the model ends.
    raw
        Continue the text as it is, without the model's chat format.
    """
    loaded = _open(file)
    verify(loaded.program)
    words = msgspec.msgpack.decode(loaded.tokenizer, type=Vocabulary)
    tokenizer = Tokenizer(words)
    tokens = tokenizer.encode(prompt if raw else chat(words, prompt))
    if not tokens:
        raise UserError("--prompt is empty", "Give it some text.")
    most = loaded.program.parts[0].buckets[-1].tokens
    if len(tokens) + 1 > most:
        loaded.program.bucket(len(tokens))
    machine = Machine(loaded)
    begun = time.perf_counter()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    cycles: list[int] = []
    written, text = 0, ""
    for each in answer(machine, tokens, min(max_tokens, most - len(tokens)), tokenizer.end):
        cycles.append(each.cycles)
        if each.token is None:
            continue
        written += 1
        piece = decoder.decode(tokenizer.bytes_of(each.token))
        text += piece
        if not json:
            OUT.print(piece, end="", markup=False, soft_wrap=True)
    spent = time.perf_counter() - begun
    clock = loaded.program.chip.clock_hz
    # The prompt's last pass gives the first token, a token's the next one or the end.
    read, later = sum(cycles[: len(tokens)]), cycles[len(tokens) :]
    us = sum(cycles) / clock * 1e6
    if json:
        print_json({
            "text": text, "prompt_tokens": len(tokens), "output_tokens": written,
            "prompt_cycles": read, "output_cycles": sum(later), "cycles": sum(cycles),
            "cycles_by_token": later, "chip_us": us, "machine_s": spent,
        })  # fmt: skip
        return
    OUT.print()
    OUT.print(
        f"{sum(cycles):,} cycles: {len(tokens)} tokens read in {read:,},"
        f" {written} written in {sum(later):,}",
        soft_wrap=True,
    )
    rate = len(cycles) / spent
    OUT.print(
        f"on the chip this took {us:,.1f} µs; here {spent:.1f} s ({rate:.1f} tokens/s)",
        soft_wrap=True,
    )


@lpu.command
def explain(file: Path, *, context: int = 1, json: AsJson = False) -> None:
    """Show where the cycles of a token go, and how busy each unit is.

    Example: tokenworks lpu explain smollm2.lpu

    Parameters
    ----------
    context
        The context length whose program is meant.
    """
    made = _open(file).program
    found = timing.timing(made, made.bucket(max(context, 1) - 1))
    if json:
        print_json({**summary(made), "timing": found})
        return
    _show_summary(made)
    table = Table("operator", "cycles", "share", box=None)
    for stage, cycles in sorted(found.stages.items(), key=lambda item: -item[1]):
        table.add_row(stage, f"{cycles:,}", f"{cycles / found.cycles:.1%}")
    OUT.print(table)
    table = Table("unit", "busy", box=None)
    for unit, share in found.busy.items():
        table.add_row(unit, f"{share:.1%}")
    OUT.print(table)


@lpu.command
def trace(
    file: Path, *, out: Out = Path("lpu-trace.html"), context: int = 1, disassemble: bool = False
) -> None:
    """Draw a program's schedule, units against cycles: one HTML file, and JSON for Perfetto.

    Example: tokenworks lpu trace smollm2.lpu --out trace.html

    Parameters
    ----------
    context
        The context length whose program is meant.
    disassemble
        Print the instructions too.
    """
    made = _open(file).program
    bucket = made.bucket(max(context, 1) - 1)
    beside = out.with_suffix(".json")
    write(out, lpu_trace.page(made, bucket).encode(), "--out")
    write(beside, lpu_trace.chrome(made, bucket), "--out")
    OUT.print(f"{out}, {beside}", soft_wrap=True)
    if disassemble:
        for segment in made.parts[0].buckets[bucket].segments:
            OUT.print(f"{segment.name} x{segment.stamps}")
            OUT.print(isa.disassemble(segment.instructions), soft_wrap=True, markup=False)


# What the commands share


def summary(made: Program) -> dict[str, Any]:
    """A program's numbers."""
    return {
        "model": made.model,
        "processor": made.chip.name,
        "chips": len(made.parts),
        "group": made.group,
        "sram_share": timing.sram_share(made),
        "energy_grade": "derived: average power of the chips times the time",
        "buckets": [timing.timing(made, b) for b in range(len(made.parts[0].buckets))],
    }


def _show_summary(made: Program) -> None:
    shared = f", {made.group} to a layer" if made.group > 1 else ""
    OUT.print(
        f"{made.model} on {len(made.parts)} x {made.chip.name}{shared}:"
        f" {timing.sram_share(made):.0%} of the SRAM",
        soft_wrap=True,
    )
    table = Table("context", "instructions", "cycles/token", "time", "tokens/s/user", "J/token",
                  "MXM loads", "VXM", box=None)  # fmt: skip
    for index in range(len(made.parts[0].buckets)):
        t = timing.timing(made, index)
        table.add_row(
            f"{t.bucket_tokens}", f"{t.instructions:,}", f"{t.cycles:,}", show(t.seconds, "s"),
            f"{t.tokens_per_s:,.0f}", f"{t.joules:.3g}", f"{t.busy['MXM loading']:.0%}",
            f"{t.busy['VXM']:.0%}",
        )  # fmt: skip
    OUT.print(table)
    OUT.print("J/token is derived: the chips' average power times the time.")


def _count(chips: str, group: int, chip: Chip, sizes: Sizes, name: str, context: int) -> int:
    if chips == "auto":
        return compiler.chips_needed(chip, sizes, name, context, group)
    if not chips.isascii() or not chips.isdigit() or not int(chips):
        raise UserError(f"--chips {chips} is no number", "Give 1, 2, 4 … or auto.")
    return int(chips)


def _told(what: str, done: int, total: int) -> None:
    if not done:
        ERR.print(f"{what} …")
    del total


def _source(model: str) -> tuple[str, Tensors | Checkpoint, Vocabulary]:
    """What a model is called, its weights and its words."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return (folder.resolve().name, *checkpoint.read(folder))
    path = _model_path(model)
    header = store.read_header(path)
    raw = store.read_bytes(path, "the model", store.MODEL_BYTES)
    name = path.name.removesuffix(".gguf")
    return name, Tensors(header, raw), vocabulary(header, raw, name)


def _model_path(name: str) -> Path:
    if name.endswith(".gguf"):
        return Path(name).expanduser()
    if name not in models() and not Path(name).exists():
        catalogue_model(name)  # tells what there is
    found = catalogue_model(name)
    return with_progress(lambda progress: store.ensure(found, progress))


def _open(file: Path) -> Loaded:
    return program.decode(store.read_bytes(file, "the program", store.MODEL_BYTES), str(file))


__all__ = ["lpu"]
