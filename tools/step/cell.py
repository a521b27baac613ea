"""One measurement in a process of its own: `python -m step.cell KIND SPEC OUT`, on several ranks under torchrun."""

from __future__ import annotations

import json
import os
import sys

import torch
from step import conditions, drift, prompts, sampling

from asd_megatron.files import write_json

CELLS = {**conditions.CELLS, **sampling.CELLS, **prompts.CELLS, **drift.CELLS}


def main(kind: str, spec: str, out: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    result = CELLS[kind](json.loads(spec))
    if os.environ.get("RANK", "0") == "0":
        write_json(out, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
