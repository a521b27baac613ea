"""The KV cache against attention over whole sequences."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from asd_megatron.models.attention import SDPACoreAttention
from asd_megatron.rollout.embedded.cache import EMPTY, KVCache

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 2


WINDOWS = (None, 4)  # of the layers


def _reference(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Last position of causal attention, one sequence: [t, h, d] -> [h*d]."""
    query, key, value = (x[-window:] if window else x for x in (query, key, value))
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
        self.shared = 0
        self.rows: list[list[tuple[Tensor, Tensor, Tensor]]] = [[self._make(n) for _ in range(LAYERS)] for n in lengths]
        self.cache = KVCache(len(lengths), max(lengths), block=block)

    def _make(self, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = [(steps, HEADS, DIM), (steps, KV_HEADS, DIM), (steps, KV_HEADS, DIM)]
        q, k, v = (torch.randn(shape, generator=self.generator) for shape in shapes)
        return q, k, v

    def prefix(self, length: int) -> None:
        self.shared = length
        self.cache.prefix(length)
        for layer in range(LAYERS):
            tokens = [x[:length] for x in self.rows[0][layer]]
            out = self.cache.attend(layer + 5, *(x[:, None] for x in tokens), self.scale, WINDOWS[layer])
            torch.testing.assert_close(self.cache.newest(out)[0, 0], _reference(*tokens, self.scale, WINDOWS[layer]))

    def prefill(self, start: int, stop: int) -> None:
        rows = self.rows[start:stop]
        lengths = torch.tensor([row[0][0].shape[0] for row in rows])
        self.cache.prefill(start, lengths)
        for layer in range(LAYERS):
            q, k, v = (
                torch.nn.utils.rnn.pad_sequence([row[layer][i][self.shared :] for row in rows], padding_value=9.0)
                for i in range(3)
            )
            out = self.cache.attend(layer + 5, q, k, v, self.scale, WINDOWS[layer])
            assert out.shape == (int(lengths.max()) - self.shared, len(rows), HEADS * DIM)
            for i, row in enumerate(rows):
                torch.testing.assert_close(
                    self.cache.newest(out)[0, i], _reference(*row[layer], self.scale, WINDOWS[layer])
                )

    def decode(self) -> None:
        self.cache.decode()
        assert self.cache.rows == len(self.rows)
        new = [[self._make(1) for _ in range(LAYERS)] for _ in self.rows]
        for layer in range(LAYERS):
            q, k, v = (torch.stack([n[layer][i][0] for n in new])[None] for i in range(3))
            out = self.cache.attend(layer + 5, q, k, v, self.scale, WINDOWS[layer])
            for r, row in enumerate(self.rows):
                old = row[layer]
                row[layer] = tuple(torch.cat([old[i], new[r][layer][i]]) for i in range(3))  # type: ignore[assignment]
                torch.testing.assert_close(
                    out[0, r], _reference(*row[layer], self.scale, WINDOWS[layer]), atol=1e-5, rtol=1e-5
                )

    def select(self, indices: list[int], how: str) -> None:
        getattr(self.cache, how)(torch.tensor(indices))
        self.rows = [list(self.rows[i]) for i in indices]


@pytest.mark.parametrize("lengths", [[5, 2, 7], [4, 4, 4], [1, 1, 3]])
@pytest.mark.parametrize("block", [1, 3, 256])
def test_prefill_expand_decode_keep(lengths: list[int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if block == 3:  # parts of one or two batch items
        monkeypatch.setattr("asd_megatron.rollout.embedded.cache.WIDENED_ELEMENTS", 50)
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


def test_prompts_may_share_their_beginning() -> None:
    batch = _Batch([4, 6, 3], block=4)
    for layer in range(LAYERS):  # the same first two tokens in every row
        for row in batch.rows[1:]:
            for mine, first in zip(row[layer], batch.rows[0][layer], strict=True):
                mine[:2] = first[:2]
    batch.prefix(2)
    batch.prefill(0, 3)
    batch.select([0, 0, 1, 1, 2, 2], "expand")
    for _ in range(3):
        batch.decode()


@pytest.mark.parametrize("samples", [4, 8])
def test_a_prompt_is_stored_once_and_its_samples_leave_one_by_one(samples: int) -> None:
    batch = _Batch([5, 2, 4], block=3)
    batch.prefill(0, 3)
    batch.select([i for i in range(3) for _ in range(samples)], "expand")
    assert batch.cache._prompts[5].shape[1] == 3
    generator = torch.Generator().manual_seed(7)
    cells = [len(batch.rows)]
    while len(batch.rows) > 1:
        batch.decode()
        order = torch.randperm(len(batch.rows), generator=generator)[
            1:
        ].tolist()  # one leaves, the others change places
        batch.select(order, "keep")
        cells.append(batch.cache._decoded[5].shape[1] // KV_HEADS)
        assert cells[-1] <= max(EMPTY * len(order), 1)
    batch.decode()
    assert len(set(cells)) < 0.7 * len(cells)  # most leave without any copying


@pytest.mark.parametrize(("shared", "window"), [(0, None), (30, None), (30, 35)])
def test_a_token_attends_alike_in_the_cache_and_in_a_pack(shared: int, window: int | None) -> None:
    """The same float32 numbers, bit for bit, whatever its neighbours: so the engine's log-probs are the trainer's."""
    heads, kv_heads, dim, prompts, samples, decoded = 9, 3, 64, (41, 70), 2, 40
    generator = torch.Generator().manual_seed(1)

    def make(steps: int) -> list[Tensor]:
        return [torch.randn(steps, h, dim, generator=generator) for h in (heads, kv_heads, kv_heads)]

    beginning = make(shared)
    of_prompts = [[torch.cat(x) for x in zip(beginning, make(n - shared), strict=True)] for n in prompts]
    rows = [[torch.cat(x) for x in zip(p, make(decoded), strict=True)] for p in of_prompts for _ in range(samples)]
    lengths = [n + decoded for n in prompts for _ in range(samples)]
    config = SimpleNamespace(context_parallel_size=1)
    packed = SDPACoreAttention(config, 1, None, "self", scale=dim**-0.5, window=window)(
        *(torch.cat([row[i] for row in rows]) for i in range(3)),
        packed_seq_params=SimpleNamespace(boundaries=[0, *itertools.accumulate(lengths)], parents=()),
    )
    expected = packed.squeeze(1).split(lengths)

    cache = KVCache(len(prompts), max(prompts))
    if shared:
        cache.prefix(shared)
        assert torch.equal(cache.attend(1, *(x[:, None] for x in beginning), window=window)[:, 0], expected[0][:shared])
    cache.prefill(0, torch.tensor(prompts))
    rest = cache.attend(
        1, *(torch.nn.utils.rnn.pad_sequence([p[i][shared:] for p in of_prompts]) for i in range(3)), window=window
    )
    cache.expand(torch.arange(len(prompts)).repeat_interleave(samples))
    steps = []
    for t in range(decoded):
        cache.decode()
        newest = [[x[n - decoded + t] for x in row] for n, row in zip(lengths, rows, strict=True)]
        steps.append(
            cache.attend(1, *(torch.stack([new[i] for new in newest])[None] for i in range(3)), window=window)[0]
        )
    for i, (n, out) in enumerate(zip(lengths, expected, strict=True)):
        prompt = n - decoded
        assert torch.equal(rest[: prompt - shared, i // samples], out[shared:prompt])
        assert torch.equal(torch.stack(steps)[:, i], out[prompt:])
