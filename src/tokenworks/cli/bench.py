"""`tokenworks bench`: traffic on a live endpoint, measured as the twin measures."""

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Any, Final

import msgspec
from cyclopts import Parameter
from msgspec.structs import replace

from tokenworks.assets import store
from tokenworks.cli.book import AsJson, print_json, write
from tokenworks.cli.console import ERR, OUT
from tokenworks.cli.traffic import (
    Requests,
    Smooth,
    Stretch,
    Traffic,
    make,
    offered,
    print_table,
    progress,
    write_run,
)
from tokenworks.errors import UserError
from tokenworks.load import endpoint as endpoints
from tokenworks.load.check import KINDS
from tokenworks.load.run import Load, Result
from tokenworks.load.run import run as run_load
from tokenworks.load.wire import Bounds
from tokenworks.report import text
from tokenworks.report.latency import latencies
from tokenworks.report.run import Run
from tokenworks.sched.config import DEFAULT_CLASSES, ClassRules, Rules
from tokenworks.units import NS_PER_S
from tokenworks.workload import Gamma, Mix, Request, Share, assigned, times

_MORE_S: Final = 60.0  # than the trace is long
_BOTTLENECK: Final = 3  # the exit code of a run whose numbers are the generator's own
_LOST: Final = 4  # of one that lost a part of the generator


class _Asked(msgspec.Struct, frozen=True):
    """What of a fleet's or a scenario's file is a client's business."""

    classes: Mapping[str, ClassRules] = msgspec.field(default_factory=lambda: dict(DEFAULT_CLASSES))
    mix: tuple[Share, ...] = ()


def bench(  # noqa: PLR0913 - one argument a flag
    trace: str,
    *,
    url: str,
    model: str,
    fleet: Path | None = None,
    mix: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    requests: Requests = None,
    rate: float | None = None,
    scale: float = 1.0,
    stretch: Stretch = 1.0,
    smooth: Smooth = False,
    poisson: Annotated[bool, Parameter(negative=())] = False,
    cv: float | None = None,
    concurrency: int | None = None,
    stream: Annotated[bool, Parameter(negative="--whole")] = True,
    max_seconds: float | None = None,
    key_env: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    workers: int = 1,
    out: Path | None = None,
    seed: int = 0,
    json: AsJson = False,
) -> None:
    """Replay traffic on a live OpenAI-compatible endpoint, check each answer, and measure.

    Example: tokenworks bench azure-code --url http://127.0.0.1:8000/v1 --model M --requests 100

    Writes what `tokenworks replay` writes, and checks.json. Ctrl-C ends the run and leaves what is
    done. Where this generator itself was the bottleneck, the exit code is 3; where a process of it
    was lost, 4.

    Parameters
    ----------
    trace
        As for `tokenworks replay`: a file, the name of a workload, or a workload of your own.
    url
        Of the API, up to and with /v1.
    model
        As the endpoint calls it.
    fleet
        A fleet's or scenario's file, for the bounds of its classes and its mix.
    mix
        Who sends how much: --mix realtime=0.3 standard=0.7.
    rate
        So many requests a second, on average.
    scale
        So many times the traffic: more users of the same habits.
    poisson
        At times that know nothing of each other, as many a second as otherwise.
    cv
        Likewise, with gaps of this coefficient of variation: above 1 in clumps.
    concurrency
        So many at a time, each as soon as one before it has ended, whatever their times say.
    stream
        Ask for streams, or for whole answers, which have no first token.
    max_seconds
        End after so long; by default a minute after the last request's time.
    key_env
        The variable that holds the API key; TENANT=VARIABLE for one tenant's.
    workers
        Processes, each with a share of the requests.
    out
        The folder to write into; by default named after the trace and the model.
    seed
        Of all that is drawn at random, the prompts' text too.
    """
    asked = _asked(fleet, mix)
    pace = [name for name, is_set in (("--rate", rate), ("--concurrency", concurrency)) if is_set]
    if scale != 1.0:
        pace.append("--scale")
    if len(pace) > 1:
        raise UserError(f"{' and '.join(pace)} exclude each other", "Give one of them.")
    for name, number in (("--concurrency", concurrency), ("--workers", workers)):
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}", "It must be 1 or more.")
    if max_seconds is not None and not 0 < max_seconds < 1e8:
        raise UserError(f"--max-seconds is {max_seconds:g}", "It must be above 0.")
    traffic = offered(trace, requests, scale, stretch, smooth=smooth, rate=rate)
    if poisson or cv is not None:
        traffic = _redrawn(traffic, 1.0 if cv is None else cv, seed)
    rows = traffic.requests(Random(f"{seed}/traffic"))  # noqa: S311 - a simulation's
    if asked.mix:
        rows = assigned(rows, Mix(asked.mix), Random(f"{seed}/mix"))  # noqa: S311
    load = Load(
        endpoint=endpoints.parse(url),
        model=model,
        requests=list(rows),
        most_s=traffic.span_ns / NS_PER_S + _MORE_S if max_seconds is None else max_seconds,
        keys=_keys(key_env or []),
        bounds={
            name: Bounds(rules.ttft_ns or -1, rules.tpot_ns or -1)
            for name, rules in asked.classes.items()
        },
        is_stream=stream,
        concurrency=concurrency,
        workers=workers,
        seed=seed,
    )
    folder = out or Path(f"{Path(trace).stem}-{model.replace('/', '-')}-live")
    make(folder)
    with progress(1, len(load.requests)) as begin:
        result = run_load(load, begin("Sending", len(load.requests)))
    _tell(folder, load, traffic, result, is_json=json)


def _tell(folder: Path, load: Load, traffic: Traffic, result: Result, *, is_json: bool) -> None:
    """Files, tables, and the end that the command comes to."""
    run = _shown(load, traffic, result)
    checks = {
        "violations": result.violations,
        "generator": _generator(result),
        "lost": result.lost,
        "accepted": result.accepted,
        "notes": run.notes,
    }
    files = [*write_run(folder, run, result.outcomes), "checks.json"]
    write(folder / "checks.json", msgspec.json.format(msgspec.json.encode(checks)), "--out")
    if is_json:
        whole = {"seed": load.seed, "is_whole": result.is_whole, "summary": result.summary}
        print_json({**whole, **checks})
    else:
        print_table(text.rows(result.summary))
        for note in run.notes:
            OUT.print(f"Note: {note}", markup=False)
    ERR.print(f"Written to {folder}: {', '.join(files)}.", soft_wrap=True, markup=False)
    if result.bottleneck:
        told = f"tokenworks: this generator was the bottleneck: {'; '.join(result.bottleneck)}"
        ERR.print(told, soft_wrap=True, markup=False)
    for lost in result.lost:
        ERR.print(f"tokenworks: {lost}", soft_wrap=True, markup=False)
    if result.lost:
        raise SystemExit(_LOST)
    if not result.is_whole:
        raise KeyboardInterrupt
    if result.bottleneck:
        raise SystemExit(_BOTTLENECK)


def _shown(load: Load, traffic: Traffic, result: Result) -> Run:
    """The run as a report tells it."""
    notes = []
    if result.bottleneck:
        notes.append(
            f"This generator was the bottleneck: {'; '.join(result.bottleneck)}. The numbers are "
            "its own, not the endpoint's. Give it --workers, or another machine."
        )
    notes += [
        f"{str(lost).removesuffix('.')}. Its {lost.requests:,} requests are not in here, and the "
        "others were stopped."
        for lost in result.lost
    ]
    if not result.is_whole:
        done = len(result.outcomes)
        notes.append(f"Interrupted: {done:,} of {len(load.requests):,} requests are in here.")
    notes += [
        f"{seen.count:,} times {KINDS[kind]}; request {seen.number}: {seen.example}".rstrip(": ")
        for kind, seen in result.violations.items()
    ]
    if not result.violations:
        notes.append("Each answer was checked whole; none was wrong.")
    made = _generator(result)
    notes.append(
        f"This generator used {made['cpu_share']:.0%} of a core over {result.connections:,} "
        f"connections; requests were sent {made['late_ms_p99']:.2f} ms late (p99)."
    )
    return Run(
        title=f"{traffic.name} on {load.model}, live",
        summary=result.summary,
        scenario=_settings(load, traffic, result),
        seed=load.seed,
        notes=(*notes, *traffic.notes, *result.notes),
        latencies=latencies(result.outcomes),
        variant="live",
    )


def _generator(result: Result) -> dict[str, float]:
    strain = result.strain
    return {
        "is_bottleneck": bool(result.bottleneck),
        "late_ms_p99": strain.late_ns_p99 / 1e6,
        "late_share": strain.late_share,
        "lag_ms_p99": strain.lag_ns_p99 / 1e6,
        "lag_ms_max": strain.lag_ns_max / 1e6,
        "cpu_share": strain.cpu_share,
        "cpu_s": strain.cpu_s,
        "requests": len(result.outcomes),
        "chunks": result.chunks,
        "connections": result.connections,
    }


def _settings(load: Load, traffic: Traffic, result: Result) -> dict[str, Any]:
    """What was run, for the report."""
    pace = f"{traffic.rate_per_s:.3g} requests/s"
    if load.concurrency is not None:
        pace = f"{load.concurrency} at a time"
    return {
        "endpoint": load.endpoint.url,
        "model": load.model,
        "traffic": traffic.name,
        "requests": len(load.requests),
        "pace": pace,
        "stream": load.is_stream,
        "max_seconds": load.most_s,
        "workers": load.workers,
        "bounds": msgspec.to_builtins(load.bounds),
        "accepted": msgspec.to_builtins(result.accepted),
    }


def _asked(fleet: Path | None, mix: list[str] | None) -> _Asked:
    """Classes and mix of a file, the mix of --mix over it."""
    asked = _Asked()
    if fleet is not None:
        try:
            asked = msgspec.toml.decode(store.read_bytes(fleet, "the fleet"), type=_Asked)
            Rules(asked.classes).check()
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            told = f"{fleet}: {str(error).replace('`$.', '`')}"
            raise UserError(told, "Give a fleet's or a scenario's file.") from None
        except UserError as error:
            raise UserError(f"{fleet}: {error.message}", error.remedy) from None
    if not mix:
        return asked
    shares = []
    for each in mix:
        name, _, share = each.partition("=")
        try:
            shares.append(Share(float(share), name))
        except ValueError:
            raise UserError(f"--mix {each!r} is no share", "Write --mix realtime=0.3.") from None
    return replace(asked, mix=tuple(shares))


def _redrawn(traffic: Traffic, cv: float, seed: int) -> Traffic:
    """The same requests at other times, as many a second."""
    if not 0 < cv < 1e3:
        raise UserError(f"--cv is {cv:g}", "It must be above 0.")
    if not traffic.rate_per_s > 0:
        raise UserError(f"{traffic.name} has no rate of its own", "Give --rate.")
    process = Gamma(traffic.rate_per_s, cv)
    chance = Random(f"{seed}/arrivals")  # noqa: S311 - a simulation's
    arrivals = list(islice(times(process, chance), traffic.size))
    first_ns = arrivals[0]

    def requests(rng: Random) -> Iterator[Request]:
        for request, arrival_ns in zip(traffic.requests(rng), arrivals, strict=False):
            yield replace(request, arrival_ns=arrival_ns - first_ns)

    return traffic._replace(span_ns=arrivals[-1] - first_ns, requests=requests)


def _keys(variables: Iterable[str]) -> dict[str, str]:
    """The key of each tenant, and that of all others."""
    keys = {}
    for each in variables:
        tenant, is_one, name = each.rpartition("=")
        key = os.environ.get(name, "").strip()
        if not key:
            told = f"--key-env {each}: the variable {name} is not set"
            raise UserError(told, f"export {name}=…")
        if not key.isascii() or not key.isprintable():
            raise UserError(f"--key-env {each}: what {name} holds is no key", "Set it anew.")
        keys[tenant if is_one else ""] = key
    return keys
