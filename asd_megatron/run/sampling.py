"""How responses are sampled, from a recipe's sections."""

from __future__ import annotations

from asd_megatron.config import Recipe
from asd_megatron.config.evaluation import EvaluationSection
from asd_megatron.config.sampling import SamplingSection
from asd_megatron.records import SamplingParams
from asd_megatron.run.model_session import ModelSession


def stop_ids(session: ModelSession) -> tuple[int, ...]:
    """The tokens that end a response: the recipe's, or the model's end tokens."""
    given = session.recipe.sampling.stop_token_ids
    return tuple(session.end_ids if given is None else given)


def training_params(recipe: Recipe, session: ModelSession) -> SamplingParams:
    """How training rollouts are sampled."""
    return _params(session, recipe.sampling, recipe.sampling.rollouts_per_problem)


def evaluation_params(
    session: ModelSession, section: EvaluationSection | None = None, max_new_tokens: int | None = None
) -> SamplingParams:
    """How held-out responses are sampled: as the recipe's section says, or another one, with the recipe's budget of
    tokens or another one."""
    section = section or session.recipe.evaluation
    return _params(session, section, section.samples, max_new_tokens)


def _params(
    session: ModelSession, filters: SamplingSection | EvaluationSection, n: int, max_new_tokens: int | None = None
) -> SamplingParams:
    """`filters`: the section with temperature, top-p and top-k. The end of a response is that of `sampling` always."""
    limits = session.recipe.sampling
    return SamplingParams(
        temperature=filters.temperature,
        top_p=filters.top_p,
        top_k=filters.top_k,
        max_new_tokens=max_new_tokens or limits.max_response_tokens,
        stop_token_ids=stop_ids(session),
        stop=tuple(limits.stop),
        n=n,
    )
