"""Matrix products with accumulation-dtype results, whatever the dtype of the operands.

The accumulation dtype is float32 (float64 for float64 operands). Half-precision operands keep their dtype where the
device multiplies them with float32 sums: on CUDA (torch 2.8 or newer; older ones fail with a TypeError on `out_dtype`
instead of running in float32 silently), and bfloat16 on CPUs with AVX-512. Elsewhere they are widened first, which is
the same product up to the rounding of the logit gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

WIDENED_ELEMENTS = 1 << 20
"""Elements of a weight that are widened at a time: 4 MiB of float32, so that they are multiplied while they are in the
processor's cache."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which products of operands of `dtype` are summed: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def _is_half_on_cuda(x: Tensor) -> bool:
    """CUDA multiplies half-precision matrices into a float32 result (`out_dtype`)."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _has_onednn_bfloat16(x: Tensor) -> bool:
    """The CPU multiplies bfloat16 matrices in oneDNN, which sums in float32 and rounds the result."""
    return (
        x.dtype is torch.bfloat16
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def operand(x: Tensor) -> Tensor:
    """`x` in the dtype that the products below take on this device. Call it once per tensor, not once per product."""
    return x if _is_half_on_cuda(x) or _has_onednn_bfloat16(x) else x.to(accumulation_dtype(x.dtype))


def gradient_dtype(operand: Tensor) -> torch.dtype:
    """The dtype of gradients in their products with `operand`."""
    return operand.dtype if _is_half_on_cuda(operand) else accumulation_dtype(operand.dtype)


def product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [n, m] = a [n, k] @ b [m, k]^T for two operands, with `out` in the accumulation dtype."""
    if _is_half_on_cuda(b):
        torch.mm(a, b.t(), out_dtype=torch.float32, out=out)
    elif _has_onednn_bfloat16(b):
        rows = max(1, WIDENED_ELEMENTS // max(1, b.shape[1]))
        wide = torch.empty((min(rows, b.shape[0]), b.shape[1]), dtype=out.dtype)
        a = a.to(out.dtype)
        with _bfloat16_operands():
            for start in range(0, b.shape[0], rows):
                part = b[start : start + rows]
                torch.mm(a, wide[: len(part)].copy_(part).t(), out=out[:, start : start + rows])
    else:
        torch.mm(a, b.t(), out=out)


def rounded_product(out: Tensor, gradient: Tensor, b: Tensor) -> None:
    """out [n, m] = gradient [n, k] @ b [k, m], summed in the accumulation dtype and rounded to the dtype of `out`."""
    gradient = gradient.to(b.dtype)
    if out.dtype == b.dtype:
        torch.mm(gradient, b, out=out)
    else:
        out.copy_(torch.mm(gradient, b))


def add_product_(out: Tensor, gradient: Tensor, b: Tensor) -> None:
    """out [m, k] += gradient [n, m]^T @ b [n, k], with `out` in the accumulation dtype."""
    if _is_half_on_cuda(b):
        torch.addmm(out, gradient.t(), b, out_dtype=torch.float32, out=out)
    elif _has_onednn_bfloat16(b):
        with _bfloat16_operands():
            out.addmm_(gradient.t(), b.to(out.dtype))
    else:
        out.addmm_(gradient.t(), b)


def _bfloat16_operands() -> AbstractContextManager[None]:
    """Allow float32 products to round their operands to bfloat16: these are bfloat16 numbers already, or a gradient.

    Sums and results remain float32. PyTorch then calls oneDNN instead of MKL, which multiplies with AMX where the
    machine has it and in float32 with AVX-512 elsewhere (MKL does not on AMD).
    """
    return _cpu_precision("bf16")


def exact_products() -> AbstractContextManager[None]:
    """Float32 products on CPUs do not round their operands, whatever torch.set_float32_matmul_precision says."""
    return _cpu_precision("ieee")


@contextmanager
def _cpu_precision(precision: str) -> Iterator[None]:
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9; without it PyTorch calls MKL
    if settings is None:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before
