"""An answer as bytes, in the OpenAI API's shape; what can be is rendered once. No sockets."""

import time
from typing import Final

import msgspec

from tokenworks.gateway import framing
from tokenworks.gateway.emulated.ask import Ask
from tokenworks.gateway.emulated.words import WORD_BYTES

_ROLE: Final = b'[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
_ROLE_END: Final = b'"finish_reason":null}]'
_DONE: Final = b"e\r\ndata: [DONE]\n\n\r\n" + framing.LAST_CHUNK
_encode: Final = msgspec.json.encode


class Style:
    """What all answers of one replica have in common, one of them being honesty."""

    def __init__(self, model: str, processor: str) -> None:
        slug = "-".join(processor.replace("+", " ").split())
        self.fingerprint = f"emulated-{slug}"
        self.model = b',"model":%b,"system_fingerprint":%b,"choices":' % (
            _encode(model),
            _encode(self.fingerprint),
        )
        self.header = b"x-emulated: %b\r\n" % processor.encode("latin-1", "replace")
        self.stream_head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"cache-control: no-cache\r\n%btransfer-encoding: chunked\r\n\r\n" % self.header
        )
        self.whole_head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: " % self.header
        )


class Answer:
    """One answer. `said`: words so far, with those of its beginning that came from elsewhere."""

    __slots__ = ("_ask", "_each", "_head", "_record", "_style", "_tail", "said")

    def __init__(self, ask: Ask, style: Style, number: int) -> None:
        self._ask, self._style, self.said = ask, style, ask.done
        kind, name = (
            (b"chatcmpl-", b"chat.completion") if ask.is_chat else (b"cmpl-", b"text_completion")
        )
        if ask.is_stream and ask.is_chat:
            name += b".chunk"
        self._record = b'{"id":"%bemulated-%x","object":"%b","created":%d%b' % (
            kind,
            number,
            name,
            int(time.time()),
            style.model,
        )
        if ask.is_stream:
            opening = (
                b'[{"index":0,"delta":{"content":"' if ask.is_chat else b'[{"index":0,"text":"'
            )
            closing = b'"}' if ask.is_chat else b'"'
            self._head = b"data: " + self._record + opening
            self._tail = closing + b',"logprobs":null,"finish_reason":null}]'
            # All words are equally long, so that a chunk with one of them is known but for it.
            size = len(self._head) + WORD_BYTES + len(self._tail) + 3
            self._each = (b"%x\r\n" % size + self._head, self._tail + b"}\n\n\r\n")

    def opening(self) -> bytes:
        """A stream's headers and its first event."""
        if not self._ask.is_chat:
            return self._style.stream_head
        role = _ROLE + _ROLE_END
        return self._style.stream_head + self._event(role + self._progress(self.said) + b"}")

    def words(self, said: int, *, one_each: bool) -> bytes:
        """The stream's next chunks: up to `said` words, each in one or all together."""
        begin, self.said = self.said, said
        voice = self._ask.voice
        if said - begin > 1 and not one_each:
            return self._chunk(voice.bytes(begin, said), said)
        if self._ask.shows_progress:
            each = range(begin, said)
            return b"".join(self._chunk(voice.bytes(at, at + 1), at + 1) for at in each)
        head, tail = self._each
        if said - begin == 1:
            return b"%b%b%b" % (head, voice.bytes(begin, said), tail)
        return b"".join(head + voice.bytes(at, at + 1) + tail for at in range(begin, said))

    def _chunk(self, text: bytes, said: int) -> bytes:
        progress = self._progress(said)
        return framing.chunk(b"%b%b%b%b}\n\n" % (self._head, text, self._tail, progress))

    def _progress(self, said: int) -> bytes:
        return b',"usage":' + self._usage(said, 0) if self._ask.shows_progress else b""

    def _event(self, choices: bytes) -> bytes:
        return framing.chunk(b"data: " + self._record + choices + b"\n\n")

    def ending(self, cached: int, lie: int = 0) -> bytes:
        """A stream's last events."""
        content = b'"delta":{}' if self._ask.is_chat else b'"text":""'
        last = b'[{"index":0,%b,"logprobs":null,"finish_reason":"%b"}]' % (content, self._reason())
        found = self._event(last + self._progress(self.said) + b"}")
        if self._ask.shows_usage:
            found += self._event(b'[],"usage":%b}' % self._usage(self.said + lie, cached))
        return found + _DONE

    def whole(self, cached: int, transfer: dict[str, object] | None, lie: int = 0) -> bytes:
        """The response with all words at once."""
        ask = self._ask
        said = ask.voice.bytes(ask.done, ask.end)
        if ask.is_chat:
            content = b'"message":{"role":"assistant","content":"%b"}' % said
        else:
            content = b'"text":"%b"' % said
        more = b"" if transfer is None else b',"kv_transfer_params":' + _encode(transfer)
        body = b'%b[{"index":0,%b,"logprobs":null,"finish_reason":"%b"}],"usage":%b%b}' % (
            self._record,
            content,
            self._reason(),
            self._usage(ask.end + lie, cached),
            more,
        )
        return b"%b%d\r\n\r\n%b" % (self._style.whole_head, len(body), body)

    def _reason(self) -> bytes:
        return b"stop" if self._ask.ends_early else b"length"

    def _usage(self, said: int, cached: int) -> bytes:
        """As vLLM counts: words that were given are part of the prompt."""
        read, made = self._ask.prompt_tokens + self._ask.done, said - self._ask.done
        return (
            b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,'
            b'"prompt_tokens_details":{"cached_tokens":%d}}' % (read, made, read + made, cached)
        )
