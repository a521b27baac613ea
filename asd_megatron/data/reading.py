"""Reading a file of problems: its rows through a schema, duplicates and filters, each row with what became of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from asd_megatron.data import schemas
from asd_megatron.data.code_tests import as_key, check_tests, is_judged
from asd_megatron.data.files import Row, read_rows
from asd_megatron.data.jsonl import (
    DataError,
    Line,
    LineError,
    freeze,
    kind_of,
    optional_text_field,
    prompt_or_messages,
    scalar_field,
)
from asd_megatron.data.schema_readers import NoAnswer
from asd_megatron.data.schemas import Schema
from asd_megatron.errors import did_you_mean
from asd_megatron.records import Problem

FIELDS = ("prompt", "messages", "answer", "solution", "id")
OWN_FIELDS = (*FIELDS, "tests", "setup")
"""The fields of a canonical row, which `data.fields` may take from others."""
DUPLICATES = "duplicates"
NO_ANSWER = "without an answer"
Duplicates = Literal["error", "drop"]


@dataclass(frozen=True)
class Filters:
    """Which problems of a file are left out.

    duplicates: `drop` leaves a problem out whose text and answer are an earlier one's; `error` refuses a file with two
    rows of the same id, or without ids of the same text and answer; None: as the schema says. pass_rate: the field (a
    dotted path) with the fraction of solved attempts; problems outside of [min_pass_rate, max_pass_rate] and those
    without a number there are left out. Lengths are in characters.
    """

    duplicates: Duplicates | None = None
    max_prompt_chars: int | None = None
    max_answer_chars: int | None = None
    pass_rate: str | None = None
    min_pass_rate: float = 0.0
    max_pass_rate: float = 1.0

    def reason(self, problem: Problem, line: Line) -> tuple[str, str] | None:
        """Why a problem, read from `line`, is left out: (what is counted, the row's own reason); None: it is kept."""
        if self.max_prompt_chars is not None and len(problem.question) > self.max_prompt_chars:
            return "with a long prompt", f"the prompt has {len(problem.question):,} characters"
        if self.max_answer_chars is not None and len(problem.answer) > self.max_answer_chars:
            return "with a long answer", f"the answer has {len(problem.answer):,} characters"
        if self.pass_rate is None:
            return None
        rate = value_at(line, self.pass_rate)
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            found = "missing" if rate is None else kind_of(rate)
            return "without a pass rate", f"`{self.pass_rate}` (data.filter.pass_rate_field) is {found}"
        if rate < self.min_pass_rate:
            return "too hard", f"`{self.pass_rate}` is {rate:g}, below {self.min_pass_rate:g}"
        if rate > self.max_pass_rate:
            return "too easy", f"`{self.pass_rate}` is {rate:g}, above {self.max_pass_rate:g}"
        return None


class RowOutcome(NamedTuple):
    """What became of a row: a problem, or a `reason` why there is none. counted: the name under which the row is left
    out; None for a problem, and for a row that a run refuses."""

    row: Row
    problem: Problem | None = None
    counted: str | None = None
    reason: str = ""

    @property
    def refused(self) -> bool:
        return self.problem is None and self.counted is None


@dataclass
class ProblemReader:
    """Reads one file row by row. `schema` is set when the first row has been read.

    Args:
        path: a file, a folder, or a pattern (`files.read_rows`).
        name: of the schema; None: that of the first row, or `canonical` with `fields`.
        fields: canonical field -> the dotted path (`target.value`, `prompt.0.content`) of the field that holds it; they
            replace what the schema reads.
        filters: which problems are left out.
    """

    path: str | Path
    name: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    filters: Filters = Filters()
    schema: Schema | None = None

    def __post_init__(self) -> None:
        unknown = next((name for name in self.fields if name not in OWN_FIELDS), None)
        if unknown is not None:
            hint = did_you_mean(unknown, OWN_FIELDS)
            raise DataError(
                f"data.fields: there is no field {unknown!r}: {hint}{' T' if hint else 't'}he fields that can be filled"
                f" are {', '.join(OWN_FIELDS)}"
            )
        if self.name is not None:
            self.schema = schemas.named(self.name)
        elif self.fields:
            self.schema = schemas.SCHEMAS["canonical"]

    @property
    def drops(self) -> bool:
        """Whether copies of a problem are left out, not refused."""
        chosen = self.filters.duplicates
        return chosen == "drop" or chosen is None and self.schema is not None and self.schema.drop

    def outcomes(self) -> Iterator[RowOutcome]:
        """What becomes of each row, in order. Raises DataError for a file that cannot be read."""
        seen: dict[str, Row] = {}  # by id, or by content where copies are dropped
        ids: set[str] = set()
        originals: dict[int, RowOutcome] = {}  # of files with copies: what became of the first of them
        for row in read_rows(self.path):
            if row.copy_of is not None:
                yield self._copy(row, originals[row.copy_of])
                continue
            outcome = self._outcome(row, seen, ids)
            if row.unit == "row":
                originals[row.number] = outcome._replace(row=row._replace(value=None))
            yield outcome

    def _copy(self, row: Row, original: RowOutcome) -> RowOutcome:
        """What becomes of a row that equals another: what has become of that one, or it is a duplicate."""
        if original.problem is None:
            return original._replace(row=row)
        return self._duplicate(row, original.row, original.problem, has_id=False)

    def _duplicate(self, row: Row, first: Row, problem: Problem, *, has_id: bool) -> RowOutcome:
        what = f"the id {problem.prompt_id!r} is that" if has_id else "the same problem and answer as those"
        reason = f"{what} of {first.unit} {first.number}" + ("" if first.path == row.path else f" of {first.path}")
        if self.drops:
            return RowOutcome(row, counted=DUPLICATES, reason=reason)
        remedy = "remove one of them, give each an `id` of its own, or set data.filter.duplicates drop"
        return RowOutcome(row, reason=f"{reason}; {remedy}")

    def _outcome(self, row: Row, seen: dict[str, Row], ids: set[str]) -> RowOutcome:
        line = row.value
        if line is None:
            return RowOutcome(row, reason=row.error or "")
        try:
            self.schema = self.schema or schemas.schema_of(line)
            read = self.schema.read(line)
            for name, place in self.fields.items():
                value = value_at(line, place)
                if value is None and name in ("prompt", "messages", "answer"):
                    raise LineError(f"`{place}` (data.fields.{name}) is missing")
                read = {**read, name: value}
            problem = problem_of(read)
        except NoAnswer as e:
            return RowOutcome(row, counted=NO_ANSWER if self.schema and self.schema.drop else None, reason=str(e))
        except LineError as e:
            return RowOutcome(row, reason=str(e))
        has_id = read.get("id") is not None
        key = content_hash(problem) if self.drops and has_id else problem.prompt_id  # without an id that is the hash
        if key in seen:
            return self._duplicate(row, seen[key], problem, has_id=has_id and not self.drops)
        left_out = self.filters.reason(problem, line)
        if left_out is not None:
            return RowOutcome(row, counted=left_out[0], reason=left_out[1])
        if problem.prompt_id in ids:  # another problem with the same id, in a published set
            problem = replace(problem, prompt_id=f"{problem.prompt_id}:{key}")
        seen[key] = row._replace(value=None)
        ids.add(problem.prompt_id)
        return RowOutcome(row, problem)


def value_at(line: Line, place: str) -> Any:
    """The value of a dotted path: keys of objects and, from 0, places in lists. None where there is none. A field whose
    name has dots itself comes first."""
    if place in line:
        return line[place]
    value: Any = line
    for part in place.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def problem_of(line: Line) -> Problem:
    """The problem of a canonical row. Raises LineError."""
    prompt, messages = prompt_or_messages(line)
    answer, tests = line.get("answer"), line.get("tests")
    if is_judged(tests) and (answer is None or isinstance(answer, str) and not answer.strip()):
        text: str | None = ""
    else:
        text = scalar_field(line, "answer")
    if text is None:
        if isinstance(tests, list) and tests:
            check_tests(tests)
        raise LineError("`answer` is missing")
    if text in ("inf", "-inf"):
        raise LineError(f"`answer` is {text}: give it as text")
    solution = optional_text_field(line, "solution")
    if not text:
        optional_text_field(line, "setup")  # which the code reward runs before the program
    extra = {name: v for name, v in line.items() if name not in FIELDS and (name != "setup" or v is not None)}
    problem = Problem("", text, prompt, messages, solution, freeze(extra))
    return replace(problem, prompt_id=scalar_field(line, "id") or content_hash(problem))


def content_hash(problem: Problem) -> str:
    """16 hex digits that are equal for problems with the same text and answer (without an answer: the same tests)."""
    content: list[Any] = [problem.prompt, problem.messages, problem.answer]
    if not problem.answer:
        content.append(as_key(problem.extra.get("tests")))
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
