"""A GGUF header as a Shape: the same parser as for config.json, fed with the header's keys."""

from collections import Counter
from math import prod
from typing import Any, Final

from tokenworks.errors import UserError
from tokenworks.model import config
from tokenworks.model.gguf import Array, Gguf, GgufError
from tokenworks.model.shape import Shape

# llama.cpp's names of architectures and keys, in Hugging Face's.
_KINDS: Final = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "deepseek2": "deepseek_v3",
    "gpt-oss": "gpt_oss",
    "llama4": "llama4_text",
}
_KEYS: Final = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.value_length_mla": "v_head_dim",
    "context_length": "max_position_embeddings",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "leading_dense_block_count": "first_k_dense_replace",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
    "vocab_size": "vocab_size",
}
# ggml's tensor types; those that are missing have 2 to 5 bits.
_PRECISIONS: Final = {
    0: "fp32",
    1: "fp16",
    30: "bf16",
    8: "int8",
    9: "int8",
    15: "int8",
    39: "mxfp4",
    6: "fp6",
    7: "fp6",
    13: "fp6",
    14: "fp6",
}


def shape(header: Gguf, name: str) -> Shape:
    """The shape a header describes; UserError for an architecture that is not known."""
    try:
        arch = header.architecture
    except GgufError as error:
        raise UserError(f"{name}: {error}", "Give the GGUF file of a language model.") from None
    if arch not in _KINDS:
        raise UserError(
            f"{name}: the architecture {arch!r} is not known", f"Known are: {', '.join(_KINDS)}."
        )
    table: dict[str, Any] = {"model_type": _KINDS[arch]}
    for key, theirs in _KEYS.items():
        value = header.metadata.get(f"{arch}.{key}")
        if isinstance(value, int) and not isinstance(value, bool) and value:
            table[theirs] = value
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Array):
        table.setdefault("vocab_size", tokens.length)
    names = {tensor.name for tensor in header.tensors}
    table["tie_word_embeddings"] = "output.weight" not in names if names else True
    table["attention_bias"] = "blk.0.attn_q.bias" in names and arch != "qwen2"
    if "kv_lora_rank" in table:
        _latent(table, header)
    if table["model_type"] == "llama" and "num_local_experts" in table:
        table["model_type"] = "mixtral"
    return config.shape(table, name, _precision(header))


def _precision(header: Gguf) -> str:
    """The precision nearest to that of most of the weights."""
    numbers: Counter[str] = Counter()
    for tensor in header.tensors:
        numbers[_PRECISIONS.get(tensor.ggml_type, "int4")] += prod(tensor.shape)
    return numbers.most_common(1)[0][0] if numbers else "bf16"


def _latent(table: dict[str, Any], header: Gguf) -> None:
    """DeepSeek's head sizes: the header has them with and without the rotary part."""
    arch = header.architecture
    rope = header.metadata.get(f"{arch}.rope.dimension_count")
    key = header.metadata.get(f"{arch}.attention.key_length_mla") or table.get("head_dim")
    if isinstance(rope, int) and isinstance(key, int):
        table["qk_rope_head_dim"] = rope
        table["qk_nope_head_dim"] = key - rope
    value = header.metadata.get(f"{arch}.attention.value_length")
    if isinstance(value, int):
        table.setdefault("v_head_dim", value)


def parameters(header: Gguf) -> int:
    """All numbers of the tensors the header lists: exact, whatever the architecture."""
    return sum(prod(tensor.shape) for tensor in header.tensors)
