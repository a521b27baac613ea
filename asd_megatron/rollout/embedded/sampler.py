"""From logits to tokens as pure functions: sampling noise, filters, and the check for the end of a response."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.models.decoder import head_logprobs
from asd_megatron.records import SamplingParams

MOST_PROBABLE = 1024  # tokens that top-p sorts first; the complete vocabulary only if they do not reach top_p


def check_params(params: SamplingParams) -> None:
    """Raise UserError for sampling parameters outside their ranges."""
    bounds = [
        (params.temperature >= 0, "temperature", "0 (greedy) or more"),
        (0 < params.top_p <= 1, "top_p", "above 0 and at most 1 (1 switches it off)"),
        (params.top_k >= 0, "top_k", "0 (off) or more"),
        (params.max_new_tokens >= 1, "max_new_tokens", "1 or more"),
        (params.n >= 1, "n", "1 or more"),
        (all(params.stop), "stop", "a list of strings that are not empty"),
    ]
    for valid, name, expected in bounds:
        if not valid:
            raise UserError(f"sampling: {name} is {getattr(params, name)!r}; give {expected}")


def uniforms(seed: int, step: int, prompt_id: str, sample: int, count: int, start: int = 0) -> NDArray[np.float64]:
    """Uniform noise of response positions start:start+count, float64 [count] in [0, 1).

    A counter-based function of its arguments (Philox 4x64, keyed by a hash of the first four), so that any part of the
    sequence can be computed independently of what else is sampled. `start` is a multiple of 4, because one Philox
    counter yields four numbers; otherwise ValueError.
    """
    return noise([(seed, step, prompt_id, sample)], count, start)[0]


def noise(names: Sequence[tuple[int, int, str, int]], count: int, start: int = 0) -> NDArray[np.float64]:
    """`uniforms` of several (seed, step, prompt id, sample): [len(names), count]."""
    if start % 4:
        raise ValueError(f"start is {start}; it must be a multiple of 4")
    philox = np.random.Philox(0)
    generator, state = np.random.Generator(philox), philox.state
    out = np.empty((len(names), count))
    for row, (seed, step, prompt_id, sample) in zip(out, names, strict=True):
        name = f"{seed}\0{step}\0{sample}\0{prompt_id}".encode()
        key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype="<u8").astype(np.uint64)
        state["state"] = {"counter": np.array([start // 4, 0, 0, 0], np.uint64), "key": key}
        philox.state = state  # a tenth of the cost of a new generator
        generator.random(out=row)
    return out


def weights_of(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(z, exp(z), log(sum(exp(z))) [..., 1]) in float32 over the last dimension, where z = logits / temperature minus
    its maximum. Temperature 0 (greedy) counts as 1. log_softmax is the first minus the third."""
    logits = logits.float()
    if temperature not in (0.0, 1.0):
        logits = logits * (1.0 / temperature)
    # As the trainer's head. On a CPU, `log_softmax` rounds away the tail of a large vocabulary in few partial sums.
    shifted = logits - logits.amax(-1, keepdim=True)
    weights = shifted.exp()
    return shifted, weights, weights.sum(-1, keepdim=True).log_()


def filter_probabilities(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero the tokens that top-k, then top-p among those left, exclude; not renormalised. [B, V] -> [B, V].

    top-k keeps exactly k tokens (ties: lower id first). top-p keeps the smallest set of most probable tokens whose
    fraction of the total reaches top_p, the token that crosses it included, so at least one token stays.
    """
    vocabulary = probabilities.shape[-1]
    limited = 0 < top_k < vocabulary
    if not limited and top_p >= 1:
        return probabilities
    # Only values are sorted, and only as many as needed: sorting ids too would take a full stable sort.
    if limited:
        values = probabilities.topk(top_k).values
        total = values.sum(-1, keepdim=True)
    else:
        values = probabilities.topk(min(vocabulary, MOST_PROBABLE)).values
        total = probabilities.sum(-1, keepdim=True)
        if bool((values.sum(-1, keepdim=True) < top_p * total).any()):
            values = probabilities.sort(-1, descending=True).values
    kept = torch.full_like(total, values.shape[-1], dtype=torch.int64)
    if top_p < 1:
        before = values.cumsum(-1) - values
        kept = (before < top_p * total).sum(-1, keepdim=True).clamp_(min=1)
    cutoff = values.gather(-1, kept - 1)
    stays, ties = probabilities > cutoff, probabilities == cutoff
    ties &= ties.cumsum(-1) <= kept - stays.sum(-1, keepdim=True)
    return probabilities.where(stays | ties, 0)


def inverse_cdf(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds noise * total. Never a token of probability zero.

    probabilities float64 [B, V], not negative, not necessarily summing to 1; noise float64 [B] in [0, 1). Returns int64
    [B].
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    # noise * total may round up to the total, which no cumulative probability exceeds.
    threshold = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]


def draw(
    logits: Tensor, noise: Tensor | None, params: SamplingParams, head_columns: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token per row of logits [B, V] with noise float64 [B] (None only for temperature 0).

    Returns (tokens int64 [B], log-probs float32 [B], taken before top-k and top-p). `head_columns`: log-probs are the
    bits that the trainer's head computes where each of its ranks has so many tokens of the vocabulary; None: they may
    differ in the last ones, which saves a pass over the logits.
    """
    if head_columns is not None and logits.is_cuda:  # CUDA's cumulative sums add in any order
        tokens, _ = draw(logits.cpu(), None if noise is None else noise.cpu(), params)
        tokens = tokens.to(logits.device)
        return tokens, head_logprobs(logits, tokens, params.temperature, head_columns)
    shifted, weights, total = weights_of(logits, params.temperature)
    if params.temperature == 0 or noise is None:
        tokens = logits.argmax(-1)
    else:
        tokens = inverse_cdf(filter_probabilities(weights.double(), params.top_k, params.top_p), noise)
    # Non-finite logits may let the search run past the end; their log-prob is not finite either and is checked.
    tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    if head_columns is not None:
        return tokens, head_logprobs(logits, tokens, params.temperature, head_columns)
    return tokens, (shifted.gather(-1, tokens[:, None]) - total)[:, 0]


class StopCheck:
    """Decides which rows' newest token ends their response: an end token, or the one that completes a stop string.

    decode: token ids -> text, special tokens included; required for stop strings (UserError without). `tail`: tokens
    that a check needs, enough for the longest stop string at one byte each, plus CONTEXT.
    """

    CONTEXT = 4

    def __init__(
        self, stop_token_ids: Sequence[int], stop: Sequence[str], decode: Callable[[Sequence[int]], str] | None
    ) -> None:
        if stop and decode is None:
            raise UserError("sampling: stop strings need a tokenizer; give the engine one, or use stop_token_ids")
        self._ids = np.array(sorted(stop_token_ids), dtype=np.int64)
        self._strings = tuple(stop)
        self._decode = decode
        self.tail = max(len(s.encode()) for s in stop) + self.CONTEXT if stop else 1

    def __call__(self, responses: NDArray[np.int64]) -> NDArray[np.bool_]:
        """responses int64 [B, t], the last `tail` ids of each row (or all, if fewer), the newest last -> bool [B].

        Earlier tokens were checked when they were the newest.
        """
        ended = (responses[:, -1:] == self._ids).any(axis=1)
        if self._strings and self._decode is not None:
            for row in np.flatnonzero(~ended):
                text = self._decode(responses[row].tolist())
                ended[row] = any(s in text for s in self._strings)
        return ended
