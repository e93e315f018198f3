"""`tokenworks replay` and `tokenworks compare`: what they write, and one line for each mistake."""

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from tests.support import run
from tokenworks.metrics.outcomes import STATUSES

ROOT = Path(__file__).parents[1]
SCENARIOS = sorted((ROOT / "examples/scenarios").glob("*.toml"))
EIGHT = ROOT / "examples/scenarios/8xh100.toml"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.5,{100 + 40 * second},{5 + second}\n" for second in range(40)
)
MOONCAKE = "".join(
    json.dumps(
        {"timestamp": 3000 * (n // 4), "input_length": 900, "output_length": 20, "hash_ids": [1, n]}
    )
    + "\n"
    for n in range(40)
)
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + "".join(
    f"{second},ChatGPT,{50 + second},{10 + second},{60 + 2 * second},Conversation log\n"
    for second in range(40)
)


@pytest.mark.parametrize("text", [AZURE, MOONCAKE, BURST], ids=["azure", "mooncake", "burstgpt"])
def test_every_format_becomes_a_report(tmp_path: Path, text: str) -> None:
    trace, out = tmp_path / "trace", tmp_path / "out"
    trace.write_text(text)
    done = run("replay", str(trace), "--fleet", str(EIGHT), "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["is_whole"]
    total = told["summary"]["total"]
    assert total["requests"] == total["statuses"]["finished"] == 40
    assert json.loads((out / "summary.json").read_text()) == told["summary"]
    table = pl.read_parquet(out / "outcomes.parquet")
    assert len(table) == 40
    assert table["output_tokens"].sum() == total["output_tokens"]
    assert set(table["status"]) <= set(STATUSES)
    assert json.loads((out / "trace.json").read_text())["metadata"]["shown"] == 40
    page = (out / "report.html").read_text()
    assert "Eight H100" in page
    assert "src=" not in page.split("<script>")[0]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(AZURE)
    found = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        out = tmp_path / name
        run("replay", str(trace), "--fleet", str(EIGHT), "--out", str(out), "--seed", seed)
        found.append([(out / f).read_bytes() for f in ("outcomes.parquet", "summary.json")])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_batches_of_stamps_are_noted_and_smoothed(tmp_path: Path) -> None:
    trace = tmp_path / "mooncake.jsonl"
    trace.write_text(MOONCAKE)
    command = ("replay", str(trace), "--fleet", str(EIGHT), "--out", str(tmp_path / "out"))
    assert "--smooth spreads them" in run(*command).stdout
    assert "--smooth" not in run(*command, "--smooth").stdout


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: str(path.stem))
def test_every_scenario_that_ships_runs(tmp_path: Path, path: Path) -> None:
    out = ("--out", str(tmp_path), "--requests", "300", "--json")
    done = run("replay", "azure-conversation", "--fleet", str(path), *out)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)["summary"]
    assert summary["total"]["statuses"]["finished"] >= 295
    assert summary["energy_j_per_token"] > 0


def test_a_comparison_has_every_run(tmp_path: Path) -> None:
    done = run(
        "compare", "azure-code", "--fleet", str(EIGHT), "--route", "energy", "round-robin",
        "--scale", "1", "2", "--seeds", "2", "--requests", "100", "--out", str(tmp_path), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    assert {(r["variant"], r["seed"]) for r in runs} == {
        (variant, seed) for variant in ("energy", "round-robin") for seed in (0, 1)
    }
    assert len(runs) == 8
    assert len({r["rate_per_s"] for r in runs}) == 2
    assert "round-robin" in (tmp_path / "comparison.html").read_text()


def test_ctrl_c_leaves_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["replay", "azure-conversation", "--fleet", str(EIGHT), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenworks", *command, "--requests", "2000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    told, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Interrupted" in told
    assert "Traceback" not in error
    some = len(pl.read_parquet(out / "outcomes.parquet"))
    assert 0 < some < 2_000_000
    assert "Interrupted" in (out / "report.html").read_text()


BROKEN = {
    "empty": (b"", "is empty"),
    "gzip": (gzip.compress(AZURE.encode()), "gunzip"),
    "columns": (b"a,b\n1,2\n", "has the columns a, b"),
    "negative": (AZURE.replace("100,5", "-100,5").encode(), "trace:2"),
    "time": (AZURE.replace("2023-11-16 18:15:03.5", "yesterday").encode(), "trace:5"),
    "mixed": (MOONCAKE.encode() + AZURE.encode(), "trace:41"),
    "binary": (b"\x00\x01\x02", "no text file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_trace_is_one_line(tmp_path: Path, name: str) -> None:
    data, told = BROKEN[name]
    trace = tmp_path / "trace"
    trace.write_bytes(data)
    done = run("replay", str(trace), "--fleet", str(EIGHT), "--out", str(tmp_path / "out"))
    one_line(done, told)
    assert str(trace) in done.stderr
    assert not (tmp_path / "out").exists()


GOOD = 'model = "llama-3.1-8b"\n[[pools]]\nprocessor = "h100"\n'
WRONG = {
    "toml": ("model = ", "no TOML"),
    "key": (GOOD + "colour = 3\n", "colour"),
    "processor": (GOOD.replace("h100", "h1000"), "Did you mean h100"),
    "model": (GOOD.replace("llama-3.1-8b", "lama-3.1-8b"), "Did you mean llama-3.1-8b"),
    "large": (GOOD.replace("8b", "70b") + "devices = 1\n", "does not fit on 1 h100"),
    "bounds": (
        GOOD + "[classes.realtime]\nttft_ms = 900\n[classes.standard]\nttft_ms = 500\n",
        "classes.realtime.ttft_ms is 900, looser than standard's 500",
    ),
    "class": (GOOD + "[classes.quick]\nttft_ms = 3\n", "classes.quick"),
    "shares": (GOOD + "[[mix]]\nshare = 0.5\n", "sum to 0.5"),
    "fault": (GOOD + '[[faults]]\nreplica = "gpu-9"\nat_s = 1\nkind = "crash"\n', "gpu-9"),
    "limits": (GOOD + "limits = { sequences = 0 }\n", "pools[0].limits.sequences is 0"),
    "type": (GOOD + 'replicas = "two"\n', "replicas"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_scenario_is_one_line(tmp_path: Path, name: str) -> None:
    text, told = WRONG[name]
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(text)
    out = tmp_path / "out"
    done = run("replay", "azure-code", "--fleet", str(fleet), "--out", str(out))
    one_line(done, told)
    assert str(fleet) in done.stderr


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["azure-conv"], "azure-conversation?"),
        (["absent.csv"], "cannot read the trace absent.csv"),
        (["azure-code", "--route", "energie"], "Did you mean energy"),
        (["azure-code", "--requests", "0"], "0 requests"),
        (["azure-code", "--scale", "0"], "0"),
        (["azure-code", "--smooth"], "for files"),
        (["azure-code", "--set", "processor.h100.tpd_w=3"], "Did you mean tdp_w"),
        (["azure-code", "--out", "/dev/null/x"], "cannot make the folder"),
    ],
)
def test_other_mistakes_are_one_line(
    command: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("replay", *command, "--fleet", str(EIGHT))
    one_line(done, told)


def test_what_is_compared_twice_is_refused() -> None:
    done = run("compare", "azure-code", "--fleet", str(EIGHT), "--route", "energy", "energy")
    one_line(done, "twice")


def one_line(done: subprocess.CompletedProcess[str], told: str) -> None:
    assert done.returncode == 2
    lines = [line for line in done.stderr.strip().splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert told in lines[0]
