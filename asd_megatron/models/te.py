"""All that names Transformer Engine: whether it can be used, its layers, and the switches that Megatron-Core leaves to
its caller."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from asd_megatron.distributed.machine import (
    ATTENTION_CHOSEN,
    ATTENTION_SWITCHES,
    has_cuda,
    transformer_engine_is_stand_in,
    transformer_engine_problem,
)
from asd_megatron.models.precision import Machine, Version

TESTED: dict[Version, tuple[Version, Version]] = {(0, 16): ((2, 9), (2, 11)), (0, 19): ((2, 11), (2, 18))}
"""By release of megatron-core: the oldest and the newest Transformer Engine that its calls were compared with."""


def problem(dtype: torch.dtype) -> str | None:
    """Why layers of `dtype` cannot be Transformer Engine's on this machine; None if they can. Imports it."""
    if not transformer_engine_is_stand_in():
        if not has_cuda():
            return "it needs a CUDA device"
        if dtype is torch.float32:
            return "its attention has no float32"
    return transformer_engine_problem() or _version_problem(version(), _version_of("megatron-core"))


def version() -> Version:
    """The version of the importable Transformer Engine."""
    return _numbers(str(getattr(importlib.import_module("transformer_engine"), "__version__", "")))


def _version_of(distribution: str) -> Version:
    return _numbers(metadata.version(distribution))


def _numbers(text: str) -> Version:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def _version_problem(found: Version, megatron: Version) -> str | None:
    """Why the release is too old for this megatron-core; None if it is not. A newer one than tested is used: see
    `untested`."""
    oldest, _ = TESTED.get(megatron[:2], ((0, 0), (0, 0)))
    if found >= oldest:
        return None
    return f"version {_text(found)} is older than the {_text(oldest)} that megatron-core {_text(megatron)} needs"


def untested() -> str | None:
    """For the start-up report: that this release is newer than those tested with megatron-core; None if it is not."""
    megatron = _version_of("megatron-core")
    window = TESTED.get(megatron[:2])
    if window is None:
        return f"no release of Transformer Engine was tested with megatron-core {_text(megatron)}"
    if version() <= window[1]:
        return None
    oldest, newest = map(_text, window)
    return f"newer than those tested with megatron-core {_text(megatron)} ({oldest} to {newest})"


def _text(numbers: Version) -> str:
    return ".".join(map(str, numbers))


def machine() -> Machine | None:
    """This rank's machine, for `Precision.machine_problem`; None without CUDA. Creates a CUDA context."""
    if not has_cuda():
        return None
    return Machine(torch.cuda.get_device_capability(), _numbers(torch.version.cuda or ""), version())


# ---------------------------------------------------------------- layers


def linear_layers() -> tuple[type, type, type, type]:
    """(column parallel, the same after a norm, row parallel, norm): Megatron's wrappers."""
    from megatron.core.extensions import transformer_engine as te

    return te.TEColumnParallelLinear, te.TELayerNormColumnParallelLinear, te.TERowParallelLinear, te.TENorm


def norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def attention(scale: float | None) -> type:
    """Megatron's wrapper of the core attention. scale: of the scores; None: 1 / sqrt(head_dim), its default. The window
    is Megatron's config's."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    if scale is None:
        return TEDotProductAttention  # type: ignore[no-any-return]

    class ScaledAttention(TEDotProductAttention):  # type: ignore[misc]
        """Transformer Engine's attention with a layer's own scale."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "softmax_scale": scale})

    return ScaledAttention


# ---------------------------------------------------------------- attention backends


@contextmanager
def choosing_attention(layers: str) -> Iterator[None]:
    """Around building a model of `layers`: Transformer Engine's unfused attention, which writes scores of length x
    length, is never chosen. Where no other fits, the first forward pass raises.

    While a model is built, Megatron sets the switches by the recipe's backend and accepts no other values; Transformer
    Engine reads them when it chooses.
    """
    if ATTENTION_CHOSEN in os.environ:
        for name in ATTENTION_SWITCHES:
            os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ[ATTENTION_CHOSEN] = "1"
        if layers == "te":
            os.environ["NVTE_UNFUSED_ATTN"] = "0"


def attention_in_use() -> str | None:
    """Which of its attentions computed last, for the console; None before the first."""
    module = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention")
    state = getattr(module, "_attention_backends", {})
    if state.get("use_flash_attention"):
        found = state.get("flash_attention_backend")
        return f"FlashAttention {found}" if found is not None else "FlashAttention"
    if state.get("use_fused_attention"):
        return f"cuDNN's fused attention ({state.get('fused_attention_backend')})"
    return None


# ---------------------------------------------------------------- gradients and precision


def fuse_weight_gradients(chunks: Iterable[torch.nn.Module]) -> None:
    """Let linear layers add their weight gradients to the float32 buffers themselves, without a bfloat16 copy that
    rounds each micro-batch's.

    Not through Megatron's own key: that makes its ColumnParallelLinear, which our head is, ask for Apex.
    """
    for chunk in chunks:
        modules: Iterable[Any] = chunk.modules()
        for module in modules:
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True


def apex_fuses_weight_gradients() -> bool:
    """Whether Apex's kernel for Megatron's own linear layers can be imported."""
    try:
        importlib.import_module("fused_weight_gradient_mlp_cuda")
    except Exception:  # absent, or built for another CUDA
        return False
    return True


@contextmanager
def in_bfloat16(config: Any) -> Iterator[None]:
    """Inside, a model that was built for FP8 computes in bfloat16: Megatron asks its config at every pass."""
    before, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = before


# ---------------------------------------------------------------- FP8 parameters


def values(parameter: Tensor) -> Tensor:
    """The numbers of a parameter, in the model's dtype: those of an FP8 parameter as a new tensor."""
    is_quantized = any(kind.__module__.startswith("transformer_engine") for kind in type(parameter).__mro__)
    found: Any = parameter.dequantize() if is_quantized else parameter
    return found  # type: ignore[no-any-return]


def fill(parameter: Any, value: Tensor) -> None:
    """Set a parameter. One in FP8 keeps `value` itself in host memory too, until the optimizer has made its float32
    master weights of it: of the FP8 numbers they would begin with their rounding errors."""
    parameter.copy_(value)
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter._high_precision_init_val = value.to("cpu", parameter.dtype)
