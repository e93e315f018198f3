"""`tokenworks calibrate`: the twin's model of a fleet, learned from a recording of it at work."""

from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from tokenworks.assets import store
from tokenworks.catalog.book import catalog
from tokenworks.cli.book import AsJson, open_model, print_json, write
from tokenworks.cli.console import ERR, OUT
from tokenworks.twin.live import Error, Twins, halves, opened
from tokenworks.twin.scenario import Scenario
from tokenworks.workload.lines import recorded


def calibrate(
    recording: Path,
    *,
    out: Path | None = None,
    model: str | None = None,
    against: list[Path] | None = None,
    json: AsJson = False,
) -> None:
    """Fit the twin's model of a fleet to a recording of it, and say how far off the twin is.

    The error is that of the second half, predicted by what was learned from the first. What is
    written is learned from all of it.

    Example: tokenworks calibrate recorded.jsonl

    Parameters
    ----------
    recording
        A file that `tokenworks up --record FILE` wrote.
    out
        The scenario to write; by default named after the recording.
    model
        Whose requests, where the fleet has several models.
    against
        More recordings of the same fleet, to be predicted by what was learned from this one.
    """
    data = store.read_bytes(recording, "the recording")
    found = opened(data, recorded(data, str(recording)), str(recording), model)
    twins = Twins(catalog(), open_model)
    title = f"As recorded in {recording.name}"
    first, half = halves(found.rows)
    errors = twins.errors(found, twins.known(found, first, title).scenario, half)
    known = twins.known(found, found.rows, title)
    others = {}
    for path in against or ():
        raw = store.read_bytes(path, "the recording")
        other = opened(raw, recorded(raw, str(path)), str(path), model)
        others[path] = twins.errors(other, known.scenario)
    target = out or recording.with_suffix(".toml")
    write(target, toml(known.scenario, known.notes), "--out")
    if json:
        tables = {str(recording): errors, **{str(path): each for path, each in others.items()}}
        print_json({"notes": known.notes, "errors": {k: _plain(v) for k, v in tables.items()}})
    else:
        for note in known.notes:
            OUT.print(note, markup=False)
        _show(f"The second half ({len(found.rows) - half:,} requests), from the first", errors)
        for path, each in others.items():
            _show(f"{path.name}, from {recording.name}", each)
    ERR.print(f"Written to {target}.", soft_wrap=True, markup=False)


def _plain(errors: list[Error]) -> list[dict[str, Any]]:
    return [{**each._asdict(), "error": each.error} for each in errors]


def _show(title: str, errors: list[Error]) -> None:
    table = Table("", "measured", "predicted", "error", box=None, title=title, title_justify="left")
    for each in errors:
        ms = [f"{value / 1e6:,.4g} ms" for value in (each.measured_ns, each.predicted_ns)]
        table.add_row(each.metric, *ms, f"{each.error:+.1%}")
    OUT.print(table)


def toml(scenario: Scenario, notes: tuple[str, ...]) -> bytes:
    """The scenario as a file, without what is as by default."""
    lines = [f"# {note}" for note in notes]
    changed = _changed(scenario)
    pools = changed.pop("pools")
    lines += [f"{key} = {_value(value)}" for key, value in changed.items()]
    for pool in pools:
        lines += ["", "[[pools]]"]
        lines += [f"{key} = {_value(value)}" for key, value in pool.items()]
    return "\n".join([*lines, ""]).encode()


def _changed(record: msgspec.Struct) -> dict[str, Any]:
    """A record's fields that are not as by default, as plain values."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(record):
        value = getattr(record, field.name)
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if value is not None and (default is msgspec.NODEFAULT or value != default):
            found[field.name] = _plainly(value)
    return found


def _plainly(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return _changed(value)
    if isinstance(value, dict):
        return {key: _plainly(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plainly(each) for each in value]
    return value


def _value(value: Any) -> str:
    """A value in TOML, on one line."""
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return repr(float(f"{value:.6g}"))
    return msgspec.json.encode(value).decode()


def _key(name: str) -> str:
    return name if name.isidentifier() else msgspec.json.encode(name).decode()
