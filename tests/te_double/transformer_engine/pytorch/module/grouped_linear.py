from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        num_gemms: int,
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
        device: torch.device | str = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert not bias and tp_size == 1, "experts have no bias and are never sharded"
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.fuse_wgrad_accumulation, self.use_bias = fuse_wgrad_accumulation, bias
        self.save_original_input = save_original_input
        for number in range(num_gemms):
            weight = self.weight_parameter(out_features, in_features, params_dtype)
            if init_method is not None:
                init_method(weight)
            self.register_parameter(f"weight{number}", weight)

    def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        assert len(m_splits) == self.num_gemms and sum(m_splits) == inp.shape[0]
        parts = [
            self.product(x, f"weight{number}", is_first_microbatch)
            for number, x in enumerate(torch.split(inp, m_splits))
        ]
        return torch.cat(parts)
