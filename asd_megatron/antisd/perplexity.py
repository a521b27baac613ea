"""Lambda from the teacher's perplexity: the released code's alternative to the entropy gate.

With t the teacher's log-probs of response i's tokens, P_i = exp(-mean t) and a target P*,

    lambda_i = clip(lambda_0 * alpha * log(clip(P_i / P*, 0.5, 3)), lambda_min, lambda_max)

and 0 where P_i is above the cut-off. Responses at the target get no term, those that surprise the teacher more get more
of it. Everything is float64 over the responses of the complete batch, without communication.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from asd_megatron.errors import UserError

RATIO_LIMITS = (0.5, 3.0)
"""Of P_i / P*, before the logarithm."""
TARGET_FLOOR = 1.01
UNUSABLE_MEAN = 10.0
"""A warm-up step whose mean perplexity reaches this is left out of the target."""

Scope = Literal["response", "batch"]
Shift = Literal["none", "negative", "always"]


class PerplexityError(UserError, ValueError):
    """Settings that leave the target unknown."""


@dataclass(frozen=True)
class PerplexityRule:
    """How a perplexity becomes a lambda.

    Attributes:
        lambda_0, alpha, lambda_min, lambda_max: of the formula above.
        cutoff: a response with a larger perplexity has lambda 0.
        scope: `response`: each its own lambda. `batch`: one lambda, from the mean of the logarithms.
        shift: subtract the responses' mean lambda, `always` or only where it is `negative`, so that it is 0.
            Responses above the cut-off keep lambda 0 and take no part.
        target_ratio: P* is this times the warm-up's median perplexity; None: the median minus `target_offset`.
    """

    lambda_0: float = 0.1
    alpha: float = 2.0
    lambda_min: float = -0.02
    lambda_max: float = 0.5
    cutoff: float = 3.0
    scope: Scope = "response"
    shift: Shift = "none"
    target_ratio: float | None = None
    target_offset: float = 0.1

    def target(self, median: float) -> float:
        """P* from the warm-up's median; at least 1.01."""
        target = median - self.target_offset if self.target_ratio is None else median * self.target_ratio
        return max(target, TARGET_FLOOR)

    def lambdas(self, perplexities: Tensor, target: float) -> Tensor:
        """The lambda of every response: float64 [R] from perplexities [R]. NaN, a response without counting tokens,
        gets 0 and takes no part in the means."""
        counted = ~perplexities.isnan()
        logs = (perplexities / target).clamp(*RATIO_LIMITS).log()
        if self.scope == "batch" and counted.any():
            logs = torch.full_like(logs, float(logs[counted].mean()))
        lambdas = (self.lambda_0 * self.alpha * logs).clamp(self.lambda_min, self.lambda_max)
        acting = counted & (perplexities <= self.cutoff)
        if self.shift != "none" and acting.any():
            mean = lambdas[acting].mean()
            if self.shift == "always" or mean < 0:
                lambdas = lambdas - mean
        return torch.where(acting, lambdas, 0.0)


class PerplexityLambda:
    """Computes each step's lambdas from the teacher's perplexities of the step's responses.

    * Warm-up: the first `warmup_steps` steps with a perplexity run with lambda 0. P* is the rule's, from the lower
      median of these steps' mean perplexities. Steps with a mean of 10 and more do not count for it, and the warm-up
      continues until one step counts. A given `target` needs no warm-up.
    * A step without any perplexity changes nothing and does not count as a warm-up step.

    `history` are the mean perplexities of the warm-up's steps, `given` is the recipe's target. All ranks hold equal
    objects and update them with the same perplexities. A checkpoint needs `state_dict` alone; the settings come from
    the recipe. Raises PerplexityError for a target that could not be known.
    """

    def __init__(self, rule: PerplexityRule, warmup_steps: int, target: float | None = None) -> None:
        if warmup_steps < 1 and target is None:
            raise PerplexityError(
                f"perplexity.warmup_steps {warmup_steps} leaves nothing to measure the target on: give 1 or more"
                " warm-up steps, or perplexity.target"
            )
        if target is not None and not (math.isfinite(target) and target > 1):
            raise PerplexityError(f"perplexity.target is {target}: give a perplexity above 1, such as 1.2")
        self.rule, self.warmup_steps, self.given = rule, warmup_steps, target
        self.recalibrate()

    def recalibrate(self) -> None:
        """Back to the state of a new rule: as many warm-up steps again."""
        self.steps = 0
        self.history: list[float] = []
        self._warming_up = self.warmup_steps > 0

    def rescale(self, factor: float) -> None:
        """Multiply the measured perplexities by `factor` (above 0): those of the same responses in another number
        format, in which the steps are from here on. A given target stays."""
        self.history = [p * factor for p in self.history]

    @property
    def target(self) -> float | None:
        """P*: the given one, otherwise the rule's from the warm-up; None while that lasts."""
        if self.given is not None:
            return self.given
        if self.steps < self.warmup_steps or not self.history:
            return None
        return self.rule.target(sorted(self.history)[(len(self.history) - 1) // 2])

    @property
    def warming_up(self) -> bool:
        """The latest step was a warm-up step (before any step: the first one will be)."""
        return self._warming_up

    def update(self, perplexities: Tensor) -> Tensor:
        """This step's lambdas [R] float64, from the global batch's perplexities [R] (NaN: no token counts)."""
        usable = perplexities[~perplexities.isnan()]
        lambdas = torch.zeros_like(perplexities)
        if not usable.numel():
            return lambdas
        target = self.target
        if self.steps >= self.warmup_steps and target is not None:
            self._warming_up = False
            return self.rule.lambdas(perplexities, target)
        self.steps += 1
        mean = float(usable.mean())
        if mean < UNUSABLE_MEAN:
            self.history.append(mean)
        return lambdas

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return {
            "steps": self.steps,
            "history": list(self.history),
            "target": self.target,
            "warming_up": self._warming_up,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state: the progress of its warm-up. The target follows from that under the present settings:
        one that the saved recipe gave does not outlive it, and where nothing was measured the warm-up begins."""
        self.steps = int(state["steps"])
        self.history = [float(p) for p in state["history"]]
        self._warming_up = bool(state["warming_up"]) or self.target is None


def response_perplexities(teacher_logprobs: Tensor, counted: Tensor, segment: Tensor, segments: int) -> Tensor:
    """P = exp(-mean t) over the counted tokens of each response: float64 [segments], NaN for one without any.

    Args:
        teacher_logprobs: t [N], nats. counted: bool [N]. segment: int64 [N] in [0, segments), each token's response.
    """
    values = torch.where(counted, teacher_logprobs.detach().double(), 0.0)
    columns = torch.stack([values, counted.double()], dim=1)
    total, count = columns.new_zeros(segments, 2).index_add_(0, segment, columns).unbind(1)
    return (-total / count).exp()  # 0 / 0 is NaN
