"""The key/value cache of the embedded engine.

All rows of a batch produce one token per forward, so decoded tokens share a slot: row i's valid slots are its prompt's
[0, length_i) and the common [width, filled), `width` being the longest prompt. Slots in between hold padding and are
masked; their place does not matter because keys are stored after RoPE. An append is then one contiguous copy, and a
batch whose prompts are equally long needs no mask at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from asd_megatron.models.attention import MIN_ROWS, fill_rows, operand


class KVCache:
    """Keys and values of every layer of one pipeline stage, for a batch of rows.

    Use: `prefill(start, lengths)` then one forward of those prompts (repeat for further rows); `expand` once to repeat
    each prompt's row for its samples; then `decode()` before every one-token forward, and `keep` when rows finish.
    `attend` is called by the model, once per layer and forward.

    rows: prompts in the batch. width: the longest prompt. block: slots by which the cache grows.
    Storage per layer: [2, rows, kv heads of this tensor-parallel rank, slots, head_dim] in the dtype that attention
    takes (`models.attention.operand`).
    """

    def __init__(self, rows: int, width: int, *, block: int = 256) -> None:
        self.rows = rows
        self.width = width
        self.filled = width
        self.lengths = torch.full((rows,), width, dtype=torch.int64)
        self._block = block
        self._capacity = width
        self._store: dict[int, Tensor] = {}
        self._bias: Tensor | None = None
        self._span: tuple[int, int] | None = None  # rows of the prefill in progress; None while decoding

    def prefill(self, start: int, lengths: Tensor) -> None:
        """The next forward carries the right-padded prompts of rows start:start+len(lengths), `lengths` int64 [b]."""
        self._span = (start, start + len(lengths))
        self.lengths[start : start + len(lengths)] = lengths.cpu()

    def decode(self) -> None:
        """The next forward carries one token of every row; its keys take the next slot."""
        if self._span is not None:
            self._span = None
            self._bias = None
        if self.filled == self._capacity:
            self._reallocate(None)
        self.filled += 1

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None = None
    ) -> Tensor:
        """Store this forward's keys and values, and attend.

        query [s, B, h, d]; key and value [s, B, hkv, d], after RoPE, heads of this tensor-parallel rank, h a multiple
        of hkv with consecutive query heads sharing a key head. softmax_scale: default 1/sqrt(d). Returns [s, B, h*d].
        """
        if self._span is not None:
            return self._attend_prompt(layer_number, query, key, value, softmax_scale)
        _, rows, heads, dim = query.shape
        wide = operand(query)
        store = self._store[layer_number]
        if rows != self.rows:
            raise RuntimeError(f"{rows} rows came to a cache of {self.rows}")
        slot = self.filled - 1
        store[0, :rows, :, slot] = key[0]
        store[1, :rows, :, slot] = value[0]
        kv_heads = key.shape[2]
        group = heads // kv_heads
        # The query heads of one key head become query positions of it: no key is ever repeated.
        out = F.scaled_dot_product_attention(
            fill_rows(wide[0].reshape(rows, kv_heads, group, dim), MIN_ROWS, dim=2),
            store[0, :rows, :, : self.filled],
            store[1, :rows, :, : self.filled],
            attn_mask=self._mask(wide),
            scale=softmax_scale,
        )
        return out[:, :, :group].reshape(1, rows, heads * dim).to(query.dtype)

    def newest(self, hidden: Tensor) -> Tensor:
        """Hidden states of each row's newest token in the current forward: [s, B, H] -> [1, B, H]. Only these need
        logits."""
        if self._span is None:
            return hidden
        last = (self.lengths[slice(*self._span)] - 1).to(hidden.device)
        return hidden.gather(0, last[None, :, None].expand(1, -1, hidden.shape[-1]))

    def expand(self, indices: Tensor) -> None:
        """New row i is a copy of row indices[i] (int64, repeats allowed)."""
        self._reallocate(indices)

    def keep(self, indices: Tensor) -> None:
        """New row i is row indices[i] (int64, no repeats); all other rows leave.

        Only rows with indices[i] != i are copied, so filling each gap with a row from the end costs as much as what
        left.
        """
        moved = (indices != torch.arange(len(indices))).nonzero()[:, 0]
        self.rows = len(indices)
        self.lengths = self.lengths[indices]
        if len(moved) == 0:
            return
        for store in self._store.values():
            target, source = moved.to(store.device), indices[moved].to(store.device)
            filled = store[:, :, :, : self.filled]
            filled[:, target] = filled[:, source]
        if self._bias is not None:
            self._bias[moved.to(self._bias.device)] = self._bias[indices[moved].to(self._bias.device)]

    def _attend_prompt(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        assert self._span is not None
        start, stop = self._span
        steps, rows, heads, dim = query.shape
        dtype, kv_heads = query.dtype, key.shape[2]
        query, key, value = operand(query), operand(key), operand(value)
        if layer not in self._store:
            self._store[layer] = key.new_zeros(2, self.rows, kv_heads, self._capacity, dim)
        store = self._store[layer]
        query, key, value = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        store[0, start:stop, :, :steps] = key
        store[1, start:stop, :, :steps] = value
        # Padding is on the right: a causal mask alone keeps it from every real position.
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=heads != kv_heads
        )
        return out.permute(2, 0, 1, 3).reshape(steps, rows, heads * dim).to(dtype)

    def _mask(self, query: Tensor) -> Tensor | None:
        """Additive mask [rows, 1, 1, filled]: -inf in the padding between a shorter prompt and the decoded tokens."""
        if self._bias is None:
            if bool((self.lengths == self.width).all()):
                return None
            slots = torch.arange(self._capacity)
            padding = (slots >= self.lengths[:, None]) & (slots < self.width)
            bias = torch.zeros(padding.shape, dtype=query.dtype).masked_fill_(padding, float("-inf"))
            self._bias = bias[:, None, None].to(query.device)
        return self._bias[: self.rows, ..., : self.filled]

    def _reallocate(self, indices: Tensor | None) -> None:
        """Copy the rows (all of them, or `indices`) into storage with room for at least one more slot."""
        rows = self.rows if indices is None else len(indices)
        self._capacity = -(-(self.filled + 1) // self._block) * self._block
        for layer in list(self._store):
            old = self._store.pop(layer)[:, : self.rows, :, : self.filled]
            new = old.new_empty(2, rows, old.shape[2], self._capacity, old.shape[4])
            if indices is None:
                new[:, :, :, : self.filled] = old
            else:
                new[:, :, :, : self.filled] = old[:, indices.to(old.device)]
            self._store[layer] = new
            del old
        if indices is not None:
            self.lengths = self.lengths[indices]
        self.rows = rows
        self._bias = None
