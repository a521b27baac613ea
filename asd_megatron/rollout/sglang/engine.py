"""The rollout engine on SGLang servers.

Global rank 0 talks to the servers (`controller`), the other ranks follow it. The ranks meet on the host group, a few
seconds apart at most, so that no rank waits in a collective for as long as a generation takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.distributed.objects import share_outcome
from asd_megatron.errors import UserError
from asd_megatron.records import Group, Prompt, SamplingParams
from asd_megatron.rollout.engine import RolloutError, WeightSource, check_lengths
from asd_megatron.rollout.sglang.controller import Controller
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors
from asd_megatron.rollout.sglang.weight_sync.transfer import Sending, Transfer

T = TypeVar("T")
TICK_SECONDS = 2.0  # between two meetings of the ranks while they wait
STOP_PATIENCE = 5.0  # for the tokens so far of responses when the run stops: its state is saved after that
SEND_ATTEMPTS = 3  # full transmissions before an update is given up

ProbeScorer = Callable[[], list[float]]
"""Scores the probe with the trainer's weights: log-probs in nats. Collective."""


@dataclass(frozen=True)
class _Tick:
    """What rank 0 broadcasts after a tick: the number of delivered groups, or what all ranks do next."""

    delivered: int = 0
    send: bool = False  # a server came back: send it the weights
    failure: str | None = None  # why generation is given up


class SGLangEngine:
    """`RolloutEngine` over one or many SGLang servers.

    Args:
        process_groups: the trainer's ranks. controller: the servers, on global rank 0 alone; None elsewhere.
        sending: how all ranks send their weights, on every rank; None: global rank 0 sends all of them.
        probe: scores the sequence whose log-probs are compared with the servers' after an update (collective). None:
            they are not compared.
        meeting: called on every rank whenever they meet in `collect`. What it raises, the same on all ranks, gives up
            everything pending (a rollout bank gets the tokens so far), and colocated servers release their memory.
        max_positions: of the model. end_ids: its end tokens, at which SGLang always ends a response.
    """

    def __init__(
        self,
        process_groups: ProcessGroups,
        controller: Controller | None,
        *,
        sending: Sending | None = None,
        probe: ProbeScorer | None,
        max_positions: int,
        end_ids: Sequence[int],
        meeting: Callable[[], None] = lambda: None,
    ) -> None:
        self._process_groups = process_groups
        self._controller = controller
        self._sending = sending
        self._probe = probe
        self._max_positions = max_positions
        self._end_ids = frozenset(end_ids)
        self._meeting = meeting
        self._weights: WeightSource | None = None
        self._version = 0
        self._pending = 0

    def start(self) -> None:
        """Start the servers or connect to running ones; returns when they are ready. Call it before any other method.
        Raises RolloutError."""
        self._on_root(lambda controller: controller.start())

    @property
    def weight_version(self) -> int:
        return self._version

    @property
    def pending(self) -> int:
        return self._pending

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> None:
        check_lengths(prompts, params, self._max_positions)
        self._check_ends(params)
        self._on_root(lambda controller: controller.submit(prompts, params, step))
        self._pending += len(prompts)

    def collect(self, timeout: float) -> list[Group]:
        if not self._pending:
            return []
        assert self._weights is not None, "load_weights comes before collect"
        deadline = time.monotonic() + timeout
        while True:
            groups, tick = self._tick(self._weights, deadline, timeout)
            if tick.failure is not None:
                self._pending = 0
                raise RolloutError(tick.failure)
            self._meet()
            if tick.send and self._transmit(self._weights):
                self._version = self._weights.version
            if tick.delivered:
                self._pending -= tick.delivered
                return groups

    def abort(self) -> None:
        self._on_root(lambda controller: controller.abort())
        self._pending = 0

    def suspend(self) -> None:
        self._on_root(lambda controller: controller.suspend())

    def release(self) -> None:
        self._on_root(lambda controller: controller.release())

    def resume(self) -> None:
        self._on_root(lambda controller: controller.resume())

    def load_weights(self, weights: WeightSource) -> None:
        version = weights.version
        if version < self._version:
            raise ValueError(f"weight version {version} after {self._version}: versions never decrease")
        self._weights = weights
        for _ in range(SEND_ATTEMPTS):
            if not self._on_root(lambda controller: controller.needs(version)) or self._transmit(weights):
                self._version = version
                return
        raise RolloutError(self._on_root(lambda controller: controller.not_sent(version, SEND_ATTEMPTS)))

    def metrics(self) -> dict[str, float]:
        return {} if self._controller is None else self._controller.metrics()

    def close(self) -> None:
        if self._controller is not None:
            self._controller.close()
        if self._sending is not None:
            self._sending.transport.close()

    # ---------------------------------------------------------------- collective steps

    def _transmit(self, weights: WeightSource) -> bool:
        """Send the weights to every usable server that lacks them; whether enough servers have them now. Collective:
        every rank reads the source to its end."""
        expected = None if self._probe is None else self._probe()
        if self._sending is not None:
            return self._transfer(self._sending.transfer(weights), weights.version, expected)
        tensors = iter(weights)
        sent, error = self._send(tensors, weights.version, expected)
        for _ in tensors:
            pass
        return self._share(sent, error)

    def _transfer(self, transfer: Transfer, version: int, expected: list[float] | None) -> bool:
        sent, error = self._send(transfer, version, expected)
        if self._controller is None:
            transfer.take_part()
        else:
            transfer.cancel()
        return self._share(sent, error)

    def _send(
        self, weights: NamedTensors | Transfer, version: int, expected: list[float] | None
    ) -> tuple[bool, Exception | None]:
        """Whether global rank 0 has sent the weights to enough servers, or its error, which the other ranks must hear
        of; nothing elsewhere."""
        if self._controller is None:
            return False, None
        try:
            return self._controller.send(weights, version, expected), None
        except Exception as error:
            return False, error

    def _tick(self, weights: WeightSource, deadline: float, timeout: float) -> tuple[list[Group], _Tick]:
        """Wait for complete groups on rank 0, TICK_SECONDS at most, and tell every rank what to do next. `timeout`: the
        seconds that end at `deadline`."""
        groups: list[Group] = []
        tick = _Tick()
        error: Exception | None = None
        if self._controller is not None:
            try:
                groups = self._controller.collect(TICK_SECONDS)
                failure = None if groups else self._controller.failure() or _late(deadline, timeout)
                moved = weights.version != self._version
                tick = _Tick(len(groups), self._controller.returned(weights.version, moved=moved), failure)
            except Exception as e:
                error = e
            if error is not None or tick.failure is not None:
                self._controller.abort()
        try:
            return groups, self._share(tick, error)
        except Exception:
            self._pending = 0
            raise

    def _meet(self) -> None:
        try:
            self._meeting()
        except BaseException:
            with suppress(RolloutError):
                self._on_root(lambda controller: controller.suspend(STOP_PATIENCE))
            self.abort()
            self.release()
            raise

    def _on_root(self, action: Callable[[Controller], T]) -> T:
        """Rank 0's result, or its error, on every rank."""
        result: T | None = None
        error: Exception | None = None
        if self._controller is not None:
            try:
                result = action(self._controller)
            except Exception as e:
                error = e
        return self._share(result, error)

    def _share(self, result: T | None, error: Exception | None) -> T:
        """Rank 0's result on every rank. Its UserError is a RolloutError on all of them, so that all of them can do the
        same about it; another error, a bug, ends the run."""
        try:
            return share_outcome(result, error, self._process_groups.host)
        except UserError as refusal:
            raise RolloutError(str(refusal)) from error

    def _check_ends(self, params: SamplingParams) -> None:
        missing = self._end_ids - set(params.stop_token_ids)
        if params.stop_token_ids and missing:
            raise UserError(
                f"sampling.stop_token_ids {list(params.stop_token_ids)} leaves out the model's end tokens "
                f"{sorted(missing)}, at which SGLang always ends a response: add them, or use the embedded engine"
            )


def _late(deadline: float, timeout: float) -> str | None:
    """The message for a generation that has finished no group by `deadline`; None before."""
    if time.monotonic() < deadline:
        return None
    return (
        f"no group was finished within {timeout:.0f} s (rollout.collect_timeout): raise it, or lower"
        " sampling.max_response_tokens"
    )
