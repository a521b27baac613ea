"""The student's update: one forward-backward yields s_t, u_t, the advantage, the loss and the gradient (Algorithm 1,
line 11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.models.port import ModelPort
from asd_megatron.models.routing import LoadBalance, LoadReport, combined
from asd_megatron.models.weight_copies import WeightCopies
from asd_megatron.ops.vocab_divergence import linear_divergence_loss
from asd_megatron.ops.vocab_head import TokenLoss, linear_logprob, linear_token_loss
from asd_megatron.trainer import schedule, token_method
from asd_megatron.trainer.align import share_columns
from asd_megatron.trainer.batch import Pack
from asd_megatron.trainer.columns import Divergences, LossInputs, Scores, TokenInputs, UpdateColumns
from asd_megatron.trainer.expert_routing import StudentRouting
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.optimizer import Optimizer, StepResult
from asd_megatron.trainer.pass_plan import Head, PassPlan
from asd_megatron.trainer.sft import sum_over_ranks
from asd_megatron.trainer.teacher_states import TeacherStates
from asd_megatron.trainer.token_method import ExactTerm, Method, Sums


@dataclass(frozen=True)
class UpdateStats:
    """The results of all optimizer steps of one batch, in order. `grad_norms` are global L2 norms before clipping;
    `applied` is False for a step that was skipped because its loss or gradient was not finite."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    applied: tuple[bool, ...]
    columns: UpdateColumns
    load: LoadReport | None = None  # of the experts, in a model that has some

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def grad_norm(self) -> float:
        return max(self.grad_norms)


def update(
    port: ModelPort,
    process_groups: ProcessGroups,
    optimizer: Optimizer,
    batch: LocalBatch,
    inputs: TokenInputs,
    *,
    teacher: Scores | None,
    student: Scores | None,
    method: Method,
    plan: PassPlan,
    lam: float | Tensor,
    temperature: float,
    epochs: int = 1,
    states: TeacherStates | None = None,
    reference: Scores | None = None,
    old: Tensor | None = None,
    copies: WeightCopies | None = None,
    routing: StudentRouting | None = None,
    balance: LoadBalance | None = None,
) -> UpdateStats:
    """Train on the batch: one optimizer step for each mini-batch and epoch. Collective over all ranks.

    Args:
        inputs: of `token_inputs`. teacher: None when the teacher was not scored.
        student: of a scoring pass before the update, when the plan has one: u, the term, the advantage and the
            importance weights are then frozen before the first optimizer step.
        old: of `passes.score_old`, when the plan has that pass.
        lam: this step's lambda, one number or one for each token [N].
        states: of the teacher's scoring pass, for the exact estimator (`method.exact`).
        reference: of the scoring pass under the initial weights, for the KL penalty (`method.kl`).
        copies: whose moving average follows every applied optimizer step.
        routing, balance: of a model with experts, both or neither.

    Raises ValueError when several updates of the batch have no scoring pass of the student before them, for a KL
    penalty without `reference`, and without `old` where the plan has that pass.
    """
    if batch.mini_batches * epochs > 1 and student is None:
        raise ValueError("several updates of one batch need a scoring pass of the student first (see pass_plan)")
    if method.kl is not None and reference is None:
        raise ValueError("a KL penalty needs a scoring pass under the initial weights first (see pass_plan)")
    if plan.old_scoring and old is None:
        raise ValueError("the updates' ratios need old log-probs of their own number format first (see pass_plan)")
    tokens = LossInputs(inputs, torch.zeros_like(inputs.weight) + lam, teacher, reference=reference)
    if student is not None:
        frozen = token_method.freeze(tokens, student, method, batch.table.rollouts, process_groups.dp)
        if plan.bfloat16_student:  # without the pass they are written in the first epoch
            frozen = replace(frozen, old=torch.zeros_like(inputs.weight) if old is None else old)
        tokens = replace(tokens, frozen=frozen)
    out, values = UpdateColumns.zeros(
        batch.table.tokens,
        port.device,
        importance=method.importance_cap is not None,
        exact=method.exact is not None,
        old=plan.bfloat16_student,
    )
    loss = _PackLoss(port, process_groups, tokens, out, method, temperature, batch.table.rollouts, plan.head, states)
    steps: list[_Step] = []
    for epoch in range(epochs):
        loss.own_is_old = epoch == 0 and plan.bfloat16_student and not plan.old_scoring
        packs = [batch.student_packs(m) for m in range(batch.mini_batches)]
        if states is not None and epoch == 0:
            states.bring([pack for mini_batch in packs for pack in mini_batch])
        for number, mini_batch in enumerate(packs):
            responses = batch.response_tokens(number)
            steps.append(_step(port, process_groups, optimizer, mini_batch, loss, responses, routing, balance))
            if steps[-1].result.applied and copies is not None:
                copies.follow()
    share_columns(values, cp=process_groups.cp, pp=process_groups.pp)
    loads = [step.load for step in steps if step.load is not None]
    return UpdateStats(
        losses=tuple(step.loss for step in steps),
        grad_norms=tuple(step.result.grad_norm for step in steps),
        applied=tuple(step.result.applied for step in steps),
        columns=out,
        load=combined(loads) if loads else None,
    )


class _Step(NamedTuple):
    """One optimizer step: the loss of its mini-batch over all ranks; `load` of a model with experts."""

    loss: float
    result: StepResult
    load: LoadReport | None


def _step(
    port: ModelPort,
    process_groups: ProcessGroups,
    optimizer: Optimizer,
    packs: Sequence[Pack],
    loss: _PackLoss,
    responses: int,
    routing: StudentRouting | None,
    balance: LoadBalance | None,
) -> _Step:
    """Forward and backward of a mini-batch's packs, then the optimizer step. `responses`: the mini-batch's response
    tokens over all ranks. Collective over all ranks."""
    optimizer.zero_grad()
    pack_routing = None
    if routing is not None and balance is not None:
        balance.start()
        pack_routing = partial(routing.update, balance=balance, responses=responses)
    parts = schedule.forward_backward(port, packs, loss, pack_routing)
    load = None if balance is None else balance.finish(responses, process_groups.world)
    total = sum_over_ranks(parts, process_groups, port.device)
    return _Step(total, optimizer.step(loss=total), load)


@dataclass
class _PackLoss:
    """The loss of one pack on the last pipeline stage; writes the pack's rows of `out`. `own_is_old`: the log-probs
    become the frozen scores' old ones."""

    port: ModelPort
    process_groups: ProcessGroups
    tokens: LossInputs  # of the rank's table
    out: UpdateColumns  # of the rank's table
    method: Method
    temperature: float
    rollouts: int
    head: Head
    states: TeacherStates | None
    own_is_old: bool = False

    def __call__(self, pack: Pack, hidden: Tensor) -> Tensor:
        tokens = self.tokens.at(pack.flat)
        weight, shard = self.port.head_weight(), self.port.head_shard()
        if self.head == "two_phase":
            logprobs, entropy = linear_logprob(
                hidden, weight, pack.targets, shard, rows=pack.rows, temperature=self.temperature
            )
            return self._loss(tokens, pack.flat, logprobs, entropy, complete=True)

        def token_loss(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
            return self._loss(tokens.at(block), pack.flat[block], logprobs, entropy, complete=False)

        if self.method.exact is not None:
            return self._exact(self.method.exact, tokens, pack, hidden, token_loss)
        return linear_token_loss(
            hidden, weight, pack.targets, token_loss, shard, rows=pack.rows, temperature=self.temperature
        )[0]

    def _exact(self, exact: ExactTerm, tokens: LossInputs, pack: Pack, hidden: Tensor, token_loss: TokenLoss) -> Tensor:
        assert self.states is not None and self.out.divergences is not None, "the plan keeps the teacher's states"
        mask = tokens.inputs.term_mask
        loss, columns = linear_divergence_loss(
            hidden,
            self.port.head_weight(),
            pack.targets,
            token_loss,
            torch.where(mask, exact.sign * tokens.lam * tokens.inputs.weight, 0.0),
            self.states.at(pack.flat),
            exact.divergence,
            self.port.head_shard(),
            teacher_weight=self.states.head,
            rows=pack.rows,
            temperature=self.temperature,
        )
        found = Divergences(columns.divergence, columns.reverse_kl, columns.forward_kl, columns.agreement)
        self.out.divergences.put(pack.flat, found)
        self.out.constants.term[pack.flat] = torch.where(mask, columns.divergence, 0.0).float()
        return loss

    def _sums(self, tokens: LossInputs, logprobs: Tensor) -> Sums:
        """Of the pack's rollouts, complete."""
        sums = token_method.local_sums(tokens, logprobs, self.method, self.rollouts)
        return Sums(*(None if part is None else self._over_slices(part) for part in sums))

    def _over_slices(self, part: Tensor) -> Tensor:
        """The sum over context-parallel ranks, which hold different rows of each rollout. In place."""
        if self.process_groups.cp.size() > 1:
            dist.all_reduce(part, group=self.process_groups.cp)
        return part

    def _loss(self, tokens: LossInputs, flat: Tensor, logprobs: Tensor, entropy: Tensor, *, complete: bool) -> Tensor:
        """The loss of rows of the pack, which are `flat` of the rank's table; `complete`: all of them, so that sums
        over their rollouts can be made."""
        ratio = None
        if tokens.frozen is None:  # on-policy: the update's own log-probs are the scoring ones
            student = Scores(logprobs.detach(), entropy.detach())
            sums = self._sums(tokens, student.logprobs) if complete else token_method.NO_SUMS
            constants = token_method.loss_constants(tokens, student.logprobs, self.method, sums)
            old = student.logprobs
        else:
            student, constants, old = tokens.frozen.student, tokens.frozen.constants, tokens.frozen.old
            if self.own_is_old:
                old = logprobs.detach().to(old.dtype)
                assert self.tokens.frozen is not None
                self.tokens.frozen.old[flat] = old
            if complete and self.method.policy_loss == "gspo":
                ratio = token_method.response_ratios(tokens.inputs, logprobs.detach(), old, self.rollouts)
                ratio = self._over_slices(ratio)
        loss, clipped = token_method.policy_loss(tokens.inputs, logprobs, old, constants, self.method, ratio)
        loss = token_method.add_kl_loss(loss, tokens, logprobs, student.logprobs - old, constants, self.method)
        loss = token_method.add_entropy_bonus(loss, tokens.inputs, entropy, self.method)
        ever_clipped = torch.maximum(self.out.clipped[flat], clipped.float())
        # `_exact` writes the divergences, which are known only after the tile's loss.
        columns = UpdateColumns(student, ever_clipped, constants, old=None if self.out.old is None else old)
        replace(self.out, divergences=None).put(flat, columns)
        return loss
