"""Text to tokens and back: byte-level pair encoding (GPT-2's), with a GGUF file's vocabulary.

Text is cut into pieces (words with the space before them, runs of signs, single digits where the
model wants it), a piece into bytes, and neighbours are joined in the order the vocabulary learned.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import msgspec

from tokenworks.errors import UserError
from tokenworks.model import gguf
from tokenworks.model.gguf import Array, Gguf

_CONTROL: Final = 3  # ggml's token type of marks like <|im_end|>
_DIGIT_BY_DIGIT: Final = ("smollm",)
_PLAIN: Final = ("gpt-2", "gpt2")
_ENDINGS: Final = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it can be seen, else one past 255."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in seen}
    hidden = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


_LETTERS: Final = _byte_letters()
_BYTES: Final = {letter: byte for byte, letter in _LETTERS.items()}


class Vocabulary(msgspec.Struct, frozen=True):
    """What a tokenizer needs, in a form that can be kept in a file."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    controls: tuple[int, ...]
    digit_by_digit: bool
    end: int
    chat_template: str | None = None


def vocabulary(header: Gguf, buffer: Any, name: str) -> Vocabulary:
    """The vocabulary of a GGUF file; UserError for a kind of tokenizer that isn't known."""
    table = header.metadata
    kind, pre = table.get("tokenizer.ggml.model"), table.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in (*_DIGIT_BY_DIGIT, *_PLAIN):
        raise UserError(
            f"{name}: the tokenizer {kind!r} with {pre!r} is not known",
            f"Known are gpt2 with {', '.join((*_DIGIT_BY_DIGIT, *_PLAIN))}.",
        )
    arrays = [table.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges", "token_type")]
    tokens, merges, types = arrays
    if not all(isinstance(each, Array) for each in arrays):
        raise UserError(f"{name}: the vocabulary is missing", "Fetch the file again.")
    assert isinstance(tokens, Array)
    assert isinstance(merges, Array)
    assert isinstance(types, Array)
    kinds = gguf.numbers(buffer, types)
    end = table.get("tokenizer.ggml.eos_token_id", 0)
    return Vocabulary(
        tuple(gguf.texts(buffer, tokens)),
        tuple(gguf.texts(buffer, merges)),
        tuple(index for index, each in enumerate(kinds) if each == _CONTROL),
        pre in _DIGIT_BY_DIGIT,
        end if isinstance(end, int) else 0,
        header.chat_template,
    )


class Tokenizer:
    """Encodes and decodes with one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.end = vocabulary.end
        self._numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
        self._ranks = {merge: rank for rank, merge in enumerate(vocabulary.merges)}
        marks = {vocabulary.tokens[number]: number for number in vocabulary.controls}
        self._marks = dict(sorted(marks.items(), key=lambda item: -len(item[0])))
        self._hidden = frozenset(vocabulary.controls)
        self._joined = lru_cache(maxsize=65536)(self._join)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; marks like <|im_start|> are one each."""
        out: list[int] = []
        while text:
            found = [(at, mark) for mark in self._marks if (at := text.find(mark)) >= 0]
            at, mark = min(found, default=(len(text), ""))
            for piece in _pieces(text[:at], self.vocabulary.digit_by_digit):
                out += self._joined(piece)
            if mark:
                out.append(self._marks[mark])
            text = text[at + len(mark) :]
        return out

    def bytes_of(self, token: int) -> bytes:
        """The bytes a token stands for; none for a mark."""
        if token in self._hidden:
            return b""
        return bytes(_BYTES[letter] for letter in self.vocabulary.tokens[token])

    def _join(self, piece: str) -> list[int]:
        parts = [_LETTERS[byte] for byte in piece.encode()]
        while len(parts) > 1:
            ranked = [
                (self._ranks.get(f"{a} {b}", 1 << 30), i)
                for i, (a, b) in enumerate(pairwise(parts))
            ]
            rank, at = min(ranked)
            if rank == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self._numbers[part] for part in parts if part in self._numbers]


def _pieces(text: str, digit_by_digit: bool) -> list[str]:
    if not digit_by_digit:
        return _words(text)
    out, start = [], 0
    for at, letter in enumerate(text):
        if _kind(letter) == "N":
            out += [*_words(text[start:at]), letter]
            start = at + 1
    return out + _words(text[start:])


def _words(text: str) -> list[str]:
    """GPT-2's cut: an ending like 's; a run of one kind with the space before it; white space."""
    out, at = [], 0
    while at < len(text):
        end = next((at + len(e) for e in _ENDINGS if text.startswith(e, at)), at)
        if end == at:
            first = at + (text[at] == " " and at + 1 < len(text) and _kind(text[at + 1]) != " ")
            kind = _kind(text[first])
            end = first + 1
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
            # White space leaves its last letter to the word that follows.
            if kind == " " and end < len(text) and end - at > 1:
                end -= 1
        out.append(text[at:end])
        at = end
    return out


def _kind(letter: str) -> str:
    if letter.isspace():
        return " "
    kind = unicodedata.category(letter)[0]
    return kind if kind in "LN" else "."


def prompt(words: Vocabulary, text: str) -> str:
    """A question in the chat format of the vocabulary; the text itself where there is none known.

    Of templates only ChatML's is known (<|im_start|>), with its own first system message.
    """
    if "<|im_start|>" not in (words.chat_template or ""):
        return text
    return conversation(words, [("user", text)])


def conversation(words: Vocabulary, messages: Sequence[tuple[str, str]]) -> str:
    """Messages (role, text) in the chat format, and the beginning of the assistant's next one."""
    template = words.chat_template or ""
    if "<|im_start|>" not in template:
        return "\n".join(text for _, text in messages)
    _, _, rest = template.partition("<|im_start|>system\n")
    system, found, _ = rest.partition("<|im_end|>")
    has_own = bool(messages) and messages[0][0] == "system"
    said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)
    if found and "{" not in system and not has_own:
        said = f"<|im_start|>system\n{system}<|im_end|>\n{said}"
    return f"{said}<|im_start|>assistant\n"
