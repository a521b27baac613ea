"""Checks of recipes with `reasoning_gym:` problem sets."""

from __future__ import annotations

from collections.abc import Iterator

from asd_megatron.config.data import DataSection
from asd_megatron.config.recipe import AnyRecipe, SftRecipe
from asd_megatron.config.refusals import changed
from asd_megatron.errors import UserError
from asd_megatron.gym.tasks import PREFIX, check_task, task_of

GYM_REWARD = "reasoning_gym"


def gym_findings(recipe: AnyRecipe) -> Iterator[str]:
    """What cannot work, one finding each; imports reasoning-gym only for a recipe that names a task."""
    data = recipe.data
    given = {} if data.test is None else {"data.test": data.test}
    if not isinstance(recipe, SftRecipe):
        given = {"data.train": data.train_name, **given}
    elif task_of(data.train_name) is not None:
        yield f"data.train {data.train!r} holds problems without responses: the supervised stage takes a JSONL file"
    tasks = {key: task for key, name in given.items() if (task := task_of(name)) is not None}
    yield from _reward(recipe, given, tasks)
    if not tasks:
        yield from _unread(data)
    elif len(set(tasks.values())) > 1 and data.reasoning_gym:
        yield (
            f"data.reasoning_gym holds the parameters of one task, and data.train and data.test name two"
            f" ({' and '.join(tasks.values())}): leave it out, or name one task"
        )
    else:
        for task in sorted(set(tasks.values())):
            yield from _task(task, data)


def _task(task: str, data: DataSection) -> Iterator[str]:
    try:
        check_task(task, data.reasoning_gym)
    except UserError as error:
        yield str(error)


def _reward(recipe: AnyRecipe, given: dict[str, str], tasks: dict[str, str]) -> Iterator[str]:
    if recipe.reward is None:
        return
    names = [verifier.name for verifier in recipe.reward.verifiers]
    others = [f"{key} {value!r}" for key, value in given.items() if key not in tasks]
    if GYM_REWARD in names and (others or not given):
        yield (
            f"reward.name {GYM_REWARD} scores problems of {PREFIX}TASK sets alone"
            + (f", and {' and '.join(others)} is none" if others else "")
            + f": set reward.name to another verifier, or name a task ({PREFIX}chain_sum, for instance) as problem set"
        )
    for name in names if tasks else ():
        if name == GYM_REWARD or name == "http" or ":" in name:
            continue
        yield (
            f"reward.name {name} does not know how problems of {' and '.join(tasks)} are judged: set reward.name"
            f" {GYM_REWARD}, the task's own verifier, or a function of your own"
        )


def _unread(data: DataSection) -> Iterator[str]:
    for key in changed(data, "reasoning_gym", "test_problems"):
        yield f"data.{key} is read only with a problem set {PREFIX}TASK: name one, or leave data.{key} out"
