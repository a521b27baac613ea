"""Memory of every rank in every phase of a step, item by item: what is there when the phase needs most.

A `Phase` is a sum of items at one moment, so a phase whose parts peak at different moments has those of the worst one.
The ranks of a pipeline stage need the same, but for how many choices their experts get (`Training.expert_load`) and
which of them has the longest sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from asd_megatron.models.parameters import padded_vocabulary
from asd_megatron.planner import lengths, serving
from asd_megatron.planner.activations import FLOAT, Activations, in_flight, stage_saved, worst_expert_load
from asd_megatron.planner.hardware import GIB
from asd_megatron.planner.head import Head
from asd_megatron.planner.parameters import Parameters, stage_parameters
from asd_megatron.planner.setting import Setting
from asd_megatron.planner.states import States
from asd_megatron.trainer.precision_aware import SLICE_NUMEL

Where = Literal["device", "host"]
PhaseName = Literal["start", "generation", "weight sync", "scoring", "update", "optimizer step", "checkpoint"]

NCCL = 0.25 * GIB
"""Of a communicator: 4 MiB (NCCL_BUFFSIZE), 4.7 MiB (LL128) and 0.25 MiB (LL) for each of some 24 channels. An
estimate: NCCL's channels depend on the topology."""
LIBRARIES = 0.15 * GIB
"""Workspaces of cuBLAS (32 MiB on Hopper in PyTorch, as much in Transformer Engine) and cuDNN."""
COLUMNS = 128
"""Bytes of a response token in the columns of a step (`trainer.columns`): ids, masks, scores, advantages, terms."""
MIB = 1 << 20


@dataclass(frozen=True)
class Item:
    """`note` says in a line how the bytes come about."""

    name: str
    bytes: float
    note: str
    where: Where = "device"


@dataclass(frozen=True)
class Phase:
    name: PhaseName
    items: tuple[Item, ...]

    def bytes(self, where: Where = "device") -> float:
        return sum(item.bytes for item in self.items if item.where == where)


@dataclass(frozen=True)
class StageMemory:
    """The fullest rank of a pipeline stage."""

    stage: int
    phases: tuple[Phase, ...]

    def peak(self, where: Where = "device") -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.bytes(where))

    def phase(self, name: PhaseName) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def rank_memory(setting: Setting) -> tuple[StageMemory, ...]:
    """One entry for each pipeline stage. Raises UserError for layouts that cannot shard the model."""
    stages = stage_parameters(setting.shape, setting.training.layout)
    return tuple(
        StageMemory(number, tuple(_Rank(setting, number, counts).phases())) for number, counts in enumerate(stages)
    )


def peak(setting: Setting, where: Where = "device") -> tuple[int, Phase]:
    """(stage, phase) that needs most."""
    fullest = max(rank_memory(setting), key=lambda stage: stage.peak(where).bytes(where))
    return fullest.stage, fullest.peak(where)


def margin_gib(setting: Setting) -> float:
    """Device memory that is left in the fullest phase of the fullest rank, beyond the reserve; negative: it lacks."""
    return (setting.gpu.memory_bytes - peak(setting)[1].bytes()) / GIB


def fits(setting: Setting) -> bool:
    """Whether every rank has enough device memory in every phase, and the servers hold at least one response."""
    return margin_gib(setting) >= 0 and holds_a_response(setting)


def holds_a_response(setting: Setting) -> bool:
    """Whether a server's KV cache holds the longest sequence; the embedded engine's is among the phases."""
    longest = setting.workload.prompt + setting.workload.responses.most
    return setting.serving.engine == "embedded" or kv_tokens(setting) >= longest


def kv_tokens(setting: Setting) -> int:
    """Tokens that the KV cache of one SGLang server holds. Colocated, a server gets what the trainer leaves."""
    free = setting.gpu.memory_bytes
    if setting.serving.colocated:
        stages = stage_parameters(setting.shape, setting.training.layout)
        free -= max(_Rank(setting, number, counts).while_generating() for number, counts in enumerate(stages))
    return serving.kv_capacity(setting, free)


def micro_batches(setting: Setting) -> int:
    """Packs of a data-parallel rank in an update, by the mean length; at least one for each pipeline stage, complete
    rounds of them with virtual stages."""
    work, layout = setting.workload, setting.training.layout
    tokens = work.rollouts / (work.updates * layout.data) * (work.prompt + lengths.mean(work.responses))
    packs = max(math.ceil(tokens / setting.training.pack), layout.pipeline)
    return -(-packs // layout.pipeline) * layout.pipeline if layout.virtual_pipeline else packs


def _number(count: float) -> str:
    """1.2e9 as 1.20B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


class _Rank:
    """The phases of one rank."""

    def __init__(self, setting: Setting, stage: int, parameters: Parameters) -> None:
        self.setting, self.stage, self.parameters = setting, stage, parameters
        self.training, self.layout, self.work = setting.training, setting.training.layout, setting.workload
        self.states = States(parameters, setting.training)
        self.on_cpu = setting.gpu.cpu
        self.first, self.last = stage == 0, stage == self.layout.pipeline - 1
        self.activations = self._activations(self.work.prompt)

    def _activations(self, prompt: float) -> Activations:
        """Of a pack that is full, or of one sequence that is longer."""
        longest = round(prompt) + self.work.responses.most
        tokens = -(-max(self.training.pack, longest) // self.layout.context)
        return Activations(self.setting.shape, self.training, tokens, longest, self.on_cpu)

    @property
    def _responses(self) -> float:
        """Response tokens of this data-parallel rank's part of a batch."""
        return self.work.rollouts / self.layout.data * lengths.mean(self.work.responses)

    def phases(self) -> Iterator[Phase]:
        yield Phase("start", (*self._fixed(), *self._start()))
        yield Phase("generation", (*self._fixed(), *self._generation()))
        if self.setting.serving.engine == "sglang":
            yield Phase("weight sync", (*self._fixed(), *self._weight_sync()))
        yield Phase("scoring", (*self._fixed(), *self._held(), *self._beside_training(), *self._scoring()))
        yield Phase("update", (*self._fixed(), *self._held(), *self._beside_training(), *self._update()))
        yield Phase("optimizer step", (*self._fixed(), *self._held(), *self._beside_training(), *self._step()))
        yield Phase("checkpoint", (*self._fixed(), *self._held(), *self._beside_training(), *self._checkpoint()))

    # ---------------------------------------------------------------- always there

    def _fixed(self) -> Iterator[Item]:
        """Whatever the phase: the process's own, NCCL's, the reserve, copies in host memory."""
        if not self.on_cpu:
            yield Item("CUDA context", serving.CONTEXT, "of the trainer's process")
            yield Item("cuBLAS, Transformer Engine", LIBRARIES, "workspaces")
            groups = self._communicators()
            if groups:
                yield Item("NCCL buffers", NCCL * len(groups), f"{NCCL / GIB:.2f} GiB each: {', '.join(groups)}")
        yield Item("reserve", self.setting.reserve_gib * GIB, "fragments, and what is not counted")
        copies = self.states.host_copies
        if copies:
            yield Item("copies of the weights", copies, f"{self.training.copies}, and room for the live ones", "host")
        if self.states.host_optimizer:
            yield Item("optimizer", self.states.host_optimizer, f"16 B x {_number(self.states.shard)}", "host")
        if self.setting.serving.full_every > 1 and self.first:
            sent = self.states.element * serving.model_parameters(self.setting.shape)
            yield Item("weights as last sent", sent, "of the complete model, on global rank 0", "host")

    def _communicators(self) -> list[str]:
        layout = self.layout
        sizes = {
            "world": layout.world_size,
            "tp": layout.tensor,
            "pp": layout.pipeline,
            "cp": layout.context,
            "dp_cp": layout.data * layout.context,
            "ep": layout.expert,
            "expert dp": layout.stage_size // layout.expert if layout.expert > 1 else 1,
        }
        serving_ = self.setting.serving
        servers = serving_.engine == "sglang" and not serving_.colocated and serving_.transport == "distributed"
        return [name for name, size in sizes.items() if size > 1] + ["servers"] * (servers and self.first)

    def _weights(self) -> Iterator[Item]:
        states = self.states
        yield Item("weights", states.weights, f"{states.element} B x {_number(self.parameters.total)} parameters")

    def _held(self) -> Iterator[Item]:
        """Weights, gradients and the optimizer's state."""
        states = self.states
        yield from self._weights()
        yield Item("gradients", states.gradients, f"4 B x {_number(self.parameters.total)} parameters, float32")
        shard = f"{_number(states.shard)} parameters{self._sharded()}"
        if states.masters:
            yield Item("master weights", states.masters, f"{states.masters / states.shard:.0f} B x {shard}")
        if states.moments:
            yield Item("moments", states.moments, f"{states.moments / states.shard:.0f} B x {shard}")

    def _sharded(self) -> str:
        """Over how many ranks the optimizer is sharded, for a note."""
        if not self.training.distributed_optimizer:
            return ""
        dense, experts = self.states.replicas
        if not self.parameters.experts:
            return f" (over {dense} ranks)" if dense > 1 else ""
        return f" (dense over {dense}, experts over {experts})"

    def _beside_training(self) -> Iterator[Item]:
        """In every phase but generation."""
        if self.states.fp8_copies:
            matrices = _number(self.parameters.matrices)
            yield Item("FP8 copies of weights", self.states.fp8_copies, f"2 B x {matrices} of matrices")
        if self.setting.serving.colocated:
            yield Item("offloaded server", serving.OFFLOADED, "its context and what is not released")
        if self._offloads:
            yield from self._offloaded()

    @property
    def _offloads(self) -> bool:
        return self.setting.serving.offload_optimizer

    def _offloaded(self) -> Iterator[Item]:
        """The host memory of an optimizer whose device memory servers get: taken once and kept."""
        if self.states.optimizer:
            yield Item("offloaded optimizer", self.states.optimizer, "master weights and moments", "host")

    # ---------------------------------------------------------------- start, generation, weight sync

    def _start(self) -> Iterator[Item]:
        """While DDP copies the weights to its buffer, or, later, with the optimizer."""
        buffer = self.states.weights if self.training.distributed_optimizer else 0.0
        yield from self._weights()
        yield Item("gradients", self.states.gradients, "float32")
        if buffer > self.states.optimizer:
            yield Item("weights in DDP's buffer", buffer, "copied from the loaded ones")
        elif self.states.optimizer:
            yield Item("optimizer", self.states.optimizer, "master weights and moments")
        largest = self._largest_tensor()
        yield Item("tensor being loaded", 2 * largest, "this rank's slice, and its parts joined", "host")

    def _largest_tensor(self) -> float:
        """Bytes of the model's largest tensor, embedding or head."""
        return self.setting.shape.vocab * self.setting.shape.hidden * self.states.element

    def while_generating(self) -> float:
        """Bytes of the device that the trainer keeps while rollouts are generated."""
        return sum(item.bytes for item in (*self._fixed(), *self._resident()) if item.where == "device")

    def _resident(self) -> Iterator[Item]:
        """What the trainer holds while rollouts are generated."""
        yield from self._weights() if self._offloads else self._held()
        if self._offloads:
            yield from self._offloaded()

    def _generation(self) -> Iterator[Item]:
        yield from self._resident()
        serve, shape = self.setting.serving, self.setting.shape
        if serve.engine == "embedded":
            yield from self._embedded()
        elif serve.colocated:
            free = self.setting.gpu.memory_bytes - self.while_generating()
            static = serving.server_static(self.setting, free)
            tokens = _number(serving.kv_capacity(self.setting, free))
            each = serving.kv_bytes(shape, serve.tensor_parallel, self.states.element)
            note = f"{serve.memory_fraction:g} of {free / GIB:.1f} GiB: weights, and {tokens} tokens of {each:,} B"
            weights = serving.server_weights(self.setting)
            yield Item("server", max(static, weights), note)
            yield Item("server's context, graphs", serving.CONTEXT + serving.WORKSPACE, "activations too")

    def _embedded(self) -> Iterator[Item]:
        shape, serve = self.setting.shape, self.setting.serving
        rows = min(serve.requests, -(-self.work.rollouts // self.layout.data))
        length = round(self.work.prompt) + self.work.responses.most
        each = serving.kv_bytes(shape, self.layout.tensor, self.states.element) / self.layout.pipeline
        note = f"{rows} rows x {_number(length)} tokens x {each:,.0f} B"
        yield Item("KV cache", rows * length * each, note)
        if self.last:
            logits = 2 * FLOAT * rows * padded_vocabulary(shape.vocab, self.layout.tensor)
            yield Item("logits", logits, "float32 of all rows, gathered")
        if self.layout.expert > 1:
            others = self.parameters.experts * (self.layout.expert - 1) * self.states.element
            yield Item("all ranks' experts", others, f"{self.layout.expert - 1} times this rank's")

    def _weight_sync(self) -> Iterator[Item]:
        """Two buckets in turn, and on a rank that gathers two gathered ones; the largest tensor is a bucket alone."""
        serve = self.setting.serving
        yield from self._resident()
        if serve.colocated:
            weights = serving.server_weights(self.setting)
            yield Item("server's weights", weights + serving.CONTEXT, "with its context; its cache is not resident")
        bucket = max(serve.bucket_mib * MIB, self._largest_tensor())
        gathers = self.layout.tensor > 1 or self.layout.expert > 1
        note = f"{4 if gathers else 2} of {bucket / MIB:,.0f} MiB" + (", two of them gathered" if gathers else "")
        yield Item("buckets", (4 if gathers else 2) * bucket, note)

    # ---------------------------------------------------------------- training

    def _batch(self) -> Iterator[Item]:
        """Of a step's tokens on this rank."""
        tokens = self._responses
        yield Item("token columns", COLUMNS * tokens, f"{COLUMNS} B x {_number(tokens)} response tokens")
        if self.work.exact and self.last:
            width = -(-self.setting.shape.hidden // self.layout.tensor)
            held = tokens / self.layout.context * width * self.states.element
            where: Where = self.training.teacher_states
            note = f"{_number(tokens / self.layout.context)} rows x {width} x {self.states.element} B"
            yield Item("teacher's hidden states", held, note, where)
            if self.work.updates > 1 or self.training.copies:
                head = self._head(self.activations)
                yield Item("teacher's head", head.weight, f"{head.vocabulary:,} rows of the scoring weights")

    def _head(self, activations: Activations) -> Head:
        return Head(activations, activations.tokens, exact=self.work.exact)

    def _scoring(self) -> Iterator[Item]:
        activations = self._activations(self.work.prompt + (self.work.privileged if self.work.teacher else 0))
        yield from self._batch()
        layer = activations.forward_workspace() + activations.inputs()
        head = self._head(activations).scoring() + activations.hidden if self.last else 0.0
        name, needed = ("head", head) if head > layer else ("one layer", layer)
        yield Item(name, needed, f"of {_number(activations.tokens)} tokens, without gradients")

    def _update(self) -> Iterator[Item]:
        """The worst of the moments of `_moments`."""
        yield from self._batch()
        activations = self.activations
        if self.training.layers == "local" and activations.gathered:
            yield Item("gathered tokens", activations.gathered, "Megatron's buffer for sequence parallelism")
        saved, name, needed = max(self._moments(), key=lambda moment: moment[0] + moment[2])
        shape, recompute = self.setting.shape, self.training.recompute
        packs = in_flight(self.layout, self.stage, micro_batches(self.setting))
        chunk = shape.layers // (self.layout.pipeline * (self.layout.virtual_pipeline or 1))
        note = f"{_number(activations.tokens)} tokens, recompute {recompute.kind}"
        note += f"; {packs} x {chunk} layers" if packs > 1 else f"; {chunk} layers"
        worst = worst_expert_load(shape, self.layout)
        if worst > 1:
            note += f"; experts at {self.training.expert_load:g} of the mean load (worst {worst:g})"
        yield Item("activations", saved, note)
        yield Item(name, needed, f"of {_number(activations.tokens)} tokens")

    def _moments(self) -> Iterator[tuple[float, str, float]]:
        """(activations saved, what else is there, its bytes) at the moments that may be the worst."""
        activations = self.activations
        packs = in_flight(self.layout, self.stage, micro_batches(self.setting))
        saved = stage_saved(activations, self.stage, micro_batches(self.setting))
        layer = activations.workspace(self.training.recompute)
        tied = 0.0
        if self.last:
            head = self._head(activations)
            tied = head.dummy() if self.setting.shape.tied and self.layout.pipeline == 1 else 0.0
            saved += activations.final_norm() + activations.hidden
            yield saved, "head", head.forward()
            yield saved, "gradient of the head", activations.hidden + head.dummy()
        yield saved, "backward pass of a layer", layer + tied
        if self.first:
            others = saved * (packs - 1) / packs
            vocabulary = padded_vocabulary(self.setting.shape.vocab, self.layout.tensor) // self.layout.tensor
            rows = vocabulary * self.setting.shape.hidden
            widened = FLOAT if self.on_cpu and self.states.element < FLOAT else 0
            embedding = rows * (self.states.element + widened) + activations.hidden
            yield others, "gradient of the embedding", embedding + tied
        if self.on_cpu and self.training.distributed_optimizer:
            yield 0.0, "gradients being reduced", FLOAT * self._largest_buffer  # gloo copies what it scatters

    @property
    def _largest_buffer(self) -> int:
        """Parameters of the larger of Megatron's two buffers: of the experts, and of everything else."""
        return max(self.parameters.dense, self.parameters.experts)

    def _step(self) -> Iterator[Item]:
        yield from self._batch()
        if self.on_cpu and self.training.distributed_optimizer:
            yield Item("weights being gathered", self.states.element * self._largest_buffer, "gloo's copy of a buffer")
        if self.training.moments == "bfloat16" and self.training.offload == "none":
            numbers = min(self.states.shard, SLICE_NUMEL)
            note = "float32 copies, by Transformer Engine before 2.13"
            yield Item("moments being updated", 2 * FLOAT * numbers, note)

    def _checkpoint(self) -> Iterator[Item]:
        """Written part by part; in the background from a copy in host memory, which is kept."""
        if self.training.async_save:
            note = f"{self.states.checkpoint / self.states.spread:.0f} B x {_number(self.states.spread)} parameters"
            yield Item("copy of the checkpoint", self.states.checkpoint, note, "host")
        else:
            yield Item("part being written", FLOAT * self._largest_part(), "one tensor", "host")
        if self.training.moments == "bfloat16" and self.training.offload == "none":
            yield Item("complete master weights", FLOAT * self._largest_part(), "of one tensor, float32")

    def _largest_part(self) -> float:
        """Numbers of the rank's largest tensor."""
        return self.setting.shape.vocab * self.setting.shape.hidden / self.layout.tensor
