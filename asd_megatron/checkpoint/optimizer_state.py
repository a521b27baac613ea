"""Megatron's optimizers in a checkpoint: the Adam state that must exist before a save or a load, and which
hyper-parameters are in force after a load.

An Adam of Transformer Engine, Apex or PyTorch has no state before its first step, and every step may have been left out
so far: `fill` creates what the first step would.

With PyTorch's Adam (no GPU), Megatron's distributed optimizer

* reads the state, `step` included, before it exists;
* loads no `step` of its own but insists on one, then lets all parameters share one tensor, so that every parameter's
  update advances the step of all (a wrong bias correction, silently).

With any Adam, up to Megatron-Core 0.19,

* it cuts parameters out of its gathered state by offsets that count the padding between buckets, which the gathered
  state does not have: what follows a padded bucket is saved shifted, silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from asd_megatron.models.compat import optimizer_parts

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

KIND_OF_GROUP = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
RATES_OF_GROUP = ("max_lr", "min_lr", "start_wd", "end_wd")


def _distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return [part for part in optimizer_parts(optimizer) if isinstance(part, DistributedOptimizer)]


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether a part of it is Megatron's distributed optimizer."""
    return bool(_distributed_parts(optimizer))


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    parts = [part.optimizer for part in optimizer_parts(optimizer)]
    inner = [o for part in parts for o in getattr(part, "sub_optimizers", [part])]  # those of a HybridDeviceOptimizer
    return [o for o in inner if isinstance(o, torch.optim.Adam | torch.optim.AdamW)]


def fill(optimizer: MegatronOptimizer) -> None:
    """Give parameters without Adam state the state that they would get at their first step."""
    for part in optimizer_parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)  # `exp_avg` and `exp_avg_sq`, of whichever Adam
    for adam in _torch_adams(optimizer):  # it alone counts steps by parameter; the others by group, from the first on
        for group in adam.param_groups:
            for p in group["params"]:
                adam.state[p].setdefault("step", torch.zeros((), device=p.device if group["fused"] else None))


@contextmanager
def gathering(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Around `optimizer.sharded_state_dict`: the gathered state has the padding that its offsets count."""
    with ExitStack() as stack:
        if _drops_padding():
            for part in _distributed_parts(optimizer):
                stack.enter_context(_padded(part))
        yield


def _drops_padding() -> bool:
    from megatron.core.package_info import MAJOR, MINOR

    return (MAJOR, MINOR) < (0, 20)


@contextmanager
def _padded(part: DistributedOptimizer) -> Iterator[None]:
    original = part.get_parameter_state_dp_zero

    def padded(*args: Any, **kwargs: Any) -> Any:
        state = original(*args, **kwargs)
        for index, buffer in enumerate(part.buffers if state is not None else ()):
            for gathered in state[index].values():
                for key, dense in gathered.items():
                    if isinstance(dense, torch.Tensor):
                        gathered[key] = _insert_padding(dense, buffer)
        return state

    part.get_parameter_state_dp_zero = padded
    try:
        yield
    finally:
        del part.get_parameter_state_dp_zero


def _insert_padding(dense: torch.Tensor, buffer: Any) -> torch.Tensor:
    """A buffer's state without padding, [numel_unpadded], to one with it, [numel].

    Two buckets with 3 and 2 numbers, each padded to 4 (offsets 0 and 4):

        dense  a b c d e            the second bucket begins at 3
        wide   a b c 0 d e 0 0      and here at 4, where Megatron's offsets look for it
    """
    wide = dense.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        wide[bucket.offset : bucket.offset + bucket.numel_unpadded] = dense[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return wide


@contextmanager
def loading(optimizer: MegatronOptimizer, state: Any) -> Iterator[None]:
    """Around `optimizer.load_state_dict(state)`: moments and step counts are loaded, hyper-parameters stay the
    recipe's."""
    hyper = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups]
    _use_own_rates(state, hyper)
    if _torch_adams(optimizer):
        _add_first_steps(state)
    with ExitStack() as stack:
        for part in _distributed_parts(optimizer):
            stack.enter_context(_keeping_steps(part))
        yield
    for adam in _torch_adams(optimizer):
        for of_parameter in adam.state.values():
            of_parameter["step"] = of_parameter["step"].clone()
    for group, values in zip(optimizer.param_groups, hyper, strict=True):
        group.update(values)


def _use_own_rates(state: Any, hyper: Sequence[Mapping[str, Any]]) -> None:
    """Give the saved parameter groups, wherever they are in the nested state, the rates of the optimizer's groups.

    From 0.18 on, Megatron tells groups apart by their rates too, and a recipe may have changed its learning rate since:

        saved {wd_mult: 1, max_lr: 1e-6}, own {wd_mult: 1, max_lr: 2e-6}: the same group, saved gets max_lr 2e-6
    """
    if isinstance(state, dict):
        for key, value in state.items():
            if key != "param_groups":
                _use_own_rates(value, hyper)
                continue
            for saved in value:
                same = [g for g in hyper if all(saved.get(k) == g.get(k) for k in KIND_OF_GROUP)]
                if len(same) == 1:
                    saved.update({k: same[0][k] for k in RATES_OF_GROUP if k in saved and k in same[0]})
    elif isinstance(state, list | tuple):
        for part in state:
            _use_own_rates(part, hyper)


def _add_first_steps(state: Any) -> None:
    """Give the saved parameters of PyTorch's Adam, wherever they are in the nested state, a step: Megatron stores one
    for all as `common_step`, but none while it is 0."""
    if not isinstance(state, dict):
        return
    if "param_groups" in state and "state" in state:
        if "common_step" not in state["state"]:
            for of_parameter in state["state"].values():
                of_parameter.setdefault("step", torch.zeros(()))
        return
    for part in state.values():
        _add_first_steps(part)


@contextmanager
def _keeping_steps(part: DistributedOptimizer) -> Iterator[None]:
    """Megatron copies a parameter's loaded tensors over every entry of its Adam state, and none of them is `step`:
    give it the one that is there, which the load of the groups has set."""
    original = part._set_main_param_and_optimizer_states

    def with_step(model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"].clone()}
        original(model_param, tensors)

    part._set_main_param_and_optimizer_states = with_step
    try:
        yield
    finally:
        del part._set_main_param_and_optimizer_states
