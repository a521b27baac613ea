"""Running packs through Megatron's forward-backward schedules: the one place that calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from asd_megatron.trainer.batch import Pack


class ScheduledModel(Protocol):
    """What the schedules need of a model port."""

    chunks: list[torch.nn.Module]

    def forward(self, chunk: torch.nn.Module, packed: Any) -> Tensor: ...


def _iterators(packs: Sequence[Pack], chunks: int) -> Any:
    """Every model chunk of an interleaved pipeline walks through the same packs."""
    return iter(packs) if chunks == 1 else [iter(packs) for _ in range(chunks)]


def _run(
    port: ScheduledModel, packs: Sequence[Pack], loss: Callable[..., Any], *, forward_only: bool, collect: bool
) -> list[Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(data: Iterator[Pack], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        pack = next(data)
        return port.forward(chunk, pack.tokens), partial(loss, pack)

    chunks = port.chunks
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=_iterators(packs, len(chunks)),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(packs),
        seq_length=max(len(p.tokens.input_ids) for p in packs),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


@torch.no_grad()
def forward(port: ScheduledModel, packs: Sequence[Pack], visit: Callable[[Pack, Tensor], None]) -> None:
    """One forward of every pack; `visit(pack, hidden [T, H])` runs on the last pipeline stage."""

    def loss(pack: Pack, output: Tensor, non_loss_data: bool = False) -> int:
        visit(pack, output.squeeze(1))
        return 0

    _run(port, packs, loss, forward_only=True, collect=True)


def forward_backward(
    port: ScheduledModel, packs: Sequence[Pack], loss: Callable[[Pack, Tensor], Tensor]
) -> list[Tensor]:
    """Forward and backward of every pack, gradients reduced over data and context parallel ranks by sum.

    `loss(pack, hidden [T, H])` returns the pack's share of the loss, already divided by its global denominator: nothing
    is rescaled afterwards, so the gradient cannot depend on how the batch was split. Returns the packs' detached losses
    on the last stage ([] elsewhere).
    """

    def with_count(pack: Pack, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = loss(pack, output.squeeze(1))
        # A three-tuple under calculate_per_token_loss: Megatron neither divides by the micro-batches nor by this count.
        return value, torch.ones((), dtype=torch.int32, device=value.device), value.detach()

    return _run(port, packs, with_count, forward_only=False, collect=False)
