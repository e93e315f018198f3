"""The catalogue as one object: processors, tariffs, assumptions and fits, with a user's own on top.

Nothing here is read from disk but the packaged tables; a user's table comes as bytes.
"""

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final, Protocol, TypeVar

import msgspec

from tokenworks.catalog import packaged
from tokenworks.catalog.quantity import Quantity, check, flatten
from tokenworks.errors import UserError

_TEXTS: Final = ("title", "vendor", "kind", "note", "moves")
# Numbers a processor's record may have; `*` stands for a name (of a precision, a tier, a link).
_FIELDS: Final = frozenset(
    {
        *("flops.*", "memory.*.bytes", "memory.*.bytes_per_s"),
        *("link.*.bytes_per_s", "link.*.devices", "link.*.latency_ns"),
        *("units.*", "clock_hz", "tdp_w", "idle_w", "average_w", "max_w"),
        *("price_usd", "price_usd_per_h"),
    }
)

# What is fitted for single processors only; elsewhere shares of TDP stand in.
_OWN_FITS: Final = ("active_w", "j_per_flop", "j_per_byte")


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where numbers come from."""

    title: str
    address: str


class Record(msgspec.Struct, frozen=True):
    """One thing of the catalogue: its words, and its numbers by dotted path."""

    name: str
    table: str  # "processor", "tariff", "assumption" or "fit"
    title: str = ""
    vendor: str = ""
    kind: str = ""
    note: str = ""
    moves: str = ""  # of an assumption: which answers depend on it
    year: int = 0
    aliases: tuple[str, ...] = ()
    numbers: Mapping[str, Quantity] = {}

    def get(self, path: str) -> Quantity | None:
        """The number called `path`, if it is known."""
        return self.numbers.get(path)

    def need(self, path: str) -> Quantity:
        """The number called `path`; UserError that says how to give it if nobody published it."""
        found = self.numbers.get(path)
        if found is None:
            raise UserError(
                f"{self.table}.{self.name}.{path} is not in the catalogue: no source was found",
                f"Give it: --set {self.table}.{self.name}.{path}=NUMBER",
            )
        return found

    def names(self, group: str) -> tuple[str, ...]:
        """The names under `group` in the record's order: memory tiers, links, precisions."""
        found = (path.split(".")[1] for path in self.numbers if path.startswith(f"{group}."))
        return tuple(dict.fromkeys(found))


class Catalog(msgspec.Struct, frozen=True):
    """All records by table and name. Made by `catalog()`, changed by `with_user` and `with_set`."""

    tables: Mapping[str, Mapping[str, Record]]
    sources: Mapping[str, Source]

    def processor(self, name: str) -> Record:
        """The processor called `name` or by an alias; UserError with suggestions if none is."""
        return self._find("processor", name)

    def tariff(self, name: str) -> Record:
        """The tariff called `name`."""
        return self._find("tariff", name)

    def assumed(self, name: str) -> Quantity:
        """The assumption called `name`."""
        return self._find("assumption", name).need("value")

    def fit(self, processor: Record, path: str) -> Quantity:
        """The fitted number `path` of a processor; its kind's where none was fitted for itself."""
        fits = self.tables["fit"]
        for name in (processor.name, processor.kind, "any"):
            found = fits[name].get(path) if name in fits else None
            if found is not None:
                return found
        raise UserError(
            f"no {path!r} is fitted for {processor.name} nor for a {processor.kind or 'processor'}",
            f"Give it: --set fit.{processor.name}.{path}=NUMBER",
        )

    def _find(self, table: str, name: str) -> Record:
        records = self.tables[table]
        found = named(records, name)
        if found is None:
            raise unknown(table, name, records)
        return found

    def with_user(self, raw: bytes, where: str) -> "Catalog":
        """This catalogue with the tables of a user's TOML over it; UserError names the place."""
        try:
            document = msgspec.toml.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{where} is not valid TOML: {error}", "Mend that line.") from None
        if not isinstance(document, dict):  # pragma: no cover - TOML has no other documents
            raise UserError(f"{where} has no tables", "")
        changed = self
        for table, records in document.items():
            if table not in self.tables:
                raise unknown("table", table, self.tables, f"{where}: ")
            if not isinstance(records, dict):
                raise UserError(f"{where}: {table} is no table", f"Write [{table}.NAME].")
            for name, fields in records.items():
                if not isinstance(fields, dict):
                    place = f"{where}: {table}.{name}"
                    raise UserError(f"{place} is no table", f"Write [{table}.{name}].")
                changed = changed._with(table, name, fields, where)
        return changed

    def with_set(self, assignment: str) -> "Catalog":
        """This catalogue with one number changed: "processor.h100.tdp_w=650"."""
        path, equals, text = assignment.partition("=")
        place = f"--set {assignment}"
        try:
            value = float(text)
        except ValueError:
            value = None
        table, _, rest = path.strip().partition(".")
        if not equals or value is None or not rest:
            raise UserError(f"{place} is no setting", "Write --set TABLE.NAME.FIELD=NUMBER.")
        if table not in self.tables:
            raise unknown("table", table, self.tables, f"{place}: ")
        check(f"--set {path}", value)
        if table == "assumption":
            return self._with(table, rest, {"value": value}, "--set", must_exist=True)
        name, _, field = rest.partition(".")
        return self._with(table, name, {field: value}, "--set", must_exist=True)

    def _with(
        self,
        table: str,
        name: str,
        fields: Mapping[str, Any],
        where: str,
        *,
        must_exist: bool = False,
    ) -> "Catalog":
        records = self.tables[table]
        name = name.lower()
        known = named(records, name)
        if known is None and table == "fit" and name in self.tables["processor"]:
            known = Record(name, "fit")  # what is fitted for all, for this one
        if known is None and (must_exist or table in ("assumption", "fit")):
            raise unknown(table, name, records, f"{where}: ")
        record = _record(table, known.name if known else name, fields, where)
        if known is not None:
            if table in ("assumption", "tariff", "fit"):
                there = {*known.numbers}
                if table == "fit":
                    there |= {*records["any"].numbers, *_OWN_FITS}
                for path in record.numbers:
                    if path not in there:
                        raise unknown(f"number of {table}.{known.name}", path, there)
            words = {key: fields[key] for key in (*_TEXTS, "year", "aliases") if key in fields}
            numbers = {**known.numbers, **record.numbers}
            record = msgspec.structs.replace(known, numbers=numbers, **words)
        tables = {**self.tables, table: {**records, record.name: record}}
        return msgspec.structs.replace(self, tables=tables)


class _Named(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...


_Any = TypeVar("_Any", bound=_Named)


def named(records: Mapping[str, _Any], name: str) -> _Any | None:
    """The record called `name` or by an alias, in any case; None if there is none."""
    wanted = name.lower()
    found = (each for each in records.values() if wanted in (each.name, *each.aliases))
    return next(found, None)


def unknown(what: str, name: str, names: Iterable[str], where: str = "") -> UserError:
    """The error of a name that isn't there, with the nearest ones that are."""
    there = sorted(names)
    near = difflib.get_close_matches(name.lower(), there, n=3, cutoff=0.5)
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"There is: {', '.join(there)}."
    return UserError(f"{where}there is no {what} {name!r}", remedy)


def _record(table: str, name: str, fields: Mapping[str, Any], given_by: str = "") -> Record:
    place = f"{given_by}: {table}.{name}" if given_by else f"{table}.{name}"
    words = {key: fields[key] for key in _TEXTS if key in fields}
    for key, text in words.items():
        if not isinstance(text, str):
            raise UserError(f"{place}.{key} is {text!r}", "It must be a text.")
    year, aliases = fields.get("year", 0), fields.get("aliases", ())
    is_list = isinstance(aliases, list | tuple)
    if not isinstance(year, int) or not is_list or not all(isinstance(a, str) for a in aliases):
        raise UserError(f"{place}: year must be a number, aliases a list of texts", "Mend that.")
    rest = {k: v for k, v in fields.items() if k not in (*_TEXTS, "year", "aliases")}
    numbers = flatten(rest, place, given_by)
    if table == "processor":
        for path in numbers:
            if not _is_field(path):
                raise unknown(f"field of {place}:", path, _FIELDS)
    return Record(name, table, year=year, aliases=tuple(aliases), numbers=numbers, **words)


def _is_field(path: str) -> bool:
    parts = path.split(".")
    starred = [parts[0], "*", *parts[2:]] if len(parts) > 1 else parts
    return ".".join(starred) in _FIELDS


@cache
def catalog() -> Catalog:
    """The packaged catalogue."""
    raw = {
        "processor": packaged.table("processors"),
        "tariff": packaged.table("tariffs"),
        "assumption": packaged.table("assumptions"),
        "fit": packaged.table("fits"),
    }
    tables = {
        table: {name: _record(table, name, fields) for name, fields in records.items()}
        for table, records in raw.items()
    }
    sources = msgspec.convert(packaged.table("sources"), dict[str, Source])
    return Catalog(tables, sources)
