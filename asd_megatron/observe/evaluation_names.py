"""The metrics of the held-out evaluation: of `data.test`, and of `evaluation.sets`."""

from __future__ import annotations

from asd_megatron.observe.metric import Metric, Section

PREFIX = "evaluation/<set>"

SECTIONS = (
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
    Section(
        "Held-out evaluation by set",
        "One group for each of `evaluation.sets`, at the steps of the evaluation; n is the set's `samples`, k a power"
        " of two up to n, or n (docs/evaluation.md).",
        (
            Metric(f"{PREFIX}/avg@<n>_se", "reward", "standard error of avg@n over problems"),
            Metric(f"{PREFIX}/pass@<n>_se", "fraction of problems", "standard error of pass@n over problems"),
            Metric(f"{PREFIX}/avg@<n>", "reward", "mean reward of n samples: of rewards 0 and 1, the accuracy"),
            Metric(
                f"{PREFIX}/pass@<k>",
                "fraction of problems",
                "unbiased pass@k: at least one of k samples has a reward of `privileged.success_threshold`",
            ),
            Metric(f"{PREFIX}/maj@<k>", "reward", "expected reward of the majority vote of k samples' final answers"),
            Metric(f"{PREFIX}/length_mean", "tokens", "mean response length, the end token included"),
            Metric(f"{PREFIX}/truncated", "fraction of responses", "responses that the token budget cut off"),
            Metric(f"{PREFIX}/errors", "answers", "answers that scored 0 unjudged: failures and time-outs of judging"),
        ),
    ),
)
