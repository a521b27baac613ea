"""The journal, the files of samples and results, comparisons and figures."""

from __future__ import annotations

import csv
import io
import json
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from asd_megatron.errors import UserError
from asd_megatron.evaluation.figures import StepCurve, curves_of_metrics, plot_over_steps, reached_text
from asd_megatron.evaluation.intervals import Estimate
from asd_megatron.evaluation.journal import Journal
from asd_megatron.evaluation.outcomes import Outcomes, Sample
from asd_megatron.evaluation.report import comparison_table, results_table
from asd_megatron.evaluation.results import (
    RESULTS_FILE,
    Results,
    SetResult,
    paired,
    read_results,
    table_csv,
    write_results,
)
from asd_megatron.evaluation.samples import SetSamples, read_samples, write_samples
from asd_megatron.records import Problem

IDENTITY = {"weights": "0f3a", "temperature": 0.7, "stop": ["\n"]}


def sample(reward: float, *, tokens: int = 5, reason: str = "stop", answer: str | None = None) -> Sample:
    return Sample(f"the answer é\u2028\x85\n is {answer}", tokens, reason, reward, answer)


def set_samples(rewards: Any, names: str = "pqrst") -> SetSamples:
    rows = tuple(tuple(sample(r, answer=str(int(r))) for r in row) for row in rewards)
    return SetSamples(tuple(names[: len(rows)]), rows, {"timeouts": 1}, IDENTITY)


def test_a_journal_continues_after_its_last_complete_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal-a.jsonl"
    journal = Journal(path, IDENTITY)
    first, second = (sample(1.0, answer="4"), sample(0.0)), (sample(0.1), sample(0.25, reason="length"))
    journal.add([(3, "p3", first), (0, "p0", second)], {"timeouts": 2, "errors": 0})
    journal.add([(1, "p1", first)])
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"problem": 2, "id": "p2", "samp')  # a kill amid a line
    again = Journal(path, IDENTITY)
    assert again.done == {3: first, 0: second, 1: first} and again.failures == {"timeouts": 2}
    again.add([(2, "p2", second)], {"errors": 1})
    again.close()
    last = Journal(path, IDENTITY)
    assert sorted(last.done) == [0, 1, 2, 3] and last.failures == {"timeouts": 2, "errors": 1}
    last.remove()
    assert not path.exists()


def test_a_journal_on_a_full_disk_says_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal-a.jsonl", IDENTITY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        with pytest.raises(UserError, match="cannot be written.*what is answered is kept"):
            journal.add([(0, "p", [sample(1.0)] * 4)])
        journal.close()  # what is left in memory is refused again
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not Journal(journal.path, IDENTITY).done


def test_a_journal_of_other_weights_or_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal-a.jsonl"
    Journal(path, IDENTITY).close()
    with pytest.raises(UserError, match=r"temperature: 0.7 -> 1.0\).*--overwrite"):
        Journal(path, {**IDENTITY, "temperature": 1.0})
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="is damaged.*remove it"):
        Journal(path, IDENTITY)


def test_samples_are_a_parquet_file_that_reads_back(tmp_path: Path) -> None:
    found = set_samples([[1.0, 0.0], [0.5, 1.0]])
    problems = [Problem(name, "1", prompt=f"question {name}") for name in "pq"]
    path = write_samples(tmp_path / "samples-a.parquet", found, problems, ["<s> question p", "<s> question q"])
    assert read_samples(path) == found
    rows = pq.read_table(path).to_pylist()
    assert rows[1] | {"response": "", "extracted": ""} == {
        "problem": "p", "place": 0, "sample": 1, "question": "question p", "prompt": "<s> question p", "answer": "1",
        "response": "", "tokens": 5, "finish_reason": "stop", "reward": 0.0, "extracted": "",
    }  # fmt: skip
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read as samples.*remove it"):
        read_samples(path)


def test_outcomes_of_a_step() -> None:
    """The metrics of a training step, with k in powers of two."""
    rows = [
        [sample(1.0, answer="a"), sample(0.0, answer="b"), sample(0.0, answer="b"), sample(0.0, reason="length")],
        [sample(1.0, answer="c", tokens=9)] * 4,
    ]
    metrics = Outcomes.of(rows, {"timeouts": 2, "errors": 1, "restarts": 5}).metrics(1.0)
    assert metrics == pytest.approx(
        {
            "avg@4": 0.625, "avg@4_se": 0.375, "pass@1": 0.625, "pass@2": 0.75, "pass@4": 1.0, "pass@4_se": 0.0,
            "maj@2": (0.5 * (2 / 6) + 1 / 6 + 1) / 2, "maj@4": 0.5, "length_mean": 7.0, "truncated": 0.125,
            "errors": 3.0,
        }
    )  # fmt: skip
    assert not any(name.startswith("maj@") for name in Outcomes.of([[sample(1.0), sample(0.0)]]).metrics(1.0))


def results(label: str, rewards: Any, names: str = "pqrst") -> Results:
    return Results(label, "model", 60, [SetResult.of("a", set_samples(rewards, names), 1.0)])


def test_results_and_paired_differences(tmp_path: Path) -> None:
    base = results("base", [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    other = results("other", [[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]][::-1], "srqp")  # in another order
    (apart,) = paired(base, other)
    found = apart.differences["avg@2"]
    assert found.estimate.value == 0.25 and (found.better, found.worse, found.equal) == (2, 0, 2)
    fewer = results("fewer", [[1.0, 1.0], [1.0, 1.0]], "qz")
    (one,) = paired(base, fewer)
    assert one.differences["pass@1"].as_json()["problems"] == 1 and one.differences["pass@1"].better == 1
    with pytest.raises(UserError, match="has no problem of that of base"):
        paired(base, results("foreign", [[1.0, 1.0]], "z"))
    write_results(tmp_path, base)
    stored = read_results(tmp_path / RESULTS_FILE)
    assert stored.sets["a"]["avg@2"] == base.sets[0].metrics["avg@2"] and stored.step == 60
    content = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert content["sets"]["a"]["settings"]["temperature"] == 0.7 and content["sets"]["a"]["failures"]["timeouts"] == 1
    rows = list(csv.DictReader(io.StringIO(table_csv([base, other], [apart]))))
    row = next(r for r in rows if r["label"] == "other" and r["metric"] == "pass@2")
    assert float(row["value"]) == 0.75 and float(row["difference_value"]) == 0.25 and row["better"] == "1"
    text = comparison_table([base, other], [apart])
    assert "+0.250 [" in text and "2/0/2" in text and "base" in results_table(base)
    assert results_table(base).count("\n") == 2


def test_the_mean_of_sets_weighs_them_equally() -> None:
    sets = [
        SetResult.of("a", set_samples([[1.0], [0.0]]), 1.0),
        SetResult.of("b", set_samples([[1.0], [1.0], [1.0], [0.0]]), 1.0),
    ]
    mean = Results("x", "model", 0, sets).mean
    assert mean is not None and mean.value == pytest.approx((0.5 + 0.75) / 2)
    assert mean.error == pytest.approx(np.hypot(0.5, 0.25) / 2)


def test_the_first_step_that_reaches_the_baselines_best(tmp_path: Path) -> None:
    rows = [{"step": s, "evaluation/a/avg@4": v, "evaluation/a/avg@4_se": 0.01} for s, v in ((0, 0.1), (40, 0.5))]
    (base,) = curves_of_metrics("grpo", [*rows, {"step": 80, "evaluation/a/avg@4": 0.4}])
    assert base.best == (40, 0.5) and base.name == "a"
    ours = StepCurve("antisd", "a", {0: Estimate(0.1), 10: Estimate(0.55), 40: Estimate(0.7)})
    assert reached_text(base, ours).endswith("0.500 at step 40, first at step 10, 4.0x fewer steps")
    assert "never reaches" in reached_text(ours, base)
    assert plot_over_steps([base, ours], tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="no evaluation to plot"):
        plot_over_steps([StepCurve("x", "a")], tmp_path / "none.png")
