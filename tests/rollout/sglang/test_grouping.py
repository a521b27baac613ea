"""Prompts to requests, results to groups."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from asd_megatron.records import FinishReason, SamplingParams
from asd_megatron.rollout.sglang.client.routing import Routing
from asd_megatron.rollout.sglang.client.scheduling import SampleRequest, SampleResult
from asd_megatron.rollout.sglang.grouping import Assembler, Labels
from tests.rollout.toy import ToyTokenizer, prompt

LABELS = Labels("cafe")
PARAMS = SamplingParams(n=2, max_new_tokens=8, temperature=0.7, stop_token_ids=(0,), stop=("zz",))


def assembler() -> Assembler:
    return Assembler(ToyTokenizer(), seed=5, labels=LABELS)


def answer(request: SampleRequest, ids: tuple[int, ...], reason: str = "stop", *spans: tuple[int, int]) -> SampleResult:
    """A result for the request, made under version 3 or under the (start, version) of `spans`."""
    labelled = tuple((start, LABELS.label(version)) for start, version in spans or [(0, 3)])
    return SampleResult(request.key, ids, tuple(-0.5 * i for i in ids), reason, labelled if ids else ())


def test_one_request_per_sample_and_complete_groups_in_submitted_order() -> None:
    made = assembler()
    a0, a1, b0, b1 = made.add([prompt("a", (1, 2)), prompt("b", (3,))], PARAMS, step=4)
    assert [r.input_ids for r in (a0, a1, b0, b1)] == [(1, 2), (1, 2), (3,), (3,)]
    assert a0.group == a1.group != b0.group
    assert a0.sampling | {"sampling_seed": 0} == {
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 8,
        "stop_token_ids": [0],
        "stop": ["zz"],
        "ignore_eos": False,
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "sampling_seed": 0,
    }
    assert made.take([answer(b1, (4, 0)), answer(a1, (5,), "length")]) == []
    first, second = made.take([answer(b0, (6, 0)), answer(a0, (7, 0))])
    assert [g.problem.prompt_id for g in (first, second)] == ["a", "b"]
    one, two = first.rollouts
    found = [list(part) for part in (one.prompt_ids, one.response_ids, one.logprobs)]
    assert one.sample == 0 and found == [[1, 2], [7, 0], [-3.5, 0.0]]
    assert (one.text, one.weight_version, one.across_versions, one.finish_reason) == ("g", 3, False, FinishReason.STOP)
    assert two.truncated and tuple(second.rollouts[1].response_ids) == (4, 0)
    assert made.take(()) == []


def test_noise_is_a_function_of_seed_step_problem_and_sample() -> None:
    def seeds(seed: int, step: int, name: str) -> list[int]:
        requests = Assembler(None, seed, LABELS).add([prompt(name, (1,))], PARAMS, step)
        return [r.sampling["sampling_seed"] for r in requests]

    assert seeds(1, 2, "a") == seeds(1, 2, "a")
    everything = seeds(1, 2, "a") + seeds(2, 2, "a") + seeds(1, 3, "a") + seeds(1, 2, "b")
    assert len(set(everything)) == 8 and all(0 <= s < 2**63 for s in everything)


def test_a_suspended_sample_continues_where_it_stopped() -> None:
    made = assembler()
    a0, a1 = made.add([prompt("a", (1, 2))], PARAMS, step=4)
    made.suspend([answer(a0, (5, 6, 7), "abort"), answer(a1, (8, 0))])
    assert made.take(()) == []
    rest, new, _ = made.add([prompt("b", (3,))], PARAMS, step=5)
    assert (rest.key, rest.group, rest.input_ids) == (a0.key, a0.group, (1, 2, 5, 6, 7))
    assert rest.sampling["max_new_tokens"] == 5 and new.group != rest.group
    assert rest.sampling["sampling_seed"] != a0.sampling["sampling_seed"]
    (group,) = made.take([answer(rest, (9, 0), "stop", (0, 4))])
    rollout = group.rollouts[0]
    assert tuple(rollout.response_ids) == (5, 6, 7, 9, 0) and tuple(rollout.logprobs) == (-2.5, -3.0, -3.5, -4.5, 0.0)
    assert rollout.weight_version == 3 and rollout.version_changes == ((3, 4),) and rollout.across_versions
    assert tuple(group.rollouts[1].response_ids) == (8, 0) and not group.rollouts[1].across_versions


def test_suspended_twice_and_before_the_first_token() -> None:
    made = assembler()
    a0, a1 = made.add([prompt("a", (1,))], PARAMS, step=1)
    made.suspend([answer(a0, (), "abort"), answer(a1, (4,), "abort")])
    b0, b1 = made.add([], PARAMS, step=2)
    assert b0.input_ids == (1,) and b0.sampling["max_new_tokens"] == 8
    made.suspend([answer(b0, (5,), "abort", (0, 4)), answer(b1, (6,), "abort", (0, 4))])
    c0, c1 = made.add([], PARAMS, step=3)
    (group,) = made.take([answer(c0, (0,), "stop", (0, 5)), answer(c1, (7, 0), "stop", (0, 5))])
    assert [tuple(r.response_ids) for r in group.rollouts] == [(5, 0), (4, 6, 7, 0)]
    assert [(r.weight_version, r.version_changes) for r in group.rollouts] == [
        (4, ((1, 5),)),
        (3, ((1, 4), (2, 5))),
    ]


def test_a_group_that_the_suspension_completes_is_delivered_next() -> None:
    made = assembler()
    a0, a1 = made.add([prompt("a", (1,))], PARAMS, step=1)
    made.suspend([answer(a0, (4, 0)), answer(a1, (5, 0))])
    assert made.add([], PARAMS, step=2) == []
    (group,) = made.take(())
    assert [tuple(r.response_ids) for r in group.rollouts] == [(4, 0), (5, 0)]


def test_weights_that_change_within_an_answer() -> None:
    made = assembler()
    a0, a1 = made.add([prompt("a", (1,))], PARAMS, step=1)
    (group,) = made.take([answer(a0, (4, 5, 6), "stop", (0, 3), (2, 4)), answer(a1, (), "abort")])
    assert group.rollouts[0].version_changes == ((2, 4),)
    assert group.rollouts[1].finish_reason is FinishReason.ABORT and tuple(group.rollouts[1].response_ids) == ()


def test_routes_are_those_of_the_answer_that_completes_a_response(caplog: pytest.LogCaptureFixture) -> None:
    """Its input holds the earlier parts, so it has the routes of all tokens, under the weights that finished it."""
    made = Assembler(None, 5, LABELS, Routing(layers=1, experts=4, per_token=2))
    a0, a1 = made.add([prompt("a", (1, 2))], PARAMS, step=1)
    assert a0.routing == Routing(layers=1, experts=4, per_token=2)
    old, new = np.zeros((4, 1, 2), np.int16), np.ones((6, 1, 2), np.int16)
    part = replace(answer(a0, (5, 6, 7), "abort"), routed_experts=old)
    made.suspend([part, replace(answer(a1, (), "abort"), unrouted="it has none")])
    assert made.unrouted == 0
    b0, b1 = made.add([], PARAMS, step=2)
    with caplog.at_level(logging.WARNING):
        lost = replace(answer(b1, (4, 0)), unrouted="they are 8 bytes", url="http://a")
        (group,) = made.take([replace(answer(b0, (9, 0)), routed_experts=new), lost])
    assert tuple(group.rollouts[0].response_ids) == (5, 6, 7, 9, 0) and group.rollouts[0].routed_experts is new
    assert group.rollouts[1].routed_experts is None and made.unrouted == 1
    assert "answer of http://a are not used: they are 8 bytes" in caplog.text
    with pytest.raises(ValueError, match="4 routed tokens do not belong to 7 tokens"):
        replace(group.rollouts[0], routed_experts=old)


def test_clear_forgets() -> None:
    made = assembler()
    made.add([prompt("a", (1,))], PARAMS, step=1)
    made.suspend([])
    made.clear()
    assert made.add([], PARAMS, step=2) == [] and made.take(()) == []


def test_labels() -> None:
    assert LABELS.version(LABELS.label(17)) == 17
    assert Labels().label(1) != Labels().label(1), "each run has a tag of its own"
    for foreign in ("default", Labels("beef").label(3), f"{LABELS.label(3)}-incomplete"):
        with pytest.raises(ValueError, match="label|invalid literal"):
            LABELS.version(foreign)
