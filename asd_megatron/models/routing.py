"""The routers of a mixture of experts: what they are told about a micro-batch, and the balance of the load over the
experts with its auxiliary loss.

The auxiliary loss of one layer is E * sum_i f_i P_i over its E experts: f_i is expert i's fraction of all choices, P_i
the mean of its router probability, both over the response tokens of the global mini-batch (1 when all experts get
equally many). Only P_i has a gradient. f_i is known when all micro-batches have run and their gradients exist, so the
gradient takes the f_i of the update before: it is then a sum over tokens with global denominators, which depends on no
split into micro-batches and no placement. The first update has none: all f_i equal have no gradient.

The training loss gets the coefficient times the sum over the layers, as in Megatron; reports give the mean of the
layers. (`transformers` averages over the layers, and its value is the experts of a token, not 1, when the load is
balanced.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.models.compat import prepare_routers

UNKNOWN = -1
"""In place of a replayed expert: the router chooses."""


@dataclass(frozen=True)
class LoadReport:
    """The load of one update, or several: float64 [layers, experts] each, on the CPU.

    `tokens`: choices of each expert by the counted tokens. `probabilities`: mean router probabilities of these tokens.
    """

    tokens: Tensor
    probabilities: Tensor

    @property
    def fractions(self) -> Tensor:
        """Each expert's fraction of its layer's choices: [layers, experts]; uniform where there were none."""
        total = self.tokens.sum(1, keepdim=True)
        return torch.where(total > 0, self.tokens / total.clamp_min(1), 1.0 / self.tokens.shape[1])

    @property
    def auxiliary_loss(self) -> float:
        """E * sum_i f_i P_i, averaged over the layers; 1 when the load is balanced."""
        return float((self.fractions * self.probabilities).sum(1).mean()) * self.tokens.shape[1]

    @property
    def entropy(self) -> Tensor:
        """Entropy of the fractions over its maximum, log(experts): [layers], 1 when balanced."""
        f = self.fractions
        return torch.special.entr(f).sum(1) / torch.log(torch.tensor(float(max(f.shape[1], 2)), dtype=f.dtype))


class LoadBalance:
    """Counts the load of an update and adds the auxiliary loss's gradient to it.

    coefficient: of the auxiliary loss; 0: it is measured alone. `fractions`, float32 [layers, experts]: the f_i of the
    update before, on the model's device.
    """

    def __init__(self, layers: int, experts: int, coefficient: float, device: torch.device) -> None:
        self.coefficient = coefficient
        self.fractions = torch.full((layers, experts), 1.0 / experts, device=device)
        self._sums = torch.zeros(2, layers, experts, dtype=torch.float64, device=device)

    def start(self) -> None:
        """Before the first micro-batch of an update."""
        self._sums.zero_()

    def attach(self, layer: int, probabilities: Tensor, chosen: Tensor, weights: Tensor, routed: Tensor) -> Tensor:
        """Count one micro-batch of one layer, and return `routed`, through which the auxiliary loss's gradient flows.

        probabilities: float32 [T, experts], of the complete softmax. chosen: bool [T, experts]. weights: float32 [T],
        each token's fraction of the counted tokens: they sum to 1 over all micro-batches and ranks.
        """
        with torch.no_grad():
            w = weights.double()
            self._sums[0, layer] += w @ chosen.double()
            self._sums[1, layer] += w @ probabilities.double()
        if self.coefficient == 0:
            return routed
        experts = probabilities.shape[1]
        loss = self.coefficient * experts * (weights @ probabilities @ self.fractions[layer])
        return _WithLoss.apply(routed, loss)

    def finish(self, tokens: int, group: dist.ProcessGroup) -> LoadReport:
        """After the last micro-batch: the load over all ranks, whose fractions the next update's gradient takes.

        tokens: the counted ones of all ranks. group: all ranks; each has counted its own tokens in its own layers.
        """
        sums = self._sums.clone()
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
        report = LoadReport((sums[0] * tokens).cpu(), sums[1].cpu())
        if tokens:
            self.fractions.copy_(report.fractions)
        return report


class _WithLoss(torch.autograd.Function):
    """The first argument, with the second, a scalar, as part of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.scalar = loss.new_ones(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, ctx.scalar


@dataclass
class MicroBatchRouting:
    """What the routers of one micro-batch are told. T counts the tokens of this rank's slice.

    Attributes:
        weights: float32 [T], each token's fraction of the counted tokens (`LoadBalance.attach`).
        balance: where they are counted; None: nowhere.
        experts: int64 [layers, T, per_token], the experts to take instead of choosing some; UNKNOWN where the router
            chooses. None: it chooses everywhere.
        record: called with (layer, numbers, experts int64 [T, per_token]) for every layer of this rank.
        numbers: int64 [T], what `record` is told to know the tokens by.
    """

    weights: Tensor | None = None
    balance: LoadBalance | None = None
    experts: Tensor | None = None
    record: Callable[[int, Tensor, Tensor], None] | None = field(default=None, repr=False)
    numbers: Tensor | None = None

    def sliced(self, rank: int, ranks: int) -> MicroBatchRouting:
        """That of slice `rank` of `ranks` equal ones, of the tokens (sequence parallelism)."""
        if ranks == 1:
            return self
        weights = None if self.weights is None else self.weights.chunk(ranks)[rank]
        numbers = None if self.numbers is None else self.numbers.chunk(ranks)[rank]
        experts = None if self.experts is None else self.experts.chunk(ranks, 1)[rank]
        return MicroBatchRouting(weights, self.balance, experts, self.record, numbers)


class _Choice:
    """Megatron's interface for routing replay: chooses the experts of one layer's tokens."""

    def __init__(self, micro_batch: MicroBatchRouting, layer: int) -> None:
        self._micro_batch, self._layer = micro_batch, layer

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """scores [T, experts]. Returns the chosen ones' scores and their numbers, [T, topk] each."""
        assert default_compute_topk is not None
        values, experts = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self._micro_batch.experts is not None:
            given = self._micro_batch.experts[self._layer]
            experts = torch.where(given == UNKNOWN, experts, given)
            values = scores.gather(1, experts)
        if self._micro_batch.record is not None:
            assert self._micro_batch.numbers is not None
            self._micro_batch.record(self._layer, self._micro_batch.numbers, experts)
        return values, experts


def router_class() -> type:
    """Megatron's top-k router that replays, records and counts as its `MicroBatchRouting` says. (A function: importing
    Megatron replaces CUDA's functions first.)"""
    from megatron.core.transformer.moe.router import TopKRouter

    prepare_routers()

    class Router(TopKRouter):  # type: ignore[misc]
        micro_batch: MicroBatchRouting | None = None

        def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            micro_batch, layer = self.micro_batch, self.layer_number - 1
            self.router_replay = None if micro_batch is None else _Choice(micro_batch, layer)
            routed, chosen = super().routing(logits, *args, **kwargs)
            self.router_replay = None
            # With activation recomputation the first forward has no gradients: each token is counted once.
            if micro_batch is not None and micro_batch.balance is not None and torch.is_grad_enabled():
                assert micro_batch.weights is not None
                probabilities = torch.softmax(logits.view(chosen.shape), -1, dtype=torch.float32)
                routed = micro_batch.balance.attach(layer, probabilities, chosen, micro_batch.weights, routed)
            return routed, chosen

    return Router


def token_weights(rows: Tensor, tokens: int, total: int) -> Tensor:
    """The weights of a pack's tokens: float32 [tokens]. rows: int64, the places that predict a response token, with
    repetitions where several responses follow one place. total: their number over all packs and ranks."""
    weights = torch.zeros(tokens, device=rows.device)
    if len(rows):
        weights.index_add_(0, rows, torch.full((len(rows),), 1.0 / total, device=rows.device))
    return weights


def combined(reports: Sequence[LoadReport]) -> LoadReport:
    """The load of several updates together; probabilities are averaged by their tokens."""
    if len(reports) == 1:
        return reports[0]
    tokens = torch.stack([r.tokens for r in reports])
    weight = tokens.sum((1, 2)).clamp_min(1e-300)[:, None, None]
    probabilities = (torch.stack([r.probabilities for r in reports]) * weight).sum(0) / weight.sum(0)
    return LoadReport(tokens.sum(0), probabilities)
