"""From a recipe's `reward.name` to a verifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asd_megatron.errors import did_you_mean
from asd_megatron.reward.base import RewardError, Verifier
from asd_megatron.reward.code import CodeVerifier
from asd_megatron.reward.custom import CustomVerifier
from asd_megatron.reward.exact import ExactVerifier
from asd_megatron.reward.math import MathVerifier
from asd_megatron.reward.puzzle import PuzzleVerifier
from asd_megatron.reward.reasoning_gym import ReasoningGymVerifier
from asd_megatron.reward.truncation import ZeroForTruncated

NAMES = ("code", "exact", "math", "puzzle", "reasoning_gym")


def make_verifier(name: str = "math", *, truncated: str = "zero", **settings: Any) -> Verifier:
    """The verifier of a recipe's section `reward`; `settings`: see `_verifier`.

    truncated: `zero`, a truncated response scores 0 without being judged; `judge`, it is judged like any other.
    Raises RewardError if there is no such verifier or it cannot start.
    """
    if truncated not in ("zero", "judge"):
        raise RewardError(f"reward.truncated {truncated!r} does not exist; choose zero or judge")
    verifier = _verifier(name, **settings)
    return ZeroForTruncated(verifier) if truncated == "zero" else verifier


def _verifier(
    name: str,
    *,
    timeout_seconds: float = 5.0,
    wall_timeout_seconds: float | None = None,
    workers: int = 2,
    on_error: str = "stop",
    allow_unsafe_sandbox: bool = False,
    code: Mapping[str, Any] | None = None,
) -> Verifier:
    """The verifier `name`: `math`, `exact`, `puzzle`, `reasoning_gym`, `code`, or a user's `module:function` or
    `file.py:function`.

    One answer takes at most `timeout_seconds` of processor time with `math` and `reasoning_gym`, which judge in
    `workers` processes, and `wall_timeout_seconds` in all (None: 10 times as long) with these and a user's function.
    `on_error` is for a user's function, `allow_unsafe_sandbox` and the settings `code` are for `code`. Raises
    RewardError if there is no such verifier or it cannot start.
    """
    limits: dict[str, Any] = {"timeout_seconds": timeout_seconds, "wall_timeout_seconds": wall_timeout_seconds}
    if name == "math":
        return MathVerifier(**limits, workers=workers)
    if name == "exact":
        return ExactVerifier()
    if name == "puzzle":
        return PuzzleVerifier()
    if name == "reasoning_gym":
        return ReasoningGymVerifier(**limits, workers=workers)
    if name == "code":
        unsafe = {"allow_unsafe_sandbox": allow_unsafe_sandbox}
        return CodeVerifier(**limits, **unsafe, workers=workers, **(code or {}))
    if ":" in name:
        return CustomVerifier(name, on_error=on_error, **limits)
    hint = did_you_mean(name, NAMES)
    raise RewardError(
        f"reward.name {name!r} does not exist{f'; {hint}' if hint else '.'}"
        f" Choose {', '.join(NAMES)}, or your own as package.module:function or path/to/file.py:function"
    )
