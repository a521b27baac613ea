"""The metrics of a step's rewards, responses, rollouts and demonstrations."""

from __future__ import annotations

from asd_megatron.observe.metric import Metric, Section

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
)
