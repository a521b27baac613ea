"""Every layout computes what `transformers` does, and exports what it read, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.models.gpt import Recompute
from tests.distributed.harness import run_ranks
from tests.models import everywhere
from tests.models.oracle import as_plain, oracle, pack, relative
from tests.models.tiny import tiny_llama, tiny_olmo3, tiny_qwen2, tiny_qwen3, tiny_qwen3_moe

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3": (tiny_qwen3, {}),
    "qwen3_tied": (tiny_qwen3, {"tie_word_embeddings": True}),
    "llama": (tiny_llama, {}),
    "llama_tied": (tiny_llama, {"tie_word_embeddings": True}),
    "qwen2": (tiny_qwen2, {}),
    "olmo3": (tiny_olmo3, {}),
    "qwen3_moe": (tiny_qwen3_moe, {}),
    "qwen3_moe_raw": (tiny_qwen3_moe, {"norm_topk_prob": False, "tie_word_embeddings": True}),
}
EXPERTS: list[dict[str, Any]] = [
    {"data": 2, "expert": 2},
    {"tensor": 2, "sequence_parallel": True, "expert": 2},
    {"context": 2, "expert": 2},
]
FORWARD, BACKWARD = 2e-5, 2e-5
Case = tuple[str, dict[str, Any], dict[str, Any]]
"""A model's name, a layout, further arguments of `ModelPort.build`."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, (make, over) in MODELS.items():
        make(root / name, **over)
        torch.save(as_plain(oracle(root / name)), root / f"{name}.pt")
    return root


def _compare(rank: int, root: str, model: str, layout: dict[str, Any], build: dict[str, Any]) -> dict[str, float]:
    """The largest relative errors of one layout against `transformers`."""
    from asd_megatron.checkpoint.huggingface import FolderReader, read_config
    from asd_megatron.distributed.layout import Layout, init
    from asd_megatron.models.port import ModelPort

    truth = torch.load(Path(root) / f"{model}.pt")
    sizes = Layout(**layout)
    process_groups = init(sizes)
    folder = Path(root) / model
    port = ModelPort.build(read_config(folder), process_groups, sizes, dtype=torch.float32, layers="local", **build)
    with FolderReader(folder) as reader:
        port.load(reader)
        exported = everywhere.weights(port)
        assert set(exported) == reader.keys() == set(port.expected())
        for name, tensor in exported.items():
            assert torch.equal(tensor, reader[name][:]), name
    port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    multiple = sizes.tensor if sizes.sequence_parallel else 1
    micros = [
        pack(ids, context=sizes.context, rank=process_groups.cp.rank(), multiple=multiple) for ids in truth["ids"]
    ]
    micros = micros[process_groups.dp.rank() :: process_groups.dp.size()]
    truth = {
        k: v[process_groups.dp.rank() :: process_groups.dp.size()] if k != "gradients" else v for k, v in truth.items()
    }
    errors = {"hidden": 0.0, "logits": 0.0}

    def check(number: int, hidden: Tensor) -> None:
        shard, micro = port.head_shard(), micros[number]
        hidden = shard.gather_tokens(hidden.detach())
        logits = shard.gather_ranks(hidden @ port.head_weight().t()).transpose(0, 1).flatten(1)[:, : port.vocab_size]
        real = micro.source >= 0
        for name, found in (("hidden", hidden), ("logits", logits)):
            expected = torch.cat(truth[name][number])[micro.source[real]]
            if len(expected):
                errors[name] = max(errors[name], relative(found[real], expected))

    _run(port, micros, check)
    gradients = everywhere.gradients(port)
    assert set(gradients) == set(truth["gradients"])
    errors["gradients"] = max(relative(gradients[n], g) for n, g in truth["gradients"].items())
    _scoring_gives_the_modules_numbers(port, micros)
    _sampling_changes_nothing(port, micros, gradients)
    return errors


def _run(port: Any, micros: list[Any], check: Any) -> None:
    """All micro-batches through Megatron's schedule, forward and backward of sum(-log p(next token))."""
    from asd_megatron.ops.vocab_head import linear_logprob
    from asd_megatron.trainer import schedule

    for chunk in port.chunks:
        chunk.zero_grad_buffer()
    numbers = {id(micro): number for number, micro in enumerate(micros)}

    def loss(micro: Any, hidden: Tensor) -> Tensor:
        check(numbers[id(micro)], hidden)
        rows = (micro.targets >= 0).nonzero()[:, 0]
        shard = port.head_shard()
        return -linear_logprob(hidden, port.head_weight(), micro.targets[rows], shard, rows=rows)[0].sum()

    schedule.forward_backward(port, micros, loss)


def _scoring_gives_the_modules_numbers(port: Any, micros: list[Any]) -> None:
    """Whatever `scoring` runs, hidden states are those of Megatron's modules, bit for bit."""
    from asd_megatron.trainer import schedule

    found: dict[bool | None, list[Tensor]] = {None: [], True: []}
    for through_modules, states in found.items():
        with port.scoring(through_modules=through_modules):
            schedule.forward(port, micros, lambda _, hidden, states=states: states.append(hidden.clone()))
    assert len(found[None]) == len(found[True]) == (len(micros) if port.is_last_stage else 0)
    for ours, theirs in zip(found[None], found[True], strict=True):
        assert torch.equal(ours, theirs)
    assert all(module.training for chunk in port.chunks for module in chunk.modules())


def _sampling_changes_nothing(port: Any, micros: list[Any], gradients: dict[str, Tensor]) -> None:
    """After `sampling`, in both ways, the same backward gives the same bits: sequence parallelism and core attention
    are back."""
    if port.layout.context > 1 or len(port.chunks) > 1:
        return
    with port.sampling():
        pass
    if port.layout.expert == 1:  # modules would leave the experts on their ranks
        with port.sampling(through_modules=True):
            assert not port.config.sequence_parallel and not port.chunks[0].module.decoder.training
    assert port.config.sequence_parallel == port.layout.sequence_parallel
    assert all(c.training for c in port.chunks[0].modules())
    _run(port, micros, lambda *_: None)
    for name, gradient in everywhere.gradients(port).items():
        assert torch.equal(gradient, gradients[name]), name


def _no_exchange(*_: Any) -> None:
    raise AssertionError("pipeline stages exchange a shape, or wait for the device, beside a transfer")


def _compare_all(rank: int, root: str, cases: list[Case]) -> list[dict[str, float]]:
    from asd_megatron.distributed import device

    device.prepare()  # which replaces `synchronize` on CPUs
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    P2PCommunicator._communicate_shapes = torch.cuda.synchronize = _no_exchange
    found = [_compare(rank, root, *case) for case in cases]
    dist.barrier()
    return found


def _assert_close(root: Path, world: int, cases: list[Case]) -> None:
    by_rank = run_ranks(_compare_all, world, str(root), cases, timeout=240)
    for case, errors in zip(cases, zip(*by_rank, strict=True), strict=True):
        for error in errors:
            assert error["hidden"] < FORWARD and error["logits"] < FORWARD, (case, error)
            assert error["gradients"] < BACKWARD, (case, error)
        assert any(error["logits"] > 0 for error in errors), case  # somebody compared


def test_one_rank(folders: Path) -> None:
    cases: list[Any] = [(model, {}, {}) for model in MODELS]
    cases += [("qwen3", {}, {"recompute": Recompute(kind)}) for kind in ("mlp", "full")]
    cases += [("qwen3", {}, {"recompute": Recompute("full", layers=1)})]
    _assert_close(folders, 1, cases)


def test_two_ranks(folders: Path) -> None:
    layouts: list[dict[str, Any]] = [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2},
    ]
    dense = [model for model in MODELS if "moe" not in model]
    cases: list[Any] = [(model, layout, {}) for layout in layouts for model in dense]
    cases += [("qwen3_moe", layout, {}) for layout in (*layouts[1:4], *EXPERTS)]
    cases += [("qwen3_moe_raw", layouts[4], {}), ("qwen3_tied", {"data": 2}, {})]
    cases += [("llama", layouts[1], {"recompute": Recompute("full")})]
    _assert_close(folders, 2, cases)


def test_four_ranks(folders: Path) -> None:
    layouts: list[dict[str, Any]] = [
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence_parallel": True},
        {"tensor": 2, "context": 2, "sequence_parallel": True},
        {"pipeline": 2, "context": 2},
        {"pipeline": 4},
    ]
    cases: list[Any] = [(model, layout, {}) for layout in layouts for model in ("qwen3_tied", "llama")]
    cases += [("olmo3", layout, {}) for layout in layouts[1:3]]
    cases += [("qwen3_moe", {"data": 2, "pipeline": 2, "expert": 2}, {})]
    cases.append(("qwen3_moe_raw", {"tensor": 2, "data": 2, "sequence_parallel": True, "expert": 2}, {}))
    _assert_close(folders, 4, cases)
