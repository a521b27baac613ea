"""What an evaluation leaves for the reader beside the files of each model: tables on the console, the comparison of
several models, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from asd_megatron.errors import UserError
from asd_megatron.evaluation.figures import (
    PASS_FILE,
    STEPS_FILE,
    PassCurve,
    StepCurve,
    curves_of_metrics,
    plot_over_steps,
    plot_pass_at_k,
    reached_text,
)
from asd_megatron.evaluation.intervals import Estimate
from asd_megatron.evaluation.report import comparison_table, results_table
from asd_megatron.evaluation.results import RESULTS_FILE, Results, StoredResult, paired, read_results, write_comparison
from asd_megatron.observe.run_names import run_names
from asd_megatron.observe.writer import METRICS_FILE, read_metrics
from asd_megatron.run.evaluation_request import Request
from asd_megatron.run.folder import EVALUATION, writing
from asd_megatron.run.subjects import OUT, Subject, run_of


def report(results: Sequence[Results], subjects: Sequence[Subject], out: Path | None) -> None:
    """Print the tables and draw the figures; of several models, write their comparison into `out`, by default
    `evaluation`."""
    for found, subject in zip(results, subjects, strict=True):
        with writing(subject.out):
            plot_pass_at_k(_pass_curves([found]), subject.out / PASS_FILE)
        print(f"\n{results_table(found)}\nwritten: {subject.out}", flush=True)
    if len(results) == 1:
        return
    folder = out or OUT
    differences = [d for other in results[1:] for d in paired(results[0], other)]
    with writing(folder):
        write_comparison(folder, results, differences)
        paths = [plot_pass_at_k(_pass_curves(results), folder / PASS_FILE)]
        curves = _step_curves(results, subjects)
        if any(len(curve.points) > 1 for curve in curves):
            paths.append(plot_over_steps(curves, folder / STEPS_FILE))
            _tell_reached(curves)
    print(f"\n{comparison_table(results, differences)}", flush=True)
    print(
        f"written: {folder / 'comparison.json'}, comparison.csv, {', '.join(path.name for path in paths)}", flush=True
    )


def _pass_curves(results: Sequence[Results]) -> list[PassCurve]:
    return [PassCurve(found.label, result.name, result.pass_curve()) for found in results for result in found.sets]


def _step_curves(results: Sequence[Results], subjects: Sequence[Subject]) -> list[StepCurve]:
    """A curve for each run and set, of the steps that were evaluated."""
    curves: dict[tuple[str, str], StepCurve] = {}
    for found, subject in zip(results, subjects, strict=True):
        for result in found.sets if subject.run is not None else ():
            key = (str(subject.run), result.name)
            curve = curves.setdefault(key, StepCurve(*key, {}))
            curves[key] = StepCurve(*key, {**curve.points, subject.step: result.metrics[result.average]})
    return list(curves.values())


def _tell_reached(curves: Sequence[StepCurve]) -> None:
    bases: dict[str, StepCurve] = {}
    for curve in curves:
        base = bases.setdefault(curve.name, curve)
        if curve is not base:
            print(f"{curve.name}: {reached_text(base, curve)}", flush=True)


# ---------------------------------------------------------------- --plot


def plot(request: Request) -> int:
    """Draw what runs have measured so far, during training (metrics.jsonl) and by `asd-megatron evaluate`
    (RUN/evaluation/*/results.json), and what other folders of results hold. Answers nothing. Returns exit status 0;
    raises UserError where there is nothing to draw."""
    folder = request.out or OUT
    names = run_names(*request.what)
    steps: list[StepCurve] = []
    passes: list[PassCurve] = []
    for what, name in zip(request.what, names, strict=True):
        stored = _stored(Path(what))
        steps += _merged(name, Path(what), stored)
        if stored:
            newest = max(stored, key=lambda found: found.step)
            passes += [PassCurve(name, of_set, _curve(metrics)) for of_set, metrics in newest.sets.items()]
    if not any(curve.points for curve in steps) and not passes:
        raise UserError(
            f"{', '.join(request.what)}: no evaluation to plot yet; evaluate during training (evaluation.every), or"
            " with asd-megatron evaluate RUN --all"
        )
    with writing(folder):
        if any(curve.points for curve in steps):
            print(f"written: {plot_over_steps(steps, folder / STEPS_FILE)}")
            _tell_reached([curve for curve in steps if curve.points])
        if passes:
            print(f"written: {plot_pass_at_k(passes, folder / PASS_FILE)}", flush=True)
    return 0


def _stored(folder: Path) -> list[StoredResult]:
    """The results in a run folder, or in a folder of results. Raises UserError for a folder that is neither."""
    found = [folder / RESULTS_FILE] if (folder / RESULTS_FILE).is_file() else []
    found += sorted((folder / EVALUATION).glob(f"step_*/{RESULTS_FILE}"))
    if not found and run_of(folder) is None:
        raise UserError(f"{folder} is no run folder and holds no {RESULTS_FILE}: give runs or results of an evaluation")
    return [read_results(path) for path in found]


def _merged(name: str, folder: Path, stored: Sequence[StoredResult]) -> list[StepCurve]:
    """The run's curves by set: of an evaluation by the command where there is one, else of training."""
    rows = read_metrics(folder) if (folder / METRICS_FILE).is_file() else []
    points = {curve.name: dict(curve.points) for curve in curves_of_metrics(name, rows)}
    if run_of(folder) is not None:
        for found in stored:
            for of_set, metrics in found.sets.items():
                average = next(metric for metric in metrics if metric.startswith("avg@"))
                points.setdefault(of_set, {})[found.step] = metrics[average]
    return [StepCurve(name, of_set, values) for of_set, values in points.items()]


def _curve(metrics: Mapping[str, Estimate]) -> list[tuple[int, Estimate]]:
    """(k, pass@k), k rising."""
    found = [(int(name.removeprefix("pass@")), e) for name, e in metrics.items() if name.startswith("pass@")]
    return sorted(found, key=lambda point: point[0])
