"""The model and its optimizer as the recipe's sections say."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from asd_megatron.checkpoint.huggingface import FolderReader
from asd_megatron.config import AnyRecipe, Recipe
from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.distributed.objects import meet
from asd_megatron.errors import UserError
from asd_megatron.models.compat import resolve_attention
from asd_megatron.models.gpt import Recompute
from asd_megatron.models.loading import FullTensor
from asd_megatron.models.port import ModelPort
from asd_megatron.observe.progress import print_line
from asd_megatron.observe.transfer import TransferProgress
from asd_megatron.trainer.optimizer import Optimizer


def build_port(
    recipe: AnyRecipe,
    hf_config: Mapping[str, Any],
    source: Path,
    process_groups: ProcessGroups,
    layout: Layout,
    *,
    tensors: Mapping[str, FullTensor] | None = None,
    training: bool = True,
) -> ModelPort:
    """The model with the weights of `tensors` (None: of the Hugging Face folder `source`), wrapped for training unless
    it is only to sample. Collective."""
    dtype = dtype_of(recipe.model.dtype)
    port = ModelPort.build(
        hf_config,
        process_groups,
        layout,
        dtype=dtype,
        layers=recipe.model.layers,
        attention_backend=recipe.model.attention_backend,
        recompute=Recompute(recipe.model.recompute, recipe.model.recompute_layers),
        precision=recipe.precision.recipe,
        fuse_weight_gradient=recipe.precision.fuse_weight_gradient,
        attention=resolve_attention(dtype, layout, shares_prefixes=recipe.batching.share_prefixes is not False),
    )
    load_weights(recipe, port, source, tensors)
    if not training:
        return port
    port.wrap_ddp(
        distributed_optimizer=recipe.parallelism.distributed_optimizer,
        overlap_grad_reduce=recipe.parallelism.overlap_grad_reduce,
    )
    return port


def load_weights(
    recipe: AnyRecipe, port: ModelPort, source: Path, tensors: Mapping[str, FullTensor] | None = None
) -> None:
    """Load the weights of `tensors`, or of the Hugging Face folder `source`. Collective."""
    host = port.process_groups.host
    shown = recipe.logging.progress and host.rank() == 0
    progress = TransferProgress("loading the model", lambda line: print_line(line, sys.stderr)) if shown else None
    with FolderReader(source) if tensors is None else nullcontext(tensors) as given:
        port.load(given, progress=progress)
    meet(host)  # storage may serve some ranks much later than others


def build_optimizer(recipe: AnyRecipe, port: ModelPort) -> Optimizer:
    """The optimizer with the learning-rate schedule of the complete run."""
    return Optimizer(
        port,
        **recipe.optimizer.model_dump(),
        total_steps=recipe.run.steps * updates_per_step(recipe),
        distributed=recipe.parallelism.distributed_optimizer,
    )


def shares_prefixes(recipe: AnyRecipe, port: ModelPort) -> bool:
    """Whether packs share prefixes. Raises UserError when the recipe says so and the model's attention cannot."""
    asked = recipe.batching.share_prefixes
    if asked and not port.shares_prefixes:
        raise UserError(
            "batching.share_prefixes true: the attention of this model does not support shared prefixes; leave"
            " batching.share_prefixes out, or set model.layers local"
        )
    return port.shares_prefixes if asked is None else asked


def updates_per_step(recipe: AnyRecipe) -> int:
    """Optimizer steps of one training step."""
    return recipe.algorithm.updates_per_batch * recipe.algorithm.epochs if isinstance(recipe, Recipe) else 1


def dtype_of(name: str) -> torch.dtype:
    """That of the recipe's `model.dtype` on this machine."""
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
