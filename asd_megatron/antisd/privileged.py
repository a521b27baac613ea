"""Privileged context (section 4 setup, Appendix C): the choice of the verified solution, and the feedback line.

The text is rendered by `data/prompts.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from asd_megatron.errors import UserError
from asd_megatron.records import DemonstrationSource


class PrivilegedContextError(UserError, ValueError):
    """A privileged-context setting that does not exist or lacks what it needs."""


@dataclass(frozen=True)
class Demonstration:
    """The source of a rollout's verified solution; `sample` is that rollout's index in the group, or -1."""

    source: DemonstrationSource
    sample: int = -1


def choose_demonstrations(
    rewards: Sequence[float],
    *,
    key: tuple[int, int, str],
    success_threshold: float = 1.0,
    exclude_self: bool = True,
    per_group: int | None = None,
    when_no_solution: str = "mask",
    has_reference: bool = False,
    has_answer: bool = True,
    eligible: Sequence[bool] | None = None,
) -> list[Demonstration]:
    """One demonstration for each rollout of a group, in order.

    A rollout with reward >= `success_threshold` is a verified solution. Each rollout gets one of the group's,
    uniformly; with `exclude_self` never its own (so a sole success has none from the group), without it its own is one
    of the candidates. If there is none, the data set's reference solution; if there is none either, what
    `when_no_solution` says: `mask` (no privileged context), `reference_answer` (the block tells only the final answer;
    masked if that is unknown) or `feedback_only` (no solution block).

    Args:
        per_group: size of a uniformly drawn subset of the group's verified solutions to draw from, so that teacher
            prompts repeat and their prefixes can be shared; a rollout whose own solution is the only one in it draws
            one more, the same for all such rollouts. None: all solutions.
        key: (seed, step, prompt_id). The draw is a hash of the key and the rollout's index: the same in every process
            and layout.
        eligible: rollouts that may demonstrate at all (for instance: not aborted, text not empty); None: all.
    """
    if when_no_solution not in ("mask", "reference_answer", "feedback_only"):
        raise PrivilegedContextError(
            f"privileged.when_no_solution {when_no_solution!r} does not exist; "
            "choose mask, reference_answer or feedback_only"
        )
    allowed = [True] * len(rewards) if eligible is None else eligible
    successes = [j for j, (r, ok) in enumerate(zip(rewards, allowed, strict=True)) if ok and r >= success_threshold]
    if has_reference:
        otherwise = DemonstrationSource.REFERENCE
    elif when_no_solution == "reference_answer" and has_answer:
        otherwise = DemonstrationSource.REFERENCE_ANSWER
    elif when_no_solution == "feedback_only":
        otherwise = DemonstrationSource.FEEDBACK_ONLY
    else:
        otherwise = DemonstrationSource.NONE
    ranked = sorted(successes, key=lambda j: _draw(key, j, "shared"))
    drawn = set(ranked[:per_group])
    chosen = []
    for i in range(len(rewards)):
        others = [j for j in ranked if not (exclude_self and j == i)]
        candidates = sorted(drawn.intersection(others)) or others[:1]
        if not candidates:
            chosen.append(Demonstration(otherwise))
            continue
        j = candidates[_draw(key, i) % len(candidates)]
        chosen.append(Demonstration(DemonstrationSource.SELF if j == i else DemonstrationSource.GROUP, j))
    return chosen


def _draw(key: tuple[int, int, str], sample: int, what: str = "demonstration") -> int:
    seed, step, prompt_id = key
    digest = hashlib.blake2b(repr((what, seed, step, sample, prompt_id)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def feedback(reward: float, kind: str = "binary", *, success_threshold: float = 1.0, tests: int | None = None) -> str:
    """The feedback line on the student's own response.

    `binary`: correct from `success_threshold` on. `fraction`: the reward is the fraction of `tests` cases passed.
    """
    if kind == "binary":
        return f"Your answer is {'correct' if reward >= success_threshold else 'incorrect'}."
    if kind == "fraction":
        if tests is None or tests < 1:
            raise PrivilegedContextError("feedback of kind 'fraction' needs the number of test cases")
        return f"Your code passes {round(reward * tests)} of {tests} test cases."
    raise PrivilegedContextError(f"feedback kind {kind!r} does not exist; choose binary or fraction")
