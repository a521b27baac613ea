"""The head's gradient in `main_grad`: the convention, and Megatron's own DistributedDataParallel on two ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from asd_megatron.ops.vocab_head import VocabShard, linear_logprob, linear_token_loss
from tests.distributed.harness import run_ranks
from tests.ops.dense import dense_logprob, error

V, PADDED, H, T = 29, 32, 16, 12


def _loss(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
    a = torch.linspace(-1, 2, T, dtype=logprobs.dtype)[: len(logprobs)]
    return (logprobs * a).sum() + 0.3 * (entropy * a.flip(0)).sum()


class Model(nn.Module):
    """Embedding, one layer, head: all that DDP can get wrong about a head."""

    head: Any  # a parameter, with Megatron's attributes on it
    embedding: Any
    accumulators: list[Any]

    def __init__(self, tied: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Parameter(torch.randn(PADDED, H).to(dtype))
        self.middle = nn.Linear(H, H, dtype=dtype)
        self.head = None if tied else nn.Parameter(torch.randn(PADDED, H).to(dtype))
        if tied:
            self.embedding.zero_out_wgrad = True  # as Megatron's LanguageModule does on a single pipeline stage

    @property
    def head_weight(self) -> Any:
        return self.embedding if self.head is None else self.head

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.middle(torch.nn.functional.embedding(ids, self.embedding)))


def _batch(rank: int, microbatch: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(10 * rank + microbatch)
    return torch.randint(0, V, (T,), generator=g), torch.randint(0, V, (T,), generator=g)


def _product_loss(model: nn.Module, weight: Tensor, batch: tuple[Tensor, Tensor], fused: bool) -> Tensor:
    ids, target = batch
    hidden, shard = model(ids), VocabShard.of(V, PADDED)
    if fused:
        return linear_token_loss(hidden, weight, target, _loss, shard, token_block=T)[0]
    return _loss(*linear_logprob(hidden, weight, target, shard, token_block=5), slice(0, T))


def _dense_gradients(tied: bool, dtype: torch.dtype, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    model = Model(tied, dtype).double()
    for ids, target in batches:
        _loss(*dense_logprob(model(ids), model.head_weight[:V], target, None, 1.0), slice(0, T)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _mimic_ddp(model: Model, dtype: torch.dtype, overlap: bool) -> Callable[[], int]:
    """Megatron 0.16.1's buffers and hooks; returns how often the head weight's hook has fired."""
    fired = 0

    def make(param: Any) -> Callable[..., None]:
        def hook(*unused: object) -> None:
            nonlocal fired
            fired += param is model.head_weight
            if overlap:
                assert param.grad is not None
            if param.grad is not None and (
                not param.grad_added_to_main_grad or getattr(param, "zero_out_wgrad", False)
            ):
                param.main_grad.add_(param.grad.data)
            param.grad = None

        return hook

    model.accumulators = []
    param: Any
    for param in model.parameters():
        param.main_grad = torch.zeros(param.shape, dtype=dtype)
        param.grad_added_to_main_grad = False
        accumulator = param.expand_as(param).grad_fn.next_functions[0][0]
        accumulator.register_hook(make(param))
        model.accumulators.append(accumulator)
    return lambda: fired


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.float64])
def test_the_convention(fused: bool, tied: bool, overlap: bool, main_dtype: torch.dtype) -> None:
    """Accumulated over micro-batches, in main_grad's own dtype too when that is not the accumulation dtype."""
    model = Model(tied, torch.float32)
    fired = _mimic_ddp(model, main_dtype, overlap)
    batches = [_batch(0, m) for m in range(3)]
    for batch in batches:
        _product_loss(model, model.head_weight, batch, fused).backward()
    assert fired() == 3
    want = _dense_gradients(tied, torch.float32, batches)
    param: Any
    for name, param in model.named_parameters():
        assert error(param.main_grad, want[name]) < 3e-6, name
        assert param.grad is None


@pytest.mark.parametrize("fused", [False, True])
def test_main_grad_without_the_flag(fused: bool) -> None:
    """A bare `main_grad` attribute: the gradient goes there and autograd gets none."""
    model = Model(False, torch.float32)
    model.head.main_grad = torch.ones(PADDED, H)
    _product_loss(model, model.head, _batch(0, 0), fused).backward()
    want = _dense_gradients(False, torch.float32, [_batch(0, 0)])
    assert model.head.grad is None
    assert error(model.head.main_grad - 1, want["head"]) < 3e-6


def test_the_fused_loss_may_not_be_scaled() -> None:
    model = Model(False, torch.float32)
    model.head.main_grad = torch.zeros(PADDED, H)
    with pytest.raises(RuntimeError, match="scales its loss by 2"):
        (2 * _product_loss(model, model.head, _batch(0, 0), fused=True)).backward()


def test_no_grad_leaves_main_grad_alone() -> None:
    model = Model(False, torch.float32)
    model.head.main_grad = torch.zeros(PADDED, H)
    with torch.no_grad():
        silent = _product_loss(model, model.head, _batch(0, 0), fused=True)
    assert not model.head.main_grad.any() and not silent.requires_grad
    assert silent == _product_loss(model, model.head, _batch(0, 0), fused=True).detach()


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_to_train_on_still_fires_the_hooks(fused: bool) -> None:
    model = Model(False, torch.float32)
    fired = _mimic_ddp(model, torch.float32, overlap=True)
    rows, target = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    hidden, shard = model(_batch(0, 0)[0]), VocabShard.of(V, PADDED)
    if fused:
        loss = linear_token_loss(hidden, model.head, target, _loss, shard, rows=rows)[0]
    else:
        loss = linear_logprob(hidden, model.head, target, shard, rows=rows)[0].sum()
    loss.backward()
    assert fired() == 1
    parameters: list[Any] = list(model.parameters())
    assert not any(p.main_grad.any() for p in parameters)


def _ddp_body(rank: int) -> dict[str, float]:
    from asd_megatron.distributed.device import prepare

    prepare()
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=2, calculate_per_token_loss=True)
    worst = {}
    for tied, overlap, fused, dtype, count in itertools.product(
        (False, True), (False, True), (False, True), (torch.float32, torch.bfloat16), (1, 3)
    ):
        module = Model(tied, dtype)
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, bucket_size=300 if overlap else None
        )
        ddp = DistributedDataParallel(config, settings, module)
        for _ in range(2):  # the second round starts from what the first left behind
            ddp.zero_grad_buffer()
            for microbatch in range(count):
                with ddp.no_sync() if microbatch < count - 1 else torch.enable_grad():
                    batch = _batch(rank, microbatch)
                    _product_loss(ddp, module.head_weight, batch, fused).backward()
            ddp.finish_grad_sync()
        batches = [_batch(r, m) for r in range(dist.get_world_size()) for m in range(count)]
        want = _dense_gradients(tied, dtype, batches)
        case = f"tied={tied} overlap={overlap} fused={fused} {dtype} count={count}"
        got: dict[str, Any] = dict(module.named_parameters())
        worst[case] = max(error(p.main_grad, want[name]) for name, p in got.items())
    parallel_state.destroy_model_parallel()
    return worst


def test_megatron_ddp_on_two_ranks() -> None:
    for worst in run_ranks(_ddp_body, 2):
        for case, value in worst.items():
            assert value < (2e-2 if "bfloat16" in case else 5e-6), (case, value)
