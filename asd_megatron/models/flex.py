"""Core attention by PyTorch's FlexAttention: prefix trees on GPUs, under Transformer Engine's layers and under ours.

One kernel computes a complete pack, its mask given by `models.tree_mask`. Nothing in a layer waits for the device: the
masks are made once for a pack, from its boundaries on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asd_megatron.models.attention import PackAttention, PackedCoreAttention, scaled_dot_product
from asd_megatron.models.tree_mask import BLOCK, TreeMask, listed
from asd_megatron.records import PackedTokens

SMALLEST_HEAD = 16  # head dimension from which the kernel can be used


class PackMasks:
    """The masks of one pack on its device, one for each window, made when the first layer asks for it.

    Layers of a forward pass share it, and so does recomputation in the backward pass. It must not outlive the pass:
    tensors that are made in inference mode cannot be saved for a backward pass.
    """

    def __init__(self, boundaries: Sequence[int], parents: Sequence[int], device: torch.device) -> None:
        """`boundaries`, `parents`: of `TreeMask`."""
        self._tree, self._device = TreeMask(boundaries, parents), device
        self._longest = int(self._tree.position.max()) + 1
        self._dense: dict[int | None, Tensor] = {}
        self._blocks: dict[int | None, Any] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [T, h, d], key and value [T, hkv, d], after RoPE. Returns [T, h, d]."""
        window = None if window is not None and window >= self._longest else window
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        if _has_kernel(query):
            out = _compiled()(query, key, value, self._block_mask(window), scale)
        else:
            out = scaled_dot_product(query, key, value, scale, self._dense_mask(window))
        return out[0].transpose(0, 1)

    def _dense_mask(self, window: int | None) -> Tensor:
        """bool [1, 1, T, T], True: attend."""
        if window not in self._dense:
            self._dense[window] = _moved(self._tree.seen(window)[None, None], self._device)
        return self._dense[window]

    def _block_mask(self, window: int | None) -> Any:
        if window not in self._blocks:
            self._blocks[window] = block_mask(self._tree, window, self._device)
        return self._blocks[window]


def block_mask(tree: TreeMask, window: int | None, device: torch.device) -> Any:
    """FlexAttention's BlockMask of a pack, equal to what `create_block_mask` finds by evaluating every pair of tokens
    (4 GiB of pairs at 64K tokens)."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = tree.blocks(window)
    lists: dict[str, Any] = {}
    for name, of in (("", blocks.partial), ("full_", blocks.full)):
        for side, matrix in (("kv", of), ("q", of.T)):
            counts, indices = listed(matrix)
            lists[f"{name}{side}_num_blocks"] = _moved(counts[None, None], device)
            lists[f"{name}{side}_indices"] = _moved(indices[None, None], device)
    end = _moved(tree.end, device)
    if window is None:
        function = _in_tree(end)
    else:
        before = _moved(tree.position - np.int32(window), device)
        function = _in_window(end, _moved(tree.position, device), before)
    lengths, sizes = (tree.tokens, tree.tokens), (BLOCK, BLOCK)
    return BlockMask(seq_lengths=lengths, **lists, BLOCK_SIZE=sizes, mask_mod=function)


def _in_tree(end: Tensor) -> Callable[..., Tensor]:
    """The mask of a pair of tokens without a window. `end`: of `TreeMask`."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    return mask


def _in_window(end: Tensor, position: Tensor, before: Tensor) -> Callable[..., Tensor]:
    """The same with a window. `position`: of `TreeMask`; `before`: of each query the newest position before its
    window. Not the window's size, which torch.compile would make an input of the kernel."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key]) & (position[key] > before[query])

    return mask


def _moved(values: np.ndarray, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _has_kernel(query: Tensor) -> bool:
    """Whether FlexAttention computes it. Otherwise dense attention does: on a CPU, where FlexAttention has no backward
    pass, and for packs of one block, for which torch would compile kernels of their own."""
    return query.device.type == "cuda" and query.shape[2] > BLOCK and query.shape[3] >= SMALLEST_HEAD


@cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention compiled for packs of any length and any tree: (query [1, h, T, d], key and value [1, hkv, T, d],
    BlockMask, scale) -> [1, h, T, d].

    It is compiled once for each kind of call: with or without gradients, with or without a window, and for each scale.
    `fullgraph`: more kinds than torch keeps are an error; without it torch would go on with all T x T scores.
    """
    import torch.fx.experimental._config as symbols
    from torch.nn.attention.flex_attention import flex_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: str) -> Tensor:
        return flex_attention(  # type: ignore[no-any-return]
            query,
            key,
            value,
            block_mask=mask,
            scale=float(scale),
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # not the kernel for short queries
        )

    compiled = torch.compile(attention, dynamic=True, fullgraph=True)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
        # Otherwise two sizes that are equal when it is compiled (blocks and heads, say) would have to stay equal.
        with symbols.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled(query, key, value, mask, repr(scale))  # a text is a constant, a float becomes an input

    return attend


class FlexCoreAttention(PackedCoreAttention):
    """By FlexAttention, for packs with and without shared prefixes. Raises ValueError under context parallelism."""

    supplier = f"torch {torch.__version__} FlexAttention, shared prefixes"  # for the start-up report

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.context_parallel_size > 1:
            raise ValueError("FlexAttention takes complete packs, and context parallelism cuts them")
        super().__init__(config, *args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, packed: Any) -> Tensor:
        masks = getattr(packed, "masks", None)
        if masks is None:  # all layers of the micro-batch share it
            masks = packed.masks = PackMasks(packed.boundaries, packed.parents, query.device)
        return masks.attend(query, key, value, self.scale, self.window)


class FlexPackAttention(PackAttention):
    """`PackAttention` by FlexAttention."""

    def __init__(self, packed: PackedTokens) -> None:
        self._masks = PackMasks(packed.host_boundaries(), packed.parents, packed.input_ids.device)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        return self._masks.attend(query, key, value, scale, window)
