"""The fused head and minimal forms of the usual ways to the same: log-probs, exact entropy, policy-gradient loss, and
the gradients of hidden states and head weight.

`fused` is the product's. The entropy is a reported number without gradient, as in the product's default update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from asd_megatron.antisd.policy_loss import clipped_policy_loss
from asd_megatron.ops.vocab_head import VocabShard, linear_token_loss

CHUNK = 256
"""Tokens of a chunk of `checkpointed`: as many as a tile of the fused head has at V 32,768."""


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H], or a rank's slice of it
    target: Tensor  # [T]
    advantages: Tensor  # [T]
    shard: VocabShard

    @classmethod
    def random(cls, tokens: int, vocab: int, width: int, device: torch.device, dtype: torch.dtype) -> Problem:
        """Logits of standard deviation 3, equal for equal sizes."""
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, width, generator=g)
        weight = torch.randn(vocab, width, generator=g).mul_(3 / width**0.5)
        target = torch.randint(0, vocab, (tokens,), generator=g)
        advantages = torch.randn(tokens, generator=g)
        return cls(
            hidden.to(device, dtype),
            weight.to(device, dtype),
            target.to(device),
            advantages.to(device),
            VocabShard.of(vocab, vocab),
        )

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    def loss(self, logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
        """The trainer's: clipped, one update a batch, a mean over tokens."""
        weights = torch.full_like(logprobs, 1 / self.target.shape[0], requires_grad=False)
        advantages = self.advantages[block].to(logprobs.dtype)
        return clipped_policy_loss(logprobs, logprobs.detach(), advantages, weights, 0.2, 0.2)[0]


class Result(NamedTuple):
    logprobs: Tensor  # [T]
    entropy: Tensor  # [T]
    d_hidden: Tensor | None  # [T, H]
    d_weight: Tensor | None  # [V, H]


def fused(problem: Problem) -> Result:
    hidden, weight = problem.leaves()
    loss, logprobs, entropy = linear_token_loss(hidden, weight, problem.target, problem.loss, problem.shard)
    loss.backward()
    return Result(logprobs, entropy, hidden.grad, weight.grad)


def materialised(problem: Problem) -> Result:
    """All logits, torch's log-softmax, autograd."""
    hidden, weight = problem.leaves()
    logprobs, entropy = _logprobs(hidden, weight, problem.target)
    problem.loss(logprobs, entropy, slice(None)).backward()
    return Result(logprobs.detach(), entropy, hidden.grad, weight.grad)


def _logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax((hidden @ weight.t()).float(), -1)
    logprobs = logp.gather(1, target[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logprobs, entropy


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """As Megatron's, without its collectives: softmax in the logits' place, and the gradient in the softmax's."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits.sub_(logits.amax(-1, keepdim=True))
        logprobs = logits.gather(1, target[:, None])[:, 0]
        softmax = logits.exp_()
        total = softmax.sum(-1)
        softmax.div_(total[:, None])
        entropy = torch.special.entr(softmax).sum(-1)
        ctx.save_for_backward(softmax, target)
        ctx.mark_non_differentiable(entropy)
        return logprobs - total.log(), entropy

    @staticmethod
    def backward(ctx: Any, g_logprobs: Tensor, _g_entropy: Tensor) -> tuple[Tensor, None]:
        gradient, target = ctx.saved_tensors
        gradient[torch.arange(len(target), device=target.device), target] -= 1.0
        return gradient.mul_(-g_logprobs[:, None]), None


def vocab_parallel(problem: Problem) -> Result:
    """All logits, Megatron's vocabulary-parallel cross-entropy, entropy from its softmax."""
    hidden, weight = problem.leaves()
    logprobs, entropy = _VocabParallelCrossEntropy.apply((hidden @ weight.t()).float(), problem.target)
    problem.loss(logprobs, entropy, slice(None)).backward()
    return Result(logprobs.detach(), entropy, hidden.grad, weight.grad)


def checkpointed(problem: Problem) -> Result:
    """Chunks of tokens, computed again in backward."""
    hidden, weight = problem.leaves()
    parts: list[tuple[Tensor, Tensor]] = [
        checkpoint(_logprobs, hidden[block], weight, problem.target[block], use_reentrant=False)
        for block in blocks(len(hidden), CHUNK)
    ]
    logprobs, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    problem.loss(logprobs, entropy, slice(None)).backward()
    return Result(logprobs.detach(), entropy, hidden.grad, weight.grad)


@torch.no_grad()
def liger_style(problem: Problem) -> Result:
    """Gradients in forward, chunk by chunk, from the chunk's softmax; chunks as long as Liger's rule makes them."""
    hidden, weight, target = problem.hidden, problem.weight, problem.target
    (tokens, width), vocab = hidden.shape, weight.shape[0]
    chunk = 1 << (-(-tokens // -(-vocab // width)) - 1).bit_length()  # the power of 2 from T / ceil(V / H) on
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    logprobs, entropy = torch.empty(2, tokens, device=hidden.device)
    for block in blocks(tokens, chunk):
        logp = torch.log_softmax((hidden[block] @ weight.t()).float(), -1)
        logprobs[block] = logp.gather(1, target[block, None])[:, 0]
        softmax = logp.exp()
        entropy[block] = -logp.mul_(softmax).sum(-1)
        with torch.enable_grad():
            leaf = logprobs[block].clone().requires_grad_()
            (slope,) = torch.autograd.grad(problem.loss(leaf, entropy[block], block), leaf)
        gradient = softmax.mul_(-slope[:, None])
        gradient[torch.arange(len(slope), device=slope.device), target[block]] += slope
        gradient = gradient.to(hidden.dtype)
        torch.mm(gradient, weight, out=d_hidden[block])
        if hidden.dtype == d_weight.dtype:
            d_weight.addmm_(gradient.t(), hidden[block])
        else:
            d_weight += gradient.t() @ hidden[block]
    return Result(logprobs, entropy, d_hidden, d_weight.to(weight.dtype))


def blocks(count: int, length: int) -> Iterator[slice]:
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))


WAYS: dict[str, Callable[[Problem], Result]] = {
    "fused": fused,
    "materialised": materialised,
    "vocab_parallel": vocab_parallel,
    "checkpointed": checkpointed,
    "liger_style": liger_style,
}


class Products:
    """The bare 6 T H V flops: three products into tensors that exist, `chunk` tokens at a time."""

    def __init__(self, problem: Problem, chunk: int) -> None:
        self.problem, self.chunk = problem, min(chunk, len(problem.hidden))
        self.logits = problem.hidden.new_empty((self.chunk, len(problem.weight)))
        self.d_hidden = torch.empty_like(problem.hidden)
        self.d_weight = torch.zeros_like(problem.weight)

    def __call__(self) -> None:
        hidden, weight = self.problem.hidden, self.problem.weight
        for block in blocks(len(hidden), self.chunk):
            logits = self.logits[: block.stop - block.start]
            torch.mm(hidden[block], weight.t(), out=logits)
            torch.mm(logits, weight, out=self.d_hidden[block])
            self.d_weight.addmm_(logits.t(), hidden[block])


def dense(problem: Problem) -> Result:
    """The same in float64 by autograd, chunk by chunk: what every way is checked against."""
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in problem.leaves())
    columns: list[tuple[Tensor, Tensor]] = []
    for block in blocks(len(hidden), CHUNK):
        logp = torch.log_softmax(hidden[block] @ weight.t(), -1)
        logprobs = logp.gather(1, problem.target[block, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        problem.loss(logprobs, entropy, block).backward()
        columns.append((logprobs.detach(), entropy.detach()))
    logprobs, entropy = (torch.cat(column) for column in zip(*columns, strict=True))
    return Result(logprobs, entropy, hidden.grad, weight.grad)


def errors(got: Sequence[Tensor | None], want: Sequence[Tensor | None], names: Sequence[str]) -> dict[str, float]:
    """Largest absolute difference of each result over the largest absolute value."""
    found = {}
    for name, ours, reference in zip(names, got, want, strict=True):
        assert ours is not None and reference is not None
        found[name] = ((ours.double() - reference).abs().max() / reference.abs().max()).item()
    return found
