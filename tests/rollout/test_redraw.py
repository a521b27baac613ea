"""Dynamic sampling: groups that are discarded for their rewards, and the problems that are drawn in their place."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asd_megatron.data.problems import ProblemSet
from asd_megatron.errors import UserError
from asd_megatron.records import Group, Problem, SamplingParams
from asd_megatron.rollout.draw import Plan, Redraw
from asd_megatron.rollout.order import ProblemOrder
from tests.distributed.harness import run_ranks
from tests.rollout.test_collector import Problems
from tests.rollout.test_turns import Engine, Loop
from tests.rollout.toy import one_process_groups


def problem_set(total: int, shuffle: bool = True) -> ProblemSet:
    return ProblemSet("set", tuple(Problem(f"p{i}", "", prompt="") for i in range(total)), shuffle=shuffle)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=8), st.integers(0, 9))
def test_an_order_read_in_any_portions(steps: list[list[int]], seed: int) -> None:
    """A step's draws at once or in portions, in one process or resumed between any two steps, are the same."""
    source, size = problem_set(23), 4
    whole = ProblemOrder(source, size, seed)
    resumed_state: dict[str, Any] = {"asked": size}
    flat: list[str] = []
    for number, portions in enumerate(steps, start=1):
        whole.begin_step(number, continues=True)
        at_once = [p.prompt_id for p in whole.draw(sum(portions), ())]
        whole.end_step(())
        resumed = ProblemOrder(source, size, seed)
        resumed.restore(json.loads(json.dumps(resumed_state)), {})
        resumed.begin_step(number, continues=True)
        in_portions: list[str] = []
        for n in portions:
            in_portions += [p.prompt_id for p in resumed.draw(n, in_portions)]
        resumed.end_step(())
        resumed_state = resumed.state()
        assert at_once == in_portions and len(set(at_once)) == len(at_once)
        assert len(at_once) == min(sum(portions), 23) or len(at_once) > 23 - size * 3
        flat += at_once
    epoch = [p.prompt_id for k in range(5) for p in source.batch(k + 1, size, seed)]
    assert flat[:20] == epoch[: len(flat[:20])], "the epoch's order, each problem once"


def test_without_dynamic_sampling_a_step_has_the_batch_of_its_number() -> None:
    order, source = ProblemOrder(problem_set(10), 3, 0), problem_set(10)
    for step in (7, 2, 3):
        order.begin_step(step, continues=False)
        batch = source.batch(step, 3, 0)
        assert order.draw(2, {batch[0].prompt_id}) == batch[1:]
        order.end_step([batch[1].prompt_id])
        assert order.batch_of == {batch[1].prompt_id: step}


def keeps(but: str) -> Any:
    return lambda group, step: group.problem.prompt_id not in but


@pytest.mark.parametrize("slow", ["", "ad", "e"])
def test_the_next_problems_come_in_place_of_those_discarded(slow: str, process_groups: Any) -> None:
    """In whatever order groups finish; the next step continues where this one ended."""
    loop = Loop(process_groups, engine := Engine(slow), Plan(), Redraw(keeps("bde"), limit=9))
    assert loop.step(1) == "a0 c0 f0" and loop.step(2) == "g1 h1 i1"
    said = engine.said()
    assert said.startswith("v0 abc@1 d@1 ") or slow
    assert sorted(c for c in said.split(" release")[0] if c.isalpha() and c != "v") == list("abcdef")
    counts = loop.collector.counts
    assert (counts.judged_groups, counts.rejected_groups, counts.short_groups) == (9, 3, 0)
    assert loop.collector.state() == {"asked": 3, "passed": 9, "left_over": []}
    assert (counts.redrawn_groups, counts.dropped_groups) == (0, 0)  # those that an engine gave up are others


def test_at_the_limit_a_step_has_fewer_groups_and_goes_on_with_others(
    process_groups: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(process_groups, Engine(), Plan(), Redraw(keeps("abde"), limit=2))
    with caplog.at_level(logging.INFO):
        assert loop.step(1) == "c0"
        assert loop.step(2) == "f1 g1 h1"
    assert loop.collector.counts.short_groups == 2
    (record,) = [r for r in caplog.records if "redraw_limit" in r.getMessage()]
    assert record.levelname == "WARNING" and "2 groups fewer than 3: 4 were discarded" in record.getMessage()
    loop = Loop(process_groups, Engine(), Plan(), Redraw(keeps("abcdef"), limit=2))
    assert loop.step(1) == "a0 b0 c0", "with none left it trains on the first of those discarded"
    assert loop.step(2) == "g1 h1 i1" and loop.collector.counts.short_groups == 3


class Cycle(Problems):
    def batch(self, step: int, n: int, seed: int) -> list[Problem]:
        return [self.problems[((step - 1) * n + i) % len(self.problems)] for i in range(n)]


def test_a_small_set_has_no_other_problems(process_groups: Any) -> None:
    loop = Loop(process_groups, engine := Engine(), Plan(), Redraw(keeps("ab"), limit=99))
    loop.collector._order._source = Cycle("abcd")
    assert loop.step(1) == "c0 d0" and engine.said() == "v0 abc@1 d@1 release"
    assert loop.collector.counts.short_groups == 1


def test_overlap_and_an_evaluation(process_groups: Any) -> None:
    """Problems are drawn with the weights that the engine has; the step in flight is complete before an evaluation."""
    plan = Plan(overlap=True, max_staleness=1, last_step=3)
    loop = Loop(process_groups, engine := Engine(), plan, Redraw(keeps("bdg"), limit=9))
    assert loop.step(1) == "a0 c0 e0" and engine.said() == "v0 abc@1 d@1 e@1 v0 fgh@2"
    state = loop.collector.state()
    loop.collector.evaluate(Problems("X"), SamplingParams(n=1), step=1)
    assert engine.said() == "i@2 v1 X@-2"
    assert loop.step(2) == "f0 h0 i0" and engine.said() == "v1 jkl@3"
    again = Loop(process_groups, engine := Engine(), plan, Redraw(keeps("bdg"), limit=9))
    again.collector.restore(json.loads(json.dumps(state)))
    again.weights.version = 1
    assert again.step(2) == "f1 h1 i1", "a run that resumes after step 1 draws what step 2 had drawn"


def test_over_sampled_groups_make_up_for_discarded_ones_first(process_groups: Any) -> None:
    loop = Loop(process_groups, engine := Engine("e"), Plan(oversampling=1.5), Redraw(keeps("ac"), limit=9))
    assert loop.step(1) == "b0 d0 e0" and engine.said() == "v0 abcde@1 release"
    loop = Loop(process_groups, engine := Engine("e"), Plan(oversampling=1.5), Redraw(keeps("acd"), limit=9))
    assert loop.step(1) == "b0 e0 f0" and engine.said() == "v0 abcde@1 f@1 release"


def test_carried_groups_are_kept_and_found_again(process_groups: Any) -> None:
    plan, redraw = Plan(oversampling=1.5, carry=True), Redraw(keeps("acd"), limit=9)
    loop = Loop(process_groups, engine := Engine("jk"), plan, redraw)
    assert loop.step(1) == "b0 e0 f0" and loop.step(2) == "g1 h1 i1"
    assert engine.said() == "v0 abcde@1 f@1 release resume v1 ghijk@2 suspend release"
    state = json.loads(json.dumps(loop.collector.state()))
    assert state == {"asked": 5, "passed": 11, "left_over": [[2, "j", 2], [2, "k", 3]]}  # k is of the third batch
    again = Loop(process_groups, engine := Engine(), plan, redraw)
    again.collector.restore(state)
    again.weights.version = 2
    assert again.step(3) == "j2 k2 l2" and engine.said() == "v2 jk@2 lmn@3 suspend release"


def _two_ranks(rank: int) -> list[str]:
    groups = one_process_groups()
    found = []
    loop = Loop(groups, engine := Engine(root=rank == 0), Plan(), Redraw(keeps("bc"), limit=9))
    found.append(loop.step(1))
    found.append(engine.said())
    loop = Loop(groups, engine := Engine(root=rank == 0), Plan(), Redraw(keeps("abcde"), limit=2))
    found.append(loop.step(1))

    def fails(group: Group, step: int) -> bool:
        raise UserError("no prompt")

    try:
        Loop(groups, Engine(root=rank == 0), Plan(), Redraw(fails, limit=9)).step(1)
    except UserError as error:
        found.append(str(error))
    return found


def test_every_rank_draws_the_same() -> None:
    first, second = run_ranks(_two_ranks, 2, timeout=60)
    assert first == ["a0 d0 e0", "v0 abc@1 d@1 e@1 release", "a0 b0 c0", "no prompt"]
    assert second == ["", first[1], "", "no prompt"]
