"""What the fused head allocates beside its inputs: the results, one tile, two slabs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asd_megatron.ops import softmax_tile
from asd_megatron.ops.vocab_head import VocabShard, linear_logprob, linear_token_loss
from tools.head.memory import peak_bytes

T, V, H, BLOCK = 512, 4096, 64, 64
TILE = 4 * BLOCK * V
SLAB = 4 * 16 * V
SMALL = 64 * T * 8 + 4 * BLOCK * H * 4
"""Columns [T], and a block's hidden states and their like."""


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_tile, "_slab_elements", lambda tile: SLAB // 4)


def _token_loss(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
    return logprobs.sum() + entropy.sum()


def _peak(fused: bool, dtype: torch.dtype, main_grad: bool = False, block: int = BLOCK) -> int:
    hidden, weight = (torch.randn(n, H).to(dtype).requires_grad_() for n in (T, V))
    target = torch.randint(0, V, (T,))
    if main_grad:
        weight.main_grad = torch.zeros(V, H)  # type: ignore[attr-defined]

    def action() -> None:
        if fused:
            linear_token_loss(hidden, weight, target, _token_loss, VocabShard.of(V, V), token_block=block)[0].backward()
        else:
            logprobs, entropy = linear_logprob(hidden, weight, target, VocabShard.of(V, V), token_block=block)
            (logprobs.sum() + entropy.sum()).backward()

    return peak_bytes(action, torch.device("cpu"))


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradients_a_tile_and_its_slabs(fused: bool, slabs: None) -> None:
    """In all 2 MiB beside the weight's gradient, where one copy of the logits has 8 MiB. The statistics take two slabs
    of ten rows, the gradient one of 16; `linear_logprob` has computed them when it allocates the gradients."""
    results, scratch = 4 * (V + T) * H, (20 if fused else 16) * SLAB // 16
    peak = _peak(fused, torch.float32)
    assert results + TILE + scratch <= peak <= results + TILE + scratch + SMALL


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_for_the_weight_when_main_grad_takes_its_gradient(fused: bool, slabs: None) -> None:
    assert _peak(fused, torch.float32, main_grad=True) <= 4 * T * H + TILE + 2 * SLAB + SMALL


@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_weights_are_not_widened_whole(fused: bool, slabs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from asd_megatron.ops import gemm

    if not gemm._has_onednn_bfloat16(torch.empty(1, dtype=torch.bfloat16)):
        pytest.skip("this CPU multiplies no bfloat16")
    monkeypatch.setattr(gemm, "WIDENED_ELEMENTS", 128 * H)
    peak = _peak(fused, torch.bfloat16, main_grad=True, block=BLOCK // 4)
    # Beside a small tile and its slab: its gradient, which oneDNN may copy, a part of the weight, and results. All of
    # the weight in float32 has 1 MiB.
    assert peak <= TILE // 4 * 2 + TILE // 8 + SLAB + 4 * 128 * H + 2 * T * H + SMALL // 2
