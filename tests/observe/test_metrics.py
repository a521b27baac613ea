"""Step metrics against numbers computed by hand, and the names against their documentation."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from asd_megatron.data.tokenizer import load_tokenizer
from asd_megatron.evaluation.outcomes import Outcomes, Sample
from asd_megatron.observe import names
from asd_megatron.observe.expert_load import load_metrics
from asd_megatron.observe.flops import rates
from asd_megatron.observe.metrics import (
    REWARD_COUNTERS,
    ROLLOUT_COUNTERS,
    GateReading,
    Increments,
    PerplexityReading,
    step_metrics,
    supervised_metrics,
)
from asd_megatron.observe.names import METRICS, PHASES, reference_page, undocumented
from asd_megatron.observe.reduction import REDUCTIONS
from asd_megatron.observe.warnings import MethodWarnings
from asd_megatron.puzzle.metrics import PuzzleMetrics
from asd_megatron.puzzle.tokenizer import write_tokenizer
from asd_megatron.records import Example, FinishReason, Rollout, TokenTable
from asd_megatron.reward.base import new_counters
from asd_megatron.rollout.counts import Counts
from asd_megatron.rollout.sglang.client.requests import Counters as ServerCounters
from asd_megatron.rollout.sglang.metrics import ServerMetrics
from asd_megatron.rollout.sglang.weight_sync.synchronise import SyncReport
from asd_megatron.rollout.sglang.weight_sync.verification import ProbeDifference
from tests.observe.batch import make_examples, make_table

GATE = GateReading(open=True, lam=0.5, entropy=2.0, h_warm=1.5, close_below=1.395)
TIMES = {phase: 1.0 for phase in PHASES if phase != "total"}


def step(examples: list[Example] | None = None, table: TokenTable | None = None, **over: object) -> dict[str, float]:
    values: dict[str, object] = {
        "learning_rate": 1e-6,
        "grad_norm": 0.5,
        "policy_loss": -0.01,
        "times": TIMES,
        "reading": GATE,
        "skipped_updates": 2,
        "step": 6,
        "computed": (50, 40, 80),
    }
    values.update(over)
    return step_metrics(
        make_examples() if examples is None else examples,
        make_table() if table is None else table,
        **values,  # type: ignore[arg-type]
    )


def test_values_by_hand() -> None:
    m = step()
    expected = {
        "reward/mean": 0.5,
        "reward/pass_rate": 0.25,
        "reward/mixed_groups": 0.5,
        "response/length_mean": 2.25,
        "response/length_max": 4,
        "response/truncated": 0.25,
        "rollouts/total": 4,
        "rollouts/masked": 1,
        "pmi/coverage": 0.75,
        "demonstration/group": 2,
        "demonstration/reference": 1,
        "demonstration/none": 1,
        "demonstration/self": 0,
        # sampled tokens: all but the forced one (index 4)
        "entropy/student_mean": 3.6 / 8,
        "entropy/student_median": 0.4,
        # with context and sampled: the first four tokens
        "entropy/teacher_mean": 2.5,
        "entropy/teacher_median": 2.0,
        "pmi/mean": -0.75 / 4,
        "pmi/q01": -1.0,
        "pmi/q50": -0.25,
        "pmi/q75": 0.0,
        "pmi/q99": 0.5,
        "pmi/negative_share": 0.5,
        "term/mean": -0.05,
        "term/negative_share": 0.5,
        "divergence/mean": 0.25,
        "divergence/reverse_kl": 0.5,
        "divergence/forward_kl": 0.75,
        "divergence/agreement": 0.75,
        # what the loss sees
        "advantage/mean": 1.5 / 8,
        "advantage/abs_mean": 3.0 / 8,
        "advantage/std": math.sqrt((1 + 0.25 + 0.5625 + 0.5625) / 8 - (1.5 / 8) ** 2),
        "loss/clip_fraction": 0.25,
        "loss/clipped_responses": 2 / 3,
        "loss/policy": -0.01,
        "mismatch/max_abs": 0.5,
        "mismatch/mean_abs": 0.5 / 8,
        # d is 0.5 at one sampled token, -0.5 at the forced one
        "mismatch/k3": (math.exp(0.5) - 1.5) / 8,
        "mismatch/ess": (7 + math.exp(0.5)) ** 2 / (8 * (7 + math.exp(1.0))),
        "mismatch/ess_sequence": (2 + math.exp(0.5)) ** 2 / (3 * (2 + math.exp(1.0))),
        "importance/mean": 1.0,
        "importance/affected": 0.25,
        # before update 6 the weights have version 5, the rollouts began with 4
        "rollouts/stale": 1,
        "rollouts/stale_max": 1,
        "rollouts/across_versions": 1,
        "tokens/prompt": 10,
        "tokens/response": 9,
        "tokens/teacher": 3 * 4 + 5,
        "tokens/trained": 8,
        "tokens/not_finite": 0,
        "tokens/computed": 50,
        "tokens/padding_share": 0.2,
        "tokens/shared_share": 0.5,
        "time/total": len(TIMES),
        "tokens/per_second": 9 / len(TIMES),
        "optimizer/skipped": 2,
        "gate/open": 1,
        "gate/lambda": 0.5,
        "gate/h_warm": 1.5,
        "gate/warming_up": 0,
    }
    for name, value in expected.items():
        assert m[name] == pytest.approx(value, rel=1e-6), name
    assert all(isinstance(v, float) for v in m.values())


def puzzle_names() -> set[str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(write_tokenizer(folder))
        puzzle = PuzzleMetrics(tokenizer)
        wrong, right = "Wait 3 =6 +10 no So 4", "Let 5 =10 +14 yes So 5"
        ids = [tuple(tokenizer(text + " <|end|>", add_special_tokens=False)["input_ids"]) for text in (wrong, right)]
    rollouts = [Rollout("p", i, (1,), x, (0.0,) * len(x), FinishReason.STOP, 0) for i, x in enumerate(ids)]
    table = TokenTable.for_lengths([len(x) for x in ids])
    table["pmi"] = table["divergence"] = torch.zeros(table.tokens)
    examples = [Example(r, reward, 0.0, (1,)) for r, reward in zip(rollouts, (0.0, 1.0), strict=True)]
    return {*puzzle.of_step(examples, table), *puzzle.of_evaluation(rollouts, [0.0, 1.0])}


def server_names() -> set[str]:
    readings = ServerMetrics()
    probes = {"http://a": ProbeDifference(0.0, 0.0, False)}
    readings.add(SyncReport({}, (), bytes=8, tensors=1, seconds=0.5, checked=1, probes=probes), changed=0.5)
    return set(readings.take(ServerCounters(), serving=1, restarts=0, unrouted=0))


def released_form_names() -> set[str]:
    lambdas = torch.zeros(4, dtype=torch.float64)
    return set(step(reading=PerplexityReading(lambdas + 1, lambdas, cutoff=3.0), outlier_limit=1.0))


def warning_names() -> set[str]:
    """All that one misguided run shows."""
    watch = MethodWarnings()
    warm_up = {"gate/lambda": 0.0, "gate/warming_up": 1.0, "gate/tokens": 1.0}
    useless = {"pmi/coverage": 0.0, "pmi/negative_share": 1.0, "pmi/mean": -9.0, "reward/mixed_groups": 0.0}
    useless |= {"perplexity/above_cutoff": 1.0, "perplexity/mean": 99.0}
    useless |= {"optimizer/grad_norm": 0.0, "advantage/abs_mean": 0.5}
    steps = [warm_up] + [{**useless, "gate/lambda": 0.0, "gate/h_warm": 1.0}] * 20
    return {name for i, metrics in enumerate(steps) for name in watch.of_step(i, metrics)[0]}


def penalty_names() -> set[str]:
    """Of a step with a KL penalty."""
    table = make_table()
    table["reference_logprobs"] = table["student_logprobs"]
    return set(step(table=table))


def option_names() -> set[str]:
    """Of a step with an overlong penalty and dynamic sampling."""
    examples = [replace(e, overlong_penalty=p) for e, p in zip(make_examples(), (0.0, -1.0, -0.5, 0.0), strict=True)]
    found = step(examples)
    assert (found["reward/overlong_share"], found["reward/overlong_mean"]) == (0.5, -0.375)
    assert found["reward/mean"] == 0.5 and not any(name.startswith("reward/overlong") for name in step())
    counts = {"judged_groups": 8, "rejected_groups": 2}
    counted = Increments().of(examples={}, rollouts=counts, rewards={})
    assert counted["rollouts/rejected_share"] == 0.25
    return {*found, *counted}


def fp8_names() -> set[str]:
    """Of a step whose update computes in FP8 and which probes it (tests/trainer/test_fp8.py)."""
    table = make_table()
    table["update_logprobs"] = table["student_logprobs"] + 0.25
    found = step(table=table)
    assert found["fp8/update_drift"] == pytest.approx(0.25)
    probed = ("student_drift", "teacher_drift", "pmi_drift", "pmi_sign_flips", "entropy_shift")
    return {*found, *(f"fp8/{name}" for name in probed)}


def hardware_names() -> set[str]:
    """Of a run on GPUs that tell everything."""
    times = {"rollout": 1.0, "update": 1.0, "total": 2.0}
    values = rates(model_flops=1.0, hardware_flops=1.0, tokens=1, times=times, gpus=1, peak=1.0)
    reduced = {name + suffix for name, reductions in REDUCTIONS.items() for suffix in reductions}
    return reduced | set(values)


def set_names() -> set[str]:
    """Of one of `evaluation.sets`."""
    right, wrong = Sample("4", 1, "stop", 1.0, "4"), Sample("5", 1, "stop", 0.0, "5")
    return set(Outcomes.of([[right, wrong], [wrong, wrong]]).metrics(1.0))


def test_every_name_is_documented_and_every_documented_name_exists() -> None:
    emitted = {
        *step(),
        *penalty_names(),
        *fp8_names(),
        *option_names(),
        *(f"evaluation/{name}" for name in ("accuracy", "pass_rate", "length_mean", "truncated")),
        *(f"evaluation/gsm8k/{name}" for name in set_names()),
        *supervised_metrics(loss=1.0, tokens=5, learning_rate=1e-3, grad_norm=1.0, times={"update": 1.0}),
        *puzzle_names(),
        *Increments().of(examples={}, rollouts={}, rewards={}),
        "reward/part/math",  # with several rewards: ComposedReward.take_part_means
        *server_names(),
        *released_form_names(),
        *warning_names(),
        *hardware_names(),
        *load_metrics(torch.full((2, 4), 0.25), torch.ones(2), 1.0),
        "experts/replayed",  # with routing replay of SGLang's experts
        *("checkpoint/skipped", "optimizer/spikes", "optimizer/spike_limit"),  # tests/trainer/test_guarded_run.py
        "checkpoint/failed",  # these: tests/e2e/test_disk.py
        "files/waiting_lines",
        "files/dumps_dropped",
        "files/tensorboard_dropped",
    }
    assert undocumented(emitted) == []
    assert [m.name for m in METRICS if not any(m.matches(name) for name in emitted)] == []
    assert len({m.name for m in METRICS}) == len(METRICS)


def test_counters_are_shown_by_step() -> None:
    increments = Increments()
    examples = Counter({"teacher_too_long": 2, "undecodable_tokens": 5})
    rewards = {"timeouts": 1, "errors": 0, "restarts": 1}
    rollouts = asdict(Counts(dropped_groups=1))
    first = increments.of(examples=examples, rollouts=rollouts, rewards=rewards)
    assert {name for name, value in first.items() if value} == {
        "demonstration/too_long",
        "rollouts/undecodable_tokens",
        "rollouts/dropped_groups",
        "reward/timeouts",
        "reward/restarts",
    }
    examples["teacher_too_long"] += 3
    second = increments.of(examples=examples, rollouts=rollouts, rewards=rewards)
    assert {name: value for name, value in second.items() if value} == {"demonstration/too_long": 3.0}
    assert (
        set(rewards) == set(new_counters()) < set(REWARD_COUNTERS)
        and asdict(Counts()).keys() == ROLLOUT_COUNTERS.keys()
    )


def test_undocumented_names_are_found() -> None:
    assert undocumented(["step", "time_utc", "reward/mean", "reward/median", "puzzle/u_a/b", "puzzle/u_"]) == [
        "puzzle/u_",
        "puzzle/u_a/b",
        "reward/median",
    ]


def test_page_is_current() -> None:
    page = Path(names.__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == reference_page(), "run: python -m asd_megatron.observe.names > docs/metrics.md"


def random_batch(seed: int, noise: float) -> tuple[list[Example], TokenTable]:
    g = np.random.default_rng(seed)
    examples, trainer = [], []
    for sample in range(20):
        n = int(g.integers(1, 40))
        engine = -3 * g.random(n)
        trainer.append(engine + noise * g.standard_normal(n))
        mask = tuple(bool(x) for x in g.random(n) < (0.8 if sample else 0.0))  # one without any trained token
        version, changes = int(g.integers(0, 4)), ((1, 4),) if sample % 3 == 0 else ()
        rollout = Rollout(
            "p", sample, (1,), (5,) * n, tuple(engine), FinishReason.STOP, version, mask, version_changes=changes
        )
        examples.append(Example(rollout, 0.0, 0.0))
    table = TokenTable.for_lengths([len(x) for x in trainer])
    table["student_logprobs"] = torch.tensor(np.concatenate(trainer))
    table["loss_mask"] = torch.tensor([m for e in examples for m in e.rollout.loss_mask])
    return examples, table


@pytest.mark.parametrize("noise", [1e-5, 0.3, 2.0])
def test_mismatch_against_numpy(noise: float) -> None:
    examples, table = random_batch(0, noise)
    m = step(examples, table, step=5)
    ratios = [
        (np.exp(row.numpy()) / np.exp(e.rollout.logprobs.astype(np.float64)))[list(e.rollout.loss_mask)]
        for e, row in zip(examples, table.rows("student_logprobs"), strict=True)
    ]
    w, products = np.concatenate(ratios), np.array([r.prod() for r in ratios if len(r)])
    assert len(products) == len(examples) - 1
    expected = {
        "mismatch/mean_abs": np.abs(np.log(w)).mean(),
        "mismatch/max_abs": np.abs(np.log(w)).max(),
        "mismatch/k3": (w - 1 - np.log(w)).mean(),
        "mismatch/ess": w.sum() ** 2 / (len(w) * (w * w).sum()),
        "mismatch/ess_sequence": products.sum() ** 2 / (len(products) * (products**2).sum()),
        "rollouts/stale": np.mean([4 - e.rollout.weight_version for e in examples]),
        "rollouts/stale_max": 4 - min(e.rollout.weight_version for e in examples),
        "rollouts/across_versions": 7,
    }
    for name, value in expected.items():
        assert m[name] == pytest.approx(value, rel=1e-5 if name == "mismatch/k3" else 1e-9), name
    assert 0 < m["mismatch/ess_sequence"] <= m["mismatch/ess"] <= 1


def test_the_divergence_from_the_initial_weights() -> None:
    """Over the tokens that the loss sees, all but the forced one; absent without a KL penalty."""
    table = make_table()
    table["reference_logprobs"] = table["student_logprobs"] - torch.tensor([1.0, -1.0, 0, 0, 99, 0, 0, 0, 0])
    m = step(table=table)
    assert m["kl/k1"] == pytest.approx(0.0) and m["kl/k2"] == pytest.approx(1 / 8)
    assert m["kl/k3"] == pytest.approx((math.exp(-1) + math.exp(1) - 2) / 8)
    assert not undocumented(m)
    assert not any(name.startswith("kl/") for name in step())


def test_k3_estimates_the_divergence() -> None:
    """Its mean over tokens that the engine drew is KL(engine, trainer)."""
    g = np.random.default_rng(1)
    engine, trainer = g.dirichlet(np.ones(8)), g.dirichlet(np.ones(8))
    drawn = g.choice(8, size=20_000, p=engine)
    rollout = Rollout("p", 0, (1,), (5,) * len(drawn), tuple(np.log(engine)[drawn]), FinishReason.STOP, 0)
    table = TokenTable.for_lengths([len(drawn)])
    table["student_logprobs"] = torch.tensor(np.log(trainer)[drawn])
    k3 = step([Example(rollout, 0.0, 0.0)], table)["mismatch/k3"]
    assert k3 == pytest.approx(float((engine * np.log(engine / trainer)).sum()), rel=0.1)


def test_an_engine_far_off_overflows_nothing() -> None:
    rollout = Rollout("p", 0, (1,), (5, 6), (-2000.0, -1.0), FinishReason.STOP, 0)
    table = TokenTable.for_lengths([2])
    table["student_logprobs"] = torch.tensor([-1.0, -1.0])
    m = step([Example(rollout, 0.0, 0.0)], table)
    assert m["mismatch/ess"] == 0.5 and m["mismatch/ess_sequence"] == 1.0
    assert m["mismatch/max_abs"] == 1999.0 and m["mismatch/k3"] == math.inf


def test_without_correction_or_step_number_theirs_are_left_out() -> None:
    table = make_table()
    del table.columns["importance"], table.columns["importance_affected"]
    m = step(table=table, step=None)
    assert not [name for name in m if name.startswith(("importance/", "rollouts/stale", "rollouts/across"))]
    assert m["mismatch/k3"] > 0


def test_without_teacher_there_is_no_context_to_miss() -> None:
    m = step(table=make_table(teacher=False), reading=None)
    for prefix in ("pmi/", "term/", "demonstration/", "entropy/teacher", "gate/", "rollouts/masked"):
        assert not [name for name in m if name.startswith(prefix)], prefix
    assert m["tokens/teacher"] == 0
    assert m["entropy/student_median"] == pytest.approx(0.4)


def test_student_only_signal_counts_every_rollout() -> None:
    table = make_table(teacher=False)
    table["pmi"] = -table["student_logprobs"]
    m = step(table=table)
    assert m["pmi/mean"] == pytest.approx((0.5 + 1 + 1 + 0.25 + 0.1 + 0.2 + 0.3 + 0.4) / 8)
    assert "pmi/coverage" not in m


def test_no_token_gives_nan_not_an_error() -> None:
    empty = step(examples=[], table=TokenTable.for_lengths([]), times={})
    assert math.isnan(empty["reward/mean"])
    assert math.isnan(empty["tokens/per_second"]) and math.isnan(empty["rollouts/stale"])
    rollout = Rollout("p", 0, (1,), (5,), (-1.0,), FinishReason.STOP, 0)
    table = TokenTable.for_lengths([1])
    for name in ("student_logprobs", "teacher_logprobs", "teacher_entropy", "pmi", "advantage"):
        table[name] = torch.zeros(1)
    m = step(examples=[Example(rollout, 0.0, 0.0)], table=table)
    assert math.isnan(m["pmi/mean"]) and math.isnan(m["pmi/q50"]) and math.isnan(m["entropy/teacher_median"])
    assert m["pmi/coverage"] == 0
    table["loss_mask"] = torch.tensor([False])
    m = step(examples=[Example(rollout, 0.0, 0.0)], table=table)
    for name in ("mean_abs", "max_abs", "k3", "ess", "ess_sequence"):
        assert math.isnan(m[f"mismatch/{name}"]), name


def test_non_finite_tokens_are_counted_and_left_out() -> None:
    table = make_table()
    table["student_entropy"][0] = float("nan")
    table["pmi"][1] = float("inf")
    table["pmi"][7] = float("nan")  # without context: means nothing
    m = step(table=table)
    assert m["tokens/not_finite"] == 2
    assert m["entropy/student_mean"] == pytest.approx(3.5 / 7)
    assert m["pmi/mean"] == pytest.approx(-1.25 / 3)


def test_quantiles_of_many_tokens_are_exact_order_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(997, generator=generator)
    rollout = Rollout("p", 0, (1,), tuple(range(997)), (0.0,) * 997, FinishReason.STOP, 0)
    table = TokenTable.for_lengths([997])
    table["pmi"] = u
    table["teacher_logprobs"] = u
    m = step(examples=[Example(rollout, 1.0, 0.0, (1,))], table=table)
    ordered = u.sort().values
    for name, q in (("q01", 0.01), ("q25", 0.25), ("q50", 0.5), ("q95", 0.95)):
        assert m[f"pmi/{name}"] == pytest.approx(float(ordered[math.ceil(q * 997) - 1]))


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="the examples differ"):
        step(table=TokenTable.for_lengths([3, 2, 4, 1]))
    with pytest.raises(ValueError, match=r"undeclared phases sampling; .* declares .*rollout"):
        step(times={"sampling": 1.0})


def test_given_total_is_kept_and_gate_without_entropy_is_nan() -> None:
    m = step(times={"rollout": 1.0, "total": 4.5}, reading=GateReading(open=False, lam=0.0, warming_up=True))
    assert m["time/total"] == 4.5
    assert "time/teacher" not in m
    assert m["gate/warming_up"] == 1
    assert math.isnan(m["gate/entropy"]) and math.isnan(m["gate/h_warm"]) and math.isnan(m["gate/close_below"])


def test_lambdas_from_the_perplexity_and_outliers() -> None:
    nan = math.nan
    reading = PerplexityReading(
        torch.tensor([1.5, 4.0, nan, 2.0], dtype=torch.float64),
        torch.tensor([-0.02, 0.0, 0.0, 0.32], dtype=torch.float64),
        cutoff=3.0,
        target=1.4,
    )
    m = step(reading=reading, outlier_limit=0.7)
    assert not any(name.startswith("gate/") for name in m) and undocumented(m) == []
    expected = {
        "perplexity/mean": 2.5,
        "perplexity/median": 2.0,
        "perplexity/target": 1.4,
        "perplexity/above_cutoff": 1 / 3,
        "perplexity/warming_up": 0.0,
        "lambda/mean": 0.1,
        "lambda/min": -0.02,
        "lambda/max": 0.32,
        "lambda/zero_share": 1 / 3,
        "outliers/limit": 0.7,
        "outliers/share": 0.25,
    }
    assert {name: m[name] for name in expected} == pytest.approx(expected)
    none = PerplexityReading(torch.full((4,), nan), torch.zeros(4), cutoff=3.0, warming_up=True)
    m = step(reading=none, outlier_limit=nan)
    assert none.lam == 0 and math.isnan(m["lambda/mean"]) and math.isnan(m["perplexity/target"])
    assert m["perplexity/warming_up"] == 1 and math.isnan(m["outliers/limit"]) and m["outliers/share"] == 0
