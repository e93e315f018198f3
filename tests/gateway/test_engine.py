"""The real engine behind the gateway: its answers, and what happens when it or a client dies."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import groq
import openai
import psutil
import pytest

from tests.support import (
    CAPITAL,
    MODEL,
    Answer,
    Client,
    Running,
    gateway,
    request_bytes,
    run,
    wait_for,
)

pytestmark = pytest.mark.engine

LONG: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Write a very long story about a lighthouse."}],
    "stream": True,
    "max_tokens": 4000,
    "ignore_eos": True,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


AS_PERSON: Any = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}


@pytest.fixture(scope="module")
def client(live_gateway: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live_gateway.url}/v1", api_key="none", max_retries=0)


def test_the_openai_client_chats(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    stream = client.chat.completions.create(
        model=MODEL,
        messages=CAPITAL,
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Paris" in text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens > 10
    assert chunks[-1].usage.completion_tokens >= sum(
        bool(c.choices and c.choices[0].delta.content) for c in chunks
    )
    whole = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0)
    assert whole.choices[0].message.content == text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens
    assert whole.usage.prompt_tokens == chunks[-1].usage.prompt_tokens


def test_the_groq_client_chats(live_gateway: Running) -> None:
    client = groq.Groq(base_url=live_gateway.url, api_key="none", max_retries=0)
    answer = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    stream = client.chat.completions.create(
        model=MODEL,
        messages=CAPITAL,
        stream=True,
        temperature=0,
    )
    assert "Paris" in "".join(c.choices[0].delta.content or "" for c in stream)


def test_a_json_schema_holds(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format=AS_PERSON,
        max_tokens=200,
        temperature=0,
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert isinstance(person["name"], str)
    assert isinstance(person["age"], int)


@pytest.mark.parametrize("choice", ["required", "auto", "named"])
def test_a_tool_call_holds_streamed_and_whole(client: openai.OpenAI, choice: str) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    options: Any = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
        "tool_choice": named if choice == "named" else choice,
        "temperature": 0,
        "max_tokens": 200,
    }
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(**options | {"stream": True})
    chunks = [c.choices[0] for c in stream]
    calls = whole.choices[0].message.tool_calls
    assert calls, whole
    assert whole.choices[0].finish_reason == chunks[-1].finish_reason == "tool_calls"
    assert calls[0].function.name == "get_weather"
    assert isinstance(json.loads(calls[0].function.arguments)["city"], str)
    parts = [c.delta.tool_calls[0] for c in chunks if c.delta.tool_calls]
    assert parts[0].id
    assert parts[0].function.name == "get_weather"
    assert "".join(p.function.arguments for p in parts) == calls[0].function.arguments


def test_a_conversation_with_a_tools_result_goes_on(client: openai.OpenAI) -> None:
    call = {"name": "get_weather", "arguments": '{"city":"Paris"}'}
    history: Any = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "clear", "celsius": 21}'},
    ]
    for tools in ([WEATHER], openai.omit):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=history,
            tools=tools,
            tool_choice="none" if tools else openai.omit,
            max_tokens=60,
        )
        assert answer.choices[0].message.content


def test_choices_add_up(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": CAPITAL, "n": 2, "max_tokens": 6, "seed": 1}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert [c.index for c in whole.choices] == [0, 1]
    written = sum(len(c.logprobs.content) for c in whole.choices)
    assert whole.usage.completion_tokens == written
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**options))
    assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens <= 12
    with pytest.raises(openai.BadRequestError, match="at most 4 choices"):
        client.chat.completions.create(**(options | {"n": 5}))


def test_completions(client: openai.OpenAI) -> None:
    one = client.completions.create(model=MODEL, prompt="Once upon a", max_tokens=5, logprobs=2)
    logprobs = one.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == one.choices[0].text
    assert logprobs.top_logprobs is not None
    assert len(logprobs.top_logprobs[0]) == 2
    on = {"ignore_eos": True}
    two = client.completions.create(
        model=MODEL, prompt=["Once upon", "The sea"], max_tokens=5, extra_body=on
    )
    assert len(two.choices) == 2
    assert two.usage is not None
    assert two.usage.completion_tokens == 10
    assert two.usage.prompt_tokens == 4
    stream = client.completions.create(
        model=MODEL,
        prompt="Once upon a",
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=on,
    )
    chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=8)
    assert answer.output_text
    assert answer.usage is not None
    assert 1 <= answer.usage.output_tokens <= 8
    # Without a bound it may talk on and on.
    bounded: Any = {"model": MODEL, "input": "Say hello.", "max_output_tokens": 8}
    events = list(client.responses.create(**bounded, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="Hi", prompt={"id": "pmpt_1"})
    assert caught.value.param == "prompt"


def test_everything_a_client_sends_works_or_is_refused(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "What is the capital of France?"}]
    works: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": parts}]},
        {"messages": [{"role": "developer", "content": "Be brief."}, *CAPITAL]},
        {"stop": ["\n", "."], "seed": 7, "top_p": 0.5, "temperature": 0.1},
        {"stop": None, "seed": None, "n": None, "tools": None, "user": "someone"},
        {"max_tokens": None, "max_completion_tokens": 3},
        {"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"5": -100}},
        {"service_tier": "auto", "metadata": {"a": "b"}, "parallel_tool_calls": False},
        {"extra_body": {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1}},
    ]
    for fields in works:
        answer = client.chat.completions.create(
            **{"model": MODEL, "messages": CAPITAL, "max_tokens": 4, **fields}
        )
        assert answer.usage.completion_tokens <= 4
    image = [{"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}]
    refused: list[tuple[dict[str, Any], str | None]] = [
        ({"model": "gpt-9"}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": image}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"temperature": 3}, "temperature"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"max_tokns": 3}}, "max_tokns"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, None),
    ]
    for fields, param in refused:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": CAPITAL, **fields})
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError, match="embedding"):
        client.embeddings.create(model=MODEL, input="hello")


def test_a_killed_engine_comes_back_and_no_stream_is_lost(tmp_path: Path) -> None:
    request = {**LONG, "max_tokens": 100, "stream_options": {"include_usage": True}}
    with gateway("--slots", "8", home=tmp_path) as running:
        (before,) = running.engine_pids()
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(running.address)) for _ in range(8)]
            for client in clients:
                client.send(request_bytes(request))
            for client in clients:
                assert client.head().status == 200  # which comes with the first token
            os.kill(before, signal.SIGKILL)
            for client in clients:
                events = Answer(200, {}, b"".join(client.chunks())).events
                assert events[-1] == "[DONE]"
                assert len({event["id"] for event in events[:-1]}) == 1
                roles = [
                    e for e in events[:-1] if e["choices"] and "role" in e["choices"][0]["delta"]
                ]
                assert len(roles) == 1
                assert events[-2]["usage"]["completion_tokens"] == 100
        # Asked at once, answered as soon as the engine is back.
        reply = running.post({"model": MODEL, "messages": CAPITAL, "temperature": 0})
        assert "Paris" in reply.json["choices"][0]["message"]["content"]
        assert running.engine_pids() != [before]
        assert running.figures()["tokenworks_engine_restarts_total"] == 1


def slots_at_work(running: Running) -> int:
    """What the engine itself says it is doing, asked past the gateway."""
    (pid,) = running.engine_pids()
    sockets = {c.laddr for c in psutil.Process(pid).net_connections("unix") if c.laddr}
    (path,) = {str(address) for address in sockets if str(address).endswith(".sock")}
    asked = subprocess.run(
        ["curl", "-s", "--unix-socket", path, "http://localhost/slots"],
        capture_output=True,
        check=True,
    )
    return sum(slot["is_processing"] for slot in json.loads(asked.stdout))


def test_clients_that_hang_up_leave_nothing_running(live_gateway: Running) -> None:
    long_prompt = {**LONG, "messages": [{"role": "user", "content": "tell me " * 1500}]}
    for fields, begun in ((long_prompt, False), (LONG, True), ({**LONG, "stream": False}, False)):
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(live_gateway.address)) for _ in range(20)]
            for client in clients:
                client.send(request_bytes(fields))
            wait_for(lambda: live_gateway.working() == 20)
            if begun:
                for client in clients[:4]:  # those that have a slot
                    next(client.chunks() if client.head() else iter([b""]))
            # The gateway counts a request before the engine has given it a slot.
            wait_for(lambda: slots_at_work(live_gateway) > 0)
        wait_for(lambda: live_gateway.working() == 0)
        wait_for(lambda: slots_at_work(live_gateway) == 0)


def test_clients_that_stop_reading_cost_no_memory(live_gateway: Running) -> None:
    before = live_gateway.memory_bytes()
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(live_gateway.address)) for _ in range(20)]
        for client in clients:
            client.send(request_bytes({**LONG, "max_tokens": 60}))
        wait_for(lambda: live_gateway.working() == 0, 240)
        assert live_gateway.memory_bytes() - before < 5e6
        for client in clients:
            answer = client.answer()  # nothing of it was lost
            assert answer.events[-1] == "[DONE]"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(tmp_path: Path, number: signal.Signals) -> None:
    with gateway(home=tmp_path) as running:
        (engine,) = running.engine_pids()
        code = running.stop(number)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        wait_for(lambda: not psutil.pid_exists(engine))


def test_an_interrupt_while_the_engine_starts_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenworks", "up", "--port", "0"],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    own = psutil.Process(process.pid)
    wait_for(lambda: bool(own.children(recursive=True)), 60)
    (engine,) = own.children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (0, 130)
    wait_for(lambda: not engine.is_running())
    assert process.stderr is not None
    process.stderr.close()


def test_a_file_that_is_no_model_is_one_clear_line(tmp_path: Path) -> None:
    text = tmp_path / "notes.gguf"
    text.write_text("not a model")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    for name, told in (
        (str(text), "is not a usable GGUF file"),
        (str(empty), "is not a usable GGUF file"),
        (str(tmp_path / "absent.gguf"), "cannot read model file"),
        (str(tmp_path), "cannot read model file"),
        ("gpt-9", "no model 'gpt-9' in the catalogue"),
    ):
        refused = run("up", "--model", name)
        assert refused.returncode == 2
        assert told in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
