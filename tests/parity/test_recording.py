"""A recording is a trace, and tells the twin what the fleet is like."""

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.parity.stage import Crowd, ask, engines, fleet
from tests.support import gateway, run, wait_for
from tokenworks.errors import UserError
from tokenworks.workload import read
from tokenworks.workload.lines import recorded


def test_a_recording_is_replayed_and_calibrated(tmp_path: Path) -> None:
    path, trace, out = tmp_path / "fleet.toml", tmp_path / "trace.jsonl", tmp_path / "out"
    with engines(2) as both:
        # Nobody can promise a tenth of a millisecond: every real-time request is refused.
        bounds = "[classes.realtime]\nttft_ms = 0.1\n"
        fleet(path, [each.url for each in both], bounds)
        with gateway("--fleet", str(path), "--record", str(trace)) as running:
            slow = Crowd(running.address, 1, tokens=2)
            slow.wait()
            Crowd(running.address, 120).wait()
            for answer in range(3):
                assert ask(running.address, "default", answer + 1, 10, leave=True)
            assert running.stop() == 0
    rows = recorded(trace.read_bytes(), "trace")
    assert len(rows) == 124
    assert [row.arrival_ns for row in rows] == sorted(row.arrival_ns for row in rows)
    outcomes = Counter(row.outcome for row in rows)
    assert outcomes["finished"] >= 35
    assert outcomes["cancelled"] >= 3
    assert outcomes["rejected"] >= 20
    assert {row.output_tokens for row in rows if row.outcome == "rejected"} == {0}
    assert all(row.ttft_ns > row.queue_ns >= 0 for row in rows if row.outcome == "finished")
    assert any(row.prefix for row in rows)
    found = read(trace.read_bytes(), "trace")
    assert found.skipped == sum(not row.output_tokens for row in rows)
    assert found.unsorted == 0
    told = tmp_path / "told.toml"
    done = run("calibrate", str(trace), "--out", str(told), "--json", "--against", str(trace))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {each["metric"] for each in document["errors"][str(trace)]} == {
        f"{name} {point}" for name in ("TTFT", "TPOT", "E2E") for point in ("p50", "p90")
    }
    assert "a token attended to" in document["notes"][0]
    assert "measured = " in told.read_text()
    again = run("replay", str(trace), "--fleet", str(told), "--out", str(out), "--json")
    assert again.returncode == 0, again.stderr
    statuses = json.loads(again.stdout)["summary"]["total"]["statuses"]
    # Of a run on a busy machine the twin is slow, too: it may refuse the odd one.
    assert sum(statuses.values()) == len(found)
    assert statuses["finished"] >= 0.9 * len(found)


def test_a_recording_cut_off_by_kill_reads_up_to_its_last_whole_line(tmp_path: Path) -> None:
    path, trace = tmp_path / "fleet.toml", tmp_path / "trace.jsonl"
    with engines(1) as (one,):
        fleet(path, [one.url])
        with gateway("--fleet", str(path), "--record", str(trace)) as running:
            Crowd(running.address, 12).wait()
            wait_for(lambda: trace.read_bytes().count(b"\n") >= 12)
            running.stop(signal.SIGKILL)
    data = trace.read_bytes()
    whole = data[: data.rindex(b"\n") + 1]
    count = len(recorded(whole, "trace"))
    assert count >= 11
    for cut in (1, 7, 40):
        assert len(recorded(whole[:-cut], "trace")) == count - (cut > 1)
        assert len(read(whole[:-cut], "trace")) <= count


def test_a_fleet_that_changed_is_told_in_the_middle() -> None:
    header = b'{"tokenworks_trace":1,"fleet":{}}\n'
    line = b'{"arrival_ns":5,"prompt_tokens":3,"output_tokens":2}\n'
    assert len(read(header + line + header + line, "trace")) == 2
    broken = header + line[:20] + b"\n" + line
    with pytest.raises(UserError, match="trace:2"):
        read(broken, "trace")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"tokenworks_trace":1}\n', "does not tell of the fleet"),
        ('{"timestamp":1,"input_length":2,"output_length":3}\n', "is no recording"),
        ("", "is no recording"),
    ],
)
def test_what_can_not_be_calibrated_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    trace = tmp_path / "trace"
    trace.write_text(text)
    done = run("calibrate", str(trace))
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
