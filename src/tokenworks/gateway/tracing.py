"""A span of OpenTelemetry for each request, made of its ledger row when it is over.

Opt-in (`[watch] otlp`). Nothing happens on the way of a request but that its row is put aside; the
spans are made and sent by other threads. Names are those of the GenAI conventions where they have
one, else they begin with `tokenworks.`. Never a prompt or an answer.
"""

import importlib
import logging
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any, Final
from urllib.parse import urlsplit

from tokenworks import __version__
from tokenworks.errors import UserError
from tokenworks.gateway.ledger.row import TIERS, Row, kept, tpot_ns
from tokenworks.units import NS_PER_S

_log = logging.getLogger(__name__)

_PATH: Final = "/v1/traces"
_TIMEOUT_S: Final = 5.0
_END_S: Final = 3.0  # for what is left to be sent when the gateway stops
_MOST: Final = 10_000  # rows that wait
_OPERATIONS: Final = {
    "chat/completions": "chat",
    "responses": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(f"opentelemetry.{name}")
    except ImportError:
        raise UserError(
            "watch.otlp needs the OpenTelemetry SDK, which is not installed",
            "Install it: pip install 'tokenworks[otel]'.",
        ) from None


def endpoint_of(url: str) -> str:
    """Where a collector takes traces over HTTP; UserError where `url` is no address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"watch.otlp {url!r} is no http or https URL",
            "Give the collector's address, as http://127.0.0.1:4318.",
        )
    return url if parts.path.strip("/") else url.rstrip("/") + _PATH


class Tracing:
    """Spans for the collector at `url`. `note` and `flush` are for the loop's thread."""

    def __init__(self, url: str) -> None:
        endpoint = endpoint_of(url)
        trace, sdk = _library("sdk.trace"), _library("sdk.trace.export")
        exporter = _library("exporter.otlp.proto.http.trace_exporter")
        self._kinds, self._status = _library("trace").SpanKind, _library("trace.status")
        context = _library("trace.propagation.tracecontext")
        self._propagator = context.TraceContextTextMapPropagator()
        facts = {"service.name": "tokenworks", "service.version": __version__}
        resource = _library("sdk.resources").Resource.create(facts)
        self._provider = trace.TracerProvider(resource=resource, shutdown_on_exit=False)
        sender = exporter.OTLPSpanExporter(endpoint=endpoint, timeout=_TIMEOUT_S)
        self._provider.add_span_processor(sdk.BatchSpanProcessor(sender))
        self._tracer = self._provider.get_tracer("tokenworks", __version__)
        self._rows: list[tuple[Row, bytes]] = []
        self._lost = 0
        self._thread = ThreadPoolExecutor(1, "tracing")

    def note(self, row: Row, parent: bytes) -> None:
        """A request has ended; `parent`: its client's traceparent."""
        if len(self._rows) < _MOST:
            self._rows.append((row, parent))
        else:
            self._lost += 1

    def flush(self) -> None:
        """Make spans of what was noted, elsewhere."""
        rows, self._rows = self._rows, []
        lost, self._lost = self._lost, 0
        if lost:
            _log.warning("%d requests have no span: too many at once", lost)
        if rows:
            self._thread.submit(self._make, rows)

    def close(self) -> None:
        """Send what is left, as far as that goes fast."""
        self.flush()
        ending = Thread(target=self._end, daemon=True)
        ending.start()
        ending.join(_END_S)

    def _end(self) -> None:
        self._thread.shutdown()
        self._provider.shutdown()

    def _make(self, rows: list[tuple[Row, bytes]]) -> None:
        for row, parent in rows:
            try:
                self._span(row, parent)
            except Exception:
                _log.exception("a span could not be made")

    def _span(self, row: Row, parent: bytes) -> None:
        context = None
        if parent:
            context = self._propagator.extract({"traceparent": parent.decode("latin-1")})
        operation = _OPERATIONS.get(row.route, row.route or "request")
        span = self._tracer.start_span(
            f"{operation} {row.model}".rstrip(),
            context,
            self._kinds.SERVER,
            attributes=attributes(row, operation),
            start_time=row.unix_ns,
        )
        if row.outcome == "failed":
            self._fail(span, row)
        span.end(row.unix_ns + max(row.total_ns, 0))

    def _fail(self, span: Any, row: Row) -> None:
        span.set_status(self._status.Status(self._status.StatusCode.ERROR, row.reason))


def attributes(row: Row, operation: str) -> dict[str, Any]:
    """What a request's span says."""
    tier = TIERS.get(row.service_class, row.service_class)  # nobody is served in another
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "tokenworks",
        "gen_ai.request.model": row.model,
        "gen_ai.response.id": row.id,
        "gen_ai.usage.input_tokens": row.prompt_tokens,
        "gen_ai.usage.output_tokens": row.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": row.cached_tokens,
        "openai.request.service_tier": tier,
        "openai.response.service_tier": tier,
        "http.response.status_code": row.status,
        "tokenworks.outcome": row.outcome,
        "tokenworks.tenant": row.tenant,
        "tokenworks.key_id": row.key,
        "tokenworks.replica": row.replica,
        "tokenworks.processor": row.processor,
        "tokenworks.moves": row.moves,
        "tokenworks.hedged": row.hedged,
        "tokenworks.usd": row.usd,
        "tokenworks.batch": row.batch,
    }
    if row.reason:
        found["error.type"] = row.reason
    if row.energy_grade:
        found["tokenworks.energy_j"] = row.energy_j
        found["tokenworks.energy_grade"] = row.energy_grade
    if row.promise_ttft_ns >= 0:
        found["tokenworks.promise.confidence"] = row.confidence
    verdict = kept(row)
    if verdict is not None:
        found["tokenworks.promise.kept"] = verdict
    for name, time_ns in (
        ("gen_ai.response.time_to_first_chunk", row.ttft_ns),
        ("tokenworks.time_per_output_token_s", tpot_ns(row)),
        ("tokenworks.queue_s", row.queue_ns),
        ("tokenworks.promise.ttft_s", row.promise_ttft_ns),
        ("tokenworks.promise.tpot_s", row.promise_tpot_ns),
    ):
        if time_ns >= 0:
            found[name] = time_ns / NS_PER_S
    return {name: value for name, value in found.items() if value not in ("", None)}
