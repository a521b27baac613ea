"""Where a weight's gradient goes: Megatron's `main_grad` buffer when there is one, autograd otherwise.

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
    """Accumulates one backward's gradient of `weight` [rows, H] in `buffer` (accumulation dtype, same shape).

    `buffer` is `weight.main_grad` itself when its dtype allows; adding to it is then final, whatever backward does
    later.
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
        """Bring what was accumulated into `main_grad`, if the buffer is not that already. Call once."""
        if self.main_grad is not None and self.buffer is not self.main_grad:
            self.main_grad.add_(self.buffer)
        if self.main_grad is not None:
            del self.buffer

    def result(self) -> Tensor | None:
        """What backward returns for the weight."""
        if self.main_grad is None:
            return self.buffer.to(self.weight.dtype)
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        # An attribute of Megatron's parameters that torch's stubs do not know.
        self.weight.grad_added_to_main_grad = True
        if getattr(self.weight, "zero_out_wgrad", False):
            return torch.zeros_like(self.weight)
        return torch.empty_like(self.weight)
