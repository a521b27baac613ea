"""Lengths of a step's responses without random draws: distribution, mean, quantiles, expected longest one.

A length is log-normal and cut off: min(median exp(spread Z), most) with Z standard normal. A response that reaches
`most` is truncated there, so `most` has a probability of its own.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from asd_megatron.planner.setting import Lengths

NORMAL = NormalDist()
POINTS = 512  # of the integral over lengths


def below(lengths: Lengths, tokens: float) -> float:
    """The probability that a response has at most so many tokens."""
    if tokens >= lengths.most:
        return 1.0
    if lengths.spread == 0:
        return float(tokens >= lengths.median)
    return NORMAL.cdf(math.log(tokens / lengths.median) / lengths.spread) if tokens > 0 else 0.0


def mean(lengths: Lengths) -> float:
    """Tokens of a response: E[min(X, c)] = m exp(s^2 / 2) N(a - s) + c (1 - N(a)), with a = log(c / m) / s.

    Median 6,000, spread 1 and a cut at 32,768: 8,959; without the cut 9,892.
    """
    m, s, c = lengths.median, lengths.spread, lengths.most
    if s == 0:
        return min(m, c)
    a = math.log(c / m) / s
    return m * math.exp(s * s / 2) * NORMAL.cdf(a - s) + c * (1 - NORMAL.cdf(a))


def mean_in_flight(lengths: Lengths) -> float:
    """Tokens that a response has, averaged over the time that it is generated: E[L^2] / (2 E[L]). Long responses are
    in flight longer, so with a spread this is more than half of the mean."""
    m, s, c = lengths.median, lengths.spread, lengths.most
    if s == 0:
        return min(m, c) / 2
    a = math.log(c / m) / s
    square = m * m * math.exp(2 * s * s) * NORMAL.cdf(a - 2 * s) + c * c * (1 - NORMAL.cdf(a))
    return square / (2 * mean(lengths))


def expected_longest(lengths: Lengths, count: int) -> float:
    """The expected length of the longest of `count` responses: the integral of 1 - P(L <= x)^count from 0 to `most`.

    Of 256 responses of median 6,000 and spread 1, cut at 32,768, practically always one reaches the cut; of 8 the
    longest has 23,516 tokens.
    """
    if lengths.spread == 0:
        return min(lengths.median, lengths.most)
    width = lengths.most / POINTS
    heights = [1 - below(lengths, (i + 0.5) * width) ** count for i in range(POINTS)]
    return sum(heights) * width


def quantiles(lengths: Lengths, count: int) -> tuple[int, ...]:
    """`count` lengths that stand for as many draws, ascending: the (i + 1/2) / count quantiles, the last replaced by
    the expected longest. At least 1 token each."""
    steps = [(i + 0.5) / count for i in range(count)]
    found = [min(lengths.median * math.exp(lengths.spread * NORMAL.inv_cdf(p)), lengths.most) for p in steps]
    found[-1] = max(found[-1], expected_longest(lengths, count))
    return tuple(max(round(length), 1) for length in found)
