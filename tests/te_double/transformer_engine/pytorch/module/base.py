"""What all modules share: extra states, FP8 copies of weights, and the product with its gradients."""

import io
import pickle
from typing import Any

import torch
from torch import Tensor
from transformer_engine.common.recipe import Recipe
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, rounded
from transformer_engine.pytorch.quantized_tensor import keep_high_precision, plain
from transformer_engine.pytorch.tensor import Float8Tensor, QuantizedTensor
from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    return torch.zeros(shape, dtype=dtype) if zero else torch.full(shape, torch.nan, dtype=dtype)


class TransformerEngineBaseModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8, self.fp8_calibration = False, False

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        self.fp8_meta["fp8_checkpoint"] = self.fp8
        if self.fp8:
            self.fp8_meta["recipe"] = FP8GlobalStateManager.get_fp8_recipe()

    def get_extra_state(self) -> Tensor:
        if not self.fp8_meta["fp8_checkpoint"]:
            return torch.empty(0, dtype=torch.uint8)
        state = pickle.dumps({"recipe": self.fp8_meta["recipe"], "extra_fp8_variables": {}})
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        if state is None:
            return
        if isinstance(state, Tensor):
            if state.numel() > 0:
                pickle.loads(state.detach().cpu().numpy().tobytes())  # as the releases up to 2.17 do
        elif isinstance(state, io.BytesIO):
            torch.load(state)
        else:
            raise RuntimeError("Unsupported checkpoint format.")

    def weight_parameter(self, rows: int, columns: int, dtype: torch.dtype | None) -> torch.nn.Parameter:
        """A weight; of FP8 values inside `fp8_model_init`."""
        value = torch.empty(rows, columns, dtype=dtype)
        if not FP8GlobalStateManager.with_fp8_parameters():
            return torch.nn.Parameter(value)
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        assert recipe is not None
        parameter = torch.nn.Parameter(Float8Tensor.of(value.zero_(), recipe))
        if FP8GlobalStateManager.HIGH_PRECISION_INIT_VAL:
            keep_high_precision(parameter, value)
        return parameter

    def product(self, x: Tensor, name: str, is_first_microbatch: bool | None) -> Tensor:
        """x @ weight.T, of their FP8 copies inside `fp8_autocast`. The weight's copy is made anew in the first
        micro-batch only (or always, where that is None)."""
        weight = getattr(self, name)
        self.init_fp8_metadata()
        recipe, copy = FP8GlobalStateManager.get_fp8_recipe(), None
        if recipe is not None:
            assert_dim_for_fp8_exec(x, weight)
            copies = self.__dict__.setdefault("_weight_copies", {})
            if is_first_microbatch is None or is_first_microbatch or name not in copies:
                value = weight.detach()
                copies[name] = (
                    plain(value) if isinstance(value, QuantizedTensor) else rounded(value, recipe, weight=True)
                )
            copy = copies[name]
        return _Product.apply(x, weight, copy, recipe, getattr(self, "fuse_wgrad_accumulation", False))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, copy: Tensor | None, recipe: Recipe | None, fused: bool) -> Tensor:
        if recipe is not None:
            x = rounded(x, recipe)
        copy = plain(weight.detach()) if copy is None else copy
        ctx.save_for_backward(x, copy)
        ctx.weight, ctx.recipe, ctx.fused = weight, recipe, fused and weight.requires_grad
        return x @ copy.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, copy = ctx.saved_tensors
        if ctx.recipe is not None:
            gradient = rounded(gradient, ctx.recipe, gradient=True)
        rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        if not ctx.fused:
            return gradient @ copy, rows.t() @ inputs, None, None, None
        weight = ctx.weight
        weight.main_grad.add_(rows.to(weight.main_grad.dtype).t() @ inputs.to(weight.main_grad.dtype))
        given = None
        if hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            given = get_dummy_wgrad(list(weight.shape), x.dtype, zero=getattr(weight, "zero_out_wgrad", False))
        return gradient @ copy, given, None, None, None
