"""From rewarded groups to training examples: group-relative advantages and each rollout's privileged prompt. On global
rank 0 only."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch

from asd_megatron.antisd import choose_demonstrations, feedback, group_advantages
from asd_megatron.antisd.privileged import Demonstration
from asd_megatron.records import DemonstrationSource, Example, FinishReason, Group, Problem, Rollout

if TYPE_CHECKING:
    from asd_megatron.records import TokenIds

WORKERS = min(8, os.cpu_count() or 1)
"""Threads that render and tokenise privileged prompts."""


class TeacherPrompts(Protocol):
    """What is needed of the prompt renderer: (ids of a privileged prompt, anything), or None when there can be none."""

    def teacher(
        self, problem: Problem, demonstration: str | None, feedback: str | None, response_len: int, limits: Any
    ) -> tuple[TokenIds, Any] | None: ...


class ExampleBuilder:
    """Turns complete, rewarded groups into examples.

    Args:
        renderer, limits: of the privileged prompt; the limits are the renderer's. seed: of the draw of demonstrations.
        privileged: False for conditions without a teacher pass: no rollout gets a privileged prompt.
        success_threshold, exclude_self, demonstrations_per_group, when_no_solution: see `antisd.privileged`.
        use_group: False: no rollout demonstrates.
        use_reference: False: the data set's reference solutions are not shown.
        feedback_kind: `binary` or `fraction`, as the verifier says; `tests_of` counts a problem's test cases for the
        latter.
    """

    def __init__(
        self,
        renderer: TeacherPrompts,
        limits: Any,
        *,
        seed: int,
        privileged: bool = True,
        success_threshold: float = 1.0,
        exclude_self: bool = True,
        demonstrations_per_group: int | None = None,
        use_group: bool = True,
        use_reference: bool = True,
        when_no_solution: str = "mask",
        feedback_kind: str = "binary",
        tests_of: Callable[[Problem], int | None] = lambda problem: None,
    ) -> None:
        self.renderer, self.limits, self.seed, self.privileged = renderer, limits, seed, privileged
        self.success_threshold, self.exclude_self = success_threshold, exclude_self
        self.demonstrations_per_group = demonstrations_per_group
        self.use_group, self.use_reference = use_group, use_reference
        self.when_no_solution, self.feedback_kind, self.tests_of = when_no_solution, feedback_kind, tests_of
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="examples")
        self._prepared: dict[str, tuple[int, Group, list[Future[Example]]]] = {}  # by prompt id

    def prepare(self, group: Group, step: int) -> None:
        """Begin with the examples of a complete group that `build` will probably be given for `step`, in the
        background."""
        self._prepared[group.problem.prompt_id] = step, group, self._begin(group, step)

    def build(self, groups: Sequence[Group], step: int) -> list[Example]:
        """The step's examples, group after group. Whether they were prepared changes nothing but the time."""
        prepared = self._prepared
        self._prepared = {name: begun for name, begun in prepared.items() if begun[0] > step}
        jobs = []
        for group in groups:
            of_step, known, begun = prepared.get(group.problem.prompt_id, (0, None, []))
            jobs += begun if known is group and of_step == step else self._begin(group, step)
        return [job.result() for job in jobs]

    def close(self) -> None:
        """End the workers; what is prepared is lost."""
        self._workers.shutdown(cancel_futures=True)

    def _begin(self, group: Group, step: int) -> list[Future[Example]]:
        """The group's examples, whose privileged prompts the workers render."""
        if len(group.rewards) == 1:  # in recipes whose loss has no group advantage; others are refused
            advantages = [0.0]
        else:
            advantages = group_advantages(torch.tensor(group.rewards, dtype=torch.float64)).tolist()
        demonstrations = [Demonstration(DemonstrationSource.NONE)] * len(group.rollouts)
        if self.privileged:
            demonstrations = choose_demonstrations(
                group.rewards,
                key=(self.seed, step, group.problem.prompt_id),
                success_threshold=self.success_threshold,
                exclude_self=self.exclude_self,
                per_group=self.demonstrations_per_group,
                when_no_solution=self.when_no_solution,
                has_reference=self.use_reference and bool(group.problem.solution),
                has_answer=bool(group.problem.answer),
                eligible=[self.use_group and self._demonstrates(rollout) for rollout in group.rollouts],
            )
        return [
            self._workers.submit(self._example, group, i, advantages[i], chosen)
            for i, chosen in enumerate(demonstrations)
        ]

    def _example(self, group: Group, index: int, advantage: float, chosen: Demonstration) -> Example:
        teacher_ids = self._teacher_ids(group, index, chosen)
        if teacher_ids is None:
            chosen = Demonstration(DemonstrationSource.NONE)
        return Example(
            group.rollouts[index], group.rewards[index], advantage, teacher_ids, chosen.source, chosen.sample
        )

    @staticmethod
    def _demonstrates(rollout: Rollout) -> bool:
        return rollout.finish_reason is FinishReason.STOP and bool(rollout.text.strip())

    def _teacher_ids(self, group: Group, index: int, chosen: Demonstration) -> TokenIds | None:
        if chosen.source is DemonstrationSource.NONE:
            return None
        problem = group.problem
        text: str | None
        if chosen.sample >= 0:
            text = group.rollouts[chosen.sample].text
        elif chosen.source is DemonstrationSource.REFERENCE:
            text = problem.solution
        elif chosen.source is DemonstrationSource.REFERENCE_ANSWER:
            text = f"The final answer is: {problem.answer}"
        else:
            text = None
        assessment = feedback(
            group.rewards[index],
            self.feedback_kind,
            success_threshold=self.success_threshold,
            tests=self.tests_of(problem),
        )
        response = group.rollouts[index].response_ids
        rendered = self.renderer.teacher(problem, text, assessment, len(response), self.limits)
        return None if rendered is None else rendered[0]
