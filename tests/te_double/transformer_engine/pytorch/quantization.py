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
    return _state(FP8_PARAMETERS=enabled, FP8_RECIPE=recipe, HIGH_PRECISION_INIT_VAL=preserve_high_precision_init_val)


def rounded(x: Tensor, recipe: Recipe, *, weight: bool = False, gradient: bool = False) -> Tensor:
    """`x` as its FP8 copy has it."""
    dtype = _format(recipe, gradient)
    scale = scales(x, recipe, weight=weight, gradient=gradient)
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


def scales(x: Tensor, recipe: Recipe, *, weight: bool = False, gradient: bool = False) -> Tensor:
    """What every value of `x` is multiplied with: so that the largest value in its block is the format's largest."""
    return scales_of(maxima(x, recipe, weight=weight), x.shape, recipe, weight=weight, gradient=gradient)


def maxima(x: Tensor, recipe: Recipe, *, weight: bool = False) -> Tensor:
    """The largest magnitude in every block [row blocks, column blocks]: of 1 x 128 or, of weights, 128 x 128 (block
    scaling), 1 x 32 (MXFP8), the complete tensor (current scaling)."""
    flat = x.flatten(0, -2).float().abs()
    rows, columns = _block(flat.shape, recipe, weight)
    padded = F.pad(flat, (0, -flat.shape[1] % columns, 0, -flat.shape[0] % rows))
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).amax((1, 3))


def scales_of(
    found: Tensor, shape: torch.Size, recipe: Recipe, *, weight: bool = False, gradient: bool = False
) -> Tensor:
    """The scales [shape] of the blocks whose `maxima` are `found`; powers of two for MXFP8."""
    flat = torch.Size((shape[:-1].numel(), shape[-1]))
    rows, columns = _block(flat, recipe, weight)
    largest = torch.finfo(_format(recipe, gradient)).max
    scale = largest / torch.where(found > 0, found, torch.ones_like(found))
    if recipe.mxfp8():
        scale = scale.log2().floor().exp2()
    expanded = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return expanded[: flat[0], : flat[1]].reshape(shape)


def _block(shape: torch.Size, recipe: Recipe, weight: bool) -> tuple[int, int]:
    if recipe.mxfp8():
        return 1, 32
    if recipe.float8_block_scaling():
        return BLOCK if weight else 1, BLOCK
    assert recipe.float8_current_scaling(), f"no emulation of {type(recipe).__name__}"
    return max(shape[0], 1), max(shape[1], 1)


def _format(recipe: Recipe, gradient: bool) -> torch.dtype:
    return torch.float8_e5m2 if gradient and recipe.fp8_format is Format.HYBRID else torch.float8_e4m3fn
