"""The built-in puzzle's verifier, behind the same interface as the others."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from asd_megatron.reward.base import Response, new_counters


class PuzzleVerifier:
    """Scores with `asd_megatron.puzzle.task.score_response`, imported only when a puzzle verifier is made."""

    feedback_kind = "binary"

    def __init__(self) -> None:
        self._score = importlib.import_module("asd_megatron.puzzle.task").score_response
        self.counters = new_counters()

    def score(self, responses: Sequence[Response]) -> list[float]:
        return [float(self._score(problem, text)) for problem, text, *_ in responses]

    def close(self) -> None:
        pass
