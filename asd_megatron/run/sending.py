"""How the trainer's ranks send their weights to the recipe's SGLang servers."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch

from asd_megatron.config.host_checks import hosts_of
from asd_megatron.config.rollout import RolloutSection
from asd_megatron.distributed.addresses import is_loopback, own_names
from asd_megatron.distributed.device import gpu_of_rank
from asd_megatron.distributed.launch import visible_devices
from asd_megatron.distributed.objects import broadcast_object
from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers.versions import Versions, ipc_arguments
from asd_megatron.rollout.sglang.weight_sync.cuda_ipc import REBUILD_ARGUMENTS, CudaIpcTransport
from asd_megatron.rollout.sglang.weight_sync.delta import Deltas, DeltaTransport
from asd_megatron.rollout.sglang.weight_sync.disk import DiskTransport
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.protocol import Transport
from asd_megatron.rollout.sglang.weight_sync.transfer import Sending
from asd_megatron.rollout.sglang.weight_sync.update_group import address_towards
from asd_megatron.rollout.sglang.weight_sync.verification import WeightVerifier
from asd_megatron.run.model_session import ModelSession

MIB = 2**20
MASTER_PORT = 29500  # torchrun's; only the host of MASTER_ADDR matters here


@dataclass(frozen=True)
class Place:
    """Where a rank of the trainer runs: machine, and device as CUDA_VISIBLE_DEVICES names it ("" on the CPU).
    aliases: other names and addresses of the machine."""

    machine: str
    device: str
    aliases: frozenset[str] = frozenset()

    @classmethod
    def of_this_rank(cls) -> Place:
        device = _visible_devices()[gpu_of_rank(os.environ)] if torch.cuda.is_available() else ""
        return cls(socket.gethostname(), device, own_names(os.environ.get("MASTER_ADDR")))

    def is_on(self, host: str) -> bool:
        """Whether the machine is the one that the recipe calls `host`."""
        return host == self.machine or host in self.aliases


def _visible_devices() -> list[str]:
    return visible_devices(os.environ, torch.cuda.device_count())


def hosts_of_servers(
    urls: Sequence[str],
    devices: Sequence[str | None],
    tensor_parallel: int,
    places: Sequence[Place],
    machines: Sequence[str] = (),
) -> dict[str, tuple[int, ...]]:
    """By URL, the global rank of the trainer on the device of each of a server's ranks; servers on other devices are
    left out. On the CPU the ranks take turns.

    devices: CUDA_VISIBLE_DEVICES of each server (None: this process's, or with `machines` those of the ranks there).
    places: of the trainer's ranks. machines: the host of each server; (): the machine of global rank 0.
    """
    if not places[0].device:
        numbers = iter(range(len(urls) * tensor_parallel))
        return {url: tuple(next(numbers) % len(places) for _ in range(tensor_parallel)) for url in urls}
    found = {}
    for server, (url, names) in enumerate(zip(urls, devices, strict=True)):
        host = machines[server] if machines else places[0].machine
        ranks = {place.device: rank for rank, place in enumerate(places) if place.is_on(host)}
        if names is None:
            own = list(ranks) if machines else _visible_devices()
        else:
            own = [name.strip() for name in names.split(",")]
        if len(own) >= tensor_parallel and all(name in ranks for name in own[:tensor_parallel]):
            found[url] = tuple(ranks[name] for name in own[:tensor_parallel])
    return found


def sending(
    session: ModelSession, rollout: RolloutSection, verifier: WeightVerifier | None, transport: Transport | None
) -> Sending | None:
    """How this rank sends its weights; None where global rank 0 sends all of them. `transport`: global rank 0's.
    Collective."""
    if rollout.weight_sync == "disk":
        return None
    deltas = Deltas(rollout.weight_sync_full_every) if rollout.weight_sync_full_every > 1 else None
    if isinstance(transport, DeltaTransport):
        deltas = transport.deltas
        transport = transport.transport
    root = broadcast_object(socket.gethostname(), 0, session.process_groups.host)
    if transport is None:
        here = socket.gethostname() == root
        transport = (
            _cuda_ipc(session, rollout, {})
            if rollout.weight_sync == "cuda_ipc"
            else _distributed(
                session, rollout, rollout.weight_sync_address if here else address_elsewhere(server_names(rollout))
            )
        )
    assert isinstance(transport, DistributedTransport | CudaIpcTransport)
    layout = session.layout
    return Sending(
        transport,
        session.process_groups.host,
        [stage * layout.stage_size for stage in range(layout.pipeline)],
        session.port.device,
        rollout.weight_sync_bucket_mib * MIB,
        rollout.quantization != "none",
        deltas,
        verifier,
    )


def server_names(rollout: RolloutSection) -> list[str]:
    """The hosts of the servers, as the recipe names them; []: global rank 0's machine."""
    started = [name for entry in rollout.server_hosts for name in hosts_of(entry)]
    return started or [urlsplit(url).hostname or "" for url in rollout.server_urls]


def address_elsewhere(hosts: Sequence[str]) -> str | None:
    """At which address servers on `hosts` reach a sender that is not on global rank 0's machine: that of the interface
    towards it, if they run there; None: found from the servers' URLs."""
    if any(not is_loopback(host) for host in hosts):
        return None
    return address_towards([f"http://{os.environ['MASTER_ADDR']}:{MASTER_PORT}"])


def root_transport(
    session: ModelSession, rollout: RolloutSection, hosts: Mapping[str, Sequence[int]], servers: Versions | None
) -> Transport:
    """Global rank 0's transport. `servers`: versions in the environment of those that the run starts; None: it starts
    none. Raises UserError for an environment that it does not work with."""
    if rollout.weight_sync == "disk":
        folder = Path(rollout.weight_sync_folder or session.folder / "weights")
        quantized = rollout.quantization != "none"
        return DiskTransport(folder, session.source, quantized=quantized, timeout=rollout.weight_sync_timeout)
    if rollout.weight_sync == "cuda_ipc":
        if len(hosts) < rollout.servers:
            raise UserError(
                "rollout.weight_sync cuda_ipc: a server uses a device of which no rank of the trainer has memory: name"
                " devices of the trainer's ranks in rollout.server_devices, as CUDA_VISIBLE_DEVICES names them, or set"
                " rollout.weight_sync disk"
            )
        return _cuda_ipc(session, rollout, hosts, ipc_arguments(Path(rollout.server_python)))
    if servers is not None and torch.cuda.is_available():
        check_nccl(loaded_nccl(), servers)
    transport = _distributed(session, rollout, rollout.weight_sync_address)
    if rollout.weight_sync_full_every == 1:
        return transport
    if session.port.dtype == torch.float32:
        raise UserError(
            f"rollout.weight_sync_full_every {rollout.weight_sync_full_every}: an update changes nearly every element"
            " of float32 weights (model.dtype auto is that without GPUs), so there is nothing to leave out: set it to"
            " 1, or model.dtype bfloat16"
        )
    return DeltaTransport(transport, Deltas(rollout.weight_sync_full_every))


def _cuda_ipc(
    session: ModelSession,
    rollout: RolloutSection,
    hosts: Mapping[str, Sequence[int]],
    server_arguments: Sequence[str] = REBUILD_ARGUMENTS,
) -> CudaIpcTransport:
    return CudaIpcTransport(
        server_arguments,
        device=session.port.device,
        world=session.process_groups.world,
        hosts=hosts,
        bucket_bytes=rollout.weight_sync_bucket_mib * MIB,
        timeout=rollout.weight_sync_timeout,
    )


def _distributed(session: ModelSession, rollout: RolloutSection, address: str | None) -> DistributedTransport:
    return DistributedTransport(
        address=address,
        device=session.port.device,
        bucket_bytes=rollout.weight_sync_bucket_mib * MIB,
        timeout=rollout.weight_sync_timeout,
    )


def loaded_nccl() -> str:
    """Version of the NCCL library in this process. torch reports the one that it was built with, which is another one
    after LD_PRELOAD."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOW | os.RTLD_NOLOAD).ncclGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):  # linked into torch statically
        return ".".join(map(str, torch.cuda.nccl.version()))
    return f"{version.value // 10000}.{version.value // 100 % 100}.{version.value % 100}"


def check_nccl(ours: str, servers: Versions) -> None:
    """Raises UserError unless both sides of a broadcast have the same NCCL: with different versions it may hang."""
    if servers.nccl is None or servers.nccl == ours:
        return
    raise UserError(
        f"rollout.weight_sync distributed: the trainer has NCCL {ours} and the servers' environment has {servers.nccl};"
        " both sides of a broadcast need the same. Start the trainer with"
        f" LD_PRELOAD={servers.nccl_library or 'the libnccl.so.2 of the servers'}, or use a container image with equal"
        " NCCL on both sides (docs/weight_sync.md), or set rollout.weight_sync disk"
    )
