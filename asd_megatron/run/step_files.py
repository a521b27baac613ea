"""What a run writes of each step on global rank 0: metrics.jsonl with TensorBoard, and expert_load.jsonl.

While the disk is full their lines wait in memory (`observe.lines`), and no checkpoint is written meanwhile: its step
would promise lines that a kill could still lose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from asd_megatron.files import user_error
from asd_megatron.models.routing import LoadReport
from asd_megatron.observe.expert_load import ExpertLoadFile, load_metrics
from asd_megatron.observe.writer import RunWriter
from asd_megatron.run.folder import writing


class StepFiles:
    """The open files, on global rank 0 after `open`; elsewhere none, and nothing is written. say: prints a line on the
    console."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self.writer: RunWriter | None = None
        self._load: ExpertLoadFile | None = None

    def open(self, closing: ExitStack, recipe: str, *, tensorboard: bool, experts: bool, done: int | None) -> None:
        """Open them until `closing` closes, for a run that continues after `done` steps; None: a new run. recipe: its
        text, for TensorBoard. Raises UserError when one cannot be written."""
        with writing(self._folder):
            self.writer = RunWriter(self._folder, tensorboard=tensorboard, resume_step=done)
            closing.callback(_close, self.writer)
            if experts:
                self._load = ExpertLoadFile(self._folder, resume_step=done)
                closing.callback(_close, self._load)
            self.writer.text("recipe", recipe)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line of metrics.jsonl, and TensorBoard. Raises UserError when it cannot be written and room on the disk
        would not help."""
        if self.writer is not None:
            with writing(self._folder):
                notes = self.writer.write(step, metrics)
            for note in notes:
                self._say(note)

    def write_load(self, step: int, load: LoadReport | None) -> dict[str, float]:
        """A line of expert_load.jsonl; returns the step's metrics of the experts. Raises UserError as `write`."""
        if load is None or self._load is None:
            return {}
        with writing(self._folder):
            note = self._load.write(step, load.tokens)
        if note is not None:
            self._say(note)
        return load_metrics(load.fractions, load.entropy, load.auxiliary_loss)

    def write_waiting(self) -> None:
        """Write the lines of earlier steps that wait for room. Raises UserError if there is still none."""
        with user_error(f"lines of earlier steps still wait for room in {self._folder}", "free space there"):
            for file in (self.writer, self._load):
                if file is not None:
                    file.write_waiting()


def _close(file: RunWriter | ExpertLoadFile) -> None:
    """Close without raising: an error of the last write has been reported already."""
    with suppress(OSError):
        file.close()
