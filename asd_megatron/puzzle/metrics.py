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
        """Metrics of one step's global batch; u by class where u was computed."""
        pmi = None
        if "pmi" in table:
            pmi = [
                row.tolist() if example.has_context or "teacher_logprobs" not in table else None
                for row, example in zip(table.rows("pmi"), examples, strict=True)
            ]
        report = summarize([e.rollout.response_ids for e in examples], [e.reward for e in examples], self.lexicon, pmi)
        out = {f"puzzle/u_{name}": value for name, value in report.pmi.items()}
        out["puzzle/deliberation_rate"] = report.deliberation_rate
        return out

    def of_evaluation(self, rollouts: Sequence[Rollout], rewards: Sequence[float]) -> dict[str, float]:
        """Metrics of held-out responses."""
        report = summarize([r.response_ids for r in rollouts], rewards, self.lexicon)
        out = {
            "evaluation/deliberations": report.deliberations,
            "evaluation/deliberation_rate": report.deliberation_rate,
            "evaluation/verified": report.verified,
            "evaluation/accuracy_verified": report.accuracy_verified,
        }
        return {name: value for name, value in out.items() if not math.isnan(value)}


class MeasuredPuzzles(PuzzleStream):
    """Puzzles as a run's problem set, with the puzzle's own metrics."""

    def metrics(self, tokenizer: PreTrainedTokenizerBase) -> PuzzleMetrics:
        """The metrics of these puzzles' responses."""
        return PuzzleMetrics(tokenizer)


def puzzle_source(split: str) -> MeasuredPuzzles:
    """The problem set `puzzle:SPLIT`, as `PuzzleStream.of`."""
    return MeasuredPuzzles.of(split)
