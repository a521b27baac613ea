from transformer_engine.pytorch import distributed, ops, optimizers, tensor
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.module import (
    Fp8Padding,
    Fp8Unpadding,
    GroupedLinear,
    LayerNorm,
    LayerNormLinear,
    Linear,
    RMSNorm,
)
from transformer_engine.pytorch.quantization import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.tensor import Float8Tensor, QuantizedTensor

__all__ = [
    "DotProductAttention",
    "Float8Tensor",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "QuantizedTensor",
    "RMSNorm",
    "distributed",
    "fp8_autocast",
    "fp8_model_init",
    "ops",
    "optimizers",
    "tensor",
]
