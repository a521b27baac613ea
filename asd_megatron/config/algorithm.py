"""Section `algorithm`: the condition, the per-token term and the policy loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asd_megatron.config.base import Section

ConditionName = Literal[
    "grpo", "sd", "antisd", "reverse_kl_ascent", "no_gate", "multiplicative", "student_entropy_gate", "no_teacher"
]
DivergenceName = Literal["jensen_shannon", "reverse_kl", "forward_kl"]
ESTIMATES_REVERSE_KL: tuple[str, ...] = ("sd", "reverse_kl_ascent")
GATED: tuple[str, ...] = ("antisd", "reverse_kl_ascent", "multiplicative", "student_entropy_gate", "no_teacher")
DEFAULT_FLOOR = 0.5  # of masked importance weights


class AlgorithmSection(Section):
    """The advantage of a token, and the policy loss."""

    name: ConditionName = Field(
        "antisd",
        description=(
            "The condition. `grpo`: group-relative advantage alone; `sd`: + lambda u; `antisd`: - lambda phi(u), gated;"
            " `reverse_kl_ascent`: - lambda u, gated; `no_gate`: `antisd` with the gate always open; `multiplicative`:"
            " phi(u) scales the group advantage, gated; `student_entropy_gate`: `antisd` gated by the student's"
            " entropy; `no_teacher`: u is -log p of the student."
        ),
    )
    lambda_max: float = Field(
        0.5,
        ge=0,
        description="Weight of the per-token term while the gate is open; the largest with `teacher_perplexity`.",
    )
    lambda_source: Literal["gate", "teacher_perplexity"] = Field(
        "gate",
        description=(
            "What sets lambda. `gate`: `lambda_max` or 0 by the entropy gate, always `lambda_max` in conditions without"
            " one; `teacher_perplexity`: the section `perplexity`, in place of the gate."
        ),
    )
    composition: Literal["additive", "multiplicative", "multiplicative_plain", "rlsd"] | None = Field(
        None,
        description=(
            "How the term q, with the sign of `name`, meets the group advantage A. `additive`: A + lambda q;"
            " `multiplicative`: A max(0, 1 + lambda q sign A); `multiplicative_plain`: A (1 + lambda q); `rlsd`:"
            " A ((1 - lambda) + lambda clip(exp(q sign A), 0.8, 1.2)), with `sd` or `reverse_kl_ascent`. null: as"
            " `name` does."
        ),
    )
    advantage_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of the group advantage where a term is added to it (`grpo` has none).",
    )
    estimator: Literal["sampled", "full_vocabulary"] = Field(
        "sampled",
        description=(
            "How the per-token term is computed. `sampled`: from the log-probs of the sampled token (the paper's);"
            " `full_vocabulary`: the divergence between student and teacher itself, over all tokens, whose gradient"
            " the sampled term estimates. docs/divergences.md compares them."
        ),
    )
    divergence: DivergenceName | None = Field(
        None,
        description=(
            "With `full_vocabulary`: `jensen_shannon`, `reverse_kl` (student to teacher) or `forward_kl` (teacher to"
            " student); null: the one that `name`'s sampled term estimates."
        ),
    )
    direction: Literal["ascend", "descend"] | None = Field(
        None,
        description="With `full_vocabulary`: away from the teacher (`ascend`) or towards it; null: as `name` does.",
    )
    mixture: float = Field(
        0.5,
        gt=0,
        lt=1,
        description=(
            "The teacher's weight in the mixture of `jensen_shannon`: 0.5 is the symmetric divergence, others the"
            " generalised one."
        ),
    )
    teacher_states: Literal["device", "host"] = Field(
        "device",
        description=(
            "With `full_vocabulary`: where the teacher's hidden states wait for the update. `host` frees GPU memory"
            " and copies each tile's rows back."
        ),
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="The importance ratio is clipped below 1 - `clip_low`.")
    clip_high: float = Field(0.2, gt=0, description="The importance ratio is clipped above 1 + `clip_high`.")
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = Field(
        "token_mean",
        description=(
            "How token losses add up: mean over all response tokens of the global batch; mean over its responses of "
            "each response's mean; or sum divided by responses x `constant_length`."
        ),
    )
    constant_length: int | None = Field(
        None, ge=1, description="Tokens by which `aggregation: constant_length` divides each response's sum."
    )
    updates_per_batch: int = Field(
        1,
        ge=1,
        description=(
            "Optimizer steps a batch: it is divided into as many disjoint mini-batches of equally many rollouts."
        ),
    )
    epochs: int = Field(1, ge=1, description="Passes over the mini-batches of a batch.")
    pmi_clip: float | None = Field(
        None, gt=0, description="Clamp u to +- this (nats) before the term is computed; null: no clamp."
    )
    outlier_deviations: float | None = Field(
        None,
        gt=0,
        description=(
            "A u with an absolute value above so many standard deviations of u counts as 0 in the term; the deviation"
            " is the mean over the warm-up steps. null: no such rule."
        ),
    )
    term_normalization: Literal["none", "sequence", "demean", "batch"] = Field(
        "none",
        description=(
            "Standardise the term over the tokens of each response (`sequence`) or of the global batch; `demean`: only"
            " subtract its mean over each response."
        ),
    )
    term_clip: float | None = Field(
        None, gt=0, description="Clamp the term to +- this after normalisation; null: no clamp."
    )
    term_max_position: int | None = Field(
        None, ge=1, description="No term from this response position on (tokens, counted from 0); null: everywhere."
    )
    term_max_length: int | None = Field(
        None, ge=1, description="No term on responses of this many tokens and more; null: on all."
    )
    importance_correction: Literal["none", "truncated", "masked"] = Field(
        "none",
        description=(
            "Weight each token by the ratio exp(log-prob under the scoring weights - the engine's). `truncated`: at"
            " most `importance_cap`; `masked`: 0 outside `importance_floor` to `importance_cap`. With"
            " `rollout.quantization` the default is `truncated`."
        ),
    )
    importance_level: Literal["token", "sequence", "geometric"] = Field(
        "token",
        description=(
            "The ratio of the token itself, of its whole response (product over the sampled tokens), or the geometric"
            " mean of those."
        ),
    )
    importance_cap: float = Field(2.0, gt=0, description="Largest importance weight.")
    importance_floor: float | None = Field(
        None, ge=0, description="Smallest importance weight that `masked` keeps; null: 0.5."
    )
    kl_coefficient: float = Field(
        0.0,
        ge=0,
        description=(
            "Weight of a penalty on the divergence from the weights of `model.path` (one more scoring pass); 0: none"
            " (the paper's)."
        ),
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k2",
        description=(
            "Of the sampled token, r = log p - log p_initial. `k1`: r, subtracted from the advantage; `k2`: r^2 / 2,"
            " in the loss; `k3`: exp(-r) - 1 + r, in the loss, whose gradient is that of the divergence in the other"
            " direction (docs/teachers.md)."
        ),
    )
    mask_truncated: bool = Field(False, description="Leave responses that hit the token limit out of the loss.")
    log_pmi: bool = Field(
        False, description="Score the teacher although the condition does not need it (`grpo`), to log u."
    )

    @property
    def divergence_kind(self) -> DivergenceName:
        """`divergence`; null: the one whose gradient `name`'s sampled term estimates."""
        return self.divergence or ("reverse_kl" if self.name in ESTIMATES_REVERSE_KL else "jensen_shannon")

    @property
    def weighs_group_advantage(self) -> bool:
        """Whether the group advantage is part of the loss."""
        return self.name == "grpo" or self.advantage_weight > 0

    @property
    def mask_below(self) -> float | None:
        """The smallest importance weight that is kept; None where the correction does not mask."""
        if self.importance_correction != "masked":
            return None
        return DEFAULT_FLOOR if self.importance_floor is None else self.importance_floor

    @property
    def gated(self) -> bool:
        """Whether an entropy-triggered gate sets lambda."""
        return self.name in GATED and self.lambda_source == "gate"
