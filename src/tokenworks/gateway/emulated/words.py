"""What an emulated engine says: words that mean nothing, and always the same for the same prompt.

A word with the space before it is one token. All words stand on a ring of 4,096; an answer begins
where the prompt's hash says and goes on along it. So word `i` depends on nothing but prompt, seed
and `i`; a continuation from `k` words says just those from `k` on; and a word too many or too few
shows at once.
"""

from hashlib import blake2b
from typing import Final, NamedTuple

WORD_BYTES: Final = 5
RING: Final = 4096
# Neighbours on the ring shall look unlike each other: an odd stride visits every word once.
_STRIDE: Final = 1103


def _word(index: int) -> str:
    at = index * _STRIDE % RING
    first, second = at >> 6, at & 63
    return " " + "".join(
        "bdfghjklmnprstvz"[each >> 2] + "aeiu"[each & 3] for each in (first, second)
    )


_WORDS: Final = [_word(index) for index in range(RING)]
_PLACE: Final = {word: index for index, word in enumerate(_WORDS)}
_TWICE: Final = "".join(_WORDS) * 2
_BYTES: Final = _TWICE.encode()


class Voice(NamedTuple):
    """Where an answer begins on the ring, and a number between 0 and 1 to draw its length with."""

    start: int
    share: float

    def bytes(self, begin: int, end: int) -> bytes:
        """Words `begin` to `end` of the answer as text."""
        if end - begin > RING:
            middle = begin + RING
            return self.bytes(begin, middle) + self.bytes(middle, end)
        at = (self.start + begin) % RING
        return _BYTES[at * WORD_BYTES : (at + end - begin) * WORD_BYTES]

    def text(self, begin: int, end: int) -> str:
        """The same as a string."""
        return self.bytes(begin, end).decode()


def voice(prompt: bytes, seed: int = 0) -> Voice:
    """The voice that answers a prompt; the same in every process."""
    digest = blake2b(prompt, digest_size=16, key=seed.to_bytes(9, "little", signed=True)).digest()
    share = (int.from_bytes(digest[:6], "little") + 0.5) / 2**48
    return Voice(int.from_bytes(digest[6:], "little") % RING, share)


def continued(prompt: bytes, seed: int = 0) -> tuple[bytes, int]:
    """A plain prompt that ends in what was answered to its beginning: that beginning, and how many
    words of the answer there are; the prompt itself and 0 if it doesn't.
    """
    at, follower = len(prompt), -1
    while at >= WORD_BYTES:
        place = _PLACE.get(prompt[at - WORD_BYTES : at].decode("latin-1"), -1)
        if place < 0 or (follower >= 0 and (place + 1) % RING != follower):
            break
        at, follower = at - WORD_BYTES, place
    if follower >= 0 and voice(prompt[:at], seed).start == follower:
        return prompt[:at], (len(prompt) - at) // WORD_BYTES
    return prompt, 0
