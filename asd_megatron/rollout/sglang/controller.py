"""Global rank 0's half of the SGLang engine: requests to servers, groups from answers, weights to servers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.records import Group, Prompt, SamplingParams
from asd_megatron.rollout.engine import RolloutError
from asd_megatron.rollout.sglang.client.api import ServerError, ServerRefused
from asd_megatron.rollout.sglang.client.fleet import Fleet, ServerView
from asd_megatron.rollout.sglang.counters import Readings
from asd_megatron.rollout.sglang.grouping import Assembler, Labels
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.weight_sync.protocol import Receiver, Transport
from asd_megatron.rollout.sglang.weight_sync.synchronise import synchronise
from asd_megatron.rollout.sglang.weight_sync.verification import Probe, WeightVerifier

log = logging.getLogger(__name__)

ADMIN_SECONDS = 120.0  # for memory to be released or taken back
LOOK_SECONDS = 0.2  # between looks at servers that are not there yet
BAD_REQUEST = 400
LOADED_LATER = ("kv_cache", "cuda_graph")  # memory that a server takes back only after it has its weights


@dataclass(frozen=True)
class ServerReceiver:
    """A server as the weight transports see it."""

    fleet: Fleet
    url: str
    tensor_parallel: int

    def call(self, path: str, body: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        return self.fleet.call(self.url, path, body, timeout)


@dataclass(frozen=True)
class ServedModel:
    """What a server must serve to be this model's."""

    architectures: tuple[str, ...]
    vocab_size: int


class Backend:
    """Servers that are reached through `fleet` and given weights through `transport`.

    model: what the servers have to serve. pool: the servers that are started here, None when they run already.
    verifier: compares what arrived with what was sent, None: nothing is compared; tolerance: of the log-probs of
    `probe_ids`.
    start_timeout: seconds for the servers to be there at first; wait_timeout: seconds without any usable server after
    which generation or an update gives up. colocated: the servers share the trainer's devices. closing: what ends with
    the engine (the fleet, the transport, the pool).
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
        start_timeout: float,
        wait_timeout: float,
        colocated: bool,
        closing: ExitStack,
    ) -> None:
        self._fleet, self._transport, self._assembler, self._labels = fleet, transport, assembler, labels
        self._model = model
        self._pool = pool
        self._verifier, self._tolerance, self._probe_ids = verifier, tolerance, probe_ids
        self._start_timeout = start_timeout
        self._wait_timeout = wait_timeout
        self._colocated = colocated
        self._closing = closing
        self._asleep: dict[str, Any] = {}  # servers whose memory is away, and since when each has been running
        self._awake = ExitStack()  # holds the fleet still while the servers' memory is away
        self._silent: set[str] = set()
        self._readings = Readings()

    def start(self) -> None:
        """Start the servers, or find them; returns when they are ready. Raises UserError when they do not become so,
        or serve another model."""
        if self._pool is not None:
            self._pool.start()
        self._fleet.connect(self._start_timeout)
        for view in self._fleet.servers():
            if view.healthy:
                self._check_model(view.url)

    def _check_model(self, url: str) -> None:
        served = tuple(self._fleet.model_info(url).get("architectures") or ())
        if self._model.architectures and served and set(served).isdisjoint(self._model.architectures):
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

    def _takes(self, url: str, token: int) -> bool:
        """Whether a server knows the token id. It is asked for its log-prob: as an input, an unknown one would go into
        the model."""
        body = {
            "input_ids": [0],
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "token_ids_logprob": [token],
        }
        try:
            self._fleet.call(url, "/generate", body, ADMIN_SECONDS)
        except ServerRefused as error:
            if error.status != BAD_REQUEST:
                raise
            return False
        return True

    # ---------------------------------------------------------------- responses

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> None:
        self._fleet.submit(self._assembler.add(prompts, params, step))

    def collect(self, seconds: float) -> list[Group]:
        """The groups that are finished within `seconds`, as soon as there is one."""
        deadline = time.monotonic() + seconds
        groups = self._assembler.take(())
        while not groups and self._fleet.pending and (left := deadline - time.monotonic()) > 0:
            groups = self._assembler.take(self._fleet.wait(left))
        return groups

    def problem(self) -> str | None:
        """Why waiting is of no use any more."""
        since = self._fleet.stranded_since
        if since is None or time.monotonic() - since < self._wait_timeout:
            return None
        return (
            f"no server has been usable for {self._wait_timeout:.0f} s (rollout.server_wait_timeout): "
            f"{self.complaints()}. Start servers again and resume the run"
        )

    def abort(self) -> None:
        self._fleet.abort(keep_partial=False)
        self._assembler.clear()

    def suspend(self) -> None:
        self._assembler.suspend(self._fleet.abort(keep_partial=True))

    # ---------------------------------------------------------------- weights

    def needs(self, version: int) -> bool:
        """Whether a server that can be reached lacks this version. Waits for one if there is none."""
        deadline = time.monotonic() + self._wait_timeout
        while not self._usable():
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"no server could be reached for {self._wait_timeout:.0f} s (rollout.server_wait_timeout): "
                    f"{self.complaints()}. Start servers again and resume the run"
                )
            time.sleep(LOOK_SECONDS)
        return bool(self._lacking(version))

    def returned(self, version: int, *, moved: bool) -> bool:
        """Whether a server came back and should get the weights now: not while others work and the trainer's weights
        have `moved` on since the last update, since it would serve another version than they."""
        return bool(self._lacking(version)) and (not moved or self._fleet.stranded_since is not None)

    def send(self, tensors: Iterator[tuple[str, Tensor]], version: int, probe: Sequence[float] | None) -> bool:
        """Give the weights to every server that can be reached and lacks them; whether one has them now. `tensors` is
        read to its end. Raises VerificationError when something else arrived than was sent."""
        label = self._labels.label(version)
        receivers = self._lacking(version)
        if self._verifier is not None:
            self._verifier.probe = None if probe is None else Probe(self._probe_ids, tuple(probe), self._tolerance)
        with self._fleet.updating(label):
            self._awake.close()
            report = synchronise(
                self._transport,
                receivers,
                tensors,
                label,
                verifier=self._verifier,
                before_generating=self._take_memory,
            )
            for receiver in receivers:
                if (why := report.failures.get(receiver.url)) is None:
                    self._fleet.admit(receiver.url, label)
                else:
                    log.warning("weights %s did not reach %s: %s", label, receiver.url, why)
                    self._fleet.withdraw(receiver.url, why)
        self._silent |= report.failures.keys() - set(report.alive)
        self._readings.add(report)
        return len(report.failures) < len(receivers)

    def _lacking(self, version: int) -> list[ServerReceiver]:
        label = self._labels.label(version)
        return [
            ServerReceiver(self._fleet, view.url, view.tensor_parallel)
            for view in self._usable()
            if view.label != label
        ]

    def _usable(self) -> list[ServerView]:
        """Servers that work, except those that did not answer a moment ago, until a probe has looked at them too."""
        healthy = [view for view in self._fleet.servers() if view.healthy]
        self._silent &= {view.url for view in healthy}
        return [view for view in healthy if view.url not in self._silent]

    def complaints(self) -> str:
        """What keeps each server from serving."""
        return "; ".join(f"{view.url}: {view.reason or 'not reachable'}" for view in self._fleet.servers())

    # ---------------------------------------------------------------- memory

    def release(self) -> None:
        if not self._colocated or self._asleep:
            return
        self._awake.enter_context(self._fleet.updating("asleep"))
        for view in self._fleet.servers():
            if view.healthy:
                with self._or_withdraw(view.url):
                    self._asleep[view.url] = self._running_since(view.url)
                    self._fleet.call(view.url, "/release_memory_occupation", {}, ADMIN_SECONDS)

    def resume(self) -> None:
        """Take back the memory of the weights; the rest follows when they are there. A server that was restarted
        meanwhile has all of it."""
        for url, since in list(self._asleep.items()):
            with self._or_withdraw(url):
                if self._running_since(url) == since:
                    self._fleet.call(url, "/resume_memory_occupation", {"tags": ["weights"]}, ADMIN_SECONDS)
                else:
                    del self._asleep[url]

    def _take_memory(self, receiver: Receiver) -> None:
        if receiver.url in self._asleep:
            receiver.call("/resume_memory_occupation", {"tags": list(LOADED_LATER)}, ADMIN_SECONDS)
            del self._asleep[receiver.url]

    def _running_since(self, url: str) -> Any:
        return self._fleet.server_info(url, ADMIN_SECONDS).get("startup_time")

    @contextmanager
    def _or_withdraw(self, url: str) -> Iterator[None]:
        """A server that does not do it is out, until it has been sent the weights."""
        try:
            yield
        except ServerError as error:
            log.warning("memory of %s: %s", url, error.what)
            self._asleep.pop(url, None)
            self._fleet.withdraw(url, error.what)

    # ---------------------------------------------------------------- the rest

    def metrics(self) -> dict[str, float]:
        serving = sum(view.label is not None for view in self._fleet.servers())
        restarts = 0 if self._pool is None else self._pool.counters["restarts"]
        return self._readings.take(self._fleet.counters, serving=serving, restarts=restarts)

    def close(self) -> None:
        self._closing.close()
