"""Batch and real-time on one small engine: a line of a batch runs only while nobody waits."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.support import (
    CAPITAL,
    MODEL,
    Client,
    Running,
    exchange,
    gateway,
    request_bytes,
    wait_for,
)

pytestmark = pytest.mark.engine

WORDS = 200
LINE: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me about the sea."}],
    "temperature": 0,
    "max_tokens": WORDS,
    "ignore_eos": True,
}
URGENT = {
    "model": MODEL,
    "messages": CAPITAL,
    "service_tier": "priority",
    "stream": True,
    "max_tokens": 60,
    "ignore_eos": True,
}


def written(running: Running) -> list[int]:
    """Tokens that the engine has written of each answer it works on, asked past the gateway."""
    (pid,) = running.engine_pids()
    sockets = {str(c.laddr) for c in psutil.Process(pid).net_connections("unix")}
    (path,) = {address for address in sockets if address.endswith(".sock")}
    asked = ["curl", "-s", "--unix-socket", path, "http://localhost/slots"]
    slots = json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)
    return [slot["next_token"][0]["n_decoded"] for slot in slots if slot["is_processing"]]


def test_a_line_gives_way_and_goes_on_afterwards(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        f'[[pools]]\nname = "here"\nkind = "embedded"\nmodel = "{MODEL}"\nslots = 2\n'
        "[classes.realtime]\nttft_ms = 60000\ntpot_ms = 10000\n"
    )
    with gateway("--fleet", str(fleet), home=tmp_path) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        told = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": LINE}
        lines = io.BytesIO(json.dumps(told).encode())
        file = client.files.create(file=("lines.jsonl", lines), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        wait_for(lambda: any(tokens > 20 for tokens in written(running)))
        with Client(running.address) as one:
            one.send(request_bytes(URGENT))
            assert one.head().status == 200  # with its first token
            pieces = one.chunks()
            beside = []
            for _ in range(50):
                next(pieces)
                beside.append(len(written(running)))
            assert max(beside) == 1  # from its first token on it was alone
            assert client.batches.retrieve(batch.id).status == "in_progress"
            assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", 120)
        done = client.batches.retrieve(batch.id)
        assert done.output_file_id
        (line,) = client.files.content(done.output_file_id).text.splitlines()
        answer = json.loads(line)["response"]
        # Nothing of it was lost or said twice: as many tokens as were asked for, and the text goes
        # on from what was said before. (Read again, it may go on in other words than else.)
        assert answer["body"]["usage"]["completion_tokens"] == WORDS
        alone = running.post(LINE).json["choices"][0]["message"]["content"]
        text = answer["body"]["choices"][0]["message"]["content"]
        assert text.split()[:12] == alone.split()[:12]
        asked = f"GET /v1/receipts/{answer['request_id']} HTTP/1.1\r\nhost: localhost\r\n\r\n"
        receipt = exchange(running.address, asked.encode()).json
        assert (receipt["service_tier"], receipt["outcome"]) == ("batch", "finished")
        assert receipt["completion_tokens"] == WORDS
