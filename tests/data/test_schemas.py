"""Rows as published sets have them; what is read from each."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.data.problems import Filters, load_problems
from asd_megatron.data.reading import ProblemReader
from asd_megatron.data.schemas import SCHEMAS, schema_table
from asd_megatron.errors import UserError
from asd_megatron.records import Problem

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
    " $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
IO = {"input": "1 2\n", "output": "3\n"}


def user(text: str) -> list[dict[str, str]]:
    return [{"content": text, "role": "user"}]


def packed(tests: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def read(tmp_path: Path, *rows: Any, **options: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_problems(path, **options)


MATH_ROWS: list[tuple[str, dict[str, Any], tuple[str, str, str | None, str | None]]] = [
    (  # DAPO-Math-17k
        "verl",
        {
            "data_source": "math_dapo",
            "prompt": user(DAPO.format("2 + 2?")),
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        (DAPO.format("2 + 2?"), "34", None, "9a9b6eb4"),
    ),
    (  # verl's GSM8K
        "verl",
        {
            "data_source": "openai/gsm8k",
            "prompt": user("Q"),
            "ability": "math",
            "reward_model": {"ground_truth": "72", "style": "rule"},
            "extra_info": {
                "index": 0,
                "split": "train",
                "answer": "48 + 24 = <<48+24=72>>72\n#### 72",
                "question": "Q",
            },
        },
        ("Q", "72", "48 + 24 = 72\n#### 72", None),
    ),
    (  # Skywork-OR1: a list as JSON text
        "verl",
        {"prompt": user("Q"), "reward_model": {"ground_truth": '["\\\\frac{1}{2}"]'}, "extra_info": {"index": 1}},
        ("Q", r"\frac{1}{2}", None, None),
    ),
    (
        "gsm8k",
        {"question": "Q", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,072"},
        ("Q", "1,072", "1 + 1 = 2\n#### 1,072", None),
    ),
    (
        "competition",
        {"problem": "Q", "level": "Level 5", "type": "Algebra", "solution": "so \\boxed{\\frac{1}{2}}"},
        ("Q", "\\frac{1}{2}", "so \\boxed{\\frac{1}{2}}", None),
    ),  # MATH
    (
        "competition",
        {"problem": "Q", "solution": "S", "answer": "2", "subject": "A", "level": 2, "unique_id": "test/1.json"},
        ("Q", "2", "S", "test/1.json"),
    ),  # MATH-500
    (
        "competition",
        {
            "problem": "Q",
            "solution": "S",
            "answer": "2",
            "problem_type": "Algebra",
            "uuid": "u",
            "source": "s",
            "generations": ["long"],
            "messages": [*user("Q"), {"role": "assistant", "content": "2"}],
        },
        ("Q", "2", "S", "u"),
    ),  # OpenR1-Math-220k
    ("competition", {"ID": "2024-II-4", "Problem": "Q", "Solution": "S", "Answer": 33}, ("Q", "33", "S", "2024-II-4")),
    (
        "competition",
        {"problem_idx": 1, "problem": "Q", "answer": 204, "problem_type": ["Algebra"]},
        ("Q", "204", None, "1"),
    ),
    ("question", {"question": "Q", "answer": "1.6"}, ("Q", "1.6", None, None)),  # MinervaMath
    ("question", {"question": "Q", "final_answer": ["2", "3"], "solution": ["S"]}, ("Q", "2, 3", "S", None)),
    ("labelled", {"prompt": user("Q"), "label": "34"}, ("Q", "34", None, None)),  # slime
    ("ground_truth", {"messages": user("Q"), "ground_truth": ["7"], "dataset": ["math"]}, ("Q", "7", None, None)),
    ("canonical", {"prompt": "Q", "answer": "7", "label": "8", "question": "other"}, ("Q", "7", None, None)),
]

CODE_ROWS: list[tuple[str, dict[str, Any], list[dict[str, Any]], str]] = [
    ("canonical", {"prompt": "Q", "tests": [IO]}, [IO], "Q"),
    (
        "canonical",
        {"prompt": "Q", "tests": [{"assert": "assert f(1) == 2"}], "answer": ""},
        [{"assert": "assert f(1) == 2"}],
        "Q",
    ),
    (
        "verl",
        {
            "prompt": user("Q"),
            "data_source": "taco",
            "ability": "code",
            "reward_model": {"ground_truth": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})},
        },
        [IO],
        "Q",
    ),
    (
        "ground_truth",
        {"id": "x", "prompt": "Q", "solution": "def f(x): ...", "ground_truth": ["assert f(1) == 2"]},
        [{"assert": "assert f(1) == 2"}],
        "Q",
    ),  # Dolci-RL-Zero-Code
    ("ground_truth", {"messages": user("Q"), "ground_truth": json.dumps([IO]), "dataset": "code_stdio"}, [IO], "Q"),
    (
        "prime",
        {
            "prompt": "Q",
            "problem_id": "p",
            "verification_info": json.dumps(
                {"language": "python", "test_cases": [{"type": "stdin_stdout", "fn_name": None, **IO}]}
            ),
        },
        [IO],
        "Q",
    ),
    (
        "apps",
        {
            "problem_id": 3,
            "question": "Q",
            "input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]}),
            "solutions": "[]",
            "starter_code": "",
        },
        [IO],
        "standard input",
    ),
    (
        "apps",
        {
            "question": "Q",
            "starter_code": "def f(a, b):",
            "input_output": json.dumps({"fn_name": "f", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}),
        },
        [{"function": "f", "arguments": [1, 2], "expected": 3}, {"function": "f", "arguments": [3, 4], "expected": 7}],
        "def f(a, b):",
    ),
    (
        "deepcoder",
        {"problem": "Q", "tests": json.dumps([{**IO, "testtype": "stdin"}]), "metadata": {}},
        [IO],
        "standard input",
    ),
    (
        "deepcoder",
        {"problem": "Q", "tests": json.dumps({"fn_name": "f", "inputs": [["a"]], "outputs": ["b"]})},
        [{"function": "f", "arguments": ["a"], "expected": "b"}],
        "`f`",
    ),
    (
        "livecodebench",
        {
            "question_id": "q1",
            "question_content": "Q",
            "starter_code": "class Solution:\n    def f(self, a, b):",
            "metadata": json.dumps({"func_name": "f"}),
            "public_test_cases": json.dumps([{"input": "[1]\n2", "output": "true", "testtype": "functional"}]),
            "private_test_cases": packed([{"input": "[]\n0", "output": "false", "testtype": "functional"}]),
        },
        [
            {"function": "f", "arguments": [[1], 2], "expected": True},
            {"function": "f", "arguments": [[], 0], "expected": False},
        ],
        "class Solution",
    ),
    (
        "humaneval",
        {
            "task_id": "HumanEval/0",
            "prompt": "import math\n\n\ndef f(x):\n    '''Doc.'''\n",
            "canonical_solution": "    return x\n",
            "test": "def check(candidate):\n    assert candidate(1) == 1\n",
            "entry_point": "f",
        },
        [{"assert": "def check(candidate):\n    assert candidate(1) == 1\n\n\ncheck(f)"}],
        "import math",
    ),
    (
        "mbpp",
        {
            "task_id": 2,
            "text": "Q",
            "code": "def f(): ...",
            "test_list": ["assert f(1) == 2", "assert f(2) == 3"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        [{"assert": "assert f(1) == 2"}, {"assert": "assert f(2) == 3"}],
        "assert f(2) == 3",
    ),
]


@pytest.mark.parametrize(("schema", "row", "expected"), MATH_ROWS)
def test_mathematics(tmp_path: Path, schema: str, row: dict[str, Any], expected: tuple[Any, ...]) -> None:
    problems = read(tmp_path, row)
    (problem,) = problems
    prompt, answer, solution, identity = expected
    assert (problems.schema, problem.prompt, problem.answer, problem.solution) == (schema, prompt, answer, solution)
    assert identity is None or problem.prompt_id == identity
    assert "messages" not in problem.extra and "generations" not in problem.extra


@pytest.mark.parametrize(("schema", "row", "tests", "shown"), CODE_ROWS)
def test_code(tmp_path: Path, schema: str, row: dict[str, Any], tests: list[dict[str, Any]], shown: str) -> None:
    problems = read(tmp_path, row)
    (problem,) = problems
    assert (problems.schema, problem.answer) == (schema, "")
    assert json.loads(json.dumps(problem.extra["tests"])) == tests
    assert "Q" in problem.question or schema == "humaneval"
    assert shown in problem.question
    assert ("from typing import" in problem.extra.get("setup", "")) == (shown == "class Solution")
    if schema == "humaneval":
        assert problem.extra["setup"] == "import math\n\n\n" and "return x" in (problem.solution or "")


def test_every_schema_is_in_the_tests_and_on_the_page() -> None:
    assert {row[0] for row in MATH_ROWS} | {row[0] for row in CODE_ROWS} | {"verl_bare"} == set(SCHEMAS)
    assert schema_table() in DOCS.read_text(), "docs/data.md lacks the table that schema_table() writes"


def test_the_instruction_of_dapo_is_removed_on_request(tmp_path: Path) -> None:
    row = MATH_ROWS[0][1]
    other = row | {"prompt": user("Solve the following math problem step by step.\n\n3 + 3?"), "extra_info": None}
    assert [p.prompt for p in read(tmp_path, row, other, schema="verl_bare")] == [
        "2 + 2?",
        other["prompt"][0]["content"],
    ]


def test_a_pickle_that_does_more_than_hold_a_text_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    row = {"question_content": "Q", "public_test_cases": "[]"}
    hostile = base64.b64encode(zlib.compress(pickle.dumps(Hostile()))).decode()
    for private, reason in ((hostile, "more than a text"), ("nonsense!", "neither JSON nor packed"), ("[", "not JSON")):
        with pytest.raises(UserError, match=reason):
            read(tmp_path, row | {"private_test_cases": private})
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "tests": [{"input": "1"}]}, "test 1 of `tests` must have the fields"),
        ({"prompt": "Q", "tests": [{"assert": 1}]}, "`assert` of test 1 must be text"),
        ({"prompt": "Q", "tests": []}, "`answer` is missing"),
        ({"question": "Q", "input_output": "{"}, "`input_output` is not JSON"),
        ({"question": "Q", "input_output": '{"inputs": [], "outputs": []}'}, "holds no tests"),
        ({"question": "Q", "input_output": '{"inputs": ["1"], "outputs": []}'}, "lists of the same length"),
        ({"problem": "Q", "tests": '[{"input": "1", "output": "2", "testtype": "functional"}]'}, "does not name"),
        ({"prompt": [], "reward_model": {"ground_truth": "1"}}, "`prompt` has no user turn"),
        ({"prompt": user("Q"), "reward_model": "x"}, "`reward_model.ground_truth` is missing"),
        ({"prompt": user("Q"), "reward_model": {"ground_truth": ["1", "2"]}}, "must hold one answer, found 2"),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as e:
        read(tmp_path, row)
    assert "rows.jsonl:1: " in str(e.value) and reason in str(e.value)


def test_fields_and_schema_by_name(tmp_path: Path) -> None:
    row = {"q": {"text": ["Q"]}, "target": {"value": 3.0}, "how": "H"}
    problem = read(tmp_path, row, fields={"prompt": "q.text.0", "answer": "target.value", "solution": "how"}).problems[
        0
    ]
    assert (problem.prompt, problem.answer, problem.solution) == ("Q", "3", "H")
    with pytest.raises(UserError, match=r"rows.jsonl:1: `target.v` \(data.fields.answer\) is missing"):
        read(tmp_path, row, fields={"prompt": "q.text.0", "answer": "target.v"})
    with pytest.raises(UserError, match="no field 'anwser': did you mean 'answer'"):
        read(tmp_path, row, fields={"anwser": "x"})
    with pytest.raises(UserError, match="no schema 'gsm9k': did you mean 'gsm8k'"):
        read(tmp_path, row, schema="gsm9k")


def test_copies_and_ids_of_published_sets(tmp_path: Path) -> None:
    rows = [
        {"problem": "P", "answer": "1"},
        {"problem": "P", "answer": "1", "id": 7},
        {"problem": "R", "answer": "1", "id": 7},
        {"problem": "S", "answer": "2", "id": 7},
        {"problem": "T", "answer": "proof", "solution": "none"},
    ]
    problems = read(tmp_path, *rows)
    assert [p.prompt for p in problems] == ["P", "R", "S"] and len({p.prompt_id for p in problems}) == 3
    assert problems.left_out == {"duplicates": 1, "without an answer": 1}
    with pytest.raises(
        UserError, match=r"rows.jsonl:2: the same problem and answer as those of line 1.*duplicates drop"
    ):
        read(tmp_path, rows[0], rows[0], filters=Filters(duplicates="error"))
    same = {"prompt": "P", "answer": "1"}
    assert read(tmp_path, same, same, filters=Filters(duplicates="drop")).left_out == {"duplicates": 1}
    with pytest.raises(
        UserError, match="every row is left out, the first for this reason: .*rows.jsonl:1: no `answer`"
    ):
        read(tmp_path, {"problem": "T", "solution": "none"})


def test_filters(tmp_path: Path) -> None:
    rates = [0.0, 0.25, 0.5, 1.0, None]
    rows = [{"problem": "p" * (i + 1), "answer": "1" * (i + 1), "stats": {"rate": r}} for i, r in enumerate(rates)]
    filters = Filters(pass_rate="stats.rate", min_pass_rate=0.1, max_pass_rate=0.5)
    problems = read(tmp_path, *rows, filters=filters)
    assert [p.extra["stats"]["rate"] for p in problems] == [0.25, 0.5]
    assert problems.left_out == {"too hard": 1, "too easy": 1, "without a pass rate": 1}
    assert "1 too hard left out" in problems.describe()
    assert len(read(tmp_path, *rows, filters=Filters(max_prompt_chars=3))) == 3
    assert len(read(tmp_path, *rows, filters=Filters(max_answer_chars=2))) == 2
    kept = read(tmp_path, *rows).keep(lambda problem: len(problem.question) > 3, "short")
    assert len(kept) == 2 and kept.left_out["short"] == 3


def test_every_row_has_an_outcome(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\nx\n{"prompt": "a", "answer": "1"}\n')
    outcomes = list(ProblemReader(path).outcomes())
    assert [outcome.refused for outcome in outcomes] == [False, True, True, True]
    assert isinstance(outcomes[0].problem, Problem)


@pytest.mark.slow  # needs the published files
@pytest.mark.parametrize(
    ("name", "schema", "count"),
    [
        ("aime24", "competition", 30),
        ("amc23", "competition", 40),
        ("minerva_math", "competition", 272),
        ("gsm8k_test", "gsm8k", 1319),
        ("gsm8k_train", "gsm8k", 7473),
    ],
)
def test_real_files(name: str, schema: str, count: int) -> None:
    folder = os.environ.get("ASD_MEGATRON_DATA")
    assert folder is not None, "set ASD_MEGATRON_DATA to the folder with the published files"
    problems = load_problems(Path(folder) / f"{name}.jsonl")
    assert (problems.schema, len(problems), sum(problems.left_out.values())) == (schema, count, 0)
