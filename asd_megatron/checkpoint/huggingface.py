"""Hugging Face model folders, in and out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asd_megatron.distributed.objects import share_outcome
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_folder, to_json
from asd_megatron.models.port import ModelPort

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 4 << 30
OTHER_SUFFIXES = (".json", ".jinja", ".txt", ".model")  # configs, tokenizers of every kind, chat template
OTHER_NAMES = ("LICENSE", "NOTICE")
CHAT_TEMPLATES = "additional_chat_templates"


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The folder's config.json. Raises UserError when there is no folder, no file, or no JSON in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist (from {Path.cwd()}): check model.path")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: it is not a Hugging Face model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; download the model again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object; download the model again")
    return config


class FolderReader:
    """The tensors of a folder's safetensors files, read one at a time. Close it, or use it as a context manager."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._files = ExitStack()
        self._where: dict[str, Any] = {}
        for path in self._paths():
            try:
                handle = self._files.enter_context(safe_open(str(path), framework="pt"))
            except FileNotFoundError:
                raise UserError(f"{path} is missing, though {INDEX} names it: download the model again") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a readable safetensors file ({error}): download it again") from None
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                if name in self._where:
                    raise UserError(f"tensor {name} is in {path} and in {self._where[name][1]}: download them again")
                self._where[name] = (handle, path)

    def _paths(self) -> list[Path]:
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file():  # first, as transformers does
            return [self.folder / SINGLE]
        if index.is_file():
            try:
                files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                if any(Path(name).name != name for name in files):
                    raise ValueError("weight_map names files outside the folder")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is damaged ({error!r}): download it again") from None
            return [self.folder / name for name in sorted(files)]
        raise UserError(
            f"{self.folder} holds neither {SINGLE} nor {INDEX}: convert the model to safetensors "
            "(pickled weights are not read)"
        )

    def keys(self) -> set[str]:
        return set(self._where)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, in the file's dtype. Raises UserError if it is missing or of another shape."""
        if name not in self._where:
            raise UserError(f"{self.folder} has no tensor {name}: the model folder is incomplete")
        handle, path = self._where[name]
        found = tuple(handle.get_slice(name).get_shape())
        if found != shape:
            raise UserError(f"{path}: tensor {name} has shape {found}, config.json asks for {shape}")
        return handle.get_tensor(name)

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> FolderReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_folder(
    port: ModelPort,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Export the port's weights as a complete folder: safetensors files of at most `max_shard_bytes` (a larger tensor
    gets a file of its own) and `source`'s config, generation config, tokenizer, chat templates and licence.

    Atomic: `target` is whole or absent; an older one is replaced. Collective over all ranks; global rank 0 writes. When
    it cannot (disk full, no permission), UserError on every rank.
    """
    target = Path(target)
    tensors = port.export()
    failure: UserError | None = None
    try:
        if port.process_groups.world.rank() == 0:
            with atomic_folder(target, replace=True) as folder:
                copy_others(Path(source), folder, port.dtype)
                write_weights(tensors, folder, max_shard_bytes)
    except (OSError, SafetensorError) as error:
        failure = UserError(
            f"the model cannot be exported to {target}: {error}; free space there, or choose another run.folder"
        )
    except UserError as error:
        failure = error
    finally:
        for _ in tensors:  # every rank takes part in all of its collectives
            pass
    return share_outcome(target, failure, port.process_groups.host)


def copy_others(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Everything of a model folder but its weights; the config names `dtype`, which the weights will have."""
    for path in source.iterdir():
        wanted = path.suffix in OTHER_SUFFIXES or path.name.startswith(OTHER_NAMES)
        if path.is_file() and wanted and path.name != "config.json" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    if (source / CHAT_TEMPLATES).is_dir():
        shutil.copytree(source / CHAT_TEMPLATES, folder / CHAT_TEMPLATES)
    config = read_config(source)
    # Readers that know only transformers 4's name of the key keep finding it.
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(to_json(config, indent=2) + "\n", encoding="utf-8")


def write_weights(tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int) -> None:
    """Safetensors of bounded size; one file without an index when that is enough."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards):05d}.safetensors"
        save_file(pending, str(path), metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", path)  # safetensors writes for the owner alone
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
