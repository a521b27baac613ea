"""Seconds in which one rank computes: linear layers, attention, element-wise work, the head, the optimizer.

FLOPs are those of `models.flops`, divided over tensor- and context-parallel ranks. Two rates bound them:

    a matrix product [m, k] x [k, n]    2 m k n / (peak x matmul)  +  b (m k + k n + m n) / (bandwidth x memory)

The terms are added, not compared, because a product's first and last tiles read and write while nothing is multiplied.
That is where efficiency falls with small dimensions: on an H100 (593 TFLOP/s over 2.7 TB/s, bfloat16) the second term
is 221 / d of the first, where 1 / d = 1 / m + 1 / k + 1 / n. Of Qwen3-8B's MLP (16,384 tokens, 4,096 x 24,576) it is
8%; divided over 8 tensor-parallel ranks (n 3,072) it is 14%, and for an expert with 512 tokens (2,048 x 1,536) 68%.

Everything else (norms, rotations, activation functions, residuals) only reads and writes memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from asd_megatron.errors import UserError
from asd_megatron.planner.hardware import Accelerator
from asd_megatron.planner.loads import Load
from asd_megatron.planner.setting import BYTES, Setting
from asd_megatron.trainer.pass_plan import FP8_SPEEDUP

FLASH_BACKWARD = 2.5
"""Of attention's backward pass in forwards: five products for two, as scores are computed again (Dao 2023)."""
UNFUSED = 3.0
"""Bytes that PyTorch's operators move, one after another, over those of fused kernels: counted for RMSNorm (8 passes
over its input, not 2), rotation (10, not 4) and SwiGLU (8, not 3)."""
OPERATORS = {"te": 20, "local": 60}
"""Operators of a layer's forward pass: their launches."""
EXPERT_OPERATORS = {"te": 15, "local": 0}
LOCAL_EXPERT = 6  # operators of each expert, one after another, without grouped products
TILE = {True: 1 << 27, False: 1 << 23}
"""Logits of a tile of the head, with Transformer Engine (on GPUs) and without (`ops.head_tiles.default_block`)."""
HEAD_PASSES = {"score": 1.0, "policy": 2.5, "exact": 6.5}
"""Passes over a tile of logits beside its products (docs/head.md)."""
ADAM_BYTES = {"float32": 30.0, "bfloat16": 20.0}
"""Bytes that Adam moves for a parameter: gradient 4, master weight 4 + 4, moments 8 + 8, weight 2; in bfloat16 the
master weight's 16 bits 2 + 2, moments 4 + 4, gradient 4, weight 2 + 2."""
HOST_RATE = 25e9
"""Bytes/s of host memory for one rank: 200 GB/s of a node with 8."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one rank, by what they are spent on; idle: its waiting, for other stages (the pipeline's bubble) or
    for the busiest rank."""

    compute: float = 0.0
    memory: float = 0.0
    communication: float = 0.0
    idle: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.compute + other.compute,
            self.memory + other.memory,
            self.communication + other.communication,
            self.idle + other.idle,
        )

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.compute * factor, self.memory * factor, self.communication * factor, self.idle * factor)

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.communication + self.idle


ZERO = Cost()


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, ZERO)


@dataclass(frozen=True)
class Rates:
    """What a rank reaches. products: FLOP/s of the linear layers; head, attention: of those; memory: bytes/s; launch:
    seconds; width: bytes of a number."""

    products: float
    head: float
    attention: float
    memory: float
    launch: float
    width: int

    @classmethod
    def of(cls, gpu: Accelerator, dtype: str, *, fp8: bool = False) -> Rates:
        """Raises UserError for FP8 on a GPU without it."""
        if fp8 and gpu.fp8 is None:
            raise UserError(f"--gpu {gpu.name} has no FP8 products: set precision.fp8 none, or choose another GPU")
        peak, reached = gpu.bfloat16 if dtype == "bfloat16" else gpu.float32, gpu.efficiency
        return cls(
            products=peak * reached.matmul * (FP8_SPEEDUP if fp8 else 1.0),
            head=peak * reached.matmul,
            attention=peak * reached.attention,
            memory=gpu.memory_rate * reached.memory,
            launch=gpu.launch,
            width=BYTES[dtype],
        )

    def product(self, m: float, k: float, n: float, count: float = 1.0) -> Cost:
        """Of a product [m, k] x [k, n] whose m rows come in `count` parts, so that its weight is read as often."""
        moved = self.width * (m * k + count * k * n + m * n)
        return Cost(2.0 * m * k * n / self.products, moved / self.memory)

    def weight_gradient(self, m: float, k: float, n: float, count: float = 1.0, *, fused: bool) -> Cost:
        """Of the gradient [k, n] over m rows, added to float32 numbers in each of `count` parts: by the product itself,
        or after it has been written in the model's dtype."""
        moved = self.width * m * (k + n) + count * k * n * (8 if fused else 8 + 2 * self.width)
        return Cost(2.0 * m * k * n / self.products, moved / self.memory)

    def stream(self, size: float) -> Cost:
        return Cost(memory=size / self.memory)

    def operators(self, count: float) -> Cost:
        """Launches of `count` operators."""
        return Cost(memory=count * self.launch)


# ---------------------------------------------------------------- one layer

Product = tuple[float, float, float, float]  # m, k, n, parts


def attention_products(setting: Setting, load: Load) -> list[Product]:
    """The linear layers around attention, of one layer and rank."""
    shape, layout = setting.shape, setting.training.layout
    tokens = load.tokens / layout.context
    queries, keys = (n * shape.head_dim / layout.tensor for n in (shape.heads, shape.kv_heads))
    return [
        (tokens, shape.hidden, queries + 2 * keys, load.packs),
        (tokens, queries, shape.hidden, load.packs),
    ]


def mlp_products(setting: Setting, load: Load) -> list[Product]:
    """Of the MLP, or of the router and the rank's experts: of `per_token` x tokens rows, each expert has its part."""
    shape, layout = setting.shape, setting.training.layout
    tokens = load.tokens / layout.context
    if shape.experts is None:
        ffn = shape.ffn / layout.tensor
        return [(tokens, shape.hidden, 2 * ffn, load.packs), (tokens, ffn, shape.hidden, load.packs)]
    experts = shape.experts
    own = tokens / _token_parts(setting)
    rows = own * experts.per_token * (setting.training.expert_load if layout.expert > 1 else 1.0)
    weights = load.packs * experts.count / layout.expert  # matrices that are read, each with few rows
    return [
        (own, shape.hidden, experts.count, load.packs),
        (rows, shape.hidden, 2 * experts.ffn, weights),
        (rows, experts.ffn, shape.hidden, weights),
    ]


def _token_parts(setting: Setting) -> int:
    """Over how many ranks the tokens between the layers are divided, beside context parallelism."""
    layout = setting.training.layout
    return layout.tensor if layout.sequence_parallel else 1


def _attention_core(setting: Setting, load: Load, rates: Rates) -> Cost:
    """Scores and weighted sums: 4 heads head_dim FLOPs for each pair. Local layers gather all keys under context
    parallelism and mask the pairs that do not attend, about as many as do."""
    shape, layout = setting.shape, setting.training.layout
    flops = 4.0 * shape.heads * shape.head_dim * load.pairs / (layout.tensor * layout.context)
    masked = setting.training.layers == "local" and layout.context > 1
    return Cost(compute=flops * (2.0 if masked else 1.0) / rates.attention)


def _attention_bytes(setting: Setting, load: Load, rates: Rates) -> float:
    """Of one norm and residual (5 H), rotation of queries and keys, and their norms. Under context parallelism each
    block of keys but the first has an output that is added to the one before in float32: a read of both, a write."""
    shape, layout = setting.shape, setting.training.layout
    tokens = load.tokens / layout.context
    rotated = (shape.heads + shape.kv_heads) * shape.head_dim / layout.tensor
    numbers = 5.0 * shape.hidden / _token_parts(setting) + rotated * (2 if shape.qk_norm == "none" else 4)
    added = 0.0
    if setting.training.layers == "te":
        added = (layout.context - 1) * tokens * shape.heads * shape.head_dim / layout.tensor * (8.0 + rates.width)
    return tokens * numbers * rates.width * _passes(setting) + added


def _mlp_bytes(setting: Setting, load: Load, rates: Rates) -> float:
    """Of the other norm and residual, and of SwiGLU: reads two, writes one. Experts' tokens are permuted and back."""
    shape, layout = setting.shape, setting.training.layout
    tokens = load.tokens / layout.context
    own = tokens / _token_parts(setting)
    if shape.experts is None:
        inner = tokens * 3.0 * shape.ffn / layout.tensor
    else:
        inner = own * shape.experts.per_token * (3.0 * shape.experts.ffn + 6.0 * shape.hidden)
    return (own * 5.0 * shape.hidden + inner) * rates.width * _passes(setting)


def _passes(setting: Setting) -> float:
    return UNFUSED if setting.training.layers == "local" else 1.0


def _launches(setting: Setting, load: Load) -> float:
    layers, experts = setting.training.layers, setting.shape.experts
    count = float(OPERATORS[layers])
    if experts is not None:
        count += EXPERT_OPERATORS[layers]
        count += LOCAL_EXPERT * experts.count / setting.training.layout.expert if layers == "local" else 0
    return count * load.packs


def layer_forward(setting: Setting, load: Load, rates: Rates) -> Cost:
    """One layer's forward pass of these packs."""
    moved = _attention_bytes(setting, load, rates) + _mlp_bytes(setting, load, rates)
    return (
        total(rates.product(*p) for p in (*attention_products(setting, load), *mlp_products(setting, load)))
        + _attention_core(setting, load, rates)
        + rates.stream(moved)
        + rates.operators(_launches(setting, load))
    )


def layer_backward(setting: Setting, load: Load, rates: Rates) -> Cost:
    """One layer's backward pass: two products for each of the forward's, twice the element-wise bytes."""
    fused = setting.training.layers == "te"
    moved = _attention_bytes(setting, load, rates) + _mlp_bytes(setting, load, rates)
    cost = _attention_core(setting, load, rates) * FLASH_BACKWARD + rates.stream(2 * moved)
    for m, k, n, parts in (*attention_products(setting, load), *mlp_products(setting, load)):
        cost += rates.product(m, n, k, parts) + rates.weight_gradient(m, k, n, parts, fused=fused)
    return cost + rates.operators(2 * _launches(setting, load))


def layer_recompute(setting: Setting, load: Load, rates: Rates) -> Cost:
    """What a layer's backward pass computes forward again, mean of the stage's layers."""
    training, shape = setting.training, setting.shape
    kind, layers = training.recompute.kind, training.recompute.layers
    if kind == "none":
        return ZERO
    if kind == "mlp":
        again = ZERO if shape.experts is not None else total(rates.product(*p) for p in mlp_products(setting, load))
        return again + rates.stream(_mlp_bytes(setting, load, rates))
    of_stage = shape.layers // (training.layout.pipeline * (training.layout.virtual_pipeline or 1))
    return layer_forward(setting, load, rates) * (1.0 if layers is None else min(layers / of_stage, 1.0))


# ---------------------------------------------------------------- head and optimizer


def head_tiles(setting: Setting, load: Load) -> float:
    """Tiles of logits of all packs."""
    vocab = setting.shape.vocab / setting.training.layout.tensor
    rows = max(256.0, TILE[setting.training.layers == "te"] / vocab)
    return max(load.rows / setting.training.layout.context / rows, load.packs)


def head(setting: Setting, load: Load, rates: Rates, *, update: bool) -> Cost:
    """The head of these packs' rows: 2 R H V FLOPs to score; 6 to update, 8 with a second forward product or with the
    teacher's logits; passes over the float32 logits, and over the float32 gradient of the weight once a tile."""
    shape, layout, work = setting.shape, setting.training.layout, setting.workload
    rows, vocab = load.rows / layout.context, shape.vocab / layout.tensor
    products = 3 + work.recomputed_head + work.exact if update else 1
    passes = HEAD_PASSES["score" if not update else "exact" if work.exact else "policy"] + products
    tiles = head_tiles(setting, load)
    moved = 4.0 * rows * vocab * passes + tiles * shape.hidden * vocab * rates.width * products
    if update:
        moved += 8.0 * tiles * shape.hidden * vocab
    return Cost(2.0 * products * rows * shape.hidden * vocab / rates.head, moved / rates.memory)


def optimizer_step(setting: Setting, parameters: float, ranks: float) -> Cost:
    """One step over `parameters` of this rank, whose state is divided over `ranks`. Gradients are zeroed (4 bytes a
    parameter, all of them), their norm is computed and they are scaled (12 bytes of the own part).

    Qwen3-8B on 8 data-parallel H100s: 8.19e9 x (4 + 42 / 8) bytes / 2.68 TB/s = 28 ms.
    """
    training = setting.training
    rates = Rates.of(setting.gpu, training.dtype)
    own = parameters / ranks
    cost = rates.stream(4.0 * parameters + 12.0 * own)
    if training.offload == "host":  # gradients down, weights up, Adam beside them
        link = own * 6.0 / setting.gpu.host_link
        return cost + Cost(communication=link, memory=max(own * ADAM_BYTES["float32"] / HOST_RATE - link, 0.0))
    return cost + rates.stream(own * ADAM_BYTES[training.moments])
