"""Hugging Face model folders, in and out."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asd_megatron.checkpoint.safetensors_stream import INDEX, SINGLE, write_parts
from asd_megatron.distributed.objects import share_outcome
from asd_megatron.errors import UserError, hub_hint
from asd_megatron.files import (
    atomic_folder,
    check_own_file,
    foreign_file,
    is_inside,
    read_json_object,
    system_reason,
    to_json,
    user_error,
)
from asd_megatron.models.loading import Progress, TensorReader, in_one_message, some
from asd_megatron.models.port import ModelPort

log = logging.getLogger(__name__)

CONFIG = "config.json"
MAX_SHARD_BYTES = 4 << 30
MAPPED_BYTES = 256 << 20
OTHER_SUFFIXES = (".json", ".jinja", ".txt", ".model")  # configs, tokenizers of every kind, chat template
OTHER_NAMES = ("LICENSE", "NOTICE")
CHAT_TEMPLATES = "additional_chat_templates"
_FLOATING = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The folder's config.json. Raises UserError when there is no folder, no such file, or no JSON object in it; its
    values are the family's to check."""
    folder = Path(folder)
    with user_error(f"the model folder {folder} cannot be read", "check model.path"):
        if not folder.is_dir():
            raise UserError(
                f"model folder {folder} does not exist (from {Path.cwd()}): check model.path{hub_hint(folder)}"
            )
        if not (folder / CONFIG).exists():
            raise UserError(f"{folder} has no {CONFIG}: it is not a Hugging Face model folder")
    check_own_file(folder / CONFIG, folder)
    return read_json_object(folder / CONFIG, "download the model again")


class FileTensor:
    """A tensor of a `FolderReader`: shape and dtype as the file's header says, slices read when they are taken.

    `dtype` is safetensors' name of a type that is not floating-point.
    """

    def __init__(self, reader: FolderReader, name: str, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        self._reader, self.name, self.path, self.shape = reader, name, path, shape
        self.dtype: torch.dtype | str = _FLOATING.get(dtype, dtype)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """A view of the mapped file. Raises UserError when the folder has `problems`, or cannot be read any more."""
        return self._reader.read(self, index)


class FolderReader(TensorReader):
    """The tensors of a folder's safetensors files by name. Close it, or use it as a context manager.

    Opening it reads the headers of all files, no weights. UserError when there is nothing to read: no folder, no
    safetensors, a damaged index. Damage of single files is collected in `problems`, so that it can be told together
    with what is wrong with the tensors (`models.loading.refusal`); meanwhile no tensor can be read.

    Files are mapped, not copied. The mapped pages count as the process's memory (file-backed, the system may drop
    them), so the mappings are given back after every MAPPED_BYTES that were taken: what stays are slices that the
    caller still holds.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.name = f"the model folder {self.folder}"
        self._tensors: dict[str, FileTensor] = {}
        self._files = ExitStack()
        self._mapped: dict[Path, Any] = {}  # handles of safe_open
        self._taken = 0  # bytes, of these mappings
        self._stamps: dict[Path, tuple[int, int, int]] = {}
        index = read_index(self.folder)
        names = [SINGLE] if index is None else sorted(set(index.values()))
        held: dict[str, set[str]] = {}  # tensors of each file that can be read
        missing: list[str] = []
        unreadable: list[str] = []
        twice: list[str] = []
        outside: list[str] = []
        for path in (self.folder / name for name in names):
            try:
                foreign = foreign_file(path, self.folder)
                if foreign is not None:
                    outside.append(foreign)
                    continue
                held[path.name] = self._list(path, twice)
            except FileNotFoundError:
                missing.append(f"{path} is missing")
            except (SafetensorError, OSError) as error:
                unreadable.append(f"{path} is not a readable safetensors file ({error})")
        self.close()
        self.problems: list[str] = outside
        if missing:
            self.problems.append(f"{some(missing)}, though {INDEX} names it: download the model again")
        if unreadable:
            self.problems.append(f"{some(unreadable)}: download it again")
        if twice:
            self.problems.append(f"{some(twice)}: download them again")
        if index is not None:
            self._compare(index, held)

    def _list(self, path: Path, twice: list[str]) -> set[str]:
        status = path.stat()
        self._stamps[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
        handle = self._files.enter_context(safe_open(str(path), framework="pt"))
        names = handle.keys()
        for name in names:
            header = handle.get_slice(name)
            if name in self._tensors:
                twice.append(f"tensor {name} is in {path} and in {self._tensors[name].path}")
            else:
                self._tensors[name] = FileTensor(self, name, path, tuple(header.get_shape()), header.get_dtype())
        return set(names)

    def _compare(self, index: Mapping[str, str], held: Mapping[str, set[str]]) -> None:
        """Find where the index and the files that can be read disagree."""
        self.lost = {name for name in index if name not in self._tensors}
        misplaced = []
        for name, file in index.items():
            if file in held and name not in held[file]:
                instead = f" (it is in {self._tensors[name].path.name})" if name in self._tensors else ""
                misplaced.append(f"tensor {name} is not in {self.folder / file}{instead}")
        unlisted = [f"tensor {t.name} is in {t.path}" for t in self._tensors.values() if t.name not in index]
        if misplaced:
            self.problems.append(f"{some(misplaced)}, though {INDEX} says so: download the model again")
        if unlisted:
            self.problems.append(f"{some(unlisted)}, but {INDEX} does not list it: download the model again")

    def __getitem__(self, name: str) -> FileTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def place(self, name: str) -> str:
        return str(self._tensors[name].path)

    def read(self, tensor: FileTensor, index: slice | tuple[slice, ...]) -> Tensor:
        """A slice of one of the tensors."""
        if self.problems:
            raise UserError(in_one_message(self.problems))
        rows = range(*(index if isinstance(index, slice) else index[0]).indices(tensor.shape[0]))
        width = tensor.dtype.itemsize if isinstance(tensor.dtype, torch.dtype) else 1
        taken = len(rows) * math.prod(tensor.shape[1:]) * width  # a slice of columns touches the pages of its rows
        if self._taken + taken > MAPPED_BYTES:
            self.close()
        self._taken += taken
        try:
            return self._map(tensor.path).get_slice(tensor.name)[index]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{tensor.path}: tensor {tensor.name} cannot be read ({error}): download it again"
            ) from None

    def _map(self, path: Path) -> Any:
        if path not in self._mapped:
            status = path.stat()
            if self._stamps[path] != (status.st_ino, status.st_size, status.st_mtime_ns):
                raise UserError(f"{path} has changed since it was opened: start again when it is complete")
            self._mapped[path] = self._files.enter_context(safe_open(str(path), framework="pt"))
        return self._mapped[path]

    def close(self) -> None:
        """Give back the mappings; slices that the caller holds keep theirs."""
        self._mapped.clear()
        self._files.close()
        self._taken = 0

    def __enter__(self) -> FolderReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_index(folder: Path) -> dict[str, str] | None:
    """The name of the safetensors file that holds each tensor; None where one file without an index holds all. Raises
    UserError when there are no safetensors, or when the index is damaged or names a file outside the folder."""
    with user_error(f"the model folder {folder} cannot be read", "check model.path"):
        if (folder / SINGLE).is_file():  # first, as transformers does
            return None
        if not (folder / INDEX).is_file():
            raise UserError(
                f"{folder} holds neither {SINGLE} nor {INDEX}: convert the model to safetensors "
                "(pickled weights are not read)"
            )
    check_own_file(folder / INDEX, folder)
    weight_map = read_json_object(folder / INDEX, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{folder / INDEX} is damaged (`weight_map` must be an object of file names): download it again"
        )
    for name in weight_map.values():
        if not (isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name):
            raise UserError(
                f"{folder / INDEX} is damaged (`weight_map` names {name!r:.80}, which is no safetensors file in the "
                "folder): download it again"
            )
    return weight_map


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights. Raises UserError as `read_index`, and for links out of the
    folder. They may be missing."""
    index = read_index(folder)
    paths = [folder / name for name in ([SINGLE] if index is None else sorted(set(index.values())))]
    with user_error(f"the model folder {folder} cannot be read", "check model.path"):
        foreign = [reason for path in paths if os.path.lexists(path) and (reason := foreign_file(path, folder))]
    if foreign:
        raise UserError(in_one_message(foreign))
    return paths


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a config and every file of weights that it should."""
    folder = Path(folder)
    try:
        return (folder / CONFIG).is_file() and all(path.is_file() for path in weight_files(folder))
    except UserError:
        return False


def write_folder(
    port: ModelPort,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Export the port's weights as a complete folder: safetensors files of at most `max_shard_bytes` (a larger tensor
    gets a file of its own) and `source`'s config, generation config, tokenizer, chat templates and licence.

    Atomic: `target` is complete or absent; an older one is replaced. Collective over all ranks; global rank 0 writes,
    one tensor at a time, and holds what `port.export` does. When it cannot (disk full, no permission), UserError on
    every rank.

    progress: told on global rank 0 how many bytes of weights are written.
    """
    target = Path(target)
    tensors = port.export()
    failure: Exception | None = None
    try:
        if port.process_groups.world.rank() == 0:
            with atomic_folder(target, replace=True) as folder:
                copy_others(Path(source), folder, port.dtype)
                write_parts(tensors, port.expected(), port.dtype, folder, max_shard_bytes, progress)
    except OSError as error:
        reason = system_reason(error)
        failure = UserError(f"the model cannot be exported to {target} ({reason}): free space there")
    except Exception as error:
        failure = error
    finally:
        for _ in tensors:  # every rank takes part in all of its collectives
            pass
    return share_outcome(target, failure, port.process_groups.host)


def copy_others(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Everything of a model folder but its weights; the config names `dtype`, which the weights will have.

    A model folder may come from anybody: a link in it is followed only to a file of the same model, never to, say,
    /etc/passwd. What is left out for that is logged.
    """
    config = read_config(source)
    left_out = []
    for path in sorted([*source.iterdir(), *(source / CHAT_TEMPLATES).glob("*.jinja")]):
        wanted = path.suffix in OTHER_SUFFIXES or path.name.startswith(OTHER_NAMES)
        if not (wanted and path.is_file()) or path.name == CONFIG or path.name.endswith(".index.json"):
            continue
        if not is_inside(path.resolve(), source):
            left_out.append(path.name)
            continue
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        with user_error(f"{path} cannot be read", "check its permissions, or download it again"):
            content = path.resolve().read_bytes()
        copy.write_bytes(content)
    if left_out:
        _warn_of_links(source, tuple(left_out))
    # Readers that know only transformers 4's name of the key keep finding it.
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    (folder / CONFIG).write_text(to_json(config, indent=2) + "\n", encoding="utf-8")


@cache  # once: weights for servers may be written every step
def _warn_of_links(source: Path, names: tuple[str, ...]) -> None:
    log.warning(
        "left out of the exported model: %s, since a link leads out of the model folder %s; put the file itself there, "
        "or into the exported folder",
        ", ".join(names),
        source,
    )


def write_weights(tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int) -> None:
    """Safetensors of bounded size; one file without an index when that is enough. For streams whose tensors are not
    known beforehand: it holds a file's tensors until the file is complete (`safetensors_stream` holds one tensor)."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards):05d}.safetensors"
        save_file(pending, str(path), metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG, path)  # safetensors writes for the owner alone
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if pending and size + bytes_ > max_shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.cpu().contiguous()
        size += bytes_
        total += bytes_
    flush()
    if len(shards) == 1:
        os.replace(folder / "shard-00000.safetensors", folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{number:05d}.safetensors", folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(to_json(index, indent=2) + "\n", encoding="utf-8")
