from typing import Any

import torch
from torch import Tensor


def general_gemm(
    A: Tensor,
    B: Tensor,
    out_dtype: torch.dtype | None = None,
    quantization_params: Any = None,
    gelu: bool = False,
    gelu_in: Tensor | None = None,
    alpha: float = 1.0,
    beta: float | None = None,
    accumulate: bool = False,
    layout: str = "TN",
    out: Tensor | None = None,
    bias: Tensor | None = None,
    use_split_accumulator: bool = False,
    grad: bool = False,
    ub: Any = None,
    ub_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
) -> tuple[Tensor, None, None, None]:
    """B (transposed by the layout's second letter) times A (by its first): TN is B @ A.T."""
    assert layout in ("TN", "NN", "NT") and out is None and bias is None and not accumulate
    left = B.t() if layout[1] == "T" else B
    right = A.t() if layout[0] == "T" else A
    dtype = out_dtype or A.dtype
    return left.to(dtype) @ right.to(dtype), None, None, None
