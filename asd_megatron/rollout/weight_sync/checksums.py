"""The trainer's weights as an SGLang server holds them, by checksum.

A server fuses what the trainer sends (q, k, v into `qkv_proj`; gate and up into `gate_up_proj`) and cuts it over its
tensor-parallel ranks; `/weights_checker` then tells a hash of each tensor of each rank. The same hashes are worked out
here while the tensors stream by, without holding them. What SGLang 0.5.23 does was read in its `models/qwen3.py`,
`models/llama.py`, `layers/linear.py`, `layers/vocab_parallel_embedding.py` and `managers/mm_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.rollout.weight_sync.hashes import TensorHash
from asd_megatron.rollout.weight_sync.protocol import NamedTensors

VOCABULARY_MULTIPLE = 64  # SGLang's DEFAULT_VOCAB_PADDING_SIZE
QK_NORM = {"Qwen3ForCausalLM": True, "LlamaForCausalLM": False}
Cut = Callable[[Tensor, int, int], Tensor]
"""(whole tensor, rank, ranks) -> what that rank of a server holds of it."""


@dataclass(frozen=True)
class Piece:
    """How one tensor enters the server's: as number `part` of the `parts` that are stacked into `target`."""

    target: str
    part: int
    parts: int
    cut: Cut


def server_pieces(config: Mapping[str, Any]) -> dict[str, Piece]:
    """Every tensor of the model by Hugging Face name. `config` is its config.json.

    Raises UserError for an architecture whose server-side layout is not known here.
    """
    architecture = next((a for a in config.get("architectures") or () if a in QK_NORM), None)
    if architecture is None:
        raise UserError(
            f"how SGLang lays out {', '.join(config.get('architectures') or ['(no architecture)'])} is not known, so "
            f"its weights cannot be checked after a transfer (known: {', '.join(QK_NORM)}): switch the receipt of the "
            "weight synchronisation off"
        )
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    kv = _heads(kv_heads, int(config.get("head_dim") or hidden // heads))
    pieces = {"model.embed_tokens.weight": Piece("model.embed_tokens.weight", 0, 1, _vocabulary)}
    for layer in range(int(config["num_hidden_layers"])):
        at = f"model.layers.{layer}."
        pieces |= _stacked(at + "self_attn.qkv_proj", (("q_proj", _rows), ("k_proj", kv), ("v_proj", kv)))
        pieces |= _stacked(at + "mlp.gate_up_proj", (("gate_proj", _rows), ("up_proj", _rows)))
        pieces |= {at + n: Piece(at + n, 0, 1, _columns) for n in ("self_attn.o_proj.weight", "mlp.down_proj.weight")}
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if QK_NORM[architecture] else []
        pieces |= {f"{at}{n}.weight": Piece(f"{at}{n}.weight", 0, 1, _whole) for n in norms}
    pieces["model.norm.weight"] = Piece("model.norm.weight", 0, 1, _whole)
    if not config.get("tie_word_embeddings"):
        pieces["lm_head.weight"] = Piece("lm_head.weight", 0, 1, _vocabulary)
    return pieces


class ServerChecksums:
    """Checksums of one set of weights, for servers with the given numbers of tensor-parallel ranks.

    `dtype` is the server's, `hash_type` what its device hashes with (`hashes.for_device`).
    """

    def __init__(
        self, config: Mapping[str, Any], ranks: Iterable[int], dtype: torch.dtype, hash_type: type[TensorHash]
    ) -> None:
        self._pieces = server_pieces(config)
        self._dtype, self._hash_type = dtype, hash_type
        self._layouts = sorted(set(ranks))
        self._open: dict[tuple[int, int, str], TensorHash] = {}
        self._done: dict[tuple[int, int], dict[str, str]] = {(n, r): {} for n in self._layouts for r in range(n)}
        self._next: dict[str, int] = {}

    def watch(self, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        """`tensors` again, each hashed before it is handed on. Parts of one server tensor must come in their order.

        Raises UserError for a tensor that no rule knows, RuntimeError if some are missing or out of order.
        """
        for name, tensor in tensors:
            self._add(name, tensor)
            yield name, tensor
        missing = [n for n, piece in self._pieces.items() if self._next.get(piece.target, 0) <= piece.part]
        if missing:
            raise RuntimeError(f"the model was not exported whole: {', '.join(missing[:3])} missing")

    def expected(self, ranks: int, rank: int) -> dict[str, str]:
        """Hash by the server's name of each tensor that rank `rank` of `ranks` must hold, after `watch` has ended."""
        return self._done[ranks, rank]

    def _add(self, name: str, tensor: Tensor) -> None:
        piece = self._pieces.get(name)
        if piece is None:
            raise UserError(
                f"how SGLang stores the tensor {name} is not known, so it cannot be checked after a transfer: switch "
                "the receipt of the weight synchronisation off"
            )
        if self._next.get(piece.target, 0) != piece.part:
            raise RuntimeError(f"{name} came twice or out of order: {piece.target} is hashed as its parts arrive")
        self._next[piece.target] = piece.part + 1
        tensor = tensor.detach().to(self._dtype)
        for ranks, rank in self._done:
            key = (ranks, rank, piece.target)
            hasher = self._open.pop(key, None) or self._hash_type()
            hasher.update(piece.cut(tensor, rank, ranks))
            if piece.part + 1 < piece.parts:
                self._open[key] = hasher
            else:
                self._done[ranks, rank][piece.target] = hasher.hexdigest()


def _stacked(target: str, sources: tuple[tuple[str, Cut], ...]) -> dict[str, Piece]:
    prefix = target.rpartition(".")[0]
    return {
        f"{prefix}.{source}.weight": Piece(f"{target}.weight", number, len(sources), cut)
        for number, (source, cut) in enumerate(sources)
    }


def _whole(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    return tensor


def _rows(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    return tensor[_share(tensor.shape[0], rank, ranks)]


def _columns(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    return tensor[:, _share(tensor.shape[1], rank, ranks)]


def _heads(number: int, size: int) -> Cut:
    """Key or value heads: cut like rows, or, with more ranks than heads, one head for several ranks."""

    def cut(tensor: Tensor, rank: int, ranks: int) -> Tensor:
        if ranks <= number:
            return _rows(tensor, rank, ranks)
        head = rank // (ranks // number)
        return tensor[head * size : (head + 1) * size]

    return cut


def _vocabulary(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """Rows, after padding with zeros to a multiple of 64, or of 64 a rank if the ranks do not divide that."""
    multiple = VOCABULARY_MULTIPLE
    if -(-tensor.shape[0] // multiple) * multiple % ranks:
        multiple *= ranks
    size = -(-tensor.shape[0] // multiple) * multiple // ranks
    part = tensor[rank * size : (rank + 1) * size]
    return part if len(part) == size else torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])


def _share(length: int, rank: int, ranks: int) -> slice:
    if length % ranks:
        raise UserError(f"a server with {ranks} tensor-parallel ranks cannot cut {length} rows or columns evenly")
    size = length // ranks
    return slice(rank * size, (rank + 1) * size)
