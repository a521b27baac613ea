"""Turns prompts into requests for single samples, and finished samples into complete groups. Global rank 0 only."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from asd_megatron.data.tokenizer import decode
from asd_megatron.records import FinishReason, Group, Prompt, Rollout, SamplingParams, as_array
from asd_megatron.rollout.sglang.client.routing import Routing
from asd_megatron.rollout.sglang.client.scheduling import SampleRequest, SampleResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from asd_megatron.records import TokenIds

log = logging.getLogger(__name__)


class Labels:
    """Names of weight versions on the servers: `<tag>-<version>`.

    The tag is unique to this run, so the weights that another run has left on a server are never taken for its own.
    """

    def __init__(self, tag: str | None = None) -> None:
        self._prefix = f"{tag or secrets.token_hex(4)}-"

    def label(self, version: int) -> str:
        return f"{self._prefix}{version}"

    def version(self, label: str) -> int:
        """Raises ValueError for a label that is not this run's."""
        if not label.startswith(self._prefix):
            raise ValueError(f"weight label {label!r} does not begin with this run's {self._prefix!r}")
        return int(label.removeprefix(self._prefix))


@dataclass(frozen=True)
class PartialResponse:
    """The tokens of a sample so far, their log-probs, and (position, version): the first position of each version of
    the weights."""

    ids: TokenIds = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    logprobs: np.ndarray[Any, np.dtype[np.float32]] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    versions: tuple[tuple[int, int], ...] = ()

    def extended(self, result: SampleResult, labels: Labels) -> PartialResponse:
        versions = list(self.versions)
        for start, label in result.spans if len(result.output_ids) else ():
            version = labels.version(label)
            if not versions or versions[-1][1] != version:
                versions.append((len(self.ids) + start, version))
        ids = np.concatenate([self.ids, result.output_ids])
        return PartialResponse(ids, np.concatenate([self.logprobs, result.logprobs]), tuple(versions))


@dataclass
class PendingGroup:
    """A group in flight."""

    prompt: Prompt
    params: SamplingParams
    step: int
    partial: dict[int, PartialResponse] = field(default_factory=dict)  # of suspended samples, by sample
    rollouts: dict[int, Rollout] = field(default_factory=dict)  # of finished samples, by sample

    @property
    def complete(self) -> bool:
        return len(self.rollouts) == self.params.n


class Assembler:
    """The groups in flight, numbered in the order of submission.

    tokenizer: for `Rollout.text`; None leaves it empty. routing: of the model, to get the routed experts of every
    rollout; None: they are not asked for. `unrouted` counts the rollouts that came without usable ones.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        seed: int,
        labels: Labels,
        routing: Routing | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._labels = labels
        self._routing = routing
        self.unrouted = 0
        self._pending: dict[int, PendingGroup] = {}
        self._submitted = 0
        self._suspended = False

    def add(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> list[SampleRequest]:
        """The requests for the rest of suspended samples, then those of the new groups."""
        requests = self._restart()
        for prompt in prompts:
            number, self._submitted = self._submitted, self._submitted + 1
            self._pending[number] = PendingGroup(prompt, params, step)
            requests += [self._request(number, sample) for sample in range(params.n)]
        return requests

    def take(self, results: Iterable[SampleResult]) -> list[Group]:
        """The groups that these results complete, in submitted order."""
        for result in results:
            number, sample = _name(result)
            self._pending[number].rollouts[sample] = self._rollout(number, sample, result)
        return [self._deliver(number) for number in sorted(self._pending) if self._pending[number].complete]

    def suspend(self, results: Iterable[SampleResult]) -> None:
        """Keep these partial results; `add` requests the rest. A sample that finished just before is complete."""
        for result in results:
            number, sample = _name(result)
            group = self._pending[number]
            if result.finish_reason == FinishReason.ABORT:
                group.partial[sample] = group.partial.get(sample, PartialResponse()).extended(result, self._labels)
            else:
                group.rollouts[sample] = self._rollout(number, sample, result)
        self._suspended = True

    def clear(self) -> None:
        """Forget everything."""
        self._pending.clear()
        self._suspended = False

    def _restart(self) -> list[SampleRequest]:
        if not self._suspended:
            return []
        self._suspended = False
        return [
            self._request(number, sample)
            for number, group in self._pending.items()
            for sample in range(group.params.n)
            if sample not in group.rollouts
        ]

    def _deliver(self, number: int) -> Group:
        group = self._pending.pop(number)
        return Group(group.prompt.problem, tuple(group.rollouts[sample] for sample in range(group.params.n)))

    def _request(self, number: int, sample: int) -> SampleRequest:
        group = self._pending[number]
        prefix = group.partial.get(sample, PartialResponse()).ids
        p = group.params
        return SampleRequest(
            key=(number, sample),
            group=number,
            input_ids=(*group.prompt.ids, *prefix.tolist()),
            sampling={
                "temperature": p.temperature,
                "top_p": p.top_p,
                "top_k": p.top_k or -1,
                "max_new_tokens": p.max_new_tokens - len(prefix),
                "stop_token_ids": list(p.stop_token_ids),
                "stop": list(p.stop),
                "ignore_eos": not p.stop_token_ids,
                "no_stop_trim": True,
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "sampling_seed": self._noise(group, sample, len(prefix)),
            },
            routing=self._routing,
        )

    def _noise(self, group: PendingGroup, sample: int, position: int) -> int:
        """The sampling seed for servers with deterministic inference; others ignore it."""
        name = f"{self._seed}/{group.step}/{group.prompt.problem.prompt_id}/{sample}/{position}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1

    def _rollout(self, number: int, sample: int, result: SampleResult) -> Rollout:
        group = self._pending[number]
        response = group.partial.pop(sample, PartialResponse()).extended(result, self._labels)
        if result.unrouted:
            log.log(
                logging.DEBUG if self.unrouted else logging.WARNING,
                "the routed experts in an answer of %s are not used: %s (servers/unrouted counts such answers; their "
                "tokens are routed by the trainer)",
                result.url,
                result.unrouted,
            )
            self.unrouted += 1
        return Rollout(
            prompt_id=group.prompt.problem.prompt_id,
            sample=sample,
            prompt_ids=as_array(group.prompt.ids, "int32"),
            response_ids=response.ids,
            logprobs=response.logprobs,
            finish_reason=FinishReason(result.finish_reason),
            weight_version=response.versions[0][1] if response.versions else 0,
            version_changes=response.versions[1:],
            text="" if self._tokenizer is None else decode(self._tokenizer, response.ids),
            routed_experts=result.routed_experts,  # of prompt and complete response: the earlier parts are its input
        )


def _name(result: SampleResult) -> tuple[int, int]:
    """(group number, sample): the key of its request."""
    return cast(tuple[int, int], result.key)
