"""The console's tables of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from asd_megatron.errors import plural
from asd_megatron.evaluation.intervals import Difference, Estimate
from asd_megatron.evaluation.results import Results, SetDifference, SetResult

MANY = 0.25  # truncated responses of a set, from which on the table says what to do
HEADER = ("set", "problems", "avg@n", "pass@n", "maj@n", "length", "truncated", "errors")


def results_table(results: Results) -> str:
    """A model on its sets: means ± standard errors over problems; n is each set's number of samples."""
    rows = [list(HEADER), *(_row(result) for result in results.sets)]
    if results.mean is not None:
        rows.append(["mean", "", _with_error(results.mean), "", "", "", "", ""])
    return "\n".join([results.label, _aligned(rows), *map(_cut_off, filter(_mostly_cut_off, results.sets))])


def _mostly_cut_off(result: SetResult) -> bool:
    return result.metrics["truncated"].value >= MANY


def _cut_off(result: SetResult) -> str:
    limit = result.settings.get("max_new_tokens")
    share = f"{100 * result.metrics['truncated'].value:.0f}%"
    return f"{result.name}: {share} of the responses were cut off at {limit} tokens; --max-new-tokens sets the limit"


def _row(result: SetResult) -> list[str]:
    n = result.samples
    metrics = result.metrics
    return [
        result.name,
        f"{len(result.problems)} x {n}",
        f"@{n} {_with_error(metrics[result.average])}",
        f"@{n} {_with_error(metrics[f'pass@{n}'])}",
        f"@{n} {_with_error(metrics[f'maj@{n}'])}" if f"maj@{n}" in metrics else "-",
        f"{metrics['length_mean'].value:.1f}",
        f"{100 * metrics['truncated'].value:.1f}%",
        f"{result.errors}",
    ]


def comparison_table(results: Sequence[Results], differences: Sequence[SetDifference]) -> str:
    """All models on all sets: avg@n and pass@n, and the paired differences to the first model with their 95%
    intervals."""
    apart = {(d.label, d.name): d.differences for d in differences}
    rows = [["model", "set", "avg@n", "less the baseline", "better/worse/equal", "pass@n", "less the baseline"]]
    for found in results:
        for result in found.sets:
            n, own = result.samples, apart.get((found.label, result.name), {})
            average, passed = own.get(result.average), own.get(f"pass@{n}")
            rows.append(
                [
                    found.label,
                    result.name,
                    f"@{n} {_with_error(result.metrics[result.average])}",
                    _apart(average),
                    "" if average is None else f"{average.better}/{average.worse}/{average.equal}",
                    f"@{n} {_with_error(result.metrics[f'pass@{n}'])}",
                    _apart(passed),
                ]
            )
        if found.mean is not None:
            rows.append([found.label, "mean", _with_error(found.mean), "", "", "", ""])
    count = plural(len(results), "model")
    return f"{count}; differences to {results[0].label}, paired by problem, with 95% intervals\n" + _aligned(rows, 2)


def _apart(found: Difference | None) -> str:
    if found is None:
        return ""
    e = found.estimate
    interval = f" [{e.low:+.3f}, {e.high:+.3f}]" if math.isfinite(e.low) else ""
    return f"{e.value:+.3f}{interval}"


def _with_error(found: Estimate) -> str:
    return f"{found.value:.3f}" + (f" ± {found.error:.3f}" if math.isfinite(found.error) else "")


def _aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their longest text, the first `left` aligned left and the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
