"""`tokenworks catalog`: what exists, each number with its source."""

from rich.table import Table

from tokenworks.catalog import book, quantity, shapes
from tokenworks.catalog.book import Catalog, Record
from tokenworks.cli.book import AsJson, Files, Measure, Settings, opened, print_json
from tokenworks.cli.console import OUT
from tokenworks.model import library
from tokenworks.model.shape import Shape
from tokenworks.units import show, unit_of


def catalog(
    name: str | None = None,
    *,
    catalog: Files = None,
    set_: Settings = None,
    measure: Measure = False,
    json: AsJson = False,
) -> None:
    """Show the processors there are; or one record, each number with its source and grade.

    Example: tokenworks catalog h100

    Parameters
    ----------
    name
        A processor, a model, a tariff or an assumption; cpu is the processor at hand, measured
        the first time. All processors and models if left out.
    """
    known = opened(catalog, set_, (name,), measure)
    if name is None:
        _list(known, json)
        return
    found = [book.named(records, name) for records in known.tables.values()]
    records = [record for record in found if record is not None]
    shape = book.named(shapes.shapes(), name)
    if records:
        _records(known, records, json)
    elif shape is not None:
        _shape(shape, json)
    else:
        everything = [*known.tables["processor"], *known.tables["assumption"], *shapes.shapes()]
        raise book.unknown("record of the catalogue called", name, everything)


def _list(known: Catalog, json: bool) -> None:
    if json:
        print_json({"processors": known.tables["processor"], "models": shapes.shapes()})
        return
    table = Table("processor", "year", "kind", box=None)
    for header in ("16-bit Tflop/s", "8-bit", "GB", "TB/s", "W"):
        table.add_column(header, justify="right")
    for record in known.tables["processor"].values():
        tier = record.names("memory")[0] if record.names("memory") else "hbm"
        table.add_row(
            record.name,
            str(record.year or ""),
            record.kind,
            _first(record, 1e12, "flops.bf16", "flops.fp16"),
            _first(record, 1e12, "flops.fp8", "flops.int8"),
            _first(record, 1e9, f"memory.{tier}.bytes"),
            _first(record, 1e12, f"memory.{tier}.bytes_per_s"),
            _first(record, 1, "tdp_w"),
        )
    OUT.print(table)
    table = Table("model", "parameters", "active", "KV per token", "served", box=None)
    for shape in map(library.shape, shapes.shapes()):
        active = shape.active_parameters
        table.add_row(
            shape.name,
            f"{shape.parameters / 1e9:,.1f} B",
            "" if active == shape.parameters else f"{active / 1e9:,.1f} B",
            show(shape.kv_bytes_per_token(), "B"),
            shape.served,
        )
    OUT.print()
    OUT.print(table)
    OUT.print("\nOne record with its sources: tokenworks catalog NAME")


def _first(record: Record, scale: float, *paths: str) -> str:
    found = next((number for path in paths if (number := record.get(path)) is not None), None)
    return "-" if found is None else f"{found.value / scale:,.4g}"


def _records(known: Catalog, records: list[Record], json: bool) -> None:
    """One thing's record, and what was fitted for it."""
    if json:
        print_json({record.table: record for record in records})
        return
    for record in records:
        OUT.print(f"{record.table}.{record.name}" + (f": {record.title}" if record.title else ""))
        if record.moves:
            OUT.print(f"moves {record.moves}")
        if record.note:
            OUT.print(record.note)
        table = Table("number", "value", "grade", "source", "note", box=None)
        for path, number in record.numbers.items():
            table.add_row(path, quantity.told(path, number), *_origin(known, number))
            for other in number.others:
                told = show(other.value, unit_of(path))
                table.add_row("  or", told, *_origin(known, other))
        OUT.print(table)
        OUT.print()


def _origin(known: Catalog, number: quantity.Quantity | quantity.Other) -> tuple[str, str, str]:
    source = known.sources.get(number.source)
    where = f"{source.title}, {source.address}" if source else number.source
    return number.grade, where, number.note


def _shape(record: shapes.ShapeRecord, json: bool) -> None:
    if json:
        print_json(record)
        return
    shape = library.shape(record.name)
    OUT.print(f"{record.name}: {record.title} ({record.vendor})")
    rows = {
        "parameters": f"{shape.parameters:,} (published: {record.parameters:,})",
        "active": f"{shape.active_parameters:,}",
        "layers": ", ".join(_group(shape)),
        "weights": ", ".join(
            f"{p} {show(shape.weight_bytes(p), 'B')}" for p in dict.fromkeys((shape.served, "bf16"))
        ),
        "KV cache": f"{show(shape.kv_bytes_per_token(), 'B')} per token in bf16",
        "source": f"{record.source} ({record.grade})",
        "note": record.note,
    }
    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    OUT.print(table)


def _group(shape: Shape) -> list[str]:
    told = []
    for group in shape.groups:
        attention, experts = group.layer.attention, group.layer.experts
        kind = "latent" if attention.latent_dim else f"{attention.heads}/{attention.kv_heads} heads"
        window = f", window {attention.window}" if attention.window else ""
        mixture = f", {experts.active} of {experts.count} experts" if experts else ""
        told.append(f"{group.count} x ({kind}{window}{mixture})")
    return told
