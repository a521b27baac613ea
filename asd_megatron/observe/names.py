"""Every metric's name, unit and meaning: the one declaration behind `metrics.jsonl`, TensorBoard and `docs/metrics.md`.

`python -m asd_megatron.observe.names` prints the reference page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from asd_megatron.observe import engine_names, evaluation_names, hardware_names
from asd_megatron.observe.metric import Metric, Section

QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.50, "q75": 0.75, "q95": 0.95, "q99": 0.99}
PHASES = {
    "weight_sync": "sending the newest weights to the engine",
    "rollout": "waiting for responses",
    "reward": "waiting for the verifiers",
    "teacher": "scoring the privileged sequences",
    "student": "the student's scoring pass, in recipes that need one",
    "reference": "scoring under the initial weights, with a KL penalty",
    "probe": "scoring a few tokens in bfloat16 and in FP8, with `precision.fp8_probe_every`",
    "replicas": "comparing the ranks' copies of weights, with `run.replica_check_every`",
    "update": "forward, backward and optimizer of every update of the batch",
    "evaluate": "the held-out evaluation",
    "checkpoint": "writing checkpoints and exports",
    "profile": "writing the trace of the step before",
    "total": "the complete step",
}


WARNINGS = {
    "no_context": "no rollout had privileged context, several steps in a row",
    "out_of_distribution": "u < 0 for nearly all tokens, mean below -1 nat, several steps in a row",
    "equal_rewards": "equal rewards in every group, several steps in a row",
    "above_cutoff": "most responses have a teacher's perplexity above `perplexity.cutoff`, several steps in a row",
    "no_target": "the mean perplexity is too large to measure the target from, several steps in a row",
    "learns_nothing": "a gradient of 0 that no batch without a signal explains, several steps in a row",
    "gate_closed": "lambda was 0 (for every response) in more than half of the steps since the warm-up",
    "short_calibration": "H_warm was calibrated on few tokens",
}


def _distribution(prefix: str, what: str) -> tuple[Metric, ...]:
    quantiles = (Metric(f"{prefix}/{q}", "nats", f"{100 * at:g}% quantile of {what}") for q, at in QUANTILES.items())
    return (
        Metric(f"{prefix}/mean", "nats", f"mean of {what}"),
        *quantiles,
        Metric(f"{prefix}/negative_share", "fraction of tokens", f"tokens where {what} is below 0"),
    )


SECTIONS = (
    Section(
        "Reward",
        "Every step of reinforcement learning.",
        (
            Metric("reward/mean", "reward", "mean reward of the step's rollouts"),
            Metric("reward/pass_rate", "fraction of rollouts", "rewards of at least `privileged.success_threshold`"),
            Metric(
                "reward/mixed_groups",
                "fraction of groups",
                "groups with unequal rewards; others have advantage 0, but for the overlong penalty",
            ),
            Metric("reward/part/<label>", "reward", "mean reward of one of `reward.parts`, before its weight"),
            Metric(
                "reward/overlong_share",
                "fraction of rollouts",
                "rollouts that `algorithm.overlong_buffer` takes reward from, for the group advantage alone: the other"
                " numbers are those of rewards without it",
            ),
            Metric("reward/overlong_mean", "reward", "mean of what it takes over all rollouts, at most 0"),
            Metric(
                "reward/timeouts",
                "answers",
                "judging took too long: reward 0 (held-out answers of the step too); of `code`, tests",
            ),
            Metric("reward/no_code", "answers", "without a program (`reward.name: code`): reward 0"),
            Metric("reward/errors", "answers", "judging failed: reward 0 (held-out answers of the step too)"),
            Metric("reward/restarts", "workers", "reward workers that died or were ended, and replaced"),
            Metric(
                "reward/truncated", "answers", "cut off by the token budget: reward 0 unjudged (`reward.truncated`)"
            ),
        ),
    ),
    Section(
        "Responses and rollouts",
        "Every step of reinforcement learning; `rollouts/masked` with a teacher.",
        (
            Metric("response/length_mean", "tokens", "mean response length, the end token included"),
            Metric("response/length_max", "tokens", "longest response"),
            Metric("response/truncated", "fraction of rollouts", "responses that the token budget cut off"),
            Metric("rollouts/undecodable_tokens", "tokens", "sampled ids that the tokenizer lacks"),
            Metric("rollouts/total", "rollouts", "rollouts of the step, over all ranks"),
            Metric("rollouts/masked", "rollouts", "rollouts without privileged context: their u is 0 in the loss"),
            Metric("rollouts/stale", "versions", "mean age of the weights that rollouts began with; 0: present ones"),
            Metric("rollouts/stale_max", "versions", "the largest age among the rollouts"),
            Metric("rollouts/across_versions", "rollouts", "rollouts that several versions of the weights sampled"),
            Metric("rollouts/aborted", "rollouts", "rollouts that the engine gave up"),
            Metric("rollouts/stale_groups", "groups", "groups discarded because their weights were too old"),
            Metric("rollouts/redrawn_groups", "groups", "groups resampled because of either"),
            Metric("rollouts/dropped_groups", "groups", "groups left out of the step for the same reasons"),
            Metric("rollouts/cut_groups", "groups", "groups requested beyond the need and discarded unfinished"),
            Metric("rollouts/judged_groups", "groups", "finished groups whose rewards `sampling.redraw` looked at"),
            Metric("rollouts/rejected_groups", "groups", "of these those discarded for their rewards"),
            Metric("rollouts/rejected_share", "fraction of judged groups", "of the same; absent without such groups"),
            Metric(
                "rollouts/short_groups",
                "groups",
                "groups that the step lacks because no more could be drawn in place of those (`sampling.redraw_limit`)",
            ),
            Metric("rollouts/carried_groups", "groups", "unfinished groups carried over to the next step"),
            Metric("rollouts/restored_groups", "groups", "groups with responses that an earlier start of the run made"),
            Metric("rollouts/restored_tokens", "tokens", "tokens of these responses, not sampled again"),
            Metric("rollouts/dropped_tokens", "tokens", "tokens that it made and that may not be used: sampled again"),
        ),
    ),
    Section(
        "Demonstrations",
        "With a teacher. Where the verified solution of each rollout's teacher prompt came from.",
        (
            Metric("demonstration/group", "rollouts", "another correct rollout of the group"),
            Metric("demonstration/self", "rollouts", "the rollout's own success"),
            Metric("demonstration/reference", "rollouts", "the problem's reference solution"),
            Metric("demonstration/reference_answer", "rollouts", "only the problem's final answer"),
            Metric("demonstration/feedback_only", "rollouts", "no solution, the assessment line alone"),
            Metric("demonstration/none", "rollouts", "no privileged context"),
            Metric("demonstration/shortened", "rollouts", "solutions cut to `privileged.max_*_tokens`"),
            Metric("demonstration/empty", "rollouts", "no context: nothing was left of the solution's text"),
            Metric("demonstration/too_long", "rollouts", "no context: the teacher's sequence would be too long"),
        ),
    ),
    Section(
        "Entropy",
        "Full-vocabulary entropy of the tokens that the loss sees; the teacher's of those in rollouts with context.",
        (
            Metric("entropy/student_mean", "nats", "mean entropy of the student's next-token distribution"),
            Metric("entropy/student_median", "nats", "lower median of the same"),
            Metric("entropy/teacher_mean", "nats", "mean entropy of the teacher's next-token distribution"),
            Metric(
                "entropy/teacher_median",
                "nats",
                "lower median of the same; the gate's H where the gate reads the teacher",
            ),
        ),
    ),
    Section(
        "PMI (u)",
        "u = log-prob under the teacher - log-prob under the student, over rollouts with context. "
        "With `no_teacher`: u = -log-prob under the student, over all rollouts, and no coverage.",
        (
            *_distribution("pmi", "u"),
            Metric("pmi/coverage", "fraction of rollouts", "rollouts with privileged context"),
        ),
    ),
    Section(
        "Per-token term",
        "What lambda multiplies (phi(u) with `antisd`; the divergence D with `algorithm.estimator: full_vocabulary`) "
        "after the recipe's clipping and normalization; tokens as for u.",
        _distribution("term", "the term"),
    ),
    Section(
        "Divergence",
        "With `algorithm.estimator: full_vocabulary`: between the student's next-token distribution p, under the"
        " weights of the token's last update of the step, and the teacher's, q. Tokens as for u.",
        (
            Metric("divergence/mean", "nats", "mean of the recipe's divergence D; its quantiles are those of the term"),
            Metric("divergence/reverse_kl", "nats", "mean KL(p, q)"),
            Metric("divergence/forward_kl", "nats", "mean KL(q, p)"),
            Metric("divergence/agreement", "fraction of tokens", "p and q have their maximum at the same token"),
        ),
    ),
    Section(
        "Outliers of u",
        "With `algorithm.outlier_deviations`. Tokens as for u.",
        (
            Metric(
                "outliers/limit",
                "nats",
                "a u of larger absolute value counts as 0 in the term; null in the warm-up",
            ),
            Metric("outliers/share", "fraction of tokens", "tokens whose u has an absolute value above the limit"),
        ),
    ),
    Section(
        "Lambda from the teacher's perplexity",
        "With `algorithm.lambda_source: teacher_perplexity`, in place of the gate's metrics; over the responses with"
        " privileged context and a token that the loss sees.",
        (
            Metric("perplexity/mean", "1", "mean of the teacher's perplexity of a response, exp(-mean log-prob)"),
            Metric("perplexity/median", "1", "lower median of the same"),
            Metric("perplexity/target", "1", "the target P*; null before it is known"),
            Metric("perplexity/above_cutoff", "fraction of responses", "perplexities above `perplexity.cutoff`"),
            Metric("perplexity/warming_up", "0 or 1", "1 during the steps that measure the target, with lambda 0"),
            Metric("lambda/mean", "weight", "mean lambda of the responses"),
            Metric("lambda/min", "weight", "smallest lambda of a response"),
            Metric("lambda/max", "weight", "largest lambda of a response"),
            Metric("lambda/zero_share", "fraction of responses", "responses with lambda 0: without a per-token term"),
        ),
    ),
    Section(
        "Gate",
        "Conditions with a per-token term, unless lambda comes from the teacher's perplexity.",
        (
            Metric("gate/open", "0 or 1", "1 while lambda is above 0: the per-token term acts"),
            Metric("gate/lambda", "weight", "lambda of this step: 0 while closed or warming up"),
            Metric("gate/entropy", "nats", "H: the median entropy that the gate read, null if no token counted"),
            Metric("gate/tokens", "tokens", "tokens that H is the median of"),
            Metric("gate/h_warm", "nats", "H_warm: the calibrated entropy, at which the gate reopens; null before"),
            Metric("gate/close_below", "nats", "`gate.tau_down` x H_warm: below it the gate closes; null before"),
            Metric("gate/warming_up", "0 or 1", "1 during the calibration steps"),
        ),
    ),
    Section(
        "Advantage and loss",
        "Every step of reinforcement learning, over the tokens that the loss sees.",
        (
            Metric("advantage/mean", "1", "mean of the per-token advantage that the loss used"),
            Metric("advantage/std", "1", "its standard deviation"),
            Metric("advantage/abs_mean", "1", "mean of its absolute value"),
            Metric(
                "loss/policy",
                "1",
                "clipped policy loss, near 0 on-policy by construction; plus, where the recipe has them, the KL penalty"
                " by `k2` or `k3`, the entropy bonus and the exact estimator's lambda D. With `policy_loss: cispo` its"
                " value means nothing",
            ),
            Metric(
                "loss/clip_fraction",
                "fraction of tokens",
                "tokens whose ratio was clipped; with `policy_loss: cispo` cut to its bounds",
            ),
            Metric(
                "loss/clipped_responses",
                "fraction of responses",
                "responses with such a token; with `policy_loss: gspo` the ratio is the response's",
            ),
        ),
    ),
    Section(
        "KL penalty",
        "With `algorithm.kl_coefficient`; over the tokens that the loss sees. r = log-prob under the student (before"
        " the step's update) - log-prob under the initial weights. Each mean estimates the divergence of a token, KL"
        " of the student to the initial model; the recipe's `algorithm.kl_estimator` names the penalty's own.",
        (
            Metric("kl/k1", "nats", "mean of r; unbiased, may be negative"),
            Metric("kl/k2", "nats", "mean of r^2 / 2"),
            Metric("kl/k3", "nats", "mean of exp(-r) - 1 + r; unbiased, of small variance"),
        ),
    ),
    Section(
        "FP8",
        "With `precision.fp8` (docs/fp8.md). `fp8/update_drift` in every step whose update computes in FP8 and whose"
        " student is scored in bfloat16, over the tokens that the loss sees. The others in the steps of"
        " `precision.fp8_probe_every`, over at most 4,096 of these tokens in rollouts with context, scored in both"
        " formats; those about the teacher where it is scored. Differences are FP8 - bfloat16.",
        (
            Metric("fp8/update_drift", "nats", "mean absolute difference of the student's log-prob in the update"),
            Metric("fp8/student_drift", "nats", "mean absolute difference of the student's log-prob"),
            Metric("fp8/teacher_drift", "nats", "mean absolute difference of the teacher's log-prob"),
            Metric("fp8/pmi_drift", "nats", "mean absolute difference of u; compare with the mean of |u|"),
            Metric(
                "fp8/pmi_sign_flips",
                "fraction of tokens",
                "tokens whose u changes its sign, among those with |u| > 0.05 in bfloat16",
            ),
            Metric("fp8/entropy_shift", "fraction", "relative change of the teacher's median entropy, signed"),
        ),
    ),
    Section(
        "Experts",
        "Mixtures of experts, over the response tokens of the update; the tokens of each expert are in"
        " `RUN/expert_load.jsonl`.",
        (
            Metric(
                "experts/auxiliary_loss",
                "1",
                "load-balancing loss without its coefficient, mean of the layers; 1: balanced",
            ),
            Metric(
                "experts/entropy",
                "fraction of the maximum",
                "entropy of the load over a layer's experts, mean of the layers",
            ),
            Metric("experts/busiest", "fraction of choices", "load of the busiest expert of any layer"),
            Metric("experts/idle", "experts", "experts of all layers that no token chose"),
            Metric("experts/entropy_<layer>", "fraction of the maximum", "the entropy of one layer, from 00"),
            Metric("experts/busiest_<layer>", "fraction of choices", "load of one layer's busiest expert"),
            Metric(
                "experts/replayed",
                "fraction of tokens",
                "tokens whose experts the engine returned, with `rollout.routing_replay engine`",
            ),
        ),
    ),
    Section(
        "Optimizer",
        "Every training step, of both stages.",
        (
            Metric("optimizer/grad_norm", "1", "global gradient norm before clipping; of several updates the largest"),
            Metric("optimizer/learning_rate", "1", "learning rate of the update"),
            Metric(
                "optimizer/skipped",
                "updates",
                "updates skipped because loss or gradient norm was not finite, or a spike with `grad_spike: skip`",
            ),
            Metric("optimizer/spikes", "updates", "gradient norms above the limit, with `optimizer.grad_spike`"),
            Metric("optimizer/spike_limit", "1", "that limit for the next update; null before 20 norms are known"),
        ),
    ),
    *engine_names.SECTIONS,
    Section(
        "Tokens",
        "Over all ranks, padding left out.",
        (
            Metric("tokens/prompt", "tokens", "prompt tokens of the step's rollouts"),
            Metric("tokens/response", "tokens", "response tokens of the step's rollouts"),
            Metric("tokens/teacher", "tokens", "tokens of the privileged sequences, responses included"),
            Metric("tokens/trained", "tokens", "tokens that the loss sees"),
            Metric(
                "tokens/computed", "tokens", "tokens that go through the model in all passes of the step, padding too"
            ),
            Metric("tokens/padding_share", "fraction of computed", "padding among these"),
            Metric(
                "tokens/shared_share",
                "fraction of tokens",
                "tokens of shared prefixes that are not computed again (`batching.share_prefixes`)",
            ),
            Metric(
                "tokens/per_second",
                "tokens / s",
                "response tokens over the time of a step, all ranks together",
            ),
            Metric("tokens/not_finite", "tokens", "tokens with a number that is not finite: anything but 0 is a fault"),
        ),
    ),
    Section(
        "Time",
        "Wall-clock time of rank 0; a phase that did not run is left out.",
        tuple(Metric(f"time/{phase}", "s", meaning) for phase, meaning in PHASES.items()),
    ),
    *hardware_names.SECTIONS,
    Section(
        "Held-out evaluation",
        "At the steps that the recipe's `evaluation` section names (step 0 is before training).",
        (
            Metric("evaluation/accuracy", "reward", "mean reward: of rewards 0 and 1, the fraction of right answers"),
            Metric(
                "evaluation/pass_rate",
                "fraction of responses",
                "rewards of at least `privileged.success_threshold` (supervised stage: of at least 1)",
            ),
            Metric("evaluation/length_mean", "tokens", "mean response length"),
            Metric("evaluation/truncated", "fraction of responses", "responses that the token budget cut off"),
        ),
    ),
    *evaluation_names.SECTIONS,
    Section(
        "Puzzle",
        "With the built-in puzzle; the held-out numbers at the steps of the evaluation.",
        (
            Metric("puzzle/u_<class>", "nats", "mean u of one class of the puzzle's tokens (docs/puzzle.md)"),
            Metric("puzzle/divergence_<class>", "nats", "mean D of the same class, with the exact estimator"),
            Metric("puzzle/deliberation_rate", "fraction of tokens", "deliberation words among the response tokens"),
            Metric("evaluation/deliberations", "words", "deliberation words a held-out response"),
            Metric("evaluation/deliberation_rate", "fraction of tokens", "deliberation words of held-out responses"),
            Metric("evaluation/verified", "fraction of responses", "held-out responses that end with a tested answer"),
            Metric("evaluation/accuracy_verified", "fraction of responses", "accuracy among those"),
        ),
    ),
    Section(
        "Warnings",
        "While the condition holds; the first time, the console and `summary.json` say what to look at.",
        tuple(Metric(f"warnings/{kind}", "1", meaning) for kind, meaning in WARNINGS.items()),
    ),
    Section(
        "Checkpoints",
        "Only in the steps in which it happened.",
        (
            Metric(
                "checkpoint/skipped",
                "1",
                "a training checkpoint was due and not written, because the last update was skipped; it is written "
                "after the next update that is applied",
            ),
            Metric(
                "checkpoint/failed",
                "attempts",
                "training checkpoints that the disk had no room for, or the system refused, since the line before; the"
                " next step tries again",
            ),
        ),
    ),
    Section(
        "Files",
        "Only while files of the run cannot be written (docs/reliability.md).",
        (
            Metric("files/waiting_lines", "lines", "earlier lines of metrics.jsonl that wait in memory for room"),
            Metric("files/dumps_dropped", "1", "the step's rollout dump could not be written and is missing"),
            Metric("files/tensorboard_dropped", "1", "TensorBoard's files are given up until the next start"),
        ),
    ),
    Section(
        "Supervised stage",
        "With `asd-megatron sft`, beside the optimizer, token and time metrics above.",
        (Metric("sft/loss", "nats", "cross-entropy per unit of loss weight over the global batch"),),
    ),
)

INTRODUCTION = """# Metrics

Rank 0 writes one JSON object a step to `RUN/metrics.jsonl` (`step`, `time_utc` and the names below) and the same names
to TensorBoard (`RUN/tensorboard`). A number that does not exist (a mean over no tokens) is `null` there and missing in
TensorBoard.

Token statistics are over the *sampled* response tokens of all ranks (`loss_mask` of the rollouts), the end token
included, the prompt never; those of the teacher, of u and of the per-token term only over rollouts that have
privileged context. Medians and quantiles are exact and are values that occur: the smallest with at least that fraction
of the tokens at or below it. Entropies and log-probabilities are in nats, at the sampling temperature, under the
weights before the step's update. Unit 1 is a plain number.

`python tools/plot_run.py RUN` plots a run into `RUN/curves.png`, finished or not.

This page is generated: `python -m asd_megatron.observe.names > docs/metrics.md`.
"""

METRICS = tuple(metric for section in SECTIONS for metric in section.metrics)


def graded(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether some reward in these rows of metrics is graded: not only 0 or 1, so that the mean reward
    (`evaluation/accuracy`, `reward/mean`) is not the pass rate and must not be called accuracy."""
    pairs = (("evaluation/accuracy", "evaluation/pass_rate"), ("reward/mean", "reward/pass_rate"))
    return any(
        row[mean] != row[rate]
        for row in rows
        for mean, rate in pairs
        if isinstance(row.get(mean), int | float) and isinstance(row.get(rate), int | float)
    )


@cache
def declared(name: str) -> Metric | None:
    """The declaration that covers the metric `name`."""
    return next((metric for metric in METRICS if metric.matches(name)), None)


def undocumented(names: Iterable[str]) -> list[str]:
    """Those of `names` that no declaration covers (`step` and `time_utc`, the line's own keys, are no metrics)."""
    return sorted(n for n in names if n not in ("step", "time_utc") and declared(n) is None)


def reference_page() -> str:
    """The text of `docs/metrics.md`."""
    lines = [INTRODUCTION.rstrip()]
    for section in SECTIONS:
        lines += ["", f"## {section.title}", "", section.when, "", "| name | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in section.metrics]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference_page(), end="")
