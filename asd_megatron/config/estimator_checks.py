"""Refusals about `algorithm.estimator: full_vocabulary`."""

from __future__ import annotations

from collections.abc import Iterator

from asd_megatron.config.algorithm import AlgorithmSection
from asd_megatron.config.refusals import changed, unread

WITHOUT_DIVERGENCE = {
    "grpo": "it has no per-token term",
    "multiplicative": "its term scales the advantage of the sampled token",
    "no_teacher": "its term is a function of the student's own log-prob",
}
"""Conditions whose term estimates the gradient of no divergence from the teacher."""
OF_THE_SAMPLED_TERM = ("pmi_clip", "outlier_deviations", "term_normalization", "term_clip")
OF_THE_DIVERGENCE = ("divergence", "direction", "mixture", "teacher_states")


def estimator_findings(a: AlgorithmSection) -> Iterator[str]:
    """What `algorithm` asks for that its estimator cannot do."""
    if a.estimator == "sampled":
        yield from unread("algorithm", a, *OF_THE_DIVERGENCE, needs="algorithm.estimator full_vocabulary")
        return
    if a.name in WITHOUT_DIVERGENCE:
        yield (
            f"algorithm.estimator full_vocabulary: algorithm.name {a.name} is not the gradient of a divergence from the"
            f" teacher ({WITHOUT_DIVERGENCE[a.name]}); set algorithm.estimator sampled, or algorithm.name antisd,"
            " no_gate, student_entropy_gate, reverse_kl_ascent or sd"
        )
    if a.composition not in (None, "additive"):
        yield (
            f"algorithm.composition {a.composition} scales the advantage of the sampled token, and algorithm.estimator"
            " full_vocabulary adds the divergence to the loss: leave algorithm.composition out, or set"
            " algorithm.estimator sampled"
        )
    for key, value in changed(a, *OF_THE_SAMPLED_TERM).items():
        yield (
            f"algorithm.{key} {value} changes the sampled token's term, and algorithm.estimator full_vocabulary has"
            f" none: leave algorithm.{key} out, or set algorithm.estimator sampled"
        )
    if a.divergence_kind != "jensen_shannon":
        yield from unread("algorithm", a, "mixture", needs="algorithm.divergence jensen_shannon")
