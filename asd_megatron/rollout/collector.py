"""From an engine, a verifier and a problem set to complete, rewarded groups."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from asd_megatron.data.problems import ProblemSource
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.distributed.objects import broadcast_object, share_outcome
from asd_megatron.errors import UserError, plural
from asd_megatron.records import FinishReason, Group, Problem, Prompt, SamplingParams
from asd_megatron.reward.base import Response, Verifier
from asd_megatron.rollout.bank import Key, RolloutBank
from asd_megatron.rollout.counts import RESTORED, Counts, Timings
from asd_megatron.rollout.draw import Draw, Evaluation, Plan, Redraw
from asd_megatron.rollout.engine import RolloutEngine, RolloutError, WeightSource
from asd_megatron.rollout.order import ProblemOrder

log = logging.getLogger(__name__)


class StudentPrompts(Protocol):
    """What the collector needs of a prompt renderer."""

    def student(self, problem: Problem) -> Prompt: ...


class Collector:
    """Delivers the rewarded groups of a training step, and evaluates, with an engine and a verifier.

    Collective: every rank calls the same methods in the same order. Results come on global rank 0; an error that only
    rank 0 can see (a reward that raises) is raised on every rank.

    The engine is given the newest weights before any request. A group with an aborted or stale rollout is discarded and
    resampled, at most `redraws` times, then dropped and counted; a group is never delivered in part. Finished groups
    are rewarded while the engine generates the others. timeout: seconds within which the engine must deliver at least
    one group, per wait.

    redraw: dynamic sampling. A group that it does not keep is discarded, and the next problem of the order is drawn in
    its place as soon as over-sampled groups do not make up for it, with the weights that the engine has. Without
    over-sampling the problems of a step do not depend on the order in which groups finish. At the limit the step goes
    on with the groups that it has; if none is left, with the first of the discarded ones.

    A checkpoint keeps `state`: how far the order of problems is, and those that are drawn and left over; `restore`
    makes the latter the first of the next step. bank: that of the engine, on global rank 0, which has their responses;
    None: they are sampled again.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        weights: WeightSource,
        verifier: Verifier | None,
        problem_set: ProblemSource,
        renderer: StudentPrompts,
        process_groups: ProcessGroups,
        *,
        params: SamplingParams,
        problems_per_step: int,
        seed: int,
        plan: Plan = Plan(),  # noqa: B008 (frozen)
        timeout: float,
        redraws: int = 1,
        on_group: Callable[[Group, int], None] = lambda group, step: None,
        bank: RolloutBank | None = None,
        redraw: Redraw | None = None,
    ) -> None:
        """weights: the engine's weights; their version counts optimizer steps. params: of training rollouts. on_group:
        is told of every rewarded group of a training step as soon as there is one, on global rank 0."""
        self.timings = Timings()
        self.counts = Counts()
        self._engine = engine
        self._weights = weights
        self._verifier = verifier
        self._render = renderer.student
        self._process_groups = process_groups
        self._params = params
        self._wanted = problems_per_step
        self._plan = plan
        self._timeout = timeout
        self._redraws = redraws
        self._on_group = on_group
        self._bank = bank
        self._redraw = redraw
        self._asked = math.ceil(problems_per_step * plan.oversampling)  # problems a step
        self._order = ProblemOrder(problem_set, self._asked, seed)
        self._drawn_for: dict[str, int] = {}  # the first step of every problem in flight or left over, by its id
        self._left_over: list[Key] = []  # after the last complete step, in order
        self._draw: Draw | None = None  # the step in flight
        self._carried: list[Prompt] = []  # suspended in the engine, for the next step
        self._restart: list[Prompt] = []  # those that no engine has: aborted by an evaluation, or of a checkpoint
        self._spare: list[Prompt] = []  # finished but not needed: for the next step; their groups on global rank 0
        self._spare_groups: list[Group] = []
        self._released = False  # whether the engine has given its memory to the trainer
        self._evaluated: tuple[ProblemSource, int | None, list[Prompt]] | None = None

    @property
    def verifier(self) -> Verifier | None:
        """What scores responses, on global rank 0; None elsewhere."""
        return self._verifier

    def render(self, problems: Sequence[Problem]) -> list[Prompt]:
        """The problems' prompts, for `answer`."""
        return [self._render(problem) for problem in problems]

    def take_timings(self) -> Timings:
        """Seconds since the last call."""
        timings, self.timings = self.timings, Timings()
        return timings

    def next(self, step: int) -> list[Group]:
        """Step `step`'s groups (from 1) in the problem set's order; [] on other ranks than global rank 0.

        Raises RolloutError when every group was aborted.
        """
        if self._draw is None:
            self._load()
            self._draw = self._begin(step)
        draw, self._draw = self._draw, None
        self._finish(draw)
        self._count_lacking(draw)
        if not draw.available:
            draw.take_back()
        if not draw.available:
            raise RolloutError(
                f"step {step}: the engine aborted every group, {self._redraws + 1} times; see its log or the servers'"
            )
        self._stop_tail(draw)
        self._end_step(step)
        if self._plan.overlap and step != self._plan.last_step:
            self._load()
            self._draw = self._begin(step + 1, updates=1)
        else:
            self.release()
        return draw.first_groups()

    def suspend(self) -> None:
        """The run stops: generate nothing further. What there is of the responses goes to the bank."""
        with suppress(RolloutError):  # servers that do not answer: nothing depends on it
            if self._engine.pending:
                self._engine.suspend()

    def state(self) -> dict[str, Any]:
        """How far the order of problems is after the last complete step, and those that are drawn and left over: [first
        step, id, batch] each."""
        left_over = [[step, name, self._order.batch_of[name]] for step, name in self._left_over]
        return {**self._order.state(), "left_over": left_over}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the step of `state`. A problem that the set does not have any more is left out."""
        batches = {name: batch[0] if batch else step for step, name, *batch in state["left_over"]}
        found = {problem.prompt_id: problem for problem in self._order.restore(state, batches)}
        self._left_over = [(step, name) for step, name, *_ in state["left_over"] if name in found]
        self._restart = [self._render(found[name]) for _, name in self._left_over]
        self._drawn_for = {name: step for step, name in self._left_over}
        lost = len(state["left_over"]) - len(self._left_over)
        if lost:
            log.warning("%s left over by the checkpoint's step cannot be found in the data", plural(lost, "problem"))

    def evaluate(
        self, problem_set: ProblemSource, params: SamplingParams, *, step: int, problems: int | None = None
    ) -> Evaluation | None:
        """Sample every problem of `problem_set` (its first `problems`) with `params` from the newest weights, reward
        all.

        step: the training step after which this happens (0 before the first); the noise differs between evaluations and
        from training's. None on other ranks than 0. Raises RolloutError when a problem's samples cannot be had: an
        evaluation is complete or not at all.
        """
        if self._evaluated is None or self._evaluated[0] is not problem_set or self._evaluated[1] != problems:
            self._evaluated = (problem_set, problems, [self._render(p) for p in problem_set.take(problems)])
        return self.answer(self._evaluated[2], params, step=step)

    def answer(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        step: int,
        verifier: Verifier | None = None,
        on_group: Callable[[int, Group], None] | None = None,
    ) -> Evaluation | None:
        """As `evaluate`, of rendered prompts, scored by `verifier` (None: the collector's own; other ranks than 0 have
        none). on_group: is told of every rewarded group, with the index of its prompt, as soon as there is one."""
        self._settle()
        self._load()
        draw = Draw(-1 - step, list(prompts), params, wanted=len(prompts), verifier=verifier, on_group=on_group)
        self._engine.submit(draw.prompts, params, draw.step)
        self._finish(draw)
        if self._draw is None:
            self.release()
        if draw.lacking:
            raise RolloutError(
                f"evaluation after step {step}: the engine aborted {draw.lacking} problem(s), {self._redraws + 1}"
                " times; see its log or the server's"
            )
        return Evaluation(tuple(draw.first_groups())) if self._is_root else None

    # ---------------------------------------------------------------- the engine's weights and memory

    @property
    def _is_root(self) -> bool:
        return self._process_groups.world.rank() == 0

    def _load(self) -> None:
        started = time.perf_counter()
        if self._released:
            self._engine.resume()
            self._released = False
        self._engine.load_weights(self._weights)
        self.timings.weight_sync += time.perf_counter() - started

    def release(self) -> None:
        """Give the engine's accelerator memory to the trainer."""
        self._engine.release()
        self._released = True

    def _begin(self, step: int, updates: int = 0) -> Draw:
        """Request a step's groups: first those that the last step left over, then new problems. `updates`: weight
        updates that come before the step trains on them."""
        if self._bank is not None:
            limit = self._plan.max_staleness if self._plan.overlap or self._plan.carry else 0
            oldest = None if limit is None else self._weights.version + updates - limit
            self._bank.begin_step(set(self._left_over), oldest)
        self._restart_stale_spare(updates)
        spare, self._spare = self._spare, []
        carried, self._carried = self._carried, []
        restarted, self._restart = self._restart, []
        old = [*spare, *carried, *restarted]
        self._order.begin_step(step, continues=self._redraw is not None)
        new = [*restarted, *self._next_prompts(self._asked - len(old), step, old)]
        prompts = [*spare, *carried, *new]
        draw = Draw(step, prompts, self._params, wanted=min(self._wanted, len(prompts)))
        draw.missing -= set(range(len(spare)))
        draw.found = dict(enumerate(self._spare_groups))
        draw.judged = set(draw.found)
        self._spare_groups = []
        for group in draw.found.values():
            self._on_group(group, step)
        self._submit(new, draw)
        return draw

    def _next_prompts(self, n: int, step: int, others: Iterable[Prompt]) -> list[Prompt]:
        """The prompts of the next `n` problems of the order that are not among the `others`, drawn for `step`."""
        problems = self._order.draw(n, {prompt.problem.prompt_id for prompt in others})
        self._drawn_for |= {problem.prompt_id: step for problem in problems}
        return [self._render(problem) for problem in problems]

    def _submit(self, prompts: Sequence[Prompt], draw: Draw) -> None:
        """Request the prompts, each under the first step of its problem, by which the bank knows it."""
        if draw.step < 1:  # an evaluation
            self._engine.submit(prompts, draw.params, draw.step)
            return
        steps = [self._drawn_for[prompt.problem.prompt_id] for prompt in prompts]
        for step in sorted({*steps, draw.step}):  # of the draw's own step even none: what is suspended continues
            mine = [prompt for prompt, drawn in zip(prompts, steps, strict=True) if drawn == step]
            self._engine.submit(mine, draw.params, step)

    def _restart_stale_spare(self, updates: int) -> None:
        """Discard spare groups that will be too stale for the next step, `updates` weight updates from now: they
        are resampled."""
        if self._plan.max_staleness is None or not self._spare:
            return
        fresh = [i for i, group in enumerate(self._spare_groups) if not self._is_stale(group, updates)]
        fresh = broadcast_object(fresh if self._is_root else None, 0, self._process_groups.host)
        self._restart += [prompt for i, prompt in enumerate(self._spare) if i not in fresh]
        self.counts.stale_groups += len(self._spare) - len(fresh)
        self._spare = [self._spare[i] for i in fresh]
        if self._is_root:
            self._spare_groups = [self._spare_groups[i] for i in fresh]

    def _finish(self, draw: Draw) -> None:
        """Collect until the draw has enough groups, resampling those that were given up."""
        for attempt in range(self._redraws + 1):
            if attempt:
                again = [draw.prompts[i] for i in sorted(draw.missing)]
                self.counts.redrawn_groups += len(again)
                self._submit(again, draw)
            self._collect(draw, all_of_it=draw.wanted == len(draw.prompts) and not self._judges(draw))
            if draw.enough or not draw.missing:
                return

    def _judges(self, draw: Draw) -> bool:
        """Whether groups of the draw may be discarded for their rewards."""
        return self._redraw is not None and draw.step > 0

    def _collect(self, draw: Draw, *, all_of_it: bool) -> None:
        """Reward finished groups until the engine has nothing pending or, unless `all_of_it`, the draw has enough."""
        while self._engine.pending and (all_of_it or not draw.enough):
            started = time.perf_counter()
            groups = self._engine.collect(self._timeout)
            self.timings.rollout += time.perf_counter() - started
            if groups and draw.error is None:
                try:
                    self._take(groups, draw)
                except Exception as e:  # the other ranks must hear of it before anyone stops
                    draw.error = e
            if not all_of_it or self._judges(draw):
                self._agree(draw)
                self._replace_rejected(draw)
        self._agree(draw)

    def _agree(self, draw: Draw) -> None:
        """Rank 0's missing and rejected groups on every rank; raises rank 0's error on every rank."""
        if self._redraw is not None and self._judges(draw) and self._is_root and draw.error is None:
            before = len(draw.rejected)
            try:
                self.counts.judged_groups += draw.judge(self._redraw.keeps)
            except Exception as e:
                draw.error = e
            self.counts.rejected_groups += len(draw.rejected) - before
        missing = sorted(draw.missing - set(draw.found) - set(draw.rejected))
        missing, rejected = share_outcome((missing, list(draw.rejected)), draw.error, self._process_groups.host)
        draw.missing = set(missing)
        draw.rejected = {i: draw.rejected.get(i) for i in rejected}

    def _replace_rejected(self, draw: Draw) -> None:
        """Draw further problems when the groups that there are and may still come are fewer than the step needs."""
        needed = draw.wanted - (len(draw.prompts) - len(draw.rejected))
        if self._redraw is None or needed <= 0 or draw.exhausted:
            return
        needed = min(needed, self._redraw.limit - draw.redrawn)
        prompts = self._next_prompts(needed, draw.step, draw.prompts)
        draw.exhausted = len(prompts) < needed
        if prompts:
            draw.add(prompts)
            self._submit(prompts, draw)

    def _count_lacking(self, draw: Draw) -> None:
        """Count the groups that the step lacks, after all that was done to have them."""
        dropped = min(draw.lacking, len(draw.missing))
        short = draw.lacking - dropped
        self.counts.dropped_groups += dropped
        self.counts.short_groups += short
        if short and self._is_root:
            tell = log.warning if self.counts.short_groups == short else log.info  # the first time aloud
            tell(draw.shortage(short))

    def _stop_tail(self, draw: Draw) -> None:
        """Discard or carry over the over-sampled groups that the step does not need."""
        unfinished = [draw.prompts[i] for i in sorted(draw.missing)] if self._engine.pending else []
        spare: list[int] = []
        if self._plan.oversampling > 1:
            spare = broadcast_object(draw.spare() if self._is_root else None, 0, self._process_groups.host)
        prompts, groups = [draw.prompts[i] for i in spare], [draw.found[i] for i in spare if self._is_root]
        if self._plan.carry:
            if unfinished:
                self._engine.suspend()
            self._carried, self._spare, self._spare_groups = unfinished, prompts, groups
            self.counts.carried_groups += len(unfinished) + len(spare)
        else:
            if unfinished:
                self._engine.abort()
            self.counts.cut_groups += len(unfinished) + len(spare)

    def _end_step(self, step: int) -> None:
        """Note what the step leaves over; the bank forgets the rest."""
        names = [prompt.problem.prompt_id for prompt in (*self._spare, *self._carried)]
        self._drawn_for = {name: self._drawn_for[name] for name in names}
        self._order.end_step(names)
        self._left_over = [(drawn, name) for name, drawn in self._drawn_for.items()]
        if self._bank is not None:
            self._bank.end_step(step, set(self._left_over))
            for name in RESTORED:
                setattr(self.counts, name, getattr(self._bank, name))

    def _settle(self) -> None:
        """Finish the step in flight and abort carried groups, so that only the evaluation is in the engine. They
        continue with what the bank has of them."""
        if self._draw is not None:
            self._collect(self._draw, all_of_it=True)
        if self._carried:
            self._engine.abort()
            if self._bank is None:
                self.counts.cut_groups += len(self._carried)
            self._restart, self._carried = [*self._restart, *self._carried], []

    def _take(self, groups: Iterable[Group], draw: Draw) -> None:
        """Reward the complete groups among `groups` into `draw.found`."""
        complete: list[Group] = []
        for group in groups:
            aborted = sum(r.finish_reason is FinishReason.ABORT for r in group.rollouts)
            self.counts.aborted_rollouts += aborted
            stale = not aborted and self._is_stale(group)
            self.counts.stale_groups += stale
            if not aborted and not stale:
                complete.append(group)
        verifier = draw.verifier or self._verifier
        if verifier is None:
            raise ValueError("global rank 0 has no verifier")
        started = time.perf_counter()
        responses = [Response(g.problem, r.text, r.truncated) for g in complete for r in g.rollouts]
        rewards = iter(verifier.score(responses)) if responses else iter(())
        for group in complete:
            scores = tuple(float(next(rewards)) for _ in group.rollouts)
            if not all(math.isfinite(score) for score in scores):
                raise UserError(
                    f"the rewards of problem {group.problem.prompt_id} are not all finite ({scores}); a reward "
                    "function returns a finite number for every response"
                )
            rewarded = dataclasses.replace(group, rewards=scores)
            place = draw.place(group)
            draw.found[place] = rewarded
            if draw.step > 0:
                self._on_group(rewarded, draw.step)
            elif draw.on_group is not None:
                draw.on_group(place, rewarded)
        self.timings.reward += time.perf_counter() - started

    def _is_stale(self, group: Group, updates: int = 0) -> bool:
        """Whether the group will be too stale to train on after `updates` further weight updates."""
        if self._plan.max_staleness is None:
            return False
        oldest = min(rollout.weight_version for rollout in group.rollouts)
        return oldest < self._weights.version + updates - self._plan.max_staleness
