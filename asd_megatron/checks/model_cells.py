"""What a rank of the models table is asked to measure: layouts and tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from asd_megatron.distributed.layout import Layout

LAYOUTS: dict[str, Layout] = {
    "single": Layout(),
    "tp2": Layout(tensor=2),
    "tp2_sp": Layout(tensor=2, sequence_parallel=True),
    "pp2": Layout(pipeline=2),
    "pp2_vpp2": Layout(pipeline=2, virtual_pipeline=2),
    "tp2_pp2": Layout(tensor=2, pipeline=2),
    "cp2": Layout(context=2),
    "dp2": Layout(data=2),
    "ep2": Layout(data=2, expert=2),
    "tp2_ep2": Layout(tensor=2, expert=2),
    "ep2_pp2": Layout(data=2, pipeline=2, expert=2),
}


def layout_of(name: str, *, experts: bool) -> Layout | None:
    """The layout of a cell; None where the model has none of that name. Experts need sequence parallelism beside tensor
    parallelism: their `tp2` has it, and is their `tp2_sp`."""
    layout = LAYOUTS[name]
    if not experts:
        return layout if layout.expert == 1 else None
    if name == "tp2_sp":
        return None
    return replace(layout, sequence_parallel=layout.tensor > 1)


Kind = Literal["parity", "logits", "train", "drift"]


@dataclass(frozen=True)
class Task:
    """One measurement on the ranks of `layout`.

    Attributes:
        kind: `parity`: logits, gradients and both round trips against `transformers`; `logits`: the same without
            gradients; `train`: one optimizer step, then logits and an export; `drift`: bfloat16 against float32.
        name: of its files in the folder of the check.
        folder, bfloat16: the model in float32 and (for the round trips) in bfloat16.
        sequences: file with the sequences and, for `parity` and `logits`, what `transformers` computes from them.
    """

    kind: Kind
    name: str
    layout: Layout
    folder: str
    sequences: str
    bfloat16: str = ""


def write_tasks(path: Path, tasks: Sequence[Task]) -> None:
    path.write_text(json.dumps([asdict(task) for task in tasks]))


def read_tasks(path: Path) -> list[Task]:
    return [Task(**{**given, "layout": Layout(**given["layout"])}) for given in json.loads(path.read_text())]
