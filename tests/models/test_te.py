"""Transformer Engine's layers beside local ones, on the stand-in, and the parity cells with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch

from asd_megatron.checks import parity, parity_worker
from asd_megatron.checks.layouts import CELLS
from tests.models import tiny
from tests.models.oracle import pack, relative
from tests.te_double import run_ranks_with_te

COMPARED = ["te_single", "te_moe_recompute_mlp", "te_tp2_sp_shared", "te_pp2", "te_cp2", "te_moe_ep2", "te_bf16_tp2_sp"]
OTHERS = ["te_recompute_mlp", "te_tp2", "te_tp2_sp", "te_dp2_distopt"]


def _launch(ranks: int, folder: Path, cells: Sequence[str], timeout: float) -> None:
    run_ranks_with_te(_work, ranks, [str(folder), *cells], timeout=timeout, init=False)


def _work(rank: int, argv: list[str]) -> None:
    parity_worker.main(argv)


@pytest.mark.parametrize("names", [COMPARED, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["compared", "others"])
def test_parity_with_local_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    """Losses, gradients and updates in float32 are those of one process with local layers; weight gradients are
    fused. FlexAttention attends to shared prefixes, and the stand-in's rotation counts positions from 0 in every
    sequence, as the kernel does."""
    monkeypatch.setattr(parity, "_launch", _launch)
    results = parity.run(names, tmp_path, timeout=250, say=lambda _: None)
    assert [r.layout for r in results] == names
    for result in results:
        assert result.passed, parity.table(results)
        if CELLS[result.layout].dtype == "float32":
            assert result.max_relative_error <= 1e-5 and 0 < result.update_error <= parity.UPDATE_TOLERANCE


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


def _layers(rank: int, root: str) -> dict[str, Any]:
    from asd_megatron.distributed import device
    from asd_megatron.distributed.machine import attention_switch_problem
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
            if name == "qwen3":
                port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
                found[f"weight gradients, {layers}"] = port.weight_gradients_text()
        found[name] = relative(hidden[1], hidden[0]), relative(sampled[1], sampled[0])
    found["attention"] = te.attention_in_use()

    found["unfused"] = [os.environ.get("NVTE_UNFUSED_ATTN")]
    for backend in ("flash", "auto"):  # in a process that has built other models
        assert attention_switch_problem() is None
        _build(Path(root) / "qwen3", "te", torch.float32, attention_backend=backend)
        found["unfused"].append(os.environ.get("NVTE_UNFUSED_ATTN"))
    return found


def test_layers_by_family(tmp_path: Path) -> None:
    """Windows, YaRN's scale, experts; scoring and sampling through modules; who adds weight gradients; unfused
    attention is never chosen."""
    tiny.tiny_qwen3(tmp_path / "qwen3")
    tiny.tiny_olmo3(tmp_path / "olmo3")
    tiny.tiny_qwen3_moe(tmp_path / "qwen3_moe")
    found = run_ranks_with_te(_layers, 1, str(tmp_path))[0]
    for name in ("qwen3", "olmo3", "qwen3_moe"):
        assert max(found[name]) < 2e-5, (name, found[name])
    assert "cuDNN" in found["attention"]
    assert found["unfused"] == ["0", "0", "0"]
    assert "Transformer Engine" in found["weight gradients, te"] and "not fused" in found["weight gradients, local"]


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
