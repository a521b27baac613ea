from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.cli.main import main
from tests.data.tokenizers import tokenizer_folder

GOOD = [
    {"prompt": "1 + 1?", "answer": "2", "solution": "So \\boxed{2}"},
    {"prompt": "2 + 2?", "answer": "4", "id": "b"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    status = main(["data", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out + out.err


def test_check_of_a_good_file(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    status, text = run(capsys, "check", file)
    assert status == 0 and text.rstrip().endswith("a run reads this file")
    for expected in ("canonical (your own files)", "1 with a solution", "6 to 6 characters", "1 + 1?"):
        assert expected in text
    status, text = run(capsys, "check", file, "--json")
    (report,) = json.loads(text)
    assert report["problems"] == 2 and report["accepted"] and report["characters"]["answer"] == [1, 1, 1]


def test_check_names_every_row_that_is_refused_or_left_out(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    file.write_text(
        file.read_text() + "".join(f'{{"prompt": "p{i}"}}\n' for i in range(12)) + json.dumps(GOOD[1]) + "\n"
    )
    status, text = run(capsys, "check", file)
    assert status == 1 and "a run refuses this file" in text
    assert f"{file}:3: `answer` is missing" in text and "and 3 more (--all prints them)" in text
    status, text = run(capsys, "check", file, "--all", "--duplicates", "drop")
    assert status == 1 and f"{file}:14: `answer` is missing" in text
    assert "left out: duplicates" in text and f"{file}:15: the same problem and answer as those of line 2" in text


def test_check_with_fields_and_of_supervised_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"q": "x", "a": {"v": 1}}]')
    assert run(capsys, "check", path, "--fields", "prompt=q", "answer=a.v")[0] == 0
    status, text = run(capsys, "check", path)
    assert status == 1 and "row 1: no `prompt` or `messages` (fields: `q`, `a`)" in text
    assert run(capsys, "check", path, "--fields", "prompt")[0] == 2
    assert run(capsys, "check", tmp_path / "none.jsonl")[0] == 2
    path.write_text('{"instruction": "x", "output": "y"}\n{"messages": []}\n')
    status, text = run(capsys, "check", "--sft", path)
    assert status == 1 and f"{path}:2: `response` is missing" in text and "1 to 1 characters" in text


def test_show_prints_the_prompts_as_the_model_sees_them(
    capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path
) -> None:
    model = tokenizer_folder(tmp_path / "model")
    status, text = run(capsys, "show", file, "--problem", "1", "--model", model)
    assert status == 0
    student, wrong, correct = text.split("\n\nteacher of ")
    assert "<|start|>user\n1 + 1?<|end|>\n<|start|>assistant\n" in student and "tokens" in student
    assert (
        "shown the file's solution" in wrong
        and "So \\boxed{2}\n\nPrevious assessment:\nYour answer is incorrect" in wrong
    )
    assert "Your answer is correct" in correct
    status, text = run(capsys, "show", file, "--problem", "b", "--model", model)
    assert status == 0 and "shown another response" in text
    assert run(capsys, "show", file, "--problem", "9", "--model", model)[0] == 2
    with pytest.raises(SystemExit):
        run(capsys, "show", file)
