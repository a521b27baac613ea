"""The embedded rollout engine: samples on the training model itself."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from asd_megatron.data.tokenizer import decode
from asd_megatron.distributed import activity
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.distributed.objects import gather_objects
from asd_megatron.errors import NotFinite, UserError
from asd_megatron.models.port import ModelPort
from asd_megatron.records import FinishReason, Group, Prompt, Rollout, SamplingParams, as_array
from asd_megatron.rollout.embedded.cache import KVCache
from asd_megatron.rollout.embedded.sampler import StopCheck, check_params, draw, noise
from asd_megatron.rollout.engine import RolloutError, WeightSource, check_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFILL_TOKENS = 16384  # most padded prompt tokens of one prefill forward: bounds its activations, not the batch
PREFIX_TOKENS = 256  # fewest tokens saved for which the prefix common to all prompts of a batch is computed separately
CACHE_BLOCK = 256  # decoded tokens of a row by which the cache grows
NOISE_BLOCK = 64  # positions of noise drawn at once; a multiple of 4

# The state of a row after a forward; the last two end the sampling of all rows.
RUNNING, FINISHED, NON_FINITE, LATE = range(4)
FAILURES = {
    NON_FINITE: "the model returned non-finite numbers while sampling: the weights are broken (a diverged update, or a "
    "wrong checkpoint); resume from an earlier checkpoint with a lower learning rate",
    LATE: "sampling did not finish in time: raise rollout.collect_timeout, or lower sampling.max_response_tokens",
}


@dataclass(frozen=True)
class GroupSlice:
    """Part of a group: samples first:first+samples of the submission's prompt number `prompt`."""

    prompt: int
    first: int
    samples: int


@dataclass(frozen=True)
class SampledResponse:
    """One finished row of a batch, as it is sent to global rank 0."""

    prompt: int
    sample: int
    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    reason: FinishReason
    text: str


@dataclass
class SamplingStats:
    """Counts of the last `collect` on this rank's model-parallel group."""

    prompt_tokens: int = 0  # without padding; each group's prompt once
    forwards: int = 0  # one-token forwards
    rows: int = 0  # batch rows, summed over those forwards


@dataclass(frozen=True)
class _Submission:
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    step: int

    def noise_names(self) -> list[str]:
        """The prompt ids, numbered where one occurs again (`p7`, `p7#1`): otherwise its samples would repeat the first
        ones."""
        seen: Counter[str] = Counter()
        names = []
        for prompt in self.prompts:
            name = prompt.problem.prompt_id
            names.append(f"{name}#{seen[name]}" if seen[name] else name)
            seen[name] += 1
        return names


class EmbeddedEngine:
    """`RolloutEngine` on the training model: no second copy of the weights, no weight sync.

    Groups are distributed over data-parallel ranks and sampled in batches of at most `max_batch_size` rows. The first
    tensor-parallel rank of the last pipeline stage draws the tokens and broadcasts them over the model-parallel group.
    The noise of a token is a function of (seed, step, prompt, sample, position) alone: samples depend on neither the
    layout nor the batch (up to ties in floating point).

    tokenizer: a Hugging Face tokenizer, for stop strings and `Rollout.text`; None leaves the text empty and refuses
    stop strings. Sampling happens inside `collect`, on the weights that the model has then. Raises UserError for
    virtual pipeline stages and context parallelism.
    """

    def __init__(
        self,
        port: ModelPort,
        process_groups: ProcessGroups,
        tokenizer: PreTrainedTokenizerBase | None,
        seed: int,
        max_batch_size: int = 256,
    ) -> None:
        if len(port.chunks) > 1:
            raise UserError(
                "the embedded rollout engine cannot sample with virtual pipeline stages: set "
                "parallelism.virtual_pipeline to null"
            )
        if process_groups.cp.size() > 1:
            raise UserError(
                "the embedded rollout engine cannot sample with context parallelism: its cache holds each sequence on "
                "one rank; set parallelism.context to 1"
            )
        if max_batch_size < 1:
            raise UserError(f"rollout.max_batch_size is {max_batch_size}; give 1 or more")
        self.stats = SamplingStats()
        self._port = port
        self._process_groups = process_groups
        self._tokenizer = tokenizer
        self._seed = seed
        self._max_batch_size = max_batch_size
        self._version = 0
        self._queue: list[_Submission] = []
        self._draws = port.is_last_stage and process_groups.tp.rank() == 0

    @property
    def weight_version(self) -> int:
        return self._version

    @property
    def pending(self) -> int:
        return sum(len(s.prompts) for s in self._queue)

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> None:
        check_params(params)
        StopCheck((), params.stop, _decoder(self._tokenizer))
        check_lengths(prompts, params, self._port.max_positions)
        if prompts:
            self._queue.append(_Submission(tuple(prompts), params, step))

    def collect(self, timeout: float) -> list[Group]:
        if not self._queue:
            return []
        submission = self._queue.pop(0)
        self.stats = SamplingStats()
        with torch.no_grad(), self._port.sampling():
            responses, outcome = self._sample(submission, time.monotonic() + timeout)
        status = torch.tensor([outcome])  # on the host group: ranks finish as far apart as their longest responses
        dist.all_reduce(status, op=dist.ReduceOp.MAX, group=self._process_groups.host)
        if (failure := int(status)) in FAILURES:
            self.abort()
            raise NotFinite(FAILURES[failure]) if failure == NON_FINITE else RolloutError(FAILURES[failure])
        return self._deliver(submission, responses)

    def abort(self) -> None:
        self._queue.clear()

    def suspend(self) -> None:
        """Nothing is generated outside `collect`."""

    def release(self) -> None:
        """Nothing to free: the cache lives only inside `collect`."""

    def resume(self) -> None:
        """Nothing was freed."""

    def load_weights(self, weights: WeightSource) -> None:
        """Record the version. The source is not read: the weights are the trainer's own. Raises ValueError for an older
        version."""
        if weights.version < self._version:
            raise ValueError(f"weight version {weights.version} after {self._version}: versions never decrease")
        self._version = weights.version

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.abort()

    def _sample(self, submission: _Submission, deadline: float) -> tuple[list[SampledResponse], int]:
        """Sample this data-parallel rank's groups; returns (responses, on the rank that draws; outcome)."""
        replica, replicas = self._process_groups.dp.rank(), self._process_groups.dp.size()
        lengths = [len(prompt.ids) for prompt in submission.prompts]
        mine = sorted(range(replica, len(lengths), replicas), key=lambda i: lengths[i])
        responses: list[SampledResponse] = []
        for chunk in plan_chunks(mine, submission.params.n, self._max_batch_size):
            rows, outcome = self._sample_chunk(submission, chunk, deadline)
            if outcome in FAILURES:
                return [], outcome
            if rows is not None:
                responses += rows.responses()
        return responses, FINISHED

    def _sample_chunk(
        self, submission: _Submission, chunk: Sequence[GroupSlice], deadline: float
    ) -> tuple[_Rows | None, int]:
        device = self._port.device
        exact = torch.are_deterministic_algorithms_enabled()
        columns = self._port.padded_vocab_size // self._port.layout.tensor if exact else None
        rows = _Rows(self._seed, submission, chunk, self._tokenizer, columns) if self._draws else None
        prompts = [submission.prompts[part.prompt].ids for part in chunk]
        new = submission.params.max_new_tokens
        cache = KVCache(len(prompts), max(len(ids) for ids in prompts), block=min(new, CACHE_BLOCK))
        logits = self._prefill(prompts, cache)
        # From one row for each prompt to one for each sample.
        repeat = torch.repeat_interleave(torch.arange(len(chunk)), torch.tensor([part.samples for part in chunk]))
        cache.expand(repeat)
        logits = logits[repeat.to(device)] if logits is not None else None
        positions = cache.lengths.to(device)
        for _ in range(new):
            if rows is not None:
                assert logits is not None
                control = rows.draw(logits)
                if time.monotonic() > deadline:
                    control[1] = LATE
            else:
                control = torch.empty(2, cache.rows, dtype=torch.int64)
            tokens, state = self._share(control)
            if (outcome := int(state.max(initial=RUNNING))) in FAILURES:
                return None, outcome
            if outcome == FINISHED:
                kept = np.flatnonzero(state == RUNNING)
                if rows is not None:
                    rows.keep(kept)
                if len(kept) == 0:
                    break
                indices = torch.from_numpy(kept)
                cache.keep(indices)
                tokens, positions = tokens[indices.to(device)], positions[indices.to(device)]
            cache.decode()
            logits = self._forward(tokens[:, None], positions[:, None], cache)
            positions = positions + 1
            self.stats.forwards += 1
            self.stats.rows += cache.rows
        return rows, FINISHED

    def _prefill(self, prompts: list[tuple[int, ...]], cache: KVCache) -> Tensor | None:
        """Compute the prompts' keys and values; logits after each prompt [prompts, vocab] on the last stage.

        `prompts` are sorted by length. If they have a long enough common prefix, it is computed once, as one row, and
        the rest of every prompt afterwards. Forwards are limited to PREFILL_TOKENS padded tokens.
        """
        lengths = torch.tensor([len(ids) for ids in prompts])
        shared = min(len(os.path.commonprefix(prompts)), len(prompts[0]) - 1)
        if shared * (len(prompts) - 1) >= PREFIX_TOKENS:
            cache.prefix(shared)
            self._forward_prompts([prompts[0][:shared]], 0, cache)
        else:
            shared = 0
        found: list[Tensor] = []
        start = 0
        while start < len(prompts):
            stop = start + 1
            while stop < len(prompts) and (stop + 1 - start) * (int(lengths[stop]) - shared) <= PREFILL_TOKENS:
                stop += 1
            cache.prefill(start, lengths[start:stop])
            logits = self._forward_prompts([ids[shared:] for ids in prompts[start:stop]], shared, cache)
            if logits is not None:
                found.append(logits)
            start = stop
        self.stats.prompt_tokens += int(lengths.sum())
        return torch.cat(found) if found else None

    def _forward_prompts(self, prompts: Sequence[Sequence[int]], begin: int, cache: KVCache) -> Tensor | None:
        """One forward of right-padded prompts, or of their parts from position `begin` on; the last is the longest."""
        ids = torch.zeros(len(prompts), len(prompts[-1]), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        positions = torch.arange(begin, begin + ids.shape[1]).expand(ids.shape)
        return self._forward(ids.to(self._port.device), positions.to(self._port.device), cache)

    def _forward(self, input_ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor | None:
        activity.mark()
        logits = self._port.decode(input_ids, positions, cache)
        return logits[:, -1] if logits is not None else None

    def _share(self, control: Tensor) -> tuple[Tensor, NDArray[np.int64]]:
        """The drawing rank's `control` [2, B] on every rank of the model-parallel group: (tokens, on the device;
        states, on the host)."""
        tp, pp = self._process_groups.tp, self._process_groups.pp
        if tp.size() * pp.size() > 1:
            control = control.to(self._port.device)
            if tp.size() > 1 and self._port.is_last_stage:
                dist.broadcast(control, group=tp, group_src=0)
            if pp.size() > 1:
                dist.broadcast(control, group=pp, group_src=pp.size() - 1)
        return control[0].to(self._port.device), control[1].cpu().numpy()

    def _deliver(self, submission: _Submission, responses: list[SampledResponse]) -> list[Group]:
        """All ranks' responses as complete groups in submitted order, on global rank 0; [] elsewhere."""
        gathered = gather_objects(responses, 0, self._process_groups.host)
        if gathered is None:
            return []
        rollouts: list[list[Rollout]] = [[] for _ in submission.prompts]
        for r in sorted((r for part in gathered for r in part), key=lambda r: (r.prompt, r.sample)):
            prompt = submission.prompts[r.prompt]
            rollouts[r.prompt].append(
                Rollout(
                    prompt_id=prompt.problem.prompt_id,
                    sample=r.sample,
                    prompt_ids=as_array(prompt.ids, "int32"),
                    response_ids=as_array(r.ids, "int32"),
                    logprobs=r.logprobs,
                    finish_reason=r.reason,
                    weight_version=self._version,
                    text=r.text,
                )
            )
        return [Group(p.problem, tuple(rs)) for p, rs in zip(submission.prompts, rollouts, strict=True)]


class _Rows:
    """The unfinished responses of a batch, on the rank that draws."""

    def __init__(
        self,
        seed: int,
        submission: _Submission,
        chunk: Sequence[GroupSlice],
        tokenizer: PreTrainedTokenizerBase | None,
        head_columns: int | None,
    ) -> None:
        self._tokenizer, self._head_columns = tokenizer, head_columns
        self._params = submission.params
        names = submission.noise_names()
        self._rows = [(p.prompt, sample) for p in chunk for sample in range(p.first, p.first + p.samples)]
        self._keys = [(seed, submission.step, names[index], sample) for index, sample in self._rows]
        self._stops = StopCheck(self._params.stop_token_ids, self._params.stop, _decoder(tokenizer))
        shape = (len(self._rows), self._params.max_new_tokens)
        self._ids = np.zeros(shape, dtype=np.int64)
        self._logprobs = np.zeros(shape, dtype=np.float32)
        self._noise = np.zeros((len(self._rows), NOISE_BLOCK))
        self._length = np.zeros(len(self._rows), dtype=np.int64)
        self._reason = [FinishReason.LENGTH] * len(self._rows)
        self._alive = np.arange(len(self._rows))  # which of `_rows` each row of the shrinking batch is
        self._position = 0  # of the next token

    def draw(self, logits: Tensor) -> Tensor:
        """Draw the next token of every row of the batch: int64 [2, B] on the host, tokens and states."""
        at, alive = self._position, self._alive
        tokens, logprobs = draw(logits, self._noise_at(at, logits.device), self._params, self._head_columns)
        ids, values = tokens.cpu().numpy(), logprobs.cpu().numpy()
        self._ids[alive, at], self._logprobs[alive, at] = ids, values
        self._position = at + 1
        self._length[alive] = at + 1
        tail = self._stops.tail
        ended = self._stops(ids[:, None] if tail == 1 else self._ids[alive, max(0, at + 1 - tail) : at + 1])
        for row in alive[ended]:
            self._reason[row] = FinishReason.STOP
        control = np.empty((2, len(alive)), dtype=np.int64)
        control[0], control[1] = ids, np.where(ended, FINISHED, RUNNING)
        if at + 1 == self._params.max_new_tokens:
            control[1] = FINISHED
        if not np.isfinite(values).all():
            control[1] = NON_FINITE
        return torch.from_numpy(control)

    def keep(self, indices: NDArray[np.int64]) -> None:
        self._alive = self._alive[indices]

    def responses(self) -> list[SampledResponse]:
        found = []
        for row, (prompt, sample) in enumerate(self._rows):
            ids, logprobs = self._ids[row, : self._length[row]], self._logprobs[row, : self._length[row]]
            found.append(SampledResponse(prompt, sample, ids, logprobs, self._reason[row], self._text(ids)))
        return found

    def _text(self, ids: NDArray[np.int64]) -> str:
        return "" if self._tokenizer is None else decode(self._tokenizer, ids.tolist())

    def _noise_at(self, position: int, device: torch.device) -> Tensor | None:
        if self._params.temperature == 0:
            return None
        if position % NOISE_BLOCK == 0:
            self._noise[self._alive] = noise([self._keys[row] for row in self._alive], NOISE_BLOCK, position)
        return torch.from_numpy(self._noise[self._alive, position % NOISE_BLOCK]).to(device)


def _decoder(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Sequence[int]], str] | None:
    """Ids to text with special tokens, for stop strings."""
    return None if tokenizer is None else lambda ids: decode(tokenizer, ids, skip_special_tokens=False)


def plan_chunks(indices: Sequence[int], n: int, max_rows: int) -> list[list[GroupSlice]]:
    """Batches of at most max_rows rows made of complete groups; a group larger than that is split into batches of its
    own. 3 groups of 4 with 8 rows: [0, 1], [2]; with 3 rows: each group 3 samples, then 1."""
    if n > max_rows:
        return [[GroupSlice(i, first, min(max_rows, n - first))] for i in indices for first in range(0, n, max_rows)]
    per_chunk = max_rows // n
    return [[GroupSlice(i, 0, n) for i in indices[at : at + per_chunk]] for at in range(0, len(indices), per_chunk)]
