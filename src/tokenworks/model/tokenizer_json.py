"""A Hugging Face tokenizer.json as a Vocabulary: byte-level pair encoding (GPT-2's) only."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from tokenworks.errors import UserError
from tokenworks.model.tokens import Vocabulary

_KNOWN: Final = "Known is byte-level BPE as GPT-2 has it, with digits apart or not."


class _Bpe(msgspec.Struct, frozen=True):
    type: str = ""
    vocab: dict[str, int] = {}
    merges: list[str | tuple[str, str]] = []
    ignore_merges: bool = False
    byte_fallback: bool = False


class _Added(msgspec.Struct, frozen=True):
    id: int
    content: str
    special: bool = False


class _Document(msgspec.Struct, frozen=True):
    model: _Bpe
    added_tokens: list[_Added] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


def vocabulary(raw: bytes, settings: Mapping[str, Any], size: int, name: str) -> Vocabulary:
    """The vocabulary of a tokenizer.json, filled up to `size` tokens as llama.cpp's converter does.

    `settings` is the tokenizer_config.json: `eos_token`, `chat_template`. UserError for a damaged
    file or another kind of tokenizer.
    """
    try:
        document = msgspec.json.decode(raw, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: tokenizer.json is damaged: {error}", "Fetch it again.") from None
    digits, model = _digits(document.pre_tokenizer), document.model
    unlike = model.type != "BPE" or model.ignore_merges or model.byte_fallback
    if digits is None or unlike or document.normalizer is not None:
        raise UserError(f"{name}: the tokenizer of tokenizer.json is not known", _KNOWN)
    numbers = {**model.vocab, **{each.content: each.id for each in document.added_tokens}}
    tokens = {number: token for token, number in numbers.items()}
    if tokens and not 0 <= min(tokens) <= max(tokens) < size:
        told = f"{name}: tokenizer.json has tokens up to {max(tokens)}, the model {size}"
        raise UserError(told, "Give the tokenizer that belongs to the model.")
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, Mapping) else end
    template = settings.get("chat_template")
    return Vocabulary(
        tuple(tokens.get(number, f"[PAD{number}]") for number in range(size)),
        tuple(each if isinstance(each, str) else " ".join(each) for each in model.merges),
        tuple(sorted(each.id for each in document.added_tokens if each.special)),
        digits,
        numbers.get(str(end), 0),
        template if isinstance(template, str) else None,
    )


def _digits(found: Mapping[str, Any] | None) -> bool | None:
    """Whether text is cut digit by digit and then as GPT-2 does; None if it is cut otherwise."""
    steps = (found or {}).get("pretokenizers", [found])
    *before, last = steps or [None]
    if not isinstance(last, Mapping) or last.get("type") != "ByteLevel":
        return None
    if last.get("add_prefix_space", True) or not last.get("use_regex", True):
        return None
    if not before:
        return False
    apart = [{"type": "Digits", "individual_digits": True}]
    return True if before == apart else None
