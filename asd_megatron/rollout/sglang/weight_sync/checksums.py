"""Checksums of the trainer's weights in the layout of an SGLang server.

A server fuses the tensors that it is sent (q, k, v into `qkv_proj`; gate and up into `gate_up_proj`; all experts of a
layer into two tensors) and shards them over its tensor-parallel ranks; `/weights_checker` then returns a hash of each
tensor of each rank. The same hashes are computed here while the tensors stream past, without keeping them. For example,
rank 0 of 2 holds under `model.layers.0.self_attn.qkv_proj.weight` the first half of the rows of q, then of k, then of
v; and under `mlp.experts.w13_weight` the first half of the rows of expert 0's gate, of its up, of expert 1's gate, and
so on. The layouts are those of SGLang 0.5.23 (`models/qwen3.py`, `qwen3_moe.py`, `qwen2.py`, `llama.py`, `olmo2.py`,
`layers/linear.py`, `layers/moe/fused_moe_triton/layer.py`, `layers/vocab_parallel_embedding.py`,
`managers/mm_utils.py`, `utils/weight_checker.py`). Of a matrix in block-wise FP8 a server hashes the bfloat16 numbers
that its values and scales stand for, under the matrix's name; so are they here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.weight_sync.hashes import TensorHash, for_device, hexdigests
from asd_megatron.rollout.sglang.weight_sync.protocol import NamedTensors
from asd_megatron.rollout.sglang.weight_sync.quantize import FP8, SCALE_SUFFIX, dequantize

VOCABULARY_MULTIPLE = 64  # SGLang's DEFAULT_VOCAB_PADDING_SIZE
CPU_FFN_MULTIPLE = 32  # a server on the CPU pads so many columns a rank (adjust_config_with_unaligned_cpu_tp)
Cut = Callable[[Tensor, int, int], Tensor]
"""(full tensor, rank, ranks) -> the shard that this rank of a server holds, of rows (its first dimension)."""


@dataclass(frozen=True)
class Layout:
    """What a decoder has besides attention, MLP and RMSNorm: norms of queries and keys; query, key and value biases;
    norms after attention and MLP instead of before them; experts instead of the MLP."""

    qk_norm: bool = False
    qkv_bias: bool = False
    post_norm: bool = False
    experts: bool = False


LAYOUTS = {
    "LlamaForCausalLM": Layout(),
    "MistralForCausalLM": Layout(),
    "Olmo3ForCausalLM": Layout(qk_norm=True, post_norm=True),
    "Qwen2ForCausalLM": Layout(qkv_bias=True),
    "Qwen3ForCausalLM": Layout(qk_norm=True),
    "Qwen3MoeForCausalLM": Layout(qk_norm=True, experts=True),
}


@dataclass(frozen=True)
class Piece:
    """Where one tensor is stored on the server: as number `part` of the `parts` that are stacked into `target`, cut
    along dimension `dim` by `cut_rows`."""

    target: str
    part: int
    parts: int
    cut_rows: Cut
    dim: int = 0

    def cut(self, tensor: Tensor, rank: int, ranks: int) -> Tensor:
        """The shard of the tensor that rank `rank` of `ranks` holds."""
        return self.cut_stacked(tensor[None], rank, ranks)[0]

    def cut_stacked(self, tensors: Tensor, rank: int, ranks: int) -> Tensor:
        """The shards of several tensors, [n, *shape]."""
        return self.cut_rows(tensors.movedim(1 + self.dim, 0), rank, ranks).movedim(0, 1 + self.dim)


Digests = dict[tuple[int, int], dict[str, str]]
"""(ranks, rank) -> hash by the server's name of each tensor."""


def server_pieces(config: Mapping[str, Any], device: str) -> dict[str, Piece]:
    """Every tensor of the model by Hugging Face name. `config` is its config.json, `device` the servers'.

    Raises UserError for an architecture whose server-side layout is not known here.
    """
    architecture = next((a for a in config.get("architectures") or () if a in LAYOUTS), None)
    if architecture is None:
        raise UserError(
            f"how SGLang lays out {', '.join(config.get('architectures') or ['(no architecture)'])} is not known, so "
            f"its weights cannot be checked after a transfer (known: {', '.join(LAYOUTS)}): set "
            "rollout.verify_weights to false"
        )
    layout = LAYOUTS[architecture]
    attention, key_value, ffn = _cuts(config, on_cpu=device == "cpu")
    pieces = {"model.embed_tokens.weight": Piece("model.embed_tokens.weight", 0, 1, _vocabulary)}
    norms = ["post_attention_layernorm", "post_feedforward_layernorm" if layout.post_norm else "input_layernorm"]
    norms += ["self_attn.q_norm", "self_attn.k_norm"] if layout.qk_norm else []
    for layer in range(int(config["num_hidden_layers"])):
        at = f"model.layers.{layer}."
        qkv = [
            (f"{at}self_attn.{x}_proj", cut) for x, cut in zip("qkv", (attention, key_value, key_value), strict=True)
        ]
        for kind in ("weight", "bias") if layout.qkv_bias else ("weight",):
            pieces |= _stacked(f"{at}self_attn.qkv_proj.{kind}", [(f"{name}.{kind}", cut) for name, cut in qkv])
        pieces |= _stacked(at + "self_attn.o_proj.weight", [(at + "self_attn.o_proj.weight", attention)], dim=1)
        pieces |= _experts(at + "mlp.", config, ffn) if layout.experts else _mlp(at + "mlp.", ffn)
        pieces |= {f"{at}{n}.weight": Piece(f"{at}{n}.weight", 0, 1, _full) for n in norms}
    pieces["model.norm.weight"] = Piece("model.norm.weight", 0, 1, _full)
    if not config.get("tie_word_embeddings"):
        pieces["lm_head.weight"] = Piece("lm_head.weight", 0, 1, _vocabulary)
    return pieces


def _mlp(at: str, ffn: Cut) -> dict[str, Piece]:
    gate_up = _stacked(at + "gate_up_proj.weight", [(f"{at}{x}_proj.weight", ffn) for x in ("gate", "up")])
    return gate_up | _stacked(at + "down_proj.weight", [(at + "down_proj.weight", ffn)], dim=1)


def _experts(at: str, config: Mapping[str, Any], ffn: Cut) -> dict[str, Piece]:
    """`w13_weight` [experts, gate and up rows, hidden], `w2_weight` [experts, hidden, ffn], and the router, which every
    rank holds."""
    names = [f"{at}experts.{e}." for e in range(int(config.get("num_experts") or config["num_local_experts"]))]
    w13 = [(f"{name}{x}_proj.weight", ffn) for name in names for x in ("gate", "up")]
    w2 = [(f"{name}down_proj.weight", ffn) for name in names]
    return (
        _stacked(at + "gate.weight", [(at + "gate.weight", _full)])
        | _stacked(at + "experts.w13_weight", w13)
        | _stacked(at + "experts.w2_weight", w2, dim=1)
    )


class ServerChecksums:
    """Checksums of one set of weights, for servers with the given numbers of tensor-parallel ranks.

    `dtype` and `device` ("cpu" or "cuda") are the servers'. FP8 matrices come as `quantized` yields them.
    """

    def __init__(self, config: Mapping[str, Any], ranks: Iterable[int], dtype: torch.dtype, device: str) -> None:
        self._pieces = server_pieces(config, device)
        self._dtype, self._hash_type = dtype, for_device(device)
        self._shards = [(n, rank) for n in sorted(set(ranks)) for rank in range(n)]
        self._open: dict[tuple[int, int, str], TensorHash] = {}
        self._done: dict[tuple[int, int, str], TensorHash] = {}
        self._next: dict[str, int] = {}
        self._values: dict[str, Tensor] = {}  # an FP8 matrix, until its scales follow
        self._digests: Digests | None = None
        self._others: Digests = {}  # of other ranks of the trainer

    def watch(self, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        """`tensors` unchanged, each hashed before it is yielded. Parts of one server tensor must come in order.

        Raises UserError for a tensor that no rule knows, RuntimeError if some are missing or out of order.
        """
        for name, tensor in tensors:
            self.add((name,), tensor[None])
            yield name, tensor
        self.check_complete()

    def add(self, names: Sequence[str], tensors: Tensor) -> None:
        """Hash `tensors` [n, *shape], stored one after another as parts of one server tensor. Raises as `watch`."""
        if tensors.dtype == FP8:
            self._values.update((name + SCALE_SUFFIX, values) for name, values in zip(names, tensors, strict=True))
        elif names[0] in self._values:
            for name, scales in zip(names, tensors, strict=True):
                self._add((name.removesuffix(SCALE_SUFFIX),), dequantize(self._values.pop(name), scales)[None])
        else:
            self._add(names, tensors)

    def check_complete(self) -> None:
        """Raises RuntimeError unless every tensor of the model was hashed, here or on ranks whose `digests` were
        merged."""
        others = {target for found in self._others.values() for target in found}
        missing = [
            n for n, p in self._pieces.items() if self._next.get(p.target, 0) <= p.part and p.target not in others
        ]
        if missing:
            raise RuntimeError(f"the export of the model is incomplete: {', '.join(missing[:3])} missing")

    def digests(self) -> Digests:
        """The hashes of all tensors that were complete here at the first call. Waits for the device, once."""
        if self._digests is None:
            found: Digests = {shard: {} for shard in self._shards}
            for (ranks, rank, target), digest in zip(self._done, hexdigests(list(self._done.values())), strict=True):
                found[ranks, rank][target] = digest
            self._digests = found
        return self._digests

    def merge(self, digests: Digests) -> None:
        """Take over what another rank of the trainer has hashed."""
        for shard, found in digests.items():
            self._others.setdefault(shard, {}).update(found)

    def expected(self, ranks: int, rank: int) -> dict[str, str]:
        """Hash by the server's name of each tensor that rank `rank` of `ranks` must hold, when all are complete."""
        return self.digests()[ranks, rank] | self._others.get((ranks, rank), {})

    def _add(self, names: Sequence[str], tensors: Tensor) -> None:
        """Consecutive parts of one target, [n, *shape]."""
        pieces = [self._piece(name) for name in names]
        first, last = pieces[0], pieces[-1]
        for piece, name in zip(pieces, names, strict=True):
            if piece.target != first.target or piece.part != self._next.get(piece.target, 0):
                raise RuntimeError(
                    f"{name} came twice or out of order: {piece.target} is hashed in the order of its parts"
                )
            self._next[piece.target] = piece.part + 1
        tensors = tensors.detach().to(self._dtype)
        for ranks, rank in self._shards:
            key = (ranks, rank, first.target)
            hasher = self._open.pop(key, None) or self._hash_type()
            hasher.update(first.cut_stacked(tensors, rank, ranks))
            if last.part + 1 < last.parts:
                self._open[key] = hasher
            else:
                hasher.finish()
                self._done[key] = hasher

    def _piece(self, name: str) -> Piece:
        piece = self._pieces.get(name)
        if piece is None:
            raise UserError(
                f"how SGLang stores the tensor {name} is not known, so it cannot be checked after a transfer: set "
                "rollout.verify_weights to false"
            )
        return piece


def _cuts(config: Mapping[str, Any], *, on_cpu: bool) -> tuple[Cut, Cut, Cut]:
    """How rows of query heads, of key or value heads and of the MLP are sharded.

    On CUDA the ranks must divide them, except key and value heads: one of those may go to several ranks. On the CPU
    what the ranks do not divide is padded with zeros.
    """
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or hidden // heads)
    if on_cpu:
        return _padded(heads // kv_heads * size), _padded(size), _padded(CPU_FFN_MULTIPLE)
    return _even, _shared(kv_heads, size), _even


def _stacked(target: str, sources: Sequence[tuple[str, Cut]], dim: int = 0) -> dict[str, Piece]:
    return {name: Piece(target, number, len(sources), cut, dim) for number, (name, cut) in enumerate(sources)}


def _full(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """Replicated: every rank holds the full tensor."""
    return tensor


def _even(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    if len(tensor) % ranks:
        raise UserError(f"a server with {ranks} tensor-parallel ranks cannot shard {len(tensor)} rows evenly")
    return _rows(tensor, rank, len(tensor) // ranks)


def _padded(unit: int) -> Cut:
    """Every rank has the same number of full units of rows; the last ones are padded with zeros."""
    return lambda tensor, rank, ranks: _rows(tensor, rank, -(-len(tensor) // (unit * ranks)) * unit)


def _shared(heads: int, size: int) -> Cut:
    """Like `_even`, or, with more ranks than heads, one head of `size` rows for several ranks."""

    def cut(tensor: Tensor, rank: int, ranks: int) -> Tensor:
        return _even(tensor, rank, ranks) if ranks <= heads else _rows(tensor, rank // (ranks // heads), size)

    return cut


def _vocabulary(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """Padded to a multiple of 64, or of 64 a rank if the ranks do not divide that."""
    padded = -(-len(tensor) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if padded % ranks:
        return _padded(VOCABULARY_MULTIPLE)(tensor, rank, ranks)
    return _rows(tensor, rank, padded // ranks)


def _rows(tensor: Tensor, number: int, size: int) -> Tensor:
    """Block `number` of `size` rows, with zeros after the last row."""
    block = tensor[number * size : (number + 1) * size]
    if len(block) == size:
        return block
    return torch.cat([block, block.new_zeros(size - len(block), *block.shape[1:])])
