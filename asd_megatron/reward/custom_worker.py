"""The judge of `custom.py`'s worker (`worker_program.py`): imports a user's reward function and calls it.

From `{"describe": true}` to `{"feedback_kind": TEXT}`, from `{"problem": BASE64 OF A PICKLE, "response": TEXT,
"truncated": BOOL}` to `{"reward": NUMBER}` or `{"error": REASON, "where": FILE AND LINE}`. If the function cannot be
used, every answer is `{"refused": REASON}`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from asd_megatron.records import FinishReason
from asd_megatron.reward.base import RewardError

RewardFunction = Callable[..., float]
HOW_IT_ENDED: dict[str, Callable[[bool], bool | str]] = {
    "truncated": bool,
    "finish_reason": lambda truncated: str(FinishReason.LENGTH if truncated else FinishReason.STOP),
}
"""Further parameters that a function may have, with their values."""

EXPECTED = (
    "expected reward(problem, response), called once for each response: problem.answer is the right answer,"
    " problem.question the question, problem.extra the other fields of the problem's line, response the text; it"
    " returns a number. It may have a parameter `truncated` (whether the token budget cut the response off) or"
    " `finish_reason` (stop or length)"
)
# other frameworks' functions: parameter names that only theirs have, and how to call such a function from ours
FOREIGN = (
    (
        "verl",
        {"solution_str", "ground_truth", "data_source", "extra_info"},
        "FUNCTION(problem.extra.get('data_source'), response, problem.answer, dict(problem.extra))",
    ),
    (
        "OpenRLHF",
        {"queries", "labels"},
        "FUNCTION([problem.question + response], [problem.question], [problem.answer])['rewards'][0]",
    ),
    (
        "TRL",
        {"completions", "prompts", "completion_ids"},
        "FUNCTION(prompts=[problem.question], completions=[response], answer=[problem.answer])[0]",
    ),
    ("NeMo RL", {"message_log_batch", "message_logs"}, "..."),
)


def load(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The judge that calls the function `name`."""
    try:
        function = load_function(name)
        refuse_other_signatures(function, name)
        kind = str(getattr(function, "feedback_kind", "binary"))
        if kind not in ("binary", "fraction"):
            raise RewardError(f"reward.name {name!r}: feedback_kind {kind!r} does not exist; choose binary or fraction")
    except RewardError as e:
        refusal = {"refused": str(e)}
        return lambda request: refusal
    more = {parameter: HOW_IT_ENDED[parameter] for parameter in parameters_of_the_end(function)}
    problem_of = lru_cache(maxsize=1)(lambda data: pickle.loads(base64.b64decode(data)))  # noqa: S301 (of the trainer)

    def judge(request: dict[str, Any]) -> dict[str, Any]:
        if "describe" in request:
            return {"feedback_kind": kind}
        try:
            ended = {parameter: value(request["truncated"]) for parameter, value in more.items()}
            return {"reward": number(function(problem_of(request["problem"]), request["response"], **ended))}
        except NotANumber as e:
            return {"error": str(e)}
        except BaseException as e:  # sys.exit() too, which must not pass for the end of the run
            last = traceback.extract_tb(e.__traceback__)[-1]
            return {
                "error": f"raised {described(e)}"[:2_000],
                "where": f" at {os.path.basename(last.filename)}:{last.lineno}",
            }

    return judge


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
    except BaseException as e:
        del sys.modules[module_name]
        raise RewardError(f"reward.name {name!r}: importing {path} failed: {described(e)}") from e
    return module


def _load_module(target: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a console command does not have it, `python -m` does
    try:
        return importlib.import_module(target)
    except BaseException as e:
        raise RewardError(
            f"reward.name {name!r}: importing {target} failed: {described(e)}. "
            "Give a module that Python can import from here, or path/to/file.py:function"
        ) from e


def refuse_other_signatures(function: Callable[..., Any], name: str) -> None:
    """Raise RewardError unless `function` looks like reward(problem, response), with that signature and, for functions
    written for another framework, how to wrap them."""

    def refuse(what: str, remedy: str = "") -> None:
        raise RewardError(f"reward.name {name!r}: {what}; {EXPECTED}{remedy}")

    if inspect.isclass(function):
        refuse(f"{name.rpartition(':')[2]!r} is a class, not a function")
    called = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    if any(f(x) for x in (function, called) for f in (inspect.iscoroutinefunction, inspect.isasyncgenfunction)):
        refuse("it is an async function", ". Call asyncio.run inside a plain function")
    if inspect.isgeneratorfunction(function) or inspect.isgeneratorfunction(called):
        refuse("it is a generator (it has a `yield`)", ". Return the number instead")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a built-in function does not say
    shown, names = f"its signature is {signature}", set(signature.parameters)
    try:
        bound = list(signature.bind("problem", "response", **dict.fromkeys(parameters_of_the_end(function))).arguments)
    except TypeError:
        bound = []
    for framework, marks, call in FOREIGN:
        # a reward(problem, response, *, extra_info=None) is one of ours
        if marks & (set(bound[:2]) if bound else names):
            wrapped = call.replace("FUNCTION", name.rpartition(":")[2])
            refuse(f"{shown}, as {framework} has it", f". Wrap it: def reward(problem, response): return {wrapped}")
    if not bound:
        refuse(f"{shown}, which cannot be called with two arguments")
    if [b.lower() for b in bound[:2]] == ["response", "problem"]:
        refuse(f"{shown}, with the arguments the other way round")


def parameters_of_the_end(function: Callable[..., Any]) -> list[str]:
    """The names of `HOW_IT_ENDED` that are parameters of the function."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    return [name for name in HOW_IT_ENDED if name in parameters]


def described(error: BaseException) -> str:
    """The class of an exception and its text, if it has one: a user's exception may fail to say."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}".removesuffix(": ")


class NotANumber(Exception):
    """A reward function returned something else; the message says what."""


def number(value: Any) -> float:
    """A finite number, Boolean, or array or tensor without dimensions (numpy's and torch's scalars) as a float.
    Raises NotANumber."""
    kind = type(value).__name__
    if not isinstance(value, Real | Decimal) and hasattr(value, "item"):
        shape = tuple(getattr(value, "shape", ()))
        if shape:
            raise NotANumber(f"returned {kind} of shape {shape}, not a number; return one number, as .item() gives it")
        value = value.item()
    if not isinstance(value, Real | Decimal):
        raise NotANumber(f"returned {kind}, not a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise NotANumber(f"returned {str(value)[:40]}, which is not finite")
    return result
