"""Hugging Face configs, old and new spelling, to model shapes; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from asd_megatron.errors import UserError
from asd_megatron.models.families import ModelShape, family_of

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **BASE}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 12, **BASE}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(config: dict[str, Any]) -> ModelShape:
    return family_of(config).translate(config)


def test_llama() -> None:
    shape = _shape(LLAMA)
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (4, 32, 4, 2, 8)
    assert (shape.ffn, shape.vocab, shape.max_positions, shape.norm_epsilon) == (48, 61, 128, 1e-5)
    assert not shape.qk_norm and not shape.tied
    assert shape.rotary.theta == 5e5 and shape.rotary.llama3 is None
    assert _shape({**LLAMA, "tie_word_embeddings": True}).tied
    assert _shape({**LLAMA, "num_key_value_heads": None}).kv_heads == 4


def test_qwen3() -> None:
    shape = _shape(QWEN3)
    assert shape.qk_norm and shape.head_dim == 12
    with pytest.raises(UserError, match="head_dim"):  # transformers would take 128, whatever hidden / heads is
        _shape({k: v for k, v in QWEN3.items() if k != "head_dim"})


@pytest.mark.parametrize("model_class", [LlamaConfig, Qwen3Config])
def test_defaults_are_those_of_transformers(model_class: Any) -> None:
    """A config.json may leave out what equals its class's default."""
    needed = {k: v for k, v in BASE.items() if k not in ("rms_norm_eps", "rope_theta")}
    needed |= {"head_dim": 12} if model_class is Qwen3Config else {}
    theirs = model_class(**needed)
    ours = _shape({"architectures": [model_class.__name__.replace("Config", "ForCausalLM")], **needed})
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.rotary.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied == theirs.tie_word_embeddings and ours.head_dim == theirs.head_dim


@pytest.mark.parametrize("original", [8192, 64])
def test_llama3_frequencies(original: int) -> None:
    scaling = {**LLAMA3, "original_max_position_embeddings": original}
    old = {**LLAMA, "rope_scaling": scaling}
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"} | {"rope_parameters": {**scaling, "rope_theta": 5e5}}
    kept = {k: v for k, v in new.items() if k not in ("architectures", "model_type")}
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**kept), torch.device("cpu"))
    for config in (old, new):
        torch.testing.assert_close(_shape(config).rotary.inverse_frequencies(), theirs, rtol=1e-6, atol=0)


def test_plain_frequencies_and_their_spellings() -> None:
    expected = 5e5 ** -(torch.arange(0, 8, 2) / 8)
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    for config in (
        LLAMA,
        {**LLAMA, "rope_scaling": None},
        {**new, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {**new, "rope_scaling": {"type": "default"}, "rope_theta": 5e5},
    ):
        torch.testing.assert_close(_shape(config).rotary.inverse_frequencies(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "rope_scaling": LLAMA3}, QWEN3])
def test_what_transformers_writes_is_understood(config: dict[str, Any], tmp_path: Any) -> None:
    kept = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    made = AutoConfig.for_model(config["model_type"], **kept)
    assert _shape({**made.to_dict(), "architectures": config["architectures"]}) == _shape(config)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*not supported.*LlamaForCausalLM"),
        ({"architectures": None}, r"\(none\)"),
        ({"attention_bias": True}, "attention_bias.*bias"),
        ({"mlp_bias": True}, "mlp_bias.*bias"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear.*not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "llama3 needs"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quanti"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_refusals(over: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _shape({**LLAMA, **over})
