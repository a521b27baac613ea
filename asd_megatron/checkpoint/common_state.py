"""What Megatron stores beside the tensors: read for its plain values, without looking up any class. It is in
`common.pt`, or from Megatron-Core 0.20 on an object among the tensors.

Megatron-LM keeps its arguments there as an `argparse.Namespace` with enumerations and dtypes inside, which PyTorch's
safe reader refuses. Here every object that is no plain value or container becomes an `Opaque`: its class is neither
imported nor called, so nothing in the file can run.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import torch

from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.safety import unpickle

_CONTAINERS = {
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
}
_MOST_BYTES = 64 << 20  # of the pickle, tensors apart


class Opaque:
    """Stands for an object of the class `origin`; `fields` are its attributes where it was pickled with a dict."""

    origin = ""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.fields: dict[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.fields = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        """Items of a dict or list of an unknown class are dropped."""

    def append(self, item: Any) -> None:
        """See `__setitem__`."""

    def extend(self, items: Any) -> None:
        """See `__setitem__`."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _CONTAINERS.get((module, name)) or type("Opaque", (Opaque,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return Opaque()  # a tensor's storage


def _file(checkpoint: DistributedCheckpoint) -> Any:
    """Path or file of the common state. StopIteration where there is none."""
    path = checkpoint.folder / "common.pt"
    if path.is_file():
        return path
    key = next(key for key in checkpoint.objects if key.startswith("common_state/"))
    return io.BytesIO(checkpoint.object_bytes(key, _MOST_BYTES))


def load_common(checkpoint: DistributedCheckpoint) -> Any:
    """The common state of a training checkpoint: plain values, containers and tensors. Raises whatever a missing, torn
    or hostile file raises."""
    found = torch.load(_file(checkpoint), map_location="cpu", weights_only=True)
    return found[0] if isinstance(found, list) and found else found  # an object is stored in a list


def read_common(checkpoint: DistributedCheckpoint) -> dict[str, Any]:
    """The common state of a checkpoint; empty when it cannot be read: nothing that is converted depends on it."""
    try:
        with zipfile.ZipFile(_file(checkpoint)) as archive:
            entry = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
            if entry.file_size > _MOST_BYTES:
                return {}
            found = unpickle(_Reader(io.BytesIO(archive.read(entry))), entry.file_size)
    except Exception:  # whatever a missing, torn or hostile file raises
        return {}
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, dict) else {}


def arguments(common: dict[str, Any]) -> dict[str, Any]:
    """Megatron-LM's arguments that are numbers or text, by name."""
    fields = getattr(common.get("args"), "fields", {})
    return {str(k): v for k, v in fields.items() if isinstance(v, str | int | float | bool)}
