"""Starting local ranks: the torchrun command line and the environment that its workers want."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def torchrun_command(ranks: int, module: str, arguments: Sequence[str]) -> list[str]:
    """`torchrun` for `ranks` local processes of `python -m module arguments`, on a free port of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    # Without --local-addr the ranks meet at the machine's name, which need not resolve.
    return [*launcher, "--local-addr", "127.0.0.1", "-m", module, *arguments]


def worker_environment(ranks: int) -> dict[str, str]:
    """This process's environment with what local workers need: the machine's threads divided among the ranks, huge
    pages for torch's tensors, and one CUDA queue (Megatron asks for it)."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    env.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return env
