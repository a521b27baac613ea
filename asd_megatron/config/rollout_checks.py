"""Combinations of the `rollout` section that cannot work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from asd_megatron.config.host_checks import host_findings, host_of_server, hosts_of, url_findings
from asd_megatron.config.refusals import changed
from asd_megatron.config.rollout import RolloutSection
from asd_megatron.distributed.launch import visible_devices

if TYPE_CHECKING:
    from asd_megatron.config.recipe import Recipe

ANY_ENGINE = ("engine", "replay_folder", "max_batch_size", "collect_timeout", "routing_replay")
QUANTIZING_ARGUMENTS = ("quantization", "load-format")
"""SGLang's own arguments that `rollout.quantization` decides about."""
SCALES_NOT_LOADED = ("LlamaForCausalLM", "MistralForCausalLM")
"""SGLang 0.5.23 renames the scales of these (`models/llama.py`, `load_weights`) and then does not find their place."""
BLOCK = 128  # rows and columns of a quantised weight that share a scale
STARTED_ONLY = ("servers", "server_devices", "server_tensor_parallel", "server_args", "server_python")


def rollout_findings(recipe: Recipe) -> Iterator[str]:
    """What cannot work in the section, one finding a yield, each with its remedy."""
    rollout = recipe.rollout
    if rollout.engine != "sglang":
        for key in changed(rollout, *(k for k in RolloutSection.model_fields if k not in ANY_ENGINE)):
            yield f"rollout.{key} is read only with rollout.engine sglang: set that, or leave rollout.{key} out"
        if rollout.routing_replay == "engine":
            yield (
                "rollout.routing_replay engine replays the experts that SGLang servers chose: set rollout.engine"
                " sglang, or rollout.routing_replay scoring or none"
            )
        return
    yield from _servers(rollout)
    yield from host_findings(rollout)
    yield from url_findings(rollout)
    yield from _weight_sync(rollout)
    yield from _deltas(recipe)
    yield from _quantization(recipe)
    yield from _off_policy(recipe)


def device_findings(rollout: RolloutSection, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """What cannot work on a machine with CUDA devices. `environment`: the variables of a trainer's rank, which say
    which devices the trainer's ranks on this machine use."""
    if rollout.engine != "sglang" or rollout.server_urls:
        return
    if rollout.placement == "colocated" and rollout.weight_sync == "distributed":
        yield (
            "rollout.weight_sync distributed: NCCL does not connect two processes on one device, and colocated servers"
            " are on the trainer's: set rollout.weight_sync cuda_ipc (or disk)"
        )
    if any(name.lstrip("-") == "device" and value == "cpu" for name, value in rollout.server_args.items()):
        yield (
            "rollout.server_args device cpu: a trainer on CUDA devices sends its weights to servers on CUDA devices"
            " alone: leave it out"
        )
    if rollout.server_hosts:
        if not rollout.server_devices and rollout.servers > len(rollout.server_hosts):
            yield (
                f"rollout.server_devices is empty, so several of the {rollout.servers} servers would share the devices"
                ' of a host: name theirs, one text a server ("0,1"), or set rollout.servers'
                f" {len(rollout.server_hosts)}"
            )
        return
    if rollout.placement == "disaggregated" and not rollout.server_devices:
        yield (
            "rollout.server_devices is empty, so the servers would take the trainer's devices: name theirs, one text a"
            ' server ("4,5"), or set rollout.placement colocated'
        )
    if rollout.servers > 1 and not rollout.server_devices and rollout.placement == "colocated":
        yield (
            f"rollout.server_devices is empty, so {rollout.servers} servers would share the same devices: name theirs,"
            ' one text a server ("0,1"), or set rollout.servers 1'
        )
    if environment.get("RANK", "0") == environment.get("LOCAL_RANK", "0"):  # the first machine, which has the servers
        yield from _shared_devices(rollout, trainer_devices(environment))


def trainer_devices(environment: Mapping[str, str]) -> list[str]:
    """The devices of the trainer's ranks on this machine, as CUDA_VISIBLE_DEVICES names them."""
    ranks = int(environment.get("LOCAL_WORLD_SIZE") or 1)
    return visible_devices(environment, ranks)[:ranks]


def _shared_devices(rollout: RolloutSection, trainers: list[str]) -> Iterator[str]:
    """Servers on devices of the trainer that must not be there, or the reverse. A device may be named by its number or
    its UUID; names of different kinds are not compared."""
    servers = [name for entry in rollout.server_devices for name in _devices(entry)]
    shared = [name for name in trainers if name in servers]
    comparable = {name.isdigit() for name in trainers} == {name.isdigit() for name in servers}
    if rollout.placement == "disaggregated" and shared:
        yield (
            f"rollout.server_devices names {', '.join(shared)}, on which the trainer's ranks run: name other devices,"
            " or set rollout.placement colocated"
        )
    others = [name for name in servers if name not in trainers]
    if rollout.weight_sync == "cuda_ipc" and comparable and others:
        yield (
            f"rollout.weight_sync cuda_ipc shares the memory of the trainer's ranks, and none runs on device"
            f" {others[0]}, which rollout.server_devices names: name some of {', '.join(trainers)}, or set"
            " rollout.weight_sync disk"
        )


def _devices(entry: str) -> list[str]:
    return [name.strip() for name in entry.split(",")]


def _servers(rollout: RolloutSection) -> Iterator[str]:
    if rollout.server_urls:
        for key in changed(rollout, *STARTED_ONLY):
            yield (
                f"rollout.{key} is for servers that the run starts, and rollout.server_urls names running ones: leave"
                " one of the two out"
            )
        if rollout.router == "start":
            yield (
                "rollout.router start needs servers that the run starts, and rollout.server_urls names running ones:"
                " give the URL of their router, or null"
            )
        if rollout.placement == "colocated":
            yield (
                "rollout.placement colocated needs servers that the run starts on its own devices: leave"
                " rollout.server_urls out"
            )
    for url in rollout.server_urls:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            yield f"rollout.server_urls: {url!r} is no URL; write it like http://127.0.0.1:30000"
    if len(set(rollout.server_urls)) < len(rollout.server_urls):
        yield "rollout.server_urls names a server twice: name each once"
    if rollout.router is not None and rollout.routing_replay == "engine":
        yield (
            "rollout.router: sglang-router does not pass the request for routed experts on, which"
            " rollout.routing_replay engine replays: set rollout.router null, or rollout.routing_replay scoring or none"
        )
    yield from _server_devices(rollout)
    if not rollout.server_urls and rollout.router not in (None, "start"):
        yield (
            "rollout.router names a running router, which does not know the servers that the run starts: set it to"
            " `start`, or give rollout.server_urls too"
        )
    if rollout.router not in (None, "start") and urlsplit(rollout.router).scheme not in ("http", "https"):
        yield f"rollout.router {rollout.router!r} is neither `start` nor a URL like http://127.0.0.1:31000"


def _server_devices(rollout: RolloutSection) -> Iterator[str]:
    if not rollout.server_devices:
        return
    if len(rollout.server_devices) != rollout.servers:
        yield (
            f"rollout.server_devices names the devices of {len(rollout.server_devices)} servers and rollout.servers is"
            f" {rollout.servers}: give one text a server"
        )
    hosts = [host_of_server(rollout.server_hosts or ("",), k) for k in range(len(rollout.server_devices))]
    ranks = rollout.server_tensor_parallel // len(hosts_of(hosts[0]))
    for entry in rollout.server_devices:
        if len(_devices(entry)) != ranks:
            yield (
                f"rollout.server_devices {entry!r}: a server with rollout.server_tensor_parallel"
                f" {rollout.server_tensor_parallel} needs {'as many' if len(hosts_of(hosts[0])) == 1 else ranks}"
                " devices: change one of the two"
            )
    names = [
        (host, name) for host, entry in zip(hosts, rollout.server_devices, strict=True) for name in _devices(entry)
    ]
    twice = next((where for where in names if names.count(where) > 1), None)
    if twice is not None:
        of = f" of {twice[0]}" if twice[0] else ""
        yield f"rollout.server_devices names device {twice[1]}{of} twice: give every server devices of its own"


def _weight_sync(rollout: RolloutSection) -> Iterator[str]:
    if rollout.weight_sync != "disk" and rollout.weight_sync_folder is not None:
        yield (
            "rollout.weight_sync_folder is read only with rollout.weight_sync disk: set that, or leave the folder out"
        )
    if rollout.weight_sync != "distributed" and rollout.weight_sync_address is not None:
        yield (
            "rollout.weight_sync_address is read only with rollout.weight_sync distributed: set that, or leave the"
            " address out"
        )
    if rollout.weight_sync == "disk":
        for key in changed(rollout, "weight_sync_bucket_mib"):
            yield f"rollout.{key} is not read with rollout.weight_sync disk: leave it out"
    if rollout.weight_sync == "cuda_ipc" and rollout.server_urls:
        yield (
            "rollout.weight_sync cuda_ipc needs a server that the run starts, and rollout.server_urls names running"
            " ones: set rollout.weight_sync distributed (or disk), or leave rollout.server_urls out"
        )
    elif rollout.weight_sync == "cuda_ipc" and rollout.placement != "colocated":
        yield (
            "rollout.weight_sync cuda_ipc shares the memory of one device: set rollout.placement colocated, or"
            " rollout.weight_sync distributed"
        )
    everywhere = ("0.0.0.0", "::")  # noqa: S104 (refused)
    if rollout.weight_sync == "distributed" and rollout.weight_sync_address in everywhere:
        yield (
            f"rollout.weight_sync_address {rollout.weight_sync_address} would let anybody join the weight update:"
            " name the address of one interface"
        )
    if not rollout.verify_weights and rollout.verify_tolerance is not None:
        yield (
            "rollout.verify_tolerance is read only with rollout.verify_weights true: set that, or leave the tolerance"
            " out"
        )
    if rollout.offload_optimizer and rollout.placement != "colocated":
        yield (
            "rollout.offload_optimizer frees memory for servers on the trainer's devices: set rollout.placement"
            " colocated, or rollout.offload_optimizer false"
        )


def _deltas(recipe: Recipe) -> Iterator[str]:
    rollout, key = recipe.rollout, f"rollout.weight_sync_full_every {recipe.rollout.weight_sync_full_every}"
    if rollout.weight_sync_full_every == 1:
        return
    if rollout.weight_sync != "distributed":
        yield f"{key} is read only with rollout.weight_sync distributed: set that, or leave it out"
    if rollout.placement == "colocated":
        yield (
            f"{key} sends changes of the weights that the servers hold, and colocated servers give up theirs while the"
            " trainer works: set it to 1, or rollout.placement disaggregated"
        )
    if recipe.model.dtype == "float32":
        yield (
            f"{key} with model.dtype float32: an update changes nearly every element of float32 weights, so there is"
            " nothing to leave out: set it to 1, or model.dtype bfloat16"
        )


def _quantization(recipe: Recipe) -> Iterator[str]:
    rollout = recipe.rollout
    given = {name.lstrip("-").replace("_", "-") for name in rollout.server_args}
    if rollout.quantization == "none":
        if "quantization" in given:
            yield (
                "rollout.server_args quantization: SGLang cannot be sent other weights once it has quantised them: set"
                " rollout.quantization fp8, which quantises them in the trainer"
            )
        return
    for name in (name for name in QUANTIZING_ARGUMENTS if name in given):
        yield (
            f"rollout.server_args {name}: rollout.quantization {rollout.quantization} sets how the servers load their"
            " weights: leave one of the two out"
        )
    if recipe.model.dtype == "float32":
        yield (
            f"rollout.quantization {rollout.quantization} with model.dtype float32: SGLang computes the rest of a"
            " quantised model in bfloat16: set model.dtype bfloat16, or rollout.quantization none"
        )


def quantized_model_findings(rollout: RolloutSection, hf_config: Mapping[str, Any]) -> Iterator[str]:
    """Models that SGLang does not load in blocks, and sizes that blocks do not divide. What `hf_config`, the model's
    config.json, does not say is not checked."""
    if rollout.quantization == "none":
        return
    for name in (name for name in hf_config.get("architectures") or () if name in SCALES_NOT_LOADED):
        yield (
            f"rollout.quantization {rollout.quantization}: SGLang does not load the scales of a {name}: set"
            " rollout.quantization none"
        )
    ranks, heads, hidden = (
        rollout.server_tensor_parallel,
        hf_config.get("num_attention_heads"),
        hf_config.get("hidden_size"),
    )
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    head = hf_config.get("head_dim") or hidden // heads
    key_heads = hf_config.get("num_key_value_heads") or heads
    units = hf_config.get("moe_intermediate_size") or hf_config.get("intermediate_size") or 0
    sizes = {
        "hidden units": hidden,
        "rows of query heads": heads * head / ranks,
        "rows of key heads": max(key_heads / ranks, 1) * head,
        "feed-forward units": units / ranks,
    }
    bad = [f"{size:g} {name}" for name, size in sizes.items() if size % BLOCK]
    if bad:
        yield (
            f"rollout.quantization {rollout.quantization} takes blocks of {BLOCK} x {BLOCK}, and a server's rank has"
            f" {', '.join(bad)} of the model: set rollout.quantization none"
            + (f", or lower rollout.server_tensor_parallel {ranks}" if ranks > 1 else "")
        )


def _off_policy(recipe: Recipe) -> Iterator[str]:
    rollout = recipe.rollout
    if rollout.partial_rollouts and rollout.oversampling == 1:
        yield (
            "rollout.partial_rollouts keeps what over-sampling cancels, and rollout.oversampling is 1: raise it, or set"
            " rollout.partial_rollouts false"
        )
    if rollout.partial_rollouts and recipe.sampling.stop:
        yield (
            "rollout.partial_rollouts: a stop string (sampling.stop) that spans the interruption of a response would be"
            " missed: use sampling.stop_token_ids, or set rollout.partial_rollouts false"
        )
    for key in ("overlap", "partial_rollouts"):
        if not getattr(rollout, key):
            continue
        if recipe.algorithm.importance_correction == "none":
            yield (
                f"rollout.{key} trains on responses of older weights: set algorithm.importance_correction truncated or"
                " masked"
            )
        if rollout.max_staleness == 0:
            yield f"rollout.max_staleness 0 discards every rollout of rollout.{key}: set it to 1 or more"
    if rollout.overlap and rollout.placement == "colocated":
        yield (
            "rollout.overlap generates while the trainer works, and colocated servers release their memory then: set"
            " rollout.placement disaggregated, or rollout.overlap false"
        )
