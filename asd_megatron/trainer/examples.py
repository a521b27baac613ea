"""From rewarded groups to training examples: group-relative advantages and each rollout's privileged prompt. On global
rank 0 only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from asd_megatron.antisd import GroupAdvantage, Overlong, choose_demonstrations, feedback, group_advantages, whitened
from asd_megatron.antisd.privileged import Demonstration
from asd_megatron.errors import UserError
from asd_megatron.records import DemonstrationSource, Example, FinishReason, Group, Problem, Rollout

if TYPE_CHECKING:
    from asd_megatron.records import TokenIds

RENDER_SECONDS = 600.0  # in which a privileged prompt has to be rendered, however many are before it
WORKERS = min(8, os.cpu_count() or 1)
"""Threads that render and tokenise privileged prompts."""


class TeacherPrompt(Protocol):
    """A privileged prompt: int32 [tokens], None when there can be none; what is counted of it, None: nothing."""

    @property
    def ids(self) -> TokenIds | None: ...
    @property
    def outcome(self) -> str | None: ...


class TeacherPrompts(Protocol):
    """What is needed of the prompt renderer; several threads call it."""

    def teacher(
        self, problem: Problem, demonstration: str | None, feedback: str | None, response_len: int, limits: Any
    ) -> TeacherPrompt: ...


@dataclass(frozen=True)
class Signal:
    """What of the recipe makes an example's tokens learn from their rewards or their privileged context.

    advantage: the group advantage is part of the loss. context: a term is added for responses with a privileged prompt.
    mask_truncated: responses cut off by the token limit are left out of the loss.
    """

    advantage: bool
    context: bool
    mask_truncated: bool

    def of(self, example: Example) -> bool:
        """Whether the example has a gradient that tells good tokens from bad ones. A KL penalty and an entropy bonus,
        which every token has, do not count; nor does that lambda is 0 in a warm-up or with the gate closed, which is
        known only after the step's responses have been scored."""
        if self.mask_truncated and example.rollout.truncated:
            return False
        return self.advantage and example.group_advantage != 0 or self.context and example.has_context


class _Pending(NamedTuple):
    """A group whose examples are in flight: for each rollout the example and the `outcome` of its prompt."""

    step: int
    group: Group
    jobs: list[Future[tuple[Example, str | None]]]


def _result(group: Group, job: Future[tuple[Example, str | None]]) -> tuple[Example, str | None]:
    try:
        return job.result(RENDER_SECONDS)
    except TimeoutError as error:
        raise UserError(
            f"the privileged prompts of problem {group.problem.prompt_id} were not rendered within"
            f" {RENDER_SECONDS:.0f} s: does the chat template of the model folder end for every text?"
        ) from error


class ExampleBuilder:
    """Turns complete, rewarded groups into examples. `counters` counts the `outcome` of their privileged prompts.

    Args:
        renderer, limits: of the privileged prompt; the limits are the renderer's. seed: of the draw of demonstrations.
        privileged: False for conditions without a teacher pass: no rollout gets a privileged prompt.
        success_threshold, exclude_self, demonstrations_per_group, when_no_solution: see `antisd.privileged`.
        use_group: False: no rollout demonstrates.
        use_reference: False: the data set's reference solutions are not shown.
        feedback_kind: `binary` or `fraction`, as the verifier says; `tests_of` counts a problem's test cases for the
        latter.
        group_advantage: how a group's rewards become advantages. whiten: divide them by the standard deviation of the
        batch's. overlong: takes reward from long responses, for the advantage alone.
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
        group_advantage: GroupAdvantage = "normalized",
        whiten: bool = False,
        overlong: Overlong | None = None,
    ) -> None:
        self.renderer, self.limits, self.seed, self.privileged = renderer, limits, seed, privileged
        self.success_threshold, self.exclude_self = success_threshold, exclude_self
        self.demonstrations_per_group = demonstrations_per_group
        self.use_group, self.use_reference = use_group, use_reference
        self.when_no_solution, self.feedback_kind, self.tests_of = when_no_solution, feedback_kind, tests_of
        self.group_advantage, self.whiten, self.overlong = group_advantage, whiten, overlong
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="examples")
        self._prepared: dict[str, _Pending] = {}  # by prompt id
        self.counters: Counter[str] = Counter()

    def prepare(self, group: Group, step: int) -> None:
        """Begin with the examples of a complete group that `build` will probably be given for `step`, in the
        background. What was prepared of the same problem before is dropped."""
        self._drop(group.problem.prompt_id)
        self._prepared[group.problem.prompt_id] = self._begin(group, step)

    def build(self, groups: Sequence[Group], step: int) -> list[Example]:
        """The step's examples, group after group. Whether they were prepared changes nothing but the time."""
        chosen = []
        for group in groups:
            pending = self._prepared.get(group.problem.prompt_id)
            if pending is not None and pending.group is group and pending.step == step:
                chosen.append(self._prepared.pop(group.problem.prompt_id))
            else:
                chosen.append(self._begin(group, step))
        for name, pending in list(self._prepared.items()):
            if pending.step <= step:  # over-sampled: not in the step
                self._drop(name)
        made = [_result(pending.group, job) for pending in chosen for job in pending.jobs]
        self.counters.update(outcome for _, outcome in made if outcome is not None)
        examples = [example for example, _ in made]
        if not self.whiten:
            return examples
        advantages = whitened(torch.tensor([e.group_advantage for e in examples], dtype=torch.float64)).tolist()
        return [replace(e, group_advantage=a) for e, a in zip(examples, advantages, strict=True)]

    def has_signal(self, group: Group, step: int, signal: Signal) -> bool:
        """Whether any example of a complete group has a signal. Waits for the group's privileged prompts, which stay
        prepared for `build`."""
        pending = self._prepared.get(group.problem.prompt_id)
        if pending is None or pending.group is not group or pending.step != step:
            self.prepare(group, step)
            pending = self._prepared[group.problem.prompt_id]
        return any(signal.of(_result(group, job)[0]) for job in pending.jobs)

    def _drop(self, prompt_id: str) -> None:
        pending = self._prepared.pop(prompt_id, None)
        for job in () if pending is None else pending.jobs:
            job.cancel()

    def close(self) -> None:
        """End the workers, each after the prompt that it is at, which is not waited for: it may be the one that did not
        end in time. What is prepared is lost."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _begin(self, group: Group, step: int) -> _Pending:
        """Let the workers render the privileged prompts of the group's examples."""
        penalties: list[float | None] = [None] * len(group.rollouts)
        rewards = list(group.rewards)
        if self.overlong is not None:
            found = [self.overlong.penalty(len(rollout.response_ids)) for rollout in group.rollouts]
            penalties, rewards = [*found], [r + p for r, p in zip(rewards, found, strict=True)]
        if len(rewards) == 1:  # in recipes whose loss has no group advantage; others are refused
            advantages = [0.0]
        else:
            advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), self.group_advantage).tolist()
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
        jobs = [
            self._workers.submit(self._example, group, i, advantages[i], chosen, penalties[i])
            for i, chosen in enumerate(demonstrations)
        ]
        return _Pending(step, group, jobs)

    def _example(
        self, group: Group, index: int, advantage: float, chosen: Demonstration, penalty: float | None
    ) -> tuple[Example, str | None]:
        """The example of one rollout, and the `outcome` of its privileged prompt."""
        prompt = self._teacher_prompt(group, index, chosen)
        ids, outcome = (None, None) if prompt is None else (prompt.ids, prompt.outcome)
        if ids is None:
            chosen = Demonstration(DemonstrationSource.NONE)
        rollout, reward = group.rollouts[index], group.rewards[index]
        return Example(rollout, reward, advantage, ids, chosen.source, chosen.sample, penalty), outcome

    @staticmethod
    def _demonstrates(rollout: Rollout) -> bool:
        return rollout.finish_reason is FinishReason.STOP and bool(rollout.text.strip())

    def _teacher_prompt(self, group: Group, index: int, chosen: Demonstration) -> TeacherPrompt | None:
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
        return self.renderer.teacher(problem, text, assessment, len(response), self.limits)
