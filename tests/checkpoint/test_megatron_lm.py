"""A checkpoint of Megatron-Core's own GPTModel, with what plain Megatron-LM adds, converted and run by transformers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from asd_megatron.checkpoint.conversion import megatron_to_hf
from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.inspection import inspect
from asd_megatron.checkpoint.locate import find, find_checkpoint
from asd_megatron.errors import UserError
from tests.checkpoint import megatron_writer
from tests.checkpoint.trainer import CONFIG
from tests.distributed.harness import run_ranks

VOCABULARY, PADDED = 61, 128
IDS = torch.arange(2, 40) % VOCABULARY


def _save(rank: int, root: str) -> torch.Tensor:
    """Save a random model under tensor parallelism 2 as iterations 5 (layers stacked) and 6 (each with its own keys);
    its logits of IDS."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from asd_megatron.distributed.layout import Layout, init

    init(Layout(tensor=2))
    config = TransformerConfig(
        num_layers=4,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.3,
        use_cpu_initialization=True,
        tensor_model_parallel_size=2,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
        vocab_size=PADDED,
        max_sequence_length=64,
        parallel_output=False,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=10000,
    ).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    given = argparse.Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=1, num_layers=4)
    for iteration, singleton in ((5, False), (6, True)):
        folder = Path(root) / f"iter_{iteration:07d}"
        folder.mkdir(exist_ok=True)
        state = {
            "args": given,
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "content_metadata": {"singleton_local_shards": singleton},
            "model": model.sharded_state_dict(metadata={"singleton_local_shards": singleton}),
        }
        megatron_writer.save(folder, state)
    causal = torch.ones(1, 1, len(IDS), len(IDS)).triu(1).bool()
    with torch.no_grad():
        return model(IDS[None], torch.arange(len(IDS))[None], causal)[0, :, :VOCABULARY]


def test_what_megatron_saves_gives_the_same_logits_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    want = run_ranks(_save, 2, str(tmp_path))[0]
    model = tmp_path / "hf"
    model.mkdir()
    config = {**CONFIG, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("6")
    assert find_checkpoint(tmp_path).name == "iter_0000006"
    for name in ("iter_0000005", "iter_0000006"):
        out = megatron_to_hf(DistributedCheckpoint(tmp_path / name), model, tmp_path / f"{name}_hf")
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS[None]).logits[0], want, rtol=0, atol=2e-5)
        facts = inspect(find(tmp_path / name)).facts
        assert facts["written by"] == "Megatron-LM" and facts["step"] == int(name[-1])
        assert facts["tensor parallelism of the writer"] == 2 and facts["layout"] == "tensor 2, pipeline 1"
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5, "tie_word_embeddings": True}))
    for name in ("iter_0000005", "iter_0000006"):
        with pytest.raises(
            UserError, match=r"output_layer.weight \(128, 16\) is not in the model \(a head that is not"
        ):
            megatron_to_hf(DistributedCheckpoint(tmp_path / name), model, tmp_path / "out")
