"""The declaration of a model family, and the parts that decoder-only families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from asd_megatron.errors import UserError
from asd_megatron.models.hf_config import flag, number, required, shown, whole_number
from asd_megatron.models.rope import RotarySettings
from asd_megatron.models.weights import QKV, Copy, GateUp, Row, Rule, Split, Vocabulary

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
    "num_experts": 1 << 12,
    "num_experts_per_tok": 1 << 12,
    "moe_intermediate_size": 1 << 21,
    "sliding_window": (1 << 31) - 1,
}
OPTIONAL = ("num_key_value_heads", "head_dim")
SIZES = tuple(MOST)[:8]

QKNorm = Literal["none", "head", "projection"]
"""RMSNorm of queries and keys: none; of each head, with one weight for all heads; of the complete projection."""


@dataclass(frozen=True)
class AttentionKind:
    """How a layer attends.

    Attributes:
        rotary: its rotary position embedding.
        window: the newest keys that a query attends to, its own included; None: all.
    """

    rotary: RotarySettings
    window: int | None = None


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in place of every layer's MLP, with a softmax router.

    Attributes:
        count, per_token: experts of a layer, and those that each token is sent to.
        ffn: the intermediate size of one expert.
        normalized: whether the probabilities of a token's experts are divided by their sum.
        auxiliary_loss: the model's own coefficient of the load-balancing loss.
    """

    count: int
    per_token: int
    ffn: int
    normalized: bool
    auxiliary_loss: float


@dataclass(frozen=True)
class ModelShape:
    """A Hugging Face config, translated: everything that the Megatron model is built from.

    `attention` has one entry for each layer. `post_norm`: norms follow the attention and the MLP, inside the residual
    branch, instead of preceding them. `ffn` is unused in a model with experts.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm_epsilon: float
    tied: bool
    attention: tuple[AttentionKind, ...]
    qk_norm: QKNorm = "none"
    qkv_bias: bool = False
    post_norm: bool = False
    experts: Experts | None = None
    initializer_range: float = 0.02

    @property
    def rotaries(self) -> tuple[RotarySettings, ...]:
        """The different rotary embeddings, in the order of their first layer."""
        return tuple(dict.fromkeys(kind.rotary for kind in self.attention))


@dataclass(frozen=True)
class Family:
    """A family of models. `translate` refuses (UserError) what its Megatron model cannot represent."""

    name: str
    architectures: tuple[str, ...]
    translate: Callable[[Mapping[str, Any]], ModelShape]
    rules: tuple[Rule, ...]
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.nn.functional.silu


Attention = Callable[[Mapping[str, Any], int, int], tuple[AttentionKind, ...]]
"""(config, layers, head_dim) -> how each layer attends."""


def full_attention(config: Mapping[str, Any], layers: int, head_dim: int) -> tuple[AttentionKind, ...]:
    """Every layer attends to all earlier tokens; a config that asks for a window is refused."""
    refuse_unless(config, "use_sliding_window", (False, None), "sliding-window attention is not supported")
    layer_types = config.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list | tuple) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise UserError("config.json: layer_types asks for other layers than full_attention, which are not supported")
    return (AttentionKind(RotarySettings.from_config(config, head_dim)),) * layers


def decoder_family(
    name: str,
    *architectures: str,
    qk_norm: QKNorm = "none",
    qkv_bias: bool = False,
    post_norm: bool = False,
    experts: bool = False,
    attention: Attention = full_attention,
    explicit: tuple[str, ...] = (),
) -> Family:
    """A family of decoders with grouped-query attention, RoPE, RMSNorm and SwiGLU, whose other projections have no
    bias.

    `explicit` are optional keys of config.json that this family requires, since `transformers` gives them other
    defaults than ours.
    """
    translate = partial(
        _translate,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        post_norm=post_norm,
        experts=experts,
        attention=attention,
        explicit=explicit,
    )
    rules = _rules(qk_norm=qk_norm, qkv_bias=qkv_bias, post_norm=post_norm, experts=experts)
    return Family(name, architectures, translate, rules)


def refuse_unless(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], why: str) -> None:
    """Raise UserError unless the key is absent or one of `allowed`; `why` says what is supported."""
    if config.get(key, allowed[0]) not in allowed:
        raise UserError(f"config.json: {key} is {shown(config[key])}; {why}")


def _translate(
    config: Mapping[str, Any],
    *,
    qk_norm: QKNorm,
    qkv_bias: bool,
    post_norm: bool,
    experts: bool,
    attention: Attention,
    explicit: tuple[str, ...],
) -> ModelShape:
    for key in explicit:
        required(config, key)
    refuse_unless(config, "quantization_config", (None,), "quantized weights cannot be trained; use a model without")
    refuse_unless(config, "hidden_act", ("silu",), "only silu (SwiGLU) is supported")
    refuse_unless(config, "attention_bias", (False, None), "projections with a bias are not supported")
    refuse_unless(config, "mlp_bias", (False, None), "projections with a bias are not supported")
    size = {key: whole_number(config, key, MOST[key]) for key in SIZES if key not in OPTIONAL}
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
        tied=flag(config, "tie_word_embeddings"),
        attention=attention(config, size["num_hidden_layers"], head_dim),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        post_norm=post_norm,
        experts=_experts(config) if experts else None,
        initializer_range=number(config, "initializer_range", 0.02, zero=True),
    )


def _experts(config: Mapping[str, Any]) -> Experts:
    refuse_unless(config, "mlp_only_layers", ([], None), "a model with dense and sparse layers is not supported")
    refuse_unless(config, "decoder_sparse_step", (1, None), "a model with dense and sparse layers is not supported")
    return Experts(
        count=whole_number(config, "num_experts", MOST["num_experts"]),
        per_token=whole_number(config, "num_experts_per_tok", MOST["num_experts_per_tok"]),
        ffn=whole_number(config, "moe_intermediate_size", MOST["moe_intermediate_size"]),
        normalized=flag(config, "norm_topk_prob"),
        auxiliary_loss=number(config, "router_aux_loss_coef", 0.001, zero=True),
    )


def _rules(*, qk_norm: QKNorm, qkv_bias: bool, post_norm: bool, experts: bool) -> tuple[Rule, ...]:
    """The tensors of such a decoder, in the order of the forward pass."""
    mega, hf = "decoder.layers.{layer}.", "model.layers.{layer}."

    def layer(megatron: tuple[str, ...], names: tuple[str, ...], operation: Any) -> Rule:
        return Rule(tuple(mega + m for m in megatron), tuple(hf + n for n in names), operation)

    def norm(name: str, *megatron: str) -> Rule:
        return layer(megatron, (f"{name}.weight",), Copy(("hidden",)))

    attention, mlp = "self_attention.", "mlp."
    projections = tuple(f"self_attn.{x}_proj" for x in "qkv")
    rules = [Rule(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), Vocabulary())]
    if not post_norm:
        rules.append(norm("input_layernorm", "input_layernorm.weight", attention + "linear_qkv.layer_norm_weight"))
    rules.append(layer((attention + "linear_qkv.weight",), tuple(f"{p}.weight" for p in projections), QKV()))
    if qkv_bias:
        rules.append(layer((attention + "linear_qkv.bias",), tuple(f"{p}.bias" for p in projections), QKV(bias=True)))
    if qk_norm != "none":
        kinds: dict[str, Any] = {"q": Copy(("head_dim",)), "k": Copy(("head_dim",))}
        if qk_norm == "projection":
            kinds = {"q": Split(("queries",)), "k": Split(("keys",))}
        rules += [
            layer((attention + f"{x}_layernorm.weight",), (f"self_attn.{x}_norm.weight",), operation)
            for x, operation in kinds.items()
        ]
    rules.append(layer((attention + "linear_proj.weight",), ("self_attn.o_proj.weight",), Row("queries")))
    if post_norm:
        rules.append(norm("post_attention_layernorm", attention + "linear_proj.post_norm.weight"))
    else:
        fused = mlp + "linear_fc1.layer_norm_weight"
        rules.append(norm("post_attention_layernorm", "pre_mlp_layernorm.weight", *(() if experts else (fused,))))
    if experts:
        local, grouped = mlp + "experts.local_experts.{expert}.", mlp + "experts."
        names = "mlp.experts.{expert}."
        rules += [
            layer((mlp + "router.weight",), ("mlp.gate.weight",), Copy(("experts", "hidden"))),
            layer(
                (local + "linear_fc1.weight", grouped + "linear_fc1.weight{expert}"),
                (names + "gate_proj.weight", names + "up_proj.weight"),
                GateUp("expert_ffn"),
            ),
            layer(
                (local + "linear_fc2.weight", grouped + "linear_fc2.weight{expert}"),
                (names + "down_proj.weight",),
                Row("expert_ffn"),
            ),
        ]
    else:
        rules += [
            layer((mlp + "linear_fc1.weight",), ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GateUp()),
            layer((mlp + "linear_fc2.weight",), ("mlp.down_proj.weight",), Row("ffn")),
        ]
    if post_norm:
        rules.append(norm("post_feedforward_layernorm", mlp + "linear_fc2.post_norm.weight"))
    return (
        *rules,
        Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), Copy(("hidden",))),
        Rule(("output_layer.weight",), ("lm_head.weight",), Vocabulary()),
    )
