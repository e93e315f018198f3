"""A gateway that is killed in the middle of a batch: one output and one charge for each line."""

import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

from openai import OpenAI

from tests.gateway.batch_factory import Inside, factory
from tests.gateway.test_batch import begin, client, counts, finish, line, results
from tests.support import wait_for


def test_killed_again_and_again(tmp_path: Path) -> None:
    lines = 2000
    # How many lines are done more when it is killed; at the first time the file is being checked.
    kills = [0, 1, 100, 300, 50, 200]
    models = ["flaky" if number % 50 == 0 else "echo" for number in range(lines)]
    content = b"".join(line(number, model) for number, model in enumerate(models))
    batch_id = None
    for start in range(len(kills) + 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gateway.batch_factory", str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url
            api = OpenAI(base_url=f"{url}/v1", api_key="alice", max_retries=0)
            if batch_id is None:
                content = b"".join(
                    line(n, "flaky" if n % 50 == 0 else "echo") for n in range(lines)
                )
                batch_id = begin(api, content).id
            batch = api.batches.retrieve(batch_id)
            if start < len(kills):
                goal = sum(counts(api, batch)) + kills[start]
                wait_for(lambda: sum(counts(api, batch)) >= goal)  # noqa: B023
                assert sum(counts(api, batch)) < lines
                process.send_signal(signal.SIGKILL)
            else:
                ended = finish(api, batch)
                told = [entry["custom_id"] for entry in results(api, ended.output_file_id)]
                process.send_signal(signal.SIGTERM)
            process.wait(30)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    assert ended.status == "completed"
    assert ended.request_counts is not None
    assert ended.request_counts.model_dump() == {"total": lines, "completed": lines, "failed": 0}
    assert told == [f"line-{n}" for n in range(lines)]
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        outputs = [json.loads(row[0]) for row in db.execute("SELECT text FROM batch_outputs")]
        charged = db.execute("SELECT id, outcome, batch, output_tokens FROM requests").fetchall()
    assert len(outputs) == lines
    assert sorted(row[0] for row in charged) == sorted(entry["id"] for entry in outputs)
    assert {row[1:] for row in charged} == {("finished", batch_id, 2)}
    assert ended.usage is not None
    assert (ended.usage.input_tokens, ended.usage.output_tokens) == (4 * lines, 2 * lines)


def test_fifty_thousand_lines(tmp_path: Path) -> None:
    lines = 50_000
    inside = Inside(slots=256, each_s=0.001)
    with factory(tmp_path, inside) as live:
        api = client(live)
        ended = finish(api, begin(api, b"".join(line(n) for n in range(lines))))
        assert ended.status == "completed"
        told = [entry["custom_id"] for entry in results(api, ended.output_file_id)]
        assert told == [f"line-{n}" for n in range(lines)]
        assert inside.most <= 256
        assert len(inside.begun) == lines
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM requests").fetchone() == (lines,)
