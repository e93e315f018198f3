"""Refusals and failures in OpenAI's shape: what a client reads when it gets no answer."""

from typing import Final

import msgspec

# OpenAI's `type` for a status; the rest of the 4xx are "invalid_request_error".
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class Problem(Exception):
    """An answer that is none. `message` names the place and the remedy, for a person to read.

    `param` is the request's field as a path ("messages[0].role"), `code` a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.allow = allow

    @property
    def type(self) -> str:
        """OpenAI's word for this kind of problem."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return _TYPES.get(self.status, default)

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The headers that go with the answer, lower case, without the content's own."""
        found = []
        if self.retry_after_s is not None:
            found.append(("retry-after", str(self.retry_after_s)))
        if self.status == 401:
            found.append(("www-authenticate", "Bearer"))
        if self.allow is not None:
            found.append(("allow", self.allow))
        return found

    def body(self) -> bytes:
        """The JSON document that tells it."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def event(self) -> bytes:
        """The same as a server-sent event, for a stream that has already begun."""
        return b"data: " + self.body() + b"\n\n"


def invalid(message: str, param: str | None = None, code: str | None = None) -> Problem:
    """400: the request itself is wrong."""
    return Problem(400, message, param=param, code=code)


def engine_lost(detail: str) -> Problem:
    """502: the engine went away while the request was with it."""
    return Problem(
        502,
        f"The engine stopped while it worked on this request ({detail}). Please send it again.",
        code="engine_lost",
    )


def not_resumable(detail: str, why: str) -> Problem:
    """502: the same, of a request that can't go on elsewhere."""
    return Problem(
        502,
        f"The engine stopped while it worked on this request ({detail}). It can't go on at another "
        f"one: {why}. Please send it again.",
        code="not_resumable",
    )
