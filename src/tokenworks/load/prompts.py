"""Prompts of a wanted length, and whole requests, as bytes. Pure.

Text is made of words of four letters, each a token of its own in most vocabularies: lengths add up,
and a text can be cut out of a long one anywhere. The first words of each part spell a number, so
that two parts begin alike only if they are the same: an engine's prefix cache finds what the trace
shares and nothing else.
"""

from collections.abc import Mapping
from random import Random
from typing import Final

import msgspec

from tokenworks.load.endpoint import Accepted, Endpoint
from tokenworks.workload import Request

WORD_BYTES: Final = 5  # with the space before it
# 128 common words: seven bits each.
_WORDS: Final = (
    b" able also area army away baby back ball band bank base bath bear beat best bill bird"
    b" blue boat body bone book both busy call camp card care case cell city club coat cold"
    b" come cool cost dark data date deal deep desk door down draw drop each east easy edge"
    b" even face fact fair fall farm fast feel film find fine fire fish flat food foot form"
    b" free full game gate girl give glad goal gold good hair half hall hand hard head hear"
    b" help here high hill hold home hope hour idea iron item join jump keep kind king lady"
    b" lake land last late lead left life lift like line list live long look lose love main"
    b" make many mark meet mind more move name near"
)
_SPELT: Final = [_WORDS[at : at + WORD_BYTES] for at in range(0, len(_WORDS), WORD_BYTES)]
_SHIFTS: Final = (57, 50, 43, 36, 29, 22)  # of the bits that each word of a number spells
_CORPUS_WORDS: Final = 1 << 16
_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1


class Prompts:
    """Requests for one model. The same seed gives the same text."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        accepted: Accepted,
        keys: Mapping[str, str],
        seed: int,
        *,
        stream: bool,
    ) -> None:
        self._accepted, self._seed = accepted, seed
        words = Random(seed).choices(_SPELT, k=_CORPUS_WORDS)  # noqa: S311 - filler
        self._corpus = b"".join(words) * 2
        self._heads = {tenant: _head(endpoint, key) for tenant, key in {"": "", **keys}.items()}
        self._open = b'{"model":%b,"messages":[{"role":"user","content":"' % msgspec.json.encode(
            model
        )
        self._said = b'"}],"temperature":0,"%b":' % accepted.limit.encode()
        more = b""
        if stream:
            more += b',"stream":true'
            if accepted.include_usage:
                more += b',"stream_options":{"include_usage":true}'
        if accepted.ignore_eos:
            more += b',"ignore_eos":true'
        self._ends = {
            name: b'%b,"service_tier":%b}' % (more, msgspec.json.encode(tier))
            for name, tier in accepted.tiers.items()
        }
        self._end = more + b"}"

    def request(self, number: int, request: Request) -> bytes:
        """Request `number` of the run, head and body."""
        text = self._text(number, request)
        end = self._ends.get(request.service_class, self._end)
        body = b"%b%b%b%d%b" % (self._open, text, self._said, request.output_tokens, end)
        head = self._heads.get(request.tenant) or self._heads[""]
        return b"%b%d\r\n\r\n%b" % (head, len(body), body)

    def _text(self, number: int, request: Request) -> bytes:
        rate = self._accepted.words_per_token
        left = max(round((request.prompt_tokens - self._accepted.base_tokens) * rate), 1)
        parts = []
        if request.prefix:
            # A block's text depends on nothing but its hash and the size that all blocks have.
            each = max(round(request.prefix_block_tokens * rate), 1)
            shared = request.prefix[: left // each]
            parts = [self._part(block, each) for block in shared]
            left -= each * len(shared)
        if left:
            parts.append(self._part(_mixed(self._seed, number), left))
        return b"".join(parts)

    def _part(self, number: int, words: int) -> bytes:
        """So many words that begin with the number's."""
        mixed = number * _GOLDEN & _MASK
        head = b"".join([_SPELT[mixed >> shift & 127] for shift in _SHIFTS[:words]])
        more = (words - len(_SHIFTS)) * WORD_BYTES
        if more <= 0:
            return head
        whole, rest = divmod(more, _CORPUS_WORDS * WORD_BYTES)
        start = (mixed & (_CORPUS_WORDS - 1)) * WORD_BYTES
        corpus = self._corpus
        filler = corpus[: _CORPUS_WORDS * WORD_BYTES] * whole + corpus[start : start + rest]
        return head + filler


def _mixed(seed: int, number: int) -> int:
    """Another number for each run and request."""
    return (seed * 0xD1342543DE82EF95 ^ number * 0xBF58476D1CE4E5B9 ^ 0x5851F42D4C957F2D) & _MASK


def _head(endpoint: Endpoint, key: str) -> bytes:
    """A request's head up to its length."""
    lines = [
        f"POST {endpoint.base}/chat/completions HTTP/1.1",
        f"host: {endpoint.authority}",
        "user-agent: tokenworks-bench",
        "content-type: application/json",
        *([f"authorization: Bearer {key}"] if key else []),
        "content-length: ",
    ]
    return "\r\n".join(lines).encode()
