"""The port under Megatron's DDP and optimizer, in half precision, and its gate on every rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from tests.distributed.harness import run_ranks
from tests.models import everywhere
from tests.models.oracle import pack, relative
from tests.models.test_layouts import _run as run_schedule
from tests.models.tiny import tiny_llama, tiny_qwen3, tiny_qwen3_moe

LENGTHS = ([9, 1, 5], [17, 3], [2, 2, 3, 11], [6, 4])


def _build(folder: Path, layout: Layout, dtype: torch.dtype = torch.float32) -> Any:
    from asd_megatron.checkpoint.huggingface import FolderReader, read_config
    from asd_megatron.distributed.layout import init
    from asd_megatron.models.port import ModelPort

    port = ModelPort.build(read_config(folder), init(layout), layout, dtype=dtype, layers="local")
    with FolderReader(folder) as reader:
        port.load(reader)
    return port


def _micros(port: Any) -> list[Any]:
    g = torch.Generator().manual_seed(3)
    ids = [[torch.randint(61, (n,), generator=g) for n in lengths] for lengths in LENGTHS]
    multiple = port.layout.tensor if port.layout.sequence_parallel else 1
    micros = [pack(i, context=1, rank=0, multiple=multiple) for i in ids]
    # Every rank of a data-parallel group has its own half, and at least two micro-batches.
    return micros[port.process_groups.dp.rank() :: port.process_groups.dp.size()]


def _gradients(port: Any) -> dict[str, Tensor]:
    run_schedule(port, _micros(port), lambda *_: None)
    return everywhere.gradients(port)


# ---------------------------------------------------------------- one rank


def _half(rank: int, root: str) -> dict[str, float]:
    """bfloat16 parameters: what is loaded, exported, accumulated and sampled from."""
    from asd_megatron.ops.vocab_head import linear_logprob
    from asd_megatron.rollout.embedded.cache import KVCache

    full = dict(_build(Path(root), Layout()).export())
    port = _build(Path(root), Layout(), torch.bfloat16)
    assert {p.dtype for p in port.chunks[0].parameters()} == {torch.bfloat16}
    for name, tensor in port.export():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, full[name].bfloat16()), name
    port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    gradients = _gradients(port)
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    reference = _build(Path(root), Layout())
    with torch.no_grad():
        for parameter in reference.chunks[0].parameters():
            parameter.copy_(parameter.bfloat16())
    reference.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    errors = {n: relative(gradients[n], g) for n, g in _gradients(reference).items()}

    ids = torch.arange(3, 20)
    micro = pack([ids], context=1, rank=0, multiple=1)
    cache = KVCache(1, len(ids))
    with torch.no_grad():
        hidden = port.forward(port.chunks[0], micro.tokens)[-1]
        with port.sampling():
            cache.prefill(0, torch.tensor([len(ids)]))
            sampled = port.decode(ids[None], torch.arange(len(ids))[None], cache)[0, 0]
        assert sampled.dtype == torch.float32
        every = torch.arange(61)
        scored, _ = linear_logprob(hidden.expand(61, -1).contiguous(), port.head_weight(), every, port.head_shard())
    return {"gradient": max(errors.values()), "sampled": float((sampled.log_softmax(-1) - scored).abs().max())}


def test_half_precision(tmp_path: Path) -> None:
    (errors,) = run_ranks(_half, 1, str(tiny_qwen3(tmp_path / "model", tie_word_embeddings=True)))
    assert errors["gradient"] < 0.1  # three significant digits, through four layers
    # Engine and trainer round hidden states alike; both take the head's product in float32.
    assert errors["sampled"] < 1e-5


# ---------------------------------------------------------------- two ranks


def _gate(rank: int, folder: str) -> list[str]:
    """What a pipeline says to a folder whose last layer lacks a tensor, or has one too many."""
    from asd_megatron.checkpoint.huggingface import FolderReader

    port = _build(Path(folder), Layout(pipeline=2))
    messages = []
    with FolderReader(folder) as reader:
        last = {n for n in reader if n.startswith("model.layers.3.")}
        added = {"model.layers.4.mlp.up_proj.weight": torch.zeros(48, 32)}
        for tensors in ({n: t for n, t in reader.items() if n not in last}, {**reader, **added}):
            with pytest.raises(UserError) as error:
                port.load(tensors)
            messages.append(str(error.value))
    return messages


def test_the_gate_closes_on_every_rank(tmp_path: Path) -> None:
    """A rank that went on alone would wait for the others for an hour."""
    by_rank = run_ranks(_gate, 2, str(tiny_llama(tmp_path / "model")))
    assert by_rank[0] == by_rank[1]
    missing, unknown = by_rank[0]
    assert "incomplete" in missing and "model.layers.3." in missing and "and 4 more" in missing
    assert "model.layers.4.mlp.up_proj.weight" in unknown and "config.json" in unknown


# ---------------------------------------------------------------- four ranks

OVERLAP = [
    Layout(data=2, pipeline=2, virtual_pipeline=2),
    Layout(data=2, tensor=2, sequence_parallel=True),
]
SHARDED = [Layout(tensor=2, pipeline=2), Layout(tensor=2, data=2, sequence_parallel=True)]
EXPERTS = [Layout(tensor=2, data=2, sequence_parallel=True, expert=n) for n in (1, 2, 4)]


def _overlap(rank: int, folder: str) -> list[float]:
    """Gradients reduced while the backward pass runs, against those reduced after it, for two batches in a row."""
    errors = []
    for layout in OVERLAP:
        found = []
        for overlap in (False, True):
            port = _build(Path(folder), layout)
            port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=overlap)
            found.append([_gradients(port), _gradients(port)])
        (plain, _), overlapped = found
        for again in overlapped:
            errors.append(max(relative(again[n], g) for n, g in plain.items()))
    return errors


def _norms(rank: int, folder: str, layouts: list[Layout] = SHARDED) -> list[tuple[float, float]]:
    """Megatron's gradient norm, and that of the whole gradients."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    found = []
    for layout in layouts:
        port = _build(Path(folder), layout)
        port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
        config = OptimizerConfig(optimizer="adam", lr=0.0, weight_decay=0.0, clip_grad=1e9)
        optimizer = get_megatron_optimizer(config, port.chunks, use_gloo_process_groups=False)
        gradients = _gradients(port)
        _, norm, _ = optimizer.step()
        found.append((float(norm), math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))))
    return found


def _sharded_weights(rank: int, folder: str) -> None:
    """The distributed optimizer moves parameters into its buffer: they are found there."""
    port = _build(Path(folder), Layout(data=2, pipeline=2))
    before = everywhere.weights(port)
    port.wrap_ddp(distributed_optimizer=True, overlap_grad_reduce=True)
    with torch.no_grad():
        for chunk in port.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(2)
    after = everywhere.weights(port)
    assert list(after) == list(before) and all(torch.equal(after[n], 2 * t) for n, t in before.items())


def _four(rank: int, root: str) -> tuple[list[float], list[tuple[float, float]]]:
    tied, untied = Path(root) / "tied", Path(root) / "untied"
    _sharded_weights(rank, str(tied))
    experts = _norms(rank, str(Path(root) / "experts"), EXPERTS)
    return _overlap(rank, str(tied)), [*_norms(rank, str(tied)), *_norms(rank, str(untied)), *experts]


def test_four_ranks(tmp_path: Path) -> None:
    tiny_qwen3(tmp_path / "tied", tie_word_embeddings=True)
    tiny_llama(tmp_path / "untied")
    tiny_qwen3_moe(tmp_path / "experts", num_experts=8)
    for errors, norms in run_ranks(_four, 4, str(tmp_path), timeout=240):
        assert max(errors) < 1e-6, errors
        for megatron, expected in norms:
            assert megatron == pytest.approx(expected, rel=1e-5)
