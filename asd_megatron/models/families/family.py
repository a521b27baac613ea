"""The declaration of a model family, and the parts that decoder-only families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from asd_megatron.errors import UserError
from asd_megatron.models.hf_config import flag, number, required, shown, whole_number
from asd_megatron.models.rope import RotarySettings
from asd_megatron.models.weights import QKV, Copy, GateUp, Row, Rule, Vocabulary

# The largest sizes that are believed. Beyond them a file is damaged, and building such a model would take all memory.
MOST = {
    "num_hidden_layers": 1 << 12,
    "hidden_size": 1 << 18,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "intermediate_size": 1 << 21,
    "vocab_size": 1 << 24,
    "max_position_embeddings": (1 << 31) - 1,
}
OPTIONAL = ("num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class ModelShape:
    """A Hugging Face config, translated: everything that the Megatron model is built from."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm_epsilon: float
    qk_norm: bool
    tied: bool
    rotary: RotarySettings
    initializer_range: float = 0.02


@dataclass(frozen=True)
class Family:
    """A family of models. `translate` refuses (UserError) what its Megatron model cannot represent."""

    name: str
    architectures: tuple[str, ...]
    translate: Callable[[Mapping[str, Any]], ModelShape]
    rules: tuple[Rule, ...]
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.nn.functional.silu


def refuse_unless(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], why: str) -> None:
    """Raise UserError unless the key is absent or one of `allowed`; `why` says what is supported."""
    if config.get(key, allowed[0]) not in allowed:
        raise UserError(f"config.json: {key} is {shown(config[key])}; {why}")


def translate_decoder(config: Mapping[str, Any], *, qk_norm: bool, explicit: tuple[str, ...] = ()) -> ModelShape:
    """A pre-norm decoder with grouped-query attention, RoPE, RMSNorm and SwiGLU, without biases.

    `explicit` are optional keys that this family requires, since `transformers` gives them other defaults than ours.
    """
    for key in explicit:
        required(config, key)
    refuse_unless(config, "quantization_config", (None,), "quantized weights cannot be trained; use a model without")
    refuse_unless(config, "hidden_act", ("silu",), "only silu (SwiGLU) is supported")
    refuse_unless(config, "attention_bias", (False, None), "projections with a bias are not supported")
    refuse_unless(config, "mlp_bias", (False, None), "projections with a bias are not supported")
    refuse_unless(config, "use_sliding_window", (False, None), "sliding-window attention is not supported")
    layer_types = config.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list | tuple) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise UserError("config.json: layer_types asks for other layers than full_attention, which are not supported")
    size = {key: whole_number(config, key, most) for key, most in MOST.items() if key not in OPTIONAL}
    heads, hidden = size["num_attention_heads"], size["hidden_size"]
    kv_heads, head_dim = (None if config.get(key) is None else whole_number(config, key, MOST[key]) for key in OPTIONAL)
    kv_heads = heads if kv_heads is None else kv_heads
    if heads % kv_heads:
        raise UserError(
            f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}: the file is"
            " damaged, or of another model; download the model again"
        )
    if head_dim is None and hidden % heads:
        raise UserError(
            f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads} and there is no head_dim:"
            " the file is damaged, or of another model; download the model again"
        )
    head_dim = hidden // heads if head_dim is None else head_dim
    return ModelShape(
        layers=size["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=size["intermediate_size"],
        vocab=size["vocab_size"],
        max_positions=size["max_position_embeddings"],
        norm_epsilon=number(config, "rms_norm_eps", 1e-6, zero=True),
        qk_norm=qk_norm,
        tied=flag(config, "tie_word_embeddings"),
        rotary=RotarySettings.from_config(config, head_dim),
        initializer_range=number(config, "initializer_range", 0.02, zero=True),
    )


def decoder_rules(*, qk_norm: bool) -> tuple[Rule, ...]:
    """The tensors of such a decoder, in the order of the forward pass."""
    mega, hf = "decoder.layers.{layer}.", "model.layers.{layer}."

    def layer(megatron: tuple[str, ...], names: tuple[str, ...], operation: Any) -> Rule:
        return Rule(tuple(mega + m for m in megatron), tuple(hf + n for n in names), operation)

    attention, mlp = "self_attention.", "mlp."
    rules = [
        Rule(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), Vocabulary()),
        layer(
            ("input_layernorm.weight", attention + "linear_qkv.layer_norm_weight"),
            ("input_layernorm.weight",),
            Copy(("hidden",)),
        ),
        layer(
            (attention + "linear_qkv.weight",),
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            QKV(),
        ),
    ]
    if qk_norm:
        rules += [
            layer((attention + f"{x}_layernorm.weight",), (f"self_attn.{x}_norm.weight",), Copy(("head_dim",)))
            for x in ("q", "k")
        ]
    rules += [
        layer((attention + "linear_proj.weight",), ("self_attn.o_proj.weight",), Row("attention")),
        layer(
            ("pre_mlp_layernorm.weight", mlp + "linear_fc1.layer_norm_weight"),
            ("post_attention_layernorm.weight",),
            Copy(("hidden",)),
        ),
        layer((mlp + "linear_fc1.weight",), ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GateUp()),
        layer((mlp + "linear_fc2.weight",), ("mlp.down_proj.weight",), Row("ffn")),
        Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), Copy(("hidden",))),
        Rule(("output_layer.weight",), ("lm_head.weight",), Vocabulary()),
    ]
    return tuple(rules)
