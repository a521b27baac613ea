from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch.attention.dot_product_attention import DotProductAttention
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

__all__ = ["DotProductAttention", "_SplitAlongDim", "apply_rotary_pos_emb"]


class _SplitAlongDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return torch.split(x, sizes, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return torch.cat(gradients, ctx.dim), None, None
