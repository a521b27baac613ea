"""Memory of an SGLang server on one of its GPUs, and the tokens that its KV cache holds.

A server takes `memory_fraction` of what is free when it starts for weights and KV cache (SGLang's
mem-fraction-static, relative to the memory before the weights are loaded); the rest is for activations and CUDA graphs.
One token of KV cache has 2 x layers x kv_heads / min(TP, kv_heads) x head_dim x 2 bytes on each GPU: more GPUs than
key heads hold the same head.
"""

from __future__ import annotations

from asd_megatron.models.family import ModelShape
from asd_megatron.planner.hardware import GIB
from asd_megatron.planner.parameters import model_parameters
from asd_megatron.planner.setting import BYTES, Setting

CONTEXT = 0.6 * GIB
"""Of a process on a GPU: the CUDA context with its loaded kernels, as nvidia-smi shows it on H100 (0.5 to 0.6 GiB)."""
WORKSPACE = 2.0 * GIB
"""Of a server beside weights and KV cache: activations of a prefill of 8,192 tokens, and CUDA graphs. An estimate."""
OFFLOADED = CONTEXT + 0.5 * GIB
"""What remains of a server whose weights, KV cache and graphs are released: its context and the libraries'. An
estimate."""


def kv_bytes(shape: ModelShape, tensor: int, element: int = 2) -> int:
    """Bytes of one token's keys and values of all layers on one of `tensor` GPUs."""
    return 2 * shape.layers * max(shape.kv_heads // tensor, 1) * shape.head_dim * element


def server_weights(setting: Setting) -> float:
    """Bytes of the weights on one GPU of a server. In FP8 the layers' matrices have one byte, and a float32 scale for
    128 x 128 numbers; embedding and head stay as they are."""
    shape, tensor = setting.shape, setting.serving.tensor_parallel
    every = model_parameters(shape)
    if not setting.serving.fp8:
        return BYTES[setting.training.dtype] * every / tensor
    outside = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    return (2 * outside + (1 + 4 / 128**2) * (every - outside)) / tensor


def server_static(setting: Setting, free: float) -> float:
    """Bytes that a server takes for weights and KV cache on a GPU with `free` bytes when it starts."""
    return setting.serving.memory_fraction * max(free - CONTEXT, 0.0)


def kv_capacity(setting: Setting, free: float) -> int:
    """Tokens that fit the KV cache of one server whose GPUs have `free` bytes each when it starts; 0 when the weights
    do not fit."""
    room = server_static(setting, free) - server_weights(setting)
    each = kv_bytes(setting.shape, setting.serving.tensor_parallel, BYTES[setting.training.dtype])
    return max(int(room // each), 0)
