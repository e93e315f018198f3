"""The model as the compiler takes it: a Llama-family decoder, its sizes and quantised weights.

Keys and names are GGUF's; a checkpoint with safetensors answers to them too.

One layer, operator by operator (`OPERATORS`), with what each reads and writes; `lower` turns each
into passes of the chip's units.
"""

from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np

from tokenworks.errors import UserError
from tokenworks.lpu import numerics
from tokenworks.lpu.numerics import Bytes, Floats
from tokenworks.model.checkpoint import Checkpoint
from tokenworks.model.gguf import Array, GgufError
from tokenworks.model.safetensors import SafetensorsError
from tokenworks.model.tensors import Tensors

OPERATORS: Final = (
    ("norm", "residual → activations"),
    ("qkv", "activations → queries, keys, values"),
    ("rotary", "queries, keys → turned by their position"),
    ("cache", "keys, values → int8, into the cache"),
    ("scores", "queries, cached keys → scores"),
    ("softmax", "scores → weights of the cached values"),
    ("mix", "weights, cached values → heads"),
    ("out", "heads → added to the residual"),
    ("norm2", "residual → activations"),
    ("gate_up", "activations → gate, up"),
    ("silu", "gate, up → inner activations"),
    ("down", "inner activations → added to the residual"),
)


# Tensors of models whose layers do more than the operators say.
_UNLIKE: Final = ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.attn_output.bias",
                  "blk.0.ffn_up.bias", "blk.0.attn_q_norm.weight")  # fmt: skip


class Sizes(msgspec.Struct, frozen=True):
    """A decoder's sizes; all layers are of one kind."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    eps: float
    rope_base: float
    context_tokens: int

    @property
    def rows(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads

    @property
    def kv_width(self) -> int:
        """Numbers of one token's keys, and of its values."""
        return self.kv_heads * self.head_dim


class Matrix(msgspec.Struct, frozen=True):
    """Weights of one matrix: int8 (outputs, inputs), and a scale per output."""

    values: Bytes
    scale: Floats


class Layer(msgspec.Struct, frozen=True):
    """One layer's weights."""

    norm: Floats
    norm2: Floats
    q: Matrix
    k: Matrix
    v: Matrix
    out: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix


class Network(msgspec.Struct, frozen=True):
    """A quantised model."""

    name: str
    sizes: Sizes
    embedding: Matrix
    layers: tuple[Layer, ...]
    norm: Floats
    head: Matrix


def sizes(tensors: Tensors | Checkpoint, name: str) -> Sizes:
    """The sizes a model's header gives; UserError for a kind of model the compiler doesn't take."""
    header = tensors.header
    try:
        arch = header.architecture
    except GgufError as error:
        raise UserError(f"{name}: {error}", "Give the GGUF file of a language model.") from None
    unlike = [key for key in ("expert_count", "attention.sliding_window", "rope.scaling.type")
              if header.metadata.get(f"{arch}.{key}")]  # fmt: skip
    unlike += [key for key in _UNLIKE if key in tensors]
    if arch != "llama" or unlike:
        what = f"a {arch} model with {', '.join(unlike)}" if unlike else f"a {arch} model"
        raise UserError(
            f"{name} is {what}", "The LPU compiler takes dense models of the Llama family."
        )

    def number(key: str, default: float | None = None) -> float:
        value = header.metadata.get(f"{arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{name}: {arch}.{key} is {value!r}", "The file's header is damaged.")
        return value

    heads, hidden = int(number("attention.head_count")), int(number("embedding_length"))
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    found = Sizes(
        layers=int(number("block_count")),
        hidden=hidden,
        heads=heads,
        kv_heads=int(number("attention.head_count_kv", heads)),
        head_dim=int(number("attention.key_length", hidden // heads)),
        inner=int(number("feed_forward_length")),
        vocab=int(number("vocab_size", tokens.length if isinstance(tokens, Array) else None)),
        eps=number("attention.layer_norm_rms_epsilon"),
        rope_base=number("rope.freq_base", 10000.0),
        context_tokens=int(number("context_length")),
    )
    turned = int(number("rope.dimension_count", found.head_dim))
    if found.heads % found.kv_heads or turned != found.head_dim:
        raise UserError(f"{name}: {found} can't be compiled", "Heads must share keys evenly.")
    return found


def network(
    tensors: Tensors | Checkpoint,
    name: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> Network:
    """Read and quantise all weights; UserError names what is missing or damaged."""
    s = sizes(tensors, name)

    def matrix(key: str, outputs: int, inputs: int) -> Matrix:
        return Matrix(*numerics.quantise(tensors.get(f"{key}.weight", (outputs, inputs))))

    def layer(index: int) -> Layer:
        if progress is not None:
            progress("Quantising", index, s.layers)
        at = f"blk.{index}"
        width = s.heads * s.head_dim
        return Layer(
            norm=tensors.get(f"{at}.attn_norm.weight", (s.hidden,)),
            norm2=tensors.get(f"{at}.ffn_norm.weight", (s.hidden,)),
            q=matrix(f"{at}.attn_q", width, s.hidden),
            k=matrix(f"{at}.attn_k", s.kv_width, s.hidden),
            v=matrix(f"{at}.attn_v", s.kv_width, s.hidden),
            out=matrix(f"{at}.attn_output", s.hidden, width),
            gate=matrix(f"{at}.ffn_gate", s.inner, s.hidden),
            up=matrix(f"{at}.ffn_up", s.inner, s.hidden),
            down=matrix(f"{at}.ffn_down", s.hidden, s.inner),
        )

    try:
        layers = tuple(layer(index) for index in range(s.layers))
        embedding = matrix("token_embd", s.vocab, s.hidden)
        tied = "output.weight" not in tensors
        head = embedding if tied else matrix("output", s.vocab, s.hidden)
        return Network(name, s, embedding, layers, tensors.get("output_norm.weight", (s.hidden,)),
                       head)  # fmt: skip
    except (GgufError, SafetensorsError) as error:
        raise UserError(f"{name}: {error}", "Fetch the file again.") from None


def rotary(s: Sizes, position: int) -> tuple[Floats, Floats]:
    """Cosines and sines of one token's position, for one head; sines negated at even places.

    They are tables, rounded from double precision once: pairs (0, 1), (2, 3), … turn together.
    """
    angle = position * s.rope_base ** (-np.arange(0, s.head_dim, 2, dtype=np.float64) / s.head_dim)
    sines = np.stack([-np.sin(angle), np.sin(angle)], axis=1).reshape(-1)
    return np.repeat(np.cos(angle), 2).astype(np.float32), sines.astype(np.float32)
