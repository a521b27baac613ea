import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint


class CudaRNGStatesTracker:
    def __init__(self) -> None:
        self.states_: dict[str, Any] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        self.states_, self.seeds_ = {}, set()


def checkpoint(function: Callable[..., Any], *args: torch.Tensor, **kwargs: Any) -> Any:
    for name in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group", "context_fn"):
        kwargs.pop(name, None)
    return torch_checkpoint(function, *args, use_reentrant=kwargs.pop("use_reentrant", True), **kwargs)


@contextlib.contextmanager
def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def get_all_rng_states() -> dict[str, Any]:
    return {}
