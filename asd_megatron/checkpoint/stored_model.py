"""The weights of one model in a `torch_dist` checkpoint, by Hugging Face name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.errors import UserError
from asd_megatron.models.families import shape_of
from asd_megatron.models.family import ModelShape
from asd_megatron.models.stored import (
    LAYERS,
    Parameter,
    Place,
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


class StoredModel:
    """A reader (`models.loading.TensorReader`) of full tensors, one at a time, out of a checkpoint of any layout.

    Attributes:
        dtype: of the live weights; None where they have several.
    """

    def __init__(
        self, checkpoint: DistributedCheckpoint, hf_config: Mapping[str, Any], *, weights: WeightsName = "live"
    ) -> None:
        """weights: the live ones or a stored copy of them. Raises UserError for tensors that the model of `hf_config`
        lacks, and for those that it has in addition or in another shape: all of them by key."""
        self.checkpoint = checkpoint
        self.family, self.shape = shape_of(hf_config)
        self._shapes = unpadded(self.shape)
        prefix = _prefix(checkpoint, weights)
        self._places = _fit(checkpoint, prefix, parameters(self.family, self.shape), self.shape)
        self._names = {name: (p, number) for p in self._places for number, name in enumerate(p.names)}
        live = [checkpoint.tensors.get(place.key.removeprefix(prefix)) for place in self._places.values()]
        dtypes = {tensor.dtype for tensor in live if tensor is not None}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self._last: tuple[Parameter, tuple[Tensor, ...]] | None = None

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by name, with its full shape, in the order of the forward pass."""
        out: dict[str, tuple[int, ...]] = {}
        for parameter in self._places:
            out.update(zip(parameter.names, parameter.rule.operation.shapes(self._shapes), strict=True))
        return out

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in the order of `expected`, in its stored dtype. One parameter is in memory at a time."""
        for parameter in self._places:
            yield from zip(parameter.names, self._full(parameter), strict=True)

    def keys(self) -> set[str]:
        return set(self._names)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, in its stored dtype. Raises UserError if the checkpoint has none of that name and shape."""
        if name not in self._names:
            raise UserError(f"{self.checkpoint.folder} has no tensor {name}")
        parameter, number = self._names[name]
        if self._last is None or self._last[0] is not parameter:  # q, k and v are asked for one after the other
            self._last = (parameter, self._full(parameter))
        tensor = self._last[1][number]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{self.checkpoint.folder}: tensor {name} has shape {tuple(tensor.shape)}, not {shape}")
        return tensor

    def _full(self, parameter: Parameter) -> tuple[Tensor, ...]:
        place = self._places[parameter]
        return parameter.rule.operation.unshard([self.checkpoint.read(place.key, place.index)], self._shapes)


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
        found = [place for place in places if place.key in tensors]
        known |= {place.key for place in found}
        if parameter.rule not in shape_of_rule:
            shape_of_rule[parameter.rule] = parameter.shape(shapes)
        own = shape_of_rule[parameter.rule]
        if not found:
            place = places[-1] if layers_apart else places[0]
            problems[f"{place.key} is missing, {(*place.leading, *own)} in the model"] = None
        elif len(found) > 1:
            problems[f"{' and '.join(place.key for place in found)} are the same parameter"] = None
        else:
            placed[parameter] = found[0]
            stored = tensors[found[0].key].shape
            if not _fits(stored, (*found[0].leading, *own), parameter.is_vocabulary):
                problems[f"{found[0].key} has the shape {stored}, {(*found[0].leading, *own)} in the model"] = None
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
