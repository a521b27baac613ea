"""A pack's sequences, positions and segments in the form that Megatron's layers take."""

from __future__ import annotations

from typing import Any

import torch

from asd_megatron.models.rope import Rotation
from asd_megatron.records import PackedTokens

LENGTHS = 1024
"""Transformer Engine chooses its attention anew for every value of the longest length: it gets a multiple of this."""


def packed_parameters(
    packed: PackedTokens, rotation: Rotation, *, as_one: bool, fused_rotation: bool, te_attention: bool
) -> Any:
    """Megatron's PackedSeqParams of a pack, with `angles`, and `boundaries` and `parents` for our attention.

    as_one: `cu_seqlens_*` describe one sequence, the complete pack, whose angles are those of the tokens' own
    positions. Megatron and Transformer Engine's kernel rotate the tokens of every sequence by the first angles, so
    a segment of a prefix tree could otherwise not begin anywhere but at 0. Our attention reads the segments from
    `boundaries` and `parents`. The one sequence's boundaries stand where the rotation reads them: on the device for the
    kernel (`fused_rotation`), on the host for Megatron's own, which would wait for the device in every layer.

    te_attention: the core attention is Transformer Engine's, which has sequences only, no segments.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    device = packed.input_ids.device
    if as_one:
        longest = len(packed.input_ids)
        where = device if fused_rotation else torch.device("cpu")
        sequences = torch.arange(0, longest + 1, longest, dtype=torch.int32, device=where)
        positions = packed.position_ids
    else:
        longest, sequences = packed.max_seqlen, packed.cu_seqlens
        if te_attention:
            longest = -(-longest // LENGTHS) * LENGTHS
        positions = torch.arange(packed.max_seqlen, device=device)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=sequences,
        cu_seqlens_kv=sequences,
        # The same objects: equal ones in other tensors count as padding between sequences, which costs Transformer
        # Engine's flash attention.
        cu_seqlens_q_padded=sequences,
        cu_seqlens_kv_padded=sequences,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if hasattr(params, "pad_between_seqs"):  # 0.19.2
        params.pad_between_seqs = False
    params.angles = rotation.angles(positions[:, None])
    if not te_attention:
        params.boundaries, params.parents = packed.host_boundaries(), packed.parents
    return params
