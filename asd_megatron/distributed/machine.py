"""Properties of this machine: its GPUs and the one of this rank, Transformer Engine, the version of torch."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping

import torch

from asd_megatron.errors import UserError

OLDEST_CUDA_TORCH = (2, 8)  # the first whose `mm` has half-precision operands and a float32 result
NOT_INSTALLED = "it is not installed (install the extra `asd_megatron[gpu]`)"
ATTENTION_SWITCHES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
ATTENTION_CHOSEN = "ASD_MEGATRON_ATTENTION_CHOSEN"  # beside switches that this process has set, for an earlier model
_hidden: list[str] = []  # why this process has hidden the installed Transformer Engine


def gpus() -> int:
    """GPUs that this process may use. Asks the driver's management library (NVML): no CUDA context is created."""
    return torch.cuda.device_count()


def local_rank(environment: Mapping[str, str]) -> int:
    """The number of this rank on its machine, from torchrun's LOCAL_RANK or Slurm's SLURM_LOCALID.

    Raises UserError when neither is set and there are other ranks: all ranks of a machine would take GPU 0.
    """
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if name in environment:
            return int(environment[name])
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "WORLD_SIZE is set and neither LOCAL_RANK nor SLURM_LOCALID is, so this rank's GPU is unknown: start ranks"
            " with torchrun or srun, or set LOCAL_RANK (0, 1, ... on each machine)"
        )
    return 0


def gpu_of_rank(environment: Mapping[str, str]) -> int:
    """The index of this rank's GPU among those it sees: its local rank, or 0 where Slurm shows each rank one GPU.
    Raises UserError when there is none for it."""
    rank, count = local_rank(environment), gpus()
    if rank < count:
        return rank
    if count == 1 and "SLURM_LOCALID" in environment:
        return 0
    raise UserError(
        f"the rank with LOCAL_RANK {rank} has no GPU: this machine shows {count}; start at most {count} ranks on it, or"
        " correct CUDA_VISIBLE_DEVICES"
    )


def gpu_memory() -> int | None:
    """Bytes of this rank's GPU; None without one. Creates a CUDA context."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(gpu_of_rank(os.environ)).total_memory


def has_cuda() -> bool:
    """Whether this process computes on a GPU. May initialize CUDA."""
    return torch.cuda.is_available()


def bfloat16_problem() -> str | None:
    """Why this rank's GPU cannot compute in bfloat16; None if it can. Creates a CUDA context."""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return (
        "model.dtype bfloat16: this GPU has no bfloat16 arithmetic; set model.dtype float32, or use an Ampere or newer"
        " GPU"
    )


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be imported; None if it can. An installation may be broken, so it is imported and
    not just looked for."""
    if _hidden:
        return _hidden[0]
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a library that is missing or made for another CUDA: ImportError, OSError, RuntimeError
        if isinstance(error, ModuleNotFoundError) and error.name == "transformer_engine":
            return NOT_INSTALLED
        reason = (str(error).splitlines() or [""])[0]
        return f"importing it failed ({type(error).__name__}: {reason})"
    return None


def hide_broken_transformer_engine() -> None:
    """Let a Transformer Engine that cannot be imported count as absent: Megatron-Core, which imports what it finds,
    could not be imported either. Call before importing Megatron."""
    problem = transformer_engine_problem()
    if problem in (None, NOT_INSTALLED) or _hidden:
        return
    _hidden.append(str(problem))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # an import of it raises ModuleNotFoundError


def transformer_engine_is_stand_in() -> bool:
    """Whether the importable package declares to compute on CPUs and in float32, as that of the tests does."""
    if transformer_engine_problem() is not None:
        return False
    return bool(getattr(importlib.import_module("transformer_engine"), "STAND_IN", False))


def attention_switch_problem(environment: Mapping[str, str] = os.environ) -> str | None:
    """The variable that keeps Megatron-Core from choosing Transformer Engine's attention; None if there is none."""
    for name in ATTENTION_SWITCHES if ATTENTION_CHOSEN not in environment else ():
        if environment.get(name, "1") != "1":
            return f"{name} is {environment[name]} in the environment, which Megatron-Core refuses: unset it"
    return None


def torch_problem() -> str | None:
    """Why this release of torch is too old for CUDA; None if it is not."""
    version = str(torch.__version__)
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= OLDEST_CUDA_TORCH:
        return None
    return (
        f"torch {version} on CUDA: its half-precision products have no float32 result, so the head would run in"
        " float32; install torch 2.8 or newer"
    )
