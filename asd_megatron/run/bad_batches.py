"""Batches with bad numbers, kept for inspection: RUN/rollouts/bad_step_NNNNNN.parquet, in the format of dumps.

A batch is kept when one of its rollouts, scores or updates is not finite, and when its update was skipped. The file's
metadata has the reason; numbers that were not computed any more are null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from asd_megatron.config import Recipe
from asd_megatron.errors import UserError
from asd_megatron.observe.dumps import bad_dump_path
from asd_megatron.observe.metrics import GateReading, PerplexityReading
from asd_megatron.records import Example, Group, TokenTable
from asd_megatron.run.folder import writing
from asd_megatron.run.reports import dump_batch
from asd_megatron.run.session import Session
from asd_megatron.trainer.align import gather_table
from asd_megatron.trainer.local_batch import LocalBatch

MOST = 8
"""Batches that a run folder keeps, its first ones."""


class BadBatches:
    """Keeps the bad batches of a run. A file that cannot be written is a line on the console: the run has another
    error to report."""

    def __init__(self, recipe: Recipe, session: Session) -> None:
        self.recipe, self.session = recipe, session
        self.begin_step()

    def begin_step(self) -> None:
        """A new step, whose lambda is not known yet; `reading` is to say how it is set, once it is."""
        self.reading: GateReading | PerplexityReading = GateReading(False, 0.0)

    def keep(
        self, step: int, examples: Sequence[Example], local: LocalBatch, columns: Mapping[str, Tensor], reason: str
    ) -> None:
        """Keep a batch with the columns that are known of it. examples: of the global batch, on global rank 0.
        Collective."""
        table = gather_table(local.table, columns, local.indices, self.session.process_groups)
        if table is not None:
            self._write(step, examples, table, reason)

    def keep_groups(self, step: int, groups: Sequence[Group], reason: str) -> None:
        """Keep rollouts before they are a batch, without advantages and demonstrations. Global rank 0 alone."""
        examples = [
            Example(rollout, reward, 0.0)
            for group in groups
            for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
        ]
        table = TokenTable.for_lengths([len(example.rollout.response_ids) for example in examples])
        self._write(step, examples, table, reason)

    def _write(self, step: int, examples: Sequence[Example], table: TokenTable, reason: str) -> None:
        path = bad_dump_path(self.session.folder, step)
        try:
            with writing(path):
                kept = [other for other in path.parent.glob("bad_step_*.parquet") if other != path]
                if len(kept) >= MOST:
                    return
                path.parent.mkdir(exist_ok=True)
                dump_batch(path, self.recipe, step, examples, table, self.reading, reason)
            self.session.say(f"step {step}: its batch is kept in {path} ({reason})")
        except UserError as error:
            self.session.say(f"warning: the batch of step {step} is not kept: {error}")
