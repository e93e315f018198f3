"""multipart/form-data (RFC 7578) as it arrives: bytes in, fields and files out. Touches no socket.

Starlette's own forms need another library and put every file into a temporary one first; here a
file's bytes pass through, and what is held is never more than a header or a boundary.
"""

from email.message import Message
from typing import Final

import msgspec

_MAX_HEAD_BYTES: Final = 16 * 1024
_MAX_PARTS: Final = 32


class MultipartError(ValueError):
    """The bytes are not what their content type says."""


class Part(msgspec.Struct, frozen=True):
    """A part begins: a file if it has a file name (which may be empty), else a field."""

    name: str
    filename: str | None


def boundary(content_type: str) -> bytes:
    """What divides the parts of a body of this type; MultipartError if it can't be one."""
    message = Message()
    message["content-type"] = content_type
    found = message.get_boundary()
    if message.get_content_type() != "multipart/form-data" or not found:
        raise MultipartError("the content type is not multipart/form-data with a boundary")
    try:
        return found.encode("ascii")
    except UnicodeEncodeError:
        raise MultipartError("the boundary is not ASCII") from None


class Multipart:
    """One body. `is_complete` once its last boundary has come."""

    def __init__(self, boundary: bytes) -> None:
        self.is_complete = False
        self._mark = b"\r\n--" + boundary
        self._buffer = bytearray(b"\r\n")  # so that the first boundary is as any other
        self._at = "body"  # of the preamble, which nobody reads
        self._parts = 0

    def feed(self, data: bytes) -> list[Part | bytes]:
        """What `data` brings: parts, and after each the pieces of its content."""
        found: list[Part | bytes] = []
        self._buffer += data
        while not self.is_complete:
            if self._at == "body":
                is_done = self._body(found)
            elif self._at == "boundary":
                is_done = self._boundary()
            else:
                is_done = self._head(found)
            if is_done:
                break
        if self.is_complete:
            self._buffer.clear()
        return found

    def _body(self, found: list[Part | bytes]) -> bool:
        end = self._buffer.find(self._mark)
        is_whole = end >= 0
        if not is_whole:
            # What may be the beginning of a boundary waits for the rest of it.
            end = max(len(self._buffer) - len(self._mark) + 1, 0)
        if self._parts and end:
            found.append(bytes(self._buffer[:end]))
        del self._buffer[: end + (len(self._mark) if is_whole else 0)]
        if is_whole:
            self._at = "boundary"
        return not is_whole

    def _boundary(self) -> bool:
        rest = self._buffer.lstrip(b" \t")
        if len(self._buffer) - len(rest) > _MAX_HEAD_BYTES:
            raise MultipartError("a boundary is followed by too many blanks")
        if len(rest) < 2:
            return True
        if rest.startswith(b"--"):
            self.is_complete = True
        elif rest.startswith(b"\r\n"):
            self._buffer = rest  # a head without lines then ends with this line's end
            self._at = "head"
        else:
            raise MultipartError("a boundary is followed by something else than a line's end")
        return False

    def _head(self, found: list[Part | bytes]) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if max(end, len(self._buffer) if end < 0 else 0) > _MAX_HEAD_BYTES:
            raise MultipartError("a part's headers are too large")
        if end < 0:
            return True
        if self._parts == _MAX_PARTS:
            raise MultipartError(f"there are more than {_MAX_PARTS} parts")
        self._parts += 1
        found.append(_part(bytes(self._buffer[2:end])))
        del self._buffer[: end + 4]
        self._at = "body"
        return False


def _part(head: bytes) -> Part:
    """What a part's header lines say of it."""
    message = Message()
    try:
        lines = head.decode().split("\r\n")
    except UnicodeDecodeError:
        raise MultipartError("a part's headers are not UTF-8") from None
    for line in lines:
        header, _, value = line.partition(":")
        if header.strip().lower() == "content-disposition":
            message["content-disposition"] = value.strip()
    name = message.get_param("name", header="content-disposition")
    if message.get_content_disposition() != "form-data" or not isinstance(name, str):
        raise MultipartError("a part has no name")
    return Part(name, message.get_filename())
