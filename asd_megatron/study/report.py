"""FOLDER/report.md: tables of a study's finished cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from asd_megatron.errors import plural
from asd_megatron.files import atomic_write
from asd_megatron.observe.names import graded
from asd_megatron.study.cells import LOG_FILE, CellRecord
from asd_megatron.study.markdown import NOTHING, counted, decimals, number, spread, table, when
from asd_megatron.study.plan import CellKey
from asd_megatron.study.results import CellResult, Point, trained_alike
from asd_megatron.study.schema import Study
from asd_megatron.study.statistics import (
    crossing,
    differences,
    paired,
    reached,
    summarize,
    value_at,
    variance_components,
)

REPORT_FILE = "report.md"
Pair = tuple[str, int]  # start and seed: what two arms have in common
Value = Callable[[CellResult], float | None]


@dataclass(frozen=True)
class Findings:
    """A study, the records of all its cells (None: not run yet) and the results of the finished ones."""

    study: Study
    records: Mapping[CellKey, CellRecord | None]
    results: Sequence[CellResult]

    @property
    def arms(self) -> list[str]:
        """Arms with at least one finished cell, in the file's order."""
        there = {result.key.arm for result in self.results}
        return [arm for arm in self.study.arms if arm in there]

    @property
    def steps(self) -> list[int]:
        """The columns of the tables: those asked for, or every evaluation."""
        asked = self.study.table.steps
        return list(asked) if asked else sorted({point.step for result in self.results for point in result.points})

    @property
    def main_metric(self) -> str:
        target = self.study.target
        return target.metric if target is not None else self.study.table.metrics[0]

    def of(self, arm: str, start: str | None = None) -> list[CellResult]:
        return [r for r in self.results if r.key.arm == arm and start in (None, r.key.start)]

    def values(self, arm: str, value: Value, start: str | None = None) -> dict[Pair, float | None]:
        return {(r.key.start, r.key.seed): value(r) for r in self.of(arm, start)}

    def against(self, arm: str, value: Value, start: str | None = None) -> list[float | None]:
        """The arm's value less the baseline's, of the same start and seed."""
        baseline = self.values(self.study.baseline_arm, value, start)
        return list(differences(self.values(arm, value, start), baseline).values())


def at(step: int, metric: str) -> Value:
    """The metric at an evaluation's step."""
    return lambda result: result.at(step, metric)


def equal_arms(findings: Findings) -> list[tuple[str, str]]:
    """Pairs of arms whose cells of the same start and seed, one at least, all trained alike."""
    cells = {arm: {(r.key.start, r.key.seed): r for r in findings.of(arm)} for arm in findings.arms}
    found = []
    for one, other in combinations(findings.arms, 2):
        shared = cells[one].keys() & cells[other].keys()
        if shared and all(trained_alike(cells[one][pair], cells[other][pair]) for pair in shared):
            found.append((one, other))
    return found


def equal_arms_text(one: str, other: str) -> str:
    """The warning about a pair of `equal_arms`."""
    return (
        f"arms {one} and {other} trained alike to the last digit: what they differ in had no effect (is the gate open, "
        "does any rollout have privileged context? Look at gate/lambda, pmi/coverage and the runs' summary.json)"
    )


def write_report(findings: Findings, plots: Sequence[Path] = ()) -> Path:
    """Write FOLDER/report.md; returns its path."""
    study = findings.study
    lines = [f"# Study {study.name}", "", *_overview(findings)]
    if findings.results:
        lines += _how_to_read(findings)
        lines += _target(findings)
        for metric in study.table.metrics:
            lines += [f"## {metric}", "", *_metric(findings, metric)]
            if metric == findings.main_metric:
                lines += _metric_differences(findings, metric)
        lines += _equal_seconds(findings) + _starts(findings)
    lines += _failed(findings) + _plots(study.path, plots)
    for metric in study.table.metrics:
        if metric != findings.main_metric and (differing := _metric_differences(findings, metric)):
            lines += [f"## {metric}: differences from `{study.baseline_arm}`", "", *differing]
    return atomic_write(study.path / REPORT_FILE, "\n".join(lines) + "\n")


def _overview(findings: Findings) -> list[str]:
    study, records = findings.study, findings.records
    states = [record.status if record is not None else "not run" for record in records.values()]
    kinds = [(kind, states.count(kind)) for kind in ("failed", "interrupted", "running", "not run")]
    others = "".join(f", {n} {kind}" for kind, n in kinds if n)
    rows = []
    for arm, settings in study.arms.items():
        keys = [key for key in records if key.arm == arm]
        done = [r for k in keys if (r := records[k]) is not None and r.status == "finished"]
        wall, cpu = summarize(record.seconds for record in done), summarize(record.cpu_seconds for record in done)
        overrides = ", ".join(f"{key} {value}" for key, value in settings.overrides.items())
        rows.append([f"`{arm}`", overrides or NOTHING, f"{len(done)} of {len(keys)}", spread(wall, 0), spread(cpu, 0)])
    common = ", ".join(f"{key} {value}" for key, value in study.overrides.items())
    return [
        f"Recipe `{study.recipe}`" + (f" with {common}" if common else "") + ".",
        f"{states.count('finished')} of {plural(len(states), 'cell')} finished{others}. "
        f"Starts: {', '.join(study.starts)}; seeds: {', '.join(map(str, study.seeds))}.",
        "",
        *table(["arm", "overrides", "finished cells", "seconds a cell", "CPU seconds"], rows, left=2),
        "",
        *[line for pair in equal_arms(findings) for line in (f"**Warning:** {equal_arms_text(*pair)}.", "")],
    ]


def _how_to_read(findings: Findings) -> list[str]:
    baseline = findings.study.baseline_arm
    rewards = [
        "* Rewards are graded, not only 0 and 1: `evaluation/accuracy` is the mean reward of held-out responses, and "
        "`evaluation/pass_rate` the fraction that passed.",
    ]
    return [
        "How to read the tables:",
        "",
        "* Numbers are mean ± sample standard deviation over an arm's finished cells (n; another n is in brackets). A "
        "dash: no number.",
        "* Held-out metrics (`evaluation/`) are of one evaluation; the others are means over the steps since the "
        "evaluation before.",
        *(rewards if graded(row for result in findings.results for row in result.rows) else []),
        f"* Differences are arm less `{baseline}`, of cells with the same start and seed. Arms that ran from other "
        "starts or with other seeds compare there alone.",
        "* The interval is for the mean difference: 95%, percentile bootstrap over the pairs, 10,000 resamples, fixed "
        "seed. It is too narrow below about 8 pairs, and takes pairs of one start for independent.",
        "* p is the sign-flip test's, two-sided. Its smallest value is 2 / 2^n: 0.25 for 3 pairs. Of many differences, "
        "one in twenty has a p below 0.05 by chance.",
        "* Training seconds are wall-clock without evaluations (`time/total` less `time/evaluate`): they compare only "
        "if nothing else ran. CPU seconds are a complete cell's, all its processes and threads.",
        "",
    ]


def _columns(findings: Findings, metric: str) -> list[int]:
    """The tabled steps at which some cell has the metric."""
    return [step for step in findings.steps if any(r.at(step, metric) is not None for r in findings.results)]


def _metric(findings: Findings, metric: str) -> list[str]:
    """The metric by arm and step."""
    columns = _columns(findings, metric)
    if not columns:
        return ["No finished cell has this metric at these steps.", ""]
    return [*_by_arm(findings, [(str(step), at(step, metric)) for step in columns]), ""]


def _by_arm(findings: Findings, columns: Sequence[tuple[str, Value]]) -> list[str]:
    """A table: mean ± sd of each (label, value) for each arm."""
    cells = {a: [summarize(findings.values(a, value).values()) for _, value in columns] for a in findings.arms}
    digits = decimals(summary.mean for summaries in cells.values() for summary in summaries)
    rows = []
    for arm, summaries in cells.items():
        n = len(findings.of(arm))
        rows.append([f"`{arm}`", str(n), *[counted(summary, digits, n) for summary in summaries]])
    return table(["arm", "n", *[label for label, _ in columns]], rows)


def _metric_differences(findings: Findings, metric: str) -> list[str]:
    """The metric's paired differences; nothing at step 0, where the arms are the same model."""
    values = [(str(step), at(step, metric)) for step in _columns(findings, metric) if step > 0]
    return _differences(findings, "step", values)


def _differences(findings: Findings, unit: str, values: Sequence[tuple[str, Value]]) -> list[str]:
    """A row for each arm but the baseline and each (label, value)."""
    found = [
        (label, arm, paired(findings.against(arm, value)))
        for label, value in values
        for arm in findings.arms
        if arm != findings.study.baseline_arm
    ]
    found = [(label, arm, pair) for label, arm, pair in found if pair.summary.n]
    if not found:
        return []
    digits = decimals(pair.summary.mean for _, _, pair in found)
    rows = [
        [
            label,
            f"`{arm}`",
            str(pair.summary.n),
            spread(pair.summary, digits, sign=True),
            f"{number(pair.low, digits, sign=True)} to {number(pair.high, digits, sign=True)}"
            if pair.summary.n > 1
            else NOTHING,
            number(pair.p, 4),
            str(pair.summary.missing or NOTHING),
        ]
        for label, arm, pair in found
    ]
    header = [unit, "arm", "pairs", f"difference from `{findings.study.baseline_arm}`", "95% interval", "p", "missing"]
    return [*table(header, rows, left=2), ""]


def _target(findings: Findings) -> list[str]:
    target = findings.study.target
    if target is None:
        return []

    def along(x: Callable[[Point], float]) -> Value:
        return lambda r: crossing([x(p) for p in r.points], r.column(target.metric), target.at_least)

    times = [("steps", along(lambda point: point.step)), ("training seconds", along(lambda point: point.seconds))]
    rows = []
    for arm in findings.arms:
        found = [reached(findings.values(arm, value).values()) for _, value in times]
        texts = [text for reaching in found for text in (when(reaching, 1), number(reaching.median, 1))]
        rows.append([f"`{arm}`", str(found[0].reached + found[0].never), str(found[0].never), *texts])
    header = ["arm", "n", "never", *(text for label, _ in times for text in (label, "median"))]
    return [
        f"## Until {target.metric} is at least {target.at_least:g}",
        "",
        "The first crossing, interpolated linearly between evaluations. Means are over the cells that got there; in "
        "the median the others count as later than any (a dash: half or more never did).",
        "",
        *table(header, rows),
        "",
        "Of the pairs that both got there:",
        "",
        *_differences(findings, "in", times),
    ]


def _equal_seconds(findings: Findings) -> list[str]:
    """The main metric when as many seconds of training have passed as the baseline needs for each tabled step."""
    metric, baseline = findings.main_metric, findings.of(findings.study.baseline_arm)
    times = [(s, summarize(r.seconds_at(s) for r in baseline)) for s in findings.steps if s > 0]
    marks = [(step, summary.mean) for step, summary in times if summary.n]
    if not marks:
        return []

    def after(seconds: float) -> Value:
        return lambda r: value_at([p.seconds for p in r.points], r.column(metric), seconds)

    values = [(f"{mark:.1f} s (step {step})", after(mark)) for step, mark in marks]
    return [
        f"## {metric} at equal training seconds",
        "",
        f"Columns: the mean seconds after which `{findings.study.baseline_arm}` has made so many steps. Values between "
        "evaluations are interpolated linearly; a cell that has ended by then has none.",
        "",
        *_by_arm(findings, values),
        "",
        *_differences(findings, "at", values),
    ]


def _starts(findings: Findings) -> list[str]:
    """The main metric from each start, and which spread is whose."""
    study, metric = findings.study, findings.main_metric
    arms = [arm for arm in findings.arms if len({r.key.start for r in findings.of(arm)}) > 1]
    if not arms:
        return []
    columns = _columns(findings, metric)
    values = [at(step, metric) for step in columns]
    places = [(arm, start) for arm in arms for start in study.starts if findings.of(arm, start)]
    rows = [_level(findings, arm, start, values) for arm, start in places]
    gaps = [row for arm, start in places if arm != study.baseline_arm and (row := _gap(findings, arm, start, values))]
    fractions = [row for arm in arms for row in _spreads(findings, arm, values)]
    steps = list(map(str, columns))
    lines = [f"## {metric} from each start", "", *table(["arm", "start", "n", *steps], rows, left=2), ""]
    if gaps:
        lines += [f"Differences from `{study.baseline_arm}`:", ""]
        lines += [*table(["arm", "start", "pairs", *steps], gaps, left=2), ""]
    lines += [
        "Standard deviations of a random-effects model (analysis of variance; an estimate below 0 is 0). With few "
        "starts the first is rough.",
        "",
        *table(["arm", "spread", *steps], fractions, left=2),
        "",
    ]
    return lines


def _level(findings: Findings, arm: str, start: str, values: Sequence[Value]) -> list[str]:
    """A row: the arm's mean ± sd of each value from one start."""
    n = len(findings.of(arm, start))
    summaries = [summarize(findings.values(arm, value, start).values()) for value in values]
    return [f"`{arm}`", start, str(n), *[counted(summary, 3, n) for summary in summaries]]


def _gap(findings: Findings, arm: str, start: str, values: Sequence[Value]) -> list[str]:
    """A row: the arm's differences from the baseline from one start; empty without pairs."""
    pairs = [summarize(findings.against(arm, value, start)) for value in values]
    n = max((pair.n for pair in pairs), default=0)
    return [f"`{arm}`", start, str(n), *[counted(pair, 3, n, sign=True) for pair in pairs]] if n else []


def _spreads(findings: Findings, arm: str, values: Sequence[Value]) -> list[list[str]]:
    """Two rows: the standard deviations between starts and between seeds of each value."""
    parts = [
        variance_components(
            {start: [value(result) for result in findings.of(arm, start)] for start in findings.study.starts}
        )
        for value in values
    ]
    between, within = [number(part.between, 3) for part in parts], [number(part.within, 3) for part in parts]
    return [[f"`{arm}`", "between starts", *between], [f"`{arm}`", "between seeds", *within]]


def _failed(findings: Findings) -> list[str]:
    lines = []
    for key, record in findings.records.items():
        if record is not None and record.status == "failed":
            place = f"cells/{key}/{LOG_FILE}"
            lines += [f"* `{key}`, exit status {record.exit_status} ({place}):", "", "  ```"]
            lines += [f"  {line}" for line in record.log_tail] + ["  ```", ""]
    return ["## Failed cells", "", *lines] if lines else []


def _plots(folder: Path, plots: Sequence[Path]) -> list[str]:
    if not plots:
        return []
    images = [f"![{path.stem}]({path.relative_to(folder)})" for path in plots]
    return ["## Curves", "", "Mean over the cells, the band is ± one standard deviation.", "", *images]
