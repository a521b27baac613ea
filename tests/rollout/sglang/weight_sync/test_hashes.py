"""SGLang's hashes of tensors: against their definitions, and against SGLang's own kernel."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess

import numpy as np
import pytest
import torch

from asd_megatron.rollout.sglang.weight_sync import hashes
from asd_megatron.rollout.sglang.weight_sync.hashes import Sha256Hash, WordHash, hexdigests, word_hash
from tests.rollout.sglang.sglang_world import sglang_python

# Sizes around a word, a tile of 8192 words and several of them.
SIZES = (1, 3, 4, 5, 4096, 4 * 8192 - 4, 4 * 8192, 4 * 8192 + 1, 5 * 4 * 8192 + 40)


def _data(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def _reference(data: torch.Tensor) -> int:
    """The kernel's arithmetic, in numpy's unsigned integers, one word at a time in meaning."""
    words = np.frombuffer(data.numpy().tobytes() + bytes(-data.numel() % 4), dtype="<u4")
    u32 = np.uint32

    def fmix(x: np.ndarray) -> np.ndarray:
        x = x ^ (x >> u32(16))
        x = x * u32(0x85EBCA6B)
        x = x ^ (x >> u32(13))
        x = x * u32(0xC2B2AE35)
        return x ^ (x >> u32(16))

    def half(seed: int, factor: int, rotation: int, tile: np.ndarray, index: np.ndarray) -> int:
        position = (index * u32(factor) + u32(seed)) ^ ((index << u32(rotation)) | (index >> u32(32 - rotation)))
        total = np.array([int(fmix(tile ^ position).sum(dtype=np.uint64)) & 0xFFFFFFFF], dtype=u32)
        return int(fmix(total ^ u32(4 * len(words)))[0])

    seed = 0x243F6A88
    other = ((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF
    total = 0
    for start in range(0, len(words), 8192):
        tile = words[start : start + 8192]
        index = np.arange(start, start + len(tile), dtype=u32)
        high, low = half(seed, 0x27D4EB2D, 15, tile, index), half(other, 0x165667B1, 13, tile, index)
        total = (total + (high << 32 | low)) % 2**64
    total = (total ^ total >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    total = (total ^ total >> 27) * 0x94D049BB133111EB % 2**64
    return total ^ total >> 31


@pytest.mark.parametrize("size", SIZES)
def test_word_hash_is_the_kernels_arithmetic(size: int) -> None:
    assert word_hash(_data(size)) == _reference(_data(size))


def test_word_hash_does_not_depend_on_how_much_is_hashed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data(SIZES[-1])
    before = word_hash(data)
    monkeypatch.setattr(hashes, "CHUNK", 2 * hashes.TILE)
    assert word_hash(data) == before


def test_parts_are_hashed_before_the_last_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused experts of a layer can be gigabytes: little more than CHUNK words are kept."""
    monkeypatch.setattr(hashes, "CHUNK", 2 * hashes.TILE)
    data, hasher, kept = _data(SIZES[-1]), WordHash(), []
    for part in data.split(9_998):  # no multiple of a word
        hasher.update(part)
        kept.append(sum(waiting.numel() for waiting in hasher._waiting))
    assert hasher.hexdigest() == f"{_reference(data):016x}"
    assert max(kept) < 4 * hashes.CHUNK < len(data)


def test_word_hash_of_nothing_is_zero() -> None:
    assert word_hash(torch.empty(0, dtype=torch.uint8)) == 0


def test_every_bit_counts() -> None:
    data = _data(40_000)
    seen = {word_hash(data)}
    for byte in (0, 3, 20_000, 39_999):
        changed = data.clone()
        changed[byte] ^= 1
        seen.add(word_hash(changed))
    assert len(seen) == 5


@pytest.mark.parametrize("hash_type", [Sha256Hash, WordHash])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_hash_like_the_whole(hash_type: type, dtype: torch.dtype) -> None:
    whole = torch.randn(31, 7).to(dtype)
    together, apart = hash_type(), hash_type()
    together.update(whole)
    for part in (whole[:5].clone(), whole[5:6].clone(), whole[6:].clone()):
        apart.update(part)
        part.zero_()  # as the memory of a bucket that is used again
    assert together.hexdigest() == apart.hexdigest()
    assert len(apart.hexdigest()) == 16


def test_sha256_hash_is_the_first_half_of_a_quarter() -> None:
    tensor = torch.randn(9, 4)
    hasher = Sha256Hash()
    hasher.update(tensor)
    assert hasher.hexdigest() == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def test_a_finished_hash_keeps_no_part_and_is_read_later() -> None:
    """On CUDA nothing waits for the device while weights stream past: only `hexdigest` does."""
    data, hasher = _data(SIZES[-1]), WordHash()
    hasher.update(data[: 4 * 8192])
    hasher.update(data[4 * 8192 :])
    hasher.finish()
    assert hasher._bytes == 0 and isinstance(hasher._sum, torch.Tensor)
    data.zero_()
    assert hasher.hexdigest() == f"{_reference(_data(SIZES[-1])):016x}"
    other = WordHash()
    other.update(data)
    assert hexdigests([hasher, other]) == [hasher.hexdigest(), other.hexdigest()]


def test_columns_hash_as_a_tensor_of_their_own() -> None:
    whole, hasher, copy = torch.randn(6, 8), WordHash(), WordHash()
    hasher.update(whole[:, 2:5])
    copy.update(whole[:, 2:5].clone())
    assert hasher.hexdigest() == copy.hexdigest()


_KERNEL = """
import importlib.util, json, pathlib, sys, torch
package = pathlib.Path(importlib.util.find_spec("sglang").origin).parent  # importing all of it takes long
spec = importlib.util.spec_from_file_location("kernel", package / "kernels/ops/memory/gpu_tensor_hash.py")
h = importlib.util.module_from_spec(spec)
spec.loader.exec_module(h)
torch.Tensor.is_cuda = property(lambda self: True)  # Triton's interpreter runs the kernel on the CPU
sizes = json.loads(sys.argv[1])
data = lambda n: torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
print(json.dumps([h.gpu_tensor_hash(data(n)) for n in sizes]))
"""


@pytest.mark.sglang
def test_word_hash_against_sglangs_kernel() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [str(sglang_python()), "-c", _KERNEL, json.dumps(SIZES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [word_hash(_data(size)) for size in SIZES]
