"""Accumulation of a weight's gradient: in Megatron's `main_grad` buffer when there is one, otherwise through autograd.

Megatron's DistributedDataParallel gives every parameter a `main_grad` buffer and a hook on its gradient accumulator
that does

    if param.grad is not None and (not param.grad_added_to_main_grad or zero_out_wgrad): main_grad += param.grad
    param.grad = None

An op that adds to `main_grad` itself therefore sets `grad_added_to_main_grad` and returns a dummy gradient: the hook
must fire, and under `overlap_grad_reduce` it asserts that there is a gradient. When the weight is the embedding's too
(tied), Megatron sets `zero_out_wgrad`, autograd adds the embedding's real gradient to the dummy, and the hook adds
the sum: the dummy must be zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


class WeightGradient:
    """Accumulates the gradient of `weight` [rows, H] from one backward pass in `buffer` (accumulation dtype, same
    shape).

    `buffer` is `weight.main_grad` itself when that has the accumulation dtype: what is added is then final, and
    backward cannot scale it any more.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.main_grad: Tensor | None = getattr(weight, "main_grad", None)
        if self.main_grad is not None and self.main_grad.dtype == dtype:
            self.buffer = self.main_grad
        else:
            self.buffer = torch.zeros(weight.shape, dtype=dtype, device=weight.device)

    @property
    def in_main_grad(self) -> bool:
        return self.main_grad is not None

    def flush(self) -> None:
        """Add the buffer to `main_grad` unless it is that already. Call once."""
        if self.main_grad is not None and self.buffer is not self.main_grad:
            self.main_grad.add_(self.buffer)
        if self.main_grad is not None:
            del self.buffer

    def result(self) -> Tensor | None:
        """What backward returns for the weight: the gradient, a dummy, or None (see the module's docstring)."""
        if self.main_grad is None:
            return self.buffer.to(self.weight.dtype)
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        # An attribute of Megatron's parameters that torch's stubs do not know.
        self.weight.grad_added_to_main_grad = True
        if getattr(self.weight, "zero_out_wgrad", False):
            return torch.zeros_like(self.weight)
        return torch.empty_like(self.weight)
