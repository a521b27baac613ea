"""Sampling through Megatron's own modules: for Transformer Engine's layers, whose numbers `models.decoder` does not
reproduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from asd_megatron.models.attention import Attends, CachedAttention, CacheHolder
from asd_megatron.models.family import ModelShape
from asd_megatron.models.layers import softmax_scale
from asd_megatron.models.rope import Rotation

SEQUENCE_PARALLEL_FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


class ModuleStack:
    """A chunk's embedding and layers as Megatron's modules (a `models.decoder.Stack`)."""

    def __init__(self, chunk: Any, holder: CacheHolder, rotation: Rotation) -> None:
        self._chunk, self._holder, self._rotation = chunk, holder, rotation

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden: Tensor = self._chunk.embedding(input_ids=input_ids, position_ids=position_ids)
        return hidden

    def run(self, hidden: Tensor, position_ids: Tensor, cache: Attends, rows: int) -> Tensor:
        self._holder.cache, self._holder.rows = cache, rows
        if not self._chunk.pre_process:
            self._chunk.decoder.set_input_tensor(hidden)
        rotary = self._rotation.angles(position_ids.transpose(0, 1))
        out: Tensor = self._chunk.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
        return out


@contextmanager
def sampling_modules(chunk: Any, config: Any, shape: ModelShape, rotation: Rotation) -> Iterator[ModuleStack]:
    """The chunk prepared for sampling: evaluation mode, the engine's cache in place of core attention, no sequence
    parallelism (a single token cannot be sharded). Restored on leaving.
    """
    saved: list[tuple[Any, str, Any]] = [(config, "sequence_parallel", config.sequence_parallel)]
    saved.append((config, "apply_rope_fusion", config.apply_rope_fusion))
    for module in chunk.modules():
        saved += [(module, f, True) for f in SEQUENCE_PARALLEL_FLAGS if getattr(module, f, False) is True]
    attentions = [layer.self_attention for layer in chunk.decoder.layers]
    cores = [a.core_attention for a in attentions]
    holder = CacheHolder()
    try:
        for owner, name, _ in saved:
            setattr(owner, name, False)
        for attention in attentions:
            kind = shape.attention[attention.layer_number - 1]
            scale = softmax_scale(shape, kind)
            attention.core_attention = CachedAttention(holder, attention.layer_number, scale, kind.window)
        with evaluating([chunk]):
            yield ModuleStack(chunk, holder, rotation)
    finally:
        for attention, core in zip(attentions, cores, strict=True):
            attention.core_attention = core
        for owner, name, value in saved:
            setattr(owner, name, value)
        chunk.decoder.set_input_tensor(None)


@contextmanager
def evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode restored on leaving. Sets `training` in the modules' dictionaries:
    torch's `eval()` takes a tenth of a small model's forward pass."""
    before = [(module.__dict__, module.training) for chunk in chunks for module in chunk.modules()]
    try:
        for attributes, _ in before:
            attributes["training"] = False
        yield
    finally:
        for attributes, mode in before:
            attributes["training"] = mode
