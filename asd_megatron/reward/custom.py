"""A user's own `reward(problem, response) -> float`: `package.module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from asd_megatron.records import Problem
from asd_megatron.reward.base import Item, RewardError, new_counters, tests_of

log = logging.getLogger(__name__)

RewardFunction = Callable[[Problem, str], float]


def load_function(name: str) -> RewardFunction:
    """The function that `name` points to. Modules are looked up from the current folder too. Raises RewardError."""
    target, _, attribute = name.rpartition(":")
    if not target or not attribute:
        raise RewardError(f"reward.name {name!r}: write package.module:function or path/to/file.py:function")
    module = _load_file(Path(target), name) if target.endswith(".py") else _load_module(target, name)
    function = getattr(module, attribute, None)
    if function is None:
        found = sorted(k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
        raise RewardError(
            f"reward.name {name!r}: {target} has no {attribute!r}; it has {', '.join(found) or 'no functions'}"
        )
    if not callable(function):
        raise RewardError(f"reward.name {name!r}: {attribute!r} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def _load_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"reward.name {name!r}: there is no file {path} (seen from {os.getcwd()})")
    path = path.resolve()
    # a name of its own, so that a reward called math.py shadows nothing
    module_name = f"asd_megatron_reward_{hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[module_name]
        raise RewardError(f"reward.name {name!r}: importing {path} failed: {type(e).__name__}: {e}") from e
    return module


def _load_module(target: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a console command does not have it, `python -m` does
    try:
        return importlib.import_module(target)
    except Exception as e:
        raise RewardError(
            f"reward.name {name!r}: importing {target} failed: {type(e).__name__}: {e}. "
            "Give a module that Python can import from here, or path/to/file.py:function"
        ) from e


class CustomVerifier:
    """Calls a user's function in this process, one response after the other.

    The function bounds its own time: it runs in the calling thread (so that it may use signals), where nobody can
    stop it. Attributes of the function are read: `feedback_kind` (`binary`, the default, or `fraction`: the problem's
    `tests` field then says how many tests there are).

    `on_error`: `stop` raises RewardError when the function raises or returns no finite number; `zero` counts and logs
    it.
    """

    def __init__(self, name: str, *, on_error: str = "stop") -> None:
        if on_error not in ("stop", "zero"):
            raise RewardError(f"reward.on_error {on_error!r} does not exist; choose stop or zero")
        self.name, self.on_error = name, on_error
        self.function = load_function(name)
        self.feedback_kind = str(getattr(self.function, "feedback_kind", "binary"))
        if self.feedback_kind not in ("binary", "fraction"):
            raise RewardError(f"{name}: feedback_kind {self.feedback_kind!r} does not exist; choose binary or fraction")
        self.counters = new_counters()

    def score(self, items: Sequence[Item]) -> list[float]:
        return [self._score(problem, text) for problem, text in items]

    def _score(self, problem: Problem, text: str) -> float:
        if self.feedback_kind == "fraction" and not tests_of(problem):
            raise RewardError(
                f"{self.name} says feedback_kind = 'fraction', but problem {problem.prompt_id} has no field `tests`"
            )
        try:
            return _number(self.function(problem, text))
        except Exception as e:
            reason = str(e) if isinstance(e, _NotANumber) else f"raised {type(e).__name__}: {e}"
            message = f"the reward {self.name} {reason} (problem {problem.prompt_id}, response {_excerpt(text)})"
            if self.on_error == "stop":
                hint = "Mend the function, or set reward.on_error to zero to count such responses as 0"
                raise RewardError(f"{message}. {hint}") from e
            self.counters["errors"] += 1
            log.warning("%s: counted as 0 (%d so far)", message, self.counters["errors"])
            return 0.0

    def close(self) -> None:
        pass


class _NotANumber(Exception):
    pass


def _number(value: Any) -> float:
    if not isinstance(value, Real):
        raise _NotANumber(f"returned {type(value).__name__}, not a number")
    if not math.isfinite(value):
        raise _NotANumber(f"returned {value}, which is not finite")
    return float(value)


def _excerpt(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")
