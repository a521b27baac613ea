"""Transfers between pipeline stages whose shapes every stage knows, without an exchange before each of them.

Packs differ in length. Megatron's schedules would then send the shape of every tensor ahead of it and wait for the
device, because the host has to read the shape: no stage could launch work in advance. But every stage has all packs of
a call in their order and the schedules are deterministic, so that each stage knows what it receives next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from asd_megatron.distributed.layout import ProcessGroups

Shape = list[int]


@dataclass
class KnownShapes:
    """Stands in for `P2PCommunicator._communicate_shapes`: the shapes of the tensors that one stage receives, in order.

    With one chunk a stage, activations and gradients arrive in the order of the packs. With virtual stages a round of
    as many packs as there are stages passes through all chunks before the next round. Packs 0 to 3, 2 stages of 2
    chunks:

        activations at the second stage    0 1 | 0 1 | 2 3 | 2 3
        activations at the first stage     0 1 | 2 3               its first chunk reads the packs themselves

    Gradients arrive in the same order, at the last stage once less.
    """

    activations: deque[Shape]
    gradients: deque[Shape]

    @classmethod
    def of(cls, packs: Sequence[Shape], *, stage: int, stages: int, chunks: int, backward: bool) -> KnownShapes:
        """packs: the shapes of their hidden states on this rank. stage: this rank's. chunks: of each stage. backward:
        whether gradients are sent. Raises ValueError for virtual stages without complete rounds of packs."""
        size = stages if chunks > 1 else max(len(packs), 1)
        if len(packs) % size:
            raise ValueError(f"{len(packs)} packs make no complete rounds of {stages} pipeline stages")
        rounds = [packs[first : first + size] for first in range(0, len(packs), size)]

        def arriving(passes: int) -> deque[Shape]:
            return deque(shape for packs_of_round in rounds for _ in range(passes) for shape in packs_of_round)

        return cls(arriving(chunks - (stage == 0)), arriving(chunks - (stage == stages - 1) if backward else 0))

    def __call__(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape, Shape]:
        """(of the activations from the stage before, of the gradients from the stage after), with Megatron's arguments.
        Of what does not arrive the shape means nothing. Raises IndexError when nothing more should arrive."""
        return (
            self.activations.popleft() if recv_prev else [0, 0, 0],
            self.gradients.popleft() if recv_next else [0, 0, 0],
        )

    def finish(self) -> None:
        """Raises RuntimeError when less arrived than should have: this release of Megatron has another schedule."""
        if self.activations or self.gradients:
            raise RuntimeError(
                f"the pipeline schedule did not receive {len(self.activations)} activations and {len(self.gradients)}"
                " gradients that this stage should have: this version of megatron-core is not supported"
            )


def communicator(config: Any, process_groups: ProcessGroups, shapes: KnownShapes) -> dict[str, Any]:
    """The arguments by which one of Megatron's pipeline schedules transfers tensors of `shapes`. config: Megatron's
    TransformerConfig, with `variable_seq_lengths`."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection

    found = P2PCommunicator(pp_group=process_groups.pp, config=config)
    found._communicate_shapes = shapes
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp", "dp_cp", "embd", "pos_embd"])
    return {"p2p_communicator": found, "pg_collection": groups}
