"""Copies of weights in a training checkpoint: sharded like the live weights, under keys of their own.

    live       decoder.layers.mlp.linear_fc1.weight
    copies     initial.decoder.layers.mlp.linear_fc1.weight, ema.decoder.layers.mlp.linear_fc1.weight (float32)

Another layout can load them too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from asd_megatron.checkpoint.parts import Sharded
from asd_megatron.models.weight_copies import CopyName, WeightCopies

NAMES: tuple[CopyName, ...] = ("initial", "ema")


def shards(
    copies: WeightCopies | None, names: Iterable[CopyName], model: Mapping[int, Sharded]
) -> Iterator[tuple[int, Sharded]]:
    """Megatron's description of the tensors of the copies `names`, which are its `data`, by the id of the parameter.
    model: the live weights' descriptions."""
    for name in names:
        assert copies is not None, f"there is no copy {name}"
        tensors = copies.of_parameters(name)
        for parameter, sharded in model.items():
            yield parameter, _with_data(sharded, f"{name}.{sharded.key}", tensors[parameter])


def is_unread(key: str, read: Collection[CopyName]) -> bool:
    """Whether a stored tensor's key is that of a copy other than `read`."""
    name = key.partition(".")[0]
    return name in NAMES and name not in read


def _with_data(shard: Sharded, key: str, data: Tensor) -> Any:
    """A ShardedTensor, or a factory of some (a gated MLP stores its halves apart), with other content."""
    changes = {"dtype": data.dtype} if hasattr(shard, "dtype") else {}
    return replace(shard, key=key, data=data, **changes)
