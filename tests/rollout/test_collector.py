"""The collector with an engine and a verifier that do as they are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.records import FinishReason, Group, Problem, Prompt, Rollout, SamplingParams
from asd_megatron.reward.base import Response
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.draw import Evaluation
from asd_megatron.rollout.engine import RolloutError
from tests.distributed.harness import run_ranks
from tests.rollout.toy import Versioned, one_process_groups

PARAMS = SamplingParams(n=2)


class Problems:
    def __init__(self, names: str) -> None:
        self.problems = [Problem(prompt_id=c, answer=c, prompt=c) for c in names]

    def batch(self, step: int, n: int, seed: int) -> list[Problem]:
        return self.problems[step - 1 : step - 1 + n]

    def take(self, n: int | None = None) -> list[Problem]:
        return self.problems[:n]


class Renderer:
    def __init__(self) -> None:
        self.calls = 0

    def student(self, problem: Problem) -> Prompt:
        self.calls += 1
        return Prompt(problem, (ord(problem.prompt_id),))


class ScriptedEngine:
    """Delivers one group per `collect`, last submitted first; `aborts[id]` groups of a problem come back aborted."""

    weight_version = 0

    def __init__(self, aborts: dict[str, int] | None = None, root: bool = True) -> None:
        self.aborts = dict(aborts or {})
        self.root = root
        self.asked: list[tuple[str, int]] = []
        self.queue: list[tuple[Prompt, SamplingParams]] = []

    @property
    def pending(self) -> int:
        return len(self.queue)

    def load_weights(self, weights: Any) -> None:
        self.weight_version = weights.version

    def release(self) -> None: ...

    def resume(self) -> None: ...

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> None:
        self.asked.append(("".join(p.problem.prompt_id for p in prompts), step))
        self.queue += [(p, params) for p in prompts]

    def collect(self, timeout: float) -> list[Group]:
        prompt, params = self.queue.pop()
        name = prompt.problem.prompt_id
        self.aborts[name] = self.aborts.get(name, 0) - 1
        reasons = [
            FinishReason.ABORT if self.aborts[name] >= 0 and s == 1 else FinishReason.STOP for s in range(params.n)
        ]
        reasons = [FinishReason.LENGTH if f"{name}{s}" == "c1" else reason for s, reason in enumerate(reasons)]
        rollouts = [
            Rollout(name, s, prompt.ids, (1,) * (s + 1), (0.0,) * (s + 1), reason, 0, text=f"{name}{s}")
            for s, reason in enumerate(reasons)
        ]
        return [Group(prompt.problem, tuple(rollouts))] if self.root else []


class Verifier:
    feedback_kind = "binary"
    counters: dict[str, int] = {}

    def __init__(self, reward: Any = None) -> None:
        self.reward = reward
        self.items: list[tuple[str, str]] = []
        self.truncated: list[str] = []

    def score(self, responses: Sequence[Response]) -> list[float]:
        self.items += [(r.problem.prompt_id, r.text) for r in responses]
        self.truncated += [r.text for r in responses if r.truncated]
        if isinstance(self.reward, Exception):
            raise self.reward
        return [float(text.endswith("1")) if self.reward is None else self.reward for _, text, _ in responses]

    def close(self) -> None: ...


def _collector(process_groups: Any, engine: ScriptedEngine, verifier: Any = None, **kwargs: Any) -> Collector:
    return Collector(
        engine,  # type: ignore[arg-type]
        Versioned(0),
        verifier or Verifier(),
        Problems("abcdef"),
        Renderer(),
        process_groups,
        params=PARAMS,
        problems_per_step=3,
        seed=0,
        timeout=60.0,
        **kwargs,
    )


def test_rewarded_groups_in_the_order_of_the_problems(process_groups: Any) -> None:
    engine, verifier = ScriptedEngine(), Verifier()
    collector = _collector(process_groups, engine, verifier)
    found = collector.next(2)
    assert [g.problem.prompt_id for g in found] == ["b", "c", "d"]
    assert all(g.rewards == (0.0, 1.0) for g in found)
    assert engine.asked == [("bcd", 2)]
    assert sorted(verifier.items) == [(c, f"{c}{s}") for c in "bcd" for s in (0, 1)]
    assert verifier.truncated == ["c1"]
    assert collector.timings.rollout > 0 and collector.timings.reward > 0


def test_a_group_with_an_aborted_rollout_is_resampled(process_groups: Any) -> None:
    engine, verifier = ScriptedEngine({"b": 1}), Verifier()
    collector = _collector(process_groups, engine, verifier)
    found = collector.next(1)
    assert [g.problem.prompt_id for g in found] == ["a", "b", "c"]
    assert engine.asked == [("abc", 1), ("b", 1)]
    assert [i for i in verifier.items if i[0] == "b"] == [("b", "b0"), ("b", "b1")]
    counts = collector.counts
    assert (counts.aborted_rollouts, counts.redrawn_groups, counts.dropped_groups) == (1, 1, 0)


def test_a_group_that_stays_aborted_is_dropped_and_counted(process_groups: Any) -> None:
    engine = ScriptedEngine({"b": 9})
    collector = _collector(process_groups, engine, redraws=2)
    assert [g.problem.prompt_id for g in collector.next(1)] == ["a", "c"]
    assert engine.asked == [("abc", 1), ("b", 1), ("b", 1)]
    counts = collector.counts
    assert (counts.aborted_rollouts, counts.redrawn_groups, counts.dropped_groups) == (3, 2, 1)
    with pytest.raises(RolloutError, match="step 1.*every group"):
        _collector(process_groups, ScriptedEngine(dict.fromkeys("abc", 9))).next(1)


def test_evaluation(process_groups: Any) -> None:
    engine = ScriptedEngine()
    collector = _collector(process_groups, engine)
    held_out = Problems("uvwx")
    for step in (0, 5):
        result = collector.evaluate(held_out, SamplingParams(n=4), step=step, problems=3)
        assert result is not None
        assert result.scores == ((0.0, 1.0, 0.0, 0.0),) * 3
        assert result.accuracy == 0.25 and result.length_mean == 2.5 and result.truncated == 0
    assert engine.asked == [("uvw", -1), ("uvw", -6)]  # noise of its own: never a training step's
    assert collector._render.__self__.calls == 3  # type: ignore[attr-defined]
    assert len(collector.evaluate(held_out, PARAMS, step=6).groups) == 4  # type: ignore[union-attr]
    with pytest.raises(RolloutError, match="evaluation after step 3"):
        _collector(process_groups, ScriptedEngine({"v": 9})).evaluate(held_out, PARAMS, step=3)


def test_accuracy_weighs_problems_equally() -> None:
    def group(*rewards: float) -> Group:
        rollouts = [
            Rollout("p", i, (1,), (1, 2), (0.0, 0.0), FinishReason.LENGTH if r else FinishReason.STOP, 0)
            for i, r in enumerate(rewards)
        ]
        return Group(Problem("p", "", prompt=""), tuple(rollouts), rewards)

    result = Evaluation((group(1.0, 1.0), group(0.0)))
    assert result.accuracy == 0.5 and result.truncated == pytest.approx(2 / 3)
    thirds = Evaluation(tuple(group(float(i % 3 == 0), float(i % 2), 1.0) for i in range(7)))
    assert thirds.pass_rate(1.0) == thirds.accuracy  # bit for bit with rewards of 0 and 1
    assert Evaluation((group(0.5, 1.0), group(0.25, 0.0))).pass_rate(0.5) == 0.5


def test_rewards_must_be_finite(process_groups: Any) -> None:
    with pytest.raises(UserError, match="problem .*finite"):
        _collector(process_groups, ScriptedEngine(), Verifier(float("nan"))).next(1)


def _two_ranks(rank: int) -> tuple[str, bool, list[str]]:
    groups = one_process_groups()
    engine = ScriptedEngine({"b": 1}, root=rank == 0)
    collector = _collector(groups, engine, None if rank else Verifier())
    found = collector.next(1)
    evaluation = collector.evaluate(Problems("xy"), PARAMS, step=1)
    assert engine.asked == [("abc", 1), ("b", 1), ("xy", -2)]
    raised = []
    for error in (UserError("bad reward"), KeyError("x")):
        try:
            _collector(groups, engine, None if rank else Verifier(error)).next(1)
        except Exception as e:
            assert engine.pending == 0
            raised.append(f"{type(e).__name__}: {e}")
    return "".join(g.problem.prompt_id for g in found), evaluation is None, raised


def test_every_rank_makes_the_same_calls_and_hears_of_rank_0s_error() -> None:
    first, second = run_ranks(_two_ranks, 2, timeout=60)
    assert first == ("abc", False, ["UserError: bad reward", "KeyError: 'x'"])
    assert second == ("", True, ["UserError: bad reward", "RuntimeError: global rank 0 failed: KeyError: 'x'"])
