"""The reward of a recipe: one verifier or the weighted sum of several, and the rule about truncated responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asd_megatron.reward.base import Response, Verifier


@dataclass(frozen=True)
class Part:
    """A verifier, its name in metrics, and the weight of its reward."""

    name: str
    weight: float
    verifier: Verifier


class ComposedReward:
    """R = sum over the parts of weight * reward; with one part of weight 1 its reward. Itself a `Verifier`.

    A truncated response scores 0 without being judged and is counted in `truncated`, unless `judge_truncated`: it has
    not ended, what stands in it may be a guess that it was about to take back, and a model that is rewarded for it
    learns to repeat answers until the budget is spent.

    `feedback_kind` is that of a single verifier of weight 1. With another weight, and with several parts, it is
    `binary`: the reward is no fraction of tests.
    """

    def __init__(self, parts: Sequence[Part], *, judge_truncated: bool = False) -> None:
        self.parts = tuple(parts)
        self.judge_truncated = judge_truncated
        alone = len(self.parts) == 1 and self.parts[0].weight == 1.0
        self.feedback_kind = self.parts[0].verifier.feedback_kind if alone else "binary"
        self._truncated = 0
        self._sums = dict.fromkeys((part.name for part in self.parts), 0.0)
        self._scored = 0

    @property
    def counters(self) -> Mapping[str, int]:
        """The sums over the parts, and `truncated`."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.verifier.counters)
        return {**total, "truncated": self._truncated}

    def score(self, responses: Sequence[Response]) -> list[float]:
        responses = [Response(*response) for response in responses]
        judged = [i for i, r in enumerate(responses) if self.judge_truncated or not r.truncated]
        rewards = [0.0] * len(responses)
        for part in self.parts if judged else ():
            for i, reward in zip(judged, part.verifier.score([responses[i] for i in judged]), strict=True):
                rewards[i] += part.weight * reward
                self._sums[part.name] += reward
        self._truncated += len(responses) - len(judged)
        self._scored += len(responses)
        return rewards

    def take_part_means(self) -> dict[str, float]:
        """The mean reward of each of several parts, before its weight, over the responses since the last call; a
        truncated one that is not judged has 0. {} with one part, or without responses."""
        means = {name: total / self._scored for name, total in self._sums.items() if self._scored}
        self._sums, self._scored = dict.fromkeys(self._sums, 0.0), 0
        return means if len(self.parts) > 1 else {}

    def close(self) -> None:
        for part in self.parts:
            part.verifier.close()
