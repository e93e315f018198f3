"""A live run on file, played again: a fresh scheduler says the same, byte for byte."""

import json
import signal
from pathlib import Path

import pytest

from tests.parity.stage import MODEL, Crowd, engines, fleet, other_hashes
from tests.support import Running, exchange, gateway, request_bytes, run, wait_for
from tokenworks.catalog.book import catalog
from tokenworks.errors import UserError
from tokenworks.gateway.parity import Parity, parity
from tokenworks.model import library


def played(data: bytes) -> Parity:
    return parity(data, "events", catalog(), library.shape)


def kinds(data: bytes) -> set[str]:
    """Events and commands in a log, and replicas added."""
    found: set[str] = set()
    for line in data.splitlines()[1:]:
        told = json.loads(line)
        if isinstance(told, dict):
            found |= set(told)
        else:
            found |= {each["type"] for each in [told[1], *told[2]] if each}
    return found


def batch(running: Running, lines: int) -> None:
    """A batch of so many short requests."""
    body = {"model": MODEL, "max_tokens": 300, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": "word"}]}
    document = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    text = "\n".join(json.dumps({**document, "custom_id": str(n)}) for n in range(lines))
    form = (
        '--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
        'content-disposition: form-data; name="file"; filename="f"\r\n\r\n'
        f"{text}\r\n--x--\r\n"
    )
    kind = "multipart/form-data; boundary=x"
    sent = exchange(running.address, request_bytes(form.encode(), "/v1/files", content_type=kind))
    wanted = {"input_file_id": sent.json["id"], "endpoint": "/v1/chat/completions"}
    answer = running.post({**wanted, "completion_window": "24h"}, "/v1/batches")
    assert answer.status == 200, answer.body


def test_a_live_run_with_everything_in_it(tmp_path: Path) -> None:
    path, log = tmp_path / "fleet.toml", tmp_path / "events"
    with engines(4) as all_of_them:
        urls = [each.url for each in all_of_them]
        fleet(path, urls[:3])
        with gateway("--fleet", str(path), "--events", str(log)) as running:
            batch(running, 80)
            crowd = Crowd(running.address, 40, tokens=200)
            wait_for(lambda: len(crowd.answers) >= 5)
            assert running.post({"cap_w": 900}, "/admin/cap").status == 200
            all_of_them[0].kill()
            wait_for(lambda: len(crowd.answers) >= 15)
            assert running.post({"cap_w": None}, "/admin/cap").status == 200
            fleet(path, urls[1:2] + urls[3:], "[classes.realtime]\nttft_ms = 900\n")
            reloaded = running.post({}, "/admin/reload")
            assert reloaded.status == 200, reloaded.body
            crowd.wait()
            more = Crowd(running.address, 20)
            more.wait()
            assert running.stop() == 0
    data = log.read_bytes()
    assert kinds(data) >= {
        "Arrived", "FirstToken", "Finished", "Stopped", "Cancelled", "Progress", "ReplicaUp",
        "ReplicaDown", "Drain", "PowerCapChanged", "RulesChanged", "added", "Accept", "Dispatch",
        "Abort",
    }  # fmt: skip
    assert b'"whole":true' in data  # the batch's lines; the crowd's are streams
    assert b'"whole":false' in data
    found = played(data)
    assert found.difference is None
    assert found.calls == data.count(b"\n") - 1 - data.count(b'\n{"added"')
    done = run("parity", str(log), **other_hashes())
    assert done.returncode == 0, done.stderr
    assert "byte for byte" in done.stdout
    lied = data.replace(
        b'"type":"Dispatch","id":3,"replica":', b'"type":"Dispatch","id":3,"replica":1'
    )
    wrong = played(lied)
    assert wrong.difference is not None
    assert b'"id":3' in wrong.difference.said


@pytest.mark.parametrize("route", ["round-robin", "power-of-two"])
def test_baselines_too_and_a_log_that_was_cut_off(tmp_path: Path, route: str) -> None:
    path, log = tmp_path / "fleet.toml", tmp_path / "events"
    with engines(2) as both:
        fleet(path, [each.url for each in both], f'policy = {{ route = "{route}" }}')
        with gateway("--fleet", str(path), "--events", str(log)) as running:
            Crowd(running.address, 12).wait()
            wait_for(lambda: running.working() == 0)
            wait_for(lambda: log.read_bytes().count(b'"Finished"') >= 8)
            running.stop(signal.SIGKILL)
    data = log.read_bytes()
    whole = data[: data.rindex(b"\n") + 1]
    calls = whole.count(b"\n") - 1
    assert (played(whole).calls, played(whole).difference) == (calls, None)
    assert played(whole[:-7]).calls == calls - 1


def test_what_is_no_log_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="events is empty"):
        played(b"")
    with pytest.raises(UserError, match="events:1"):
        played(b'{"tokenworks_trace":1}\n')
    with pytest.raises(UserError, match="tokenworks_events is 9"):
        played(b'{"tokenworks_events":9,"program":"","fleet":{"rules":{},"replicas":[]}}\n')
    done = run("parity", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
