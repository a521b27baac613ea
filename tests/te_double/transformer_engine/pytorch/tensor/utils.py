from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch.quantization import maxima, scales_of
from transformer_engine.pytorch.quantized_tensor import QuantizedTensor, encoded


def replace_raw_data(tensor: QuantizedTensor, new_raw_data: Tensor) -> None:
    assert new_raw_data.dtype == tensor._data.dtype
    new_raw_data.detach().copy_(tensor._data)
    tensor._data = new_raw_data


def cast_master_weights_to_fp8(
    model_weights: list[QuantizedTensor],
    master_weights: list[Tensor | None],
    start_offsets: list[int | None],
    group: Any,
    fsdp_shard_model_weights: Any = None,
    manual_post_all_gather_processing: bool = False,
) -> None:
    """Each rank writes its shard's values, scaled by the maxima of all ranks."""
    for weight, master, start in zip(model_weights, master_weights, start_offsets, strict=True):
        if hasattr(weight, "clear_high_precision_init_val"):
            weight.clear_high_precision_init_val()
        full = torch.zeros(weight.numel())
        if master is not None and start is not None:
            full[start : start + master.numel()] = master.to(weight.dtype).float()
        found = maxima(full.view(weight.shape), weight._recipe, weight=True)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
        scale = scales_of(found, weight.shape, weight._recipe, weight=True)
        weight._scale_inv = 1.0 / scale
        if master is not None and start is not None:
            end = start + master.numel()
            bits = encoded(full[start:end], scale.flatten()[start:end])
            weight._data.view(-1)[start:end].copy_(bits)
