"""The twin of a live fleet: what a recording tells of its replicas, as a scenario; and how far off.

Pools whose engines batch continuously are measured. Others (pipelines, joined processors) are as
the catalogue has them: their times are fixed. What nobody can know from a recording is assumed, and
named in `notes`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import replace

from tokenworks.catalog.book import Catalog
from tokenworks.cost.measured import Constants
from tokenworks.cost.roofline import Roofline
from tokenworks.errors import UserError
from tokenworks.fleet.placed import Wish, prepared
from tokenworks.fleet.sheet import Fleet, Sheet
from tokenworks.model.shape import Shape
from tokenworks.sched.prior import Prior
from tokenworks.twin.replay import replay
from tokenworks.twin.scenario import Learned, Pool, PowerRules, Scenario, check
from tokenworks.twin.spans import Span, fitted
from tokenworks.units import NS_PER_S
from tokenworks.workload import Request
from tokenworks.workload.lines import Recorded

_S_PER_H: Final = 3600
_POINTS: Final = (0.5, 0.9)


class Recording(NamedTuple):
    """A fleet and what became of its requests, in order of arrival."""

    fleet: Fleet
    rows: list[Recorded]


class Known(NamedTuple):
    """A scenario, and of each pool what was learned and what had to be assumed."""

    scenario: Scenario
    notes: tuple[str, ...]


class Error(NamedTuple):
    """One measure, in nanoseconds, as it was and as the twin says."""

    metric: str
    measured_ns: float
    predicted_ns: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted_ns / self.measured_ns - 1 if self.measured_ns else math.nan


class _Header(msgspec.Struct, frozen=True):
    fleet: Fleet


def opened(data: bytes, rows: list[Recorded], place: str, model: str | None) -> Recording:
    """The recording of one model's requests; UserError where there are several, or none is told."""
    try:
        fleet = msgspec.json.decode(data.split(b"\n", 1)[0], type=_Header).fleet
    except msgspec.DecodeError as error:
        told = f"{place}:1 does not tell of the fleet: {error}"
        raise UserError(told, "Record it with `tokenworks up --record FILE`.") from None
    models = sorted({row.model for row in rows if row.output_tokens})
    if model is None and len(models) > 1:
        told = f"{place} has requests for {', '.join(models)}"
        raise UserError(told, "Choose one with --model.")
    if model is not None and model not in models:
        told = f"{place} has no answers of {model!r}"
        raise UserError(told, f"There are: {', '.join(models)}.")
    if not models:
        raise UserError(f"{place} has no answers", "Record a longer run.")
    name = model or models[0]
    kept = tuple(each for each in fleet.replicas if each.model in ("", name))
    return Recording(
        replace(fleet, replicas=kept),
        [row for row in rows if row.model == name and row.output_tokens],
    )


class Twins:
    """Makes scenarios of recordings; what the catalogue and model files have is handed in."""

    def __init__(self, catalog: Catalog, open_model: Callable[[str], Shape]) -> None:
        self._catalog, self._open_model = catalog, open_model

    def known(self, recording: Recording, rows: Sequence[Recorded], title: str) -> Known:
        """The scenario that `rows` of the recording tell."""
        pools: dict[str, list[Sheet]] = {}
        for sheet in recording.fleet.replicas:
            pools.setdefault(sheet.pool, []).append(sheet)
        notes: list[str] = []
        made = [self._pool(name, sheets, rows, notes) for name, sheets in pools.items()]
        rules = recording.fleet.rules
        shapes = [sheet.shape for sheet in recording.fleet.replicas if sheet.shape]
        scenario = Scenario(
            model=shapes[0] if shapes else recording.rows[0].model,
            pools=tuple(made),
            title=title,
            classes=rules.classes,
            policy=rules.policy,
            tenants=rules.tenants,
            power=PowerRules(rules.cap_w),
        )
        return Known(check(scenario), tuple(notes))

    def _pool(
        self, name: str, sheets: list[Sheet], rows: Sequence[Recorded], notes: list[str]
    ) -> Pool:
        first = sheets[0]
        usd_per_h = None if first.usd_per_s is None else first.usd_per_s * _S_PER_H
        wish = first.wish or Wish()
        plain = Pool(
            **{field: getattr(wish, field) for field in wish.__struct_fields__},
            name=name, replicas=len(sheets), role=first.role,
            hand_over=first.can_hand_over, usd_per_h=usd_per_h, prior=first.prior,
        )  # fmt: skip
        if not self._is_batching(first):
            notes.append(f"{name}: as the catalogue has {first.processor}, not fitted")
            return plain
        runs = [[span_of(row) for row in rows if is_at(row, sheet)] for sheet in sheets]
        its_rows = [row for row in rows for sheet in sheets if is_at(row, sheet)]
        limits = replace(
            wish.limits,
            sequences=first.seats,
            step_tokens=max(first.step_tokens, first.seats),
            prefix_cache=any(row.cached_tokens for row in its_rows),
        )
        try:
            constants = fitted(runs, limits)
            notes.append(f"{name}: {len(its_rows):,} answers: {told(constants)}")
        except UserError as error:
            if first.prior is None:
                notes.append(f"{name}: {error.message}: as the catalogue has {first.processor}")
                return plain
            constants = assumed(first.prior)
            notes.append(f"{name}: {error.message}: its times are assumed")
        idle_w, busy_w = self._watts(name, first, runs, its_rows, notes)
        learned = Learned(constants, first.kv_tokens, busy_w, idle_w)
        return replace(plain, limits=limits, measured=learned)

    def _is_batching(self, sheet: Sheet) -> bool:
        """Whether its steps' times depend on who is there, as continuous batching's do."""
        wish = sheet.wish
        if wish is None:
            return True
        if wish.decode_on or wish.ffn_on or wish.draft_on:
            return False
        shape = self._open_model(sheet.shape)
        return isinstance(prepared(wish, shape, self._catalog, self._open_model), Roofline)

    def _watts(
        self, name: str, sheet: Sheet, runs: list[list[Span]], rows: list[Recorded],
        notes: list[str],
    ) -> tuple[float, float]:  # fmt: skip
        """Idle and at work."""
        busy_s = sum(_busy_ns(run) for run in runs) / NS_PER_S
        energy_j = sum(row.energy_j for row in rows)
        fraction = self._catalog.assumed("idle_fraction").value
        if energy_j > 0 and busy_s > 0:
            above_w = energy_j / busy_s
            idle_w = sheet.idle_w or above_w * fraction / (1 - fraction)
            busy_w = idle_w + above_w
        else:
            busy_w = (sheet.prior or Prior()).busy_w
            idle_w = sheet.idle_w or busy_w * fraction
            notes.append(f"{name}: no joules were recorded; {busy_w:g} W at work are assumed")
        if not sheet.idle_w:
            notes.append(f"{name}: {idle_w:.0f} W idle are assumed (idle_fraction)")
        return idle_w, busy_w

    def errors(self, recording: Recording, scenario: Scenario, since: int = 0) -> list[Error]:
        """The whole recording in the twin; its requests from number `since` on, beside what was."""
        rows = recording.rows
        start_ns = rows[0].arrival_ns
        requests = [
            Request(
                row.arrival_ns - start_ns, row.prompt_tokens, row.output_tokens, row.service_class,
                row.tenant, row.prefix, row.prefix_block_tokens,
            )
            for row in rows
        ]  # fmt: skip
        span_ns = requests[-1].arrival_ns
        outcomes = replay(scenario, requests, span_ns, self._catalog, self._open_model).outcomes
        measured: dict[str, list[float]] = {}
        predicted: dict[str, list[float]] = {}
        for outcome in outcomes:
            row = rows[outcome.id]
            if outcome.id < since or not _is_whole(row) or outcome.status != "finished":
                continue
            e2e_ns = outcome.last_ns - outcome.arrival_ns
            pairs = [("TTFT", row.ttft_ns, outcome.ttft_ns), ("E2E", row.total_ns, e2e_ns)]
            if row.output_tokens > 1:
                tpot_ns = (row.total_ns - row.ttft_ns) / (row.output_tokens - 1)
                pairs.append(("TPOT", tpot_ns, outcome.tpot_ns))  # type: ignore[arg-type]
            for metric, was_ns, said_ns in pairs:
                measured.setdefault(metric, []).append(was_ns)
                predicted.setdefault(metric, []).append(said_ns)
        return [
            Error(
                f"{metric} p{round(100 * point)}",
                quantile(measured[metric], point),
                quantile(predicted[metric], point),
            )
            for metric in ("TTFT", "TPOT", "E2E")
            if metric in measured
            for point in _POINTS
        ]


def halves(rows: Sequence[Recorded]) -> tuple[Sequence[Recorded], int]:
    """The first half, and at which number the second begins."""
    half = len(rows) // 2
    return rows[:half], half


def _is_whole(row: Recorded) -> bool:
    return row.outcome == "finished" and row.ttft_ns >= 0 and row.queue_ns >= 0 and not row.moves


def is_at(row: Recorded, sheet: Sheet) -> bool:
    """Whether that replica had the request all the time."""
    return row.replica == sheet.name and row.queue_ns >= 0 and not row.moves


def span_of(row: Recorded) -> Span:
    """A request at its replica. Who asked for a whole answer is taken to write all the time."""
    sent_ns = row.arrival_ns + row.queue_ns
    first_ns = row.arrival_ns + row.ttft_ns if row.ttft_ns >= 0 else sent_ns
    return Span(
        sent_ns, max(first_ns, sent_ns), row.arrival_ns + max(row.total_ns, row.ttft_ns),
        row.prompt_tokens, max(row.prompt_tokens - row.cached_tokens, 1), row.output_tokens,
        _is_whole(row),
    )  # fmt: skip


def _busy_ns(run: Sequence[Span]) -> int:
    """How long somebody was there."""
    busy_ns, until_ns = 0, 0
    for span in sorted(run):
        busy_ns += max(span.last_ns - max(span.sent_ns, until_ns), 0)
        until_ns = max(until_ns, span.last_ns)
    return busy_ns


def assumed(prior: Prior) -> Constants:
    """What is assumed of an engine that did nothing, as constants."""
    each = tuple(prior.step_ns + n * prior.sequence_ns for n in (1, 2))
    return Constants(each, prior.context_ns, prior.step_ns, prior.read_ns_per_token)


def told(constants: Constants) -> str:
    """The constants, for a line of text."""
    decode = constants.decode_ns
    steps = f"{decode[0] / 1e6:.3g} ms for one sequence"
    if len(decode) > 1:
        steps += f" to {decode[-1] / 1e6:.3g} ms for {len(decode)}"
    return (
        f"a step {steps}; {constants.seen_ns:.3g} ns a token attended to; a prompt "
        f"{constants.chunk_ns / 1e6:.3g} ms and {constants.prompt_token_ns / 1e3:.3g} us a token"
    )


def quantile(values: Sequence[float], point: float) -> float:
    """The value that so large a share lies at or below."""
    return sorted(values)[max(math.ceil(point * len(values)) - 1, 0)]
