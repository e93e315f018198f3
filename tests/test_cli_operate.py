"""`tokenworks top`, `reload` and `cap`: what they show, and each no as one line."""

import http.server
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from rich.console import Console

from tests.support import Running, run, wait_for
from tokenworks.cli.operate import watts_of
from tokenworks.cli.top import frame, rates_of
from tokenworks.errors import UserError

ASK = {"model": "scripted", "messages": [{"role": "user", "content": "good"}], "stream": True}


@pytest.mark.parametrize(
    ("text", "watts"),
    [("900W", 900), ("2.5kW", 2500), ("1200", 1200), ("3 MW", 3e6), ("0.5kw", 500), ("none", None)],
)
def test_power_as_people_write_it(text: str, watts: float | None) -> None:
    assert watts_of(text) == watts


@pytest.mark.parametrize("text", ["0", "-3kW", "much", "2.5kWh", "1e3", "", "None", "kW"])
def test_what_is_no_power_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no power"):
        watts_of(text)


NOWHERE = ["--url", "http://127.0.0.1:1"]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["top", *NOWHERE], "no gateway answers at http://127.0.0.1:1"),
        (["reload", *NOWHERE], "no gateway answers at http://127.0.0.1:1"),
        (["cap", "2.5kW", *NOWHERE], "no gateway answers at http://127.0.0.1:1"),
        (["cap", "--url", "ftp://x"], "no http or https URL"),
        (["reload", "--url", "http://[x"], "no http or https URL"),
        (["top", *NOWHERE, "--key-env", "NO_SUCH"], "--key-env NO_SUCH"),
        (["cap", "lots", *NOWHERE], "'lots' is no power"),
    ],
)
def test_no_gateway_is_one_line(command: list[str], told: str) -> None:
    done = run(*command)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert told in line


@contextmanager
def page(status: int, body: bytes) -> Iterator[str]:
    """Something that listens and is no gateway."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"<html>"), (404, b"no"), (302, b""), (500, b'{"error": "oh"}')]
)
def test_what_is_no_gateway_is_one_line(status: int, body: bytes) -> None:
    with page(status, body) as url:
        done = run("reload", "--url", url)
    assert done.returncode == 2
    assert f"{url} answers {status}, and not as a gateway does" in done.stderr


def test_cap_and_reload_say_what_is_now(relay: Running) -> None:
    url = relay.url
    assert run("cap", "2.5kW", "--url", url).stdout.startswith("cap 2,500 W, ")
    assert run("cap", "--url", f"{url}/v1").stdout.startswith("cap 2,500 W, ")
    assert run("cap", "none", "--url", url).stdout.startswith("no cap, ")
    assert run("reload", "--url", url).stdout == "0 replicas added, 0 draining, 1 kept\n"


def test_top_shows_one_frame_or_json(relay: Running) -> None:
    relay.post(ASK)
    shown = run("top", "--once", "--url", relay.url)
    assert shown.returncode == 0, shown.stderr
    for word in (relay.url, "openai-0", "ready", "standard", "TTFT p50", "promises kept", "power:"):
        assert word in shown.stdout, word
    state = json.loads(run("top", "--json", "--url", relay.url).stdout)
    assert state["engines"][0]["name"] == "openai-0"
    wrong = run("top", "--every", "0", "--url", relay.url)
    assert (wrong.returncode, "--every" in wrong.stderr) == (2, True)


def test_top_is_live_and_ctrl_c_ends_it_cleanly(relay: Running) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tokenworks", "top", "--url", relay.url, "--every", "0.1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                seen.extend(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        wait_for(lambda: seen.count(b"openai-0") >= 3, 30)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        reader.join(5)
        os.close(ours)
    assert b"Traceback" not in seen
    assert b"\x1b[?1049l" in seen  # the screen of before is back


STATE: dict[str, Any] = {
    "up_s": 3725.0, "draining": True, "ledger": "broken", "waiting": 3,
    "power": {"cap_w": 2500.0, "drawn_w": 1234.5, "reserved_w": 2000.0},
    "engines": [
        {
            "name": "gpu-0", "model": "m", "kind": "vllm", "processor": "h100", "state": "down",
            "address": "http://h:1", "running": 7, "slots": 256, "tokens": 500,
            "detail": "it takes no connection", "watts": 650.0,
            "telemetry": {"running": 7, "waiting": 2, "kv_fraction": 0.41},
            "joules": {"meter": 5000.0},
        },
        {
            "name": "far-0", "model": "m", "kind": "openai", "processor": "", "state": "ready",
            "address": "http://h:2", "running": 0, "slots": None, "tokens": 10,
            "telemetry": {"running": -1, "waiting": -1, "kv_fraction": -1.0},
        },
    ],
    "requests": {"finished": 1200, "rejected": 3},
    "classes": [
        {
            "model": "m", "service_class": "realtime", "finished": 1200, "kept": 990, "broken": 10,
            "ttft_s": {"p50": 0.012, "p99": 0.4}, "tpot_s": {"p50": 0.0102, "p99": None},
        },
    ],
    "batches": {"batches": {"in_progress": 1}, "waiting": 40, "running": 8, "done": 2},
    "log": [f"line {number}" for number in range(20)],
}  # fmt: skip


def test_a_frame_has_all_that_matters() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(frame("http://h", STATE, {"gpu-0": 1234.0}, trouble="no gateway answers"))
    shown = console.export_text()
    for word in (
        *("up 1 h 2 min", "3 waiting", "cap 2,500 W, 2,000 W reserved, 1,234 W drawn"),
        *("1,200 finished, 3 rejected", "batches: 1 in_progress", "2 done, 8 running, 40 waiting"),
        *("shutting down", "the ledger can't be written", "no gateway answers"),
        *("7/256", "41%", "1,234", "650", "5 kJ", "it takes no connection"),
        *("12 ms", "400 ms", "10.2 ms", "99.0% of 1,000", "line 19", "line 12"),
    ):
        assert word in shown, word
    assert "line 11" not in shown
    assert "-1" not in shown


def test_tokens_per_second_are_of_engines_seen_twice() -> None:
    later = {"engines": [{"name": "gpu-0", "tokens": 700}, {"name": "new-0", "tokens": 9}]}
    assert rates_of(STATE, later, 2.0) == {"gpu-0": 100.0}
    assert rates_of(later, STATE, 2.0)["gpu-0"] == 0.0  # counted anew, never below nothing
