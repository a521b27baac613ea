"""What a rank holds from step to step: weights, gradients, the optimizer's state, copies; on its device and its host.

With N parameters of the rank, of which data parallelism shares n = dense / d + experts / e (d: ranks that hold the same
weights; e: those that hold the same experts; both 1 without the distributed optimizer):

    bfloat16    weights 2 N   gradients 4 N   master weights 4 n   moments 8 n
    moments bfloat16                          2 n                  4 n
    offload host                              host 4 n             host 8 n, gradients on the host 4 n
    float32     weights 4 N   gradients 4 N                        moments 8 n

Megatron's `main_grad` is float32 in each of them (docs/scaling.md, "Memory of the update"). Rajbhandari et al. 2020
(ZeRO) count 16 bytes a parameter in mixed precision where gradients are half; here they are 18 before sharding.
"""

from __future__ import annotations

from dataclasses import dataclass

from asd_megatron.planner.parameters import Parameters
from asd_megatron.planner.setting import BYTES, Training

GRADIENT = 4
FLOAT = 4


@dataclass(frozen=True)
class States:
    """Bytes of one rank with `parameters`."""

    parameters: Parameters
    training: Training

    @property
    def element(self) -> int:
        return BYTES[self.training.dtype]

    @property
    def replicas(self) -> tuple[int, int]:
        """Ranks that hold the same weights, and the same experts."""
        layout = self.training.layout
        return layout.data * layout.context, layout.stage_size // layout.expert

    @property
    def spread(self) -> float:
        """Parameters of this rank's part of a checkpoint, which data-parallel ranks share in any case."""
        dense, experts = self.replicas
        return self.parameters.dense / dense + self.parameters.experts / experts

    @property
    def shard(self) -> float:
        """Parameters that this rank's optimizer updates."""
        return self.spread if self.training.distributed_optimizer else float(self.parameters.total)

    @property
    def weights(self) -> float:
        """FP8 parameters have one byte, and one more for their transpose."""
        return float(self.element * self.parameters.total)

    @property
    def fp8_copies(self) -> float:
        """Of matrices, and of their transposes, that Transformer Engine keeps for all micro-batches of a step."""
        kept = self.training.fp8 and not self.training.fp8_parameters
        return 2.0 * self.parameters.matrices if kept else 0.0

    @property
    def gradients(self) -> float:
        return float(GRADIENT * self.parameters.total)

    @property
    def masters(self) -> float:
        """On the device; with moments in bfloat16 the 16 bits that the weights lack."""
        if self.element == FLOAT or self.training.offload == "host":
            return 0.0
        return (2 if self.training.moments == "bfloat16" else FLOAT) * self.shard

    @property
    def moments(self) -> float:
        """On the device, both."""
        if self.training.offload == "host":
            return 0.0
        return 2 * (2 if self.training.moments == "bfloat16" else FLOAT) * self.shard

    @property
    def optimizer(self) -> float:
        return self.masters + self.moments

    @property
    def host_optimizer(self) -> float:
        """Master weights, moments and gradients of an optimizer in host memory."""
        return 4 * FLOAT * self.shard if self.training.offload == "host" else 0.0

    @property
    def host_copies(self) -> float:
        """Copies of the weights, and room for the live ones while a copy is in place (`models.weight_copies`)."""
        if not self.training.copies:
            return 0.0
        each = self.element * (self.training.copies + 1) + (FLOAT - self.element) * self.training.average
        return float(each * self.parameters.total)

    @property
    def checkpoint(self) -> float:
        """This rank's part of a checkpoint: weights, copies, and float32 master weights and moments."""
        copies = self.element * self.training.copies + (FLOAT - self.element) * self.training.average
        optimizer = 2 * FLOAT + (0 if self.element == FLOAT else FLOAT)
        return (self.element + copies + optimizer) * self.spread
