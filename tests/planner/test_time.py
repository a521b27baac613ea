"""Seconds of passes and steps: FLOPs against `models.flops`, a pipeline's bubble, what more bandwidth does."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from asd_megatron.models.flops import flops_model, forward_flops
from asd_megatron.models.gpt import Recompute
from asd_megatron.planner.communication import Groups
from asd_megatron.planner.compute import Cost, Rates, head, layer_backward, layer_forward, layer_recompute
from asd_megatron.planner.loads import Batch, Load
from asd_megatron.planner.setting import Lengths, Serving, Setting
from asd_megatron.planner.step_time import step_time
from asd_megatron.planner.training import layer_exchange, pipelined
from asd_megatron.records import PackCounts
from tests.planner.settings import WORK, setting, shape

MODELS = ("Qwen3-8B", "Olmo-3-7B-Instruct", "Qwen3-30B-A3B", "Qwen3-4B-Instruct-2507")
ONE = Layout()
MOE = Layout(tensor=4, data=4, sequence_parallel=True, expert=8)


def load_of(s: Setting, tokens: int, rows: int) -> Load:
    """Of one pack with one sequence."""
    batch = Batch(s.shape, s.workload)
    sequence = batch._sequence(tokens - rows, rows)
    return Load(sequence.tokens, sequence.pairs, sequence.rows, 1)


@pytest.mark.parametrize("model", MODELS)
def test_flops_are_those_of_the_flops_model(model: str) -> None:
    s = setting(model, ONE)
    rates = Rates(products=1.0, head=1.0, attention=1.0, memory=1e300, launch=0.0, width=2)  # seconds are FLOPs
    load = load_of(s, 9000, 8000)
    counts = PackCounts(((0, 9000),), 8000)
    forward = (layer_forward(s, load, rates) * s.shape.layers + head(s, load, rates, update=False)).compute
    assert forward == pytest.approx(forward_flops(flops_model(s.shape), counts))
    # The backward pass is two products for each; of attention five for two, since its scores are computed again.
    attention = 4 * s.shape.heads * s.shape.head_dim * load.pairs * s.shape.layers
    backward = layer_backward(s, load, rates).compute * s.shape.layers
    only_layers = forward - head(s, load, rates, update=False).compute
    assert backward == pytest.approx(2 * only_layers + 0.5 * attention)
    assert head(s, load, rates, update=True).compute == pytest.approx(3 * head(s, load, rates, update=False).compute)


@pytest.mark.parametrize("kind", ["mlp", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_recomputed_flops_are_those_of_the_flops_model(model: str, kind: str) -> None:
    recompute = Recompute(kind)  # type: ignore[arg-type]
    s = setting(model, ONE, recompute=recompute)
    rates = Rates(products=1.0, head=1.0, attention=0.0, memory=1e300, launch=0.0, width=2)
    rates = replace(rates, attention=1e300)  # linear layers alone
    load = load_of(s, 9000, 8000)
    again = layer_recompute(s, load, rates).compute * s.shape.layers
    assert again == pytest.approx(2 * flops_model(s.shape, recompute).recomputed_body * 9000)


def test_every_rank_computes_its_part() -> None:
    """Tensor, context and expert parallelism divide a dense layer's and the experts' FLOPs."""
    rates = Rates(products=1.0, head=1.0, attention=1.0, memory=1e300, launch=0.0, width=2)
    for model, layout in (("Qwen3-8B", Layout(tensor=4, context=2, sequence_parallel=True)), ("Qwen3-30B-A3B", MOE)):
        one, divided = setting(model, ONE), setting(model, layout)
        load = load_of(one, 8192, 8000)
        factor = layer_forward(divided, load, rates).compute / layer_forward(one, load, rates).compute
        parts = layout.tensor * layout.context
        # The fullest expert-parallel rank has 1.25 times the mean's rows.
        assert 1.0 <= factor * parts < (1.25 if layout.expert > 1 else 1.0 + 1e-9)


def test_small_products_are_less_efficient() -> None:
    rates = Rates.of(setting().gpu, "bfloat16")
    whole, eighth = rates.product(16384, 4096, 24576), rates.product(16384, 4096, 3072)
    assert whole.memory / whole.compute == pytest.approx(221 * (1 / 16384 + 1 / 4096 + 1 / 24576), rel=5e-3)
    assert eighth.memory / eighth.compute == pytest.approx(221 * (1 / 16384 + 1 / 4096 + 1 / 3072), rel=5e-3)


def test_a_pipeline_of_equal_packs_has_the_bubble_of_the_formula() -> None:
    for stages, packs, chunks in itertools.product((2, 4, 8), (8, 32), (1, 2)):
        total, pack = Cost(compute=packs), Cost(compute=1.0)
        part = pipelined((total, total), (total, total), (pack, pack), pipeline=stages, chunks=chunks)
        assert part.seconds == pytest.approx(packs + (stages - 1) / chunks)
        assert part.idle / part.seconds == pytest.approx((stages - 1) / (chunks * packs + stages - 1))


def test_a_last_stage_with_the_head_holds_up_the_others() -> None:
    inner, last = Cost(compute=8.0), Cost(compute=12.0)
    part = pipelined((inner, last), (inner, last), (inner * 0.25, last * 0.25), pipeline=2, chunks=1)
    assert part.seconds == pytest.approx(12.0 + 2.0)  # four packs of 3 s, filled by one of 2 s
    assert part.compute == pytest.approx(10.0)  # the mean stage


def test_what_a_layer_exchanges_by_hand() -> None:
    """16,384 tokens of Qwen3-8B at tensor 4: 4 all-gathers or reduce-scatters of 134 MB forward; 4 more backward and 2
    for the weights' gradients. Experts: two all-to-alls of a rank's tokens x top-k each way."""
    load = Load(tokens=16384, pairs=1.0, rows=1.0, packs=1.0)

    def exchanged(s: Setting, *, update: bool) -> float:
        gpu = replace(s.gpu, node_latency=0.0, network_latency=0.0)
        s = replace(s, gpu=gpu)
        rates = Rates.of(gpu, "bfloat16")
        return layer_exchange(s, Groups.of(gpu, s.training.layout), load, rates, update=update).communication

    ring = 450e9 * 0.75
    hidden = 16384 * 4096 * 2.0 * 3 / 4 / ring
    dense = setting(layout=Layout(tensor=4, data=2, sequence_parallel=True))
    assert exchanged(dense, update=False) == pytest.approx(4 * hidden)
    assert exchanged(dense, update=True) == pytest.approx((4 + 4 + 2) * hidden)
    recomputed = replace(dense, training=replace(dense.training, recompute=Recompute("full")))
    assert exchanged(recomputed, update=True) == pytest.approx((4 + 4 + 4 + 2) * hidden)

    experts = setting("Qwen3-30B-A3B", Layout(data=8, expert=8))
    tokens = 16384 * 8 * 2048 * 2.0 * 7 / 8 / ring
    assert exchanged(experts, update=False) == pytest.approx(2 * tokens)
    assert exchanged(experts, update=True) == pytest.approx(4 * tokens)


CASES = {
    "dense": setting(layout=Layout(tensor=2, pipeline=2, data=4, sequence_parallel=True)),
    "context": setting(layout=Layout(context=4, data=4), serving=Serving(servers=2, tensor_parallel=4)),
    "experts": setting("Qwen3-30B-A3B", replace(MOE, pipeline=2), serving=Serving(servers=4, tensor_parallel=4)),
    "colocated": setting(
        serving=Serving(servers=4, tensor_parallel=2, colocated=True, offload_optimizer=True, transport="cuda_ipc")
    ),
    "embedded": setting(serving=Serving(engine="embedded")),
    "offload": setting(offload="host", copies=1, work=replace(WORK, reference=1, student=1, updates=4)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_faster_machine_is_never_slower(name: str) -> None:
    case = CASES[name]
    before = step_time(case)
    for rate in ("bfloat16", "memory_rate", "node_link", "network", "host_link"):
        double: Any = {rate: 2 * getattr(case.gpu, rate)}
        faster = replace(case, gpu=replace(case.gpu, **double))
        assert step_time(faster).total <= before.total * (1 + 1e-12), rate
    for latency in ("launch", "node_latency", "network_latency"):
        none: Any = {latency: 0.0}
        faster = replace(case, gpu=replace(case.gpu, **none))
        assert step_time(faster).total <= before.total * (1 + 1e-12), latency


def test_more_work_is_never_faster() -> None:
    before = step_time(setting()).total
    longer = replace(WORK, responses=Lengths(8000, 32768, 1.0))
    for work in (longer, replace(WORK, problems=40), replace(WORK, privileged=9000), replace(WORK, reference=1)):
        assert step_time(setting(work=work)).total > before


def test_mfu_is_that_of_the_telemetry_page() -> None:
    """The page's example: 256 sequences of 8,192 tokens, 6,144 of them the response, and a teacher's pass of the same
    size, on 8 H100: 1.446e17 FLOPs."""
    work = replace(WORK, prompt=2048, responses=Lengths(6144, 32768, 0.0), privileged=0)
    time = step_time(setting(work=work))
    assert time.model_flops == pytest.approx(1.446e17, rel=1e-3)
    seconds = time.seconds("teacher", "student", "reference", "update", "optimizer")
    assert time.mfu == pytest.approx(1.446e17 / (seconds * 8 * 989e12), rel=1e-3)
    assert time.gpu_hours == pytest.approx(time.total * 16 / 3600)
    assert time.dollars == pytest.approx(time.gpu_hours * 2.5)


def test_overlap_hides_the_shorter_of_generation_and_training() -> None:
    apart = step_time(setting())
    beside = step_time(setting(serving=Serving(servers=8, overlap=True)))
    rollout, sync = apart.seconds("rollout"), apart.seconds("weight_sync")
    assert apart.total == pytest.approx(sync + rollout + apart.training)
    assert beside.total == pytest.approx(sync + max(rollout, apart.training))


def test_the_longest_response_bounds_many_data_parallel_ranks() -> None:
    """256 rollouts on 256 ranks: the rank with the longest response works, the others wait. Context parallelism divides
    that response."""
    batch = Batch(shape("Qwen3-8B"), WORK)
    few, many = (batch.spread(setting(layout=Layout(data=n), pack=65536).training)[0] for n in (8, 256))
    assert few.busiest.tokens / few.mean.tokens < 1.01
    assert many.busiest.tokens == 32768 + 300
    wide = step_time(setting(layout=Layout(data=256))).seconds("update")
    divided = step_time(setting(layout=Layout(data=64, context=4))).seconds("update")
    assert divided < 0.6 * wide


def test_fp8_is_refused_where_there_is_none() -> None:
    assert step_time(setting(fp8=True)).seconds("update") < step_time(setting()).seconds("update")
    with pytest.raises(UserError, match="a100 has no FP8"):
        step_time(setting(gpu="a100", fp8=True))
