"""The interfaces of weight synchronisation (a server, a transport), and requests to several servers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

from torch import Tensor

from asd_megatron.errors import UserError

SLACK_SECONDS = 5.0  # beyond a server's own time limit, for its answer to arrive
Answer = TypeVar("Answer")
NamedTensors = Iterable[tuple[str, Tensor]]
"""(Hugging Face name, full tensor), each once."""


class Receiver(Protocol):
    """One server that takes weights."""

    @property
    def url(self) -> str: ...

    @property
    def tensor_parallel(self) -> int:
        """Tensor-parallel size of the server."""
        ...

    def call(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        """POST `body` as JSON, with the key that `path` requires (`/generate` the generation key, every other path the
        administration key); returns the response's object. Called from several threads at once.

        Raises, with a message for the user, when the server cannot be reached, does not answer within `timeout`
        seconds, or answers an HTTP error.
        """
        ...


class Transport(Protocol):
    """A way to transfer weights to servers. Used on global rank 0 alone."""

    @property
    def needs_session(self) -> bool:
        """Whether SGLang requires the transfer to be between `/begin_weight_update` and `/end_weight_update`."""
        ...

    def send(self, receivers: Sequence[Receiver], tensors: NamedTensors, label: str) -> dict[str, str]:
        """Transfer every tensor to every receiver; none of them generates meanwhile. Returns URL -> reason for the
        receivers whose transfer is incomplete, which must be sent everything again; {} if all are complete.

        `tensors` is read to its end even after failures, because other ranks take part in its gathers. Exceptions pass
        through, and then no receiver is complete. Bounded in time unless `tensors` is not.
        """
        ...

    def close(self) -> None:
        """Release what is shared with the servers. May be called twice."""
        ...


class VerificationError(UserError):
    """A server does not have the weights that it was sent. The message names server, rank and tensor."""


class RequestRefused(Exception):
    """A server answered that it did not do what was requested."""


class TransferIncomplete(Exception):
    """Some servers did not take all weights; `failures` as `Transport.send` returns them."""

    def __init__(self, failures: dict[str, str]) -> None:
        super().__init__("; ".join(f"{url}: {why}" for url, why in failures.items()))
        self.failures = failures


def ask(receiver: Receiver, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
    """`receiver.call`, where an answer with `success: false` raises too."""
    answer = receiver.call(path, body, timeout)
    if answer.get("success") is False:
        raise RequestRefused(f"{path}: {answer.get('message') or 'refused without a reason'}")
    return answer


def ask_all(
    receivers: Sequence[Receiver], question: Callable[[Receiver], Answer], limit: float
) -> tuple[dict[str, Answer], dict[str, str]]:
    """`question` of every receiver, in parallel: its results, and the reasons of those that raised, by URL. A receiver
    without a result after `limit` seconds counts as failed; `limit` is more than its requests' own time limits.

    A VerificationError is no failure of one server but passes through, once all have answered.
    """
    answers: dict[str, Answer] = {}
    failures: dict[str, str] = {}
    if not receivers:
        return answers, failures
    pool = ThreadPoolExecutor(len(receivers), thread_name_prefix="weight-sync")
    try:
        futures = {receiver.url: pool.submit(question, receiver) for receiver in receivers}
        wait(futures.values(), limit)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    for url, future in futures.items():
        if not future.done():
            failures[url] = f"did not answer within {limit:g} s"
        elif isinstance(error := future.exception(), VerificationError):
            raise error
        elif error is not None:
            failures[url] = reason(error)
        else:
            answers[url] = future.result()
    return answers, failures


def incomplete(receivers: Sequence[Receiver], failures: Mapping[str, str], otherwise: str) -> dict[str, str]:
    """Why the transfer to each of `receivers` is incomplete: its own reason in `failures`, else `otherwise`."""
    return {receiver.url: failures.get(receiver.url, otherwise) for receiver in receivers}


def reason(error: BaseException) -> str:
    """The error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def drain(tensors: NamedTensors) -> None:
    """Read the remaining tensors, because other ranks take part in their gathers."""
    for _ in tensors:
        pass
