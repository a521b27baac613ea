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
    group_advantage: Literal["normalized", "centered", "leave_one_out"] = Field(
        "normalized",
        description=(
            "How a group's rewards R become A. `normalized`: (R - mean) / standard deviation (GRPO, the paper's);"
            " `centered`: R - mean (Dr. GRPO); `leave_one_out`: R - mean of the other responses' rewards (RLOO)."
        ),
    )
    whiten_advantages: bool = Field(
        False,
        description=(
            "Divide the group advantages by their standard deviation over the responses of the batch; their mean is 0"
            " already (REINFORCE++ with a group baseline)."
        ),
    )
    overlong_buffer: int = Field(
        0,
        ge=0,
        description=(
            "Length of the zone before `sampling.max_response_tokens` (tokens) in which a response loses reward in"
            " proportion to its length, for the group advantage alone (DAPO); 0: none."
        ),
    )
    overlong_penalty: float = Field(
        1.0, gt=0, description="Reward that a response at the token limit loses with `overlong_buffer`."
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
    policy_loss: Literal["ppo_clip", "gspo", "cispo"] = Field(
        "ppo_clip",
        description=(
            "What becomes of the policy ratio, which is 1 with one update a batch. `ppo_clip`: each token's, clipped"
            " (the paper's); `gspo`: the geometric mean over the response, clipped; `cispo`: each token's, cut to the"
            " bounds, as a constant weight: no token loses its gradient (docs/options.md)."
        ),
    )
    clip_low: float = Field(
        0.2, gt=0, le=1, description="The policy ratio is clipped below 1 - `clip_low`; 1: not clipped below."
    )
    clip_high: float = Field(
        0.2, gt=0, description="The policy ratio is clipped above 1 + `clip_high` (DAPO's clip-higher: 0.28)."
    )
    entropy_coefficient: float = Field(
        0.0,
        ge=0,
        description=(
            "Weight of an entropy bonus: the loss gets minus this times the mean entropy of the student's distributions"
            " over the vocabulary; 0: none."
        ),
    )
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
    def term_composition(self) -> str:
        """`composition`; null: the condition's own."""
        return self.composition or ("multiplicative" if self.name == "multiplicative" else "additive")

    @property
    def adds_term(self) -> bool:
        """Whether a per-token term is added to the group advantage or to the loss, so that it acts where the group
        advantage is 0 too. A lambda that may become 0 in a step does not matter."""
        acts = self.lambda_max > 0 or self.lambda_source == "teacher_perplexity"
        return self.name != "grpo" and acts and self.term_composition == "additive"

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
