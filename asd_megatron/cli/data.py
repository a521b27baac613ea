"""`asd-megatron data check | show`: what is read from a file, and what student and teacher see of a problem."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asd_megatron.cli.guard import FAILED, importing
from asd_megatron.errors import UserError
from asd_megatron.files import to_json

if TYPE_CHECKING:
    from asd_megatron.config import Recipe
    from asd_megatron.data.prompts import PromptRenderer
    from asd_megatron.data.reading import ProblemReader, RowOutcome
    from asd_megatron.records import Problem

SHOWN = 10  # rows of each kind
SHOWN_CHARACTERS = 600  # of an example's text
ATTEMPT = "(a correct response of the same group)"


def main(argv: Sequence[str]) -> int:
    """Run one of the tools. `check` returns 1 when a run would refuse the file."""
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments) or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asd-megatron data",
        description="Look at files of problems before a run reads them. docs/data.md has the formats and schemas.",
    )
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    check = tools.add_parser(
        "check",
        help="what is read from a file, and what is left out or refused and why",
        description="Read a file as a run does, but to its end: its schema, how many problems it has, every row that is"
        " left out or refused with the reason, lengths, an example. Exits with 1 when a run would refuse the file.",
        epilog="example: asd-megatron data check gsm8k/main/train-*.parquet",
    )
    show = tools.add_parser(
        "show",
        help="a student's and a teacher's prompt as the model sees them",
        description="The prompts of one problem through the model's chat template (or the recipe's raw prompt), as text"
        " and in tokens: the student's, and the teacher's for a wrong and for a correct response.",
        epilog="example: asd-megatron data show train.jsonl --problem 3 --model models/Qwen3-0.6B",
    )
    for tool, run in ((check, _check), (show, _show)):
        tool.set_defaults(run=run)
        tool.add_argument("file", metavar="FILE", nargs="+", help="a file, a folder, or a pattern of files")
        tool.add_argument("--schema", help="the schema of its rows, by default the one that its first row fits")
        tool.add_argument(
            "--fields", nargs="+", default=[], metavar="NAME=PATH", help="as data.fields: prompt=question answer=a.b"
        )
    check.add_argument("--duplicates", choices=("error", "drop"), help="as data.filter.duplicates")
    check.add_argument("--sft", action="store_true", help="a file of responses, for `asd-megatron sft`")
    check.add_argument("--all", action="store_true", help=f"print all rows, not {SHOWN} of each kind")
    check.add_argument("--json", action="store_true", help="print JSON")
    show.add_argument(
        "--problem", default="1", metavar="N", help="its place in the file from 1, or its id (default: 1)"
    )
    model = show.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="FOLDER", type=Path, help="the model's folder, for tokenizer and template")
    model.add_argument("--recipe", metavar="RECIPE", type=Path, help="a recipe: its model, prompts and limits")
    return parser


def _fields(given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    wrong = next((text for text, (name, _, place) in zip(given, pairs, strict=True) if not name or not place), None)
    if wrong is not None:
        raise UserError(f"--fields {wrong!r}: write NAME=PATH, for instance answer=target.value")
    return {name: place for name, _, place in pairs}


# ---------------------------------------------------------------- check


def _check(arguments: Any) -> int:
    from asd_megatron.data.reading import Filters, ProblemReader

    reports = []
    for path in arguments.file:
        if arguments.sft:
            reports.append(_Report(path, None, _supervised(path)))
            continue
        reader = ProblemReader(path, arguments.schema, _fields(arguments.fields), Filters(arguments.duplicates))
        reports.append(_Report(path, reader, reader.outcomes()))
    if arguments.json:
        print(to_json([report.as_json() for report in reports], indent=2))
    else:
        print("\n\n".join(report.text(None if arguments.all else SHOWN) for report in reports))
    return FAILED if any(report.refused for report in reports) else 0


def _supervised(path: str) -> Iterator[RowOutcome]:
    """The rows of a supervised file as outcomes, without tokens."""
    from asd_megatron.data.conversations import conversation_of
    from asd_megatron.data.files import read_rows
    from asd_megatron.data.jsonl import LineError
    from asd_megatron.data.reading import RowOutcome
    from asd_megatron.records import Problem

    for row in read_rows(path):
        try:
            if row.value is None:
                raise LineError(row.error or "")
            turns = conversation_of(row.value).turns
        except LineError as error:
            yield RowOutcome(row, reason=str(error))
        else:
            answer = turns[-1]["content"]
            yield RowOutcome(row, Problem(f"{row.unit} {row.number}", answer, messages=tuple(turns[:-1])))


class _Report:
    """What `check` says of one file."""

    def __init__(self, path: str, reader: ProblemReader | None, outcomes: Iterable[RowOutcome]) -> None:
        from tqdm import tqdm

        self.path, self.rows, self.problems = path, 0, 0
        self.left_out: Counter[str] = Counter()
        self.reasons: dict[str, list[str]] = {}  # counted name, or "refused" -> `place: reason` of its rows
        self.lengths: dict[str, list[int]] = {"prompt": [], "answer": []}
        self.with_solution = self.with_tests = 0
        self.example: Problem | None = None
        shown = sys.stderr.isatty()
        for outcome in tqdm(outcomes, unit=" rows", file=sys.stderr, disable=not shown, delay=1.0, leave=False):
            self.rows += 1
            if outcome.problem is not None:
                self._count(outcome.problem)
                continue
            if outcome.counted is not None:
                self.left_out[outcome.counted] += 1
            name = "refused" if outcome.counted is None else outcome.counted
            self.reasons.setdefault(name, []).append(f"{outcome.row.place}: {outcome.reason}")
        self.schema = None if reader is None else reader.schema
        self.supervised = reader is None

    def _count(self, problem: Problem) -> None:
        self.problems += 1
        self.lengths["prompt"].append(len(problem.question))
        self.lengths["answer"].append(len(problem.answer))
        self.with_solution += problem.solution is not None
        self.with_tests += not problem.answer
        self.example = self.example or problem

    @property
    def refused(self) -> bool:
        """Whether a run would refuse the file."""
        return "refused" in self.reasons or not self.problems

    def as_json(self) -> dict[str, Any]:
        lengths = {name: [min(values), statistics.median_low(values), max(values)] for name, values in self._measured()}
        return {
            "path": self.path,
            "schema": None if self.schema is None else self.schema.name,
            "rows": self.rows,
            "problems": self.problems,
            "left_out": dict(self.left_out),
            "refused": self.reasons.get("refused", []),
            "reasons": {name: lines[:SHOWN] for name, lines in self.reasons.items() if name != "refused"},
            "characters": lengths,
            "with_solution": self.with_solution,
            "with_tests": self.with_tests,
            "accepted": not self.refused,
        }

    def _measured(self) -> Iterator[tuple[str, list[int]]]:
        return ((name, values) for name, values in self.lengths.items() if values)

    def text(self, shown: int | None) -> str:
        """The report; `shown` rows of each kind (None: all)."""
        rows = [("file", self.path)]
        if self.schema is not None:
            rows += [("schema", f"{self.schema.name} ({self.schema.sets}): {self.schema.reads}")]
        read, answer = ("examples", "response") if self.supervised else ("problems", "answer")
        rows += [("rows", f"{self.rows:,}"), (read, f"{self.problems:,}")]
        if self.problems and not self.supervised:
            rows += [("", f"{self.with_solution:,} with a solution, {self.with_tests:,} with tests")]
        for name, values in self._measured():
            low, middle, high = min(values), statistics.median_low(values), max(values)
            rows.append(
                (f"{answer if name == 'answer' else name}s", f"{low:,} to {high:,} characters, median {middle:,}")
            )
        for name, lines in self.reasons.items():
            what = "refused" if name == "refused" else f"left out: {name}"
            rows.append((what, f"{len(lines):,}"))
            rows += [("", line) for line in lines[:shown]]
            if shown is not None and len(lines) > shown:
                rows.append(("", f"and {len(lines) - shown:,} more (--all prints them)"))
        if self.example is not None:
            title = self.example.prompt_id if self.supervised else f"problem {self.example.prompt_id}"
            rows += [("example", title), ("  prompt", _cut(self.example.question))]
            rows.append((f"  {answer}", _cut(self.example.answer) or "judged by its tests"))
        verdict = "a run refuses this file" if self.refused else "a run reads this file"
        verdict += "" if self.problems else f": it has no {read}"
        wide = max(len(name) for name, _ in rows)
        lines = [f"{name:<{wide}}  {text}".rstrip() for name, text in rows]
        return "\n".join([*lines, verdict])


def _cut(text: str) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


# ---------------------------------------------------------------- show


def _show(arguments: Any) -> int:
    from asd_megatron.config import load_recipe
    from asd_megatron.data.reading import ProblemReader

    if len(arguments.file) != 1:
        raise UserError("data show takes one file, folder or pattern (in quotes, so that the shell leaves it alone)")
    path, fields = arguments.file[0], _fields(arguments.fields)
    recipe = None if arguments.recipe is None else load_recipe(arguments.recipe)
    schema, named = (None, {}) if recipe is None else _as_read(recipe, path)
    reader = ProblemReader(path, arguments.schema or schema, fields or named)
    problem = _chosen(arguments.problem, [read.problem for read in reader.outcomes() if read.problem is not None])
    with importing("interrupted"):
        import torch  # noqa: F401 - it and what follows take seconds to import
    renderer, limit, reference = _renderer(arguments.model, recipe)
    views = _views(renderer, problem, limit, reference, _tests(problem, recipe))
    print("\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in views))
    return 0


def _chosen(name: str, problems: Sequence[Problem]) -> Problem:
    """The problem at a place, from 1, or with an id. Raises UserError if there is none."""
    if name.isdecimal() and 1 <= int(name) <= len(problems):
        return problems[int(name) - 1]
    if not problems:
        raise UserError("the file has no problem that a run would read: asd-megatron data check FILE says why")
    found = next((problem for problem in problems if problem.prompt_id == name), None)
    if found is None:
        raise UserError(f"--problem {name}: give a place from 1 to {len(problems):,}, or the id of a problem")
    return found


def _as_read(recipe: Recipe, path: str) -> tuple[str | None, Mapping[str, str]]:
    """The schema and fields with which the recipe reads the file `path`; (None, {}) for one that it does not name."""
    data = recipe.data
    sets = [(given.path, given.schema, given.fields) for given in data.train_sets]
    sets += [(str(data.test), data.test_schema, data.test_fields)]
    sets += [(given.data, given.schema, given.fields) for given in recipe.evaluation.sets.values()]
    return next(((schema, fields) for name, schema, fields in sets if name == path), (None, {}))


def _tests(problem: Problem, recipe: Recipe | None) -> int | None:
    """How many tests the feedback on a response counts; None: it says correct or incorrect."""
    from asd_megatron.reward.base import tests_of

    if recipe is None:
        return None if problem.answer else tests_of(problem)
    of_tests = recipe.reward.name == "code" and not recipe.reward.parts and not recipe.reward.code.all_or_nothing
    return tests_of(problem, recipe.reward.max_tests) if of_tests else None


def _renderer(folder: Path | None, recipe: Recipe | None) -> tuple[PromptRenderer, int, bool]:
    """The renderer, the longest prompt of a student in tokens, and whether teachers are shown the file's solutions."""
    from asd_megatron.data.prompts import PromptRenderer
    from asd_megatron.data.tokenizer import end_token_ids, load_tokenizer
    from asd_megatron.run.build import make_renderer
    from asd_megatron.run.sources import model_folder

    if recipe is not None:
        folder = model_folder(recipe.model.path)
    assert folder is not None  # argparse wants one of the two
    tokenizer = load_tokenizer(folder)
    ends = end_token_ids(folder, tokenizer)
    if recipe is not None:
        renderer = make_renderer(recipe, tokenizer, ends)
        return renderer, recipe.sampling.max_prompt_tokens, recipe.privileged.use_reference
    format = "chat" if tokenizer.chat_template else "raw"
    renderer = PromptRenderer(tokenizer, format=format, end_token_ids=ends)
    return renderer, renderer.max_prompt_tokens, True


def _views(
    renderer: PromptRenderer, problem: Problem, limit: int, reference: bool, tests: int | None
) -> Iterator[tuple[str, str]]:
    from asd_megatron.antisd import feedback
    from asd_megatron.data.prompts import TeacherLimits
    from asd_megatron.data.tokenizer import decode

    tokens = renderer.tokens(problem)
    beyond = f", more than the {limit:,} of sampling.max_prompt_tokens" if tokens > limit else ""
    yield f"student, problem {problem.prompt_id}: {tokens:,} tokens{beyond}", renderer.student_text(problem)
    solution = problem.solution if reference else None
    shown = "the file's solution" if solution else "another response"
    kind = "binary" if tests is None else "fraction"
    for reward, response in ((0.0, "a wrong response"), (1.0, "a correct response")):
        assessment = feedback(reward, kind, success_threshold=1.0, tests=tests)
        prompt = renderer.teacher(problem, solution or ATTEMPT, assessment, 0, TeacherLimits())
        if prompt.ids is None:
            yield f"teacher of {response}: none ({prompt.outcome})", ""
            continue
        title = f"teacher of {response}, shown {shown} ({prompt.solution_tokens:,} tokens): {len(prompt.ids):,} tokens"
        yield title, decode(renderer.tokenizer, prompt.ids, skip_special_tokens=False)
