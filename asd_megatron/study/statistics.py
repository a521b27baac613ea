"""Pure functions of numbers from cells. A value that is None or not finite is missing: left out and counted."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL, SEED = 10_000, 0.95, 0
EXACT = 16  # up to so many pairs all sign flips are counted, beyond them RESAMPLES random ones
Floats = NDArray[np.float64]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Summary:
    """Mean (NaN if n is 0), sample standard deviation (NaN below 2) and how many values were there and missing."""

    mean: float
    sd: float
    n: int
    missing: int = 0


@dataclass(frozen=True)
class Paired:
    """Differences of pairs: their summary, a confidence interval of the mean (NaN below 2 pairs) and the p value of
    the sign-flip test."""

    summary: Summary
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Reached:
    """When cells reached a level. `mean` and `sd` are over those that did; `median` is over all, None where half or
    more never did (a cell that never does counts as later than any)."""

    mean: float
    sd: float
    median: float | None
    reached: int
    never: int


@dataclass(frozen=True)
class Components:
    """Standard deviations of a one-way random-effects model: `between` groups and `within` them (NaN if the data do
    not tell)."""

    between: float
    within: float
    groups: int
    n: int


def is_number(value: object) -> TypeGuard[float]:
    """A finite number; None, NaN, infinities and truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def summarize(values: Iterable[float | None]) -> Summary:
    """Mean, sample standard deviation (divisor n - 1), n."""
    given = list(values)
    array = np.asarray([v for v in given if is_number(v)], dtype=np.float64)
    n = len(array)
    mean = float(array.mean()) if n else math.nan
    return Summary(mean, float(array.std(ddof=1)) if n > 1 else math.nan, n, len(given) - n)


def differences(ours: Mapping[K, float | None], theirs: Mapping[K, float | None]) -> dict[K, float | None]:
    """`ours - theirs` for every key that both have; None where either value is missing."""
    out: dict[K, float | None] = {}
    for key, value in ours.items():
        if key in theirs:
            other = theirs[key]
            out[key] = value - other if value is not None and other is not None else None
    return out


def paired(values: Iterable[float | None]) -> Paired:
    """Summary, bootstrap interval and sign-flip p of the differences of pairs."""
    given = list(values)
    numbers = [float(v) for v in given if is_number(v)]
    low, high = bootstrap_interval(numbers)
    return Paired(summarize(given), low, high, sign_flip_p(numbers))


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean, from a fixed seed; NaN below 2 values. Too narrow for few."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(SEED).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_flip_p(values: Sequence[float]) -> float:
    """Two-sided p value of "the differences are symmetric about 0": the fraction of all sign flips whose mean is at
    least as far from 0 as the observed one. Exact up to 16 values, else from random flips; NaN without values."""
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    if n == 0:
        return math.nan
    if n <= EXACT:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
        extra = 0
    else:
        bits = np.random.default_rng(SEED).integers(2, size=(RESAMPLES, n))
        extra = 1  # the observed signs
    means = np.abs(((2 * bits - 1) * array).sum(axis=1))
    slack = 1e-9 * np.abs(array).sum()
    hits = int((means >= abs(array.sum()) - slack).sum())
    return (hits + extra) / (len(bits) + extra)


def crossing(x: Sequence[float], y: Sequence[float | None], level: float) -> float | None:
    """The first x at which y is at least `level`, interpolated linearly; None if it never is. `x` rises;
    points whose y is missing are left out."""
    last: tuple[float, float] | None = None
    for at, value in zip(x, y, strict=True):
        if not is_number(value):
            continue
        if value >= level:
            if last is None:
                return float(at)
            return float(last[0] + (at - last[0]) * (level - last[1]) / (value - last[1]))
        last = (at, value)
    return None


def value_at(x: Sequence[float], y: Sequence[float | None], where: float) -> float | None:
    """y at `where`, interpolated linearly; None outside the points."""
    found = float(resample(x, y, np.asarray([where]))[0])
    return found if math.isfinite(found) else None


def resample(x: Sequence[float], y: Sequence[float | None], grid: Floats) -> Floats:
    """y on the points of `grid` by linear interpolation; NaN outside the points that have a number."""
    points = np.asarray([(a, b) for a, b in zip(x, y, strict=True) if is_number(b)], dtype=np.float64).reshape(-1, 2)
    if not len(points):
        return np.full(len(grid), math.nan)
    return np.interp(grid, points[:, 0], points[:, 1], left=math.nan, right=math.nan)


def mean_and_sd(curves: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Mean and sample standard deviation over curves on one grid, NaN where a curve has no number (sd below 2)."""
    stacked = np.stack(curves)
    sd = stacked.std(axis=0, ddof=1) if len(stacked) > 1 else np.full(stacked.shape[1], math.nan)
    return stacked.mean(axis=0), sd


def reached(times: Iterable[float | None]) -> Reached:
    """Of times, None for never."""
    given = list(times)
    known = summarize(t for t in given if t is not None)
    ordered = sorted(math.inf if t is None else t for t in given)
    middle = float(np.mean([ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]])) if ordered else math.nan
    return Reached(known.mean, known.sd, middle if math.isfinite(middle) else None, known.n, len(given) - known.n)


def variance_components(groups: Mapping[K, Sequence[float | None]]) -> Components:
    """Spread between groups and within them by the analysis of variance (unequal group sizes allowed; a negative
    estimate of the variance between is 0)."""
    data = [np.asarray([v for v in values if is_number(v)], dtype=np.float64) for values in groups.values()]
    data = [values for values in data if len(values)]
    sizes = np.asarray([len(values) for values in data], dtype=np.float64)
    k, n = len(data), int(sizes.sum())
    if n <= k:
        return Components(math.nan, math.nan, k, n)
    within = sum(float(((v - v.mean()) ** 2).sum()) for v in data) / (n - k)
    if k < 2:
        return Components(math.nan, math.sqrt(within), k, n)
    grand = sum(float(v.sum()) for v in data) / n
    means = np.asarray([v.mean() for v in data])
    square = float((sizes * (means - grand) ** 2).sum()) / (k - 1)
    size = (n - float((sizes**2).sum()) / n) / (k - 1)
    return Components(math.sqrt(max(0.0, (square - within) / size)), math.sqrt(within), k, n)
