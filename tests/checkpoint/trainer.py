"""What the tests of checkpoints train: a tiny model, Megatron's optimizer and its schedule, without data."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from asd_megatron.checkpoint import training
from asd_megatron.models.precision import BFLOAT16, Precision
from tests.models import everywhere

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 62,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
}
MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
}
"""Makes a Qwen3-MoE of CONFIG."""
RUN_STATE = {"step": 2, "gate": {"open": True, "h_warm": 0.1 + 0.2, "history": [math.inf, None]}, "text": "é"}


def weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random full tensors for `ModelPort.load`."""
    g = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


class Trainer:
    """A port, Megatron's optimizer and its schedule. Gradients are a function of the weights.

    copies: keep the initial weights and a moving average. change: alters a chunk's modules before it is wrapped.
    layers: `te` in a process that finds the stand-in. config: replaces values of CONFIG.
    """

    def __init__(
        self,
        layout: dict[str, Any],
        distributed: bool,
        seed: int,
        dtype: torch.dtype = torch.float32,
        change: Callable[[Any], None] = lambda chunk: None,
        copies: bool = False,
        layers: Literal["local", "te"] = "local",
        precision: Precision = BFLOAT16,
        **config: Any,
    ) -> None:
        from asd_megatron.distributed.layout import Layout, init

        sizes = Layout(**layout)
        groups = init(sizes)
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from asd_megatron.models.port import ModelPort
        from asd_megatron.models.weight_copies import WeightCopies

        self.port = ModelPort.build(
            {**CONFIG, **config}, groups, sizes, dtype=dtype, layers=layers, precision=precision
        )
        for chunk in self.port.chunks:
            change(chunk)
        self.port.load(weights(self.port.expected(), seed))
        self.port.wrap_ddp(distributed_optimizer=distributed, overlap_grad_reduce=False)
        self.copies = WeightCopies(self.port, initial=True, ema_rate=0.3) if copies else None
        settings = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            min_lr=0.0,
            weight_decay=0.01,
            clip_grad=1.0,
            use_distributed_optimizer=distributed,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            **precision.optimizer_keys(),
        )
        self.optimizer = get_megatron_optimizer(settings, self.port.chunks, use_gloo_process_groups=False)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=1e-2,
            min_lr=0.0,
            lr_warmup_steps=2,
            lr_decay_steps=10,
            lr_decay_style="linear",
            start_wd=0.01,
            end_wd=0.01,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self.scheduler.step(1)

    def steps(self, numbers: range) -> None:
        for number in numbers:
            for chunk in self.port.chunks:
                chunk.zero_grad_buffer()
                parameter: Any
                for parameter in chunk.parameters():
                    parameter.main_grad.copy_(torch.sin(parameter.detach().float() * 37 * (number + 1)))
            self.optimizer.step()
            if self.copies is not None:
                self.copies.follow()
            self.scheduler.step(1)

    def save(self, folder: Path, step: int, run_state: dict[str, Any] = RUN_STATE, keep: int = 2) -> Path:
        return training.save(
            folder, step, self.port, self.optimizer, self.scheduler, run_state, keep=keep, copies=self.copies
        )

    def load(self, path: Path | None) -> dict[str, Any]:
        assert path is not None
        return training.load(path, self.port, self.optimizer, self.scheduler, self.copies)

    def kept(self) -> dict[str, Tensor]:
        """All full tensors of the copies, each rounded to the model's dtype."""
        assert self.copies is not None
        found = {}
        for name in self.copies.names:
            with self.copies.in_place(name):
                found |= {f"{name} {key}": tensor.clone() for key, tensor in self.weights().items()}
        return found

    def weights(self) -> dict[str, Tensor]:
        return everywhere.weights(self.port)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])
