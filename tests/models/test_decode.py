"""Logits of the sampling forward, ragged prompts and single tokens, are those of `transformers`; what cannot sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from tests.distributed.harness import run_ranks
from tests.models.oracle import relative
from tests.models.tiny import tiny_llama, tiny_olmo3, tiny_qwen2, tiny_qwen3, tiny_qwen3_moe

LENGTHS, NEW = (5, 1, 9), 9
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3_tied": (tiny_qwen3, {"tie_word_embeddings": True}),
    "llama": (tiny_llama, {}),
    "olmo3": (tiny_olmo3, {}),  # a window of 8: prompts and samples go beyond it
    "qwen2": (tiny_qwen2, {}),
    "qwen3_moe": (tiny_qwen3_moe, {}),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_tied", {"pipeline": 2}),
    ("qwen3_tied", {"tensor": 2, "sequence_parallel": True}),
    ("llama", {"pipeline": 2}),
    ("llama", {"tensor": 2, "sequence_parallel": True}),
    ("olmo3", {"tensor": 2, "sequence_parallel": True}),
    ("qwen2", {"pipeline": 2}),
    ("qwen3_moe", {"tensor": 2, "sequence_parallel": True, "expert": 2}),
    ("qwen3_moe", {"pipeline": 2}),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("decode")
    for name, (make, over) in MODELS.items():
        make(root / name, **over)
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(61, (n + NEW,), generator=generator) for n in LENGTHS]
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(root / name)
        with torch.no_grad():
            logits = [model(ids[None]).logits[0, n - 1 :] for n, ids in zip(LENGTHS, sequences, strict=True)]
        torch.save((sequences, torch.stack(logits)), root / f"{name}.pt")  # logits [rows, NEW + 1, vocab]
    return root


def _build(folder: Path, layout: dict[str, Any]) -> Any:
    from asd_megatron.checkpoint.huggingface import FolderReader, read_config
    from asd_megatron.distributed.layout import init
    from asd_megatron.models.port import ModelPort

    sizes = Layout(**layout)
    port = ModelPort.build(read_config(folder), init(sizes), sizes, dtype=torch.float32, layers="local")
    with FolderReader(folder) as reader:
        port.load(reader)
    return port


def _decode(port: Any, sequences: list[Tensor]) -> Tensor | None:
    """Logits [rows, NEW + 1, vocab] after each prompt and after each of the NEW tokens; None off the last stage."""
    from asd_megatron.rollout.embedded.cache import KVCache

    lengths = torch.tensor(LENGTHS)
    width, rows = max(LENGTHS), len(LENGTHS)
    cache = KVCache(rows, width, block=2)
    ids = torch.zeros(rows, width, dtype=torch.int64)
    for row, (n, sequence) in enumerate(zip(LENGTHS, sequences, strict=True)):
        ids[row, :n] = sequence[:n]
    cache.prefill(0, lengths)
    found = [port.decode(ids, torch.arange(width).expand(rows, width), cache)]
    cache.expand(torch.arange(rows))
    for step in range(NEW):
        cache.decode()
        tokens = torch.stack([s[n + step] for n, s in zip(LENGTHS, sequences, strict=True)])
        found.append(port.decode(tokens[:, None], (lengths + step)[:, None], cache))
    return torch.cat(found, 1) if found[0] is not None else None


def _errors(rank: int, root: str) -> list[list[float | None]]:
    """Against `transformers`: of the sampling forward, and of the one through Megatron's modules."""
    out: list[list[float | None]] = []
    for name, layout in CASES:
        port = _build(Path(root) / name, layout)
        sequences, expected = torch.load(Path(root) / f"{name}.pt")
        errors: list[float | None] = []
        for through_modules in (False, True) if port.layout.expert == 1 else (False,):
            with port.sampling(through_modules=through_modules):
                found = _decode(port, sequences)
            assert (found is None) == (not port.is_last_stage)
            errors.append(None if found is None else relative(found, expected))
        out.append(errors)
    return out


def _refusals(rank: int, root: str) -> list[str]:
    """What each attempt is refused with."""
    from asd_megatron.checkpoint.huggingface import read_config
    from asd_megatron.distributed.layout import init
    from asd_megatron.models.port import ModelPort

    def build(layout: Layout, folder: str = "llama", layers: str = "local", **over: Any) -> Any:
        return ModelPort.build({**read_config(Path(root) / folder), **over}, init(layout), layout, layers=layers)

    def sample(layout: Layout, **how: Any) -> None:
        with build(layout, "llama" if layout.expert == 1 else "qwen3_moe").sampling(**how):
            pass

    found = []
    for attempt in (
        lambda: sample(Layout(pipeline=2, virtual_pipeline=2)),
        lambda: sample(Layout(context=2)),
        lambda: build(Layout(tensor=2), num_key_value_heads=1),
        lambda: build(Layout(tensor=2), intermediate_size=47),
        lambda: build(Layout(pipeline=2), num_hidden_layers=3),
        lambda: build(Layout(data=2), layers="te"),
        lambda: build(Layout(data=2, expert=2)),
        lambda: build(Layout(tensor=2), folder="qwen3_moe"),
        lambda: sample(Layout(data=2, expert=2), through_modules=True),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        found.append(str(error.value))
    return found


def _both(rank: int, root: str) -> tuple[list[list[float | None]], list[str]]:
    return _errors(rank, root), _refusals(rank, root)


@pytest.fixture(scope="module")
def ranks(root: Path) -> Any:
    return run_ranks(_both, 2, str(root), timeout=180)


def test_decode(ranks: Any) -> None:
    for case, errors in zip(CASES, zip(*(errors for errors, _ in ranks), strict=True), strict=True):
        assert len(errors[0]) == (1 if "expert" in case[1] else 2), case
        for way in zip(*errors, strict=True):
            assert len([e for e in way if e is not None]) == (2 if "tensor" in case[1] else 1), case
            assert all(e < 2e-5 for e in way if e is not None), (case, errors)


def test_refusals(ranks: Any) -> None:
    vpp, context, kv_heads, ffn, stages, te, experts, routed, modules = ranks[0][1]
    assert "one chunk a stage" in vpp and "no context parallelism" in context
    assert "key/value heads (1)" in kv_heads and "(47)" in ffn and "3 layers" in stages
    assert "Transformer Engine" in te
    assert "no experts" in experts and "sequence_parallel true" in routed and "layers local" in modules
