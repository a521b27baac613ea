"""What real models have: parameters at true size, and saved activations of small ones. For a process of its own
(`counted`), because Megatron's groups are global. The other ranks of the world do not exist: PyTorch's `fake` group
does nothing in a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from asd_megatron.distributed import device, layout
from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.models.families import shape_of
from asd_megatron.models.gpt import Implementation, Recompute, build_chunks, transformer_config
from asd_megatron.models.parameters import padded_vocabulary
from asd_megatron.models.port import ModelPort
from asd_megatron.models.published import config_of
from asd_megatron.models.routing import LoadBalance, MicroBatchRouting
from asd_megatron.records import PackedTokens
from tests.distributed.harness import run_ranks

T = TypeVar("T")


def counted(function: Callable[..., T], cases: Sequence[Any]) -> list[T]:
    """`function` of all cases, from one other process."""
    found: list[list[T]] = run_ranks(_all, 1, function, cases, init=False)
    return found[0]


def _all(rank: int, function: Callable[..., T], cases: Sequence[Any]) -> list[T]:
    device.prepare()
    return [function(*case) for case in cases]


@contextmanager
def rank_of(chosen: Layout, stage: int = 0) -> Iterator[ProcessGroups]:
    """Inside, this process is the first rank of a stage in a world of the layout's size."""
    dist.init_process_group("fake", store=FakeStore(), rank=stage * chosen.stage_size, world_size=chosen.world_size)
    yield layout.init(chosen)
    layout.shutdown_model_parallel()
    dist.destroy_process_group()


def kind_of(name: str) -> str:
    """A field of `Parameters` by Megatron's name of a parameter."""
    if "norm" in name:
        return "norms"
    parts = {
        "word_embeddings": "embedding",
        "output_layer": "head",
        "self_attention": "attention",
        "router": "router",
        "experts": "experts",
    }
    return next((kind for part, kind in parts.items() if part in name), "mlp")


def parameters(model: str, sizes: dict[str, Any], stage: int) -> dict[str, int]:
    """Of the first rank of a stage by kind, of a published model on PyTorch's `meta` device."""
    chosen, how = Layout(**sizes), Implementation()
    config = config_of(model)
    assert config is not None
    family, shape = shape_of(config)
    found: dict[str, int] = {}
    with rank_of(chosen, stage), torch.device("meta"):
        megatron = transformer_config(family, shape, chosen, dtype=torch.bfloat16, how=how)
        vocabulary = padded_vocabulary(shape.vocab, chosen.tensor)
        for chunk in build_chunks(megatron, shape, chosen, how=how, padded_vocab=vocabulary):
            for name, parameter in chunk.named_parameters():
                found[kind_of(name)] = found.get(kind_of(name), 0) + parameter.numel()
    return found


def saved(config: dict[str, Any], sizes: dict[str, Any], dtype: str, kind: str, tokens: int) -> int:
    """Bytes that one layer saves of a pack of one sequence: what a model of three layers saves more than one of two."""
    found = []
    for layers in (2, 3):
        kinds = {"layer_types": config["layer_types"][:1] * layers} if "layer_types" in config else {}
        longer = {**config, **kinds, "num_hidden_layers": layers}
        found.append(_saved(longer, Layout(**sizes), dtype, kind, tokens))
    return found[1] - found[0]


def _saved(config: dict[str, Any], chosen: Layout, dtype: str, kind: Any, tokens: int) -> int:
    seen: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used again
    with rank_of(chosen) as groups:
        port = ModelPort.build(
            config, groups, chosen, dtype=getattr(torch, dtype), layers="local", recompute=Recompute(kind)
        )
        own = set()
        for _, parameter in port.named_weights():
            torch.nn.init.normal_(parameter, std=0.02)
            own.add(parameter.untyped_storage().data_ptr())

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage
            return tensor

        own_tokens = torch.arange(tokens // chosen.context)
        pack = PackedTokens(own_tokens, own_tokens, torch.tensor([0, tokens], dtype=torch.int32), tokens)
        routing, experts = None, port.shape.experts
        if experts is not None:
            balance = LoadBalance(port.shape.layers, experts.count, 0.001, port.device)
            routing = MicroBatchRouting(torch.full((tokens,), 1 / tokens), balance)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            port.forward(port.chunks[0], pack, routing)
    return sum(storage.nbytes() for storage in seen.values())
