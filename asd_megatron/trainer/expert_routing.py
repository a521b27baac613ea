"""Routing of the student's tokens to experts: what is replayed in its passes, and what the update counts.

With routing replay the student's scoring pass and its updates send each token to the experts that were recorded, with
the router's own present probabilities of these experts. Recorded are

    engine     the experts that the engine sampled the token with, prompt tokens included
    scoring    the experts of the student's scoring pass, for the updates after it

Tokens without a record (the last one of a sequence, padding, what the engine did not return) are routed as usual. A
prefix that several sequences share is routed as in the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.models.port import ModelPort
from asd_megatron.models.routing import UNKNOWN, LoadBalance, MicroBatchRouting, token_weights
from asd_megatron.records import Example
from asd_megatron.trainer.batch import Pack
from asd_megatron.trainer.local_batch import LocalBatch

Replay = Literal["none", "engine", "scoring"]


class StudentRouting:
    """The routing of one batch's student passes, in a model with experts.

    `experts`: int16 [layers, tokens + 1, per_token] on the host, the recorded ones of this data-parallel rank's student
    tokens (`Pack.numbers`), UNKNOWN where there is no record, as in the last row, which padding (number -1) refers to;
    None without replay. A pipeline stage records its own layers.
    """

    def __init__(self, port: ModelPort, process_groups: ProcessGroups, batch: LocalBatch, replay: Replay) -> None:
        assert port.shape.experts is not None
        self._process_groups, self._replay, self._device = process_groups, replay, port.device
        self._sequence_parallel = port.layout.sequence_parallel
        self.experts: Tensor | None = None
        if replay != "none":
            shape = (port.shape.layers, batch.student_tokens + 1, port.shape.experts.per_token)
            self.experts = torch.full(shape, UNKNOWN, dtype=torch.int16)
        if replay == "engine":
            self._read(batch)

    def _read(self, batch: LocalBatch) -> None:
        assert self.experts is not None
        for first, example in zip(batch.first_tokens, batch.examples, strict=False):
            given = example.rollout.routed_experts
            if given is not None:
                self.experts[:, first : first + len(given)] = torch.from_numpy(
                    np.ascontiguousarray(given.transpose(1, 0, 2))
                ).to(torch.int16)

    def scoring(self, pack: Pack) -> MicroBatchRouting:
        """For the student's scoring pass: replays the engine's experts, or records."""
        if self._replay == "scoring":
            return MicroBatchRouting(record=self._record, numbers=pack.numbers)
        return MicroBatchRouting(experts=self._of(pack))

    def replayed(self, pack: Pack) -> MicroBatchRouting:
        """For a scoring pass that repeats an update: replays what the update does."""
        return MicroBatchRouting(experts=self._of(pack))

    def update(self, pack: Pack, balance: LoadBalance, responses: int) -> MicroBatchRouting:
        """For an update whose mini-batch has `responses` response tokens in all."""
        weights = token_weights(pack.rows, len(pack.numbers), responses)
        return MicroBatchRouting(weights, balance, self._of(pack))

    def share(self) -> None:
        """After the scoring pass: what each context- and sequence-parallel rank has recorded of its slices, on all of
        them. Collective over these."""
        if self._replay != "scoring" or self.experts is None:
            return
        groups = [self._process_groups.cp]
        groups += [self._process_groups.tp] if self._sequence_parallel else []
        for group in (g for g in groups if g.size() > 1):
            for layer in self.experts:  # one at a time: collectives know no int16
                wide = layer.to(self._device, torch.int32)
                dist.all_reduce(wide, op=dist.ReduceOp.MAX, group=group)
                layer.copy_(wide)

    def _record(self, layer: int, numbers: Tensor, experts: Tensor) -> None:
        assert self.experts is not None
        numbers, experts = numbers.cpu(), experts.cpu()
        real = numbers >= 0
        self.experts[layer, numbers[real]] = experts[real].to(torch.int16)

    def _of(self, pack: Pack) -> Tensor | None:
        """int64 [layers, T_local, per_token]."""
        if self.experts is None:
            return None
        return self.experts[:, pack.numbers.cpu()].to(self._device, torch.int64)


def returned_fraction(examples: Sequence[Example]) -> float:
    """The fraction of all student tokens whose experts the engine returned."""
    rollouts = [example.rollout for example in examples]
    returned = sum(len(r.routed_experts) for r in rollouts if r.routed_experts is not None)
    return returned / max(1, sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts))
