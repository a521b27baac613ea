"""Host memory, time and bytes of saving and loading a training checkpoint, by rank, on this machine's CPUs.

Each number of data-parallel ranks trains a random Qwen3 in bfloat16 with the distributed optimizer for one step, then
saves it at once, in the background, and loads it. A peak is the growth of the process's resident memory meanwhile, of
which a rank's shard is the measure: its part of the moments, the master weights and the weights. Loading reads into
tensors that exist already.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from asd_megatron.config.optimizer import OptimizerSection
from asd_megatron.files import write_json

MB = 1e6
BYTES_A_PARAMETER = 14  # of a checkpoint: weight 2, master weight 4, moments 8
VOCABULARY, LAYERS, HEAD = 2048, 6, 64


@dataclass(frozen=True)
class Row:
    """One rank of `data`. Sizes in MB (10^6 bytes). `blocked_seconds`: until training goes on after a save in the
    background; `background_seconds`: until that checkpoint is complete."""

    data: int
    rank: int
    model: float
    shard: float
    file: float
    save_peak: float
    save_seconds: float
    background_peak: float
    blocked_seconds: float
    background_seconds: float
    load_peak: float
    load_seconds: float


def config(megabytes: float) -> dict[str, Any]:
    """A Qwen3 whose bfloat16 weights have about that size."""
    hidden = 2 * HEAD
    while 2 * (2 * VOCABULARY * hidden + LAYERS * 12 * hidden * hidden) < megabytes * MB:
        hidden += 2 * HEAD  # 12 h^2 a layer: q and o (2), k and v (1), gate, up and down (9)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": max(hidden // (2 * HEAD), 1),
        "head_dim": HEAD,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
    }


def peak(action: Callable[[], Any]) -> tuple[float, float]:
    """By how many MB the resident memory of this process grew at most during `action`, and its seconds."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes the present size
    before, start = _resident("VmRSS"), time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return (_resident("VmHWM") - before) / MB, seconds


def _resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024.0


def measure(rank: int, world: int, port: int, megabytes: float, folder: str, result: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from asd_megatron.checkpoint import training
    from asd_megatron.checkpoint.background import Background
    from asd_megatron.distributed import layout as layouts
    from asd_megatron.distributed.layout import Layout
    from asd_megatron.models.port import ModelPort
    from asd_megatron.trainer.optimizer import Optimizer

    layout = Layout(data=world)
    groups = layouts.init(layout)
    model = ModelPort.build(config(megabytes), groups, layout, dtype=torch.bfloat16, layers="local")
    torch.manual_seed(0)
    with torch.no_grad():
        for _, parameter in model.named_weights():
            parameter.normal_(std=0.02)
    model.wrap_ddp(distributed_optimizer=True, overlap_grad_reduce=False)
    optimizer = Optimizer(model, distributed=True, **SETTINGS)
    optimizer.zero_grad()
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.copy_(parameter.detach())
    assert optimizer.step().applied
    background, root = Background(groups), Path(folder)

    def save(step: int, background: Background | None) -> None:
        state = {"step": step}
        training.save(root, step, model, optimizer.megatron, optimizer.scheduler, state, background=background)

    save_peak, save_seconds = peak(lambda: save(1, None))
    blocked: list[float] = []

    def save_in_background() -> None:
        start = time.perf_counter()
        save(2, background)
        blocked.append(time.perf_counter() - start)
        background.settle()

    background_peak, background_seconds = peak(save_in_background)
    load_peak, load_seconds = peak(
        lambda: training.load(root / "step_000001", model, optimizer.megatron, optimizer.scheduler)
    )
    parameters = sum(parameter.numel() for _, parameter in model.named_weights())
    file = (root / "step_000001" / f"__{rank}_0.distcp").stat().st_size
    result[rank] = Row(
        data=world,
        rank=rank,
        model=2 * parameters / MB,
        shard=BYTES_A_PARAMETER * parameters / world / MB,
        file=file / MB,
        save_peak=save_peak,
        save_seconds=save_seconds,
        background_peak=background_peak,
        blocked_seconds=blocked[0],
        background_seconds=background_seconds,
        load_peak=load_peak,
        load_seconds=load_seconds,
    )
    dist.barrier()
    background.close()
    layouts.shutdown()


SETTINGS: dict[str, Any] = {**OptimizerSection().model_dump(), "learning_rate": 1e-3, "total_steps": 10}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500, help="of the model's bfloat16 weights")
    parser.add_argument("--data", type=int, nargs="+", default=[2, 4], help="numbers of data-parallel ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    print(" ".join(f"{name.replace('_', ' '):>18}" for name in Row.__dataclass_fields__))
    for world in options.data:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the ranks connect to it
        with mp.Manager() as manager, tempfile.TemporaryDirectory(prefix="checkpoint_") as folder:
            result = manager.dict()
            mp.spawn(measure, (world, store.port, options.megabytes, folder, result), nprocs=world)
            for rank in range(world):
                row = result[rank]
                rows.append(row)
                values = asdict(row).values()
                print(" ".join(f"{v:>18}" if isinstance(v, int) else f"{v:>18.2f}" for v in values), flush=True)
    if options.json is not None:
        write_json(options.json, {"rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
