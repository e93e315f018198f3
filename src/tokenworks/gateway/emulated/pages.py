"""What an emulated engine answers without its model: /health, /v1/models, /metrics, faults."""

import msgspec

from tokenworks.gateway import framing
from tokenworks.gateway.emulated.fault import Fault
from tokenworks.gateway.emulated.host import Host
from tokenworks.gateway.problem import Problem, invalid
from tokenworks.units import NJ_PER_J

_encode = msgspec.json.encode


def page(host: Host, method: bytes, path: bytes, body: bytes) -> bytes:
    """The whole response; Problem where there is nothing of the kind."""
    if path == b"/emulate/fault" and host.has_faults:
        return _fault(host, _only(b"POST", method, path), body)
    if path == b"/health":
        return _response(host, b"", _only(b"GET", method, path))
    if path == b"/v1/models":
        return _response(host, _encode(_models(host)), _only(b"GET", method, path))
    if path == b"/metrics":
        _only(b"GET", method, path)
        return _response(host, metrics(host).encode(), b"text/plain; version=0.0.4")
    told = f"There is no {path.decode('latin-1')!r} at an emulated engine."
    raise Problem(404, told, code="not_found")


def _only(allowed: bytes, method: bytes, path: bytes) -> bytes:
    """The type of what is answered, if the method is the one that is allowed."""
    if method != allowed:
        allow = allowed.decode()
        raise Problem(
            405,
            f"{path.decode('latin-1')} takes {allow} only.",
            code="method_not_allowed",
            allow=allow,
        )
    return b"application/json"


def _response(host: Host, body: bytes, kind: bytes) -> bytes:
    return b"%bcontent-type: %b\r\n%bcontent-length: %d\r\n\r\n%b" % (
        framing.status_line(200),
        kind,
        host.style.header,
        len(body),
        body,
    )


def _models(host: Host) -> dict[str, object]:
    built = host.built
    model = {
        "id": built.model,
        "object": "model",
        "created": host.created_s,
        "owned_by": f"emulated {built.processor}",
        "root": built.model,
        "max_model_len": built.context_tokens,
    }
    return {"object": "list", "data": [model]}


def _fault(host: Host, kind: bytes, body: bytes) -> bytes:
    try:
        fault = msgspec.json.decode(body, type=Fault)
    except msgspec.DecodeError as error:
        raise invalid(f"The fault: {error}.", code="invalid_value") from None
    host.hurt(fault)
    return _response(host, _encode({"fault": fault}), kind)


def metrics(host: Host) -> str:
    """vLLM's names and forms where it has the number."""
    made, read, preemptions, drawn_nj = host.settle()
    load = host.load()
    usage = load.used_blocks / load.total_blocks
    rows = [
        (
            "gauge",
            "vllm:num_requests_running",
            "Requests that get tokens or are read.",
            load.running,
        ),
        ("gauge", "vllm:num_requests_waiting", "Requests that wait.", load.waiting),
        ("gauge", "vllm:kv_cache_usage_perc", "Used share of the cache, 1 is all.", usage),
        ("counter", "vllm:prompt_tokens_total", "Prompt tokens that were read.", read),
        ("counter", "vllm:generation_tokens_total", "Tokens made.", made),
        ("counter", "vllm:num_preemptions_total", "Times that a request gave way.", preemptions),
        (
            "counter",
            "vllm:prefix_cache_queries_total",
            "Prompt tokens asked for.",
            host.prompt_tokens,
        ),
        ("counter", "vllm:prefix_cache_hits_total", "And found.", host.cached_tokens),
        ("counter", "vllm:request_success_total", "Requests answered.", host.finished),
        (
            "counter",
            "tokenworks_emulated_energy_joules_total",
            "Energy of all devices, as modelled.",
            drawn_nj / NJ_PER_J,
        ),
    ]
    label = _encode(host.built.model).decode()
    lines = []
    for kind, name, told, value in rows:
        lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
        lines.append(f'{name}{{engine="0",model_name={label}}} {value:.12g}')
    return "\n".join(lines) + "\n"
