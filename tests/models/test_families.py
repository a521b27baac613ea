"""Hugging Face configs, old and new spelling, to model shapes; and what is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from asd_megatron.errors import UserError
from asd_megatron.models.families import ModelShape, check_architecture, family_of
from asd_megatron.models.family import Experts
from asd_megatron.models.hf_config import warn_once
from asd_megatron.models.rope import RotarySettings
from tests.models.test_rope import MODULES, base

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
MOE = {**base("qwen3_moe"), "norm_topk_prob": False}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def deep() -> Any:
    """Lists in lists, too many for Python to print."""
    value: Any = []
    for _ in range(20_000):
        value = [value]
    return value


def _shape(config: dict[str, Any]) -> ModelShape:
    return family_of(config).translate(config)


def test_llama() -> None:
    shape = _shape(LLAMA)
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (4, 32, 4, 2, 8)
    assert (shape.ffn, shape.vocab, shape.max_positions, shape.norm_epsilon) == (48, 61, 128, 1e-5)
    assert shape.qk_norm == "none" and not shape.tied
    assert shape.rotaries[0].theta == 5e5 and shape.rotaries[0].scaling is None
    assert _shape({**LLAMA, "tie_word_embeddings": True}).tied
    assert _shape({**LLAMA, "num_key_value_heads": None}).kv_heads == 4


def test_qwen3() -> None:
    shape = _shape(QWEN3)
    assert shape.qk_norm == "head" and shape.head_dim == 12
    with pytest.raises(UserError, match="head_dim"):  # transformers would take 128, whatever hidden / heads is
        _shape({k: v for k, v in QWEN3.items() if k != "head_dim"})


@pytest.mark.parametrize("family", MODULES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """A config.json may leave out what equals its class's default."""
    config = base(family)
    theirs = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    ours = _shape(config)
    assert ours.norm_epsilon == theirs.rms_norm_eps and ours.tied == theirs.tie_word_embeddings
    assert ours.initializer_range == theirs.initializer_range
    nested = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert {rotary.theta for rotary in ours.rotaries} == {nested["rope_theta"]}
    config = {k: v for k, v in config.items() if k not in ("head_dim", "num_key_value_heads")}
    theirs = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    try:
        ours = _shape(config)
    except UserError as error:  # defaults that are no function of the other sizes have to be written out
        assert "config.json has no `num_key_value_heads`" in str(error)
    else:
        assert (ours.kv_heads, ours.head_dim) == (theirs.num_key_value_heads, 64) == (4, 64)


def test_experts() -> None:
    assert _shape(MOE).experts == Experts(6, 2, 16, normalized=False, auxiliary_loss=0.001)
    over = {"norm_topk_prob": True, "router_aux_loss_coef": 0.02, "mlp_only_layers": [], "decoder_sparse_step": 1}
    assert _shape({**MOE, **over}).experts == Experts(6, 2, 16, normalized=True, auxiliary_loss=0.02)
    assert _shape(LLAMA).experts is None
    assert _shape({k: v for k, v in MOE.items() if k != "head_dim"}).head_dim == 64  # transformers 5 may leave it out


def test_either_name_of_the_number_of_experts() -> None:
    """transformers 4 writes `num_experts`, 5 writes `num_local_experts`."""
    written = Qwen3MoeConfig(**{k: v for k, v in MOE.items() if k not in ("architectures", "model_type")}).to_dict()
    assert "num_experts" not in written
    assert _shape({**written, "architectures": MOE["architectures"]}) == _shape(MOE)
    assert _shape({**MOE, "num_local_experts": 6}) == _shape(MOE)
    with pytest.raises(UserError, match="num_local_experts is 8; but num_experts is 6"):
        _shape({**MOE, "num_local_experts": 8})


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"num_experts": None}, "has no `num_experts`"),
        (
            {"norm_topk_prob": None},
            "has no `norm_topk_prob`",
        ),  # transformers' default is not that of any published model
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7; there are 6 experts"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; a model with dense and sparse layers"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; a model with dense and sparse layers"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef is -1"),
        ({"n_group": 4}, "n_group is 4; such experts are not supported"),
        ({"shared_expert_intermediate_size": 16}, "shared_expert_intermediate_size is 16; such experts"),
    ],
)
def test_experts_that_are_refused(over: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _shape({**MOE, **over})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("original", [8192, 64])
def test_llama3_frequencies(original: int) -> None:
    scaling = {**LLAMA3, "original_max_position_embeddings": original}
    old = {**LLAMA, "rope_scaling": scaling}
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"} | {"rope_parameters": {**scaling, "rope_theta": 5e5}}
    kept = {k: v for k, v in new.items() if k not in ("architectures", "model_type")}
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**kept), torch.device("cpu"))
    for config in (old, new):
        torch.testing.assert_close(_shape(config).rotaries[0].inverse_frequencies(), theirs, rtol=1e-6, atol=0)


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {}},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {**SCALED, "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {**SCALED, "rope_theta": 2e5}},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}, "rope_theta": 5e5},
        {"rope_parameters": {**SCALED, "rope_theta": 1e6}, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {**SCALED, "original_max_position_embeddings": 64}, "rope_theta": 5e5},
        {"rope_scaling": {**SCALED, "type": "linear", "partial_rotary_factor": 1.0}},
        {"rope_scaling": SCALED, "original_max_position_embeddings": 32},
    ],
)
@pytest.mark.parametrize("model_class", [LlamaConfig, Qwen3Config])
def test_every_spelling_of_rope_is_read_as_transformers_reads_it(model_class: Any, rope: dict[str, Any]) -> None:
    kept = {k: v for k, v in BASE.items() if k != "rope_theta"} | {"head_dim": 16}
    # transformers fills in the dictionaries that it is given
    theirs = model_class(**kept, **{k: dict(v) if isinstance(v, dict) else v for k, v in rope.items()})
    kind = theirs.rope_parameters["rope_type"]
    ours = RotarySettings.from_config({**kept, **rope}, 16)
    assert ours.theta == theirs.rope_parameters["rope_theta"] and (ours.scaling is not None) == (kind == "llama3")
    if kind == "llama3":
        expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
        torch.testing.assert_close(ours.inverse_frequencies(), expected, rtol=1e-6, atol=0)


def test_a_base_that_rope_scaling_replaces_is_named(caplog: pytest.LogCaptureFixture) -> None:
    rope = {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": SCALED, "max_position_embeddings": 128}
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="asd_megatron"):
        assert RotarySettings.from_config(rope, 16).theta == 1e4
    assert "rope_theta is 10000" in caplog.text and "1000000.0" in caplog.text
    caplog.clear()
    assert RotarySettings.from_config({**rope, "rope_theta": 1e6}, 16).theta == 1e6 and not caplog.text


def test_plain_frequencies_and_their_spellings() -> None:
    expected = 5e5 ** -(torch.arange(0, 8, 2) / 8)
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    for config in (
        LLAMA,
        {**LLAMA, "rope_scaling": None},
        {**new, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {**new, "rope_scaling": {"type": "default"}, "rope_theta": 5e5},
    ):
        torch.testing.assert_close(_shape(config).rotaries[0].inverse_frequencies(), expected, rtol=1e-6, atol=0)


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
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            r"dynamic.*not supported; supported are default, linear, ",
        ),
        ({"rope_scaling": {"rope_type": "proportional"}}, "proportional.*not supported"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "mrope.*not supported"),
        ({"rope_scaling": {"type": "linear"}}, "linear needs 'factor' in rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, r"rope_scaling\.factor is -1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, "yarn needs a rope_theta above 1"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 1}},
            "truncate is 1, expected true or false",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0}}, "attention_factor is 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "finetuned": True}}, "yarn has no 'finetuned'"),
        (
            {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "high_freq_factor"}},
            "llama3 needs 'high_freq_factor'",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}},
            "yarn needs 'factor' in rope_scaling",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"longrope.*rope_parameters.*not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "has no 'full_attention'"),
        ({"rope_scaling": {"factor": 4.0}}, "has no 'factor'.*name the rope_type"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "has no 'mrope_section'"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "not supported"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_scaling": {**LLAMA3, "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor is '8'"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor.*below"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192.5}}, "original_max_position_embeddings"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*expected a number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"head_dim": 7}, "head_dim of 7"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_sliding_window": True}, "use_sliding_window is True; sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quanti"),
        ({"hidden_size": None}, "config.json has no `hidden_size`"),
        ({"model_type": "olmo2"}, "model_type is 'olmo2'; architectures names a model of type llama"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; dropout is not supported: set it to 0"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5; scaled embeddings"),
        ({"clip_qkv": 8}, "clip_qkv is 8; capped or clipped"),
        ({"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
        ({"mamba_d_conv": 4}, "mamba_d_conv is 4"),
        ({"num_local_experts": 8}, "num_local_experts is 8; such experts are not supported in this family"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
    ],
)
def test_refusals(over: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _shape({**LLAMA, **over})
    assert "\n" not in str(caught.value)  # one violation, one message


@pytest.mark.parametrize(
    "value", [10**12, -1, 0, "64", 64.0, True, [64], {}, float("nan"), float("inf"), 10**5000], ids=range(11)
)
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "head_dim",
    ],
)
def test_sizes_that_no_model_has_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(
        UserError, match=rf"config\.json: {key} is .*, expected a whole number from 1 to [\d,]+: .*again"
    ):
        check_architecture({**QWEN3, key: value})


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 33}, "hidden_size 33 is no multiple of num_attention_heads 4"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected a number"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"initializer_range": float("nan")}, "initializer_range is nan"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        ({"layer_types": 3}, "layer_types"),
        ({"layer_types": [["full_attention"]]}, "layer_types"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected a list"),
        ({"architectures": [{}]}, "architectures"),
        ({"hidden_act": deep()}, "hidden_act is a value too large"),
        ({"rope_scaling": {"rope_type": deep()}}, "a value too large.*is not supported"),
    ],
)
def test_other_values_that_are_refused(over: dict[str, Any], message: str) -> None:
    check_architecture(LLAMA)
    with pytest.raises(UserError, match=message):
        check_architecture({**LLAMA, **over})
