"""The path of a batch at the paper's scale, on CPU ranks without a model: from the servers' answers to the model, and
from there to metrics and dump.

    python tools/benchmark_batch.py [--json FILE]

By default 256 rollouts (32 problems x 8) of 32,768 tokens, demonstrations cut to 8,192 tokens, a vocabulary of 151,936
tokens, 4 data-parallel ranks. All responses are right and of the greatest length, so every privileged prompt has
another rollout's response to shorten: the worst case. The answers' parts are also reported; they come while servers
generate, and privileged prompts are rendered then too, as soon as a group is complete. `--arrival together` has all
groups complete at once, so that nothing of that is hidden; `--arrival apart` (the default) lets each group's prompts be
rendered before the last group comes, as they are in a run whose generation takes longer.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.multiprocessing as mp

from asd_megatron.antisd import condition
from asd_megatron.checks.cases import hard_batch
from asd_megatron.checks.memory import PeakMemory
from asd_megatron.data.prompts import PromptRenderer, TeacherLimits
from asd_megatron.data.tokenizer import undecodable
from asd_megatron.distributed import layout as layouts
from asd_megatron.distributed.layout import Layout
from asd_megatron.files import write_json
from asd_megatron.observe.dumps import write_dump
from asd_megatron.observe.metrics import GateReading, step_metrics
from asd_megatron.records import Example, Group, Problem, Prompt, SamplingParams, TokenTable
from asd_megatron.rollout.sglang.client.api import read_generation
from asd_megatron.rollout.sglang.client.scheduling import SampleResult
from asd_megatron.rollout.sglang.grouping import Assembler, Labels
from asd_megatron.trainer import token_method
from asd_megatron.trainer.align import gather_table
from asd_megatron.trainer.batch import PackLayout
from asd_megatron.trainer.examples import ExampleBuilder
from asd_megatron.trainer.guard import check_rollouts
from asd_megatron.trainer.local_batch import LocalBatch

GIB = 2**30
VOCABULARY = 151_936
COLUMNS = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy", "pmi", "term", "advantage")


@dataclass
class Parts:
    """Seconds by part."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def make_tokenizer() -> Any:
    """A byte-level BPE of made-up words with `VOCABULARY` ids; those that no merge makes are single words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = made_up_words(60_000)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = (" ".join(words[i : i + 1000]) for i in range(0, len(words), 1000))
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator(corpus, trainer)
    backend.add_tokens([f"\ue000{i}" for i in range(backend.get_vocab_size(), VOCABULARY)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def made_up_words(count: int) -> list[str]:
    """Words of one to four syllables, some of them more than once; the same at every call."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnpqrstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "ion", "st")]
    return ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 3, 4)))) for _ in range(count)]


def answers(options: argparse.Namespace, tokenizer: Any) -> list[bytes]:
    """What a server answers, one body for each rollout: texts of frequent and rare words, numbers and line ends."""
    words, rng = made_up_words(60_000), np.random.default_rng(0)
    bodies = []
    for _ in range(options.problems * options.rollouts):
        drawn = (len(words) * rng.random(options.tokens) ** 6).astype(int)
        text = " ".join(words[i] if i % 5 else f"{i}.\n" for i in drawn)
        ids = tokenizer.backend_tokenizer.encode_batch_fast([text])[0].ids[: options.tokens]
        logprobs = (-rng.exponential(size=len(ids))).round(9).tolist()
        meta = {"output_token_logprobs": [[p, i, None] for p, i in zip(logprobs, ids, strict=True)]}
        meta |= {"finish_reason": {"type": "stop"}, "weight_version": "00000000-0"}
        bodies.append(json.dumps({"output_ids": ids, "meta_info": meta}).encode())
    return bodies


def receive(bodies: list[bytes], options: argparse.Namespace, tokenizer: Any, parts: Parts) -> list[Group]:
    """The groups that the answers make up, all rewarded 1 or 0 in turn; empties `bodies`."""
    assembler = Assembler(tokenizer, 0, Labels("00000000"))
    problems = [Problem(f"p{i}", "5", prompt=f"Question {i}? " * 20) for i in range(options.problems)]
    ids = [tuple(tokenizer(problem.question)["input_ids"]) for problem in problems]
    params = SamplingParams(max_new_tokens=options.tokens, n=options.rollouts)
    requests = assembler.add([Prompt(*pair) for pair in zip(problems, ids, strict=True)], params, 1)
    groups: list[Group] = []
    for request in requests:
        with parts.time("answers: parse"):
            generation = read_generation(json.loads(bodies.pop()))
        with parts.time("answers: decode"):
            result = SampleResult(request.key, generation.output_ids, generation.logprobs, "stop", ((0, "00000000-0"),))
            groups += assembler.take([result])
    rewards = tuple(1.0 if i else 0.0 for i in range(options.rollouts))
    return [Group(group.problem, group.rollouts, rewards) for group in groups]


def rank(number: int, options: argparse.Namespace, port: int, folder: str) -> None:
    """One rank's process: its figures go to `folder`/`number`.json."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(options.ranks), "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    layout = Layout(data=options.ranks)
    process_groups = layouts.init(layout)
    parts, groups, bodies, tokenizer = Parts(), [], [], None
    if number == 0:
        tokenizer = make_tokenizer()
        bodies = answers(options, tokenizer)
        held = sum(map(len, bodies))
    divide = partial(
        LocalBatch.receive,
        layout=layout,
        process_groups=process_groups,
        packs=PackLayout(pad_id=0),
        updates=1,
        tokens_per_microbatch=options.tokens + 16_384,
    )
    divide(hard_batch(1) if number == 0 else [])  # what is loaded and allocated once
    gc.freeze()  # as a session does
    process_groups.host.barrier().wait()
    examples: list[Example] = []
    with PeakMemory() as memory:
        if number == 0:
            groups = receive(bodies, options, tokenizer, parts)
            examples = build_examples(groups, options, tokenizer, parts)
        process_groups.host.barrier().wait()
        with parts.time("plan and scatter"):
            local = divide(examples)
    with PeakMemory() as columns_memory:
        with parts.time("columns"):
            inputs = token_method.token_inputs(local, token_method.Method(condition("antisd")))
        with parts.time("teacher packs"):
            local.teacher_packs()
    own = share_bytes(local)
    with parts.time("after: gather"):
        columns = {name: inputs.engine_logprobs for name in COLUMNS} | {"loss_mask": inputs.loss_mask}
        table = gather_table(local.table, columns, local.indices, process_groups)
    result = {
        "peak_gib": (memory.mib or 0) / 1024,
        "share_gib": own / GIB,
        "columns_gib": (columns_memory.mib or 0) / 1024,
        "parts": parts.seconds,
    }
    if table is not None:
        report_step(examples, table, Path(folder) / "step.parquet", parts)
        result["answers_gib"] = held / GIB
    write_json(Path(folder) / f"{number}.json", result)
    process_groups.host.barrier().wait()
    layouts.shutdown()


def report_step(examples: list[Example], table: TokenTable, dump: Path, parts: Parts) -> None:
    """What `run.reports` does in the background while the next step generates."""
    with parts.time("after: metrics (in the background)"):
        reading = GateReading(True, 1.0)
        step_metrics(examples, table, learning_rate=1e-6, grad_norm=1.0, policy_loss=0.0, times={}, reading=reading)
    with parts.time("after: dump (in the background)"):
        write_dump(dump, examples, table, step=1, lam=1.0, H=None, h_warm=None, temperature=1.0, recipe_hash="")


def build_examples(groups: Sequence[Group], options: argparse.Namespace, tokenizer: Any, parts: Parts) -> list[Example]:
    renderer = PromptRenderer(tokenizer, format="raw")
    builder = ExampleBuilder(renderer, TeacherLimits(max_solution_tokens=options.demonstration), seed=0)
    early, late = (groups[:-1], groups[-1:]) if options.arrival == "apart" else ([], groups)
    with parts.time("examples of earlier groups (while the last one is generated)"):
        examples = builder.build(early, 1)
    with parts.time("checks"):
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        check_rollouts(rollouts, 1)
        undecodable(tokenizer, [rollout.response_ids for rollout in rollouts])
    with parts.time("examples"):
        examples += builder.build(late, 1)
    builder.close()
    return examples


def share_bytes(local: LocalBatch) -> int:
    """Of the arrays of a rank's examples; what several share counts once."""
    arrays: dict[int, int] = {}
    for e in local.examples:
        r = e.rollout
        for array in (r.prompt_ids, r.response_ids, r.logprobs, r.loss_mask, e.teacher_prompt_ids):
            if array is not None:
                arrays[id(array)] = array.nbytes
    return sum(arrays.values())


BEFORE_THE_MODEL = ("checks", "examples", "plan and scatter", "columns", "teacher packs")


def report(found: list[dict[str, Any]]) -> dict[str, Any]:
    first, others = found[0], found[1:]
    return {
        "rank0_seconds": round(sum(first["parts"][name] for name in BEFORE_THE_MODEL), 3),
        "rank0_peak_gib": round(first["peak_gib"], 3),
        "other_ranks_peak_gib": round(max(r["peak_gib"] for r in others), 4),
        "other_ranks_share_gib": round(max(r["share_gib"] for r in others), 4),
        "other_ranks_peak_over_share": round(max(r["peak_gib"] / r["share_gib"] for r in others), 3),
        "columns_gib": round(max(r["columns_gib"] for r in found), 4),
        "answers_gib": round(first["answers_gib"], 3),
        "parts": {name: round(seconds, 3) for name, seconds in first["parts"].items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=8, help="of each problem")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each response")
    parser.add_argument("--demonstration", type=int, default=8_192, help="most tokens of a demonstration")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--arrival", choices=("apart", "together"), default="apart", help="of complete groups")
    options = parser.parse_args(argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory(prefix="batch-") as folder:
        mp.spawn(rank, (options, port, folder), nprocs=options.ranks)
        found = report([json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(options.ranks)])
    for name, value in found.items():
        if not isinstance(value, dict):
            print(f"{name:32} {value}")
    for name, value in found["parts"].items():
        print(f"  {name:62} {value:8.3f} s")
    if options.json:
        write_json(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
