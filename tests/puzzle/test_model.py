"""The model's size, shape and initialisation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from asd_megatron.puzzle.model import puzzle_config, write_initial_model
from asd_megatron.puzzle.task import PuzzleStream


def test_an_ordinary_folder(tmp_path: Path) -> None:
    folder = write_initial_model(tmp_path / "model", seed=3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert 1e5 <= sum(p.numel() for p in model.parameters()) <= 2e5
    assert model.dtype == torch.float32 and model.config.model_type == "qwen3"
    assert model.config.vocab_size == len(tokenizer)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    problem = PuzzleStream.of("test").take(1)[0]
    ids = tokenizer.apply_chat_template(list(problem.messages or ()), add_generation_prompt=True, return_dict=False)
    assert model(torch.tensor([ids])).logits.shape == (1, 19, 112)


def test_initialisation(tmp_path: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(write_initial_model(tmp_path / "a", seed=3)).state_dict()
    layer = "model.layers.1."
    assert state["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state[layer + "self_attn.q_proj.weight"].std().item() == pytest.approx(0.1, rel=0.05)
    assert state[layer + "mlp.down_proj.weight"].std().item() == pytest.approx(0.1 / math.sqrt(4), rel=0.05)
    assert torch.all(state[layer + "self_attn.q_norm.weight"] == 1)
    again = AutoModelForCausalLM.from_pretrained(write_initial_model(tmp_path / "b", seed=3)).state_dict()
    other = AutoModelForCausalLM.from_pretrained(write_initial_model(tmp_path / "c", seed=4)).state_dict()
    assert all(torch.equal(state[k], again[k]) for k in state)
    assert not torch.equal(state["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_two_ranks_divide_it() -> None:
    config = puzzle_config()
    for size in (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.vocab_size):
        assert size % 2 == 0
    assert config.num_hidden_layers == 2 and puzzle_config(4).num_hidden_layers == 4
