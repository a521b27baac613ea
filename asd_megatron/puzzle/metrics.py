"""The puzzle's own metrics: mean u by token class and how much a response deliberates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from asd_megatron.puzzle.report import Lexicon, summarize
from asd_megatron.puzzle.task import PuzzleStream
from asd_megatron.records import Example, Rollout, TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PuzzleMetrics:
    """The metrics of puzzle responses: `puzzle/*` of a training step and `evaluation/*` of held-out responses."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.lexicon = Lexicon.of(tokenizer)

    def of_step(self, examples: Sequence[Example], table: TokenTable) -> dict[str, float]:
        """Metrics of one step's global batch; u and D by class where they were computed."""
        responses, rewards = [e.rollout.response_ids.tolist() for e in examples], [e.reward for e in examples]
        report = summarize(responses, rewards, self.lexicon, _values("pmi", examples, table))
        out = {f"puzzle/u_{name}": value for name, value in report.pmi.items()}
        divergences = _values("divergence", examples, table)
        if divergences is not None:
            by_class = summarize(responses, rewards, self.lexicon, divergences).pmi
            out |= {f"puzzle/divergence_{name}": value for name, value in by_class.items()}
        out["puzzle/deliberation_rate"] = report.deliberation_rate
        return out

    def of_evaluation(self, rollouts: Sequence[Rollout], rewards: Sequence[float]) -> dict[str, float]:
        """Metrics of held-out responses."""
        report = summarize([r.response_ids.tolist() for r in rollouts], rewards, self.lexicon)
        out = {
            "evaluation/deliberations": report.deliberations,
            "evaluation/deliberation_rate": report.deliberation_rate,
            "evaluation/verified": report.verified,
            "evaluation/accuracy_verified": report.accuracy_verified,
        }
        return {name: value for name, value in out.items() if not math.isnan(value)}


def _values(name: str, examples: Sequence[Example], table: TokenTable) -> list[list[float] | None] | None:
    """A column by rollout, None for those without privileged context; None where it was not computed."""
    if name not in table:
        return None
    return [
        row.tolist() if example.has_context or "teacher_logprobs" not in table else None
        for row, example in zip(table.rows(name), examples, strict=True)
    ]


class MeasuredPuzzles(PuzzleStream):
    """Puzzles as a run's problem set, with the puzzle's own metrics."""

    def metrics(self, tokenizer: PreTrainedTokenizerBase) -> PuzzleMetrics:
        """The metrics of these puzzles' responses."""
        return PuzzleMetrics(tokenizer)


def puzzle_source(split: str) -> MeasuredPuzzles:
    """The problem set `puzzle:SPLIT`, as `PuzzleStream.of`."""
    return MeasuredPuzzles.of(split)
