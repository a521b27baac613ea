import torch
from torch import Tensor


def moe_permute(
    inp: Tensor, routing_map: Tensor, num_out_tokens: int = -1, max_token_num: int = -1, map_type: str = "mask"
) -> tuple[Tensor, Tensor]:
    assert map_type == "mask"
    rows = _rows(routing_map)
    return inp[rows], rows


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(routing_map)
    return inp[rows], probs.t()[routing_map.bool().t()], rows


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
) -> Tensor:
    assert map_type == "mask" and merging_probs is None and probs is None and restore_shape is not None
    return inp.new_zeros(restore_shape).index_add(0, row_id_map, inp)


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    parts = torch.split(inp, split_sizes.tolist())
    return torch.cat([parts[i] for i in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        moe_sort_chunks_by_index(inp, split_sizes, sorted_index),
        moe_sort_chunks_by_index(probs, split_sizes, sorted_index),
    )


def _rows(routing_map: Tensor) -> Tensor:
    """The token of every row of the permuted tensor: those of expert 0 in order, then of expert 1, ..."""
    return routing_map.bool().t().nonzero()[:, 1]
