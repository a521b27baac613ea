"""`config.json` files as published: their translation, the parameters that it implies, transformers' reading, and two
layers of each at full width."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from asd_megatron.checks.reference import reference
from asd_megatron.models.families import Family, ModelShape, shape_of
from asd_megatron.models.hf_config import warn_once
from asd_megatron.models.published import FOLDER as PUBLISHED
from asd_megatron.models.rope import Llama3Scaling, Scaling, YarnScaling
from asd_megatron.models.weights import Shapes
from tests.distributed.harness import run_ranks
from tests.models.oracle import pack
from tests.models.test_rope import assert_same_rope

FOLDER = PUBLISHED
YARN = YarnScaling(8.0, 8192, 1.2079441541679836)
LLAMA3 = Llama3Scaling(32.0, 1.0, 4.0, 8192)


@dataclass(frozen=True)
class Published:
    """What the model cards and the safetensors headers of a model say; `window`, `full`: layers without a window."""

    parameters: int  # a tied head counted once
    layers: int
    heads: tuple[int, int, int]  # queries, keys, numbers each
    positions: int
    theta: float
    tied: bool
    scaling: Scaling | None = None
    window: int | None = None
    full: int | None = None  # layers without a window; None: all


MODELS = {
    "Qwen3-0.6B": Published(596_049_920, 28, (16, 8, 128), 40960, 1e6, True),
    "Qwen3-1.7B": Published(1_720_574_976, 28, (16, 8, 128), 40960, 1e6, True),
    "Qwen3-4B": Published(4_022_468_096, 36, (32, 8, 128), 40960, 1e6, True),
    "Qwen3-4B-Instruct-2507": Published(4_022_468_096, 36, (32, 8, 128), 262144, 5e6, True),
    "Qwen3-8B": Published(8_190_735_360, 36, (32, 8, 128), 40960, 1e6, False),
    "Qwen3-30B-A3B": Published(30_532_122_624, 48, (32, 4, 128), 40960, 1e6, False),
    "Olmo-3-7B-Instruct": Published(7_298_011_136, 32, (32, 32, 128), 65536, 5e5, False, YARN, 4096, 8),
    "Olmo-3-7B-Think": Published(7_298_011_136, 32, (32, 32, 128), 65536, 5e5, False, YARN, 4096, 8),
    "Llama-3.2-1B": Published(1_235_814_400, 16, (32, 8, 64), 131072, 5e5, True, LLAMA3),
    "Qwen2.5-7B": Published(7_615_616_512, 28, (28, 4, 128), 131072, 1e6, False),
    "Mistral-7B-v0.1": Published(7_241_732_096, 32, (32, 8, 128), 32768, 1e4, False, None, 4096, 0),
    "Mistral-7B-v0.3": Published(7_248_023_552, 32, (32, 8, 128), 32768, 1e6, False),
    "SmolLM2-135M-Instruct": Published(134_515_008, 30, (9, 3, 64), 8192, 1e5, True),
}


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def parameters(family: Family, shape: ModelShape) -> int:
    """The numbers in the Hugging Face tensors of the family's rules."""
    experts, expert_ffn = (0, 0) if shape.experts is None else (shape.experts.count, shape.experts.ffn)
    sizes = Shapes(
        shape.hidden,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.ffn,
        shape.vocab,
        shape.vocab,
        experts,
        expert_ffn,
    )
    return sum(
        sum(map(prod, rule.operation.shapes(sizes)))
        * (shape.layers if rule.per_layer else 1)
        * (experts if rule.per_expert else 1)
        for rule in family.rules
        if not (shape.tied and rule.huggingface == ("lm_head.weight",))
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_published_config(name: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="asd_megatron"):
        family, shape = shape_of(read(name))
    assert not [r for r in caplog.records if r.name == "asd_megatron"]  # every field of a published config is known
    expected = MODELS[name]
    assert parameters(family, shape) == expected.parameters
    assert (shape.layers, shape.tied, shape.max_positions) == (expected.layers, expected.tied, expected.positions)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == expected.heads
    windows = [kind.window for kind in shape.attention]
    full = shape.layers if expected.full is None else expected.full
    assert windows.count(None) == full and windows.count(expected.window) == (shape.layers - full or full)
    for kind in shape.attention:
        assert kind.rotary.theta == expected.theta
        olmo_sliding = family.name == "olmo3" and kind.window is not None
        assert kind.rotary.scaling == (None if olmo_sliding else expected.scaling)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_it_as_we_do_and_what_it_writes_is_read_the_same(name: str, tmp_path: Path) -> None:
    config = read(name)
    assert_same_rope(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path)
    family, shape = shape_of(config)
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * shape.layers
    assert [kind.window for kind in shape.attention] == [window if t == "sliding_attention" else None for t in types]
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (shape.head_dim, shape.kv_heads) == (head_dim, theirs.num_key_value_heads)
    assert (shape.norm_epsilon, shape.tied) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    if shape.experts is not None:
        count, per_token = theirs.num_experts, theirs.num_experts_per_tok
        assert (shape.experts.count, shape.experts.per_token) == (count, per_token) == (128, 8)
        assert shape.experts.normalized is theirs.norm_topk_prob is True
    theirs.save_pretrained(tmp_path / "written")
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    assert ("rope_parameters" in written, "rope_theta" in written) == (True, False)
    assert shape_of(written) == (family, shape)


def two_layers(name: str) -> dict[str, Any]:
    """The published config with two of its layers; Olmo 3's have a window and none."""
    config = read(name)
    types = config.get("layer_types")
    return {**config, "num_hidden_layers": 2, **({"layer_types": types[2:4]} if types else {})}


def _parameters_built(rank: int, names: list[str]) -> dict[str, int]:
    from asd_megatron.distributed.layout import Layout, init
    from asd_megatron.models.port import ModelPort

    process_groups, found = init(Layout()), {}
    for name in names:  # no weight is touched, so none of the memory is used
        port = ModelPort.build(two_layers(name), process_groups, Layout(), dtype=torch.bfloat16, layers="local")
        found[name] = sum(parameter.numel() for chunk in port.chunks for parameter in chunk.parameters())
    return found


def test_two_layers_of_each_build_at_full_width() -> None:
    built = run_ranks(_parameters_built, 1, list(MODELS))[0]
    for name, published in MODELS.items():
        family, shape = shape_of(two_layers(name))
        assert built[name] == parameters(family, shape), name
        full, one_layer = published.parameters, built[name] - parameters(*_without_layers(name))
        assert built[name] + (published.layers - 2) * one_layer // 2 == full, name


def _without_layers(name: str) -> tuple[Family, ModelShape]:
    family, shape = shape_of(two_layers(name))
    return family, replace(shape, layers=0)


def _largest_difference(rank: int, folder: str, ids: list[torch.Tensor], logits: list[torch.Tensor]) -> float:
    from asd_megatron.checkpoint.huggingface import FolderReader, read_config
    from asd_megatron.distributed.layout import Layout, init
    from asd_megatron.models.port import ModelPort

    port = ModelPort.build(read_config(folder), init(Layout()), Layout(), dtype=torch.float32, layers="local")
    with FolderReader(folder) as reader:
        port.load(reader)
    with torch.no_grad():
        hidden = port.forward(port.chunks[0], pack(ids, context=1, rank=0, multiple=1).tokens)[:, 0]
        found = hidden @ port.head_weight().t()
    return float((found - torch.cat(logits)).abs().max())


@pytest.mark.parametrize(
    "name",
    ["SmolLM2-135M-Instruct", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Qwen3-0.6B", "Llama-3.2-1B"))],
)
def test_two_layers_at_full_width_compute_what_transformers_does(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**two_layers(name), "dtype": "float32"}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).float()
    model.save_pretrained(tmp_path)
    del model
    ids = [torch.arange(n) * 7 % 1000 for n in (9, 1, 40)]
    logits = reference(tmp_path, ids, gradients=False).logits
    assert run_ranks(_largest_difference, 1, str(tmp_path), ids, logits)[0] < 2e-5 * float(logits[2].abs().max())
