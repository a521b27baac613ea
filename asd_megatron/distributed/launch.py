"""Starting local ranks: the torchrun command line, and the environment of the ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence


def torchrun_command(ranks: int, module: str, arguments: Sequence[str]) -> list[str]:
    """`torchrun` for `ranks` local processes of `python -m module arguments`, on a free port of this machine."""
    return [sys.executable, "-m", "torch.distributed.run", *torchrun_options(ranks), "-m", module, *arguments]


def torchrun_options(ranks: int) -> list[str]:
    """torchrun's options for `ranks` local processes that meet on a free port of this machine."""
    # Without --local-addr the ranks meet at the machine's name, which need not resolve.
    return ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]


def visible_devices(environment: Mapping[str, str], count: int) -> list[str]:
    """The GPUs of a process by the names that CUDA_VISIBLE_DEVICES gives them; without it the numbers of `count`."""
    names = environment.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return [str(index) for index in range(count)]
    return [name.strip() for name in names.split(",")]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_defaults(ranks: int, environment: MutableMapping[str, str]) -> None:
    """Prepare `environment` for local ranks. Where it does not say otherwise: the cores divided among them, one CUDA
    queue (Megatron asks for it), and huge pages for torch's tensors. PET_* variables are removed: torchrun reads every
    option that its command line leaves out from them, and Kubeflow sets them for a job of its own.

    A CPU's tensors of some MiB are mapped again each time; with ordinary pages a fifth of an update goes into faults.
    """
    for name in [name for name in environment if name.startswith("PET_")]:
        del environment[name]
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def worker_environment(ranks: int) -> dict[str, str]:
    """This process's environment for `ranks` that it starts."""
    environment = dict(os.environ)
    set_defaults(ranks, environment)
    return environment
