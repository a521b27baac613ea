"""The embedded engine on the training model, alone and on several ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.distributed.layout import Layout, ProcessGroups, init
from asd_megatron.models.port import ModelPort
from asd_megatron.ops.vocab_head import linear_logprob
from asd_megatron.records import Group, PackedTokens, Rollout, SamplingParams
from asd_megatron.rollout.embedded.engine import EmbeddedEngine
from asd_megatron.rollout.engine import RolloutError
from tests.distributed.harness import run_ranks
from tests.models import everywhere
from tests.rollout.model import hugging_face_model, port_of
from tests.rollout.toy import ToyTokenizer, prompt

PROMPTS = [prompt(f"p{i}", [(11 * i + 5 * j) % 60 + 1 for j in range(1 + 4 * (i % 3))]) for i in range(5)]
PARAMS = SamplingParams(n=3, max_new_tokens=14, stop_token_ids=(0, 1, 2, 3))
WAYS = {
    "plain": PARAMS,
    "filtered": dataclasses.replace(PARAMS, temperature=0.8, top_k=20, top_p=0.9),
    "greedy": dataclasses.replace(PARAMS, n=1, temperature=0.0),
    "strings": dataclasses.replace(PARAMS, stop=("f", "bc", "nq")),
}
Sampled = dict[str, list[Rollout]]


def _sample(port: ModelPort, process_groups: ProcessGroups, rows: int = 7) -> Sampled:
    engine = EmbeddedEngine(port, process_groups, ToyTokenizer(), seed=3, max_batch_size=rows)
    found: Sampled = {}
    for way, params in WAYS.items():
        engine.submit(PROMPTS, params, 1)
        delivered: list[Group] = engine.collect(100)
        assert engine.pending == 0
        assert len(delivered) == (len(PROMPTS) if process_groups.world.rank() == 0 else 0)
        assert all(len(g.rollouts) == params.n for g in delivered)
        found[way] = [r for g in delivered for r in g.rollouts]
    return found


def _alone(rank: int) -> Sampled:
    """Everything that needs no second rank: against transformers, repetition, batches."""
    layout = Layout()
    groups = init(layout)
    model = hugging_face_model()
    port = port_of(model, groups, layout)
    found = _sample(port, groups)
    assert _sample(port, groups) == found
    for rows in (1, 100):
        other = _sample(port, groups, rows)
        for way, rollouts in found.items():
            _assert_same(other[way], rollouts)
    for way, rollouts in found.items():
        for r in rollouts:
            _check_logprobs(model, r, WAYS[way].temperature or 1.0)
    for r in found["greedy"]:
        out = model.generate(
            torch.tensor([r.prompt_ids.tolist()]),
            attention_mask=torch.ones(1, len(r.prompt_ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=14,
            eos_token_id=list(PARAMS.stop_token_ids),
            pad_token_id=0,
        )
        assert out[0, len(r.prompt_ids) :].tolist() == list(r.response_ids)
    return found


@torch.no_grad()
def _check_logprobs(model: Any, r: Rollout, temperature: float) -> None:
    logits = model(torch.tensor([[*r.prompt_ids, *r.response_ids]])).logits[0, len(r.prompt_ids) - 1 : -1]
    expected = torch.log_softmax(logits / temperature, -1)
    expected = expected[torch.arange(len(r.response_ids)), r.response_ids]
    torch.testing.assert_close(torch.tensor(r.logprobs), expected, atol=1e-5, rtol=0)


def _assert_same(found: list[Rollout], expected: list[Rollout]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert dataclasses.replace(a, logprobs=b.logprobs) == b
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def alone() -> Sampled:
    found = run_ranks(_alone, 1, init=False, timeout=100)[0]
    lengths = [len(r.response_ids) for r in found["plain"]]
    assert len(set(lengths)) > 4 and max(lengths) == 14  # finished and truncated rows, at different times
    ended = [r for r in found["strings"] if r.text.endswith(WAYS["strings"].stop)]
    assert ended
    return found


def test_one_process(alone: Sampled) -> None:
    assert set(alone) == set(WAYS)


def _gradients(port: ModelPort, process_groups: ProcessGroups) -> dict[str, Tensor]:
    """Of a sum of log-probs over one pack, through the training forward. One pipeline stage."""
    ids = torch.arange(1, 17)
    packed = PackedTokens(ids, torch.arange(8).repeat(2), torch.tensor([0, 8, 16], dtype=torch.int32), 8)
    for chunk in port.chunks:
        chunk.zero_grad_buffer()
    hidden = port.forward(port.chunks[0], packed)
    if port.config.sequence_parallel:
        assert hidden.shape[0] == 16 // process_groups.tp.size()
    logprobs, _ = linear_logprob(hidden.squeeze(1), port.head_weight(), ids.roll(-1), port.head_shard())
    logprobs.sum().backward()
    port.config.finalize_model_grads_func(port.chunks)
    return everywhere.gradients(port)


def _in_layout(rank: int, layout: Layout) -> Sampled:
    groups = init(layout)
    port = port_of(hugging_face_model(), groups, layout)
    port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    one_stage = layout.pipeline == 1
    before = _gradients(port, groups) if one_stage else {}
    training = [m.training for m in port.chunks[0].modules()]
    found = _sample(port, groups)
    assert [m.training for m in port.chunks[0].modules()] == training and all(training)
    assert port.config.sequence_parallel == layout.sequence_parallel
    if one_stage:
        after = _gradients(port, groups)
        assert any(g.abs().max() > 0 for g in before.values())
        assert all(torch.equal(after[name], before[name]) for name in before)
    if layout.data > 1:
        _check_failure_of_one_replica(port, groups)
    return found


def _check_failure_of_one_replica(port: ModelPort, process_groups: ProcessGroups) -> None:
    """Raised on every rank; the engine continues, also with fewer groups than replicas."""
    engine = EmbeddedEngine(port, process_groups, None, seed=3)
    engine.submit(PROMPTS, PARAMS, 1)
    with pytest.raises(RolloutError, match="rollout.collect_timeout"):
        engine.collect(0.0 if process_groups.dp.rank() == 1 else 100.0)
    assert engine.pending == 0
    engine.submit(PROMPTS[:1], PARAMS, 1)
    assert len(engine.collect(100)) == (process_groups.world.rank() == 0)


LAYOUTS = {
    "tp2_sp": Layout(tensor=2, sequence_parallel=True),
    "pp2": Layout(pipeline=2),
    "dp2": Layout(data=2),
    "tp2_pp2": Layout(tensor=2, pipeline=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples_are_those_of_one_process(name: str, alone: Sampled) -> None:
    layout = LAYOUTS[name]
    found = run_ranks(_in_layout, layout.world_size, layout, init=False, timeout=120)
    for way, rollouts in alone.items():
        _assert_same(found[0][way], rollouts)
        assert not any(other[way] for other in found[1:])
