"""The last thing a run says."""

from __future__ import annotations

from pathlib import Path

from asd_megatron.observe.closing import Sample, closing_table
from asd_megatron.run.evaluation import evaluation_line

ROWS = [
    {"step": 0, "evaluation/accuracy": 0.2, "evaluation/length_mean": 9.0},
    *({"step": s, "reward/mean": s / 40, "entropy/student_mean": None} for s in range(1, 20)),
    {"step": 20, "reward/mean": 0.5, "evaluation/accuracy": 0.6, "evaluation/length_mean": 30.0},
    {"step": 40, "reward/mean": 0.5, "evaluation/accuracy": 0.5, "evaluation/length_mean": 31.0},
]


def test_before_and_after_best_step_places_and_a_sample() -> None:
    text = closing_table(ROWS, run_folder=Path("R"), model_folder=Path("R/hf/step_40"), sample=Sample("1 + 1?", "2", 1))
    lines = [line.split() for line in text.splitlines()]
    assert ["held-out", "accuracy", "0.200", "0.500"] in lines
    assert ["mean", "reward", "of", "training", "rollouts", "0.138", "0.410"] in lines  # means of 10 steps each
    assert "best held-out accuracy: 0.600 after step 20" in text
    assert "R/hf/step_40" in text and "R/curves.png" in text
    assert "| 1 + 1?" in text and "reward 1" in text


def test_a_mean_of_graded_rewards_is_no_accuracy() -> None:
    rows = [
        {"step": 0, "evaluation/accuracy": 0.3, "evaluation/pass_rate": 0.1},
        {"step": 1, "reward/mean": 0.4, "reward/pass_rate": 0.4},
        {
            "step": 2,
            "reward/mean": 0.5,
            "reward/pass_rate": 0.2,
            "evaluation/accuracy": 0.6,
            "evaluation/pass_rate": 0.2,
        },
    ]
    text = closing_table(rows, run_folder=Path("R"), model_folder=None)
    lines = [line.split() for line in text.splitlines()]
    assert ["held-out", "mean", "reward", "0.300", "0.600"] in lines
    assert ["held-out", "pass", "rate", "0.100", "0.200"] in lines
    assert ["pass", "rate", "of", "training", "rollouts", "0.400", "0.200"] in lines
    line = evaluation_line(1, {**rows[0], "evaluation/length_mean": 3})
    assert "mean reward after 1 step: 0.300, pass rate 0.100" in line and "accuracy" not in line
    right = {"evaluation/accuracy": 0.5, "evaluation/pass_rate": 0.5, "evaluation/length_mean": 3}
    assert evaluation_line(2, right).startswith("held-out accuracy after 2 steps: 0.500, response")
    assert "accuracy" not in text and "best held-out mean reward: 0.600" in text


def test_a_run_without_evaluation_or_export_and_a_long_sample() -> None:
    text = closing_table(
        [{"step": 1, "sft/loss": 2.0}, {"step": 2, "sft/loss": 1.0}],
        run_folder=Path("R"),
        model_folder=None,
        sample=Sample("p", "x" * 10_000, 0),
    )
    assert "cross-entropy (nats)     2.000     1.000" in text
    assert "best" not in text and "export_at_end" in text
    rows = [{"step": s, "evaluation/aime/avg@4": 0.1 * s, "evaluation/aime/avg@4_se": 0.0} for s in (1, 3)]
    assert "held-out aime, avg@4     0.100     0.300" in closing_table(rows, run_folder=Path("R"), model_folder=None)
    assert len(text) < 2000
    assert "not exported" in closing_table([], run_folder=Path("R"), model_folder=None)
