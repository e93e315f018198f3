"""How often promises are kept where things go wrong: an hour in the twin, some minutes live.

    python bench/live_promises.py                 # the twin: an hour, a slow-down and a crash
    python bench/live_promises.py --live          # a gateway over emulated engines, four minutes
    python bench/live_promises.py --live --minutes 2 --rate 12

Mixed traffic (30 % real-time, 50 % standard, 10 % flex, 10 % batch) on four H100 with Llama-3.1-8B.
After a third of the time one replica takes twice as long for everything, for a sixth of it; at half
of it another one crashes, and is back after a minute (live: killed with -9, and not replaced).
Promises say 90 %. Of each class and each replica: how many promises were kept, of the first token
and of the time per token, and the median of promise over actual. A request that failed has broken
its promise. docs/live-twin.md has the results.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final, NamedTuple

from tokenworks.catalog.book import catalog
from tokenworks.metrics.outcomes import Outcome
from tokenworks.model import library
from tokenworks.twin.replay import replay
from tokenworks.twin.scenario import Scenario, parse
from tokenworks.units import NS_PER_S
from tokenworks.workload import Mix, Request, Share, assigned, generate, named

MODEL: Final = "llama-3.1-8b"
REPLICAS: Final = 4
MIX: Final = (
    Share(0.3, "realtime"), Share(0.5, "standard"), Share(0.1, "flex"), Share(0.1, "batch"),
)  # fmt: skip
SCENARIO: Final = f"""
model = "{MODEL}"
[[pools]]
name = "gpu"
processor = "h100"
replicas = {REPLICAS}
limits = {{ sequences = 64 }}
[classes.realtime]
ttft_ms = 500
tpot_ms = 20
[classes.standard]
wait_s = 300
"""
SLOW, CRASHED = 0, 1
_READY: Final = re.compile(r"Tokenworks is ready: (\S+)")


class Seen(NamedTuple):
    """A request: what was promised, and what became of it; -1: nothing."""

    service_class: str
    replica: str
    ttft_promise_ns: int
    ttft_ns: int
    tpot_promise_ns: int
    tpot_ns: float
    failed: bool


def traffic(rate: float, seconds: float, seed: int) -> list[Request]:
    """Conversations like Azure's, of all classes, so many a second."""
    workload, chance = named("azure-conversation"), Random(seed)
    requests = generate(workload, chance, round(rate * seconds), rate)
    return list(assigned(requests, Mix(MIX), Random(seed + 1)))


# The twin


def faults(seconds: float) -> str:
    return (
        f'[[faults]]\nreplica = "gpu-{SLOW}"\nat_s = {seconds / 3}\nkind = "slow"\n'
        f"for_s = {seconds / 6}\nfactor = 2\n"
        f'[[faults]]\nreplica = "gpu-{CRASHED}"\nat_s = {seconds / 2}\nkind = "crash"\nfor_s = 60\n'
    )


def seen(outcome: Outcome) -> Seen:
    return Seen(
        outcome.service_class, outcome.replica, outcome.ttft_promise_ns, outcome.ttft_ns,
        outcome.tpot_promise_ns, outcome.tpot_ns, outcome.status == "failed",
    )  # fmt: skip


def in_twin(rate: float, seconds: float, seed: int, confidence: float) -> list[Seen]:
    text = SCENARIO + f"[policy]\nconfidence = {confidence}\n" + faults(seconds)
    scenario: Scenario = parse(text.encode(), "here")
    requests = traffic(rate, seconds, seed)
    result = replay(scenario, requests, round(seconds * NS_PER_S), catalog(), library.shape, seed)
    return [seen(outcome) for outcome in result.outcomes if outcome.status != "rejected"]


# Live


@contextmanager
def program(*arguments: str, state: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """One of our commands, and the address it says it is ready at."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenworks", *arguments], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, env={**os.environ, "TOKENWORKS_STATE": state},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        ready = next(match for line in process.stdout if (match := _READY.search(line)))
        yield ready[1].removesuffix("/v1"), process
    finally:
        process.terminate()
        process.wait(60)


def hurt(url: str, fault: dict[str, Any]) -> None:
    head = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/emulate/fault", json.dumps(fault).encode(), head)
    with urllib.request.urlopen(request) as answer:
        answer.read()


def live(rate: float, seconds: float, seed: int, confidence: float) -> list[Seen]:
    with tempfile.TemporaryDirectory(prefix="tokenworks-") as folder:
        return list(_live(rate, seconds, seed, confidence, Path(folder)))


def _live(
    rate: float, seconds: float, seed: int, confidence: float, folder: Path
) -> Iterator[Seen]:
    """The same through a gateway, from its ledger: a batch by /v1/batches has no times of its own
    there, so that class comes as requests here, too.
    """
    from contextlib import ExitStack  # noqa: PLC0415

    with ExitStack() as stack:
        engines = [
            stack.enter_context(
                program(
                    "emulate", "h100", MODEL, "--port", "0", "--faults", "--sequences", "64",
                    state=str(folder),
                )
            )
            for _ in range(REPLICAS)
        ]  # fmt: skip
        urls = json.dumps([url for url, _ in engines])
        fleet, trace = folder / "fleet.toml", folder / "trace.jsonl"
        fleet.write_text(
            f'[[pools]]\nname = "gpu"\nkind = "vllm"\nmodel = "{MODEL}"\nprocessor = "h100"\n'
            f"slots = 64\nurls = {urls}\n[classes.realtime]\nttft_ms = 500\ntpot_ms = 20\n"
            f"[policy]\nconfidence = {confidence}\n"
        )
        url, _ = stack.enter_context(
            program("up", "--fleet", str(fleet), "--port", "0", state=str(folder / "up"))
        )
        from tokenworks.workload import Trace, write  # noqa: PLC0415

        trace.write_bytes(write(Trace.of(traffic(rate, seconds, seed))))

        def trouble() -> None:
            time.sleep(seconds / 3)
            hurt(engines[SLOW][0], {"kind": "slow", "factor": 2})
            time.sleep(seconds / 6)
            hurt(engines[SLOW][0], {"kind": "slow", "factor": 1})
            engines[CRASHED][1].kill()

        threading.Thread(target=trouble, daemon=True).start()
        out = folder / "out"
        subprocess.run(
            [sys.executable, "-m", "tokenworks", "bench", str(trace), "--url", f"{url}/v1",
             "--model", MODEL, "--out", str(out)],
            check=False,
        )  # fmt: skip
        yield from ledger(folder / "up")


def ledger(state: Path) -> Iterator[Seen]:
    """The rows of a gateway's ledger."""
    import sqlite3  # noqa: PLC0415

    (path,) = state.rglob("*.sqlite*") if len(list(state.rglob("*.sqlite"))) == 0 else state.rglob(
        "*.sqlite"
    )  # fmt: skip
    time.sleep(2)
    rows = sqlite3.connect(path).execute(
        "SELECT service_class, replica, promise_ttft_ns, ttft_ns, promise_tpot_ns, total_ns, "
        "output_tokens, outcome FROM requests"
    )
    for name, replica, ttft_promise, ttft, tpot_promise, total, tokens, outcome in rows:
        if outcome == "rejected":
            continue
        tpot = (total - ttft) / (tokens - 1) if ttft >= 0 and tokens > 1 else -1
        yield Seen(name, replica, ttft_promise, ttft, tpot_promise, tpot, outcome == "failed")


# What came of it


def row(title: str, rows: Sequence[Seen]) -> str:
    cells = []
    for kind in ("ttft", "tpot"):
        told = [
            (getattr(each, f"{kind}_promise_ns"), getattr(each, f"{kind}_ns"), each.failed)
            for each in rows
        ]
        judged = [each for each in told if each[0] >= 0 and (each[1] > 0 or each[2])]
        if not judged:
            cells.append(f"{'-':>23}")
            continue
        kept = sum(not failed and actual <= said for said, actual, failed in judged) / len(judged)
        ratio = median(said / actual for said, actual, _ in judged if actual > 0)
        cells.append(f"{len(judged):9,} {kept:6.1%} {ratio:6.2f}")
    return f"{title:24}{'  '.join(cells)}"


def show(rows: Sequence[Seen], confidence: float) -> None:
    print(
        f"{'said ' + format(confidence, '.0%'):24}     TTFT   kept  ratio       TPOT   kept  ratio"
    )
    print(row("all", rows))
    for name in ("realtime", "standard", "flex", "batch"):
        print(row(name, [each for each in rows if each.service_class == name]))
    for replica in sorted({each.replica for each in rows if each.replica}):
        print(row(replica, [each for each in rows if each.replica == replica]))
    failed = sum(each.failed for each in rows)
    print(f"{len(rows):,} requests, {failed} of them failed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--live", action="store_true", help="a gateway over emulated engines")
    parser.add_argument("--minutes", type=float, help="60; live 4")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--confidence", type=float, default=0.9)
    options = parser.parse_args()
    minutes = options.minutes or (4 if options.live else 60)
    run = live if options.live else in_twin
    show(run(options.rate, minutes * 60, options.seed, options.confidence), options.confidence)


if __name__ == "__main__":
    main()
