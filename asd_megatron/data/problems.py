"""Problems from files. The set of problems that comes of it is in `problem_sets`, reading row by row in `reading`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from asd_megatron.data.jsonl import DataError
from asd_megatron.data.problem_sets import ProblemSet, ProblemSource
from asd_megatron.data.reading import Filters, ProblemReader
from asd_megatron.records import Problem

__all__ = ["Filters", "ProblemSet", "ProblemSource", "load_problems"]


def load_problems(
    path: str | Path,
    *,
    schema: str | None = None,
    fields: Mapping[str, str] | None = None,
    filters: Filters | None = None,
    shuffle: bool = True,
) -> ProblemSet:
    """Read the problems of a file, a folder or a pattern of files (docs/data.md).

    Raises DataError, as `file:line: reason` (`file: row N: reason`) for a row that cannot be used: one that is
    malformed, lacks its fields, or has the id or content of another where the schema refuses that. Rows that the schema
    or `filters` leave out are counted.
    """
    reader = ProblemReader(path, schema, fields or {}, filters or Filters())
    problems: list[Problem] = []
    left_out: Counter[str] = Counter()
    example = ""
    for outcome in reader.outcomes():
        if outcome.problem is not None:
            problems.append(outcome.problem)
        elif outcome.counted is not None:
            left_out[outcome.counted] += 1
            example = example or f"{outcome.row.place}: {outcome.reason}"
        else:
            raise DataError(f"{outcome.row.place}: {outcome.reason}")
    if not problems:
        raise DataError(
            f"{path} has no problems: every row is left out, the first for this reason: {example}"
            if example
            else f"{path} has no problems: every line is blank; write one JSON object a line"
        )
    assert reader.schema is not None  # a row has been read
    return ProblemSet(str(path), tuple(problems), reader.schema.name, shuffle, dict(left_out))
