"""The GGUF header: files we write ourselves, the default model's, and damaged ones."""

import struct
from contextlib import suppress
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenworks.assets import store
from tokenworks.catalog.models import DEFAULT, model
from tokenworks.model.gguf import Array, GgufError, parse


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return entry(key, 4, struct.pack("<I", value))


ENTRIES = [
    entry("general.architecture", 8, text("llama")),
    entry("general.name", 8, text("Tiny")),
    u32("llama.context_length", 128),
    u32("llama.block_count", 2),
    u32("llama.embedding_length", 64),
    u32("llama.attention.head_count", 4),
    u32("llama.attention.head_count_kv", 2),
    entry("tokenizer.chat_template", 8, text("{{ tools }}")),
    entry("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
    entry("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, 3) + bytes(12)),
]


def header(
    entries: list[bytes] = ENTRIES, version: int = 3, tensors: int = 1, data: int = 64
) -> bytes:
    shape = struct.pack("<IQQ", 2, 8, 4)
    infos = [text(f"t{i}") + shape + struct.pack("<IQ", 0, 32 * i) for i in range(tensors)]
    counts = struct.pack("<QQ", tensors, len(entries))
    return b"GGUF" + struct.pack("<I", version) + counts + b"".join(entries + infos) + bytes(data)


def test_a_header_is_read() -> None:
    found = parse(header())
    assert found.version == 3
    assert found.architecture == "llama"
    assert found.name == "Tiny"
    assert found.context_tokens == 128
    assert found.chat_template == "{{ tools }}"
    assert found.metadata["tokenizer.ggml.tokens"] == Array(2)
    assert found.tensors[0].shape == (8, 4)
    # 2 layers x 2 KV heads x (16 + 16) numbers x 2 bytes
    assert found.kv_bytes_per_token() == 256
    assert not found.is_embedder
    assert parse(header([*ENTRIES, u32("llama.pooling_type", 1)])).is_embedder


@pytest.mark.parametrize(
    ("buffer", "told"),
    [
        (b"", "starts with b''"),
        (b"GG", "starts with"),
        (b"PK\3\4" + bytes(100), "starts with"),
        (header(version=1), "version 1"),
        (header()[:50], "cut short"),
        (header(tensors=4, data=0), "cut short"),
        (header([entry("x", 99, b"")]), "unknown value type 99"),
        (header([entry("x", 9, struct.pack("<IQ", 99, 1))]), "unknown array type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "more than the file could hold"),
    ],
)
def test_what_is_none_is_told(buffer: bytes, told: str) -> None:
    with pytest.raises(GgufError, match=told):
        parse(buffer)


def test_missing_facts_are_told() -> None:
    found = parse(header(ENTRIES[1:2]))
    with pytest.raises(GgufError, match=r"general\.architecture"):
        _ = found.architecture
    with pytest.raises(GgufError, match="block_count"):
        parse(header(ENTRIES[:3])).kv_bytes_per_token()


@given(st.integers(0, len(header()) - 1), st.binary(max_size=12))
def test_damage_is_an_error_or_harmless(at: int, junk: bytes) -> None:
    whole = header()
    with suppress(GgufError):
        parse(whole[:at] + junk + whole[at + len(junk) :])


@pytest.mark.engine
def test_the_default_models_parameters_are_those_of_the_catalogue() -> None:
    """Truth: the number that the model's publisher states, and the file's own tensors."""
    facts = model(DEFAULT)
    found = store.read_header(store.ensure(facts))
    assert sum(prod(tensor.shape) for tensor in found.tensors) == facts.parameters
    assert found.context_tokens == facts.context_tokens
    assert found.architecture == facts.architecture
