"""Rates and sizes of accelerators and of the links between them: what the planner knows about hardware.

Peak rates are the vendors' data sheets'. What is reached of them is stated once, in `Efficiency`, whose defaults are
what published measurements of Megatron-Core and SGLang on H100 reach; `asd-megatron plan --calibrate` measures two of
them on the machine at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from asd_megatron.errors import UserError, did_you_mean
from asd_megatron.observe.flops import TERA, peak_flops

GB = 1e9
GIB = 1 << 30


@dataclass(frozen=True)
class Efficiency:
    """Fractions of the peak rates that programs reach.

    Attributes:
        matmul: of the bfloat16 (or FP8) peak, large matrix products of a layer.
        attention: the same for attention's own products.
        memory: of the memory's bandwidth, streaming.
        link: of a link's bandwidth, large collectives.
    """

    matmul: float = 0.60
    attention: float = 0.50
    memory: float = 0.80
    link: float = 0.75


@dataclass(frozen=True)
class Accelerator:
    """One GPU, or a CPU that stands for one, and the node around it.

    Attributes:
        name: as `--gpu` takes it.
        memory_gib: of the device, all of it.
        bfloat16, fp8: FLOP/s, dense; None: it has no such products (a plan with them is refused).
        memory_rate: bytes/s of the device's memory.
        node_link: bytes/s of one GPU to others of its node, one direction.
        network: bytes/s of one GPU to other nodes, one direction.
        host_link: bytes/s between a GPU and the host's memory, one direction.
        per_node: GPUs of a node.
        cpu: whether it is a CPU, whose memory is the host's.
        dollars_per_hour: a GPU's price for the cost of a step: a list price to be replaced (`--price`).
        efficiency: what programs reach of these.
        float32: FLOP/s of float32 products, not rounded to TF32.
        launch: seconds from one operator to the next, beyond what it reads and computes.
        node_latency, network_latency: seconds of a message between two GPUs of a node, of two nodes.
    """

    name: str
    memory_gib: float
    bfloat16: float
    fp8: float | None
    memory_rate: float
    node_link: float
    network: float
    host_link: float
    per_node: int = 8
    cpu: bool = False
    dollars_per_hour: float = 0.0
    efficiency: Efficiency = field(default_factory=Efficiency)
    float32: float = 67e12
    launch: float = 3e-6
    node_latency: float = 5e-6
    network_latency: float = 15e-6

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB

    def with_efficiency(self, **changes: float) -> Accelerator:
        return replace(self, efficiency=replace(self.efficiency, **changes))


def _gpu(
    name: str,
    device: str,
    memory_gib: float,
    memory_rate: float,
    node_link: float,
    price: float,
    network: float = 50.0,
    float32: float = 67.0,
) -> Accelerator:
    """A GPU whose peak rates `observe.flops` knows by its device name. Rates in GB/s, one direction; float32 in
    TFLOP/s."""
    bfloat16 = peak_flops(device, "bfloat16")
    assert bfloat16 is not None, device
    return Accelerator(
        name=name,
        memory_gib=memory_gib,
        bfloat16=bfloat16,
        fp8=peak_flops(device, "fp8"),
        memory_rate=memory_rate * GB,
        node_link=node_link * GB,
        network=network * GB,
        host_link=(25.0 if bfloat16 < 500e12 else 50.0) * GB,
        dollars_per_hour=price,
        float32=float32 * TERA,
    )


# Data sheets of the SXM modules; memory as nvidia-smi reports it; NVLink's rate is half of the sum of both directions;
# one 400 Gbit/s adapter a GPU. Prices are round list prices of on-demand clouds in 2026.
ACCELERATORS: dict[str, Accelerator] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 39.4, 1555.0, 300.0, 1.3, network=25.0, float32=19.5),
        _gpu("a100", "NVIDIA A100-SXM4-80GB", 79.2, 2039.0, 300.0, 1.8, network=25.0, float32=19.5),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 79.6, 3350.0, 450.0, 2.5),
        _gpu("h200", "NVIDIA H200", 139.8, 4800.0, 450.0, 3.0),
        _gpu("h20", "NVIDIA H20", 95.1, 4000.0, 450.0, 1.5, float32=44.0),
        _gpu("b200", "NVIDIA B200", 178.4, 8000.0, 900.0, 4.5, float32=75.0),
    )
}


def accelerator(name: str) -> Accelerator:
    """An accelerator of the table by name. Raises UserError for others."""
    found = ACCELERATORS.get(name.lower())
    if found is None:
        hint = did_you_mean(name.lower(), ACCELERATORS) or f"choose one of {', '.join(ACCELERATORS)}"
        raise UserError(f"--gpu {name}: no such GPU is known: {hint}")
    return found
