"""The results of a model on its sets, and the paired differences of two models: results.json, results.csv."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asd_megatron.errors import UserError
from asd_megatron.evaluation.estimators import Floats
from asd_megatron.evaluation.intervals import KEYS, Difference, Estimate, difference, estimates
from asd_megatron.evaluation.samples import SetSamples
from asd_megatron.files import atomic_write, read_json_object, write_json

RESULTS_FILE, TABLE_FILE = "results.json", "results.csv"
VERSION = 1


@dataclass(frozen=True, eq=False)
class SetResult:
    """A model on one set. `metrics`: estimates by name (`avg@8`, `pass@1` ... `pass@8`, `maj@2` ..., `length_mean`,
    `truncated`). `values`: of each problem, by the same names; `problems`: what tells them from others. `failures`:
    answers that scored 0 unjudged, by kind. `settings`: how it was sampled and scored."""

    name: str
    samples: int
    metrics: Mapping[str, Estimate]
    values: Mapping[str, Floats]
    problems: tuple[str, ...]
    failures: Mapping[str, int]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, found: SetSamples, threshold: float) -> SetResult:
        """threshold: the reward from which a sample counts as correct."""
        outcomes = found.outcomes()
        values = outcomes.by_problem(threshold, every_k=True)
        metrics = dict(zip(values, estimates(np.stack(list(values.values()))), strict=True))
        return cls(name, outcomes.samples, metrics, values, found.problems, found.failures, found.identity)

    @property
    def average(self) -> str:
        """The name of its mean reward, `avg@n`."""
        return f"avg@{self.samples}"

    @property
    def errors(self) -> int:
        return sum(self.failures.values())

    def pass_curve(self) -> list[tuple[int, Estimate]]:
        """(k, pass@k), k rising."""
        return [(k, self.metrics[f"pass@{k}"]) for k in range(1, self.samples + 1)]

    def as_json(self) -> dict[str, Any]:
        return {
            "problems": len(self.problems),
            "samples": self.samples,
            "metrics": {name: found.as_json() for name, found in self.metrics.items()},
            "failures": dict(self.failures),
            "settings": dict(self.settings),
        }


@dataclass(frozen=True, eq=False)
class Results:
    """A model on its sets. `label` names it in tables; `model`: the folder of its weights; `step`: training steps."""

    label: str
    model: str
    step: int
    sets: Sequence[SetResult]

    @property
    def mean(self) -> Estimate | None:
        """The mean of the sets' avg@n, each set with the same weight, as the paper averages its benchmarks; None for a
        single set. The error is that of a mean of independent estimates, the interval normal."""
        if len(self.sets) < 2:
            return None
        found = [result.metrics[result.average] for result in self.sets]
        value = math.fsum(e.value for e in found) / len(found)
        error = math.sqrt(math.fsum(e.error**2 for e in found)) / len(found)
        return Estimate(value, error, value - 1.96 * error, value + 1.96 * error)

    def as_json(self) -> dict[str, Any]:
        mean = self.mean
        return {
            "version": VERSION,
            "label": self.label,
            "model": self.model,
            "step": self.step,
            "sets": {result.name: result.as_json() for result in self.sets},
            "mean": None if mean is None else mean.as_json(),
        }


@dataclass(frozen=True)
class SetDifference:
    """How much better than the baseline a model is on one set: by metric, over the problems that both have."""

    label: str
    name: str
    differences: Mapping[str, Difference]


def paired(base: Results, other: Results) -> list[SetDifference]:
    """`other` less `base` on the sets that both have; metrics that both have, of the same problems. Raises UserError
    for a set of which they share no problem."""
    found = []
    of_base = {result.name: result for result in base.sets}
    for result in other.sets:
        before = of_base.get(result.name)
        if before is None:
            continue
        places, before_places = _shared(result.problems, before.problems)
        if not places:
            raise UserError(
                f"the set {result.name} of {other.label} has no problem of that of {base.label}: compare evaluations of"
                " the same file"
            )
        metrics = [m for m in result.metrics if m in before.metrics]
        found.append(
            SetDifference(
                other.label,
                result.name,
                {m: difference(before.values[m][before_places], result.values[m][places]) for m in metrics},
            )
        )
    return found


def _shared(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[int], list[int]]:
    """The places of the problems that both lists have, in the order of the first; a repeated id counts as often as both
    have it."""
    at = {key: place for place, key in enumerate(_numbered(theirs))}
    pairs = [(place, at[key]) for place, key in enumerate(_numbered(ours)) if key in at]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _numbered(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    seen: Counter[str] = Counter()
    for name in names:
        yield name, seen[name]
        seen[name] += 1


def write_results(folder: Path, results: Results) -> None:
    """FOLDER/results.json and FOLDER/results.csv."""
    write_json(folder / RESULTS_FILE, results.as_json())
    atomic_write(folder / TABLE_FILE, table_csv([results]))


def write_comparison(folder: Path, results: Sequence[Results], differences: Sequence[SetDifference]) -> None:
    """FOLDER/comparison.json and FOLDER/comparison.csv; the first of `results` is the baseline."""
    content = {
        "version": VERSION,
        "baseline": results[0].label,
        "models": [found.as_json() for found in results],
        "differences": [
            {"label": d.label, "set": d.name, "metrics": {m: found.as_json() for m, found in d.differences.items()}}
            for d in differences
        ],
    }
    write_json(folder / "comparison.json", content)
    atomic_write(folder / "comparison.csv", table_csv(results, differences))


def table_csv(results: Sequence[Results], differences: Sequence[SetDifference] = ()) -> str:
    """A line for each model, set and metric. The difference is to the first model; better, worse and equal count
    problems."""
    apart = {(d.label, d.name): d.differences for d in differences}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["label", "step", "set", "problems", "metric", *KEYS]
    compared = [*(f"difference_{key}" for key in KEYS), "better", "worse", "equal"]
    writer.writerow([*header, *(compared if differences else [])])
    for found in results:
        for result in found.sets:
            for metric, value in result.metrics.items():
                row: list[Any] = [found.label, found.step, result.name, len(result.problems), metric]
                row += [_cell(number) for number in value.as_json().values()]
                other = apart.get((found.label, result.name), {}).get(metric)
                if other is not None:
                    row += [_cell(number) for number in other.estimate.as_json().values()]
                    row += [other.better, other.worse, other.equal]
                writer.writerow(row)
    return text.getvalue()


def _cell(number: float) -> str:
    return repr(float(number)) if math.isfinite(number) else ""


@dataclass(frozen=True)
class StoredResult:
    """What a results.json says: label, step, and the metrics of each set by name."""

    label: str
    step: int
    sets: Mapping[str, Mapping[str, Estimate]]


def read_results(path: Path) -> StoredResult:
    """Raises UserError for a file that is no results.json."""
    content = read_json_object(path, "remove it, or evaluate again")
    try:
        sets = {
            name: {m: Estimate.from_json(values) for m, values in found["metrics"].items()}
            for name, found in content["sets"].items()
        }
        return StoredResult(str(content["label"]), int(content["step"]), sets)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} holds no results of an evaluation ({error!r}): evaluate again") from error
