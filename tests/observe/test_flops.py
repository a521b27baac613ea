"""Model FLOPs of packs, by hand and against the attention's own masks; rates and peaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from asd_megatron.checks.cases import hard_batch
from asd_megatron.models.attention_plan import AttentionBucket, plan_buckets
from asd_megatron.models.family import AttentionKind, Experts, ModelShape
from asd_megatron.models.flops import (
    FlopsModel,
    attending_pairs,
    computed_tokens,
    flops_model,
    forward_flops,
    step_flops,
)
from asd_megatron.models.gpt import Recompute
from asd_megatron.models.rope import RotarySettings
from asd_megatron.observe.flops import peak_flops, rates
from asd_megatron.observe.reduction import over_ranks
from asd_megatron.records import ComputedPacks, PackCounts
from asd_megatron.trainer.batch import PackLayout, TokenSequence, build_pack
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.shares import plan_shares
from tests.distributed.harness import run_ranks

ROTARY = RotarySettings(head_dim=4, theta=1e4)
DENSE = ModelShape(
    layers=3,
    hidden=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    ffn=16,
    vocab=10,
    max_positions=64,
    norm_epsilon=1e-6,
    tied=False,
    attention=(AttentionKind(ROTARY, 3), AttentionKind(ROTARY, 3), AttentionKind(ROTARY)),
)
# queries 8 x 8, keys and values 2 x 8 x 4, output 8 x 8; gate, up and down 3 x 8 x 16; three layers
BODY = 3 * (64 + 64 + 64 + 384)
TWO = PackCounts(spans=((0, 5), (0, 2)), rows=3)  # sequences of 5 and 2 tokens
FULL, WINDOW = 15 + 3, (1 + 2 + 3 + 3 + 3) + 3  # pairs of a layer


def test_a_dense_model_with_windows() -> None:
    model = flops_model(DENSE)
    assert model.body == BODY and model.windows == (3, 3, None)
    forward = 2 * BODY * 7 + 4 * 2 * 4 * (FULL + 2 * WINDOW) + 2 * 3 * 8 * 10
    assert forward_flops(model, TWO) == forward
    packs = ComputedPacks(scored=[TWO, TWO], trained=[TWO])
    assert step_flops(model, packs) == (5 * forward, 5 * forward)
    assert computed_tokens(packs) == 21


@pytest.mark.parametrize(
    ("recompute", "chunks", "again"),
    [
        (Recompute(), 1, 0),
        (Recompute("mlp"), 1, 2 * 3 * 384 * 7),
        (Recompute("full"), 3, 2 * BODY * 7 + 32 * (FULL + 2 * WINDOW)),
        (Recompute("full", 2), 1, 2 * (BODY // 3 * 2) * 7 + 32 * 2 * WINDOW),  # the first two of three layers
        (Recompute("full", 2), 3, 2 * BODY * 7 + 32 * (FULL + 2 * WINDOW)),  # of each of three stages
    ],
)
def test_recomputation_is_in_the_hardware_flops_of_updates_alone(recompute: Recompute, chunks: int, again: int) -> None:
    model = flops_model(DENSE, recompute, chunks)
    useful = 4 * forward_flops(model, TWO)
    packs = ComputedPacks(scored=[TWO], trained=[TWO])
    assert step_flops(model, packs) == (useful, useful + again)
    assert step_flops(model, packs, recomputed_heads=1) == (useful, useful + again + 2 * 3 * 8 * 10)


def test_of_a_mixture_of_experts_the_active_ones_count() -> None:
    experts = Experts(count=16, per_token=2, ffn=6, normalized=True, auxiliary_loss=0.0)
    model = flops_model(replace(DENSE, experts=experts), Recompute("mlp"))
    assert model.body == 3 * (64 + 64 + 64 + 8 * 16 + 2 * 3 * 8 * 6) and model.recomputed_body == 0


def masked_pairs(buckets: list[AttentionBucket]) -> int:
    """Pairs that the attention's masks let through."""
    total = 0
    for bucket in buckets:
        if bucket.mask is None:
            total += int((bucket.valid.sum(1) * (bucket.valid.sum(1) + 1) // 2).sum())
        else:
            mask = bucket.mask.expand(len(bucket.valid), 1, -1, -1)[:, 0]
            total += int(mask[bucket.valid].sum())
    return total


@pytest.mark.parametrize("window", [None, 1, 7, 20, 40, 1000])
@pytest.mark.parametrize("share", [False, True])
def test_pairs_are_those_that_the_attention_computes(share: bool, window: int | None) -> None:
    """Sequences with and without a shared prefix, whose tokens and pairs then count once."""
    prompt = tuple(range(35))
    tails = [(50,) * 3, (51,) * 17, (52,) * 40, ()]
    sequences = [TokenSequence((*prompt, *tail), 35, 0) for tail in tails if tail] + [TokenSequence((9, 8, 7), 2, 0)]
    pack = build_pack(sequences, PackLayout(share_prefixes=share))
    assert bool(pack.tokens.parents) is share
    buckets = plan_buckets(pack.tokens.cu_seqlens.tolist(), pack.tokens.parents, torch.device("cpu"), window)
    assert attending_pairs(pack.counts.spans, window) == masked_pairs(buckets)
    alone = sum(len(s.ids) for s in sequences)
    assert pack.counts.tokens == (alone - 2 * 32 if share else alone)
    assert pack.counts.rows == len(pack.rows) == 3 + 17 + 40 + 1


def test_padding_counts_nothing() -> None:
    sequences = [TokenSequence((1, 2, 3, 4, 5), 3, 0), TokenSequence((1, 2), 1, 2)]
    plain = build_pack(sequences, PackLayout())
    padded = [
        build_pack(sequences, PackLayout(context=2, context_rank=rank, tensor=4, sequence_parallel=True))
        for rank in (0, 1)
    ]
    assert padded[0].tokens.cu_seqlens[-1] == 16
    assert [p.counts for p in padded] == [plain.counts] * 2 and len(padded[0].rows) < plain.counts.rows
    assert build_pack([], PackLayout(context=2)).counts == PackCounts((), 0)


def counts_of(context: int, context_rank: int, ranks: int, rank: int) -> ComputedPacks:
    """Of all passes of a step: teacher, student and two updates."""
    layout = PackLayout(context=context, context_rank=context_rank)
    shares = plan_shares(hard_batch(1), ranks=ranks, updates=2, layout=layout, tokens_per_microbatch=64)
    batch = LocalBatch(shares[rank], layout)
    batch.teacher_packs()
    batch.student_packs()
    for mini_batch in range(batch.mini_batches):
        batch.student_packs(mini_batch)
    return batch.packs


def _gathered(rank: int) -> tuple[dict[str, float], dict[str, float]] | None:
    """Rank r of data 2 x context 2 as `run.telemetry` counts it; a GPU that only ranks 1 and 2 have."""
    import torch.distributed as dist

    assert dist.group.WORLD is not None
    model, hardware = step_flops(flops_model(DENSE, Recompute("full")), counts_of(2, rank % 2, 2, rank // 2))
    values = {"flops": model / 2, "hardware_flops": hardware / 2, "tokens": 0.0, "perf/imbalance": rank // 2}
    if rank in (1, 2):
        values |= {"gpu/utilization": rank / 4, "gpu/energy_kj": 1.5, "memory/peak_gib": float(rank)}
    return over_ranks(values, dist.group.WORLD)


def test_context_parallel_ranks_count_their_packs_once() -> None:
    """Four ranks together count what one rank does; absent measurements count in no mean."""
    model, hardware = step_flops(flops_model(DENSE, Recompute("full")), counts_of(1, 0, 1, 0))
    first, *others = run_ranks(_gathered, 4)
    assert others == [None] * 3
    sums, metrics = first
    assert (sums["flops"], sums["hardware_flops"]) == (model, hardware) and hardware > model
    assert metrics == {
        "perf/imbalance": 2.0,
        "gpu/utilization": 0.375,
        "gpu/utilization_min": 0.25,
        "gpu/energy_kj": 3.0,
        "memory/peak_gib": 2.0,
    }


def test_rates() -> None:
    times = {"rollout": 3.0, "reward": 1.0, "weight_sync": 1.0, "teacher": 1.0, "update": 3.0, "total": 10.0}
    known = rates(model_flops=8e15, hardware_flops=1e16, tokens=800, times=times, gpus=2, peak=2e15)
    assert known == {
        "perf/tflops_per_gpu": 1000.0,
        "perf/tokens_per_second_per_gpu": 100.0,
        "perf/mfu": 0.5,
        "perf/hfu": 0.625,
        "perf/idle_fraction": 0.5,
    }
    supervised = rates(
        model_flops=1.0, hardware_flops=1.0, tokens=1, times={"update": 1.0, "total": 2.0}, gpus=1, peak=None
    )
    assert set(supervised) == {"perf/tflops_per_gpu", "perf/tokens_per_second_per_gpu"}


@pytest.mark.parametrize(
    ("name", "bfloat16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 1979),
        ("NVIDIA H100 PCIe", 756, 1513),
        ("NVIDIA H100 NVL", 835, 1671),
        ("NVIDIA H200", 989, 1979),
        ("NVIDIA H200 NVL", 835, 1671),
        ("NVIDIA GH200 480GB", 989, 1979),
        ("NVIDIA H20", 148, 296),
        ("NVIDIA A100-SXM4-80GB", 312, None),
        ("NVIDIA A100 80GB PCIe", 312, None),
        ("NVIDIA B200", 2250, 4500),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None),
        ("NVIDIA GeForce RTX 3090", None, None),
    ],
)
def test_peaks(name: str, bfloat16: float | None, fp8: float | None) -> None:
    assert peak_flops(name, "bfloat16") == (None if bfloat16 is None else bfloat16 * 1e12)
    assert peak_flops(name, "float32") is None
    assert peak_flops(name, "fp8") == (None if fp8 is None else fp8 * 1e12)


def test_the_worked_example_of_the_page() -> None:
    """docs/telemetry.md: Qwen3-8B, 256 sequences of 8,192 tokens of which 6,144 are the response."""
    attention = 4096 * (4096 + 2 * 1024) + 4096 * 4096
    body = 36 * (attention + 3 * 4096 * 12288)
    windows = (None,) * 36
    model = FlopsModel(body, 32, 128, windows, 4096, 151936, recomputed_body=body, recomputed_windows=windows)
    counts = PackCounts(((0, 8192),), 6144)
    assert model.body == 6_945_767_424
    assert f"{2 * model.body * 8192:.3e}" == "1.138e+14"
    assert f"{4 * 32 * 128 * 36 * attending_pairs(counts.spans):.3e}" == "1.979e+13"
    assert f"{2 * 6144 * 4096 * 151936:.3e}" == "7.647e+12"
    assert f"{forward_flops(model, counts):.3e}" == "1.412e+14"
    useful, hardware = step_flops(model, ComputedPacks([counts] * 256, [counts] * 256))
    found = rates(
        model_flops=useful,
        hardware_flops=hardware,
        tokens=0,
        times={"teacher": 10.0, "update": 30.0},
        gpus=8,
        peak=peak_flops("NVIDIA H100 80GB HBM3", "bfloat16"),
    )
    assert (round(found["perf/mfu"], 3), round(found["perf/hfu"], 3)) == (0.457, 0.565)
    assert round(found["perf/tflops_per_gpu"]) == 452
