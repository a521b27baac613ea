"""Matrix products with accumulation-dtype results, whatever the dtype of the operands.

The accumulation dtype is float32 (float64 for float64 operands). On CUDA, half-precision operands stay what they are
and the product comes out in float32 (`out_dtype`); elsewhere they are widened first, which is the same product up to
the rounding of the logit gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _has_out_dtype(x: Tensor) -> bool:
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and x.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads()


def operand(x: Tensor) -> Tensor:
    """`x` in the dtype that the products below take on this device: once per tensor, not once per product."""
    return x if _has_out_dtype(x) else x.to(accumulation_dtype(x.dtype))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] @ b [k, m] in the accumulation dtype. `b` is an operand, `a` may have the accumulation dtype."""
    a = a.to(b.dtype)
    return torch.mm(a, b, out_dtype=torch.float32) if _has_out_dtype(b) else torch.mm(a, b)


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, with `out` in the accumulation dtype and the rest as in `product`."""
    a = a.to(b.dtype)
    if _has_out_dtype(b):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a, b)
