"""The deterministic machine behind the gateway: real text, exact cycles on the receipt."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lpu.test_safetensors import gguf
from tests.support import MODEL, Client, Running, gateway, request_bytes, run, wait_for
from tokenworks import __version__
from tokenworks.lpu.program import VERSION

pytestmark = pytest.mark.engine
# A machine in software reads some tokens a second: questions are short.
COMPLETIONS = "/v1/completions"
ASK = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 3}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with gateway("--engine", "lpu", home=tmp_path_factory.mktemp("config")) as running:
        yield running


def test_its_answers_are_real_and_their_cycles_exact(machine: Running) -> None:
    whole = machine.post(ASK, COMPLETIONS)
    assert whole.json["choices"][0]["text"] == " Paris.\n"
    usage = whole.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 3)
    # Seven passes; the head is left out where its scores aren't asked for.
    assert 7 * 90_000 < usage["cycles"] < 7 * 100_000
    assert machine.receipt(whole)["cycles"] == usage["cycles"]
    # Latency is known to the cycle: the same question takes the same, streamed too.
    with_usage = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    stream = machine.post(with_usage, COMPLETIONS)
    pieces = [each["text"] for event in stream.events[:-2] for each in event["choices"]]
    assert "".join(pieces) == whole.json["choices"][0]["text"]
    assert stream.events[-2]["usage"]["cycles"] == usage["cycles"]
    assert stream.events[-1] == "[DONE]"


def test_it_chats(machine: Running) -> None:
    messages = [
        {"role": "system", "content": "Geography"},
        {"role": "user", "content": [{"type": "text", "text": "Capital of France?"}]},
    ]
    said = machine.post({"model": MODEL, "messages": messages, "max_tokens": 7}).json
    assert said["choices"][0]["message"]["content"] == "The capital of France is Paris."


def test_what_it_cannot_do_is_refused_and_what_changes_nothing_is_told(machine: Running) -> None:
    for fields in ({"n": 2}, {"logprobs": 1}):
        assert machine.post({**ASK, **fields}, COMPLETIONS).status == 400
    cut = machine.post({**ASK, "stop": ["ris", "zzz"], "temperature": 0.5}, COMPLETIONS)
    assert cut.json["choices"][0]["text"] == " Pa"
    assert "temperature" in cut.headers["x-tokenworks-warning"]
    long = machine.post({**ASK, "prompt": "word " * 3000}, COMPLETIONS)
    assert long.status == 400
    assert long.error["code"] == "context_length_exceeded"


def test_a_client_that_leaves_frees_it_and_spoils_nothing(machine: Running) -> None:
    right = machine.post(ASK, COMPLETIONS).json
    with Client(machine.address) as client:  # who leaves while his prompt is read
        client.send(request_bytes({**ASK, "prompt": "word " * 500, "stream": True}, COMPLETIONS))
        wait_for(lambda: machine.working() == 1)
    wait_for(lambda: machine.working() == 0)
    after = machine.post(ASK, COMPLETIONS).json
    assert after["choices"][0]["text"] == right["choices"][0]["text"]
    assert after["usage"]["cycles"] == right["usage"]["cycles"]


def test_a_damaged_program_is_one_line(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    model.write_bytes(gguf(0))
    program = tmp_path / "programs" / f"tiny-{__version__}-{VERSION}.lpu"
    done = run("lpu", "compile", str(model), "--out", str(program))
    assert done.returncode == 0, done.stderr
    whole = program.read_bytes()
    for raw, told in (
        (whole[:-5], f"{program} is damaged or cut short: its length is wrong"),
        (whole[:-5] + bytes(5), f"{program} is damaged or cut short: its checksum is wrong"),
    ):
        program.write_bytes(raw)
        refused = run(
            "up", "--engine", "lpu", "--model", str(model), "--port", "0",
            TOKENWORKS_CACHE=str(tmp_path), TOKENWORKS_STATE=str(tmp_path / "state"),
        )  # fmt: skip
        assert refused.returncode == 2
        assert told in refused.stderr
        assert "Compile the model again" in refused.stderr
        assert "Traceback" not in refused.stderr
