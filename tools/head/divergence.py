"""The exact divergence to a teacher with the policy loss: the product's op, float64, and the bare products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from head.ways import CHUNK, Problem, Products, blocks
from torch import Tensor

from asd_megatron.ops.vocab_divergence import Divergence, linear_divergence_loss

DIVERGENCE = Divergence()


@dataclass(frozen=True)
class TeacherProblem:
    policy: Problem
    teacher: Tensor  # [T, H]: the teacher has the student's weight
    coefficient: Tensor  # [T]: a mean over tokens

    @classmethod
    def of(cls, policy: Problem) -> TeacherProblem:
        g = torch.Generator().manual_seed(1)
        noise = 0.5 * torch.randn(policy.hidden.shape, generator=g)
        teacher = (policy.hidden.float().cpu() + noise).to(policy.hidden)
        tokens = len(policy.target)
        return cls(policy, teacher, torch.full((tokens,), 1 / tokens, device=teacher.device))


class DivergenceResult(NamedTuple):
    logprobs: Tensor  # [T]
    entropy: Tensor  # [T]
    divergence: Tensor  # [T]
    d_hidden: Tensor | None  # [T, H]
    d_weight: Tensor | None  # [V, H]


def fused_divergence(problem: TeacherProblem) -> DivergenceResult:
    hidden, weight = problem.policy.leaves()
    loss, columns = linear_divergence_loss(
        hidden,
        weight,
        problem.policy.target,
        problem.policy.loss,
        problem.coefficient,
        lambda block: problem.teacher[block],
        DIVERGENCE,
        problem.policy.shard,
    )
    loss.backward()
    return DivergenceResult(columns.logprobs, columns.entropy, columns.divergence, hidden.grad, weight.grad)


def dense_divergence(problem: TeacherProblem) -> DivergenceResult:
    """The same in float64 by autograd through the definition, chunk by chunk."""
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in problem.policy.leaves())
    columns: list[tuple[Tensor, ...]] = []
    for block in blocks(len(hidden), CHUNK):
        logp = torch.log_softmax(hidden[block] @ weight.t(), -1)
        with torch.no_grad():
            logq = torch.log_softmax(problem.teacher[block].double() @ weight.t(), -1)
        logm = torch.logaddexp(logp, logq) - torch.log(torch.tensor(2.0, dtype=torch.float64))
        value = 0.5 * ((logp.exp() * (logp - logm)).sum(1) + (logq.exp() * (logq - logm)).sum(1))
        logprobs = logp.gather(1, problem.policy.target[block, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        loss = problem.policy.loss(logprobs, entropy, block) + (problem.coefficient[block].double() * value).sum()
        loss.backward()
        columns.append((logprobs.detach(), entropy.detach(), value.detach()))
    logprobs, entropy, value = (torch.cat(column) for column in zip(*columns, strict=True))
    return DivergenceResult(logprobs, entropy, value, hidden.grad, weight.grad)


class PairProducts(Products):
    """The bare 8 T H V flops: those of `Products`, and the teacher's logits."""

    def __init__(self, problem: TeacherProblem, chunk: int) -> None:
        super().__init__(problem.policy, chunk)
        self.teacher = problem.teacher
        self.teacher_logits = torch.empty_like(self.logits)

    def __call__(self) -> None:
        for block in blocks(len(self.teacher), self.chunk):
            out = self.teacher_logits[: block.stop - block.start]
            torch.mm(self.teacher[block], self.problem.weight.t(), out=out)
        super().__call__()
