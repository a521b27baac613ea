"""How far bfloat16 weights move the log-probs of the trainer's scoring pass, and u."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.models.port import ModelPort
from asd_megatron.trainer.batch import PackLayout, TokenSequence, build_packs
from asd_megatron.trainer.scorer import score

PACK_TOKENS = 512


class Pair(NamedTuple):
    """Token ids of one response, of the student's prompt and of the teacher's privileged one."""

    prompt: list[int]
    privileged: list[int]
    response: list[int]


def random_pairs(vocabulary: int, count: int = 12, seed: int = 7) -> list[Pair]:
    """Random ids: prompts of 8, demonstrations of 24 after them, responses of 32."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        ids = torch.randint(vocabulary, (64,), generator=generator).tolist()
        pairs.append(Pair(ids[:8], ids[:32], ids[32:]))
    return pairs


def measure_drift(
    build: Callable[[torch.dtype], ModelPort], groups: ProcessGroups, pairs: list[tuple[Any, ...]]
) -> dict[str, Any]:
    """Score the responses, with models of one rank, in float32 and in bfloat16. Of s, t and u over all response tokens,
    in nats: the mean absolute value in float32, and the mean and 99% quantile of bfloat16's absolute difference from
    it."""
    given = [Pair(*pair) for pair in pairs]
    exact, rounded = (_scored(build(dtype), groups, given) for dtype in (torch.float32, torch.bfloat16))
    found: dict[str, Any] = {"tokens": len(exact["s"])}
    for name, values in exact.items():
        moved = (rounded[name] - values).abs()
        found[name] = {
            "mean_abs": float(values.abs().mean()),
            "mean_abs_drift": float(moved.mean()),
            "p99_abs_drift": float(torch.quantile(moved, 0.99)),
        }
    return found


def _scored(port: ModelPort, groups: ProcessGroups, pairs: list[Pair]) -> dict[str, Tensor]:
    """s, t and u = t - s of every response token: float64 [tokens] each."""
    tokens = sum(len(pair.response) for pair in pairs)

    def logprobs(prompts: list[list[int]]) -> Tensor:
        sequences, row = [], 0
        for prompt, pair in zip(prompts, pairs, strict=True):
            sequences.append(TokenSequence.of(prompt, pair.response, row))
            row += len(pair.response)
        packs = build_packs([sequences], 0, PACK_TOKENS, PackLayout.of(port.layout, groups, port.device))
        return score(port, groups, packs, tokens, temperature=1.0).logprobs.double().cpu()

    s, t = logprobs([pair.prompt for pair in pairs]), logprobs([pair.privileged for pair in pairs])
    return {"s": s, "t": t, "u": t - s}
