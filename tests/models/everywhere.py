"""What an export gave to global rank 0, on every rank of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from asd_megatron.distributed.objects import broadcast_object
from asd_megatron.models.port import ModelPort


def weights(port: ModelPort) -> dict[str, Tensor]:
    """All weights on the CPU. Every rank's own parameters are bit for bit their shards. Collective of all ranks."""
    return _everywhere(port, port.export(), lambda parameter: parameter, exact=True)


def gradients(port: ModelPort) -> dict[str, Tensor]:
    """All accumulated gradients, likewise; ranks may have added theirs up in another order."""
    return _everywhere(port, port.export_gradients(), lambda parameter: parameter.main_grad, exact=False)


def _everywhere(
    port: ModelPort, stream: Iterator[tuple[str, Tensor]], of: Callable[[Any], Tensor], *, exact: bool
) -> dict[str, Tensor]:
    found = broadcast_object({name: tensor.cpu() for name, tensor in stream}, 0, port.process_groups.world)
    assert list(found) == list(port.expected())
    for chunk in port.parameters.chunks:
        for name, parameter in chunk.named_parameters():
            key = port.parameters.identify(chunk, name)
            rule = port.parameters.rule(key)
            full = [found[n] for n in rule.names(key.layer, key.expert)]
            shard = rule.operation.shard(full, *port.parameters.shard(rule), port.parameters.shapes)
            mine = of(parameter).detach().cpu()
            tolerance = 0.0 if exact else 1e-5 * max(float(t.abs().max()) for t in full)
            torch.testing.assert_close(mine, shard, rtol=0.0, atol=tolerance, equal_nan=True, msg=name)
    return found
