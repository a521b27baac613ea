"""What differs between Megatron-Core releases (0.16.1 and 0.19.2) or between the objects that one release returns, and
which layer implementation a model gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from asd_megatron.distributed.device import device
from asd_megatron.distributed.layout import Layout
from asd_megatron.distributed.machine import has_cuda
from asd_megatron.errors import UserError
from asd_megatron.models import te

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


def resolve_layers(asked: str, dtype: torch.dtype) -> Literal["te", "local"]:
    """`te` or `local`, from a recipe's auto, te or local. Raises UserError when `te` cannot be had."""
    if asked == "local":
        return "local"
    problem = te.problem(dtype)
    if asked == "te" and problem is not None:
        raise UserError(
            f"model.layers te: Transformer Engine cannot be used: {problem}; set model.layers auto or local"
        )
    return "te" if problem is None else "local"


def resolve_attention(dtype: torch.dtype, layout: Layout, *, shares_prefixes: bool) -> Literal["own", "flex"]:
    """Which core attention a model gets: `flex` on a GPU where packs may share prefixes, else its layers' own.

    Not in float32, which serves comparisons and keeps the attention that a CPU has too, and not under context
    parallelism, which cuts packs.
    """
    fits = has_cuda() and dtype is torch.bfloat16 and layout.context == 1
    return "flex" if shares_prefixes and fits else "own"


def layers_text(asked: str, layers: str, dtype: torch.dtype) -> str:
    """For the start-up report: the layer implementation, and why `auto` chose another than Transformer Engine's on a
    GPU."""
    if asked != "auto" or layers == "te" or not has_cuda():
        return layers
    return f"local; not Transformer Engine: {te.problem(dtype)}"


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain that hold parameters; the optimizer itself where it is no chain."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chain if not getattr(part, "is_stub_optimizer", False)]


def master_weights(part: MegatronOptimizer) -> list[list[Tensor]]:
    """An optimizer's float32 copies of half-precision weights, by parameter group; none where Adam itself keeps them.
    A distributed optimizer's are this rank's shards."""
    names = ("shard_fp32_from_float16_groups", "fp32_from_float16_groups")  # distributed, not distributed
    groups: list[list[Tensor | None]] = next((getattr(part, name) for name in names if hasattr(part, name)), [])
    return [[weight for weight in group if weight is not None] for group in groups]


def submodules_of(spec: Any) -> Any:
    """The submodules of a spec of a layer's MLP: 0.16.1 makes a ModuleSpec of it, 0.19.2 a partial."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


@contextmanager
def building_head_norms(config: Any, present: bool) -> Iterator[None]:
    """Inside, attention layers are built with norms of queries and keys, or without (`present`).

    0.19.2 builds them only with `qk_layernorm`; both releases sum their gradients over tensor-parallel ranks when it is
    set while training, which is wrong for norms that are sharded like the projection before them.
    """
    training, config.qk_layernorm = config.qk_layernorm, present
    try:
        yield
    finally:
        config.qk_layernorm = training


def prepare_routers() -> None:
    """Let Megatron's routers run as ours do: without Transformer Engine, whose matrix product 0.16.1 asks for by a name
    that is missing then, and scoring before the first update. Its schedules keep the scale of an auxiliary loss of
    Megatron's in one tensor, which must not be made in inference mode."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=device()))


def hidden_state_model(gpt_class: type) -> type:
    """GPTModel whose last stage returns hidden states after the final norm: the head is fused with the loss, outside.

    Both releases end their forward in `_postprocess`, handed the decoder's output by keyword, and begin it with
    `_preprocess`, whose second result are the rotation angles: here those of the pack (`packed_seq_params.angles`).
    """
    if not hasattr(gpt_class, "_postprocess") or not hasattr(gpt_class, "_preprocess"):
        raise UserError(
            "this release of megatron-core has no GPTModel._preprocess and _postprocess; install 0.16.1 or 0.19.2"
        )

    class HiddenStateModel(gpt_class):  # type: ignore[misc,valid-type]
        def _preprocess(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
            found = super()._preprocess(*args, packed_seq_params=packed_seq_params, **kwargs)
            return (found[0], packed_seq_params.angles, *found[2:])

        def _postprocess(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
            return hidden_states

    return HiddenStateModel
