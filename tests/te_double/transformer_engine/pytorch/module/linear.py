from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert parallel_mode in (None, "row", "column"), parallel_mode
        assert not return_bias, "the stand-in adds biases itself"
        self.tp_size, self.tp_group, self.parallel_mode = tp_size, tp_group, parallel_mode
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation, self.use_bias = fuse_wgrad_accumulation, bias
        self.save_original_input = save_original_input
        self.weight = self.weight_parameter(self.out_features, self.in_features, params_dtype)
        if init_method is not None:
            init_method(self.weight)
        if parallel_mode is not None:
            _mark(self.weight, 1 if parallel_mode == "row" else 0)
        if bias:
            assert parallel_mode == "column"
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, dtype=params_dtype))
            _mark(self.bias, 0)
        else:
            self.bias = torch.empty(0, dtype=params_dtype)

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        self.tp_group = tp_group

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        x, group = inp, self.tp_group
        if self.parallel_mode == "column" and self.tp_size > 1:
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, group=group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
        y = self.product(x, "weight", is_first_microbatch)
        if self.parallel_mode == "row" and self.tp_size > 1:
            if self.sequence_parallel:
                y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=group)
            else:
                y = mappings.reduce_from_tensor_model_parallel_region(y, group=group)
        return y + self.bias if self.use_bias else y


def _mark(parameter: Any, dimension: int) -> None:
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dimension, 1
