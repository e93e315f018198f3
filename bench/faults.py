"""Faults, counted as the clients see them: engines and gateways killed, hung, slowed, cut off.

    python bench/faults.py                        # all of them, about ten minutes on two cores
    python bench/faults.py --only kill,hang       # those whose name has one of these words

Each fault meets some hundred streams that run through a gateway over two or three emulated engines,
all of them processes of their own. An emulated engine's words follow from the prompt, so that a
client knows its answer beforehand: a token twice, missing or wrong is found, whichever engines made
it. After each fault the ledger's rows are compared with the requests. Goals: no stream lost that
can go on, no wrong word, as many rows as requests, memory flat. Missing one: exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.gateway.faulty import (
    MODEL,
    Plant,
    Told,
    body,
    crowd,
    engines,
    fleet_file,
    plant,
    prompt,
    rows_in,
    wanted,
)
from tests.support import Client, Running, gateway, request_bytes, wait_for

SLOW = 8  # so that an emulated H100 says a token in about 60 ms, as a full one does
TOKENS = 80


class Line(NamedTuple):
    """A fault's line of the table. `lost` of those that could go on."""

    asked: int
    whole: int
    lost: int
    wrong: int  # in words or usage
    rows: int
    moved: int
    wait_s: float  # the longest that a client heard nothing
    grown_bytes: int
    told: str = ""
    may_grow_bytes: int = 32 << 20

    @property
    def is_good(self) -> bool:
        return not self.lost and not self.wrong and self.rows == self.asked and self.is_flat

    @property
    def is_flat(self) -> bool:
        return self.grown_bytes < self.may_grow_bytes


def counted(
    found: Plant,
    answers: list[Told],
    before: int,
    *,
    apart: int = 0,
    told: str = "",
    asked: int = 0,
) -> Line:
    """What became of these requests. `apart`: ended as they had to; `asked`: with all others."""
    asked = asked or len(answers)
    with contextlib.suppress(AssertionError):
        wait_for(lambda: len(rows_in(found.state)) >= asked, 15)
    time.sleep(0.5)  # for a row too many to show
    rows = rows_in(found.state)
    bad = [each for each in answers if not each.is_whole]
    wrong = sum("wrong text" in each.fault or "usage" in each.fault for each in bad)
    for fault, count in Counter(each.fault for each in bad).most_common(3):
        print(f"    {count} x {fault}", file=sys.stderr)
    alive = found.gateway.process.poll() is None
    return Line(
        asked,
        len(answers) - len(bad),
        len(bad) - wrong - apart,
        wrong,
        len({row["id"] for row in rows}) if len({r["id"] for r in rows}) == len(rows) else -1,
        sum(row["moves"] > 0 for row in rows),
        max((each.gap_s for each in answers), default=0.0),
        found.gateway.memory_bytes() - before if alive else 0,
        told,
    )


@contextlib.contextmanager
def factory(count: int = 2, **given: Any) -> Iterator[tuple[Plant, int]]:
    """A warm gateway, and its memory then. What it answered before is not in `rows_in`'s way."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        given.setdefault("slow", SLOW)
        with plant(Path(folder), count, more="[limits]\nqueue = 4096\n", **given) as found:
            yield found, found.gateway.memory_bytes()


def under(
    streams: int,
    act: Callable[[Plant, int], object],
    count: int = 2,
    after_s: float = 1,
    **more: Any,
) -> Line:
    """So many streams, and in the midst of them `act` on the engine that has most of them."""
    with factory(count) as (found, before):

        def act_later() -> None:
            wait_for(lambda: sum(e.running() for e in found.engines) >= 0.9 * streams, 60)
            time.sleep(after_s)
            act(found, max(range(count), key=lambda at: found.engines[at].running()))

        actor = threading.Thread(target=act_later)
        actor.start()
        answers = asyncio.run(crowd(found.gateway.address, streams, TOKENS, **more))
        actor.join()
        apart = sum((each.error or {}).get("code") == "not_resumable" for each in answers)
        told = f"{apart} can't go on, and were told so" if apart else ""
        return counted(found, answers, before, apart=apart, told=told)


def ordered(streams: int, kind: str, times: int, **more: Any) -> Line:
    """So many streams, of which engines were told to spoil some."""
    with factory() as (found, before):
        for engine in found.engines:
            engine.hurt(kind, times=times, **more)
        answers = asyncio.run(crowd(found.gateway.address, streams, TOKENS))
        return counted(found, answers, before)


# Engines


def nothing(streams: int) -> Line:
    """nothing (for comparison)"""
    return under(streams, lambda _found, _at: None)


def kill(streams: int) -> Line:
    """engine kill -9, 1 of 2"""
    return under(streams, lambda found, at: found.engines[at].end(signal.SIGKILL))


def kill_of_three(streams: int) -> Line:
    """engine kill -9, 1 of 3"""
    return under(streams, lambda found, at: found.engines[at].end(signal.SIGKILL), 3)


def kill_two(streams: int) -> Line:
    """engine kill -9, 2 of 3, a second apart"""

    def act(found: Plant, at: int) -> None:
        found.engines[at].end(signal.SIGKILL)
        time.sleep(1)
        left = [engine for engine in found.engines if engine.process.poll() is None]
        max(left, key=lambda engine: engine.running()).end(signal.SIGKILL)

    return under(streams, act, 3)


def restart(streams: int) -> Line:
    """engine stopped and started again"""

    def act(found: Plant, at: int) -> None:
        found.engines[at].end(signal.SIGTERM)
        found.engines[at].start()

    return under(streams, act)


def alone(streams: int) -> Line:
    """the only engine kill -9, started again"""

    def act(found: Plant, at: int) -> None:
        found.engines[at].end(signal.SIGKILL)
        found.engines[at].start()

    return under(streams, act, 1)


def hang(streams: int) -> Line:
    """engine hangs, connections open, calls itself well"""
    return under(streams, lambda found, at: found.engines[at].hurt("hang"))


def hang_whole(streams: int) -> Line:
    """the same, answers that are not streamed"""
    more = {"stream": False, "patience_s": 180}
    return under(streams // 3, lambda found, at: found.engines[at].hurt("hang"), **more)


def hang_alone(streams: int) -> Line:
    """the only engine hangs for 8 s"""

    def act(found: Plant, at: int) -> None:
        found.engines[at].hurt("hang")
        time.sleep(8)
        found.engines[at].hurt("wake")

    return under(streams, act, 1)


def slow_down(streams: int) -> Line:
    """engine 10 times slower for 10 s"""

    def act(found: Plant, at: int) -> None:
        found.engines[at].hurt("slow", factor=10 * SLOW)
        time.sleep(10)
        found.engines[at].hurt("slow", factor=SLOW)

    return under(streams, act)


def reset(streams: int) -> Line:
    """connections reset in mid-chunk"""
    return ordered(streams, "reset", streams // 3, after=20)


def malformed(streams: int) -> Line:
    """events that are no JSON"""
    return ordered(streams, "malformed", streams // 3, after=20)


def wrong_usage(streams: int) -> Line:
    """usage above what was asked for"""
    return ordered(streams, "wrong_usage", streams // 3)


def refuse(streams: int) -> Line:
    """one of two engines answers 503 to all"""
    with factory() as (found, before):
        found.engines[0].hurt("refuse", times=10 * streams)
        answers = asyncio.run(crowd(found.gateway.address, streams, TOKENS))
        return counted(found, answers, before)


def stuck(streams: int) -> Line:
    """engine kill -9, requests with a JSON schema"""
    # When all have said something: what has not can begin anew elsewhere.
    more: dict[str, Any] = {"structured_outputs": {"json": {"type": "object"}}, "after_s": 3}
    return under(streams // 3, lambda found, at: found.engines[at].end(signal.SIGKILL), **more)


def hedge(streams: int) -> Line:
    """real-time, the engine that is asked first hangs"""
    del streams
    with factory(slow=1) as (found, before):
        found.engines[0].hurt("hang")
        answers = asyncio.run(crowd(found.gateway.address, 20, 10, service_tier="priority"))
        line = counted(found, answers, before)
        hedged = sum(row["hedged"] for row in rows_in(found.state))
        return line._replace(told=f"{hedged} hedged, each answered once")


# Clients


def hang_ups(streams: int) -> Line:
    """clients hang up, before the first token and after"""

    async def leave(found: Plant, after: int) -> None:
        reader, writer = await asyncio.open_connection(*found.gateway.address)
        writer.write(request_bytes(body(prompt(), 2000)))
        if after:
            await reader.readuntil(b"data: ")
        await asyncio.sleep(0.5)
        writer.close()

    async def all_leave(found: Plant) -> None:
        await asyncio.gather(*[leave(found, number % 2) for number in range(streams)])

    with factory() as (found, before):
        asyncio.run(all_leave(found))
        wait_for(lambda: sum(e.running() for e in found.engines) == 0, 20)
        line = counted(found, [], before, asked=streams)
        ends = Counter(row["outcome"] for row in rows_in(found.state))
        return line._replace(told=f"{ends['cancelled']} cancelled, engines free at once")


def idle(streams: int) -> Line:
    """5,000 idle connections beside the streams"""
    with factory() as (found, before), contextlib.ExitStack() as stack:
        for _ in range(5000):
            stack.enter_context(socket.create_connection(found.gateway.address))
        answers = asyncio.run(crowd(found.gateway.address, streams, TOKENS))
        line = counted(found, answers, before)
        told = f"{line.grown_bytes / 5000 / 1024:.1f} KiB a connection"
        return line._replace(told=told, may_grow_bytes=5000 * 16 << 10)


def slow_readers(streams: int) -> Line:
    """100 clients that read nothing for 10 s, 3,000 tokens each"""
    del streams

    async def read_late(found: Plant) -> str:
        content = prompt()
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(found.gateway.address)
        reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
        writer.write(request_bytes(body(content, 3000)))
        await asyncio.sleep(10)
        data = b""
        while not data.endswith(b"\r\n0\r\n\r\n"):
            more = await reader.read(65536)
            if not more:
                break
            data += more
        writer.close()
        events = [part.partition(b"\n\n")[0] for part in data.split(b"data: ")[1:]]
        found_text = "".join(
            choice["delta"].get("content") or ""
            for event in events
            if event != b"[DONE]"
            for choice in json.loads(event).get("choices", ())
        )
        return "" if found_text == wanted(content, 3000) else "wrong text"

    async def all_read(found: Plant) -> list[str]:
        return list(await asyncio.gather(*[read_late(found) for _ in range(100)]))

    with factory(slow=0.5) as (found, before):
        most, is_over = [before], threading.Event()

        def look() -> None:
            while not is_over.wait(0.2):
                most.append(found.gateway.memory_bytes())

        watcher = threading.Thread(target=look)
        watcher.start()
        told = asyncio.run(all_read(found))
        is_over.set()
        watcher.join()
        answers = [Told(fault=each) for each in told]
        line = counted(found, answers, before)
        return line._replace(grown_bytes=max(most) - before, told="memory: the most at any time")


def slow_writers(streams: int) -> Line:
    """clients that send their request in 40 pieces over 8 s"""

    async def write_slowly(found: Plant) -> Told:
        content, told = prompt(), Told()
        reader, writer = await asyncio.open_connection(*found.gateway.address, limit=1 << 20)
        data = request_bytes(body(content, 20))
        size = -(-len(data) // 40)
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
            await asyncio.sleep(0.2)
        answer = await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        said = answer.count(b'"content":" ')
        told.fault = "" if answer.startswith(b"HTTP/1.1 200") and said >= 1 else "no answer"
        return told

    async def all_write(found: Plant) -> list[Told]:
        return list(await asyncio.gather(*[write_slowly(found) for _ in range(streams)]))

    with factory() as (found, before):
        return counted(found, asyncio.run(all_write(found)), before)


def refusals(streams: int) -> Line:
    """200 refusals a second for 40 s"""
    del streams
    data = request_bytes(body(prompt(), 20, service_tier="priority"), x_slo_ttft_ms="0.001")
    with factory(1) as (found, _), Client(found.gateway.address) as client:
        statuses: Counter[int] = Counter()

        def some(count: int) -> None:
            began_s = time.monotonic()
            for number in range(count):
                client.send(data)
                statuses[client.answer().status] += 1
                time.sleep(max(began_s + number / 200 - time.monotonic(), 0))

        some(4000)  # until what is kept of the last rows is full
        before = found.gateway.memory_bytes()
        some(4000)
        line = counted(found, [], before, asked=8000)
        return line._replace(told=f"{dict(statuses)}; memory from the 20th second on")


# The gateway


def drain(streams: int) -> Line:
    """SIGTERM with streams running, an engine killed meanwhile"""
    with factory() as (found, before):
        answers: list[Told] = []

        def run() -> None:
            answers.extend(asyncio.run(crowd(found.gateway.address, streams, TOKENS)))

        runner = threading.Thread(target=run)
        runner.start()
        wait_for(lambda: sum(e.running() for e in found.engines) >= 0.9 * streams, 60)
        time.sleep(1)
        found.gateway.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        refused = found.gateway.post(body(prompt(), 5))
        max(found.engines, key=lambda engine: engine.running()).end(signal.SIGKILL)
        runner.join()
        code = found.gateway.process.wait(30)
        line = counted(found, answers, before, asked=streams + 1)
        told = f"new work: {refused.status} {refused.error['code']}; exit code {code}"
        return line._replace(told=told)


def gateway_killed(streams: int) -> Line:
    """gateway kill -9 with streams running, started again"""
    with tempfile.TemporaryDirectory(prefix="faults-") as name, engines(2, slow=SLOW) as two:
        folder = Path(name)
        more = f'[limits]\nqueue = 4096\n[ledger]\nfolder = "{folder / "ledger"}"\n'
        path = str(fleet_file(folder, [engine.url for engine in two], more))
        answers: list[Told] = []
        with gateway("--fleet", path) as running:

            def run() -> None:
                answers.extend(asyncio.run(crowd(running.address, streams, TOKENS)))

            runner = threading.Thread(target=run)
            runner.start()
            wait_for(lambda: sum(e.running() for e in two) >= 0.9 * streams, 60)
            running.stop(signal.SIGKILL)
            runner.join()
        wait_for(lambda: sum(engine.running() for engine in two) == 0, 20)
        with gateway("--fleet", path) as running:
            before = running.memory_bytes()
            after = asyncio.run(crowd(running.address, 20, 5))
            found = Plant(running, two, folder / "ledger")
            line = counted(found, after, before, asked=streams + 20)
            ends = Counter(row["reason"] for row in rows_in(folder / "ledger"))
            told = f"{ends['gateway_restart']} closed as gateway_restart, engines free"
            return line._replace(told=told)


def batch_killed(streams: int) -> Line:
    """gateway kill -9 during a batch of 5,000 lines, twice"""
    del streams
    count = 5000
    with tempfile.TemporaryDirectory(prefix="faults-") as name, engines(2, slow=0.5) as two:
        folder = Path(name)
        more = f'[ledger]\nfolder = "{folder / "ledger"}"\n'
        path = str(fleet_file(folder, [engine.url for engine in two], more))
        lines = [
            json.dumps(
                {
                    "custom_id": f"line-{number}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {
                        "model": MODEL,
                        "messages": [{"role": "user", "content": f"Line {number}"}],
                        "max_tokens": 8,
                        "ignore_eos": True,
                    },
                }
            )
            for number in range(count)
        ]
        batch = ""
        for goal in (count // 3, 2 * count // 3):
            with gateway("--fleet", path) as running:
                batch = batch or _submit(running, "\n".join(lines).encode())["id"]
                wait_for(partial(_has, running, batch, goal), 120)
                running.stop(signal.SIGKILL)
        with gateway("--fleet", path) as running:
            before = running.memory_bytes()
            wait_for(partial(_has, running, batch, count), 120)
            wait_for(lambda: _get(running, f"/v1/batches/{batch}")["status"] == "completed", 60)
            file = _get(running, f"/v1/batches/{batch}")["output_file_id"]
            output = _get_raw(running, f"/v1/files/{file}/content").splitlines()
            said = {each["custom_id"]: each for each in map(json.loads, output)}
            answers = [
                Told(fault="" if _text(each) == wanted(f"Line {name[5:]}", 8) else "wrong text")
                for name, each in said.items()
            ]
            holder = Plant(running, two, folder / "ledger")
            told = f"{len(output):,} lines in the output"
            return counted(holder, answers, before, asked=count, told=told)


def _has(running: Running, batch: str, goal: int) -> bool:
    """Whether so many lines of a batch are done."""
    return bool(_get(running, f"/v1/batches/{batch}")["request_counts"]["completed"] >= goal)


def _text(line: dict[str, Any]) -> str:
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


def _submit(running: Running, data: bytes) -> dict[str, Any]:
    mark = "m4rk"
    parts = (
        f'--{mark}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{mark}\r\n'
        'content-disposition: form-data; name="file"; filename="b.jsonl"\r\n'
        "content-type: application/jsonl\r\n\r\n"
    ).encode()
    form = parts + data + f"\r\n--{mark}--\r\n".encode()
    kind = f"multipart/form-data; boundary={mark}"
    file = running.post(form, "/v1/files", content_type=kind).json
    order = {
        "input_file_id": file["id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    return dict(running.post(order, "/v1/batches").json)


def _get_raw(running: Running, path: str) -> bytes:
    with Client(running.address) as client:
        client.send(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        return client.answer().body


def _get(running: Running, path: str) -> dict[str, Any]:
    return dict(json.loads(_get_raw(running, path)))


def disk_full(streams: int) -> Line:
    """disk full for 3 s (a file system of 2 MB; else a limit on files)"""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        disk = folder / "state"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
        is_disk = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        try:
            with plant(folder, 2, more="[limits]\nqueue = 4096\n", slow=SLOW) as found:
                return _fill(found, disk, streams, is_disk=is_disk)
        finally:
            if is_disk:
                subprocess.run(["umount", str(disk)], check=False)


def _fill(found: Plant, disk: Path, streams: int, *, is_disk: bool) -> Line:
    before = found.gateway.memory_bytes()
    pid, answers, refused = found.gateway.process.pid, list[Told](), list[int]()

    def run() -> None:
        answers.extend(asyncio.run(crowd(found.gateway.address, streams, TOKENS)))

    runner = threading.Thread(target=run)
    runner.start()
    wait_for(lambda: sum(e.running() for e in found.engines) >= 0.9 * streams, 60)
    time.sleep(1)
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    if is_disk:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", 0) as filler:
            while True:
                filler.write(bytes(4096))
    else:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (16, most))
    end_s = time.monotonic() + 3
    while time.monotonic() < end_s:
        refused.append(found.gateway.post(body(prompt(), 3)).status)
        time.sleep(0.02)
    if is_disk:
        (disk / "filler").unlink()
    else:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    runner.join()

    def works() -> bool:
        refused.append(found.gateway.post(body(prompt(), 3)).status)
        return refused[-1] == 200

    wait_for(works, 10)
    told = f"{'ENOSPC' if is_disk else 'EFBIG'}; meanwhile {dict(Counter(refused))}"
    return counted(found, answers, before, asked=streams + len(refused), told=told)


FAULTS: list[Callable[[int], Line]] = [
    nothing, kill, kill_of_three, kill_two, restart, alone, hang, hang_whole, hang_alone, slow_down,
    reset, malformed, wrong_usage, refuse, stuck, hedge, hang_ups, idle, slow_readers, slow_writers,
    refusals, drain, gateway_killed, batch_killed, disk_full,
]  # fmt: skip


def main() -> int:
    """Run them and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    words = [word for word in arguments.only.split(",") if word]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16384)), hard))
    print(
        "| fault | requests | whole | lost | wrong | rows | moved | longest wait, s | memory, MB "
        "| |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    failed = 0
    for fault in FAULTS:
        if words and not any(word in fault.__name__ for word in words):
            continue
        try:
            line = fault(arguments.streams)
        except (AssertionError, OSError, EOFError, KeyError) as error:
            print(f"| {fault.__doc__} | did not run: {type(error).__name__} {error} |", flush=True)
            failed += 1
            continue
        failed += not line.is_good
        verdict = "" if line.is_good else " **NOT as it shall be**"
        print(
            f"| {fault.__doc__} | {line.asked:,} | {line.whole:,} | {line.lost} | {line.wrong} "
            f"| {line.rows:,} | {line.moved} | {line.wait_s:.1f} | {line.grown_bytes / 1e6:+.1f} "
            f"| {line.told}{verdict} |",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
