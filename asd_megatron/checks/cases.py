"""A tiny model and deliberately hard batches for the parity check."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from asd_megatron.antisd.advantage import group_advantages
from asd_megatron.records import DemonstrationSource, Example, FinishReason, Rollout

ModelKind = Literal["untied", "tied", "moe"]
VOCABULARY = 99  # not a multiple of any tensor-parallel size: padded rows are part of the check


def write_tiny_model(folder: Path, kind: ModelKind, *, seed: int = 3) -> None:
    """A random four-layer Qwen3, or Qwen3-MoE with 6 experts, 2 for each token, as a Hugging Face folder (float32),
    with weights large enough that logits differ by several nats.

    Norm weights lie around 0.4: near 1, float32 resolves a weight to 6e-8 only, 1e-4 of what two Adam steps change.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": kind == "tied",
        "initializer_range": 0.25,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if kind == "moe":
        experts: dict[str, Any] = {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        }
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, **experts)).float()
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**settings)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(0.4).add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def hard_batch(seed: int, groups: int = 4, size: int = 3) -> list[Example]:
    """Rollouts of very unequal lengths, one without privileged context, some with unsampled tokens inside, a group of
    equal rewards; some prompts and demonstrations long enough for prefix sharing."""
    rng = random.Random(seed)  # noqa: S311 (reproducible, no secret)
    lengths = [1, 2, 40, 7, 3, 19, 5, 33, 1, 11, 2, 6]
    ids = lambda n: np.array([rng.randrange(2, VOCABULARY) for _ in range(n)], dtype=np.int32)  # noqa: E731
    examples = []
    for g in range(groups):
        rewards = torch.tensor([float(rng.random() < 0.5) for _ in range(size)])
        if g == 0:
            rewards = torch.tensor([1.0] + [0.0] * (size - 1))
        if g == 1:
            rewards[:] = 1.0
        advantages = group_advantages(rewards).tolist()
        prompt = ids((1, 37, 9, 18)[g % 4])
        demonstration = ids((30, 3, 1, 40)[g % 4])
        for sample in range(size):
            number = g * size + sample
            response = ids(lengths[number % len(lengths)])
            masked = number % 5 == 2
            rollout = Rollout(
                prompt_id=f"p{g}",
                sample=sample,
                prompt_ids=prompt,
                response_ids=response,
                logprobs=np.zeros(len(response), dtype=np.float32),
                finish_reason=FinishReason.STOP,
                weight_version=0,
                loss_mask=np.array([not (masked and 2 <= t < 4) for t in range(len(response))]),
            )
            context = number != 4
            teacher = np.concatenate([prompt, demonstration, ids(1 + rng.randrange(9))]) if context else None
            examples.append(
                Example(
                    rollout=rollout,
                    reward=float(rewards[sample]),
                    group_advantage=advantages[sample],
                    teacher_prompt_ids=teacher,
                    demonstration_source=DemonstrationSource.REFERENCE if context else DemonstrationSource.NONE,
                )
            )
    return examples
