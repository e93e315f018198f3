"""The clients that people use, unmodified, against `tokenworks up --demo`: emulated GPUs and LPUs
beside the real embedded engine.
"""

import io
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import groq
import openai
import pytest

from tests.gateway.test_engine import AS_PERSON, WEATHER
from tests.support import (
    CAPITAL,
    MODEL,
    Client,
    Running,
    exchange,
    gateway,
    request_bytes,
    run,
    wait_for,
)

pytestmark = pytest.mark.engine

EMULATED = "llama-3.1-8b"
# That a busy machine keeps too.
WIDE = {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "10000"}
MODELS = (EMULATED, MODEL)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def demo(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("config")
    with gateway("--demo", home=home, TOKENWORKS_STATE=str(state)) as running:
        yield running


@pytest.fixture(scope="module")
def client(demo: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0)


def receipt(running: Running, name: str) -> dict[str, Any]:
    asked = f"GET /v1/receipts/{name} HTTP/1.1\r\nhost: localhost\r\n\r\n"
    found: dict[str, Any] = exchange(running.address, asked.encode()).json
    return found


def ask(client: openai.OpenAI, model: str, **more: Any) -> Any:
    options = {"model": model, "messages": CAPITAL, "max_tokens": 12, "temperature": 0}
    return client.chat.completions.with_raw_response.create(**options | more)


def test_every_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == list(MODELS)
    assert client.models.retrieve(MODEL).owned_by == "tokenworks"


@pytest.mark.parametrize("model", MODELS)
def test_openai_streamed_and_whole_with_promise_and_receipt(
    demo: Running, client: openai.OpenAI, model: str
) -> None:
    whole = ask(client, model)
    answer = whole.parse()
    streamed = ask(client, model, stream=True, stream_options={"include_usage": True})
    chunks = list(streamed.parse())
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    for raw, usage in ((whole, answer.usage), (streamed, chunks[-1].usage)):
        headers = raw.headers
        assert float(headers["x-promise-ttft-ms"]) > 0
        assert float(headers["x-promise-tpot-ms"]) > 0
        assert 0.5 < float(headers["x-promise-confidence"]) < 1
        assert headers["x-service-tier"] == "default"
        told = usage.model_dump()
        found = receipt(demo, headers["x-request-id"])
        assert (found["outcome"], found["status"], found["model"]) == ("finished", 200, model)
        for name in ("prompt_tokens", "completion_tokens", "energy_grade", "kept"):
            assert found[name] == told[name]
        assert told["promise"]["confidence"] == float(headers["x-promise-confidence"])
        assert told["energy_j"] == pytest.approx(found["energy_j"], rel=1e-4)
        assert found["kept"] in (True, False)
        assert found["actual"]["e2e_s"] > 0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("asked", "used"),
    [("priority", "priority"), ("flex", "flex"), ("default", "default"), ("auto", "default")],
)
def test_the_tier_really_used_is_told(
    client: openai.OpenAI, model: str, asked: str, used: str
) -> None:
    options: Any = {"service_tier": asked, "extra_headers": WIDE}
    raw = ask(client, model, **options)
    assert raw.headers["x-service-tier"] == raw.parse().service_tier == used
    streamed = ask(client, model, stream=True, stream_options={"include_usage": True}, **options)
    assert list(streamed.parse())[-1].service_tier == used


@pytest.mark.parametrize("model", MODELS)
def test_groq_streamed_and_whole(demo: Running, model: str) -> None:
    client = groq.Groq(base_url=demo.url, api_key="none", max_retries=0)
    assert [each.id for each in client.models.list().data] == list(MODELS)
    tiers: list[Any] = ["on_demand", "flex", "performance"]
    for tier in tiers:
        options: Any = {"model": model, "messages": CAPITAL, "max_tokens": 8}
        options |= {"service_tier": tier, "extra_headers": WIDE}
        whole = client.chat.completions.create(**options)
        assert whole.usage is not None
        assert whole.usage.queue_time is not None
        assert whole.usage.total_time
        chunks = list(client.chat.completions.create(**options, stream=True))
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        assert whole.choices[0].message.content


def test_a_tighter_bound_goes_to_the_faster_processor(demo: Running, client: openai.OpenAI) -> None:
    wide = ask(client, EMULATED, service_tier="priority")
    tight = ask(client, EMULATED, service_tier="priority", extra_headers={"x-slo-tpot-ms": "5"})
    found = [receipt(demo, raw.headers["x-request-id"]) for raw in (wide, tight)]
    assert [each["processor"] for each in found] == ["h100", "groq-3-lpu"]
    assert float(tight.headers["x-promise-tpot-ms"]) <= 5
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client, EMULATED, service_tier="priority", extra_headers={"x-slo-tpot-ms": "0.01"})
    headers = refused.value.response.headers
    assert headers["x-refusal-reason"] == refused.value.code == "tpot_bound"
    row = receipt(demo, headers["x-request-id"])
    assert (row["outcome"], row["reason"], row["status"]) == ("rejected", "tpot_bound", 429)


def test_tools_and_schemas_on_the_embedded_model_only(client: openai.OpenAI) -> None:
    person = ask(
        client, MODEL, response_format=AS_PERSON, max_tokens=200,
        messages=[{"role": "user", "content": "Invent a person."}],
    ).parse()  # fmt: skip
    assert isinstance(json.loads(person.choices[0].message.content)["age"], int)
    options: Any = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
        "tool_choice": "required",
        "max_tokens": 200,
    }
    (call,) = ask(client, MODEL, **options).parse().choices[0].message.tool_calls
    assert isinstance(json.loads(call.function.arguments)["city"], str)
    streamed = [c.choices[0] for c in ask(client, MODEL, stream=True, **options).parse()]
    assert streamed[-1].finish_reason == "tool_calls"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, EMULATED, response_format=AS_PERSON)
    assert refused.value.param == "response_format"


def test_each_verdict_says_why_and_when_to_come_again(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        f'[[pools]]\nname = "one"\nkind = "emulated"\nmodel = "{EMULATED}"\nprocessor = "h100"\n'
        "slots = 1\nslow = 20.0\n[classes.standard]\nwait_s = 0.05\n"
        "[classes.realtime]\nttft_ms = 4000\ntpot_ms = 4000\n"
    )
    long = {"model": EMULATED, "messages": CAPITAL, "max_tokens": 400, "stream": True}
    with gateway("--fleet", str(fleet), home=tmp_path) as running, Client(running.address) as one:
        one.send(request_bytes(long | {"service_tier": "priority"}))
        assert one.head().status == 200  # the only seat is taken, by the most urgent class
        for tier, status, reasons, least_s in (
            ("priority", 429, {"no_room", "ttft_bound"}, 2),
            ("flex", 498, {"flex_full"}, 2),
            ("default", 429, {"queue_wait"}, 1),
        ):
            reply = running.post(long | {"service_tier": tier})
            assert reply.status == status
            assert reply.headers["x-refusal-reason"] in reasons
            assert reply.error["code"] == reply.headers["x-refusal-reason"]
            # A mean answer of 256 tokens at 7 ms or more; beyond what it may wait for `default`.
            assert int(reply.headers["retry-after"]) >= least_s
        running.process.send_signal(signal.SIGTERM)
        with ExitStack() as stack:  # drained: what runs ends, new work is refused or not let in
            stack.callback(running.process.kill)
            wait_for(lambda: refused(running, long))


def refused(running: Running, request: dict[str, Any]) -> bool:
    """Whether new work is refused as it is by a gateway that shuts down."""
    try:
        reply = running.post(request | {"service_tier": "flex"})
    except OSError:
        return True
    if reply.status != 503:
        return False
    assert reply.headers["x-refusal-reason"] == "shutting_down"
    return True


def test_who_leaves_at_the_last_event_has_had_all_of_it(relay: Running) -> None:
    """As OpenAI's client does: it doesn't wait for the end of the body."""
    said = {"model": "scripted", "messages": [{"role": "user", "content": "unended"}]}
    with Client(relay.address) as one:
        one.send(request_bytes(said | {"stream": True}))
        head, body = one.head(), b""
        for piece in one.chunks():
            body += piece
            if b"[DONE]" in body:
                break
    name = head.headers["x-request-id"]
    wait_for(lambda: "outcome" in receipt(relay, name))
    row = receipt(relay, name)
    assert (row["outcome"], row["status"], row["completion_tokens"]) == ("finished", 200, 3)


def test_embeddings_are_refused_and_say_why(client: openai.OpenAI) -> None:
    for model in MODELS:
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(model=model, input="hello")
        assert "embedding" in str(refused.value)


def test_a_batch_over_both_models(demo: Running, client: openai.OpenAI, state: Path) -> None:
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": MODELS[number % 2], "messages": CAPITAL, "max_tokens": 6},
        }
        for number in range(10)
    ]
    told = io.BytesIO("\n".join(json.dumps(line) for line in lines).encode())
    file = client.files.create(file=("requests.jsonl", told), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", 120)
    done = client.batches.retrieve(batch.id)
    assert done.output_file_id
    answers = [json.loads(a) for a in client.files.content(done.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]
    assert {answer["response"]["status_code"] for answer in answers} == {200}
    port = str(demo.address[1])
    shown = run("usage", "--by", "class", "--json", "--port", port, TOKENWORKS_STATE=str(state))
    (row,) = [row for row in json.loads(shown.stdout) if row["class"] == "batch"]
    assert (row["requests"], row["finished"]) == (10, 10)


def test_the_load_generator_agrees_with_the_ledger(demo: Running, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        "bench", "azure-code", "--url", f"{demo.url}/v1", "--model", EMULATED,
        "--requests", "12", "--concurrency", "4", "--out", str(out),
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr  # 3: it was itself too slow, on a busy machine
    checks = json.loads((out / "checks.json").read_text())
    assert not checks["violations"], checks
