"""The report's tables, and the curves."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from asd_megatron.study.plots import arm_curve, curve, plot_study, title, without_repeats
from asd_megatron.study.report import Findings, equal_arms, write_report
from tests.study.world import findings, record


def cells(text: str, heading: str, first: str) -> list[list[str]]:
    """The rows of a section that begin with the cell `first`."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] == first]


@pytest.fixture
def found(tmp_path: Path) -> Findings:
    return findings(tmp_path)


def test_means_and_differences(found: Findings) -> None:
    text = write_report(found).read_text()
    assert "12 of 12 cells finished." in text
    grpo, antisd = cells(text, "evaluation/accuracy", "`grpo`")[0], cells(text, "evaluation/accuracy", "`antisd`")[0]
    # start a: .21 .22 .23, start b: .31 .32 .33; grpo gains .2, antisd .32 .34 .36 at step 10
    assert grpo == ["`grpo`", "6", "0.270 ± 0.055", "0.470 ± 0.055", "0.670 ± 0.055"]
    assert antisd[3] == "0.610 ± 0.061"
    (difference,) = cells(text, "evaluation/accuracy", "10")
    assert difference[1:4] == ["`antisd`", "6", "+0.140 ± 0.018"] and difference[5] == "0.0312"
    low, high = map(float, difference[4].split(" to "))
    assert 0.12 <= low < 0.14 < high <= 0.16
    assert "No finished cell has this metric" not in text
    assert cells(text, "pmi/mean: differences from `grpo`", "10")[0][3] == "+0.000 ± 0.000"


def test_arms_that_trained_alike_are_pointed_out(found: Findings) -> None:
    assert "Warning" not in write_report(found).read_text()
    grpo = {(r.key.start, r.key.seed): r for r in found.of("grpo")}
    copies = [r if r.key.arm == "grpo" else replace(grpo[r.key.start, r.key.seed], key=r.key) for r in found.results]
    same = replace(found, results=copies)
    assert equal_arms(same) == [("grpo", "antisd")]
    assert "**Warning:** arms grpo and antisd trained alike" in write_report(same).read_text()
    last = copies[-1]
    rows = [*last.rows[:-1], {**last.rows[-1], "evaluation/accuracy": 0.123}]
    assert equal_arms(replace(found, results=[*copies[:-1], replace(last, rows=rows)])) == []


def test_steps_and_seconds_to_the_target(found: Findings) -> None:
    text = write_report(found).read_text()
    row = cells(text, "Until evaluation/accuracy is at least 0.5", "`grpo`")[0]
    # .29 / .2 steps of 10 and so on; two seconds each, evaluations not counted
    times = [10 * (0.5 - base) / 0.2 for base in (0.21, 0.22, 0.23, 0.31, 0.32, 0.33)]
    assert row[1:3] == ["6", "0"] and row[3] == f"{np.mean(times):.1f} ± {np.std(times, ddof=1):.1f}"
    assert float(row[4]) == pytest.approx(np.median(times), abs=0.051) and float(row[6]) == pytest.approx(
        2 * np.median(times), abs=0.051
    )


def test_equal_seconds_are_between_evaluations(found: Findings) -> None:
    text = write_report(found).read_text()
    (row,) = cells(text, "evaluation/accuracy at equal training seconds", "`antisd`")
    header = next(line for line in text.splitlines() if "(step 10)" in line)
    assert re.findall(r"[\d.]+ s \(step \d+\)", header) == ["20.0 s (step 10)", "40.0 s (step 20)"]
    # after 20 s antisd has made 8 steps of 2.5 s: .8 of the first gain
    expected = [b + 0.8 * g for b, g in zip((0.21, 0.22, 0.23, 0.31, 0.32, 0.33), (0.32, 0.34, 0.36) * 2, strict=True)]
    assert row[2] == f"{np.mean(expected):.3f} ± {np.std(expected, ddof=1):.3f}"


def test_starts(found: Findings) -> None:
    text = write_report(found).read_text()
    rows = cells(text, "evaluation/accuracy from each start", "`grpo`")
    assert ["`grpo`", "a", "3", "0.220 ± 0.010", "0.420 ± 0.010", "0.620 ± 0.010"] in rows
    assert ["`grpo`", "between seeds", "0.010", "0.010", "0.010"] in rows
    between = next(row for row in rows if row[1] == "between starts")
    assert float(between[2]) == pytest.approx(((0.1**2 / 2) - 0.01**2 / 3) ** 0.5, abs=0.0006)
    gaps = cells(text, "evaluation/accuracy from each start", "`antisd`")
    assert ["`antisd`", "b", "3", "+0.000 ± 0.000", "+0.140 ± 0.020", "+0.280 ± 0.040"] in gaps


def test_cells_that_failed_or_are_missing(found: Findings) -> None:
    keys = list(found.records)
    failed = record(keys[0], status="failed", exit_status=3, log_tail=["ValueError: the corpus is empty"])
    records = {**found.records, keys[0]: failed, keys[1]: None}
    text = write_report(replace(found, records=records, results=found.results[2:])).read_text()
    assert "10 of 12 cells finished, 1 failed, 1 not run." in text
    assert "ValueError: the corpus is empty" in text and f"cells/{keys[0]}/log.txt" in text
    assert cells(text, "evaluation/accuracy", "10")[0][2] == "5"  # the pair that is left


def test_nothing_finished_is_a_report_too(found: Findings) -> None:
    text = write_report(replace(found, records=dict.fromkeys(found.records), results=[])).read_text()
    assert "0 of 12 cells finished, 12 not run." in text


def test_curves_of_an_arm(found: Findings) -> None:
    cell = found.results[0]
    assert curve(cell, "evaluation/accuracy", "seconds")[0] == [0.0, 20.0, 40.0]
    steps, values = curve(cell, "pmi/mean", "step")
    assert steps == [float(s) for s in range(1, 20, 2)] and len(values) == 10  # even steps have none
    grid, mean, sd = arm_curve(found.of("grpo"), "evaluation/accuracy", "step") or pytest.fail("no curve")
    assert grid.tolist() == [0.0, 10.0, 20.0] and mean == pytest.approx([0.27, 0.47, 0.67])
    assert sd == pytest.approx([0.0548] * 3, abs=1e-3)
    assert arm_curve(found.of("grpo"), "gate/lambda", "step") is None


def test_panels_have_titles_in_words_and_do_not_repeat(found: Findings) -> None:
    assert title("evaluation/accuracy", 200).startswith(
        "Mean reward: of rewards 0 and 1, the fraction of right answers"
    )
    assert title("puzzle/u_wait", 200).endswith("[wait] (nats)")
    doubled = [replace(r, rows=[{**row, "gate/entropy": row.get("pmi/mean")} for row in r.rows]) for r in found.results]
    metrics = ["pmi/mean", "gate/entropy", "evaluation/accuracy"]
    assert without_repeats(metrics, replace(found, results=doubled)) == ["pmi/mean", "evaluation/accuracy"]


def test_plots_are_drawn_and_shown(found: Findings) -> None:
    paths = plot_study(found)
    assert [path.stem for path in paths] == [
        "overview_by_step",
        "overview_by_seconds",
        "evaluation_accuracy",
        "pmi_mean",
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
    assert "(plots/evaluation_accuracy.png)" in write_report(found, paths).read_text()
