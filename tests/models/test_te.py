"""Transformer Engine's layers beside local ones, on the stand-in, and the parity cells with them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from asd_megatron.checks import parity, parity_worker
from asd_megatron.checks.layouts import CELLS
from tests.models import everywhere, tiny
from tests.models.oracle import pack, relative
from tests.te_double import run_ranks_with_te

CELLS_ON_TWO_RANKS = [
    *("te_tp2", "te_tp2_sp", "te_tp2_sp_shared", "te_pp2", "te_cp2", "te_dp2_distopt", "te_moe_ep2"),
    "te_bf16_tp2_sp",
]


def _launch(ranks: int, folder: Path, cells: Sequence[str], timeout: float) -> None:
    run_ranks_with_te(_work, ranks, [str(folder), *cells], timeout=timeout, init=False)


def _work(rank: int, argv: list[str]) -> None:
    parity_worker.main(argv)


def test_parity_with_local_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradients and updates in float32 are those of one process with local layers; weight gradients are
    fused. FlexAttention attends to shared prefixes, and the stand-in's rotation counts positions from 0 in every
    sequence, as the kernel does."""
    names = ["te_single", "te_recompute_mlp", "te_moe_recompute_mlp", *CELLS_ON_TWO_RANKS]
    monkeypatch.setattr(parity, "_launch", _launch)
    results = parity.run(names, tmp_path, timeout=250, say=lambda _: None)
    assert [r.layout for r in results] == names
    for result in results:
        assert result.passed, parity.table(results)
        if CELLS[result.layout].dtype == "float32":
            assert result.max_relative_error <= 1e-5 and 0 < result.update_error <= 1e-4


def _build(folder: Path, layers: Literal["local", "te"], dtype: torch.dtype, **how: Any) -> Any:
    from asd_megatron.checkpoint.huggingface import FolderReader, read_config
    from asd_megatron.distributed.layout import Layout, init
    from asd_megatron.models.port import ModelPort

    port = ModelPort.build(read_config(folder), init(Layout()), Layout(), dtype=dtype, layers=layers, **how)
    with FolderReader(folder) as reader:
        port.load(reader)
    return port


def _micro_batches(lengths: list[list[int]]) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    ids = [[torch.randint(61, (n,), generator=generator) for n in row] for row in lengths]
    return [pack(row, context=1, rank=0, multiple=1) for row in ids]


def _gradients(port: Any, micro_batches: list[Any]) -> dict[str, Tensor]:
    from tests.models.test_layouts import _run

    for chunk in port.chunks:
        chunk.zero_grad_buffer()
    _run(port, micro_batches, lambda *_: None)
    return {name: gradient.double() for name, gradient in everywhere.gradients(port).items() if "proj" in name}


def _accumulation_error(folder: Path, fuse: bool) -> tuple[float, str]:
    """How far the bfloat16 model's gradients of many micro-batches are from the sum of those of one at a time, which
    are float32 products of bfloat16 tensors when they are fused; who fuses."""
    micro_batches = _micro_batches([[9, 12], [17, 3], [16, 14], [2, 25, 3], [30], [11, 4]])
    port = _build(folder, "te", torch.bfloat16, fuse_weight_gradient=fuse)
    port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    together = _gradients(port, micro_batches)
    exact = _build(folder, "te", torch.bfloat16)
    exact.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    parts = [_gradients(exact, [micro_batch]) for micro_batch in micro_batches]
    errors = [relative(together[n], torch.stack([p[n] for p in parts]).sum(0)) for n in together]
    return max(errors), port.weight_gradients_text()


def _layers(rank: int, root: str) -> dict[str, Any]:
    from asd_megatron.distributed import device
    from asd_megatron.rollout.embedded.cache import KVCache

    device.prepare()
    from asd_megatron.models import te

    found: dict[str, Any] = {}
    ids = torch.arange(3, 33)
    for name in ("qwen3", "olmo3", "qwen3_moe"):
        hidden, sampled = [], []
        for layers in ("local", "te"):
            port = _build(Path(root) / name, layers, torch.float32)  # type: ignore[arg-type]
            with port.scoring():
                hidden.append(port.forward(port.chunks[0], _micro_batches([[30, 7]])[0].tokens))
            cache = KVCache(1, len(ids))
            with port.sampling():
                cache.prefill(0, torch.tensor([len(ids)]))
                sampled.append(port.decode(ids[None], torch.arange(len(ids))[None], cache))
        found[name] = relative(hidden[1], hidden[0]), relative(sampled[1], sampled[0])
    found["attention"] = te.attention_in_use()

    for fuse in (True, False):
        found[f"fuse {fuse}"] = _accumulation_error(Path(root) / "qwen3", fuse)
    return found


def test_layers_by_family(tmp_path: Path) -> None:
    """Windows, YaRN's scale, experts; scoring and sampling through modules; fused weight gradients."""
    tiny.tiny_qwen3(tmp_path / "qwen3")
    tiny.tiny_olmo3(tmp_path / "olmo3")
    tiny.tiny_qwen3_moe(tmp_path / "qwen3_moe")
    found = run_ranks_with_te(_layers, 1, str(tmp_path))[0]
    for name in ("qwen3", "olmo3", "qwen3_moe"):
        assert max(found[name]) < 2e-5, (name, found[name])
    assert "cuDNN" in found["attention"]
    (fused, by), (rounded, nobody) = found["fuse True"], found["fuse False"]
    assert fused < 1e-6 < 1e-4 < rounded < 1e-2, (fused, rounded)
    assert "Transformer Engine" in by and "not fused" in nobody


def _attention_variable(rank: int, root: str, backend: Literal["auto", "flash", "fused"]) -> str | None:
    import os

    from asd_megatron.distributed import device
    from asd_megatron.distributed.machine import attention_switch_problem

    device.prepare()
    _build(Path(root), "te", torch.float32, attention_backend=backend)
    assert attention_switch_problem() is None
    _build(Path(root), "local", torch.float32)  # others in the same process
    _build(Path(root), "te", torch.float32, attention_backend=backend)
    return os.environ.get("NVTE_UNFUSED_ATTN")


@pytest.mark.parametrize("backend", ["auto", "flash"])
def test_unfused_attention_is_never_chosen(tmp_path: Path, backend: str) -> None:
    tiny.tiny_qwen3(tmp_path)
    assert run_ranks_with_te(_attention_variable, 1, str(tmp_path), backend) == ["0"]


def test_apex_fuses_local_weight_gradients_where_it_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from asd_megatron.distributed.layout import Layout
    from asd_megatron.models.families import shape_of
    from asd_megatron.models.gpt import Implementation, transformer_config
    from tests.checkpoint.trainer import CONFIG

    def fused(how: Implementation) -> bool:
        config = transformer_config(*shape_of(CONFIG), Layout(), dtype=torch.float32, how=how)
        return bool(config.gradient_accumulation_fusion)

    assert not fused(Implementation())
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", ModuleType("apex"))
    assert fused(Implementation()) and not fused(Implementation(fuse_weight_gradient=False))
