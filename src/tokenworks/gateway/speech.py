"""Whether events of a stream say something: the first token is in the first of them that does.

Engines open a stream before they have read its prompt, some of them at once, with a role, a record
of the response or a comment. Bytes in, an answer out.
"""

import re
from typing import Any, Final

import msgspec

from tokenworks.gateway.framing import payload_of, split
from tokenworks.gateway.intake import Route

# A word, a call of a tool, an end. In a JSON text these can only be keys: inside a string their
# quotes would be escaped.
_SAYS: Final = re.compile(
    rb'"(?:content|text|reasoning_content|reasoning|refusal|finish_reason)"\s*:\s*"[^"]'
    rb'|"(?:tool_calls|function_call|audio|content)"\s*:\s*[\[{]\s*["{]'
)


class _Step(msgspec.Struct, gc=False):
    type: str = ""
    delta: Any = None


_decode: Final = msgspec.json.Decoder(_Step).decode


def speaks(events: bytes, route: Route) -> bool:
    """Whether complete events, in HTTP chunks or without, hold a first token."""
    if route != "responses":
        return _SAYS.search(events) is not None
    return any(_is_delta(event) for event in split(events) if b".delta" in event)


def _is_delta(event: bytes) -> bool:
    """Of /v1/responses: text, reasoning, arguments; its records repeat the request, and so can't
    be searched for words.
    """
    try:
        step = _decode(payload_of(event) or b"")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return step.type.endswith(".delta") and bool(step.delta)
