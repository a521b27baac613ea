"""Combinations of the `rollout` section that cannot work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from asd_megatron.config.rollout import Rollout
from asd_megatron.distributed.addresses import is_loopback

if TYPE_CHECKING:
    from asd_megatron.config.recipe import Recipe

ANY_ENGINE = ("engine", "replay_folder", "max_batch_size", "collect_timeout")
STARTED_ONLY = ("servers", "server_devices", "server_tensor_parallel", "server_args", "server_python")


def rollout_findings(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the section, one finding a yield, each with what to change."""
    rollout = recipe.rollout
    if rollout.engine != "sglang":
        for key in _changed(rollout, *(k for k in Rollout.model_fields if k not in ANY_ENGINE)):
            yield f"rollout.{key} is read only with rollout.engine sglang: set that, or leave rollout.{key} out"
        return
    yield from _servers(rollout)
    yield from _weight_sync(rollout)
    yield from _off_policy(recipe)


def device_findings(rollout: Rollout) -> Iterator[str]:
    """What cannot work on a machine with CUDA devices."""
    if rollout.engine != "sglang":
        return
    if rollout.placement == "colocated" and rollout.weight_sync == "distributed":
        yield (
            "rollout.weight_sync distributed: NCCL does not connect two processes on one device, and colocated servers"
            " are on the trainer's: set rollout.weight_sync cuda_ipc (or disk)"
        )
    if rollout.placement == "disaggregated" and not rollout.server_urls and not rollout.server_devices:
        yield (
            "rollout.server_devices is empty, so the servers would take the trainer's devices: name theirs, one text a"
            ' server ("4,5"), or set rollout.placement colocated'
        )


def _changed(rollout: Rollout, *keys: str) -> list[str]:
    return [key for key in keys if getattr(rollout, key) != Rollout.model_fields[key].default]


def _servers(rollout: Rollout) -> Iterator[str]:
    if rollout.server_urls:
        for key in _changed(rollout, *STARTED_ONLY):
            yield (
                f"rollout.{key} is about servers that the run starts, and rollout.server_urls names running ones: leave"
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
    if rollout.server_devices and len(rollout.server_devices) != rollout.servers:
        yield (
            f"rollout.server_devices names the devices of {len(rollout.server_devices)} servers and rollout.servers is"
            f" {rollout.servers}: give one text a server"
        )
    if not rollout.server_urls and rollout.router not in (None, "start"):
        yield (
            "rollout.router names a running router, which knows nothing of servers that the run starts: set it to"
            " `start`, or give rollout.server_urls too"
        )
    if rollout.router not in (None, "start") and urlsplit(rollout.router).scheme not in ("http", "https"):
        yield f"rollout.router {rollout.router!r} is neither `start` nor a URL like http://127.0.0.1:31000"


def _weight_sync(rollout: Rollout) -> Iterator[str]:
    if rollout.weight_sync != "disk" and rollout.weight_sync_folder is not None:
        yield (
            "rollout.weight_sync_folder is read only with rollout.weight_sync disk: set that, or leave the folder out"
        )
    if rollout.weight_sync == "cuda_ipc" and rollout.placement != "colocated":
        yield (
            "rollout.weight_sync cuda_ipc shares the memory of one device: set rollout.placement colocated, or"
            " rollout.weight_sync distributed"
        )
    if rollout.weight_sync == "distributed":
        if rollout.weight_sync_address in ("0.0.0.0", "::"):
            yield (
                f"rollout.weight_sync_address {rollout.weight_sync_address} would let anybody join the weight update:"
                " name the address of one interface"
            )
        far = [url for url in rollout.server_urls if not is_loopback(urlsplit(url).hostname or "")]
        if far and is_loopback(rollout.weight_sync_address or ""):
            yield (
                f"rollout.weight_sync_address {rollout.weight_sync_address} cannot be reached from {far[0]}: name this"
                " machine's address on the cluster's network"
            )
    if not rollout.receipt and rollout.receipt_tolerance is not None:
        yield "rollout.receipt_tolerance is read only with rollout.receipt true: set that, or leave the tolerance out"
    if rollout.offload_optimizer and rollout.placement != "colocated":
        yield (
            "rollout.offload_optimizer makes room for servers on the trainer's devices: set rollout.placement"
            " colocated, or rollout.offload_optimizer false"
        )


def _off_policy(recipe: Recipe) -> Iterator[str]:
    rollout = recipe.rollout
    if rollout.partial_rollouts and rollout.oversampling == 1:
        yield (
            "rollout.partial_rollouts keeps what over-sampling cuts, and rollout.oversampling is 1: raise it, or set"
            " rollout.partial_rollouts false"
        )
    if rollout.partial_rollouts and recipe.sampling.stop:
        yield (
            "rollout.partial_rollouts: a stop string (sampling.stop) across the place where a response was interrupted"
            " would be missed: use sampling.stop_token_ids, or set rollout.partial_rollouts false"
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
            yield f"rollout.max_staleness 0 leaves nothing of what rollout.{key} makes: set it to 1 or more"
    if rollout.overlap and rollout.placement == "colocated":
        yield (
            "rollout.overlap generates while the trainer works, and colocated servers have given their memory to it by"
            " then: set rollout.placement disaggregated, or rollout.overlap false"
        )
