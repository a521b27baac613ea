"""The interface between the trainer and the engines that generate rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.models.export import Step
from asd_megatron.records import Group, Prompt, SamplingParams


class RolloutError(UserError):
    """The engine is unavailable: no server is left, or the time limit passed. The weights are not to blame (`NotFinite`
    is raised for those), so a run saves its state and stops."""


def check_lengths(prompts: Sequence[Prompt], params: SamplingParams, max_positions: int) -> None:
    """Raises UserError for a prompt that leaves no room for the response in the model's positions, or is empty."""
    limit = max_positions - params.max_new_tokens
    for prompt in prompts:
        if not 0 < len(prompt.ids) <= limit:
            raise UserError(
                f"problem {prompt.problem.prompt_id}: its prompt has {len(prompt.ids)} tokens; with "
                f"{params.max_new_tokens} response tokens this model (max_position_embeddings {max_positions}) takes 1 "
                f"to {limit}: shorten the prompt, or lower sampling.max_response_tokens"
            )


class WeightSource(Protocol):
    """The trainer's current weights.

    Iterating yields (Hugging Face name, full tensor), each exactly once, on global rank 0 and nothing elsewhere. It is
    a collective: every rank reads it to its end. It can be iterated again, and then yields the weights of that moment.
    """

    @property
    def version(self) -> int:
        """Optimizer steps that these weights have seen. Never decreases."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...

    def steps(self, bucket_bytes: int) -> Iterator[Step]:
        """The same tensors in steps of at most `bucket_bytes`, each on the first global rank of its pipeline stage
        (`ModelPort.export_steps`). Collective likewise."""
        ...


class RolloutEngine(Protocol):
    """Turns prompts into complete groups of responses.

    **Lifecycle.** `load_weights` once, then any number of `submit` ... `collect` until `pending` is 0, `load_weights`
    again when the weights have changed, `close` at the end. `submit` may be called again while groups are still
    pending, and `load_weights` while they are: responses in flight continue under the new weights and record it.
    `suspend` stops generation but keeps unfinished responses; they continue at the next `submit`. `release` gives the
    engine's accelerator memory to the trainer, weights included; `resume` takes it back, and `load_weights` must follow
    even if the version has not changed. An engine that holds no memory ignores both.

    **All ranks.** The program is the same on every rank: every rank calls every method in the same order with the same
    arguments. Groups are returned on global rank 0 and `[]` on all other ranks. `pending` and every exception are the
    same on all ranks, so that no rank waits for one that has given up.

    **Groups.** A group is delivered once and complete (all `params.n` samples, in order of `sample`) or not at all. One
    `collect` returns the finished groups in submitted order; over several calls the order is that of completion. A
    rollout that the engine had to give up is in its group with `FinishReason.ABORT`: the caller decides what happens to
    the group, and never trains on it.

    **Weights.** Each rollout carries the `weight_version` under which its first token was sampled, and in
    `version_changes` where newer weights took over: versions are those of the sources given to `load_weights` (0 before
    the first). `logprobs` are those of the sampled distribution before top-p and top-k filtering; at temperature 0 they
    are taken at temperature 1.

    **Failures.** When a server dies, its undelivered samples are retried elsewhere, each delivered exactly once; a
    server that comes back is sent the current weights before it serves. When none is left within the engine's own time
    limit, or nothing is finished within `collect`'s `timeout`, `collect` raises `RolloutError` on every rank: groups
    delivered earlier stay valid, everything pending is dropped as by `abort`. Weights are replaced completely or
    `load_weights` raises; never a mix.
    """

    @property
    def weight_version(self) -> int:
        """The version of the weights that the next submitted prompt is sampled with."""
        ...

    @property
    def pending(self) -> int:
        """Groups submitted and not yet delivered; equal on all ranks."""
        ...

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> None:
        """Request `params.n` responses to each prompt. Returns at once.

        `step` enters the sampling noise of engines that own it: the same (seed, step, prompt_id, sample) draws the same
        noise. Raises UserError when a prompt or `params` cannot be served.
        """
        ...

    def collect(self, timeout: float) -> list[Group]:
        """Wait until at least one pending group is finished, at most `timeout` seconds, and return the finished ones.

        Global rank 0: one group or more, without rewards ([] when nothing is pending). Other ranks: []. Raises
        RolloutError (every rank) when no group is finished in time.
        """
        ...

    def abort(self) -> None:
        """Give up everything pending: none of it is delivered later."""
        ...

    def suspend(self) -> None:
        """Stop generating. Unfinished responses stay pending with their tokens so far and continue at the next `submit`
        (which may have no prompts), under the weights of that time."""
        ...

    def release(self) -> None:
        """Free the engine's accelerator memory until `resume`. Pending responses must be suspended before."""
        ...

    def resume(self) -> None:
        """Take the memory back; `load_weights` must follow, since the weights may be lost."""
        ...

    def load_weights(self, weights: WeightSource) -> None:
        """Serve these weights from now on, as `weights.version`.

        An engine that shares the trainer's weights does not read the source. One that has to send again, to a server
        that comes back while it waits in `collect`, reads it again.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """The engine's metrics since the last call, by metric name. Global rank 0; {} elsewhere."""
        ...

    def close(self) -> None:
        """Stop what the engine started. Safe to call twice."""
        ...
