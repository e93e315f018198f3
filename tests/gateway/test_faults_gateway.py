"""Faults of the gateway and of its machine: killed with answers under way, told to stop, a full
disk, a clock that is put forward and back. Each request has one row in the end.
"""

import asyncio
import resource
import signal
import threading
import time
from collections import Counter
from pathlib import Path

from tests.gateway.faulty import (
    Plant,
    Told,
    ask,
    body,
    crowd,
    engines,
    faults,
    fleet_file,
    plant,
    rows_in,
)
from tests.gateway.faulty import prompt as fresh
from tests.support import gateway, wait_for

STREAMS, TOKENS = 20, 40


class Crowd(threading.Thread):
    """So many streams, in a thread of their own."""

    def __init__(self, address: tuple[str, int], count: int = STREAMS) -> None:
        super().__init__()
        self.address, self.count = address, count
        self.answers: list[Told] = []
        self.start()

    def run(self) -> None:
        self.answers = asyncio.run(crowd(self.address, self.count, TOKENS))

    def are_running(self, factory: Plant) -> None:
        wait_for(lambda: sum(e.running() for e in factory.engines) >= self.count, 20)
        time.sleep(0.3)


def test_requests_of_a_killed_gateway_are_closed_by_the_next(tmp_path: Path) -> None:
    with engines(1, slow=4) as (engine,):
        more = f'[ledger]\nfolder = "{tmp_path / "ledger"}"\n'
        path = str(fleet_file(tmp_path, [engine.url], more))
        with gateway("--fleet", path) as running:
            before = asyncio.run(crowd(running.address, 5, 3))
            orphans = Crowd(running.address)
            orphans.are_running(Plant(running, [engine], tmp_path))
            running.stop(signal.SIGKILL)
            orphans.join()
        assert all(told.id and not told.is_whole for told in orphans.answers)
        wait_for(lambda: engine.running() == 0, 20)  # nobody waits for them any more
        with gateway("--fleet", path) as running:
            assert asyncio.run(ask(running.address, 3)).is_whole
            wait_for(lambda: len(rows_in(tmp_path)) == 5 + STREAMS + 1, 20)
        rows = {row["id"]: row for row in rows_in(tmp_path)}
        ends = {(rows[told.id]["outcome"], rows[told.id]["reason"]) for told in orphans.answers}
        assert ends == {("failed", "gateway_restart")}
        assert {rows[told.id]["outcome"] for told in before} == {"finished"}


def test_a_gateway_told_to_stop_answers_what_it_has_and_sends_others_away(tmp_path: Path) -> None:
    with plant(tmp_path, 2, slow=4) as found:
        running = Crowd(found.gateway.address)
        running.are_running(found)
        found.gateway.process.send_signal(signal.SIGTERM)
        told = []

        def is_refused() -> bool:
            told.append(found.gateway.post(body(fresh(), 3)))
            return told[-1].status == 503

        wait_for(is_refused, 5)
        refused = told[-1]
        assert refused.error["code"] == "shutting_down"
        found.engines[0].end(signal.SIGKILL)  # and what is lost meanwhile goes on elsewhere
        running.join()
        assert faults(running.answers) == Counter()
        assert found.gateway.process.wait(20) == 0
        rows = Counter(row["outcome"] for row in found.rows())
        assert rows == {"finished": STREAMS + len(told) - 1, "failed": 1}


def test_nothing_is_served_that_the_disk_has_no_room_for(tmp_path: Path) -> None:
    with plant(tmp_path, 1, slow=4) as found:
        pid = found.gateway.process.pid
        running = Crowd(found.gateway.address)
        running.are_running(found)
        _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (16, most))  # as a disk that is full
        refused = [found.gateway.post(body(fresh(), 3)) for _ in range(3)]
        assert {answer.status for answer in refused} == {503}
        assert {answer.error["code"] for answer in refused} == {"ledger_unavailable"}
        running.join()  # what was let in before is served
        assert faults(running.answers) == Counter()
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
        again = []

        def works() -> bool:
            again.append(found.gateway.post(body(fresh(), 3)))
            return again[-1].status == 200

        wait_for(works, 10)
        rows = found.settled(STREAMS + len(refused + again))
        ids = Counter(row["id"] for row in rows)
        asked = [told.id for told in running.answers]
        assert ids == Counter(asked + [a.headers["x-request-id"] for a in refused + again])
        assert Counter(row["status"] for row in rows)[503] == len(refused + again) - 1


_CLOCK = """
import os, time
_ns, _s = time.time_ns, time.time
def _step():
    try:
        return int(open(os.environ["CLOCK_STEP"]).read() or 0)
    except OSError:
        return 0
time.time_ns = lambda: _ns() + _step() * 10**9
time.time = lambda: _s() + _step()
"""


def test_a_clock_that_jumps_changes_time_stamps_only(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_CLOCK)
    step = tmp_path / "step"
    paths = {"PYTHONPATH": str(tmp_path), "CLOCK_STEP": str(step)}
    day_s = 86_400
    with plant(tmp_path, 2, slow=4, **paths) as found:
        for jump_s in (day_s, -day_s):
            running = Crowd(found.gateway.address)
            running.are_running(found)
            step.write_text(str(jump_s))
            running.join()
            assert faults(running.answers) == Counter()
            told = asyncio.run(ask(found.gateway.address, 3))
            assert told.is_whole
        rows = found.settled(2 * STREAMS + 2)
        assert {row["outcome"] for row in rows} == {"finished"}
        assert all(0 < row["total_ns"] < 60 * 10**9 for row in rows)
        assert all(0 <= row["queue_ns"] < row["ttft_ns"] for row in rows)
        stamps = [row["unix_ns"] for row in rows]
        assert max(stamps) - min(stamps) > day_s * 10**9  # so it did jump
