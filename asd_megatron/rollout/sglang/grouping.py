"""Turns prompts into requests for single samples, and finished samples into complete groups. Global rank 0 only."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np

from asd_megatron.data.tokenizer import decode
from asd_megatron.records import FinishReason, Group, Prompt, Rollout, SamplingParams, as_array
from asd_megatron.rollout.bank import Key, Response, RolloutBank
from asd_megatron.rollout.sglang.client.routing import Routing
from asd_megatron.rollout.sglang.client.scheduling import SampleRequest, SampleResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def extended(response: Response, result: SampleResult, labels: Labels) -> Response:
    """The response with the tokens of a result that continues it; finished unless the result is an abort."""
    versions = list(response.versions)
    for start, label in result.spans if len(result.output_ids) else ():
        version = labels.version(label)
        if not versions or versions[-1][1] != version:
            versions.append((len(response.ids) + start, version))
    reason = None if result.finish_reason == FinishReason.ABORT else FinishReason(result.finish_reason)
    return Response(
        np.concatenate([response.ids, result.output_ids]),
        np.concatenate([response.logprobs, result.logprobs]),
        tuple(versions),
        reason,
        None if reason is None else result.routed_experts,  # of all tokens: the earlier ones are part of the input
    )


@dataclass
class PendingGroup:
    """A group in flight. `banked`: the bank keeps its responses."""

    prompt: Prompt
    params: SamplingParams
    step: int
    banked: bool = False
    partial: dict[int, Response] = field(default_factory=dict)  # of suspended samples, by sample
    finished: dict[int, Response] = field(default_factory=dict)  # by sample; without a reason: given up

    @property
    def key(self) -> Key:
        return self.step, self.prompt.problem.prompt_id

    @property
    def complete(self) -> bool:
        return len(self.finished) == self.params.n

    @property
    def responses(self) -> dict[int, Response]:
        """What there is of the group's samples, but for those given up."""
        given_up = [sample for sample, response in self.finished.items() if response.finish_reason is None]
        found = {**self.partial, **self.finished}
        return {sample: r for sample, r in found.items() if sample not in given_up and len(r.ids)}


class Assembler:
    """The groups in flight, numbered in the order of submission.

    tokenizer: for `Rollout.text`; None leaves it empty. routing: of the model, to get the routed experts of every
    rollout; None: they are not asked for. `unrouted` counts the rollouts that came without usable ones. bank: keeps the
    responses of training steps, and has those that an earlier start of the run left; None: a restart has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        seed: int,
        labels: Labels,
        routing: Routing | None = None,
        bank: RolloutBank | None = None,
    ) -> None:
        self._bank = bank
        self._tokenizer = tokenizer
        self._seed = seed
        self._labels = labels
        self._routing = routing
        self.unrouted = 0
        self._pending: dict[int, PendingGroup] = {}
        self._submitted = 0
        self._suspended = False

    def add(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> list[SampleRequest]:
        """The requests for the rest of suspended samples, then those of the new groups but for what the bank has."""
        requests = self._restart()
        for prompt in prompts:
            number, self._submitted = self._submitted, self._submitted + 1
            group = PendingGroup(prompt, params, step)
            if self._bank is not None and step > 0 and all(group.key != other.key for other in self._pending.values()):
                group.banked = True
                for sample, response in self._bank.draw(group.key, prompt.ids, params).items():
                    (group.partial if response.finish_reason is None else group.finished)[sample] = response
            self._pending[number] = group
            requests += self._rest(number)
        return requests

    def arrived(self, result: SampleResult) -> None:
        """Let the bank keep a result at once, before `take` asks for it, which may be a training step later. Any
        thread."""
        number, sample = _name(result)
        group = self._pending.get(number)
        if group is not None and result.finish_reason != FinishReason.ABORT:
            self._keep(group, sample, extended(group.partial.get(sample, Response()), result, self._labels))

    def take(self, results: Iterable[SampleResult]) -> list[Group]:
        """The groups that these results complete, in submitted order."""
        for result in results:
            number, sample = _name(result)
            self._finish(self._pending[number], sample, result)
        return [self._deliver(number) for number in sorted(self._pending) if self._pending[number].complete]

    def suspend(self, results: Iterable[SampleResult]) -> None:
        """Keep these partial results; `add` requests the rest. A sample that finished just before is complete."""
        for result in results:
            number, sample = _name(result)
            group = self._pending[number]
            if result.finish_reason == FinishReason.ABORT:
                group.partial[sample] = extended(group.partial.get(sample, Response()), result, self._labels)
                self._keep(group, sample, group.partial[sample])
            else:
                self.arrived(result)
                self._finish(group, sample, result)
        self._suspended = True

    def clear(self) -> None:
        """Forget everything; the bank has it, in case that the same groups are added again."""
        for group in self._pending.values():
            if self._bank is not None and group.banked:
                self._bank.hold(group.key, group.params, group.prompt.ids, group.responses)
        self._pending.clear()
        self._suspended = False

    def _keep(self, group: PendingGroup, sample: int, response: Response) -> None:
        if self._bank is not None and group.banked:
            self._bank.keep(group.key, sample, response)

    def _finish(self, group: PendingGroup, sample: int, result: SampleResult) -> None:
        group.finished[sample] = extended(group.partial.pop(sample, Response()), result, self._labels)
        if result.unrouted:
            log.log(
                logging.DEBUG if self.unrouted else logging.WARNING,
                "the routed experts in an answer of %s are not used: %s (servers/unrouted counts such answers; their "
                "tokens are routed by the trainer)",
                result.url,
                result.unrouted,
            )
            self.unrouted += 1

    def _restart(self) -> list[SampleRequest]:
        if not self._suspended:
            return []
        self._suspended = False
        return [request for number in self._pending for request in self._rest(number)]

    def _rest(self, number: int) -> list[SampleRequest]:
        """The requests for what a group lacks."""
        group = self._pending[number]
        return [self._request(number, sample) for sample in range(group.params.n) if sample not in group.finished]

    def _deliver(self, number: int) -> Group:
        group = self._pending.pop(number)
        return Group(group.prompt.problem, tuple(self._rollout(group, sample) for sample in range(group.params.n)))

    def _request(self, number: int, sample: int) -> SampleRequest:
        group = self._pending[number]
        prefix = group.partial.get(sample, Response()).ids
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

    def _rollout(self, group: PendingGroup, sample: int) -> Rollout:
        response = group.finished[sample]
        return Rollout(
            prompt_id=group.prompt.problem.prompt_id,
            sample=sample,
            prompt_ids=as_array(group.prompt.ids, "int32"),
            response_ids=response.ids,
            logprobs=response.logprobs,
            finish_reason=response.finish_reason or FinishReason.ABORT,
            weight_version=response.versions[0][1] if response.versions else 0,
            version_changes=response.versions[1:],
            text="" if self._tokenizer is None else decode(self._tokenizer, response.ids),
            routed_experts=response.routed_experts,
        )


def _name(result: SampleResult) -> tuple[int, int]:
    """(group number, sample): the key of its request."""
    return cast(tuple[int, int], result.key)
