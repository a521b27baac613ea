"""A Qwen3-MoE from a dense Qwen3 by sparse upcycling: every MLP becomes experts that begin as copies of it.

    python examples/moe/make_model.py [--source FOLDER] [--experts 6] [--per-token 2] [--noise 0.05] [FOLDER]

The source is the puzzle's warm-started model, the target work/puzzle-moe (a second). The router is random and the
probabilities of a token's experts add up to 1, so without noise the model computes what the dense one does, and with
some nearly that; the noise (relative to each matrix's deviation) lets the experts differ. A tied embedding becomes a
head of its own: SGLang serves no tied Qwen3-MoE.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_megatron.checkpoint.huggingface import FolderReader, copy_others, read_config, write_weights
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_folder
from asd_megatron.models.families import family_of
from asd_megatron.run.sources import WARM_START, model_folder

FOLDER = Path("work/puzzle-moe")
PROJECTION = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")


def moe_config(dense: Mapping[str, Any], experts: int, per_token: int) -> dict[str, Any]:
    """The config of the upcycled model. Raises UserError for a model that is no dense Qwen3."""
    if family_of(dense).name != "qwen3":
        raise UserError(f"{family_of(dense).name} models have no mixture of experts here: give a dense Qwen3 folder")
    return {
        **dense,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": dense["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    }


def upcycled(reader: FolderReader, config: Mapping[str, Any], noise: float) -> Iterator[tuple[str, Tensor]]:
    """The new model's tensors by name."""
    generator = torch.Generator().manual_seed(0)
    experts, hidden = int(config["num_experts"]), int(config["hidden_size"])
    for name in sorted(reader):
        tensor = reader[name][:]
        if name == "model.embed_tokens.weight" and "lm_head.weight" not in reader:
            yield "lm_head.weight", tensor.clone()
        match = PROJECTION.fullmatch(name)
        if match is None:
            yield name, tensor
            continue
        layer = f"model.layers.{match[1]}.mlp."
        if match[2] == "gate":
            yield f"{layer}gate.weight", torch.randn(experts, hidden, generator=generator).to(tensor.dtype) * 0.1
        for expert in range(experts):
            own = noise * tensor.std() * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            yield f"{layer}experts.{expert}.{match[2]}_proj.weight", tensor + own


def make_model(source: Path, folder: Path, *, experts: int = 6, per_token: int = 2, noise: float = 0.05) -> Path:
    """Write the model folder, complete or not at all, in place of an older one. Returns it."""
    config = moe_config(read_config(source), experts, per_token)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FolderReader(source) as reader, atomic_folder(folder, replace=True) as target:
        copy_others(source, target, torch.float32)  # the config is replaced, with the source's own dtype
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_weights(upcycled(reader, config, noise), target, 4 << 30)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help=f"where to write it (default: {FOLDER})")
    parser.add_argument("--source", default=WARM_START, help=f"a dense Qwen3 folder (default: {WARM_START})")
    parser.add_argument("--experts", type=int, default=6, help="experts of each layer (default: 6)")
    parser.add_argument("--per-token", type=int, default=2, help="experts of each token (default: 2)")
    parser.add_argument("--noise", type=float, default=0.05, help="how much the experts differ (default: 0.05)")
    arguments = parser.parse_args()
    try:
        print(
            make_model(
                model_folder(arguments.source),
                arguments.folder,
                experts=arguments.experts,
                per_token=arguments.per_token,
                noise=arguments.noise,
            )
        )
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
