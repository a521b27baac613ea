import torch
from torch import Tensor


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _positions(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Of each token of a packed tensor: from 0 in every sequence, whatever angles are given. A context-parallel rank
    holds the chunks r and 2 cp - 1 - r of each."""
    places = []
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        chunks = torch.arange(end - start).chunk(2 * cp_size) if cp_size > 1 else [torch.arange(end - start)]
        places += [chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]] if cp_size > 1 else chunks
    return torch.cat(places)


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    assert fused and not interleaved and start_positions is None and freqs.dtype == torch.float32
    if tensor_format == "thd":
        assert cu_seqlens is not None and t.dim() == 3
        freqs = freqs[_positions(cu_seqlens, cp_size, cp_rank)][:, 0]
    turned, rest = t[..., : freqs.shape[-1]], t[..., freqs.shape[-1] :]
    turned = turned * freqs.cos().to(t.dtype) + _rotated(turned) * freqs.sin().to(t.dtype)
    return torch.cat([turned, rest], -1)
