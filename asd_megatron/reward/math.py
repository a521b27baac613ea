"""Mathematical answers, judged by math-verify in worker processes of bounded time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asd_megatron.reward.answers import final_answer, gold_answer, is_list, quick_verdict, tidy
from asd_megatron.reward.base import Response, check_answers, new_counters
from asd_megatron.reward.workers import Outcome, count_unjudged, judge_pool

JUDGE = Path(__file__).with_name("math_worker.py")


class MathVerifier:
    r"""1.0 if the response's final answer equals the problem's, else 0.0.

    The final answer stands in `<answer>` tags, in a box or after `####` (`answers.final_answer`), or is what
    math-verify finds in the last part of a response that marks none. LaTeX and plain spellings are compared by value
    (1/2, 0.5 and \frac12; 50% and 0.5; 1,234 and 1234); `math_worker` says when two numbers are equal.

    One answer takes at most `timeout_seconds` of processor time and `wall_timeout_seconds` in all: then its worker is
    ended and replaced, the answer scores 0 and `timeouts` counts it. An answer that math-verify fails on, or that two
    workers died of, scores 0, is logged and counted in `errors`.
    """

    feedback_kind = "binary"

    def __init__(
        self, *, timeout_seconds: float = 5.0, wall_timeout_seconds: float | None = None, workers: int = 2
    ) -> None:
        self.counters = new_counters()
        self._pool = judge_pool(JUDGE, workers, timeout_seconds, wall_timeout_seconds, self.counters)

    def score(self, responses: Sequence[Response]) -> list[float]:
        check_answers("math", responses)
        keys = [self._key(answer=problem.answer, response=text) for problem, text, *_ in responses]
        verdicts = {key: quick_verdict(key[0], key[1]) if key[2] else None for key in keys if key is not None}
        # equal answers of a group are judged once
        open_keys = [key for key, verdict in verdicts.items() if verdict is None]
        requests = [_request(*key) for key in open_keys]
        for key, outcome in zip(open_keys, self._pool.run(requests), strict=True):
            verdicts[key] = self._verdict(key, outcome)
        return [0.0 if key is None else float(bool(verdicts[key])) for key in keys]

    @staticmethod
    def _key(*, answer: str, response: str) -> tuple[str, str, bool] | None:
        gold = gold_answer(answer)
        candidate = final_answer(response, several=is_list(gold))
        if candidate is None or not gold:  # `$` alone is no answer
            return None
        if not candidate.marked and tidy(candidate.text) == gold:  # a response that is nothing but the answer
            return gold, gold, True
        return gold, candidate.text, candidate.marked

    def _verdict(self, key: tuple[str, str, bool], outcome: Outcome) -> bool:
        if outcome.answer is not None and "equal" in outcome.answer:
            return bool(outcome.answer["equal"])
        gold, text, _ = key
        count_unjudged(self.counters, f"math answer {text[-80:]!r} (expected {gold[:80]!r})", outcome)
        return False

    def close(self) -> None:
        self._pool.close()


def _request(gold: str, text: str, marked: bool) -> dict[str, str]:
    # boxed, so that all of it is the answer: `17 or 18` is a set, not whichever number math-verify likes
    return {"gold": f"\\boxed{{{gold}}}", "text": f"\\boxed{{{text}}}" if marked else text}
