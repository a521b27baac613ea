"""Problems of reasoning-gym, judged by the task's own verifier in worker processes of bounded time and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from asd_megatron.data.answers import marked_answer, outside_thinking
from asd_megatron.records import Problem
from asd_megatron.reward.base import Response, RewardError, new_counters
from asd_megatron.reward.workers import Outcome, count_unjudged, judge_pool

JUDGE = Path(__file__).with_name("reasoning_gym_worker.py")
ORIGIN = ("task", "parameters", "seed", "size", "index", "digest")


def given_answer(response: str) -> str | None:
    r"""The text that the response marks as its answer outside think blocks: in `<answer>` tags, else in the last box,
    else after the last `####` on its line. None if there is none, or if the response ends inside its last mark."""
    return marked_answer(outside_thinking(response) or "") or None


class ReasoningGymVerifier:
    """The task's own score of the response's marked answer, from 0 to 1; 0 for a response that marks none.

    One answer takes at most `timeout_seconds` of processor time and `wall_timeout_seconds` in all, regenerating the
    problem's item included: then its worker is ended and replaced, the answer scores 0 and `timeouts` counts it. An
    answer on which the task's verifier fails, or that two workers died of, scores 0, is logged and counted in `errors`.
    Raises RewardError for a problem whose item is generated differently than in the trainer.
    """

    feedback_kind = "binary"

    def __init__(
        self, *, timeout_seconds: float = 5.0, wall_timeout_seconds: float | None = None, workers: int = 2
    ) -> None:
        self.counters = new_counters()
        self._pool = judge_pool(JUDGE, workers, timeout_seconds, wall_timeout_seconds, self.counters)

    def score(self, responses: Sequence[Response]) -> list[float]:
        keys = [(problem.prompt_id, given_answer(text)) for problem, text, *_ in responses]
        # equal answers of a group are judged once
        asked = {key: problem for key, (problem, *_) in zip(keys, responses, strict=True) if key[1] is not None}
        requests = [{**_origin(problem), "answer": answer} for (_, answer), problem in asked.items()]
        outcomes = self._pool.run(requests)
        scores = {key: self._score(key, outcome) for key, outcome in zip(asked, outcomes, strict=True)}
        return [scores.get(key, 0.0) for key in keys]

    def _score(self, key: tuple[str, str | None], outcome: Outcome) -> float:
        answer = outcome.answer or {}
        if "changed" in answer:
            raise RewardError(
                f"problem {key[0]} is generated differently in a reward worker than in the trainer, so it cannot be"
                " scored: has another version of reasoning-gym been installed since the start? Start the run again"
            )
        score = answer.get("score", math.nan)
        if math.isfinite(score):
            return min(max(score, 0.0), 1.0)
        what = f"answer {(key[1] or '')[-80:]!r} to problem {key[0]}"
        count_unjudged(self.counters, what, outcome, f"its verifier returned {score}")
        return 0.0

    def close(self) -> None:
        self._pool.close()


def _origin(problem: Problem) -> dict[str, object]:
    if not all(name in problem.extra for name in ORIGIN):
        raise RewardError(
            f"reward.name reasoning_gym cannot score problem {problem.prompt_id}, which is not of its sets: name"
            " reasoning_gym:TASK as problem set, or set another reward.name"
        )
    return {name: problem.extra[name] for name in ORIGIN}
