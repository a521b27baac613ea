"""Weight verification: the servers hold the trainer's weights (checksums of every tensor) and compute the same model
from them (log-probs of one fixed sequence, the probe).

Checksums are exact: one that differs stops the run at once. Log-probs of two implementations differ by rounding, so the
probe compares the mean difference with a tolerance, warns when it is exceeded, and stops the run when the same server
exceeds it in the next weight update too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asd_megatron.rollout.sglang.weight_sync.checksums import ServerChecksums, server_pieces
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors, Receiver, VerificationError, ask

log = logging.getLogger(__name__)

SHOWN = 3  # tensors named in a message
EXCEEDED_TO_STOP = 2  # weight updates in a row in which a server's probe exceeds the tolerance
CHECKSUM_ADVICE = (
    "the run stops rather than sample from other weights than it trains: restart that server; if it happens again, "
    "choose another rollout.weight_sync or report it"
)
PROBE_ADVICE = (
    "its checksums are right, so compare dtype, rotary settings and config.json of both sides; if a difference of this "
    "size is expected, raise rollout.verify_tolerance"
)


@dataclass(frozen=True)
class Probe:
    """A sequence and the trainer's log-probs of `ids[1:]`, at temperature 1, under the weights sent.

    `tolerance`: the largest mean absolute difference, in nats.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tolerance: float

    def __post_init__(self) -> None:
        if len(self.ids) < 2 or len(self.logprobs) != len(self.ids) - 1:
            raise ValueError(f"{len(self.ids)} tokens need one log-prob less, not {len(self.logprobs)}")


@dataclass(frozen=True)
class ProbeDifference:
    """Absolute difference between a server's log-probs of the probe and the trainer's, in nats: mean and maximum over
    its tokens; whether the mean exceeds the tolerance (NaN does)."""

    mean: float
    maximum: float
    exceeded: bool


class WeightVerifier:
    """Compares what servers hold and compute with what was sent.

    `config`: the model's config.json. `dtype`, `device` ("cpu" or "cuda"): the servers'. `probe` may be replaced before
    each synchronisation (None: checksums alone). Raises UserError for an architecture without a rule.
    """

    def __init__(
        self, config: Mapping[str, Any], *, dtype: torch.dtype, device: str, probe: Probe | None = None
    ) -> None:
        server_pieces(config, device)  # refuses now rather than at the first transfer
        self._config, self._dtype, self._device = config, dtype, device
        self._checksums: ServerChecksums | None = None
        self._exceeded: dict[str, list[str]] = {}  # URL -> labels of the weights that exceeded it in a row
        self.probe = probe

    def watch(self, tensors: NamedTensors, receivers: Sequence[Receiver]) -> Iterator[tuple[str, Tensor]]:
        """`tensors` unchanged; their checksums are kept for servers of the tensor-parallel sizes of `receivers`."""
        return self.start([receiver.tensor_parallel for receiver in receivers]).watch(tensors)

    def start(self, ranks: Sequence[int]) -> ServerChecksums:
        """New checksums, for servers with these numbers of tensor-parallel ranks: `check` compares with them."""
        self._checksums = ServerChecksums(self._config, ranks, self._dtype, self._device)
        return self._checksums

    def check(self, receiver: Receiver, timeout: float) -> int:
        """Compare every tensor of every rank of `receiver` with the last `watch`. Returns how many there are.

        Raises VerificationError, or what `receiver.call` raises. Works while generation is paused.
        """
        assert self._checksums is not None, "nothing was watched"
        answer = ask(receiver, "/weights_checker", {"action": "checksum"}, timeout)
        found = _by_rank(receiver, answer)
        if sorted(found) != list(range(receiver.tensor_parallel)):
            raise VerificationError(
                f"{receiver.url} reported checksums of its ranks {sorted(found)}, but should have "
                f"{receiver.tensor_parallel} tensor-parallel ranks: correct that number"
            )
        for rank, tensors in found.items():
            _compare(receiver, rank, tensors, self._checksums.expected(receiver.tensor_parallel, rank))
        return sum(map(len, found.values()))

    def check_probe(self, receiver: Receiver, label: str, timeout: float) -> ProbeDifference | None:
        """Compare log-probs of the probe (None without one). `receiver` must be generating.

        Logs a warning when the tolerance is exceeded. Raises VerificationError when `receiver` exceeded it with the
        weights before too (the same weights sent twice, as after an evaluation, count once), or what `receiver.call`
        raises. `label`: of the weights.
        """
        if self.probe is None:
            return None
        found = server_logprobs(receiver, self.probe.ids, timeout)
        difference, worst = _difference(found, self.probe)
        if not difference.exceeded:
            self._exceeded.pop(receiver.url, None)
            return difference
        labels = self._exceeded.setdefault(receiver.url, [])
        if label not in labels:
            labels.append(label)
        what = (
            f"{receiver.url} computes other log-probs than the trainer: the mean difference over the probe's "
            f"{len(found)} tokens is {difference.mean:.4g} nats (tolerance {self.probe.tolerance:g}), the largest "
            f"{difference.maximum:.4g} at token {worst + 1} ({found[worst]:.6f} there, "
            f"{self.probe.logprobs[worst]:.6f} here)"
        )
        if len(labels) >= EXCEEDED_TO_STOP:
            raise VerificationError(f"{what}, in {len(labels)} weight updates in a row; {PROBE_ADVICE}")
        log.warning("%s; the run stops if the next weight update exceeds it too: %s", what, PROBE_ADVICE)
        return difference


def server_logprobs(receiver: Receiver, ids: Sequence[int], timeout: float) -> list[float]:
    """Log-probs of `ids[1:]` at temperature 1, recomputed by the server (never from its cache). NaN arrives as null."""
    body = {
        "input_ids": list(ids),
        "return_logprob": True,
        "logprob_start_len": 0,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
    }
    answer = receiver.call("/generate", body, timeout)
    entries = answer["meta_info"]["input_token_logprobs"][1:]
    if len(entries) != len(ids) - 1:  # the entries' ids are not compared: SGLang reports the last id as 0
        raise VerificationError(
            f"{receiver.url} scored {len(entries)} tokens of a probe of {len(ids)}: is its version supported?"
        )
    return [float("nan") if entry[0] is None else float(entry[0]) for entry in entries]


def _difference(found: Sequence[float], probe: Probe) -> tuple[ProbeDifference, int]:
    """The difference, and the index of the token with the largest one (a NaN is larger than any number)."""
    differences = [abs(a - b) for a, b in zip(found, probe.logprobs, strict=True)]
    worst = max(range(len(differences)), key=lambda i: (differences[i] != differences[i], differences[i]))
    mean = sum(differences) / len(differences)
    return ProbeDifference(mean, differences[worst], exceeded=not mean <= probe.tolerance), worst


def _by_rank(receiver: Receiver, answer: Mapping[str, Any]) -> dict[int, dict[str, str]]:
    """Checksums by tensor-parallel rank."""
    found: dict[int, dict[str, str]] = {}
    try:
        for entry in answer["ranks"]:
            info = entry["parallelism_info"]
            info = info[0] if isinstance(info, list) else info
            found[int(info["tp_rank"])] = dict(entry["checksums"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise VerificationError(
            f"{receiver.url} reported its checksums in an unknown form ({error!r}): is its version supported? If so, "
            "set rollout.verify_weights to false"
        ) from error
    return found


def _compare(receiver: Receiver, rank: int, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    mismatches = [
        *_mismatch("differs", [n for n in expected if n in found and found[n] != expected[n]]),
        *_mismatch("is missing there", [n for n in expected if n not in found]),
        *_mismatch("is not the trainer's", [n for n in found if n not in expected]),
    ]
    if mismatches:
        raise VerificationError(
            f"{receiver.url}, rank {rank}, has other weights than it was sent: {'; '.join(mismatches)}; "
            f"{CHECKSUM_ADVICE}"
        )


def _mismatch(what: str, names: Sequence[str]) -> list[str]:
    more = f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return [f"{', '.join(names[:SHOWN])}{more} {what}"] if names else []
