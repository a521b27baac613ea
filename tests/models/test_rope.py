"""Frequencies and attention factors of every kind and spelling of RoPE, against the rotary modules of transformers."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from asd_megatron.errors import UserError
from asd_megatron.models.families import shape_of
from asd_megatron.models.hf_config import warn_once

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 2048,
}
MODULES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "olmo3": "Olmo3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 16}


def base(family: str) -> dict[str, Any]:
    """A config.json of a family, without RoPE settings."""
    extra = MOE if family == "qwen3_moe" else {}
    return {"architectures": [f"{MODULES[family]}ForCausalLM"], "model_type": family, "head_dim": 64, **SIZES, **extra}


def their_frequencies(config: dict[str, Any]) -> dict[str, tuple[torch.Tensor, float]]:
    """(frequencies, attention factor) of each layer type, from the rotary module that transformers builds."""
    family = config["model_type"]
    kept = {k: copy.deepcopy(v) for k, v in config.items() if k not in ("architectures", "model_type")}
    made = AutoConfig.for_model(family, **kept)  # fills in the dictionaries that it is given
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(module, f"{MODULES[family]}RotaryEmbedding")(made)
    if family != "olmo3":
        return dict.fromkeys(("full_attention", "sliding_attention"), (rotary.inv_freq, rotary.attention_scaling))
    return {
        kind: (getattr(rotary, f"{kind}_inv_freq"), getattr(rotary, f"{kind}_attention_scaling"))
        for kind in ("full_attention", "sliding_attention")
    }


def assert_same_rope(config: dict[str, Any]) -> None:
    """The translated layers have the frequencies and the factor that transformers computes, to the last bit."""
    theirs = their_frequencies(config)
    _, shape = shape_of(config)
    for kind in shape.attention:
        name = "full_attention" if kind.window is None else "sliding_attention"
        assert torch.equal(kind.rotary.inverse_frequencies(), theirs[name][0]), name
        assert kind.rotary.attention_factor == theirs[name][1], name


def some(**choices: tuple[Any, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with each key left out or one of its values."""
    left_out = object()
    drawn = st.fixed_dictionaries({key: st.sampled_from((left_out, *values)) for key, values in choices.items()})
    return drawn.map(lambda values: {key: value for key, value in values.items() if value is not left_out})


THETA = some(rope_theta=(1e4, 1000000, 5e5, 2.5))
ORIGINAL = some(original_max_position_embeddings=(32, 512, 8192))
KINDS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "default": st.just({}),
    "linear": st.fixed_dictionaries({"factor": st.sampled_from((0.5, 1, 4.0, 7))}),
    "llama3": st.builds(
        lambda original, factors, factor: {**original, **factors, "factor": factor},
        ORIGINAL,
        st.sampled_from(
            ({"low_freq_factor": 1.0, "high_freq_factor": 4}, {"low_freq_factor": 2, "high_freq_factor": 3})
        ),
        st.sampled_from((1, 8.0, 32)),
    ),
    "yarn": st.builds(
        lambda original, factor, options: {**original, "factor": factor, **options},
        ORIGINAL,
        st.sampled_from((None, 0.5, 1.0, 4, 8.0, 40)),
        some(
            attention_factor=(None, 0.5, 1.2079441541679836),
            mscale=(None, 0, 0.707, 1.0, 2),
            mscale_all_dim=(None, 0, 1.0, 1.5),
            beta_fast=(None, 0, 32, 16.0, 1),
            beta_slow=(None, 0, 1, 2.5, 64),
            truncate=(None, True, False),
        ),
    ),
}


@st.composite
def rope(draw: st.DrawFn) -> dict[str, Any]:
    """RoPE settings of a kind, with its name in one of its two places."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    return {draw(st.sampled_from(("rope_type", "type"))): kind, **draw(KINDS[kind])}


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(sorted(set(MODULES) - {"olmo3"})),
    head_dim=st.sampled_from((2, 8, 64, 96)),
    rope=rope(),
    old=st.booleans(),
    inside=THETA,
    beside=THETA,
    original_beside=ORIGINAL,
)
def test_one_rope_for_all_layers(
    family: str,
    head_dim: int,
    rope: dict[str, Any],
    old: bool,
    inside: dict[str, Any],
    beside: dict[str, Any],
    original_beside: dict[str, Any],
) -> None:
    name = "rope_scaling" if old else "rope_parameters"
    assert_same_rope({**base(family), "head_dim": head_dim, name: {**rope, **inside}, **beside, **original_beside})


@settings(max_examples=150, deadline=None)
@given(
    full=st.none() | st.builds(lambda a, b: {**a, **b}, rope(), THETA),
    sliding=st.none() | st.builds(lambda a, b: {**a, **b}, rope(), THETA),
    scaling=st.none() | st.builds(lambda a, b: {**a, **b}, rope(), THETA),
    beside=THETA,
)
def test_a_rope_for_each_layer_type(full: Any, sliding: Any, scaling: Any, beside: dict[str, Any]) -> None:
    """Olmo 3: nested, flat and old, and both at once."""
    config = {**base("olmo3"), **beside}
    if scaling is not None:
        config["rope_scaling"] = scaling
    if full is not None or sliding is not None:
        objects = {"full_attention": full, "sliding_attention": sliding}
        config["rope_parameters"] = {key: value for key, value in objects.items() if value is not None}
    if scaling is not None and full is None and sliding is not None:
        return  # transformers lays rope_scaling over an object that must be there
    try:
        shape_of(config)
    except UserError as error:  # rope_scaling over another kind, which keeps its rope_type: keys of both
        assert scaling is not None and (full is not None or "type" in scaling) and "has no" in str(error)
        return
    assert_same_rope(config)


def test_old_olmo3_theta_is_of_the_full_attention_layers_alone(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
    _, shape = shape_of({**base("olmo3"), "rope_theta": 1e4, "rope_scaling": yarn})
    sliding, full = shape.rotaries
    assert (sliding.theta, sliding.scaling, sliding.attention_factor) == (5e5, None, 1.0)
    assert full.theta == 1e4 and full.attention_factor == pytest.approx(1.2079441541679836)
    assert "rope_theta 10000 is of the full-attention layers alone" in caplog.text
    assert hash(full) != hash(sliding) and full == shape.attention[3].rotary == shape.attention[-1].rotary
