"""The scoring passes of a step, timed and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from asd_megatron.config import Recipe
from asd_megatron.distributed.objects import first_message
from asd_megatron.errors import NotFinite
from asd_megatron.records import Example, TokenTable
from asd_megatron.run.bad_batches import BadBatches
from asd_megatron.run.session import Session
from asd_megatron.trainer import fp8_probe, passes
from asd_megatron.trainer.columns import Scores, TokenInputs, score_columns
from asd_megatron.trainer.expert_routing import StudentRouting
from asd_megatron.trainer.guard import check_scores
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.pass_plan import PassPlan
from asd_megatron.trainer.teacher_states import TeacherStates
from asd_megatron.trainer.token_method import Method


@dataclass(frozen=True)
class Batch:
    """A step's examples as this rank holds them, with the columns that need no model. `examples`: of the global batch,
    on global rank 0 alone."""

    step: int
    examples: Sequence[Example]
    local: LocalBatch
    inputs: TokenInputs
    states: TeacherStates | None = None  # the teacher's, with the exact estimator
    routing: StudentRouting | None = None  # of a model with experts


class ScoringPasses:
    """The passes of `plan` over a batch. A pass that the plan does not have returns None and is no phase of the step.

    Collective over all ranks. Scores that are not finite raise NotFinite on every rank.
    """

    def __init__(self, recipe: Recipe, session: Session, plan: PassPlan, bad_batches: BadBatches) -> None:
        self.session, self.bad_batches = session, bad_batches
        self.port, self.process_groups, self.clock = session.port, session.process_groups, session.clock
        self.copies, self.plan, self.temperature = session.copies, plan, recipe.sampling.temperature
        self.tokens_per_microbatch = recipe.batching.tokens_per_microbatch
        self.mask_truncated = recipe.algorithm.mask_truncated

    def divide(self, examples: Sequence[Example], updates: int = 1) -> LocalBatch:
        """This rank's part of global rank 0's examples. Collective."""
        return LocalBatch.receive(
            examples,
            self.session.layout,
            self.process_groups,
            self.session.pack_layout,
            updates=updates,
            tokens_per_microbatch=self.tokens_per_microbatch,
            mask_truncated=self.mask_truncated,
            student_forwards=self.plan.student_forwards,
        )

    def teacher(self, batch: Batch) -> Scores | None:
        wanted = self.plan.teacher_scoring
        return self._score("teacher", wanted, batch, passes.score_teacher, states=batch.states, copies=self.copies)

    def student(self, batch: Batch) -> Scores | None:
        return self._score("student", self.plan.student_scoring, batch, passes.score_student, routing=batch.routing)

    def reference(self, batch: Batch) -> Scores | None:
        wanted = self.plan.reference_scoring
        return self._score("reference", wanted, batch, passes.score_reference, copies=self.copies)

    def old(self, batch: Batch) -> Tensor | None:
        """The old log-probs [N] of the policy ratios, in the number format of the updates; part of the phase
        `student`."""
        if not self.plan.old_scoring:
            return None
        with self.clock.phase("student"):
            return passes.score_old(
                self.port,
                self.process_groups,
                batch.local,
                self.plan,
                temperature=self.temperature,
                routing=batch.routing,
            )

    def probe(self, batch: Batch, method: Method) -> fp8_probe.Probe:
        """What FP8 does to some of the batch's tokens."""
        with self.clock.phase("probe"):
            few = self.divide(fp8_probe.first_examples(batch.examples, with_context=self.plan.teacher_scoring))
            found = fp8_probe.probe(
                self.port,
                self.process_groups,
                few,
                method,
                self.plan,
                temperature=self.temperature,
                copies=self.copies,
            )
            batch.local.computed.include(few.computed)
            return found

    def _score(
        self, of: str, wanted: bool, batch: Batch, scoring_pass: Callable[..., Scores | None], **options: Any
    ) -> Scores | None:
        if not wanted:
            return None
        with self.clock.phase(of):
            scores = scoring_pass(
                self.port, self.process_groups, batch.local, self.plan, temperature=self.temperature, **options
            )
            self.check(f"{of} scoring", batch, scores, of)
        return scores

    def check(
        self, phase: str, batch: Batch, scores: Scores | None, of: str, known: Mapping[str, Tensor] | None = None
    ) -> None:
        """Raises NotFinite on every rank when any of them scored something that is not finite; the batch is kept, with
        the columns `known` (None: those scores).

        `of`: whose scores they are, `student`, `teacher` or `reference`."""
        if scores is None:
            return
        table = TokenTable(batch.local.table.offsets, score_columns(scores, of))
        found: str | None = None
        try:
            check_scores(phase, batch.local.examples, table, table.columns, batch.step)
        except NotFinite as e:
            found = str(e)
        message = first_message(found, self.process_groups.host)
        if message is not None:
            columns = score_columns(scores, of) if known is None else known
            self.bad_batches.keep(batch.step, batch.examples, batch.local, columns, message)
            raise NotFinite(message)
