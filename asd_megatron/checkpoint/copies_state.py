"""Copies of weights in a training checkpoint: sharded like the live weights, under keys of their own.

    live       decoder.layers.mlp.linear_fc1.weight
    copies     initial.decoder.layers.mlp.linear_fc1.weight, ema.decoder.layers.mlp.linear_fc1.weight (float32)

Another layout can load them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from asd_megatron.models.weight_copies import CopyName, WeightCopies

NAMES: tuple[CopyName, ...] = ("initial", "ema")
Entries = dict[str, dict[str, Any]]
"""Megatron's sharded state by chunk, or tensors in its place: {`model`: {name of the parameter: shard}}."""


def tensors(copies: WeightCopies, name: CopyName, model: Entries) -> dict[str, dict[str, Tensor]]:
    """The copy's tensors, named as the live weights' shards in `model`, which must still hold the parameters."""
    of_parameters = copies.of_parameters(name)
    return {
        section(name, chunk): {key: of_parameters[id(shard.data)] for key, shard in shards.items()}
        for chunk, shards in model.items()
    }


def sharded(name: CopyName, model: Entries, found: Mapping[str, Mapping[str, Tensor]]) -> Entries:
    """Megatron's sharded state of a copy, whose `tensors` were `found`: the live weights' with other data and keys."""
    return {
        section(name, chunk): {
            key: _with_data(shard, f"{name}.{shard.key}", found[section(name, chunk)][key])
            for key, shard in shards.items()
        }
        for chunk, shards in model.items()
    }


def section(name: CopyName, chunk: str) -> str:
    """The key of a copy's chunk beside the live `model`."""
    return f"{name}_{chunk}"


def is_unread(key: str, state: Mapping[str, Any]) -> bool:
    """Whether a stored tensor's key is that of a copy of which `state` has no section."""
    name = key.partition(".")[0]
    return name in NAMES and not any(asked.startswith(f"{name}_") for asked in state)


def _with_data(shard: Any, key: str, data: Tensor) -> Any:
    """A ShardedTensor, or a factory of some (a gated MLP stores its halves apart), with other content."""
    changes = {"dtype": data.dtype} if hasattr(shard, "dtype") else {}
    return replace(shard, key=key, data=data, **changes)
