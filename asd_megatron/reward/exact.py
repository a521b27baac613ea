"""Exact match of the whole response, with white space normalised."""

from __future__ import annotations

from collections.abc import Sequence

from asd_megatron.reward.base import Response, check_answers, new_counters


def normalise(text: str) -> str:
    """Runs of white space as one space, none at the ends."""
    return " ".join(text.split())


class ExactVerifier:
    """1.0 if the response is the answer, else 0.0."""

    feedback_kind = "binary"

    def __init__(self) -> None:
        self.counters = new_counters()

    def score(self, responses: Sequence[Response]) -> list[float]:
        check_answers("exact", responses)
        return [float(normalise(text) == normalise(problem.answer)) for problem, text, *_ in responses]

    def close(self) -> None:
        pass
