"""`run.deterministic`: what it sets and refuses; equal bits in the sampler, the scoring pass and the training pass."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch

from asd_megatron.config import check_devices, make_recipe
from asd_megatron.distributed import determinism
from asd_megatron.distributed.layout import Layout, init
from asd_megatron.errors import UserError
from asd_megatron.ops.vocab_head import linear_logprob
from asd_megatron.records import PackedTokens, Rollout, SamplingParams
from asd_megatron.rollout.embedded.engine import EmbeddedEngine
from asd_megatron.trainer.batch import PackLayout
from asd_megatron.trainer.scorer import score_sequence
from tests.distributed.harness import run_ranks
from tests.rollout.model import hugging_face_model, port_of
from tests.rollout.toy import ToyTokenizer, prompt

PROMPTS = [prompt(f"p{i}", [(11 * i + 5 * j) % 60 + 1 for j in range(1 + 4 * (i % 3))]) for i in range(5)]
PARAMS = SamplingParams(n=3, max_new_tokens=14, stop_token_ids=(0, 1, 2, 3))
HOT = dataclasses.replace(PARAMS, temperature=0.7, top_p=0.9)
LAYOUTS = {"tp2_sp": Layout(tensor=2, sequence_parallel=True), "pp2": Layout(pipeline=2)}


def _trained(port: Any, rollouts: list[Rollout], temperature: float) -> list[torch.Tensor]:
    """Log-probs of the responses by the training forward over one pack, with gradients. One pipeline stage."""
    sequences = [[*r.prompt_ids.tolist(), *r.response_ids.tolist()] for r in rollouts]
    ends = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0)
    padding = -int(ends[-1]) % 2  # for sequence parallelism
    ends[-1] += padding
    ids = torch.tensor([i for s in sequences for i in s] + [0] * padding)
    positions = torch.cat([torch.arange(int(b - a)) for a, b in zip(ends, ends[1:], strict=False)])
    packed = PackedTokens(ids, positions, ends.to(torch.int32), int((ends[1:] - ends[:-1]).max()))
    hidden = port.forward(port.chunks[0], packed)
    found, _ = linear_logprob(
        hidden.squeeze(1), port.head_weight(), ids.roll(-1), port.head_shard(), temperature=temperature, token_block=32
    )
    found = found.detach()
    return [
        found[int(a) + len(r.prompt_ids) - 1 : int(a) + len(s) - 1]
        for a, r, s in zip(ends, rollouts, sequences, strict=False)
    ]


def _compare(rank: int, layout: Layout) -> int:
    """Tokens compared."""
    determinism.prepare(os.environ, cuda=False)
    groups = init(layout)
    assert determinism.rows_are_independent(torch.float32)
    port = port_of(hugging_face_model(), groups, layout)
    port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    pack_layout = PackLayout.of(layout, groups, port.device, pad_id=0, share_prefixes=True)
    compared = 0
    for params in (PARAMS, HOT):
        batches = []
        for rows in (1, 7, 100):
            engine = EmbeddedEngine(port, groups, ToyTokenizer(), seed=3, max_batch_size=rows)
            engine.submit(PROMPTS, params, 1)
            batches.append([r for group in engine.collect(100) for r in group.rollouts])
        assert all(batch == batches[0] for batch in batches)  # log-probs too
        shared: list[Any] = [batches[0]]
        torch.distributed.broadcast_object_list(shared, 0)
        (rollouts,) = shared
        if layout.pipeline == 1:
            for rollout, expected in zip(rollouts, _trained(port, rollouts, params.temperature), strict=True):
                assert torch.equal(torch.tensor(rollout.logprobs), expected)
        if params.temperature == 1.0:
            for r in rollouts:
                scores = score_sequence(port, groups, [*r.prompt_ids.tolist(), *r.response_ids.tolist()], pack_layout)
                assert scores[len(r.prompt_ids) - 1 :] == r.logprobs.tolist()
        compared += sum(len(r.response_ids) for r in rollouts)
    return compared


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_token_has_the_same_bits_when_it_is_sampled_scored_and_trained(name: str) -> None:
    """In any batch and pack, with the vocabulary cut and the responses divided over ranks."""
    layout = LAYOUTS[name]
    assert all(count > 200 for count in run_ranks(_compare, layout.world_size, layout, init=False, timeout=120))


def test_variables_of_the_user_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    environment = {"NCCL_ALGO": "Tree"}
    determinism.prepare(environment, cuda=True)
    expected = {"NCCL_ALGO": "Tree", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    assert environment == expected
    with pytest.raises(UserError, match="NVTE_ALLOW_NONDETERMINISTIC_ALGO is '1'.*unset it, or set it to 0"):
        determinism.prepare({"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}, cuda=True)
    with pytest.raises(UserError, match="MKL_CBWR is 'AVX2', .* unset it"):
        determinism.prepare({"MKL_CBWR": "AVX2"}, cuda=False)


def test_what_time_decides_is_refused() -> None:
    values: dict[str, Any] = {
        "run": {"deterministic": True},
        "model": {"path": "m"},
        "data": {"train": "puzzle:train"},
        "reward": {"name": "puzzle"},
    }
    check_devices(make_recipe(values), cuda=False)
    servers = {**values, "rollout": {"engine": "sglang", "overlap": True, "oversampling": 1.5}}
    with pytest.raises(UserError, match="(?s)rollout.overlap the time.*rollout.oversampling the time"):
        make_recipe(servers)
    recipe = make_recipe({**values, "rollout": {"engine": "sglang"}})
    with pytest.raises(UserError, match="run.deterministic: SGLang's attention for CPUs"):
        check_devices(recipe, cuda=False)
