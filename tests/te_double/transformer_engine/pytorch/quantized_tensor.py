"""A tensor that holds FP8 values and behaves as one of its nominal dtype."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformer_engine.common.recipe import Recipe

aten = torch.ops.aten


class QuantizedTensor(torch.Tensor):
    """`_data` [same shape] uint8: e4m3 bits; `_scale_inv` [same shape] float32, by which they are multiplied."""

    _data: Tensor
    _scale_inv: Tensor
    _recipe: Recipe

    @staticmethod
    def __new__(cls: Any, data: Tensor, scale_inv: Tensor, recipe: Recipe, dtype: torch.dtype) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=dtype, device=data.device)
        made._data, made._scale_inv, made._recipe = data, scale_inv, recipe
        return made

    @classmethod
    def of(cls, value: Tensor, recipe: Recipe) -> Any:
        """`value` in FP8."""
        data = torch.empty(value.shape, dtype=torch.uint8)
        made = cls(data, torch.ones(value.shape), recipe, value.dtype)
        made.quantize_(value)
        return made

    def quantize_(self, tensor: Tensor) -> None:
        from transformer_engine.pytorch.quantization import scales

        scale = scales(tensor.float(), self._recipe, weight=True)
        self._data.copy_(encoded(tensor, scale))
        self._scale_inv = 1.0 / scale

    def dequantize(self, *, dtype: torch.dtype | None = None) -> Tensor:
        value = self._data.view(torch.float8_e4m3fn).float() * self._scale_inv
        return value.to(self.dtype if dtype is None else dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.detach.default:
            return type(args[0])(args[0]._data, args[0]._scale_inv, args[0]._recipe, args[0].dtype)
        if func is aten.copy_.default and isinstance(args[0], QuantizedTensor):
            args[0].quantize_(plain(args[1]))
            return args[0]
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def keep_high_precision(parameter: Any, value: Tensor) -> None:
    """Hold the value itself until `clear_high_precision_init_val`."""
    parameter._high_precision_init_val = value.detach().cpu()
    parameter.get_high_precision_init_val = MethodType(_kept, parameter)
    parameter.clear_high_precision_init_val = MethodType(_clear, parameter)


def encoded(value: Tensor, scale: Tensor) -> Tensor:
    """The e4m3 bits of scaled values, uint8."""
    return (value.float() * scale).to(torch.float8_e4m3fn).view(torch.uint8)


def plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def _kept(self: Any) -> Tensor | None:
    return getattr(self, "_high_precision_init_val", None)


def _clear(self: Any) -> None:
    if hasattr(self, "_high_precision_init_val"):
        del self._high_precision_init_val
