"""What weight synchronisation asks of a server and of a transport, and asking several servers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from torch import Tensor

from asd_megatron.errors import UserError

Answer = TypeVar("Answer")
NamedTensors = Iterable[tuple[str, Tensor]]
"""(Hugging Face name, whole tensor), each once."""


class Receiver(Protocol):
    """One server that takes weights."""

    @property
    def url(self) -> str: ...

    @property
    def tensor_parallel(self) -> int:
        """Ranks over which the server cuts its model."""
        ...

    def call(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        """POST `body` as JSON, with the key that `path` wants (`/generate` the generation key, everything else the
        administration key); the answer's object. Called from several threads at once.

        Raises, with a text for people, when the server cannot be reached, does not answer within `timeout` seconds, or
        answers an HTTP error.
        """
        ...


class Transport(Protocol):
    """A way to bring weights into servers. Used on global rank 0 alone."""

    @property
    def needs_session(self) -> bool:
        """Whether SGLang wants this between `/begin_weight_update` and `/end_weight_update`."""
        ...

    def send(self, receivers: Sequence[Receiver], tensors: NamedTensors, label: str) -> dict[str, str]:
        """Every tensor into every receiver, none of which generates meanwhile. URL -> reason for those that are not
        whole now and must be sent everything again; {} means that all are whole.

        `tensors` is read to its end even after failures, because other ranks take part in its gathers. What it raises
        passes through, and then no receiver is whole. Bounded in time unless `tensors` is not.
        """
        ...

    def close(self) -> None:
        """Give up what is shared with the servers. May be called twice."""
        ...


class ReceiptError(UserError):
    """A server does not have the weights that it was sent. The message names server, rank and tensor."""


class Refused(Exception):
    """A server answered that it did not do what it was asked."""


class NotWhole(Exception):
    """Some servers did not take all weights; `failures` as `Transport.send` returns them."""

    def __init__(self, failures: dict[str, str]) -> None:
        super().__init__("; ".join(f"{url}: {why}" for url, why in failures.items()))
        self.failures = failures


def ask(receiver: Receiver, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
    """`receiver.call`, where an answer with `success: false` raises too."""
    answer = receiver.call(path, body, timeout)
    if answer.get("success") is False:
        raise Refused(f"{path}: {answer.get('message') or 'refused without a reason'}")
    return answer


def ask_all(
    receivers: Sequence[Receiver], question: Callable[[Receiver], Answer]
) -> tuple[dict[str, Answer], dict[str, str]]:
    """`question` of every receiver, in parallel: its results, and the reasons of those that raised, by URL.

    A ReceiptError is no failure of one server but passes through, once all have answered.
    """
    answers: dict[str, Answer] = {}
    failures: dict[str, str] = {}
    if not receivers:
        return answers, failures
    with ThreadPoolExecutor(len(receivers), thread_name_prefix="weight-sync") as pool:
        futures = {receiver.url: pool.submit(question, receiver) for receiver in receivers}
    for url, future in futures.items():
        error = future.exception()
        if isinstance(error, ReceiptError):
            raise error
        if error is not None:
            failures[url] = reason(error)
        else:
            answers[url] = future.result()
    return answers, failures


def not_whole(receivers: Sequence[Receiver], failures: Mapping[str, str], others: str) -> dict[str, str]:
    """Why each of `receivers` is not whole: its own reason in `failures`, else `others`."""
    return {receiver.url: failures.get(receiver.url, others) for receiver in receivers}


def reason(error: BaseException) -> str:
    """One line for people."""
    return " ".join(str(error).split()) or type(error).__name__


def drain(tensors: NamedTensors) -> None:
    """Read what is left, for the sake of the other ranks."""
    for _ in tensors:
        pass
