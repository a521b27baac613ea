"""Megatron's optimizers in a checkpoint: what `torch.optim.Adam` under them needs, and who owns the hyper-parameters.

With Transformer Engine's or Apex's Adam the first two change nothing. With PyTorch's (no GPU), Megatron's distributed
optimizer

* reads its Adam state, `step` included, before that exists;
* loads no `step` of its own but insists on one, then lets all parameters share one tensor, so that every parameter's
  update advances the step of all (a wrong bias correction, silently).

With any Adam, up to Megatron-Core 0.19,

* it cuts parameters out of its gathered state by offsets that count the padding between buckets, which the gathered
  state does not have: what follows a padded bucket is saved shifted, silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

KIND_OF_GROUP = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
RATES_OF_GROUP = ("max_lr", "min_lr", "start_wd", "end_wd")


def parts(optimizer: Any) -> list[Any]:
    """The optimizers of a chain that hold parameters."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chain if not getattr(part, "is_stub_optimizer", False)]


def is_distributed(optimizer: Any) -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return any(isinstance(part, DistributedOptimizer) for part in parts(optimizer))


def _torch_adams(optimizer: Any) -> list[torch.optim.Optimizer]:
    inner = [part.optimizer for part in parts(optimizer)]
    return [o for o in inner if isinstance(o, torch.optim.Adam | torch.optim.AdamW)]


def fill(optimizer: Any) -> None:
    """Give parameters without Adam state the state they would get at their first step."""
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            for p in group["params"]:
                if not adam.state[p]:
                    where = p.device if group["fused"] else None
                    adam.state[p].update(
                        step=torch.zeros((), device=where), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                    )


@contextmanager
def gathering(optimizer: Any) -> Iterator[None]:
    """Around `optimizer.sharded_state_dict`: the gathered state has the padding that its offsets count."""
    with ExitStack() as stack:
        if _drops_padding():
            for part in parts(optimizer):
                if hasattr(part, "get_parameter_state_dp_zero"):
                    stack.enter_context(_padded(part))
        yield


def _drops_padding() -> bool:
    from megatron.core.package_info import MAJOR, MINOR

    return (MAJOR, MINOR) < (0, 20)


@contextmanager
def _padded(part: Any) -> Iterator[None]:
    original = part.get_parameter_state_dp_zero

    def padded(*args: Any, **kwargs: Any) -> Any:
        state = original(*args, **kwargs)
        for index, buffer in enumerate(part.buffers if state is not None else ()):
            for gathered in state[index].values():
                for key, dense in gathered.items():
                    if isinstance(dense, torch.Tensor):
                        gathered[key] = _spread(dense, buffer)
        return state

    part.get_parameter_state_dp_zero = padded
    try:
        yield
    finally:
        del part.get_parameter_state_dp_zero


def _spread(dense: torch.Tensor, buffer: Any) -> torch.Tensor:
    """A buffer's state without padding [numel_unpadded] to one with it [numel]."""
    wide = dense.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        wide[bucket.offset : bucket.offset + bucket.numel_unpadded] = dense[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return wide


@contextmanager
def loading(optimizer: Any, state: Any) -> Iterator[None]:
    """Around `optimizer.load_state_dict(state)`: state is loaded, hyper-parameters stay those of the recipe at hand."""
    hyper = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups]
    _rename_groups(state, hyper)
    with ExitStack() as stack:
        for part in parts(optimizer):
            if hasattr(part, "_set_main_param_and_optimizer_states"):
                stack.enter_context(_keeping_steps(part))
        yield
    for adam in _torch_adams(optimizer):
        for state in adam.state.values():
            state["step"] = state["step"].clone()
    for group, values in zip(optimizer.param_groups, hyper, strict=True):
        group.update(values)


def _rename_groups(state: Any, hyper: Sequence[Mapping[str, Any]]) -> None:
    """Give the saved parameter groups the rates of the groups at hand.

    From 0.18 on, Megatron tells groups apart by them too, and a recipe may have changed its learning rate since.
    """
    if isinstance(state, dict):
        for key, value in state.items():
            if key != "param_groups":
                _rename_groups(value, hyper)
                continue
            for saved in value:
                same = [g for g in hyper if all(saved.get(k) == g.get(k) for k in KIND_OF_GROUP)]
                if len(same) == 1:
                    saved.update({k: same[0][k] for k in RATES_OF_GROUP if k in saved and k in same[0]})
    elif isinstance(state, list | tuple):
        for part in state:
            _rename_groups(part, hyper)


@contextmanager
def _keeping_steps(part: Any) -> Iterator[None]:
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
