"""From a recipe's `reward.name` to a verifier."""

from __future__ import annotations

from asd_megatron.errors import did_you_mean
from asd_megatron.reward.base import RewardError, Verifier
from asd_megatron.reward.custom import CustomVerifier
from asd_megatron.reward.exact import ExactVerifier
from asd_megatron.reward.math import MathVerifier
from asd_megatron.reward.puzzle import PuzzleVerifier
from asd_megatron.reward.reasoning_gym import ReasoningGymVerifier

NAMES = ("exact", "math", "puzzle", "reasoning_gym")


def make_verifier(name: str, *, timeout_seconds: float = 5.0, workers: int = 2, on_error: str = "stop") -> Verifier:
    """The verifier `name`: `math`, `exact`, `puzzle`, `reasoning_gym`, or a user's `module:function` or
    `file.py:function`.

    `timeout_seconds` bounds one answer of `math` and `reasoning_gym`, `workers` is their number of processes;
    `on_error` is for a user's function.
    """
    if name == "math":
        return MathVerifier(timeout_seconds=timeout_seconds, workers=workers)
    if name == "exact":
        return ExactVerifier()
    if name == "puzzle":
        return PuzzleVerifier()
    if name == "reasoning_gym":
        return ReasoningGymVerifier(timeout_seconds=timeout_seconds, workers=workers)
    if ":" in name:
        return CustomVerifier(name, on_error=on_error)
    hint = did_you_mean(name, NAMES)
    raise RewardError(
        f"reward.name {name!r} does not exist{f'; {hint}' if hint else '.'}"
        f" Choose {', '.join(NAMES)}, or your own as package.module:function or path/to/file.py:function"
    )
