"""The vocabulary-parallel shard of an LM head, and the collectives that it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's slice of a head whose rows (vocabulary entries) are sharded over `group`.

    Local row r < `rows` gives the logit of token id `start + r`; local rows from `rows` on are padding and may hold
    anything. `group` None: the head is not sharded. With `sequence_parallel`, hidden states arrive as this rank's
    contiguous slice of the token dimension (all slices equally long), and so does their gradient. Every rank's weight
    has the same number of rows, padding included. A vocabulary of 99 on 2 ranks, 50 rows each: rank 0 start 0, rows 50;
    rank 1 start 50, rows 49.
    """

    group: dist.ProcessGroup | None
    start: int
    rows: int
    sequence_parallel: bool = False

    @classmethod
    def of(
        cls,
        vocab_size: int,
        local_rows: int,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> VocabShard:
        """Megatron's sharding: rank r holds ids from r * local_rows on, ids from `vocab_size` on are padding."""
        start = 0 if group is None else group.rank() * local_rows
        return cls(group, start, max(0, min(local_rows, vocab_size - start)), sequence_parallel)

    @property
    def world(self) -> int:
        return 1 if self.group is None else self.group.size()

    def gather_tokens(self, hidden: Tensor) -> Tensor:
        """All-gather [T_local, H] to [T, H] under sequence parallelism; otherwise `hidden` itself."""
        if not self.sequence_parallel or self.world == 1:
            return hidden
        gathered = hidden.new_empty((self.world * hidden.shape[0], *hidden.shape[1:]))
        if gathered.numel():
            dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=self.group)
        return gathered

    def gather_ranks(self, values: Tensor) -> Tensor:
        """All-gather [...] to [ranks, ...]."""
        if self.world == 1:
            return values[None]
        out = values.new_empty((self.world, *values.shape))
        if out.numel():
            dist.all_gather_into_tensor(out.view(-1), values.contiguous().view(-1), group=self.group)
        return out

    def reduce_hidden_gradient(self, gradient: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
        """Sum the ranks' partial gradients [N, H] and put them at `rows` of the `tokens` tokens.

        Returns [T_local, H], zero where no row points. The sum is in the gradient's dtype, as in Megatron's own
        linear layers.
        """
        scatter = self.sequence_parallel and self.world > 1
        if self.world > 1 and not scatter and gradient.numel():
            dist.all_reduce(gradient, group=self.group)
        if rows is not None:
            gradient = gradient.new_zeros((tokens, gradient.shape[1])).index_add_(0, rows, gradient)
        return self._reduce_scatter(gradient) if scatter else gradient

    def _reduce_scatter(self, gradient: Tensor) -> Tensor:
        assert self.group is not None
        local = gradient.shape[0] // self.world
        out = gradient.new_empty((local, gradient.shape[1]))
        if not out.numel():
            return out
        if dist.get_backend(self.group) == "gloo":  # not every release has reduce_scatter_tensor
            dist.all_reduce(gradient, group=self.group)
            start = self.group.rank() * local
            return out.copy_(gradient[start : start + local])
        dist.reduce_scatter_tensor(out, gradient, group=self.group)
        return out


def merge_softmax(maximum: Tensor, total: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax statistics of the parts of a vocabulary [parts, n] to those of the complete vocabulary [n].

    Of one part's logits z: maximum m, total sum(e^(z - m)), moment sum(e^(z - m) (z - m)). An empty part has m = -inf.
    From the result: logsumexp = m + log total, entropy = log total - moment / total.
    """
    top = maximum.amax(0)
    shift = torch.where(maximum == -torch.inf, 0.0, maximum - top)
    scale = torch.where(maximum == -torch.inf, 0.0, shift.exp())
    return top, (total * scale).sum(0), ((moment + total * shift) * scale).sum(0)
