"""What differs between Megatron-Core releases (0.16.1 and 0.19.2), and whether Transformer Engine is there."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch

from asd_megatron.errors import UserError


@cache
def has_transformer_engine() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def resolve_layers(asked: str) -> str:
    """`te` or `local`, from a recipe's auto, te or local."""
    if asked == "auto":
        return "te" if has_transformer_engine() else "local"
    if asked == "te" and not has_transformer_engine():
        raise UserError("model.layers te needs Transformer Engine and CUDA; install the gpu extra, or choose auto")
    return asked


def hidden_state_model(gpt_class: type) -> type:
    """GPTModel whose last stage returns hidden states after the final norm: the head is fused with the loss, outside.

    Both releases end their forward in `_postprocess`, handed the decoder's output by keyword, and begin it with
    `_preprocess`, whose second result are the rotation angles: a pack that brings its own (`packed_seq_params.angles`)
    gets those.
    """
    if not hasattr(gpt_class, "_postprocess") or not hasattr(gpt_class, "_preprocess"):
        raise UserError(
            "this release of megatron-core has no GPTModel._preprocess and _postprocess; install 0.16.1 or 0.19.2"
        )

    class HiddenStateModel(gpt_class):  # type: ignore[misc,valid-type]
        def _preprocess(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
            found = super()._preprocess(*args, packed_seq_params=packed_seq_params, **kwargs)
            own = getattr(packed_seq_params, "angles", None)
            return found if own is None else (found[0], own, *found[2:])

        def _postprocess(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
            return hidden_states

    return HiddenStateModel
