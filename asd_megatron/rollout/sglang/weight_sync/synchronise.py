"""One synchronisation: every server gets the weights, proves it, and generates on; or it is named and stays paused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from asd_megatron.rollout.sglang.client.api import INCOMPLETE
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors, Receiver, Transport, ask, ask_all, drain
from asd_megatron.rollout.sglang.weight_sync.verification import Receipt

ANSWER_SECONDS = 60.0  # for requests that move no weights
ALIVE_SECONDS = 10.0


@dataclass(frozen=True)
class SyncReport:
    """What a synchronisation did.

    failures: URL -> reason, of the servers that are not whole: paused, labelled incomplete, to be sent everything
    again. alive: those among them that answer. bytes, tensors: of the model, once. seconds: from the first pause to the
    last server's generating on. checked: checksums compared. probe: largest difference to the trainer's log-probs.
    """

    failures: dict[str, str]
    alive: tuple[str, ...]
    bytes: int
    tensors: int
    seconds: float
    checked: int
    probe: float | None


@dataclass
class _Amount:
    """What has streamed by."""

    bytes: int = 0
    tensors: int = 0

    def count(self, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self.bytes += tensor.numel() * tensor.element_size()
            self.tensors += 1
            yield name, tensor


@dataclass
class _Course:
    """Which servers are still whole, and why the others are not."""

    whole: list[Receiver]
    failures: dict[str, str] = field(default_factory=dict)

    def drop(self, failures: dict[str, str]) -> None:
        self.failures |= failures
        self.whole = [receiver for receiver in self.whole if receiver.url not in self.failures]


def synchronise(
    transport: Transport,
    receivers: Sequence[Receiver],
    tensors: NamedTensors,
    label: str,
    *,
    receipt: Receipt | None = None,
    before_generating: Callable[[Receiver], None] | None = None,
    timeout: float = ANSWER_SECONDS,
    progress: Callable[[str], None] | None = None,
) -> SyncReport:
    """Give `receivers` the weights `tensors` under the name `label`. Global rank 0.

    A server is paused (its running requests wait and go on under the new weights), labelled `LABEL-incomplete`, sent
    the tensors, and checked against `receipt`; only then is it labelled `label` and generates on. One that fails on the
    way stays paused and incomplete and is named in the report: it never answers under a good label, and takes
    everything anew the next time. `tensors` is read to its end in any case but one: what reading it raises.

    before_generating: called for each server that has the weights, before it generates on, in parallel (memory to be
    taken back); what it raises is that server's failure.

    Raises ReceiptError if a server holds other weights than it was sent or computes other log-probs, UserError for
    tensors that `receipt` has no rule for. `timeout`: seconds for each request that moves no weights.
    """
    tell = progress or (lambda _: None)
    start, amount, course, checked = time.monotonic(), _Amount(), _Course(list(receivers)), 0
    course.drop(ask_all(course.whole, lambda r: _open(r, label, transport.needs_session, timeout))[1])
    tell(f"weights {label}: sending to {len(course.whole)} of {len(receivers)} servers")
    stream = amount.count(tensors)
    watched = receipt.watch(stream, course.whole) if receipt is not None else stream
    try:
        course.drop(transport.send(course.whole, watched, label))
    finally:
        drain(stream)
    if transport.needs_session:
        course.drop(ask_all(course.whole, lambda r: ask(r, "/end_weight_update", {}, timeout))[1])
    if receipt is not None:
        checksums, failures = ask_all(course.whole, lambda r: receipt.check(r, max(timeout, ANSWER_SECONDS)))
        checked = sum(checksums.values())
        course.drop(failures)
    if before_generating is not None:
        course.drop(ask_all(course.whole, before_generating)[1])
    course.drop(ask_all(course.whole, lambda r: _release(r, label, timeout))[1])
    worst: float | None = None
    if receipt is not None and receipt.probe is not None:
        differences, failures = ask_all(course.whole, lambda r: receipt.check_probe(r, timeout))
        worst = max((d for d in differences.values() if d is not None), default=None)
        course.drop(failures)
    seconds = time.monotonic() - start
    alive = _alive([receiver for receiver in receivers if receiver.url in course.failures], label)
    tell(f"weights {label}: {len(course.whole)} of {len(receivers)} servers have them, after {seconds:.2f} s")
    return SyncReport(course.failures, alive, amount.bytes, amount.tensors, seconds, checked, worst)


def _open(receiver: Receiver, label: str, needs_session: bool, timeout: float) -> None:
    """Pause, take the good label away, and open a session, instead of one that an interrupted update left open."""
    _pause(receiver, label, timeout)
    if not needs_session:
        return
    try:
        ask(receiver, "/begin_weight_update", {}, timeout)
    except Exception:  # of whatever kind: the same request once more tells
        ask(receiver, "/end_weight_update", {}, timeout)
        ask(receiver, "/begin_weight_update", {}, timeout)


def _pause(receiver: Receiver, label: str, timeout: float) -> None:
    ask(receiver, "/pause_generation", {"mode": "retract"}, timeout)
    _relabel(receiver, label + INCOMPLETE, timeout)


def _relabel(receiver: Receiver, label: str, timeout: float) -> None:
    ask(receiver, "/update_weight_version", {"new_version": label, "abort_all_requests": False}, timeout)


def _release(receiver: Receiver, label: str, timeout: float) -> None:
    _relabel(receiver, label, timeout)
    ask(receiver, "/continue_generation", {}, timeout)


def _alive(receivers: Sequence[Receiver], label: str) -> tuple[str, ...]:
    """Which of the servers that failed can be sent to again. Also makes sure that they are paused and incomplete."""
    answers, _ = ask_all(receivers, lambda r: _pause(r, label, ALIVE_SECONDS))
    return tuple(answers)
