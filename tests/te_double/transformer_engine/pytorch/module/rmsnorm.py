from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class RMSNorm(TransformerEngineBaseModule):
    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        assert not zero_centered_gamma and not kwargs.keys() - {"device", "dtype"}
        super().__init__()
        size = hidden_size if normalized_shape is None else normalized_shape
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=params_dtype or kwargs.get("dtype")))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x, self.weight, self.eps)
