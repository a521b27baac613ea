"""What SGLang 0.5.23 makes of a model's config.json: what it would compute wrongly is refused before it starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asd_megatron.errors import UserError

SERVED_AS = {"Olmo3ForCausalLM": "Olmo2ForCausalLM"}
"""Architectures that a server reports under another name."""
WINDOWED = ("Olmo3ForCausalLM",)
"""Architectures whose sliding window SGLang computes; of others, Mistral and Qwen among them, it ignores it."""


def read_config(model: Path) -> dict[str, Any]:
    """The config.json of a model folder; {} if there is none that can be read, which the server itself reports."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether it is a mixture of experts. transformers 5 writes `num_local_experts` where published files have
    `num_experts`."""
    return bool(config.get("num_experts") or config.get("num_local_experts"))


def check_served(config: Mapping[str, Any], context_length: int | None = None) -> None:
    """Raise UserError for a model that SGLang computes otherwise than `transformers` does, or cannot load.

    context_length: the longest sequence that the server takes; None: that of the model.
    """
    architectures = config.get("architectures") or ()
    if "Olmo3ForCausalLM" in architectures:
        _check_olmo3_rope(config)
    if "Qwen3MoeForCausalLM" in architectures and config.get("tie_word_embeddings"):
        raise UserError(
            "config.json: tie_word_embeddings is true, and SGLang gives every Qwen3-MoE an output layer of its own,"
            " which nothing would fill: use rollout.engine embedded"
        )
    window = config.get("sliding_window")
    if "use_sliding_window" in config and not config["use_sliding_window"]:
        window = None
    longest = context_length or config.get("max_position_embeddings") or 0
    if isinstance(window, int) and window < longest and not set(architectures) & set(WINDOWED):
        raise UserError(
            f"config.json: sliding_window is {window}, and SGLang attends to all tokens of a {', '.join(architectures)}"
            f" of up to {longest}: use rollout.engine embedded, or `asd-megatron serve --context-length {window}`"
        )


def _check_olmo3_rope(config: Mapping[str, Any]) -> None:
    """SGLang reads `rope_theta` and `rope_scaling`, as they are published. With `rope_parameters` for each kind of
    layer, as transformers 5 writes them, it ends with an AttributeError (YaRN) or takes a base of 10,000 (none)."""
    kinds = config.get("rope_parameters")
    if not isinstance(kinds, Mapping) or "full_attention" not in kinds:
        return
    full, sliding = (dict(kinds.get(kind) or {}) for kind in ("full_attention", "sliding_attention"))
    base = full.pop("rope_theta", None)
    if sliding.get("rope_theta", base) != base:
        raise UserError(
            f"config.json: rope_parameters gives {base} and {sliding['rope_theta']} as bases of full and sliding"
            " attention, and SGLang knows one for both: use rollout.engine embedded"
        )
    scaling = None if full.get("rope_type", "default") == "default" else full
    new = json.dumps({"rope_theta": base, "rope_scaling": scaling})[1:-1]
    raise UserError(
        "config.json: SGLang does not read the rope_parameters of an Olmo 3 as transformers 5 writes them: replace them"
        f" by {new}, as published folders have them"
    )
