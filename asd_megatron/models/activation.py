"""SiLU whose values do not depend on where in a tensor they are, for deterministic runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def deterministic(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The activation function of a deterministic run: on a CPU `same_silu` in place of PyTorch's."""
    if activation is torch.nn.functional.silu and not torch.cuda.is_available():
        return same_silu
    return activation


def same_silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x). PyTorch's kernel computes the last elements of a tensor, those that fill no vector register, by
    another exponential function: a token's numbers would depend on its place in the batch."""
    return _SameSilu.apply(x)


class _SameSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return (wide / wide.neg().exp_().add_(1)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, x)
