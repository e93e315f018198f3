"""Emulated engines as their clients see them: real processes, real sockets, exact words."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import Answer, Client, Running, exchange, request_bytes, wait_for
from tokenworks.gateway.emulated import words
from tokenworks.gateway.emulated.words import voice

MODEL = "llama-3.1-8b"
HELLO = [{"role": "user", "content": "Hello there, how are you?"}]
PAIR: Any = {"do_remote_decode": True, "do_remote_prefill": False}


@contextmanager
def emulated(processor: str = "h100", *flags: str, port: int = 0) -> Iterator[Running]:
    """`tokenworks emulate` until the block ends."""
    arguments = ["emulate", processor, MODEL, "--port", str(port), *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenworks", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    readers = [
        threading.Thread(target=lambda s=stream: log.extend(s), daemon=True)
        for stream in (process.stdout, process.stderr)
    ]
    for reader in readers:
        reader.start()
    try:
        wait_for(lambda: any("ready" in line for line in log) or process.poll() is not None)
        (ready,) = [line for line in log if "ready" in line]
        match = re.search(r"Tokenworks is ready: (\S+?)(/v1)?\s", ready)
        assert match, log
        yield Running(match[1], process, log)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def gpu() -> Iterator[Running]:
    with emulated("h100", "--faults", "--slow", "0.2") as running:
        yield running


@pytest.fixture(scope="module")
def lpu() -> Iterator[Running]:
    with emulated("groq-3-lpu", "--faults") as running:
        yield running


def ask(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO, "max_tokens": 20, "ignore_eos": True, **more}


def said(answer: Answer) -> str:
    text: str = answer.json["choices"][0]["message"]["content"]
    return text


def expected(begin: int, end: int, seed: int = 0, content: str = HELLO[0]["content"]) -> str:
    return voice(f"{content}user{len(content.encode())}".encode(), seed).text(begin, end)


# Words


def test_words_are_tokens_of_their_own() -> None:
    ring = voice(b"a").text(0, words.RING)
    assert len(set(ring.split())) == words.RING
    assert re.fullmatch("( [a-z]{4})+", ring)


@given(st.binary(max_size=40), st.integers(0, 2**63 - 1), st.integers(1, 60), st.integers(0, 60))
def test_an_answer_goes_on_from_where_it_was(prompt: bytes, seed: int, k: int, n: int) -> None:
    speaker = voice(prompt, seed)
    assert speaker.text(0, k) + speaker.text(k, k + n) == speaker.text(0, k + n)
    assert words.continued(prompt + speaker.bytes(0, k), seed) == (prompt, k)


def test_a_prompt_that_only_looks_like_an_answer_is_a_prompt() -> None:
    assert words.continued(b"say: babu") == (b"say: babu", 0)
    assert words.continued(b"") == (b"", 0)
    other = b"one" + voice(b"two").bytes(0, 9)
    assert words.continued(other) == (other, 0)


# The API


def test_a_stream_has_a_chunk_for_each_word(gpu: Running) -> None:
    options = {"include_usage": True}
    fault(gpu, kind="slow", factor=1.0)
    answer = gpu.post(ask(stream=True, stream_options=options, seed=4))
    fault(gpu, kind="slow", factor=0.2)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-emulated"] == "h100"
    *events, usage, done = answer.events
    assert done == "[DONE]"
    assert {e["system_fingerprint"] for e in (*events, usage)} == {"emulated-h100"}
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    deltas = [e["choices"][0]["delta"] for e in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [d["content"] for d in deltas[1:-1]] == [expected(i, i + 1, 4) for i in range(20)]
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * 21 + ["length"]
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 7,  # 25 bytes
        "completion_tokens": 20,
        "total_tokens": 27,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("processor", ["gpu", "lpu"])
def test_fast_tokens_share_chunks_and_none_is_lost(
    processor: str, request: pytest.FixtureRequest
) -> None:
    running: Running = request.getfixturevalue(processor)
    answer = running.post(ask(stream=True, max_tokens=300))
    assert answer.text == expected(0, 300)
    chunks = len(answer.events) - 3
    assert chunks < 300  # both make more than 200 tokens/s


def test_a_whole_answer_says_the_same(gpu: Running) -> None:
    answer = gpu.post(ask())
    assert said(answer) == expected(0, 20)
    assert answer.json["object"] == "chat.completion"
    assert answer.json["system_fingerprint"] == "emulated-h100"
    assert answer.json["choices"][0]["finish_reason"] == "length"
    assert answer.json["usage"]["completion_tokens"] == 20
    assert answer.headers["x-emulated"] == "h100"


def test_usage_with_every_chunk(gpu: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, _, _ = gpu.post(ask(stream=True, stream_options=options, max_tokens=4)).events
    made = [event["usage"]["completion_tokens"] for event in events]
    assert made == sorted(made)
    assert (made[0], made[-1]) == (0, 4)


def test_answers_without_a_limit_are_as_long_as_a_workloads(gpu: Running) -> None:
    def length(content: str) -> tuple[int, str]:
        body = {"messages": [{"role": "user", "content": content}]}
        answer = gpu.post(body).json
        return answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]

    found = [length(f"question {i}") for i in range(8)]
    assert len(set(found)) > 4
    assert {reason for _, reason in found} == {"stop"}
    assert found == [length(f"question {i}") for i in range(8)]
    short = gpu.post({"messages": [{"role": "user", "content": "question 1"}], "max_tokens": 2})
    assert short.json["choices"][0]["finish_reason"] == "length"
    least = gpu.post(
        {"messages": [{"role": "user", "content": "question 1"}], "min_tokens": found[1][0] + 9}
    )
    assert least.json["usage"]["completion_tokens"] == found[1][0] + 9


def test_completions(gpu: Running) -> None:
    body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 9, "ignore_eos": True}
    whole = gpu.post(body, "/v1/completions").json
    text = voice(b"Once upon").text(0, 9)
    assert (whole["object"], whole["choices"][0]["text"]) == ("text_completion", text)
    events = gpu.post({**body, "stream": True}, "/v1/completions").events
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == text
    rest = gpu.post({**body, "prompt": "Once upon" + text[:20]}, "/v1/completions").json
    assert rest["choices"][0]["text"] == voice(b"Once upon").text(4, 13)
    numbers = gpu.post({**body, "prompt": [5, 6, 7]}, "/v1/completions").json
    assert numbers["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("processor", ["gpu", "lpu"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_continuation_says_what_is_missing(
    processor: str, stream: bool, request: pytest.FixtureRequest
) -> None:
    running: Running = request.getfixturevalue(processor)
    given = [*HELLO, {"role": "assistant", "content": expected(0, 7)}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    body = ask(messages=given, max_tokens=13, stream=stream, **options)
    answer = running.post(body)
    text = answer.text if stream else said(answer)
    assert text == expected(7, 20)
    own = running.post({"model": MODEL, "messages": HELLO}).json
    length = own["usage"]["completion_tokens"]
    for done in (length - 1, length):
        given = [*HELLO, {"role": "assistant", "content": expected(0, done)}]
        answer = running.post({"messages": given, "stream": stream, **options})
        text = answer.text if stream else said(answer)
        assert text == expected(done, length)
        if not stream:
            assert answer.json["usage"]["completion_tokens"] == length - done


def test_a_prompts_beginning_is_cached(gpu: Running) -> None:
    content = "A long story that both begin with. " * 20
    prompts = [[{"role": "user", "content": content + end}] for end in ("One?", "Another?")]
    cached = [
        gpu.post(ask(messages=m)).json["usage"]["prompt_tokens_details"]["cached_tokens"]
        for m in prompts
    ]
    assert cached == [0, len(content) // 64 * 16]


def test_errors_are_openais(gpu: Running, lpu: Running) -> None:
    def code(running: Running, status: int, **more: Any) -> str:
        answer = running.post(ask(**more))
        assert answer.status == status
        assert answer.headers["x-emulated"]
        return str(answer.error["code"])

    long = [{"role": "user", "content": "word " * 200_000}]
    assert code(gpu, 400, messages=long) == "context_length_exceeded"
    assert code(lpu, 400, max_tokens=4000) == "context_length_exceeded"
    assert code(gpu, 404, model="gpt-9") == "model_not_found"
    assert code(gpu, 400, n=2) == "unsupported_field"
    assert code(gpu, 400, logprobs=True) == "unsupported_field"
    assert code(gpu, 400, max_tokens=0) == "invalid_value"
    assert code(gpu, 400, messages="hello") == "invalid_value"
    assert gpu.post(b"{").status == 400
    assert exchange(gpu.address, b"GET /nowhere HTTP/1.1\r\n\r\n").status == 404
    assert exchange(gpu.address, b"GET /v1/completions HTTP/1.1\r\n\r\n").status == 404
    assert exchange(gpu.address, b"POST /health HTTP/1.1\r\n\r\n").headers["allow"] == "GET"
    assert exchange(gpu.address, b"nonsense\r\n\r\n").error["code"] == "invalid_http"


def test_the_real_client(gpu: Running) -> None:
    client = openai.OpenAI(base_url=f"{gpu.url}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == (MODEL, "emulated h100")
    extra = {"ignore_eos": True}
    messages: Any = HELLO
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=20, stream=True, extra_body=extra
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == expected(0, 20)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages)


def test_many_at_once_on_kept_connections(gpu: Running) -> None:
    clients = [Client(gpu.address) for _ in range(40)]
    for turn in range(3):
        contents = [f"{turn} asks number {i}" for i in range(40)]
        for client, content in zip(clients, contents, strict=True):
            message = {"role": "user", "content": content}
            client.send(request_bytes(ask(messages=[message], stream=True, max_tokens=30)))
        for client, content in zip(clients, contents, strict=True):
            assert client.answer().text == expected(0, 30, content=content)
    for client in clients:
        client.socket.close()


def test_pipelined_requests_are_answered_in_order(gpu: Running) -> None:
    with Client(gpu.address) as client:
        limits = [3, 1, 9, 2, 5, 4, 8, 6, 7]
        client.send(b"".join(request_bytes(ask(max_tokens=limit)) for limit in limits))
        assert [client.answer().json["usage"]["completion_tokens"] for _ in limits] == limits


def test_lower_priority_goes_first() -> None:
    with emulated("h100", "--sequences", "1") as running:
        clients = [Client(running.address) for _ in range(3)]
        order: list[int] = []

        def wait(index: int) -> None:
            clients[index].answer()
            order.append(index)

        threads = [threading.Thread(target=wait, args=(index,)) for index in range(3)]
        for index, priority in enumerate((0, 5, -5)):
            clients[index].send(request_bytes(ask(max_tokens=60, priority=priority)))
            wait_for(lambda n=index: waiting(running) == n)  # type: ignore[misc]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert order == [0, 2, 1]


def waiting(running: Running) -> float:
    return figure(running, "vllm:num_requests_waiting")


def figure(running: Running, name: str) -> float:
    (found,) = [v for k, v in running.figures().items() if k.startswith(name + "{")]
    return found


def test_who_hangs_up_is_taken_off() -> None:
    with emulated() as running:
        for stream in (True, False):
            client = Client(running.address)
            client.send(request_bytes(ask(stream=stream, max_tokens=100_000)))
            wait_for(lambda: figure(running, "vllm:num_requests_running") == 1)
            client.socket.close()
            wait_for(lambda: figure(running, "vllm:num_requests_running") == 0)
        assert 0 < figure(running, "vllm:generation_tokens_total") < 10_000
        assert figure(running, "vllm:kv_cache_usage_perc") == 0


def test_time_and_energy_pass_as_modelled(gpu: Running) -> None:
    before = time.monotonic(), figure(gpu, "tokenworks_emulated_energy_joules_total")
    gpu.post(ask(max_tokens=200))
    energy_j = figure(gpu, "tokenworks_emulated_energy_joules_total") - before[1]
    passed_s = time.monotonic() - before[0]
    # 200 steps of 4.9 ms or more, at a fifth of their time; at most so many watts as an H100 takes.
    assert passed_s > 200 * 0.0049 / 5
    assert 0 < energy_j < 5 * 1000 * passed_s


# Faults


def fault(running: Running, **what: Any) -> None:
    assert running.post(what, "/emulate/fault").status == 200


def everything(client: Client) -> None:
    """Read until it ends; what came is in the client's buffer."""
    while client._more():
        pass


def test_a_cut_within_a_chunk(gpu: Running) -> None:
    fault(gpu, kind="reset", after=5)
    with Client(gpu.address) as client:
        client.send(request_bytes(ask(stream=True)))
        with pytest.raises(ConnectionResetError):
            everything(client)
        raw = client._buffer
    body = raw.partition(b"\r\n\r\n")[2].decode()
    assert "".join(re.findall(r'"content":"([a-z ]+)"', body)) == expected(0, 5)
    assert body.rpartition("\r\n")[2].startswith('data: {"id":')  # an event without its end
    assert gpu.post(ask(stream=True)).text == expected(0, 20)


def test_a_broken_event(gpu: Running) -> None:
    fault(gpu, kind="malformed", after=2)
    body = gpu.post(ask(stream=True)).body.decode()
    payloads = [e[6:] for e in body.split("\n\n") if e.startswith("data: {")]
    broken = []
    text = ""
    for payload in payloads:
        try:
            document = json.loads(payload)
        except ValueError:
            broken.append(payload)
            continue
        text += document["choices"][0]["delta"].get("content") or ""
    assert len(broken) == 1
    assert text == expected(0, 2) + expected(3, 20)


def test_a_lie_and_a_refusal(gpu: Running) -> None:
    fault(gpu, kind="wrong_usage", times=2)
    options = {"include_usage": True}
    assert gpu.post(ask()).json["usage"]["completion_tokens"] == 27
    stream = gpu.post(ask(stream=True, stream_options=options))
    assert stream.events[-2]["usage"]["completion_tokens"] == 27
    fault(gpu, kind="refuse", times=2)
    assert [gpu.post(ask()).status for _ in range(3)] == [503, 503, 200]


@pytest.mark.parametrize("processor", ["gpu", "lpu"])
def test_a_hung_engine_is_silent_and_goes_on(
    processor: str, request: pytest.FixtureRequest
) -> None:
    running: Running = request.getfixturevalue(processor)
    with Client(running.address) as client:
        client.send(request_bytes(ask(stream=True, max_tokens=250)))
        found = client.head()
        fault(running, kind="hang")
        made = figure(running, "vllm:generation_tokens_total")
        client.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            everything(client)
        assert figure(running, "vllm:generation_tokens_total") == made
        assert exchange(running.address, b"GET /health HTTP/1.1\r\n\r\n").status == 200
        fault(running, kind="wake")
        client.socket.settimeout(60)
        found.body = b"".join(client.chunks())
        assert found.text == expected(0, 250)


def test_slower(gpu: Running) -> None:
    fault(gpu, kind="slow", factor=1.0)
    began = time.monotonic()
    assert said(gpu.post(ask(max_tokens=100))) == expected(0, 100)
    assert time.monotonic() - began > 0.45
    fault(gpu, kind="slow", factor=0.2)


def test_a_crash_and_no_faults_unless_allowed() -> None:
    with emulated("h100", "--faults") as running:
        client = Client(running.address)
        client.send(request_bytes({"kind": "crash"}, "/emulate/fault"))
        assert client.ended()
        assert running.process.wait(20) == 139
    with emulated("h100") as running:
        assert running.post({"kind": "crash"}, "/emulate/fault").status == 404


# The cache's way from one engine to another


def test_a_prompt_here_and_its_answer_there(gpu: Running, lpu: Running) -> None:
    first = gpu.post(ask(kv_transfer_params=PAIR))
    assert first.json["usage"]["completion_tokens"] == 1
    told = first.json["kv_transfer_params"]
    assert told["do_remote_prefill"] is True
    assert told["remote_tokens"] == 7
    assert told["remote_bytes"] > 0
    read = figure(lpu, "vllm:prompt_tokens_total")
    assert lpu.post(ask(stream=True, kv_transfer_params=told)).text == expected(0, 20)
    assert said(lpu.post(ask(kv_transfer_params=told))) == expected(0, 20)
    assert figure(lpu, "vllm:prompt_tokens_total") == read  # it read nothing itself
    assert gpu.post(ask(stream=True, kv_transfer_params=PAIR)).status == 400


def test_both_in_one_replica() -> None:
    with emulated("h100", "--decode-on", "groq-3-lpu") as running:
        answer = running.post(ask(stream=True, max_tokens=60))
        assert answer.text == expected(0, 60)
        assert answer.headers["x-emulated"] == "h100 + groq-3-lpu"


# How it is started and ended


def test_it_ends_cleanly_in_the_middle_of_an_answer() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with emulated() as running:
            client = Client(running.address)
            client.send(request_bytes(ask(stream=True, max_tokens=5000)))
            client.head()
            assert running.stop(number) == 0
            assert not any("Traceback" in line for line in running.log)
            client.socket.close()


def test_sockets_and_several_replicas(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    with emulated("h100", "--socket", str(path), "--replicas", "2") as running:
        assert Path(running.url) == path
        assert path.is_socket()
        assert Path(f"{path}.1").is_socket()
    assert list(tmp_path.iterdir()) == []
    with emulated("h100", "--replicas", "2") as running:
        (line,) = [line for line in running.log if "ready" in line]
        urls = re.findall(r"http://127.0.0.1:(\d+)/v1", line)
        assert len(set(urls)) == 2
        assert exchange(("127.0.0.1", int(urls[1])), request_bytes(ask())).status == 200


@pytest.mark.parametrize(
    ("arguments", "words_of_it"),
    [
        (["h101", MODEL], "h101"),
        (["h100", "lama"], "lama"),
        (["h100", MODEL, "--slow", "0"], "slow"),
        (["h100", MODEL, "--replicas", "0"], "replicas"),
        (["h100", MODEL, "--context-tokens", "100000000"], "context_tokens"),
        (["h100", MODEL, "--lengths", "azure"], "azure"),
        (["h100", MODEL, "--socket", "/no/such/folder/s"], "/no/such/folder"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], words_of_it: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tokenworks", "emulate", *arguments, "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert words_of_it in done.stderr
    assert "Traceback" not in done.stderr


def test_a_child_serves_until_its_input_ends(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("gpu", "lpu")]
    replicas = [
        {"processor": "h100", "model": MODEL, "socket": paths[0]},
        {"processor": "groq-3-lpu", "model": MODEL, "served_as": "fast", "socket": paths[1]},
    ]
    child = start_child(replicas)
    assert child.stdin
    assert child.stdout
    assert json.loads(child.stdout.readline()) == {"addresses": paths}
    assert all(Path(path).is_socket() for path in paths)
    child.stdin.close()
    assert child.wait(20) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_child_says_what_is_wrong() -> None:
    child = start_child([{"processor": "h101", "model": MODEL}])
    assert child.stdout
    assert "h101" in json.loads(child.stdout.readline())["error"]
    assert child.wait(20) == 1


def start_child(replicas: list[dict[str, str]]) -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-m", "tokenworks.gateway.emulated.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    assert child.stdin
    child.stdin.write(json.dumps(replicas) + "\n")
    child.stdin.flush()
    return child
