"""AntiSD training: `torchrun --nproc-per-node N -m asd_megatron.train RECIPE [FILES] [--section.key value ...]`.

The loop below is Algorithm 1; `run/rl.py` holds what its lines do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from asd_megatron.cli.guard import as_rank, leave, report_at_once
from asd_megatron.config import load_recipe
from asd_megatron.errors import UserError
from asd_megatron.run.rl import TrainingRun
from asd_megatron.run.session import Session, run_session


def train(run: TrainingRun) -> None:
    """The training loop. Collective over all ranks."""
    run.start()
    for step in run.steps():
        groups = run.collect(step)  # newest weights to the engine first; problems, G responses each, rewards
        batch = run.build_batch(groups, step)  # student sequences and privileged teacher sequences
        teacher = run.score_teacher(batch)  # t_t and full-vocabulary entropy, no gradient
        student = run.score_student(batch)  # only when the pass plan says so
        reference = run.score_reference(batch)  # only with a KL penalty: under the initial weights
        lam = run.gate_step(batch, teacher, student)  # exact median entropy over all ranks, Schmitt trigger
        stats = run.update(batch, teacher, student, lam, reference)  # s_t, u_t, phi, clipped policy gradient, optimizer
        run.observe(step, batch, teacher, stats, reference)
        run.checkpoint_if_due(step)
        run.stop_if_requested(step)  # the same on all ranks: a signal, RUN/stop, the time limit
    run.finish()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe on the ranks that torchrun started (one without it); returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)

    def program() -> int:
        if not arguments or arguments[0].startswith("-"):
            raise UserError(
                "give a recipe first: python -m asd_megatron.train RECIPE [MORE.yaml ...] [--section.key value ...]"
            )
        recipe = load_recipe(arguments[0], arguments[1:])

        def run(session: Session) -> None:
            with report_at_once():
                train(TrainingRun(recipe, session))

        return run_session(recipe, run)

    return as_rank(program)


if __name__ == "__main__":
    leave(main())
