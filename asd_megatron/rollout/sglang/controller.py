"""The part of the SGLang engine on global rank 0: requests to servers, groups from answers, weights to servers."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from asd_megatron.distributed import activity
from asd_megatron.errors import UserError
from asd_megatron.records import Group, Prompt, SamplingParams
from asd_megatron.rollout.engine import RolloutError
from asd_megatron.rollout.sglang.client.api import ServerError, ServerRefused
from asd_megatron.rollout.sglang.client.fleet import ABORT_PATIENCE, Fleet, ServerView
from asd_megatron.rollout.sglang.client.routing import SERVER_ARGUMENT, Routing
from asd_megatron.rollout.sglang.grouping import Assembler, Labels
from asd_megatron.rollout.sglang.memory import ColocatedMemory, ServerReceiver
from asd_megatron.rollout.sglang.metrics import ServerMetrics
from asd_megatron.rollout.sglang.servers.models import SERVED_AS
from asd_megatron.rollout.sglang.servers.plugin.asd_weight_delta import FORMAT, MARK
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.weight_sync.delta import DeltaTransport
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors, Transport, VerificationError
from asd_megatron.rollout.sglang.weight_sync.quantize import quantized
from asd_megatron.rollout.sglang.weight_sync.synchronise import synchronise
from asd_megatron.rollout.sglang.weight_sync.transfer import Transfer
from asd_megatron.rollout.sglang.weight_sync.verification import Probe, WeightVerifier

log = logging.getLogger(__name__)

ANSWER_SECONDS = 120.0  # for the one-token requests that check the vocabulary
LOOK_SECONDS = 0.2  # between looks at servers that cannot be reached yet
BAD_REQUEST = 400
RETURNS_ROUTED_EXPERTS = SERVER_ARGUMENT.replace("-", "_")  # in /server_info


@dataclass(frozen=True)
class ServedModel:
    """The model that every server has to serve; `routing`: and that it has to return the routed experts of."""

    architectures: tuple[str, ...]
    vocab_size: int
    routing: Routing | None = None


class Controller:
    """Generates groups on the servers of `fleet` and keeps their weights current through `transport`.

    model: what the servers have to serve. pool: the servers that are started here, None when they run already.
    verifier: compares what arrived with what was sent (None: nothing is compared). probe_ids, tolerance: the probe's
    token ids, and the largest mean absolute difference of its log-probs in nats. quantize: the servers are sent
    block-wise FP8.
    start_timeout: seconds within which all servers must work at first; wait_timeout: seconds without any usable server
    after which generation or an update gives up. colocated: the servers share the trainer's devices. closing: what ends
    with the engine (the fleet, the transport, the pool).

    The first update must reach every server: one that cannot be sent to is misconfigured. A later one needs one server;
    the others are sent to again before they serve.
    """

    def __init__(
        self,
        fleet: Fleet,
        transport: Transport,
        assembler: Assembler,
        labels: Labels,
        *,
        model: ServedModel,
        pool: ServerPool | None,
        verifier: WeightVerifier | None,
        tolerance: float,
        probe_ids: tuple[int, ...],
        quantize: bool,
        start_timeout: float,
        wait_timeout: float,
        colocated: bool,
        closing: ExitStack,
    ) -> None:
        self._fleet, self._transport, self._assembler, self._labels = fleet, transport, assembler, labels
        fleet.listen(assembler.arrived)
        self._delta = transport.deltas if isinstance(transport, DeltaTransport) else None
        self._model = model
        self._pool = pool
        self._verifier, self._tolerance, self._probe_ids = verifier, tolerance, probe_ids
        self._quantize = quantize
        self._start_timeout = start_timeout
        self._wait_timeout = wait_timeout
        self._memory: ColocatedMemory | None = None
        if colocated:
            assert pool is not None, "colocated servers are started by the run"
            self._memory = ColocatedMemory(fleet, pool, start_timeout)
        self._closing = closing
        self._synchronised = False  # whether the first update has reached every server
        self._silent: dict[str, float] = {}  # URL -> when it did not answer in an update
        self._serving = 0  # servers that served when memory was last offloaded
        self._metrics = ServerMetrics()

    def start(self) -> None:
        """Start the servers, or connect to running ones; returns when all are ready. Raises UserError when one is not
        ready in time or serves another model."""
        if self._pool is not None:
            self._pool.start()
        self._fleet.connect(self._start_timeout)
        for view in self._fleet.servers():
            try:
                self._check_model(view.url)
            except ServerError as error:
                raise UserError(f"{error}: look at its log and start it again") from error

    def _check_model(self, url: str) -> None:
        served = tuple(self._fleet.model_info(url).get("architectures") or ())
        expected = {SERVED_AS.get(name, name) for name in self._model.architectures}
        if expected and served and expected.isdisjoint(served):
            raise UserError(
                f"{url} serves a {', '.join(served)} and the trainer trains a {', '.join(self._model.architectures)}:"
                " start the server with the trainer's model"
            )
        last = self._model.vocab_size - 1
        if not self._takes(url, last) or self._takes(url, last + 1):
            raise UserError(
                f"{url} serves a model with another vocabulary than the trainer's {last + 1} tokens: start the server"
                " with the trainer's model"
            )
        if self._model.routing is not None and not self._fleet.server_info(url).get(RETURNS_ROUTED_EXPERTS):
            raise UserError(
                f"{url} does not return routed experts, which rollout.routing_replay engine needs: start it with"
                f" --{SERVER_ARGUMENT}, or set rollout.routing_replay none"
            )
        if self._delta is not None and not self._takes_deltas(url):
            raise UserError(
                f"{url} does not take deltas of the weights, which rollout.weight_sync_full_every above 1 sends: start"
                " it with `asd-megatron serve`, or set rollout.weight_sync_full_every 1"
            )

    def _takes_deltas(self, url: str) -> bool:
        states = self._fleet.server_info(url).get("internal_states") or []
        return bool(states) and all(state.get(MARK) == FORMAT for state in states)

    def _takes(self, url: str, token: int) -> bool:
        """Whether the token id is in a server's vocabulary. The request asks for its log-prob: as an input, an unknown
        id would reach the model's embedding unchecked."""
        body = {
            "input_ids": [0],
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "token_ids_logprob": [token],
        }
        try:
            self._fleet.call(url, "/generate", body, ANSWER_SECONDS)
        except ServerRefused as error:
            if error.status != BAD_REQUEST:
                raise
            return False
        return True

    # ---------------------------------------------------------------- responses

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> None:
        self._fleet.submit(self._assembler.add(prompts, params, step))

    def collect(self, seconds: float) -> list[Group]:
        """The finished groups, as soon as there is one; [] after `seconds`."""
        deadline = time.monotonic() + seconds
        activity.mark()  # of the ranks' watch: the caller bounds this wait (rollout.collect_timeout)
        groups = self._assembler.take(())
        while not groups and self._fleet.pending and (left := deadline - time.monotonic()) > 0:
            groups = self._assembler.take(self._fleet.wait(left))
        return groups

    def failure(self) -> str | None:
        """Why generation has to be given up, or None."""
        since = self._fleet.no_healthy_server_since
        if since is None or time.monotonic() - since < self._wait_timeout:
            return None
        return (
            f"no server has been usable for {self._wait_timeout:.0f} s (rollout.server_wait_timeout): "
            f"{self.unhealthy_reasons()}. Start servers again and resume the run"
        )

    def abort(self) -> None:
        self._fleet.abort(keep_partial=False)
        self._assembler.clear()

    def suspend(self, patience: float = ABORT_PATIENCE) -> None:
        """Abort with what the servers have of the responses within `patience` seconds."""
        self._assembler.suspend(self._fleet.abort(keep_partial=True, patience=patience))

    # ---------------------------------------------------------------- weights

    def needs(self, version: int) -> bool:
        """Whether a usable server lacks this version. Waits until one is usable; at the first update, until all are.

        Raises RolloutError that names each server's reason after `wait_timeout` seconds.
        """
        deadline = time.monotonic() + self._wait_timeout
        while not self._ready():
            if time.monotonic() > deadline:
                which = "no server" if self._synchronised else "not every server"
                raise RolloutError(
                    f"{which} could be reached for {self._wait_timeout:.0f} s (rollout.server_wait_timeout): "
                    f"{self.unhealthy_reasons()}. Start servers again and resume the run"
                )
            activity.mark()
            time.sleep(LOOK_SECONDS)
        return bool(self._lacking(version))

    def returned(self, version: int, *, moved: bool) -> bool:
        """Whether a server is healthy again and should be sent the weights now.

        moved: the trainer's weights have changed since the last update. The server would then serve another version
        than the others, so it is sent them only when no other server serves.
        """
        return bool(self._lacking(version)) and (not moved or self._fleet.no_healthy_server_since is not None)

    def send(self, weights: NamedTensors | Transfer, version: int, probe: Sequence[float] | None) -> bool:
        """Send the weights to every usable server that lacks them. Whether enough servers have them now: all at the
        first update, one at a later one. A stream of tensors is read to its end. Raises VerificationError when
        something else arrived than was sent."""
        label = self._labels.label(version)
        receivers = self._lacking(version)
        if self._verifier is not None:
            self._verifier.probe = None if probe is None else Probe(self._probe_ids, tuple(probe), self._tolerance)
        with self._fleet.updating(label):
            if self._delta is not None:
                self._delta.expect({receiver.url: self._base(receiver.url) for receiver in receivers})
            try:
                report = synchronise(
                    self._transport,
                    receivers,
                    quantized(weights) if self._quantize and not isinstance(weights, Transfer) else weights,
                    label,
                    verifier=self._verifier,
                    before_generating=None if self._memory is None else self._memory.resume_caches,
                )
            except VerificationError as error:
                if self._delta is None or self._delta.full:
                    raise
                return self._delta_failed(receivers, error)
            for receiver in receivers:
                if (why := report.failures.get(receiver.url)) is None:
                    self._fleet.admit(receiver.url, label)
                else:
                    log.warning("weights %s did not reach %s: %s", label, receiver.url, why)
                    self._fleet.withdraw(receiver.url, why)
        self._silent |= dict.fromkeys(report.failures.keys() - set(report.alive), time.monotonic())
        if self._delta is None:
            self._metrics.add(report)
        else:
            self._metrics.add(replace(report, bytes=self._delta.sent_bytes), changed=self._delta.changed)
        have = [view for view in self._fleet.servers() if view.label == label]
        enough = bool(have) if self._synchronised else len(have) == len(self._fleet.servers())
        self._synchronised |= enough
        return enough

    def _base(self, url: str) -> str:
        """The label of the weights to which the server at `url` can apply a delta; "" if it cannot."""
        try:
            return str(self._fleet.model_info(url).get("weight_version", "")) if self._takes_deltas(url) else ""
        except ServerError:
            return ""

    def _delta_failed(self, receivers: Sequence[ServerReceiver], error: VerificationError) -> bool:
        """Servers do not have the weights that a delta should have given them: they are sent all weights next."""
        assert self._delta is not None
        log.warning("after a delta of the weights: %s; all weights are sent again", error)
        self._delta.forget()
        for receiver in receivers:
            self._fleet.withdraw(receiver.url, str(error))
        return False

    def not_sent(self, version: int, attempts: int) -> str:
        """The message for an update that failed in `attempts` attempts."""
        which = "any server" if self._synchronised else "every server, as the first update must,"
        served = " (they have to serve a block-wise FP8 model: rollout.quantization fp8)" if self._quantize else ""
        return (
            f"the weights of version {version} did not reach {which} in {attempts} attempts: "
            f"{self.unhealthy_reasons()}. Correct or remove these servers{served}, or set another rollout.weight_sync,"
            " and resume the run"
        )

    def _lacking(self, version: int) -> list[ServerReceiver]:
        label = self._labels.label(version)
        return [ServerReceiver.of(self._fleet, view) for view in self._usable() if view.label != label]

    def _ready(self) -> bool:
        usable = self._usable()
        return bool(usable) and (self._synchronised or len(usable) == len(self._fleet.servers()))

    def _usable(self) -> list[ServerView]:
        """Healthy servers, except those that did not answer in an update and have not answered a probe since."""
        return [v for v in self._fleet.servers() if v.healthy and v.probed >= self._silent.get(v.url, 0.0)]

    def unhealthy_reasons(self) -> str:
        """The servers that do not serve, each with its reason, for messages."""
        idle = [view for view in self._fleet.servers() if view.label is None]
        return "; ".join(f"{view.url}: {view.reason or 'not reachable'}" for view in idle) or "every server serves"

    # ---------------------------------------------------------------- memory

    def release(self) -> None:
        if self._memory is not None and not self._memory.offloaded:
            self._serving = self._count_serving()
            self._memory.offload()

    def resume(self) -> None:
        if self._memory is not None:
            self._memory.resume_weights()

    # ---------------------------------------------------------------- metrics and end

    def _count_serving(self) -> int:
        return sum(view.label is not None for view in self._fleet.servers())

    def metrics(self) -> dict[str, float]:
        offloaded = self._memory is not None and self._memory.offloaded
        return self._metrics.take(
            self._fleet.counters,
            serving=self._serving if offloaded else self._count_serving(),
            restarts=0 if self._pool is None else self._pool.counters["restarts"],
            unrouted=self._assembler.unrouted,
        )

    def close(self) -> None:
        self._closing.close()
