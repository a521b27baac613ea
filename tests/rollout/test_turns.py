"""The collector's off-policy schedules: overlap, over-sampling, carried and stale groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asd_megatron.records import FinishReason, Group, Prompt, Rollout, SamplingParams
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.draw import Plan, Redraw
from tests.distributed.harness import run_ranks
from tests.rollout.test_collector import PARAMS, Problems, Renderer, Verifier
from tests.rollout.toy import Versioned, one_process_groups

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Blocks(Problems):
    """`n` problems a step, in the alphabet's order."""

    def batch(self, step: int, n: int, seed: int) -> list[Any]:
        return self.problems[(step - 1) * n : step * n]


class Engine:
    """Delivers one group per `collect`, first submitted first unless it is in `slow`, under the version it had when the
    group was begun. Writes down what it is told."""

    def __init__(self, slow: str = "", root: bool = True) -> None:
        self.slow = slow
        self.root = root
        self.log: list[str] = []
        self.version = -1
        self.queue: list[tuple[Prompt, SamplingParams, int]] = []
        self.suspended = False

    @property
    def pending(self) -> int:
        return len(self.queue)

    def load_weights(self, weights: Versioned) -> None:
        self.version = weights.version
        self.log.append(f"v{self.version}")

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> None:
        assert self.version >= 0
        self.suspended = False
        self.queue += [(p, params, self.version) for p in prompts]
        self.log.append("".join(p.problem.prompt_id for p in prompts) + f"@{step}")

    def collect(self, timeout: float) -> list[Group]:
        assert not self.suspended
        i = next((i for i, q in enumerate(self.queue) if q[0].problem.prompt_id not in self.slow), 0)
        prompt, params, version = self.queue.pop(i)
        rollouts = [
            Rollout(prompt.problem.prompt_id, s, prompt.ids, (1,), (0.0,), FinishReason.STOP, version, text=str(s))
            for s in range(params.n)
        ]
        return [Group(prompt.problem, tuple(rollouts))] if self.root else []

    def abort(self) -> None:
        self.queue.clear()
        self.log.append("abort")

    def suspend(self) -> None:
        self.suspended = True
        self.log.append("suspend")

    def release(self) -> None:
        assert not self.queue or self.suspended
        self.log.append("release")

    def resume(self) -> None:
        self.log.append("resume")

    def said(self) -> str:
        said, self.log = " ".join(self.log), []
        return said


class Loop:
    """The training loop around a collector: a step's update makes the weights' next version."""

    def __init__(self, process_groups: Any, engine: Engine, plan: Plan, redraw: Redraw | None = None) -> None:
        self.engine, self.weights = engine, Versioned(0)
        self._told: dict[int, str] = {}
        self.collector = Collector(
            engine,  # type: ignore[arg-type]
            self.weights,
            Verifier(),
            Blocks(LETTERS),
            Renderer(),
            process_groups,
            params=PARAMS,
            problems_per_step=3,
            seed=0,
            timeout=60.0,
            plan=plan,
            on_group=self._tell,
            redraw=redraw,
        )

    def _tell(self, group: Group, step: int) -> None:
        self._told[step] = self._told.get(step, "") + group.problem.prompt_id

    @property
    def told(self) -> list[str]:
        """Which groups each step may train on, as the collector's listener was told."""
        return [f"{names}@{step}" for step, names in self._told.items()]

    def step(self, step: int) -> str:
        """The problems trained on, each with the version that made it."""
        found = self.collector.next(step)
        self.weights.version = step
        return " ".join(f"{g.problem.prompt_id}{g.rollouts[0].weight_version}" for g in found)


def test_in_turns(process_groups: Any) -> None:
    loop = Loop(process_groups, engine := Engine(), Plan())
    assert loop.step(1) == "a0 b0 c0" and engine.said() == "v0 abc@1 release"
    assert loop.step(2) == "d1 e1 f1" and engine.said() == "resume v1 def@2 release"


def test_overlap_is_one_step_off_policy(process_groups: Any) -> None:
    loop = Loop(process_groups, engine := Engine(), Plan(overlap=True, max_staleness=1, last_step=3))
    assert loop.step(1) == "a0 b0 c0"
    assert engine.said() == "v0 abc@1 v0 def@2"  # step 2 is in flight while step 1 trains
    assert loop.step(2) == "d0 e0 f0" and engine.said() == "v1 ghi@3"
    assert loop.step(3) == "g1 h1 i1" and engine.said() == "release"  # nothing after the last step


def test_an_evaluation_waits_for_the_step_in_flight(process_groups: Any) -> None:
    loop = Loop(process_groups, engine := Engine(), Plan(overlap=True, max_staleness=1, last_step=9))
    loop.step(1)
    engine.said()
    result = loop.collector.evaluate(Problems("XY"), SamplingParams(n=1), step=1)
    assert result is not None and [g.problem.prompt_id for g in result.groups] == ["X", "Y"]
    assert all(g.rollouts[0].weight_version == 1 for g in result.groups)
    assert engine.said() == "v1 XY@-2"
    assert loop.step(2) == "d0 e0 f0" and engine.said() == "v1 ghi@3"


def test_oversampling_cuts_the_tail(process_groups: Any) -> None:
    loop = Loop(process_groups, engine := Engine(slow="bd"), Plan(oversampling=1.5))
    assert loop.step(1) == "a0 c0 e0"
    assert engine.said() == "v0 abcde@1 abort release"
    assert loop.collector.counts.cut_groups == 2
    assert loop.step(2) == "f1 g1 h1" and loop.collector.counts.cut_groups == 4


def test_carried_groups_come_first_in_the_next_step(process_groups: Any) -> None:
    loop = Loop(process_groups, engine := Engine(slow="bd"), Plan(oversampling=1.5, carry=True))
    assert loop.step(1) == "a0 c0 e0" and engine.said() == "v0 abcde@1 suspend release"
    engine.slow = ""
    # b and d continue; the step asks for five in all and needs three
    assert loop.step(2) == "b0 d0 f1" and engine.said() == "resume v1 fgh@2 suspend release"
    assert loop.collector.counts.carried_groups == 4 and loop.collector.counts.cut_groups == 0


def test_carried_groups_are_resampled_after_an_evaluation(process_groups: Any) -> None:
    loop = Loop(process_groups, engine := Engine(slow="bd"), Plan(oversampling=1.5, carry=True))
    loop.step(1)
    engine.said()
    loop.collector.evaluate(Problems("X"), SamplingParams(n=1), step=1)
    assert engine.said() == "abort resume v1 X@-2 release" and loop.collector.counts.cut_groups == 2
    engine.slow = ""
    assert loop.step(2) == "b1 d1 f1" and engine.said() == "resume v1 bd@1 fgh@2 suspend release"


def test_groups_finished_beyond_the_need_are_kept_or_cut(process_groups: Any) -> None:
    class Burst(Engine):
        """Delivers everything at once."""

        def collect(self, timeout: float) -> list[Group]:
            return [g for _ in range(len(self.queue)) for g in Engine.collect(self, timeout)]

    loop = Loop(process_groups, engine := Burst(), Plan(oversampling=1.5, carry=True))
    assert loop.step(1) == "a0 b0 c0" and engine.said() == "v0 abcde@1 release"
    assert loop.step(2) == "d0 e0 f1", "d and e were finished and rewarded in step 1"
    assert engine.said() == "resume v1 fgh@2 release"
    assert loop.told == ["abcde@1", "defgh@2"]
    loop = Loop(process_groups, engine := Burst(), Plan(oversampling=1.5))
    assert loop.step(1) == "a0 b0 c0" and loop.step(2) == "f1 g1 h1" and loop.collector.counts.cut_groups == 4
    plan = Plan(overlap=True, oversampling=1.5, carry=True, max_staleness=1, last_step=3)
    # begun while the step before trains, g and h of step 2 would be two versions old in step 3: sampled again
    loop = Loop(process_groups, engine := Burst(), plan)
    assert [loop.step(step) for step in (1, 2, 3)] == ["a0 b0 c0", "d0 e0 f0", "g1 h1 k1"]
    assert loop.collector.counts.stale_groups == 2 and loop.told == ["abcde@1", "defgh@2", "ghklm@3"]


def test_stale_groups_are_discarded_and_resampled(process_groups: Any) -> None:
    loop = Loop(process_groups, engine := Engine(), Plan(overlap=True, max_staleness=1, last_step=9))
    loop.step(1)
    loop.weights.version = 2  # the first tokens of d, e and f are of version 0
    engine.load_weights(loop.weights)
    engine.said()
    found = loop.collector.next(2)
    assert [(g.problem.prompt_id, g.rollouts[0].weight_version) for g in found] == [("d", 2), ("e", 2), ("f", 2)]
    assert engine.said().startswith("def@2") and loop.collector.counts.stale_groups == 3


def _two_ranks(rank: int) -> tuple[list[str], str]:
    engine = Engine(slow="bdk", root=rank == 0)
    plan = Plan(overlap=True, oversampling=1.5, carry=True, max_staleness=4, last_step=4)
    loop = Loop(one_process_groups(), engine, plan)
    if rank:
        loop.collector._verifier = None
    found = [loop.step(step) for step in (1, 2)]
    loop.collector.evaluate(Problems("XY"), PARAMS, step=2)
    found += [loop.step(step) for step in (3, 4)]
    return found, engine.said()


def test_all_ranks_tell_their_engine_the_same() -> None:
    (found, said), (nothing, same) = run_ranks(_two_ranks, 2, timeout=60)
    assert said == same and nothing == ["", "", "", ""]
    trained = [name[0] for step in found for name in step.split()]
    assert len(trained) == len(set(trained)) == 12, "no problem twice"
