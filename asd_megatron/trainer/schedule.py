"""Runs packs (micro-batches) through Megatron's pipeline schedules: the only caller of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from asd_megatron.distributed import activity
from asd_megatron.models.port import ModelPort
from asd_megatron.models.routing import MicroBatchRouting
from asd_megatron.trainer.batch import Pack
from asd_megatron.trainer.transfers import KnownShapes, communicator

Routing = Callable[[Pack], MicroBatchRouting]
"""What the routers of a mixture of experts are told about a pack."""


def _iterators(packs: Sequence[Pack], chunks: int) -> Any:
    """One iterator over the packs for each model chunk: the interleaved schedule feeds every chunk all packs."""
    return iter(packs) if chunks == 1 else [iter(packs) for _ in range(chunks)]


def _run(
    port: ModelPort,
    packs: Sequence[Pack],
    loss: Callable[..., Any],
    routing: Routing | None,
    *,
    forward_only: bool,
    collect: bool,
) -> list[Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(data: Iterator[Pack], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        pack = next(data)
        activity.mark()
        return port.forward(chunk, pack.tokens, None if routing is None else routing(pack)), partial(loss, pack)

    chunks = port.chunks
    transfers: dict[str, Any] = {}
    shapes = _shapes(port, packs, backward=not forward_only)
    if shapes is not None:
        transfers = communicator(port.config, port.process_groups, shapes)
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=_iterators(packs, len(chunks)),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(packs),
        seq_length=max(len(p.tokens.input_ids) for p in packs),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect,
        **transfers,
    )
    if shapes is not None:
        shapes.finish()
    return cast(list[Any], found)


def _shapes(port: ModelPort, packs: Sequence[Pack], *, backward: bool) -> KnownShapes | None:
    """What this pipeline stage receives; None without pipeline parallelism."""
    pp, layout = port.process_groups.pp, port.layout
    if layout.pipeline == 1:
        return None
    split = layout.tensor if layout.sequence_parallel else 1
    shapes = [[len(pack.tokens.input_ids) // split, 1, port.shape.hidden] for pack in packs]
    return KnownShapes.of(
        shapes, stage=pp.rank(), stages=layout.pipeline, chunks=layout.virtual_pipeline or 1, backward=backward
    )


@torch.no_grad()
def forward(
    port: ModelPort, packs: Sequence[Pack], visit: Callable[[Pack, Tensor], None], routing: Routing | None = None
) -> None:
    """A forward pass of every pack without gradient; `visit(pack, hidden)` runs on the last pipeline stage.

    `hidden` is [T, H] in the model's dtype, or [T / tp, H] under sequence parallelism. Collective over the
    model-parallel group.
    """

    def loss(pack: Pack, output: Tensor, non_loss_data: bool = False) -> int:
        visit(pack, output.squeeze(1))
        return 0

    _run(port, packs, loss, routing, forward_only=True, collect=True)


def forward_backward(
    port: ModelPort, packs: Sequence[Pack], loss: Callable[[Pack, Tensor], Tensor], routing: Routing | None = None
) -> list[Tensor]:
    """Forward and backward of every pack; gradients are summed over data- and context-parallel ranks. Collective.

    `loss(pack, hidden)` returns the pack's part of the loss (scalar), already divided by its global denominator:
    nothing is rescaled afterwards, so the gradient cannot depend on how the batch was split. `hidden` as for `forward`.
    Returns the packs' detached losses on the last pipeline stage, [] elsewhere.
    """

    def with_count(pack: Pack, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = loss(pack, output.squeeze(1))
        # A three-tuple under calculate_per_token_loss: Megatron neither divides by the micro-batches nor by this count.
        return value, torch.ones((), dtype=torch.int32, device=value.device), value.detach()

    return _run(port, packs, with_count, routing, forward_only=False, collect=False)
