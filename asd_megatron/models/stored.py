"""Where a model's parameters are in Megatron-Core's `torch_dist` checkpoints, by the rules of its family.

    parameter    decoder.layers.{layer}.self_attention.linear_qkv.weight       [rows, hidden]
    stacked      decoder.layers.self_attention.linear_qkv.weight               [layers, rows, hidden], at [layer]
    by layer     decoder.layers.3.self_attention.linear_qkv.weight             [rows, hidden]
    an expert's  decoder.layers.mlp.experts.experts.linear_fc1.weight          [layers, experts, rows, hidden], at
                                                                               [layer, expert]

Megatron stacks the layers of a homogeneous model. Others, and checkpoints with `singleton_local_shards`, have a key for
each layer, for each expert (`mlp.experts.experts.5.linear_fc1.weight`), and for the two halves of a gated projection
(`linear_fc1.weight_w`, `linear_fc1.weight_v`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from asd_megatron.models.family import Family, ModelShape
from asd_megatron.models.parameters import model_keys, shapes_of
from asd_megatron.models.weights import GateUp, Rule, Shapes, Vocabulary

LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Place:
    """A stored tensor, the leading index at which a parameter is in it, and the sizes of these axes. `halves`: its rows
    are in two tensors, the gate's and the up projection's."""

    key: str
    index: tuple[int, ...] = ()
    leading: tuple[int, ...] = ()
    halves: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the tensors that hold the parameter's rows, in their order."""
        return (f"{self.key}_w", f"{self.key}_v") if self.halves else (self.key,)

    def shape(self, full: Sequence[int]) -> tuple[int, ...]:
        """Of each of these tensors, for a parameter of the shape `full`."""
        return (*self.leading, full[0] // len(self.keys), *full[1:])


@dataclass(frozen=True)
class Parameter:
    """A parameter of the complete model: its rule, and the layer and the expert that it belongs to."""

    rule: Rule
    layer: int | None = None
    expert: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors that it holds."""
        return self.rule.names(self.layer, self.expert)

    @property
    def is_vocabulary(self) -> bool:
        """Whether its rows are tokens, after which a checkpoint may have padding."""
        return isinstance(self.rule.operation, Vocabulary)

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Of the full Megatron tensor; `shapes` without padding."""
        full = [torch.empty(shape, device="meta") for shape in self.rule.operation.shapes(shapes)]
        return tuple(self.rule.operation.shard(full, 0, 1, shapes).shape)

    def places(self, model: ModelShape) -> list[Place]:
        """Everywhere that Megatron may have stored it; the first is where it is written now."""
        experts = 0 if model.experts is None else model.experts.count
        found: list[Place] = []
        for name in reversed(self.rule.megatron):  # last, the name of Transformer Engine's module: all layers use it
            places = [Place(_stored_name(name))]
            for number, count, mark in ((self.layer, model.layers, "{layer}."), (self.expert, experts, "{expert}.")):
                if number is not None:
                    places = [wider for place in places for wider in _stacked_or_not(place, number, count, mark)]
            found += places
        if isinstance(self.rule.operation, GateUp):
            found += [replace(place, halves=True) for place in found]
        return list(dict.fromkeys(found))


def _stacked_or_not(place: Place, number: int, count: int, mark: str) -> Iterator[Place]:
    yield Place(place.key.replace(mark, ""), (*place.index, number), (*place.leading, count))
    yield Place(place.key.replace(mark, f"{number}."), place.index, place.leading)


def _stored_name(name: str) -> str:
    """The key of a parameter, from its name in a module:

    mlp.experts.local_experts.{expert}.linear_fc1.weight, mlp.experts.linear_fc1.weight{expert}
        -> mlp.experts.experts.{expert}.linear_fc1.weight
    """
    if name.endswith("{expert}"):
        head, _, tail = name.removesuffix("{expert}").partition("mlp.experts.")
        return f"{head}mlp.experts.experts.{{expert}}.{tail}"
    return name.replace("experts.local_experts.", "experts.experts.")


def parameters(family: Family, shape: ModelShape) -> list[Parameter]:
    """Every parameter in the order of the forward pass, without the head of a tied model."""
    return [Parameter(family.rules[key.rule], key.layer, key.expert) for key in model_keys(family, shape)]


def full_shapes(parameters: Iterable[Parameter], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The full Hugging Face tensors that these parameters hold: their shapes by name."""
    out: dict[str, tuple[int, ...]] = {}
    for parameter in parameters:
        out.update(zip(parameter.names, parameter.rule.operation.shapes(shapes), strict=True))
    return out


def unpadded(shape: ModelShape) -> Shapes:
    """The sizes of a model's full tensors, whose vocabulary has no padding."""
    return shapes_of(shape, 1)


_NOT_OF_THE_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|initial\.|ema\.|rng_state|rerun_state_machine|iteration")


def is_of_the_model(key: str) -> bool:
    """Whether a stored tensor is a live weight: not of an optimizer, a copy of the weights, a random state or a
    module's extra state."""
    return not (_NOT_OF_THE_MODEL.match(key) or "_extra_state" in key)


_KNOWN = {
    "mixer.": "Mamba layers",
    "linear_kv_down_proj": "multi-latent attention",
    "linear_q_down_proj": "multi-latent attention",
    "mtp.": "multi-token prediction",
    "position_embeddings": "learned positions",
    "shared_experts": "shared experts",
    "expert_bias": "a router with biases",
    ".bias": "biases",
    "layer_norm_bias": "LayerNorm",
    "cross_attention": "cross attention",
    "encoder.": "an encoder",
    "router": "experts",
    "experts": "experts",
    "layernorm": "norms",
    "output_layer": "a head that is not the embedding",
}


def what_it_belongs_to(key: str) -> str:
    """` (Mamba layers)`: the part of a model that an unexpected key is of; empty where that is not known."""
    return next((f" ({what})" for part, what in _KNOWN.items() if part in key), "")
