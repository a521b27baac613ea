"""How strongly the per-token term acts in each step: lambda, from the entropy gate or from the teacher's perplexities,
and the limit of u's outliers. Their states are part of every checkpoint.

These levels are measured on entropies, perplexities and u of one number format, which the state names: FP8 moves a
median entropy by more than the gate's 7% between closing and reopening. A run that resumes with scores of another
format rescales them: H_warm is multiplied by the ratio of the medians of the same tokens in both formats, under the
present weights (the perplexity's target and the outliers' deviation likewise). A new warm-up would be wrong: H_warm is
the entropy at the start of training, and the gate would not notice by how much it has fallen since. Only where the
model cannot score in the former format any more are the levels measured again, with a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from asd_megatron.antisd import Gate, OutlierLimit, PerplexityLambda, condition
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.errors import plural
from asd_megatron.models.precision import ScoreFormats
from asd_megatron.observe.metrics import GateReading, PerplexityReading
from asd_megatron.observe.warnings import CALIBRATION_TOKENS
from asd_megatron.trainer import passes
from asd_megatron.trainer.columns import Scores, TokenInputs, UpdateColumns
from asd_megatron.trainer.fp8_probe import Probe, Statistics
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.token_method import Method


class _Level(Protocol):
    """A level that a warm-up measures and that lambda or the outlier limit depends on. `given`: the recipe's value, in
    place of a measured one."""

    history: list[float]

    @property
    def given(self) -> float | None: ...
    def rescale(self, factor: float) -> None: ...
    def recalibrate(self) -> None: ...


class TermStrength:
    """Sets lambda and the outlier limit of a step before its update, and keeps what it learns from the steps.

    Args:
        method: of the recipe. gate: sets lambda unless `perplexity` does. outliers: None: no such rule.
        formats: of the scores; None: not known, and not remembered.

    All ranks hold equal objects; `step` and `learn` are collective over the data-parallel group. `reading` and
    `method`, the latter with the step's outlier limit, are those of the latest step.
    """

    def __init__(
        self,
        process_groups: ProcessGroups,
        method: Method,
        gate: Gate,
        perplexity: PerplexityLambda | None = None,
        outliers: OutlierLimit | None = None,
        formats: ScoreFormats | None = None,
    ) -> None:
        self.formats, self.measured_in = formats, None if formats is None else formats.present
        self.process_groups, self.method = process_groups, method
        self.gate, self.perplexity, self.outliers = gate, perplexity, outliers
        self.reading: GateReading | PerplexityReading = GateReading(False, 0.0)

    @property
    def needs_probe(self) -> bool:
        """Whether levels are of another number format than the scores: `rescale` them before the next `step`."""
        return self.formats is not None and self.measured_in != self.formats.present

    def rescale(self, probe: Probe) -> list[str]:
        """Bring the measured levels into the scores' number format, by the ratios of the probe; returns lines for the
        console. A probe without a counting token changes nothing: the next step's may have one."""
        assert self.formats is not None and self.measured_in is not None
        old, new = probe.bfloat16, probe.fp8
        if not self.formats.in_fp8:
            old, new = new, old
        factors: list[tuple[str, _Level, float]] = []
        for name, (level, read) in self._levels().items():
            if not level.history:
                continue
            before, after = read(old), read(new)
            if not before or not after:
                return []
            factors.append((name, level, after / before))
        for _, level, factor in factors:
            level.rescale(factor)
        former, self.measured_in = self.measured_in, self.formats.present
        over = plural(probe.tokens, "token")
        if probe.tokens < CALIBRATION_TOKENS:
            over += ": few, so the factor is uncertain; larger batches, or the former precision.fp8_scores, avoid that"
        return [
            f"{name} is {factor:.4f} times what it was: as in {self.measured_in} and in {former} on the same {over}"
            for name, level, factor in factors
            if level.given is None
        ]

    def _levels(self) -> dict[str, tuple[_Level, Callable[[Statistics], float | None]]]:
        """The levels that a number format changes, by what the recipe calls them, each with what a probe says of it."""
        found: dict[str, tuple[_Level, Callable[[Statistics], float | None]]] = {}
        if self.gate.gated:
            by_student = self.method.condition.gate_entropy == "student"
            found["gate.h_warm"] = self.gate, lambda at: at.student_entropy if by_student else at.teacher_entropy
        if self.perplexity is not None:
            found["perplexity.target"] = self.perplexity, lambda at: at.perplexity
        if self.outliers is not None:
            found["the limit of algorithm.outlier_deviations"] = self.outliers, lambda at: at.deviation
        return found

    def step(
        self, batch: LocalBatch, inputs: TokenInputs, teacher: Scores | None, student: Scores | None
    ) -> float | Tensor:
        """This step's lambda: one number from the gate, or each token's [N] from the teacher's perplexities."""
        if self.outliers is not None:
            self.method = replace(self.method, outlier_limit=self.outliers.limit)
        if self.perplexity is not None:
            assert teacher is not None, "the plan scores the teacher"
            return self._from_perplexities(self.perplexity, batch, inputs, teacher)
        entropy = passes.gate_entropy(self.process_groups, inputs, self.method, teacher, student)
        lam = self.gate.update(entropy)
        thresholds = self.gate.thresholds
        self.reading = GateReading(
            open=lam > 0,
            lam=lam,
            entropy=entropy,
            h_warm=self.gate.h_warm,
            close_below=thresholds[0] if thresholds else None,
            warming_up=self.gate.warming_up,
        )
        return lam

    def _from_perplexities(
        self, perplexity: PerplexityLambda, batch: LocalBatch, inputs: TokenInputs, teacher: Scores
    ) -> Tensor:
        found = passes.teacher_perplexities(self.process_groups, batch, inputs, teacher)
        lambdas = perplexity.update(found)
        cutoff, target = perplexity.rule.cutoff, perplexity.target
        self.reading = PerplexityReading(found, lambdas, cutoff, target, perplexity.warming_up)
        return passes.per_token(batch, lambdas)

    def learn(self, inputs: TokenInputs, update: UpdateColumns) -> None:
        """After the update, whose columns hold u: its deviation, while the outlier limit is being measured."""
        if self.outliers is not None and self.outliers.measuring:
            self.outliers.record(passes.pmi_deviation(self.process_groups, inputs, update.constants.pmi))

    @property
    def warm_up(self) -> int:
        """Warm-up steps still to be made, at least."""
        source = self.gate if self.perplexity is None else self.perplexity
        made = len(self.gate.history) if self.perplexity is None else self.perplexity.steps
        return max(source.warmup_steps - made, 0) if source.warming_up else 0

    @property
    def outlier_limit(self) -> float | None:
        """Of the latest step, for its metrics: NaN while it is being measured, None without the rule."""
        if self.outliers is None:
            return None
        return math.nan if self.method.outlier_limit is None else self.method.outlier_limit

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        if self.perplexity is not None:
            return {"perplexity": {"target": self.perplexity.target}}
        return {"gate": {"open": self.gate.is_open, "h_warm": self.gate.h_warm}}

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON values, by part; None for a part that the recipe lacks."""
        return {
            "gate": self.gate.state_dict(),
            "perplexity": None if self.perplexity is None else self.perplexity.state_dict(),
            "outliers": None if self.outliers is None else self.outliers.state_dict(),
            "scores": self.measured_in,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, of: str) -> list[str]:
        """Restore the parts that were saved; others, those of another source of lambda, start with their warm-up.
        `of`: the saved run's condition. Returns lines for the console about levels that are not the saved ones, or that
        were measured in another number format.

        A gate that reads another entropy than the saved one, or meets one that reads none, starts with its warm-up;
        the outliers then do too. So continual AntiSD (section 4.4) calibrates H_warm after `grpo`.
        """
        own = self.method.condition
        if own.gated and condition(of).gate_entropy != own.gate_entropy:
            self.gate.recalibrate()
            return []
        self.gate.load_state_dict(state["gate"])
        outliers = self.outliers if condition(of).u_source == own.u_source else None  # of the same u
        for name, part in (("perplexity", self.perplexity), ("outliers", outliers)):
            if part is not None and state.get(name) is not None:
                part.load_state_dict(state[name])
        return self._changed_levels(state) + self._from_format(state.get("scores"))

    def _from_format(self, former: str | None) -> list[str]:
        """What becomes of levels that were measured in the number format `former` (None: not known), in words."""
        if self.formats is None or former in (None, self.formats.present):
            return []
        levels = {name: level for name, (level, _) in self._levels().items()}
        change = f"scores are {self.formats.present} from here on, and were {former} up to the checkpoint"
        lines = [
            f"warning: {change}: {name} was set for those; set it to what a run in this format measures"
            for name, level in levels.items()
            if level.given is not None
        ]
        measured = [name for name, level in levels.items() if level.history and level.given is None]
        names = " and ".join(measured)
        if former == self.formats.other:
            if any(level.history for level in levels.values()):
                self.measured_in = former
            return lines + ([f"{change}: {names} will be rescaled in the next step"] if measured else [])
        for name in measured:
            levels[name].recalibrate()
        if measured:
            lines.append(
                f"warning: {change}, which this model cannot compute: {names} is measured again, in a new warm-up. An"
                " entropy that has fallen since the first one then counts as normal"
            )
        return lines

    def _changed_levels(self, state: Mapping[str, Any]) -> list[str]:
        levels = []
        if self.gate.gated:
            levels.append(("gate.h_warm", state["gate"]["h_warm"], self.gate.h_warm, self.gate.warmup_steps))
        if self.perplexity is not None and state.get("perplexity") is not None:
            before, perplexity = state["perplexity"]["target"], self.perplexity
            levels.append(("perplexity.target", before, perplexity.target, perplexity.warmup_steps))
        return [_level_text(*level) for level in levels if level[1] is not None and level[1] != level[2]]


def _level_text(key: str, before: float, present: float | None, warmup_steps: int) -> str:
    """What becomes of a level of the checkpoint's run that the recipe has changed or does not give any more."""
    if present is not None:
        return f"{key} is {present:.4g} from here on; it was {before:.4g} up to the checkpoint"
    warmup = plural(warmup_steps, "warm-up step")
    return f"{key} was given as {before:.4g} up to the checkpoint and is measured from here on, over {warmup}"
