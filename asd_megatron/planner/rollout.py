"""Seconds in which the servers generate a step's rollouts.

A decode step of a batch (Pope et al. 2022, "Efficiently scaling transformer inference") reads the weights and the
batch's keys and values, or is bound by its products:

    max(bytes of weights and cache / memory rate, FLOPs / product rate) + launches + tensor parallelism's all-reduces

Qwen3-8B on one H100, 32 responses of 4,096 tokens: 15.1 GB of weights and 19.3 GB of cache over 2.68 TB/s are 12.9 ms
(the products take 1.0 ms meanwhile), launches 1.1 ms, the server's own work 0.2 ms: 14.1 ms for 32 tokens.

Responses end at different lengths, so the batch shrinks, and the step ends with the longest response. `generate` goes
from one end to the next over the quantiles of the length distribution. Between two of them the batch is the same and
its context grows evenly, so the seconds are those of the middle: this integrates the step time over the survival
function of the lengths, exactly for these quantiles.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from asd_megatron.planner import lengths
from asd_megatron.planner.communication import Group, all_reduce
from asd_megatron.planner.compute import Cost, Rates
from asd_megatron.planner.memory import kv_tokens
from asd_megatron.planner.setting import Setting

KERNELS = 10
"""Kernels of a layer in a decode step, each with a launch's seconds beside its bytes, in a CUDA graph too."""
ALL_REDUCE_HOPS = 2
"""Messages, one after another, of an all-reduce of little data: every rank reads from all others at once."""
SCHEDULE_SECONDS = 2e-4
"""Of a server for each decode step, beside the model: sampling and what its overlap scheduler does not hide."""
EMBEDDED_OPERATORS = 100
"""Operators of a layer and token of the embedded engine, with the host's round trips in terms of operators: 1 ms at 10
us each, 30 to 40 ms a token for models of 28 to 36 layers."""
EMBEDDED_LAUNCH = 1e-5  # of a GPU's operator that Python starts
GOLDEN = (math.sqrt(5) - 1) / 2
TAIL = 0.1  # fraction of the responses


@dataclass(frozen=True)
class Engine:
    """What a decode step of one server costs, on each of its GPUs.

    Attributes:
        weights: bytes read whatever the batch. experts, count, per_token: bytes of all experts, how many a layer has,
            and how many a token is sent to.
        cache: bytes that a token of the context has in one layer. windows: of the layers, and how many have each.
        token_flops, pair_flops: of a token, and of one token of its context in one layer.
        exchange, latency: seconds of the ranks' all-reduces, for each response of the batch and of a step without any.
        launches: seconds a step beside all of these.
    """

    rates: Rates
    weights: float
    experts: float
    count: int
    per_token: int
    cache: float
    windows: tuple[tuple[int | None, int], ...]
    token_flops: float
    pair_flops: float
    exchange: float
    latency: float
    launches: float

    def step(self, batch: float, context: float) -> Cost:
        """Seconds of one decode step of `batch` responses that have `context` tokens in the mean, prompts included."""
        attended = sum(n * (context if w is None else min(context, w)) for w, n in self.windows) * batch
        moved = self.weights + self.experts * touched(batch, self.per_token, self.count) + attended * self.cache
        compute = batch * self.token_flops / self.rates.products + attended * self.pair_flops / self.rates.attention
        memory = moved / self.rates.memory
        exchanged = batch * self.exchange + self.latency
        if compute > memory:
            return Cost(compute=compute, memory=self.launches, communication=exchanged)
        return Cost(memory=memory + self.launches, communication=exchanged)

    def prefill(self, tokens: float) -> Cost:
        return Cost(compute=tokens * self.token_flops / self.rates.products)


def touched(batch: float, per_token: int, count: int) -> float:
    """The fraction of a layer's experts that at least one of `batch` tokens is sent to, if routing is even:
    1 - (1 - k / E)^batch. 8 of 128 experts: 6% of them for one token, 87% for 32, all for 256."""
    return 1.0 - (1.0 - per_token / count) ** batch if count else 0.0


def sglang_engine(setting: Setting) -> Engine:
    """A server of SGLang with `serving.tensor_parallel` GPUs. FP8 holds layers in 1 byte a weight; key heads are
    repeated where there are more ranks."""
    serving, gpu = setting.serving, setting.gpu
    ranks = serving.tensor_parallel
    group = Group.of(gpu, ranks)
    launches = SCHEDULE_SECONDS + KERNELS * setting.shape.layers * gpu.launch
    return _engine(setting, ranks, group, fp8=serving.fp8, launches=launches)


def embedded_engine(setting: Setting) -> Engine:
    """The training model itself on each model-parallel group: stage after stage, one operator after another."""
    layout, gpu = setting.training.layout, setting.gpu
    group = Group.of(gpu, layout.tensor)
    launches = EMBEDDED_OPERATORS * setting.shape.layers * max(gpu.launch, EMBEDDED_LAUNCH)
    return _engine(setting, layout.tensor, group, fp8=False, launches=launches)


def _engine(setting: Setting, ranks: int, group: Group, *, fp8: bool, launches: float) -> Engine:
    shape = setting.shape
    rates = Rates.of(setting.gpu, setting.training.dtype, fp8=fp8)
    body, width = 1 if fp8 else rates.width, rates.width
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.layers * shape.hidden * (2 * queries + 2 * keys * max(1.0, ranks / shape.kv_heads))
    head = shape.hidden * shape.vocab
    hop = setting.gpu.node_latency if group.nodes == 1 else setting.gpu.network_latency
    if shape.experts is None:
        dense, experts, active, count, per_token = 3 * shape.layers * shape.hidden * shape.ffn, 0, 0, 0, 0
    else:
        one = 3 * shape.layers * shape.hidden * shape.experts.ffn
        count, per_token = shape.experts.count, shape.experts.per_token
        dense, experts, active = shape.layers * shape.hidden * count, one * count, one * per_token
    return Engine(
        rates=rates,
        weights=((attention + dense) * body + head * width) / ranks,
        experts=float(experts * body / ranks),
        count=count,
        per_token=per_token,
        cache=2.0 * shape.head_dim * width * shape.kv_heads / min(ranks, shape.kv_heads),
        windows=tuple(Counter(kind.window for kind in shape.attention).items()),
        token_flops=2.0 * (attention + dense + active + head) / ranks,
        pair_flops=4.0 * queries / ranks,
        # Two all-reduces a layer.
        exchange=2 * shape.layers * all_reduce(setting.gpu, group, shape.hidden * width, times=0),
        latency=2 * shape.layers * ALL_REDUCE_HOPS * hop if ranks > 1 else 0.0,
        launches=launches,
    )


@dataclass(frozen=True)
class Generation:
    """A step's rollouts.

    Attributes:
        cost: seconds of the slowest server by what they are spent on.
        tokens: response tokens of all servers.
        batch: responses in flight on a server at most. limited: whether others waited for their place.
        longest: tokens of the longest response.
        tail: seconds at the end in which a tenth of the responses or fewer were still being generated.
    """

    cost: Cost
    tokens: float
    batch: int
    limited: bool
    longest: int
    tail: float

    @property
    def seconds(self) -> float:
        return self.cost.seconds


def places(setting: Setting) -> int:
    """Responses in flight on one server at most: as many as are sent, and as have their mean context in its cache. (A
    full cache makes SGLang retract requests, which costs about what waiting costs.)"""
    work, serving = setting.workload, setting.serving
    if serving.engine == "embedded":
        return serving.requests
    context = work.prompt + lengths.mean_in_flight(work.responses)
    return max(min(serving.requests, int(kv_tokens(setting) / context)), 1)


def generation(setting: Setting, most: int | None = None) -> Generation:
    """Of the slowest server: the one with the longest response. Problems go to the servers evenly, each problem's
    samples to one of them, where they share its prompt. most: `places(setting)` by default."""
    work, serving = setting.workload, setting.serving
    most = places(setting) if most is None else most
    if serving.engine == "embedded":
        engine, servers = embedded_engine(setting), setting.training.layout.data
    else:
        engine, servers = sglang_engine(setting), serving.servers
    all_lengths = lengths.quantiles(work.responses, work.rollouts)
    own = all_lengths[::-1][::servers]  # every server has its part of all quantiles
    slots = max(min(most, len(own)), 1)
    late = all_lengths[-max(math.ceil(TAIL * len(all_lengths)), 1)]
    cost, tail = generate(engine, own, slots, work.prompt, late)
    prompts = -(-len(own) // work.samples) * work.prompt
    return Generation(
        cost=cost + engine.prefill(prompts),
        tokens=float(sum(all_lengths)),
        batch=slots,
        limited=slots < len(own),
        longest=own[0],
        tail=tail,
    )


def generate(engine: Engine, responses: Sequence[int], slots: int, prompt: float, late: int = 0) -> tuple[Cost, float]:
    """(seconds, those of the tail) in which a server generates responses of these lengths, at most `slots` at a time.
    The tail begins after `late` tokens, those of a response that belongs to the longest tenth of the step's; where
    responses waited for a place, not before a tenth of this server's are left.

    A clock counts decode steps. Two slots, lengths 4 2 3: steps 1-2 have a batch of two, 3-4 too (the third response
    takes the place of the second), step 5 one:

        slot 1   1 1 1 1 .
        slot 2   2 2 3 3 3
    """
    # Long and short ones arrive mixed: the fractions of i x golden ratio are evenly spread in any order.
    arriving = sorted(range(len(responses)), key=lambda i: i * GOLDEN % 1.0)
    waiting = [responses[i] for i in reversed(arriving)]
    ends: list[tuple[int, int]] = []  # (step at which a response ends, at which it began)
    clock, begun = 0, 0  # `begun`: sum of the beginnings of those in flight
    few = TAIL * len(responses) if slots < len(responses) else math.inf
    seconds, tail, left = Cost(), 0.0, len(responses)
    while waiting or ends:
        while waiting and len(ends) < slots:
            heapq.heappush(ends, (clock + waiting.pop(), clock))
            begun += clock
        steps = min(ends[0][0], late if clock < late else ends[0][0]) - clock
        batch = len(ends)
        context = prompt + clock + steps / 2 - begun / batch
        spent = engine.step(batch, context) * steps
        seconds += spent
        if not waiting and clock >= late and left <= few:
            tail += spent.seconds
        clock += steps
        while ends and ends[0][0] == clock:
            begun -= heapq.heappop(ends)[1]
            left -= 1
    return seconds, tail
