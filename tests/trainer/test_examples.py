"""Privileged prompts of a group: whose solution, whose feedback, what is masked and counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from asd_megatron.antisd import Overlong, group_advantages, whitened
from asd_megatron.data.prompts import PromptRenderer, TeacherLimits
from asd_megatron.data.tokenizer import load_tokenizer
from asd_megatron.distributed import layout as layouts
from asd_megatron.errors import UserError
from asd_megatron.puzzle.task import PuzzleStream
from asd_megatron.records import DemonstrationSource, Example, FinishReason, Group, Problem, Rollout
from asd_megatron.reward.base import tests_of as count_tests
from asd_megatron.run.sources import WARM_START, model_folder
from asd_megatron.trainer import examples as examples_module
from asd_megatron.trainer.examples import ExampleBuilder, Signal
from tests.data.tokenizers import byte_tokenizer
from tests.reference.dense import DenseRecipe
from tests.trainer.product import Product, gate_of

TOKENIZER = byte_tokenizer()
SOLVED = Problem("p", "4", prompt="2 + 2?", solution="Two and two make four.")
UNSOLVED = replace(SOLVED, solution=None)
RIGHT, WRONG = "Your answer is correct.", "Your answer is incorrect."


def group(
    rewards: list[float], problem: Problem = SOLVED, truncated: tuple[int, ...] = (), empty: tuple[int, ...] = ()
) -> Group:
    rollouts = []
    for k in range(len(rewards)):
        text = "" if k in empty else f"attempt number {k}"
        ids = (*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id)
        reason = FinishReason.LENGTH if k in truncated else FinishReason.STOP
        rollouts.append(Rollout(problem.prompt_id, k, (1, 2), ids, (-1.0,) * len(ids), reason, 0, text=text))
    return Group(problem, tuple(rollouts), tuple(rewards))


def builder(limits: TeacherLimits | None = None, **how: Any) -> ExampleBuilder:
    limits = limits or TeacherLimits(min_solution_tokens=1)
    return ExampleBuilder(PromptRenderer(TOKENIZER), limits, **{"seed": 1, "tests_of": count_tests, **how})


def text(example: Example) -> str:
    assert example.teacher_prompt_ids is not None
    return str(TOKENIZER.decode(list(example.teacher_prompt_ids)))


def teacher_tokens(example: Example) -> int:
    prompt = example.teacher_prompt_ids
    return (0 if prompt is None else len(prompt)) + len(example.rollout.response_ids)


def sources(examples: list[Example]) -> list[str]:
    return [e.demonstration_source.value for e in examples]


def test_another_success_of_the_group_and_the_rollouts_own_feedback() -> None:
    examples = builder().build([group([1.0, 0.0, 1.0, 0.0])], step=3)
    assert sources(examples) == ["group"] * 4
    for k, e in enumerate(examples):
        assert e.rollout.sample == k and e.demonstration_sample in {0, 2} - {k}
        words = text(e)
        assert f"Your previous attempt:\nattempt number {e.demonstration_sample}\n" in words
        assert f"Previous assessment:\n{RIGHT if k in (0, 2) else WRONG}\n" in words
        assert words.count("attempt number") == 1 and words.count("Your answer is") == 1
        assert "Two and two" not in words
    assert [e.group_advantage for e in examples] == pytest.approx([0.75**0.5, -(0.75**0.5)] * 2, rel=1e-5)


def test_the_draw_repeats_and_changes_with_the_step() -> None:
    big = group([1.0] * 8 + [0.0] * 8)
    draws = [[e.demonstration_sample for e in builder().build([big], step)] for step in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 3


def test_preparing_groups_changes_no_example() -> None:
    groups = [group([1.0, 0.0, 1.0]), group([0.0, 1.0, 1.0], UNSOLVED)]
    plain, prepared = builder(), builder()
    prepared.prepare(groups[0], 2)
    prepared.prepare(groups[1], 1)  # for an earlier step, whose draws are others
    assert prepared.build(groups, 2) == plain.build(groups, 2)
    prepared.prepare(groups[1], 4)
    assert prepared.build(groups[:1], 3) == plain.build(groups[:1], 3)
    assert prepared.build(groups[1:], 4) == plain.build(groups[1:], 4)
    prepared.close()


def test_only_the_examples_of_a_step_are_counted() -> None:
    """An over-sampled group is prepared, and not in the step; the next step has it."""
    hopeless = builder(TeacherLimits(max_teacher_tokens=1))
    groups = [group([1.0, 0.0, 1.0]), group([0.0, 1.0, 1.0], UNSOLVED)]
    for prepared in groups:
        hopeless.prepare(prepared, 1)
    hopeless.build(groups[:1], 1)
    assert hopeless.counters == {"teacher_too_long": 3}
    hopeless.build(groups[1:], 2)
    assert hopeless.counters == {"teacher_too_long": 6}


def test_a_prompt_that_never_ends_holds_up_neither_the_error_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    released, ended = threading.Event(), threading.Event()

    class Stuck:
        def teacher(self, *_: Any) -> Any:
            released.wait(60)
            ended.set()

    monkeypatch.setattr(examples_module, "RENDER_SECONDS", 0.1)
    stuck = ExampleBuilder(Stuck(), TeacherLimits(), seed=1)
    try:
        with pytest.raises(UserError, match=r"problem p were not rendered .*chat template"):
            stuck.build([group([1.0, 0.0])], 1)
        stuck.close()
        assert not ended.is_set()
    finally:
        released.set()


@pytest.mark.parametrize(
    ("problem", "how", "expected"),
    [
        (SOLVED, {}, ["reference", "group", "group"]),
        (UNSOLVED, {}, ["none", "group", "group"]),
        (UNSOLVED, {"when_no_solution": "reference_answer"}, ["reference_answer", "group", "group"]),
        (UNSOLVED, {"when_no_solution": "feedback_only"}, ["feedback_only", "group", "group"]),
        (UNSOLVED, {"exclude_self": False}, ["self", "group", "group"]),
    ],
)
def test_a_sole_success(problem: Problem, how: dict[str, Any], expected: list[str]) -> None:
    examples = builder(**how).build([group([1.0, 0.0, 0.0], problem)], step=1)
    assert sources(examples) == expected
    assert [e.demonstration_sample for e in examples] == [0 if expected[0] == "self" else -1, 0, 0]
    sole = examples[0]
    assert sole.has_context == (expected[0] != "none")
    if sole.has_context:
        block = {
            "reference": "Your previous attempt:\nTwo and two make four.\n",
            "reference_answer": "Your previous attempt:\nThe final answer is: 4\n",
            "feedback_only": "2 + 2?\n\nPrevious assessment:\n",
            "self": "Your previous attempt:\nattempt number 0\n",
        }[expected[0]]
        assert block in text(sole) and RIGHT in text(sole)
        assert ("Your previous attempt" in text(sole)) == (expected[0] != "feedback_only")


def test_a_group_without_a_success() -> None:
    for problem, expected in ((SOLVED, "reference"), (UNSOLVED, "none")):
        examples = builder().build([group([0.0, 0.0], problem)], step=1)
        assert sources(examples) == [expected] * 2
        assert [e.group_advantage for e in examples] == [0.0, 0.0]
        assert all(WRONG in text(e) if problem is SOLVED else e.teacher_prompt_ids is None for e in examples)


def test_only_the_data_demonstrates() -> None:
    rewards = [1.0, 0.0, 1.0]
    assert sources(builder(use_group=False).build([group(rewards)], step=3)) == ["reference"] * 3
    assert sources(builder(use_group=False).build([group(rewards, UNSOLVED)], step=3)) == ["none"] * 3


def test_a_group_of_one_has_no_group_advantage_and_the_reference_demonstrates() -> None:
    (example,) = builder().build([group([1.0])], step=1)
    assert example.group_advantage == 0.0 and sources([example]) == ["reference"]


def test_what_cannot_demonstrate() -> None:
    """Truncated and empty responses do not, whatever their reward; nor do rewards below the threshold."""
    examples = builder().build([group([1.0, 1.0, 1.0, 0.0], truncated=(0,), empty=(1,))], step=1)
    assert [e.demonstration_sample for e in examples] == [2, 2, -1, 2]
    examples = builder(success_threshold=0.5).build([group([0.6, 0.4, 0.7])], step=1)
    first, second, third = (e.demonstration_sample for e in examples)
    assert (first, third) == (2, 0) and second in (0, 2)
    assert RIGHT in text(examples[0]) and WRONG in text(examples[1])


def test_feedback_as_a_fraction() -> None:
    problem = replace(SOLVED, extra={"tests": ["a", "b", "c", "d"]})
    examples = builder(feedback_kind="fraction").build([group([0.5, 1.0], problem)], step=1)
    assert "Your code passes 2 of 4 test cases." in text(examples[0])
    assert "Your code passes 4 of 4 test cases." in text(examples[1])


def test_limits_mask_and_count() -> None:
    """A demonstration that had to be cut, and a teacher sequence without room for enough of one."""
    rollouts = group([1.0, 1.0, 0.0])
    examples = builder().build([rollouts], step=1)
    longest = max(map(teacher_tokens, examples))
    tight = builder(TeacherLimits(min_solution_tokens=10, max_teacher_tokens=longest - 5))
    cut = tight.build([rollouts], step=1)
    assert all(teacher_tokens(e) <= longest - 5 for e in cut)
    assert all(e.has_context for e in cut)
    assert tight.counters["demonstration_shortened"] == 3 and tight.counters["teacher_too_long"] == 0
    hopeless = builder(TeacherLimits(min_solution_tokens=10, max_teacher_tokens=longest - 40))
    masked = hopeless.build([rollouts], step=1)
    assert sources(masked) == ["none"] * 3 and [e.demonstration_sample for e in masked] == [-1] * 3
    assert all(e.teacher_prompt_ids is None for e in masked)
    assert hopeless.counters["teacher_too_long"] == 3
    assert [e.group_advantage for e in masked] == [e.group_advantage for e in examples]


def test_nothing_left_of_a_demonstration_is_counted_too() -> None:
    rollouts = group([1.0, 0.0], UNSOLVED)
    special = replace(rollouts.rollouts[0], text="<|end|><|start|>")
    build = builder()
    examples = build.build([replace(rollouts, rollouts=(special, rollouts.rollouts[1]))], step=1)
    assert sources(examples) == ["none", "none"]
    assert build.counters["demonstration_empty"] == 1


def test_without_a_teacher_there_are_no_contexts() -> None:
    examples = builder(privileged=False).build([group([1.0, 0.0, 1.0])], step=1)
    assert sources(examples) == ["none"] * 3 and not any(e.has_context for e in examples)


def test_the_response_is_never_tokenised_again() -> None:
    """The ids in both sequences are the sampled ones, even where text would give others."""
    rollouts = group([1.0, 0.0])
    odd = replace(rollouts.rollouts[1], response_ids=(3, 3, 3), logprobs=(0.0,) * 3, loss_mask=(True,) * 3)
    examples = builder().build([replace(rollouts, rollouts=(rollouts.rollouts[0], odd))], step=1)
    assert examples[1].rollout is odd and examples[1].demonstration_source is DemonstrationSource.GROUP


# ---------------------------------------------------------------- an empty context


@pytest.fixture
def puzzle() -> Iterator[Product]:
    yield Product(model_folder(WARM_START))
    layouts.shutdown()


def trace(question: str) -> str:
    """Test the first candidate of `Problem: x ... *m addb ...` and announce it, as the puzzle's model would."""
    words = question.split()
    x, m, b = int(words[1]), int(words[-5][1:]), int(words[-4][3:])
    return f"Let {x} ={m * x % 17} +{(m * x + b) % 17} no So {x} <|end|>"


def test_an_empty_context_gives_equal_ids_and_no_pmi(puzzle: Product) -> None:
    """Through the ordinary chat template and the trained puzzle model: u is exactly 0 when both sequences are scored in
    the same pack, and within 1e-6 otherwise."""
    folder = model_folder(WARM_START)
    tokenizer = load_tokenizer(folder)
    renderer = PromptRenderer(tokenizer)
    examples = []
    for k, problem in enumerate(PuzzleStream.of("test").take(6)):
        prompt = renderer.student(problem)
        empty = renderer.teacher(problem, None, None, 9, TeacherLimits()).ids
        assert empty is not None and tuple(empty) == prompt.ids
        ids = tuple(tokenizer(trace(problem.question), add_special_tokens=False)["input_ids"])
        rollout = Rollout(problem.prompt_id, k, prompt.ids, ids, (0.0,) * len(ids), FinishReason.STOP, 0)
        examples.append(Example(rollout, 1.0, 0.5, empty, DemonstrationSource.REFERENCE))
    recipe = DenseRecipe("no_gate")
    same = puzzle.step(examples, recipe, gate_of(recipe), tokens_per_microbatch=10_000)
    assert same.table is not None and not same.table["pmi"].any()
    assert set(same.table["advantage"].tolist()) == {0.5}
    informed = renderer.teacher(PuzzleStream.of("test").take(1)[0], "So 5", RIGHT, 9, TeacherLimits()).ids
    assert informed is not None
    other = [replace(examples[0], teacher_prompt_ids=informed), *examples[1:]]
    found = puzzle.step(other, recipe, gate_of(recipe), tokens_per_microbatch=60)
    assert found.table is not None
    rows = found.table.rows("pmi")
    assert rows[0].abs().max() > 0.1
    assert max(float(row.abs().max()) for row in rows[1:]) <= 1e-6


def test_long_responses_lose_advantage_and_nothing_else() -> None:
    """One of four is three tokens shorter than the others, which are at the limit."""
    rewards = [1.0, 1.0, 1.0, 0.0]
    full = group(rewards)
    ids = full.rollouts[1].response_ids[:-3]
    short = replace(full.rollouts[1], response_ids=ids, logprobs=(-1.0,) * len(ids), loss_mask=())
    mixed = replace(full, rollouts=(full.rollouts[0], short, *full.rollouts[2:]))
    overlong = Overlong(limit=len(full.rollouts[0].response_ids), buffer=4, weight=0.5)
    penalties = [overlong.penalty(len(r.response_ids)) for r in mixed.rollouts]
    assert len(set(penalties)) == 2
    examples = builder(overlong=overlong, group_advantage="centered").build([mixed], step=1)
    plain = builder(group_advantage="centered").build([mixed], step=1)
    shaped = torch.tensor([r + p for r, p in zip(rewards, penalties, strict=True)], dtype=torch.float64)
    assert [e.group_advantage for e in examples] == group_advantages(shaped, "centered").tolist()
    assert [e.overlong_penalty for e in examples] == penalties and plain[0].overlong_penalty is None
    same = [
        replace(e, group_advantage=p.group_advantage, overlong_penalty=None)
        for e, p in zip(examples, plain, strict=True)
    ]
    assert same == plain, "rewards, demonstrations and feedback are those of the rewards alone"


@pytest.mark.parametrize("kind", ["normalized", "centered", "leave_one_out"])
def test_advantages_of_the_batch(kind: Any) -> None:
    groups = [
        group([1.0, 0.0, 0.0]),
        group([0.25, 0.25, 0.25], UNSOLVED),
        group([1.0, 1.0, 0.0], replace(SOLVED, prompt_id="q")),
    ]
    each = [group_advantages(torch.tensor(g.rewards), kind) for g in groups]
    plain = builder(group_advantage=kind).build(groups, step=1)
    assert [e.group_advantage for e in plain] == torch.cat(each).tolist()
    prepared = builder(group_advantage=kind, whiten=True)
    for g in groups:
        prepared.prepare(g, 1)
    found = [e.group_advantage for e in prepared.build(groups, step=1)]
    assert found == whitened(torch.cat(each)).tolist() and found[3:6] == [0.0] * 3


def test_which_groups_have_a_signal() -> None:
    everything = Signal(advantage=True, context=True, mask_truncated=False)
    grpo, masked = replace(everything, context=False), replace(everything, context=False, mask_truncated=True)
    mixed, wrong, right = group([1.0, 0.0]), group([0.0, 0.0], UNSOLVED), group([1.0, 1.0], UNSOLVED)
    solved = group([0.0, 0.0], SOLVED)

    def signals(signal: Signal, **how: Any) -> list[bool]:
        return [builder(**how).has_signal(g, 1, signal) for g in (mixed, wrong, right, solved)]

    assert signals(grpo) == [True, False, False, False]
    assert signals(everything) == [True, False, True, True], "the term acts where a response has a context"
    assert signals(everything, limits=TeacherLimits(max_teacher_tokens=1)) == [True, False, False, False]
    assert signals(replace(everything, advantage=False)) == [True, False, True, True]
    assert not builder().has_signal(group([1.0, 0.0], truncated=(0, 1)), 1, masked)
    assert builder().has_signal(group([1.0, 0.0], truncated=(0,)), 1, masked)
    overlong = Overlong(limit=18, buffer=18)
    uneven = group([0.0] * 11, UNSOLVED)  # the number of the last attempt has one digit more
    assert builder(overlong=overlong).has_signal(uneven, 1, grpo) and not builder().has_signal(uneven, 1, grpo)


def test_asking_for_a_signal_changes_no_example() -> None:
    asked, plain = builder(), builder()
    first = group([1.0, 0.0, 1.0])
    asked.prepare(first, 2)
    assert asked.has_signal(first, 2, Signal(advantage=False, context=True, mask_truncated=False))
    assert asked.build([first], 2) == plain.build([first], 2) and asked.counters == plain.counters
