"""A Llama checkpoint in Hugging Face's form, as the GGUF file that llama.cpp's converter makes.

`config.json` becomes the header's metadata, and tensors are found by their names in GGUF. So the
same model gives the same numbers, whichever form it comes in. Other families are refused.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from tokenworks.errors import UserError
from tokenworks.model.config import Config
from tokenworks.model.gguf import Gguf, Value
from tokenworks.model.safetensors import Floats, Safetensors

_ARCH: Final = "llama"
_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What transformers' LlamaConfig takes where config.json says nothing.
_EPS, _ROPE_BASE, _CONTEXT_TOKENS = 1e-6, 10000.0, 2048


class Checkpoint:
    """A model's config and weights by the names of GGUF. UserError for a config that isn't one of
    a Llama; SafetensorsError, as the weights give it.
    """

    def __init__(self, config: Mapping[str, Any], weights: Safetensors, name: str) -> None:
        self._config, self._weights = Config(config, name), weights
        self.header = Gguf(3, _metadata(self._config), (), 0)

    def __contains__(self, name: object) -> bool:
        if name == "output.weight":  # the config tells: some files have the embeddings twice
            return not self._config.has("tie_word_embeddings")
        return isinstance(name, str) and _theirs(name) in self._weights

    def get(self, name: str, shape: tuple[int, ...]) -> Floats:
        """The tensor that GGUF calls `name`, as float32; it must have just this shape."""
        values = self._weights.get(_theirs(name), shape)
        if name.split(".")[-2] not in ("attn_q", "attn_k"):
            return values
        # In a head, Hugging Face turns number i with number i + half; GGUF turns neighbours.
        width = self.header.metadata[f"{_ARCH}.attention.key_length"]
        assert isinstance(width, int)
        halves = values.reshape(-1, 2, width // 2, shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(shape)


def _theirs(name: str) -> str:
    """Hugging Face's name of a tensor; the name itself where there is none."""
    *layer, part, kind = name.split(".")
    if layer:
        return f"model.layers.{layer[-1]}.{_LAYER_NAMES.get(part, part)}.{kind}"
    return f"{_NAMES.get(part, part)}.{kind}"


def _metadata(config: Config) -> dict[str, Value]:
    if config.kind != _ARCH:
        told = f"{config.name} is a {config.kind or 'nameless'} model"
        raise UserError(told, "Of folders with safetensors, those of model_type llama are read.")
    act = config.table.get("hidden_act", "silu")
    if act != "silu":
        raise UserError(f"{config.name}: hidden_act is {act!r}", "Known is silu.")
    heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
    found: dict[str, Value] = {
        "block_count": config.count("num_hidden_layers"),
        "embedding_length": hidden,
        "feed_forward_length": config.count("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": config.count("num_key_value_heads", default=heads),
        "attention.key_length": config.count("head_dim", default=max(hidden // heads, 1)),
        "vocab_size": config.count("vocab_size"),
        "context_length": config.count("max_position_embeddings", default=_CONTEXT_TOKENS),
        "attention.layer_norm_rms_epsilon": _single(
            config.table, "rms_norm_eps", _EPS, config.name
        ),
        **_rope(config),
    }
    return {"general.architecture": _ARCH} | {f"{_ARCH}.{k}": v for k, v in found.items()}


def _rope(config: Config) -> dict[str, Value]:
    """Later configs keep all of it in one table."""
    rope = config.table.get("rope_parameters") or config.table.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{config.name}: rope_scaling is {rope!r}", "It must be a table.")
    base = _single({**config.table, **rope}, "rope_theta", _ROPE_BASE, config.name)
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    found: dict[str, Value] = {"rope.freq_base": base}
    return found if kind == "default" else found | {"rope.scaling.type": kind}


def _single(table: Mapping[str, Any], key: str, default: float, name: str) -> float:
    """A number above zero in fp32, as GGUF keeps it."""
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{name}: {key} is {value!r}", "It must be a number above zero.")
    return float(np.float32(value))
