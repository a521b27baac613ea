"""Containers with arrays: what they take, and when two are equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from asd_megatron.records import Example, FinishReason, Rollout


def rollout(ids: Any = (3,), logprobs: Any = (-1.0,)) -> Rollout:
    return Rollout("p", 0, (1, 2), ids, logprobs, FinishReason.STOP, 0)  # type: ignore[arg-type]


def test_equal_when_all_numbers_are() -> None:
    example = Example(rollout(), 1.0, 0.5, (4, 5))  # type: ignore[arg-type]
    bare = replace(example, teacher_prompt_ids=None)
    assert example == replace(example, rollout=rollout()) and bare == replace(bare)
    assert example != bare and bare != example and example != replace(example, rollout=rollout((4,)))


@pytest.mark.parametrize("logprobs", [None, 0.5, (-1.0, -2.0), ((-1.0,),)])
def test_what_is_no_list_of_the_responses_numbers_is_refused(logprobs: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        rollout(logprobs=logprobs)
