"""Parameters of each rank, counted from the model's shape and the layout: exactly those that `models.gpt` builds."""

from __future__ import annotations

from dataclasses import dataclass

from asd_megatron.distributed.layout import Layout
from asd_megatron.models.family import ModelShape
from asd_megatron.models.parameters import check_layout, padded_vocabulary


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by kind. `attention`: both projections with their biases. `norms`: all of a layer and the
    last one. `head`: the last stage's own, also its copy of a tied embedding."""

    embedding: int = 0
    attention: int = 0
    mlp: int = 0
    router: int = 0
    experts: int = 0
    norms: int = 0
    head: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __mul__(self, factor: int) -> Parameters:
        return Parameters(*(a * factor for a in self._values()))

    def _values(self) -> tuple[int, ...]:
        return (self.embedding, self.attention, self.mlp, self.router, self.experts, self.norms, self.head)

    @property
    def total(self) -> int:
        return sum(self._values())

    @property
    def dense(self) -> int:
        """All but the experts: the data- and context-parallel ranks have the same ones."""
        return self.total - self.experts

    @property
    def matrices(self) -> int:
        """Of the layers' matrix products, which FP8 can compute; without router and head."""
        return self.attention + self.mlp + self.experts


def layer_parameters(shape: ModelShape, layout: Layout) -> Parameters:
    """Of one layer on one rank. Tensor parallelism divides both projections of attention and of the MLP, and a norm of
    a complete projection; norms of the hidden size and of heads, and the router, are on every rank. Expert parallelism
    divides the experts, and nothing divides one expert."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    columns = queries + 2 * keys
    attention = columns * shape.hidden + queries * shape.hidden + (columns if shape.qkv_bias else 0)
    norms = 2 * shape.hidden
    if shape.qk_norm == "head":
        norms += 2 * shape.head_dim
    elif shape.qk_norm == "projection":
        norms += (queries + keys) // layout.tensor
    mlp = router = experts = 0
    if shape.experts is None:
        mlp = 3 * shape.hidden * shape.ffn // layout.tensor
    else:
        router = shape.experts.count * shape.hidden
        experts = shape.experts.count // layout.expert * 3 * shape.hidden * shape.experts.ffn
    return Parameters(attention=attention // layout.tensor, mlp=mlp, router=router, experts=experts, norms=norms)


def stage_parameters(shape: ModelShape, layout: Layout) -> tuple[Parameters, ...]:
    """Of one rank of each pipeline stage; all ranks of a stage have equally many.

    The first stage has the embedding, the last one the final norm and the head. A tied head on another stage than the
    embedding is a copy of it. Virtual stages divide a stage's layers, and change nothing here. Raises UserError for
    layouts that cannot shard the model.
    """
    check_layout(shape, layout)
    vocabulary = padded_vocabulary(shape.vocab, layout.tensor) // layout.tensor * shape.hidden
    layers = layer_parameters(shape, layout) * (shape.layers // layout.pipeline)
    stages = [layers] * layout.pipeline
    stages[0] += Parameters(embedding=vocabulary)
    stages[-1] += Parameters(norms=shape.hidden)
    if not (shape.tied and layout.pipeline == 1):
        stages[-1] += Parameters(head=vocabulary)
    return tuple(stages)


def model_parameters(shape: ModelShape) -> int:
    """Of the complete model."""
    return stage_parameters(shape, Layout())[0].total
