"""Parameters of real models at their true size, without memory: built on PyTorch's `meta` device by ranks of a world
that does not exist. `python -m tests.planner.build_on_meta` reads cases from standard input; run as a process of its
own, because Megatron's groups are global."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from asd_megatron.distributed import device, layout
from asd_megatron.distributed.layout import Layout
from asd_megatron.models.families import shape_of
from asd_megatron.models.gpt import Implementation, build_chunks, transformer_config
from asd_megatron.models.parameters import padded_vocabulary
from asd_megatron.models.published import config_of


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


def count(model: str, sizes: dict[str, Any], stage: int) -> dict[str, int]:
    """Of the first rank of a stage by kind."""
    chosen = Layout(**sizes)
    dist.init_process_group("fake", store=FakeStore(), rank=stage * chosen.stage_size, world_size=chosen.world_size)
    layout.init(chosen)
    config = config_of(model)
    assert config is not None
    family, shape = shape_of(config)
    how = Implementation()
    megatron = transformer_config(family, shape, chosen, dtype=torch.bfloat16, how=how)
    with torch.device("meta"):
        vocabulary = padded_vocabulary(shape.vocab, chosen.tensor)
        chunks = build_chunks(megatron, shape, chosen, how=how, padded_vocab=vocabulary)
    found: dict[str, int] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            found[kind_of(name)] = found.get(kind_of(name), 0) + parameter.numel()
    layout.shutdown_model_parallel()
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    device.prepare()
    for line in sys.stdin:
        print(json.dumps(count(*json.loads(line))), flush=True)
