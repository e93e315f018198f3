"""The twin beside the live factory: what one load teaches of another, and real-time under a batch.

    python bench/live_twin.py truth              # emulated engines, two loads, some nine minutes
    python bench/live_twin.py truth --embedded   # the embedded engine, some eight minutes
    python bench/live_twin.py kept FILE          # what validate_embedded.py --keep FILE recorded
    python bench/live_twin.py batch              # real-time alone, with a batch, the batch alone
    python bench/live_twin.py batch --twin       # the same in the twin; --gpus: without the LPU

`truth` records a gateway under `tokenworks bench` at two loads; each recording is calibrated and
predicts the other (goal: TTFT and TPOT, p50 and p90, within 10 %). `kept` does that with the first
and last tokens of a recording that has two clocks: the wall's, and the engine's own.

`batch`: a mixed fleet (two H100, one LPU) has real-time conversations; then the same while a batch
of conversations fills it; then the batch alone. Goals: attainment of the real-time bounds falls by
at most one point; the batch gets at least 80 % of what it does alone, times the share of the
requests' work that real-time leaves: 1 - (real-time requests/s) / (requests/s of the batch alone),
since both are conversations of the same lengths. docs/live-twin.md has the results.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import msgspec

from live_promises import MODEL, program
from tokenworks.catalog.book import catalog
from tokenworks.model import library
from tokenworks.twin.calibrate import Stream
from tokenworks.twin.live import quantile
from tokenworks.twin.replay import replay
from tokenworks.twin.scenario import parse
from tokenworks.twin.spans import Span, fitted
from tokenworks.twin.validate import METRICS
from tokenworks.units import NS_PER_S
from tokenworks.workload import Request, Trace, generate, named, write
from validate_embedded import CLOCKS, LOADS, Recording, flat, played

CLASSES: Final = "[classes.realtime]\nttft_ms = 500\ntpot_ms = 20\n"
EMULATED: Final = f"""
[[pools]]
name = "gpu"
kind = "emulated"
model = "{MODEL}"
processor = "h100"
replicas = 2
slots = 64
"""
EMBEDDED: Final = '[[pools]]\nname = "here"\nkind = "embedded"\nmodel = "smollm2-135m-instruct"\n'
MIXED: Final = (
    EMULATED
    + f"""
[[pools]]
name = "lpu"
kind = "emulated"
model = "{MODEL}"
processor = "groq-3-lpu"
devices = 64
context_tokens = 8192
"""
)
GPUS_IN_TWIN: Final = f"""
model = "{MODEL}"
[[pools]]
name = "gpu"
processor = "h100"
replicas = 2
limits = {{ sequences = 64 }}
[classes.batch]
wait_s = 604800
"""
LPU_IN_TWIN: Final = """
[[pools]]
name = "lpu"
processor = "groq-3-lpu"
devices = 64
limits = { context_tokens = 8192 }
"""
SMALL: Final = """
[arrivals]
type = "poisson"
rate_per_s = 0.3
[lengths]
prompt = { type = "lognormal", median_tokens = 90, sigma = 0.7, max_tokens = 300 }
output = { type = "lognormal", median_tokens = 35, sigma = 0.7, max_tokens = 120 }
"""
WARM_S: Final = 10.0  # of a run, that are not looked at
WINDOW: Final = 256  # lines of a batch that the gateway has in work


# Truth


def truth(folder: Path, *, embedded: bool, seconds: float, loads: Sequence[float]) -> None:
    fleet = folder / "fleet.toml"
    fleet.write_text(EMBEDDED if embedded else EMULATED + CLASSES)
    (folder / "small.toml").write_text(SMALL)
    source = str(folder / "small.toml") if embedded else "azure-conversation"
    model = "smollm2-135m-instruct" if embedded else MODEL
    recordings = []
    for load in loads:
        recordings.append(folder / f"at-{load:g}.jsonl")
        arguments = ("up", "--fleet", str(fleet), "--port", "0", "--record", str(recordings[-1]))
        with program(*arguments, state=str(folder / "state")) as (url, _):
            tokenworks(
                "bench", source, "--url", f"{url}/v1", "--model", model, "--poisson",
                "--requests", str(round(load * seconds)), "--rate", str(load),
                "--mix", "realtime=0.3", "standard=0.7", "--out", str(folder / f"{load:g}"),
            )  # fmt: skip
    one, other = map(str, recordings)
    tokenworks("calibrate", one, "--against", other)
    tokenworks("calibrate", other, "--against", one)


def tokenworks(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "tokenworks", *arguments], check=False)


def kept(path: Path) -> None:
    """The embedded engine from first and last tokens, by either clock."""
    recording = msgspec.json.decode(path.read_bytes(), type=Recording)
    for clock, title in CLOCKS.items():
        print(f"\n{title}")
        loads = recording.by(clock)
        learned = [fitted([spans(run) for run in runs], recording.limits) for runs in loads]
        for index, runs in enumerate(loads):
            constants = learned[1 - index]
            measured, predicted = flat(runs), played(constants, recording, runs)
            cells = []
            for metric, of in METRICS.items():
                was, said = list(map(of, measured)), list(map(of, predicted))
                for point in (0.5, 0.9):
                    error = quantile(said, point) / quantile(was, point) - 1
                    cells.append(f"{metric} p{round(100 * point)} {error:+.1%}")
            print(f"load {LOADS[index]} from load {LOADS[1 - index]}: {', '.join(cells)}")


def spans(run: Sequence[Stream]) -> list[Span]:
    return [
        Span(s.arrival_ns, s.token_ns[0], s.token_ns[-1], s.prompt_tokens, s.prompt_tokens,
             len(s.token_ns))
        for s in run
    ]  # fmt: skip


# Real-time under a batch


class Result(NamedTuple):
    """Of real-time: requests, refused, the share that met its bounds; and the batch's speed."""

    requests: int
    refused: int
    attainment: float
    lines_per_s: float


def conversations(rate: float, seconds: float, seed: int) -> list[Request]:
    workload = named("azure-conversation")
    return list(generate(workload, Random(seed), round(rate * seconds), rate))


def show(alone: Result, both: Result, batch: Result, rate: float) -> None:
    for title, each in (("real-time alone", alone), ("with a batch", both)):
        print(
            f"{title:16} {each.requests} real-time, {each.refused} refused, "
            f"bounds met {each.attainment:.2%}; batch {each.lines_per_s:.2f} lines/s"
        )
    idle = 1 - rate / batch.lines_per_s
    allowed = batch.lines_per_s * idle
    print(f"batch alone      {batch.lines_per_s:.2f} lines/s; real-time leaves {idle:.0%} of that")
    lost = alone.attainment - both.attainment
    print(f"bounds met less by {100 * lost:.2f} points (goal: 1 at most)")
    print(f"batch gets {both.lines_per_s / allowed:.0%} of what is idle (goal: 80 %)", flush=True)


def in_twin(rate: float, seconds: float, *, gpus: bool) -> None:
    fleet = GPUS_IN_TWIN + ("" if gpus else LPU_IN_TWIN)
    scenario = parse((fleet + CLASSES).encode(), "here")
    span_ns = round(seconds * NS_PER_S)
    spoken = [
        Request(r.arrival_ns, r.prompt_tokens, r.output_tokens, "realtime")
        for r in conversations(rate, seconds, 1)
    ]
    lines = [
        Request(0, r.prompt_tokens, r.output_tokens, "batch")
        for r in conversations(45.0 if gpus else 200.0, seconds, 2)
    ]

    def run(requests: list[Request]) -> Result:
        ordered = sorted(requests, key=lambda request: request.arrival_ns)
        found = replay(scenario, ordered, span_ns, catalog(), library.shape).outcomes
        begin_ns, asked, refused, met, done = round(WARM_S * NS_PER_S), 0, 0, 0, 0
        for outcome in found:
            if outcome.service_class == "batch":
                done += begin_ns <= outcome.last_ns < span_ns
            elif outcome.arrival_ns >= begin_ns:
                asked += 1
                refused += outcome.status == "rejected"
                met += (
                    outcome.status == "finished"
                    and outcome.ttft_ns <= outcome.ttft_bound_ns
                    and outcome.tpot_ns <= outcome.tpot_bound_ns
                )
        return Result(asked, refused, met / max(asked, 1), done / (seconds - WARM_S))

    show(run(spoken), run(spoken + lines), run(lines), rate)


def call(url: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
    request = urllib.request.Request(f"{url}{path}", body, {"content-type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def send_batch(url: str, requests: Sequence[Request]) -> str:
    """Its lines are as long as these; its id."""
    lines = []
    for number, each in enumerate(requests):
        words = f"{number:06d} " + "word" * max(each.prompt_tokens - 2, 1)
        body = {
            "model": MODEL, "max_tokens": each.output_tokens, "ignore_eos": True,
            "messages": [{"role": "user", "content": words}],
        }  # fmt: skip
        line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions"}
        lines.append(json.dumps({**line, "body": body}))
    form = (
        '--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
        'content-disposition: form-data; name="file"; filename="lines.jsonl"\r\n\r\n'
        + "\n".join(lines)
        + "\r\n--x--\r\n"
    )
    sent = call(url, "/v1/files", form.encode(), "multipart/form-data; boundary=x")
    wanted = {
        "input_file_id": sent["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h",
    }  # fmt: skip
    return str(call(url, "/v1/batches", json.dumps(wanted).encode())["id"])


def lines_done(url: str, batch: str) -> int:
    return int(call(url, f"/v1/batches/{batch}")["request_counts"]["completed"])


def live_run(folder: Path, spoken: Path | None, lines: Sequence[Request], seconds: float) -> Result:
    fleet = folder / "fleet.toml"
    fleet.write_text(MIXED + CLASSES)
    counts: list[tuple[float, int]] = []
    arguments = ("up", "--fleet", str(fleet), "--port", "0")
    with tempfile.TemporaryDirectory() as state, program(*arguments, state=state) as (url, _):
        batch = send_batch(url, lines) if lines else ""

        def watch() -> None:
            for wait_s in (WARM_S, seconds - WARM_S):
                time.sleep(wait_s)
                counts.append((time.monotonic(), lines_done(url, batch)))

        watcher = threading.Thread(target=watch)
        if batch:
            while lines_done(url, batch) < 1:
                time.sleep(0.5)
            watcher.start()
        total: dict[str, Any] = {}
        if spoken is not None:
            out = folder / ("both" if lines else "alone")
            tokenworks(
                "bench", str(spoken), "--url", f"{url}/v1", "--model", MODEL,
                "--fleet", str(fleet), "--out", str(out),
            )  # fmt: skip
            total = json.loads((out / "summary.json").read_bytes())["total"]
        if batch:
            watcher.join()
    per_s = 0.0
    if counts:
        (begin_s, before), (end_s, after) = counts
        per_s = (after - before) / (end_s - begin_s)
    if not total:
        return Result(0, 0, 1.0, per_s)
    return Result(
        total["requests"], total["statuses"]["rejected"], total["attainment"], per_s
    )  # fmt: skip


def live(folder: Path, rate: float, seconds: float) -> None:
    spoken = [
        Request(r.arrival_ns, r.prompt_tokens, r.output_tokens, "realtime")
        for r in conversations(rate, seconds, 1)
    ]
    trace = folder / "spoken.jsonl"
    trace.write_bytes(write(Trace.of(spoken)))
    lines = conversations(200.0, seconds, 2)
    alone = live_run(folder, trace, (), seconds)
    both = live_run(folder, trace, lines, seconds)
    show(alone, both, live_run(folder, None, lines, seconds), rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("truth", "kept", "batch"))
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--twin", action="store_true")
    parser.add_argument("--gpus", action="store_true", help="in the twin: no LPU")
    parser.add_argument("--seconds", type=float, help="of each run: 240; batch 60, in the twin 600")
    parser.add_argument("--rate", type=float, default=6.0, help="real-time requests a second")
    parser.add_argument("--loads", type=float, nargs=2)
    parser.add_argument("--keep", type=Path, help="where to keep recordings and reports")
    options = parser.parse_args()
    if options.what == "kept":
        kept(options.file)
        return
    if options.what == "batch" and options.twin:
        in_twin(options.rate, options.seconds or 600.0, gpus=options.gpus)
        return
    with tempfile.TemporaryDirectory(prefix="tokenworks-") as made:
        folder = options.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        if options.what == "batch":
            live(folder, options.rate, options.seconds or 60.0)
        else:
            loads = options.loads or ((0.25, 0.5) if options.embedded else (5.0, 12.0))
            truth(folder, embedded=options.embedded, seconds=options.seconds or 240, loads=loads)


if __name__ == "__main__":
    main()
