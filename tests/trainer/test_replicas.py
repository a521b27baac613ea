"""Checksums of replicas: one flipped bit of one rank is found, and the rank and the tensor are named."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asd_megatron.observe.writer import read_metrics
from asd_megatron.trainer import replicas
from asd_megatron.trainer.optimizer import Optimizer
from asd_megatron.trainer.replicas import Replicas, checksum
from tests.checkpoint.trainer import CONFIG, MOE, weights
from tests.distributed.harness import run_ranks
from tests.puzzle_recipe import write_recipe

NORM, EMBEDDING = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"
EXPERT = "model.layers.0.mlp.experts.1.down_proj.weight"


def reference(content: bytes, chunk_words: int) -> int:
    """The checksum in Python's integers."""
    content += bytes(-len(content) % 8)
    words = np.frombuffer(content, dtype="<i8").tolist()
    total = 0
    for begin in range(0, len(words), chunk_words):
        chunk = words[begin : begin + chunk_words]
        total = total * replicas._NEXT + sum((word + (word >> 32)) * (2 * i + 1) for i, word in enumerate(chunk))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.gpu
def test_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(replicas.CHUNK_WORDS, "cuda", 1 << 10)
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(100_003, device="cuda").to(dtype)[1:]
        content = tensor.cpu().view(torch.uint8).numpy().tobytes()
        assert int(checksum(tensor)) == reference(content, 1 << 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.uint8])
def test_a_checksum_is_of_the_bits_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every single flipped bit and every exchange of two unequal words changes it; where the tensor lies does not."""
    monkeypatch.setitem(replicas.CHUNK_WORDS, "cpu", 4)
    raw = torch.randint(0, 255, (77,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    bits = raw[: 77 // dtype.itemsize * dtype.itemsize]
    expected = int(checksum(bits.clone().view(dtype)))
    assert expected == reference(bits.numpy().tobytes(), 4)
    shifted = torch.cat([torch.zeros(dtype.itemsize, dtype=torch.uint8), bits]).view(dtype)[1:]
    assert int(checksum(shifted)) == expected
    seen = {expected}
    for byte in range(len(bits)):
        for bit in range(8):
            changed = bits.clone()
            changed[byte] ^= 1 << bit
            seen.add(int(checksum(changed.view(dtype))))
    assert len(seen) == 1 + 8 * len(bits)
    words = bits[:64].view(8, 8)
    for i in range(7):
        order = list(range(8))
        order[i], order[7] = 7, i
        assert int(checksum(words[order].reshape(-1).view(dtype))) != int(checksum(words.reshape(-1).view(dtype)))


def test_two_flipped_bits_change_a_checksum() -> None:
    """Every pair of bits of two words; and a word whose bits are all flipped, which a mixture by XOR would not see."""
    words = torch.randint(-(2**63), 2**63 - 1, (2,), generator=torch.Generator().manual_seed(2))
    expected = checksum(words)
    bits = [torch.tensor([1 << i if i < 63 else -(2**63), 0]) for i in range(64)]
    bits += [bit.flip(0) for bit in bits]
    assert all((checksum(words ^ a ^ b) != expected) for i, a in enumerate(bits) for b in bits[:i])
    assert checksum(words ^ torch.tensor([-1, 0])) != expected


def flip(tensor: Tensor, bit: int = 0) -> None:
    """Flip a bit of a tensor's last element."""
    whole = tensor.detach().view(-1).view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)
    whole[-1] ^= 1 << bit


def _checks(
    rank: int, layout: dict[str, Any], distributed: bool, dtype: torch.dtype, config: dict[str, Any], flips: list[tuple]
) -> list[str | None]:
    """What is found after two updates: with equal copies, then with one bit flipped of each (rank, tensor) in turn, and
    with all of them restored."""
    from asd_megatron.distributed.layout import Layout, init
    from asd_megatron.models.port import ModelPort

    sizes = Layout(**layout)
    port = ModelPort.build({**CONFIG, **config}, init(sizes), sizes, dtype=dtype)
    port.load(weights(port.expected(), 3))
    port.wrap_ddp(distributed_optimizer=distributed, overlap_grad_reduce=False)
    schedule: dict[str, Any] = {"schedule": "constant", "warmup_steps": 0, "total_steps": 9, "min_learning_rate": 0.0}
    adam: dict[str, Any] = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "clip_grad": 1.0}
    optimizer = Optimizer(port, learning_rate=1e-2, distributed=distributed, **schedule, **adam)
    parameter: Any
    for _ in range(2):
        optimizer.zero_grad()
        for chunk in port.chunks:
            for parameter in chunk.parameters():
                parameter.main_grad.copy_(torch.sin(parameter.detach().float() * 37))
        assert optimizer.step().applied
    compared = Replicas(port, optimizer)
    held = dict(compared.tensors())
    found = [compared.check()]
    for who, name in flips:
        if rank == who:
            flip(held[name])
        found.append(compared.check())
        if sizes.tensor > 1:  # the only copies are those of tensor-parallel ranks
            assert Replicas(port, optimizer, exact_tensor=False).check() is None
        if rank == who:
            flip(held[name])
    return [*found, compared.check()]


FP32, BF16 = torch.float32, torch.bfloat16
MOMENT, MASTER = f"exp_avg_sq of {NORM}", f"master weight of {NORM}"
CASES: dict[str, tuple[dict[str, Any], bool, torch.dtype, dict[str, Any], list[tuple[int, str]]]] = {
    "tensor parallel": ({"tensor": 2}, False, FP32, {}, [(1, NORM), (0, MOMENT)]),
    "data parallel": ({"data": 2}, False, BF16, {}, [(1, EMBEDDING), (0, MASTER), (1, MOMENT)]),
    "distributed optimizer": ({"data": 2}, True, BF16, {}, [(1, EMBEDDING), (0, NORM)]),
    "tied embedding": ({"pipeline": 2}, False, FP32, {}, [(1, EMBEDDING), (0, f"exp_avg of {EMBEDDING}")]),
    "experts": ({"data": 4, "expert": 2}, False, FP32, MOE, [(2, EXPERT), (3, NORM)]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_found_and_named(case: str) -> None:
    layout, distributed, dtype, config, flips = CASES[case]
    world = 4 if "expert" in layout else 2
    results = run_ranks(_checks, world, layout, distributed, dtype, config, flips)
    assert all(one == results[0] for one in results)
    equal, *found, restored = results[0]
    assert equal is None and restored is None
    for (who, name), message in zip(flips, found, strict=True):
        assert message.startswith(f"the copies of {name} are not equal: "), message
        if case == "experts" and name == NORM:  # four copies: a majority
            assert f": global rank {who} on " in message and "differs from global ranks 0, 1, 2" in message
        else:
            assert f"global rank {who}" in message and "no majority" in message


def recipe_file(folder: Path) -> Path:
    folder.mkdir()
    return write_recipe(
        folder / "recipe.yaml",
        run={"steps": 4, "replica_check_every": 1},
        parallelism={"data": 2},
        algorithm={"name": "no_gate"},
        sampling={"rollouts_per_problem": 2, "max_response_tokens": 12},
        optimizer={"learning_rate": 1e-4},
        checkpoint={"every": 1},
    )


def _train(rank: int, recipe: str, flip_after: int) -> tuple[int, str]:
    """The program on this rank, with a bit of rank 1's memory flipped after a step (0: never): exit status, stderr."""
    from asd_megatron import train
    from asd_megatron.run.rl import TrainingRun

    original = TrainingRun.checkpoint_if_due

    def saved(self: TrainingRun, step: int) -> None:
        original(self, step)
        if rank == 1 and step == flip_after:
            flip(dict(self.session.integrity.replicas.tensors())[NORM], bit=20)

    TrainingRun.checkpoint_if_due = saved  # type: ignore[method-assign]
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()):
        return train.main([recipe]), errors.getvalue()


def test_a_run_ends_before_it_trains_on_or_saves_a_replica_that_differs(tmp_path: Path) -> None:
    """The flipped bit is found before the next update that is due, after one bad step; with the check out of turn,
    before the checkpoint. The same command resumes from the last good checkpoint, and ends like a run without it."""
    clean, flipped = (recipe_file(tmp_path / name) for name in ("clean", "flipped"))
    assert [status for status, _ in run_ranks(_train, 2, str(clean), 0, init=False)] == [0, 0]
    results = run_ranks(_train, 2, str(flipped), 2, init=False)
    assert [status for status, _ in results] == [2, 2]
    message = results[0][1]
    assert f"error: step 3, replicas: the copies of {NORM} are not equal: " in message and "global rank 1" in message
    assert "the newest checkpoint is step_000002" in message and message.count("error") == 1
    assert [status for status, _ in run_ranks(_train, 2, str(flipped), 0, init=False)] == [0, 0]
    rows = [[row["optimizer/grad_norm"] for row in read_metrics(path.parent / "run")] for path in (clean, flipped)]
    assert rows[0] == rows[1] and len(rows[0]) == 4
