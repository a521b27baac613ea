"""Rollout dumps: one Parquet file a step, one row a rollout, every number that the step was made of.

Schema version 2. Step N's dump holds numbers under the weights before update N: whoever has those weights as a Hugging
Face folder can recompute them (the divergences: with one update a batch). Lists are per response token, float32. A list
is null where the number does not exist: the teacher's, u and the divergences for rollouts without privileged context,
columns that the recipe does not compute.
`loss_mask` is the rollout's own: the tokens that the policy sampled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from asd_megatron.errors import UserError
from asd_megatron.files import atomic_file
from asd_megatron.records import DemonstrationSource, Example, FinishReason, Rollout, TokenTable

SCHEMA_VERSION = 2
DIVERGENCES = ("divergence", "reverse_kl", "forward_kl", "agreement")
"""Of the exact estimator."""
ADDED = (*DIVERGENCES, "reference_logprobs", "lambda")
"""Columns that dumps of earlier versions lack."""
TABLE_COLUMNS = (
    "student_logprobs",
    "teacher_logprobs",
    "reference_logprobs",
    "engine_logprobs",
    "student_entropy",
    "teacher_entropy",
    "pmi",
    "advantage",
    *DIVERGENCES,
)
OF_TOKENS = ("prompt_ids", "response_ids", "teacher_prompt_ids", "engine_logprobs", "loss_mask")
"""Columns of an example with a list for each of its rollouts."""
NEED_CONTEXT = ("teacher_logprobs", "teacher_entropy", "pmi", *DIVERGENCES)
_IDS, _NUMBERS = pa.list_(pa.int32()), pa.list_(pa.float32())
_CHANGES = pa.list_(pa.list_(pa.int64(), 2))  # (response position, version)
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("prompt_ids", _IDS, nullable=False),
        pa.field("response_ids", _IDS, nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("group_advantage", pa.float64(), nullable=False),
        pa.field("demonstration_source", pa.string(), nullable=False),
        pa.field("demonstration_sample", pa.int32(), nullable=False),
        pa.field("teacher_prompt_ids", _IDS),
        *(pa.field(name, _NUMBERS) for name in TABLE_COLUMNS),
        pa.field("lambda", pa.float64()),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("weight_version", pa.int64(), nullable=False),
        pa.field("version_changes", _CHANGES, nullable=False),
    ]
)


@dataclass(frozen=True)
class DumpInfo:
    """A dump's file metadata. `H` and `h_warm` in nats, None where there is none; `lam` is the step's lambda.
    `reason`: of a batch that was kept because its numbers are bad; None for a step's ordinary dump."""

    schema_version: int
    step: int
    lam: float
    H: float | None
    h_warm: float | None
    temperature: float
    recipe_hash: str
    reason: str | None = None


@dataclass(frozen=True)
class Dump:
    """A dump read back. `lambdas`: each row's, where the step has one for each response, else None. Columns absent from
    the file's every row are absent from `table`; other null rows are NaN."""

    info: DumpInfo
    examples: list[Example]
    table: TokenTable
    lambdas: list[float] | None = None


def dump_path(run_folder: str | os.PathLike[str], step: int) -> Path:
    """RUN/rollouts/step_000001.parquet"""
    return Path(run_folder) / "rollouts" / f"step_{step:06d}.parquet"


def bad_dump_path(run_folder: str | os.PathLike[str], step: int) -> Path:
    """RUN/rollouts/bad_step_000001.parquet: of a batch with bad numbers."""
    path = dump_path(run_folder, step)
    return path.with_name(f"bad_{path.name}")


def _lists(arrays: Sequence[np.ndarray[Any, Any] | None], kind: pa.ListType) -> pa.Array:
    """One list a rollout; null for None."""
    present = [np.zeros(0) if a is None else a for a in arrays]
    offsets = np.cumsum([0, *map(len, present)], dtype=np.int64).astype(np.int32)
    values = np.concatenate([a for a in present if len(a)] or [np.zeros(0)])
    nulls = np.array([a is None for a in arrays], dtype=bool)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind.value_type), mask=pa.array(nulls))


def _column(name: str, table: TokenTable, has_context: Sequence[bool]) -> pa.Array:
    """A table column as one float32 list a rollout, null where the number does not exist."""
    if name not in table:
        return pa.nulls(table.rollouts, _NUMBERS)
    masked = name in NEED_CONTEXT and "teacher_logprobs" in table
    rows = [row.detach().to("cpu", torch.float32).numpy() for row in table.rows(name)]
    return _lists([row if c or not masked else None for row, c in zip(rows, has_context, strict=True)], _NUMBERS)


def write_dump(
    path: str | os.PathLike[str],
    examples: Sequence[Example],
    table: TokenTable,
    *,
    step: int,
    lam: float,
    H: float | None,
    h_warm: float | None,
    temperature: float,
    recipe_hash: str,
    lambdas: Sequence[float] | None = None,
    reason: str | None = None,
) -> Path:
    """Write one step's global batch atomically; `table` holds the examples' tokens in the same order. Rank 0 only.

    `engine_logprobs` come from the rollouts unless the table has them. File metadata keys: `schema_version`, `step`,
    `lambda`, `H`, `H_warm`, `temperature` (JSON numbers, `null` for none), `recipe_hash` and, unless it is None,
    `reason` (texts).
    """
    lengths = [len(e.rollout.response_ids) for e in examples]
    if table.lengths != lengths:
        raise ValueError(f"the token table holds {table.rollouts} rollouts, {table.tokens} tokens; the examples differ")
    rollouts = [e.rollout for e in examples]
    has_context = [e.has_context for e in examples]
    arrays: dict[str, Any] = {
        "step": [step] * len(examples),
        "prompt_id": [r.prompt_id for r in rollouts],
        "sample": [r.sample for r in rollouts],
        "prompt_ids": _lists([r.prompt_ids for r in rollouts], _IDS),
        "response_ids": _lists([r.response_ids for r in rollouts], _IDS),
        "finish_reason": [r.finish_reason.value for r in rollouts],
        "reward": [float(e.reward) for e in examples],
        "group_advantage": [float(e.group_advantage) for e in examples],
        "demonstration_source": [e.demonstration_source.value for e in examples],
        "demonstration_sample": [e.demonstration_sample for e in examples],
        "teacher_prompt_ids": _lists([e.teacher_prompt_ids for e in examples], _IDS),
        **{name: _column(name, table, has_context) for name in TABLE_COLUMNS},
        "lambda": [None] * len(examples) if lambdas is None else lambdas,
        "loss_mask": _lists([r.loss_mask for r in rollouts], pa.list_(pa.bool_())),
        "weight_version": [r.weight_version for r in rollouts],
        "version_changes": [[list(change) for change in r.version_changes] for r in rollouts],
    }
    if "engine_logprobs" not in table:
        arrays["engine_logprobs"] = _lists([r.logprobs for r in rollouts], _NUMBERS)
    columns = [
        arrays[field.name] if isinstance(arrays[field.name], pa.Array) else pa.array(arrays[field.name], field.type)
        for field in SCHEMA
    ]
    numbers = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "lambda": lam,
        "H": H,
        "H_warm": h_warm,
        "temperature": temperature,
    }
    metadata = {key: json.dumps(value) for key, value in numbers.items()} | {"recipe_hash": recipe_hash}
    metadata |= {} if reason is None else {"reason": reason}
    with atomic_file(path) as partial:
        pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(metadata)), partial)
    return Path(path)


def _info(path: Path, metadata: dict[bytes, bytes] | None) -> DumpInfo:
    raw = {key.decode(): value.decode() for key, value in (metadata or {}).items()}
    if "schema_version" not in raw:
        raise UserError(f"{path} is a Parquet file but no rollout dump: it has no schema_version in its metadata")
    version = json.loads(raw["schema_version"])
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} is a rollout dump of schema version {version}; this version of asd_megatron reads "
            f"{SCHEMA_VERSION}: read it with the version that wrote it, or make the dump again"
        )
    missing = [k for k in ("step", "lambda", "H", "H_warm", "temperature", "recipe_hash") if k not in raw]
    if missing:
        raise UserError(f"{path}: the dump's metadata lacks {', '.join(missing)}; make the dump again")
    return DumpInfo(
        schema_version=version,
        step=json.loads(raw["step"]),
        lam=json.loads(raw["lambda"]),
        H=json.loads(raw["H"]),
        h_warm=json.loads(raw["H_warm"]),
        temperature=json.loads(raw["temperature"]),
        recipe_hash=raw["recipe_hash"],
        reason=raw.get("reason"),
    )


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise UserError(f"the rollout dump {path} does not exist; dumps are written with `run.dump_rollouts: true`")
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file ({error}); make the dump again") from error


def _read_column(values: pa.ChunkedArray, lengths: Sequence[int]) -> torch.Tensor | None:
    """One float32 list a rollout back to a flat column [N]; null rows are NaN; None if every row is null."""
    if values.null_count == len(values):
        return None
    rows = [
        np.full(n, np.nan, dtype=np.float32) if row is None else row
        for row, n in zip(_arrays(values), lengths, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows))


def _arrays(values: pa.ChunkedArray) -> list[np.ndarray[Any, Any] | None]:
    """The lists of a column; None for null ones."""
    return [scalar.values.to_numpy(zero_copy_only=False) if scalar.is_valid else None for scalar in values]


def _read_example(row: Mapping[str, Any]) -> Example:
    rollout = Rollout(
        prompt_id=row["prompt_id"],
        sample=row["sample"],
        prompt_ids=row["prompt_ids"],
        response_ids=row["response_ids"],
        logprobs=row["engine_logprobs"],
        finish_reason=FinishReason(row["finish_reason"]),
        weight_version=row["weight_version"],
        version_changes=tuple((position, version) for position, version in row["version_changes"]),
        loss_mask=row["loss_mask"],
    )
    return Example(
        rollout=rollout,
        reward=row["reward"],
        group_advantage=row["group_advantage"],
        teacher_prompt_ids=row["teacher_prompt_ids"],
        demonstration_source=DemonstrationSource(row["demonstration_source"]),
        demonstration_sample=row["demonstration_sample"],
    )


def read_dump(path: str | os.PathLike[str]) -> Dump:
    """Read a dump back into examples (without texts) and a token table.

    Raises UserError for a missing or unreadable file, one that is no dump, another schema version, a missing column,
    and for lists that do not match the response.
    """
    path = Path(path)
    file = _open(path)
    info = _info(path, file.schema_arrow.metadata)
    missing = [name for name in SCHEMA.names if name not in (*file.schema_arrow.names, *ADDED)]
    if missing:
        raise UserError(f"{path} lacks the column(s) {', '.join(missing)}; make the dump again")
    data = file.read()
    read = [name for name in SCHEMA.names if name not in (*TABLE_COLUMNS, "lambda")] + ["engine_logprobs"]
    columns = [_arrays(data[name]) if name in OF_TOKENS else data[name].to_pylist() for name in read]
    try:
        examples = [_read_example(dict(zip(read, row, strict=True))) for row in zip(*columns, strict=True)]
        lengths = [len(example.rollout.response_ids) for example in examples]
        table = TokenTable.for_lengths(lengths)
        for name in TABLE_COLUMNS:
            column = _read_column(data[name], lengths) if name in data.column_names else None
            if column is not None:
                table[name] = column
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: a row is damaged ({error}); make the dump again") from error
    lambdas: list[Any] = data["lambda"].to_pylist() if "lambda" in data.column_names else [None]
    return Dump(info, examples, table, None if None in lambdas else lambdas)
