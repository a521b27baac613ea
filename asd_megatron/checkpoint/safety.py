"""Reading checkpoint files that somebody else may have written, without running what they contain.

Two parts of the `torch_dist` format are pickles: `.metadata`, which PyTorch reads with plain `pickle.load`, and
objects that are no tensors, which it reads with `torch.load(weights_only=False)`. Extra states of modules, which
Transformer Engine unpickles, are never handed over (`training`).
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from asd_megatron.errors import UserError
from asd_megatron.files import open_regular
from asd_megatron.limits import memory_limit

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


_PICKLE_BYTES = 256 << 20
"""Memory for unpickling, beside _MEMORY_FACTOR times the pickle's size."""
_MEMORY_FACTOR = 64
_HEAP_TYPE = 1 << 9  # of a class's flags: made by a class statement


def unpickle(unpickler: pickle.Unpickler, size: int) -> Any:
    """What an unpickler of allow-listed classes makes of a pickle of `size` bytes. Raises whatever it raises, and
    MemoryError for more than a pickle of this size can need: nine bytes can ask for 64 GiB, by the number of an entry
    of the memo or by `bytearray(10**12)`. (The bound is the main thread's: see `memory_limit`.)"""
    if threading.current_thread() is not threading.main_thread():
        return unpickler.load()
    with memory_limit(_PICKLE_BYTES + _MEMORY_FACTOR * size):
        return unpickler.load()


@contextmanager
def _unchanged_classes() -> Iterator[None]:
    """A pickle can set attributes of every class that it may name. That runs nothing by itself, but would stay when it
    has been read: such changes are undone, and refused with UnpicklingError."""
    before = {known: dict(vars(known)) for known in _known_classes()}
    try:
        yield
    finally:
        changed = [known.__qualname__ for known, attributes in before.items() if _restore(known, attributes)]
        if changed:
            raise pickle.UnpicklingError(f"it changes the class {changed[0]}")


def _known_classes() -> Iterator[type]:
    """The allowed classes that are Python's, whose attributes can be set."""
    for module, names in _ALLOWED.items():
        for name in names:
            found = getattr(sys.modules.get(module), name, None)
            if isinstance(found, type) and found.__flags__ & _HEAP_TYPE:
                yield found


def _restore(known: type, attributes: dict[str, Any]) -> bool:
    """Give a class its attributes back; whether they had changed."""
    now = dict(vars(known))
    added = [name for name in now if name not in attributes and name != "__slotnames__"]  # cached by `copyreg`
    other = [name for name in attributes if name not in now or now[name] is not attributes[name]]
    for name in added:
        delattr(known, name)
    for name in other:
        setattr(known, name, attributes[name])
    return bool(added or other)


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
        with open_regular(path) as file, _unchanged_classes():
            return unpickle(_MetadataUnpickler(file), os.fstat(file.fileno()).st_size)
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
