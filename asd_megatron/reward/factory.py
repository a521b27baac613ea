"""From a recipe's section `reward` to a verifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from asd_megatron.errors import did_you_mean
from asd_megatron.reward.base import RewardError, Verifier
from asd_megatron.reward.code import CodeVerifier
from asd_megatron.reward.composed import ComposedReward, Part
from asd_megatron.reward.custom import CustomVerifier
from asd_megatron.reward.exact import ExactVerifier
from asd_megatron.reward.math import MathVerifier
from asd_megatron.reward.puzzle import PuzzleVerifier
from asd_megatron.reward.reasoning_gym import ReasoningGymVerifier

NAMES = ("code", "exact", "http", "math", "puzzle", "reasoning_gym")


def make_verifier(
    name: str = "math", *, truncated: str = "zero", parts: Sequence[Mapping[str, Any]] = (), **options: Any
) -> ComposedReward:
    """The reward of a recipe: `make_verifier(**recipe.reward.model_dump())`.

    It is the verifier `name` with its `options` (`one_verifier`), or the weighted sum of `parts`, each with `name`,
    `weight`, `label` and its own options. truncated: `zero`, a truncated response scores 0 without being judged;
    `judge`, it is judged like any other. Raises RewardError if there is no such verifier or it cannot start.
    """
    if truncated not in ("zero", "judge"):
        raise RewardError(f"reward.truncated {truncated!r} does not exist; choose zero or judge")
    made: list[Part] = []
    with ExitStack() as stack:
        for settings in parts or [{"name": name, **options}]:
            part = dict(settings)
            weight, label = float(part.pop("weight", 1.0)), part.pop("label", "")
            verifier = one_verifier(**part)
            stack.callback(verifier.close)
            made.append(Part(label or part["name"].rpartition(":")[2], weight, verifier))
        stack.pop_all()  # all have started
    return ComposedReward(made, judge_truncated=truncated == "judge")


def one_verifier(
    name: str,
    *,
    timeout_seconds: float = 5.0,
    wall_timeout_seconds: float | None = None,
    workers: int | None = None,
    memory_gb: float | None = None,
    on_error: str = "stop",
    http: Mapping[str, Any] | None = None,
    allow_unsafe_sandbox: bool = False,
    code: Mapping[str, Any] | None = None,
) -> Verifier:
    """The verifier `name`: `math`, `exact`, `puzzle`, `reasoning_gym`, `code`, `http`, or a user's `module:function` or
    `file.py:function`.

    One answer takes at most `timeout_seconds` of processor time with `math`, `reasoning_gym` and `code` (one test),
    which judge in `workers` processes (None: 2), and `wall_timeout_seconds` in all (None: 10 times as long) with these
    and a user's function (`workers` None: 1), whose `memory_gb` are bounded. `on_error` is for a user's function and
    `http`, whose `Endpoint` is `http`; `allow_unsafe_sandbox` and the settings `code` are for `code`. Raises
    RewardError if there is no such verifier or it cannot start.
    """
    limits: dict[str, Any] = {"timeout_seconds": timeout_seconds, "wall_timeout_seconds": wall_timeout_seconds}
    if on_error not in ("stop", "zero"):
        raise RewardError(f"reward.on_error {on_error!r} does not exist; choose stop or zero")
    if name == "math":
        return MathVerifier(**limits, workers=2 if workers is None else workers)
    if name == "exact":
        return ExactVerifier()
    if name == "puzzle":
        return PuzzleVerifier()
    if name == "reasoning_gym":
        return ReasoningGymVerifier(**limits, workers=2 if workers is None else workers)
    if name == "code":
        return CodeVerifier(
            **limits,
            workers=2 if workers is None else workers,
            allow_unsafe_sandbox=allow_unsafe_sandbox,
            **(code or {}),
        )
    if name == "http":
        from asd_megatron.reward.http import Endpoint, HttpVerifier  # imports the HTTP client, which others do not need

        return HttpVerifier(Endpoint(**http or {}), on_error=on_error)
    if ":" in name:
        return CustomVerifier(name, on_error=on_error, **limits, workers=workers or 1, memory_gb=memory_gb)
    hint = did_you_mean(name, NAMES)
    raise RewardError(
        f"reward.name {name!r} does not exist{f'; {hint}' if hint else '.'}"
        f" Choose {', '.join(NAMES)}, or your own as package.module:function or path/to/file.py:function"
    )
