"""SGLang's hash of a tensor's bytes: SHA-256 on the CPU, on CUDA a sum of mixed words.

Both compute the same as `managers/mm_utils.py` and `kernels/ops/memory/gpu_tensor_hash.py` of SGLang 0.5.23; a test
compares the second with the kernel itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
    """The hash of servers on CUDA. Parts are hashed as soon as CHUNK words have arrived, so it never holds much more:
    a layer's fused experts can be gigabytes."""

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []  # bytes that are not hashed yet
        self._bytes = 0  # of those
        self._words = 0  # hashed before those: whole tiles
        self._tiles: list[Tensor] = []  # their sums
        self._sum: Tensor | None = None

    def update(self, part: Tensor) -> None:
        self._waiting.append(_bytes(part))
        self._bytes += self._waiting[-1].numel()
        if self._bytes >= 4 * CHUNK:
            self._hash(self._bytes - self._bytes % (4 * TILE))
        else:
            self._waiting[-1] = self._waiting[-1].clone()  # the memory of `part` may be used again

    def finish(self) -> None:
        self._hash(self._bytes)
        self._sum = _total(self._tiles, self._words)
        self._tiles = []

    def hexdigest(self) -> str:
        return _hexadecimal(int(self.total()))

    def total(self) -> Tensor:
        """The sum before its last mix, an int64 scalar where the parts were; does not wait for it."""
        if self._sum is None:
            self.finish()
        assert self._sum is not None
        return self._sum

    def _hash(self, size: int) -> None:
        """Hash the first `size` of the waiting bytes."""
        data = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        words = _words(data[:size])
        self._tiles += _tile_sums(words, self._words)
        self._words += words.numel()
        rest = data[size:].clone()  # not a view: it would keep all of `data`
        self._waiting, self._bytes = [rest], rest.numel()


def for_device(device: str) -> type[TensorHash]:
    """The hash of servers on `device`, "cpu" or "cuda"."""
    return Sha256Hash if device == "cpu" else WordHash


def hexdigests(hashes: Sequence[TensorHash]) -> list[str]:
    """`hexdigest` of each, but waits for the device once."""
    totals = [tensor_hash.total() for tensor_hash in hashes if isinstance(tensor_hash, WordHash)]
    found = iter(torch.stack([total.to(totals[0].device) for total in totals]).tolist() if totals else [])
    return [_hexadecimal(next(found)) if isinstance(h, WordHash) else h.hexdigest() for h in hashes]


def _hexadecimal(total: int) -> str:
    return f"{_splitmix(total & U64):016x}"


def word_hash(data: Tensor) -> int:
    """SGLang's 64-bit CUDA hash of `data` (uint8, flat), computed where `data` is.

    Each 32-bit word is mixed with its position, twice; sums over tiles of 8192 words are mixed with the length and
    added up modulo 2^64.
    """
    words = _words(data)
    return _splitmix(int(_total(_tile_sums(words, 0), words.numel())) & U64)


def _words(data: Tensor) -> Tensor:
    """int32, with zeros after the last byte."""
    return torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32)


def _tile_sums(words: Tensor, start: int) -> list[Tensor]:
    """Both sums of every tile of these words, the first of which is number `start`, a multiple of TILE: int32
    [2, tiles] for each CHUNK words."""
    found = []
    for first in range(0, words.numel(), CHUNK):
        chunk = words[first : first + CHUNK]
        index = torch.arange(start + first, start + first + chunk.numel(), device=words.device).to(torch.int32)
        halves = []
        for seed, (factor, rotation) in zip(SEEDS, POSITION, strict=True):
            position = (index * _signed(factor) + _signed(seed)) ^ _rotate(index, rotation)
            mixed = torch.nn.functional.pad(_mix(chunk ^ position), (0, -chunk.numel() % TILE))
            halves.append(mixed.view(-1, TILE).sum(dim=1, dtype=torch.int64).to(torch.int32))  # modulo 2^32
        found.append(torch.stack(halves))
    return found


def _total(tiles: list[Tensor], words: int) -> Tensor:
    """The sum of `word_hash` before its last mix: an int64 scalar where the tiles are, so that nothing waits for it.
    int64 arithmetic wraps modulo 2^64."""
    if not tiles:
        return torch.zeros((), dtype=torch.int64)
    high, low = (_mix(torch.cat(tiles, dim=1) ^ _signed(4 * words)).to(torch.int64) & 0xFFFFFFFF).sum(dim=1)
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
