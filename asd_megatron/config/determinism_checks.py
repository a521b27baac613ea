"""What `run.deterministic` cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asd_megatron.config.recipe import Recipe


def determinism_findings(recipe: Recipe) -> Iterator[str]:
    """Keys with which the time that a computation takes decides what is learned from."""
    if not recipe.run.deterministic:
        return
    rollout = recipe.rollout
    for key, on, why in (
        ("overlap", rollout.overlap, "how far the next step's responses are when new weights arrive"),
        ("oversampling", rollout.oversampling > 1, "which groups finish first, and so are trained on"),
    ):
        if on:
            yield (
                f"run.deterministic: with rollout.{key} the time that servers take decides {why}: leave rollout.{key}"
                " out, or set run.deterministic false"
            )


def cpu_server_finding(recipe: Recipe) -> str | None:
    """On a machine without CUDA devices."""
    rollout = recipe.rollout
    if not recipe.run.deterministic or rollout.engine != "sglang" or rollout.server_urls:
        return None
    return (
        "run.deterministic: SGLang's attention for CPUs (torch_native) is not among those that its deterministic"
        " inference accepts, so servers on a CPU cannot have it: set rollout.engine embedded, or"
        " run.deterministic false"
    )
