"""RMSNorm for machines without Transformer Engine; unlike Megatron's own stand-in it allows sequence parallelism. Norms
that Megatron has nowhere: over a sharded projection, and after a sub-layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32; returns the dtype of x.

    Under sequence parallelism the weight is marked, so that Megatron sums its gradient over tensor-parallel ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in both directions: every rank's loss depends on the sum, and so on every rank's part of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def projection_norm(x: Tensor, weight: Tensor, eps: float, group: dist.ProcessGroup | None) -> Tensor:
    """x / rms(x) * weight over a projection that is sharded over `group` (None: not sharded).

    x [..., heads, head_dim], weight [heads * head_dim], this rank's heads; the mean square is that of all ranks' heads.
    Computed in float32; returns the dtype of x.
    """
    h = x.flatten(-2).float()
    total = h.square().sum(-1, keepdim=True)
    width = h.shape[-1]
    if group is not None:
        total, width = _SumOverRanks.apply(total, group), width * group.size()
    h = h * torch.rsqrt(total / width + eps)
    return (weight * h.to(x.dtype)).view(x.shape)


class ProjectionNorm(torch.nn.Module):
    """`projection_norm` of all query heads, or all key heads, in place of Megatron's norm of each head.

    heads: of this tensor-parallel rank. The weight is sharded like the projection's rows.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, *, heads: int, **_: Any) -> None:
        from megatron.core import parallel_state

        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype))
        self.eps = eps
        tp = parallel_state.get_tensor_model_parallel_group()
        self.group = tp if tp.size() > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return projection_norm(x, self.weight, self.eps, self.group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron's description of the weight for a checkpoint: sharded along its only dimension."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)
        return sharded


def with_post_norm(linear: type, norm: type) -> type:
    """A row-parallel linear layer of Megatron's whose output is normalized: the end of a sub-layer of a model whose
    norms follow its sub-layers."""

    class PostNormLinear(linear):  # type: ignore[misc,valid-type]
        def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_norm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            out, bias = super().forward(x)
            return self.post_norm(out), bias

    return PostNormLinear
