"""One rank of the parity check: `python -m asd_megatron.checks.parity_worker FOLDER CELL...` under torchrun.

Runs the trainer's own path (packs, teacher pass, gate, update, Megatron's schedules and optimizer) in each cell's
layout and writes `FOLDER/CELL.pt`: losses, gradients of the first update and weight changes, as full tensors by Hugging
Face name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.antisd import Gate, condition
from asd_megatron.checks.cases import hard_batch
from asd_megatron.checks.layouts import CELLS, ParityCell
from asd_megatron.distributed import device
from asd_megatron.distributed.launcher import end_with_launcher
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.models.flops import flops_model
from asd_megatron.models.gpt import Recompute
from asd_megatron.models.port import ModelPort
from asd_megatron.models.routing import LoadBalance
from asd_megatron.ops.vocab_divergence import Divergence
from asd_megatron.records import Example
from asd_megatron.trainer import passes, token_method
from asd_megatron.trainer.batch import PackLayout
from asd_megatron.trainer.expert_routing import StudentRouting
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.optimizer import Optimizer
from asd_megatron.trainer.pass_plan import plan_passes
from asd_megatron.trainer.teacher_states import TeacherStates
from asd_megatron.trainer.updater import UpdateStats, update

TEMPERATURE = 0.7
LEARNING_RATE = 1e-3
AUXILIARY_LOSS = 0.1  # coefficient; large, so that its gradient shows
ADAM_EPSILON = 1e-4
"""Large on purpose: an entry whose gradient is far below this is rounding noise, which Adam would amplify to a full
step."""


@dataclass
class Trained:
    """One rank's model, optimizer and layout in a cell."""

    port: ModelPort
    process_groups: ProcessGroups
    optimizer: Optimizer
    layout: PackLayout
    cell: ParityCell
    balance: LoadBalance | None


def build(folder: Path, cell: ParityCell) -> Trained:
    """Join the ranks in the cell's layout and load the tiny model of `folder`. Collective."""
    from asd_megatron.checkpoint.huggingface import FolderReader, read_config
    from asd_megatron.distributed import layout as layouts

    process_groups = layouts.init(cell.layout)
    source = folder / cell.model
    port = ModelPort.build(
        read_config(source),
        process_groups,
        cell.layout,
        dtype=getattr(torch, cell.dtype),
        layers=cell.layers,
        attention=cell.attention,
        recompute=Recompute(cell.recompute),
    )
    with FolderReader(source) as tensors:
        port.load(tensors)
    port.wrap_ddp(distributed_optimizer=cell.distributed_optimizer, overlap_grad_reduce=cell.overlap)
    optimizer = constant_adam(port, distributed=cell.distributed_optimizer)
    packs = PackLayout.of(
        cell.layout,
        process_groups,
        port.device,
        share_prefixes=cell.share_prefixes,
        flops=flops_model(port.shape),
    )
    balance = port.load_balance(AUXILIARY_LOSS)
    if balance is not None:  # as after an uneven update: the first one's gradient has the auxiliary loss in it
        balance.fractions.copy_(torch.arange(1.0, balance.fractions.numel() + 1).view_as(balance.fractions).log())
    return Trained(port, process_groups, optimizer, packs, cell, balance)


def constant_adam(port: ModelPort, *, distributed: bool) -> Optimizer:
    """The optimizer of the checks, over a port that is wrapped in DDP."""
    return Optimizer(
        port,
        learning_rate=LEARNING_RATE,
        min_learning_rate=0.0,
        schedule="constant",
        warmup_steps=0,
        total_steps=10,
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.95,
        epsilon=ADAM_EPSILON,
        clip_grad=1.0,
        distributed=distributed,
    )


def run_step(
    t: Trained, examples: list[Example], gate: Gate, *, name: str, updates: int = 1, epochs: int = 1
) -> UpdateStats:
    """Teacher pass, gate, update: what one training step does after the rollouts."""
    exact = token_method.ExactTerm(Divergence(), -1) if t.cell.exact else None
    method = token_method.Method(condition(name), exact=exact)
    needed = plan_passes(method.condition, updates, epochs=epochs, exact=t.cell.exact)
    batch = LocalBatch.receive(
        examples,
        t.cell.layout,
        t.process_groups,
        t.layout,
        updates=updates,
        tokens_per_microbatch=t.cell.tokens_per_microbatch,
    )
    inputs = token_method.token_inputs(batch, method)
    routing = None if t.balance is None else StudentRouting(t.port, t.process_groups, batch, "scoring")
    states = TeacherStates(t.port, t.process_groups, batch.table.tokens) if t.cell.exact else None
    teacher = passes.score_teacher(t.port, t.process_groups, batch, needed, temperature=TEMPERATURE, states=states)
    student = passes.score_student(t.port, t.process_groups, batch, needed, temperature=TEMPERATURE, routing=routing)
    lam = gate.update(passes.gate_entropy(t.process_groups, inputs, method, teacher, student))
    return update(
        t.port,
        t.process_groups,
        t.optimizer,
        batch,
        inputs,
        teacher=teacher,
        student=student,
        method=method,
        plan=needed,
        lam=lam,
        temperature=TEMPERATURE,
        epochs=epochs,
        states=states,
        routing=routing,
        balance=t.balance,
    )


def snapshot(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Float64 copies on the CPU, by name."""
    return {name: tensor.detach().to("cpu", torch.float64) for name, tensor in tensors}


def run_cell(folder: Path, cell: ParityCell) -> None:
    """Two on-policy updates, then a batch with two clipped updates over two epochs, then a batch smaller than the
    data-parallel size."""
    t = build(folder, cell)
    result: dict[str, Any] = {}
    before = snapshot(t.port.export())
    gate = Gate(0.5, warmup_steps=0, h_warm=1e-3)
    with CapturedGradients(t) as gradients:
        stats = [run_step(t, hard_batch(1), gate, name="antisd")]
    result["gradients"] = dict(gradients)
    stats.append(run_step(t, hard_batch(2), gate, name="antisd"))
    after = snapshot(t.port.export())
    result["updates"] = {name: after[name] - before[name] for name in after}
    clipped = run_step(t, hard_batch(3), gate, name="antisd", updates=2, epochs=4)
    result["losses_clipped"] = clipped.losses
    result["clipped_tokens"] = _total(t, clipped.columns.clipped)
    few = run_step(t, hard_batch(4)[2:3], gate, name="antisd")
    final = snapshot(t.port.export())
    result["updates_all"] = {name: final[name] - before[name] for name in final}
    result["losses"] = [s.loss for s in stats] + [few.loss]
    result["grad_norms"] = [s.grad_norm for s in stats] + [few.grad_norm]
    result["advantage_scale"] = _total(t, stats[0].columns.constants.advantage.abs()) / sum(
        len(e.rollout.response_ids) for e in hard_batch(1)
    )
    if dist.get_rank() == 0:
        torch.save(result, folder / f"{cell.name}.pt")
    from asd_megatron.distributed import layout as layouts

    layouts.shutdown_model_parallel()


class CapturedGradients:
    """Captures full gradients inside, between the backward pass and the optimizer's clipping."""

    def __init__(self, t: Trained) -> None:
        self.t = t
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> dict[str, Tensor]:
        self.step = self.t.optimizer.step

        def step(*, loss: float = 0.0) -> Any:
            if not self.t.cell.distributed_optimizer:
                self.found.update(snapshot(self.t.port.export_gradients()))
            return self.step(loss=loss)

        self.t.optimizer.step = step  # type: ignore[method-assign]
        return self.found

    def __exit__(self, *_: object) -> None:
        self.t.optimizer.step = self.step  # type: ignore[method-assign]


def _total(t: Trained, column: Tensor) -> float:
    total = column.double().sum().reshape(1)
    if t.process_groups.dp.size() > 1:
        dist.all_reduce(total, group=t.process_groups.dp)
    return float(total)


def main(argv: list[str]) -> None:
    end_with_launcher(os.environ)
    folder, names = Path(argv[0]), argv[1:]
    device.prepare()
    for name in names:
        run_cell(folder, CELLS[name])
        if dist.get_rank() == 0:
            print(f"cell {name} done", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
