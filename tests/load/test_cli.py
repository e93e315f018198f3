"""`tokenworks bench` as a command: what it writes, how it ends, and one line for each mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import psutil
import pytest

from tests.load.server import Server
from tests.support import MODEL, Running, run, wait_for
from tokenworks.workload import Request, Trace, write

FLEET = """
model = "llama-3.1-8b"
mix = [{ share = 0.5, service_class = "realtime" }, { share = 0.5, service_class = "flex" }]
[classes.realtime]
ttft_ms = 60000
tpot_ms = 60000
[classes.flex]
[[pools]]
processor = "h100"
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Sixty requests, five milliseconds apart."""
    file = tmp_path / "trace.jsonl"
    rows = [Request(n * 5_000_000, 40 + n, 4 + n % 5) for n in range(60)]
    file.write_bytes(write(Trace.of(rows)))
    return file


def test_a_report_as_the_twins(server: Server, trace: Path, tmp_path: Path) -> None:
    fleet, out = tmp_path / "fleet.toml", tmp_path / "out"
    fleet.write_text(FLEET)
    command = ("bench", str(trace), "--url", server.url, "--model", "good", "--fleet", str(fleet))
    done = run(*command, "--out", str(out), "--json", "--rate", "100", "--cv", "2")
    assert done.returncode in (0, 3), done.stderr  # 3: this machine was too busy to keep up
    told = json.loads(done.stdout)
    assert (done.returncode == 3) is told["generator"]["is_bottleneck"]
    total = told["summary"]["total"]
    assert total["requests"] == total["statuses"]["finished"] == 60
    classes = {part["service_class"]: part for part in told["summary"]["classes"]}
    assert set(classes) == {"realtime", "flex"}
    assert classes["realtime"]["ttft_bound_ns"] == 60_000_000_000
    assert told["accepted"]["tiers"] == {"realtime": "priority", "flex": "flex"}
    assert json.loads((out / "summary.json").read_text()) == told["summary"]
    assert json.loads((out / "checks.json").read_text())["violations"] == {}
    table = pl.read_parquet(out / "outcomes.parquet")
    assert len(table) == 60
    assert table["arrival_ns"].n_unique() == 60
    assert json.loads((out / "trace.json").read_text())["metadata"]["shown"] == 60
    page = (out / "report.html").read_text()
    assert "none was wrong" in page
    assert "0 replicas" not in page


def test_violations_stand_in_the_answer(server: Server, trace: Path, tmp_path: Path) -> None:
    command = (
        "bench",
        str(trace),
        "--url",
        server.url,
        "--model",
        "wrong_usage",
        "--requests",
        "5",
    )
    done = run(*command, "--out", str(tmp_path / "out"))
    assert "5 times a usage that doesn't add up" in done.stdout
    assert "none was wrong" not in done.stdout


def started(*command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tokenworks", "bench", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_leaves_what_is_done(server: Server, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    server.plays.clear()
    process = started(
        str(trace), "--url", server.url, "--model", "good", "--stretch", "100", "--out", str(out)
    )
    wait_for(lambda: len(server.plays) >= 2)
    process.send_signal(signal.SIGINT)
    told, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Interrupted" in told
    assert "Traceback" not in error
    assert 2 <= len(pl.read_parquet(out / "outcomes.parquet")) < 60


def test_what_was_under_way_is_cancelled(server: Server, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    server.plays.clear()
    process = started(
        str(trace), "--url", server.url, "--model", "hangs", "--concurrency", "4", "--out", str(out)
    )
    wait_for(lambda: len(server.plays) == 4)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    table = pl.read_parquet(out / "outcomes.parquet")
    assert table["status"].to_list() == ["cancelled"] * 4
    assert set(table["reason"]) == {"interrupted"}


def test_a_generator_that_could_not_keep_up_says_so(
    server: Server, trace: Path, tmp_path: Path
) -> None:
    """Its process is stopped for a while: requests are late, and the exit says who was it."""
    server.plays.clear()
    out = tmp_path / "out"
    process = started(
        str(trace), "--url", server.url, "--model", "good", "--stretch", "10", "--out", str(out)
    )
    wait_for(lambda: len(server.plays) >= 2)
    (worker,) = psutil.Process(process.pid).children()
    worker.suspend()
    time.sleep(0.5)  # ten requests' time
    worker.resume()
    told, error = process.communicate(timeout=60)
    assert process.returncode == 3, error
    assert "This generator was the bottleneck" in told
    assert "sent more than 10 ms late" in error
    assert json.loads((out / "checks.json").read_text())["generator"]["is_bottleneck"]
    # Measured from when they should have been sent: the wait is in the first tokens.
    late = pl.read_parquet(out / "outcomes.parquet")
    assert max((late["first_ns"] - late["arrival_ns"]).to_list()) > 100_000_000


def test_a_lost_process_is_told_and_what_others_measured_is_kept(
    server: Server, trace: Path, tmp_path: Path
) -> None:
    server.plays.clear()
    out = tmp_path / "out"
    process = started(
        str(trace), "--url", server.url, "--model", "good", "--stretch", "100", "--out", str(out),
        "--workers", "3",
    )  # fmt: skip
    wait_for(lambda: len(server.plays) >= 4)
    workers = sorted(psutil.Process(process.pid).children(), key=lambda each: each.pid)
    workers[1].kill()
    told, error = process.communicate(timeout=60)
    assert process.returncode == 4, error
    assert error.count("Process 2 of the generator was lost: signal 9, Killed") == 1
    assert "Traceback" not in error
    assert "Its 20 requests are not in here" in " ".join(told.split())
    (lost,) = json.loads((out / "checks.json").read_text())["lost"]
    assert (lost["number"], lost["requests"], lost["said"]) == (2, 20, "")
    kept = pl.read_parquet(out / "outcomes.parquet")["id"].to_list()
    assert {0, 2, 3} - set(kept) == set()  # the first of the others
    assert all(number % 3 != 1 for number in kept)


def test_no_process_stays_behind(server: Server, trace: Path, tmp_path: Path) -> None:
    server.plays.clear()
    process = started(
        str(trace), "--url", server.url, "--model", "hangs", "--concurrency", "2", "--out",
        str(tmp_path / "out"), "--workers", "2",
    )  # fmt: skip
    wait_for(lambda: len(server.plays) == 2)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not any(worker.is_running() for worker in workers))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rate", "0"], "--rate is 0"),
        (["--rate", "3", "--concurrency", "4"], "exclude each other"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--workers", "0"], "--workers is 0"),
        (["--cv", "-1"], "--cv is -1"),
        (["--mix", "realtime"], "--mix 'realtime'"),
        (["--mix", "realtime=0.5"], "sum to 0.5"),
        (["--mix", "fast=1"], "fast"),
        (["--key-env", "NOT_SET_AT_ALL"], "NOT_SET_AT_ALL is not set"),
        (["--fleet", "absent.toml"], "absent.toml"),
        (["--max-seconds", "0"], "--max-seconds is 0"),
        (["--url", "nonsense"], "no http or https"),
        (["--url", "http://127.0.0.1:9/v1"], "cannot connect"),
        (["--model", "unknown"], "There is no such model"),
        (["--out", "/dev/null/x"], "cannot make the folder"),
    ],
)
def test_mistakes_are_one_line(
    server: Server, trace: Path, tmp_path: Path, flags: list[str], told: str
) -> None:
    fields = {"--url": server.url, "--model": "good", "--out": str(tmp_path / "out")}
    fields |= dict([flags[:2]]) if len(flags) == 2 else {}
    words = [word for pair in fields.items() for word in pair] + (flags if len(flags) > 2 else [])
    done = run("bench", str(trace), *words)
    assert done.returncode == 2
    lines = [line for line in done.stderr.strip().splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert told in lines[0]


@pytest.mark.engine
def test_the_real_engine(live_gateway: Running, tmp_path: Path) -> None:
    """`tokenworks up` with its model: lengths as asked for, every answer well-formed."""
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out"
    rows = [Request(n * 50_000_000, 60 + 10 * n, 6 + n) for n in range(12)]
    trace.write_bytes(write(Trace.of(rows)))
    url = f"{live_gateway.url}/v1"
    for mode in ("--stream", "--whole"):
        command = ("bench", str(trace), "--url", url, "--model", MODEL, "--out", str(out), mode)
        done = run(*command, "--json", **os.environ)
        assert done.returncode in (0, 3), done.stderr
        told = json.loads(done.stdout)
        assert told["violations"] == {}
        total = told["summary"]["total"]
        assert total["statuses"]["finished"] == 12
        assert total["output_tokens"] == sum(request.output_tokens for request in rows)
        assert total["prompt_tokens"] == pytest.approx(sum(r.prompt_tokens for r in rows), rel=0.1)
