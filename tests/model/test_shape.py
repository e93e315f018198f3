"""Shapes: parameter counts as published, cache bytes as summed by hand, windows, broken configs."""

import re
from typing import Any

import pytest

from tokenworks.assets import store
from tokenworks.catalog.models import models
from tokenworks.catalog.shapes import find, shapes
from tokenworks.errors import UserError
from tokenworks.model import config, from_gguf, library
from tokenworks.model.precision import bytes_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.parametrize("name", shapes())
def test_parameters_are_those_published(name: str) -> None:
    record, shape = find(name), library.shape(name)
    off = abs(shape.parameters - record.parameters) / record.parameters
    assert off <= record.tolerance
    if record.active_parameters is not None:
        # Rounded to two digits by the publishers; OpenAI leaves out the input embedding.
        left_out = shape.hidden * shape.vocabulary if "gpt-oss" in name else 0
        active = shape.active_parameters - left_out
        assert active == pytest.approx(record.active_parameters, rel=0.03)
    else:
        assert shape.active_parameters == shape.parameters


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("llama-3.1-8b", 2 * 32 * 8 * 128 * 2),
        ("llama-2-70b", 2 * 80 * 8 * 128 * 2),
        ("llama-2-7b", 2 * 32 * 32 * 128 * 2),
        ("qwen3-32b", 2 * 64 * 8 * 128 * 2),
        ("gemma-3-27b", 2 * 62 * 16 * 128 * 2),
        ("mixtral-8x7b", 2 * 32 * 8 * 128 * 2),
        ("deepseek-v3", 61 * (512 + 64) * 2),
        ("gpt-oss-120b", 2 * 36 * 8 * 64 * 2),
        ("smollm2-135m", 2 * 30 * 3 * 64 * 2),
    ],
)
def test_cache_bytes_are_those_summed_by_hand(name: str, by_hand: int) -> None:
    assert library.shape(name).kv_bytes_per_token() == by_hand
    assert library.shape(name).kv_bytes_per_token("fp8") == by_hand // 2


def test_windows_cut_the_cache() -> None:
    shape = library.shape("mistral-7b")
    assert shape.kv_bytes(10_000) == shape.kv_bytes(4096) == 4096 * 131_072
    gemma = library.shape("gemma-3-27b")
    assert sorted((g.count, g.layer.attention.window) for g in gemma.groups if g.count > 10) == [
        (52, 1024)
    ]
    assert gemma.kv_bytes(2000) == (52 * 1024 + 10 * 2000) * 2 * 16 * 128 * 2
    scout = library.shape("llama-4-scout")
    assert {g.layer.attention.in_chunks for g in scout.groups} == {True, False}


def test_weight_bytes() -> None:
    shape = library.shape("llama-3.1-8b")
    assert shape.weight_bytes("bf16") == 2 * shape.parameters
    wide = shape.embedding_parameters + shape.hidden * (2 * shape.layers + 1)
    assert shape.weight_bytes("fp8") == pytest.approx(shape.parameters + wide, rel=1e-4)
    # The published checkpoint of gpt-oss-120b has 60.8 GiB (65.3 GB).
    assert library.shape("gpt-oss-120b").weight_bytes() == pytest.approx(65.3e9, rel=0.01)


def test_flops_per_token() -> None:
    shape = library.shape("llama-3.1-8b")
    matrices = shape.parameters - shape.vocabulary * shape.hidden - shape.hidden * 65
    assert shape.flops_per_token() == 2 * matrices
    assert shape.flops_per_token(1000) - shape.flops_per_token() == 4 * 32 * 32 * 128 * 1000


def test_a_gguf_header_gives_the_same_shape() -> None:
    model = models()["smollm2-135m-instruct"]
    header = store.read_header(store.ensure(model))
    shape = from_gguf.shape(header, "smollm")
    assert shape.groups == library.shape("smollm2-135m").groups
    assert shape.parameters == from_gguf.parameters(header) == model.parameters


def test_a_shape_from_a_config() -> None:
    shape = config.shape(LLAMA, "tiny")
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 192 + 128
    assert shape.parameters == 2 * layer + 2 * 6400 + 64
    nested = config.shape({"model_type": "gemma3", "text_config": LLAMA}, "tiny")
    assert nested == shape


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "bert"}, "tiny: model_type 'bert' is not known"),
        ({"hidden_size": None}, "tiny: there is no hidden_size"),
        ({"hidden_size": 0}, "tiny: hidden_size is 0"),
        ({"hidden_size": "64"}, "tiny: hidden_size is '64'"),
        ({"num_hidden_layers": -1}, "tiny: num_hidden_layers is -1"),
        ({"num_hidden_layers": True}, "tiny: num_hidden_layers is True"),
        (
            {"num_local_experts": 2, "num_experts_per_tok": 4},
            "tiny: num_experts_per_tok is 4 of 2 experts",
        ),
    ],
)
def test_a_broken_config_is_one_clear_error(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        config.shape({**LLAMA, **change}, "tiny")
    assert caught.value.remedy


def test_unknown_names_suggest() -> None:
    with pytest.raises(UserError, match=r"Did you mean llama-3\.1-70b"):
        library.shape("lama-3.1-70b")
    with pytest.raises(UserError, match="Did you mean fp8"):
        bytes_of("fp7")
    assert library.shape("meta-llama/Llama-3.1-8B-Instruct") is not None
