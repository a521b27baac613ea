"""The student's update: one forward-backward yields s_t, u_t, the advantage, the loss and the gradient (Algorithm 1,
line 11)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.ops.vocab_head import linear_logprob, linear_token_loss
from asd_megatron.trainer import schedule, token_method
from asd_megatron.trainer.align import TokenColumns, gather_rows
from asd_megatron.trainer.batch import Pack
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.pass_plan import PassPlan
from asd_megatron.trainer.sft import sum_over_ranks
from asd_megatron.trainer.token_method import Columns, Method, Sums

ON_POLICY = ("student_logprobs", "student_entropy", "pmi", "term", "advantage", "clipped")


@dataclass(frozen=True)
class UpdateStats:
    """Of all optimizer steps of one batch. `columns` are whole on every rank of the model-parallel group; the numbers
    in them are those under the weights before the first update (`clipped`: in any of the updates)."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    applied: tuple[bool, ...]
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def grad_norm(self) -> float:
        return max(self.grad_norms)


def update(
    port: Any,
    process_groups: Any,
    optimizer: Any,
    batch: LocalBatch,
    inputs: Columns,
    *,
    method: Method,
    plan: PassPlan,
    lam: float,
    temperature: float,
    epochs: int = 1,
    scored: Columns | None = None,
) -> UpdateStats:
    """Train the batch: one optimizer step for each mini-batch and epoch. Collective over all ranks.

    Args:
        inputs: of `token_inputs`, plus `teacher_logprobs` [N] when the teacher was scored.
        lam: this step's lambda.
        scored: `student_logprobs` and `student_entropy` [N] of a scoring pass, when the plan has one: u, the term, the
            advantage and the importance weights are then frozen before the first update.
    """
    frozen: dict[str, Tensor] = {}
    if scored is not None:
        student = scored["student_logprobs"]
        frozen = token_method.frozen_columns(inputs, student, method, lam, batch.table.rollouts, process_groups.dp)
        frozen |= dict(scored)
    elif len(batch.shares) > 1 or epochs > 1:
        raise ValueError("several updates of one batch need a scoring pass of the student first (see pass_plan)")
    columns = {**inputs, **frozen}
    names = ON_POLICY if method.importance_cap is None else ON_POLICY + token_method.IMPORTANCE
    out = TokenColumns(names, batch.table.tokens, port.device)
    losses, norms, applied = [], [], []
    clipped_ever = torch.zeros(batch.table.tokens, device=port.device)
    for _ in range(epochs):
        for m in range(len(batch.shares)):
            loss = _PackLoss(
                port, process_groups, columns, out, method, lam, temperature, batch.table.rollouts, plan.head
            )
            optimizer.zero_grad()
            shares = schedule.forward_backward(port, batch.student_packs(m), loss)
            losses.append(sum_over_ranks(shares, process_groups, port.device))
            result = optimizer.step(loss=losses[-1])
            norms.append(result.grad_norm)
            applied.append(result.applied)
            clipped_ever = torch.maximum(clipped_ever, out.values[ON_POLICY.index("clipped")])
    out.values[ON_POLICY.index("clipped")] = clipped_ever
    final = out.share(cp=process_groups.cp, pp=process_groups.pp)
    return UpdateStats(tuple(losses), tuple(norms), tuple(applied), {**final, **frozen})


@dataclass
class _PackLoss:
    """The loss of one pack on the last pipeline stage; fills `out` on the way."""

    port: Any
    process_groups: Any
    columns: Columns
    out: TokenColumns
    method: Method
    lam: float
    temperature: float
    rollouts: int
    head: str

    def __call__(self, pack: Pack, hidden: Tensor) -> Tensor:
        rows = gather_rows(self.columns, pack)
        weight, shard = self.port.head_weight(), self.port.head_shard()
        if self.head == "two_phase":
            logprobs, entropy = linear_logprob(
                hidden, weight, pack.targets, shard, rows=pack.rows, temperature=self.temperature
            )
            return self._loss(rows, pack.flat, logprobs, entropy, self._sums(rows, logprobs))

        def token_loss(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
            part = {name: column[block] for name, column in rows.items()}
            return self._loss(part, pack.flat[block], logprobs, entropy, token_method.NO_SUMS)

        return linear_token_loss(
            hidden, weight, pack.targets, token_loss, shard, rows=pack.rows, temperature=self.temperature
        )[0]

    def _sums(self, rows: Columns, logprobs: Tensor) -> Sums:
        sums = token_method.local_sums(rows, logprobs.detach(), self.method, self.rollouts)
        for part in sums:
            if part is not None and self.process_groups.cp.size() > 1:
                dist.all_reduce(
                    part, group=self.process_groups.cp
                )  # a rollout's rows lie on several context-parallel ranks
        return sums

    def _loss(self, rows: Columns, flat: Tensor, logprobs: Tensor, entropy: Tensor, sums: Sums) -> Tensor:
        old = rows["student_logprobs"] if "student_logprobs" in rows else logprobs.detach()
        found: dict[str, Tensor]
        if "advantage" in rows:
            found = {name: rows[name] for name in ("advantage", *token_method.IMPORTANCE) if name in rows}
        else:
            found = token_method.advantages(rows, old, self.method, self.lam, statistics=sums.term)
            found |= token_method.importance(rows, old, self.method, sums.ratio)
        loss, clipped = token_method.policy_loss(rows, logprobs, old, found, self.method)
        self.out.put(
            flat, {"student_logprobs": old, "student_entropy": entropy.detach(), "clipped": clipped.float(), **found}
        )
        return loss
