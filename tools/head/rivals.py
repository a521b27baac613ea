"""Fused heads of other packages, for CUDA: measured where their package is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from head.ways import Problem, Result

Adapter = Callable[[Any, Problem], Result]


def liger_tp(module: Any, problem: Problem) -> Result:
    """Liger's tensor-parallel cross-entropy (0.8.5) on one rank."""
    hidden, weight = problem.leaves()
    if not dist.is_initialized():
        backend = "nccl" if hidden.is_cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    nll, entropy = module.LigerFusedLinearScaledCrossEntropyTPFunction.apply(
        hidden, weight, problem.target, dist.group.WORLD, return_entropy=True
    )
    return _differentiated(problem, hidden, weight, -nll, entropy)


def verl_triton(module: Any, problem: Problem) -> Result:
    """verl's Triton kernels (0.9), whose products are Triton's too."""
    hidden, weight = problem.leaves()
    logprobs, entropy = module.linear_cross_entropy(hidden, weight, problem.target, 1.0, "none", None)
    return _differentiated(problem, hidden, weight, logprobs, entropy)


def _differentiated(
    problem: Problem, hidden: torch.Tensor, weight: torch.Tensor, logprobs: torch.Tensor, entropy: torch.Tensor
) -> Result:
    problem.loss(logprobs, entropy, slice(None)).backward()
    return Result(logprobs.detach(), entropy.detach(), hidden.grad, weight.grad)


RIVALS: Mapping[str, tuple[str, Adapter]] = {
    "liger_tp": ("liger_kernel.ops", liger_tp),
    "verl_triton": ("verl.utils.kernel.linear_cross_entropy", verl_triton),
}
"""name -> (module, adapter)"""


def find_rivals(device: torch.device) -> tuple[dict[str, Callable[[Problem], Result]], dict[str, str]]:
    """(those that can run here, for each other the reason why not)."""
    found: dict[str, Callable[[Problem], Result]] = {}
    absent: dict[str, str] = {}
    for name, (path, adapter) in RIVALS.items():
        if device.type != "cuda":
            absent[name] = "runs on CUDA only"
            continue
        try:
            module = importlib.import_module(path)
        except Exception as error:  # a package may fail to load in its own ways
            absent[name] = f"{path} cannot be imported: {error!r}"
            continue
        found[name] = lambda problem, adapter=adapter, module=module: adapter(module, problem)
    return found, absent
