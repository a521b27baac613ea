import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

_attention_backends: dict[str, Any] = {
    "attention_params": None,
    "use_flash_attention": None,
    "flash_attention_backend": None,
    "use_fused_attention": None,
    "fused_attention_backend": None,
    "use_unfused_attention": None,
    "backend_selection_requires_update": False,
}


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0 and softmax_type == "vanilla" and not return_max_logit
        self.heads, self.groups = num_attention_heads // tp_size, (num_gqa_groups or num_attention_heads) // tp_size
        assert isinstance(kv_channels, int)
        self.scale = 1.0 / math.sqrt(kv_channels) if softmax_scale is None else softmax_scale
        self.window, self.cp_group = window_size, cp_group

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        num_splits: int | None = 1,
    ) -> Tensor:
        assert qkv_format == "thd" and query_layer.dim() == key_layer.dim() == value_layer.dim() == 3
        assert attn_mask_type == "padding_causal"
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert query_layer.shape[-2] == self.heads and key_layer.shape[-2] == self.groups
        longest = int((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max())
        assert max_seqlen_q is not None and max_seqlen_q == max_seqlen_kv and max_seqlen_q >= longest
        if pad_between_seqs is None:  # from 2.18 on by identity: another tensor, if equal, loses flash attention
            pad_between_seqs = not (cu_seqlens_q_padded is cu_seqlens_q and cu_seqlens_kv_padded is cu_seqlens_kv)
        assert not pad_between_seqs
        _attention_backends.update(use_flash_attention=False, use_fused_attention=True, fused_attention_backend=1)
        _attention_backends.update(use_unfused_attention=False)
        cu = cu_seqlens_q.tolist()
        if self.cp_group is None or dist.get_world_size(self.cp_group) == 1:
            return self._attend(query_layer, key_layer, value_layer, cu).flatten(1)
        order = _zigzag_order(cu, dist.get_world_size(self.cp_group))
        complete = [_gathered(x, self.cp_group)[order.argsort()] for x in (query_layer, key_layer, value_layer)]
        out = self._attend(*complete, cu)[order]
        mine = len(query_layer) * dist.get_rank(self.cp_group)
        return out[mine : mine + len(query_layer)].flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, cu: list[int]) -> Tensor:
        out = []
        for a, b in zip(cu, cu[1:], strict=False):
            q, k, v = (x[a:b].transpose(0, 1)[None] for x in (query, key, value))
            places = torch.arange(b - a)
            distance = places[:, None] - places[None]
            mask = distance >= 0
            if self.window is not None and self.window[0] >= 0:
                mask &= distance <= self.window[0]
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True)
            out.append(o[0].transpose(0, 1))
        return torch.cat(out)


def _zigzag_order(cu: list[int], ranks: int) -> Tensor:
    """Places of the complete pack in the order in which the ranks hold them: of every sequence chunks r and
    2 ranks - 1 - r."""
    places = []
    for rank in range(ranks):
        for a, b in zip(cu, cu[1:], strict=False):
            chunks = torch.arange(a, b).chunk(2 * ranks)
            places += [chunks[rank], chunks[2 * ranks - 1 - rank]]
    return torch.cat(places)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def _gathered(x: Tensor, group: Any) -> Tensor:
    out: Tensor = _Gathered.apply(x, group)
    return out
