"""The device the program runs on, and what Megatron-Core needs to run on one without CUDA.

Megatron-Core calls `torch.cuda` unguarded in many places. `prepare` replaces exactly those entry points by CPU
equivalents, once, before the first Megatron object is built; with CUDA it picks this rank's device and keeps float32
products exact. No other module replaces them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from asd_megatron.distributed.machine import gpu_of_rank, hide_broken_transformer_engine, local_rank
from asd_megatron.errors import UserError

log = logging.getLogger("asd_megatron")
CPU = torch.device("cpu")
_FACTORIES = (
    "zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "randint", "as_tensor", "zeros_like",
    "ones_like", "empty_like", "full_like", "linspace", "empty_strided", "randperm",
)  # fmt: skip
TF32_OVERRIDE = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the present name, the older one
EXPANDABLE = "expandable_segments:True"
_prepared = False


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def backend() -> str:
    """The collective backend that goes with `device`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def prepare() -> None:
    """Make Megatron-Core usable on this machine. Call before importing Megatron; safe to call again."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    _quieten()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron overlaps communication by issue order
    if torch.cuda.is_available():
        _prepare_cuda(os.environ)
        hide_broken_transformer_engine()
        return
    local_rank(os.environ)  # refuses here what would be refused with CUDA
    _replace_cuda_functions()
    _redirect_factories()
    _redirect_tensor_methods()
    with without_compiler():
        hide_broken_transformer_engine()
        import megatron.core  # noqa: F401 (decorates functions with torch.compile)
    _redirect_megatron_rng()
    _redirect_token_counts()
    _redirect_parameter_gathers()


def _prepare_cuda(environment: MutableMapping[str, str]) -> None:
    """Take this rank's GPU, and keep float32 products exact: NGC containers turn on TF32 by an environment variable,
    which old builds of torch read at the first product and prefer to the setting."""
    if environment.pop(TF32_OVERRIDE, "0") != "0" and environment.get("RANK", "0") == "0":
        log.warning("%s is ignored: float32 products stay float32, not TF32", TF32_OVERRIDE)
    torch.set_float32_matmul_precision("highest")
    torch.cuda.set_device(gpu_of_rank(environment))


def use_expandable_segments(environment: Mapping[str, str], *, allowed: bool) -> None:
    """Let PyTorch's allocator grow its segments in place of adding new ones, so that memory which is given up and taken
    again every step does not fragment. Nothing without CUDA, or where the user has configured the allocator. Call it
    before memory is taken.

    `allowed`: false when other processes open this one's memory (CUDA IPC). PyTorch hands such a segment over by a
    system call that containers forbid (pidfd_getfd; pytorch issues 165685 and 179220). Raises UserError when the user's
    variable turns such segments on then.

    Set in this process alone: an SGLang server, which inherits the environment, refuses such segments.
    """
    if not torch.cuda.is_available():
        return
    configured = next((name for name in ALLOCATOR_VARIABLES if name in environment), None)
    if configured is not None:
        if not allowed and EXPANDABLE.lower() in environment[configured].lower().replace(" ", ""):
            raise UserError(
                f"{configured} turns on expandable segments, and other processes cannot be relied on to open such"
                f" memory: take {EXPANDABLE} out of it, or set rollout.weight_sync disk"
            )
        return
    if allowed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # later releases have another name beside this one
            torch.cuda.memory._set_allocator_settings(EXPANDABLE)


def free_cached_memory() -> None:
    """Give back the device memory that only PyTorch's allocator holds, after that of objects in dead cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def _quieten() -> None:
    """Leave out warnings that every rank would repeat: the start-up report names missing packages and substitutes."""
    for message in (
        r".*Apex (is|are) not installed",
        r".*CUDA_DEVICE_MAX_CONNECTIONS",
        r"full scope is deprecated",
        r"TypedStorage is deprecated",  # which Megatron resizes to free gradient buffers
        r"Environment variable TORCH_NCCL_\w+ is deprecated",  # releases of torch differ in the name: both are set
        r"\w+ is experimental and still under active development",
    ):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


class _Stream:
    """A stream of a device without streams: all work on it is complete."""

    device = CPU

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.time = time.perf_counter()

    def record(self, *_: Any) -> None:
        self.time = time.perf_counter()

    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return (other.time - self.time) * 1e3


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _replace_cuda_functions() -> None:
    stream = _Stream()
    replacements: dict[str, Any] = {
        "current_device": _returns(CPU),
        "synchronize": _returns(None),
        "set_device": _returns(None),
        "empty_cache": _returns(None),
        "current_stream": _returns(stream),
        "default_stream": _returns(stream),
        "stream": lambda *_, **__: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "manual_seed": _returns(None),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "memory_allocated": _returns(0),
        "max_memory_allocated": _returns(0),
        "memory_reserved": _returns(0),
        "memory_stats": lambda *_, **__: defaultdict(int),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.nvtx.range_push = _returns(None)  # type: ignore[assignment]
    torch.cuda.nvtx.range_pop = _returns(None)  # type: ignore[assignment]


def _is_cuda(where: Any) -> bool:
    if isinstance(where, str):
        return where.startswith("cuda")
    return isinstance(where, torch.device) and where.type == "cuda"


def _redirect_factories() -> None:
    # `with torch.device(...)` knows factories by identity and collects them at its first use: show it the originals.
    from torch.utils import _device

    _device._device_constructors()

    def redirected(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def factory(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return original(*args, **kwargs)

        return factory

    for name in _FACTORIES:
        setattr(torch, name, redirected(getattr(torch, name)))


def _redirect_tensor_methods() -> None:
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        return original_to(self, *args, **kwargs)

    def kind(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        name = original_type(self)
        # Megatron sorts its parameters by "torch.cuda.FloatTensor" and the like.
        return name.replace("torch.", "torch.cuda.") if self.device.type == "cpu" and name.count(".") == 1 else name

    torch.Tensor.to = to  # type: ignore[method-assign,assignment]
    torch.Tensor.type = kind  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Megatron fuses element-wise functions by torch.compile when it is imported. On a CPU that would need a C++
    compiler and minutes at the first call, and the compiler's import alone takes longer than all others."""
    compile_ = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function  # type: ignore[assignment]
    try:
        yield
        from megatron.core import jit

        jit.disable_jit_fuser()
    finally:
        torch.compile = compile_


def _redirect_megatron_rng() -> None:
    """Megatron's tracker keeps CUDA generator states; here they are the CPU generator's."""
    from megatron.core.tensor_parallel import random as megatron_random

    def add(self: Any, name: str, seed: int) -> None:
        self._is_initialized = True
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"random state {name!r} or seed {seed} exists already")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    megatron_random.CudaRNGStatesTracker.add = add
    # fork() compares the CPU state before and after and warns that it changed: here it is meant to.
    logging.getLogger(megatron_random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())


def _redirect_token_counts() -> None:
    """Megatron's dispatcher of tokens to experts moves their counts from a GPU to NumPy arrays, which collectives take
    as split sizes; counts that are on the CPU already would stay tensors, which they do not take."""
    from megatron.core.transformer.moe import token_dispatcher

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = moved


def _redirect_parameter_gathers() -> None:
    """Megatron gathers the buckets of FP8 and of bfloat16 parameters as one coalesced collective, which gloo runs in
    the first one's dtype, silently: here they are gathered one by one."""
    from megatron.core.distributed import param_and_grad_buffer

    def gather(output: torch.Tensor, own: torch.Tensor, group: Any, async_op: bool = False) -> None:
        group._allgather_base(output, own).wait()

    param_and_grad_buffer.dist_all_gather_func = gather
