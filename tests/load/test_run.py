"""Runs against a server that answers well, and in every wrong way: what is counted, and as what."""

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.load.server import BASE_TOKENS, Play, Server
from tokenworks.errors import UserError
from tokenworks.load import endpoint
from tokenworks.load.check import KINDS
from tokenworks.load.run import Load, Result, run
from tokenworks.load.wire import Bounds
from tokenworks.metrics.outcomes import Outcome
from tokenworks.workload import Request

MS = 1_000_000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def load(server: Server, model: str, requests: list[Request], **more: object) -> Load:
    fields = {"most_s": 30.0, "endpoint": endpoint.parse(server.url), "model": model}
    return Load(**{**fields, "requests": requests, **more})  # type: ignore[arg-type]


def some(count: int, gap_ms: int = 5, **more: object) -> list[Request]:
    return [Request(n * gap_ms * MS, 60 + n, 5 + n % 7, **more) for n in range(count)]  # type: ignore[arg-type]


def ended(result: Result) -> set[tuple[str, str]]:
    return {(outcome.status, outcome.reason) for outcome in result.outcomes}


def by_id(result: Result) -> list[Outcome]:
    return sorted(result.outcomes, key=lambda outcome: outcome.id)


@pytest.mark.parametrize("pace", [{}, {"concurrency": 3}, {"workers": 2}], ids=str)
def test_good_streams(server: Server, pace: dict[str, int]) -> None:
    server.plays.clear()
    requests = some(40, service_class="realtime")
    bounds = {"realtime": Bounds(10_000 * MS, 5000 * MS)}
    result = run(load(server, "good", requests, bounds=bounds, **pace))
    assert result.violations == {}
    assert result.is_whole
    outcomes = by_id(result)
    assert [o.id for o in outcomes] == list(range(40))
    assert ended(result) == {("finished", "")}
    for outcome, request in zip(outcomes, requests, strict=True):
        assert outcome.output_tokens == request.output_tokens
        assert outcome.prompt_tokens == request.prompt_tokens
        assert outcome.arrival_ns <= outcome.dispatched_ns < outcome.first_ns < outcome.last_ns
        if "concurrency" not in pace:
            assert outcome.arrival_ns == request.arrival_ns
        assert outcome.energy_nj == 500_000_000
        assert (outcome.replica, outcome.cached_tokens) == ("gpu-1", 4)
        assert outcome.ttft_promise_ns == 60_000 * MS
    # Every gap there was is in the distribution, and the tokens are those that were sent.
    total = result.summary.total
    assert total.output_tokens == sum(len(play.sent_ns) for play in server.plays)
    assert total.itl_ns is not None
    assert total.itl_ns.count == total.output_tokens - 40
    between = sum(o.last_ns - o.first_ns for o in outcomes)
    assert total.itl_ns.mean * total.itl_ns.count == pytest.approx(between, rel=0.01)
    assert total.ttft_kept is not None
    assert total.tpot_kept is not None
    assert (total.ttft_kept.kept, total.tpot_kept.kept) == (1.0, 0.0)
    assert total.attainment == 1.0
    assert result.summary.energy_j == pytest.approx(20.0)
    assert result.summary.usd is None


def test_the_clients_clock_and_the_servers(server: Server) -> None:
    """What the client measures can't be shorter than what the server knows it took."""
    server.plays.clear()
    result = run(load(server, "good", some(12), concurrency=1))
    assert len(server.plays) == 12
    for outcome, play in zip(by_id(result), server.plays, strict=True):
        assert outcome.ttft_ns >= play.sent_ns[0] - play.came_ns > 0
        # The last token was read no earlier than it was sent; the first no later than the second.
        took_ns = outcome.last_ns - outcome.arrival_ns
        assert took_ns >= play.sent_ns[-1] - play.came_ns
        assert outcome.output_tokens == len(play.sent_ns)


def test_connections_are_kept(server: Server) -> None:
    before = server.connections
    result = run(load(server, "good", some(20), concurrency=2))
    assert result.connections == 2
    # The probe's own, and one each time an address is looked for.
    assert server.connections - before <= 2 + 6


def test_whole_answers(server: Server) -> None:
    bounds = {"standard": Bounds(1, 1)}
    result = run(load(server, "good", some(20), is_stream=False, bounds=bounds))
    assert ended(result) == {("finished", "")}
    assert result.violations == {}
    total = result.summary.total
    assert total.ttft_ns is None
    assert total.e2e_ns is not None
    assert total.attainment == 1.0
    assert any("no first token" in note for note in result.notes)


@pytest.mark.parametrize("scene", ["uneven", "until_close"])
def test_unusual_but_good_streams(server: Server, scene: str) -> None:
    result = run(load(server, scene, some(4)))
    assert ended(result) == {("finished", "")}
    assert result.violations == {}


@pytest.mark.parametrize("kind", KINDS)
def test_each_violation_is_counted_and_shown(server: Server, kind: str) -> None:
    result = run(load(server, kind, some(3), concurrency=1))
    assert set(result.violations) == {kind}
    assert result.violations[kind].count == 3
    assert result.violations[kind].number == 0
    assert ended(result) == {("finished", "")}


@pytest.mark.parametrize(
    ("scene", "end"),
    [
        ("cut", ("failed", "cut")),
        ("unfinished", ("failed", "cut")),
        ("error_event", ("failed", "engine_lost")),
        ("no_http", ("failed", "malformed_http")),
        ("closed", ("failed", "closed")),
        ("broken", ("failed", "500")),
        ("limited", ("rejected", "429 rate_limit_exceeded")),
        ("full", ("rejected", "498 capacity")),
        ("away", ("rejected", "503")),
    ],
)
def test_how_requests_end(server: Server, scene: str, end: tuple[str, str]) -> None:
    result = run(load(server, scene, some(3)))
    assert ended(result) == {end}
    assert result.violations == {}
    assert len(result.outcomes) == 3
    reasons = result.summary.reasons["standard"]
    assert reasons == {end[1]: 3}
    if scene == "limited":
        assert any("3 of 3 refusals said when" in note for note in result.notes)


def test_a_run_is_bounded(server: Server) -> None:
    requests = [*some(3), Request(3600 * 1000 * MS, 50, 5)]
    result = run(load(server, "hangs", requests, most_s=0.5))
    assert ended(result) == {("cancelled", "out of time")}
    assert len(result.outcomes) == 3
    assert result.summary.total.output_tokens == 3
    assert any(note.startswith("1 requests were not sent") for note in result.notes)


def test_a_process_that_fails_is_no_run_without_its_requests(server: Server) -> None:
    """A request that no memory holds, when its time has come: nobody waits for that in the loop."""
    requests = [*some(4), Request(60 * MS, 10**17, 5)]
    result = run(load(server, "good", requests, workers=2))
    (lost,) = result.lost
    assert (lost.number, lost.requests) == (1, 3)
    assert lost.why == "exit code 1: MemoryError"
    assert "Traceback" in lost.said
    assert [outcome.id for outcome in by_id(result)] == [1, 3]
    with pytest.raises(UserError, match="Process 1 of the generator was lost: exit code 1"):
        run(load(server, "good", requests))


def test_what_an_endpoint_refuses_is_left_out(server: Server) -> None:
    server.plays.clear()
    requests = [*some(2, service_class="realtime"), Request(0, 80, 6)]
    result = run(load(server, "strict", requests))
    assert ended(result) == {("finished", "")}
    assert result.accepted.limit == "max_completion_tokens"
    assert not result.accepted.ignore_eos
    assert result.accepted.tiers == {"realtime": "performance"}
    assert result.accepted.base_tokens == BASE_TOKENS
    assert result.accepted.words_per_token == 1.0
    assert any("ignore_eos" in note for note in result.notes)
    sent = [play.document for play in server.plays]
    assert all("ignore_eos" not in each and "max_tokens" not in each for each in sent)
    assert sorted(each.get("service_tier", "") for each in sent) == [
        "",
        "performance",
        "performance",
    ]


def test_shared_prefixes_are_the_same_text(server: Server) -> None:
    server.plays.clear()
    blocks = [(1, 2, 3), (1, 2, 4), (1, 2, 3), (5,)]
    requests = [
        Request(n, 160 + BASE_TOKENS, 3, prefix=prefix, prefix_block_tokens=40)
        for n, prefix in enumerate(blocks)
    ]
    run(load(server, "good", requests, concurrency=1))
    texts = [play.words for play in server.plays]
    assert [len(text) for text in texts] == [160] * 4
    assert texts[0][:80] == texts[1][:80]
    assert texts[0][:120] == texts[2][:120]
    assert texts[0][80:86] != texts[1][80:86]
    assert texts[0][120:126] != texts[2][120:126]
    assert texts[3][:6] != texts[0][:6]


def test_the_same_seed_sends_the_same(server: Server) -> None:
    def sent(seed: int) -> list[Play]:
        server.plays.clear()
        run(load(server, "good", some(5), concurrency=1, seed=seed))
        return list(server.plays)

    first, again, other = ([play.document for play in sent(seed)] for seed in (1, 1, 2))
    assert first == again
    texts = [each["messages"][0]["content"][:30] for each in first + other]
    assert len(set(texts)) == 10


def test_each_tenant_has_its_key(server: Server) -> None:
    server.plays.clear()
    server.heads.clear()
    requests = [Request(0, 50, 4, tenant="a"), Request(0, 50, 4), Request(0, 50, 4, tenant="b")]
    keys = {"": "common", "a": "own"}
    run(load(server, "good", requests, keys=keys, concurrency=1))
    found = [head.partition(b"authorization: ")[2].split(b"\r\n")[0] for head in server.heads]
    assert found == [b"Bearer own", b"Bearer common", b"Bearer common"]


@pytest.mark.parametrize(
    ("scene", "told"),
    [("unknown", "no such model"), ("locked", "--key-env")],
)
def test_an_endpoint_that_refuses_is_one_line(server: Server, scene: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        run(load(server, scene, some(2)))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are checked: one's own authority is named by SSL_CERT_FILE."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-keyout", str(key), "-out", str(cert), "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=IP:127.0.0.1"),
    ]
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command here to make a certificate")
    subprocess.run(command, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    with Server(tls) as secure:
        with pytest.raises(UserError, match="certificate verify failed"):
            run(load(secure, "good", some(5)))
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        result = run(load(secure, "good", some(5)))
        assert ended(result) == {("finished", "")}
        assert result.violations == {}
        with pytest.raises(UserError, match="http or https"):
            run(
                Load(
                    endpoint=endpoint.parse(secure.url.replace("https", "http")),
                    model="good",
                    requests=some(1),
                    most_s=5.0,
                )
            )


def test_nobody_there() -> None:
    there = endpoint.parse("http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"cannot connect to http://127\.0\.0\.1:9/v1"):
        run(Load(endpoint=there, model="m", requests=some(1), most_s=1.0))
