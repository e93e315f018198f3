"""The deterministic machine behind the gateway: real text, exact cycles on the receipt."""

import json
import urllib.request
from collections.abc import Iterator

import pytest

from tests.support import CAPITAL, MODEL, Client, Running, gateway, request_bytes, wait_for

pytestmark = pytest.mark.engine
ASK = {"model": MODEL, "messages": CAPITAL, "max_tokens": 8}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with gateway("--engine", "lpu", home=tmp_path_factory.mktemp("config")) as running:
        yield running


def test_its_answers_are_real_and_their_cycles_exact(machine: Running) -> None:
    whole = machine.post(ASK)
    assert "Paris" in whole.json["choices"][0]["message"]["content"]
    usage = whole.json["usage"]
    assert usage["cycles"] > 97_000 * usage["total_tokens"] * 0.9
    place = f"{machine.url}/v1/receipts/{whole.headers['x-request-id']}"
    with urllib.request.urlopen(place, timeout=30) as answer:
        assert json.load(answer)["cycles"] == usage["cycles"]
    # Latency is known to the cycle: the same question takes the same, streamed too.
    with_usage = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    stream = machine.post(with_usage)
    assert stream.text == whole.json["choices"][0]["message"]["content"]
    assert stream.events[-2]["usage"]["cycles"] == usage["cycles"]
    assert stream.events[-1] == "[DONE]"


def test_what_it_cannot_do_is_refused_and_what_changes_nothing_is_told(machine: Running) -> None:
    for fields in ({"n": 2}, {"logprobs": True}):
        assert machine.post({**ASK, **fields}).status == 400
    cut = machine.post({**ASK, "stop": ["France", "zzz"]})
    assert cut.json["choices"][0]["message"]["content"] == "The capital of "
    warned = machine.post({**ASK, "max_tokens": 1, "temperature": 0.5})
    assert "temperature" in warned.headers["x-tokenworks-warning"]
    long = machine.post({**ASK, "messages": [{"role": "user", "content": "word " * 3000}]})
    assert long.status == 400
    assert long.error["code"] == "context_length_exceeded"


def test_a_client_that_leaves_frees_it(machine: Running) -> None:
    with Client(machine.address) as client:
        client.send(request_bytes({**ASK, "max_tokens": 500, "stream": True}))
        assert client.head().status == 200
    wait_for(lambda: machine.working() == 0)
    assert machine.post({**ASK, "max_tokens": 1}).status == 200
