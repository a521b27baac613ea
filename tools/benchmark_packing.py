"""How evenly a batch of long responses is spread over ranks and packs, by FLOPs and by tokens.

No model runs: lengths are drawn, FLOPs are those of `models.flops`, and a pipeline's time is that of the 1F1B schedule
with a stage's time in proportion to its FLOPs. By tokens: items go by falling length to the rank with the fewest
tokens, and packs are filled by first fit.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from asd_megatron.files import write_json
from asd_megatron.models.flops import FlopsModel, forward_flops
from asd_megatron.records import PackCounts
from asd_megatron.trainer.balance import assign, cheap_ends, fill_bins, first_fit
from asd_megatron.trainer.batch import Packing, PackLayout, TokenSequence

GROUPS, SIZE = 32, 8
TENSOR = 2  # with sequence parallelism, for the padding
UPDATE = 3  # forwards
MODELS = {
    "qwen3_8b": FlopsModel(6_945_767_424, 32, 128, (None,) * 36, 4096, 151936),
    # A token's weights: attention 18.9M, router 0.3M and 8 of 128 experts 37.7M in each of 48 layers.
    "qwen3_30b_a3b": FlopsModel(48 * (18_874_368 + 262_144 + 37_748_736), 32, 128, (None,) * 48, 2048, 151936),
}
LOADS: dict[str, Callable[[random.Random], tuple[int, int]]] = {  # prompt and response of one rollout
    "long tail": lambda rng: (rng.randrange(100, 500), min(round(rng.lognormvariate(8.7, 1.0)), 32768 - 500)),
    "equal 32K": lambda rng: (256, 32768 - 256),
    "GSM8K": lambda rng: (rng.randrange(60, 200), min(round(rng.lognormvariate(5.3, 0.5)), 2048)),
}


@dataclass(frozen=True)
class Sequences:
    """Lengths of one example's sequences; `teacher` 0: it has no privileged prompt."""

    student: int
    teacher: int
    response: int


@dataclass(frozen=True)
class Spread:
    """Of one rule. imbalance: FLOPs of the busiest rank over the mean, summed over the phases. bubble: the fraction of
    the step in which the average stage has nothing to do, the ranks' imbalance included. packs: of a rank's update."""

    imbalance: float
    bubble: float
    padding: float
    packs: int


@dataclass(frozen=True)
class Row:
    model: str
    load: str
    data: int
    pipeline: int
    context: int
    budget: int
    by_tokens: Spread
    by_flops: Spread
    seconds: float  # of the processor, to plan the batch by FLOPs


Binning = Callable[[Packing, int], list[list[int]]]
"""(the sequences of a rank, the number of packs of all ranks) to the sequences of each pack."""


def batch(load: str) -> list[Sequences]:
    """Half of the rollouts are right; a demonstration of up to 8K tokens is one of the group's right ones."""
    rng, found = random.Random(0), []
    for _ in range(GROUPS):
        group = [LOADS[load](rng) for _ in range(SIZE)]
        right = [i for i in range(SIZE) if rng.random() < 0.5]
        for i, (prompt, response) in enumerate(group):
            others = [j for j in right if j != i]
            shown = min(group[rng.choice(others)][1], 8192) if others else 0
            found.append(Sequences(prompt + response, prompt + shown + response if shown else 0, response))
    return found


def by_tokens(work: Sequence[Sequence[int]], ranks: int) -> list[list[int]]:
    loads = [0] * ranks
    members: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(work)), key=lambda i: (-sum(work[i]), i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += sum(work[item])
        members[rank].append(item)
    return members


def bins_by_tokens(packing: Packing, count: int) -> list[list[int]]:
    stages, lengths = packing.layout.pipeline, packing.lengths
    if len(lengths) >= stages > 1:
        spread = by_tokens([(n,) for n in lengths], stages)
        if all(sum(lengths[i] for i in items) <= packing.budget for items in spread):
            return spread
    return first_fit(lengths, packing.budget)


def bins_by_flops(packing: Packing, count: int) -> list[list[int]]:
    bins = fill_bins(packing.lengths, packing.costs, packing.budget, count)
    return cheap_ends(bins) if packing.layout.pipeline > 1 else bins


def pipeline_time(packs: Sequence[float], stages: int, backward: float) -> float:
    """Of the 1F1B schedule. packs: a stage's forward time of each; backward: in forwards, 0: a scoring pass."""
    if not backward:  # all stages take equally long for a pack, so only the longest is waited for
        return sum(packs) + (stages - 1) * max(packs, default=0.0)
    order = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, len(packs))
        steps = [("f", k) for k in range(ahead)]
        for k in range(len(packs) - ahead):
            steps += [("f", k + ahead), ("b", k)]
        order.append([*steps, *(("b", k) for k in range(len(packs) - ahead, len(packs)))])
    done: dict[tuple[str, int, int], float] = {}
    clock, at = [0.0] * stages, [0] * stages
    while any(at[s] < len(order[s]) for s in range(stages)):
        for stage in range(stages):
            while at[stage] < len(order[stage]):
                kind, k = order[stage][at[stage]]
                needs = ("f", stage - 1, k) if kind == "f" else ("b", stage + 1, k)
                if 0 <= needs[1] < stages and needs not in done:
                    break
                start = max(clock[stage], done.get(needs, 0.0))
                clock[stage] = start + packs[k] * (1 if kind == "f" else backward)
                done[kind, stage, k] = clock[stage]
                at[stage] += 1
    return max(clock)


def spread(
    members: list[list[int]], sequences: list[Sequences], bins: Binning, budget: int, layout: PackLayout
) -> Spread:
    """The two phases of a step: the teacher's scoring pass and the update."""
    imbalance = mean = seconds = 0.0
    computed = real = packs = 0
    for teacher, backward in ((True, 0.0), (False, UPDATE - 1.0)):
        packings = []
        for items in members:
            of_rank = []
            for s in (sequences[i] for i in items):
                length = s.teacher if teacher else s.student
                if length:
                    of_rank.append(TokenSequence(np.zeros(length, dtype=np.int32), length - s.response, 0))
            packings.append(Packing(of_rank, budget, layout))
        count = layout.count(max(packing.needed for packing in packings))
        work, times = [], []
        for packing in packings:
            found = bins(packing, count)
            costs = [sum(packing.costs[i] for i in items) * (1 + backward) for items in found]
            work.append(sum(costs))
            per_stage = [cost / (1 + backward) / layout.pipeline for cost in costs] + [0.0] * (count - len(found))
            times.append(pipeline_time(per_stage, layout.pipeline, backward))
            real += sum(len(s.ids) for s in packing.sequences)
            multiple = layout.pack_multiple
            computed += sum(-(-sum(packing.lengths[i] for i in items) // multiple) * multiple for items in found)
            computed += multiple * (count - len(found))
        imbalance += max(work)
        mean += sum(work) / len(work)
        seconds += max(times)
        packs = count
    return Spread(imbalance / mean, 1 - mean / layout.pipeline / seconds, 1 - real / computed, packs)


def measure(model: str, load: str, data: int, pipeline: int, context: int, budget: int) -> Row:
    flops, sequences = MODELS[model], batch(load)
    layout = PackLayout(pipeline=pipeline, context=context, tensor=TENSOR, sequence_parallel=True, flops=flops)
    began = time.process_time()

    def forward(length: int, rows: int) -> int:
        return forward_flops(flops, PackCounts(((0, length),), rows)) if length else 0

    work = [(UPDATE * forward(s.student, s.response), forward(s.teacher, s.response)) for s in sequences]
    members = assign(work, data)
    found = spread(members, sequences, bins_by_flops, budget, layout)
    seconds = time.process_time() - began
    baseline = by_tokens([(s.student, s.teacher) for s in sequences], data)
    before = spread(baseline, sequences, bins_by_tokens, budget, layout)
    return Row(model, load, data, pipeline, context, budget, before, found, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--data", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options = parser.parse_args()
    rows = []
    print("busiest rank over mean FLOPs, idle fraction of a stage, padding (by tokens -> by FLOPs)")
    for model, load, data, pipeline, context, budget in itertools.product(
        MODELS, LOADS, options.data, (1, 2, 4), (1, 2), (32768, 65536)
    ):
        row = measure(model, load, data, pipeline, context, budget)
        rows.append(row)
        before, after = row.by_tokens, row.by_flops
        print(
            f"{model:14} {load:10} DP {data:2} PP {pipeline} CP {context} {budget // 1024:2}K  "
            f"{before.imbalance:6.3f} -> {after.imbalance:5.3f}   {before.bubble:5.1%} -> {after.bubble:5.1%}   "
            f"{before.padding:6.3%} -> {after.padding:6.3%}   {after.packs:3} packs  {row.seconds:.3f} s",
            flush=True,
        )
    worst = max(row.by_flops.padding for row in rows)
    print(f"largest padding {worst:.3%} (target: under 2%), slowest plan {max(row.seconds for row in rows):.3f} s")
    if options.json is not None:
        write_json(options.json, {"rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
