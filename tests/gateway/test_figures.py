"""What the gateway tells Prometheus: read by the client library's own parser, and by Grafana."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.scripted import ScriptedEngine
from tests.support import Client, Running, exchange, gateway, request_bytes, wait_for
from tokenworks.gateway.figures import Figures
from tokenworks.gateway.ledger.row import Row

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana.json"
MS = 1_000_000
HELLO = [{"role": "user", "content": "hello"}]


def families(text: bytes) -> dict[str, Metric]:
    """The text, parsed; each series is there once."""
    found = list(text_string_to_metric_families(text.decode()))
    series = [(s.name, *sorted(s.labels.items())) for family in found for s in family.samples]
    assert len(series) == len(set(series))
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


def samples(text: bytes) -> dict[str, float]:
    """A series' name with its labels' values, sorted: its value."""
    return {
        " ".join([s.name, *(value for _, value in sorted(s.labels.items()))]): s.value
        for family in families(text).values()
        for s in family.samples
    }


def row(number: int = 0, **more: Any) -> Row:
    fields = {
        "model": "m", "route": "chat/completions", "replica": "gpu-0", "prompt_tokens": 30,
        "output_tokens": 11, "queue_ns": MS, "ttft_ns": 40 * MS, "total_ns": 140 * MS,
        "promise_ttft_ns": 80 * MS, "promise_tpot_ns": 8 * MS, "confidence": 0.9,
        "energy_j": 2.5, "energy_grade": "modelled",
    }  # fmt: skip
    return Row(f"req_{number}", 1, **{**fields, **more})


def told(*rows: Row) -> dict[str, float]:
    figures = Figures()
    for one in rows:
        figures.note(one)
    return samples(figures.text())


def test_promises_are_counted_by_what_became_of_them_and_by_what_they_left() -> None:
    found = told(
        row(1),  # half of its first token's time; each after it took 10 ms of 8
        row(2, total_ns=100 * MS),  # 6 of 8
        row(3, outcome="rejected", status=429, replica="", promise_ttft_ns=-1, promise_tpot_ns=-1),
        row(4, outcome="failed", status=502, reason="not_resumable", moves=3, hedged=True),
    )
    assert found["tokenworks_promises_total m gpu-0 standard kept"] == 1
    assert found["tokenworks_promises_total m gpu-0 standard broken"] == 2
    ratio = "tokenworks_promise_used_ratio"
    assert found[f"{ratio}_bucket ttft 0.5 gpu-0 standard"] == 3
    assert found[f"{ratio}_bucket ttft 0.4 gpu-0 standard"] == 0
    assert found[f"{ratio}_bucket tpot 1.0 gpu-0 standard"] == 1
    assert found[f"{ratio}_bucket tpot 1.25 gpu-0 standard"] == 3
    assert found[f"{ratio}_sum tpot gpu-0 standard"] == pytest.approx(0.75 + 2 * 1.25)
    assert found["tokenworks_unresumable_total not_resumable"] == 1
    assert found["tokenworks_moves_total"] == 3
    assert found["tokenworks_hedges_total"] == 1


def test_tokens_and_joules_are_of_whoever_made_them() -> None:
    found = told(row(1), row(2, replica="lpu-0", output_tokens=64), row(3, output_tokens=0))
    assert found["vllm:generation_tokens_total m gpu-0"] == 11
    assert found["vllm:generation_tokens_total m lpu-0"] == 64
    assert found["vllm:prompt_tokens_total m gpu-0"] == 30
    assert found["gen_ai_client_token_usage_bucket m output 16.0"] == 1
    assert found["gen_ai_client_token_usage_bucket m output 64.0"] == 2
    assert found["gen_ai_client_token_usage_sum m input"] == 60
    assert found["tokenworks_request_energy_joules_total modelled m"] == 5


def test_a_thousand_ends_are_counted_without_being_asked() -> None:
    figures = Figures()
    for number in range(2500):
        figures.note(row(number))
    assert (
        samples(figures.text())["gen_ai_server_request_duration_seconds_count m standard"] == 2500
    )
    assert figures.outcomes() == {"finished": 2500}
    assert figures.said_by("gpu-0") == 11 * 2500
    (one,) = figures.classes()
    assert (one["finished"], one["kept"], one["broken"]) == (2500, 0, 2500)
    assert one["ttft_s"]["p50"] == pytest.approx(0.03, abs=0.01)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway with emulated engines, a power cap, and one engine that tells no telemetry."""
    file = tmp_path_factory.mktemp("fleet") / "fleet.toml"
    with ScriptedEngine() as engine:
        file.write_text(
            f'[[pools]]\nname = "far"\nmodel = "scripted"\nurls = ["{engine.url}"]\n'
            '[[pools]]\nname = "gpu"\nkind = "emulated"\nmodel = "llama-3.1-8b"\n'
            'processor = "h100"\nreplicas = 2\n[power]\ncap_w = 5000\n'
        )
        with gateway("--fleet", str(file)) as running:
            for tier in ("default", "priority"):
                request = {"model": "llama-3.1-8b", "messages": HELLO, "service_tier": tier}
                assert running.post({**request, "max_tokens": 4}).status == 200
            scripted = {"model": "scripted", "messages": [{"role": "user", "content": "dies"}]}
            assert running.post({**scripted, "stream": True}).status == 200
            wait_for(lambda: running.figures()["tokenworks_power_reserved_watts"] > 0)
            yield running


def metrics(running: Running) -> bytes:
    answer = exchange(running.address, b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return answer.body


def test_a_live_gateways_text_is_prometheus(mixed: Running) -> None:
    found = families(metrics(mixed))
    for family in found.values():
        assert family.documentation, family.name
    assert {
        *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
        *("vllm:prompt_tokens", "vllm:generation_tokens", "gen_ai_client_token_usage"),
        *("gen_ai_server_request_duration_seconds", "gen_ai_server_time_to_first_token_seconds"),
        *("gen_ai_server_time_per_output_token_seconds", "tokenworks_batches"),
        *("tokenworks_batch_lines", "tokenworks_ledger_broken", "tokenworks_connections"),
    } <= set(found)


def test_each_replicas_energy_is_the_sum_of_its_parts(mixed: Running) -> None:
    def drawn() -> dict[str, float]:
        return samples(metrics(mixed))

    wait_for(lambda: drawn()["tokenworks_replica_meter_joules_total llama-3.1-8b gpu-0"] > 0, 20)
    found = drawn()
    for replica in ("gpu-0", "gpu-1"):
        name, place = "tokenworks_replica_energy_joules_total llama-3.1-8b", f"{replica}"
        parts = [found[f"{name} {part} {place}"] for part in ("attributed", "idle", "unattributed")]
        meter = found[f"tokenworks_replica_meter_joules_total llama-3.1-8b {replica}"]
        assert sum(parts) == pytest.approx(meter, rel=1e-9)
        assert found[f"tokenworks_replica_measured_joules_total llama-3.1-8b {replica}"] == 0
        assert found[f"tokenworks_replica_watts llama-3.1-8b {replica}"] > 0
    assert found["tokenworks_power_cap_watts"] == 5000
    assert found["tokenworks_connections"] >= 1
    assert found["tokenworks_ledger_broken"] == 0
    assert found["tokenworks_unresumable_total not_resumable"] == 1


def test_engines_of_the_gateways_own_tell_how_busy_they_are(mixed: Running) -> None:
    """As those elsewhere do."""
    asked = {"model": "llama-3.1-8b", "messages": HELLO, "max_tokens": 4000, "ignore_eos": True}
    with Client(mixed.address) as client:
        client.send(request_bytes({**asked, "stream": True}))
        client.head()

        def told() -> list[dict[str, float]]:
            order = b"GET /admin/state HTTP/1.1\r\nhost: localhost\r\n\r\n"
            engines = exchange(mixed.address, order).json["engines"]
            mine = [each for each in engines if each["name"].startswith("gpu")]
            return [each.get("telemetry") or {"running": -1} for each in mine]

        wait_for(lambda: sorted(each["running"] for each in told()) == [0, 1], 20)
        assert {each["waiting"] for each in told()} == {0}
        found = samples(metrics(mixed))
        name = "vllm:kv_cache_usage_perc llama-3.1-8b"
        assert max(found[f"{name} gpu-0"], found[f"{name} gpu-1"]) > 0


def test_every_expression_of_the_dashboard_is_of_metrics_that_are_there(mixed: Running) -> None:
    found = families(metrics(mixed))
    there = {s.name for family in found.values() for s in family.samples} | set(found)
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(targets) > 30
    used: set[str] = set()
    for target in targets:
        names = set(re.findall(r"\b(?:vllm:|gen_ai_|tokenworks_)[a-z_:]+", target["expr"]))
        labels = set(re.findall(r"\b(gen_ai_token_type|gen_ai_request_model)\b", target["expr"]))
        assert names - labels, target
        assert names - labels <= there, target
        used |= names - labels
    families_used = {re.sub(r"_(total|bucket)$", "", name) for name in used}
    assert set(found) <= families_used, "a metric is on no panel"


def test_the_documents_name_every_metric(mixed: Running) -> None:
    page = (DASHBOARD.parents[1] / "docs" / "operate.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| `")]
    names = set(re.findall(r"`((?:vllm:|gen_ai_|tokenworks_)[a-z_:]+)`", "\n".join(table)))
    found = families(metrics(mixed))
    kinds = {f"{n}_total" if family.type == "counter" else n for n, family in found.items()}
    assert names == kinds
