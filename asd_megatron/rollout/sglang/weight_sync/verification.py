"""Proof that servers have the trainer's weights: checksums of every tensor, and log-probs of one fixed sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asd_megatron.rollout.sglang.weight_sync.checksums import ServerChecksums, server_pieces
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors, ReceiptError, Receiver, ask

SHOWN = 3  # tensors named in a message
ADVICE = (
    "the run stops rather than sample from other weights than it trains: start that server again; if it happens again, "
    "try another transport or report it"
)


@dataclass(frozen=True)
class Probe:
    """A sequence and the trainer's log-probs of its tokens but the first, at temperature 1, under the weights sent.

    `tolerance`: largest absolute difference, in nats.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tolerance: float

    def __post_init__(self) -> None:
        if len(self.ids) < 2 or len(self.logprobs) != len(self.ids) - 1:
            raise ValueError(f"{len(self.ids)} tokens need one log-prob less, not {len(self.logprobs)}")


class Receipt:
    """Compares what servers hold with what was sent.

    `config`: the model's config.json. `dtype`, `device` ("cpu" or "cuda"): the servers'. `probe` may be set anew before
    each synchronisation (None: checksums alone). Raises UserError for an architecture without a rule.
    """

    def __init__(
        self, config: Mapping[str, Any], *, dtype: torch.dtype, device: str, probe: Probe | None = None
    ) -> None:
        server_pieces(config, device)  # refuses now rather than at the first transfer
        self._config, self._dtype, self._device = config, dtype, device
        self._checksums: ServerChecksums | None = None
        self.probe = probe

    def watch(self, tensors: NamedTensors, receivers: Sequence[Receiver]) -> Iterator[tuple[str, Tensor]]:
        """`tensors` again, with their checksums remembered for servers that are cut like `receivers`."""
        ranks = [receiver.tensor_parallel for receiver in receivers]
        self._checksums = ServerChecksums(self._config, ranks, self._dtype, self._device)
        return self._checksums.watch(tensors)

    def check(self, receiver: Receiver, timeout: float) -> int:
        """Compare every tensor of every rank of `receiver` with the last `watch`. Returns how many there are.

        Raises ReceiptError, or what `receiver.call` raises. Works while generation is paused.
        """
        assert self._checksums is not None, "nothing was watched"
        answer = ask(receiver, "/weights_checker", {"action": "checksum"}, timeout)
        found = _by_rank(receiver, answer)
        if sorted(found) != list(range(receiver.tensor_parallel)):
            raise ReceiptError(
                f"{receiver.url} told checksums of its ranks {sorted(found)}, but should have "
                f"{receiver.tensor_parallel} tensor-parallel ranks: correct that number"
            )
        for rank, tensors in found.items():
            _compare(receiver, rank, tensors, self._checksums.expected(receiver.tensor_parallel, rank))
        return sum(map(len, found.values()))

    def check_probe(self, receiver: Receiver, timeout: float) -> float | None:
        """Largest difference to the probe's log-probs (None without a probe). `receiver` must be generating.

        Raises ReceiptError, or what `receiver.call` raises.
        """
        if self.probe is None:
            return None
        found = probe(receiver, self.probe.ids, timeout)
        differences = [abs(a - b) for a, b in zip(found, self.probe.logprobs, strict=True)]
        worst = max(range(len(differences)), key=lambda i: differences[i] if differences[i] == differences[i] else 1e9)
        if not differences[worst] <= self.probe.tolerance:
            raise ReceiptError(
                f"{receiver.url} computes other log-probs than the trainer: token {worst + 1} of the probe has "
                f"{found[worst]:.6f} there and {self.probe.logprobs[worst]:.6f} here (tolerance "
                f"{self.probe.tolerance:g}), although "
                "its weights arrived; compare dtype, rotary settings and vocabulary of both sides"
            )
        return differences[worst]


def probe(receiver: Receiver, ids: Sequence[int], timeout: float) -> list[float]:
    """Log-probs of `ids[1:]` at temperature 1, computed by the server anew (never from its cache)."""
    body = {
        "input_ids": list(ids),
        "return_logprob": True,
        "logprob_start_len": 0,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
    }
    answer = receiver.call("/generate", body, timeout)
    entries = answer["meta_info"]["input_token_logprobs"][1:]
    if len(entries) != len(ids) - 1:  # their ids say nothing: the vocabulary's last one is told as 0
        raise ReceiptError(
            f"{receiver.url} scored {len(entries)} tokens of a probe of {len(ids)}: is its version supported?"
        )
    return [float(entry[0]) for entry in entries]


def _by_rank(receiver: Receiver, answer: Mapping[str, Any]) -> dict[int, dict[str, str]]:
    """Checksums by tensor-parallel rank."""
    found: dict[int, dict[str, str]] = {}
    try:
        for entry in answer["ranks"]:
            info = entry["parallelism_info"]
            info = info[0] if isinstance(info, list) else info
            found[int(info["tp_rank"])] = dict(entry["checksums"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ReceiptError(
            f"{receiver.url} told its checksums in a form that is not known ({error!r}): is its version supported? If "
            "so, set rollout.receipt to false"
        ) from error
    return found


def _compare(receiver: Receiver, rank: int, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    problems = [
        *_problem("differs", [n for n in expected if n in found and found[n] != expected[n]]),
        *_problem("is missing there", [n for n in expected if n not in found]),
        *_problem("is not the trainer's", [n for n in found if n not in expected]),
    ]
    if problems:
        raise ReceiptError(
            f"{receiver.url}, rank {rank}, has other weights than it was sent: {'; '.join(problems)}; {ADVICE}"
        )


def _problem(what: str, names: Sequence[str]) -> list[str]:
    more = f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return [f"{', '.join(names[:SHOWN])}{more} {what}"] if names else []
