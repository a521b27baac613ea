"""Hugging Face model folders, in and out."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asd_megatron.distributed.objects import share_outcome
from asd_megatron.errors import UserError, hub_hint
from asd_megatron.files import atomic_folder, read_json_object, to_json, user_error
from asd_megatron.models.port import ModelPort

log = logging.getLogger(__name__)

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 4 << 30
OTHER_SUFFIXES = (".json", ".jinja", ".txt", ".model")  # configs, tokenizers of every kind, chat template
OTHER_NAMES = ("LICENSE", "NOTICE")
CHAT_TEMPLATES = "additional_chat_templates"


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
    return read_json_object(folder / CONFIG, "download the model again")


class FolderReader:
    """The tensors of a folder's safetensors files, read one at a time. Close it, or use it as a context manager."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._files = ExitStack()
        self._where: dict[str, tuple[Any, Path]] = {}  # tensor name: its file's handle and path
        try:
            for path in weight_files(self.folder):
                self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        try:
            handle = self._files.enter_context(safe_open(str(path), framework="pt"))
            names = list(handle.keys())
        except FileNotFoundError:
            raise UserError(f"{path} is missing, though {INDEX} names it: download the model again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file ({error}): download it again") from None
        for name in names:
            if name in self._where:
                raise UserError(f"tensor {name} is in {path} and in {self._where[name][1]}: download them again")
            self._where[name] = (handle, path)

    def keys(self) -> set[str]:
        return set(self._where)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, in the file's dtype. Raises UserError if it is missing or of another shape."""
        if name not in self._where:
            raise UserError(f"{self.folder} has no tensor {name}: the model folder is incomplete")
        handle, path = self._where[name]
        try:
            found = tuple(handle.get_slice(name).get_shape())
            if found != shape:
                raise UserError(f"{path}: tensor {name} has shape {found}, {CONFIG} asks for {shape}")
            return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: tensor {name} cannot be read ({error}): download it again") from None

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> FolderReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights, by the index where there are several. UserError when there
    are none, or when the index is damaged or names a file outside the folder."""
    with user_error(f"the model folder {folder} cannot be read", "check model.path"):
        if (folder / SINGLE).is_file():  # first, as transformers does
            return [folder / SINGLE]
        if not (folder / INDEX).is_file():
            raise UserError(
                f"{folder} holds neither {SINGLE} nor {INDEX}: convert the model to safetensors "
                "(pickled weights are not read)"
            )
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
    return [folder / name for name in sorted(set(weight_map.values()))]


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
) -> Path:
    """Export the port's weights as a complete folder: safetensors files of at most `max_shard_bytes` (a larger tensor
    gets a file of its own) and `source`'s config, generation config, tokenizer, chat templates and licence.

    Atomic: `target` is complete or absent; an older one is replaced. Collective over all ranks; global rank 0 writes.
    When it cannot (disk full, no permission), UserError on every rank.
    """
    target = Path(target)
    tensors = port.export()
    failure: Exception | None = None
    try:
        if port.process_groups.world.rank() == 0:
            with atomic_folder(target, replace=True) as folder:
                copy_others(Path(source), folder, port.dtype)
                write_weights(tensors, folder, max_shard_bytes)
    except (OSError, SafetensorError) as error:
        failure = UserError(
            f"the model cannot be exported to {target}: {error}; free space there, or choose another run.folder"
        )
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
        if not _belongs(path.resolve(), source):
            left_out.append(path.name)
            continue
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path.resolve(), copy)
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


def _belongs(file: Path, source: Path) -> bool:
    """Whether a resolved file is one of the model folder `source`, or of the cache repository that it is a snapshot of:

    hub/models--Qwen--Qwen3-8B/snapshots/b968826/tokenizer.json -> ../../blobs/aeb13307a71a
    """
    folder = source.resolve()
    caches = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return any(file.is_relative_to(home) for home in (folder, *caches))


def write_weights(tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int) -> None:
    """Safetensors of bounded size; one file without an index when that is enough."""
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
