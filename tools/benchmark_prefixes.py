"""What sharing prefixes saves: tokens and time of a group's teacher and student passes, and what it changes of u.

One group of a random Qwen3 on this machine, with a demonstration shared by the group (one more for its author), for
demonstrations of several times a response's length; plain and shared passes alternate in one process.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from random_qwen3 import random_qwen3
from torch import Tensor

from asd_megatron.antisd import choose_demonstrations
from asd_megatron.distributed import device
from asd_megatron.distributed import layout as layouts
from asd_megatron.distributed.layout import Layout
from asd_megatron.files import write_json
from asd_megatron.ops.vocab_head import linear_token_loss
from asd_megatron.trainer import schedule
from asd_megatron.trainer.batch import Pack, PackLayout, TokenSequence, build_packs
from asd_megatron.trainer.scorer import score

VOCABULARY = 4096
BUDGET = 1 << 20
RATIOS = (1, 4, 16)


@dataclass(frozen=True)
class Row:
    """One length of demonstration, as a multiple of the response's. Times are medians in seconds."""

    demonstration: int
    teacher_tokens: int
    teacher_tokens_shared: int
    teacher_seconds: float
    teacher_seconds_shared: float
    student_tokens: int
    student_tokens_shared: int
    student_seconds: float
    student_seconds_shared: float
    max_abs_u_difference: float


def make_port(folder: Path, hidden: int, layers: int) -> tuple[Any, Any]:
    """A random Qwen3 with 64-wide heads on one rank, and its groups."""
    from asd_megatron.checkpoint.huggingface import FolderReader, read_config
    from asd_megatron.models.port import ModelPort

    torch.manual_seed(0)
    model = random_qwen3(vocabulary=VOCABULARY, hidden=hidden, layers=layers, head_dim=64, positions=16384)
    model.save_pretrained(folder)
    groups = layouts.init(Layout())
    port = ModelPort.build(read_config(folder), groups, Layout(), layers="local")
    with FolderReader(folder) as tensors:
        port.load(tensors)
    port.wrap_ddp(distributed_optimizer=False, overlap_grad_reduce=False)
    return port, groups


def group(ratio: int, size: int, prompt: int, response: int) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """(student, teacher) sequences of one group: half of it right, one demonstration shared."""
    rng = random.Random(ratio)
    ids = lambda n: tuple(rng.randrange(VOCABULARY) for _ in range(n))  # noqa: E731
    question, end = ids(prompt), ids(12)
    verdicts = {reward: ids(6) for reward in (0.0, 1.0)}
    rewards = [float(i % 2) for i in range(size)]
    solutions = {i: ids(ratio * response) for i in range(size)}
    chosen = choose_demonstrations(rewards, key=(0, 1, "p"), per_group=1)
    students, teachers = [], []
    for i, reward in enumerate(rewards):
        answer = ids(response)
        shown = question + solutions[chosen[i].sample] + verdicts[reward] + end
        students.append(TokenSequence.of(question, answer, i * response))
        teachers.append(TokenSequence.of(shown, answer, i * response))
    return students, teachers


def packs(sequences: Sequence[TokenSequence], share: bool, device_: torch.device) -> list[Pack]:
    return build_packs([sequences], 0, BUDGET, PackLayout(share_prefixes=share, device=device_))


def timed(action: Callable[[], Any], where: torch.device) -> float:
    if where.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(port: Any, process_groups: Any, ratio: int, *, size: int, prompt: int, response: int, repeats: int) -> Row:
    students, teachers = group(ratio, size, prompt, response)
    tokens = size * response

    def logprobs(sequences: Sequence[TokenSequence], share: bool) -> Tensor:
        return score(port, process_groups, packs(sequences, share, port.device), tokens, temperature=1.0).logprobs

    def loss(pack: Pack, hidden: Tensor) -> Tensor:
        mean = lambda found, entropy, block: -found.sum() / tokens  # noqa: E731
        return linear_token_loss(hidden, port.head_weight(), pack.targets, mean, port.head_shard(), rows=pack.rows)[0]

    def train(share: bool) -> None:
        for chunk in port.chunks:
            chunk.zero_grad_buffer()
        schedule.forward_backward(port, packs(students, share, port.device), loss)

    u = {share: logprobs(teachers, share) - logprobs(students, share) for share in (False, True)}
    train(False)  # first touch of the gradient buffers
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(repeats):
        for share in (False, True):
            taken = timed(lambda s=share: logprobs(teachers, s), port.device)  # type: ignore[misc]
            times.setdefault(("teacher", share), []).append(taken)
            times.setdefault(("student", share), []).append(timed(lambda s=share: train(s), port.device))  # type: ignore[misc]
    median = {key: statistics.median(values) for key, values in times.items()}
    counts = {
        (name, share): sum(p.real_tokens for p in packs(sequences, share, port.device))
        for name, sequences in (("teacher", teachers), ("student", students))
        for share in (False, True)
    }
    return Row(
        demonstration=ratio,
        teacher_tokens=counts["teacher", False],
        teacher_tokens_shared=counts["teacher", True],
        teacher_seconds=median["teacher", False],
        teacher_seconds_shared=median["teacher", True],
        student_tokens=counts["student", False],
        student_tokens_shared=counts["student", True],
        student_seconds=median["student", False],
        student_seconds_shared=median["student", True],
        max_abs_u_difference=float((u[True] - u[False]).abs().max()),
    )


HEADER = "demonstration   teacher tokens           teacher time   student tokens         student time    max |du|"


def line(r: Row) -> str:
    """A row under `HEADER`."""
    teacher, student = r.teacher_tokens / r.teacher_tokens_shared, r.student_tokens / r.student_tokens_shared
    faster = r.teacher_seconds / r.teacher_seconds_shared, r.student_seconds / r.student_seconds_shared
    return (
        f"{r.demonstration:>4} x response   {r.teacher_tokens:>6} -> {r.teacher_tokens_shared:<6} ({teacher:.2f}x)"
        f"  {faster[0]:>6.2f}x   {r.student_tokens:>6} -> {r.student_tokens_shared:<6} ({student:.2f}x)"
        f"  {faster[1]:>6.2f}x   {r.max_abs_u_difference:.1e}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows and the setting here")
    parser.add_argument("--group", type=int, default=8, help="rollouts of the group [8]")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens [64]")
    parser.add_argument("--response", type=int, default=128, help="response tokens [128]")
    parser.add_argument("--hidden", type=int, default=512, help="model width, a multiple of 64 [512]")
    parser.add_argument("--layers", type=int, default=8, help="model layers [8]")
    parser.add_argument("--repeats", type=int, default=5, help="alternating repetitions; medians are shown [5]")
    given = parser.parse_args(argv)
    device.prepare()
    sizes = {"size": given.group, "prompt": given.prompt, "response": given.response}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        port, groups = make_port(Path(folder), given.hidden, given.layers)
        print(HEADER)
        for ratio in RATIOS:
            rows.append(measure(port, groups, ratio, **sizes, repeats=given.repeats))
            print(line(rows[-1]), flush=True)
    if given.json:
        setting = {k: v for k, v in vars(given).items() if k != "json"}
        threads, load = torch.get_num_threads(), os.getloadavg()[0]
        write_json(
            given.json, {"setting": setting, "threads": threads, "load": load, "rows": [asdict(r) for r in rows]}
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
