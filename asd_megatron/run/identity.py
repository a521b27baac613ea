"""What the samples of an evaluation depend on: two evaluations with equal identities give the same samples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asd_megatron.checkpoint.huggingface import CONFIG, weight_files
from asd_megatron.checkpoint.manifest import MANIFEST
from asd_megatron.config import AnyRecipe, Recipe
from asd_megatron.files import to_json, user_error
from asd_megatron.records import Problem, Prompt
from asd_megatron.run.evaluation_sets import EvaluationSet, success_threshold

BLOCKS, BLOCK_BYTES = 256, 4096
"""So many blocks of a file, evenly spaced, enter its digest: any training step changes numbers in all of them."""
LIMITS = ("workers", "memory_gb")
"""Keys of a reward that decide no score."""


def weights_digest(weights: Path) -> str:
    """Of a checkpoint its manifest, which has the checksums of all files; of other folders, sizes and evenly spaced
    blocks of config.json and the files of weights. 16 hex digits."""
    found = hashlib.blake2b(digest_size=8)
    manifest = weights / MANIFEST
    with user_error(f"the weights in {weights} cannot be read", "start the command again if a run has removed them"):
        if manifest.is_file():
            found.update(manifest.read_bytes())
            return found.hexdigest()
        for path in sorted(weights.glob("*.distcp")) or [*weight_files(weights), weights / CONFIG]:
            size = path.stat().st_size
            found.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for block in range(BLOCKS):
                    file.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
                    found.update(file.read(BLOCK_BYTES))
    return found.hexdigest()


def identity(
    recipe: AnyRecipe, given: EvaluationSet, prompts: Sequence[Prompt], *, weights: str, dtype: str, step: int
) -> dict[str, Any]:
    """weights: their digest; step: training steps, which enter the sampling noise. The layout is no part of it, nor is
    the batch: samples do not depend on them, but for ties in the last bits."""
    p = given.params
    reward = given.reward if given.reward is not None else (recipe.reward.model_dump() if recipe.reward else {})
    return {
        "data": os.path.basename(given.data),
        "weights": weights,
        "step": step,
        "dtype": dtype,
        "engine": recipe.rollout.engine if isinstance(recipe, Recipe) else "embedded",
        "seed": recipe.run.seed,
        "samples": p.n,
        "temperature": p.temperature,
        "top_p": p.top_p,
        "top_k": p.top_k,
        "max_new_tokens": p.max_new_tokens,
        "stop": list(p.stop),
        "stop_token_ids": list(p.stop_token_ids),
        "problems": len(prompts),
        "prompts": _digest(np.asarray(prompt.ids, dtype=np.int32).tobytes() + b"\0" for prompt in prompts),
        "answers": _digest(_judged(prompt.problem) for prompt in prompts),
        "reward": {name: value for name, value in reward.items() if "timeout" not in name and name not in LIMITS},
        "reward_files": [_file_digest(str(part.get("name", ""))) for part in (reward, *reward.get("parts", ()))],
        "success_threshold": success_threshold(recipe),
    }


def _judged(problem: Problem) -> bytes:
    return to_json([problem.prompt_id, problem.answer, problem.extra]).encode() + b"\n"


def _file_digest(name: str) -> str:
    """Of the file of a reward `FILE.py:FUNCTION`; empty for other rewards."""
    file = Path(name.rpartition(":")[0])
    return _digest([file.read_bytes()]) if file.suffix == ".py" and file.is_file() else ""


def _digest(parts: Iterable[bytes]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part)
    return found.hexdigest()
