"""Seconds of a training step by phase, and what follows: cost, model FLOPs utilisation, where the time goes."""

from __future__ import annotations

from dataclasses import dataclass

from asd_megatron.planner import transfers
from asd_megatron.planner.compute import Cost, optimizer_step
from asd_megatron.planner.loads import Batch, Spread
from asd_megatron.planner.rollout import Generation, generation
from asd_megatron.planner.setting import Setting
from asd_megatron.planner.training import gradient_exchange, optimizer_ranks, pass_time

SERVERS = ("weight_sync", "handover", "rollout")
"""Phases in which the servers work and the trainer waits, unless they overlap."""
COMPUTED = ("teacher", "student", "reference", "update", "optimizer")
"""Phases that `perf/mfu` counts."""


@dataclass(frozen=True)
class Phase:
    """`name` is that of the run's `time/*` metrics; there `optimizer` is part of `update`, `handover` of `rollout`."""

    name: str
    cost: Cost

    @property
    def seconds(self) -> float:
        return self.cost.seconds


@dataclass(frozen=True)
class StepTime:
    """A step of a setting.

    Attributes:
        phases: in the order of a step, those that it does not have left out.
        overlap: whether rollouts are generated while the trainer works.
        gpus, trainer_gpus: all, and those of the trainer. dollars_per_hour: of all.
        model_flops, tokens: of the trainer's passes. peak: FLOP/s of a trainer's GPU, None in float32.
        generated: response tokens.
        rollouts: how they are generated.
    """

    phases: tuple[Phase, ...]
    overlap: bool
    gpus: int
    trainer_gpus: int
    dollars_per_hour: float
    model_flops: float
    tokens: float
    peak: float | None
    generated: float
    rollouts: Generation

    def seconds(self, *names: str) -> float:
        """Of these phases together."""
        return sum(phase.seconds for phase in self.phases if phase.name in names)

    @property
    def training(self) -> float:
        """Seconds of all phases but generation and weight sync."""
        return sum(phase.seconds for phase in self.phases if phase.name not in SERVERS)

    @property
    def total(self) -> float:
        """Seconds of the step. With overlap the longer of generation and training counts, beside the weight sync."""
        servers = self.seconds(*SERVERS)
        if not self.overlap:
            return servers + self.training
        sync = self.seconds("weight_sync")
        return sync + max(servers - sync, self.training)

    @property
    def gpu_hours(self) -> float:
        return self.total * self.gpus / 3600

    @property
    def dollars(self) -> float:
        return self.total / 3600 * self.dollars_per_hour

    @property
    def mfu(self) -> float | None:
        """`perf/mfu` (docs/telemetry.md): model FLOPs over what the trainer's GPUs could do in its passes."""
        seconds = self.seconds(*COMPUTED)
        if self.peak is None or seconds == 0:
            return None
        return self.model_flops / (seconds * self.trainer_gpus * self.peak)

    @property
    def tokens_per_second(self) -> float:
        """Response tokens a second of the complete step, all GPUs together."""
        return self.generated / self.total

    def fractions(self) -> list[tuple[str, float]]:
        """(phase, its part of the step), longest first. With overlap they sum up to more than 1."""
        found = [(phase.name, phase.seconds / self.total) for phase in self.phases]
        return sorted(found, key=lambda item: -item[1])


def step_time(setting: Setting, batch: Batch | None = None) -> StepTime:
    """batch: of the setting's shape and workload, where many layouts share it. Raises UserError for layouts that cannot
    shard the model, and for FP8 on a GPU without it."""
    batch = batch or Batch(setting.shape, setting.workload)
    return assembled(setting, batch, training_phases(setting, batch), generation(setting))


def assembled(setting: Setting, batch: Batch, trained: tuple[Phase, ...], rollouts: Generation) -> StepTime:
    """The step from its trainer's phases and its generation."""
    training, gpu = setting.training, setting.gpu
    cost = rollouts.cost
    before = (
        Phase("weight_sync", transfers.weight_sync(setting)),
        Phase("handover", transfers.handover(setting)),
        Phase("rollout", cost),
        Phase("reward", transfers.reward(setting, rollouts.tokens)),
    )
    peak = gpu.fp8 if training.fp8 else gpu.bfloat16
    return StepTime(
        phases=tuple(phase for phase in (*before, *trained) if phase.seconds > 0),
        overlap=setting.serving.overlap,
        gpus=setting.gpus,
        trainer_gpus=training.layout.world_size,
        dollars_per_hour=gpu.dollars_per_hour * setting.gpus,
        model_flops=batch.model_flops(),
        tokens=batch.tokens(),
        peak=peak if training.dtype == "bfloat16" else None,
        generated=batch.generated(),
        rollouts=rollouts,
    )


def training_phases(setting: Setting, batch: Batch) -> tuple[Phase, ...]:
    """The trainer's own, from the teacher's scoring pass to the checkpoint. They do not depend on the servers."""
    work = setting.workload
    student, teacher = batch.spread(setting.training)
    scored = pass_time(setting, student, update=False) * work.mini_batches if work.student or work.reference else Cost()
    copies = setting.training.copies
    swap = transfers.exchange_copy(setting) if copies else Cost()
    parts = {
        "teacher": pass_time(setting, teacher, update=False) * (work.mini_batches * work.teacher)
        if work.teacher
        else Cost(),
        "student": scored * work.student,
        "reference": (scored + swap) * work.reference,
        "update": pass_time(setting, student, update=True) * work.updates,
        "optimizer": optimizer(setting, student) * work.updates,
        "checkpoint": transfers.checkpoint(setting),
    }
    if work.teacher and copies > work.reference:
        parts["teacher"] += swap
    return tuple(Phase(name, part) for name, part in parts.items())


def optimizer(setting: Setting, student: Spread) -> Cost:
    """An optimizer step: gradients over the data-parallel ranks, Adam, weights back. Its exchange runs beside the last
    pack's backward pass with `overlap_grad_reduce`."""
    own, (dense, experts) = transfers.fullest(setting), optimizer_ranks(setting)
    exchanged = gradient_exchange(setting, own.dense, own.experts)
    if setting.training.overlap_grad_reduce:
        packs = max(student.busiest.packs, 1.0)
        backward = pass_time(setting, student, update=True).seconds / packs * (2 / 3)
        exchanged -= min(exchanged * (2 / 3), backward)  # the gradients' 4 of 6 bytes, not the weights'
    cost = optimizer_step(setting, own.dense, dense) + optimizer_step(setting, own.experts, experts)
    return cost + Cost(communication=exchanged)
