"""`asd-megatron train RECIPE --dry-run`: everything that can be checked without a model, in one process."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asd_megatron.antisd import feedback
from asd_megatron.checkpoint.huggingface import read_config
from asd_megatron.config import AnyRecipe, Recipe, SftRecipe
from asd_megatron.data.prompts import PromptRenderer
from asd_megatron.data.tokenizer import check_stop_token_ids, check_vocabulary, decode, end_token_ids, load_tokenizer
from asd_megatron.errors import UserError, plural
from asd_megatron.models.families import shape_of
from asd_megatron.models.family import ModelShape
from asd_megatron.records import Problem
from asd_megatron.reward.base import Response, tests_of
from asd_megatron.reward.factory import make_verifier
from asd_megatron.run.build import first_problems, make_renderer, training_set
from asd_megatron.run.folder import Start
from asd_megatron.run.method import (
    make_gate,
    make_method,
    make_perplexity,
    make_plan,
    never_acts,
)
from asd_megatron.run.mismatch import uncorrected
from asd_megatron.run.preview import preview, start_text
from asd_megatron.run.report import evaluation_text, method_rows, weights_rows
from asd_megatron.run.sources import described, held_out, model_folder, supervised_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAKE_RESPONSE = "The answer is 42."
DEMONSTRATION = "(a verified solution of this problem)"

Section = tuple[str, str]
"""A title and the text below it."""


def dry_run(recipe: AnyRecipe, ranks: int, where: str) -> int:
    """Check the recipe's data, chat template, reward and model configuration, and print what would run, `where`.

    Builds no model, starts no rank and leaves no files. Returns exit status 0; raises UserError for what the run itself
    would refuse: first for its inputs, then, after the summary, for its folder. The recipe, the number of ranks and the
    layout have been checked before.
    """
    folder = model_folder(recipe.model.path)
    config = read_config(folder)
    family, shape = shape_of(config)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, shape.vocab)
    check_stop_token_ids(tokenizer, recipe.sampling.stop_token_ids or ())
    end_ids = end_token_ids(folder, tokenizer)
    renderer = make_renderer(recipe, tokenizer, end_ids)
    sections = [("layout", where), ("model", _model(recipe, family.name, shape, folder))]
    if isinstance(recipe, Recipe):
        sections += _training(recipe, renderer, shape.max_positions)
    else:
        sections += _supervised(recipe, renderer, tokenizer, end_ids, shape.max_positions)
    start, refusal = _start(recipe)
    for title, text in [("run", _summary(recipe, start)), *sections]:
        print(f"{title}\n{'-' * len(title)}\n{text}\n", flush=True)
    if refusal is not None:
        raise refusal
    if start is not None and start.kind == "finished":
        print("nothing was started: without --dry-run nothing would be trained either, the run is finished", flush=True)
    else:
        print(f"nothing was started: without --dry-run this recipe starts {plural(ranks, 'rank')}", flush=True)
    return 0


def _model(recipe: AnyRecipe, family: str, shape: ModelShape, folder: Path) -> str:
    """The model's size and, if any, what computes in FP8. Raises UserError for sizes that FP8 products cannot have."""
    text = f"{family}, {plural(shape.layers, 'layer')}, {folder}"
    precision = recipe.precision.recipe
    problem = precision.shape_problem(shape, recipe.parallelism.tensor)
    if problem is not None:
        raise UserError(problem)
    return f"{text}\nFP8: {precision.text(shape.layers)}" if precision.enabled else text


def _start(recipe: AnyRecipe) -> tuple[Start | None, UserError | None]:
    """What the run would do with its folder, or why it would refuse it."""
    try:
        return preview(recipe, "train" if isinstance(recipe, Recipe) else "sft"), None
    except UserError as error:
        return None, error


def _summary(recipe: AnyRecipe, start: Start | None) -> str:
    """The run's folder, method, length and evaluations, one a row."""
    refused = f"{recipe.run.path}: refused, for the reason given at the end"
    rows = {"run folder": refused if start is None else start_text(recipe, start)}
    if isinstance(recipe, Recipe):
        rows |= method_rows(recipe, make_method(recipe), make_gate(recipe), make_perplexity(recipe))
        rows |= weights_rows(recipe, make_plan(recipe))
    optimizer = recipe.optimizer
    rows |= {
        "steps": f"{recipe.run.steps}",
        "learning rate": f"{optimizer.learning_rate:g}, {optimizer.schedule} schedule",
        "evaluation": evaluation_text(recipe),
    }
    wide = max(map(len, rows))
    return "\n".join(
        f"{name:<{wide}}  {textwrap.indent(text, ' ' * (wide + 2)).lstrip()}" for name, text in rows.items()
    )


def _training(recipe: Recipe, renderer: PromptRenderer, positions: int) -> list[Section]:
    train = training_set(recipe, renderer)
    passes = make_plan(recipe)
    counts = []
    for name, problems in ((recipe.data.train_name, train), *held_out(recipe)):
        if problems is not None:
            looked_at = problems.take(None)
            longest = renderer.check(looked_at)
            counts.append(
                f"{described(name, problems)}: {plural(len(looked_at), 'problem')} checked, prompts of at most"
                f" {plural(longest, 'token')}"
            )
            if problems is train and passes.teacher_scoring and recipe.privileged.use_reference:
                counts[-1] += f", {sum(bool(problem.solution) for problem in looked_at):,} with a solution"
    problem = first_problems(recipe, train)[0]
    scores, assessment = _scored(recipe, problem)
    sections = [
        ("data", "\n".join(counts)),
        ("reward", f"{recipe.reward.in_words} gives {scores} to the problem below"),
        ("passes of a step", "\n".join(passes.reasons)),
        *(("warning", reason) for reason in (never_acts(recipe), uncorrected(recipe)) if reason is not None),
        (f"student's prompt of problem {problem.prompt_id}", renderer.student_text(problem)),
    ]
    if passes.teacher_scoring:
        demonstration = (recipe.privileged.use_reference and problem.solution) or DEMONSTRATION
        limit = recipe.privileged.max_teacher_tokens or positions
        text = renderer.teacher_text(problem, demonstration, assessment)
        sections.append((f"teacher's prompt for that response (with it at most {limit} tokens)", text))
    return sections


def _scored(recipe: Recipe, problem: Problem) -> tuple[str, str]:
    """The rewards of a made-up response and of the problem's own solution, in words, and the assessment of the first
    that the teacher would read."""
    responses = [Response(problem, FAKE_RESPONSE)]
    responses += [] if problem.solution is None else [Response(problem, problem.solution)]
    try:
        verifier = make_verifier(**recipe.reward.model_dump())
        try:
            rewards = verifier.score(responses)
        finally:
            verifier.close()
    except SystemExit as error:
        raise UserError(
            f"the reward {recipe.reward.in_words} called sys.exit({error.code!r}): return a number, or raise an"
            " exception"
        ) from None
    threshold = recipe.privileged.success_threshold
    text = feedback(
        rewards[0],
        verifier.feedback_kind,
        success_threshold=threshold,
        tests=tests_of(problem, recipe.reward.max_tests),
    )
    own = "" if problem.solution is None else f", and {rewards[1]:g} for the file's solution,"
    return f"{rewards[0]:g} for the response {FAKE_RESPONSE!r}{own}", text


def _supervised(
    recipe: SftRecipe,
    renderer: PromptRenderer,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    positions: int,
) -> list[Section]:
    examples = supervised_source(
        recipe.data.train_name,
        renderer,
        tokenizer,
        steps=recipe.run.steps,
        end_ids=end_ids,
        max_tokens=positions,
        shuffle=recipe.data.shuffle,
        loss_on=recipe.sft.loss_on,
    )
    batch = examples.batch(1, recipe.sft.sequences_per_step, recipe.run.seed)
    longest = max(len(example.prompt_ids) + len(example.response_ids) for example in batch)
    size = f"{plural(len(batch), 'sequence')} of at most {plural(longest, 'token')}"
    sections = [
        ("data", f"{recipe.data.train_name}: the first step has {size}"),
        ("prompt of the first example", decode(tokenizer, batch[0].prompt_ids, skip_special_tokens=False)),
        ("its response", decode(tokenizer, batch[0].response_ids)),
    ]
    for name, problems in held_out(recipe) if recipe.evaluates else ():
        renderer.check(problems.take(None))
        sections[0] = ("data", f"{sections[0][1]}\n{name}: prompts checked")
    if recipe.evaluates and recipe.reward is not None:
        make_verifier(**recipe.reward.model_dump()).close()
    return sections
