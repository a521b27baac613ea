"""Model FLOPs of packs, counted from what they hold.

The forward pass of a pack (N: weights that a token goes through; T: tokens; pairs: of a query and a key that attend to
each other, of one layer; rows: tokens whose logits are computed; H: hidden size; V: vocabulary):

    2 N T  +  4 heads head_dim (sum of the layers' pairs)  +  2 rows H V

An update is three times that: the backward pass is two more products for each. Padding, embedding look-ups, norms and
softmaxes count nothing; of a mixture of experts the router and a token's own experts count; pairs that a mask hides
count nothing, and a shared prefix counts once. All are whole numbers, the sum over a complete pack: ranks that hold
parts of one pack count the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from asd_megatron.models.family import ModelShape
from asd_megatron.models.gpt import NO_RECOMPUTE, Recompute
from asd_megatron.records import ComputedPacks, PackCounts

UPDATE = 3  # forwards' worth of an update: the backward pass is two


@dataclass(frozen=True)
class FlopsModel:
    """What the matrix products of a model depend on.

    Attributes:
        body: weights of the linear layers that one token goes through, of all layers; embedding and head left out.
        heads, head_dim: of the attention's queries.
        windows: for each layer, the newest tokens that a token attends to, itself included; None: all.
        hidden, vocab: of the head.
        recomputed_body: those of `body` that an update computes forward once more, for activation recomputation.
        recomputed_windows: of the layers whose attention it does that with.
    """

    body: int
    heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    hidden: int
    vocab: int
    recomputed_body: int = 0
    recomputed_windows: tuple[int | None, ...] = ()


TOKENS = FlopsModel(body=1, heads=0, head_dim=0, windows=(), hidden=0, vocab=0)
"""Counts tokens alone: for packs of models whose shape does not matter."""


def attending_pairs(spans: Sequence[tuple[int, int]], window: int | None = None) -> int:
    """Pairs of a query and a key that attend to each other in one layer: the token at position p has p + 1 keys, or
    `window` if these are fewer. `spans`: of `PackCounts`.

    A sequence of 4 tokens has 1 + 2 + 3 + 4 pairs, with a window of 2 it has 1 + 2 + 2 + 2.
    """
    total = 0
    for start, length in spans:
        growing = length if window is None else min(max(window - start, 0), length)  # tokens before the window is full
        total += growing * start + growing * (growing + 1) // 2
        if window is not None:
            total += (length - growing) * window
    return total


def forward_flops(model: FlopsModel, counts: PackCounts) -> int:
    """The model FLOPs of one forward pass of a pack."""
    body, attention, head = _parts(model, counts)
    return body + attention + head


def _parts(model: FlopsModel, counts: PackCounts) -> tuple[int, int, int]:
    """The FLOPs of a forward pass by (linear layers, attention, head)."""
    return (
        2 * model.body * counts.tokens,
        _attention(model, counts, model.windows),
        2 * counts.rows * model.hidden * model.vocab,
    )


def _attention(model: FlopsModel, counts: PackCounts, windows: tuple[int | None, ...]) -> int:
    """The FLOPs of attention in layers with these windows: scores, and weighted sums of values."""
    pairs = sum(n * attending_pairs(counts.spans, window) for window, n in Counter(windows).items())
    return 4 * model.heads * model.head_dim * pairs


def step_flops(model: FlopsModel, packs: ComputedPacks, recomputed_heads: int = 0) -> tuple[int, int]:
    """(model FLOPs, the same with what is recomputed) of the passes over `packs`, complete packs. `recomputed_heads`:
    forward passes of the head that an update makes beside the first one."""
    useful = again = 0
    for counts in packs.scored:
        useful += forward_flops(model, counts)
    for counts in packs.trained:
        body, attention, head = _parts(model, counts)
        useful += UPDATE * (body + attention + head)
        again += 2 * model.recomputed_body * counts.tokens
        again += _attention(model, counts, model.recomputed_windows) + recomputed_heads * head
    return useful, useful + again


def computed_tokens(packs: ComputedPacks) -> int:
    """Tokens of all passes, without padding."""
    return sum(counts.tokens for counts in (*packs.scored, *packs.trained))


def flops_model(shape: ModelShape, recompute: Recompute = NO_RECOMPUTE, chunks: int = 1) -> FlopsModel:
    """The matrix products of a model of this shape in `chunks` equal chunks of layers: pipeline stages, virtual ones
    too."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden * (queries + 2 * keys) + queries * shape.hidden
    mlp = 3 * shape.hidden * shape.ffn
    if shape.experts is not None:
        router = shape.hidden * shape.experts.count
        mlp = router + shape.experts.per_token * 3 * shape.hidden * shape.experts.ffn
    windows = tuple(kind.window for kind in shape.attention)
    size = shape.layers // chunks
    again = [i for i in range(shape.layers) if recompute.layers is None or i % size < recompute.layers]
    body = 0
    if recompute.kind == "full":
        body = len(again) * (attention + mlp)
    elif recompute.kind == "mlp" and shape.experts is None:  # of experts the activation function alone
        body = shape.layers * mlp
    return FlopsModel(
        body=shape.layers * (attention + mlp),
        heads=shape.heads,
        head_dim=shape.head_dim,
        windows=windows,
        hidden=shape.hidden,
        vocab=shape.vocab,
        recomputed_body=body,
        recomputed_windows=tuple(windows[i] for i in again) if recompute.kind == "full" else (),
    )
