"""The seam between the trainer and whatever makes rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from asd_megatron.errors import UserError
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
    """The trainer's weights as they are now.

    Iterating yields (Hugging Face name, whole tensor), each exactly once, on global rank 0 and nothing elsewhere. It is
    a collective: every rank reads it to its end. It can be read again, and then yields the weights of that moment.
    """

    @property
    def version(self) -> int:
        """Optimizer steps that these weights have seen. Never decreases."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class RolloutEngine(Protocol):
    """Turns prompts into whole groups of responses.

    **Lifecycle.** `load_weights` once, then any number of `submit` ... `collect` until `pending` is 0, `load_weights`
    again when the weights have changed, `close` at the end. `submit` may be called again while groups are still
    pending, and `load_weights` while they are: responses in the making go on under the new weights and say so.
    `suspend` stops generation but keeps what is unfinished; it goes on at the next `submit`. `release` gives the
    engine's accelerator memory to the trainer, `resume` takes it back before the next `load_weights`; an engine that
    holds none ignores both.

    **All ranks.** The program is the same on every rank: every rank calls every method in the same order with the same
    arguments. Groups come back on global rank 0 and `[]` on all other ranks. `pending` and every exception are the same
    on all ranks, so that no rank waits for one that has given up.

    **Groups.** A group is delivered once, whole (all `params.n` samples, in order of `sample`) or not at all. One
    `collect` returns what is finished, in submitted order; over several calls the order is that of completion. A
    rollout that the engine had to give up is in its group with `FinishReason.ABORT`: the caller decides what happens to
    the group, and never trains on it.

    **Weights.** Each rollout carries the `weight_version` under which its first token was sampled, and in
    `version_changes` where newer weights took over: versions are those of the sources given to `load_weights` (0 before
    the first). `logprobs` are those of the sampled distribution before top-p and
    top-k filtering; at temperature 0 they are taken at temperature 1.

    **Failures.** When a server dies, what it had not delivered is made again elsewhere, each sample exactly once; a
    server that comes back gets the current weights before it serves. When none is left within the engine's own time
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
        """Ask for `params.n` responses to each prompt. Returns at once.

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
        """Stop generating. What is unfinished stays pending with the tokens it has and goes on at the next `submit`
        (of no prompts, if there are none), under the weights of then."""
        ...

    def release(self) -> None:
        """Free the engine's accelerator memory until `resume`. What is pending must be suspended before."""
        ...

    def resume(self) -> None:
        """Take the memory back; `load_weights` must follow, since the engine may have given its weights up."""
        ...

    def load_weights(self, weights: WeightSource) -> None:
        """Serve these weights from now on, as `weights.version`.

        An engine that shares the trainer's weights does not read the source. One that has to send again, to a server
        that comes back while it waits in `collect`, reads it again.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to tell of the last step beside the rollouts, by metric name, since the last call. Global rank
        0; {} elsewhere."""
        ...

    def close(self) -> None:
        """Stop what the engine started. Safe to call twice."""
        ...
