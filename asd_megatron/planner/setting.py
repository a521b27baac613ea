"""The planner's input: a model, what a step computes, how trainer and servers are laid out, and on which hardware."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from asd_megatron.distributed.layout import Layout
from asd_megatron.models.family import ModelShape
from asd_megatron.models.gpt import NO_RECOMPUTE, Recompute
from asd_megatron.models.layers import CoreAttention
from asd_megatron.planner.hardware import Accelerator

Dtype = Literal["bfloat16", "float32"]
BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Lengths:
    """Lengths of responses in tokens: log-normal with this median and spread, cut off at `most`.

    spread is the standard deviation of the logarithm: 0 makes all lengths equal; 0.8 has 5% of responses beyond 3.7
    medians.
    """

    median: float
    most: int
    spread: float = 0.8


@dataclass(frozen=True)
class Workload:
    """One training step. Tokens are means of a sequence.

    Attributes:
        problems, samples: rollouts of a step are problems x samples.
        prompt: of the student's prompt.
        responses: lengths of responses.
        privileged: of the teacher's prompt beyond the student's: demonstration and feedback.
        teacher, student, reference: forward passes of scoring over the batch (`PassPlan`).
        updates: optimizer steps of a batch, of all epochs. epochs: passes over the batch, of forward and backward.
        recomputed_head: forward passes of the head in the backward pass, beside the first (0, or 1: "two_phase").
        exact: whether the teacher's hidden states are kept from scoring to update (`estimator: full_vocabulary`).
        steps: of the complete run. checkpoint_every: steps from one checkpoint to the next; 0: none.
    """

    problems: int
    samples: int
    prompt: float
    responses: Lengths
    privileged: float
    teacher: int = 1
    student: int = 0
    reference: int = 0
    updates: int = 1
    epochs: int = 1
    recomputed_head: int = 0
    exact: bool = False
    steps: int = 200
    checkpoint_every: int = 20

    @property
    def rollouts(self) -> int:
        return self.problems * self.samples

    @property
    def mini_batches(self) -> int:
        """Parts of the batch, each with an optimizer step in every epoch."""
        return max(self.updates // self.epochs, 1)


@dataclass(frozen=True)
class Training:
    """How the trainer's ranks hold and compute the model.

    Attributes:
        layout: sizes of every kind of parallelism; layout.world_size is the trainer's number of GPUs.
        layers: implementation, `te` or `local`; they save different activations.
        attention: the layers' own, or FlexAttention (`models.compat.resolve_attention`).
        pack: tokens of a micro-batch at most (a longer sequence has its own).
        distributed_optimizer, overlap_grad_reduce, moments, offload: as the recipe's keys.
        copies: copies of the weights in host memory (initial weights, moving average).
        average: whether one of them is the moving average, which is float32.
        expert_load: choices of the busiest expert-parallel rank's experts over the mean, of a micro-batch.
        fp8: whether linear layers of the update compute in FP8; fp8_scores: of scoring passes too; fp8_parameters.
        async_save: whether checkpoints are written from a copy in host memory.
        teacher_states: where the teacher's hidden states wait with `Workload.exact`.
    """

    layout: Layout
    dtype: Dtype = "bfloat16"
    layers: Literal["te", "local"] = "te"
    attention: CoreAttention = "own"
    recompute: Recompute = NO_RECOMPUTE
    pack: int = 16384
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    moments: Literal["float32", "bfloat16"] = "float32"
    offload: Literal["none", "host"] = "none"
    copies: int = 0
    average: bool = False
    expert_load: float = 1.25
    fp8: bool = False
    fp8_scores: bool = False
    fp8_parameters: bool = False
    async_save: bool = False
    teacher_states: Literal["device", "host"] = "device"


@dataclass(frozen=True)
class Serving:
    """The rollout engine.

    Attributes:
        engine: `sglang` servers or the `embedded` engine on the trainer's own ranks.
        servers, tensor_parallel: how many servers, and the GPUs of each.
        colocated: servers share the trainer's GPUs, in turns; else they have GPUs of their own.
        offload_optimizer: colocated: the optimizer's state is in host memory meanwhile.
        overlap: rollouts of step k + 1 are generated while step k trains.
        memory_fraction: of a GPU's memory that a server takes for weights and KV cache (SGLang's
            mem-fraction-static).
        fp8: whether servers hold matrices in FP8.
        requests: responses in flight on one server at most.
        bucket_mib, transport, verify, full_every: of the weight sync.
    """

    engine: Literal["sglang", "embedded"] = "sglang"
    servers: int = 1
    tensor_parallel: int = 1
    colocated: bool = False
    offload_optimizer: bool = False
    overlap: bool = False
    memory_fraction: float = 0.85
    fp8: bool = False
    requests: int = 256
    bucket_mib: int = 512
    transport: Literal["distributed", "cuda_ipc", "disk"] = "distributed"
    verify: bool = True
    full_every: int = 1

    @property
    def gpus(self) -> int:
        """GPUs that servers have beside the trainer's."""
        return 0 if self.colocated or self.engine == "embedded" else self.servers * self.tensor_parallel


@dataclass(frozen=True)
class Setting:
    """All that memory and time depend on."""

    shape: ModelShape
    training: Training
    serving: Serving
    workload: Workload
    gpu: Accelerator
    reserve_gib: float = field(default=1.0)
    """Memory of every GPU that is left free: fragments, and what nobody has counted."""

    @property
    def gpus(self) -> int:
        return self.training.layout.world_size + self.serving.gpus

    def with_layout(self, layout: Layout) -> Setting:
        return replace(self, training=replace(self.training, layout=layout))
