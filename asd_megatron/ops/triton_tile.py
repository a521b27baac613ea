"""Softmax statistics, logit gradients, divergence sums and divergence gradients of a tile [n, v], as Triton kernels.

The functions are those of `softmax_tile.py` and `divergence_tile.py`, for float32 tiles; `tile_kernels.py` chooses. One
program processes one row, in blocks of columns:

    program 0    row 0  [BLOCK][BLOCK][part]
    program 1    row 1  [BLOCK][BLOCK][part]

Every kernel reads its tiles once. The gradient kernels write once, in the dtype that the products take; they compute
probabilities again from the logits, which is cheaper than to write them in one kernel and read them in the next.

A probability of 0 contributes 0, whatever it is multiplied by (the logarithm of another probability of 0). A logit of
NaN makes its row's sums NaN. Importing this module imports triton.
"""

# Triton compiles the kernels' annotations too, and knows only its own types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from asd_megatron.ops import divergence_tile, softmax_tile
from asd_megatron.ops.divergence_tile import SUMS, Divergence, DivergenceTile
from asd_megatron.ops.softmax_tile import Softmax, Targets, merged

BLOCK = 2048
"""Columns of a block: 8 for each of the 256 threads, so that the sums of a row stay in registers."""
WARPS = 8
LOG2_E = tl.constexpr(math.log2(math.e))
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def softmax_statistics(tile: Tensor, target: Targets) -> Tensor:
    """As `softmax_tile.softmax_statistics`."""
    n, v = tile.shape
    if not tile.numel():
        return softmax_tile.softmax_statistics(tile, target)
    out = torch.empty(4, n, dtype=tile.dtype, device=tile.device)
    _launch(_softmax_statistics, tile, tile, tile.stride(0), v, *_dense(*target), out)
    return out


def logit_gradient_(
    tile: Tensor, target: Targets, softmax: Softmax, g_logprob: Tensor, g_entropy: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As `softmax_tile.logit_gradient_`; overwrites `tile` only if that has `dtype`."""
    out = _gradient_memory(tile, dtype)
    if out.numel():
        maximum, top_logprob, _, entropy = _dense(*softmax)
        _launch(
            _logit_gradient, tile, tile, tile.stride(0), out, out.stride(0), tile.shape[1], *_dense(*target),
            maximum, top_logprob, entropy, *_dense(g_logprob, g_entropy),
        )  # fmt: skip
    return out


def complete_divergence_(
    logits: Tensor, target: Targets, coefficient: Tensor, divergence: Divergence
) -> tuple[DivergenceTile, Tensor]:
    """As `divergence_tile.complete_divergence_`, but leaves the logits as they are."""
    p, q = (merged(softmax_statistics(part, target)[None]) for part in logits)
    tile = DivergenceTile(logits, p, q, coefficient, divergence)
    return tile, divergence_sums_(tile)


def divergence_sums_(tile: DivergenceTile) -> Tensor:
    """As `divergence_tile.divergence_sums_`, but leaves the logits as they are."""
    (student, teacher), p, q, _, divergence = tile
    n, v = student.shape
    if not student.numel():
        return divergence_tile.divergence_sums_(tile)
    out = torch.empty(SUMS, n, dtype=student.dtype, device=student.device)
    _launch(
        _divergence_sums, student, student, student.stride(0), teacher, teacher.stride(0), v,
        *_dense(p.maximum, p.top_logprob, q.maximum, q.top_logprob), out, divergence.mixture, KIND=divergence.kind,
    )  # fmt: skip
    return out


def divergence_gradient_(
    tile: DivergenceTile,
    mean: Tensor,
    target: Targets,
    g_logprob: Tensor,
    g_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `divergence_tile.divergence_gradient_`; overwrites the student's logits only if they have `dtype`."""
    (student, teacher), p, q, coefficient, divergence = tile
    out = _gradient_memory(student, dtype)
    if out.numel():
        _launch(
            _divergence_gradient, student, student, student.stride(0), teacher, teacher.stride(0), out, out.stride(0),
            student.shape[1], *_dense(*target, p.maximum, p.top_logprob, p.entropy, q.maximum, q.top_logprob),
            *_dense(coefficient, mean, g_logprob, g_entropy), divergence.mixture, KIND=divergence.kind,
        )  # fmt: skip
    return out


def _launch(kernel: Any, tile: Tensor, *arguments: Any, **constants: Any) -> None:
    """One program for each row of `tile`, on its device."""
    with torch.cuda.device_of(tile):
        kernel[(tile.shape[0],)](*arguments, **constants, BLOCK=BLOCK, num_warps=WARPS)


def _dense(*columns: Tensor | None) -> list[Tensor | None]:
    """Per-row arguments [n] with stride 1; autograd's gradients may have stride 0."""
    return [None if column is None else column.contiguous() for column in columns]


def _gradient_memory(tile: Tensor, dtype: torch.dtype) -> Tensor:
    return tile if tile.dtype == dtype else torch.empty_like(tile, dtype=dtype)


@triton.jit
def _weighted(p, x):
    """p x, but 0 where p is 0 and x infinite."""
    return tl.where(p == 0.0, 0.0, p * x)


@triton.jit
def _log_mixture(p, q, mixture):
    m = p + mixture * (q - p)
    return tl.log(tl.where(m < TINY, TINY, m))  # unlike tl.maximum, this keeps NaN


@triton.jit
def _softmax_statistics(tile, stride, columns, local, owned, out, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # a tile may have more than 2^31 elements
    tile += row * stride
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)  # of every BLOCK-th column; added up at the end
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(tile + column, mask=column < columns, other=float("-inf"))
        before = maximum
        maximum = tl.maximum(before, tl.max(z, 0))
        # The sums so far refer to the maximum before. e^(before - maximum) is 0 as long as all logits were -inf.
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        scale = tl.exp2((before - shift) * LOG2_E)
        moved = tl.where(scale == 0.0, 0.0, before - shift)
        below = z - shift
        weight = tl.exp2(below * LOG2_E)
        moment = scale * (moment + total * moved) + _weighted(weight, below)
        total = scale * total + weight
    rows = tl.num_programs(0).to(tl.int64)
    target = tl.load(tile + tl.load(local + row), mask=tl.load(owned + row), other=float("-inf"))
    tl.store(out + row, maximum)
    tl.store(out + rows + row, tl.sum(total, 0))
    tl.store(out + 2 * rows + row, tl.sum(moment, 0))
    tl.store(out + 3 * rows + row, target)


@triton.jit
def _logit_gradient(
    tile, stride, out, out_stride, columns, local, owned,
    maximum, top_logprob, entropy, g_logprob, g_entropy, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile += row * stride
    out += row * out_stride
    top, top_logp, g = tl.load(maximum + row), tl.load(top_logprob + row), tl.load(g_logprob + row)
    target = tl.where(tl.load(owned + row), tl.load(local + row), -1)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logp = tl.load(tile + column, mask=column < columns, other=0.0) - top + top_logp
        p = tl.exp2(logp * LOG2_E)
        gradient = -g * p
        if g_entropy is not None:
            gradient -= _weighted(p, tl.load(g_entropy + row) * (logp + tl.load(entropy + row)))
        gradient = tl.where(column == target, gradient + g, gradient)
        tl.store(out + column, gradient.to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def _divergence_sums(
    student, stride, teacher, teacher_stride, columns,
    p_maximum, p_top_logprob, q_maximum, q_top_logprob, out, mixture,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * teacher_stride
    p_top, p_top_logp = tl.load(p_maximum + row), tl.load(p_top_logprob + row)
    q_top, q_top_logp = tl.load(q_maximum + row), tl.load(q_top_logprob + row)
    reverse = tl.zeros((BLOCK,), tl.float32)
    forward = tl.zeros((BLOCK,), tl.float32)
    student_part = tl.zeros((BLOCK,), tl.float32)
    teacher_part = tl.zeros((BLOCK,), tl.float32)
    together = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(student + column, mask=column < columns, other=float("-inf"))
        teacher_z = tl.load(teacher + column, mask=column < columns, other=float("-inf"))
        together = tl.where((z == p_top) & (teacher_z == q_top) & (column < columns), 1.0, together)
        logp = z - p_top + p_top_logp
        logq = teacher_z - q_top + q_top_logp
        p, q = tl.exp2(logp * LOG2_E), tl.exp2(logq * LOG2_E)
        reverse += _weighted(p, logp - logq)
        forward += _weighted(q, logq - logp)
        if KIND == "jensen_shannon":
            logm = _log_mixture(p, q, mixture)
            student_part += _weighted(p, logp - logm)
            teacher_part += _weighted(q, logq - logm)
    rows = tl.num_programs(0).to(tl.int64)
    tl.store(out + row, tl.sum(reverse, 0))
    tl.store(out + rows + row, tl.sum(forward, 0))
    tl.store(out + 2 * rows + row, tl.sum(student_part, 0))
    tl.store(out + 3 * rows + row, tl.sum(teacher_part, 0))
    tl.store(out + 4 * rows + row, tl.max(together, 0))


@triton.jit
def _divergence_gradient(
    student, stride, teacher, teacher_stride, out, out_stride, columns,
    local, owned, p_maximum, p_top_logprob, entropy, q_maximum, q_top_logprob,
    coefficient, mean, g_logprob, g_entropy, mixture,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * teacher_stride
    out += row * out_stride
    p_top, p_top_logp = tl.load(p_maximum + row), tl.load(p_top_logprob + row)
    q_top, q_top_logp = tl.load(q_maximum + row), tl.load(q_top_logprob + row)
    scale, g = tl.load(coefficient + row), tl.load(g_logprob + row)
    constant = scale * tl.load(mean + row) + g
    target = tl.where(tl.load(owned + row), tl.load(local + row), -1)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logp = tl.load(student + column, mask=column < columns, other=0.0) - p_top + p_top_logp
        logq = tl.load(teacher + column, mask=column < columns, other=0.0) - q_top + q_top_logp
        p, q = tl.exp2(logp * LOG2_E), tl.exp2(logq * LOG2_E)
        if KIND == "forward_kl":
            gradient = scale * (p - q) - constant * p
        elif KIND == "reverse_kl":
            gradient = _weighted(p, scale * (logp - logq) - constant)
        else:
            gradient = _weighted(p, scale * (1.0 - mixture) * (logp - _log_mixture(p, q, mixture)) - constant)
        if g_entropy is not None:
            gradient -= _weighted(p, tl.load(g_entropy + row) * (logp + tl.load(entropy + row)))
        gradient = tl.where(column == target, gradient + g, gradient)
        tl.store(out + column, gradient.to(out.dtype.element_ty), mask=column < columns)
