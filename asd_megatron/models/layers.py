"""The layer specs of a model: Megatron's layers with the parts that the family and the layer implementation ask for."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import torch

from asd_megatron.models import te
from asd_megatron.models.attention import SDPACoreAttention
from asd_megatron.models.compat import submodules_of
from asd_megatron.models.experts import local_experts_class
from asd_megatron.models.family import AttentionKind, ModelShape
from asd_megatron.models.flex import FlexCoreAttention
from asd_megatron.models.norm import ProjectionNorm, RMSNorm, with_post_norm
from asd_megatron.models.routing import router_class

CoreAttention = Literal["own", "flex"]
"""Which core attention layers have: their implementation's own, or FlexAttention (`models.flex`)."""


def softmax_scale(shape: ModelShape, kind: AttentionKind) -> float:
    """The factor of a layer's attention scores: 1 / sqrt(head_dim), and YaRN's factor, by which its definition
    multiplies query and key both."""
    return float(shape.head_dim**-0.5 * kind.rotary.attention_factor**2)


class _Parts(NamedTuple):
    """What an implementation's layers are made of."""

    column: type
    column_after_norm: type  # with the norm before it fused in, where the implementation does that
    row: type
    norm: type
    fuses_norm: bool


def layer_specs(shape: ModelShape, layers: str, tensor: int, attention: CoreAttention = "own") -> list[Any]:
    """The spec of every layer of the complete model. tensor: the tensor-parallel size."""
    specs = {kind: _layer_spec(shape, kind, layers, tensor, attention) for kind in dict.fromkeys(shape.attention)}
    return [specs[kind] for kind in shape.attention]


def norm_class(layers: str) -> Any:
    """The class of the final norm."""
    return RMSNorm if layers == "local" else te.norm()


def _parts(layers: str) -> _Parts:
    if layers == "local":
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        return _Parts(ColumnParallelLinear, ColumnParallelLinear, RowParallelLinear, RMSNorm, False)
    return _Parts(*te.linear_layers(), fuses_norm=True)


def _layer_spec(shape: ModelShape, kind: AttentionKind, layers: str, tensor: int, core: CoreAttention) -> Any:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    parts = _parts(layers)
    before = IdentityOp if shape.post_norm or parts.fuses_norm else parts.norm
    row = with_post_norm(parts.row, parts.norm) if shape.post_norm else parts.row
    column = parts.column if shape.post_norm else parts.column_after_norm
    query_norm, key_norm = _head_norms(shape, parts, tensor)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=_core_attention(shape, kind, layers, core),
            linear_proj=row,
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )
    return ModuleSpec(
        module=_decoder_layer_class(),
        params={"rotary": shape.rotaries.index(kind.rotary)},
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm if shape.experts is not None else before,
            mlp=_experts(shape, layers) if shape.experts is not None else _mlp(column, row),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_stored_norms(shape) if parts.norm is RMSNorm else {},
        ),
    )


def _stored_norms(shape: ModelShape) -> dict[str, str]:
    """Under which keys checkpoints store the norms of local layers: Transformer Engine's, which are part of the linear
    layer that follows."""
    if shape.post_norm:
        return {}
    dense = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"} if shape.experts is None else {}
    return {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", **dense}


def _head_norms(shape: ModelShape, parts: _Parts, tensor: int) -> tuple[Any, Any]:
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec

    if shape.qk_norm == "none":
        return IdentityOp, IdentityOp
    if shape.qk_norm == "head":
        return parts.norm, parts.norm
    heads = (shape.heads // tensor, shape.kv_heads // tensor)
    query, key = (ModuleSpec(module=ProjectionNorm, params={"heads": n}) for n in heads)
    return query, key


def _core_attention(shape: ModelShape, kind: AttentionKind, layers: str, core: CoreAttention) -> Any:
    from megatron.core.transformer.spec_utils import ModuleSpec

    scale = softmax_scale(shape, kind)
    if core == "flex":
        return ModuleSpec(module=FlexCoreAttention, params={"scale": scale, "window": kind.window})
    if layers == "local":
        return ModuleSpec(module=SDPACoreAttention, params={"scale": scale, "window": kind.window})
    return te.attention(None if scale == shape.head_dim**-0.5 else scale)


def _mlp(column: type, row: type) -> Any:
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))


def _experts(shape: ModelShape, layers: str) -> Any:
    """Megatron's mixture of experts: with grouped products of Transformer Engine, or one expert after another."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    assert shape.experts is not None
    spec = get_moe_module_spec(use_te=layers == "te", num_experts=shape.experts.count, moe_grouped_gemm=layers == "te")
    submodules = submodules_of(spec)
    submodules.router = router_class()
    if layers == "local":
        parts = _parts(layers)
        submodules.experts = ModuleSpec(
            module=local_experts_class(), submodules=MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)
        )
    return spec


@cache
def _decoder_layer_class() -> type:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    class DecoderLayer(TransformerLayer):  # type: ignore[misc]
        """Megatron's layer, which picks its rotation angles where a model has several kinds, and hands its router what
        belongs to the micro-batch. Both come with the arguments, so that recomputing a micro-batch's layer in the
        backward pass finds them again."""

        def __init__(self, *args: Any, rotary: int, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.rotary = rotary

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            angles: torch.Tensor | None = kwargs.get("rotary_pos_emb")
            if angles is not None and angles.dim() == 5:  # [kinds, s, b, 1, head_dim]
                kwargs["rotary_pos_emb"] = angles[self.rotary]
            if not self.is_moe_layer:
                return super().forward(*args, **kwargs)
            self.mlp.router.micro_batch = getattr(kwargs.get("packed_seq_params"), "routing", None)
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.mlp.router.micro_batch = None  # frees the micro-batch's tensors

    return DecoderLayer
