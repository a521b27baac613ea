r"""The schemas of problem files that are read without conversion: SCHEMAS declares each in a few lines.

A file has one schema: the first in SCHEMAS that its first row fits (`schema_of`), or the one that the recipe names. Its
`read` (`schema_readers`) makes a canonical row of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from asd_megatron.data import code_tests
from asd_megatron.data.answers import HASHES
from asd_megatron.data.jsonl import DataError, Line, LineError, ends_with_user_turn
from asd_megatron.data.schema_readers import (
    apps,
    canonical,
    competition,
    deepcoder,
    first,
    ground_truth,
    gsm8k,
    humaneval,
    labelled,
    livecodebench,
    mbpp,
    prime,
    question,
    verl,
    verl_bare,
)
from asd_megatron.errors import did_you_mean


@dataclass(frozen=True)
class Schema:
    """A schema: what a row has that fits it (`fits`, in words `has`), how it is read (`read`, in words `reads`), and
    which published sets have it. drop: copies of a problem, and rows without an answer, are left out and counted; else
    they are refused."""

    name: str
    has: str
    fits: Callable[[Line], bool]
    read: Callable[[Line], Line]
    reads: str
    sets: str
    drop: bool = True


def _has(*names: str) -> Callable[[Line], bool]:
    return lambda line: all(line.get(name) is not None for name in names)


def _is_canonical(line: Line) -> bool:
    asked = isinstance(line.get("prompt"), str) or ends_with_user_turn(line.get("messages"))
    return asked and (line.get("answer") is not None or code_tests.is_judged(line.get("tests")))


def _is_gsm8k(line: Line) -> bool:
    return _has("question")(line) and isinstance(line.get("answer"), str) and HASHES in line["answer"]


def _is_mbpp(line: Line) -> bool:
    return isinstance(line.get("test_list"), list) and first(line, "text", "prompt") is not None


SCHEMAS: Mapping[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema(
            "canonical", "`prompt`, or `messages` that end with a user turn, beside `answer` or `tests`", _is_canonical,
            canonical, "the fields' own names", "your own files", drop=False,
        ),
        Schema(
            "verl", "`prompt`, `reward_model`", _has("prompt", "reward_model"), verl,
            "prompt = the turns of `prompt`; answer or tests = `reward_model.ground_truth`; solution = a worked"
            " `extra_info.answer`; id = `extra_info.index` if it is text",
            "DAPO-Math-17k, Skywork-OR1, verl's GSM8K and MATH",
        ),
        Schema(
            "verl_bare", "only by name", lambda line: False, verl_bare,
            "as `verl`; DAPO's instruction around the problem is removed", "DAPO-Math-17k",
        ),
        Schema(
            "prime", "`verification_info`", _has("verification_info"), prime,
            "prompt = `prompt` or `problem`; tests = `verification_info.test_cases`",
            "PrimeIntellect verifiable-coding-problems, open-r1",
        ),
        Schema(
            "humaneval", "`prompt`, `test`, `entry_point`", _has("prompt", "test", "entry_point"), humaneval,
            "prompt = the stub with the instruction to complete it; tests = `test` and a call of its `check`; setup ="
            " what stands before the function; id = `task_id`", "HumanEval, HumanEval+",
        ),
        Schema(
            "mbpp", "`text` or `prompt`, `test_list`", _is_mbpp, mbpp,
            "prompt = the task and its assert statements; tests = `test_list`; setup = `test_imports` or"
            " `test_setup_code`; id = `task_id`", "MBPP, complete and sanitized",
        ),
        Schema(
            "livecodebench", "`question_content`, `public_test_cases`", _has("question_content", "public_test_cases"),
            livecodebench,
            "prompt = `question_content` with the starter code; tests = public and private ones; id = `question_id`",
            "LiveCodeBench",
        ),
        Schema(
            "apps", "`question`, `input_output`", _has("question", "input_output"), apps,
            "prompt = `question` with the starter code; tests = `input_output`; id = `id`, else `problem_id`",
            "APPS, TACO",
        ),
        Schema(
            "deepcoder", "`problem`, `tests`", _has("problem", "tests"), deepcoder,
            "prompt = `problem` with the starter code; tests = `tests`", "DeepCoder-Preview",
        ),
        Schema(
            "ground_truth", "`prompt` or `messages`, `ground_truth`",
            lambda line: _has("ground_truth")(line) and first(line, "prompt", "messages") is not None, ground_truth,
            "prompt = `prompt`, or `messages` to the last user turn; answer or tests = `ground_truth`",
            "Dolci-RL-Zero, Tulu 3 RLVR",
        ),
        Schema(
            "labelled", "`prompt`, `label`", _has("prompt", "label"), labelled,
            "prompt = `prompt`, text or turns; answer = `label`", "slime's files",
        ),
        Schema(
            "competition", "`problem` (or `Problem`)",
            lambda line: first(line, "problem", "Problem") is not None and line.get("prompt") is None, competition,
            "prompt = `problem`; answer = `answer` (or `expected_answer`), or without one the last `\\boxed{}` of"
            " `solution`; solution = `solution`; id = `id`, `idx`, `problem_idx`, `unique_id` or `uuid`; `messages`"
            " and `generations` are dropped",
            "MATH, MATH-500, AIME, AMC, HMMT, Minerva, NuminaMath, OpenR1-Math, DeepScaleR",
        ),
        Schema(
            "gsm8k", "`question`, `answer` with `####`", _is_gsm8k, gsm8k,
            "prompt = `question`; answer = `N` of the line `#### N`; solution = all of `answer` without the calculator"
            " marks `<<...>>`", "GSM8K",
        ),
        Schema(
            "question", "`question`", _has("question"), question,
            "prompt = `question`; answer = `answer` or `final_answer`; solution = `solution`",
            "MinervaMath, AMC 23, AIME 2025, OlympiadBench",
        ),
    )
}  # fmt: skip
"""In the order in which the first row is compared with them."""


def schema_of(line: Line) -> Schema:
    """The schema of a file whose first row is `line`. Raises LineError if it is none of them."""
    found = next((schema for schema in SCHEMAS.values() if schema.fits(line)), None)
    if found is not None:
        return found
    if line.get("prompt") is not None or line.get("messages") is not None:
        return SCHEMAS["canonical"]  # which says what is missing
    fields = ", ".join(f"`{name}`" for name in line) or "none"
    raise LineError(
        f"no `prompt` or `messages` (fields: {fields}); docs/data.md lists the schemas that are read; data.fields says"
        " which fields hold prompt and answer"
    )


def named(name: str) -> Schema:
    """The schema of that name. Raises DataError."""
    if name not in SCHEMAS:
        hint = did_you_mean(name, SCHEMAS) or f"choose one of {', '.join(SCHEMAS)}"
        raise DataError(f"there is no schema {name!r}: {hint}")
    return SCHEMAS[name]


def schema_table() -> str:
    """The table of docs/data.md."""
    rows = ["| schema | a row has | read as | published sets |", "|---|---|---|---|"]
    rows += [f"| `{s.name}` | {s.has} | {s.reads} | {s.sets} |" for s in SCHEMAS.values()]
    return "\n".join(rows)
