"""Requests that one engine reads and another writes, and answers that move: real engines, real
sockets, texts compared with those of one engine alone.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import MODEL, Answer, Client, Running, exchange, gateway, request_bytes, wait_for
from tokenworks.assets import store
from tokenworks.catalog import models
from tokenworks.gateway import kv
from tokenworks.gateway.address import socket_in
from tokenworks.gateway.emulated.words import voice
from tokenworks.gateway.seats import Seats

EXAMPLE = Path(__file__).parents[2] / "examples/fleets/prefill-decode.toml"
TOKENS = 24
PROMPTS = (
    "What is the capital of France? Answer in one sentence.",
    "Count from one to ten.",
    "Write a haiku about the sea.",
    "Why is the sky blue?",
    "Name three animals that live in water, with an emoji for each.",
    "Tell me a story about a dog who finds a key.",
    "Write a function in Python that adds two numbers.",
    "Wie heißt die Hauptstadt von Österreich?",
    "List the first five prime numbers, and say why one is not among them.",
)


def chat(prompt: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    asked = {"model": MODEL, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    return asked | more


STREAM: Any = {"stream": True, "stream_options": {"include_usage": True}}


def embedded(name: str, folder: Path, **more: Any) -> str:
    """A pool of the fleet file, all of them with as many slots, so that texts can be compared."""
    pool: dict[str, Any] = {"name": name, "kind": "embedded", "model": MODEL}
    pool |= {"threads": 1, "slots": 4, "context_tokens": 1024, "kv_folder": str(folder), **more}
    return "[[pools]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in pool.items())


@contextmanager
def fleet(folder: Path, *pools: str) -> Iterator[Running]:
    file = folder / "fleet.toml"
    file.write_text("\n".join(pools))
    with gateway("--fleet", str(file)) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("handover")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Answer]:
    """What one engine says to each prompt."""
    with fleet(folder, embedded("one", folder / "kv")) as running:
        return {prompt: running.post(chat(prompt)) for prompt in PROMPTS}


@pytest.fixture(scope="module")
def pair(folder: Path, alone: dict[str, Answer]) -> Iterator[Running]:
    del alone  # its engine is gone before these are there
    reads = embedded("reads", folder / "kv", role="prefill")
    with fleet(folder, reads, embedded("writes", folder / "kv", role="decode")) as running:
        yield running


def content(answer: Answer) -> str:
    text: str = answer.json["choices"][0]["message"]["content"]
    return text


def receipt(running: Running, answer: Answer) -> Any:
    path = f"/v1/receipts/{answer.headers['x-request-id']}"
    return exchange(
        running.address, f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    ).json


def tokens(usage: dict[str, Any]) -> tuple[int, int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]


def check_stream(answer: Answer) -> dict[str, Any]:
    """That it is one stream; its usage."""
    assert answer.status == 200
    *events, last, done = answer.events
    assert done == "[DONE]"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["model"]) for event in (*events, last)}) == 1
    deltas = [event["choices"][0]["delta"] for event in events]
    assert [at for at, delta in enumerate(deltas) if delta.get("role")] == [0]
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert [at for at, reason in enumerate(reasons) if reason] == [len(events) - 1]
    usage: dict[str, Any] = last["usage"]
    return usage


def process_of(running: Running, name: str) -> psutil.Process:
    """The process of an engine, by its socket file."""
    for pid in running.engine_pids():
        process = psutil.Process(pid)
        for place in process.net_connections("unix"):
            if str(place.laddr).endswith(socket_in(Path("/"), name)):
                return process
    raise AssertionError(f"{name} is at none of {running.engine_pids()}")


# Two llama.cpp engines


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_text_is_the_same_as_of_one_engine(
    pair: Running, alone: dict[str, Answer], prompt: str
) -> None:
    answer = pair.post(chat(prompt, **STREAM))
    usage = check_stream(answer)
    assert answer.text == content(alone[prompt])
    assert tokens(usage) == tokens(alone[prompt].json["usage"])
    assert usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
    told = receipt(pair, answer)
    assert told["replica"] == "writes-0"
    assert told["handover"]["s"] > 0
    assert told["handover"]["bytes"] > 20_000 * usage["prompt_tokens"]


def test_so_are_whole_answers_and_those_beside_each_other(
    pair: Running, alone: dict[str, Answer], folder: Path
) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(pair.post, [chat(prompt) for prompt in PROMPTS]))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert content(answer) == content(alone[prompt])
        assert tokens(answer.json["usage"]) == tokens(alone[prompt].json["usage"])
        assert receipt(pair, answer)["handover"]["bytes"] > 0
    assert list((folder / "kv").iterdir()) == []


def test_a_plain_prompt_goes_on_too(pair: Running) -> None:
    asked = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    whole = pair.post(asked, "/v1/completions")
    answer = pair.post({**asked, "stream": True}, "/v1/completions")
    *events, done = answer.events
    assert done == "[DONE]"
    assert {event["object"] for event in events} == {"text_completion"}
    assert "".join(e["choices"][0]["text"] for e in events) == whole.json["choices"][0]["text"]
    assert receipt(pair, answer)["handover"]["bytes"] > 0


@pytest.mark.parametrize("more", [{}, STREAM], ids=["whole", "streamed"])
def test_an_answer_may_end_with_its_first_token(
    pair: Running, alone: dict[str, Answer], more: dict[str, Any]
) -> None:
    answer = pair.post(chat(PROMPTS[0], **{**more, "max_tokens": 1}))
    if more:
        assert check_stream(answer)["completion_tokens"] == 1
        text, reason = answer.text, answer.events[-3]["choices"][0]["finish_reason"]
    else:
        text, reason = content(answer), answer.json["choices"][0]["finish_reason"]
        assert answer.json["usage"]["completion_tokens"] == 1
    assert text
    assert content(alone[PROMPTS[0]]).startswith(text)
    assert reason == "length"
    told = receipt(pair, answer)
    assert told["replica"] == "reads-0"
    assert "handover" not in told
    stopped = pair.post(chat(PROMPTS[0], stop=[text], **more))  # its first token is its end
    assert (stopped.text if more else content(stopped)) == ""
    assert receipt(pair, stopped)["replica"] == "reads-0"
    assert pair.working() == 0


def test_what_must_be_whole_is_written_by_the_writer(pair: Running) -> None:
    answer = pair.post(chat(PROMPTS[1], logprobs=True, **STREAM))
    check_stream(answer)
    chunks = [e["choices"][0] for e in answer.events[:-2]]
    told = [each["token"] for c in chunks if c.get("logprobs") for each in c["logprobs"]["content"]]
    assert "".join(told) == answer.text
    assert receipt(pair, answer)["handover"]["bytes"] > 0


def test_what_no_pair_can_do_is_refused(pair: Running) -> None:
    answer = pair.post(chat(PROMPTS[0], n=2))
    assert answer.status == 400
    assert "several answers" in answer.error["message"]


def test_a_writer_that_dies_on_the_way_loses_nothing(
    pair: Running, alone: dict[str, Answer], folder: Path
) -> None:
    writer = process_of(pair, "writes-0")
    writer.suspend()
    with Client(pair.address) as client:
        client.send(request_bytes(chat(PROMPTS[5], **STREAM)))
        head = client.head()
        chunks = client.chunks()
        first = next(chunks)  # it is there before the cache has gone anywhere
        writer.kill()
        answer = Answer(head.status, head.headers, first + b"".join(chunks))
    usage = check_stream(answer)
    assert usage["completion_tokens"] == TOKENS
    assert answer.text[:20] == content(alone[PROMPTS[5]])[:20]
    assert receipt(pair, answer)["outcome"] == "finished"
    assert list((folder / "kv").iterdir()) == []


def test_a_client_may_leave_on_the_way(
    pair: Running, alone: dict[str, Answer], folder: Path
) -> None:
    writer = process_of(pair, "writes-0")
    writer.suspend()
    try:
        for _ in range(5):  # more than there are slots
            with Client(pair.address) as client:
                client.send(request_bytes(chat(PROMPTS[6], **STREAM)))
                client.head()
                next(client.chunks())
        wait_for(lambda: pair.working() == 0)
    finally:
        writer.resume()
    wait_for(lambda: list((folder / "kv").iterdir()) == [])
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(pair.post, [chat(PROMPTS[6])] * 4):
            assert content(answer) == content(alone[PROMPTS[6]])
            assert receipt(pair, answer)["replica"] == "writes-0"


# Answers that move


def test_a_draining_replica_hands_its_answers_over(
    folder: Path, alone: dict[str, Answer], tmp_path: Path
) -> None:
    del alone
    asked = [chat(prompt, max_tokens=150, ignore_eos=True, **STREAM) for prompt in PROMPTS[:4]]
    stuck = chat(PROMPTS[5], max_tokens=150, ignore_eos=True, logprobs=True, **STREAM)
    caches, spread = tmp_path / "kv", '[policy]\nroute = "latency"\n'
    with fleet(tmp_path, embedded("one", caches)) as running:
        expected = [running.post(each).text for each in (*asked, stuck)]
    with fleet(tmp_path, spread, embedded("two", caches, replicas=2)) as running:
        begun = threading.Barrier(6)

        def post(document: dict[str, Any]) -> Answer:
            with Client(running.address) as client:
                client.send(request_bytes(document))
                head = client.head()
                chunks = client.chunks()
                said = [next(chunks) for _ in range(4)]
                begun.wait(60)
                return Answer(head.status, head.headers, b"".join([*said, *chunks]))

        with ThreadPoolExecutor(5) as pool:
            answers = pool.map(post, [*asked, stuck])
            begun.wait(60)
            (tmp_path / "fleet.toml").write_text(spread + embedded("two", caches, replicas=1))
            running.process.send_signal(signal.SIGHUP)
            found = list(answers)
        receipts = [receipt(running, answer) for answer in found]
        for answer, text, told in zip(found, expected, receipts, strict=True):
            assert check_stream(answer)["completion_tokens"] == 150
            assert answer.text == text, told
        moved = [told for told in receipts if "handover" in told]
        assert moved, receipts
        assert {(told["replica"], told["moves"]) for told in moved} == {("two-0", 1)}
        assert "handover" not in receipts[4]  # its probabilities would be told twice: it stayed
        assert list(caches.iterdir()) == []


# By URL


SERVER = """
import sys, xllamacpp
path, folder, port = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = path, {"smollm2-135m-instruct"}
params.hostnames, params.port = ["127.0.0.1"], int(port)
params.ui, params.endpoint_slots, params.verbosity = False, True, 2
params.n_parallel, params.n_ctx, params.kv_unified = 4, 4096, False
params.n_batch = params.n_ubatch = 64
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.n_threads_http = 16
params.slot_save_path = folder + "/"
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_llama_servers_elsewhere_do_it_as_well(alone: dict[str, Answer], tmp_path: Path) -> None:

    path = store.ensure(models.model(MODEL), lambda *_: None)
    ports = (free_port(), free_port())
    command = [sys.executable, "-c", SERVER, str(path), str(tmp_path)]
    servers = [
        subprocess.Popen(
            [*command, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for port in ports
    ]
    try:
        for server in servers:
            assert server.stdout is not None
            assert server.stdout.readline()  # it listens
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        pools = [
            f'[[pools]]\nname = "{role}"\nkind = "llamacpp"\nmodel = "{MODEL}"\n'
            f'role = "{role}"\nurls = ["{url}"]\nslots = 4\nkv_folder = "{tmp_path}"\n'
            for role, url in zip(("prefill", "decode"), urls, strict=True)
        ]
        with fleet(tmp_path, *pools) as running:
            for prompt in PROMPTS[:3]:
                answer = running.post(chat(prompt, **STREAM))
                check_stream(answer)
                assert answer.text == content(alone[prompt])
                assert receipt(running, answer)["handover"]["bytes"] > 0
    finally:
        for server in servers:
            server.kill()
            server.wait()


# Emulated engines: the example


EMULATED = "llama-3.1-8b"


@pytest.fixture(scope="module")
def example() -> Iterator[Running]:
    with gateway("--fleet", str(EXAMPLE)) as running:
        yield running


def words(prompt: str, count: int) -> str:
    return voice(f"{prompt}user{len(prompt.encode())}".encode()).text(0, count)


def emulated(prompt: str, count: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    asked = {"model": EMULATED, "messages": messages, "max_tokens": count, "ignore_eos": True}
    return asked | more


@pytest.mark.parametrize("count", [1, 2, 3, 200])
def test_gpus_read_and_lpus_write(example: Running, count: int) -> None:
    prompt = "Hello there. " * 100
    whole = example.post(emulated(prompt, count))
    assert content(whole) == words(prompt, count)
    assert "kv_transfer_params" not in whole.json
    streamed = example.post(emulated(prompt, count, **STREAM))
    usage = check_stream(streamed)
    assert streamed.text == words(prompt, count)
    assert tokens(usage) == tokens(whole.json["usage"]) == (325, count, 325 + count)
    for answer in (whole, streamed):
        told = receipt(example, answer)
        if count == 1:
            assert told["processor"] == "h100"
            assert "handover" not in told
        else:
            assert told["processor"] == "groq-3-lpu"
            assert told["handover"]["s"] > 0
            assert told["handover"]["bytes"] > 1_000_000


def test_many_at_once_are_all_exact(example: Running) -> None:
    prompts = [f"Prompt {number}. " * 20 for number in range(60)]
    with ThreadPoolExecutor(20) as pool:
        asked = [emulated(prompt, 50, stream=True) for prompt in prompts]
        for prompt, answer in zip(prompts, pool.map(example.post, asked), strict=True):
            assert answer.text == words(prompt, 50)
    assert example.working() == 0


def test_an_emulated_writer_that_dies_on_the_way_loses_nothing(example: Running) -> None:
    writer = process_of(example, "lpu-0")
    writer.suspend()
    with Client(example.address) as client:
        client.send(request_bytes(emulated("Hello", 40, **STREAM)))
        head = client.head()
        chunks = client.chunks()
        first = next(chunks)
        writer.kill()
        answer = Answer(head.status, head.headers, first + b"".join(chunks))
    assert check_stream(answer)["completion_tokens"] == 40
    assert answer.text == words("Hello", 40)


# Pieces


def test_a_request_gets_the_slot_that_began_alike_or_the_oldest() -> None:
    seats = Seats(3)
    assert [seats.take(b"one"), seats.take(b"two"), seats.take(b"six")] == [0, 1, 2]
    assert seats.take(b"more") == -1
    seats.give(2, b"a long conversation")
    seats.give(0, b"another one")
    assert seats.take(b"a long conversation goes on") == 2
    assert seats.take(b"z") == 0
    assert seats.take(b"z") == -1
    seats.give(1, b"x")
    assert seats.oldest() == 1


def test_the_tokens_of_a_saved_slot_are_read() -> None:
    ids = (5, 6, 7)
    magic = 0x67677371
    assert kv.ids_in(struct.pack("<III3i", magic, 2, 3, *ids) + b"state") == ids
    newer = struct.pack("<III7i", magic, 4, 7, -1, 1, 3, *ids, 0)
    assert kv.ids_in(newer + b"state") == ids
    for broken in (b"", newer[:20], b"GGUF" + newer[4:], newer[:16] + b"\7" + newer[17:]):
        with pytest.raises(ValueError, match="saved slot"):
            kv.ids_in(broken)


@pytest.mark.parametrize(
    ("pool", "told"),
    [
        ('kind = "groq"\nurls = ["http://h"]\nrole = "prefill"', "can't be handed over by groq"),
        ('kind = "embedded"\nrole = "prefill"', "kv_folder is missing"),
        ('kind = "vllm"\nurls = ["http://h"]\nrole = "decode"', "no pool of m does prefill"),
        ('kind = "vllm"\nurls = ["http://h"]\nkv_folder = "/x"', "save no slots"),
        ('kind = "llamacpp"\nurls = ["http://h"]\nkv_folder = "/x"', "slots is missing"),
        ('kind = "llamacpp"\nurls = ["http://h"]\nkv_folder = "/nowhere"\nslots = 4', "no folder"),
    ],
)
def test_a_fleet_that_can_not_hand_over_does_not_start(
    tmp_path: Path, pool: str, told: str
) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(f'[[pools]]\nname = "p"\nmodel = "m"\n{pool}\n')
    command = [sys.executable, "-m", "tokenworks", "up", "--port", "0", "--fleet", str(file)]
    variables = {**os.environ, "TOKENWORKS_STATE": str(tmp_path)}
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=variables, check=False
    )
    assert found.returncode != 0
    assert told in found.stderr
    assert "Traceback" not in found.stderr
