"""How a line's end reads in an output or error file."""

from typing import Final

import msgspec

from tokenworks.gateway.problem import Problem

_EXPIRED: Final = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}
_decode: Final = msgspec.json.Decoder(msgspec.Raw).decode


def answer(id: str, custom_id: str, status: int, body: bytes) -> bytes:  # noqa: A002
    """The line of a request that was answered, with its end."""
    response = {"status_code": status, "request_id": id, "body": msgspec.Raw(_one_line(body))}
    return _line(id, custom_id, response, None)


def expired(id: str, custom_id: str) -> bytes:  # noqa: A002
    """The line of a request that was not reached in time, with its end."""
    return _line(id, custom_id, None, _EXPIRED)


def _line(id: str, custom_id: str, response: object, error: object) -> bytes:  # noqa: A002
    line = {"id": id, "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(line) + b"\n"


def _one_line(body: bytes) -> bytes:
    """An answer's JSON without line breaks; an engine's nonsense as the problem it is."""
    try:
        _decode(body)
    except msgspec.DecodeError:
        return Problem(502, "The engine's answer was not JSON.", code="engine_error").body()
    if b"\n" in body or b"\r" in body:
        return msgspec.json.format(body, indent=-1)
    return body
