"""What ranks need, imported once by the server process that `harness` forks them from. No threads, no process group."""

import contextlib
import gc

from asd_megatron.distributed import device
from asd_megatron.distributed.machine import has_cuda

with contextlib.nullcontext() if has_cuda() else device.without_compiler():
    import megatron.core.dist_checkpointing.strategies.torch
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401

import torch._dynamo  # noqa: F401 (the first optimizer imports it)
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM  # noqa: F401

import asd_megatron.run.rl  # noqa: F401
import tests.models.tiny  # noqa: F401

gc.collect()
gc.freeze()  # Megatron collects garbage for every checkpoint: a rank need not look through what is imported here
