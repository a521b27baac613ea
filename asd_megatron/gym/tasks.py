"""The tasks of the reasoning-gym package: which can be used, with which parameters, and their items.

Without heavy imports at module level, because reward workers import it to generate an item again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date, time
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from asd_megatron.errors import UserError, did_you_mean

PREFIX = "reasoning_gym:"
COMPOSITE = "composite"
RESERVED = ("seed", "size")  # set by asd_megatron, which decides the items of each split
PAGE = "docs/reasoning_gym_tasks.md"
FINDINGS = Path(__file__).with_name("findings.json")
MOST_TEST_PROBLEMS = 10_000


def task_of(name: str | None) -> str | None:
    """The task of a problem set's name: `chain_sum` of `reasoning_gym:chain_sum`, None for any other name."""
    return name.removeprefix(PREFIX) if name is not None and name.startswith(PREFIX) else None


def registry() -> Mapping[str, tuple[type, type]]:
    """(data set class, class of its parameters) by task. Raises UserError when reasoning-gym is not installed."""
    try:
        import reasoning_gym  # noqa: F401 - importing it registers the tasks
        from reasoning_gym.factory import DATASETS
    except ImportError as e:
        raise UserError(
            f"problem sets named {PREFIX}TASK need the package reasoning-gym, which cannot be imported ({e}): install"
            " the extra, pip install 'asd_megatron[gym]'"
        ) from None
    return DATASETS  # type: ignore[no-any-return]


@cache
def findings() -> Mapping[str, Mapping[str, Any]]:
    """What a sweep over all tasks found about each (tools/sweep_reasoning_gym.py)."""
    return json.loads(FINDINGS.read_text(encoding="utf-8"))["tasks"]  # type: ignore[no-any-return]


def why_unusable(task: str) -> str | None:
    """Why a recipe may not name `task`, as the sweep found; None if it may."""
    return findings().get(task, {}).get("unusable")


def check_task(task: str, parameters: Mapping[str, Any]) -> None:
    """Raises UserError for a task that is unknown or cannot be used, and for parameters that it does not have."""
    reason = why_unusable(task)
    if reason is not None:
        raise UserError(f"{PREFIX}{task} cannot be used: {reason}. Take another task; {PAGE} lists them")
    config = _config(task, parameters, seed=0, size=1)
    if task == COMPOSITE:
        for part in config.datasets:
            check_task(part.name, part.config)


def make_dataset(task: str, parameters: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """The `reasoning_gym` data set of items 0 to size - 1; item i depends on (task, parameters, seed, size, i) alone.
    Raises UserError for a task that is unknown and for parameters that it does not have."""
    config = _config(task, parameters, seed=seed, size=size)
    return registry()[task][0](config)


def make_item(dataset: Any, index: int) -> dict[str, Any]:
    """Item `index` as reasoning-gym makes it (`question`, `answer`, `metadata`). Its generator may raise anything."""
    with _random_state_kept():
        item = dataset[index]
    return item  # type: ignore[no-any-return]


def digest(item: Mapping[str, Any]) -> str:
    """A hash of the item's question and answer."""
    content = json.dumps([item["question"], answer_text(item)])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def answer_text(item: Mapping[str, Any]) -> str:
    """The item's answer; empty if it has none (then its verifier checks the rules of the task alone)."""
    return "" if item["answer"] is None else str(item["answer"])


def parameters_of(task: str) -> dict[str, Any]:
    """A task's parameters with their defaults, as a recipe would give them."""
    config = registry()[task][1]()
    return {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in RESERVED
    }


# ---------------------------------------------------------------- checking


def _config(task: str, parameters: Mapping[str, Any], *, seed: int, size: int) -> Any:
    if task not in registry():
        hint = did_you_mean(task, registry())
        hint = f"; {hint}" if hint else "."
        raise UserError(f"{PREFIX}{task}: reasoning-gym has no such task{hint} {PAGE} lists all of them")
    config_class = registry()[task][1]
    values = {name: _value(task, config_class, name, value) for name, value in parameters.items()}
    config = config_class(**values, seed=seed, size=size)
    try:
        if hasattr(config, "validate"):
            config.validate()
    except Exception as e:  # asserts, mostly
        raise UserError(f"data.reasoning_gym: {task} refuses its parameters: {e}. {_offer(task)}") from None
    return config


def _value(task: str, config_class: type, name: str, value: Any) -> Any:
    """The parameter in its annotated type: a YAML list may become a tuple, a text an enum's member."""
    if name in RESERVED:
        raise UserError(
            f"data.reasoning_gym: {name} cannot be set: training and held-out problems have seeds of their own"
            " (data.test_problems says how many are held out)"
        )
    defaults = parameters_of(task)
    if name not in defaults:
        hint = did_you_mean(name, defaults)
        hint = f"; {hint}" if hint else "."
        raise UserError(f"data.reasoning_gym: {task} has no parameter {name!r}{hint} {_offer(task)}")
    wanted = typing.get_type_hints(config_class)[name]
    if isinstance(defaults[name], float):  # some are annotated int
        wanted = float
    try:
        return TypeAdapter(wanted).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as e:
        reason = e.errors(include_url=False)[0]["msg"]
        raise UserError(f"data.reasoning_gym: {task}'s {name} was given {value!r}: {reason}. {_offer(task)}") from None


def _offer(task: str) -> str:
    listed = ", ".join(f"{name}: {json.dumps(value)}" for name, value in parameters_of(task).items())
    return f"Its parameters, with defaults: {listed}" if listed else "It has no parameters"


def _plain(value: Any) -> Any:
    """A default as YAML and JSON can hold it."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, date | time) else value


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the global random state of Python and NumPy, which some generators seed, afterwards."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
