"""The guard names what is broken, skips single updates and stops a row of them."""

from __future__ import annotations

import math

import pytest
import torch

from asd_megatron.errors import UserError
from asd_megatron.records import Example, FinishReason, Rollout, TokenTable
from asd_megatron.trainer.guard import Guard, NotFinite, check_rollouts, check_scores, first_not_finite

NAN, INF = float("nan"), float("inf")


def rollout(sample: int, *logprobs: float, forced: int | None = None) -> Rollout:
    mask = tuple(t != forced for t in range(len(logprobs)))
    ids = tuple(range(len(logprobs)))
    return Rollout("problem", sample, (1, 2), ids, logprobs, FinishReason.STOP, 0, loss_mask=mask)


def batch() -> tuple[list[Example], TokenTable]:
    """Three rollouts: with context, without, with a forced token."""
    rollouts = [rollout(0, -1.0, -1.0), rollout(1, -1.0, -1.0, -1.0), rollout(2, -1.0, -1.0, forced=0)]
    examples = [Example(r, 1.0, 0.0, None if i == 1 else (9,)) for i, r in enumerate(rollouts)]
    table = TokenTable.for_lengths([2, 3, 2])
    for name in ("student_logprobs", "teacher_logprobs"):
        table[name] = torch.full((7,), -1.0)
    return examples, table


NAMES = ("student_logprobs", "teacher_logprobs", "student_entropy")


def test_finite_scores_pass_and_absent_columns_too() -> None:
    check_scores("teacher scoring", *batch(), NAMES, 3)
    check_scores("teacher scoring", [], TokenTable.for_lengths([]), NAMES, 3)


def test_scores_name_phase_step_and_rollouts() -> None:
    examples, table = batch()
    table["student_logprobs"][1] = NAN
    table["student_logprobs"][3:5] = INF
    with pytest.raises(NotFinite) as caught:
        check_scores("student scoring", examples, table, NAMES, 12)
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert message.startswith(
        "step 12, student scoring: student_logprobs is not finite for 3 tokens of rollouts problem/0 at response "
        "position 1, problem/1 at response position 1. "
    )


def test_tokens_that_mean_nothing_may_hold_anything() -> None:
    examples, table = batch()
    table["teacher_logprobs"][2:5] = NAN  # no context
    table["student_logprobs"][5] = NAN  # forced
    check_scores("scoring", examples, table, NAMES, 1)
    table["student_logprobs"][2] = NAN  # the student is scored without context as well
    with pytest.raises(NotFinite, match="problem/1 at response position 0"):
        check_scores("scoring", examples, table, NAMES, 1)


def test_many_rollouts_are_summed_up() -> None:
    rollouts = [rollout(i, NAN) for i in range(9)]
    with pytest.raises(NotFinite, match=r"log-prob is not finite for 9 tokens of rollouts problem/0 .* and 5 more\."):
        check_rollouts(rollouts, 2)


def test_rollouts() -> None:
    check_rollouts([rollout(0, -1.0, -2.0), rollout(1), rollout(2, -INF, -1.0, forced=0)], 1)
    with pytest.raises(NotFinite, match="step 4, rollout: .* 1 token of rollout problem/3 at response position 1"):
        check_rollouts([rollout(3, -1.0, -INF)], 4)


def test_a_single_bad_update_is_skipped_and_a_row_stops() -> None:
    guard = Guard(max_consecutive_skips=2)
    assert guard.check_update(0.1, 1.0, 1)
    assert not guard.check_update(NAN, 1.0, 2)
    assert not guard.check_update(0.1, INF, 3)
    assert guard.check_update(0.0, 0.0, 4)
    assert (guard.skipped, guard.consecutive) == (2, 0)
    assert not guard.check_update(0.1, NAN, 5)
    assert not guard.check_update(0.1, NAN, 6)
    with pytest.raises(NotFinite, match=r"step 7, update: loss 0\.1 and gradient norm nan in the 3\. update in a row"):
        guard.check_update(0.1, NAN, 7)
    assert guard.skipped == 5


def test_skipped_spikes_count_like_updates_that_are_not_finite() -> None:
    guard = Guard(max_consecutive_skips=2)
    assert not guard.check_update(0.1, 9.0, 1, applied=False) and guard.consecutive == 1
    assert not guard.check_update(0.1, NAN, 2, applied=False)
    with pytest.raises(NotFinite, match="step 3, update: loss 0.1 and gradient norm 9 in the 3.*grad_spike clip"):
        guard.check_update(0.1, 9.0, 3, applied=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_found_by_name(dtype: torch.dtype) -> None:
    weights = {"empty": torch.zeros(0), "a": torch.full((3, 2), 3e38), "b": torch.ones(5), "c": torch.ones(1)}
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    assert first_not_finite(weights.items()) is None
    assert first_not_finite([]) is None
    for bad in (NAN, INF, -INF):
        weights["b"][4] = weights["c"][0] = bad
        assert first_not_finite(weights.items()) == "b"


def test_zero_tolerance() -> None:
    with pytest.raises(NotFinite):
        Guard(0).check_update(-INF, 1.0, 1)
    with pytest.raises(ValueError, match="negative"):
        Guard(-1)


def test_state_survives() -> None:
    guard = Guard(1)
    guard.check_update(math.nan, 1.0, 1)
    other = Guard(1)
    other.load_state_dict(guard.state_dict())
    assert (other.skipped, other.consecutive) == (1, 1)
    with pytest.raises(NotFinite):
        other.check_update(math.nan, 1.0, 2)
