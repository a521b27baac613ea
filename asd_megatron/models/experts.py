"""The experts of a layer on machines without Transformer Engine: in training, and in the inference forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from asd_megatron.models.attention import MIN_ROWS


def local_experts_class() -> type:
    """Megatron's experts as one MLP after another, each on at least MIN_ROWS tokens, so that a token's numbers do not
    depend on how many others chose its expert."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    class LocalExperts(SequentialMLP):  # type: ignore[misc]
        def forward(
            self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
        ) -> tuple[Tensor, None]:
            counts = tokens_per_expert.tolist()
            tokens, probabilities = permuted_local_hidden_states.split(counts), permuted_probs.split(counts)
            outputs = []
            for expert, x, p in zip(self.local_experts, tokens, probabilities, strict=True):
                output, _ = expert(*_filled(x, p))
                outputs.append(output[: len(x)])
            return torch.cat(outputs), None

    return LocalExperts


def _filled(x: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """An expert's tokens [T, H] and their probabilities [T] with zeros until there are MIN_ROWS."""
    missing = max(0, MIN_ROWS - len(x))
    return F.pad(x, (0, 0, 0, missing)), F.pad(probabilities, (0, missing))


class Expert(NamedTuple):
    """One expert's weights as transposed views: gate_up [hidden, 2 * ffn], down [ffn, hidden]."""

    gate_up: Tensor
    down: Tensor


class ExpertMixture:
    """All experts of one layer, for the inference forward. It repeats Megatron's operations in their order: a token's
    outputs are added up from its first expert to its last."""

    def __init__(self, router: Any, experts: Sequence[Expert], activation: Callable[[Tensor], Tensor]) -> None:
        self._router, self._experts, self._activation = router, experts, activation

    def __call__(self, x: Tensor) -> Tensor:
        """Hidden states [T, H], all of which choose their experts -> [T, H]."""
        probabilities, chosen = self._router(x[:, None])
        out = torch.zeros_like(x)
        for number in chosen.any(0).nonzero()[:, 0].tolist():
            rows = chosen[:, number].nonzero()[:, 0]
            out.index_add_(0, rows, self._expert(self._experts[number], x[rows], probabilities[rows, number]))
        return out

    def _expert(self, expert: Expert, x: Tensor, probabilities: Tensor) -> Tensor:
        count = len(x)
        x, probabilities = _filled(x, probabilities)
        gate, up = torch.mm(x, expert.gate_up).chunk(2, -1)
        inner = (self._activation(gate) * up * probabilities[:, None]).to(x.dtype)
        return torch.mm(inner, expert.down)[:count]


def gathered_experts(experts: Any, group: dist.ProcessGroup | None) -> list[Expert]:
    """All experts of a layer, from Megatron's module of this rank's experts: the live weights, or under expert
    parallelism copies of all ranks'. Collective over the expert-parallel group (None: all experts are here)."""
    own = [(e.linear_fc1.weight.detach(), e.linear_fc2.weight.detach()) for e in experts.local_experts]
    if group is None:
        return [Expert(fc1.t(), fc2.t()) for fc1, fc2 in own]
    found = []
    for part in zip(*own, strict=True):
        mine = torch.stack(part)
        everyone = mine.new_empty((group.size() * len(mine), *mine.shape[1:]))
        dist.all_gather_into_tensor(everyone.view(-1), mine.view(-1), group=group)
        found.append(everyone)
    return [Expert(fc1.t(), fc2.t()) for fc1, fc2 in zip(*found, strict=True)]
