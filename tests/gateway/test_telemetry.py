"""What engines say of their load and their health. The pages are as those engines write them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenworks.gateway.telemetry import Health, Telemetry, health, read, read_slots
from tokenworks.gateway.traits import KINDS

# vLLM with two engines (data parallel) under one address.
VLLM = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 2.0
vllm:num_requests_running{engine="1",model_name="meta-llama/Llama-3.1-8B-Instruct"} 1.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 3.0
vllm:num_requests_waiting{engine="1",model_name="meta-llama/Llama-3.1-8B-Instruct"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 3.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="meta-llama/Llama-3.1-8B-Instruct"} 2.5e-01
vllm:prompt_tokens_total{engine="0"} 9.41e+08
"""

# SGLang with --enable-priority-scheduling: the whole under priority="", and its parts.
SGLANG = b"""\
sglang:num_running_reqs{engine_type="unified",model_name="m",priority="",tp_rank="0"} 4.0
sglang:num_running_reqs{engine_type="unified",model_name="m",priority="0",tp_rank="0"} 3.0
sglang:num_running_reqs{engine_type="unified",model_name="m",priority="-2",tp_rank="0"} 1.0
sglang:num_queue_reqs{model_name="m",priority=""} 2.0
sglang:num_queue_reqs{model_name="m",priority="0"} 2.0
sglang:token_usage{model_name="m",priority=""} 0.37
sglang:num_grammar_queue_reqs{model_name="m"} 9.0
"""

TRTLLM = b"""\
# TYPE trtllm_num_requests_running gauge
trtllm_num_requests_running{engine_type="undefined",model_name="m"} 5.0
trtllm_num_requests_waiting{engine_type="undefined",model_name="m"} 6.0
trtllm_kv_cache_utilization{engine_type="undefined",model_name="m"} 0.9
trtllm_num_requests_completed_total{model_name="m"} 1000.0
"""

# llama.cpp, as the xllamacpp 2026.10 of the tests writes it.
LLAMACPP = b"""\
# HELP llamacpp:requests_processing Number of requests processing
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
# HELP llamacpp:requests_deferred Number of requests deferred
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 2
llamacpp:predicted_tokens_seconds nan
"""

DYNAMO = b"""\
dynamo_frontend_inflight_requests{model="a"} 8
dynamo_frontend_inflight_requests{model="b"} 2
dynamo_frontend_queued_requests{model="a"} 3
"""


@pytest.mark.parametrize(
    ("kind", "page", "load"),
    [
        ("vllm", VLLM, Telemetry(3, 3, 0.375)),
        ("emulated", VLLM, Telemetry(3, 3, 0.375)),
        ("sglang", SGLANG, Telemetry(4, 2, 0.37)),
        ("sglang", SGLANG.replace(b"sglang:", b"sglang_"), Telemetry(4, 2, 0.37)),
        ("trtllm", TRTLLM, Telemetry(5, 6, 0.9)),
        ("trtllm", TRTLLM.replace(b"trtllm_", b"trtllm:"), Telemetry(5, 6, 0.9)),
        ("llamacpp", LLAMACPP, Telemetry(1, 2, -1.0)),
        ("embedded", LLAMACPP, Telemetry(1, 2, -1.0)),
        ("dynamo", DYNAMO, Telemetry(7, 3, -1.0)),
        ("vllm", LLAMACPP, None),
        ("vllm", b"", None),
        ("groq", VLLM, None),
    ],
)
def test_the_load_an_engine_tells(kind: str, page: bytes, load: Telemetry | None) -> None:
    assert read(KINDS[kind], page) == load


def test_an_older_vllm() -> None:
    page = b'vllm:num_requests_running 1\nvllm:gpu_cache_usage_perc{model_name="m"} 0.2'
    assert read(KINDS["vllm"], page) == Telemetry(1, -1, 0.2)


@pytest.mark.parametrize(
    ("line", "running"),
    [
        (b'vllm:num_requests_running{model_name="a}b {c"} 3', 3),
        (b"vllm:num_requests_running{} 3 1795651505000", 3),
        (b"vllm:num_requests_running\t3.0", 3),
        (b"vllm:num_requests_running 3\r", 3),
        (b"vllm:num_requests_running NaN", None),
        (b"vllm:num_requests_running -1", None),
        (b"vllm:num_requests_running three", None),
        (b"vllm:num_requests_running", None),
        (b"vllm:num_requests_running{", None),
        (b"# vllm:num_requests_running 3", None),
        (b"my_vllm:num_requests_running 3", None),
        (b"vllm:num_requests_running_total 3", None),
        (b'vllm:num_requests_running{high_priority="1"} 3', 3),
    ],
)
def test_the_forms_of_a_sample(line: bytes, running: int | None) -> None:
    for page in (line, b"up 1\n" + line + b"\nup 1\n"):
        found = read(KINDS["vllm"], page)
        assert (found.running if found else None) == running


def test_a_trtllm_without_prometheus() -> None:
    cache = {"usedNumBlocks": 25, "maxNumBlocks": 100, "tokensPerBlock": 32}
    steps = [{"iter": 1}, {"numActiveRequests": 4, "numQueuedRequests": 1, "kvCacheStats": cache}]
    assert read(KINDS["trtllm"], json.dumps(steps).encode()) == Telemetry(4, 1, 0.25)
    for odd in (b"[]", b"{}", b"[3]", b"["):
        assert read(KINDS["trtllm"], odd) is None
    odd = b'[{"numActiveRequests": "x", "kvCacheStats": 3}]'
    assert read(KINDS["trtllm"], odd) == Telemetry(0, 0, -1.0)


def test_the_slots_of_llama_cpp() -> None:
    slots = [
        {"id": 0, "n_ctx": 1024, "is_processing": False, "n_prompt_tokens": 1023},
        {"id": 1, "n_ctx": 1024, "is_processing": True, "n_prompt_tokens": 512},
    ]
    assert read_slots(json.dumps(slots).encode()) == Telemetry(1, -1, 0.25)
    for odd in (b"[]", b"{}", b"nonsense", b'{"error":{"code":501}}'):
        assert read_slots(odd) is None
    assert read_slots(b"[3]") == Telemetry(0, -1, -1.0)


@given(st.sampled_from(list(KINDS.values())), st.binary(max_size=200), st.integers(0, len(VLLM)))
def test_no_page_is_too_odd(kind: Any, junk: bytes, at: int) -> None:
    for page in (junk, VLLM[:at] + junk + VLLM[at:], b"[" + junk):
        found = read(kind, page)
        assert found is None or (found.running >= -1 and found.waiting >= -1)
        read_slots(page)
        health(200, page)


@pytest.mark.parametrize(
    ("status", "body", "state"),
    [
        (200, b"", "ready"),  # vLLM, SGLang, TensorRT-LLM
        (200, b'{"status":"ok"}', "ready"),  # llama.cpp
        (200, b'{"object":"list","data":[]}', "ready"),  # /v1/models
        (200, b'{"status":"healthy","endpoints":[],"instances":[]}', "ready"),  # Dynamo
        (200, b'{"status":"unhealthy","message":"No endpoints available"}', "unready"),
        (503, b'{"error":{"code":503,"message":"Loading model"}}', "unready"),
        (404, b"", "absent"),
        (401, b"", "down"),
        (429, b"", "ready"),
        (500, b"Traceback", "down"),
    ],
)
def test_what_a_health_check_means(status: int, body: bytes, state: str) -> None:
    found = health(status, body)
    assert found.state == state
    assert found == Health("ready") or found.detail
