"""Copies of this rank's weights in host memory, exchanged with the live ones while something is scored under them.

    initial    the weights that training started from
    ema        their exponential moving average over the applied updates, in float32

A rank copies exactly the parameters that it has, whatever the layout (a tied head on the last stage is a parameter of
its own), so nothing is communicated. Parameters are views of Megatron's buffers: their values are exchanged in place,
and no parameter, buffer or optimizer state is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from asd_megatron.models.port import ModelPort

CopyName = Literal["initial", "ema"]


class WeightCopies:
    """The copies of weights that a run scores with, at the present step.

    Beside each copy, `in_place` needs host memory for the live weights, allocated once. Host memory is pinned where
    the model is on a CUDA device.
    """

    def __init__(self, port: ModelPort, *, initial: bool = False, ema_rate: float | None = None) -> None:
        """Copy the port's weights. `ema_rate`: weight of the live ones in each step of the moving average; None: no
        average. Call after `port.wrap_ddp`."""
        self.port, self.ema_rate = port, ema_rate
        self._copies: dict[CopyName, list[Tensor]] = {}
        if initial:
            self._copies["initial"] = [_host_copy(p, p.dtype) for p in self._parameters()]
        if ema_rate is not None:
            self._copies["ema"] = [_host_copy(p, torch.float32) for p in self._parameters()]
        self._live = [_host_copy(p, p.dtype) for p in self._parameters()]
        self._inside = False
        _wait(port.device)

    @property
    def names(self) -> tuple[CopyName, ...]:
        return tuple(self._copies)

    @property
    def bytes(self) -> int:
        """Host memory of this rank, that for the live weights included."""
        return sum(t.numel() * t.element_size() for tensors in (*self._copies.values(), self._live) for t in tensors)

    def of_parameters(self, name: CopyName) -> dict[int, Tensor]:
        """The copy's tensors by id of their parameter."""
        return {id(p): copy for p, copy in zip(self._parameters(), self._copies[name], strict=True)}

    @contextmanager
    def in_place(self, name: CopyName) -> Iterator[None]:
        """Inside, the parameters have the copy's values (the average rounded to the model's dtype). Afterwards, also
        after an exception, they are bit for bit what they were.

        Inside, weights must not be trained, saved or sent, and `in_place` must not be entered again.
        """
        if self._inside:
            raise RuntimeError("weights are exchanged already: leave `in_place` before entering it again")
        parameters = self._parameters()
        _copy_all(self._live, parameters)
        _wait(self.port.device)  # the copy is complete before anything is overwritten
        self._inside = True
        try:
            _copy_all(parameters, self._copies[name])
            yield
        finally:
            _copy_all(parameters, self._live)
            self._inside = False

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average, if there is one, to the live weights w: ema + rate * (w - ema), in float32. Call after
        every applied update."""
        if self.ema_rate is None:
            return
        for average, parameter in zip(self._copies["ema"], self._parameters(), strict=True):
            on_device = average.to(parameter.device, non_blocking=True)  # `average` itself on a CPU
            average.copy_(on_device.lerp_(parameter.float(), self.ema_rate), non_blocking=True)
        _wait(self.port.device)

    @torch.no_grad()
    def begin_average(self) -> None:
        """Start the average, if there is one, at the live weights."""
        if self.ema_rate is not None:
            _copy_all(self._copies["ema"], self._parameters())
            _wait(self.port.device)

    def _parameters(self) -> list[Tensor]:
        """Of all chunks, always in the same order."""
        return [parameter for chunk in self.port.chunks for parameter in chunk.parameters()]


@torch.no_grad()
def _host_copy(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    copy = torch.empty(parameter.shape, dtype=dtype, pin_memory=parameter.is_cuda)
    return copy.copy_(parameter, non_blocking=True)


@torch.no_grad()
def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if source.dtype is not target.dtype:
            source = source.to(target.device, non_blocking=True)  # convert on the target's device
        target.copy_(source, non_blocking=True)


def _wait(device: torch.device) -> None:
    """Until host memory has what was copied into it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
