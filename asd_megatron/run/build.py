"""Builds the objects of the other modules from a recipe's sections; those of the method are in `method`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from asd_megatron.config import AnyRecipe, Recipe
from asd_megatron.data.problems import ProblemSource
from asd_megatron.data.prompts import PromptRenderer, TeacherLimits
from asd_megatron.data.templates import PAPER_WORDING
from asd_megatron.records import Group, Problem
from asd_megatron.reward.base import Verifier, tests_of
from asd_megatron.rollout.bank import RolloutBank
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.draw import Plan, Redraw
from asd_megatron.rollout.embedded.engine import EmbeddedEngine
from asd_megatron.rollout.engine import RolloutEngine, WeightSource
from asd_megatron.rollout.replay import ReplayEngine
from asd_megatron.run.evaluation_sets import EvaluationSet
from asd_megatron.run.method import make_overlong, make_signal
from asd_megatron.run.model_session import ModelSession
from asd_megatron.run.sampling import evaluation_params, training_params
from asd_megatron.run.session import Session
from asd_megatron.run.sources import FileSource, training_problems
from asd_megatron.trainer.examples import ExampleBuilder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def first_problems(recipe: Recipe, problems: ProblemSource) -> list[Problem]:
    """The problems that step 1 asks the engine for. Raises UserError for a set that is smaller than that."""
    asked = math.ceil(recipe.sampling.problems_per_step * recipe.rollout.oversampling)
    return problems.batch(1, asked, recipe.run.seed)


def checked_problems(recipe: Recipe, renderer: PromptRenderer, held_out: Sequence[EvaluationSet]) -> ProblemSource:
    """The training problems. Raises UserError for prompts that are too long, of these and of the sets `held_out`, and
    for fewer problems than a step has."""
    train_set = training_set(recipe, renderer)
    renderer.check(train_set.take(None))
    for found in held_out:
        renderer.check(found.source.take(None))
    first_problems(recipe, train_set)
    return train_set


def training_set(recipe: Recipe, renderer: PromptRenderer) -> ProblemSource:
    """The training problems, without those whose prompts are too long where `data.filter.long_prompts` is `drop`."""
    problems = training_problems(recipe.data)
    if recipe.data.filter.long_prompts != "drop" or not isinstance(problems, FileSource):
        return problems
    limit = recipe.sampling.max_prompt_tokens
    return problems.keep(lambda problem: renderer.tokens(problem) <= limit, f"longer than {limit:,} tokens")


def example_builder(
    recipe: Recipe, renderer: PromptRenderer, *, privileged: bool, feedback_kind: str, max_positions: int
) -> ExampleBuilder:
    """The builder of training examples with advantages and, if `privileged`, the teacher's prompts."""
    p = recipe.privileged
    return ExampleBuilder(
        renderer,
        TeacherLimits(
            p.max_solution_tokens, p.min_solution_tokens, p.max_teacher_tokens or max_positions, p.strip_thinking
        ),
        seed=recipe.run.seed,
        privileged=privileged,
        success_threshold=p.success_threshold,
        exclude_self=p.exclude_self,
        demonstrations_per_group=p.demonstrations_per_group,
        use_group=p.use_group,
        use_reference=p.use_reference,
        when_no_solution=p.when_no_solution,
        feedback_kind=feedback_kind,
        tests_of=partial(tests_of, max_tests=recipe.reward.max_tests),
        group_advantage=recipe.algorithm.group_advantage,
        whiten=recipe.algorithm.whiten_advantages,
        overlong=make_overlong(recipe),
    )


def redraw_rule(recipe: Recipe, builder: ExampleBuilder) -> Redraw | None:
    """Which groups of a step are discarded for others, and how many; None: none. `builder` knows, on global rank 0,
    which groups have a signal."""
    s = recipe.sampling
    if s.redraw == "never":
        return None
    limit = 9 * s.problems_per_step if s.redraw_limit is None else s.redraw_limit
    if s.redraw == "equal_rewards":
        return Redraw(lambda group, step: min(group.rewards) < max(group.rewards), limit)
    return Redraw(partial(builder.has_signal, signal=make_signal(recipe)), limit)


def make_renderer(recipe: AnyRecipe, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> PromptRenderer:
    """The prompts of both stages. `end_ids`: the model's end tokens. Raises UserError for unusable templates."""
    privileged = recipe.privileged if isinstance(recipe, Recipe) else None
    return PromptRenderer(
        tokenizer,
        format=recipe.data.format,
        system=recipe.data.system,
        raw_prompt=recipe.data.raw_prompt,
        raw_template=None if privileged is None else privileged.raw_template,
        chat_template=PAPER_WORDING if privileged is None else privileged.chat_template,
        chat_template_kwargs=recipe.data.chat_template_kwargs,
        max_prompt_tokens=recipe.sampling.max_prompt_tokens,
        end_token_ids=end_ids,
    )


# ---------------------------------------------------------------- engines


def embedded_engine(session: ModelSession, max_batch_size: int) -> EmbeddedEngine:
    """The engine on the session's own model, of batches of at most `max_batch_size` responses."""
    return EmbeddedEngine(
        session.port,
        session.process_groups,
        session.tokenizer,
        seed=session.recipe.run.seed,
        max_batch_size=max_batch_size,
    )


def rollout_bank(recipe: Recipe, session: Session) -> RolloutBank | None:
    """The bank of the run's SGLang rollouts, on global rank 0; None elsewhere, and for engines whose rollouts a resumed
    run repeats bit for bit."""
    if recipe.rollout.engine != "sglang" or not session.is_root:
        return None
    bank = RolloutBank(
        session.folder / "bank",
        resumed=session.first_step - 1,
        saved_step=lambda: session.saved_step,
        identity=f"{recipe.run.seed} {recipe.model.path}",
        say=session.say,
    )
    session.closing.callback(bank.close)
    return bank


def rollout_engine(
    recipe: Recipe, session: ModelSession, renderer: PromptRenderer, problems: ProblemSource, bank: RolloutBank | None
) -> tuple[RolloutEngine, Callable[[], None]]:
    """The recipe's engine, and a function to call before its first use, once the run folder exists. The prompt of the
    probe with which servers are verified comes from `renderer` and the training `problems`. bank: keeps its
    responses."""
    rollout = recipe.rollout
    if rollout.engine == "sglang":
        from asd_megatron.run.serving import sglang_engine  # imports the HTTP client, which other engines do not need

        engine = sglang_engine(session, renderer, problems, bank)
        return engine, engine.start
    if rollout.engine == "replay":
        return ReplayEngine(str(rollout.replay_folder), session.process_groups, session.tokenizer), lambda: None
    return embedded_engine(session, rollout.max_batch_size), lambda: None


def rollout_plan(recipe: Recipe) -> Plan:
    """The schedule of generation and training."""
    rollout = recipe.rollout
    if rollout.engine != "sglang":
        return Plan()
    return Plan(
        overlap=rollout.overlap,
        oversampling=rollout.oversampling,
        carry=rollout.partial_rollouts,
        max_staleness=rollout.max_staleness,
        last_step=recipe.run.steps,
    )


def make_collector(
    session: ModelSession,
    engine: RolloutEngine,
    weights: WeightSource,
    problems: ProblemSource,
    renderer: PromptRenderer,
    verifier: Verifier | None,
    on_group: Callable[[Group, int], None] = lambda group, step: None,
    bank: RolloutBank | None = None,
    redraw: Redraw | None = None,
) -> Collector:
    """The collector on `engine`: of a `train` recipe for training steps on `problems` and for evaluations, of an `sft`
    recipe for evaluations alone. `on_group`, `bank`, `redraw`: see `Collector`."""
    recipe = session.recipe
    if isinstance(recipe, Recipe):
        params, plan, timeout = training_params(recipe, session), rollout_plan(recipe), recipe.rollout.collect_timeout
        problems_per_step = recipe.sampling.problems_per_step
    else:  # the embedded engine waits for no server
        params, plan, timeout = evaluation_params(session), Plan(), math.inf
        problems_per_step = 1
    return Collector(
        engine,
        weights,
        verifier,
        problems,
        renderer,
        session.process_groups,
        params=params,
        problems_per_step=problems_per_step,
        seed=recipe.run.seed,
        plan=plan,
        timeout=timeout,
        on_group=on_group,
        bank=bank,
        redraw=redraw,
    )
