"""The twin beside NVIDIA Dynamo's offline replay: time, memory, and how both grow.

The lengths of `azure-conversation`, Poisson arrivals, seed 1, at the same rate for each replica,
written as a Mooncake trace that both read: blocks of 512 tokens that no two requests share. Ours
has everything on: the example's classes and mix, admission, promises, prefix cache, energy, all
percentiles. The peer (ai-dynamo 1.6.1, a compiled core) has its defaults and logs errors only: its
KV router's line for each request would be measured. Each run is a process of its own, in turns.

Time is that of the replay and its summary, without imports and without reading the trace (the
peer's is the `wall_time_ms` it reports). Memory is the process's peak, with both.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

from msgspec.structs import replace

from tokenworks.catalog.book import catalog
from tokenworks.model import library
from tokenworks.twin import run as twin_run
from tokenworks.twin.replay import replay
from tokenworks.twin.scenario import parse
from tokenworks.workload import Poisson, generate, named, read

OURS, ROUND_ROBIN, KV_ROUTER = "tokenworks", "round robin", "KV router"
SCENARIO = Path(__file__).parents[1] / "examples" / "scenarios" / "8xh100.toml"
RATE_PER_S = 5.5  # of each replica: it always has something to do, and nothing piles up
BLOCK_TOKENS = 512  # of Mooncake's traces
FEW, MANY, HUGE, WIDE = 10_000, 100_000, 1_000_000, 64

# The goals, and where one wants to get: times the KV router, MB, and times a smaller run.
IS_COMPILED = not twin_run.__file__.endswith(".py")  # see scripts/compile
TIME, TIME_AIM = 1.0 if IS_COMPILED else 3.0, 1 / 3
MEMORY_MB, MEMORY_AIM_MB = 677, 250
GROWTH, WIDTH = 1.2, 3.0
WAITED = 1.1  # times its CPU time, and a run's time says something about other programs

# What the peer's interpreter runs; PEAK is the same for ours. The resource module won't do: what
# it calls a child's peak includes that of the parent that forked it.
PEAK = "int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) * 1024 / 1e6"
PEER = f"""
import json, sys, time
from dynamo.replay import run_trace_replay
trace, replicas, router = sys.argv[1:]
begin = time.process_time()
found = run_trace_replay(trace, num_workers=int(replicas), router_mode=router).summary
print(json.dumps([found["wall_time_ms"] / 1e3, time.process_time() - begin, {PEAK},
    found["completed_requests"], found["median_ttft_ms"], found["median_tpot_ms"]]))
"""
ROUTERS = {ROUND_ROBIN: "round_robin", KV_ROUTER: "kv_router"}
say = partial(print, file=sys.stderr, flush=True)


class Case(NamedTuple):
    requests: int
    replicas: int

    def __str__(self) -> str:
        return f"{self.requests:,} requests, {self.replicas} replica{'s' * (self.replicas > 1)}"


class Run(NamedTuple):
    """Seconds (those of the CPU are fewer where others wanted it too; the peer's include reading
    the trace), peak MB, requests that finished; medians, to see that both did the same work.
    """

    wall_s: float
    cpu_s: float
    rss_mb: float
    finished: int
    ttft_ms: float
    tpot_ms: float

    def __str__(self) -> str:
        told = f"{self.wall_s:.2f} s (CPU {self.cpu_s:.2f}), {self.rss_mb:,.0f} MB, "
        told += f"{self.finished:,} finished, median TTFT {self.ttft_ms:.0f} ms, "
        return told + f"per token {self.tpot_ms:.1f} ms"


Runs = dict[Case, dict[str, list[Run]]]  # by target, round by round


def write(case: Case, rate_per_s: float, path: Path) -> None:
    """The case's requests. At another rate they are the same ones, closer together."""
    arrivals = Poisson(rate_per_s * case.replicas)
    workload, blocks = replace(named("azure-conversation"), arrivals=arrivals), count()
    with path.open("w") as file:
        for request in generate(workload, Random(1), case.requests):
            line = {
                "timestamp": request.arrival_ns / 1e6,
                "input_length": request.prompt_tokens,
                "output_length": request.output_tokens,
                "hash_ids": [next(blocks) for _ in range(0, request.prompt_tokens, BLOCK_TOKENS)],
            }
            file.write(json.dumps(line) + "\n")


def ours(path: Path, replicas: int) -> Run:
    """Replay it, in a process of its own."""
    scenario = parse(SCENARIO.read_bytes(), str(SCENARIO))
    scenario = replace(scenario, pools=(replace(scenario.pools[0], replicas=replicas),))
    trace, book = read(path.read_bytes(), path.name), catalog()
    library.shape(scenario.model)  # reads it once
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    result = replay(scenario, trace, trace.span_ns, book, library.shape, 1)
    took_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    total = result.summary.total
    if not result.is_whole or sum(total.statuses.values()) != len(trace):
        raise RuntimeError(f"{len(trace)} requests came in, and there went {total.statuses}")
    latencies_ms = [spread.p50 / 1e6 if spread else 0 for spread in (total.ttft_ns, total.tpot_ns)]
    return Run(took_s, cpu_s, eval(PEAK), total.statuses["finished"], *latencies_ms)


def measured(target: str, case: Case, trace: Path, python: str | None) -> Run:
    """Run it in a new process."""
    rest, environment = [str(trace), str(case.replicas)], os.environ
    command = [sys.executable, __file__, "--child", *rest]
    if target != OURS:
        assert python
        command = [python, "-c", PEER, *rest, ROUTERS[target]]
        environment = os.environ | {"DYN_LOG": "error"}  # type: ignore[assignment]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, process_group=0
    )
    if done.returncode or not done.stdout:
        raise RuntimeError(f"{target}, {case}: {done.stderr[-2000:] or 'no answer'}")
    return Run(*json.loads(done.stdout.splitlines()[-1]))


def cases(sizes: list[int], replicas: list[int], is_large: bool) -> list[tuple[Case, bool]]:
    """What is measured, and whether of the peer as well."""
    both = [(Case(size, many), True) for size in sizes for many in replicas]
    alone = [Case(sizes[0], 1), Case(sizes[0], WIDE)]
    alone += [Case(HUGE, max(replicas))] if is_large else []
    return both + [(case, False) for case in alone if (case, True) not in both]


def measure(args: argparse.Namespace, runs: Runs) -> None:
    """All cases, again and again; what is done is in `runs`, also if this is interrupted."""
    with tempfile.TemporaryDirectory(prefix="twin-bench-") as folder:
        for case, has_peer in cases(args.requests, args.replicas, args.large):
            trace = Path(folder) / "mooncake.jsonl"
            write(case, args.rate, trace)
            targets = [OURS, *(ROUTERS if has_peer and args.dynamo_python else ())]
            found = runs.setdefault(case, {target: [] for target in targets})
            repeat = 1 if case.requests == HUGE else args.repeat
            for turn in range(repeat):
                for target in targets[:: -1 if turn % 2 else 1]:
                    run = measured(target, case, trace, args.dynamo_python)
                    found[target].append(run)
                    say(f"round {turn + 1}/{repeat}  {case}, {target}: {run}")


def row(label: str, cells: list[str], goal: str = "") -> None:
    print((f"{label:40}" + "".join(f"{cell:>13}" for cell in cells) + f"   {goal}").rstrip())


def verdict(value: float, goal: float, unit: str, aim: float | None = None) -> str:
    text = f"<= {goal:g} {unit}  {'reached' if value <= goal else 'NOT reached'}"
    if aim is not None:
        text += f", aim {aim:.3g}: {'reached' if value <= aim else 'not yet'}"
    return text


def beside(runs: Runs) -> None:
    """Ours and the peer's, for each case."""
    row("medians of rounds", [OURS, *ROUTERS, "to r. robin", "to KV router"], "goal")
    for case, found in runs.items():
        mine, have_all = found[OURS], len(found) > 1 and all(found.values())
        if not mine:
            continue
        others = [found[target] for target in ROUTERS] if have_all else []
        for name, field, places in (("s", 0, 2), ("CPU s", 1, 2), ("MB", 2, 0)):
            columns = [[run[field] for run in each] for each in (mine, *others)]
            pairs = [zip(columns[0], column, strict=False) for column in columns[1:]]
            ratios = [median(a / b for a, b in each) for each in pairs]
            cells = [f"{median(column):,.{places}f}" for column in columns]
            cells += ["-"] * (3 - len(cells)) + [f"{ratio:.2f}" for ratio in ratios]
            goal = ""
            if name != "MB" and ratios:
                goal = verdict(ratios[1], TIME, "x", TIME_AIM)
            elif name == "MB" and case.requests == MANY:
                goal = verdict(median(columns[0]), MEMORY_MB, "MB", MEMORY_AIM_MB)
            row(f"{case}, {name}", cells, goal)


def growth(runs: Runs, few: int) -> None:
    """Ours against itself: longer and wider runs."""
    took_s = {
        case: median(r.cpu_s for r in found[OURS]) for case, found in runs.items() if found[OURS]
    }
    row("\ngrowth", [" CPU us each", "ratio"], "goal")
    for case, cpu_s in took_s.items():
        base_s = took_s.get(Case(few, case.replicas))
        cells = [f"{cpu_s / case.requests * 1e6:,.0f}"]
        if case.requests == few or not base_s:
            row(str(case), cells)
            continue
        ratio = cpu_s / case.requests / (base_s / few)
        row(str(case), [*cells, f"{ratio:.2f}"], verdict(ratio, GROWTH, "x"))
    wide_s, one_s = took_s.get(Case(few, WIDE)), took_s.get(Case(few, 1))
    if wide_s and one_s:
        ratio = wide_s / one_s
        label = f"the same {few:,}, {WIDE} replicas to 1"
        row(label, ["", f"{ratio:.2f}"], verdict(ratio, WIDTH, "x"))


def report(args: argparse.Namespace, runs: Runs) -> None:
    print(f"{args.rate:g} requests/s for each replica, llama-3.1-8b, one H100 each")
    print("tokenworks is", "compiled" if IS_COMPILED else "pure Python")
    if not args.dynamo_python:
        print("ours only: no peer was measured (--dynamo-python), so time has no verdict")
    beside(runs)
    growth(runs, args.requests[0])
    for case, found in runs.items():
        left = max((case.requests - run.finished for run in found[OURS]), default=0)
        if left:
            print(f"{case}: ours left {left:,} unfinished, as their bounds couldn't be met")
    every = [run for found in runs.values() for each in found.values() for run in each]
    waited = sum(run.wall_s > WAITED * run.cpu_s for run in every)
    if waited:
        print(f"other programs were running: {waited} of {len(every)} runs waited for their core")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dynamo-python", help="the interpreter that has ai-dynamo; without: ours")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (3)")
    parser.add_argument("--large", action="store_true", help=f"{HUGE:,} requests too, once, ours")
    parser.add_argument("--requests", type=int, nargs="+", default=[FEW, MANY], metavar="N")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--rate", type=float, default=RATE_PER_S, help="requests/s for a replica")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(ours(Path(args.child[0]), int(args.child[1]))))
        return 0
    if min(args.repeat, *args.requests, *args.replicas) < 1 or not args.rate > 0:
        parser.error("all numbers must be above zero")
    if sys.platform != "linux":
        parser.error("needs Linux, for the processes' peak memory")
    args.requests.sort()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background of a shell
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    runs, code = Runs(), 0
    try:
        measure(args, runs)
    except KeyboardInterrupt:
        say("stopped; what is done:")
        code = 130
    except (OSError, RuntimeError, ValueError) as error:
        say(f"failed: {error or type(error).__name__}; what is done:")
        code = 1
    report(args, runs)
    return code


if __name__ == "__main__":
    sys.exit(main())
