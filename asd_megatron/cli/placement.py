"""The placement of a recipe on this machine: the number of ranks and their GPUs."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from asd_megatron.config import AnyRecipe, Recipe, check_world
from asd_megatron.errors import UserError, plural

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Placement:
    """`ranks` local ranks. `devices` are their GPUs, one each and as CUDA_VISIBLE_DEVICES names them; without GPUs it
    is empty. `servers` are the GPUs of the recipe's SGLang servers, `unused` those that nobody takes."""

    ranks: int
    devices: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def apply(self, environment: MutableMapping[str, str]) -> None:
        """Show the ranks their GPUs only, where others belong to servers: rank i takes the i-th GPU that it sees."""
        if self.devices and self.servers:
            environment[VISIBLE] = ",".join(self.devices)


def place(recipe: AnyRecipe, gpus: int, environment: Mapping[str, str]) -> Placement:
    """Ranks for a machine with `gpus` GPUs that CUDA_VISIBLE_DEVICES allows.

    With GPUs and `parallelism.data` null, data parallelism fills those that no SGLang server takes; without GPUs it is
    as small as the experts allow. For instance 8 GPUs, tensor 2, servers on "6,7": GPUs 0 to 5 hold 6 ranks, tensor 2 x
    data 3. Raises UserError when there are too few GPUs, or the layout is impossible.
    """
    layout = recipe.parallelism
    check_world(recipe, layout.ranks)
    if gpus == 0:
        return Placement(layout.ranks)
    visible = _visible(gpus, environment)
    servers = _server_devices(recipe)
    free = [device for device in visible if device not in servers]
    needed = layout.ranks
    if needed > len(free):
        taken = f", {len(visible) - len(free)} of them in rollout.server_devices" if len(free) < len(visible) else ""
        raise UserError(
            f"the recipe's layout needs {plural(needed, 'rank')} and this machine has {plural(len(visible), 'GPU')}"
            f"{taken}: make the parallelism section smaller, or use torchrun on several machines"
        )
    ranks = needed if layout.data is not None else len(free) // needed * needed
    return Placement(ranks, tuple(free[:ranks]), servers, tuple(free[ranks:]))


def _visible(gpus: int, environment: Mapping[str, str]) -> list[str]:
    """The names of the GPUs: numbers, or what CUDA_VISIBLE_DEVICES holds (numbers or UUIDs)."""
    given = [name.strip() for name in environment.get(VISIBLE, "").split(",") if name.strip()]
    return given[:gpus] if len(given) >= gpus else [str(index) for index in range(gpus)]


def _server_devices(recipe: AnyRecipe) -> tuple[str, ...]:
    if not isinstance(recipe, Recipe) or recipe.rollout.engine != "sglang":
        return ()
    if recipe.rollout.placement == "colocated" or recipe.rollout.server_hosts:  # the trainer's as well, or elsewhere
        return ()
    return tuple(name.strip() for entry in recipe.rollout.server_devices for name in entry.split(","))


def placement_text(recipe: AnyRecipe, placement: Placement) -> str:
    """One line that says which GPUs are used, or that there are none."""
    p = recipe.parallelism
    sizes = {"tensor": p.tensor, "pipeline": p.pipeline, "context": p.context}
    sizes["data"] = placement.ranks // p.model_parallel
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    where = _gpus(placement.devices) if placement.devices else "the CPU"
    text = f"{plural(placement.ranks, 'rank')} on {where}" + (f" ({layout})" if layout else "")
    if not placement.devices:
        meant = _gpu_keys(recipe)
        return f"{text}: no CUDA device found" + (f", although the recipe has {', '.join(meant)}" if meant else "")
    if placement.servers:
        text += f"; SGLang servers on {_gpus(placement.servers)}"
    if placement.unused:
        why = "parallelism.data" if p.data is not None else f"the layout takes multiples of {plural(p.ranks, 'GPU')}"
        text += f"; {_gpus(placement.unused)} unused ({why})"
    return text


def _gpu_keys(recipe: AnyRecipe) -> list[str]:
    """The recipe's keys that are meant for GPUs, with their values."""
    keys = []
    if recipe.model.dtype == "bfloat16":
        keys.append("model.dtype bfloat16")
    if recipe.model.layers == "te":
        keys.append("model.layers te")
    if recipe.precision.fp8 != "none":
        keys.append(f"precision.fp8 {recipe.precision.fp8}")
    if isinstance(recipe, Recipe) and recipe.rollout.engine == "sglang":
        if recipe.rollout.server_devices:
            keys.append("rollout.server_devices")
        if recipe.rollout.weight_sync == "cuda_ipc":
            keys.append("rollout.weight_sync cuda_ipc")
    return keys


def _gpus(names: tuple[str, ...]) -> str:
    return f"GPU{'s' * (len(names) > 1)} {', '.join(names)}"
