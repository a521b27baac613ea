"""Matrix products with accumulation-dtype results, whatever the dtype of the operands.

The accumulation dtype is float32 (float64 for float64 operands). Half-precision operands stay what they are where the
device multiplies them with float32 sums: on CUDA, and bfloat16 on CPUs with AVX-512. Elsewhere they are widened first,
which is the same product up to the rounding of the logit gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WIDENED = 1 << 20
"""Elements of a weight that are widened at a time: 4 MiB, so that they are multiplied while in a cache."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _has_out_dtype(x: Tensor) -> bool:
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and x.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads()


def _has_onednn_bfloat16(x: Tensor) -> bool:
    """The CPU multiplies bfloat16 matrices in oneDNN, which sums in float32 and rounds the result."""
    return (
        x.dtype is torch.bfloat16
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def operand(x: Tensor) -> Tensor:
    """`x` in the dtype that the products below take on this device: once per tensor, not once per product."""
    return x if _has_out_dtype(x) or _has_onednn_bfloat16(x) else x.to(accumulation_dtype(x.dtype))


def gradient_operand(gradient: Tensor, operand: Tensor) -> Tensor:
    """A gradient in the accumulation dtype as its products with operands like `operand` want it."""
    return gradient.to(operand.dtype) if _has_out_dtype(operand) else gradient


def product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [n, m] = a [n, k] @ b [m, k]^T for two operands, with `out` in the accumulation dtype."""
    if _has_out_dtype(b):
        torch.mm(a, b.t(), out_dtype=torch.float32, out=out)
    elif _has_onednn_bfloat16(b):
        rows = max(1, WIDENED // max(1, b.shape[1]))
        wide = torch.empty((min(rows, b.shape[0]), b.shape[1]), dtype=out.dtype)
        a = a.to(out.dtype)
        with _bfloat16_numbers():
            for start in range(0, b.shape[0], rows):
                part = b[start : start + rows]
                torch.mm(a, wide[: len(part)].copy_(part).t(), out=out[:, start : start + rows])
    else:
        torch.mm(a, b.t(), out=out)


def rounded_product(out: Tensor, gradient: Tensor, b: Tensor) -> None:
    """out [n, m] = gradient [n, k] @ b [k, m], summed in the accumulation dtype, with `out` in a dtype of its own."""
    gradient = gradient.to(b.dtype)
    if out.dtype == b.dtype:
        torch.mm(gradient, b, out=out)
    else:
        out.copy_(torch.mm(gradient, b))


def add_product_(out: Tensor, gradient: Tensor, b: Tensor) -> None:
    """out [m, k] += gradient [n, m]^T @ b [n, k], with `out` in the accumulation dtype."""
    if _has_out_dtype(b):
        torch.addmm(out, gradient.t(), b, out_dtype=torch.float32, out=out)
    elif _has_onednn_bfloat16(b):
        with _bfloat16_numbers():
            out.addmm_(gradient.t(), b.to(out.dtype))
    else:
        out.addmm_(gradient.t(), b)


@contextmanager
def _bfloat16_numbers() -> Iterator[None]:
    """Float32 products inside may round their operands to bfloat16: these are such numbers already, or a gradient.

    Sums and results remain float32. It lets oneDNN have the product instead of MKL: it multiplies with AMX where the
    machine has that, and in float32 with AVX-512 elsewhere (on AMD, MKL does not).
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9; without it MKL has the product
    if settings is None:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
