"""The gateway's log: lines for people, or JSON for machines. Never a prompt or an answer."""

import logging
import sys
from datetime import UTC, datetime

import msgspec

from tokenworks.gateway.ledger.row import Row, kept
from tokenworks.units import NS_PER_S

_requests = logging.getLogger("tokenworks.requests")
# Of a request's row, what its line in the log says, in this order; all of it is about the request.
_FACTS = (
    *("id", "tenant", "key", "model", "route", "service_class", "outcome", "status", "reason"),
    *("replica", "prompt_tokens", "cached_tokens", "output_tokens", "moves", "batch"),
)


class _Json(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        facts = getattr(record, "facts", None)
        told |= {"message": record.getMessage()} if facts is None else facts
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(told).decode()


def note_request(row: Row, _trace: bytes) -> None:
    """A line for a request that has ended: who, what, how long; nothing of what was said."""
    facts: dict[str, object] = {name: getattr(row, name) for name in _FACTS}
    for name in ("queue_ns", "ttft_ns", "total_ns"):
        if getattr(row, name) >= 0:
            facts[f"{name.removesuffix('_ns')}_s"] = round(getattr(row, name) / NS_PER_S, 6)
    if row.energy_grade:
        facts["energy_j"] = round(row.energy_j, 6)
    facts["kept"] = kept(row)
    facts = {name: value for name, value in facts.items() if value not in ("", None)}
    _requests.info("%s", _Line(facts), extra={"facts": facts})


class _Line:
    """Facts as text, made only if somebody reads it."""

    def __init__(self, facts: dict[str, object]) -> None:
        self._facts = facts

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._facts.items())


def set_up(*, verbose: bool, as_json: bool, requests: bool = False) -> None:
    """Log to standard error from now on; `requests`: a line for each."""
    handler = logging.StreamHandler(sys.stderr)
    if as_json:
        handler.setFormatter(_Json())
    else:
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(form))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, handlers=[handler])
    logging.getLogger("uvicorn.error").setLevel(logging.INFO if verbose else logging.ERROR)
    if requests:
        _requests.setLevel(logging.INFO)
