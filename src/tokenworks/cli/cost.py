"""`tokenworks cost`: what a step takes, and why."""

from pathlib import Path
from typing import Any

from rich.table import Table

from tokenworks.catalog import quantity
from tokenworks.catalog.book import Catalog
from tokenworks.cli.book import (
    AsJson,
    Files,
    Measure,
    Settings,
    open_model,
    opened,
    print_json,
    write,
)
from tokenworks.cli.console import ERR, OUT
from tokenworks.cost import (
    AttentionFfn,
    Batch,
    Drafted,
    PrefillDecode,
    Prepared,
    place,
    prepare,
    validate,
)
from tokenworks.cost.answer import Answer, answer, placed
from tokenworks.cost.joined import attention_part, feed_forward_part
from tokenworks.cost.roofline import Roofline
from tokenworks.cost.static import Static
from tokenworks.errors import UserError
from tokenworks.report import frontier
from tokenworks.units import show


def cost(  # noqa: PLR0913 - one argument a flag
    model: str | None = None,
    processor: str | None = None,
    *,
    devices: int | None = None,
    batch: int = 1,
    context: int = 1024,
    prefill: int = 0,
    tp: int | None = None,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    precision: str | None = None,
    kv: str = "bf16",
    decode_on: str | None = None,
    ffn_on: str | None = None,
    draft_on: str | None = None,
    other_devices: int | None = None,
    draft_model: str = "llama-3.1-8b",
    drafted: int = 3,
    micro_batches: int = 2,
    tariff: str = "default",
    catalog: Files = None,
    set_: Settings = None,
    measure: Measure = False,
    json: AsJson = False,
    chart: Path | None = None,
    validate: bool = False,
) -> None:
    """How long one step of a model takes on a processor, how many joules and dollars, and why.

    Example: tokenworks cost llama-3.1-70b h100 --devices 4 --batch 64 --context 1024

    Parameters
    ----------
    model
        A name of the catalogue, or the path of a config.json or a .gguf file.
    processor
        A name of the catalogue (tokenworks catalog), or cpu: the one at hand, measured once.
    devices
        How many of them; as many as the weights need if left out.
    batch
        Sequences that get a token in this step.
    context
        Tokens each of them has in its cache.
    prefill
        Tokens of a prompt that are read in the same step.
    tp
        Devices that share each layer; all of them if left out.
    pp
        Groups of devices that share the layers.
    dp
        Groups that share the sequences, each with the attention's weights.
    ep
        Devices over which whole experts are spread; 1 cuts experts like other matrices.
    precision
        Of the weights: bf16, fp8, int8, nvfp4, mxfp4, int4. What the model is usually served in
        if left out.
    kv
        Precision of the cache.
    decode_on
        Decode there, after a transfer of the cache; PROCESSOR reads the prompts.
    ffn_on
        Feed-forward layers there (an LPU), attention on PROCESSOR.
    draft_on
        A small model drafts there, PROCESSOR verifies.
    other_devices
        How many of the second processor; as many as are needed if left out.
    draft_model
        The small model.
    drafted
        Tokens drafted at once.
    micro_batches
        Parts of the batch that take turns between attention and feed-forward.
    tariff
        Price of electricity, for processors that are bought (tokenworks catalog default).
    chart
        Write the frontier (tokens/s for each user against tokens/s per device, over the batch) to
        this HTML file.
    validate
        Show how far the model is from what others measured, and end.
    """
    known = opened(catalog, set_, (processor, decode_on, ffn_on, draft_on), measure)
    if validate:
        _validate(known, json)
        return
    if model is None or processor is None:
        raise UserError(
            "cost needs a model and a processor",
            "For example: tokenworks cost llama-3.1-70b h100 --devices 4 --batch 64",
        )
    joined = [name for name in (decode_on, ffn_on, draft_on) if name is not None]
    if len(joined) > 1:
        raise UserError("--decode-on, --ffn-on and --draft-on exclude each other", "Give one.")
    shape = open_model(model)
    own = attention_part(shape) if ffn_on else shape
    cuts: dict[str, Any] = {"tp": tp, "pp": pp, "dp": dp, "ep": ep, "weights": precision, "kv": kv}
    first = prepare(own, place(known, own, processor, devices, **cuts), known)
    prepared: Prepared = first
    asked = Batch.of(batch, context, prefill)
    if joined:
        theirs = (
            feed_forward_part(shape) if ffn_on else open_model(draft_model) if draft_on else shape
        )
        spot = place(known, theirs, joined[0], other_devices, weights=precision, kv=kv)
        second = prepare(theirs, spot, known)
        if decode_on:
            prepared = PrefillDecode(first, second, known)
        elif ffn_on:
            prepared = _split(first, second, known, micro_batches)
        else:
            prepared = Drafted(second, _gpu(first), known, drafted)
        if not ffn_on:
            second.check_room(asked)
    # Each side must hold what it is given: the one that only reads, its prompts.
    first.check_room(Batch((), asked.prefills) if decode_on else asked)
    if chart is not None:
        name = f"{shape.name} on {processor}" + (f" and {joined[0]}" if joined else "")
        used = sum(part.placement.devices for part in placed(prepared))
        html = frontier.page([(name, prepared, used)], context, f"{name}, context {context}")
        write(chart, html.encode(), "--chart")
        ERR.print(f"The chart is in {chart}.", soft_wrap=True)
    _answer(answer(prepared, asked, tariff), first, json)


def _split(
    first: Roofline | Static, second: Roofline | Static, known: Catalog, micro_batches: int
) -> AttentionFfn:
    if not isinstance(second, Static):
        raise UserError("--ffn-on takes an LPU", "For example --ffn-on groq-3-lpu.")
    return AttentionFfn(_gpu(first), second, known, micro_batches)


def _gpu(prepared: Roofline | Static) -> Roofline:
    if isinstance(prepared, Static):
        raise UserError(
            f"{prepared.placement.processor.name} can't be the first of the two here",
            "Give a GPU as PROCESSOR and the LPU as the second.",
        )
    return prepared


def _answer(found: Answer, first: Roofline | Static, json: bool) -> None:
    if json:
        print_json(found)
        return
    p = first.placement
    OUT.print(
        f"{first.shape.name} ({p.weights} weights, {p.kv} cache) on {p.devices} x "
        f"{p.processor.name}"
        + (f", tp {p.tp} pp {p.pp} dp {p.dp} ep {p.ep}" if isinstance(first, Roofline) else "")
    )
    rows = [("step", show(found.time_ns, "ns"))]
    if found.tpot_ns is not None and found.tokens_per_s_per_user is not None:
        rows.append(("time per token", show(found.tpot_ns, "ns")))
        rows.append(("tokens/s/user", show(found.tokens_per_s_per_user)))
    rows += [
        ("tokens/s", show(found.tokens_per_s)),
        ("joules/token", show(found.energy_j_per_token, "J")),
        ("power", show(found.power_w, "W")),
        (
            "$/million tokens",
            "unknown: " + found.unpriced
            if found.usd_per_mtok is None
            else show(found.usd_per_mtok),
        ),
        ("bound", found.bound),
        ("room in cache", f"{found.kv_capacity_tokens:,} tokens"),
    ]
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    OUT.print(table)
    for form in found.timed_from:
        OUT.print(f"Timed by {form}", soft_wrap=True)
    OUT.print("\nWhere the time goes:")
    table = Table.grid(padding=(0, 2))
    for term in found.terms[:8]:
        share = term.time_ns / found.time_ns
        table.add_row("  " + term.name, show(term.time_ns, "ns"), f"{share:.0%}", term.bound)
    OUT.print(table)
    OUT.print("\nFrom these numbers:")
    table = Table.grid(padding=(0, 2))
    for name, number in sorted(found.numbers.items(), reverse=True):
        source = number.source if number.grade != "user" else f"set by {number.source}"
        table.add_row("  " + name, quantity.told(name, number), number.grade, source)
    OUT.print(table)
    OUT.print("\nA number's source and note: tokenworks catalog NAME. Another one: --set NAME=…")


def _validate(known: Catalog, json: bool) -> None:
    rows = validate.checks(known)
    totals = validate.summaries(rows)
    if json:
        print_json({"rows": rows, "summaries": totals})
        return
    table = Table("", "measured", "model", "error", box=None)
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            table.add_row(f"{group} ({row.unit})")
        told = "in range" if row.in_range else f"{row.error:+.1%}"
        table.add_row(f"  {row.what}", f"{row.measured:.4g}", f"{row.predicted:.4g}", told)
    OUT.print(table)
    OUT.print()
    table = Table("errors without sign", "rows", "median", "worst", box=None)
    for total in totals:
        table.add_row(total.group, str(total.rows), f"{total.median:.1%}", f"{total.worst:.1%}")
    OUT.print(table)
