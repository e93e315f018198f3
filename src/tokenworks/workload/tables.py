"""Traces as CSV: Azure's LLM inference traces of 2023 and 2024, and BurstGPT's."""

import csv
import math
from array import array
from collections.abc import Callable, Sequence
from itertools import compress, islice
from typing import Final

import msgspec

from tokenworks.errors import UserError
from tokenworks.workload.rows import MOST_NS, MOST_TOKENS, Rows, listed, plain, shown
from tokenworks.workload.stamps import Stamps, seconds_ns
from tokenworks.workload.trace import Trace

_CHUNK_ROWS: Final = 4096


class Table(msgspec.Struct, frozen=True):
    """A CSV format: its columns for the time, the prompt and the output, and how time is told."""

    name: str
    columns: tuple[str, str, str]
    stamps: bool


TABLES: Final = (
    Table("azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), stamps=True),
    Table("burstgpt", ("Timestamp", "Request tokens", "Response tokens"), stamps=False),
)


def read_table(text: str, name: str) -> Trace:
    """The trace in `text`; UserError that names the line if it is none."""
    lines = csv.reader(text.split("\n"), strict=True)
    try:
        header = next((row for row in lines if any(row)), [])
        table, places = _known(header, f"{name}:{lines.line_num}")
        reading = _Reading(Rows(name, table.name, table.columns), table, places, len(header))
        line = lines.line_num + 1
        while chunk := list(islice(lines, _CHUNK_ROWS)):
            reading.add_all(line, chunk)
            line = lines.line_num + 1
    except csv.Error as error:
        place = f"{name}:{lines.line_num}"
        raise UserError(f"{place}: {plain(str(error))}", "Mend that line.") from None
    return reading.rows.trace()


def _known(header: Sequence[str], place: str) -> tuple[Table, list[int]]:
    """The format with these columns, and where its three are."""
    found = [column.strip().lower() for column in header]

    def missing(table: Table) -> list[str]:
        return [column for column in table.columns if column.lower() not in found]

    # Both have a time stamp: its spelling says nothing.
    table = min(TABLES, key=lambda each: len(missing(each)))
    lacks = missing(table)
    if len(lacks) >= 2:
        raise UserError(
            f"{place}: no known trace has the columns {listed(header)}",
            "Known are Azure's (TIMESTAMP, ContextTokens, GeneratedTokens), BurstGPT's (Timestamp, "
            "Request tokens, Response tokens), and JSON lines: Mooncake's, Dynamo's, our own.",
        )
    if lacks:
        there = f"{place}: {lacks[0]} is missing among the columns {listed(header)}"
        raise UserError(there, f"A trace of {table.name} needs it.")
    return table, [found.index(column.lower()) for column in table.columns]


class _Reading:
    """Rows of text on their way into numbers."""

    def __init__(self, rows: Rows, table: Table, places: Sequence[int], width: int) -> None:
        self.rows, self.table, self.width = rows, table, width
        self.when, self.prompt, self.output = places
        self.time: Callable[[str], int] = Stamps().ns if table.stamps else seconds_ns

    def add_all(self, line: int, chunk: Sequence[Sequence[str]]) -> None:
        """Keep rows from `line` on: by columns, which is much faster than one by one, if all are
        as rows should be. One by one says what is wrong.
        """
        try:
            columns = list(zip(*chunk, strict=True))
            texts = columns[self.prompt], columns[self.output]
            arrival_ns = array("q", map(self.time, columns[self.when]))
            prompts, outputs = (array("q", map(int, each)) for each in texts)
        except (ValueError, IndexError, OverflowError):
            return self._add_each(line, chunk)
        whole = all(all(map(str.isdecimal, each)) for each in texts)
        if not (whole and len(columns) == self.width and min(arrival_ns) >= 0):
            return self._add_each(line, chunk)
        failed = outputs.count(0)
        if failed:
            arrival_ns, prompts = (array("q", compress(e, outputs)) for e in (arrival_ns, prompts))
            outputs = array("q", filter(None, outputs))
        most = max(max(prompts, default=1), max(outputs, default=1))
        fits = most <= MOST_TOKENS and max(arrival_ns, default=0) <= MOST_NS
        if not fits or not min(prompts, default=1):
            return self._add_each(line, chunk)
        rows = self.rows
        rows.skipped += failed
        rows.arrival_ns.extend(arrival_ns)
        rows.prompt_tokens.extend(prompts)
        rows.output_tokens.extend(outputs)
        return None

    def _add_each(self, line: int, chunk: Sequence[Sequence[str]]) -> None:
        for at, row in enumerate(chunk, line):
            self.add(at, row)

    def add(self, line: int, row: Sequence[str]) -> None:
        """Keep a row; UserError for one that isn't this table's. A blank line is none."""
        if len(row) != self.width:
            if any(row):
                raise self._odd(line, row)
            return
        when, prompt, output = row[self.when], row[self.prompt], row[self.output]
        try:
            arrival = self.time(when)
        except (ValueError, IndexError):
            raise self._no_time(line, row) from None
        self.rows.add(line, arrival, self._tokens(line, 1, prompt), self._tokens(line, 2, output))

    def _tokens(self, line: int, column: int, text: str) -> int:
        if text.isdecimal() and len(text) < 20:
            return int(text)
        try:
            number = float(text.strip().replace("_", "?"))
            if not math.isfinite(number) or number != int(number):
                raise ValueError(text)
        except ValueError:
            remedy = "Write a whole number of tokens."
            raise self.rows.wrong(line, column, shown(text), remedy) from None
        return int(number)

    def _no_time(self, line: int, row: Sequence[str]) -> UserError:
        if row[self.when].strip().lower() == self.table.columns[0].lower():
            return UserError(
                f"{self.rows.name}:{line}: a second header among the rows",
                "Several files in one? Give them one by one.",
            )
        remedy = (
            "Write it like 2023-11-16 18:15:46.6805900."
            if self.table.stamps
            else "Write seconds as a number."
        )
        return self.rows.wrong(line, 0, shown(row[self.when]), remedy)

    def _odd(self, line: int, row: Sequence[str]) -> UserError:
        place = f"{self.rows.name}:{line}"
        if row[0].lstrip().startswith("{"):
            return UserError(f"{place}: JSON among CSV rows", "Split the file by format.")
        count = f"{len(row)} field{'s' * (len(row) != 1)} where the header has {self.width}"
        return UserError(f"{place}: {count}", "Mend that line; was the file cut off?")
