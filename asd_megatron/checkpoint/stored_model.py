"""The weights of one model in a `torch_dist` checkpoint, by Hugging Face name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.errors import UserError
from asd_megatron.models.families import shape_of
from asd_megatron.models.family import ModelShape
from asd_megatron.models.loading import FullTensor, TensorReader
from asd_megatron.models.stored import (
    LAYERS,
    Parameter,
    Place,
    full_shapes,
    is_of_the_model,
    parameters,
    unpadded,
    what_it_belongs_to,
)
from asd_megatron.models.weights import Rule

WeightsName = Literal["live", "initial", "ema"]
WEIGHTS: tuple[WeightsName, ...] = ("live", "initial", "ema")
MOST_PADDING = 128 * 64  # Megatron-LM pads the vocabulary to a multiple of 128 for each tensor-parallel rank
SHOWN = 30  # misfits that a message lists


class StoredModel(TensorReader):
    """The full tensors of a model by Hugging Face name, put together from a checkpoint of any layout when they are
    read; one parameter is in memory at a time.

    Attributes:
        shapes: of all tensors by name, in the order of the forward pass.
        dtype: of the live weights; None where they have several.
    """

    def __init__(
        self, checkpoint: DistributedCheckpoint, hf_config: Mapping[str, Any], *, weights: WeightsName = "live"
    ) -> None:
        """weights: the live ones or a stored copy of them. Raises UserError for tensors of the model of `hf_config`
        that are missing or have another shape, and for tensors that it does not have: all of them by key."""
        family, shape = shape_of(hf_config)
        self.name = f"the checkpoint {checkpoint.folder}"
        self.checkpoint, self._sizes = checkpoint, unpadded(shape)
        prefix = _prefix(checkpoint, weights)
        self._places = _fit(checkpoint, prefix, parameters(family, shape), shape)
        self.shapes = full_shapes(self._places, self._sizes)
        self._tensors = {
            name: _Tensor(self, parameter, number, self.shapes[name], checkpoint.tensors[place.keys[0]].dtype)
            for parameter, place in self._places.items()
            for number, name in enumerate(parameter.names)
        }
        live = [checkpoint.tensors.get(place.keys[0].removeprefix(prefix)) for place in self._places.values()]
        dtypes = {tensor.dtype for tensor in live if tensor is not None}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self._last: tuple[Parameter, tuple[Tensor, ...]] | None = None

    def __getitem__(self, name: str) -> FullTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def rows(self, parameter: Parameter, rows: slice) -> Tensor:
        """Some rows of a parameter that has one for each token, read without the others."""
        place = self._places[parameter]
        begin, end, _ = rows.indices(self._sizes.vocab)
        return self.checkpoint.read(place.key, place.index, slice(begin, end))

    def full(self, parameter: Parameter) -> tuple[Tensor, ...]:
        """The tensors of one parameter, in their stored dtype. Those of the latest one are kept: q, k and v are asked
        for one after the other."""
        if self._last is None or self._last[0] is not parameter:
            self._last = None  # before the next one is read
            place = self._places[parameter]
            parts = [self.checkpoint.read(key, place.index) for key in place.keys]
            stored = parts[0] if len(parts) == 1 else torch.cat(parts)
            self._last = (parameter, parameter.rule.operation.unshard([stored], self._sizes))
        return self._last[1]


@dataclass(frozen=True)
class _Tensor:
    """One of the tensors that a parameter holds. A slice reads the parameter; of the embedding and the head, only its
    rows."""

    model: StoredModel
    parameter: Parameter
    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        if self.parameter.is_vocabulary and isinstance(index, slice) and index.step in (None, 1):
            return self.model.rows(self.parameter, index)
        return self.model.full(self.parameter)[self.number][index]


def _prefix(checkpoint: DistributedCheckpoint, weights: WeightsName) -> str:
    """What stands before the keys of these weights. Raises UserError when the checkpoint has none of them."""
    prefix = "" if weights == "live" else f"{weights}."
    if prefix and not any(key.startswith(prefix) for key in checkpoint.tensors):
        found = [name for name in WEIGHTS[1:] if any(key.startswith(f"{name}.") for key in checkpoint.tensors)]
        raise UserError(
            f"{checkpoint.folder} stores no {weights} weights (beside the live ones: {', '.join(found) or 'none'}): "
            "choose another --weights"
        )
    return prefix


def _fit(
    checkpoint: DistributedCheckpoint, prefix: str, wanted: Iterable[Parameter], model: ModelShape
) -> dict[Parameter, Place]:
    """Where each parameter is. Raises UserError with every tensor that does not fit."""
    tensors, shapes = checkpoint.tensors, unpadded(model)
    placed: dict[Parameter, Place] = {}
    problems: dict[str, None] = {}  # in order, and once for all layers of a stacked tensor
    known: set[str] = set()
    shape_of_rule: dict[Rule, tuple[int, ...]] = {}
    layers_apart = any(key.startswith(f"{prefix}{LAYERS}0.") for key in tensors)
    for parameter in wanted:
        places = [replace(place, key=prefix + place.key) for place in parameter.places(model)]
        found = [place for place in places if all(key in tensors for key in place.keys)]
        known |= {key for place in found for key in place.keys}
        if parameter.rule not in shape_of_rule:
            shape_of_rule[parameter.rule] = parameter.shape(shapes)
        own = shape_of_rule[parameter.rule]
        if not found:
            complete = [place for place in places if not place.halves]
            place = complete[-1] if layers_apart else complete[0]
            problems[f"{place.key} is missing, {place.shape(own)} in the model"] = None
        elif len(found) > 1:
            problems[f"{' and '.join(place.keys[0] for place in found)} are the same parameter"] = None
        else:
            placed[parameter] = found[0]
            for key in found[0].keys:
                stored, expected = tensors[key].shape, found[0].shape(own)
                if not _fits(stored, expected, parameter.is_vocabulary):
                    problems[f"{key} has the shape {stored}, {expected} in the model"] = None
    for key in sorted(tensors):
        of_these = key.startswith(prefix) if prefix else is_of_the_model(key)
        if of_these and key not in known:
            what = what_it_belongs_to(key.removeprefix(prefix))
            problems[f"{key} {tensors[key].shape} is not in the model{what}"] = None
    if problems:
        listed = "\n  ".join([*problems][:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(
            f"{checkpoint.folder} holds another model than the given config.json describes:\n  {listed}{more}\n"
            "give the Hugging Face folder of the model that was trained"
        )
    return placed


def _fits(stored: tuple[int, ...], expected: tuple[int, ...], is_vocabulary: bool) -> bool:
    """Whether a stored tensor has the expected shape; one with a row for each token may have padding after them."""
    padding = stored[0] - expected[0] if is_vocabulary and stored else 0
    return stored == expected or (0 < padding < MOST_PADDING and stored[1:] == expected[1:])
