"""Weights out of a folder with safetensors: the same program as from GGUF, and what is damaged."""

import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.lpu import made
from tests.lpu.test_tensors import HEADS, HIDDEN, INNER, KV, VOCAB, file, llama, tensors_of
from tests.model.test_gguf import entry, text, u32
from tests.support import run
from tokenworks.assets import checkpoint
from tokenworks.errors import UserError
from tokenworks.lpu import compile as compiler
from tokenworks.lpu import graph, program
from tokenworks.model.checkpoint import Checkpoint
from tokenworks.model.gguf import parse
from tokenworks.model.safetensors import Safetensors, SafetensorsError
from tokenworks.model.tokens import vocabulary

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 1, "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": KV,
    "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
THEIRS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}
TOKENS = [*"abcdefghijklmnopqrstuvwxyz", "ab", "the", "Ġthe", *map(str, range(9)), "<|end|>", "!"]
MERGES = ["a b", "t h", "th e", "Ġ the"]
TOKENIZER: dict[str, Any] = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ],
    },
    "model": {
        "type": "BPE",
        "vocab": {token: number for number, token in enumerate(TOKENS)},
        "merges": [merge.split(" ") for merge in MERGES],
    },
    "added_tokens": [{"id": TOKENS.index("<|end|>"), "content": "<|end|>", "special": True}],
}
WORDS = [
    entry("tokenizer.ggml.model", 8, text("gpt2")),
    entry("tokenizer.ggml.pre", 8, text("smollm")),
    entry("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, VOCAB) + b"".join(map(text, TOKENS))),
    entry("tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, 4) + b"".join(map(text, MERGES))),
    entry("tokenizer.ggml.token_type", 9, struct.pack("<IQ", 5, VOCAB)
          + struct.pack(f"<{VOCAB}i", *(3 if t == "<|end|>" else 1 for t in TOKENS))),
    u32("tokenizer.ggml.eos_token_id", TOKENS.index("<|end|>")),
    entry("tokenizer.chat_template", 8, text("{{ it }}")),
]  # fmt: skip


def safetensors(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A file of these tensors: name, dtype, shape, data."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        ends = [len(data), len(data) + len(raw)]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
        data += raw
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + data


def theirs(kind: int) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """`llama`'s tensors as Hugging Face keeps them: rows of a head's queries and keys in halves."""
    found = {}
    for name, shape, _, raw in llama():
        values = np.frombuffer(raw, "<f4").reshape(shape[::-1])
        if "attn_q" in name or "attn_k" in name:
            values = values.reshape(-1, HIDDEN // HEADS // 2, 2, HIDDEN).swapaxes(1, 2)
        data = np.ascontiguousarray(values, ("<f4", "<f2")[kind]).tobytes()
        own = THEIRS[name.removesuffix(".weight")]
        found[f"{own}.weight"] = (("F32", "F16")[kind], shape[::-1], data)
    return found


def gguf(kind: int) -> bytes:
    tensors = []
    for name, shape, _, raw in llama():
        values = np.frombuffer(raw, "<f4").astype(("<f4", "<f2")[kind])
        tensors.append((name, shape, kind, values.tobytes()))
    return file(tensors, more=WORDS)


def compiled(tensors: Any, words: Any) -> bytes:
    return program.encode(
        compiler.compile_network(
            made.lpu(), graph.network(tensors, "tiny"), 1, 320, msgspec.msgpack.encode(words)
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    settings = {"eos_token": {"content": "<|end|>"}, "chat_template": "{{ it }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "model.safetensors").write_bytes(safetensors(theirs(0)))
    return path


@pytest.mark.parametrize("kind", [0, 1])
def test_a_folder_and_a_gguf_file_of_one_model_are_one_program(folder: Path, kind: int) -> None:
    raw = gguf(kind)
    expected = compiled(tensors_of(raw), vocabulary(parse(raw), raw, "tiny"))
    if kind == 0:
        out = folder / "out.lpu"
        done = run("lpu", "compile", str(folder), "--context", "320", "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == expected
        return
    # In two files, and the template in a third, as larger and later ones are.
    tensors = list(theirs(kind).items())
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (folder / "chat_template.jinja").write_text("{{ it }}")
    index: dict[str, str] = {}
    for number in (0, 1):
        part = dict(tensors[number::2])
        (folder / f"{number}.safetensors").write_bytes(safetensors(part))
        index |= dict.fromkeys(part, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert compiled(*checkpoint.read(folder)) == expected


def test_numbers_are_those_of_the_formats() -> None:
    halves = struct.pack("<2f", 1.5, -2)
    found = Safetensors({"x": safetensors({
        "a": ("F32", (2,), halves),
        "b": ("F16", (2,), struct.pack("<2e", 1.5, -2)),
        "c": ("BF16", (2,), halves[2:4] + halves[6:8]),
    })})  # fmt: skip
    for name in "abc":
        np.testing.assert_array_equal(found.get(name, (2,)), [1.5, -2])
    assert "d" not in found


RIGHT = safetensors({"a": ("F32", (2,), bytes(8)), "b": ("I8", (3,), bytes(3))})


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "x: it is no safetensors file"),
        (b"GGUF\3\0\0\0\0\0\0\0", "x: it is no safetensors file"),
        (RIGHT[:60], "x: it is cut short: the header runs past its 60 bytes"),
        (RIGHT[:-4], "x: it is cut short: 7 of 11 bytes of numbers"),
        (RIGHT + b"!", "x: it has 1 bytes too many"),
        (RIGHT.replace(b'{"__m', b'["__m'), "x: its header is damaged"),
        (RIGHT.replace(b'"shape"', b'"shapf"'), "x: its header is damaged: Object missing"),
        (RIGHT.replace(b"[8, 11]", b"[7, 11]"), "x: its header is damaged: there is no tensor at"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_told(raw: bytes, told: str) -> None:
    with pytest.raises(SafetensorsError) as found:
        Safetensors({"x": raw})
    assert str(found.value).startswith(told)


def test_tensors_that_are_none_or_others_are_told() -> None:
    found = Safetensors({"x": RIGHT.replace(bytes(8), struct.pack("<2f", 1, float("nan")))})
    for name, shape, told in (
        ("a", (2,), "'a' holds numbers that are none"),
        ("a", (3,), r"'a' is \(2,\), \(3,\) is needed"),
        ("b", (3,), "'b' has dtype I8; read are F32, F16, BF16"),
        ("c", (3,), "there is no tensor 'c'"),
    ):
        with pytest.raises(SafetensorsError, match=told):
            found.get(name, shape)
    odd = Safetensors({"x": safetensors({"a": ("F16", (2,), bytes(8))})})
    with pytest.raises(SafetensorsError, match="takes 8 bytes"):
        odd.get("a", (2,))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "qwen3"}, "tiny is a qwen3 model"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": None}, "there is no hidden_size"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"a llama model with rope\.scaling\.type"),
        ({"rope_parameters": {"type": "yarn"}}, r"a llama model with rope\.scaling\.type"),
        ({"tie_word_embeddings": False}, r"there is no tensor 'lm_head\.weight'"),
        ({"num_hidden_layers": 2}, r"there is no tensor 'model\.layers\.1\.input_layernorm"),
        ({"vocab_size": 41}, r"'model\.embed_tokens\.weight' is \(40, 64\), \(41, 64\) is needed"),
    ],
)
def test_configs_of_other_models_are_told(changes: dict[str, Any], told: str) -> None:
    weights = Safetensors({"x": safetensors(theirs(0))})
    with pytest.raises(UserError, match=told):
        graph.network(Checkpoint({**CONFIG, **changes}, weights, "tiny"), "tiny")


def test_a_model_with_biases_is_told() -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": ("F32", (HIDDEN,), bytes(4 * HIDDEN))}
    weights = Safetensors({"x": safetensors(theirs(0) | bias)})
    with pytest.raises(UserError, match=r"a llama model with blk\.0\.attn_q\.bias"):
        graph.network(Checkpoint(CONFIG, weights, "tiny"), "tiny")


def test_rotary_tables_of_later_configs_are_read() -> None:
    later = {k: v for k, v in CONFIG.items() if k != "rope_theta"}
    later["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    weights = Safetensors({"x": safetensors(theirs(0))})
    assert graph.sizes(Checkpoint(later, weights, "tiny"), "tiny").rope_base == 500000


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", None, "cannot read config.json"),
        ("config.json", b"[]", "is no JSON object"),
        ("tokenizer.json", None, "cannot read the tokenizer"),
        ("tokenizer.json", b"{", "tokenizer.json is damaged"),
        ("tokenizer.json", json.dumps({**TOKENIZER, "normalizer": {}}).encode(), "is not known"),
        ("tokenizer.json", json.dumps({**TOKENIZER, "pre_tokenizer": None}).encode(),
         "is not known. Known is byte-level BPE"),
        ("tokenizer.json", json.dumps({**TOKENIZER, "added_tokens": [{"id": 40, "content": "x"}]})
         .encode(), "has tokens up to 40, the model 40"),
        ("model.safetensors", None, "cannot read weights"),
        ("model.safetensors", RIGHT[:-1], r"model\.safetensors: it is cut short"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../x"}}', "lists no files"),
    ],
)  # fmt: skip
def test_files_of_a_folder_that_are_missing_or_damaged_are_told(
    folder: Path, name: str, content: bytes | None, told: str
) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        checkpoint.read(folder)


def test_words_that_the_tokenizer_lacks_are_filled_up(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 42}))
    found = checkpoint.read(folder)[1]
    assert found.tokens[39:] == ("!", "[PAD40]", "[PAD41]")
    assert (found.end, found.controls, found.digit_by_digit) == (38, (38,), True)
