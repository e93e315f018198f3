"""The relay beside nginx: what a streamed chunk, a whole answer and a first token cost.

Each target (the gateway, and nginx as a plain streaming proxy) has a core and forwards to the same
scripted engine, which shares another core with this client. In each round every load meets all
targets in turn; results are ratios to nginx in that round, as absolute figures say more about the
machine and the hour. Throughput is divided by the CPU time of the target's processes: a client in
Python can't saturate nginx, so its wall-clock rate would be the client's own. Added TTFT is the
difference to the engine asked directly. Every answer is checked whole: status, chunked framing,
order and number of tokens, usage, `[DONE]`, nothing after it. One error makes the run fail.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple, cast

import uvloop

import engine

CHUNKS, BURSTS, WHOLE = "chunks/CPU-s", "chunks/CPU-s, 8 at once", "whole answers/CPU-s"
FIRST, TTFT_P50, TTFT_P99 = "first token", "added TTFT p50, us", "added TTFT p99, us"
# The goals: at least so many times nginx's figure in the same run; at most so many microseconds.
AT_LEAST = {CHUNKS: 0.80, BURSTS: 0.80, WHOLE: 0.40}
AT_MOST = {TTFT_P50: 250}

STREAMS = 500  # fewer, if engine and client asked for more than this part of their core:
FOR_CPU, FOR_TTFT = 0.80, 0.30  # a waiting client delays first tokens more than a gateway does
FULL = 0.90  # of their core: then engine and client are the bottleneck
TAKEN, TRIES = 0.15, 4  # cores taken by other programs: then measured again, so many times at most
START_S, TAIL_S = 60, 15  # for a target to come up; for the last answers, beyond their length
GATEWAY = f"tokenworks=0={shlex.quote(sys.executable)} -m tokenworks up --port {{port}}"
GATEWAY += " --engine http://127.0.0.1:{engine_port}"
NGINX = """worker_processes 1; daemon off; pid pid; error_log error.log warn;
worker_rlimit_nofile 8192; events {{ worker_connections 4096; multi_accept on; }}
http {{
  access_log off; keepalive_timeout 300s; keepalive_requests 100000000; proxy_temp_path p;
  client_body_temp_path b; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  upstream up {{ server 127.0.0.1:{engine_port}; keepalive 1024; keepalive_requests 100000000; }}
  server {{ listen 127.0.0.1:{port} backlog=1024; location / {{ proxy_pass http://up;
    proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }} }}
}}
"""
say = partial(print, file=sys.stderr, flush=True)
Samples = dict[str, dict[str, list["Tally"]]]  # by target and figure, round by round


class Load(NamedTuple):
    """What the client offers. Each connection asks again as soon as its answer is complete."""

    connections: int
    tokens: int = 200
    interval_us: int = 0
    burst: int = 1
    stream: bool = True

    def seconds(self) -> float:
        return self.tokens / self.burst * self.interval_us / 1e6

    def request(self) -> bytes:
        script = f"tokens={self.tokens} interval_us={self.interval_us} burst={self.burst}"
        user = {"role": "user", "content": f"{script}: tell me how a relay keeps its pace."}
        body = {"model": "mock", "messages": [user], "stream": self.stream}
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        text = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        return head.encode() + text


LAST_CHUNK = b"\r\n0\r\n\r\n"
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")
STAMPS = re.compile(rb'"~(\d{19})"')
COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')


class Tally:
    """What one load on one target has shown. Work counts tokens, or whole answers."""

    def __init__(self, load: Load) -> None:
        self.load, self.live, self.counting, self.stopping = load, 0, False, False
        self.work, self.wall_s, self.cpu_s, self.rss_mb = 0, 0.0, 0.0, 0.0
        self.busy, self.taken = 0.0, 0.0  # cores used by engine and client, and by other programs
        self.ttft_us: list[float] = []
        self.errors: Counter[str] = Counter()


class Connection(asyncio.Protocol):
    """Asks, again and again; keeps each answer as it comes, and checks it when it is complete."""

    def __init__(self, tally: Tally) -> None:
        self.tally, self.request = tally, tally.load.request()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.tally.live += 1
        self.ask()

    def ask(self) -> None:
        self.raw, self.seen, self.asked_ns = bytearray(), 0, time.monotonic_ns()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now_ns, seen = time.monotonic_ns(), data.count(b"~")
        if self.tally.counting:
            self.tally.work += seen
            if seen and not self.seen and self.tally.load.stream:
                self.tally.ttft_us.append((now_ns - self.asked_ns) / 1e3)
        self.seen += seen
        self.raw += data
        if self.seen > 1 and not self.raw.endswith(LAST_CHUNK):
            return
        fault = flaw(bytes(self.raw), self.tally.load)
        if fault:
            self.tally.errors[fault] += 1
        if fault or (fault == "" and self.tally.stopping):
            self.asked_ns = 0
            self.transport.close()
        elif fault == "":
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self.tally.live -= 1
        if self.asked_ns:
            self.tally.errors[f"connection lost: {exc or 'closed'}"] += 1


def flaw(raw: bytes, load: Load) -> str | None:
    """What is wrong with an answer: "" if it is as the engine was told, None if it isn't all."""
    head, _, body = raw.partition(b"\r\n\r\n")
    length, parts, start, size = engine.LENGTH.search(head), [], 0, -1
    if len(body) < int(length[1]) if length else not body.endswith(LAST_CHUNK):
        return None
    if not head.startswith(b"HTTP/1.1 200 "):
        return repr(raw[:300])
    if length:
        parts, start, size = [body], int(length[1]), 0
    while size and (match := CHUNK.match(body, start)):
        size = int(match[1], 16)
        parts.append(body[match.end() : match.end() + size])
        start = match.end() + size + 2
        if body[start - 2 : start] != b"\r\n":
            return f"a chunk that doesn't end where it should: {body[:start][-40:]!r}"
    if size or start != len(body):
        return f"not a chunk, or beyond the end: {body[start:][:40]!r}"
    text = b"".join(parts)
    if not load.stream:
        return "" if b'"content":"~ a relay' in text and text.endswith(b"}}") else repr(text[:80])
    *events, done, rest = text.split(b"\n\n")
    if done + rest != b"data: [DONE]" or not all(e.startswith(b"data: {") for e in events):
        return f"not a stream of events that ends with [DONE]: {text[-80:]!r}"
    stamps, usage = STAMPS.findall(text), COMPLETION_TOKENS.findall(text)
    if len(stamps) != load.tokens or stamps != sorted(stamps) or usage != [b"%d" % load.tokens]:
        return f"{len(stamps)} tokens, in order: {stamps == sorted(stamps)}, usage: {usage}"
    return ""


class Target(NamedTuple):
    """What is asked: a process and its port. The engine itself is the target `direct`."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def spent(self) -> tuple[float, float]:
        """CPU seconds and resident MB of the process and all it has started."""
        tree, cpu_ns, pages = [self.process.pid], 0, 0
        for pid in tree:
            with contextlib.suppress(OSError):  # a process or thread that has just ended
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                for task in Path(f"/proc/{pid}/task").iterdir():
                    cpu_ns += int((task / "schedstat").read_text().split()[0])
                    tree += map(int, (task / "children").read_text().split())
        return cpu_ns / 1e9, pages * resource.getpagesize() / 1e6

    def clocks(self, engine: Target) -> list[float]:
        """Seconds until now: the time, the target's, engine's and client's, of cores not idle."""
        cores = os.sched_getaffinity(0) | os.sched_getaffinity(self.process.pid)
        rows = [row.split() for row in Path("/proc/stat").read_text().splitlines()]
        idle = sum(int(n) for row in rows if row[0] in {f"cpu{c}" for c in cores} for n in row[4:6])
        now_s, idle_s = time.monotonic(), idle / os.sysconf("SC_CLK_TCK")
        side_s = engine.spent()[0] + time.process_time()
        return [now_s, self.spent()[0], side_s, now_s * len(cores) - idle_s]

    def stop(self) -> None:
        """End the process, and then whatever is left in the group that begins with it."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut this short
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, number)
                self.process.wait(10)

    def failed(self, since_s: float, error: Exception) -> str:
        """Why it won't come up any more; nothing while it still may."""
        if self.process.poll() is None and time.monotonic() - since_s < START_S:
            return ""
        return f"{self.name} isn't ready: {error}\n{self.log.read_text()[-2000:]}"


def start(specs: list[str], stack: contextlib.ExitStack) -> list[Target]:
    """Start engine, nginx and gateways: the engine on the last core, the others on the first."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-")))
    folder.chmod(0o755)  # nginx's worker may be another user
    cores, targets = sorted(os.sched_getaffinity(0)), list[Target]()
    engine = f"direct=0={shlex.join([sys.executable, __file__])} --engine {{port}}"
    for name, wanted, command in (spec.split("=", 2) for spec in [engine, "nginx=0=nginx", *specs]):
        with socket.create_server(("127.0.0.1", int(wanted))) as free:
            port = free.getsockname()[1]
        home, engine_port = folder / name, targets[0].port if targets else port
        home.mkdir()
        text = f"nginx -p {home} -c {home}/conf" if command == "nginx" else command
        text, conf = (x.format(port=port, engine_port=engine_port) for x in (text, NGINX))
        (home / "conf").write_text(conf)
        os.sched_setaffinity(0, {cores[0 if targets else -1]})  # a child inherits it
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                shlex.split(text), stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )
        targets.append(Target(name, port, process, home / "log"))
        stack.callback(targets[-1].stop)
    os.sched_setaffinity(0, {cores[-1]})
    return targets


async def ready(target: Target, engine: Target) -> None:
    """Ask for a short stream until it comes."""
    since_s = time.monotonic()
    while True:
        try:
            await measure(target, Load(1, tokens=2), 0.1, engine)
            return
        except (OSError, RuntimeError) as error:
            if text := target.failed(since_s, error):
                raise RuntimeError(text) from error
        await asyncio.sleep(0.2)


async def measure(target: Target, load: Load, seconds: float, engine: Target) -> Tally:
    """Bring the load up, count for some seconds, let every answer end; raise if one was wrong."""
    tally, loop = Tally(load), asyncio.get_running_loop()
    ramp_s = max(load.seconds(), 0.5)
    async with asyncio.timeout(4 * ramp_s + TAIL_S):
        for _ in range(load.connections):
            await loop.create_connection(partial(Connection, tally), "127.0.0.1", target.port)
            await asyncio.sleep(ramp_s / load.connections)
    tally.counting, before = True, target.clocks(engine)
    await asyncio.sleep(seconds)
    tally.counting, tally.stopping, after = False, True, target.clocks(engine)
    wall_s, cpu_s, side_s, all_s = (b - a for a, b in zip(before, after, strict=True))
    tally.wall_s, tally.cpu_s, tally.rss_mb = wall_s, cpu_s, target.spent()[1]
    own_s = side_s if target is engine else side_s + cpu_s
    tally.busy, tally.taken = side_s / wall_s, (all_s - own_s) / wall_s
    limit_s = time.monotonic() + load.seconds() + TAIL_S
    while tally.live and time.monotonic() < limit_s:  # noqa: ASYNC110 - a count, not an event
        await asyncio.sleep(0.05)
    if tally.live:
        tally.errors["answer without an end"] += tally.live
    if tally.errors or not tally.work:
        rows = [f"{count} x {text}" for text, count in tally.errors.most_common(5)]
        raise RuntimeError("\n  ".join([f"{target.name}, {load}, {tally.work} done:", *rows]))
    return tally


async def rounds(targets: list[Target], repeat: int, seconds: float) -> Samples:
    """Every load on every target, again and again; disturbed measurements are repeated."""
    direct = targets[0]
    for target in targets:
        await ready(target, direct)
    busy = (await measure(direct, Load(STREAMS, 200, 20_000), 1, direct)).busy
    many, few = (min(STREAMS, int(STREAMS * x / busy)) // 10 * 10 for x in (FOR_CPU, FOR_TTFT))
    loads = {CHUNKS: Load(many, 200, 20_000), BURSTS: Load(many, 200, 40_000, 8)}
    loads |= {WHOLE: Load(32, stream=False), FIRST: Load(few, 100, 20_000)}
    samples: Samples = {target.name: {name: [] for name in loads} for target in targets}
    for turn, name in itertools.product(range(repeat), loads):
        for target in targets[:: -1 if turn % 2 else 1]:
            if target is direct and name != FIRST:
                continue
            tries = list[Tally]()
            while len(tries) < TRIES and all(t.taken > TAKEN for t in tries):
                tries.append(t := await measure(target, loads[name], seconds, direct))
                rates = f"{t.work / t.wall_s:,.0f}/s, {t.cpu_s / t.wall_s:.0%} of its core"
                rest = f"load side {t.busy:.0%}, other programs {t.taken:.0%}"
                say(f"round {turn + 1}/{repeat}  {target.name}, {name}: {rates}, {rest}")
            samples[target.name][name].append(min(tries, key=lambda t: t.taken))
    return samples


def figures(name: str, samples: Samples) -> dict[str, list[tuple[float, float]]]:
    """Each figure of a target and of nginx, from the rounds that no other program disturbed."""

    def clean(load: str) -> list[tuple[Tally, ...]]:
        names = [name, "nginx", *(["direct"] if load == FIRST else [])]
        together = zip(*(samples[n][load] for n in names), strict=True)
        return [tallies for tallies in together if all(t.taken <= TAKEN for t in tallies)]

    rows = {n: [(a.work / a.cpu_s, b.work / b.cpu_s) for a, b in clean(n)] for n in AT_LEAST}
    cuts = [[quantiles(t.ttft_us, n=100) for t in tallies] for tallies in clean(FIRST)]
    for figure, nth in ((TTFT_P50, 49), (TTFT_P99, 98)):
        rows[figure] = [(a[nth] - d[nth], b[nth] - d[nth]) for a, b, d in cuts]
    return rows | {"RSS, MB": [(a.rss_mb, b.rss_mb) for a, b in clean(CHUNKS)]}


def report(name: str, samples: Samples) -> None:
    many, few = (samples["nginx"][load][0].load.connections for load in (CHUNKS, FIRST))
    print(f"\nmedians of rounds, {many} streams with a token every 20 ms, {few} of them for TTFT")
    print(f"{'':24}{'nginx':>12}{name:>14}{'ratio':>8}  {'in rounds':12}goal")
    for figure, pairs in figures(name, samples).items():
        if not pairs:
            print(f"{figure:24}  not judged: other programs were running in every round")
            continue
        ratios = [mine / nginx if nginx > 0 else 0 for mine, nginx in pairs]
        value, base = (median(column) for column in zip(*pairs, strict=True))
        ratio, goal = median(ratios), ""
        if least := AT_LEAST.get(figure):
            goal = f">= {least:.2f} x  {'reached' if ratio >= least else 'NOT reached'}"
        elif most := AT_MOST.get(figure):
            goal = f"<= {most}  {'reached' if value <= most else 'NOT reached'}"
        span = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"{figure:24}{base:12,.0f}{value:14,.0f}{ratio:8.2f}  {span:12}{goal}".rstrip())
    for target, load in itertools.product(("nginx", name), samples[name]):
        full = sum(tally.busy > FULL for tally in samples[target][load])
        disturbed = sum(tally.taken > TAKEN for tally in samples[target][load])
        if full:
            print(f"{target}, {load}: engine and client were the bottleneck in {full} round(s)")
        if disturbed:
            print(f"{target}, {load}: other programs were running, {disturbed} round(s) dropped")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=3, help="rounds (3)")
    parser.add_argument("--seconds", type=float, default=3, help="counted for each load (3)")
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    parser.add_argument(
        "--target",
        action="append",
        metavar="NAME=PORT=COMMAND",
        help="a gateway to compare instead of tokenworks; {port} and {engine_port} are filled in, "
        "PORT 0 takes a free one; the command `nginx` starts a second nginx",
    )
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeat < 1 or not 1 <= args.seconds <= 60:
        parser.error("needs at least one round, of 1 to 60 seconds for each load")
    if any(spec.count("=") < 2 for spec in args.target or []):
        parser.error("--target takes NAME=PORT=COMMAND")
    gc.disable()  # its pauses would be measured
    if args.engine:
        uvloop.run(engine.Engine().serve(args.engine))
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        parser.error("needs Linux and two cores")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin"  # where nginx often is
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with contextlib.ExitStack() as stack:
            targets = start(args.target or [GATEWAY], stack)
            samples = uvloop.run(rounds(targets, args.repeat, args.seconds))
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        say(f"failed: {error or type(error).__name__}")
        return 1
    others = [name for name in samples if name not in {"direct", "nginx"}]
    for name in others:
        report(name, samples)
    if args.json:
        results = {"figures": {name: figures(name, samples) for name in others}, "samples": samples}
        args.json.write_text(json.dumps(results, default=vars))
    return 0


if __name__ == "__main__":
    sys.exit(main())
