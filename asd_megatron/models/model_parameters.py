"""A model's parameters on this rank: which tensors of a Hugging Face folder they are; loading, streaming out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from asd_megatron.distributed import activity, device
from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.distributed.objects import first_message
from asd_megatron.errors import UserError
from asd_megatron.models import te
from asd_megatron.models.export import FullTensors, Part, Step, first_stages
from asd_megatron.models.family import Family, ModelShape
from asd_megatron.models.loading import FullTensor, Progress, refusal
from asd_megatron.models.parameters import Key, model_keys, shapes_of
from asd_megatron.models.weights import Copy, Row, Rule


class ModelParameters:
    """The parameters of this rank's chunks, without their DDP wrapper (gradients and weights are the same tensors).

    `shapes`: of the complete model's tensors.
    """

    def __init__(
        self, family: Family, shape: ModelShape, process_groups: ProcessGroups, layout: Layout, chunks: list[Any]
    ) -> None:
        self.family, self.shape, self.process_groups, self.layout = family, shape, process_groups, layout
        self.chunks, self.shapes = chunks, shapes_of(shape, layout.tensor)
        self._stages: dict[Key, int] | None = None  # of every parameter, for `stream`; communicated once
        self._mark()

    def _mark(self) -> None:
        """Mark the parameters that differ over tensor-parallel ranks: the gradient norm counts the others once. Those
        of experts are reduced over the ranks that hold the same experts.

        Megatron's own initialization would do the first, but is skipped (every weight is loaded), and does the second
        with expert parallelism alone: without it, experts that tensor-parallel ranks hold would drift apart.
        """
        from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                rule = self.rule(self.identify(chunk, name))
                if not isinstance(rule.operation, Copy) and not hasattr(parameter, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(parameter, True, int(isinstance(rule.operation, Row)), 1)
                if rule.per_expert:
                    parameter.allreduce = False

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by Hugging Face name, with its full shape, in export order."""
        out: dict[str, tuple[int, ...]] = {}
        for key in self._keys():
            rule = self.rule(key)
            out.update(zip(rule.names(key.layer, key.expert), rule.operation.shapes(self.shapes), strict=True))
        return out

    def rule(self, key: Key) -> Rule:
        """How the parameter is made of a folder's tensors."""
        return self.family.rules[key.rule]

    def shard(self, rule: Rule) -> tuple[int, int]:
        """(rank, ranks) over which the rule's parameters are sharded, for its operation."""
        return (0, 1) if rule.per_expert else (self.process_groups.tp.rank(), self.layout.tensor)

    def _keys(self) -> Iterator[Key]:
        """All parameters in the order of the forward pass; the head of a tied model is left out."""
        return model_keys(self.family, self.shape)

    @cached_property
    def _local(self) -> dict[Key, Tensor]:
        """This rank's parameters. A tied head on the last stage has the embedding's key."""
        found: dict[Key, Tensor] = {}
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                found.setdefault(self.identify(chunk, name), parameter)
        return found

    def identify(self, chunk: Any, name: str) -> Key:
        """Which parameter of the complete model a chunk's `name` is."""
        layer = expert = None
        if match := re.match(r"decoder\.layers\.(\d+)\.", name):
            layer = chunk.decoder.layers[int(match[1])].layer_number - 1
            name = f"decoder.layers.{{layer}}.{name[match.end() :]}"
        if match := re.search(r"(?<=local_experts\.)\d+|(?<=\.weight)\d+$", name):  # of this rank
            assert self.shape.experts is not None
            expert = int(match[0]) + self.process_groups.ep.rank() * self.shape.experts.count // self.layout.expert
            name = f"{name[: match.start()]}{{expert}}{name[match.end() :]}"
        if self.shape.tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        for number, rule in enumerate(self.family.rules):
            if name in rule.megatron:
                return Key(number, layer, expert)
        raise RuntimeError(f"family {self.family.name} has no rule for the parameter {name}")

    def load(self, tensors: Mapping[str, FullTensor], *, progress: Progress | None = None) -> None:
        """See `ModelPort.load`."""
        expected = self.expected()
        message = refusal(tensors, expected, family=self.family.name, tied=self.shape.tied)
        message = first_message(message, self.process_groups.host)
        if message is not None:
            raise UserError(message)
        parameters = [(chunk, *named) for chunk in self.chunks for named in chunk.named_parameters()]
        total, done = sum(parameter.nbytes for *_, parameter in parameters), 0
        with torch.no_grad():
            for chunk, name, parameter in parameters:
                key = self.identify(chunk, name)
                rule = self.rule(key)
                full = [tensors[n] for n in rule.names(key.layer, key.expert)]
                activity.mark()
                te.fill(parameter, rule.operation.shard(full, *self.shard(rule), self.shapes))
                done += parameter.nbytes
                if progress is not None:
                    progress(done, total)

    def replicas(self, exact_tensor: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
        """This rank's parameters, each as (name, parameter, values), by a name that is the same on all ranks that hold
        the same values: its tensors in a Hugging Face folder and, where it is sharded, the tensor-parallel rank.

        exact_tensor: False: what tensor-parallel ranks have in common is named by rank all the same.
        """
        for key, parameter in self._local.items():
            rule = self.rule(key)
            rank, ranks = self.shard(rule)
            name = " + ".join(rule.names(key.layer, key.expert))
            if ranks > 1 and not (exact_tensor and isinstance(rule.operation, Copy)):
                name += f" (tensor-parallel rank {rank})"
            yield name, parameter, te.values(parameter.detach())

    def stream(
        self, of: Callable[[Any], Tensor], dtype: torch.dtype, bucket_bytes: int
    ) -> Iterator[tuple[str, Tensor]]:
        """`of(parameter)`, a tensor of the parameter's shape, in `dtype`, as `ModelPort.export` streams parameters."""
        yield from self._full_tensors(dtype).stream(self._parts(self._keys(), of), bucket_bytes)

    def steps(self, dtype: torch.dtype, bucket_bytes: int) -> Iterator[Step]:
        """See `ModelPort.export_steps`."""
        keys = self._stacked(self._keys())
        senders = [stage * self.layout.stage_size for stage in range(self.layout.pipeline)]
        yield from self._full_tensors(dtype).steps(
            self._parts(keys, lambda parameter: parameter), bucket_bytes, senders
        )

    def _full_tensors(self, dtype: torch.dtype) -> FullTensors:
        replica = self.process_groups.dp_cp.rank() == 0
        return FullTensors(self.process_groups, self.shapes, dtype, device.device(), replica)

    def _parts(self, keys: Iterable[Key], of: Callable[[Any], Tensor]) -> list[Part]:
        local = self._local
        if self._stages is None:
            self._stages = first_stages(
                self._layer_keys(local), self.process_groups.pp.rank(), self.process_groups.host
            )
        parts = []
        for key in keys:
            rule, stage = self.rule(key), self._stages[Key(key.rule, key.layer)]
            owner = None if key.expert is None else self._expert_owner(stage, key.expert)
            parts.append(Part(rule, key, stage, owner, of(local[key]) if key in local else None))
        return parts

    def _stacked(self, keys: Iterable[Key]) -> Iterator[Key]:
        """The keys with the experts of a layer by owner, and in it by rule: the experts of a rule can be stacked."""
        for (_, experts), run in groupby(keys, lambda key: (key.layer, key.expert is not None)):
            of_layer = list(run)
            if experts:
                of_layer.sort(key=lambda key: (self._expert_part(key.expert or 0), key))
            yield from of_layer

    @staticmethod
    def _layer_keys(keys: Iterable[Key]) -> list[Key]:
        """The keys without their experts: those of one layer are on one stage."""
        return list(dict.fromkeys(Key(key.rule, key.layer) for key in keys))

    def _expert_owner(self, stage: int, expert: int) -> int:
        return self.layout.expert_rank(stage, self._expert_part(expert))

    def _expert_part(self, expert: int) -> int:
        assert self.shape.experts is not None
        return expert * self.layout.expert // self.shape.experts.count


def bare(chunk: Any) -> Any:
    """The model inside Megatron's DDP wrapper."""
    return chunk.module if hasattr(chunk, "module") and hasattr(chunk, "ddp_config") else chunk
