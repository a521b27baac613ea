"""Warnings about a run that ends without errors but does not train as it should: its per-token term has no effect, or
its model cannot learn any more.

Each warning looks at the metrics of consecutive steps (`observe/names.py`) and says what to look at. It is raised once
per run; the step's metric `warnings/KIND` is 1 while the condition holds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from asd_megatron.antisd.perplexity import UNUSABLE_MEAN
from asd_megatron.errors import LearnsNothing
from asd_megatron.observe.names import WARNINGS

STEPS_IN_A_ROW = 3
"""Steps in which a condition holds before it is reported: one small batch alone may have it by chance."""
CLOSED_FRACTION, CLOSED_AFTER = 0.5, 10
"""The gate is reported when lambda was 0 in more than this fraction of at least so many steps since the warm-up."""
NEGATIVE_FRACTION, NEGATIVE_MEAN = 0.9, -1.0
"""u is out of distribution when more than this fraction of tokens has u < 0 and the mean is below so many nats."""
SAME = 1e-6
"""Entropies that differ by no more, in nats and relative to those above 1 nat, are the same but for rounding."""
LOSS_AT_REST = 1e-3
"""Nats below which the cross-entropy of the supervised stage may have a gradient that rounds to 0."""
ABOVE_CUTOFF = 0.5
"""The cut-off of the perplexity is reported when more than this fraction of responses is above it."""
CALIBRATION_TOKENS = 256
"""Tokens over all warm-up steps below which H_warm is too noisy an estimate."""

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Finding:
    """A warning as `summary.json` lists it: the kind, the step at which it was first reported, the text."""

    kind: str
    step: int
    text: str


def _no_context(m: Metrics) -> bool:
    return m.get("pmi/coverage") == 0


def _out_of_distribution(m: Metrics) -> bool:
    return m.get("pmi/negative_share", 0.0) > NEGATIVE_FRACTION and m.get("pmi/mean", 0.0) < NEGATIVE_MEAN


def _equal_rewards(m: Metrics) -> bool:
    return m.get("reward/mixed_groups") == 0 and not m.get("reward/overlong_share")  # which makes advantages differ


def _above_cutoff(m: Metrics) -> bool:
    return m.get("perplexity/above_cutoff", 0.0) > ABOVE_CUTOFF


def _no_target(m: Metrics) -> bool:
    known = math.isfinite(m.get("perplexity/target", math.nan))
    return not known and m.get("perplexity/mean", 0.0) >= UNUSABLE_MEAN


def _same_entropy(steps: Sequence[Metrics]) -> float | None:
    """The entropy of next-token distributions that do not depend on what the model reads; None where they may.

    The mean alone does not tell: batches of one prompt and one response, or of single-token responses to one prompt,
    have the same. Median and mean must agree, and responses have several tokens. Entropies of 0 are also those of a
    model that is sure of different things, and may be right about the next batch.
    """
    values = [m.get(name, math.nan) for m in steps for name in ("entropy/student_mean", "entropy/student_median")]
    if not all(map(math.isfinite, values)) or any(m.get("response/length_max", 0.0) < 2 for m in steps):
        return None
    largest = max(values)
    if largest - min(values) > SAME * max(1.0, largest):
        return None
    return largest if largest > SAME or all(map(_one_response, steps)) else None


def _one_response(m: Metrics) -> bool:
    """Whether all responses may be one and the same, a failure, of which no per-token term will make another."""
    same_length = m.get("response/length_mean") == m.get("response/length_max")
    waiting = m.get("gate/warming_up") or m.get("perplexity/warming_up")
    return same_length and m.get("reward/pass_rate", 0.0) == 0 and not waiting


IN_A_ROW: dict[str, tuple[Callable[[Metrics], bool], str]] = {
    "no_context": (
        _no_context,
        "no rollout has had privileged context for {n} steps (pmi/coverage 0), so the per-token term is 0"
        " everywhere and {rest}. Look at demonstration/*: with no correct rollout and no reference solution"
        " there is nothing to show; give `solution` in data.train (read with privileged.use_reference true), set"
        " privileged.when_no_solution, or choose easier problems",
    ),
    "out_of_distribution": (
        _out_of_distribution,
        "nearly every token is less likely under the teacher (u < 0 for {negative:.0%} of tokens, mean {mean:.1f} nats,"
        " {n} steps in a row): the privileged prompt is out of distribution for this model, and u measures that instead"
        " of the solution. Look at a teacher's prompt (`asd-megatron train RECIPE --dry-run`), the chat template and"
        " privileged.*",
    ),
    "equal_rewards": (
        _equal_rewards,
        "all rewards of every group have been equal for {n} steps (pass rate {passed:.0%}): the group-relative"
        " advantage is 0. Look at a few responses (run.dump_rollouts true) and the reward; choose easier or harder"
        " problems, or more rollouts per problem",
    ),
    "above_cutoff": (
        _above_cutoff,
        "{above:.0%} of the responses have a teacher's perplexity above perplexity.cutoff, where lambda is 0 ({n} steps"
        " in a row, mean perplexity {perplexity:.3g}): the term does nothing on them. Look at a teacher's prompt"
        " (`asd-megatron train RECIPE --dry-run`); raise perplexity.cutoff above perplexity/target, or use"
        " algorithm.lambda_source gate",
    ),
    "no_target": (
        _no_target,
        "the teacher's mean perplexity has been {perplexity:.3g} for {n} steps: from {unusable:g} on a step does not"
        " count for the target, and lambda is 0 until one counts. Look at perplexity/median: when it is small, a few"
        " responses make the mean; give perplexity.target, or use algorithm.lambda_source gate",
    ),
}
"""Conditions of single steps, reported when they hold `STEPS_IN_A_ROW` times."""


@dataclass
class MethodWarnings:
    """Watches the metrics of a run's steps, in order. Feed a resumed run the rows of its metrics.jsonl first.

    `group_advantage`: the recipe trains on it; equal rewards do not matter to one that does not. `stop_when_dead`: a
    model that cannot learn any more is an error (`must_stop`), not a warning.
    """

    group_advantage: bool = True
    stop_when_dead: bool = False
    reported: list[Finding] = field(default_factory=list)
    _recent: dict[str, deque[bool]] = field(
        default_factory=lambda: {kind: deque(maxlen=STEPS_IN_A_ROW) for kind in IN_A_ROW}
    )
    _without_gradient: deque[Metrics] = field(default_factory=lambda: deque(maxlen=STEPS_IN_A_ROW))
    _gated_steps: int = 0
    _closed_steps: int = 0
    _calibration_tokens: float = 0.0
    _calibrated: bool = False

    def of_step(self, step: int, metrics: Metrics) -> tuple[dict[str, float], list[str]]:
        """(the step's metrics `warnings/*`, the texts of warnings that are new with this step)."""
        texts = {kind: text for kind in WARNINGS if (text := self._check(kind, metrics)) is not None}
        known = {warning.kind for warning in self.reported}
        new = [Finding(kind, step, text) for kind, text in texts.items() if kind not in known]
        self.reported += new
        warned = [warning.text for warning in new if not (self.stop_when_dead and warning.kind == "learns_nothing")]
        return {f"warnings/{kind}": 1.0 for kind in texts}, warned

    def must_stop(self, step: int, found: Metrics) -> LearnsNothing | None:
        """The error that ends the run after `step`, of which `of_step` has found these metrics; None: it continues."""
        if not (self.stop_when_dead and found.get("warnings/learns_nothing")):
            return None
        text = next(one.text for one in self.reported if one.kind == "learns_nothing")
        return LearnsNothing(f"step {step}: {text} (with run.stop_when_dead false the run continues)")

    def summary(self) -> list[dict[str, Any]]:
        """For summary.json, in the order in which they were reported."""
        return [asdict(warning) for warning in self.reported]

    def _check(self, kind: str, metrics: Metrics) -> str | None:
        if kind == "gate_closed":
            return self._gate_closed(metrics)
        if kind == "short_calibration":
            return self._short_calibration(metrics)
        if kind == "learns_nothing":
            return self._learns_nothing(metrics)
        if kind == "equal_rewards" and not self.group_advantage:
            return None
        holds, text = IN_A_ROW[kind]
        recent = self._recent[kind]
        recent.append(holds(metrics))
        if len(recent) < STEPS_IN_A_ROW or not all(recent):
            return None
        return text.format(
            n=STEPS_IN_A_ROW,
            negative=metrics.get("pmi/negative_share", 0.0),
            mean=metrics.get("pmi/mean", 0.0),
            passed=metrics.get("reward/pass_rate", 0.0),
            above=metrics.get("perplexity/above_cutoff", 0.0),
            perplexity=metrics.get("perplexity/mean", 0.0),
            unusable=UNUSABLE_MEAN,
            rest="this is plain GRPO" if self.group_advantage else "nothing is trained",
        )

    def _learns_nothing(self, metrics: Metrics) -> str | None:
        """A gradient of exactly 0 is ordinary for a batch without a signal. It is not when the loss asks for a change
        (advantages above 0, a loss of the supervised stage), nor when the next-token distributions do not depend on
        what is read: their entropy is then the same at all tokens of all batches (`_same_entropy`)."""
        if metrics.get("optimizer/grad_norm") != 0 or metrics.get("reward/pass_rate", 0.0) == 1:
            self._without_gradient.clear()
            return None
        self._without_gradient.append(metrics)
        if len(self._without_gradient) < STEPS_IN_A_ROW:
            return None
        entropy = _same_entropy(self._without_gradient)
        asked = all(
            m.get("advantage/abs_mean", 0) > 0 or m.get("sft/loss", 0) > LOSS_AT_REST for m in self._without_gradient
        )
        if entropy is None and not asked:
            return None
        why = "the loss is not at rest" if entropy is None else f"the entropy is {entropy:.6g} nats on every batch"
        return (
            f"the model cannot learn any more: the gradient has been 0 for {STEPS_IN_A_ROW} steps, and {why}. An update"
            " has destroyed its weights: look at optimizer/grad_norm and entropy/student_mean of the steps before,"
            " lower optimizer.learning_rate, and resume from an earlier checkpoint (checkpoint.resume), or start again"
        )

    def _gate_closed(self, metrics: Metrics) -> str | None:
        by_perplexity = "lambda/zero_share" in metrics
        if not by_perplexity and "gate/lambda" not in metrics:
            return None
        if metrics.get("gate/warming_up") or metrics.get("perplexity/warming_up"):
            return None
        self._gated_steps += 1
        self._closed_steps += metrics["lambda/zero_share"] == 1 if by_perplexity else metrics["gate/lambda"] == 0
        fraction = self._closed_steps / self._gated_steps
        if self._gated_steps < CLOSED_AFTER or fraction <= CLOSED_FRACTION:
            return None
        found = f"lambda was 0 in {fraction:.0%} of the {self._gated_steps} steps since the warm-up"
        if by_perplexity:
            return (
                f"{found} for every response: the term does nothing. Look at perplexity/mean beside"
                " perplexity/target and perplexity/above_cutoff: raise perplexity.cutoff, set perplexity.target, or use"
                " algorithm.lambda_source gate"
            )
        return (
            f"{found}: the gate is closed and the term"
            " does nothing. Look at gate/entropy beside gate/close_below: when the entropy fell during the"
            " warm-up or later, lower optimizer.learning_rate, set gate.h_warm or gate.tau_down, or use algorithm.name"
            " no_gate"
        )

    def _short_calibration(self, metrics: Metrics) -> str | None:
        if metrics.get("gate/warming_up"):
            self._calibration_tokens += metrics.get("gate/tokens", 0.0)
            return None
        first = "gate/h_warm" in metrics and not self._calibrated and self._calibration_tokens > 0
        self._calibrated = self._calibrated or first
        if not first or self._calibration_tokens >= CALIBRATION_TOKENS:
            return None
        return (
            f"H_warm was calibrated on {self._calibration_tokens:.0f} tokens, fewer than {CALIBRATION_TOKENS}: the"
            " estimate of the gate's thresholds is noisy. Raise gate.warmup_steps or the rollouts of a step,"
            " or set gate.h_warm"
        )
