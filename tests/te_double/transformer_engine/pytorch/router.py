"""Fused routing, which Megatron-Core imports with Transformer Engine and this project leaves off."""

from typing import Any


def fused_topk_with_score_function(*_: Any, **__: Any) -> Any:
    raise NotImplementedError


def fused_compute_score_for_moe_aux_loss(*_: Any, **__: Any) -> Any:
    raise NotImplementedError


def fused_moe_aux_loss(*_: Any, **__: Any) -> Any:
    raise NotImplementedError
