"""Prompts to requests for single samples, finished samples back to whole groups. Global rank 0 only."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from asd_megatron.data.tokenizer import decode
from asd_megatron.records import FinishReason, Group, Prompt, Rollout, SamplingParams
from asd_megatron.rollout.sglang.client.scheduling import SampleRequest, SampleResult


class Labels:
    """Names of weight versions on the servers: `<tag>-<version>`.

    The tag is this run's own: a server that another run has used is not taken for one with current weights.
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
class Response:
    """What a sample has so far: tokens, their log-probs, and (position, version) from where on which weights."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    versions: tuple[tuple[int, int], ...] = ()

    def extended(self, result: SampleResult, labels: Labels) -> Response:
        versions = list(self.versions)
        for start, label in result.spans if result.output_ids else ():
            version = labels.version(label)
            if not versions or versions[-1][1] != version:
                versions.append((len(self.ids) + start, version))
        return Response(self.ids + result.output_ids, self.logprobs + result.logprobs, tuple(versions))


@dataclass
class Pending:
    """A group in the making."""

    prompt: Prompt
    params: SamplingParams
    step: int
    begun: dict[int, Response] = field(default_factory=dict)  # suspended samples
    rollouts: dict[int, Rollout] = field(default_factory=dict)  # finished ones

    @property
    def whole(self) -> bool:
        return len(self.rollouts) == self.params.n


class Assembler:
    """The groups in the making, by number in the order of submission.

    tokenizer: for `Rollout.text`; None leaves it empty.
    """

    def __init__(self, tokenizer: Any | None, seed: int, labels: Labels) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._labels = labels
        self._pending: dict[int, Pending] = {}
        self._submitted = 0
        self._suspended = False

    def add(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> list[SampleRequest]:
        """The requests of what was suspended, then those of the new groups."""
        requests = self._restart()
        for prompt in prompts:
            number, self._submitted = self._submitted, self._submitted + 1
            self._pending[number] = Pending(prompt, params, step)
            requests += [self._request(number, sample) for sample in range(params.n)]
        return requests

    def take(self, results: Iterable[SampleResult]) -> list[Group]:
        """The groups that are whole with these results, in submitted order."""
        for result in results:
            number, sample = _name(result)
            self._pending[number].rollouts[sample] = self._rollout(number, sample, result)
        return [self._deliver(number) for number in sorted(self._pending) if self._pending[number].whole]

    def suspend(self, results: Iterable[SampleResult]) -> None:
        """Keep what these samples have; `add` asks for the rest. One that was finished just then is finished."""
        for result in results:
            number, sample = _name(result)
            group = self._pending[number]
            if result.finish_reason == FinishReason.ABORT:
                group.begun[sample] = group.begun.get(sample, Response()).extended(result, self._labels)
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
        begun = group.begun.get(sample, Response()).ids
        p = group.params
        return SampleRequest(
            key=(number, sample),
            group=number,
            input_ids=group.prompt.ids + begun,
            sampling={
                "temperature": p.temperature,
                "top_p": p.top_p,
                "top_k": p.top_k or -1,
                "max_new_tokens": p.max_new_tokens - len(begun),
                "stop_token_ids": list(p.stop_token_ids),
                "stop": list(p.stop),
                "ignore_eos": not p.stop_token_ids,
                "no_stop_trim": True,
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "sampling_seed": self._noise(group, sample, len(begun)),
            },
        )

    def _noise(self, group: Pending, sample: int, position: int) -> int:
        """The seed of servers with deterministic inference; others draw noise of their own."""
        name = f"{self._seed}/{group.step}/{group.prompt.problem.prompt_id}/{sample}/{position}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1

    def _rollout(self, number: int, sample: int, result: SampleResult) -> Rollout:
        group = self._pending[number]
        response = group.begun.pop(sample, Response()).extended(result, self._labels)
        return Rollout(
            prompt_id=group.prompt.problem.prompt_id,
            sample=sample,
            prompt_ids=group.prompt.ids,
            response_ids=response.ids,
            logprobs=response.logprobs,
            finish_reason=FinishReason(result.finish_reason),
            weight_version=response.versions[0][1] if response.versions else 0,
            version_changes=response.versions[1:],
            text="" if self._tokenizer is None else decode(self._tokenizer, response.ids),
        )


def _name(result: SampleResult) -> tuple[int, int]:
    """(group, sample), the key that its request got."""
    return cast(tuple[int, int], result.key)
