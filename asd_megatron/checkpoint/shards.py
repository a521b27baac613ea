"""Writing the tensors of a checkpoint: in this process, on all ranks, with what the operating system refused as a
UserError."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from asd_megatron.distributed.objects import on_rank_zero, share_outcome
from asd_megatron.errors import UserError
from asd_megatron.files import system_reason

_TORCH_SAVE = ("inline_container", "iostream error")  # in what `torch.save` raises when the system refuses a write
_TRIAL_BYTES = 1 << 20


@contextmanager
def saving(folder: Path, step: int) -> Iterator[None]:
    """Raise what the operating system refused inside as a UserError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = _reason(error, folder)
        if reason is not None:
            raise UserError(
                f"the checkpoint of step {step} cannot be saved in {folder} ({reason}): free space there (or raise a"
                " limit: quota, ulimit -f), or choose another run.folder"
            ) from error
        if isinstance(error, CheckpointException):  # a BaseException
            raise RuntimeError(f"the checkpoint of step {step} cannot be saved in {folder}: {error}") from error
        raise


def _reason(error: BaseException, folder: Path) -> str | None:
    """The operating system's reason for a failed write in `folder`, None when something else failed."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException):  # what failed, by rank
        reasons = [_reason(failure, folder) for failure, _ in error.failures.values()]
        return next((reason for reason in reasons if reason is not None), None)
    refusal = refused_write(error, folder)
    return None if refusal is None else system_reason(refusal)


def refused_write(error: BaseException, folder: Path) -> OSError | None:
    """The operating system's error behind a failed write in `folder`, None when something else failed.

    `torch.save` into a Python stream raises `inline_container.cc: unexpected pos 704 vs 598` with the OSError in its
    context; into a path it raises `iostream error` alone, and a trial write finds out why.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and not isinstance(link, UserError) and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for known in chain:
        if isinstance(known, OSError):
            return known
    for failed in chain:
        if isinstance(failed, RuntimeError) and any(word in str(failed) for word in _TORCH_SAVE):
            return _trial_write(folder) or OSError(f"a file cannot be written: {str(failed).splitlines()[0]}")
    return None


def _trial_write(folder: Path) -> OSError | None:
    """The operating system's error for a file of 1 MiB in `folder`; None if it can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def save_shards(
    folder: str, state: dict[str, Any], host: dist.ProcessGroup, guarded: Callable[[], AbstractContextManager[None]]
) -> None:
    """Megatron's save with a writer that stays in this process.

    Its own forks workers out of a process full of threads, keeps a helper process alive and hangs when a worker dies.
    What global rank 0 writes alone, before and after the shards, is shared with the others, who would wait for it.
    `guarded`: `saving` of this checkpoint.
    """
    import torch.distributed.checkpoint as torch_checkpoint
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    class InProcess(strategies.TorchDistSaveShardedStrategy):
        begun = False

        def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
            self.begun = True
            share_outcome(None, None, host)  # common.pt is written
            flat = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)[0]
            planner = strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
            # One thread: torch loses the error of a second one, and completes the checkpoint without its tensors.
            writer = Writer(checkpoint_dir, thread_count=1)
            torch_checkpoint.save(
                strategies.mcore_to_pyt_state_dict(flat, False), storage_writer=writer, planner=planner
            )
            on_rank_zero(partial(self._save_config, str(checkpoint_dir)), host)

        def _save_config(self, checkpoint_dir: str) -> None:
            with guarded():
                save_config(CheckpointingConfig(self.backend, self.version), checkpoint_dir)

    class Writer(torch_checkpoint.FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            try:
                return super().write_data(plan, planner)
            except RuntimeError as error:
                refusal = refused_write(error, Path(folder))
                if refusal is None:
                    raise
                raise refusal from None  # torch sends an error to the other ranks without its context

    strategy = InProcess("torch_dist", 1)
    try:
        with guarded():
            dist_checkpointing.save(state, folder, sharded_strategy=strategy)
    except Exception as error:
        if not strategy.begun:  # the others wait in its `save`
            share_outcome(None, error, host)
        raise
