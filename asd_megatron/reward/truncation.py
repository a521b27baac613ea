"""The rule about responses that the token budget cut off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asd_megatron.reward.base import Response, Verifier


class ZeroForTruncated:
    """A verifier whose truncated responses score 0 without being judged, and are counted in `truncated`.

    A response that the token budget cut off has not ended: what stands in it may be a guess that it was about to take
    back, and a model that is rewarded for it learns to repeat answers until the budget is spent.
    """

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._truncated = 0
        self.feedback_kind = verifier.feedback_kind

    @property
    def counters(self) -> Mapping[str, int]:
        return {**self._verifier.counters, "truncated": self._truncated}

    def score(self, responses: Sequence[Response]) -> list[float]:
        responses = [Response(*response) for response in responses]
        complete = [response for response in responses if not response.truncated]
        rewards = iter(self._verifier.score(complete) if complete else ())
        self._truncated += len(responses) - len(complete)
        return [0.0 if response.truncated else next(rewards) for response in responses]

    def close(self) -> None:
        self._verifier.close()
