"""The checks on a model folder's tensors before they are copied into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from asd_megatron.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHOWN = 5  # names that a message lists


class TensorReader(Protocol):
    """A source of full tensors by Hugging Face name (a model folder, a dictionary)."""

    def keys(self) -> set[str]: ...

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor; raises UserError, naming where it looked, if it is missing or of another shape."""
        ...


def check_names(reader: TensorReader, expected: Mapping[str, tuple[int, ...]], *, family: str, tied: bool) -> None:
    """The reader has exactly the `expected` tensors (full shapes by name). Raises UserError for missing and unknown
    ones.

    A tied model's folder may repeat the embedding as its head, if the two are equal.
    """
    found = reader.keys()
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(f"the model folder is incomplete: it has no tensor {_some(missing)}; download the model again")
    ignored = {HEAD} if tied else set()
    unknown = sorted(n for n in found - set(expected) - ignored if not n.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise UserError(
            f"the model folder holds tensors that a {family} model of its config.json does not have: "
            f"{_some(unknown)}; is that config.json of another model?"
        )
    if HEAD in found & ignored:
        _check_repeated_head(reader, expected[EMBEDDING])


def _check_repeated_head(reader: TensorReader, shape: tuple[int, ...]) -> None:
    """`transformers` unties a head that differs from the embedding, so it is refused."""
    if not torch.equal(reader.get(HEAD, shape), reader.get(EMBEDDING, shape)):
        raise UserError(
            f"config.json ties the embedding to the head (tie_word_embeddings), but the model folder holds an {HEAD} "
            f"that differs from {EMBEDDING}: set tie_word_embeddings to false there"
        )


def read_unquantized(reader: TensorReader, name: str, shape: tuple[int, ...]) -> Tensor:
    """The full tensor. Raises UserError for quantized numbers: copying them would succeed and give nonsense."""
    tensor = reader.get(name, shape)
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise UserError(
            f"tensor {name} of the model folder has type {tensor.dtype}: quantized weights cannot be trained, use the "
            "unquantized model"
        )
    return tensor


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
