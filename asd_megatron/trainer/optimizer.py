"""Megatron's AdamW with its learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from asd_megatron.models.compat import master_weights, optimizer_parts
from asd_megatron.models.port import ModelPort
from asd_megatron.trainer import precision_aware
from asd_megatron.trainer.handover import HostMemory
from asd_megatron.trainer.precision_aware import Moments, Offload
from asd_megatron.trainer.spikes import SpikeAction, SpikeRule


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: the global L2 gradient norm before clipping (NaN when Megatron found a non-finite gradient),
    and whether the update was applied. A skipped update, of a norm or a loss that is not finite or of a spike, leaves
    weights and optimizer state untouched."""

    grad_norm: float
    applied: bool


class Optimizer:
    """Megatron's (chained) optimizer and learning-rate scheduler over a port's DDP-wrapped chunks.

    `step` calls the stages of Megatron's own `step` one by one, because that would apply a non-finite gradient in
    float32.

    The learning rate of update n (from 1): n / warmup_steps of `learning_rate` during the warm-up, `learning_rate` at
    its end (without a warm-up: at update 1), from there along `schedule` (constant, linear, cosine) towards
    `min_learning_rate`, which the update after `total_steps` would have. A skipped update advances the schedule too.
    `distributed` shards optimizer state over data-parallel ranks. `moments` bfloat16 and `offload` host need it, and a
    model in bfloat16: see `precision_aware`. `grad_spike` clip or skip: `spikes` is the rule for spikes of the gradient
    norm.
    """

    def __init__(
        self,
        port: ModelPort,
        *,
        learning_rate: float,
        min_learning_rate: float,
        schedule: str,
        warmup_steps: int,
        total_steps: int,
        weight_decay: float,
        beta1: float,
        beta2: float,
        epsilon: float,
        clip_grad: float,
        distributed: bool,
        moments: Moments = "float32",
        offload: Offload = "none",
        grad_spike: SpikeAction | Literal["none"] = "none",
        grad_spike_factor: float = 3.0,
    ) -> None:
        self.port = port
        self.clip_grad = clip_grad
        self.spikes = None if grad_spike == "none" else SpikeRule(grad_spike, grad_spike_factor)
        self.megatron = _megatron_optimizer(
            port,
            lr=learning_rate,
            min_lr=min_learning_rate,
            weight_decay=weight_decay,
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_eps=epsilon,
            clip_grad=clip_grad,
            use_distributed_optimizer=distributed,
            **precision_aware.settings(moments, offload),
        )
        for part in optimizer_parts(self.megatron):
            precision_aware.adapt(part)
            _fuse(part.optimizer)
        self.scheduler = _scheduler(
            self.megatron, learning_rate, min_learning_rate, schedule, warmup_steps, total_steps, weight_decay
        )
        # Megatron's scheduler starts at step 0 of the warm-up, whose rate is 0: the first update has step 1's.
        self._first = 1 if warmup_steps else 0
        self.seek(0)
        self._host = HostMemory()

    @property
    def learning_rate(self) -> float:
        """Of the next update; `last_learning_rate` is that of the latest one."""
        return float(self.megatron.param_groups[0]["lr"])

    def seek(self, updates: int) -> None:
        """Put the schedule where `updates` updates, applied or skipped, have been made. A resumed run calls it with the
        updates that its finished steps have under the recipe at hand, so that its progress decides the learning rate,
        not the number of updates that earlier settings made."""
        self.scheduler.num_steps = updates + self._first
        self.scheduler.step(0)
        self.last_learning_rate = self.learning_rate

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors and step counts, as plain JSON values."""
        return {"spikes": None if self.spikes is None else self.spikes.state_dict()}

    def restore(self, run_state: Mapping[str, Any]) -> None:
        """Continue with what `run_state` gave, or nothing of it where the rule for spikes is new."""
        if self.spikes is not None and run_state.get("spikes") is not None:
            self.spikes.load_state_dict(run_state["spikes"])

    def zero_grad(self) -> None:
        for chunk in self.port.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def offload(self) -> None:
        """Free the device memory of gradients and of the optimizer's own tensors: Adam's moments and, in half
        precision, the float32 master weights (in float32 those are the model's weights themselves). The gradients'
        contents are lost. Only `reload` and what needs neither may follow."""
        for chunk in self.port.chunks:
            chunk.offload_grad_buffers(synchronize=True, empty_cache=False)
        self._host.offload(tensor for tensor in self._own_tensors() if tensor.device == self.port.device)

    @torch.no_grad()
    def reload(self) -> None:
        """Take the memory again, with the contents of the optimizer's tensors; the gradients are zero."""
        self._host.reload()
        for chunk in self.port.chunks:
            chunk.restore_grad_buffers(synchronize=False)

    def _own_tensors(self) -> Iterator[Tensor]:
        """Adam's state, and master weights that are no view of the model's weights."""
        for part in optimizer_parts(self.megatron):
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))
            for group in master_weights(part):
                yield from group

    def replicated(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The optimizer's own tensors that every rank with the same parameter holds too, each as (what it is, the
        parameter, the tensor): master weights and moments of an optimizer that is not distributed."""
        for part in optimizer_parts(self.megatron):
            if hasattr(part, "model_param_gbuf_map"):  # Megatron's distributed optimizer: each rank has its own shard
                continue
            models = [p for group in getattr(part, "float16_groups", ()) for p in group]
            masters = [p for group in master_weights(part) for p in group]
            parameters = {id(master): model for model, master in zip(models, masters, strict=True)}
            for model, master in zip(models, masters, strict=True):
                yield "master weight", model, master
            for master, state in part.optimizer.state.items():
                for key in ("exp_avg", "exp_avg_sq"):
                    if key in state:
                        yield key, parameters.get(id(master), master), state[key]

    @torch.no_grad()
    def step(self, *, loss: float = 0.0) -> StepResult:
        """Clip to the global gradient norm, update, and advance the schedule. Collective over all ranks.

        The update is skipped when the gradient norm or `loss` (the same on every rank) is not finite, and for a spike
        of the norm where the rule says so.
        """
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        self.last_learning_rate = self.learning_rate
        found_inf = self.megatron.prepare_grads()
        norm = float("nan") if found_inf else float(self.megatron.get_grad_norm())
        applied = math.isfinite(norm) and math.isfinite(loss)
        largest = self.clip_grad if self.clip_grad > 0 else math.inf
        if applied and self.spikes is not None and (limit := self.spikes.exceeds(norm)) is not None:
            applied = self.spikes.action == "clip"
            largest = min(largest, limit)
        if applied:
            if norm > largest or self.clip_grad > 0:
                for part in optimizer_parts(self.megatron):
                    parameters = part.get_parameters()
                    if parameters:
                        clip_grad_by_total_norm_fp32(
                            parameters,
                            max_norm=largest,
                            total_norm=norm,
                            use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                        )
            self.megatron.step_with_ready_grads()
        self.scheduler.step(1)
        return StepResult(norm, applied)


def _megatron_optimizer(port: ModelPort, **settings: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        bf16=port.dtype is not torch.float32,
        params_dtype=port.dtype,
        log_num_zeros_in_grad=False,
        **settings,
    )
    return get_megatron_optimizer(config, port.chunks, use_gloo_process_groups=False)


def _scheduler(
    optimizer: Any,
    learning_rate: float,
    min_learning_rate: float,
    schedule: str,
    warmup_steps: int,
    total_steps: int,
    weight_decay: float,
) -> Any:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if warmup_steps else learning_rate,
        max_lr=learning_rate,
        min_lr=min_learning_rate,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=max(total_steps, warmup_steps) + (1 if warmup_steps else 0),
        lr_decay_style=schedule,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _fuse(optimizer: Any) -> None:
    """Select the fused kernel of torch's Adam, which is used where Transformer Engine and Apex are absent: it passes
    over memory once, the default ten times, and Megatron does not ask for it."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        for group in (optimizer.defaults, *optimizer.param_groups):
            group["fused"] = True
