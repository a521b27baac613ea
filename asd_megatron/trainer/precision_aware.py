"""Megatron's precision-aware optimizers: Adam itself keeps the float32 master weights.

`moments: bfloat16`: Transformer Engine's Adam, with moments in bfloat16 and of each master weight only what the model's
bfloat16 weight lacks, its remainder (int16). `offload: host`: Megatron's HybridDeviceOptimizer, which updates float32
copies on the host by PyTorch's Adam.

Here are the parts that Megatron-Core leaves open: state before the first step, checkpoints with complete float32 master
weights (any `moments` and `offload` can resume from them), and bounded temporary memory of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

Moments = Literal["float32", "bfloat16"]
Offload = Literal["none", "host"]
SLICE_NUMEL = 1 << 28
"""Weights that are updated at a time: Transformer Engine before 2.13 makes float32 copies of their moments (2 GiB)."""


def settings(moments: Moments, offload: Offload) -> dict[str, Any]:
    """Of Megatron's OptimizerConfig."""
    if offload == "host":
        return {
            "use_precision_aware_optimizer": True,
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": 1.0,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    if moments == "float32":
        return {}
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
    }


def adapt(part: MegatronOptimizer) -> None:
    """Complete a part of an optimizer that Megatron built with `settings`; another one stays as it is."""
    if not part.config.use_precision_aware_optimizer:
        return
    part.__class__ = _complete_masters(part.__class__)
    if part.config.optimizer_cpu_offload:
        part.init_state_fn = _init_on_host
    else:
        part.init_state_fn = _init_fused
        part.optimizer.step = partial(step_in_slices, part.optimizer, part.optimizer.step)


def step_in_slices(adam: torch.optim.Optimizer, step: Callable[[], object]) -> None:
    """`step` of Transformer Engine's Adam on slices of each group's parameters, of about SLICE_NUMEL elements. The
    result is that of one call: parameters do not depend on each other, and every slice counts the same step."""
    groups = [(group, group["params"], group.get("step")) for group in adam.param_groups]
    try:
        for group, _, _ in groups:
            group["params"] = []  # passed over, uncounted
        for group, parameters, count in groups:
            for chosen in _slices(parameters, SLICE_NUMEL):
                group["params"] = chosen
                if count is not None:
                    group["step"] = count
                else:
                    group.pop("step", None)
                step()
            group["params"] = []
    finally:
        for group, parameters, _ in groups:
            group["params"] = parameters


def _slices(parameters: Sequence[Tensor], numel: int) -> Iterator[list[Tensor]]:
    """Consecutive parameters of at most `numel` elements together; a larger one alone."""
    chosen: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if chosen and size + parameter.numel() > numel:
            yield chosen
            chosen, size = [], 0
        chosen.append(parameter)
        size += parameter.numel()
    if chosen:
        yield chosen


def complete(weight: Tensor, remainder: Tensor) -> Tensor:
    """Float32 master weights from bfloat16 `weight` and int16 `remainder`, of one shape: their bit patterns, as
    integers, are weight * 2^16 + remainder."""
    return ((weight.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def remainder_of(master: Tensor, weight: Tensor) -> Tensor:
    """The int16 remainder for which `complete` gives the float32 `master`, of which `weight` is the bfloat16 rounding.

    Transformer Engine rounds a tie up, PyTorch to even: where `weight` is a tie rounded down, 2^15 is one too many for
    int16, and the master weight changes in its last bit.
    """
    lacking = master.view(torch.int32) - (weight.view(torch.int16).int() << 16)
    return lacking.clamp(-(1 << 15), (1 << 15) - 1).to(torch.int16)


@cache
def _complete_masters(base: Any) -> type:
    """Megatron's distributed optimizer, `base`, whose checkpoints hold complete master weights."""

    class CompleteMasters(base):  # type: ignore[misc,valid-type]
        def _get_main_param_and_optimizer_states(self, model_param: Tensor) -> dict[str, Tensor]:
            tensors: dict[str, Tensor] = super()._get_main_param_and_optimizer_states(model_param)
            if tensors["param"].dtype is torch.int16:
                tensors["param"] = complete(self._shard(model_param), tensors["param"])
            return tensors

        def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
            shard = self._shard(model_param)
            if self.optimizer.state[shard]["master_param"].dtype is torch.int16:
                tensors = {**tensors, "param": remainder_of(tensors["param"].to(shard.device), shard)}
            super()._set_main_param_and_optimizer_states(model_param, tensors)

        def _shard(self, model_param: Tensor) -> Tensor:
            """This rank's part of a model's weight."""
            group, order = self.model_param_group_index_map[model_param]
            shard: Tensor = self.optimizer.param_groups[group]["params"][order]
            return shard

    return CompleteMasters


def _init_fused(adam: Any, config: Any = None) -> None:
    """Give parameters that have no state yet the zeros that their first step would: Megatron's own call lacks an
    argument."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                remainders = adam.store_param_remainders and parameter.dtype is torch.bfloat16
                adam.initialize_state(parameter, remainders)


def _init_on_host(hybrid: Any, config: Any = None) -> None:
    """The same for the optimizers on the host; Megatron would make a step with random gradients."""
    for adam in hybrid.sub_optimizers:
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
    hybrid._sync_sub_optimizers_state_to_hdo()
