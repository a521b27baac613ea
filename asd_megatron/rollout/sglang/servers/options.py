"""The options of an SGLang server, its command line and its environment variables."""

from __future__ import annotations

import ipaddress
import json
import random
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from asd_megatron.distributed import determinism
from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers.models import check_served, has_experts, read_config
from asd_megatron.rollout.sglang.servers.versions import without_other_torch

MODULE = "sglang.launch_server"
ROUTER_MODULE = "sglang_router.launch_router"
OWNED = {  # SGLang's argument -> how it is set here
    "host": "the host option",
    "port": "the port option",
    "model-path": "the model",
    "model": "the model",
    "api-key": "the generation key",
    "admin-api-key": "the administration key",
    "tensor-parallel-size": "the tensor-parallel option",
    "tp-size": "the tensor-parallel option",
    "tp": "the tensor-parallel option",
    "weight-version": "weight synchronisation",
    "config": "the recipe",
    "dtype": "the dtype option",
    "context-length": "the context-length option",
    "nnodes": "rollout.server_hosts",
    "node-rank": "rollout.server_hosts",
    "dist-init-addr": "rollout.server_hosts",
}
ONE_ONLY = (
    *("data-parallel-size", "dp-size", "dp", "pipeline-parallel-size", "pp-size", "pp"),
    *("expert-parallel-size", "ep-size", "ep"),
)
CPU_ARGUMENTS: dict[str, Any] = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "disable-overlap-schedule": True,
    "sleep-on-idle": True,  # otherwise an idle server uses half a core
    "mem-fraction-static": 0.2,
    "max-total-tokens": 8192,
    "max-running-requests": 16,
}
GPU_EXPERT_ARGUMENTS = {"moe-runner-backend": "triton"}
"""For a mixture of experts on GPUs. SGLang's own choice is the same up to Hopper; on Blackwell it is a backend that
reorders the experts' weights, so that they could not be verified, and chooses experts inside the kernel."""
NCCL_DEFAULTS = {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "2"}
"""NCCL's own defaults; 2: where the device supports it. SGLang sets both to 0 where they are unset."""
TRANSPORT_PREFIXES = ("NCCL_", "GLOO_")
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0",
    "THP_MEM_ALLOC_ENABLE": "1",  # PyTorch: huge pages, so that received weights cost few page faults
}
PLUGIN = Path(__file__).with_name("plugin")
"""On the import path of every server: the plugin of SGLang there is loaded by each of its processes."""
TRAINER_VARIABLES = re.compile(  # of the trainer's ranks and Python environment, not passed on
    "TORCHELASTIC_.*|ASD_MEGATRON_.*|PYTHONPATH|PYTHONHOME|VIRTUAL_ENV|OMP_NUM_THREADS|CUDA_DEVICE_MAX_CONNECTIONS"
    "|RANK|LOCAL_RANK|GROUP_RANK|ROLE_.*|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE|MASTER_ADDR|MASTER_PORT"
    "|TORCH_FR_DUMP_TEMP_FILE|TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
)


@dataclass(frozen=True)
class ServerOptions:
    """One server. `arguments` are SGLang's own, names without the dashes: {"mem-fraction-static": 0.8}; True: a flag
    without a value, None or False: left out, a list: several values. `devices` is CUDA_VISIBLE_DEVICES ("": no device),
    `port` 0 a free one, `dtype` "auto" SGLang's choice on GPUs and float32 on the CPU. `nodes`: the hosts on which its
    ranks run, as the launcher names them, with equally many ranks each; (): this machine. `places`: address and port
    on each of them, `host` and `port` being those of the first; `meeting`: where the ranks of several nodes meet;
    `part`: the number of the node that these options are for. `deterministic`: answers depend on a request and its
    sampling seed alone, not on what else is in the batch.
    """

    python: Path
    model: Path
    tensor_parallel: int = 1
    devices: str | None = None
    host: str = "127.0.0.1"
    port: int = 0
    api_key: str = field(default="", repr=False)
    admin_key: str = field(default="", repr=False)
    dtype: str = "auto"
    context_length: int | None = None
    deterministic: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    places: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    part: int = 0
    meeting: str = ""

    @property
    def on_cpu(self) -> bool:
        """Whether the server computes on the CPU: because the options say so, or because there is no GPU."""
        device = pass_through(self).get("device")
        if device:
            return bool(device == "cpu")
        return not (_has_cuda() if self.devices is None else self.devices)


def command(options: ServerOptions) -> list[str]:
    """The command line of a server, without its keys (`secret_arguments`). Its port is not 0 any more.

    Raises UserError for arguments that an option of ours sets (`OWNED`) or weight updates do not support (`ONE_ONLY`),
    and for a model that SGLang would compute wrongly.
    """
    config = read_config(options.model)
    check_served(config, options.context_length)
    gpu_arguments = GPU_EXPERT_ARGUMENTS if has_experts(config) else {}
    arguments: dict[str, Any] = {
        "model-path": str(options.model),
        "host": options.host,
        "port": options.port,
        "tp-size": options.tensor_parallel,
        "dtype": "float32" if options.dtype == "auto" and options.on_cpu else options.dtype,
        "context-length": options.context_length,
        "weight-version": "default",
        **(
            {"nnodes": len(options.nodes), "node-rank": options.part, "dist-init-addr": options.meeting}
            if options.meeting
            else {}
        ),
        **(CPU_ARGUMENTS if options.on_cpu else gpu_arguments),
        **({"enable-deterministic-inference": True} if options.deterministic else {}),
        **pass_through(options),
    }
    return [str(options.python), "-m", MODULE, *_flags(arguments)]


def router_command(at: ServerOptions, urls: Sequence[str], metrics_port: int, start_timeout: float) -> list[str]:
    """The command line of a router at `at`'s address before servers at `urls`. It does not retry; its client does."""
    arguments = {
        "worker-urls": list(urls),
        "policy": "cache_aware",
        "host": at.host,
        "port": at.port,
        "prometheus-host": "127.0.0.1",
        "prometheus-port": metrics_port,
        "worker-startup-timeout-secs": int(start_timeout),
        "disable-retries": True,
        "log-level": "warn",
    }
    return [str(at.python), "-m", ROUTER_MODULE, *_flags(arguments)]


def secret_arguments(options: ServerOptions) -> list[str]:
    """The keys' arguments, passed through a pipe. One word each, because a key may start with a dash."""
    keys = {"--api-key": options.api_key, "--admin-api-key": options.admin_key}
    return [f"{name}={key}" for name, key in keys.items() if key]


def pass_through(options: ServerOptions) -> dict[str, Any]:
    """SGLang's own arguments as given, by their long names; their values are not checked."""
    given = {name.lstrip("-").replace("_", "-"): value for name, value in options.arguments.items()}
    for name in given:
        if name in OWNED:
            raise UserError(f"SGLang's argument --{name} is set by {OWNED[name]}: remove it from the server arguments")
        if name in ONE_ONLY and str(given[name]) != "1":
            raise UserError(
                f"SGLang's argument --{name} above 1 is not supported (weights go to tensor-parallel ranks only):"
                " start more servers instead"
            )
    return given


def server_environment(options: ServerOptions, base: Mapping[str, str], direct: Sequence[str] = ()) -> dict[str, str]:
    """The variables of a server's process on this machine: `base` without those of the trainer's ranks, Python
    environment and torch, with `server_variables`."""
    return trainer_variables_removed(base) | server_variables(options, base, direct=direct)


def trainer_variables_removed(base: Mapping[str, str]) -> dict[str, str]:
    """`base` without the variables of the trainer's ranks, Python environment and torch."""
    kept = without_other_torch(base)
    return {name: value for name, value in kept.items() if not TRAINER_VARIABLES.fullmatch(name)}


def server_variables(
    options: ServerOptions, base: Mapping[str, str], plugin: Path = PLUGIN, direct: Sequence[str] = ()
) -> dict[str, str]:
    """The variables that a server needs, wherever it runs: NCCL's settings of the trainer, whose variables are `base`,
    our plugin of SGLang, and no proxy for its own address and those in `direct`. On another node all of the trainer's
    settings of NCCL and gloo, which its launcher need not pass on."""
    variables = dict(CPU_ENVIRONMENT) if options.on_cpu else nccl_settings(base)
    if options.deterministic:
        wanted = determinism.variables(cuda=not options.on_cpu)
        variables |= {name: base.get(name, value) for name, value in wanted.items()}
    if options.nodes:
        variables = {name: base[name] for name in base if name.startswith(TRANSPORT_PREFIXES)} | variables
    variables |= dict.fromkeys(("no_proxy", "NO_PROXY"), _no_proxy([options.host, *direct], base))
    if options.devices is not None:
        variables["CUDA_VISIBLE_DEVICES"] = options.devices
    return variables | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(plugin)} | dict(options.environment)


def nccl_settings(base: Mapping[str, str]) -> dict[str, str]:
    """NCCL's memory settings in a process with the variables `base`. All ranks of a communicator need the same: the
    trainer's rank 0 and the servers' ranks are in one when weights are broadcast."""
    return {name: base.get(name) or default for name, default in NCCL_DEFAULTS.items()}


def _no_proxy(hosts: Sequence[str], base: Mapping[str, str]) -> str:
    """Hosts that are reached without a proxy: the user's, loopback, and `hosts`: the server's own, whose warm-up
    request to itself would go to the proxy otherwise, and those that it asks."""
    given = [entry.strip() for name in ("no_proxy", "NO_PROXY") for entry in base.get(name, "").split(",")]
    if "*" in given:
        return "*"
    own = ["localhost", "127.0.0.1", "::1", "[::1]"]
    own += [name for host in hosts for name in (host, *([f"[{host}]"] if ":" in host else []))]
    return ",".join(dict.fromkeys(entry for entry in (*given, *own) if entry))


def parse_arguments(words: Sequence[str]) -> dict[str, Any]:
    """SGLang's own arguments from its command line, `--name value`, `--name=value` or `--flag`, as a mapping."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, given, value = word.removeprefix("--").partition("=")
            found[name] = value if given else True
        elif not name:
            raise UserError(f"{word!r} stands before the first of SGLang's arguments: they start with --name")
        else:
            before = found[name]
            found[name] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    return found


def devices_of_servers(devices: Sequence[str], servers: int, tensor_parallel: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each server from `devices` like `["4,5", "6,7"]`; None for each if `devices` is empty.

    Raises UserError unless there is one entry a server with one device a rank, and for several servers on GPUs without
    devices.
    """
    if not devices:
        if servers > 1 and _has_cuda():
            raise UserError(f"{servers} servers would share the same GPUs: name the devices of each one")
        return [None] * servers
    if len(devices) != servers:
        raise UserError(f"devices are given for {len(devices)} servers, and there are {servers}: one entry a server")
    for entry in devices:
        if len(entry.split(",")) != tensor_parallel:
            raise UserError(f"a server of tensor-parallel size {tensor_parallel} needs as many devices, not {entry!r}")
    return list(devices)


def check_listening(options: ServerOptions) -> None:
    """Raises UserError unless a server may and can listen at the host and port of `options`: a free port of loopback,
    or with both keys of one interface of this machine.
    """
    host = options.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise UserError(f"server host {host!r} is not an address: give the IP address of one interface") from error
    if address.is_unspecified:
        raise UserError(
            f"server host {host} would open the servers on every interface, and whoever reaches them can replace their"
            " weights: give the address of the cluster's own interface, or leave it at 127.0.0.1"
        )
    if not address.is_loopback and not (options.api_key and options.admin_key):
        raise UserError(f"a server at {host} can be reached from other machines and needs both keys: set them")
    if not can_listen(host, options.port):
        if options.port and can_listen(host, 0):
            raise UserError(f"port {options.port} of {host} is in use: choose another one, or 0 for a free one")
        raise UserError(f"no interface of this machine has the address {host}: give one that `ip address` shows")


def url_of(options: ServerOptions) -> str:
    """The URL of a server whose port is chosen."""
    return f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{options.port}"


def pick_ports(options: Sequence[ServerOptions]) -> list[ServerOptions]:
    """`options` with distinct free ports in place of 0."""
    taken = {given.port for given in options if given.port}
    chosen = []
    for given in options:
        chosen.append(given if given.port else replace(given, port=free_port(given.host, taken)))
        taken.add(chosen[-1].port)
    return chosen


def _has_cuda() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))


def _flags(arguments: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        flags += [f"--{name}", *(json.dumps(v) if isinstance(v, Mapping) else str(v) for v in values)]
    return flags


def free_port(host: str, taken: frozenset[int] | set[int] = frozenset()) -> int:
    """A free port of `host` below the system's ephemeral ports: the server binds it some seconds later, and an outgoing
    connection could take an ephemeral one meanwhile.
    """
    try:
        ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        ephemeral = 32768
    draw = random.SystemRandom()
    for _ in range(100):
        port = draw.randrange(max(ephemeral - 10_000, 10_000), max(ephemeral, 10_100))
        if port not in taken and can_listen(host, port):
            return port
    raise UserError(f"no free port was found on {host} below {ephemeral}: end other programs that listen there")


def can_listen(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
