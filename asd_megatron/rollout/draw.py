"""What a collector gathers: the groups of one step, and those of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from asd_megatron.records import Group, Prompt, SamplingParams


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


@dataclass
class Draw:
    """The groups requested for a step. `found`: the rewarded ones by prompt index, in order of completion, on global
    rank 0 alone. `missing`: the prompt indices without a group, the same on all ranks. `on_group`: of an evaluation, is
    told of every rewarded group and the index of its prompt, on global rank 0."""

    step: int
    prompts: Sequence[Prompt]
    params: SamplingParams
    wanted: int
    on_group: Callable[[int, Group], None] | None = None
    found: dict[int, Group] = field(default_factory=dict)
    missing: set[int] = field(init=False)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.missing = set(range(len(self.prompts)))

    @property
    def enough(self) -> bool:
        return len(self.prompts) - len(self.missing) >= self.wanted

    def place(self, group: Group) -> int:
        """The index of the group's prompt."""
        name = group.problem.prompt_id
        return next(i for i, p in enumerate(self.prompts) if p.problem.prompt_id == name and i not in self.found)

    def first_groups(self) -> list[Group]:
        """The `wanted` groups that finished first, in the order of the prompts."""
        return [self.found[i] for i in sorted(list(self.found)[: self.wanted])]

    def spare(self) -> list[int]:
        """The prompt indices of the other finished groups."""
        return list(self.found)[self.wanted :]
