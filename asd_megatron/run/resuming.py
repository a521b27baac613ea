"""Loading the checkpoint that a run starts from. One whose newest checkpoint is damaged resumes from the newest one
before it that is not, with a warning."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from asd_megatron.checkpoint import lineage
from asd_megatron.checkpoint.manifest import DamagedCheckpoint
from asd_megatron.config import AnyRecipe
from asd_megatron.distributed.objects import on_rank_zero
from asd_megatron.errors import UserError
from asd_megatron.observe.progress import print_line
from asd_megatron.run.folder import Start, is_asked

T = TypeVar("T")


def load_start(
    recipe: AnyRecipe, start: Start, load: Callable[[str], T], host: dist.ProcessGroup
) -> tuple[Start, T | None]:
    """`load` the checkpoint of `start`; returns the start as it was made then, and the result, None without a
    checkpoint. load: collective; raises DamagedCheckpoint on every rank or on none. Collective over `host`, all ranks.
    """
    while start.checkpoint is not None:
        try:
            return start, load(start.checkpoint)
        except DamagedCheckpoint as damage:
            start = _fall_back(recipe, start, damage, host)
    return start, None


def _fall_back(recipe: AnyRecipe, start: Start, damage: DamagedCheckpoint, host: dist.ProcessGroup) -> Start:
    found, warning = on_rank_zero(lambda: fall_back(recipe, start, damage), host)
    if host.rank() == 0:
        print_line(f"warning: {warning}", sys.stderr)
    return found


def fall_back(recipe: AnyRecipe, start: Start, damage: DamagedCheckpoint) -> tuple[Start, str]:
    """The start from the newest checkpoint of the run that is older than the damaged one of `start`, and a warning.

    UserError when there is none, and when the damaged one is what `checkpoint.resume` names: the user's choice is not
    replaced by another one.
    """
    assert start.checkpoint is not None
    if start.kind != "resume" or is_asked(recipe, start.checkpoint):
        raise UserError(f"{damage}. checkpoint.resume names it, so no other one is taken: name another")
    older = lineage.before(Path(start.checkpoint))
    if not older:
        raise UserError(
            f"{damage}. There is no older one: copy it again if you have it elsewhere, or set run.overwrite true and"
            " checkpoint.resume never to start from step 1"
        )
    damaged = (*start.damaged, (Path(start.checkpoint).name, str(damage)))
    found = replace(start, checkpoint=str(older[0]), damaged=damaged)
    return found, f"{damage}. The run resumes from the one before, {older[0].name}"
