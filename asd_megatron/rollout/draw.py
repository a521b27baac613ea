"""What a collector gathers: the groups of one step, and those of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from asd_megatron.errors import plural
from asd_megatron.records import Group, Prompt, SamplingParams
from asd_megatron.reward.base import Verifier


@dataclass(frozen=True)
class Evaluation:
    """A held-out evaluation: one rewarded group per problem, in the set's order."""

    groups: tuple[Group, ...]
    scores: tuple[tuple[float, ...], ...] = field(init=False)  # per problem, per sample

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", tuple(group.rewards for group in self.groups))

    @property
    def accuracy(self) -> float:
        """Mean over problems of the mean reward of their samples."""
        return sum(sum(s) / len(s) for s in self.scores) / len(self.scores)

    def pass_rate(self, threshold: float) -> float:
        """Mean over problems of the fraction of their samples with at least this reward: equal to `accuracy`, bit for
        bit, where all rewards are 0 or 1 and the threshold is between them."""
        return sum(sum(reward >= threshold for reward in s) / len(s) for s in self.scores) / len(self.scores)

    @property
    def length_mean(self) -> float:
        """Mean response length in tokens, the end token included."""
        lengths = [len(r.response_ids) for g in self.groups for r in g.rollouts]
        return sum(lengths) / len(lengths)

    @property
    def truncated(self) -> float:
        """Fraction of the responses cut off by the token limit."""
        flags = [r.truncated for g in self.groups for r in g.rollouts]
        return sum(flags) / len(flags)


@dataclass(frozen=True)
class Plan:
    """The schedule of generation and training.

    overlap: step k + 1 is generated while step k trains (one step off-policy). oversampling: problems requested over
    problems needed; the groups that finish last are discarded, or carried over to the next step with `carry`.
    max_staleness: a group with a rollout whose first token is staler than this many weight versions is discarded and
    resampled.
    """

    overlap: bool = False
    oversampling: float = 1.0
    carry: bool = False
    max_staleness: int | None = None
    last_step: int | None = None  # None: there is always a next step


@dataclass(frozen=True)
class Redraw:
    """Dynamic sampling: groups that are discarded for what their rewards are.

    keeps: whether a rewarded group of a step stays, asked on global rank 0. limit: problems drawn in place of discarded
    ones in a step, at most.
    """

    keeps: Callable[[Group, int], bool]
    limit: int


@dataclass
class Draw:
    """The groups requested for a step.

    `missing`: the prompt indices without a group; `rejected`: those whose group was discarded for its rewards, in that
    order; both the same on all ranks. `found`: the rewarded groups by prompt index, in order of completion, on global
    rank 0 alone; there `rejected` has the first `wanted` of the discarded ones. `judged`: those of `found` that stay.
    Of an evaluation, on global rank 0: `verifier` scores it (None: the collector's own), and `on_group` is told of
    every rewarded group and the index of its prompt.
    """

    step: int
    prompts: list[Prompt]
    params: SamplingParams
    wanted: int
    verifier: Verifier | None = None
    on_group: Callable[[int, Group], None] | None = None
    found: dict[int, Group] = field(default_factory=dict)
    missing: set[int] = field(init=False)
    rejected: dict[int, Group | None] = field(default_factory=dict)
    judged: set[int] = field(default_factory=set)
    redrawn: int = 0  # prompts added in place of rejected ones
    exhausted: bool = False  # the data have no others
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.missing = set(range(len(self.prompts)))

    @property
    def available(self) -> int:
        """Groups that there are."""
        return len(self.prompts) - len(self.missing) - len(self.rejected)

    @property
    def lacking(self) -> int:
        """Groups that the step lacks."""
        return max(0, self.wanted - self.available)

    @property
    def enough(self) -> bool:
        return self.lacking == 0

    def place(self, group: Group) -> int:
        """The index of the group's prompt."""
        name, taken = group.problem.prompt_id, {*self.found, *self.rejected}
        return next(i for i, p in enumerate(self.prompts) if p.problem.prompt_id == name and i not in taken)

    def judge(self, keeps: Callable[[Group, int], bool]) -> int:
        """Reject the groups found since the last call that `keeps` does not want; returns how many were looked at. On
        global rank 0."""
        new = [i for i in self.found if i not in self.judged]
        for i in new:
            if keeps(self.found[i], self.step):
                self.judged.add(i)
            else:
                group = self.found.pop(i)
                self.rejected[i] = group if len(self.rejected) < self.wanted else None
        return len(new)

    def add(self, prompts: Sequence[Prompt]) -> None:
        """Further prompts, in place of rejected ones."""
        self.missing |= set(range(len(self.prompts), len(self.prompts) + len(prompts)))
        self.prompts += prompts
        self.redrawn += len(prompts)

    def take_back(self) -> None:
        """Keep the first `wanted` rejected groups after all."""
        for i in list(self.rejected)[: self.wanted]:
            group = self.rejected.pop(i)
            if group is not None:
                self.found[i] = group

    def shortage(self, groups: int) -> str:
        """In words, that rejected groups could not be replaced: so many."""
        instead = "" if self.available else "; none is left, so that it trains on the first of these"
        return (
            f"step {self.step} has {plural(groups, 'group')} fewer than {self.wanted}: {len(self.rejected)} were"
            f" discarded for their rewards (sampling.redraw), and {self.redrawn} were drawn in their place, which is"
            f" all that sampling.redraw_limit or the data allow{instead}"
        )

    def first_groups(self) -> list[Group]:
        """The `wanted` groups that finished first, in the order of the prompts."""
        return [self.found[i] for i in sorted(list(self.found)[: self.wanted])]

    def spare(self) -> list[int]:
        """The prompt indices of the other finished groups."""
        return list(self.found)[self.wanted :]
