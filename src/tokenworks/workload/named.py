"""Named workloads: generators fitted to public traces, without a row of them."""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from itertools import islice

import msgspec

from tokenworks.catalog.book import unknown
from tokenworks.errors import UserError
from tokenworks.workload.arrivals import Process, times, with_rate
from tokenworks.workload.lengths import Lengths, tokens
from tokenworks.workload.request import Request
from tokenworks.workload.rng import Rng
from tokenworks.workload.sessions import Sessions, conversed


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the numbers come from."""

    title: str
    address: str
    licence: str


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A statistic of the trace, and the same of what is generated in the trace's size (the mean
    over the fit's seeds): how good the fit is.
    """

    trace: float
    generated: float

    @property
    def error(self) -> float:
        """The fit's relative error."""
        return self.generated / self.trace - 1


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When requests come, how long they are, and how they hang together (None: they don't)."""

    arrivals: Process
    lengths: Lengths
    sessions: Sessions | None = None
    name: str = ""
    title: str = ""
    note: str = ""
    source: Source | None = None
    checks: Mapping[str, Check] = {}


@cache
def _table() -> Mapping[str, Workload]:
    raw = (files(__package__) / "data" / "workloads.toml").read_bytes()
    found = msgspec.toml.decode(raw, type=dict[str, Workload])
    return {name: msgspec.structs.replace(each, name=name) for name, each in found.items()}


def names() -> list[str]:
    """The names there are."""
    return sorted(_table())


def named(name: str) -> Workload:
    """The workload called `name`; UserError with the nearest names if there is none."""
    found = _table().get(name.lower())
    if found is None:
        raise unknown("workload", name, names())
    return found


def given(data: bytes, place: str) -> Workload:
    """A workload of the user's own, from a TOML file's bytes: keys as in data/workloads.toml."""
    try:
        found = msgspec.toml.decode(data, type=Workload)
    except msgspec.ValidationError as error:
        told = f"{place}: {str(error).replace('`$.', '`')}"
        raise UserError(told, "docs/twin.md shows a workload.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{place} is no TOML: {error}", "Mend the line it names.") from None
    except UserError as error:
        raise UserError(f"{place}: {error.message}", error.remedy) from None
    return msgspec.structs.replace(found, name=found.name or place)


def generate(
    workload: Workload, rng: Rng, requests: int, rate_per_s: float | None = None
) -> Iterator[Request]:
    """`requests` requests one by one, the first at 0. At another mean rate, bursts and sessions
    last as long as before: it is more users, not faster ones. UserError for a rate or a number
    that gives no requests.
    """
    if requests < 1:
        raise UserError(f"{requests} requests are no workload", "Ask for 1 or more.")
    process = workload.arrivals
    if rate_per_s is not None:
        if not 0 < rate_per_s < 1e9:
            raise UserError(f"a rate of {rate_per_s} requests per second", "Give one above 0.")
        process = with_rate(process, rate_per_s)
    arrivals = islice(_from_zero(times(process, rng)), requests)
    if workload.sessions is not None:
        return conversed(workload.sessions, workload.lengths, arrivals, rng)
    return _alone(workload.lengths, arrivals, rng)


def _from_zero(arrivals: Iterator[int]) -> Iterator[int]:
    start_ns = next(arrivals)
    yield 0
    for arrival_ns in arrivals:
        yield arrival_ns - start_ns


def _alone(lengths: Lengths, arrivals: Iterator[int], rng: Rng) -> Iterator[Request]:
    prompt, output, scores = lengths.prompt, lengths.output, lengths.scores
    for arrival_ns in arrivals:
        score, other = scores(rng)
        yield Request(arrival_ns, tokens(prompt, score), tokens(output, other))
