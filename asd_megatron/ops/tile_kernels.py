"""Which implementation does the element-wise work on a tile of logits: Triton's kernels or PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from asd_megatron.ops import divergence_tile, softmax_tile
from asd_megatron.ops.divergence_tile import Divergence, DivergenceTile
from asd_megatron.ops.softmax_tile import Softmax, Targets


class TileKernels(NamedTuple):
    """The five functions, specified in `softmax_tile.py` and `divergence_tile.py`."""

    softmax_statistics: Callable[[Tensor, Targets], Tensor]
    logit_gradient_: Callable[[Tensor, Targets, Softmax, Tensor, Tensor | None, torch.dtype], Tensor]
    complete_divergence_: Callable[[Tensor, Targets, Tensor, Divergence], tuple[DivergenceTile, Tensor]]
    divergence_sums_: Callable[[DivergenceTile], Tensor]
    divergence_gradient_: Callable[[DivergenceTile, Tensor, Targets, Tensor, Tensor | None, torch.dtype], Tensor]


TORCH = TileKernels(
    softmax_tile.softmax_statistics,
    softmax_tile.logit_gradient_,
    divergence_tile.complete_divergence_,
    divergence_tile.divergence_sums_,
    divergence_tile.divergence_gradient_,
)


def tile_kernels(tile: Tensor) -> TileKernels:
    """Triton's for float32 tiles on CUDA where triton is importable, otherwise PyTorch's."""
    kernels = triton_kernels() if uses_triton(tile) else None
    return kernels or TORCH


def uses_triton(tile: Tensor) -> bool:
    return tile.is_cuda and tile.dtype is torch.float32


@cache
def triton_kernels() -> TileKernels | None:
    """None where triton is not importable."""
    try:
        from asd_megatron.ops import triton_tile
    except ImportError:
        return None
    return TileKernels(
        triton_tile.softmax_statistics,
        triton_tile.logit_gradient_,
        triton_tile.complete_divergence_,
        triton_tile.divergence_sums_,
        triton_tile.divergence_gradient_,
    )
