"""A plugin of SGLang (0.5.23): weight updates in which only the changed elements of a tensor travel, and a paused
server that sleeps between their requests.

Runs inside the server's own Python environment, in every process of a server, and needs torch alone: nothing of this
package can be imported there. The trainer imports it for the format, which is the same on both sides:

    name        asd_delta:DTYPE:ROWSxCOLUMNS:CHANGED:NAME       what the tensor NAME is, how many elements follow
    payload     int64, three segments, each rounded up to 8 bytes:
                int32  [chunks]     changed elements in each chunk of 65,536 elements of the flat tensor
                uint16 [changed]    their position in the chunk
                DTYPE  [changed]    their new values, bit for bit

A server loads such a tensor with its own model's `load_weights`. In place of the full tensor that gets a
`ChangedElements`, which has the full tensor's shape and takes the same views (the rows of this rank, the half of
`gate_up_proj`); when a view is copied into a parameter, its changed elements alone are written. So the layouts of all
models, shards and stacks are SGLang's, and what is not known to be right raises.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PREFIX = "asd_delta"
MARK = "asd_weight_delta"
"""Key of a scheduler's `internal_states` in `/server_info`: the format that it takes."""
FORMAT = 1
CHUNK_BITS = 16  # of a position in its chunk
CHUNK = 2**CHUNK_BITS
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Element size in bytes -> the type in which values are compared and copied, so that every bit counts (NaN, -0)."""
UNKNOWN = "weight delta cannot be loaded"
"""Begins the message of a server that loads the model in a way that `ChangedElements` does not follow."""
LOADER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.load_weights_from_distributed"
PAUSED = "sglang.srt.managers.scheduler.Scheduler._record_scheduler_state_for_paused_engine"
"""What a paused scheduler calls between two looks for requests."""
STATE = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state"


@dataclass(frozen=True)
class Changes:
    """The changed elements of one tensor. `name`: of that tensor; `payload`: int64, flat, on any device."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    changed: int
    payload: Tensor

    @classmethod
    def of(cls, name: str, tensor: Tensor, positions: Tensor) -> Changes:
        """`tensor` at `positions`, int64, ascending, of its elements in row-major order."""
        flat = tensor.detach().reshape(-1)
        counts = torch.bincount(positions >> CHUNK_BITS, minlength=_chunks(flat.numel()))
        values = integers(flat)[positions]
        payload = torch.cat([_padded(x) for x in (counts.int(), (positions & (CHUNK - 1)).short(), values)])
        return cls(name, tensor.dtype, tuple(tensor.shape), positions.numel(), payload.view(torch.int64))

    @classmethod
    def read(cls, encoded: str, payload: Tensor) -> Changes:
        """From `encoded_name` and the payload. Raises ValueError if they do not belong together."""
        prefix, dtype, shape, changed, name = encoded.split(":", 4)
        sizes = tuple(int(size) for size in shape.split("x"))
        found = cls(name, getattr(torch, dtype), sizes, int(changed), payload)
        expected = _payload_bytes(torch.Size(sizes).numel(), found.dtype.itemsize, found.changed)
        if prefix != PREFIX or payload.nbytes != expected:
            raise ValueError(f"{encoded}: {payload.nbytes} bytes of an unknown form")
        return found

    @property
    def encoded_name(self) -> str:
        dtype, shape = str(self.dtype).removeprefix("torch."), "x".join(map(str, self.shape))
        return f"{PREFIX}:{dtype}:{shape}:{self.changed}:{self.name}"

    def positions(self) -> Tensor:
        """int64 [changed], ascending, in row-major order."""
        chunks = _chunks(torch.Size(self.shape).numel())
        data = self.payload.view(torch.uint8)
        start = _rounded(4 * chunks)
        counts = data[: 4 * chunks].view(torch.int32).long()
        inside = data[start : start + 2 * self.changed].view(torch.int16).long() & (CHUNK - 1)
        first = torch.arange(0, chunks * CHUNK, CHUNK, device=data.device)
        return first.repeat_interleave(counts, output_size=self.changed) + inside

    def values(self) -> Tensor:
        """[changed] of `dtype`."""
        start = _rounded(4 * _chunks(torch.Size(self.shape).numel())) + _rounded(2 * self.changed)
        data = self.payload.view(torch.uint8)[start:]
        return data[: self.changed * self.dtype.itemsize].view(self.dtype)


def integers(tensor: Tensor) -> Tensor:
    """A view of the same bits as integers."""
    return tensor.view(INTEGERS[tensor.element_size()])


def _chunks(elements: int) -> int:
    return -(-elements // CHUNK)


def _payload_bytes(elements: int, item: int, changed: int) -> int:
    """Bytes of the payload of a tensor of `elements` elements of `item` bytes."""
    return _rounded(4 * _chunks(elements)) + _rounded(2 * changed) + _rounded(item * changed)


def _rounded(size: int) -> int:
    return -(-size // 8) * 8


def _padded(tensor: Tensor) -> Tensor:
    data = tensor.view(torch.uint8)
    return torch.nn.functional.pad(data, (0, -data.numel() % 8))


class ChangedElements(Tensor):
    """Stands for a full tensor, or for a view of one, of which the changed elements alone are known.

    It owns no memory. Views are followed on `region`, a tensor on the meta device with the same sizes, strides and
    offset. Copied into another tensor of its shape it writes its changed elements there and leaves the others. Any
    other operation raises NotImplementedError.
    """

    changes: Changes
    region: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, changes: Changes, region: Tensor) -> ChangedElements:
        made: ChangedElements = Tensor._make_wrapper_subclass(
            cls,
            region.shape,
            strides=region.stride(),
            storage_offset=region.storage_offset(),
            dtype=changes.dtype,
            device=changes.payload.device,
        )
        made.changes, made.region = changes, region
        return made

    @classmethod
    def full(cls, changes: Changes) -> ChangedElements:
        """In place of the complete tensor."""
        return cls(changes, torch.empty(changes.shape, dtype=changes.dtype, device="meta"))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        source = args[0]
        if func is torch.ops.aten.copy_.default and not isinstance(source, cls):
            args[1].write_to(source)
            return source
        if func in (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default):  # the same elements elsewhere
            return source
        if isinstance(source, cls) and not func._schema.is_mutable:
            with suppress(RuntimeError):  # needs values, which the meta device does not have
                found = func(source.region, *args[1:], **(kwargs or {}))
                parts = found if isinstance(found, list | tuple) else [found]
                if all(_shares(part, source.region) for part in parts):
                    views = [cls(source.changes, part) for part in parts]
                    return views if isinstance(found, list | tuple) else views[0]
        raise NotImplementedError(f"{UNKNOWN}: SGLang uses {func} to load this model")

    def write_to(self, target: Tensor) -> None:
        """Write the changed elements of this view into `target`, of the same shape, wherever that lies in memory."""
        if target.shape != self.shape or 0 in self.region.stride() or not self.dim():
            raise NotImplementedError(f"{UNKNOWN}: {tuple(self.shape)} into {tuple(target.shape)}")
        if not self.numel():
            return
        positions, values = self.changes.positions(), self.changes.values()
        if target.dtype == values.dtype:
            target, values = integers(target), integers(values)
        else:
            values = values.to(target.dtype)
        complete = self.region.is_contiguous() and self.region.numel() == torch.Size(self.changes.shape).numel()
        if complete and target.is_contiguous():
            target.view(-1)[positions] = values
            return
        index, inside = _locate(positions, self.region)
        target[tuple(i[inside] for i in index)] = values[inside]


def _locate(positions: Tensor, region: Tensor) -> tuple[list[Tensor], Tensor]:
    """(index in each dimension of `region`, whether it is in it) of each position of the full, row-major tensor.

    `region` is a view without overlap: its strides, largest first, are the digits of a position. For example, columns 8
    to 12 of [rows, 16] are offset 8 and strides (16, 1): position 25 is 17 after the offset, row 1, column 1.
    """
    rest = positions - int(region.storage_offset())
    inside = rest >= 0
    index = [torch.zeros_like(rest)] * region.dim()
    for dim in sorted(range(region.dim()), key=region.stride, reverse=True):
        if region.shape[dim] > 1:
            index[dim] = rest.div(region.stride(dim), rounding_mode="floor")
            rest = rest - index[dim] * region.stride(dim)
            inside = inside & (index[dim] >= 0) & (index[dim] < region.shape[dim])
    return index, inside & (rest == 0)


def _shares(part: Any, region: Tensor) -> bool:
    return isinstance(part, Tensor) and part.untyped_storage()._cdata == region.untyped_storage()._cdata


def load(original: Callable[..., Any], updater: Any, tensors: Iterable[tuple[str, Tensor]]) -> Any:
    """Around SGLang's function that loads received tensors: deltas as `ChangedElements`, others as they are."""
    return original(updater, [_decoded(name, tensor) for name, tensor in tensors])


def _decoded(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if not name.startswith(PREFIX + ":"):
        return name, tensor
    changes = Changes.read(name, tensor)
    return changes.name, ChangedElements.full(changes)


def announce(answer: Any, *_: Any, **__: Any) -> None:
    """After a scheduler has described itself: say which format it takes, if SGLang has put `load` in its place. An
    error here would end the server, also one that is never sent a delta."""
    with suppress(ImportError, AttributeError):  # an SGLang without that function
        if hasattr(pkgutil.resolve_name(LOADER), "__wrapped__"):
            answer.internal_state[MARK] = FORMAT


def sleep_while_paused(_: Any, scheduler: Any) -> None:
    """After a look for requests of a paused scheduler: sleep until one comes, as an idle scheduler does with
    `--sleep-on-idle`. SGLang's loop does not while it is paused, so that each server would use a core of the machine
    during the whole weight update."""
    scheduler.maybe_sleep_on_idle()


def register() -> None:
    """The entry point: called by SGLang at the start of each of its processes."""
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(LOADER, load, hooks.HookType.AROUND)
    hooks.HookRegistry.register(PAUSED, sleep_while_paused, hooks.HookType.AFTER)
    hooks.HookRegistry.register(STATE, announce, hooks.HookType.AFTER)
