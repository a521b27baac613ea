"""SGLang's hash of a tensor's bytes: SHA-256 on the CPU, on CUDA a sum of mixed words.

Both compute the same as `managers/mm_utils.py` and `kernels/ops/memory/gpu_tensor_hash.py` of SGLang 0.5.23; a test
compares the second with the kernel itself.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

TILE = 8192  # words that are mixed into one partial sum
CHUNK = 512 * TILE  # words hashed at a time: 16 MiB, and some copies of that
SEED = 0x243F6A88
SEEDS = (SEED, (SEED * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF)
POSITION = ((0x27D4EB2D, 15), (0x165667B1, 13))  # factor of a word's position, rotation of it
MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
U64 = (1 << 64) - 1


class TensorHash(Protocol):
    """A hash of one tensor that arrives in consecutive parts."""

    def update(self, part: Tensor) -> None: ...

    def finish(self) -> None:
        """No more parts follow: computes the hash without waiting for the device, and frees the parts."""
        ...

    def hexdigest(self) -> str:
        """16 hexadecimal digits. Waits for the device."""
        ...


class Sha256Hash:
    """The hash of servers on the CPU: the first 8 bytes of SHA-256."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(self, part: Tensor) -> None:
        if part.numel():
            self._sha.update(_bytes(part).cpu().numpy().data)

    def finish(self) -> None:
        """Nothing is left to compute."""

    def hexdigest(self) -> str:
        return self._sha.hexdigest()[:16]


class WordHash:
    """The hash of servers on CUDA. Keeps the parts until `finish`."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._sum: Tensor | None = None

    def update(self, part: Tensor) -> None:
        self._parts.append(_bytes(part))

    def finish(self) -> None:
        parts, self._parts = self._parts, []
        self._sum = _word_sum(parts[0] if len(parts) == 1 else torch.cat(parts))

    def hexdigest(self) -> str:
        if self._sum is None:
            self.finish()
        assert self._sum is not None
        return f"{_splitmix(int(self._sum) & U64):016x}"


def for_device(device: str) -> type[TensorHash]:
    """The hash of servers on `device`, "cpu" or "cuda"."""
    return Sha256Hash if device == "cpu" else WordHash


def word_hash(data: Tensor) -> int:
    """SGLang's 64-bit CUDA hash of `data` (uint8, flat), computed where `data` is.

    Each 32-bit word is mixed with its position, twice; sums over tiles of 8192 words are mixed with the length and
    added up modulo 2^64.
    """
    return _splitmix(int(_word_sum(data)) & U64)


def _word_sum(data: Tensor) -> Tensor:
    """The sum of `word_hash` before its last mix: an int64 scalar where `data` is, so that nothing waits for it."""
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    words = torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32)
    for start in range(0, words.numel(), CHUNK):
        total += _chunk(words[start : start + CHUNK], start, words.numel())
    return total


def _chunk(words: Tensor, start: int, total: int) -> Tensor:
    """Sum of the tiles' hashes of some words, the first of which is number `start` of `total`; int64 arithmetic wraps
    modulo 2^64."""
    index = torch.arange(start, start + words.numel(), device=words.device, dtype=torch.int64).to(torch.int32)
    halves = []
    for seed, (factor, rotation) in zip(SEEDS, POSITION, strict=True):
        position = (index * _signed(factor) + _signed(seed)) ^ _rotate(index, rotation)
        mixed = torch.nn.functional.pad(_mix(words ^ position), (0, -words.numel() % TILE))
        sums = mixed.view(-1, TILE).sum(dim=1, dtype=torch.int64).to(torch.int32)  # modulo 2^32: the low half
        halves.append((_mix(sums ^ _signed(4 * total)).to(torch.int64) & 0xFFFFFFFF).sum())
    high, low = halves
    return (high << 32) + low


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's final mix of 32-bit words; int32 arithmetic wraps like uint32."""
    for shift, factor in MIX:
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return x ^ _shift_right(x, 16)


def _shift_right(x: Tensor, by: int) -> Tensor:
    """Logical shift: zeros are shifted in."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def _rotate(x: Tensor, left: int) -> Tensor:
    return (x << left) | _shift_right(x, 32 - left)


def _signed(x: int) -> int:
    """The int32 with the bits of `x` modulo 2^32."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def _splitmix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & U64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & U64
    return x ^ x >> 31


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
