"""The rollout engine on SGLang servers.

Global rank 0 talks to the servers (`backend`), every other rank follows what it says. The ranks meet on the host group,
some seconds apart at most, so that nobody waits in a collective for as long as a generation takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.distributed.objects import share_outcome
from asd_megatron.errors import UserError
from asd_megatron.records import Group, Prompt, SamplingParams
from asd_megatron.rollout.engine import RolloutError, WeightSource, check_lengths
from asd_megatron.rollout.sglang.controller import Backend

T = TypeVar("T")
TICK_SECONDS = 2.0  # the ranks hear of each other this often while they wait
SEND_ATTEMPTS = 3  # full transmissions before an update is given up

Probe = Callable[[], list[float]]


@dataclass(frozen=True)
class _News:
    """What rank 0 tells the others after a tick: a number of delivered groups, or what to do together."""

    delivered: int = 0
    send: bool = False  # a server came back: give it the weights
    problem: str | None = None


class SGLangEngine:
    """`RolloutEngine` over one or many SGLang servers.

    Args:
        groups: the trainer's ranks. backend: the servers, on global rank 0 alone; None elsewhere.
        probe: the trainer's log-probs of the sequence that servers are asked about after an update (collective). None:
            they are not asked.
        max_positions: of the model. end_ids: its end tokens, at which SGLang stops whatever it is told.
    """

    def __init__(
        self,
        process_groups: ProcessGroups,
        backend: Backend | None,
        *,
        probe: Probe | None,
        max_positions: int,
        end_ids: Sequence[int],
    ) -> None:
        self._process_groups = process_groups
        self._backend = backend
        self._probe = probe
        self._max_positions = max_positions
        self._end_ids = frozenset(end_ids)
        self._weights: WeightSource | None = None
        self._version = 0
        self._pending = 0

    def start(self) -> None:
        """Start or find the servers; returns when they can be used. Before anything else. Raises RolloutError."""
        self._on_root(lambda backend: backend.start())

    @property
    def weight_version(self) -> int:
        return self._version

    @property
    def pending(self) -> int:
        return self._pending

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> None:
        check_lengths(prompts, params, self._max_positions)
        self._check_ends(params)
        self._on_root(lambda backend: backend.submit(prompts, params, step))
        self._pending += len(prompts)

    def collect(self, timeout: float) -> list[Group]:
        if not self._pending:
            return []
        assert self._weights is not None, "load_weights comes before collect"
        deadline = time.monotonic() + timeout
        while True:
            groups, news = self._tick(deadline, timeout, moved=self._weights.version != self._version)
            if news.problem is not None:
                self._pending = 0
                raise RolloutError(news.problem)
            if news.send and self._transmit(self._weights):
                self._version = self._weights.version
            if news.delivered:
                self._pending -= news.delivered
                return groups

    def abort(self) -> None:
        self._on_root(lambda backend: backend.abort())
        self._pending = 0

    def suspend(self) -> None:
        self._on_root(lambda backend: backend.suspend())

    def release(self) -> None:
        self._on_root(lambda backend: backend.release())

    def resume(self) -> None:
        self._on_root(lambda backend: backend.resume())

    def load_weights(self, weights: WeightSource) -> None:
        if weights.version < self._version:
            raise ValueError(f"weight version {weights.version} after {self._version}: versions never decrease")
        self._weights = weights
        for _ in range(SEND_ATTEMPTS):
            if not self._on_root(lambda backend: backend.needs(weights.version)) or self._transmit(weights):
                self._version = weights.version
                return
        raise RolloutError(
            f"the weights of version {weights.version} reached no server in {SEND_ATTEMPTS} attempts: "
            f"{self._on_root(lambda backend: backend.complaints())}"
        )

    def metrics(self) -> dict[str, float]:
        return {} if self._backend is None else self._backend.metrics()

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()

    # ---------------------------------------------------------------- together

    def _transmit(self, weights: WeightSource) -> bool:
        """Give the weights to every reachable server that lacks them; whether one has got them. Collective: every rank
        reads the source to its end."""
        expected = None if self._probe is None else self._probe()
        tensors = iter(weights)
        sent = False
        error: Exception | None = None
        if self._backend is not None:
            try:
                sent = self._backend.send(tensors, weights.version, expected)
            except Exception as e:  # the others must hear of it
                error = e
        for _ in tensors:
            pass
        return self._agree(sent, error)

    def _tick(self, deadline: float, timeout: float, *, moved: bool) -> tuple[list[Group], _News]:
        """Wait for whole groups on rank 0, a tick at most, and tell everybody."""
        groups: list[Group] = []
        news = _News()
        error: Exception | None = None
        if self._backend is not None:
            try:
                groups = self._backend.collect(TICK_SECONDS)
                news = self._look(self._backend, groups, moved, None if time.monotonic() < deadline else timeout)
            except Exception as e:
                error = e
            if error is not None or news.problem is not None:
                self._backend.abort()
        try:
            return groups, self._agree(news, error)
        except Exception:
            self._pending = 0
            raise

    def _look(self, backend: Backend, groups: Sequence[Group], moved: bool, late: float | None) -> _News:
        """What has come, and what there is to do. `late`: the seconds within which something should have come."""
        assert self._weights is not None
        problem = None if groups else backend.problem()
        if problem is None and not groups and late is not None:
            problem = (
                f"no group was finished within {late:.0f} s: raise the limit, or lower sampling.max_response_tokens"
            )
        return _News(len(groups), send=backend.returned(self._weights.version, moved=moved), problem=problem)

    def _on_root(self, action: Callable[[Backend], T]) -> T:
        """Rank 0's result, or its error, on every rank."""
        result: Any = None
        error: Exception | None = None
        if self._backend is not None:
            try:
                result = action(self._backend)
            except Exception as e:
                error = e
        return self._agree(result, error)

    def _agree(self, result: T, error: Exception | None) -> T:
        """Rank 0's result on every rank. Its UserError is a RolloutError on all of them, so that all of them can do the
        same about it; another error, a bug, ends the run."""
        try:
            return share_outcome(result, error, self._process_groups.host)
        except UserError as refusal:
            raise RolloutError(str(refusal)) from error

    def _check_ends(self, params: SamplingParams) -> None:
        unheard = self._end_ids - set(params.stop_token_ids)
        if params.stop_token_ids and unheard:
            raise UserError(
                f"sampling.stop_token_ids {list(params.stop_token_ids)} leaves out the model's end tokens "
                f"{sorted(unheard)}, at which SGLang stops whatever it is told: add them, or use the embedded engine"
            )
