"""The check of a conversion: the tensors of both sides, then the logits of both models on fixed prompts.

Side A, a checkpoint or a model folder, is run as our Megatron-Core model in this process; side B, a model folder, as
`transformers` runs it; both in float32 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.huggingface import FolderReader, read_config
from asd_megatron.checkpoint.locate import Found
from asd_megatron.checkpoint.safetensors_stream import row_blocks
from asd_megatron.checkpoint.stored_model import StoredModel, WeightsName
from asd_megatron.distributed import device
from asd_megatron.errors import UserError
from asd_megatron.models.families import shape_of
from asd_megatron.models.loading import TensorReader, refusal
from asd_megatron.models.stored import full_shapes, parameters, unpadded
from asd_megatron.records import PackedTokens

LENGTHS = (1, 7, 64, 256, 33, 2, 129, 20)
"""Tokens of the prompts, used over and over; none is longer than the model's positions."""
SEED = 20_240


@dataclass(frozen=True)
class TensorComparison:
    """`differing` has the largest absolute difference of each tensor that is not equal, by name, largest first."""

    tensors: int
    differing: dict[str, float] = field(default_factory=dict)


@contextmanager
def reading(found: Found, hf_config: Any, weights: WeightsName) -> Iterator[TensorReader]:
    """The full tensors of a checkpoint or a model folder, by Hugging Face name."""
    if found.kind == "checkpoint":
        yield StoredModel(DistributedCheckpoint(found.folder), hf_config, weights=weights)
        return
    with FolderReader(found.folder) as reader:
        yield reader


def compare_tensors(a: TensorReader, b: TensorReader, hf_config: Any) -> TensorComparison:
    """Compare every tensor of the model, some rows at a time, in float32 where dtypes differ. UserError when a side
    has other tensors than the model."""
    family, shape = shape_of(hf_config)
    expected = full_shapes(parameters(family, shape), unpadded(shape))
    for side in (a, b):
        message = refusal(side, expected, family=family.name, tied=shape.tied)
        if message is not None:
            raise UserError(message)
    differing = {}
    for name, full in expected.items():
        differences = [_difference(a[name][rows], b[name][rows]) for rows in row_blocks(full)]
        largest = next((d for d in differences if math.isnan(d)), max(differences))
        if largest != 0.0:
            differing[name] = largest
    return TensorComparison(len(expected), dict(sorted(differing.items(), key=lambda item: -item[1])))


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference, in float32; NaN where either has one."""
    if one.dtype == other.dtype and torch.equal(one, other):
        return 0.0
    return (one.float() - other.float()).abs().max().item()


def prompts(count: int, vocabulary: int, positions: int) -> list[list[int]]:
    """`count` fixed sequences of token ids, the same on every machine."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = [min(LENGTHS[number % len(LENGTHS)], positions) for number in range(count)]
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def compare_logits(found: Found, folder: Path, count: int, weights: WeightsName) -> Iterator[tuple[int, float]]:
    """For each prompt its tokens and the largest absolute difference of a logit. One model is in memory at a time."""
    config = read_config(folder)
    _, shape = shape_of(config)
    sequences = prompts(count, shape.vocab, shape.max_positions)
    ours = _megatron_logits(found, config, sequences, weights)
    theirs = _transformers_logits(folder, sequences)
    for sequence, one, other in zip(sequences, ours, theirs, strict=True):
        yield len(sequence), (one - other).abs().max().item()


def _megatron_logits(found: Found, config: Any, sequences: Sequence[list[int]], weights: WeightsName) -> list[Tensor]:
    """[tokens, vocabulary] of each sequence."""
    from asd_megatron.distributed import layout as layouts
    from asd_megatron.models.port import ModelPort

    layout = layouts.Layout()
    try:
        port = ModelPort.build(config, layouts.init(layout), layout, dtype=torch.float32, layers="local")
        with reading(found, config, weights) as reader:
            port.load(reader)
        with port.scoring():
            head = port.head_weight()[: port.vocab_size]
            return [(port.forward(port.chunks[0], _pack(sequence))[:, 0] @ head.t()).cpu() for sequence in sequences]
    finally:
        layouts.shutdown()


def _pack(sequence: list[int]) -> PackedTokens:
    """One sequence as a pack of its own."""
    where, length = device.device(), len(sequence)
    return PackedTokens(
        input_ids=torch.tensor(sequence, device=where),
        position_ids=torch.arange(length, device=where),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32, device=where),
        max_seqlen=length,
    )


def _transformers_logits(folder: Path, sequences: Sequence[list[int]]) -> Iterator[Tensor]:
    """[tokens, vocabulary] of each sequence."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"transformers cannot load {folder}: {' '.join(str(error).split()):.400}") from error
    model.eval()
    with torch.no_grad():
        for sequence in sequences:
            yield model(torch.tensor([sequence])).logits[0].float()
