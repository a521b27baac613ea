"""How noisy is the gradient of the per-token term, estimated from the sampled token or exact over the vocabulary?

Draws fresh batches from the recipe's model, whose weights never change, and computes of each batch the gradient of
every parameter with both estimators: of the term alone and of the complete loss, with lambda at lambda_max. In one
process.

    python tools/gradient_noise.py examples/puzzle/quickstart.yaml --batches 40 --parallelism.tensor 1

Columns: `norm` is the length of the mean gradient (its own noise taken off), `noise` the root of the total variance of
one batch's gradient, `batches` how many batches have to be averaged until noise and norm are equal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_megatron.cli.guard import as_rank
from asd_megatron.config import Recipe, load_recipe
from asd_megatron.errors import UserError
from asd_megatron.files import write_json
from asd_megatron.run.rl import Batch, TrainingRun
from asd_megatron.run.session import Session, run_session
from asd_megatron.trainer.columns import Scores
from asd_megatron.trainer.optimizer import StepResult
from asd_megatron.trainer.token_method import Method
from asd_megatron.trainer.updater import update

LOSSES = {"term": 0.0, "loss": 1.0}  # weight of the group advantage


class _Gradients:
    """Stands in for the optimizer: keeps the gradient and changes nothing."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.found = torch.empty(0)

    def zero_grad(self) -> None:
        self.session.optimizer.zero_grad()

    def step(self, *, loss: float = 0.0) -> StepResult:
        tensors = [tensor.reshape(-1).double() for _, tensor in self.session.port.export_gradients()]
        self.found = torch.cat(tensors)
        return StepResult(float(self.found.norm()), False)


@dataclass
class Moments:
    """Running sums over batches of one gradient."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: float = 0.0

    def add(self, gradient: Tensor) -> None:
        self.count += 1
        self.total = self.total + gradient
        self.squares += float(gradient.square().sum())

    @property
    def mean(self) -> Tensor:
        assert isinstance(self.total, Tensor)
        return self.total / self.count

    def figures(self) -> dict[str, float]:
        """Unbiased: the mean's own variance is taken off its squared length."""
        square = float(self.mean.square().sum())
        variance = (self.squares - self.count * square) / (self.count - 1)
        norm2 = max(square - variance / self.count, 0.0)
        batches = variance / norm2 if norm2 else float("inf")
        return {"norm": norm2**0.5, "noise": variance**0.5, "batches": batches}


def gradient(run: TrainingRun, batch: Batch, teacher: Scores, method: Method) -> Tensor:
    """The gradient of all parameters, flat, float64."""
    gradients = _Gradients(run.session)
    exact = method.exact is not None
    update(
        run.port,
        run.process_groups,
        gradients,  # type: ignore[arg-type]
        batch.local,
        batch.inputs,
        teacher=teacher,
        student=None,
        method=method,
        plan=run.plan if exact else replace(run.plan, head="fused"),
        lam=run.recipe.algorithm.lambda_max,
        temperature=run.recipe.sampling.temperature,
        states=batch.states if exact else None,
    )
    return gradients.found


def measure(run: TrainingRun, batches: int) -> dict[str, Moments]:
    """Moments by loss and estimator over fresh batches."""
    found = {f"{loss} {how}": Moments() for loss in LOSSES for how in ("sampled", "exact")}
    run.start()
    for step in range(1, batches + 1):
        batch = run.build_batch(run.collect(step), step)
        teacher = run.score_teacher(batch)
        assert teacher is not None
        for loss, weight in LOSSES.items():
            method = replace(run.strength.method, advantage_weight=weight)
            found[f"{loss} exact"].add(gradient(run, batch, teacher, method))
            found[f"{loss} sampled"].add(gradient(run, batch, teacher, replace(method, exact=None)))
        run.weights.version = step
        print(f"batch {step} of {batches}", file=sys.stderr, flush=True)
    return found


def report(found: dict[str, Moments]) -> dict[str, Any]:
    """The figures of every gradient, and of both losses the ratio of the variances and the cosine of the means."""
    out: dict[str, Any] = {name: moments.figures() for name, moments in found.items()}
    for loss in LOSSES:
        sampled, exact = found[f"{loss} sampled"], found[f"{loss} exact"]
        out[f"{loss}: variance, sampled over exact"] = (
            out[f"{loss} sampled"]["noise"] ** 2 / out[f"{loss} exact"]["noise"] ** 2
        )
        out[f"{loss}: cosine of the means"] = float(
            torch.nn.functional.cosine_similarity(sampled.mean, exact.mean, dim=0)
        )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe; overrides as for `asd-megatron train`")
    parser.add_argument("--batches", type=int, default=40, help="fresh batches, 2 or more (default: 40)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments, overrides = parser.parse_known_args(argv)

    def program() -> int:
        if arguments.batches < 2:
            raise UserError("--batches must be at least 2: the noise is a variance over batches")
        with tempfile.TemporaryDirectory() as folder:
            fixed = ["--algorithm.estimator", "full_vocabulary", "--run.folder", folder, "--run.dump_rollouts", "false"]
            fixed += ["--evaluation.at_start", "false", "--evaluation.at_end", "false", "--evaluation.every", "0"]
            fixed += ["--checkpoint.every", "0", "--checkpoint.export_at_end", "false"]
            recipe = load_recipe(arguments.recipe, [*overrides, *fixed])
            assert isinstance(recipe, Recipe)
            if recipe.teacher.weights != "live" or recipe.algorithm.kl_coefficient:
                raise UserError(
                    "the noise is measured with the live teacher and without a KL penalty: leave out"
                    " teacher.weights and algorithm.kl_coefficient"
                )
            return run_session(recipe, lambda session: _show(measure(TrainingRun(recipe, session), arguments.batches)))

    def _show(found: dict[str, Moments]) -> None:
        figures = report(found)
        for name, value in figures.items():
            text = (
                f"{value:.3f}"
                if isinstance(value, float)
                else "  ".join(f"{key} {number:.3g}" for key, number in value.items())
            )
            print(f"{name:36s} {text}")
        if arguments.json:
            write_json(Path(arguments.json), figures)

    return as_rank(program)


if __name__ == "__main__":
    raise SystemExit(main())
