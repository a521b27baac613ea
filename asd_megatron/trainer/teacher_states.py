"""The teacher's last hidden states at the response positions, kept from its scoring pass for the update's head.

The exact divergence needs the teacher's complete distribution of every response token. Its hidden states [N, H] are
kept instead of its logits [N, V]; the head computes the logits from them, tile by tile.

Each tensor-parallel rank keeps H / tp of every row, whatever the sequence parallelism. Where the student's context
parallelism puts a token on another rank than the teacher's, `bring` sends the row there:

    context-parallel rank   0           1
    scored by the teacher   rows 0 3    rows 1 2     `put`
    in the student's packs  rows 0 1    rows 2 3     `bring`: 0 sends row 3, 1 sends row 1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.models.port import ModelPort
from asd_megatron.ops.vocab_divergence import TeacherHidden
from asd_megatron.trainer.batch import Pack


class TeacherStates:
    """Of one data-parallel rank's tokens, for one batch, on the last pipeline stage; elsewhere empty.

    Rows without privileged context have none: `at` gives zeros.
    """

    def __init__(self, port: ModelPort, process_groups: ProcessGroups, tokens: int, *, on_host: bool = False) -> None:
        """`tokens`: rows of the rank's token table. `on_host`: keep the rows in host memory (pinned on CUDA)."""
        self.port, self.cp = port, process_groups.cp
        self.tp_rank, self.tp_size = process_groups.tp.rank(), process_groups.tp.size()
        self.width = -(-port.config.hidden_size // self.tp_size)  # of this rank's part, the last one padded with zeros
        self.memory = torch.device("cpu") if on_host else port.device
        self.head: Tensor | None = None
        self._place = torch.full((tokens,), -1, dtype=torch.int64)  # of a table row in `_rows`; -1: not here
        self._parts: list[Tensor] = []
        self._rows = torch.empty(0, self.width, dtype=port.dtype, device=self.memory)

    def put(self, pack: Pack, hidden: Tensor) -> None:
        """Keep the rows of one of the teacher's packs; `hidden` as for `schedule.forward`. Collective over the
        tensor-parallel group under sequence parallelism."""
        selected = self.port.head_shard().gather_tokens(hidden)[pack.rows]  # [n, H]
        part = selected[:, self.tp_rank * self.width : (self.tp_rank + 1) * self.width]
        part = torch.nn.functional.pad(part, (0, self.width - part.shape[1]))
        held = sum(len(p) for p in self._parts)
        self._place[pack.flat.cpu()] = torch.arange(held, held + len(part))
        self._parts.append(part.to(self.memory))

    def keep_head(self) -> None:
        """Copy this rank's shard of the head: further updates of the batch change the live one, and the teacher's
        distribution stays that of the scoring weights."""
        if self.port.is_last_stage:
            self.head = self.port.head_weight().detach().clone()

    def bring(self, packs: Sequence[Pack]) -> None:
        """Exchange rows so that this rank has those of the tokens in `packs`, its student packs of the complete batch.
        Collective over the context-parallel group of the last stage; call after all `put`; may be repeated."""
        if not self.port.is_last_stage:
            return
        self._rows = torch.cat([self._rows, *self._parts])
        self._parts.clear()
        if self.cp.size() > 1:
            self._exchange(packs)
        if self.memory != self.port.device:  # a GPU's rows on the host
            self._rows = self._rows.pin_memory()

    def _exchange(self, packs: Sequence[Pack]) -> None:
        """Rows to the context-parallel ranks whose student packs hold their tokens."""
        me, device = self.cp.rank(), self.port.device
        holder = torch.where(self._place >= 0, me, -1)
        user = torch.full_like(holder, -1)
        for pack in packs:
            user[pack.flat.cpu()] = me
        both = torch.stack([holder, user]).to(device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.cp)
        holder, user = both.cpu()
        # Both sides count the rows that go from one rank to another in the order of the table.
        send = [((holder == me) & (user == r)).nonzero()[:, 0] for r in range(self.cp.size())]
        receive = [((holder == r) & (user == me)).nonzero()[:, 0] for r in range(self.cp.size())]
        outgoing = self._rows[self._place[torch.cat(send)].to(self.memory)].to(device)
        incoming = outgoing.new_empty(sum(map(len, receive)), self.width)
        dist.all_to_all_single(incoming, outgoing, [*map(len, receive)], [*map(len, send)], group=self.cp)
        self._rows = incoming.to(self.memory)
        self._place.fill_(-1)
        self._place[torch.cat(receive)] = torch.arange(len(incoming))

    def at(self, flat: Tensor) -> TeacherHidden:
        """The rows of the table at `flat`, block by block, for the head: [n, H] on every tensor-parallel rank."""
        places = self._place[flat.cpu()]
        shard = self.port.head_shard()

        def rows(block: slice) -> Tensor:
            place = places[block]
            part = self._rows.new_zeros(len(place), self.width)
            has = place >= 0
            part[has.to(self.memory)] = self._rows[place[has].to(self.memory)]
            parts = shard.gather_ranks(part.to(self.port.device, non_blocking=True))  # [tp, n, H / tp]
            return parts.transpose(0, 1).flatten(1)[:, : self.port.config.hidden_size]

        return rows

    def drop(self) -> None:
        """Free the memory: the batch has been trained."""
        self._rows = self._rows.new_empty(0, self.width)
        self._place.fill_(-1)
        self._parts.clear()
        self.head = None
