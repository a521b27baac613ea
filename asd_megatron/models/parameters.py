"""The parameters of a complete model: what they are called here, their sizes, and which layouts can shard them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from asd_megatron.models.family import Family, ModelShape
from asd_megatron.models.weights import Shapes


class Key(NamedTuple):
    """A parameter of the complete model: the index of its rule in the family, its global layer and expert (None:
    outside the layers, no expert's)."""

    rule: int
    layer: int | None = None
    expert: int | None = None


def shapes_of(shape: ModelShape, tensor: int) -> Shapes:
    """The sizes of a model's tensors under tensor parallelism `tensor`."""
    experts = shape.experts
    return Shapes(
        shape.hidden,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.ffn,
        shape.vocab,
        padded_vocabulary(shape.vocab, tensor),
        experts=0 if experts is None else experts.count,
        expert_ffn=0 if experts is None else experts.ffn,
    )


def padded_vocabulary(vocab: int, tensor: int) -> int:
    """The rows of the embedding and the head: a multiple of the tensor-parallel size."""
    return -(-vocab // tensor) * tensor


def model_keys(family: Family, shape: ModelShape) -> Iterator[Key]:
    """All parameters of a model in the order of the forward pass; the head of a tied model is left out."""
    rules = family.rules
    per_layer = [number for number, rule in enumerate(rules) if rule.per_layer]
    per_expert = [number for number in per_layer if rules[number].per_expert]
    experts = 0 if shape.experts is None else shape.experts.count
    for number in range(per_layer[0]):
        yield Key(number)
    for layer in range(shape.layers):
        for number in per_layer:
            if number not in per_expert:
                yield Key(number, layer)
        for expert in range(experts):
            for number in per_expert:
                yield Key(number, layer, expert)
    for number in range(per_layer[-1] + 1, len(rules)):
        if not (shape.tied and rules[number].huggingface == ("lm_head.weight",)):
            yield Key(number)


def check_layout(shape: ModelShape, layout: Layout) -> None:
    """Refuse what cannot be sharded; recipes are checked earlier, this is for callers without one."""
    sizes = [(shape.heads, "attention heads"), (shape.kv_heads, "key/value heads")]
    if shape.experts is None:
        sizes.append((shape.ffn, "ffn size"))
    for size, name in sizes:
        if size % layout.tensor:
            raise UserError(
                f"tensor parallelism {layout.tensor} does not divide the model's {name} ({size}): set"
                " parallelism.tensor to a divisor of it"
            )
    stages = layout.pipeline * (layout.virtual_pipeline or 1)
    if shape.layers % stages:
        raise UserError(
            f"{stages} pipeline stages do not divide the model's {shape.layers} layers: set parallelism.pipeline and"
            " parallelism.virtual_pipeline so that their product does"
        )
    experts = 1 if shape.experts is None else shape.experts.count
    if experts % layout.expert:
        what = "has no experts" if shape.experts is None else f"has {experts} experts"
        raise UserError(f"expert parallelism {layout.expert}: the model {what}; set parallelism.expert to a divisor")
    if shape.experts is not None and layout.tensor > 1 and not layout.sequence_parallel:
        raise UserError(
            "a model with experts needs sequence parallelism with tensor parallelism: set "
            "parallelism.sequence_parallel true"
        )
