"""The validation on files that our own engine wrote: no error, and errors where there are some."""

import csv
import importlib.util
import itertools
import json
import math
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from tests.docs.test_docs import ROOT
from tests.twin.stage import BOOK
from tokenworks.catalog.book import Catalog
from tokenworks.cost import place, prepare
from tokenworks.engine.build import build
from tokenworks.engine.work import Limits
from tokenworks.errors import UserError
from tokenworks.model import library
from tokenworks.twin.validate import Served, closed_loop, errors, recorded

NAME = "RTXPRO6000-made"
SLOWER = BOOK.with_set("fit.any.sequence_ns=400000")


def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("served", ROOT / "bench/validate_serving.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = command()
META = {
    "model": "meta-llama/Llama-3.1-8B",
    "vllm_version": "0.19.0",
    "engine_kwargs": {
        "tensor_parallel_size": 1,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 1024,
    },
}


def written(folder: Path, book: Catalog = BOOK) -> Path:
    """A run of our own engine, in the form of vLLM's."""
    chance, at_ns, requests = Random(5), 0, []
    for _ in range(60):
        requests.append(Served(at_ns, chance.randint(20, 2000), chance.randint(2, 200), 0, 0))
        at_ns += round(chance.expovariate(8) * 1e9)
    blank = recorded(json.dumps(META).encode(), lines(requests), "made")
    served = bench.replay(NAME, blank._replace(requests=tuple(requests)), book)
    target = folder / NAME
    target.mkdir()
    (target / "meta.json").write_text(json.dumps(META))
    (target / "requests.jsonl").write_bytes(lines(served))
    return folder


def lines(served: list[Served]) -> bytes:
    """Arrivals by a wall clock, all else by another."""
    rows = [
        {
            "request_id": f"r{index}",
            "input_toks": each.prompt_tokens,
            "output_toks": each.output_tokens,
            "arrival_time": 1.7e9 + each.arrival_ns / 1e9,
            "queued_ts": 4e5 + each.arrival_ns / 1e9 + 0.002 * (index % 3),
            "scheduled_ts": 4e5 + each.arrival_ns / 1e9 + 0.01,
            "first_token_ts": 4e5 + each.first_ns / 1e9,
            "last_token_ts": 4e5 + each.last_ns / 1e9,
        }
        for index, each in enumerate(served)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def test_a_run_of_our_own_is_met_exactly(tmp_path: Path) -> None:
    ((name, run),) = bench.read_runs(written(tmp_path)).items()
    assert run.limits == Limits(sequences=16, step_tokens=1024, async_scheduling=True)
    found = errors(run.requests, bench.replay(name, run, BOOK))
    assert [each.metric for each in found] == ["TTFT", "TPOT", "E2E"]
    for each in found:
        assert max(abs(each.of_mean), abs(each.of_p99), each.each) < 1e-4


def test_other_constants_show_and_calibration_finds_them(tmp_path: Path) -> None:
    ((name, run),) = bench.read_runs(written(tmp_path, SLOWER)).items()
    before = errors(run.requests, bench.replay(name, run, BOOK))
    assert all(each.of_mean < -0.1 and each.each > 0.1 for each in before)
    tuned = bench.calibrate(name, run, BOOK, 30)
    assert tuned.tables["fit"]["any"].need("sequence_ns").value == pytest.approx(4e5, rel=0.05)
    after = errors(run.requests[30:], bench.replay(name, run, tuned)[30:])
    assert all(abs(each.of_mean) < 0.02 for each in after)


def test_the_errors_are_what_they_say() -> None:
    measured = [Served(0, 1, 11, 10, 110), Served(100, 1, 1, 120, 120), Served(0, 1, 5, 30, 70)]
    predicted = [Served(0, 1, 11, 20, 120), Served(100, 1, 1, 110, 110), Served(0, 1, 5, 30, 90)]
    ttft, tpot, e2e = errors(measured, predicted)
    assert (ttft.measured_ns, ttft.predicted_ns, ttft.of_p99) == (20, 20, 0)
    assert ttft.each == pytest.approx((1 + 0.5 + 0) / 3)
    assert tpot.each == pytest.approx((0 + 0.5) / 2)  # an answer of one token has none
    assert e2e.of_p99 == pytest.approx(120 / 110 - 1)


def test_clients_in_a_closed_loop_ask_again_at_once() -> None:
    shape = library.shape("llama-3.1-8b")
    engine = build(prepare(shape, place(BOOK, shape, "h200", 1), BOOK), Limits(sequences=4))
    chance = Random(3)
    lengths = [(chance.randint(1, 3000), chance.randint(1, 60)) for _ in range(50)]
    served = closed_loop(engine, lengths, 6)
    assert [(each.prompt_tokens, each.output_tokens) for each in served] == lengths
    assert [each.arrival_ns for each in served[:6]] == [0] * 6
    ends = sorted(each.last_ns for each in served)
    assert [each.arrival_ns for each in served[6:]] == ends[:44]
    # The time that clients spend waiting is that of the run: Little's law, exactly.
    spent = sum(each.e2e_ns for each in served)
    assert spent == 6 * ends[-7] + sum(end - ends[-7] for end in ends[-6:])


COLUMNS = (
    "silicon_data_source", "backend", "backend_version", "model_path", "system", "mode", "isl",
    "osl", "gemm_quant_mode", "batch_size", "tp_size", "pp_size", "silicon_ttft_ms",
    "silicon_tpot_ms",
)  # fmt: skip
OLDER = "source_file=gap-analysis/x.csv; silicon_concurrency=8"
NEWER = "source_file=2026.csv; silicon_concurrency=4; measured=2025"
ROWS = [
    (OLDER, "vllm", "0.12.0", "Qwen/Qwen3-32B", "h200_sxm", "agg", 1000, 50, "fp8", 8, 2, 1, 1, 1),
    (NEWER, "vllm", "", "meta-llama/Llama-3.1-70B", "h200_sxm", "agg", 1024, 100, "fp8", 4, 4, 1, 1,
     1),
    (OLDER, "sglang", "0.5", "Qwen/Qwen3-32B", "h100_sxm", "agg", 500, 40, "", 8, 4, 1, 1, 1),
    (OLDER, "vllm", "0.12.0", "openai/gpt-oss-120b", "h200_sxm", "agg", 9, 9, "", 8, 1, 1, 1, 1),
    (OLDER, "vllm", "0.12.0", "Qwen/Qwen3-32B", "h200_sxm", "disagg", 9, 9, "", "", 1, 1, 1, 1),
]  # fmt: skip


def table(path: Path, factor: float = 1.0) -> Path:
    """A table whose figures are what the model says, times `factor`."""

    def write(rows: list[dict[str, Any]]) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    rows = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
    write(rows)
    for row, read in zip(rows, bench.read_table(path), strict=False):
        ttft_ms, tpot_ms = bench.predicted_ms(read, BOOK)
        row |= {"silicon_ttft_ms": ttft_ms * factor, "silicon_tpot_ms": tpot_ms * factor}
    write(rows)
    return path


def test_a_table_of_our_own_is_met_exactly(tmp_path: Path) -> None:
    rows = bench.read_table(table(tmp_path / "made.csv"))
    assert [row.is_inferencex for row in rows] == [False, True, False]
    assert [bench.limits_of(row).async_scheduling for row in rows] == [False, True, True]
    found = bench.misses(rows, BOOK)
    assert len(found) == 3
    assert all(math.isclose(each.ttft, 0, abs_tol=1e-9) for each in found)
    assert all(math.isclose(each.tpot, 0, abs_tol=1e-9) for each in found)
    assert all(each.tpot > 0.01 for each in bench.misses(rows, SLOWER))


def test_the_command_prints_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, made = written(tmp_path), table(tmp_path / "made.csv", 0.8)
    arguments = ["validate_serving.py", "--runs", str(runs), "--table", str(made)]
    monkeypatch.setattr("sys.argv", arguments)
    bench.main()
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("  nothing calibrated")]
    assert set(line.split()[2:]) <= {"+0.0%", "-0.0%", "0.0%"}
    (line,) = [line for line in shown.splitlines() if line.startswith("NOT FITTED TO")]
    assert line.split()[3:] == ["2", "+25%", "25.0%", "+25%", "25.0%"]


@pytest.mark.parametrize(
    ("meta", "requests", "told"),
    [
        (b"{", b"", "is no recorded run"),
        (json.dumps(META).encode(), b"", "has no requests"),
        (json.dumps(META).encode(), b'{"input_toks": 1}', "is no recorded run"),
        (json.dumps({**META, "engine_kwargs": {}}).encode(), b"", "max_num_seqs|tensor_parallel"),
        (json.dumps({**META, "vllm_version": "new"}).encode(), b"", "is no recorded run"),
    ],
)
def test_what_is_no_run_is_told(meta: bytes, requests: bytes, told: str) -> None:
    with pytest.raises(UserError, match=told):
        recorded(meta, requests, "there")


def test_more_clients_never_wait_less() -> None:
    row = bench.Row(
        "Qwen3-32B", "h200_sxm", "trtllm", "1", "fp8", 2, 1, 1, 800, 40, False, True, 1.0, 1.0
    )
    found = [bench.predicted_ms(row._replace(clients=n), BOOK) for n in (1, 4, 16, 64)]
    assert all(a < b for (_, a), (_, b) in itertools.pairwise(found))
