"""From an engine, a verifier and a problem set to rewarded whole groups."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from asd_megatron.distributed.layout import Groups
from asd_megatron.distributed.objects import broadcast_object
from asd_megatron.errors import UserError
from asd_megatron.records import FinishReason, Group, Problem, Prompt, SamplingParams
from asd_megatron.reward.base import Verifier
from asd_megatron.rollout.engine import RolloutEngine, RolloutError


class Problems(Protocol):
    """What the collector needs of a problem set: a step's problems, and the first `n` for evaluation."""

    def batch(self, step: int, n: int, seed: int) -> list[Problem]: ...

    def take(self, n: int | None = None) -> list[Problem]: ...


class StudentPrompts(Protocol):
    """What the collector needs of a prompt renderer."""

    def student(self, problem: Problem) -> Prompt: ...


@dataclass
class Timings:
    """Seconds spent by the last call in each phase, on this rank (rewards are computed on global rank 0)."""

    rollout: float = 0.0
    reward: float = 0.0


@dataclass
class Counts:
    """What did not go straight since the start of the run (global rank 0)."""

    aborted_rollouts: int = 0
    redrawn_groups: int = 0
    dropped_groups: int = 0


@dataclass(frozen=True)
class Evaluation:
    """A held-out evaluation: one rewarded group a problem, in the set's order."""

    groups: tuple[Group, ...]
    scores: tuple[tuple[float, ...], ...] = field(init=False)  # per problem, per sample

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", tuple(group.rewards for group in self.groups))

    @property
    def accuracy(self) -> float:
        """Mean over problems of the mean reward of their samples."""
        return sum(sum(s) / len(s) for s in self.scores) / len(self.scores)

    @property
    def length_mean(self) -> float:
        """Mean response length in tokens, the end token included."""
        lengths = [len(r.response_ids) for g in self.groups for r in g.rollouts]
        return sum(lengths) / len(lengths)

    @property
    def truncated(self) -> float:
        """Share of the responses that ran into the token limit."""
        flags = [r.truncated for g in self.groups for r in g.rollouts]
        return sum(flags) / len(flags)


class Collector:
    """Delivers the rewarded groups of a training step, and evaluates.

    Collective: every rank calls the same methods in the same order. Results come on global rank 0; an error that only
    rank 0 can see (a reward that raises) is raised on every rank.

    A group with an aborted rollout is asked for again, at most `redraws` times, then dropped whole and counted; a group
    is never delivered in part. timeout: seconds within which the engine must deliver something, per wait.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        verifier: Verifier | None,
        problem_set: Problems,
        renderer: StudentPrompts,
        groups: Groups,
        *,
        params: SamplingParams,
        problems_per_step: int,
        seed: int,
        timeout: float = 3600.0,
        redraws: int = 1,
    ) -> None:
        """render: a problem to the student's prompt (`PromptRenderer.student`). params: how training rollouts are
        sampled."""
        self.timings = Timings()
        self.counts = Counts()
        self._engine = engine
        self._verifier = verifier
        self._problem_set = problem_set
        self._render = renderer.student
        self._groups = groups
        self._params = params
        self._problems_per_step = problems_per_step
        self._seed = seed
        self._timeout = timeout
        self._redraws = redraws
        self._evaluated: tuple[Problems, int | None, list[Prompt]] | None = None

    def next(self, step: int) -> list[Group]:
        """Step `step`'s groups (from 1) in the problem set's order; [] on other ranks than global rank 0.

        Raises RolloutError when every group was aborted.
        """
        problems = self._problem_set.batch(step, self._problems_per_step, self._seed)
        found, missing = self._draw([self._render(problem) for problem in problems], self._params, step)
        if missing == len(problems):
            raise RolloutError(
                f"step {step}: the engine aborted every group, {self._redraws + 1} times; see its log or the server's"
            )
        self.counts.dropped_groups += missing
        return found

    def evaluate(
        self, problem_set: Problems, params: SamplingParams, *, step: int, problems: int | None = None
    ) -> Evaluation | None:
        """Score `params.n` samples of the set's first `problems` problems (None: all), on the weights the engine has.

        step: training steps done; the noise differs between evaluations and from training's. None on other ranks than
        0. Raises RolloutError when a problem's samples cannot be had: an evaluation is complete or not at all.
        """
        if self._evaluated is None or self._evaluated[0] is not problem_set or self._evaluated[1] != problems:
            self._evaluated = (problem_set, problems, [self._render(p) for p in problem_set.take(problems)])
        found, missing = self._draw(self._evaluated[2], params, -1 - step)
        if missing:
            raise RolloutError(
                f"evaluation after step {step}: the engine aborted {missing} problem(s), {self._redraws + 1} times; "
                "see its log or the server's"
            )
        return Evaluation(tuple(found)) if self._is_root else None

    @property
    def _is_root(self) -> bool:
        return self._groups.world.rank() == 0

    def _draw(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> tuple[list[Group], int]:
        """(rewarded groups in the order of `prompts` on rank 0, number of prompts without one on every rank)."""
        self.timings = Timings()
        found: dict[int, Group] = {}
        error: Exception | None = None
        missing = list(range(len(prompts)))
        for attempt in range(self._redraws + 1):
            asked = missing
            self.counts.redrawn_groups += len(asked) if attempt else 0
            self._engine.submit([prompts[i] for i in asked], params, step)
            while self._engine.pending:
                started = time.perf_counter()
                groups = self._engine.collect(self._timeout)
                self.timings.rollout += time.perf_counter() - started
                if groups and error is None:
                    try:
                        self._take(groups, prompts, asked, found)
                    except Exception as e:  # the other ranks must hear of it before anyone stops
                        error = e
            missing = [i for i in asked if i not in found]
            missing = self._agree(missing, error)
            if not missing:
                break
        return [found[i] for i in sorted(found)], len(missing)

    def _agree(self, missing: list[int], error: Exception | None) -> list[int]:
        """Rank 0's list on every rank; raises rank 0's error on every rank."""
        message = None if error is None else str(error) if isinstance(error, UserError) else repr(error)
        missing, message = broadcast_object((missing, message) if self._is_root else None, 0, self._groups.world)
        if error is not None:
            raise error
        if message is not None:
            raise UserError(message)
        return missing

    def _take(
        self, groups: Iterable[Group], prompts: Sequence[Prompt], asked: Sequence[int], found: dict[int, Group]
    ) -> None:
        """Reward the whole groups among `groups` into `found`, by the number of their prompt."""
        whole: list[tuple[int, Group]] = []
        open_places = {prompts[i].problem.prompt_id: i for i in asked if i not in found}
        for group in groups:
            aborted = sum(r.finish_reason is FinishReason.ABORT for r in group.rollouts)
            self.counts.aborted_rollouts += aborted
            if not aborted:
                whole.append((open_places[group.problem.prompt_id], group))
        if self._verifier is None:
            raise ValueError("global rank 0 has no verifier")
        started = time.perf_counter()
        items = [(group.problem, rollout.text) for _, group in whole for rollout in group.rollouts]
        rewards = iter(self._verifier.score(items)) if items else iter(())
        for place, group in whole:
            scores = tuple(float(next(rewards)) for _ in group.rollouts)
            if not all(math.isfinite(score) for score in scores):
                raise UserError(
                    f"the rewards of problem {group.problem.prompt_id} are not all finite ({scores}); a reward "
                    "function returns a finite number for every response"
                )
            found[place] = dataclasses.replace(group, rewards=scores)
        self.timings.reward += time.perf_counter() - started
