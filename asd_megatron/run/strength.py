"""How strongly the per-token term acts in each step: lambda, from the entropy gate or from the teacher's perplexities,
and the limit of u's outliers. Their states are part of every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from asd_megatron.antisd import Gate, OutlierLimit, PerplexityLambda, condition
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.errors import plural
from asd_megatron.observe.metrics import GateReading, PerplexityReading
from asd_megatron.trainer import passes
from asd_megatron.trainer.columns import Scores, TokenInputs, UpdateColumns
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.token_method import Method


class TermStrength:
    """Sets lambda and the outlier limit of a step before its update, and keeps what it learns from the steps.

    Args:
        method: of the recipe. gate: sets lambda unless `perplexity` does. outliers: None: no such rule.

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
    ) -> None:
        self.process_groups, self.method = process_groups, method
        self.gate, self.perplexity, self.outliers = gate, perplexity, outliers
        self.reading: GateReading | PerplexityReading = GateReading(False, 0.0)

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
        }

    def load_state_dict(self, state: Mapping[str, Any], *, of: str) -> list[str]:
        """Restore the parts that were saved; others, those of another source of lambda, start with their warm-up.
        `of`: the saved run's condition. Returns a line for the console about a level that is not the saved one.

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
