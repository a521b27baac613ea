"""Reading checkpoint files that somebody else may have written, without running what they contain.

Two parts of the `torch_dist` format are pickles: `.metadata`, which PyTorch reads with plain `pickle.load`, and
objects that are no tensors, which it reads with `torch.load(weights_only=False)`. Extra states of modules, which
Transformer Engine unpickles, are never handed over (`training`).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from asd_megatron.errors import UserError

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "builtins": {"bytearray", "complex", "dict", "frozenset", "list", "set", "slice", "tuple"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of `torch.distributed.checkpoint`'s metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in checkpoint metadata")
        return super().find_class(module, name)


def read_metadata(folder: str | os.PathLike[str]) -> Any:
    """The content of the checkpoint's `.metadata`, made of the classes of tensor descriptions alone; how they are put
    together is not checked. UserError when it is missing, torn, or names anything else."""
    path = Path(folder) / ".metadata"
    try:
        with path.open("rb") as file:
            return _MetadataUnpickler(file).load()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the checkpoint is incomplete, resume from another one") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}; resume from another checkpoint") from error
    except Exception as error:  # whatever a hostile or torn pickle raises
        raise UserError(
            f"{path} is not safe to read: {error}. Do not load this checkpoint unless you trust who wrote it"
        ) from error


@contextmanager
def weights_only() -> Iterator[None]:
    """Inside, every `torch.load` reads tensors and plain containers alone, whatever its caller asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
