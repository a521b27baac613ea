"""Weights through a folder that trainer and servers see under the same path."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError

from asd_megatron.checkpoint.huggingface import MAX_SHARD_BYTES, copy_others, write_weights
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_folder
from asd_megatron.rollout.sglang.weight_sync.protocol import (
    SLACK_SECONDS,
    NamedTensors,
    Receiver,
    ask,
    ask_all,
    drain,
)
from asd_megatron.rollout.sglang.weight_sync.quantize import mark_quantized


class DiskTransport:
    """`Transport` over safetensors files and SGLang's `/update_weights_from_disk`.

    Each version is a complete model folder of its own, `folder`/LABEL, renamed into place when it is complete; older
    ones that this object wrote are removed once the servers have read the new one. `folder` must be on a file system
    that every server sees under that path.

    source: the model folder whose config and tokenizer are copied. quantized: the tensors are in block-wise FP8, as
    `quantize.quantized` yields them. timeout: seconds for a server to load the model.
    """

    needs_session = False

    def __init__(
        self,
        folder: str | os.PathLike[str],
        source: str | os.PathLike[str],
        *,
        quantized: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        timeout: float = 600.0,
    ) -> None:
        self._folder, self._source, self._quantized = Path(folder).resolve(), Path(source), quantized
        self._max_shard_bytes, self._timeout = max_shard_bytes, timeout
        self._written: set[Path] = set()

    def send(self, receivers: Sequence[Receiver], tensors: NamedTensors, label: str) -> dict[str, str]:
        tensors = iter(tensors)
        first = next(tensors, None)
        if not receivers or first is None:
            drain(tensors)
            return {}
        target = self._folder / label
        self._written.add(target)
        try:
            with atomic_folder(target, replace=True) as folder:
                copy_others(self._source, folder, first[1].dtype)  # an embedding's, which is never quantised
                if self._quantized:
                    mark_quantized(folder)
                write_weights(chain([first], tensors), folder, self._max_shard_bytes)
        except (OSError, SafetensorError) as error:
            drain(tensors)
            raise UserError(
                f"weights for the servers cannot be written to {target}: {error}; free space there, or set another "
                "rollout.weight_sync_folder"
            ) from error
        body = {"model_path": str(target), "load_format": "auto", "flush_cache": True}
        _, failures = ask_all(
            receivers,
            lambda r: ask(r, "/update_weights_from_disk", body, self._timeout),
            self._timeout + SLACK_SECONDS,
        )
        self._remove(self._written - {target})
        return failures

    def close(self) -> None:
        """Remove the versions written: no server reads them again, a restarted one loads its original model."""
        self._remove(set(self._written))

    def _remove(self, paths: set[Path]) -> None:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)
        self._written -= paths
