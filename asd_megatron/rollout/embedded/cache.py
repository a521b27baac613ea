"""The key/value cache of the embedded engine: prompts stored once, decoded tokens in a grid of samples.

A prompt's keys and values are stored once, however many samples (rows of the batch) continue it. The samples are cells
of a grid: a group is one stored prompt with equally many cells in every group. One batched product per layer attends
over the prompts, with all queries of a group as rows of one matrix, and another over the decoded tokens.

Two prompts, P of 3 tokens and Q of 2, with 3 samples each (batch rows 0 to 5), after 2 decoded tokens:

            stored prompt     cells           slots of decoded tokens (one for each forward)
    group 0 P0 P1 P2          0 1 2           cell 0: a0 a1    cell 1: b0 b1    cell 2: c0 c1
    group 1 Q0 Q1 --          3 4 5           cell 3: d0 d1    cell 4: e0 e1    cell 5: f0 f1

    query of cell 4 attends to   Q0 Q1 (the padding is masked), e0 e1

All samples decode one token per forward, so a slot is filled in every cell at once and decoded tokens need no mask;
only prompts of different lengths do. Keys are stored after RoPE, so the order of slots carries no meaning.

A finished sample leaves its cell empty. `keep([0, 1, 3, 4, 5])` leaves cell 2 empty: 6 cells for 5 rows, still within
EMPTY. `keep([0, 3, 4, 5])` would leave 6 cells for 4 rows, too many, so the grid is laid out again with the largest
groups that fit, here of one cell, and Q is stored three times:

    group 0 P0 P1 P2    cell 0 (was 0)          group 2 Q0 Q1 --    cell 2 (was 4)
    group 1 Q0 Q1 --    cell 1 (was 3)          group 3 Q0 Q1 --    cell 3 (was 5)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from asd_megatron.models.attention import attention_operand

EMPTY = 1.25
"""Most cells of the grid for each row of the batch."""

WIDENED_ELEMENTS = 1 << 17
"""Elements of decoded keys or values that are converted to a wider dtype at a time: 1 MiB of float64, so that they are
multiplied while they are in the processor's cache."""


class KVCache:
    """Keys and values of every layer of one pipeline stage, for a batch of rows.

    Call order: `prefix` if all prompts begin alike, then `prefill` (repeated for further prompts), each before its
    forward; `expand` once, to repeat each prompt's row for its samples; then `decode` before every one-token forward,
    and `keep` when rows finish. The model calls `attend`, once per layer and forward.

    rows: prompts in the batch. width: length of the longest prompt. block: slots by which the storage of decoded tokens
    grows. `lengths`, int64 [rows]: the rows' prompt lengths.
    Storage per layer, with the key/value heads of this tensor-parallel rank: prompts [2, groups, heads, width,
    head_dim] in the dtype that attention takes (`models.attention.attention_operand`), decoded tokens [2, groups *
    heads * cells of a group, slots, head_dim] in their own, widened whenever they are read: half the memory to wait
    for.
    """

    def __init__(self, rows: int, width: int, *, block: int = 256) -> None:
        self.rows = rows
        self.width = width
        self.lengths = torch.full((rows,), width, dtype=torch.int64)
        self._prompts: dict[int, Tensor] = {}
        self._decoded: dict[int, Tensor] = {}
        self._block = block
        self._slots = self._capacity = 0  # of decoded tokens: in use (this forward's included), allocated
        self._span: tuple[int, int] | None = None  # prompts of the current prefill; None while decoding
        self._begin = self._shared = 0  # position where that prefill begins; tokens common to all prompts
        self._newest: Tensor | None = None  # each row's newest position in the current forward; None: it has only one
        self._group_lengths = self.lengths  # int64 [groups]: lengths of the stored prompts
        self._members = 1  # cells of each group
        self._cells = torch.arange(rows)  # int64 [rows]: each row's cell
        self._maps: tuple[Tensor, Tensor] | None = None  # each cell's row (any row, if empty), each row's cell
        self._masks: dict[int | None, Tensor | None] = {}  # of `_mask`, by window

    def prefix(self, length: int) -> None:
        """The next forward holds, as one row, the first `length` tokens, which all prompts have in common."""
        self._span, self._begin, self._shared = (0, self.rows), 0, length
        self._newest = torch.tensor([length - 1])

    def prefill(self, start: int, lengths: Tensor) -> None:
        """The next forward holds prompts start:start+len(lengths), right-padded, without the common `prefix`.

        lengths: int64 [b], of the complete prompts.
        """
        self._span, self._begin = (start, start + len(lengths)), self._shared
        self.lengths[slice(*self._span)] = lengths.cpu()
        self._newest = lengths.cpu() - 1 - self._begin

    def decode(self) -> None:
        """The next forward holds one token of every row; its keys and values take the next slot."""
        self._span = self._newest = None
        self._slots += 1
        self._masks = {window: mask for window, mask in self._masks.items() if window is None}
        if self._slots <= self._capacity:
            return
        self._capacity += self._block
        for layer, old in self._decoded.items():
            new = self._decoded[layer] = old.new_empty(2, old.shape[1], self._capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        softmax_scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Store this forward's keys and values, then attend over everything stored, or the newest `window` tokens.

        query [s, B, h, d], or [s, B, hkv, h / hkv, d]; key and value [s, B, hkv, d], after RoPE, heads of this
        tensor-parallel rank, h a multiple of hkv with consecutive query heads sharing a key head. softmax_scale:
        default 1/sqrt(d). Returns [s, B, h*d]. Raises RuntimeError while decoding when B is not the cache's rows.
        """
        steps, rows, kv_heads, dim = key.shape
        scale = dim**-0.5 if softmax_scale is None else softmax_scale
        if query.dim() == 4:
            query = query.view(steps, rows, kv_heads, -1, dim)
        if self._span is not None:
            return self._attend_prompt(layer_number, self._span, query, key, value, scale, window)
        if rows != self.rows:
            raise RuntimeError(f"the forward has {rows} rows, the cache holds {self.rows}")
        out = self._attend_cells(layer_number, self._grid(query), self._grid(key), self._grid(value), scale, window)
        # [groups, hkv, cells, h / hkv, d] to [1, cells, h * d], then cells to rows.
        out = query.new_empty(out.transpose(1, 2).shape).copy_(out.transpose(1, 2)).view(1, -1, query[0, 0].numel())
        return out if self._maps is None else out.index_select(1, self._maps[1])

    def newest(self, hidden: Tensor) -> Tensor:
        """Hidden states of each row's newest token in the current forward, which alone need logits: [s, B, H] ->
        [1, B, H]."""
        if self._newest is None:
            return hidden
        last = self._newest.to(hidden.device)
        return hidden.gather(0, last[None, :, None].expand(1, -1, hidden.shape[-1]))

    def expand(self, indices: Tensor) -> None:
        """New row i is a copy of row indices[i] (int64, repeats allowed)."""
        self._select(indices)
        self._lay_out()

    def keep(self, indices: Tensor) -> None:
        """New row i is row indices[i] (int64, no repeats); all other rows are dropped."""
        self._select(indices)
        if len(self._group_lengths) * self._members > EMPTY * self.rows:
            self._lay_out()
        else:
            self._map()

    def _grid(self, x: Tensor) -> Tensor:
        """From rows to cells: [1, rows, hkv, ...] to [groups, hkv, cells of a group, ...]."""
        if self._maps is not None:
            x = x.index_select(1, self._maps[0])
        return x.view(-1, self._members, *x.shape[2:]).transpose(1, 2)

    def _attend_prompt(
        self,
        layer: int,
        span: tuple[int, int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        steps, rows, kv_heads, dim = key.shape
        dtype, begin, end = query.dtype, self._begin, self._begin + steps
        query, key, value = attention_operand(query.flatten(2, 3)), attention_operand(key), attention_operand(value)
        if layer not in self._prompts:
            self._prompts[layer] = key.new_zeros(2, self.rows, kv_heads, self.width, dim)
        store = self._prompts[layer][:, slice(*span)]
        query, key, value = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        store[0, :, :, begin:end] = key
        store[1, :, :, begin:end] = value
        mask = None
        if begin:
            key, value = store[:, :, :, :end]
        if begin or window is not None and window < end:
            mask = torch.ones(steps, end, dtype=torch.bool, device=key.device).tril(begin)
            if window is not None:
                mask = mask.triu(begin - window + 1)
        # Padding is on the right, so the causal mask alone hides it from every real position.
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != kv_heads
        )
        return out.permute(2, 0, 1, 3).reshape(steps, rows, -1).to(dtype)

    def _attend_cells(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """query [groups, hkv, cells, h / hkv, d], key and value [groups, hkv, cells, d]; returns the query's shape.

        Scores of prompt and decoded tokens are two products over the same queries, softmaxed together. The query heads
        that share a key head are rows of one matrix, so no key is repeated:

            prompts   [groups * hkv, cells * h / hkv, d] @ [groups * hkv, d, width]
            decoded   [groups * hkv * cells, h / hkv, d] @ [groups * hkv * cells, d, slots]

        The newest `window` tokens are slots, the same ones in every cell, and what is left of it in the prompt.
        """
        groups, kv_heads, cells, heads, dim = query.shape
        prompt_keys, prompt_values = self._prompts[layer].flatten(1, 2)
        if layer not in self._decoded:
            self._decoded[layer] = key.new_empty(2, groups * kv_heads * cells, self._capacity, dim)
        new_key, new_value = self._decoded[layer].select(2, self._slots - 1)
        new_key.view(key.shape).copy_(key)
        new_value.view(key.shape).copy_(value)
        slots = self._slots if window is None else min(window, self._slots)
        keys, values = self._decoded[layer].narrow(2, self._slots - slots, slots)
        wide = prompt_keys.new_empty(query.shape).copy_(query)
        of_prompts = _product(wide.view(groups * kv_heads, -1, dim), prompt_keys, transpose=True).view(
            -1, heads, self.width
        )
        of_tokens = _product(wide.view(-1, heads, dim), keys, transpose=True)
        scores = torch.cat([of_prompts, of_tokens], -1).mul_(scale)
        bias = self._mask(scores, window)
        if bias is not None:
            scores.view(groups, -1, scores.shape[-1])[..., : self.width] += bias
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        total = weights.sum(-1, keepdim=True)
        out = _product(weights.view(groups * kv_heads, -1, scores.shape[-1]).narrow(2, 0, self.width), prompt_values)
        out.view(-1, heads, dim).add_(_product(weights.narrow(2, self.width, slots), values))
        return out.view(-1, heads, dim).div_(total).view(query.shape)

    def _mask(self, like: Tensor, window: int | None) -> Tensor | None:
        """Additive mask [groups, 1, width]: -inf in the padding of a shorter prompt and outside the window; None if it
        would mask nothing. Computed once for each layout of the cells, with a window for each token."""
        if window not in self._masks:
            places = torch.arange(self.width)
            hidden = places >= self._group_lengths[:, None]
            if window is not None:  # the query is at position length + slots - 1
                hidden |= places < self._group_lengths[:, None] + self._slots - window
            bias = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, float("-inf"))
            self._masks[window] = bias[:, None].to(like.device) if bool(hidden.any()) else None
        return self._masks[window]

    def _select(self, indices: Tensor) -> None:
        self.rows, self.lengths, self._cells = len(indices), self.lengths[indices], self._cells[indices]

    def _map(self) -> None:
        """Set `_maps`; None when row i is cell i and none is empty."""
        cells = len(self._group_lengths) * self._members
        self._maps = None
        if cells != self.rows or not torch.equal(self._cells, torch.arange(cells)):
            row_of = torch.zeros(cells, dtype=torch.int64)
            row_of[self._cells] = torch.arange(self.rows)
            device = next(iter(self._prompts.values())).device
            self._maps = (row_of.to(device), self._cells.to(device))

    def _lay_out(self) -> None:
        """Give the rows new cells, in the largest groups that leave few cells empty (EMPTY).

        An old group of c rows becomes ceil(c / members) groups of `members` cells, each with a copy of its prompt.
        """
        owners = self._cells // self._members
        counts = owners.bincount(minlength=len(self._group_lengths))
        for members in range(int(counts.max()), 0, -1):
            groups = (counts + members - 1) // members  # int64 [old groups]: how many each becomes
            if members * int(groups.sum()) <= EMPTY * self.rows:
                break
        order = owners.argsort(stable=True)
        place = torch.empty_like(order)  # of each row among the rows of its old group
        place[order] = torch.arange(self.rows) - (counts.cumsum(0) - counts)[owners[order]]
        cells = ((groups.cumsum(0) - groups)[owners] + place // members) * members + place % members
        group_sources = torch.arange(len(groups)).repeat_interleave(groups)
        cell_sources = (group_sources * self._members).repeat_interleave(members)  # an empty cell copies any
        cell_sources[cells] = self._cells
        self._move(group_sources, cell_sources, members)
        self._group_lengths, self._members, self._cells = self._group_lengths[group_sources], members, cells
        self._masks = {}
        self._map()

    def _move(self, group_sources: Tensor, cell_sources: Tensor, members: int) -> None:
        """Copy into a new grid: each group's prompt from group `group_sources[i]`, each cell's decoded tokens from cell
        `cell_sources[j]` of the old one."""
        old_groups = len(self._group_lengths)
        same = torch.equal(group_sources, torch.arange(old_groups))
        for layer, prompts in self._prompts.items():
            kv_heads, device = prompts.shape[2], prompts.device
            if not same:
                self._prompts[layer] = prompts.index_select(1, group_sources.to(device))
            if layer not in self._decoded:
                continue
            group, cell = (cell_sources // self._members).view(-1, 1, members), cell_sources.view(-1, 1, members)
            heads = torch.arange(kv_heads)[:, None]
            sources = (group * kv_heads + heads) * self._members + cell % self._members
            old = self._decoded[layer][:, :, : self._slots]
            new = old.new_empty(2, sources.numel(), self._capacity, old.shape[3])
            new[:, :, : self._slots] = old.index_select(1, sources.flatten().to(device))
            self._decoded[layer] = new


def _product(a: Tensor, b: Tensor, transpose: bool = False) -> Tensor:
    """Batched a [n, i, k] @ b [n, k, j], or with `transpose` b [n, j, k].

    Returns `a`'s dtype, which is `b`'s or a wider one; float32 for half precision on CUDA.
    """
    if a.dtype != b.dtype and not b.is_cuda and b.numel() > WIDENED_ELEMENTS:
        return _product_by_parts(a, b, transpose)
    if b.is_cuda and b.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a.to(b.dtype), b.mT if transpose else b, out_dtype=torch.float32)  # torch 2.8 or newer
    b = b.type_as(a)
    return torch.bmm(a, b.mT if transpose else b)


def _product_by_parts(a: Tensor, b: Tensor, transpose: bool) -> Tensor:
    """`_product` in parts of the batch, so that widened elements are still in the processor's cache when multiplied."""
    out = a.new_empty(*a.shape[:2], b.shape[1 if transpose else 2])
    wide = a.new_empty(max(1, WIDENED_ELEMENTS // b[0].numel()), *b.shape[1:])
    for start in range(0, len(b), len(wide)):
        part = slice(start, start + len(wide))
        b_part = wide[: len(b[part])].copy_(b[part])
        torch.bmm(a[part], b_part.mT if transpose else b_part, out=out[part])
    return out
