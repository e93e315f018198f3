"""What all connections share: models, the factory, the ledger, limits, keys, figures."""

import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from tokenworks.gateway.arrival import BLOCK_TOKENS, prefix_of
from tokenworks.gateway.factory import Factory, ledger_problem
from tokenworks.gateway.figures import Figures
from tokenworks.gateway.keys import Key, Keys
from tokenworks.gateway.ledger.ledger import Ledger
from tokenworks.gateway.ledger.row import Row
from tokenworks.gateway.limits import Limits
from tokenworks.gateway.problem import Problem, invalid
from tokenworks.gateway.recording import Recording
from tokenworks.gateway.served import Models
from tokenworks.gateway.tenancy import Tenancy

if TYPE_CHECKING:
    from tokenworks.gateway.relay import Exchange

# Paths that need no key: they carry no request and tell nothing of others'.
_OPEN_PATHS: Final = frozenset(
    {b"/", b"/health", b"/favicon.svg", b"/static/chat.js", b"/static/chat.css"}
)

# What a caller may ask for beyond its class: milliseconds, ours and llm-d's.
_BOUNDS: Final = (
    (b"x-slo-ttft-ms", b"x-llm-d-slo-ttft-ms"),
    (b"x-slo-tpot-ms", b"x-llm-d-slo-tpot-ms"),
)
_NS_PER_MS: Final = 1_000_000
Bounds = tuple[int | None, int | None]
NO_BOUNDS: Final[Bounds] = (None, None)

_JSON: Final = re.compile(rb"application/json\s*(?:;.*)?$", re.IGNORECASE | re.DOTALL)


class Gateway:
    """The gateway's state, without its sockets. One event loop, one thread.

    `keys` None: no key is asked for, and only requests to a loopback name are answered (`hosts`),
    so that no web page can reach the gateway through a name of its own that resolves to us.
    """

    def __init__(
        self,
        models: Models,
        factory: Factory,
        ledger: Ledger,
        tenancy: Tenancy,
        limits: Limits,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.models, self.factory, self.ledger, self.limits = models, factory, ledger, limits
        self.tenancy = tenancy
        self.keys: Keys | None = None
        self.hosts: frozenset[bytes] | None = None
        self.now = now
        self.is_draining = False
        self.figures = Figures()
        self.recording: Recording | None = None
        # Told of each end, with what its client sent as traceparent.
        self.hearers: list[Callable[[Row, bytes], None]] = []
        self._prefix = f"req_{secrets.token_hex(6)}_"
        self._count = 0

    def next_id(self) -> str:
        """A request's id, unique over restarts."""
        self._count += 1
        return f"{self._prefix}{self._count:x}"

    def check_head(
        self, path: bytes, headers: Mapping[bytes, bytes], size: int, *, is_hot: bool
    ) -> Problem | None:
        """Why a request with these headers (`size` bytes of them) is not taken, if it isn't."""
        if size > self.limits.header_bytes:
            return self.large_headers()
        if not path.startswith(b"/") or not path.isascii():
            return Problem(400, "The request's address is malformed.", code="invalid_url")
        problem = self._check_caller(path, headers)
        if problem is None and is_hot:
            problem = self._check_content(headers)
        return problem

    def _check_caller(self, path: bytes, headers: Mapping[bytes, bytes]) -> Problem | None:
        """Why the client may not come in at all."""
        if self.keys is not None:
            if path not in _OPEN_PATHS:
                return self.keys.check(headers.get(b"authorization", b""))
        elif self.hosts is not None:
            host = headers.get(b"host", b"localhost").lower()
            name = host if host.endswith(b"]") else host.partition(b":")[0]
            if host.startswith(b"[") and not host.endswith(b"]"):
                name = host.rpartition(b":")[0]
            if name not in self.hosts:
                return Problem(
                    403,
                    "This gateway answers to loopback names only (localhost, 127.0.0.1). To serve "
                    "other names, listen on an address with --host and make a key with "
                    "`tokenworks keys add`.",
                    code="unknown_host",
                )
        return None

    def _check_content(self, headers: Mapping[bytes, bytes]) -> Problem | None:
        """Why the body that `headers` announce can't be taken."""
        kind = headers.get(b"content-type", b"")
        if kind != b"application/json" and not _JSON.match(kind):
            return Problem(
                415,
                "Send the request as JSON, with the header `content-type: application/json`.",
                code="unsupported_media_type",
            )
        if headers.get(b"content-encoding", b"identity") != b"identity":
            return Problem(415, "Send the body uncompressed.", code="unsupported_content_encoding")
        length = headers.get(b"content-length", b"0")
        if int(length) > self.limits.body_bytes:
            return self.too_large()
        return None

    def large_headers(self) -> Problem:
        """The problem of headers above the limit."""
        limit = f"The headers are larger than {self.limits.header_bytes} bytes."
        return Problem(431, limit, code="headers_too_large")

    def too_large(self) -> Problem:
        """The problem of a body above the limit."""
        return Problem(
            413,
            f"The body is larger than {self.limits.body_bytes} bytes, the gateway's limit.",
            code="body_too_large",
        )

    def check_open(self, waiting: int) -> None:
        """Raise Problem where nothing new is taken: it shuts down, is full, or can't keep books."""
        if self.is_draining:
            raise Problem(503, "The gateway is shutting down.", code="shutting_down")
        if self.ledger.is_broken:
            raise ledger_problem()
        if waiting >= self.limits.queue:
            told = f"The engines are busy and {waiting} requests wait already."
            raise Problem(429, told, code="queue_full", retry_after_s=1)

    def caller(self, headers: Mapping[bytes, bytes]) -> Key | None:
        """Whose request it is, where keys are asked for and `check_head` found no problem."""
        if self.keys is None:
            return None
        found = self.keys.find(headers.get(b"authorization", b""))
        return found if isinstance(found, Key) else None

    def close_books(self, exchange: "Exchange", row: Row, ended_ns: int) -> None:
        """A request has ended: its one row, its tenant's account, the figures."""
        self.figures.note(row)
        if exchange.problem is None:  # else it was not let in
            exchange.write_row(row)
            self.factory.keep()
        if exchange.reserved_tokens >= 0:
            # Who was refused by the scheduler has used nothing.
            tokens = 0 if row.outcome == "rejected" else row.prompt_tokens + row.output_tokens
            self.tenancy.settle(
                exchange.key,
                exchange.reserved_tokens,
                tokens,
                row.usd,
                ended_ns * 1e-9,
                row.energy_j,
            )
        elif exchange.batch and (row.usd or row.energy_j):
            self.tenancy.spend(exchange.key, row.usd, row.energy_j, ended_ns * 1e-9)
        if self.recording is not None:
            prefix = prefix_of(exchange) if exchange.tokens else ()
            self.recording.note(row, prefix, BLOCK_TOKENS)
        for hear in self.hearers:
            hear(row, exchange.trace)


def bounds_of(headers: Mapping[bytes, bytes]) -> Bounds:
    """A request's own bounds on its first token and on each after it; raises Problem."""
    found: list[int | None] = []
    for names in _BOUNDS:
        value = next((headers[name] for name in names if name in headers), None)
        if value is None:
            found.append(None)
            continue
        try:
            bound_ns = round(float(value) * _NS_PER_MS)
        except (ValueError, OverflowError):
            bound_ns = 0
        if bound_ns < 1:
            name = names[0].decode()
            raise invalid(f"The header {name} takes milliseconds above zero.", name)
        found.append(bound_ns)
    return found[0], found[1]
