"""A Hugging Face config.json as a Shape. One builder per part; families differ in few switches.

The counts follow the reference implementations in the `transformers` library; that they are right
is shown by the published parameter counts (tests/model).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from tokenworks.errors import UserError
from tokenworks.model.shape import Attention, Experts, Group, Layer, Matrix, Shape


class Config:
    """A config with its name; every missing or malformed number is one clear error."""

    def __init__(self, table: Mapping[str, Any], name: str) -> None:
        # Multi-modal models keep the text model's config in a table of its own.
        text = table.get("text_config")
        self.table: dict[str, Any] = {**table, **text} if isinstance(text, Mapping) else {**table}
        self.name = name
        self.kind = str(self.table.get("model_type") or "")

    def count(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that is there, as a whole number above zero."""
        for key in keys:
            value = self.table.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(
                    f"{self.name}: {key} is {value!r}", "It must be a whole number above zero."
                )
            return value
        if default is None:
            raise UserError(
                f"{self.name}: there is no {' or '.join(keys)}",
                "Give the config.json of a language model.",
            )
        return default

    def has(self, key: str) -> bool:
        """Whether `key` is there and true."""
        return bool(self.table.get(key))

    def optional(self, key: str) -> int | None:
        """A whole number above zero, or None where there is none (0 is none too)."""
        return self.count(key) if self.table.get(key) else None


def _attention(config: Config, window: int | None, in_chunks: bool) -> Attention:
    heads = config.count("num_attention_heads")
    latent = config.optional("kv_lora_rank")
    if latent is not None:
        rope = config.count("qk_rope_head_dim")
        key_dim = config.count("qk_nope_head_dim") + rope
        value_dim = config.count("v_head_dim")
        return Attention(heads, heads, key_dim, value_dim, latent, rope, window)
    hidden = config.count("hidden_size")
    head_dim = config.count("head_dim", default=max(hidden // heads, 1))
    kv_heads = config.count("num_key_value_heads", default=heads)
    return Attention(heads, kv_heads, head_dim, head_dim, 0, 0, window, in_chunks)


def _attention_matrices(config: Config, attention: Attention) -> tuple[list[Matrix], int]:
    """The projections, and the number of parameters beside them."""
    hidden, heads = config.count("hidden_size"), attention.heads
    out = Matrix("o", "attention", heads * attention.value_dim, hidden)
    if attention.latent_dim:
        return _latent_matrices(config, attention, out)
    q = Matrix("q", "attention", hidden, heads * attention.key_dim)
    k = Matrix("k", "attention", hidden, attention.kv_heads * attention.key_dim)
    v = Matrix("v", "attention", hidden, attention.kv_heads * attention.value_dim)
    other = 0
    if config.kind in ("qwen2", "qwen2_moe", "gpt_oss") or config.has("attention_bias"):
        other += q.outputs + k.outputs + v.outputs
    if config.kind == "gpt_oss" or (config.has("attention_bias") and "qwen2" not in config.kind):
        other += hidden
    if config.kind == "gpt_oss":
        other += heads  # one sink per head
    if config.kind in ("qwen3", "qwen3_moe", "gemma3_text", "gemma3"):
        other += 2 * attention.key_dim  # norms of queries and keys
    return [q, k, v, out], other


def _latent_matrices(config: Config, attention: Attention, out: Matrix) -> tuple[list[Matrix], int]:
    hidden, heads, latent = config.count("hidden_size"), attention.heads, attention.latent_dim
    matrices = [Matrix("kv_a", "attention", hidden, latent + attention.rope_dim)]
    other = latent  # its norm
    nope_dim = attention.key_dim - attention.rope_dim
    matrices.append(Matrix("kv_b", "attention", latent, heads * (nope_dim + attention.value_dim)))
    q_rank = config.optional("q_lora_rank")
    if q_rank is None:
        matrices.append(Matrix("q", "attention", hidden, heads * attention.key_dim))
    else:
        matrices.append(Matrix("q_a", "attention", hidden, q_rank))
        matrices.append(Matrix("q_b", "attention", q_rank, heads * attention.key_dim))
        other += q_rank
    return [*matrices, out], other


def _gated(name: str, part: Any, hidden: int, inner: int, copies: int = 1) -> list[Matrix]:
    """A gated feed-forward: two matrices in (as one), one out."""
    return [
        Matrix(f"{name}gate_up", part, hidden, 2 * inner, copies),
        Matrix(f"{name}down", part, inner, hidden, copies),
    ]


def _dense(config: Config) -> tuple[list[Matrix], int, Experts | None]:
    hidden = config.count("hidden_size")
    # Llama 4's `intermediate_size` is that of an expert.
    inner = config.count("intermediate_size_mlp", "intermediate_size")
    bias = (2 * inner + hidden) if config.has("mlp_bias") else 0
    return _gated("", "mlp", hidden, inner), bias, None


def _mixture(config: Config) -> tuple[list[Matrix], int, Experts | None]:
    hidden, kind = config.count("hidden_size"), config.kind
    experts = Experts(
        config.count("n_routed_experts", "num_local_experts", "num_experts"),
        config.count("num_experts_per_tok"),
    )
    if experts.active > experts.count:
        raise UserError(
            f"{config.name}: num_experts_per_tok is {experts.active} of {experts.count} experts",
            "It can't be more than there are.",
        )
    inner = config.count("moe_intermediate_size", "intermediate_size")
    matrices = [Matrix("router", "router", hidden, experts.count)]
    matrices += _gated("expert_", "expert", hidden, inner, experts.count)
    other = 0
    shared = config.optional("shared_expert_intermediate_size") or 0
    if config.optional("n_shared_experts"):
        shared = config.count("n_shared_experts") * inner
    if kind == "llama4_text":
        shared = inner
    if shared:
        matrices += _gated("shared_", "shared", hidden, shared)
    if kind == "qwen2_moe":
        other += hidden  # the gate of the shared expert
    if config.table.get("topk_method") == "noaux_tc" or kind in ("deepseek_v3", "kimi_k2"):
        other += experts.count  # the balance bias of the router
    if kind == "gpt_oss":
        other += experts.count + experts.count * (2 * inner + hidden)
    return matrices, other, experts


def _is_mixture(config: Config, index: int) -> bool:
    """Whether the layer at `index` has experts."""
    table = config.table
    if not any(table.get(k) for k in ("n_routed_experts", "num_local_experts", "num_experts")):
        return False
    dense = table.get("mlp_only_layers")
    if isinstance(dense, list) and index in dense:
        return False
    if config.optional("first_k_dense_replace"):
        return index >= config.count("first_k_dense_replace")
    step = config.count(
        "interleave_moe_layer_step", "decoder_sparse_step", "moe_layer_freq", default=1
    )
    return (index + 1) % step == 0


def _window(config: Config, index: int) -> tuple[int | None, bool]:
    """The attention window of the layer at `index`, and whether it begins anew in chunks."""
    table, kind = config.table, config.kind
    types = table.get("layer_types")
    chunk = config.optional("attention_chunk_size")
    if chunk is not None:  # Llama 4: every fourth layer sees all
        every = config.count("no_rope_layer_interval", default=4)
        return (None, False) if (index + 1) % every == 0 else (chunk, True)
    window = config.optional("sliding_window")
    if window is None or table.get("use_sliding_window") is False:
        return None, False
    if isinstance(types, list) and len(types) == config.count("num_hidden_layers"):
        return (window, False) if types[index] == "sliding_attention" else (None, False)
    if kind.startswith("gemma"):
        pattern = config.count("sliding_window_pattern", default=6 if "gemma3" in kind else 2)
        return (None, False) if (index + 1) % pattern == 0 else (window, False)
    if kind.startswith("qwen"):
        begins = config.count("max_window_layers", default=config.count("num_hidden_layers"))
        return (window, False) if index >= begins else (None, False)
    if kind == "gpt_oss":
        return (window, False) if index % 2 == 0 else (None, False)
    return window, False


_MOST_LAYERS: Final = 10_000
_NORMS: Final = {"gemma2": 4, "gemma3_text": 4, "gemma3": 4}
_KINDS: Final = (
    *("llama", "llama4_text", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "deepseek_v2", "deepseek_v3"),
    *("kimi_k2", "gpt_oss"),
)


def shape(table: Mapping[str, Any], name: str, served: str = "bf16") -> Shape:
    """The shape that a config.json describes; UserError names the key that is missing or wrong."""
    config = Config(table, name)
    if config.kind not in _KINDS:
        raise UserError(
            f"{name}: model_type {config.kind!r} is not known",
            f"Known are: {', '.join(_KINDS)}.",
        )
    hidden = config.count("hidden_size")
    norms = _NORMS.get(config.kind, 2) * hidden
    groups: Counter[Layer] = Counter()
    seen: dict[tuple[bool, int | None, bool], Layer] = {}
    layers = config.count("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise UserError(f"{name}: num_hidden_layers is {layers}", f"At most {_MOST_LAYERS} go.")
    for index in range(layers):
        key = (_is_mixture(config, index), *_window(config, index))
        if key not in seen:
            seen[key] = _layer(config, _mixture if key[0] else _dense, key[1], key[2], norms)
        groups[seen[key]] += 1
    # These tie by default, where the config doesn't say.
    tied = config.table.get("tie_word_embeddings", config.kind.startswith("gemma"))
    return Shape(
        name,
        hidden,
        config.count("vocab_size"),
        bool(tied),
        tuple(Group(count, layer) for layer, count in groups.items()),
        served,
        config.optional("max_position_embeddings"),
    )


def _layer(
    config: Config,
    feed_forward: Callable[[Config], tuple[list[Matrix], int, Experts | None]],
    window: int | None,
    in_chunks: bool,
    norms: int,
) -> Layer:
    attention = _attention(config, window, in_chunks)
    matrices, other = _attention_matrices(config, attention)
    more, more_other, experts = feed_forward(config)
    return Layer(attention, tuple(matrices + more), norms + other + more_other, experts)
