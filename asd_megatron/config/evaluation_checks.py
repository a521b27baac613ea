"""Checks of the sets of problems that a recipe evaluates on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from asd_megatron.config.gym_checks import GYM_REWARD
from asd_megatron.config.recipe import AnyRecipe
from asd_megatron.config.reward import RewardSection
from asd_megatron.errors import UserError
from asd_megatron.gym.tasks import PREFIX, check_task, task_of

PUZZLES = ("puzzle:train", "puzzle:test")
TEST = "test"
"""The name of `data.test` among the sets of `asd-megatron evaluate`."""


def evaluation_findings(recipe: AnyRecipe) -> Iterator[str]:
    """What cannot work, one finding each."""
    if recipe.evaluation.every and recipe.data.test is None and not recipe.evaluation.sets:
        yield ("evaluation.every needs problems to measure on: set data.test or evaluation.sets, or evaluation.every 0")
    if recipe.data.test is not None and TEST in recipe.evaluation.sets:
        yield f"evaluation.sets.{TEST}: the name is that of data.test: give the set another, or leave one out"
    for name, section in recipe.evaluation.sets.items():
        key = f"evaluation.sets.{name}"
        if section.data.startswith("puzzle:") and section.data not in PUZZLES:
            yield f"{key}.data {section.data!r} is not a puzzle set: use puzzle:test"
        own = () if recipe.reward is None else tuple(verifier.name for verifier in recipe.reward.verifiers)
        rewards = own if section.reward is None else (section.reward,)
        if not rewards:
            yield f"{key} needs a reward to score the answers: add {key}.reward, or a section reward"
            continue
        if section.reward is not None and not _is_reward(section.reward):
            yield (f"{key}.reward {section.reward!r} is no verifier: {RewardSection.model_fields['name'].description}")
        yield from _task(key, section.data, rewards, recipe)


def _is_reward(name: str) -> bool:
    try:
        RewardSection(name=name)
    except ValidationError:
        return False
    return True


def _task(key: str, data: str, rewards: Sequence[str], recipe: AnyRecipe) -> Iterator[str]:
    """A reasoning-gym set and its verifier belong together."""
    task = task_of(data)
    if task is None:
        if GYM_REWARD in rewards:
            yield f"{key}: the reward {GYM_REWARD} scores problems of {PREFIX}TASK sets alone: set {key}.reward"
        return
    for reward in rewards:
        if reward in (GYM_REWARD, "http") or ":" in reward:
            continue
        yield (
            f"{key}: the reward {reward} does not know how problems of {task} are judged: set {key}.reward {GYM_REWARD}"
        )
    try:
        check_task(task, recipe.data.reasoning_gym)
    except UserError as error:
        yield str(error)
