"""The method of the paper (arXiv 2605.11609) as pure functions of tensors, one file for each part. No communication, no
models."""

from asd_megatron.antisd.advantage import AdvantageError, GroupAdvantage, compose, group_advantages, whitened
from asd_megatron.antisd.divergence import (
    CONDITIONS,
    Condition,
    UnknownCondition,
    condition,
    context_tokens,
    entropy_mask,
    phi,
    pmi,
    signal,
    term,
    term_mask,
)
from asd_megatron.antisd.gate import Gate, GateError
from asd_megatron.antisd.importance import importance_weights, ratio_statistics
from asd_megatron.antisd.kl_penalty import KlEstimates, KlPenalty, kl_estimates, kl_loss, penalised_advantage
from asd_megatron.antisd.normalization import finish_term, moments, normalize_term, term_statistics
from asd_megatron.antisd.outliers import OutlierLimit, without_outliers
from asd_megatron.antisd.overlong import Overlong
from asd_megatron.antisd.perplexity import (
    PerplexityError,
    PerplexityLambda,
    PerplexityRule,
    response_perplexities,
)
from asd_megatron.antisd.policy_loss import (
    AggregationError,
    PolicyLoss,
    cispo_policy_loss,
    clipped_policy_loss,
    entropy_bonus,
    mean_log_ratio,
    sequence_policy_loss,
    token_weights,
)
from asd_megatron.antisd.privileged import Demonstration, PrivilegedContextError, choose_demonstrations, feedback

__all__ = [
    "CONDITIONS",
    "AdvantageError",
    "AggregationError",
    "Condition",
    "Demonstration",
    "Gate",
    "GateError",
    "GroupAdvantage",
    "KlEstimates",
    "KlPenalty",
    "OutlierLimit",
    "Overlong",
    "PerplexityError",
    "PerplexityLambda",
    "PerplexityRule",
    "PolicyLoss",
    "PrivilegedContextError",
    "UnknownCondition",
    "choose_demonstrations",
    "cispo_policy_loss",
    "clipped_policy_loss",
    "compose",
    "condition",
    "context_tokens",
    "entropy_bonus",
    "entropy_mask",
    "feedback",
    "finish_term",
    "group_advantages",
    "importance_weights",
    "kl_estimates",
    "kl_loss",
    "mean_log_ratio",
    "moments",
    "normalize_term",
    "penalised_advantage",
    "phi",
    "pmi",
    "ratio_statistics",
    "response_perplexities",
    "sequence_policy_loss",
    "signal",
    "term",
    "term_mask",
    "term_statistics",
    "token_weights",
    "whitened",
    "without_outliers",
]
