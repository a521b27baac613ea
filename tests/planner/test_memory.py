"""The planner's memory against tables that were worked out by hand, and its sentences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from asd_megatron.distributed.layout import Layout
from asd_megatron.models.gpt import Recompute
from asd_megatron.planner.hardware import GIB, accelerator
from asd_megatron.planner.lengths import mean
from asd_megatron.planner.memory import fits, kv_tokens, margin_gib, peak, rank_memory
from asd_megatron.planner.setting import Lengths, Serving, Setting, Workload
from asd_megatron.planner.shortage import changes, lacks
from tests.planner import settings

QWEN, MOE = "Qwen3-8B", "Qwen3-30B-A3B"
TP4 = Layout(tensor=4, data=2, sequence_parallel=True)
WORK = Workload(32, 8, prompt=384, responses=Lengths(6000, 16000), privileged=2000)


def setting(model: str, layout: Layout, *, serving: Serving | None = None, **training: Any) -> Setting:
    return settings.setting(model, layout, work=WORK, serving=serving or Serving(), expert_load=1.0, **training)


def items(found: Setting, phase: Any, stage: int = 0, where: str = "device") -> dict[str, float]:
    """GiB by item."""
    return {i.name: i.bytes / GIB for i in rank_memory(found)[stage].phase(phase).items if i.where == where}


@pytest.mark.parametrize(
    ("model", "layout", "options", "expected"),
    [
        (QWEN, TP4, {}, (3.8, 7.6, 11.4)),
        (QWEN, Layout(data=8), {}, (15.3, 30.5, 11.4)),
        (QWEN, Layout(tensor=2, data=4), {}, (7.6, 15.3, 11.4)),
        (QWEN, Layout(tensor=2, data=2), {}, (7.6, 15.3, 22.9)),
        (QWEN, Layout(tensor=2, data=2), {"distributed_optimizer": False}, (7.6, 15.3, 45.8)),
        (MOE, replace(TP4, expert=8), {}, (7.5, 14.9, 42.7)),  # one replica of the experts: nothing to shard over
        (MOE, replace(TP4, expert=8), {"moments": "bfloat16"}, (7.5, 14.9, 21.3)),
        (MOE, replace(TP4, expert=8, data=4), {}, (7.5, 14.9, 21.3)),
        (MOE, replace(TP4, expert=8), {"offload": "host"}, (7.5, 14.9, 0.0)),
    ],
)
def test_weights_gradients_and_optimizer(
    model: str, layout: Layout, options: dict[str, Any], expected: tuple[float, float, float]
) -> None:
    """By hand: 8.19e9 parameters, 2, 4 and 12 bytes of each; 29.0e9 in experts and 1.5e9 outside."""
    found = items(setting(model, layout, **options), "scoring")
    optimizer = found.get("master weights", 0.0) + found.get("moments", 0.0)
    assert (found["weights"], found["gradients"], optimizer) == pytest.approx(expected, rel=0.05)


def test_activations_of_transformer_engine_and_the_peak() -> None:
    """By hand, a dense layer of Qwen3-8B without recomputation saves T x 137 KB / TP: 1.05 GiB, 38 in all, at 32K
    tokens and TP 4; complete recomputation keeps 2.3. Weights, gradients and optimizer 22.9, head 1.5, the rest 3."""

    def update(pack: int, kind: Any) -> tuple[float, float]:
        found = setting(QWEN, TP4, pack=pack, recompute=Recompute(kind))
        phase = rank_memory(found)[0].phase("update")
        return items(found, "update")["activations"], phase.bytes() / GIB

    assert update(32768, "none") == pytest.approx((38, 65), rel=0.05)
    assert update(16384, "none") == pytest.approx((19, 46), rel=0.05)
    saved, needed = update(32768, "full")
    assert saved == pytest.approx(2.3, rel=0.05)
    # The sum by hand was 32, with the head's tile beside a recomputed layer (2.5): the tile is free by then.
    assert needed == pytest.approx(32 - 1.5, rel=0.05)
    # By hand 17, with the second norm's output, which is recomputed with the MLP that Transformer Engine fuses it to.
    assert update(32768, "mlp")[0] == pytest.approx(17 - 36 * 32768 * 8192 / 4 / GIB, rel=0.05)


def test_pipeline_stages_hold_the_micro_batches_in_flight() -> None:
    found = setting(QWEN, Layout(pipeline=4, data=2), recompute=Recompute("full"))
    saved = [items(found, "update", stage)["activations"] for stage in range(4)]
    assert saved[0] / saved[2] == pytest.approx(2, rel=0.01)  # 4 packs against 2; the last stage has its head's
    assert {stage.peak().name for stage in rank_memory(found)} == {"update"}


def test_kv_cache_of_a_server() -> None:
    """By hand: 0.85 of 79.0 GiB less 15.26 of weights, at 147,456 bytes a token; two GPUs hold half of both."""
    assert kv_tokens(setting(QWEN, TP4)) == pytest.approx((0.85 * 79.0 - 15.26) * GIB / 147456, rel=0.01)
    two = kv_tokens(setting(QWEN, TP4, serving=Serving(tensor_parallel=2)))
    assert two == pytest.approx((0.85 * 79.0 - 7.63) * GIB / (147456 / 2), rel=0.01)
    eight, sixteen = (setting(QWEN, TP4, serving=Serving(tensor_parallel=n)) for n in (8, 16))
    assert kv_tokens(sixteen) < 1.05 * kv_tokens(eight)  # 8 key heads: twice the GPUs hold copies


def test_colocated_servers_get_what_the_trainer_leaves() -> None:
    def colocated(**serving: Any) -> Setting:
        return setting(QWEN, TP4, serving=Serving(colocated=True, transport="cuda_ipc", **serving))

    resident, offloaded = colocated(), colocated(offload_optimizer=True)
    assert kv_tokens(offloaded) - kv_tokens(resident) == pytest.approx(0.85 * 19.07 * GIB / 147456, rel=0.01)
    assert items(offloaded, "generation", where="host") == pytest.approx({"offloaded optimizer": 11.44}, rel=0.01)
    assert "gradients" not in items(offloaded, "generation")
    assert items(offloaded, "update")["gradients"] == pytest.approx(7.63, rel=0.01)


def test_float32_has_no_master_weights_and_checkpoints_in_the_background_are_held_on_the_host() -> None:
    found = setting(QWEN, TP4, dtype="float32", layers="local", async_save=True)
    assert "master weights" not in items(found, "update")
    # 8.19e9 / 4 parameters of a rank, shared by two: weights 4, moments 8.
    assert items(found, "checkpoint", where="host")["copy of the checkpoint"] == pytest.approx(11.4, rel=0.05)


def test_a_shortage_names_keys_that_have_been_worked_out() -> None:
    found = setting(QWEN, Layout(data=8))
    (sentence,) = lacks(found)
    assert not fits(found) and margin_gib(found) < 0
    assert sentence.startswith(f"update needs {peak(found)[1].bytes() / GIB:.1f} GiB")
    assert "activations" in sentence and "model.recompute full" in sentence
    for change, changed in changes(found):
        if f"set {change} (" in sentence or f"or {change} (" in sentence:
            assert fits(changed), change
    assert lacks(replace(found, training=replace(found.training, recompute=Recompute("full")))) == ()


def test_what_no_single_key_mends_and_a_cache_that_is_too_small() -> None:
    small = replace(setting(MOE, replace(TP4, expert=8)), gpu=accelerator("a100-40gb"))
    memory, cache = lacks(small)
    assert "no single key is enough" in memory and "optimizer.offload host" in memory
    assert "KV cache" in cache and "16,384" in cache


def test_teachers_states_wait_where_they_are_told_and_fp8_keeps_copies() -> None:
    exact = replace(setting(QWEN, TP4), workload=replace(WORK, exact=True))
    on_host = replace(exact, training=replace(exact.training, teacher_states="host"))
    each = 256 / 2 * mean(WORK.responses) * 4096 / 4 * 2 / GIB
    assert items(exact, "update")["teacher's hidden states"] == pytest.approx(each)
    assert items(on_host, "update", where="host")["teacher's hidden states"] == pytest.approx(each)
    assert "teacher's hidden states" not in items(on_host, "update")
    # Projections of attention and MLP have 6.95e9 of the parameters.
    fp8 = items(setting(QWEN, TP4, fp8=True), "update")
    assert fp8["FP8 copies of weights"] == pytest.approx(2 * 6.95e9 / 4 / GIB, rel=0.01)
    assert fp8["activations"] < items(setting(QWEN, TP4), "update")["activations"]
