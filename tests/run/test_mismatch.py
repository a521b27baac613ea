"""Warnings about rollouts of another distribution: when, once, and what they advise."""

from __future__ import annotations

import math

from asd_megatron.run.mismatch import LARGE_KL, SMALL_SAMPLE, STEPS_IN_A_ROW, MismatchWarning, uncorrected
from asd_megatron.run.report import _quantized
from tests.config.test_checks import make

FP8 = "rollout.engine=sglang rollout.quantization=fp8 "
FINE = {"mismatch/k3": LARGE_KL, "mismatch/ess": SMALL_SAMPLE}
LARGE = {"mismatch/k3": 2 * LARGE_KL, "mismatch/ess": 0.99}
FEW = {"mismatch/k3": 1e-3, "mismatch/ess": 0.8}


def said(recipe: str, *steps: dict[str, float]) -> list[str | None]:
    watch = MismatchWarning(make(recipe))
    return [watch.of_step(step) for step in steps]


def test_a_large_mismatch_is_said_once_and_after_several_steps_in_a_row() -> None:
    assert STEPS_IN_A_ROW == 3
    *quiet, text, last = said(FP8, FINE, LARGE, FEW, FINE, LARGE, {}, {"mismatch/k3": math.nan}, FEW, LARGE, LARGE)
    assert quiet == [None] * 8 and last is None, "a step without numbers neither counts nor ends the row"
    assert text is not None and "mismatch/k3" in text and "set rollout.quantization none" in text
    assert "importance_correction" not in text, "it is on"


def test_the_advice_is_that_of_the_recipe() -> None:
    overlap = "rollout.engine=sglang rollout.overlap=true algorithm.importance_correction=truncated"
    assert "rollout.max_staleness" in str(said(overlap, LARGE, LARGE, LARGE)[-1])
    off = said(FP8 + "algorithm.importance_correction=none", LARGE, LARGE, LARGE)[-1]
    assert "set algorithm.importance_correction truncated" in str(off)
    assert said("rollout.engine=replay rollout.replay_folder=r", LARGE, LARGE, LARGE)[-1] is None


def test_quantised_rollouts_without_correction_are_warned_about_and_reported() -> None:
    assert uncorrected(make(FP8)) is None and uncorrected(make("")) is None and _quantized(make("")) == {}
    off = make(FP8 + "algorithm.importance_correction=none")
    assert "importance_correction out" in str(uncorrected(off)) and "NOT CORRECTED" in _quantized(off)["importance"]
    assert "truncated at 2" in _quantized(make(FP8))["importance"]
    assert "a response (geometric)" in _quantized(make(FP8 + "algorithm.importance_level=geometric"))["importance"]
