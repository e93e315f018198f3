"""What a model costs in the abstract: its layers as operators, counted in parameters and FLOPs.

A shape has groups of equal layers; a layer has an attention and a feed-forward part. Matrices are
listed one by one, as the cost of a step depends on each (`Matrix`); what is no matrix (norms,
biases) only counts. All counts are for one model on one device; `cost` divides them.
"""

from collections.abc import Iterator
from typing import Literal

import msgspec

from tokenworks.model.precision import bytes_of

# How a matrix is cut when several devices share a layer, and what it belongs to.
Part = Literal["attention", "mlp", "shared", "expert", "router", "head"]


class Matrix(msgspec.Struct, frozen=True, gc=False):
    """A weight matrix [inputs, outputs]; `copies` of it in the layer (experts)."""

    name: str
    part: Part
    inputs: int
    outputs: int
    copies: int = 1

    @property
    def parameters(self) -> int:
        """Numbers in it, over all copies."""
        return self.inputs * self.outputs * self.copies


class Attention(msgspec.Struct, frozen=True, gc=False):
    """Softmax attention over cached keys and values.

    Grouped-query: `kv_heads` heads of `key_dim` + `value_dim` numbers are cached per token.
    Multi-head latent (`latent_dim` > 0): one vector of `latent_dim` + `rope_dim` per token, which
    decode attends to directly (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    latent_dim: int = 0
    rope_dim: int = 0
    window: int | None = None  # tokens that are attended to, the token itself among them
    # A window that begins anew at multiples of its size (Llama 4), and doesn't slide.
    in_chunks: bool = False

    @property
    def cached(self) -> int:
        """Numbers cached per token."""
        if self.latent_dim:
            return self.latent_dim + self.rope_dim
        return self.kv_heads * (self.key_dim + self.value_dim)

    @property
    def decode_flops(self) -> int:
        """FLOPs of one new token for each token it attends to."""
        if self.latent_dim:
            return 2 * self.heads * (2 * self.latent_dim + self.rope_dim)
        return self.prefill_flops

    @property
    def prefill_flops(self) -> int:
        """FLOPs of each pair of tokens in a prompt."""
        return 2 * self.heads * (self.key_dim + self.value_dim)


class Experts(msgspec.Struct, frozen=True, gc=False):
    """A mixture: each token goes to `active` of `count`; FLOPs and bytes follow from it."""

    count: int
    active: int


class Layer(msgspec.Struct, frozen=True, gc=False):
    """One transformer layer."""

    attention: Attention
    matrices: tuple[Matrix, ...]
    other_parameters: int  # norms, biases, sinks
    experts: Experts | None = None

    @property
    def parameters(self) -> int:
        """All numbers of the layer."""
        return sum(matrix.parameters for matrix in self.matrices) + self.other_parameters

    @property
    def active_parameters(self) -> float:
        """Numbers that take part for one token."""
        idle = 0.0
        if self.experts is not None:
            share = 1 - self.experts.active / self.experts.count
            idle = share * sum(m.parameters for m in self.matrices if m.part == "expert")
        return self.parameters - idle


class Group(msgspec.Struct, frozen=True, gc=False):
    """`count` equal layers, wherever in the model they stand."""

    count: int
    layer: Layer


class Shape(msgspec.Struct, frozen=True):
    """A model without its weights."""

    name: str
    hidden: int
    vocabulary: int
    tied: bool  # the output head is the embedding table again
    groups: tuple[Group, ...]
    served: str = "bf16"  # the precision its weights are usually served in
    context_tokens: int | None = None  # the longest it was made for

    @property
    def layers(self) -> int:
        """Number of layers."""
        return sum(group.count for group in self.groups)

    @property
    def head(self) -> Matrix:
        """The output head: what turns the last hidden vector into logits."""
        return Matrix("lm_head", "head", self.hidden, self.vocabulary)

    @property
    def embedding_parameters(self) -> int:
        """Numbers of the embedding table and, if it is a matrix of its own, the output head."""
        return self.hidden * self.vocabulary * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All numbers: the published count of the model."""
        layers = sum(group.count * group.layer.parameters for group in self.groups)
        return layers + self.embedding_parameters + self.hidden  # the last norm

    @property
    def active_parameters(self) -> int:
        """Numbers that take part for one token, embeddings included as publishers do."""
        layers = sum(group.count * group.layer.active_parameters for group in self.groups)
        return round(layers) + self.embedding_parameters + self.hidden

    def flops_per_token(self, context_tokens: int = 0) -> int:
        """FLOPs of one decoded token that attends to `context_tokens`: two per number it meets."""
        return round(sum(self._flops(context_tokens))) + 2 * self.head.parameters

    def _flops(self, context_tokens: int) -> Iterator[float]:
        for group in self.groups:
            layer, attention = group.layer, group.layer.attention
            seen = min(context_tokens, attention.window or context_tokens)
            matrices = layer.active_parameters - layer.other_parameters
            yield group.count * (2 * matrices + seen * attention.decode_flops)

    def weight_bytes(self, precision: str | None = None) -> int:
        """Bytes of the weights with their matrices in `precision` (as usually served if None).

        Embeddings, output head, router and norms stay in 16 bits in any narrower precision, as
        the published checkpoints have it; in MXFP4 (gpt-oss) only the experts are narrow.
        """
        precision = precision or self.served
        total = (self.embedding_parameters + self.hidden) * wide_bytes(precision)
        for group in self.groups:
            layer = group.layer
            size = layer.other_parameters * wide_bytes(precision)
            size += sum(m.parameters * matrix_bytes(m, precision) for m in layer.matrices)
            total += group.count * size
        return round(total)

    def kv_bytes_per_token(self, precision: str = "bf16") -> int:
        """Bytes cached per token over all layers, windows left aside."""
        numbers = sum(group.count * group.layer.attention.cached for group in self.groups)
        return round(numbers * bytes_of(precision))

    def kv_bytes(self, context_tokens: int, precision: str = "bf16") -> int:
        """Bytes that one sequence of `context_tokens` holds in the cache; windows cut it."""
        total = 0
        for group in self.groups:
            attention = group.layer.attention
            held = min(context_tokens, attention.window or context_tokens)
            total += group.count * attention.cached * held
        return round(total * bytes_of(precision))


def wide_bytes(precision: str) -> float:
    """Bytes of a number of what is not narrowed: 2, or 4 where all is in 32 bits."""
    return max(2.0, bytes_of(precision))


def matrix_bytes(matrix: Matrix, precision: str) -> float:
    """Bytes of a number of `matrix` in a model served in `precision`."""
    if matrix.part in ("router", "head") or (precision == "mxfp4" and matrix.part != "expert"):
        return wide_bytes(precision)
    return bytes_of(precision)
