"""Warnings about a method that does nothing: when each is raised, once, and what it tells to look at."""

from __future__ import annotations

import pytest

from asd_megatron.observe.names import WARNINGS
from asd_megatron.observe.warnings import CALIBRATION_TOKENS, MethodWarnings

NAN = float("nan")
HEALTHY = {
    "pmi/coverage": 0.9,
    "pmi/negative_share": 0.6,
    "pmi/mean": -0.1,
    "reward/mixed_groups": 0.5,
    "reward/pass_rate": 0.4,
    "gate/lambda": 0.5,
    "gate/warming_up": 0.0,
    "gate/tokens": 1e5,
    "gate/h_warm": 0.7,
}
WARM_UP = {**HEALTHY, "gate/lambda": 0.0, "gate/warming_up": 1.0}
CONSTANT = {  # the same distribution after whatever is read
    **HEALTHY,
    "optimizer/grad_norm": 0.0,
    "reward/pass_rate": 0.0,
    "response/length_mean": 16.0,
    "response/length_max": 16.0,
    "entropy/student_mean": 4.7185,
    "entropy/student_median": 4.718501,
}
BY_PERPLEXITY = {k: v for k, v in HEALTHY.items() if not k.startswith("gate/")} | {
    "perplexity/mean": 1.4,
    "perplexity/above_cutoff": 0.1,
    "perplexity/target": 1.3,
    "perplexity/warming_up": 0.0,
    "lambda/zero_share": 0.1,
}


def run(*steps: dict[str, float]) -> tuple[MethodWarnings, list[tuple[int, str]]]:
    """(the watcher, (step, text) of every warning)."""
    watch = MethodWarnings()
    found = [(i, text) for i, metrics in enumerate(steps, 1) for text in watch.of_step(i, metrics)[1]]
    return watch, found


CASES = {
    "no_context": ([{**HEALTHY, "pmi/coverage": 0.0}] * 5, 3, "privileged.when_no_solution"),
    "out_of_distribution": (
        [{**HEALTHY, "pmi/negative_share": 0.97, "pmi/mean": -4.0}] * 5,
        3,
        "asd-megatron train RECIPE --dry-run",
    ),
    "equal_rewards": ([{**HEALTHY, "reward/mixed_groups": 0.0, "reward/pass_rate": 0.0}] * 5, 3, "pass rate 0%"),
    "above_cutoff": ([{**BY_PERPLEXITY, "perplexity/above_cutoff": 0.6}] * 5, 3, "perplexity.cutoff"),
    "no_target": (
        [{**BY_PERPLEXITY, "perplexity/warming_up": 1.0, "perplexity/target": NAN, "perplexity/mean": 1e3}] * 5,
        3,
        "perplexity.target",
    ),
    "learns_nothing": ([HEALTHY] + [CONSTANT] * 4, 4, "lower optimizer.learning_rate"),
    "gate_closed": ([WARM_UP] * 5 + [{**HEALTHY, "gate/lambda": 0.0}] * 12, 15, "gate/close_below"),
    "short_calibration": (
        [{**WARM_UP, "gate/tokens": CALIBRATION_TOKENS / 5 - 1}] * 5 + [HEALTHY] * 3,
        6,
        "gate.warmup_steps",
    ),
}


def test_lambda_0_of_every_response_is_reported_with_its_own_remedy() -> None:
    closed = {**BY_PERPLEXITY, "lambda/zero_share": 1.0}
    warm_up = {**closed, "perplexity/warming_up": 1.0}
    _, found = run(*[warm_up] * 5, *[closed] * 12)
    assert [step for step, _ in found] == [15] and "perplexity.cutoff" in found[0][1] and "gate.tau" not in found[0][1]
    _, found = run(*[warm_up] * 5, *[{**closed, "lambda/zero_share": 0.9}] * 12)
    assert found == []


@pytest.mark.parametrize("kind", CASES)
def test_each_warning_is_raised_once_and_says_what_to_look_at(kind: str) -> None:
    steps, first, remedy = CASES[kind]
    watch, found = run(*steps)
    assert [step for step, _ in found] == [first]
    assert remedy in found[0][1]
    assert watch.summary() == [{"kind": kind, "step": first, "text": found[0][1]}]


def test_every_kind_is_tested_and_its_metric_lasts_as_long_as_its_condition() -> None:
    assert set(CASES) == set(WARNINGS)
    watch = MethodWarnings()
    without = {**HEALTHY, "pmi/coverage": 0.0}
    shown = ["warnings/no_context" in watch.of_step(i, m)[0] for i, m in enumerate([without] * 4 + [HEALTHY])]
    assert shown == [False, False, True, True, False]


def test_a_healthy_run_and_conditions_without_a_term_say_nothing() -> None:
    assert run(*[WARM_UP] * 5, *[HEALTHY] * 20)[1] == []
    grpo = {"reward/mixed_groups": 0.5, "reward/pass_rate": 0.5}
    assert run(*[grpo] * 20)[1] == []
    overlong = {**HEALTHY, "reward/mixed_groups": 0.0, "reward/overlong_share": 0.1}  # makes advantages differ
    assert run(*[overlong] * 5)[1] == []
    flicker = [{**HEALTHY, "pmi/coverage": 0.0}, {**HEALTHY, "pmi/coverage": 0.0}, HEALTHY]
    assert run(*flicker * 5)[1] == []


def test_batches_without_a_signal_are_no_dead_model() -> None:
    """Zero gradients alone: GRPO has them whenever all rewards are equal, and a model that solves everything has."""
    no_signal = {**HEALTHY, "optimizer/grad_norm": 0.0, "reward/mixed_groups": 0.5, "advantage/abs_mean": 0.0}
    assert run(*[{**no_signal, "entropy/student_mean": 0.7 + 0.01 * i} for i in range(20)])[1] == []
    assert run(*[{**no_signal, "entropy/student_mean": NAN} for _ in range(20)])[1] == []
    assert run(*[{**no_signal, "entropy/student_mean": 0.0, "reward/pass_rate": 1.0}] * 20)[1] == []
    constant = {**CONSTANT, "reward/mixed_groups": 0.5}
    for ordinary in (
        {"entropy/student_median": 4.1},  # one prompt and one response in every batch
        {"response/length_max": 1.0},  # one prompt, answered by one token
        {"entropy/student_mean": 0.0, "entropy/student_median": 0.0, "reward/pass_rate": 0.9},  # learned what it can
        {"entropy/student_mean": 0.0, "entropy/student_median": 0.0, "response/length_mean": 3.5},  # sure, and wrong
    ):
        assert run(*[{**constant, **ordinary}] * 20)[1] == []
    holes = [{**constant, "entropy/student_mean": mean} for mean in (4.7185, NAN, 4.7185, NAN)]
    assert run(*holes)[1] == []  # batches without a trained token between
    one_token = {"entropy/student_mean": 0.0, "entropy/student_median": 0.0}
    assert run(*[{**constant, **one_token}] * 3)[1]
    asked = [{**no_signal, "entropy/student_mean": 0.1 * i, "advantage/abs_mean": 0.3} for i in range(3)]
    watch, found = run(*asked)
    assert [step for step, _ in found] == [3]
    dead = {"warnings/learns_nothing": 1.0}
    assert watch.must_stop(3, dead) is None  # a warning by default
    watch.stop_when_dead = True
    assert str(watch.must_stop(3, dead)).startswith("step 3: the model cannot learn any more")
    assert watch.must_stop(3, {}) is None
    supervised = {"optimizer/grad_norm": 0.0}
    assert run(*[{**supervised, "sft/loss": 1e-7}] * 5)[1] == [] and run(*[{**supervised, "sft/loss": 0.2}] * 5)[1]


def test_equal_rewards_do_not_matter_to_a_recipe_without_the_group_advantage() -> None:
    watch = MethodWarnings(group_advantage=False)
    equal = {**HEALTHY, "reward/mixed_groups": 0.0}
    assert [watch.of_step(i, equal) for i in range(5)] == [({}, [])] * 5
    without = [watch.of_step(i, {**equal, "pmi/coverage": 0.0})[1] for i in range(5)]
    assert len(without[2]) == 1 and "nothing is trained" in without[2][0]


def test_a_resumed_run_does_not_repeat_itself() -> None:
    steps = CASES["gate_closed"][0]
    before = MethodWarnings()
    for i, metrics in enumerate(steps[:15], 1):
        before.of_step(i, metrics)
    resumed = MethodWarnings()
    for i, metrics in enumerate(steps[:15], 1):  # the rows of its metrics.jsonl
        resumed.of_step(i, metrics)
    assert resumed.summary() == before.summary()
    assert resumed.of_step(16, steps[15])[1] == []
