"""The soft penalty of responses that come close to the token limit (DAPO, arXiv 2503.14476, Eq. 13)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Overlong:
    """The zone before the token limit in which a response loses reward.

    limit: the longest response, in tokens (L_max). buffer: the last tokens before it, at least 1 (L_cache).
    weight: the loss at the limit.
    """

    limit: int
    buffer: int
    weight: float = 1.0

    def penalty(self, length: int) -> float:
        """What is added to the reward of a response of `length` tokens: from 0 down to -weight.

            0                                                      length <= limit - buffer
            weight * ((limit - buffer) - length) / buffer          between them
            -weight                                                length >= limit

        Eq. 13 is that of weight 1. Only the group-relative advantage sees the sum. A response's correctness is its
        reward alone: what demonstrates, the feedback that the teacher is shown, accuracy and pass rate are those of
        responses without a penalty.
        """
        over = length - (self.limit - self.buffer)
        return -self.weight * min(max(over, 0), self.buffer) / self.buffer if over > 0 else 0.0
