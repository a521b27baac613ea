"""Every case of the gate."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_megatron.antisd import CONDITIONS, Gate, GateError
from asd_megatron.errors import UserError


def run(gate: Gate, entropies: Sequence[float | None]) -> list[float]:
    return [gate.update(h) for h in entropies]


def antisd(**settings: float) -> Gate:
    return Gate.for_condition("antisd", **{"warmup_steps": 5, **settings})  # type: ignore[arg-type]


def test_warm_up_then_schmitt_trigger() -> None:
    gate = antisd()
    assert run(gate, [1.0, 1.2, 0.9, 1.1, 1.0]) == [0.0] * 5
    assert gate.h_warm == 1.0
    assert gate.thresholds == (0.93, 1.0)
    # above, between (stays open), below (closes), between (stays closed), at H_warm (opens), at tau_down (stays)
    assert run(gate, [1.1, 0.95, 0.92, 0.99, 1.0, 0.93]) == [0.5, 0.5, 0.0, 0.0, 0.5, 0.5]


def test_first_step_after_warm_up_may_close_at_once() -> None:
    gate = antisd()
    run(gate, [1.0] * 5)
    assert gate.update(0.5) == 0.0
    assert not gate.is_open and not gate.warming_up
    fresh = antisd()
    run(fresh, [1.0] * 5)
    assert fresh.update(0.95) == 0.5  # g starts at 1: between the thresholds it is open


def test_what_is_reported_belongs_to_the_step_just_made() -> None:
    gate = antisd(warmup_steps=2)
    assert gate.warming_up and not gate.is_open
    seen = []
    for h in (1.0, 1.0, 1.0, 0.1):
        lam = gate.update(h)
        seen.append((lam, gate.warming_up, gate.is_open))
    assert seen == [(0.0, True, False), (0.0, True, False), (0.5, False, True), (0.0, False, False)]


@pytest.mark.parametrize(
    ("entropies", "expected"), [([4, 1, 3, 2], 2), ([2, 1], 1), ([5], 5), ([3, 1, 2], 2), ([1, 1, 9, 9], 1)]
)
def test_h_warm_is_the_lower_median(entropies: list[float], expected: float) -> None:
    gate = antisd(warmup_steps=len(entropies))
    run(gate, list(entropies))
    assert gate.h_warm == expected


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_step_without_tokens_changes_nothing(nothing: float | None) -> None:
    gate = antisd(warmup_steps=2)
    assert run(gate, [nothing, 1.0, nothing, nothing]) == [0.0] * 4
    assert gate.warming_up and gate.h_warm is None  # not counted as a warm-up step
    assert run(gate, [2.0, nothing]) == [0.0, 0.5]
    assert gate.h_warm == 1.0
    assert run(gate, [0.1, nothing, 1.5, nothing]) == [0.0, 0.0, 0.5, 0.5]


def test_no_warm_up_is_refused_unless_h_warm_is_given() -> None:
    with pytest.raises(GateError, match="warm-up steps, or gate.h_warm"):
        antisd(warmup_steps=0)
    gate = antisd(warmup_steps=0, h_warm=0.71)
    assert run(gate, [0.7, 0.66, 0.7, 0.71]) == [0.5, 0.0, 0.0, 0.5]


def test_a_given_h_warm_outlives_a_warm_up() -> None:
    gate = antisd(h_warm=0.71, warmup_steps=2)
    assert run(gate, [5.0, 5.0, 0.8]) == [0.0, 0.0, 0.5]
    assert gate.h_warm == 0.71


@pytest.mark.parametrize("name", ["sd", "no_gate"])
def test_ungated_conditions_act_from_the_first_step(name: str) -> None:
    gate = Gate.for_condition(name, warmup_steps=0, lambda_max=0.4)
    assert run(gate, [1.0, 0.01, None, 9.0]) == [0.4] * 4
    assert gate.is_open and gate.thresholds is None


@pytest.mark.parametrize("name", ["sd", "no_gate"])
def test_ungated_conditions_take_an_explicit_warm_up(name: str) -> None:
    gate = Gate.for_condition(name, warmup_steps=2)
    assert run(gate, [1.0, None, 3.0, 0.01, None]) == [0.0, 0.0, 0.0, 0.5, 0.5]


def test_grpo_has_no_lambda() -> None:
    gate = Gate.for_condition("grpo", warmup_steps=0, lambda_max=0.5)
    assert run(gate, [None, 1.0, 0.1]) == [0.0] * 3
    assert not gate.is_open


@pytest.mark.parametrize("name", [c.name for c in CONDITIONS.values() if c.gated])
def test_gated_conditions_warm_up(name: str) -> None:
    gate = Gate.for_condition(name, warmup_steps=5)
    assert run(gate, [1.0] * 6) == [0.0] * 5 + [0.5]


def test_thresholds_of_the_ablations() -> None:
    for tau, lam in ((0.90, 0.5), (0.95, 0.0)):
        gate = antisd(tau_down=tau)
        run(gate, [1.0] * 5)
        assert gate.update(0.92) == lam
    gate = antisd(tau_up=1.1)
    assert run(gate, [1.0] * 5 + [0.5, 1.05, 1.1]) == [0.0] * 7 + [0.5]


@pytest.mark.parametrize(
    "settings",
    [
        {"warmup_steps": -1},
        {"h_warm": 0.0},
        {"h_warm": math.nan},
        {"tau_down": 1.1},
        {"tau_down": 0.0},
        {"tau_up": 0.5},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(GateError) as error:
        antisd(**settings)
    assert isinstance(error.value, UserError) and "gate." in str(error.value)


@pytest.mark.parametrize("entropy", [math.inf, -1.0])
def test_an_impossible_entropy_is_an_error(entropy: float) -> None:
    with pytest.raises(GateError, match="median entropy"):
        antisd().update(entropy)


# ------------------------------------------------------------------------------------------------ state

steps = st.lists(st.one_of(st.none(), st.floats(0.1, 2.0)), max_size=20)


@given(st.sampled_from(list(CONDITIONS)), st.integers(1, 4), steps, steps)
def test_state_round_trip_at_any_step(
    name: str, warmup: int, before: list[float | None], after: list[float | None]
) -> None:
    one = Gate.for_condition(name, warmup_steps=warmup)
    run(one, before)
    two = Gate.for_condition(name, warmup_steps=warmup)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict() == one.state_dict()
    assert run(two, after) == run(one, after)
    assert two.state_dict() == one.state_dict()


def test_recalibrate_starts_a_new_warm_up() -> None:
    gate = antisd()
    run(gate, [1.0] * 5 + [0.1])
    gate.recalibrate()
    assert gate.h_warm is None and gate.warming_up
    assert run(gate, [0.1] * 6) == [0.0] * 5 + [0.5]
    assert gate.h_warm == 0.1


@pytest.mark.parametrize("name", ["grpo", "sd", "no_gate"])
def test_a_gate_that_meets_a_run_without_one_recalibrates(name: str) -> None:
    earlier = Gate.for_condition(name, warmup_steps=0)
    run(earlier, [3.0] * 10)
    gate = antisd()
    gate.load_state_dict(earlier.state_dict())
    assert run(gate, [1.0] * 6) == [0.0] * 5 + [0.5]
    assert gate.h_warm == 1.0


def test_leaving_the_gate_behind_opens_it() -> None:
    closed = antisd()
    run(closed, [1.0] * 5 + [0.1])
    free = Gate.for_condition("no_gate", warmup_steps=0)
    free.load_state_dict(closed.state_dict())
    assert free.update(0.1) == 0.5


def test_settings_come_from_the_recipe_not_from_the_state() -> None:
    half = antisd(warmup_steps=5)
    run(half, [1.0, 2.0, 3.0])
    shorter = antisd(warmup_steps=3)
    shorter.load_state_dict(half.state_dict())
    assert run(shorter, [2.0]) == [0.5] and shorter.h_warm == 2.0
    given_level = antisd(warmup_steps=0, h_warm=4.0)
    given_level.load_state_dict(half.state_dict())
    assert run(given_level, [2.0]) == [0.0] and given_level.h_warm == 4.0


def test_a_rescaled_gate_decides_as_before_on_rescaled_entropies() -> None:
    """In the middle of a warm-up and after it, closed or open; a given H_warm is the recipe's."""
    entropies = [1.0, 1.2, 0.9, 1.1, 1.0, 1.1, 0.92, 0.99, 1.0, 0.9, 1.01]
    for moment in range(len(entropies)):
        plain, moved = antisd(), antisd()
        before = [(plain.update(h), moved.update(h)) for h in entropies[:moment]]
        moved.rescale(0.875)
        after = [(plain.update(h), moved.update(0.875 * h)) for h in entropies[moment:]]
        assert all(a == b for a, b in before + after)
        assert moved.h_warm == pytest.approx(0.875) and plain.h_warm == 1.0
    given = antisd(h_warm=0.8)
    given.rescale(0.5)
    assert given.h_warm == given.given == 0.8
