"""Memory of an update on this machine's CPUs, predicted by the planner and measured, rank by rank.

Each cell trains a model with random weights in one layout: two supervised updates by the trainer's own code (local
layers, gloo), a short one, which makes the optimizer's state, and the measured one. A rank's peak is the high-water
mark of its resident memory (VmHWM, reset by /proc/self/clear_refs) minus what is resident before the model is built,
after an update of a tiny one, which has loaded all libraries. The C library is told to give freed tensors back to the
kernel at once (MALLOC_MMAP_THRESHOLD_), so resident memory is that of live tensors, and of what libraries take;
oneDNN's cache of compiled kernels, one for each number of tokens of an expert, is kept short.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from asd_megatron.config.optimizer import OptimizerSection
from asd_megatron.distributed.layout import Layout
from asd_megatron.files import write_json
from asd_megatron.models.families import shape_of
from asd_megatron.models.gpt import Recompute
from asd_megatron.planner.hardware import Accelerator
from asd_megatron.planner.memory import rank_memory
from asd_megatron.planner.setting import Dtype, Lengths, Serving, Setting, Training, Workload

MB = 1e6
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
}
PROMPT, RESPONSE = 32, 480

SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2304,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
TINY: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3": {**SIZES, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "Olmo 3": {
        **SIZES,
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
    "Qwen3-MoE": {
        **SIZES,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}
LAYOUTS: dict[str, Layout] = {
    "1 rank": Layout(),
    "TP 2, SP": Layout(tensor=2, sequence_parallel=True),
    "PP 2": Layout(pipeline=2),
    "DP 2": Layout(data=2),
    "EP 2": Layout(data=2, expert=2),
}
OPTIMIZER: dict[str, Any] = {**OptimizerSection().model_dump(), "total_steps": 10}


@dataclass(frozen=True)
class Cell:
    """One model in one layout. sequences: of a pack, of PROMPT + RESPONSE tokens each."""

    model: str
    layout: str
    dtype: Dtype
    recompute: Literal["none", "mlp", "full"] = "none"
    sequences: int = 2

    @property
    def config(self) -> dict[str, Any]:
        return MODELS[self.model]

    @property
    def packs(self) -> int:
        """Of each data-parallel rank: as many as are in flight in a pipeline."""
        return LAYOUTS[self.layout].pipeline

    @property
    def setting(self) -> Setting:
        """What the planner is told; the experts' load is the mean, because their weights are random."""
        layout = LAYOUTS[self.layout]
        training = Training(
            layout,
            dtype=self.dtype,
            layers="local",
            recompute=Recompute(self.recompute),
            pack=self.sequences * (PROMPT + RESPONSE),
            expert_load=1.0,
        )
        work = Workload(self.sequences * self.packs * layout.data, 1, PROMPT, Lengths(RESPONSE, RESPONSE, 0.0), 0.0)
        here = Accelerator(
            "cpu", 1000.0, 1e11, None, memory_rate=1e10, node_link=1e9, network=1e9, host_link=1e10, cpu=True
        )
        shape = shape_of(self.config)[1]
        return Setting(shape, training, Serving(engine="embedded"), work, here, reserve_gib=0.0)

    def predicted(self, stage: int) -> float:
        """Bytes of a rank of a stage: of the update, or of the optimizer's step."""
        memory = rank_memory(self.setting)[stage]
        return max(memory.phase(name).bytes() for name in ("update", "optimizer step"))


@dataclass(frozen=True)
class Row:
    """One rank of a cell, in MB (10^6 bytes)."""

    model: str
    layout: str
    dtype: str
    recompute: str
    rank: int
    weights: float
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative, of the prediction."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class _Example:
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    loss_weights: tuple[float, ...]


def resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024.0


def _examples(cell: Cell) -> list[_Example]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, TINY["vocab_size"], (cell.setting.workload.rollouts, PROMPT + RESPONSE), generator=generator)
    return [_Example(tuple(row[:PROMPT]), tuple(row[PROMPT:]), (1.0,) * RESPONSE) for row in ids.tolist()]


class _Trainer:
    """A model with random weights and its optimizer on this rank."""

    def __init__(self, cell: Cell, config: dict[str, Any], groups: Any) -> None:
        from asd_megatron.models.port import ModelPort
        from asd_megatron.trainer.batch import PackLayout
        from asd_megatron.trainer.optimizer import Optimizer

        layout, dtype = LAYOUTS[cell.layout], getattr(torch, cell.dtype)
        recompute = Recompute(cell.recompute)
        self.model = ModelPort.build(config, groups, layout, dtype=dtype, layers="local", recompute=recompute)
        with torch.no_grad():
            for _, parameter in self.model.named_weights():
                parameter.normal_(std=0.02)
        self.model.wrap_ddp(distributed_optimizer=True, overlap_grad_reduce=False)
        self.optimizer = Optimizer(self.model, distributed=True, **OPTIMIZER)
        self.groups, self.balance = groups, self.model.load_balance()
        self.packs, self.pack = PackLayout.of(layout, groups, self.model.device), cell.setting.training.pack

    @property
    def weights(self) -> int:
        return sum(parameter.nbytes for _, parameter in self.model.named_weights())

    def update(self, examples: Sequence[_Example], length: int) -> None:
        """One update on the first tokens of the responses."""
        from asd_megatron.trainer.sft import supervised_update

        shorter = [_Example(e.prompt_ids, e.response_ids[:length], e.loss_weights[:length]) for e in examples]
        parts = (self.model, self.groups, self.optimizer, shorter)
        stats = supervised_update(*parts, layout=self.packs, tokens_per_microbatch=self.pack, balance=self.balance)
        assert stats.applied


def measure(rank: int, world: int, port: int, cell: Cell, result: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from asd_megatron.distributed import layout as layouts

    groups = layouts.init(LAYOUTS[cell.layout])
    torch.manual_seed(rank)
    examples = _examples(cell)
    tiny = {key: size for key, size in TINY.items() if key in cell.config}
    _Trainer(cell, {**cell.config, **tiny}, groups).update(examples, RESPONSE)
    gc.collect()
    dist.barrier()
    before = resident("VmRSS")
    trainer = _Trainer(cell, cell.config, groups)
    trainer.update(examples, 8)
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes the present size
    trainer.update(examples, RESPONSE)
    peak = resident("VmHWM") - before
    predicted = cell.predicted(rank // LAYOUTS[cell.layout].stage_size)
    sizes = (size / MB for size in (trainer.weights, predicted, peak))
    result[rank] = Row(cell.model, cell.layout, cell.dtype, cell.recompute, rank, *sizes)
    dist.barrier()
    layouts.shutdown()


def measured(cell: Cell) -> list[Row]:
    """The rows of a cell, one for each rank."""
    world = LAYOUTS[cell.layout].world_size
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the ranks connect to it
    os.environ.update(ALLOCATOR)  # read by the libraries of the ranks, when they start
    with mp.Manager() as manager:
        result = manager.dict()
        mp.spawn(measure, (world, store.port, cell, result), nprocs=world)
        return [result[rank] for rank in range(world)]


def cells(sequences: int) -> Iterator[Cell]:
    for model in MODELS:
        for dtype in ("float32", "bfloat16"):
            for layout in LAYOUTS:
                if layout != "EP 2" or model == "Qwen3-MoE":
                    yield Cell(model, layout, dtype, sequences=sequences)  # type: ignore[arg-type]
    for model, kind in (("Qwen3", "mlp"), ("Qwen3", "full"), ("Olmo 3", "full"), ("Qwen3-MoE", "full")):
        yield Cell(model, "1 rank", "bfloat16", kind, sequences)  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="cells whose 'model, layout, dtype, recompute' match"
    )
    parser.add_argument("--sequences", type=int, default=2, help=f"of a pack, {PROMPT + RESPONSE} tokens each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    print("| model | layout | dtype | recompute | rank | weights | predicted | measured | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cell in cells(options.sequences):
        if not re.search(options.only, ", ".join((cell.model, cell.layout, cell.dtype, cell.recompute))):
            continue
        for row in measured(cell):
            rows.append(row)
            sizes = f"{row.weights:.0f} | {row.predicted:.0f} | {row.measured:.0f} | {row.error:+.1%}"
            print(f"| {row.model} | {row.layout} | {row.dtype} | {row.recompute} | {row.rank} | {sizes} |", flush=True)
    if options.json is not None:
        write_json(options.json, {"rows": [{**asdict(row), "error": row.error} for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
