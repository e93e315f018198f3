"""The HTTP side: limits, malformed messages, wrong methods, keys."""

import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gateway.scripted import ScriptedEngine
from tests.gateway.test_relay import STREAM, ask
from tests.support import Answer, Client, Running, exchange, gateway, request_bytes, run, wait_for


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /health", 200),
        ("GET /metrics", 200),
        ("GET /v1/models", 200),
        ("GET /openai/v1/models", 200),
        ("GET /v1/models/scripted", 200),
        ("GET /v1/models?limit=1", 200),
        ("GET http://localhost/v1/models", 200),
        ("GET /v1/models/other", 404),
        ("GET /v1/nothing", 404),
        ("POST /v1/models", 405),
        ("GET /v1/chat/completions", 405),
        ("DELETE /openai/v1/completions", 405),
        ("OPTIONS *", 400),
        ("GET /\xff", 400),
        ("FROB /", 400),
        ("CONNECT example.com:443", 400),
    ],
)
def test_routes(relay: Running, request_line: str, status: int) -> None:
    answer = exchange(
        relay.address, f"{request_line} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode("latin-1")
    )
    assert answer.status == status
    if status >= 400:
        assert answer.error["message"]
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize("base", ["/v1", "/openai/v1"])
def test_both_bases_serve(relay: Running, base: str) -> None:
    assert relay.post(ask("good"), f"{base}/chat/completions").status == 200
    assert relay.post(ask("good"), f"{base}/chat/completions?api-version=1").status == 200


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content_type": "text/plain"}, 415, "unsupported_media_type"),
        ({"content_type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        ({"content_type": "Application/JSON; charset=utf-8"}, 200, None),
        ({"content_encoding": "gzip"}, 415, "unsupported_content_encoding"),
        ({"host": "evil.example"}, 403, "unknown_host"),
        ({"host": "127.0.0.1:1"}, 200, None),
        ({"host": "[::1]:80"}, 200, None),
        ({"content_length": str(10**12)}, 413, "body_too_large"),
        ({"x_large": "y" * 70_000}, 431, "headers_too_large"),
        ({"connection": "Upgrade", "upgrade": "h2c"}, 200, None),
    ],
)
def test_headers(relay: Running, headers: dict[str, str], status: int, code: str | None) -> None:
    with Client(relay.address) as client:
        client.send(request_bytes(ask("good"), **headers))
        answer = client.answer()
        assert answer.status == status
        if code is not None:
            assert answer.error["code"] == code
        else:  # the connection can be used again
            client.send(request_bytes(ask("good")))
            assert client.answer().status == 200


def test_a_chunked_body_is_taken_and_bounded(relay: Running) -> None:
    body = request_bytes(ask("good")).partition(b"\r\n\r\n")[2]
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    chunks = b"".join(b"1\r\n%b\r\n" % bytes([byte]) for byte in body)
    assert exchange(relay.address, head + chunks + b"0\r\n\r\n").status == 200
    with Client(relay.address) as client:
        client.send(head)
        piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        for _ in range(33):
            client.send(piece)
        answer = client.answer()
    assert answer.status == 413
    assert answer.error["code"] == "body_too_large"


def test_a_client_that_waits_for_leave_to_send_gets_it(relay: Running) -> None:
    head, _, body = request_bytes(ask("good"), expect="100-continue").partition(b"\r\n\r\n")
    with Client(relay.address) as client:
        client.send(head + b"\r\n\r\n")
        assert client._until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue"
        client.send(body)
        assert client.answer().status == 200
    refused = request_bytes(ask("good"), expect="100-continue", content_type="text/plain")
    with Client(relay.address) as client:
        client.send(refused.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        assert client.answer().status == 415
        assert client.ended()


@dataclass
class Strict:
    """A gateway that asks for keys: where they are kept, and one that it takes."""

    running: Running
    home: Path
    key: str

    @property
    def address(self) -> tuple[str, int]:
        return self.running.address

    def ask(self, authorization: str) -> Answer:
        return self.running.post(ask("good"), authorization=authorization)


@pytest.fixture(scope="module")
def strict(
    scripted_engine: ScriptedEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Strict]:
    """A gateway with tight limits, and keys."""
    home = tmp_path_factory.mktemp("strict")
    settings = home / "factory.toml"
    settings.write_text(
        "require_key = true\n[limits]\nheader_s = 3\nbody_s = 3\nidle_s = 3\nreader_s = 3\n"
        "connections = 10\nbody_bytes = 10000\n"
    )
    made = run("keys", "add", "tester", TOKENWORKS_CONFIG=str(home))
    assert made.returncode == 0
    with gateway("--engine", scripted_engine.url, "--config", str(settings), home=home) as running:
        yield Strict(running, home, made.stdout.strip())


def test_slow_clients_are_let_go(strict: Strict) -> None:
    started = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
    bearer = f"authorization: Bearer {strict.key}\r\n".encode()
    whole = started + bearer + b"content-type: application/json\r\ncontent-length: 9\r\n\r\n"
    for sent, told in ((b"", False), (started, True), (whole + b"{", True)):
        with Client(strict.address, timeout_s=60) as client:
            since = time.monotonic()
            client.send(sent)
            if told:
                answer = client.answer()
                assert answer.status == 408
                assert answer.error["code"] == "timeout"
            assert client.ended()
            assert time.monotonic() - since > 2.9  # the limit is 3 s, and never less


def test_there_is_an_end_to_connections(strict: Strict) -> None:
    clients = [Client(strict.address) for _ in range(10)]
    try:
        time.sleep(0.2)
        with Client(strict.address) as one_more:
            answer = one_more.answer()
            assert answer.status == 503
            assert answer.error["code"] == "too_many_connections"
            assert answer.headers["retry-after"] == "1"
    finally:
        for client in clients:
            client.socket.close()
    wait_for(lambda: exchange(strict.address, b"GET /health HTTP/1.0\r\n\r\n").status == 200)


def test_a_reader_that_has_stopped_is_let_go(
    strict: Strict, scripted_engine: ScriptedEngine
) -> None:
    with Client(strict.address) as client:
        key = f"Bearer {strict.key}"
        client.send(request_bytes(ask("floods", **STREAM), authorization=key))
        assert client.head().status == 200
        wait_for(lambda: scripted_engine.open == 0, 30)


def test_keys(strict: Strict) -> None:
    key, home = strict.key, strict.home
    assert strict.ask(f"Bearer {key}").status == 200
    assert strict.ask(f"bearer {key}").status == 200
    for wrong in ("", "Bearer", f"Basic {key}", f"Bearer {key[:-1]}", f"Bearer {key}x", "Bearer é"):
        answer = strict.ask(wrong)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.error["type"] == "authentication_error"
    assert exchange(strict.address, b"GET /health HTTP/1.0\r\n\r\n").status == 200
    assert exchange(strict.address, b"GET /metrics HTTP/1.0\r\n\r\n").status == 401
    assert exchange(strict.address, b"GET /v1/models HTTP/1.0\r\n\r\n").status == 401

    stored = (home / "keys.json").read_text()
    assert key.split("-", 2)[2] not in stored
    assert (home / "keys.json").stat().st_mode & 0o077 == 0

    second = run("keys", "add", "second", TOKENWORKS_CONFIG=str(home)).stdout.strip()
    wait_for(lambda: strict.ask(f"Bearer {second}").status == 200)
    assert run("keys", "revoke", "second", TOKENWORKS_CONFIG=str(home)).returncode == 0
    wait_for(lambda: strict.ask(f"Bearer {second}").status == 401)


def test_an_open_address_needs_keys(scripted_engine: ScriptedEngine, tmp_path: Path) -> None:
    refused = run(
        "up", "--engine", scripted_engine.url, "--host", "0.0.0.0", TOKENWORKS_CONFIG=str(tmp_path)
    )
    assert refused.returncode == 2
    assert "refusing to listen on 0.0.0.0 without API keys" in refused.stderr
    assert "tokenworks keys add" in refused.stderr


def test_tls(scripted_engine: ScriptedEngine, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        (
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(key), "-out", str(cert)),
        ),
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("no openssl command here to make a certificate")
    context = ssl.create_default_context(cafile=str(cert))
    options = ("--engine", scripted_engine.url, "--tls-cert", str(cert), "--tls-key", str(key))
    with gateway(*options, home=tmp_path) as running:
        assert running.url.startswith("https://")
        with Client(running.address) as client:
            client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
            for _ in range(2):
                client.send(request_bytes(ask("good", **STREAM)))
                assert client.answer().text == "one two three"
    wrong = run(
        "up", "--engine", scripted_engine.url, "--tls-cert", str(key), "--tls-key", str(key)
    )
    assert wrong.returncode == 2
    assert "for TLS" in wrong.stderr


def test_a_port_in_use_is_one_clear_line(relay: Running, scripted_engine: ScriptedEngine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = run("up", "--engine", scripted_engine.url, "--port", port)
    assert refused.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_answers_end_before_the_gateway_does(
    scripted_engine: ScriptedEngine, tmp_path: Path
) -> None:
    with gateway("--engine", scripted_engine.url, home=tmp_path) as running:
        with Client(running.address) as client:
            client.send(request_bytes(ask("uneven", **STREAM)))
            client.head()
            running.process.terminate()
            events = b"".join(client.chunks())
        assert events.endswith(b"data: [DONE]\n\n")
        assert running.process.wait(10) == 0
