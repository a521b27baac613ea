"""The FP8 state of the process, and the numbers that FP8 makes of tensors."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_engine.common.recipe import Format, Recipe

BLOCK = 128


class FP8GlobalStateManager:
    FP8_ENABLED = False
    FP8_RECIPE: Recipe | None = None
    FP8_PARAMETERS = False
    HIGH_PRECISION_INIT_VAL = False

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.FP8_ENABLED

    @classmethod
    def get_fp8_recipe(cls) -> Recipe | None:
        return cls.FP8_RECIPE

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        return cls.FP8_PARAMETERS


@contextlib.contextmanager
def _state(**values: Any) -> Iterator[None]:
    before = {name: getattr(FP8GlobalStateManager, name) for name in values}
    for name, value in values.items():
        setattr(FP8GlobalStateManager, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(FP8GlobalStateManager, name, value)


def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Any:
    return _state(FP8_ENABLED=enabled, FP8_RECIPE=fp8_recipe if enabled else None)


def fp8_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
) -> Any:
    return _state(FP8_PARAMETERS=enabled, HIGH_PRECISION_INIT_VAL=preserve_high_precision_init_val)


def rounded(x: Tensor, recipe: Recipe, *, weight: bool = False, gradient: bool = False) -> Tensor:
    """`x` as its FP8 copy has it: scaled to the format's range over the whole tensor (current scaling), over blocks of
    1 x 128 of rows or 128 x 128 of weights (block scaling), or 1 x 32 by powers of two (MXFP8)."""
    dtype = torch.float8_e5m2 if gradient and recipe.fp8_format is Format.HYBRID else torch.float8_e4m3fn
    if recipe.mxfp8():
        return _in_blocks(x, dtype, 1, 32, power_of_two=True)
    if recipe.float8_block_scaling():
        return _in_blocks(x, dtype, BLOCK if weight else 1, BLOCK, power_of_two=False)
    if recipe.float8_current_scaling():
        return _scaled(x.float(), x.float().abs().amax(), dtype).to(x.dtype)
    raise NotImplementedError(f"no emulation of {type(recipe).__name__}")


def _scaled(x: Tensor, amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    scale = torch.finfo(dtype).max / torch.where(amax > 0, amax, torch.ones_like(amax))
    if power_of_two:
        scale = scale.log2().floor().exp2()
    return (x * scale).to(dtype).float() / scale


def _in_blocks(x: Tensor, dtype: torch.dtype, rows: int, columns: int, *, power_of_two: bool) -> Tensor:
    flat = x.flatten(0, -2).float()
    n, k = flat.shape
    padded = F.pad(flat, (0, -k % columns, 0, -n % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    return _scaled(blocks, amax, dtype, power_of_two).view(padded.shape)[:n, :k].reshape(x.shape).to(x.dtype)
