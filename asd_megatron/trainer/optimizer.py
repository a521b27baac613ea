"""Megatron's AdamW with its learning-rate schedule and gradient clipping, behind three plain functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepResult:
    """`applied` is False for an update that was left out: weights and optimizer state are untouched then."""

    grad_norm: float
    applied: bool


class Optimizer:
    """Megatron's (chained) optimizer and scheduler over a port's DDP-wrapped chunks.

    The steps are Megatron's own; they are called one by one because Megatron's `step` would apply a non-finite gradient
    in float32.

    The learning rate of update n (from 1): n / warmup_steps of `learning_rate` during the warm-up, all of it at its end
    (without a warm-up: at update 1), from there down to `min_learning_rate`, which the update after `total_steps` would
    have. An update that is left out takes its place in the schedule.
    """

    def __init__(
        self,
        port: Any,
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
    ) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        half = port.dtype is not torch.float32
        config = OptimizerConfig(
            optimizer="adam",
            lr=learning_rate,
            min_lr=min_learning_rate,
            weight_decay=weight_decay,
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_eps=epsilon,
            clip_grad=clip_grad,
            use_distributed_optimizer=distributed,
            bf16=half,
            params_dtype=port.dtype,
            log_num_zeros_in_grad=False,
        )
        self.port = port
        self.clip_grad = clip_grad
        self.megatron = get_megatron_optimizer(config, port.chunks, use_gloo_process_groups=False)
        for part in self._parts():
            _one_pass(part.optimizer)
        self.scheduler = OptimizerParamScheduler(
            self.megatron,
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
        # Megatron's scheduler starts at step 0 of the warm-up, whose rate is 0: the first update has step 1's.
        self._first = 1 if warmup_steps else 0
        self.seek(0)
        self._homes: list[torch.device] = []  # where offloaded tensors came from

    @property
    def learning_rate(self) -> float:
        """Of the update to come; `last_learning_rate` is that of the update just made."""
        return float(self.megatron.param_groups[0]["lr"])

    def seek(self, updates: int) -> None:
        """Put the schedule where `updates` updates, applied or skipped, have been made. A resumed run calls it with the
        updates that its finished steps have under the recipe at hand, so that its progress decides the learning rate,
        not the number of updates that earlier settings made."""
        self.scheduler.num_steps = updates + self._first
        self.scheduler.step(0)
        self.last_learning_rate = self.learning_rate

    def zero_grad(self) -> None:
        for chunk in self.port.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def offload(self) -> None:
        """Move the optimizer's own tensors to host memory: its moments and, where they are not the model's weights
        themselves, the float32 master weights. `reload` must follow before anything else is done with it."""
        self._homes = self._move(itertools.repeat(torch.device("cpu")))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Move them back to where they were."""
        self._move(iter(self._homes))
        self._homes = []

    def _move(self, targets: Iterator[torch.device]) -> list[torch.device]:
        """Each tensor to the next device of `targets`; returns where they were."""
        homes = []

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            homes.append(tensor.device)
            return tensor.to(next(targets))

        for part in self._parts():
            for state in part.optimizer.state.values():
                state.update({k: moved(v) for k, v in state.items() if isinstance(v, torch.Tensor)})
            if self.port.dtype is not torch.float32:
                for group in part.optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.data = moved(parameter.data)
        return homes

    def _parts(self) -> list[Any]:
        """The optimizers of the chain that hold parameters."""
        chain = getattr(self.megatron, "chained_optimizers", [self.megatron])
        return [part for part in chain if not getattr(part, "is_stub_optimizer", False)]

    @torch.no_grad()
    def step(self, *, loss: float = 0.0) -> StepResult:
        """Clip to the global gradient norm and update, then advance the schedule. Collective over all ranks.

        The update is left out when the gradient norm or `loss`, the same on every rank, is not finite.
        """
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        self.last_learning_rate = self.learning_rate
        found_inf = self.megatron.prepare_grads()
        norm = float("nan") if found_inf else float(self.megatron.get_grad_norm())
        applied = math.isfinite(norm) and math.isfinite(loss)
        if applied:
            if self.clip_grad > 0:
                for part in self._parts():
                    parameters = part.get_parameters()
                    if parameters:
                        clip_grad_by_total_norm_fp32(parameters, max_norm=self.clip_grad, total_norm=norm)
            self.megatron.step_with_ready_grads()
        self.scheduler.step(1)
        return StepResult(norm, applied)


def _one_pass(optimizer: Any) -> None:
    """Let torch's own Adam, used where Transformer Engine and Apex are not, update each tensor in one pass over memory:
    Megatron does not ask for it, and the default makes ten."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        for group in (optimizer.defaults, *optimizer.param_groups):
            group["fused"] = True
