"""A rank with a fault in it: `python -m asd_megatron.checks.drill.sabotage RECIPE ...` is `asd_megatron.train`, and at
one moment what the environment variable ASD_MEGATRON_DRILL says (`Sabotage` as JSON; nothing without it) happens.

The training program has no hooks for this: the methods that a step calls are wrapped here.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from asd_megatron import train
from asd_megatron.checkpoint import shards
from asd_megatron.cli.guard import leave
from asd_megatron.models.port import ModelPort
from asd_megatron.rollout.collector import Collector
from asd_megatron.run.rl import TrainingRun
from asd_megatron.trainer import passes
from asd_megatron.trainer.optimizer import Optimizer

VARIABLE = "ASD_MEGATRON_DRILL"
RELEASED = ".released"
"""Ends the file name beside a sabotage's `marker` whose existence lets a waiting rank go on."""
MOST_SECONDS = 300.0  # that a rank waits for it
TENSORS_BEFORE = 3  # that a checkpoint's shard holds when the moment `save` has come

Phase = Literal["start", "rollout", "scoring", "update", "save"]
Act = Literal["kill", "stop", "hang", "raise", "wait", "nan", "flip", "no_space"]


@dataclass(frozen=True)
class Sabotage:
    """What happens, once: `act` at the first call of `phase` in `step` (of a run's first attempt), on `rank`; None: on
    every rank.

    kill, stop: SIGKILL or SIGSTOP to the rank itself. hang: it computes nothing and joins no collective any more.
    raise: a RuntimeError. wait: until the file `marker` + RELEASED exists. nan: in a gradient, before the optimizer's
    step. flip: of one bit of a weight that other ranks hold too. no_space: ENOSPC, by what writes a checkpoint.
    marker: this file is made when the moment has come.
    """

    phase: Phase
    step: int
    rank: int | None
    act: Act
    marker: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class _Saboteur:
    """Knows the step of this rank, and does what is to be done when the phase of that step begins."""

    def __init__(self, sabotage: Sabotage) -> None:
        self.sabotage = sabotage
        self._rank = int(os.environ.get("RANK", "0"))
        self._done = Path(sabotage.marker).exists()
        self._run: TrainingRun | None = None
        self._step = self._saved = self._tensors = 0

    def collects(self, run: TrainingRun, step: int) -> None:
        self._run, self._step = run, step

    def saves(self, run: TrainingRun, step: int) -> None:
        self._saved, self._tensors = step, 0

    def writes_tensor(self, *_: Any) -> None:
        """Of a checkpoint, maybe in a thread beside the next step."""
        self._tensors += 1
        if self._tensors > TENSORS_BEFORE:
            self._reach("save", self._saved)

    def reaches(self, phase: Phase) -> Callable[..., None]:
        return lambda *_: self._reach(phase, self._step)

    def _reach(self, phase: Phase, step: int) -> None:
        s = self.sabotage
        if self._done or s.phase != phase or s.step != step or s.rank not in (None, self._rank):
            return
        self._done = True
        Path(s.marker).touch()
        match s.act:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                while True:
                    time.sleep(1.0)
            case "raise":
                raise RuntimeError(f"the drill's error on rank {self._rank}")
            case "no_space":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "wait":
                self._wait()
            case "nan":
                assert self._run is not None
                _gradient(self._run.port).view(-1)[0] = float("nan")
            case "flip":
                assert self._run is not None
                flip_bit(_replicated(self._run.port))

    def _wait(self) -> None:
        released, end = Path(self.sabotage.marker + RELEASED), time.monotonic() + MOST_SECONDS
        while not released.exists():
            if time.monotonic() > end:
                raise TimeoutError(f"{released} was not made within {MOST_SECONDS:.0f} s")
            time.sleep(0.02)


def _gradient(port: ModelPort) -> torch.Tensor:
    return next(p.main_grad for chunk in port.parameters.chunks for p in chunk.parameters() if p.requires_grad)


def _replicated(port: ModelPort) -> torch.Tensor:
    """A weight that every tensor-parallel and data-parallel rank holds whole: a norm's."""
    return next(tensor for name, tensor in port.named_weights() if "norm" in name)


def flip_bit(tensor: torch.Tensor) -> None:
    """Change the lowest bit of the mantissa of the tensor's first element, in place."""
    numbers = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    tensor.data.view(-1)[:1].view(numbers).bitwise_xor_(1)


def install(sabotage: Sabotage) -> None:
    """Wrap the methods of a step in this process."""
    saboteur = _Saboteur(sabotage)

    def first(look: Callable[..., None], owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            look(*args)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    first(saboteur.collects, TrainingRun, "collect")
    first(saboteur.saves, TrainingRun, "checkpoint_if_due")
    first(saboteur.writes_tensor, shards, "write_tensor")
    first(saboteur.reaches("start"), TrainingRun, "start_engine")
    first(saboteur.reaches("rollout"), Collector, "next")
    first(saboteur.reaches("scoring"), passes, "score_teacher")
    first(saboteur.reaches("update"), Optimizer, "step")


def main() -> int:
    """The training program with the fault of the environment."""
    if VARIABLE in os.environ:
        install(Sabotage(**json.loads(os.environ[VARIABLE])))
    return train.main(sys.argv[1:])


if __name__ == "__main__":
    leave(main())
