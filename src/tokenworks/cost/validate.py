"""The cost model against what others measured: predictions beside measurements, and the errors."""

from collections.abc import Iterator
from functools import cache
from statistics import median
from typing import Any, NamedTuple

from tokenworks.catalog import packaged
from tokenworks.catalog.book import Catalog
from tokenworks.cost.batch import Batch
from tokenworks.cost.facts import Facts
from tokenworks.cost.placement import place
from tokenworks.cost.prepare import prepare
from tokenworks.cost.roofline import near_ridge
from tokenworks.model import library


class Check(NamedTuple):
    """One measured figure and what the model says; `error` is relative."""

    group: str
    what: str
    unit: str
    measured: float
    predicted: float
    source: str
    in_range: bool = False  # where a range was published: whether the prediction lies in it

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1


class Summary(NamedTuple):
    """The errors of one group, without their signs."""

    group: str
    rows: int
    median: float
    worst: float


@cache
def measured() -> dict[str, list[dict[str, Any]]]:
    """The packaged measurements by kind, a dictionary a row."""
    return {
        kind: [
            {**table, **dict(zip(table["columns"], row, strict=True))}
            for table in tables
            for row in table["rows"]
        ]
        for kind, tables in packaged.table("measured").items()
    }


def checks(book: Catalog) -> list[Check]:
    """Every measured figure with its prediction."""
    served = sorted(serving(book), key=lambda check: check.group)
    return [*served, *_gemms(book), *_attention(book), *_lpus(book)]


def serving(book: Catalog) -> Iterator[Check]:
    """ML.ENERGY: time between tokens and joules per token.

    The sequences running are throughput times time between tokens (Little's law): with a limit of
    2048 there were fewer.
    """
    context = round(book.assumed("mlenergy_context_tokens").value)
    for row in measured()["serving"]:
        shape = library.shape(row["model"])
        placement = place(book, shape, row["processor"], row["devices"], weights=row["weights"])
        running = round(row["tokens_per_s"] * row["itl_ms"] / 1000)
        cost = prepare(shape, placement, book).step(Batch.of(running, context))
        what = f"{row['model']} on {row['devices']} {row['processor']}, batch {row['batch']}"
        itl_ms, joules = cost.time_ps / 1e9, cost.energy_j / running
        yield Check("ITL", what, "ms", row["itl_ms"], itl_ms, row["source"])
        yield Check("J/token", what, "J", row["j_per_token"], joules, row["source"])


def _gemms(book: Catalog) -> Iterator[Check]:
    for row in measured()["gemm"]:
        facts = Facts(book, book.processor(row["processor"]))
        work, size = 2.0 * row["m"] * 8192**2, 2.0 * 8192 * (8192 + 2 * row["m"])
        compute = facts.need("flops.bf16") * facts.fit("compute_fraction")
        memory = facts.need("memory.hbm.bytes_per_s") * facts.fit("weights_fraction")
        seconds = near_ridge(size / memory, work / compute, facts.fit("roofline_exponent"))
        what = f"{row['processor']} [{row['m']}, 8192] x [8192, 8192] bf16"
        yield Check("GEMM", what, "us", row["latency_us"], seconds * 1e6, row["source"])


def _attention(book: Catalog) -> Iterator[Check]:
    for row in measured()["attention"]:
        facts = Facts(book, book.processor(row["processor"]))
        size = row["batch"] * row["context"] * 2 * 8 * 128 * 2
        rate = facts.need("memory.hbm.bytes_per_s") * facts.fit("kv_fraction")
        what = f"{row['processor']} batch {row['batch']}, context {row['context']}"
        yield Check(
            "attention, reading only",
            what,
            "us",
            row["latency_us"],
            size / rate * 1e6,
            row["source"],
        )


def _lpus(book: Catalog) -> Iterator[Check]:
    """Published speeds beside what is foretold, and beside the compiled schedule taken at its word:
    how far the share that published systems reach of it is from all of it.
    """
    alone = book.with_set("assumption.lpu_compiled_fraction=1")
    for group, known in (("LPU tokens/s/user", book), ("LPU, all that is scheduled", alone)):
        for row in measured()["lpu"]:
            shape = library.shape(row["model"])
            spot = place(known, shape, row["processor"], row["devices"], weights=row["weights"])
            cost = prepare(shape, spot, known).step(Batch.of(1, row["context"]))
            speed = 1e12 / cost.time_ps
            lowest, highest = row["lowest"], row["highest"]
            what = f"{row['model']} on {row['devices']} {row['processor']} ({lowest} to {highest})"
            middle = (lowest + highest) / 2
            inside = known is book and lowest <= speed <= highest
            yield Check(group, what, "/s", middle, speed, row["source"], inside)


def summaries(rows: list[Check]) -> list[Summary]:
    """Median and worst error of each group."""
    groups = dict.fromkeys(row.group for row in rows)
    errors = {group: [abs(row.error) for row in rows if row.group == group] for group in groups}
    return [Summary(g, len(found), median(found), max(found)) for g, found in errors.items()]
