from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.data.problems import ProblemSet, load_problems
from asd_megatron.errors import UserError
from asd_megatron.records import Problem


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8")
    return path


def refused(path: Path, *lines: Any) -> str:
    with pytest.raises(UserError) as e:
        load_problems(write(path, *lines))
    return str(e.value)


GOOD = {"prompt": "1 + 1?", "answer": "2"}


def test_canonical_fields(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    problems = load_problems(
        write(
            tmp_path / "p.jsonl",
            {
                "prompt": "1 + 1?",
                "answer": " 2 ",
                "solution": "1 + 1 = 2",
                "id": 7,
                "level": 3,
                "tests": [[1], {"a": 2}],
            },
            "",
            {"messages": turns, "answer": 4.0},
        )
    )
    first, second = problems
    assert (first.prompt_id, first.prompt, first.answer, first.solution) == ("7", "1 + 1?", "2", "1 + 1 = 2")
    assert first.extra == {"level": 3, "tests": ((1,), {"a": 2})}
    assert second.answer == "4" and second.question == "2 + 2?" and second.prompt is None and second.solution is None
    assert problems.schema == "canonical" and len(problems) == 2 and problems.take(1) == [first]


def test_extra_is_read_only_and_travels_between_processes(tmp_path: Path) -> None:
    problem = load_problems(write(tmp_path / "p.jsonl", GOOD | {"tests": {"a": [1]}})).problems[0]
    for change in (
        lambda m: m.update(b=1),
        lambda m: m.__setitem__("b", 1),
        lambda m: m.pop("tests"),
        lambda m: m.clear(),
    ):
        with pytest.raises(TypeError, match="read-only"):
            change(problem.extra)
    copy = pickle.loads(pickle.dumps(problem))
    assert copy == problem
    with pytest.raises(TypeError, match="read-only"):
        copy.extra["tests"]["a"] = 2


def test_prompt_ids_without_an_id_depend_on_the_content_alone(tmp_path: Path) -> None:
    a = load_problems(write(tmp_path / "a.jsonl", GOOD, {"prompt": "x", "answer": "2"}))
    b = load_problems(write(tmp_path / "b.jsonl", {"prompt": "x", "answer": 2, "note": "n"}, GOOD))
    assert [p.prompt_id for p in a] == [p.prompt_id for p in reversed(list(b))]
    assert a.problems[0].prompt_id == "859bd0d75c9cd42b"  # for ever: dumps and sampling noise are keyed by it


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "x", "answer": "1"', "not JSON"),
        ('["x"]', "expected a JSON object, found a list"),
        ("nonsense", "not JSON"),
        ('{"prompt": "x", "answer": NaN}', "NaN is not JSON"),
        ('{"prompt": "x", "answer": 1e999}', "too large"),
        ('{"prompt": "x", "answer": "1", "extra": [-1e999]}', "too large"),
        ('{"prompt": "x", "answer": ' + "7" * 5000 + "}", "too large a number (5,000 digits)"),
        ('{"prompt": "x", "answer": "1", "extra": {"a": [' + "7" * 5000 + "]}}", "too large"),
        ('{"prompt": "x", "answer": "1", "id": -' + "7" * 5000 + "}", "too large"),
        ('{"prompt": "x", "prompt": "y", "answer": "1"}', "'prompt' is given twice"),
        ('{"prompt": "\\ud800", "answer": "1"}', "surrogate"),
        ('{"prompt": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply"),
        ('{"prompt": "x", "answer": "1", "extra": ' + "[" * 600 + "]" * 600 + "}", "nested too deeply"),
        ('{"prompt": "x", "answer": "1", "extra": ' + '{"a":' * 990 + "1" + "}" * 991, "nested too deeply"),
        ('{"messages": ' + "[" * 101 + "]" * 101 + ', "answer": "1"}', "nested too deeply"),
        ({"answer": "1", "extra": 1}, "give `prompt` or `messages`, found neither"),
        ({"prompt": "x"}, "`answer` is missing"),
        ({"prompt": "x", "answer": None}, "`answer` is missing"),
        ({"prompt": "x", "answer": True}, "`answer` must be text, found a boolean"),
        ({"prompt": "x", "answer": ["1"]}, "`answer` must be text, found a list"),
        ({"prompt": "x", "answer": " "}, "`answer` is empty"),
        ({"prompt": "", "answer": "1"}, "`prompt` is empty"),
        ({"prompt": 3, "answer": "1"}, "`prompt` must be text, found a number"),
        ({"prompt": [{"role": "user", "content": "x"}], "answer": "1"}, "give chat turns as `messages`"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}], "answer": "1"}, "not both"),
        ({"prompt": "x", "answer": "1", "solution": 5}, "`solution` must be text"),
        ({"prompt": "x", "answer": "1", "id": {}}, "`id` must be text, found an object"),
        ({"messages": [], "answer": "1"}, "list of turns"),
        ({"messages": ["x"], "answer": "1"}, "turn 1 of `messages` must be an object"),
        ({"messages": [{"role": "user", "content": 1}], "answer": "1"}, "must have text as `content`, found a number"),
        ({"messages": [{"role": "bot", "content": "x"}], "answer": "1"}, "has the role 'bot'"),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}], "answer": "1"}, "`role` and `content` alone"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "answer": "1"},
            "the last turn of `messages` must be a user turn, found assistant",
        ),
    ],
)
def test_a_malformed_line_is_named_with_file_line_and_reason(tmp_path: Path, line: Any, reason: str) -> None:
    message = refused(tmp_path / "p.jsonl", GOOD, "", line)
    assert message.startswith(f"{tmp_path / 'p.jsonl'}:3: ") and reason in message


def test_numbers_are_read_as_they_are_written(tmp_path: Path) -> None:
    written = ["6.02e23", "1e23", "1E-400", "1.50", "27.0", "100", "-0.5", "9007199254740993", "12345678901234567890.5"]
    lines = [f'{{"prompt": "{i}", "answer": {text}, "id": {i}.0, "n": {text}}}' for i, text in enumerate(written)]
    problems = load_problems(write(tmp_path / "p.jsonl", *lines))
    assert [p.answer for p in problems] == [*written[:4], "27", *written[5:]]
    assert [p.prompt_id for p in problems] == [str(i) for i in range(len(written))]
    numbers = [p.extra["n"] for p in problems]
    assert numbers == [json.loads(text) for text in written] and {type(n) for n in numbers} == {int, float}


def test_a_blank_solution_is_none(tmp_path: Path) -> None:
    for name in ("prompt", "problem"):
        lines = [{name: f"{i}", "answer": "1", "solution": s} for i, s in enumerate(["", " \n", None, "S"])]
        assert [p.solution for p in load_problems(write(tmp_path / "p.jsonl", *lines))] == [None, None, None, "S"]


@pytest.mark.parametrize(
    ("content", "kind", "remedy"),
    [
        (b"PK\x03\x04", "zip", "unzip"),
        (b"\x93NUMPY\x01\x00", "binary", "JSONL, JSON, Parquet"),
        (b"ARROW1\x00", "Arrow", "Dataset.save_to_disk"),
        ('{"prompt": "x", "answer": "1"}'.encode("utf-16"), "UTF-16", "iconv"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", "git lfs pull"),
        (b"PAR1\x15\x04", "damaged Parquet", ""),
        (b"\x1f\x8b\x08\x00", "damaged gzip", "get it again"),
        (b"\x28\xb5\x2f\xfd\x00", "damaged Zstandard", "get it again"),
        (b'[\n {"prompt": "x",\n "answer" "1"}\n]\n', "line 3, column 11", "one JSON document"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, content: bytes, kind: str, remedy: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as e:
        load_problems(path)
    assert str(path) in str(e.value) and kind in str(e.value) and remedy in str(e.value)


def test_first_line_without_known_fields(tmp_path: Path) -> None:
    assert "no `prompt` or `messages` (fields: `text`); docs/data.md" in refused(tmp_path / "p.jsonl", {"text": "x"})


def test_duplicates_are_refused(tmp_path: Path) -> None:
    with_id = GOOD | {"id": "a"}
    assert ":3: the id 'a' is that of line 1" in refused(tmp_path / "p.jsonl", with_id, GOOD, with_id | {"prompt": "y"})
    assert ":2: the same problem and answer as those of line 1" in refused(tmp_path / "p.jsonl", GOOD, GOOD)


def test_missing_empty_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read .*null"):
        load_problems("a\0b")
    with pytest.raises(UserError, match="cannot read .*No such file"):
        load_problems(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder without data files"):
        load_problems(tmp_path)
    assert "has no problems" in refused(tmp_path / "p.jsonl")
    assert "has no problems" in refused(tmp_path / "p.jsonl", "", "  ")
    (tmp_path / "binary").write_bytes(b'{"prompt": "\xff", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"binary:1: not UTF-8 text \(byte 13\)"):
        load_problems(tmp_path / "binary")


def test_other_line_separators_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b", "answer": "1"}\r\n'.encode())
    assert load_problems(tmp_path / "p.jsonl").problems[0].prompt == "a\u2028b"


def test_gsm8k_schema(tmp_path: Path) -> None:
    answer = "She sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = $<<48+24=72>>1,072.\n#### 1,072"
    problems = load_problems(write(tmp_path / "g.jsonl", {"question": "How many clips?", "answer": answer}))
    problem = problems.problems[0]
    assert problems.schema == "gsm8k" and problem.answer == "1,072" and problem.prompt == "How many clips?"
    assert problem.solution == "She sold 48/2 = 24 clips.\nIn all 48+24 = $1,072.\n#### 1,072"
    reason = refused(tmp_path / "g.jsonl", {"question": "Q", "answer": answer}, {"question": "Q2", "answer": "72"})
    assert ":2: `answer` has no final line `#### N`; to give a plain answer name the fields" in reason
    assert ":2: `question` or `answer` is missing" in refused(
        tmp_path / "g.jsonl", {"question": "Q", "answer": answer}, {"prompt": "Q2", "answer": "72"}
    )


def test_competition_schema(tmp_path: Path) -> None:
    problems = load_problems(
        write(
            tmp_path / "c.jsonl",
            {"id": 60, "problem": "P1", "question": "P1", "answer": 27.0, "url": "u"},
            {"idx": 3, "problem": "P2", "solution": r"so \boxed{1} or rather $\boxed{\frac{1}{2}}$.", "type": "t"},
            {"problem": "P3", "solution": "S", "answer": "204"},
        )
    )
    assert problems.schema == "competition"
    assert [(p.prompt_id, p.answer) for p in problems][:2] == [("60", "27"), ("3", r"\frac{1}{2}")]
    assert problems.problems[0].extra == {"question": "P1", "url": "u"} and problems.problems[0].solution is None
    assert problems.problems[2].answer == "204" and problems.problems[2].solution == "S"
    blank = load_problems(write(tmp_path / "c.jsonl", {"problem": "P", "answer": " ", "solution": r"\boxed{3}"}))
    assert blank.problems[0].answer == "3"
    assert "no `answer`, and no `\\boxed{...}`" in refused(tmp_path / "c.jsonl", {"problem": "P", "solution": "no box"})


def test_problem_and_response_as_messages_beside_the_problem(tmp_path: Path) -> None:
    """Lines of NuminaMath-CoT and OpenR1-Math."""
    turns = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "So 3."}]
    line = {"source": "x", "problem": "1 + 2?", "solution": "So \\boxed{3}.", "messages": turns}
    first, second = load_problems(write(tmp_path / "n.jsonl", line, line | {"problem": "2?", "messages": turns[:1]}))
    assert (first.prompt, first.answer, first.messages, first.extra) == ("1 + 2?", "3", None, {"source": "x"})
    assert second.prompt == "2?"
    asked = load_problems(write(tmp_path / "n.jsonl", line | {"messages": turns[:1]}))
    assert asked.schema == "competition"  # without `answer` the messages alone would not do
    canonical = load_problems(write(tmp_path / "m.jsonl", {"messages": turns[:1], "answer": "3", "problem": "tag"}))
    assert canonical.problems[0].extra == {"problem": "tag"} and canonical.problems[0].messages is not None
    gsm8k = load_problems(write(tmp_path / "g.jsonl", {"question": "Q", "answer": "#### 5", "messages": turns}))
    assert (gsm8k.schema, gsm8k.problems[0].answer) == ("gsm8k", "5")
    null = load_problems(write(tmp_path / "c.jsonl", {"prompt": None, "messages": None, "problem": "P", "answer": "1"}))
    assert null.problems[0].prompt == "P"
    reason = refused(tmp_path / "n.jsonl", {"messages": turns, "answer": "3"})
    assert "`messages` is read as the prompt" in reason and "remove" in reason


def problem_set(n: int, shuffle: bool = True) -> ProblemSet:
    return ProblemSet("p.jsonl", tuple(Problem(str(i), "1", prompt=str(i)) for i in range(n)), shuffle=shuffle)


def ids(problems: list[Problem]) -> list[int]:
    return [int(p.prompt_id) for p in problems]


def test_shuffled_order_is_a_function_of_seed_and_step() -> None:
    problems = problem_set(10)
    epochs = [[ids(problems.batch(3 * e + s, 3, seed=5)) for s in (1, 2, 3)] for e in range(4)]
    for epoch in epochs:
        assert len({i for batch in epoch for i in batch}) == 9  # no problem twice in an epoch
    assert len({str(e) for e in epochs}) == 4
    assert ids(problem_set(10).batch(5, 3, seed=5)) == epochs[1][1]  # no state
    assert ids(problems.batch(5, 3, seed=6)) != epochs[1][1]
    assert ids(problems.batch(1, 10, seed=1)) == [7, 2, 9, 1, 6, 0, 4, 8, 5, 3]  # for ever


def test_unshuffled_order_goes_round() -> None:
    problems = problem_set(5, shuffle=False)
    assert [ids(problems.batch(s, 3, seed=0)) for s in (1, 2, 3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_a_step_larger_than_the_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"p\.jsonl has 5 problems, fewer than the 6 of one step: lower sampling"):
        problem_set(5).batch(1, 6, seed=0)
    assert sorted(ids(problem_set(5).batch(1, 5, seed=0))) == [0, 1, 2, 3, 4]
