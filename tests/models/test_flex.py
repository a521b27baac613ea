"""FlexAttention over prefix trees: its masks and block lists, its numbers beside dense attention, and complete models
that attend by it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.distributed.layout import Layout
from asd_megatron.models import compat, flex
from asd_megatron.models.attention import SDPACoreAttention
from asd_megatron.models.flex import FlexCoreAttention, PackMasks, block_mask
from asd_megatron.models.gpt import Recompute
from asd_megatron.models.rope import RotarySettings, Rotation
from asd_megatron.models.tree_mask import BLOCK, TreeMask
from asd_megatron.observe.startup import suppliers
from tests.distributed.harness import run_ranks
from tests.models.test_attention import SCALE, TREES, _boundaries, _dense_tree, _differentiate, _inputs, _path
from tests.models.tiny import tiny_qwen3

Tree = tuple[list[int], tuple[int, ...]]
DEPTH_FIRST: dict[str, Tree] = {name: tree for name, tree in TREES.items() if name != "two groups in turn"} | {
    "separate sequences": ([7, 2, 30, 1], (-1, -1, -1, -1)),
    "no parents": ([7, 2, 30, 1], ()),
    "three levels": ([150, 90, 1, 40, 33, 128, 70, 5, 200], (-1, 0, 1, 1, 0, 4, 4, 0, -1)),
}
WINDOWS = [None, 1, 4, 150]


def _core(kind: type, window: int | None, scale: float = SCALE) -> Any:
    config = SimpleNamespace(context_parallel_size=1)
    return kind(config, 1, None, "self", pg_collection=None, scale=scale, window=window)


def _attend(kind: type, tree: Tree, window: int | None) -> Callable[..., Tensor]:
    lengths, parents = tree
    packed = SimpleNamespace(boundaries=_boundaries(lengths).tolist(), parents=parents)
    return lambda *qkv: _core(kind, window)(*qkv, packed_seq_params=packed).squeeze(1)


def _reference(tree: Tree, window: int | None) -> Callable[..., Tensor]:
    lengths, parents = tree
    return lambda q, k, v: _dense_tree(q, k, v, lengths, parents or (-1,) * len(lengths), window)


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", DEPTH_FIRST)
def test_output_and_gradients_are_those_of_dense_attention(name: str, window: int | None) -> None:
    tree = DEPTH_FIRST[name]
    *qkv, gradient = _inputs(sum(tree[0]))
    found = _differentiate(_attend(FlexCoreAttention, tree, window), qkv, gradient)
    present = _differentiate(_attend(SDPACoreAttention, tree, window), qkv, gradient)
    expected = _differentiate(_reference(tree, window), qkv, gradient)
    for ours, sdpa, dense in zip(found, present, expected, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours, sdpa, rtol=1e-10, atol=1e-12)


def test_bfloat16_rounds_as_the_present_attention() -> None:
    tree = DEPTH_FIRST["three levels"]
    *qkv, gradient = (x.bfloat16() for x in _inputs(sum(tree[0])))
    found = _differentiate(_attend(FlexCoreAttention, tree, 150), qkv, gradient)
    present = _differentiate(_attend(SDPACoreAttention, tree, 150), qkv, gradient)
    for ours, sdpa in zip(found, present, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, sdpa, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 300])
def test_blocks_are_those_of_create_block_mask(window: int | None) -> None:
    """Counted from the segments; torch evaluates every pair of tokens, here by the paths of a dense reference."""
    from torch.nn.attention.flex_attention import create_block_mask

    deep = ([300, 128, 130, 20, 400, 1, 257], (-1, 0, 1, 2, 2, 1, 0))
    for lengths, parents in (DEPTH_FIRST["three levels"], deep, ([256], ()), ([9], ()), ([130, 700], ())):
        start, tokens = _boundaries(lengths).tolist(), sum(lengths)
        seen = torch.zeros(tokens, tokens, dtype=torch.bool)
        for i, length in enumerate(lengths):
            path = torch.cat([torch.arange(start[s], start[s + 1]) for s in _path(i, parents or (-1,) * len(lengths))])
            own = torch.ones(length, len(path), dtype=torch.bool).tril(len(path) - length)
            own = own.triu(len(path) - length + 1 - (window or len(path)))
            seen[start[i] : start[i + 1], path] = own
        expected = create_block_mask(lambda b, h, q, k, seen=seen: seen[q, k], None, None, tokens, tokens, device="cpu")
        tree = TreeMask(start, parents)
        assert torch.equal(torch.from_numpy(tree.seen(window)), seen)
        found = block_mask(tree, window, torch.device("cpu"))
        places = torch.arange(tokens)
        assert torch.equal(found.mask_mod(0, 0, places[:, None], places[None]), seen)  # what the kernel evaluates
        assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE
        for side in ("kv", "full_kv", "q", "full_q"):
            assert _blocks(found, side) == _blocks(expected, side), (lengths, side)


def _blocks(mask: Any, side: str) -> list[list[int]]:
    """Each row's blocks, without empty rows at the end."""
    counts, indices = (getattr(mask, f"{side}_{part}")[0, 0].tolist() for part in ("num_blocks", "indices"))
    rows = [row[:count] for row, count in zip(indices, counts, strict=True)]
    while rows and not rows[-1]:
        rows.pop()
    return rows


def test_what_has_to_be_computed_is_what_a_tree_saves() -> None:
    """8 responses of 512 tokens to a prompt of 4,096: each sees the prompt and itself, not its siblings."""
    prompt, response = 4096 // BLOCK, 512 // BLOCK
    boundaries = [0, *range(4096, 4096 + 9 * 512, 512)]
    blocks = TreeMask(boundaries, (-1, *[0] * 8)).blocks(None)
    assert blocks.full.sum() == prompt * (prompt - 1) / 2 + 8 * (response * prompt + response * (response - 1) / 2)
    assert blocks.partial.sum() == prompt + 8 * response  # the diagonal


def test_other_orders_and_context_parallelism_are_refused() -> None:
    lengths, parents = TREES["two groups in turn"]
    with pytest.raises(ValueError, match="segment 2 continues segment 0"):
        TreeMask(_boundaries(lengths).tolist(), parents)
    with pytest.raises(ValueError, match="context parallelism"):
        FlexCoreAttention(SimpleNamespace(context_parallel_size=2), 1, None, "self", scale=SCALE, window=None)


def test_flex_attention_takes_these_masks_and_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own FlexAttention, forward and backward, by its reference formulas (its check that they run on a GPU is
    removed); packs of any length and tree share what was compiled, windows of any size too."""
    from torch._dynamo.backends.debugging import aot_eager
    from torch.nn.attention import flex_attention

    compiled = []

    def backend(graph: Any, inputs: Sequence[Any]) -> Any:
        compiled.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_has_kernel", lambda query: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    flex._compiled.cache_clear()
    try:
        counts = []
        for window in (None, 4, 150):
            for name in ("three levels", "a large group"):
                tree = DEPTH_FIRST[name]
                *qkv, gradient = _inputs(sum(tree[0]))
                found = _differentiate(_attend(FlexCoreAttention, tree, window), qkv, gradient)
                expected = _differentiate(_reference(tree, window), qkv, gradient)
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
                counts.append(len(compiled))
        assert counts[0] == counts[1] > 0
        assert counts[2] > counts[1] and counts[2:] == counts[2:3] * 4
    finally:
        flex._compiled.cache_clear()
        torch._dynamo.reset()


def test_the_report_names_it() -> None:
    shown = suppliers([_core(FlexCoreAttention, None)])["attention"]
    assert shown == f"torch {torch.__version__} FlexAttention, shared prefixes (FlexCoreAttention)"


def test_what_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = functools.partial(compat.resolve_attention, shares_prefixes=True)
    assert choose(torch.bfloat16, Layout()) == "own"  # without a GPU
    monkeypatch.setattr(compat, "has_cuda", lambda: True)
    assert choose(torch.bfloat16, Layout()) == choose(torch.bfloat16, Layout(tensor=2, data=4)) == "flex"
    assert choose(torch.float32, Layout()) == choose(torch.bfloat16, Layout(context=2)) == "own"
    assert choose(torch.bfloat16, Layout(), shares_prefixes=False) == "own"


def test_a_backend_of_another_attention_is_refused(tmp_path: Path) -> None:
    folder = str(tiny_qwen3(tmp_path / "model"))
    (message,) = run_ranks(_refusal, 1, folder)
    assert "model.attention_backend flash" in message and "set batching.share_prefixes false" in message


def _refusal(rank: int, folder: str) -> str:
    from asd_megatron.errors import UserError

    with pytest.raises(UserError) as error:
        _port(folder, Layout(), "flex", attention_backend="flash")
    return str(error.value)


# ---------------------------------------------------------------- on a GPU


def _layer(kind: type, tree: Tree, heads: tuple[int, int, int], where: torch.device) -> Callable[..., Tensor]:
    """Megatron's rotation and the core attention, as a layer calls them: (query, key, value) -> output."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    lengths, parents = tree
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    boundaries = _boundaries(lengths).tolist()
    packed = SimpleNamespace(boundaries=boundaries, parents=parents)
    positions = torch.from_numpy(TreeMask(boundaries, parents).position).to(where)
    angles = Rotation([RotarySettings(heads[2], 1e6)], where).angles(positions[:, None])
    complete = torch.tensor([0, boundaries[-1]], dtype=torch.int32)  # on the host, as `ModelPort.forward` has it
    rotate = functools.partial(apply_rotary_pos_emb, freqs=angles, config=config, cu_seqlens=complete, cp_group=alone)
    core = _core(kind, None, heads[2] ** -0.5)
    return lambda query, key, value: core(rotate(query), rotate(key), value, packed_seq_params=packed).squeeze(1)


def _random(tokens: int, heads: tuple[int, int, int], where: torch.device) -> list[Tensor]:
    shapes = [(tokens, heads[0], heads[2]), *[(tokens, heads[1], heads[2])] * 2, (tokens, heads[0] * heads[2])]
    return [torch.randn(shape, device=where, dtype=torch.bfloat16) for shape in shapes]


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_layer_on_a_gpu_waits_for_nothing_and_agrees() -> None:
    """Prints both attentions' times, forward and backward, of 8 responses of 512 tokens to a prompt of 4,096."""
    from torch._dynamo.utils import counters

    where, heads = torch.device("cuda"), (32, 8, 128)
    trees = [([4096, *[512] * 8], (-1, *[0] * 8)), ([1000, 77, 300, 1, 640], (-1, 0, 1, 1, 0))]
    times: dict[str, float] = {}
    for number, tree in enumerate(trees):
        *qkv, gradient = _random(sum(tree[0]), heads, where)
        layers = {kind.__name__: _layer(kind, tree, heads, where) for kind in (FlexCoreAttention, SDPACoreAttention)}
        results = {name: _differentiate(layer, qkv, gradient) for name, layer in layers.items()}
        exact = _differentiate(layers["SDPACoreAttention"], [x.float() for x in qkv], gradient.float())
        errors = {
            name: [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
            for name, found in results.items()
        }
        for ours, sdpa in zip(*errors.values(), strict=True):
            assert ours < 1.5 * sdpa + 1e-3, errors
        if number == 0:
            for name, layer in layers.items():
                times[name] = _milliseconds(functools.partial(_differentiate, layer, qkv, gradient))
            graphs = counters["stats"]["unique_graphs"]
        fresh = _layer(FlexCoreAttention, tree, heads, where)  # makes its masks inside, as the first layer of a pack
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                _differentiate(fresh, qkv, gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == graphs  # another length and tree
    print("\nms a layer:", {name: round(value, 2) for name, value in times.items()})


def _milliseconds(action: Callable[[], Any], repeats: int = 10) -> float:
    action()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


# ---------------------------------------------------------------- complete models


def _packs(tensor: int, sequence_parallel: bool) -> list[Any]:
    """Two groups whose teacher prompts share a demonstration as far as they go, in packs with and without sharing."""
    from asd_megatron.trainer.batch import PackLayout, TokenSequence, build_pack

    draw = torch.Generator().manual_seed(4)
    ids = lambda n: tuple(torch.randint(61, (n,), generator=draw).tolist())  # noqa: E731
    sequences, row = [], 0
    for _ in range(2):
        question, demonstration = ids(32), ids(48)
        for shown in (demonstration, demonstration, demonstration[:32] + ids(16), ()):
            prompt, answer = question + shown, ids(11)
            sequences.append(TokenSequence.of(prompt, answer, row))
            row += len(answer)
    layout = functools.partial(PackLayout, tensor=tensor, sequence_parallel=sequence_parallel)
    shared, plain = layout(share_prefixes=True), layout()
    packs = [build_pack(sequences[:5], shared), build_pack(sequences[5:], shared), build_pack(sequences[3:5], plain)]
    assert max(len(_path(i, p.tokens.parents)) for p in packs[:2] for i in range(len(p.tokens.parents))) == 4
    assert not packs[2].tokens.parents
    return packs


def _port(folder: str, layout: Any, attention: str, **build: Any) -> Any:
    from asd_megatron.checkpoint.huggingface import FolderReader, read_config
    from asd_megatron.distributed.layout import init
    from asd_megatron.models.port import ModelPort

    port = ModelPort.build(read_config(folder), init(layout), layout, layers="local", attention=attention, **build)
    with FolderReader(folder) as reader:
        port.load(reader)
    return port


def _train(rank: int, folder: str, sizes: dict[str, Any], attention: str, recompute: Recompute) -> dict[str, Any]:
    """Losses, gradients and scored hidden states."""
    from asd_megatron.ops.vocab_head import linear_logprob
    from asd_megatron.trainer import schedule
    from tests.models import everywhere

    layout = Layout(**sizes)
    port = _port(folder, layout, attention, recompute=recompute)
    port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    packs = _packs(layout.tensor, layout.sequence_parallel)
    made = []
    flex.PackMasks = lambda *a: made.append(PackMasks(*a)) or made[-1]  # type: ignore[assignment,misc]

    def loss(pack: Any, hidden: Tensor) -> Tensor:
        logprobs, _ = linear_logprob(hidden, port.head_weight(), pack.targets, port.head_shard(), rows=pack.rows)
        return -logprobs.sum()

    losses = [float(value) for value in schedule.forward_backward(port, packs, loss)]
    assert len(made) == (len(packs) if attention == "flex" else 0)  # not in every layer, not in recomputation
    states: dict[bool | None, list[Tensor]] = {None: [], True: []}
    for through_modules, found in states.items():
        with port.scoring(through_modules=through_modules):
            schedule.forward(port, packs, lambda _, hidden, found=found: found.append(hidden.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*states.values(), strict=True))
    return {"losses": losses, "gradients": everywhere.gradients(port), "states": states[None]}


@pytest.mark.parametrize(
    ("sizes", "recompute"),
    [
        ({}, Recompute("none")),
        ({"tensor": 2}, Recompute("mlp")),
        ({"tensor": 2, "sequence_parallel": True}, Recompute("full")),
    ],
    ids=["tp1", "tp2", "tp2_sp"],
)
def test_a_model_trains_and_scores_as_with_the_present_attention(
    tmp_path: Path, sizes: dict[str, Any], recompute: Recompute
) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}  # in layers 2 and 3 of 4
    folder = str(tiny_qwen3(tmp_path / "model", **windows))
    ranks = sizes.get("tensor", 1)
    found = run_ranks(_train, ranks, folder, sizes, "flex", recompute)[0]
    expected = run_ranks(_train, ranks, folder, sizes, "own", recompute)[0]
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["states"], expected["states"], rtol=1e-5, atol=1e-5)
    for name, gradient in expected["gradients"].items():
        error = float((found["gradients"][name] - gradient).abs().max() / gradient.abs().max())
        assert error < 2e-5, (name, error)


def _restarting(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, cp_size: int = 1, cp_rank: int = 0, **_: Any) -> Tensor:
    """Megatron's fused rotation of packed sequences, as Transformer Engine's kernel computes it: positions count from 0
    in every sequence, whatever the length of `freqs`."""
    assert cu_seqlens.dtype == torch.int32 and freqs.dtype == torch.float32 and cp_size == 1
    boundaries = cu_seqlens.tolist()
    angles = torch.cat([freqs[: e - a] for a, e in zip(boundaries, boundaries[1:], strict=False)])[:, 0]
    half, other = t.chunk(2, -1)
    return t * angles.cos().to(t.dtype) + torch.cat([-other, half], -1) * angles.sin().to(t.dtype)


def _rotated(rank: int, folder: str) -> list[list[Tensor]]:
    """Hidden states of each pack, rotated by Megatron's own function and by the kernel's stand-in."""
    from megatron.core.models.common.embeddings import rope_utils

    port = _port(folder, Layout(), "flex")
    found: list[list[Tensor]] = []
    with torch.no_grad():
        for fused in (False, True):
            port.config.apply_rope_fusion = fused
            rope_utils.fused_apply_rotary_pos_emb_thd = _restarting
            found.append([port.forward(port.chunks[0], pack.tokens) for pack in _packs(1, False)])
    return found


def test_a_kernel_that_counts_positions_from_0_rotates_by_position(tmp_path: Path) -> None:
    ((own, fused),) = run_ranks(_rotated, 1, str(tiny_qwen3(tmp_path / "model")))
    torch.testing.assert_close(own, fused, rtol=1e-5, atol=1e-5)
