"""The file run_state.json of a checkpoint: the run's own state, and what must be known before the tensors are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from asd_megatron.checkpoint import copies_state
from asd_megatron.checkpoint.lineage import RUN_STATE, is_one_of_a_run
from asd_megatron.checkpoint.manifest import MANIFEST, damage, damaged
from asd_megatron.errors import UserError
from asd_megatron.files import read_json_object
from asd_megatron.models.weight_copies import CopyName

FORMAT = 1


@dataclass(frozen=True)
class RunStateFile:
    """The content of run_state.json. A folder without it is no checkpoint.

    Attributes:
        distributed_optimizer: the kind of optimizer whose state the checkpoint stores.
        copies: the copies of weights that it stores.
        run_state: numbers, strings, lists and string-keyed dicts.
        has_manifest: whether the checkpoint was written with a manifest; those of earlier versions were not.
    """

    distributed_optimizer: bool
    copies: tuple[CopyName, ...]
    run_state: dict[str, Any]
    has_manifest: bool = True

    def text(self, step: int) -> str:
        """The file's text, for the checkpoint of `step`. Raises ValueError for a run state that JSON would change."""
        _check_plain(self.run_state, "run_state")
        content = {
            "format": FORMAT,
            "step": step,
            "distributed_optimizer": self.distributed_optimizer,
            "weight_copies": list(self.copies),
            "manifest": self.has_manifest,
            "run_state": self.run_state,
        }
        return json.dumps(content, indent=2)  # with Python's NaN and Infinity: the state must come back as it was

    @classmethod
    def read(cls, path: Path) -> Self:
        """That of the checkpoint `path`. Raises UserError for a folder that is no checkpoint or of another format, a
        DamagedCheckpoint where the file cannot be understood, or is missing beside others of a checkpoint or in a place
        for one."""
        file = path / RUN_STATE
        others = not path.is_dir() or (path / MANIFEST).exists() or (path / ".metadata").exists()
        if not file.is_file() and (others or is_one_of_a_run(path)):
            raise damaged(path, f"{RUN_STATE} is missing" if path.is_dir() else "its folder is missing")
        if not file.is_file():
            raise UserError(
                f"{path} is no training checkpoint ({RUN_STATE} is missing): give a folder checkpoints/step_NNNNNN of"
                " a run"
            )
        with damage(path):
            stored = read_json_object(file, "resume from another checkpoint", non_finite=True)
        if stored.get("format") != FORMAT:
            raise UserError(
                f"{file} is not of format {FORMAT}: another version of asd_megatron wrote it; resume with that version"
            )
        distributed, run_state = stored.get("distributed_optimizer"), stored.get("run_state")
        names = stored.get("weight_copies", [])  # absent in checkpoints of earlier versions
        if not (isinstance(distributed, bool) and isinstance(run_state, dict) and isinstance(names, list)):
            raise damaged(path, f"{file} lacks what it should have; resume from another checkpoint")
        copies = tuple(name for name in copies_state.NAMES if name in names)
        return cls(distributed, copies, run_state, stored.get("manifest") is True)


def _check_plain(value: Any, where: str) -> None:
    """ValueError for what JSON would change or refuse (tuples may become lists)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}: a checkpoint keeps string keys only")
            _check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_plain(inner, f"{where}[{i}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(f"{where} is a {type(value).__name__}: a checkpoint keeps numbers, strings, lists and dicts")
