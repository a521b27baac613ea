"""FOLDER/samples-SET.parquet: every sample of a complete set, one row each, for reading with pandas or DuckDB.

Columns: `problem` (id), `place` (of the problem in the set, from 0), `sample` (from 0), `question`, `prompt` (all that
the model read, special tokens included), `answer` (the expected one), `response`, `tokens` (of the response, the end
token included), `finish_reason` (`stop`, or `length`: the token budget cut it off), `reward`, `extracted` (the answer
that the response marks, null for none). The file's metadata hold what the samples depend on (`asd_megatron.identity`)
and the verifier's failures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from asd_megatron.errors import UserError
from asd_megatron.evaluation.outcomes import Outcomes, Sample
from asd_megatron.files import atomic_file, remedy, system_reason, to_json
from asd_megatron.records import Problem

KEY = b"asd_megatron"
SCHEMA = pa.schema(
    [
        pa.field("problem", pa.string(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("extracted", pa.string()),
    ]
)


@dataclass(frozen=True)
class SetSamples:
    """The samples of a complete set: ids of its problems, the samples of each, and what they depend on."""

    problems: tuple[str, ...]
    samples: tuple[tuple[Sample, ...], ...]
    failures: Mapping[str, int]
    identity: Mapping[str, Any]

    def outcomes(self) -> Outcomes:
        return Outcomes.of(self.samples, self.failures)


def samples_path(folder: Path, name: str) -> Path:
    """FOLDER/samples-SET.parquet"""
    return folder / f"samples-{name}.parquet"


def write_samples(path: Path, found: SetSamples, problems: Sequence[Problem], prompts: Sequence[str]) -> Path:
    """Atomically write the file. problems, prompts: of the set, in its order. Raises UserError where the operating
    system refuses."""
    rows = [
        {
            "problem": problem.prompt_id,
            "place": place,
            "sample": number,
            "question": problem.question,
            "prompt": prompt,
            "answer": problem.answer,
            "response": sample.response,
            "tokens": sample.tokens,
            "finish_reason": sample.finish_reason,
            "reward": sample.reward,
            "extracted": sample.extracted,
        }
        for place, (problem, prompt, samples) in enumerate(zip(problems, prompts, found.samples, strict=True))
        for number, sample in enumerate(samples)
    ]
    about = {KEY: to_json({"identity": found.identity, "failures": found.failures}).encode()}
    try:
        with atomic_file(path) as partial:
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata(about), partial)
    except OSError as error:
        text = f"{path} cannot be written ({system_reason(error)}): {remedy(error)}, then start the same command again"
        raise UserError(text) from error
    return path


def read_samples(path: Path) -> SetSamples:
    """A file of `write_samples`. Raises UserError for anything else."""
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[KEY])
        rows = table.select(["problem", "place", "response", "tokens", "finish_reason", "reward", "extracted"])
        names: list[str] = []
        samples: list[list[Sample]] = []
        for row in rows.to_pylist():
            if row["place"] == len(samples):
                names.append(row["problem"])
                samples.append([])
            values = (row[key] for key in ("response", "tokens", "finish_reason", "reward", "extracted"))
            samples[row["place"]].append(Sample(*values))
        return SetSamples(tuple(names), tuple(map(tuple, samples)), about["failures"], about["identity"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read as samples of an evaluation ({error}): remove it to evaluate the set again"
        ) from error
