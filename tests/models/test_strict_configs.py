"""Configs whose fields are all looked at: every problem at once, fields of other models, fields that nobody knows."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from asd_megatron.errors import UserError
from asd_megatron.models import families as families_package
from asd_megatron.models.families import check_architecture, families, shape_of
from asd_megatron.models.hf_config import warn_once
from asd_megatron.models.hf_fields import CHANGES
from asd_megatron.models.rope import COMMON_KEYS, KINDS, LAYER_TYPES, OPTIONS
from tests.models.test_rope import MODULES, base


def test_all_violations_are_named_at_once() -> None:
    broken = {
        **{k: v for k, v in base("llama").items() if k != "vocab_size"},
        "hidden_size": -1,
        "num_attention_heads": "4",
        "tie_word_embeddings": 1,
        "layer_types": ["chunked_attention"],
        "mlp_bias": True,
        "rope_scaling": {"rope_type": "llama3", "factor": 0},
    }
    with pytest.raises(UserError) as caught:
        check_architecture(broken)
    first, *lines = str(caught.value).splitlines()
    assert first == "config.json cannot be used:"
    named = [
        "hidden_size is -1",
        "num_attention_heads is '4'",
        "`vocab_size`",
        "tie_word_embeddings is 1",
        "layer_types",
    ]
    named += ["'low_freq_factor'", "'high_freq_factor'", "mlp_bias is True"]
    assert [name in line for name, line in zip(named, lines, strict=True)] == [True] * len(named), lines


# Families whose difference from Llama is in their code, not in a field of their config: the model's type or its
# tensors tell them apart.
LIKE_LLAMA = {"ernie4_5", "helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "llama", "olmo", "olmo2", "phi3"}
LIKE_LLAMA |= {"qwen2", "qwen3"}


def test_a_config_of_any_other_family_of_transformers_is_refused_by_its_fields() -> None:
    """Relabelled as Llama: a derived model that keeps a field of its origin is not trained without it."""
    tried, accepted = 0, set()
    for name in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING.keys())):
        config_class = CONFIG_MAPPING[name]
        if not hasattr(config_class, "rope_parameters") or not hasattr(config_class, "hidden_act"):
            continue
        config = {**config_class().to_dict(), "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        tried += 1
        try:
            shape_of(config)
            accepted.add(name)
        except UserError:
            pass
    assert accepted == LIKE_LLAMA and tried > 60


def test_fields_that_nobody_knows_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    harmless = {
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "image_token_id": 3,
        "pretraining_tp": 2,
        "clip_qkv": None,
    }
    with caplog.at_level(logging.WARNING, logger="asd_megatron"):
        check_architecture({**base("llama"), **harmless})
        assert not caplog.records
        for _ in range(2):
            check_architecture({**base("llama"), **harmless, "zeta": 1, "flux_capacity": 2, "null": None})
        assert [r.getMessage() for r in caplog.records] == [
            "config.json: fields that are not known here and have no effect: flux_capacity, zeta; if one of them "
            "changes what the model computes, the model is not supported"
        ]


TOY = '''
"""A toy family."""

from asd_megatron.models.family import decoder_family
from asd_megatron.models.layer_attention import window_in_all_layers

FAMILY = decoder_family("toy", "ToyForCausalLM", qkv_bias=True, post_norm=True, attention=window_in_all_layers)
'''


def test_a_family_is_added_by_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**base("llama"), "architectures": ["ToyForCausalLM"], "model_type": "toy", "sliding_window": 7}
    with pytest.raises(UserError, match="ToyForCausalLM, which is not supported"):
        shape_of(config)
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(families_package, "__path__", [*families_package.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, f"{families_package.__name__}.toy", raising=False)
    families.cache_clear()
    try:
        family, shape = shape_of(config)
    finally:
        sys.modules.pop(f"{families_package.__name__}.toy", None)
        monkeypatch.undo()
        families.cache_clear()
    assert family.name == "toy" and shape.qkv_bias and shape.post_norm
    assert {kind.window for kind in shape.attention} == {7} and len(shape.attention) == 4
    names = {name for rule in family.rules for name in rule.huggingface}
    assert {
        "model.layers.{layer}.self_attn.q_proj.bias",
        "model.layers.{layer}.post_feedforward_layernorm.weight",
    } < names
    with pytest.raises(UserError, match="ToyForCausalLM"):  # and is gone again
        shape_of(config)


ROPE_KEYS = [*COMMON_KEYS, *LAYER_TYPES, *{key: None for keys in (*KINDS.values(), *OPTIONS.values()) for key in keys}]
KEYS = sorted({*base("qwen3_moe"), *(key for _, values in CHANGES for key in values)} - {"architectures"})
KEYS += ["rope_theta", "max_window_layers", "rms_norm_eps", "initializer_range", "tie_word_embeddings"]
SCALARS = st.sampled_from(
    (
        None,
        True,
        False,
        0,
        1,
        4,
        -1,
        0.5,
        1e40,
        10**400,
        float("nan"),
        float("inf"),
        "8",
        "yarn",
        "linear",
        "llama3",
        "x",
    )
)
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ROPE_KEYS), inner, max_size=4)
)
ROPES = st.dictionaries(st.sampled_from(ROPE_KEYS), JUNK, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(sorted(MODULES)),
    over=st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=5),
    ropes=st.dictionaries(st.sampled_from(("rope_scaling", "rope_parameters")), ROPES | JUNK, max_size=2),
)
def test_no_value_of_any_field_goes_unnoticed(family: str, over: dict[str, Any], ropes: dict[str, Any]) -> None:
    """A damaged config is refused by a message that names its fields, or its frequencies are numbers."""
    try:
        _, shape = shape_of({**base(family), **over, **ropes})
    except UserError as error:
        assert "of the wrong kind:" not in str(error)  # what shape_of says of an exception that nobody foresaw
        assert any(key in str(error) for key in (*over, *ropes, *ROPE_KEYS, "RoPE")), str(error)
    else:
        for rotary in shape.rotaries:
            assert rotary.inverse_frequencies().isfinite().all() and 0 < rotary.attention_factor < float("inf")
