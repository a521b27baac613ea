"""Block-wise FP8 of the weights that quantised servers are sent.

Every matrix of a decoder layer but the router is sent as two tensors, each block of 128 x 128 elements with a scale of
its own; the embedding, the output layer, norms, biases and routers stay as they are:

    model.layers.0.mlp.up_proj.weight             e4m3 [rows, columns]
    model.layers.0.mlp.up_proj.weight_scale_inv   float32 [rows / 128, columns / 128]     weight = e4m3 * scale

This is the format of published block-wise FP8 models. SGLang keeps it as it arrives, so that weight updates work and
can be verified; with `--quantization fp8` it transposes the weights while it quantises them, and cannot load others
afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_megatron.checkpoint.huggingface import copy_others
from asd_megatron.files import atomic_folder
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors

BLOCK = 128
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
SCALE_SUFFIX = "_scale_inv"
QUANTIZATION: Mapping[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
}
"""`quantization_config` of config.json. SGLang leaves routers and the output layer unquantised by itself."""
_MATRIX = re.compile(r"model\.layers\.\d+\.(self_attn|mlp(\.experts\.\d+)?)\.\w+_proj\.weight")


def is_quantized(name: str) -> bool:
    """Whether the tensor of this Hugging Face name is sent in FP8."""
    return _MATRIX.fullmatch(name) is not None


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [rows, columns], float32 scales [rows / 128, columns / 128]) of a matrix, where it is.

    A block's scale maps its largest absolute value to 448; a block of zeros, or of values that float32 cannot scale,
    has scale 1. Elements are rounded to nearest. A block with a value that is not finite becomes NaN.

    Raises ValueError unless 128 divides both sizes.
    """
    rows, columns = weight.shape
    if rows % BLOCK or columns % BLOCK:
        raise ValueError(f"a matrix of {rows} x {columns} is not made of blocks of {BLOCK} x {BLOCK}")
    blocks = weight.detach().float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    scales = largest / LARGEST
    scales = torch.where(scales == 0, 1.0, scales)
    scaled = (blocks / scales[:, None, :, None]).clamp(-LARGEST, LARGEST)
    return scaled.to(FP8).view(rows, columns), scales


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix that `values` and `scales` of `quantize` stand for, rounded once, from float32 to `dtype`."""
    blocks = values.float().view(scales.shape[0], BLOCK, scales.shape[1], BLOCK)
    return (blocks * scales[:, None, :, None]).view(values.shape).to(dtype)


def quantized(tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """`tensors` with each quantised matrix as its e4m3 values and then its scales. One matrix is held at a time."""
    for name, tensor in tensors:
        if is_quantized(name):
            values, scales = quantize(tensor)
            yield name, values
            yield name + SCALE_SUFFIX, scales
        else:
            yield name, tensor


def mark_quantized(folder: Path) -> None:
    """Say in the config.json of `folder` that its weights are in this format."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": dict(QUANTIZATION)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_model_without_weights(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """`folder` with config (in this format) and tokenizer of the model `source`. A server that starts from it with
    dummy weights takes all of them from the first update. `dtype`: of the tensors that are not quantised."""
    with atomic_folder(folder, replace=True) as partial:
        copy_others(source, partial, dtype)
        mark_quantized(partial)
    return folder
