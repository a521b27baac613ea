"""Model FLOPs of packs, counted from what they hold, and the peak rates of GPUs that they are compared with.

The forward pass of a pack (N: weights that a token goes through; T: tokens; pairs: of a query and a key that attend to
each other, of one layer; rows: tokens whose logits are computed; H: hidden size; V: vocabulary):

    2 N T  +  4 heads head_dim (sum of the layers' pairs)  +  2 rows H V

An update is three times that: the backward pass is two more products for each. Padding, embedding look-ups, norms and
softmaxes count nothing; of a mixture of experts the router and a token's own experts count; pairs that a mask hides
count nothing, and a shared prefix counts once. All are whole numbers, the sum over a complete pack: ranks that hold
parts of one pack count the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


# ---------------------------------------------------------------- peak rates

TERA = 1e12
# Dense rates (without sparsity) of the vendor's data sheets in TFLOP/s: of bfloat16, and of FP8 where there is any. The
# first pattern that is found in the device's name decides.
PEAKS: tuple[tuple[str, float, float | None], ...] = (
    (r"\bH[128]00.*\bNVL\b", 835.0, 1671.0),
    (r"\bH[18]00.*\bPCIe\b", 756.0, 1513.0),
    (r"\bG?H[128]00\b", 989.0, 1979.0),
    (r"\bH20\b", 148.0, 296.0),
    (r"\bA[18]00\b", 312.0, None),
    (r"\bL40S\b", 362.0, 733.0),
    (r"\bB200\b", 2250.0, 4500.0),
)


def peak_flops(device: str, arithmetic: str) -> float | None:
    """FLOP/s of a GPU by its name in `bfloat16` or `fp8`, at its highest clock; None for names that are not known, for
    parts of a GPU (MIG) and for other arithmetic, or what it does not have."""
    if "MIG" in device or arithmetic not in ("bfloat16", "fp8"):
        return None
    for pattern, bfloat16, fp8 in PEAKS:
        if re.search(pattern, device):
            rate = bfloat16 if arithmetic == "bfloat16" else fp8
            return None if rate is None else rate * TERA
    return None


# ---------------------------------------------------------------- metrics

MODEL_PHASES = ("teacher", "student", "reference", "update")
"""The phases of a step whose packs are counted."""
WAITING_PHASES = ("rollout", "reward", "weight_sync")


def rates(
    *,
    model_flops: float,
    hardware_flops: float,
    tokens: float,
    times: Mapping[str, float],
    gpus: int,
    peak: float | None,
) -> dict[str, float]:
    """Metrics `perf/*` of a step. FLOPs and tokens are those of all ranks; `times` are seconds by phase, with `total`;
    `peak` is one GPU's in FLOP/s, None: not known."""
    found: dict[str, float] = {}
    seconds = sum(times.get(phase, 0.0) for phase in MODEL_PHASES)
    if seconds > 0:
        found["perf/tflops_per_gpu"] = model_flops / seconds / gpus / TERA
        found["perf/tokens_per_second_per_gpu"] = tokens / seconds / gpus
        if peak is not None:
            found["perf/mfu"] = model_flops / (seconds * gpus * peak)
            found["perf/hfu"] = hardware_flops / (seconds * gpus * peak)
    if times.get("total", 0.0) > 0 and "rollout" in times:
        found["perf/idle_fraction"] = sum(times.get(phase, 0.0) for phase in WAITING_PHASES) / times["total"]
    return found
