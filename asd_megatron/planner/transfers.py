"""Seconds in which weights and optimizer states move: to the servers, to host memory and back, to a disk."""

from __future__ import annotations

from asd_megatron.planner.communication import Groups, all_gather
from asd_megatron.planner.compute import Cost
from asd_megatron.planner.parameters import Parameters, model_parameters, stage_parameters
from asd_megatron.planner.setting import BYTES, Setting
from asd_megatron.planner.training import optimizer_ranks

SYNC_SECONDS = 0.1
"""Of a weight sync's requests beside its buckets: pause, session, label, resume; 20 ms measured on a CPU."""
VERIFY_SECONDS = 0.1
"""The probe: a prefill of at most 256 tokens, and the checksums' way back."""
BUCKET_SECONDS = 0.012
"""A server's answer to one bucket: 0.3 to 0.5 s for 32."""
MATRIX_SECONDS = 5e-5
"""Python of the trainer (21 us with a hash, docs/scaling.md) and of a server's loader for one matrix."""
CHANGED = 0.01
"""Elements that a delta sends, 4 bytes each: 0.4% measured at a learning rate of 1e-6, 3% at 2e-5."""
STORAGE_RATE = 2e9
"""Bytes/s of one node to and from a shared file system: an assumption."""
RESUME_SECONDS = 0.5
"""A colocated server gives its memory back and takes it again: an assumption."""
REWARD_SECONDS = 0.1
BATCH_SECONDS = 8.3e-8
"""Of a response token on global rank 0, from the last complete group to the first pass: 0.70 s for 8.4 million."""


def fullest(setting: Setting) -> Parameters:
    """Parameters of the pipeline stage that has the most."""
    return max(stage_parameters(setting.shape, setting.training.layout), key=lambda stage: stage.total)


def weight_sync(setting: Setting) -> Cost:
    """All weights from the trainer to all servers.

    A sender gathers its stage's shards and fills buckets (a read and a write), while the servers receive the bucket
    before and copy it into their parameters (another two). Checksums are one more pass over the server's weights.
    """
    serving, gpu = setting.serving, setting.gpu
    if serving.engine == "embedded":
        return Cost()
    width = 1 if serving.fp8 else BYTES[setting.training.dtype]
    size = model_parameters(setting.shape) * float(width)
    memory = gpu.memory_rate * gpu.efficiency.memory
    if serving.transport == "disk":
        complete = Cost(memory=2 * size / STORAGE_RATE)
    else:
        gathered = _gather_seconds(setting, size)
        filled = gathered + 2 * size / memory
        arrived = size / _server_link(setting) + 2 * size / memory
        buckets = -(-size // (serving.bucket_mib << 20))
        requests = buckets * BUCKET_SECONDS + _matrices(setting) * MATRIX_SECONDS
        complete = Cost(
            memory=max(filled, arrived) - size / _server_link(setting) + requests,
            communication=size / _server_link(setting),
        )
    part = complete
    if serving.full_every > 1 and serving.transport == "distributed":
        sent = size / width * CHANGED * 4
        delta = Cost(memory=size / memory, communication=size / gpu.host_link + sent / _server_link(setting))
        part = (complete + delta * (serving.full_every - 1)) * (1 / serving.full_every)
    if serving.verify:
        part += Cost(memory=size / serving.tensor_parallel / memory + VERIFY_SECONDS)
    return part + Cost(memory=SYNC_SECONDS)


def _matrices(setting: Setting) -> int:
    """Named tensors of the model, of which experts have the most."""
    experts = setting.shape.experts
    return setting.shape.layers * (11 if experts is None else 9 + 3 * experts.count)


def _gather_seconds(setting: Setting, size: float) -> float:
    groups, layout = Groups.of(setting.gpu, setting.training.layout), setting.training.layout
    group = groups.expert if layout.expert > layout.tensor else groups.tensor
    return all_gather(setting.gpu, group, size)


def _server_link(setting: Setting) -> float:
    """Bytes/s from a sender to the servers: a broadcast within the node, or through one network adapter."""
    gpu = setting.gpu
    near = setting.serving.transport == "cuda_ipc" or setting.gpus <= gpu.per_node
    return (gpu.node_link if near else gpu.network) * gpu.efficiency.link


def optimizer_bytes(setting: Setting) -> float:
    """Of a rank's optimizer state on the GPU: 12 bytes a parameter, or 6 with bfloat16 moments, divided."""
    training = setting.training
    if training.offload == "host":
        return 0.0
    own, (dense, experts) = fullest(setting), optimizer_ranks(setting)
    per_parameter = 6.0 if training.moments == "bfloat16" else 12.0
    return per_parameter * (own.dense / dense + own.experts / experts)


def handover(setting: Setting) -> Cost:
    """Colocated servers take the GPUs and give them back: the optimizer's state goes to host memory and returns."""
    if not setting.serving.colocated or setting.serving.engine == "embedded":
        return Cost()
    moved = 2 * optimizer_bytes(setting) if setting.serving.offload_optimizer else 0.0
    return Cost(memory=RESUME_SECONDS, communication=moved / setting.gpu.host_link)


def exchange_copy(setting: Setting) -> Cost:
    """A copy of the weights in host memory takes the place of the live ones, and they come back."""
    size = fullest(setting).total * float(BYTES[setting.training.dtype])
    return Cost(communication=2 * size / setting.gpu.host_link)


def checkpoint(setting: Setting) -> Cost:
    """A training checkpoint, its seconds spread over the steps between two. 14 bytes a parameter in bfloat16, written
    by all nodes at once; in the background only the copy to host memory counts."""
    every, training = setting.workload.checkpoint_every, setting.training
    if every == 0:
        return Cost()
    size = model_parameters(setting.shape) * (12.0 + BYTES[training.dtype])
    ranks = training.layout.world_size
    if training.async_save:
        return Cost(communication=size / ranks / setting.gpu.host_link / every)
    nodes = -(-ranks // setting.gpu.per_node)
    return Cost(memory=size / (nodes * STORAGE_RATE) / every)


def reward(setting: Setting, tokens: float) -> Cost:
    """The last group's verification, and the batch divided over the ranks. tokens: of all responses."""
    return Cost(memory=REWARD_SECONDS + BATCH_SECONDS * tokens)
