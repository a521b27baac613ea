"""The full tensors that a model is loaded from, and the checks on them before any is copied."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from asd_megatron.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHOWN = 5  # entries of a list that a message shows
BLOCK_BYTES = 16 << 20  # compared at a time, of each of two tensors
THE_FOLDER = "the model folder"

Progress = Callable[[int, int], None]
"""Called with (bytes done, all bytes)."""


class FullTensor(Protocol):
    """A full tensor, in memory or in a file, whose shape and dtype are known without reading it. A slice reads only
    what it holds."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype | str:
        """A text for a type that is not floating-point, in which no model is loaded."""
        ...

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor: ...


class TensorReader(Mapping[str, FullTensor]):
    """Full tensors by Hugging Face name that know where they come from. A plain dictionary of tensors is as good to
    load from."""

    name: str = THE_FOLDER
    problems: Sequence[str] = ()
    """What is wrong with the source itself, one sentence each."""
    lost: Collection[str] = ()
    """Names that are not here for a reason that is among `problems`."""

    def place(self, name: str) -> str:
        """Where the tensor is, for messages."""
        return self.name


def refusal(
    tensors: Mapping[str, FullTensor], expected: Mapping[str, tuple[int, ...]], *, family: str, tied: bool
) -> str | None:
    """Everything that keeps `tensors` from being loaded, in one message; None when they are exactly the `expected` ones
    (full shapes by name), in floating-point numbers, and their source is undamaged.

    A tied model's folder may repeat the embedding as its head, if the two are equal. What names, shapes and types do
    not show is not seen: two tensors (two experts) of equal shape under each other's names, or altered numbers.
    """
    reader = tensors if isinstance(tensors, TensorReader) else None
    problems: Sequence[str] = () if reader is None else reader.problems
    lost: Collection[str] = () if reader is None else reader.lost
    source, place = (THE_FOLDER, lambda name: THE_FOLDER) if reader is None else (reader.name, reader.place)
    out = list(problems)
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in tensors and name not in lost]
    if missing and (len(tensors) or not problems):
        out.append(f"{source} is incomplete: it has no tensor {some(missing)}; download the model again")
    repeated = {HEAD: expected[EMBEDDING]} if tied and HEAD in tensors else {}
    wanted = {**expected, **repeated}
    unknown = [name for name in tensors if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        out.append(
            f"{source} holds tensors that a {family} model of its config.json does not have: "
            f"{some([f'{name} (in {place(name)})' for name in sorted(unknown)])}; is that config.json of another model?"
        )
    known = {name: tensors[name] for name in wanted if name in tensors}
    misshapen = [
        f"tensor {name} in {place(name)} has shape {tuple(tensor.shape)}, config.json asks for {wanted[name]}"
        for name, tensor in known.items()
        if tuple(tensor.shape) != wanted[name]
    ]
    if misshapen:
        out.append(f"{some(misshapen)}; is that config.json of another model?")
    quantized = [
        f"tensor {name} in {place(name)} has type {tensor.dtype}"
        for name, tensor in known.items()
        if tensor.dtype not in FLOATING
    ]
    if quantized:  # copying them would succeed and give nonsense
        out.append(f"{some(quantized)}: quantized weights cannot be trained, use the unquantized model")
    if repeated and not (problems or misshapen or quantized) and EMBEDDING in tensors:
        try:
            out += _differing_head(tensors)
        except UserError as error:  # of reading
            out.append(str(error))
    return in_one_message(out) if out else None


def _differing_head(tensors: Mapping[str, FullTensor]) -> list[str]:
    """`transformers` unties a head that differs from the embedding, so it is refused."""
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    rows = max(BLOCK_BYTES // max(4 * embedding.shape[1], 1), 1)
    for start in range(0, embedding.shape[0], rows):
        block = slice(start, start + rows)
        if not bool((head[block] == embedding[block]).all()):
            return [
                "config.json ties the embedding to the head (tie_word_embeddings), but the model folder holds an "
                f"{HEAD} that differs from {EMBEDDING}: set tie_word_embeddings to false there"
            ]
    return []


def in_one_message(problems: Sequence[str]) -> str:
    """One as it is, several as a list."""
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join([f"{THE_FOLDER} cannot be loaded:", *problems])


def some(entries: Sequence[str]) -> str:
    """The first of the entries, and how many there are."""
    text = ", ".join(entries[:SHOWN])
    more = len(entries) - SHOWN
    return text if more <= 0 else f"{text} and {more} more ({len(entries)} in all)"
