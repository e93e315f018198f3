"""Traces, logs and all else that is written of requests: what it says, and what it never says."""

import gzip
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.gateway.scripted import HEAD, USAGE, Play, ScriptedEngine, event, framed, scene
from tests.support import Client, Running, exchange, gateway, request_bytes, run, wait_for
from tokenworks.errors import UserError
from tokenworks.gateway.keys import Keys
from tokenworks.gateway.ledger.row import Row
from tokenworks.gateway.tracing import Tracing, attributes, endpoint_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT, SAID, TOOL = "PLUM-in-the-prompt", "PEAR-in-the-answer", "FIG_in_the_tool"


@scene
async def answers(play: Play) -> None:
    """A word of its own, streamed or whole."""
    if play.document.get("stream"):
        tail = [event(), event("", choices=[], usage=USAGE), b"data: [DONE]\n\n"]
        await play.send(HEAD, framed(event(SAID)), *map(framed, tail), b"0\r\n\r\n", pause_s=0.01)
        return
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": SAID},
        "finish_reason": "stop",
    }
    whole = {"id": "c1", "object": "chat.completion", "created": 1, "model": "scripted"}
    await play.whole(json.dumps({**whole, "choices": [choice], "usage": USAGE}).encode())


@scene
async def raves(play: Play) -> None:
    """An answer that can't be read, in mid-stream."""
    await play.send(HEAD, framed(event(SAID)), framed(b'data: {"choices": "%b' % SAID.encode()))
    await play.send(b"zz\r\n" + SAID.encode() + b"\r\n", pause_s=0.02)
    await play.until_gone()


class Collector:
    """A collector of OTLP over HTTP, until the block ends."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()
        self.resource: dict[str, Any] = {}
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.paths.add(self.path)
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            self.resource = values(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def __enter__(self) -> "Collector":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def values(attributes: Any) -> dict[str, Any]:
    found = {}
    for one in attributes:
        kind = one.value.WhichOneof("value")
        found[one.key] = getattr(one.value, kind)
    return found


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as one:
        yield one


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def secret(home: Path) -> str:
    return Keys(home / "keys.json").add("alice", tenant="acme")


@pytest.fixture(scope="module")
def watched(
    collector: Collector, home: Path, secret: str, scripted_engine: ScriptedEngine
) -> Iterator[Running]:
    """A gateway that tells all it can, to everybody who may hear it."""
    del secret  # only made before
    file = home / "fleet.toml"
    file.write_text(
        f'require_key = true\n[watch]\notlp = "{collector.url}"\nlog_json = true\n'
        f'log_requests = true\nrecord = "{home}/trace.jsonl"\nevents = "{home}/events.jsonl"\n'
        f'[[pools]]\nname = "one"\nmodel = "scripted"\nurls = ["{scripted_engine.url}"]\n'
        'key_env = "UPSTREAM_KEY"\n'
    )
    with gateway(
        "--fleet", str(file), "--verbose",
        home=home, UPSTREAM_KEY="UPSTREAM-SECRET", TOKENWORKS_STATE=str(home / "state"),
    ) as running:  # fmt: skip
        yield running


def test_a_request_is_one_span_under_its_clients(
    watched: Running, collector: Collector, secret: str
) -> None:
    bearer = {"authorization": f"Bearer {secret}"}
    parent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    answer = watched.post(ask("answers", service_tier="priority", stream=True), **bearer, **parent)
    assert answer.status == 200
    identity = answer.headers["x-request-id"]

    def mine() -> list[Span]:
        found = [(span, values(span.attributes)) for span in collector.spans]
        return [span for span, said in found if said.get("gen_ai.response.id") == identity]

    wait_for(lambda: bool(mine()), 20)
    (span,) = mine()
    assert collector.paths == {"/v1/traces"}
    assert collector.resource["service.name"] == "tokenworks"
    assert span.name == "chat scripted"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    said = values(span.attributes)
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.request.model"] == "scripted"
    assert said["gen_ai.usage.input_tokens"] == USAGE["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == USAGE["completion_tokens"]
    assert said["openai.response.service_tier"] == "priority"
    assert said["tokenworks.replica"] == "one-0"
    assert said["tokenworks.tenant"] == "acme"
    assert said["tokenworks.outcome"] == "finished"
    assert said["tokenworks.moves"] == 0
    assert said["tokenworks.energy_grade"] == "modelled"
    assert said["tokenworks.promise.ttft_s"] > 0
    receipt_head = f"GET /v1/receipts/{identity} HTTP/1.1\r\nhost: h\r\n"
    receipt = exchange(
        watched.address, f"{receipt_head}authorization: Bearer {secret}\r\n\r\n".encode()
    ).json
    lasted_ns = span.end_time_unix_nano - span.start_time_unix_nano
    assert lasted_ns == pytest.approx(receipt["actual"]["e2e_s"] * 1e9, abs=1000)
    assert said["gen_ai.response.time_to_first_chunk"] == receipt["actual"]["ttft_s"]


def test_a_known_head_keeps_its_trace_and_the_next_has_its_own(
    watched: Running, collector: Collector, secret: str
) -> None:
    ids = []
    heads = [f"00-{TRACE}-{PARENT}-01"] * 2 + ["", "nonsense", f"00-{TRACE[::-1]}-{PARENT}-01"]
    with Client(watched.address) as client:
        for head in heads:
            more = {"traceparent": head} if head else {}
            bearer = f"Bearer {secret}"
            client.send(request_bytes(ask("answers"), authorization=bearer, **more))
            answer = client.answer()
            assert answer.status == 200
            ids.append(answer.headers["x-request-id"])

    def traces() -> dict[str, str]:
        found = [(values(span.attributes), span) for span in collector.spans]
        return {said["gen_ai.response.id"]: span.trace_id.hex() for said, span in found}

    wait_for(lambda: set(ids) <= set(traces()), 20)
    found = [traces()[identity] for identity in ids]
    assert found[:2] == [TRACE, TRACE]
    assert found[4] == TRACE[::-1]
    assert len({TRACE, found[2], found[3]}) == 3


def test_a_line_for_each_request_in_json(watched: Running, secret: str) -> None:
    identity = watched.post(ask("answers"), authorization=f"Bearer {secret}").headers[
        "x-request-id"
    ]
    wait_for(lambda: any(f'"{identity}"' in line for line in watched.log), 10)
    (line,) = [json.loads(line) for line in watched.log if f'"id":"{identity}"' in line]
    assert line["level"] == "info"
    assert line["logger"] == "tokenworks.requests"
    assert (line["tenant"], line["model"], line["replica"]) == ("acme", "scripted", "one-0")
    assert (line["outcome"], line["status"]) == ("finished", 200)
    assert (line["prompt_tokens"], line["output_tokens"]) == (7, 3)
    assert line["total_s"] >= line["queue_s"] > 0


def test_neither_prompts_answers_nor_keys_are_written_anywhere(
    watched: Running, collector: Collector, home: Path, secret: str
) -> None:
    bearer = {"authorization": f"Bearer {secret}"}
    tool = {"type": "function", "function": {"name": TOOL, "parameters": {"type": "object"}}}
    bodies: list[Any] = [
        ask(f"answers {PROMPT}"),
        ask(f"answers {PROMPT}", stream=True, tools=[tool], user=PROMPT, metadata={"a": PROMPT}),
        ask(f"answers {PROMPT} " + f"{PROMPT} " * 400, stream=True),  # its prefix is hashed
        ask(f"raves {PROMPT}", stream=True),
        ask(f"dies {PROMPT}", stream=True),
        ask(f"babbles {PROMPT}"),
        ask(f"fails {PROMPT}"),
        ask(f"refuses {PROMPT}"),
        {**ask(f"answers {PROMPT}"), PROMPT: 1},  # an unknown field
        {**ask(f"answers {PROMPT}"), "temperature": PROMPT},
        b'{"messages": "' + PROMPT.encode(),
        b"\xff\xfe" + PROMPT.encode(),
    ]
    for body in bodies:
        watched.post(body, **bearer)
    wrong = f"tw-{'0' * 12}-{'x' * 43}"
    assert watched.post(ask(f"answers {PROMPT}"), authorization=f"Bearer {wrong}").status == 401
    with Client(watched.address) as client:  # one that hangs up
        client.send(request_bytes(ask(f"drips {PROMPT}", stream=True), **bearer))
        client.head()
    last = watched.post(ask("answers"), **bearer).headers["x-request-id"]
    wait_for(lambda: any(last.encode() in body for body in collector.bodies), 20)
    assert last in "".join(watched.log)
    metrics = f"GET /metrics HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {secret}\r\n\r\n"
    told = {
        "the log": "\n".join(watched.log).encode(),
        "traces": b"".join(collector.bodies),
        "metrics": exchange(watched.address, metrics.encode()).body,
    }
    files = [path for path in home.rglob("*") if path.is_file() and path.name != "fleet.toml"]
    assert {"ledger.sqlite", "trace.jsonl", "events.jsonl"} <= {path.name for path in files}
    told |= {str(path): path.read_bytes() for path in files}
    hidden = [PROMPT, SAID, TOOL, secret, secret.rpartition("-")[2], wrong, "UPSTREAM-SECRET"]
    for place, data in told.items():
        for word in hidden:
            assert word.encode() not in data, f"{word} is in {place}"


def test_spans_of_what_failed_say_so() -> None:
    row = Row("r", 1, outcome="failed", reason="engine_lost", status=502, service_class="realtime")
    said = attributes(row, "chat")
    assert said["error.type"] == "engine_lost"
    assert said["http.response.status_code"] == 502
    assert said["openai.request.service_tier"] == "priority"
    assert not {"tokenworks.replica", "tokenworks.energy_j", "tokenworks.batch"} & set(said)


def test_rows_that_come_too_fast_are_let_go(caplog: pytest.LogCaptureFixture) -> None:
    with Collector() as one:
        tracing = Tracing(one.url)
        for number in range(10_007):
            tracing.note(Row(f"r{number}", 1, total_ns=5), b"")
        tracing.close()
        assert any("7 requests have no span" in line for line in caplog.messages)
        assert 0 < len(one.spans) <= 10_000


def test_where_a_collector_listens() -> None:
    assert endpoint_of("http://h:4318") == "http://h:4318/v1/traces"
    assert endpoint_of("http://h:4318/") == "http://h:4318/v1/traces"
    assert endpoint_of("https://h/otlp/traces") == "https://h/otlp/traces"
    with pytest.raises(UserError, match=r"watch.otlp 'h:4318' is no http or https URL"):
        endpoint_of("h:4318")


def test_without_the_library_it_is_one_line(
    tmp_path: Path, scripted_engine: ScriptedEngine
) -> None:
    """As where the extra is not installed: the package can't be imported."""
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("raise ImportError('not here')")
    file = tmp_path / "fleet.toml"
    file.write_text(
        f'[watch]\notlp = "http://127.0.0.1:1"\n[engine]\nurl = "{scripted_engine.url}"\n'
    )
    path = ":".join([str(tmp_path), *(p for p in sys.path if p)])
    state = str(tmp_path / "state")
    done = run("up", "--port", "0", "--fleet", str(file), PYTHONPATH=path, TOKENWORKS_STATE=state)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "watch.otlp needs the OpenTelemetry SDK" in line
    assert "pip install 'tokenworks[otel]'" in line


def test_a_collector_that_is_not_there_harms_nobody(
    tmp_path: Path, scripted_engine: ScriptedEngine
) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(
        f'[watch]\notlp = "http://127.0.0.1:1"\n[engine]\nurl = "{scripted_engine.url}"\n'
    )
    with gateway("--fleet", str(file)) as running:
        for _ in range(3):
            assert running.post(ask("answers")).status == 200
        assert running.stop() == 0
