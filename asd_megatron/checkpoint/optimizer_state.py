"""Megatron's optimizers in a checkpoint: moments, float32 master weights and the step count. Hyper-parameters are the
recipe's and are neither stored nor loaded.

The distributed optimizer's shards are stored as boxes of tensors in their parameter's shape (`parts`), under the keys
that Megatron's `fully_reshardable` format has; Megatron itself gathers them on every rank first.

    optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight          and exp_avg_sq
    optimizer.state.param.decoder.layers.mlp.linear_fc1.weight            master weights of the distributed optimizer
    optimizer.state.fp32_param.decoder.layers.mlp.linear_fc1.weight       those of another one

An Adam of Transformer Engine, Apex or PyTorch has no state before its first step, and every step may have been left out
so far: `fill` creates what the first step would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from asd_megatron.checkpoint.parts import Box, Part, Sharded, boxes, local, local_range
from asd_megatron.errors import UserError
from asd_megatron.models.compat import optimizer_parts

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

PREFIX = "optimizer.state"
Reader = Callable[[Iterable[Box], Tensor], None]
"""Reads boxes of a checkpoint into a flat tensor."""
Shards = Mapping[int, Sharded]
"""Megatron's description of each parameter, by the parameter's id."""


def _is_distributed(part: MegatronOptimizer) -> TypeGuard[DistributedOptimizer]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return isinstance(part, DistributedOptimizer)


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether a part of it is Megatron's distributed optimizer."""
    return any(_is_distributed(part) for part in optimizer_parts(optimizer))


def fill(optimizer: MegatronOptimizer) -> None:
    """Give parameters without Adam state the state that they would get at their first step."""
    for part in optimizer_parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)  # `exp_avg` and `exp_avg_sq`, of whichever Adam
    for adam in _adams(optimizer):
        for group in adam.param_groups if _counts_by_parameter(adam) else ():
            for p in group["params"]:
                adam.state[p].setdefault("step", torch.zeros((), device=p.device if group["fused"] else None))


# ---------------------------------------------------------------- the step count


def _adams(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for part in optimizer_parts(optimizer):
        yield from getattr(part.optimizer, "sub_optimizers", [part.optimizer])  # those of a HybridDeviceOptimizer


def _counts_by_parameter(adam: torch.optim.Optimizer) -> bool:
    """Whether it is PyTorch's; the others count steps by group, from the first one on."""
    return isinstance(adam, torch.optim.Adam | torch.optim.AdamW)


def step_count(optimizer: MegatronOptimizer) -> int:
    """The updates that a filled optimizer has applied: the same number for every parameter."""
    found: set[int] = set()
    for adam in _adams(optimizer):
        if _counts_by_parameter(adam):
            found |= {int(state["step"]) for state in adam.state.values()}
        else:
            found |= {int(group["step"]) for group in adam.param_groups if group["params"] and "step" in group}
    if len(found) > 1:
        raise RuntimeError(f"parameters have made different numbers of updates: {sorted(found)}")
    return found.pop() if found else 0


def set_step_count(optimizer: MegatronOptimizer, count: int) -> None:
    """Set the updates that a filled optimizer has applied."""
    for adam in _adams(optimizer):
        if _counts_by_parameter(adam):
            for state in adam.state.values():
                state["step"].fill_(count)
        else:
            for group in adam.param_groups:
                group["step"] = count


def stored_step_count(common: Any) -> int:
    """The step count in what a checkpoint stores beside its tensors: as one `common_step`, or in each group of
    parameters; wherever they are in the nested state. 0 where there is none. UserError for several."""
    found = set(_steps(common))
    if len(found) > 1:
        raise UserError(f"its optimizer has several step counts ({sorted(found)})")
    return found.pop() if found else 0


def _steps(state: Any) -> Iterator[int]:
    if isinstance(state, dict):
        for key, value in state.items():
            if key == "common_step":
                yield int(value)
            elif key == "param_groups":
                yield from (int(group["step"]) for group in value if group.get("step") is not None)
            else:
                yield from _steps(value)
    elif isinstance(state, list | tuple):
        for part in state:
            yield from _steps(part)


# ---------------------------------------------------------------- tensors


def parts(optimizer: MegatronOptimizer, model: Shards, dense: int, expert: int) -> list[Part]:
    """What this rank holds of a filled optimizer's tensors. dense, expert: data-parallel ranks that have the same
    weights, of experts and of everything else."""
    found: list[Part] = []
    for part in optimizer_parts(optimizer):
        if _is_distributed(part):
            found += _range_parts(part, model)
            continue
        replicas = expert if any(group["is_expert_parallel"] for group in part.param_groups) else dense
        for sharded in _sharded(part, model):
            found.append(local(sharded, partial(sharded.data.detach().reshape, -1), sharded.data.dtype, replicas))
    return found


def load(optimizer: MegatronOptimizer, model: Shards, read: Reader) -> None:
    """Read this rank's tensors of a filled optimizer. Memory: those of one parameter."""
    for part in optimizer_parts(optimizer):
        if _is_distributed(part):
            for parameter, begin, end in _ranges(part):
                _load_range(part, parameter, model[id(parameter)], begin, end, read)
            if hasattr(part.optimizer, "_sync_hdo_state_to_sub_optimizers"):  # a HybridDeviceOptimizer
                part.optimizer._sync_hdo_state_to_sub_optimizers()
            continue
        for sharded in _sharded(part, model):
            read(boxes(sharded), sharded.data.detach().view(-1))


def restored(optimizer: MegatronOptimizer) -> set[int]:
    """The ids of the model's parameters that `load` and `update_weights` restore."""
    found: set[int] = set()
    for part in optimizer_parts(optimizer):
        if _is_distributed(part):
            found |= {id(p) for buffer in part.buffers for p in buffer.param_index_map}
        else:
            found |= {id(p) for group in getattr(part, "float16_groups", ()) for p in group}
    return found


def update_weights(optimizer: MegatronOptimizer, chunks: Iterable[Any]) -> None:
    """After `load`: set the model's parameters to their master weights, rounded to their precision; each data-parallel
    rank of the distributed optimizer its range, which the others get. chunks: of the model, in Megatron's DDP.
    Collective."""
    for part in optimizer_parts(optimizer):
        if hasattr(part, "_copy_main_params_to_model_params"):  # not in float32 without the distributed optimizer
            part._copy_main_params_to_model_params()
    if is_distributed(optimizer):
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)


def _sharded(part: MegatronOptimizer, model: Shards) -> list[Sharded]:
    """Megatron's description of the tensors of an optimizer that is not distributed; `data` are the tensors."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    state = part.sharded_state_dict(dict(enumerate(model.values())))
    return [found for found in nested_values(state) if isinstance(found, ShardedTensor | ShardedTensorFactory)]


def _ranges(part: DistributedOptimizer) -> Iterator[tuple[Tensor, int, int]]:
    """The parameters of which this rank has a flat range [begin, end), and the range."""
    for parameter in part.model_param_gbuf_map:
        found = part._get_model_param_range_map(parameter)["param"]
        yield parameter, found.start, found.end


def _state(part: DistributedOptimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The tensors of this rank's range of a parameter: `param`, `exp_avg`, `exp_avg_sq`; possibly new ones."""
    found: dict[str, Tensor] = part._get_main_param_and_optimizer_states(parameter)
    return {key: tensor for key, tensor in found.items() if key != "step"}


def _range_parts(part: DistributedOptimizer, model: Shards) -> Iterator[Part]:
    for parameter, begin, end in _ranges(part):
        sharded = model[id(parameter)]
        for key, tensor in _state(part, parameter).items():
            values = partial(_values, part, parameter, key)
            yield local_range(sharded, begin, end, values, tensor.dtype, f"{PREFIX}.{key}.{sharded.key}")


def _values(part: DistributedOptimizer, parameter: Tensor, key: str) -> Tensor:
    return _state(part, parameter)[key].detach().reshape(-1)


@torch.no_grad()
def _load_range(
    part: DistributedOptimizer, parameter: Tensor, sharded: Sharded, begin: int, end: int, read: Reader
) -> None:
    if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        # It does not copy its master weights to the model, and may keep only what the model's weights lack of them.
        read(boxes(sharded, begin, end), parameter.detach().view(-1)[begin:end])
    found = {}
    for key, tensor in part._get_main_param_and_optimizer_states(parameter).items():
        if key == "step":  # Megatron sets every entry
            found[key] = tensor.clone()
            continue
        numbers = torch.empty(end - begin, dtype=tensor.dtype, device=tensor.device)
        read(boxes(sharded, begin, end, f"{PREFIX}.{key}.{sharded.key}"), numbers)
        found[key] = numbers.view(tensor.shape)
    part._set_main_param_and_optimizer_states(parameter, found)
