"""Events of a stream that are no part of an answer: an engine's last words, and what is broken."""

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from tokenworks.gateway.framing import payload_of
from tokenworks.gateway.problem import Problem
from tokenworks.gateway.stream import complaint, engine_refusal

ERROR_WORD: Final = b'"error"'
_DONE: Final = b"[DONE]"
_END: Final = b"data: [DONE]\n\n"
_BLANK_LINE: Final = re.compile(rb"\r?\n\r?\n")


class Flaw(NamedTuple):
    """Where complete events stop being an answer, and how: `problem` if the request is to blame."""

    at: int
    told: str
    problem: Problem | None = None


def flaw_in(events: bytes) -> Flaw | None:
    """The first event that tells of an error or is no JSON; None where all are well."""
    ends = events.count(b"}\n\n") + events.endswith(_END)
    if ERROR_WORD not in events and ends == events.count(b"\n\n"):
        return None
    at = 0
    for end in _BLANK_LINE.finditer(events):
        payload = payload_of(events[at : end.start()])
        if payload and payload != _DONE:
            try:
                document = msgspec.json.decode(payload)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                return Flaw(at, "it sent an event that is no JSON")
            if isinstance(document, dict) and (
                document.get("error") or document.get("object") == "error"
            ):
                return _failure(at, document)
        at = end.end()
    return None


def _failure(at: int, document: Mapping[str, Any]) -> Flaw:
    """An engine's word that it failed; a code of 4xx says that the request was wrong."""
    error = document.get("error") or document
    code = error.get("code") if isinstance(error, dict) else None
    told = msgspec.json.encode(document)
    if isinstance(code, int) and 400 <= code < 500:
        return Flaw(at, "", engine_refusal(code, told))
    return Flaw(at, f"it failed: {complaint(told)[0]}")
