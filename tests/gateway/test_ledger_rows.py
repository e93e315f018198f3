"""What a row says: the verdict on its promise, its receipt, and sums over many."""

import json
import sqlite3
import time
from collections import defaultdict
from contextlib import AbstractContextManager, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.test_ledger import DAY_NS, NOW_NS, ROWS, opened
from tokenworks.cli.usage import usage as command
from tokenworks.errors import UserError
from tokenworks.gateway.ledger import Row, kept, receipt, table, tpot_ns
from tokenworks.gateway.ledger.usage import moment_ns, usage, usage_in

FULL = Row(
    "r1",
    NOW_NS,
    tenant="acme",
    model="m",
    service_class="realtime",
    replica="gpu-0",
    prompt_tokens=100,
    cached_tokens=64,
    output_tokens=11,
    queue_ns=20_000_000,
    ttft_ns=120_000_000,
    total_ns=620_000_000,
    promise_ttft_ns=150_000_000,
    promise_tpot_ns=60_000_000,
    confidence=0.99,
    promise_read_j=2.0,
    promise_token_j=0.5,
    energy_j=7.25,
    energy_grade="measured",
    usd=0.001,
    moves=1,
    handover_ns=3_000_000,
    handover_bytes=4096,
)


def test_a_receipt_reads_like_openai_then_groq_then_ours() -> None:
    found = receipt(FULL)
    assert list(found)[:8] == [
        *("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"),
        *("queue_time", "prompt_time", "completion_time", "total_time"),
    ]
    told: dict[str, Any] = {
        "prompt_tokens": 100,
        "completion_tokens": 11,
        "total_tokens": 111,
        "prompt_tokens_details": {"cached_tokens": 64},
        "queue_time": 0.02,
        "prompt_time": 0.1,
        "completion_time": 0.5,
        "total_time": 0.6,
        "energy_j": 7.25,
        "energy_grade": "measured",
        "service_tier": "priority",
        "promise": {
            "ttft_s": 0.15,
            "tpot_s": 0.06,
            "e2e_s": 0.75,
            "energy_j": 7.5,
            "confidence": 0.99,
        },
        "actual": {"ttft_s": 0.12, "tpot_s": 0.05, "e2e_s": 0.62},
        "kept": True,
        "moves": 1,
        "handover": {"s": 0.003, "bytes": 4096},
    }
    assert {name: found[name] for name in told} == told
    json.dumps(found)


def test_a_receipt_of_a_refusal_knows_no_times() -> None:
    found = receipt(Row("r", NOW_NS, outcome="rejected", status=429, reason="no_room"))
    for name in ("queue_time", "prompt_time", "completion_time", "promise", "energy_j", "kept"):
        assert found[name] is None
    assert (found["outcome"], found["reason"]) == ("rejected", "no_room")
    assert (found["status"], found["completion_tokens"]) == (429, 0)


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        ({}, None),  # nothing was promised
        ({"ttft_ns": 9}, None),
        ({"promise_ttft_ns": 9, "ttft_ns": 9}, True),
        ({"promise_ttft_ns": 9, "ttft_ns": 10}, False),
        ({"promise_ttft_ns": 9, "ttft_ns": 10, "outcome": "cancelled"}, False),
        ({"promise_ttft_ns": 9, "ttft_ns": 8, "outcome": "cancelled"}, True),
        ({"promise_ttft_ns": 9, "total_ns": 10, "outcome": "cancelled"}, False),  # it had waited
        ({"promise_ttft_ns": 9, "total_ns": 8, "outcome": "cancelled"}, None),
        ({"promise_ttft_ns": 9, "ttft_ns": 8, "outcome": "failed"}, False),
        ({"promise_ttft_ns": 9, "outcome": "rejected"}, None),
        ({"promise_tpot_ns": 5, "ttft_ns": 8, "total_ns": 18, "output_tokens": 3}, True),
        ({"promise_tpot_ns": 4, "ttft_ns": 8, "total_ns": 18, "output_tokens": 3}, False),
        ({"promise_tpot_ns": 4, "ttft_ns": 8, "total_ns": 18, "output_tokens": 1}, None),
        ({"promise_ttft_ns": 7, "promise_tpot_ns": 9, "ttft_ns": 8, "total_ns": 9}, False),
        ({"promise_ttft_ns": 8, "promise_tpot_ns": 9, "ttft_ns": 8, "total_ns": 9}, True),
        # In one piece: all of it counts.
        ({"promise_ttft_ns": 8, "promise_tpot_ns": 2, "total_ns": 12, "output_tokens": 3}, True),
        ({"promise_ttft_ns": 8, "promise_tpot_ns": 2, "total_ns": 13, "output_tokens": 3}, False),
        ({"promise_ttft_ns": 8, "total_ns": 13, "output_tokens": 3}, None),
    ],
)
def test_the_verdict_on_a_promise(facts: dict[str, Any], verdict: bool | None) -> None:
    assert kept(Row("r", NOW_NS, **facts)) is verdict


@given(ROWS)
def test_time_per_token_adds_up(row: Row) -> None:
    each_ns = tpot_ns(row)
    if each_ns >= 0:
        gaps = row.output_tokens - 1
        assert 0 <= row.total_ns - row.ttft_ns - each_ns * gaps < gaps
    else:
        assert row.output_tokens < 2 or row.ttft_ns < 0


@given(
    st.lists(ROWS, max_size=120, unique_by=lambda row: row.id),
    st.lists(st.sampled_from(["key", "tenant", "model", "class", "day"]), max_size=5),
    st.integers(-DAY_NS, 4 * DAY_NS),
    st.integers(0, 3 * DAY_NS),
)
def test_usage_is_the_sum_of_the_rows(
    rows: list[Row], by: list[str], since_ns: int, span_ns: int
) -> None:
    since_ns += NOW_NS
    with memory() as connection:
        table.insert(connection, rows)
        assert sorted(table.rows(connection), key=lambda r: r.id) == sorted(
            rows, key=lambda r: r.id
        )
        found = usage(connection, by, since_ns, since_ns + span_ns)
    told: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if since_ns <= row.unix_ns < since_ns + span_ns:
            told[tuple(named(row, name) for name in dict.fromkeys(by))].append(row)
    if not by and not told:
        told[()] = []
    assert [tuple(group[name] for name in dict.fromkeys(by)) for group in found] == sorted(told)
    for group in found:
        ours = told[tuple(group[name] for name in dict.fromkeys(by))]
        for name in ("finished", "rejected", "cancelled", "failed"):
            assert group[name] == sum(row.outcome == name for row in ours)
        assert group["requests"] == len(ours)
        for name in ("prompt_tokens", "cached_tokens", "output_tokens"):
            assert group[name] == sum(getattr(row, name) for row in ours)
        for name in ("energy_j", "usd"):
            assert group[name] == pytest.approx(sum(getattr(row, name) for row in ours))
        verdicts = [verdict for row in ours if (verdict := kept(row)) is not None]
        assert (group["promised"], group["kept"]) == (len(verdicts), sum(verdicts))


def memory() -> AbstractContextManager[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    table.create(connection)
    return closing(connection)


def named(row: Row, name: str) -> str:
    if name == "day":
        return datetime.fromtimestamp(row.unix_ns // 10**9, UTC).date().isoformat()
    return str(getattr(row, "service_class" if name == "class" else name))


def test_usage_can_be_asked_while_a_gateway_runs_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "state"
    ledger = opened(folder, keep_days=1e6)
    for day in range(3):
        ledger.end(Row(f"a{day}", NOW_NS + day * DAY_NS, key="0" * 12, model="m", output_tokens=7))
    ledger.flush()
    until_s = time.monotonic() + 20
    while not (found := usage_in(folder, ["key"])):
        assert time.monotonic() < until_s
        time.sleep(0.02)
    assert (found[0]["requests"], found[0]["output_tokens"]) == (3, 21)
    ledger.close()
    date = datetime.fromtimestamp((NOW_NS + DAY_NS) // 10**9, UTC).date().isoformat()
    command(folder=folder, by="key, day", since=date, json=True)
    assert [group["requests"] for group in json.loads(capsys.readouterr().out)] == [1, 1]
    command(folder=folder, by="day,class", until=date)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:3] == ["day", "class", "requests"]
    assert len(shown) == 2
    assert "standard" in shown[1]
    command(folder=folder, since="2100-01-01")
    assert capsys.readouterr().out == "Nothing was used in that time.\n"


def test_what_usage_can_not_tell(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no ledger in"):
        command(folder=tmp_path)
    opened(tmp_path).close()
    for flags, told in (
        ({"by": "colour"}, "usage can't be given by 'colour'"),
        ({"since": "yesterday"}, "--since: 'yesterday' is no date"),
        ({"until": "2026-13-01"}, "--until: '2026-13-01' is no date"),
    ):
        with pytest.raises(UserError, match=told) as error:
            command(folder=tmp_path, **flags)  # type: ignore[arg-type]
        assert error.value.remedy


def test_moments() -> None:
    assert moment_ns("1970-01-02") == DAY_NS
    assert moment_ns("1970-01-02T02:00+02:00") == DAY_NS
    assert moment_ns("1970-01-02T00:00:01") == DAY_NS + 10**9
