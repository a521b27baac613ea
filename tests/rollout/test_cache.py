"""The KV cache against attention over whole sequences."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from asd_megatron.models.attention import SDPACoreAttention
from asd_megatron.rollout.embedded.cache import KVCache

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 2


def _reference(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Last position of full causal attention, one sequence: [t, h, d] -> [h*d]."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True, scale=scale
    )
    return out[:, -1].reshape(-1)


class _Batch:
    """Rows as whole sequences (lists of q, k, v) beside the cache; every attend is compared."""

    def __init__(self, lengths: list[int], block: int, scale: float | None = None) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.scale = scale
        self.rows: list[list[tuple[Tensor, Tensor, Tensor]]] = [[self._make(n) for _ in range(LAYERS)] for n in lengths]
        self.cache = KVCache(len(lengths), max(lengths), block=block)

    def _make(self, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = [(steps, HEADS, DIM), (steps, KV_HEADS, DIM), (steps, KV_HEADS, DIM)]
        q, k, v = (torch.randn(shape, generator=self.generator) for shape in shapes)
        return q, k, v

    def prefill(self, start: int, stop: int) -> None:
        rows = self.rows[start:stop]
        lengths = torch.tensor([row[0][0].shape[0] for row in rows])
        self.cache.prefill(start, lengths)
        for layer in range(LAYERS):
            q, k, v = (
                torch.nn.utils.rnn.pad_sequence([row[layer][i] for row in rows], padding_value=9.0) for i in range(3)
            )
            out = self.cache.attend(layer + 5, q, k, v, self.scale)
            assert out.shape == (int(lengths.max()), len(rows), HEADS * DIM)
            for i, row in enumerate(rows):
                torch.testing.assert_close(out[lengths[i] - 1, i], _reference(*row[layer], self.scale))

    def decode(self) -> None:
        self.cache.decode()
        assert self.cache.rows == len(self.rows)
        new = [[self._make(1) for _ in range(LAYERS)] for _ in self.rows]
        for layer in range(LAYERS):
            q, k, v = (torch.stack([n[layer][i][0] for n in new])[None] for i in range(3))
            out = self.cache.attend(layer + 5, q, k, v, self.scale)
            for r, row in enumerate(self.rows):
                old = row[layer]
                row[layer] = tuple(torch.cat([old[i], new[r][layer][i]]) for i in range(3))  # type: ignore[assignment]
                torch.testing.assert_close(out[0, r], _reference(*row[layer], self.scale), atol=1e-5, rtol=1e-5)

    def select(self, indices: list[int], how: str) -> None:
        getattr(self.cache, how)(torch.tensor(indices))
        self.rows = [list(self.rows[i]) for i in indices]


@pytest.mark.parametrize("lengths", [[5, 2, 7], [4, 4, 4], [1, 1, 3]])
@pytest.mark.parametrize("block", [1, 3, 256])
def test_prefill_expand_decode_keep(lengths: list[int], block: int) -> None:
    batch = _Batch(lengths, block, scale=0.3 if block == 3 else None)
    batch.prefill(0, 3)
    batch.select([0, 0, 1, 1, 2, 2], "expand")
    for _ in range(3):
        batch.decode()
    batch.select([0, 5, 2, 3], "keep")
    for _ in range(4):
        batch.decode()
    batch.select([3, 1], "keep")
    batch.decode()
    batch.select([0, 1], "keep")
    batch.decode()
    batch.select([1], "keep")
    for _ in range(3):
        batch.decode()


def test_prompts_may_come_in_several_forwards_and_without_expanding() -> None:
    batch = _Batch([2, 3, 6, 6], block=4)
    batch.prefill(0, 2)
    batch.prefill(2, 4)
    for _ in range(6):
        batch.decode()


def test_only_gaps_are_copied_when_rows_leave() -> None:
    cache = KVCache(4, 1)
    cache.prefill(0, torch.ones(4, dtype=torch.int64))
    cache.attend(1, torch.zeros(1, 4, 1, 2), torch.arange(8.0).view(1, 4, 1, 2), torch.zeros(1, 4, 1, 2))
    store = cache._store[1]
    cache.keep(torch.tensor([0, 3, 2]))
    assert cache._store[1] is store
    assert store[0, :, 0, 0, 0].tolist() == [0.0, 6.0, 4.0, 6.0]


def test_a_token_attends_alike_in_the_cache_and_in_a_pack() -> None:
    """The same float32 numbers, bit for bit, whatever its neighbours: so the engine's log-probs are the trainer's."""
    heads, kv_heads, dim, prompts, decoded = 9, 3, 64, (70, 41), 60
    generator = torch.Generator().manual_seed(1)
    rows = [
        [torch.randn(n + decoded, h, dim, generator=generator) for h in (heads, kv_heads, kv_heads)] for n in prompts
    ]
    config = SimpleNamespace(kv_channels=dim, context_parallel_size=1)
    lengths = torch.tensor([0, *(n + decoded for n in prompts)])
    packed = SDPACoreAttention(config, 1, None, "self")(
        *(torch.cat([row[i] for row in rows]) for i in range(3)),
        packed_seq_params=SimpleNamespace(cu_seqlens_q=lengths.cumsum(0)),
    ).squeeze(1)

    cache = KVCache(len(rows), max(prompts))
    cache.prefill(0, torch.tensor(prompts))
    heads_of = [[row[i][:n] for row, n in zip(rows, prompts, strict=True)] for i in range(3)]
    prompt = cache.attend(1, *(torch.nn.utils.rnn.pad_sequence(x) for x in heads_of))
    cache.expand(torch.arange(len(rows)))
    steps = []
    for t in range(decoded):
        cache.decode()
        newest = [torch.stack([row[i][n + t] for row, n in zip(rows, prompts, strict=True)])[None] for i in range(3)]
        steps.append(cache.attend(1, *newest)[0])
    for r, (n, expected) in enumerate(zip(prompts, packed.split([n + decoded for n in prompts]), strict=True)):
        assert torch.equal(prompt[:n, r], expected[:n])
        assert torch.equal(torch.stack(steps)[:, r], expected[n:])
