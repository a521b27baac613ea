"""Standard errors and intervals over problems: a problem with all its samples is one cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from asd_megatron.evaluation.estimators import Floats

RESAMPLES, LEVEL, SEED = 10_000, 0.95, 0
KEYS = ("value", "standard_error", "low", "high")  # of an estimate in JSON and CSV
ROUNDING = 1e-12
BATCH_NUMBERS = 4_000_000  # resampled at a time: bounds the memory, not the result


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its standard error and 95% interval; NaN where there are fewer than two problems."""

    value: float
    error: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def as_json(self) -> dict[str, float]:
        return dict(zip(KEYS, (self.value, self.error, self.low, self.high), strict=True))

    @classmethod
    def from_json(cls, values: Mapping[str, float | None]) -> Estimate:
        """The estimate of `as_json`, whose NaN a JSON file has as null. Raises KeyError."""
        return cls(*(math.nan if (value := values[key]) is None else float(value) for key in KEYS))


@dataclass(frozen=True)
class Difference:
    """The mean difference of two evaluations over the problems that both have, and how many of these are better, worse
    and equal in the second."""

    estimate: Estimate
    better: int
    worse: int
    equal: int

    def as_json(self) -> dict[str, float | int]:
        counts = {"problems": self.better + self.worse + self.equal}
        return {**self.estimate.as_json(), **counts, "better": self.better, "worse": self.worse, "equal": self.equal}


def standard_error(values: Floats) -> float:
    """Sample standard deviation of the problems' values over the square root of their number; NaN below two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def estimates(values: Floats) -> list[Estimate]:
    """One estimate for each row of `values` [rows, problems].

    The interval is scipy's bootstrap (bias-corrected and accelerated, from a fixed seed): problems are drawn with
    replacement, each with all its samples, the same ones for every row. Where all problems have the same value it is
    that value alone: nothing is learned about its error.
    """
    rows, problems = values.shape
    found = [Estimate(float(row.mean()), standard_error(row)) for row in values]
    varying = [i for i in range(rows) if problems > 1 and not np.all(values[i] == values[i, 0])]
    out = [e if problems < 2 else Estimate(e.value, e.error, e.value, e.value) for e in found]
    if varying:
        from scipy.stats import bootstrap

        result = bootstrap(
            (values[varying],),
            np.mean,
            axis=-1,
            n_resamples=RESAMPLES,
            batch=max(1, BATCH_NUMBERS // (len(varying) * problems)),
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(SEED),
        )
        interval = result.confidence_interval
        for place, low, high in zip(varying, np.atleast_1d(interval.low), np.atleast_1d(interval.high), strict=True):
            out[place] = Estimate(found[place].value, found[place].error, float(low), float(high))
    return out


def estimate(values: Floats) -> Estimate:
    """`estimates` of one row [problems]."""
    return estimates(values[None])[0]


def difference(base: Floats, other: Floats) -> Difference:
    """Of the values [problems] of the same problems, in the same order: `other` less `base`."""
    apart = other - base
    apart[np.abs(apart) < ROUNDING] = 0.0  # the same rewards in another order have another sum
    return Difference(estimate(apart), int((apart > 0).sum()), int((apart < 0).sum()), int((apart == 0).sum()))
