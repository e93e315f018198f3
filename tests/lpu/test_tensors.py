"""Weights out of a GGUF file: values by the formats' definitions, a whole model, damaged files."""

import struct
from collections.abc import Sequence

import numpy as np
import pytest

from tests.lpu import made
from tests.model.test_gguf import entry, text, u32
from tokenworks.errors import UserError
from tokenworks.lpu import compile as compiler
from tokenworks.lpu import graph
from tokenworks.lpu.machine import Machine
from tokenworks.lpu.oracle import Oracle
from tokenworks.model.gguf import GgufError, parse
from tokenworks.model.tensors import Tensors

HIDDEN, HEADS, KV, INNER, VOCAB = 64, 2, 1, 96, 40


def f32(key: str, value: float) -> bytes:
    return entry(key, 6, struct.pack("<f", value))


def file(
    tensors: list[tuple[str, tuple[int, ...], int, bytes]],
    arch: str = "llama",
    more: Sequence[bytes] = (),
) -> bytes:
    """A GGUF file of these tensors: name, shape (fastest first), ggml type, data."""
    entries = [
        entry("general.architecture", 8, text(arch)),
        u32(f"{arch}.context_length", 512),
        u32(f"{arch}.block_count", 1),
        u32(f"{arch}.embedding_length", HIDDEN),
        u32(f"{arch}.feed_forward_length", INNER),
        u32(f"{arch}.attention.head_count", HEADS),
        u32(f"{arch}.attention.head_count_kv", KV),
        u32(f"{arch}.vocab_size", VOCAB),
        f32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5),
        *more,
    ]
    infos, data = b"", b""
    for name, shape, kind, raw in tensors:
        infos += text(name) + struct.pack("<I", len(shape))
        infos += b"".join(struct.pack("<Q", size) for size in shape)
        infos += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries) + infos
    return head + bytes(-len(head) % 32) + data


def llama(**without: str) -> list[tuple[str, tuple[int, ...], int, bytes]]:
    draw = np.random.default_rng(2)

    def tensor(name: str, *shape: int) -> tuple[str, tuple[int, ...], int, bytes]:
        values = draw.standard_normal(shape[::-1]).astype("<f4") / np.float32(8)
        return f"{name}.weight", shape, 0, values.tobytes()

    width = HIDDEN // HEADS
    found = [
        tensor("token_embd", HIDDEN, VOCAB),
        tensor("output_norm", HIDDEN),
        tensor("blk.0.attn_norm", HIDDEN),
        tensor("blk.0.ffn_norm", HIDDEN),
        tensor("blk.0.attn_q", HIDDEN, HIDDEN),
        tensor("blk.0.attn_k", HIDDEN, KV * width),
        tensor("blk.0.attn_v", HIDDEN, KV * width),
        tensor("blk.0.attn_output", HIDDEN, HIDDEN),
        tensor("blk.0.ffn_gate", HIDDEN, INNER),
        tensor("blk.0.ffn_up", HIDDEN, INNER),
        tensor("blk.0.ffn_down", INNER, HIDDEN),
    ]
    return [each for each in found if each[0] not in without.values()]


def tensors_of(raw: bytes) -> Tensors:
    return Tensors(parse(raw), raw)


def test_numbers_are_those_of_the_formats() -> None:
    half, quarter = struct.pack("<e", 0.5), struct.pack("<e", 0.25)
    nibbles = bytes(low | (15 - low) << 4 for low in range(16))
    raw = file([
        ("a", (32,), 3, half + quarter + nibbles),
        ("b", (32,), 8, half + struct.pack("32b", *range(-16, 16))),
        ("c", (2,), 1, struct.pack("<2e", 1.5, -2)),
    ])  # fmt: skip
    found = tensors_of(raw)
    np.testing.assert_array_equal(
        found.get("a", (32,)), [0.25 + 0.5 * q for q in [*range(16), *range(15, -1, -1)]]
    )
    np.testing.assert_array_equal(found.get("b", (32,)), np.arange(-16, 16) * 0.5)
    np.testing.assert_array_equal(found.get("c", (2,)), [1.5, -2])


def test_a_file_becomes_a_program_that_is_right() -> None:
    network = graph.network(tensors_of(file(llama())), "tiny")
    machine = Machine(compiler.compile_network(made.lpu(), network, 1, 320))
    oracle = Oracle(network)
    for token in (1, 39, 0):
        scores, _ = machine.step(token)
        np.testing.assert_array_equal(scores, oracle.step(token))


def test_what_is_damaged_is_told() -> None:
    raw = file(llama())
    with pytest.raises(UserError, match=r"tiny: it is cut short.*Fetch the file again"):
        graph.network(tensors_of(raw[:-40]), "tiny")
    nothing = file(llama(gone="blk.0.ffn_up.weight"))
    with pytest.raises(UserError, match=r"there is no tensor 'blk\.0\.ffn_up\.weight'"):
        graph.network(tensors_of(nothing), "tiny")
    broken = bytearray(raw)
    broken[-8:-4] = struct.pack("<f", float("nan"))
    with pytest.raises(UserError, match="holds numbers that are none"):
        graph.network(tensors_of(bytes(broken)), "tiny")


def test_other_models_and_formats_are_told() -> None:
    with pytest.raises(UserError, match=r"tiny is a qwen3 model\. The LPU compiler takes dense"):
        graph.network(tensors_of(file(llama(), "qwen3")), "tiny")
    with pytest.raises(GgufError, match="ggml type 12; read are F32, F16, Q4_1, Q8_0"):
        tensors_of(file([("a", (256,), 12, bytes(144))])).get("a", (256,))
    with pytest.raises(GgufError, match="is \\(32,\\), \\(31,\\) is needed"):
        tensors_of(file([("a", (32,), 0, bytes(128))])).get("a", (31,))
