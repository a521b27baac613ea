"""The declaration of a model family, and the parts that decoder-only families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from asd_megatron.models.hf_config import DAMAGED, MOST_POSITIONS, Fields
from asd_megatron.models.hf_fields import refuse_changes, warn_of_unknown
from asd_megatron.models.layer_attention import Attention, AttentionKind, full_attention
from asd_megatron.models.rope import RotarySettings
from asd_megatron.models.weights import QKV, Copy, GateUp, Row, Rule, Split, Vocabulary

__all__ = ["AttentionKind", "Experts", "Family", "ModelShape", "QKNorm", "decoder_family"]

# The largest sizes that are believed. Beyond them a file is damaged, and building such a model would take all memory.
MOST = {
    "num_hidden_layers": 1 << 12,
    "hidden_size": 1 << 18,
    "num_attention_heads": 1 << 12,
    "intermediate_size": 1 << 21,
    "vocab_size": 1 << 24,
    "max_position_embeddings": MOST_POSITIONS,
}
MOST_HEADS, MOST_HEAD_DIM, MOST_EXPERTS, MOST_EXPERT_FFN = 1 << 12, 1 << 12, 1 << 12, 1 << 21

QKNorm = Literal["none", "head", "projection"]
"""RMSNorm of queries and keys: none; of each head, with one weight for all heads; of the complete projection."""


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


def decoder_family(
    name: str,
    *architectures: str,
    qk_norm: QKNorm = "none",
    qkv_bias: bool = False,
    post_norm: bool = False,
    experts: bool = False,
    attention: Attention = full_attention,
    explicit: tuple[str, ...] = (),
    norm_epsilon: float = 1e-6,
) -> Family:
    """A family of decoders with grouped-query attention, RoPE, RMSNorm and SwiGLU, whose other projections have no
    bias.

    `name` is the family's `model_type`. `explicit` are optional keys of config.json that this family requires, since
    `transformers` gives them other defaults than ours. `norm_epsilon` is its default of `rms_norm_eps`.
    """
    translate = partial(
        _translate,
        name=name,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        post_norm=post_norm,
        experts=experts,
        attention=attention,
        explicit=explicit,
        norm_epsilon=norm_epsilon,
    )
    rules = _rules(qk_norm=qk_norm, qkv_bias=qkv_bias, post_norm=post_norm, experts=experts)
    return Family(name, architectures, translate, rules)


def _translate(
    config: Mapping[str, Any],
    *,
    name: str,
    qk_norm: QKNorm,
    qkv_bias: bool,
    post_norm: bool,
    experts: bool,
    attention: Attention,
    explicit: tuple[str, ...],
    norm_epsilon: float,
) -> ModelShape:
    fields = Fields(config)
    if fields.get("model_type", name) != name:  # transformers builds the model that this names, not `architectures`
        fields.unsupported("model_type", f"architectures names a model of type {name}: correct one of them")
    for key in explicit:
        fields.required(key)
    size = {key: fields.whole_number(key, most) for key, most in MOST.items()}
    layers, hidden, heads = (size[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    kv_heads = fields.whole_number("num_key_value_heads", MOST_HEADS, default=heads)
    if fields.good("num_attention_heads", "num_key_value_heads") and heads % kv_heads:
        fields.problem(
            f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}{DAMAGED}"
        )
    head_dim = _head_dim(fields, hidden, heads)
    epsilon = fields.number("rms_norm_eps", norm_epsilon, zero=True)
    tied, initializer = fields.flag("tie_word_embeddings"), fields.number("initializer_range", 0.02, zero=True)
    kinds = attention(fields, layers, head_dim)
    mixture = _experts(fields) if experts else None
    unknown = refuse_changes(fields)
    fields.finish()
    warn_of_unknown(unknown)
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=size["intermediate_size"],
        vocab=size["vocab_size"],
        max_positions=size["max_position_embeddings"],
        norm_epsilon=epsilon,
        tied=tied,
        attention=kinds,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        post_norm=post_norm,
        experts=mixture,
        initializer_range=initializer,
    )


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    """`head_dim`, or hidden / heads without it; 2 where one of the three was refused."""
    if fields.get("head_dim") is not None:
        head_dim = fields.whole_number("head_dim", MOST_HEAD_DIM)
        return head_dim if fields.good("head_dim") else 2
    if not fields.good("hidden_size", "num_attention_heads", "head_dim"):
        return 2
    if hidden % heads:
        fields.problem(
            f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads} and there is no"
            f" head_dim{DAMAGED}"
        )
        return 2
    return hidden // heads


def _experts(fields: Fields) -> Experts:
    name, other = "num_experts", "num_local_experts"  # transformers 4 writes the first, 5 the second
    given = [key for key in (name, other) if fields.get(key) is not None]
    count = fields.whole_number(given[0] if given else name, MOST_EXPERTS)
    if len(given) == 2 and fields.get(other) != count and fields.good(name):
        fields.unsupported(other, f"but {name} is {count}, and both say how many experts a layer has")
    per_token = fields.whole_number("num_experts_per_tok", MOST_EXPERTS)
    if per_token > count and fields.good(name, other, "num_experts_per_tok"):
        fields.unsupported("num_experts_per_tok", f"there are {count} experts{DAMAGED}")
    for key, all_layers in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        if fields.get(key, all_layers) != all_layers:
            fields.unsupported(key, "a model with dense and sparse layers is not supported")
    return Experts(
        count=count,
        per_token=per_token,
        ffn=fields.whole_number("moe_intermediate_size", MOST_EXPERT_FFN),
        normalized=fields.flag("norm_topk_prob"),
        auxiliary_loss=fields.number("router_aux_loss_coef", 0.001, zero=True),
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
