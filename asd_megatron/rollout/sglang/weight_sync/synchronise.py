"""One weight synchronisation: each server is paused, sent the weights, verified and resumed. One that fails stays
paused and is reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from asd_megatron.rollout.sglang.client.api import INCOMPLETE
from asd_megatron.rollout.sglang.weight_sync.protocol import (
    SLACK_SECONDS,
    NamedTensors,
    Receiver,
    Transport,
    ask,
    ask_all,
    drain,
)
from asd_megatron.rollout.sglang.weight_sync.transfer import Sent, Transfer
from asd_megatron.rollout.sglang.weight_sync.verification import ProbeDifference, WeightVerifier

ANSWER_SECONDS = 60.0  # for requests that move no weights
ALIVE_SECONDS = 10.0
HOOK_SECONDS = 600.0  # a bound on `before_generating`, whose requests have time limits of their own
REQUESTS_TO_OPEN = 5  # at most: pause, label, and begin, end, begin


@dataclass(frozen=True)
class SyncReport:
    """The result of a synchronisation.

    failures: URL -> reason, of the servers whose synchronisation failed: they are paused, labelled incomplete, and must
    be sent everything again. alive: those among them that answer. bytes, tensors: of the model, once. seconds: from the
    first pause until the last server resumes. checked: checksums compared. probes: by URL, how far a server's log-probs
    of the probe are from the trainer's.
    """

    failures: Mapping[str, str]
    alive: tuple[str, ...]
    bytes: int
    tensors: int
    seconds: float
    checked: int
    probes: Mapping[str, ProbeDifference]


@dataclass
class _Amount:
    """The tensors and bytes streamed so far."""

    bytes: int = 0
    tensors: int = 0

    def count(self, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self.bytes += tensor.numel() * tensor.element_size()
            self.tensors += 1
            yield name, tensor


@dataclass
class _Servers:
    """The servers without a failure so far, and why the others failed."""

    good: list[Receiver]
    failures: dict[str, str] = field(default_factory=dict)

    def drop(self, failures: dict[str, str]) -> None:
        self.failures |= failures
        self.good = [receiver for receiver in self.good if receiver.url not in self.failures]


def synchronise(
    transport: Transport,
    receivers: Sequence[Receiver],
    weights: NamedTensors | Transfer,
    label: str,
    *,
    verifier: WeightVerifier | None = None,
    before_generating: Callable[[Receiver], None] | None = None,
    timeout: float = ANSWER_SECONDS,
) -> SyncReport:
    """Send `receivers` the weights under the label `label`. Global rank 0.

    A server is paused (its running requests wait and continue under the new weights), labelled `LABEL-incomplete`, sent
    the tensors, and verified by `verifier`; only then is it labelled `label` and resumes. One that fails on the way
    stays paused and incomplete and is named in the report: it never answers under a valid label, and is sent everything
    again the next time. `weights`: the tensors, sent from this rank through `transport`, and read to their end unless
    reading them raises; or the transfer, through the same transport, in which other ranks take part.

    before_generating: called in parallel for each server that has the weights, before it resumes (to resume its KV
    cache); what it raises is that server's failure.

    Raises VerificationError if a server holds other weights than it was sent, or computed other log-probs twice in a
    row; UserError for tensors that `verifier` has no rule for. `timeout`: seconds for each request that moves no
    weights.
    """
    start, servers = time.monotonic(), _Servers(list(receivers))
    limit = timeout + SLACK_SECONDS
    servers.drop(
        ask_all(
            servers.good,
            lambda r: _open(r, label, transport.needs_session, timeout),
            REQUESTS_TO_OPEN * timeout + SLACK_SECONDS,
        )[1]
    )
    amount: _Amount | Sent
    if isinstance(weights, Transfer):
        servers.drop(weights.take_part(servers.good, label))
        amount = weights.sent
    else:
        amount = _Amount()
        stream = amount.count(weights)
        try:
            watched = verifier.watch(stream, servers.good) if verifier is not None else stream
            servers.drop(transport.send(servers.good, watched, label))
        finally:
            drain(stream)
    if transport.needs_session:
        servers.drop(ask_all(servers.good, lambda r: ask(r, "/end_weight_update", {}, timeout), limit)[1])
    checked = _check(servers, verifier, max(timeout, ANSWER_SECONDS))
    if before_generating is not None:
        servers.drop(ask_all(servers.good, before_generating, HOOK_SECONDS)[1])
    servers.drop(ask_all(servers.good, lambda r: _resume(r, label, timeout), 2 * timeout + SLACK_SECONDS)[1])
    probes = _check_probe(servers, verifier, label, timeout)
    seconds = time.monotonic() - start
    alive = _alive([receiver for receiver in receivers if receiver.url in servers.failures], label)
    return SyncReport(servers.failures, alive, amount.bytes, amount.tensors, seconds, checked, probes)


def _check(servers: _Servers, verifier: WeightVerifier | None, timeout: float) -> int:
    """Checksums of the servers that are good so far; how many were compared."""
    if verifier is None:
        return 0
    counts, failures = ask_all(servers.good, lambda r: verifier.check(r, timeout), timeout + SLACK_SECONDS)
    servers.drop(failures)
    return sum(counts.values())


def _check_probe(
    servers: _Servers, verifier: WeightVerifier | None, label: str, timeout: float
) -> dict[str, ProbeDifference]:
    """The probe's differences of the servers that have resumed, by URL; {} without a probe."""
    if verifier is None or verifier.probe is None:
        return {}
    found, failures = ask_all(servers.good, lambda r: verifier.check_probe(r, label, timeout), timeout + SLACK_SECONDS)
    servers.drop(failures)
    return {url: difference for url, difference in found.items() if difference is not None}


def _open(receiver: Receiver, label: str, needs_session: bool, timeout: float) -> None:
    """Pause, replace the valid label, and open a session; one that an interrupted update left open is ended first."""
    _pause(receiver, label, timeout)
    if not needs_session:
        return
    try:
        ask(receiver, "/begin_weight_update", {}, timeout)
    except Exception:  # of any kind: the second request shows whether an open session was the cause
        ask(receiver, "/end_weight_update", {}, timeout)
        ask(receiver, "/begin_weight_update", {}, timeout)


def _pause(receiver: Receiver, label: str, timeout: float) -> None:
    ask(receiver, "/pause_generation", {"mode": "retract"}, timeout)
    _relabel(receiver, label + INCOMPLETE, timeout)


def _relabel(receiver: Receiver, label: str, timeout: float) -> None:
    ask(receiver, "/update_weight_version", {"new_version": label, "abort_all_requests": False}, timeout)


def _resume(receiver: Receiver, label: str, timeout: float) -> None:
    _relabel(receiver, label, timeout)
    ask(receiver, "/continue_generation", {}, timeout)


def _alive(receivers: Sequence[Receiver], label: str) -> tuple[str, ...]:
    """The failed servers that still answer. Also makes sure that they are paused and labelled incomplete."""
    answers, _ = ask_all(receivers, lambda r: _pause(r, label, ALIVE_SECONDS), 2 * ALIVE_SECONDS + SLACK_SECONDS)
    return tuple(answers)
