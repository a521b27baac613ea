"""One rank of the models table: `python -m asd_megatron.checks.models_worker FOLDER TASKS` under torchrun.

Runs the trainer's own path (folders in and out, packs, Megatron's schedules, the vocabulary-parallel head) and writes
`FOLDER/NAME.json` for each task. All tasks have the same layout.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.checkpoint.huggingface import FolderReader, read_config, write_folder
from asd_megatron.checks.bfloat16 import measure_drift
from asd_megatron.checks.memory import PeakMemory
from asd_megatron.checks.model_cells import Task, read_tasks
from asd_megatron.checks.parity import largest, worst_tensor
from asd_megatron.checks.parity_worker import constant_adam
from asd_megatron.checks.ranks import REPORT
from asd_megatron.distributed import layout as layouts
from asd_megatron.distributed.launcher import end_with_launcher
from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.distributed.objects import gather_objects
from asd_megatron.files import write_json
from asd_megatron.models.port import ModelPort
from asd_megatron.ops.vocab_head import linear_logprob
from asd_megatron.records import as_array
from asd_megatron.trainer import schedule
from asd_megatron.trainer.batch import Pack, PackLayout, TokenSequence, build_packs

PACK_TOKENS = 128


def loaded(folder: str, layout: Layout, groups: ProcessGroups, dtype: torch.dtype) -> ModelPort:
    """The folder's model in the layout. Collective."""
    port = ModelPort.build(read_config(folder), groups, layout, dtype=dtype, layers="local")
    with FolderReader(folder) as tensors:
        port.load(tensors)
    return port


def build_task_packs(task: Task, port: ModelPort, groups: ProcessGroups, sequences: list[Tensor]) -> list[Pack]:
    """This rank's packs of the sequences, whose every token after the first is a response token."""
    everything, row, token = [], 0, 0
    for ids in sequences:
        everything.append(TokenSequence(as_array(ids.numpy(), "int32"), 1, row, token))
        row, token = row + len(ids) - 1, token + len(ids)
    by_rank = [everything[rank :: groups.dp.size()] for rank in range(groups.dp.size())]
    return build_packs(by_rank, groups.dp.rank(), PACK_TOKENS, PackLayout.of(task.layout, groups, port.device))


def full_logits(port: ModelPort, pack: Pack, hidden: Tensor) -> Tensor:
    """Logits of the pack's rows on the last stage: [N, vocab]. Collective over the tensor-parallel ranks."""
    shard = port.head_shard()
    rows = shard.gather_tokens(hidden.detach())[pack.rows]
    return shard.gather_ranks(rows @ port.head_weight().detach().t()).transpose(0, 1).flatten(1)[:, : port.vocab_size]


def run_backward(port: ModelPort, packs: list[Pack], see: Callable[[Pack, Tensor], None]) -> None:
    """Forward and backward of sum(-log p(next token)); `see(pack, logits)` on the last stage."""
    for chunk in port.chunks:
        chunk.zero_grad_buffer()

    def loss(pack: Pack, hidden: Tensor) -> Tensor:
        see(pack, full_logits(port, pack, hidden))
        logprobs, _ = linear_logprob(hidden, port.head_weight(), pack.targets, port.head_shard(), rows=pack.rows)
        return -logprobs.sum()

    schedule.forward_backward(port, packs, loss)


def run_forward(port: ModelPort, packs: list[Pack], see: Callable[[Pack, Tensor], None]) -> None:
    """The same without gradients, through the scoring pass."""
    with port.scoring():
        schedule.forward(port, packs, lambda pack, hidden: see(pack, full_logits(port, pack, hidden)))


def same_files(folder: str, written: Path) -> bool:
    """Whether both folders have the same tensors, dtype and bits."""
    with FolderReader(folder) as a, FolderReader(written) as b:
        return a.keys() == b.keys() and all(_same_bits(a[name][:], b[name][:]) for name in a)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def measure_parity(root: Path, task: Task, groups: ProcessGroups) -> dict[str, Any]:
    """Errors against `transformers`, on global rank 0."""
    truth = torch.load(task.sequences, mmap=True)
    expected = torch.cat([logits[:-1] for logits in truth["logits"]])
    port = loaded(task.folder, task.layout, groups, torch.float32)
    found: dict[str, Any] = {"round_trip_bitwise": _round_trip(root, port, task.folder)}
    differences = [0.0]

    def see(pack: Pack, logits: Tensor) -> None:
        if len(pack.rows):
            differences.append(float((logits.cpu() - expected[pack.flat.cpu()]).abs().max()))

    if task.kind == "parity":
        port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    packs = build_task_packs(task, port, groups, truth["ids"])
    if task.kind == "parity":
        run_backward(port, packs, see)
        gradients = {name: tensor.cpu() for name, tensor in port.export_gradients()}
        if dist.get_rank() == 0:
            found["max_gradient_error"], found["worst_gradient"] = worst_tensor(gradients, truth["gradients"])
    else:
        run_forward(port, packs, see)
    found["max_logit_difference"] = largest(gather_objects(largest(differences), 0, groups.host) or differences)
    found["compared_tokens"] = len(expected)
    del port
    port = loaded(task.bfloat16, task.layout, groups, torch.bfloat16)
    found["round_trip_bitwise"] &= _round_trip(root, port, task.bfloat16)
    return found


def _round_trip(root: Path, port: ModelPort, folder: str) -> bool:
    """Whether an export of the loaded weights is the folder again, on global rank 0; True on the others."""
    written = root / "exported"
    write_folder(port, folder, written)
    if dist.get_rank():
        return True
    same = same_files(folder, written)
    shutil.rmtree(written)
    return same


def measure_training(root: Path, task: Task, groups: ProcessGroups) -> dict[str, Any]:
    """One optimizer step with the distributed optimizer; the logits after it go to `NAME.RANK.pt`, the weights to
    the folder `NAME`."""
    ids = torch.load(task.sequences)["ids"]
    port = loaded(task.folder, task.layout, groups, torch.float32)
    port.wrap_ddp(distributed_optimizer=True, overlap_grad_reduce=False)
    optimizer = constant_adam(port, distributed=True)
    packs = build_task_packs(task, port, groups, ids)
    optimizer.zero_grad()
    run_backward(port, packs, lambda *_: None)
    step = optimizer.step()
    rows: list[tuple[Tensor, Tensor]] = []
    run_forward(port, packs, lambda pack, logits: rows.append((pack.flat.cpu(), logits.cpu())))
    mine = rows if groups.tp.rank() == 0 else []
    torch.save(mine, root / f"{task.name}.{dist.get_rank()}.pt")
    write_folder(port, task.folder, root / task.name)
    return {"applied": step.applied, "grad_norm": step.grad_norm}


def _drift(root: Path, task: Task, groups: ProcessGroups) -> dict[str, Any]:
    pairs = torch.load(task.sequences)["pairs"]
    return measure_drift(lambda dtype: loaded(task.folder, task.layout, groups, dtype), groups, pairs)


MEASURES: dict[str, Callable[[Path, Task, ProcessGroups], dict[str, Any]]] = {
    "parity": measure_parity,
    "logits": measure_parity,
    "train": measure_training,
    "drift": _drift,
}


def main(argv: list[str]) -> None:
    end_with_launcher(os.environ)
    root = Path(argv[0])
    tasks = read_tasks(Path(argv[1]))
    groups = layouts.init(tasks[0].layout)  # once: gloo's threads of a group stay for the life of the process
    for task in tasks:
        start = time.perf_counter()
        with PeakMemory() as memory:
            found = MEASURES[task.kind](root, task, groups)
        found["seconds"] = round(time.perf_counter() - start, 2)
        peaks = gather_objects(None if memory.mib is None else round(memory.mib, 1), 0, groups.host)
        if peaks is not None:
            found["peak_memory_mib"] = peaks
            write_json(root / f"{task.name}.json", found)
            print(f"{REPORT}{task.name}: {found['seconds']:.1f} s", flush=True)
    dist.barrier()
    layouts.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
