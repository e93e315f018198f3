"""Files for other tools hold each outcome as it was."""

import json
from collections import defaultdict
from io import BytesIO
from itertools import pairwise
from typing import Any

import polars as pl
import pytest
from msgspec.structs import asdict, replace

from tokenworks.metrics.outcomes import NONE, Outcome, Outcomes
from tokenworks.report.digits import DASH
from tokenworks.report.files import chrome_trace, parquet
from tokenworks.report.text import rows

from . import made
from .made import MS, S, bare, busy_outcomes, outcomes_of
from .reading import number

# What a hand-made busy run lacks: a move after the first token, a request cut short in the queue
# and one in its prefill, a name with quotes, time zero.
ODD = (
    Outcome(
        900_001, 0, "flex", 'quo"te', "finished", "", "gpu-0", 7, 0, 3,
        dispatched_ns=30 * MS, first_ns=20 * MS, last_ns=60 * MS, moves=1,
    ),
    Outcome(900_002, 5 * MS, "batch", "t", "cancelled", replica="gpu-0", dispatched_ns=9 * MS),
    Outcome(900_003, 5 * MS, "batch", "t", "failed", "gone"),
    Outcome(
        900_004, 7, "flex", "t", "finished", replica="gpu-0", output_tokens=1,
        dispatched_ns=7, first_ns=7, last_ns=7,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return outcomes_of(*busy_outcomes(1500), *ODD)


# ---- Parquet


def test_parquet_holds_every_field_of_every_outcome(outcomes: Outcomes) -> None:
    table = pl.read_parquet(BytesIO(parquet(outcomes)))
    assert table.columns == list(Outcome.__struct_fields__)
    meant = [
        {k: None if k.endswith("_ns") and v == NONE else v for k, v in asdict(one).items()}
        for one in outcomes
    ]
    assert table.to_dicts() == meant
    assert table["first_ns"].null_count() > 0  # there are some to be told apart


def test_parquet_of_nothing_has_the_same_columns(outcomes: Outcomes) -> None:
    empty = pl.read_parquet(BytesIO(parquet(Outcomes())))
    assert empty.is_empty()
    assert dict(empty.schema) == dict(pl.read_parquet(BytesIO(parquet(outcomes))).schema)


# ---- Chrome's trace


def trace(outcomes: Outcomes, **options: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    found = json.loads(chrome_trace(outcomes, **options))
    return found["traceEvents"], found["metadata"]


def ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def test_slices_on_a_thread_never_overlap(outcomes: Outcomes) -> None:
    threads = defaultdict(list)
    for event in trace(outcomes)[0]:
        if event["ph"] == "X":
            from_ns = ns(event["ts"])
            threads[event["pid"], event["tid"]].append((from_ns, from_ns + ns(event["dur"])))
    assert max(map(len, threads.values())) > 100  # slots are used again
    for slices in threads.values():
        assert all(ended <= begun for (_, ended), (begun, _) in pairwise(sorted(slices)))


def test_each_request_has_its_stretches(outcomes: Outcomes) -> None:
    slices: dict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
    marks = {}
    for event in trace(outcomes)[0]:
        if event["ph"] == "X":
            from_ns = ns(event["ts"])
            slices[event["args"]["id"]][event["name"]] = from_ns, from_ns + ns(event["dur"])
        elif event["ph"] == "i":
            marks[event["args"]["id"]] = event["name"]
    for one in outcomes:
        left_ns = one.dispatched_ns
        if one.first_ns != NONE:
            left_ns = min(left_ns, one.first_ns)
        meant = {}
        if left_ns != NONE:
            meant["queue"] = one.arrival_ns, left_ns
        if one.first_ns != NONE:
            meant |= {"prefill": (left_ns, one.first_ns), "decode": (one.first_ns, one.last_ns)}
        assert slices[one.id] == meant, one
        reason = f": {one.reason}" if one.reason else ""
        told = None if one.status == "finished" else f"{one.status}{reason}"
        assert marks.get(one.id) == told


def test_every_event_but_names_has_a_time_even_at_zero(outcomes: Outcomes) -> None:
    """A reader of traces drops events without one."""
    events = trace(outcomes)[0]
    assert all("ts" in event for event in events if event["ph"] != "M")
    assert any(event.get("ts") == 0 for event in events)


def test_processes_and_threads_are_named(outcomes: Outcomes) -> None:
    events, metadata = trace(outcomes)
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    for event in events:
        assert (event["pid"], event["tid"]) in threads or event["name"] == "process_name"
    replicas = {one.replica or "no replica" for one in outcomes}
    assert set(processes.values()) == replicas
    by_id = {one.id: one.replica or "no replica" for one in outcomes}
    assert all(processes[e["pid"]] == by_id[e["args"]["id"]] for e in events if e["ph"] == "X")
    assert metadata == {"requests": len(outcomes), "shown": len(outcomes)}


def test_a_promise_stands_beside_what_was_kept_of_it() -> None:
    one = replace(ODD[0], ttft_promise_ns=20 * MS, tpot_promise_ns=20 * MS - 1, energy_nj=5 * S)
    args = next(event for event in trace(outcomes_of(one))[0] if event["ph"] == "X")["args"]
    assert (args["ttft_s"], args["ttft_promise_s"], args["ttft_kept"]) == (0.02, 0.02, True)
    assert (args["tpot_s"], args["tpot_kept"]) == (0.02, False)
    assert (args["energy_j"], args["moves"], args["tenant"]) == (5.0, 1, 'quo"te')


def test_a_limit_keeps_the_first_to_arrive_and_says_so(outcomes: Outcomes) -> None:
    events, metadata = trace(outcomes, limit=40)
    first = sorted(outcomes, key=lambda one: one.arrival_ns)[:40]
    assert {e["args"]["id"] for e in events if e["ph"] in "Xi"} == {one.id for one in first}
    assert metadata["shown"] == 40
    assert metadata["note"] == f"only the first 40 of {len(outcomes)} requests to arrive"
    assert trace(Outcomes()) == ([], {"requests": 0, "shown": 0})


# ---- Text


def test_rows_of_text_are_the_summary() -> None:
    summary = made.summary(busy_outcomes(500))
    head, *found = rows(summary)
    assert [row[0] for row in found] == ["realtime", "standard", "flex", "batch", "all"]
    by_name = {part.service_class: part for part in (*summary.classes, summary.total)}
    for row in found:
        part, told = by_name[row[0]], dict(zip(head, row, strict=True))
        assert part.ttft_ns is not None
        assert part.tpot_ns is not None
        meant = {
            "requests": part.requests,
            "finished": part.statuses["finished"],
            "refused": part.statuses["rejected"],
            "TTFT p50": part.ttft_ns.p50 / S,
            "TTFT p99": part.ttft_ns.p99 / S,
            "TPOT p50": part.tpot_ns.p50 / S,
            "TPOT p99": part.tpot_ns.p99 / S,
            "attainment": part.attainment,
            "J/token": part.energy_j_per_token,
        }
        assert {name: number(told[name]) for name in meant} == pytest.approx(meant, rel=0.0051)
        assert part.ttft_kept is not None
        assert part.tpot_kept is not None
        kept = [
            kind.kept * kind.promises for kind in (part.ttft_kept, part.tpot_kept)
        ]  # both kinds, each by how many there are
        share = sum(kept) / (part.ttft_kept.promises + part.tpot_kept.promises)
        assert number(told["kept"]) == pytest.approx(share, rel=0.0051)


def test_rows_of_a_single_class_need_no_sum_and_of_nothing_are_dashes() -> None:
    single = bare(outcomes_of(*ODD[1:2]))
    assert [row[0] for row in rows(single.summary)] == ["class", "batch"]
    (_, nothing) = rows(bare(Outcomes()).summary)
    assert nothing == ("all", "0", "0", "0", *[DASH] * 7)
