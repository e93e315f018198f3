"""Rows on their way from a file into a trace: what every format checks the same way."""

from array import array
from collections.abc import Iterable
from typing import Final

from tokenworks.errors import UserError
from tokenworks.workload.trace import Trace

MOST_TOKENS: Final = 100_000_000
MOST_NS: Final = 1 << 62  # 146 years; stamps count from 1970
_SHOWN: Final = 60


class Rows:
    """The rows read so far of the file `name`, whose columns are called `columns` there.

    `columns` names the time, the prompt's and the output's length, for errors.
    """

    def __init__(self, name: str, kind: str, columns: tuple[str, str, str]) -> None:
        self.name, self.kind, self.columns = name, kind, columns
        self.arrival_ns, self.prompt_tokens, self.output_tokens = array("q"), array("q"), array("q")
        self.prefixes: list[tuple[int, ...]] = []
        self.service_classes: list[str] = []
        self.tenants: list[str] = []
        self.block_tokens = 0
        self.skipped = 0

    def add(self, line: int, arrival_ns: int, prompt_tokens: int, output_tokens: int) -> bool:
        """Keep a row; False for one without output, which is counted and left out.

        Nothing came out of such a request: it failed or was cancelled, nobody knows after how much
        work. UserError for what cannot be.
        """
        if not 0 <= arrival_ns <= MOST_NS:
            remedy = "Times are zero or above, and within 146 years."
            raise self.wrong(line, 0, "negative" if arrival_ns < 0 else "too large", remedy)
        if not 0 <= output_tokens <= MOST_TOKENS:
            raise self._tokens(line, 2, output_tokens)
        if not output_tokens:
            self.skipped += 1
            return False
        if not 1 <= prompt_tokens <= MOST_TOKENS:
            raise self._tokens(line, 1, prompt_tokens)
        self.arrival_ns.append(arrival_ns)
        self.prompt_tokens.append(prompt_tokens)
        self.output_tokens.append(output_tokens)
        return True

    def block(self, line: int, tokens: int) -> None:
        """Note the block size that row `line` gives; UserError if another row gave another."""
        if self.block_tokens and tokens != self.block_tokens:
            raise UserError(
                f"{self.name}:{line}: blocks of {tokens} tokens after some of {self.block_tokens}",
                "A trace has one block size: split the file.",
            )
        self.block_tokens = tokens

    def trace(self) -> Trace:
        """What was read, in order; UserError if it is nothing."""
        if not self.arrival_ns:
            failed = f": all {self.skipped} produced no token" if self.skipped else ""
            raise UserError(f"{self.name} has no request{failed}", "Give a file with requests.")
        return Trace(
            self.arrival_ns,
            self.prompt_tokens,
            self.output_tokens,
            self.name,
            self.kind,
            self.prefixes if self.block_tokens else None,
            self.block_tokens,
            self.service_classes or None,
            self.tenants or None,
            self.skipped,
        ).in_order()

    def wrong(self, line: int, column: int, what: str, remedy: str) -> UserError:
        """The error of a value: what it is and what it should be."""
        return UserError(f"{self.name}:{line}: {self.columns[column]} is {what}", remedy)

    def _tokens(self, line: int, column: int, tokens: int) -> UserError:
        least = 1 if column == 1 else 0
        return self.wrong(line, column, str(tokens), f"Write {least} to {MOST_TOKENS:,} tokens.")


def shown(value: object) -> str:
    """A value from a file, short enough for an error's one line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def listed(names: Iterable[str]) -> str:
    """Names from a file, short enough for an error's one line."""
    text = plain(", ".join(name.strip() or "(nameless)" for name in names))
    return text if len(text) <= 3 * _SHOWN else f"{text[: 3 * _SHOWN]}…"


def plain(text: str) -> str:
    """The text as one line that a terminal can show."""
    return "".join(each if each.isprintable() else "?" for each in text)
