import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, fp8_autocast


class CudaRNGStatesTracker:
    def __init__(self) -> None:
        self.states_: dict[str, Any] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        self.states_, self.seeds_ = {}, set()


def checkpoint(function: Callable[..., Any], *args: torch.Tensor, **kwargs: Any) -> Any:
    """Other keyword arguments are the function's. The backward pass recomputes it in the number format of now."""
    for name in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group", "context_fn"):
        kwargs.pop(name, None)
    reentrant = kwargs.pop("use_reentrant", True)
    fp8, recipe = FP8GlobalStateManager.is_fp8_enabled(), FP8GlobalStateManager.get_fp8_recipe()

    def in_present_format(*tensors: torch.Tensor) -> Any:
        with fp8_autocast(enabled=fp8, fp8_recipe=recipe):
            return function(*tensors, **kwargs)

    return torch_checkpoint(in_present_format, *args, use_reentrant=reentrant)


@contextlib.contextmanager
def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def get_all_rng_states() -> dict[str, Any]:
    return {}
