"""The order in which training draws problems: batch after batch of the problem source."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from asd_megatron.data.problems import ProblemSource
from asd_megatron.records import Problem

FRUITLESS_BATCHES = 3  # in a row, after which there are taken to be no other problems


class ProblemOrder:
    """The problems of `source.batch(1)`, `batch(2)`, ..., each batch of `size` problems, and how many have been passed.

    That number is all of its state: what comes next is a function of it and the seed. A step that draws no problem in
    place of another takes exactly one batch. One that does reads on into the batches after it, so that no problem of an
    epoch is passed over and none is drawn twice:

        batch       1         2         3          (size 3; step 1 draws two problems in place of others)
        problem     a b c     d e f     g h i
        drawn by    1 1 1     1 1 2     2 2 ...

    `batch_of`: the batch of every problem that was drawn and not forgotten, by its id.
    """

    def __init__(self, source: ProblemSource, size: int, seed: int) -> None:
        self.size = size
        self.batch_of: dict[str, int] = {}
        self._source, self._seed = source, seed
        self._position = 0
        self._complete: int | None = None  # the position after the last complete step; None: its number says it
        self._read: tuple[int, list[Problem]] = (0, [])

    def begin_step(self, step: int, *, continues: bool) -> None:
        """`step` draws next: from where the step before ended if it `continues`, otherwise from the batch of its own
        number, where it is if no step has drawn further ones."""
        known = self._complete if continues else None
        self._position = (step - 1) * self.size if known is None else known

    def end_step(self, kept: Iterable[str]) -> None:
        """A step is complete; of the problems that were drawn only those of these ids may be asked for."""
        self._complete = self._position
        self.batch_of = {name: self.batch_of[name] for name in kept}

    def draw(self, n: int, without: Collection[str]) -> list[Problem]:
        """The next `n` problems that are not `without`. Fewer if there are no more: if none of as many as
        `FRUITLESS_BATCHES` batches have is another.

        Those that are passed over because of `without` are not drawn later in the epoch. Whether problems are drawn at
        once or one by one makes no difference. Raises what the source does when it has too few for a batch.
        """
        found: list[Problem] = []
        names, position = set(without), self._position
        while len(found) < n and position - self._position < FRUITLESS_BATCHES * self.size:
            number, index = divmod(position, self.size)
            batch = self._batch(number + 1)
            position += 1
            if index < len(batch) and batch[index].prompt_id not in names:
                self._position = position
                found.append(batch[index])
                names.add(batch[index].prompt_id)
                self.batch_of[batch[index].prompt_id] = number + 1
        return found

    def state(self) -> dict[str, Any]:
        """After the last complete step."""
        return {"asked": self.size, "passed": self._complete}

    def restore(self, state: Mapping[str, Any], left_over: Mapping[str, int]) -> list[Problem]:
        """Continue after the step of `state`, whose batches may have another size; `left_over`: batches of problems, by
        id. Returns those problems that the source still has."""
        self._complete = state.get("passed")  # absent in checkpoints of earlier versions
        found = []
        for batch in sorted(set(left_over.values())):
            problems = {p.prompt_id: p for p in self._source.batch(batch, state["asked"], self._seed)}
            found += [problems[name] for name, number in left_over.items() if number == batch and name in problems]
        self.batch_of = {problem.prompt_id: left_over[problem.prompt_id] for problem in found}
        return found

    def _batch(self, number: int) -> list[Problem]:
        if self._read[0] != number:
            self._read = (number, self._source.batch(number, self.size, self._seed))
        return self._read[1]
