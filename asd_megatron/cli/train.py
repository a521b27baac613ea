"""`asd-megatron train RECIPE [MORE.yaml ...] [--section.key value ...]`."""

from __future__ import annotations

from collections.abc import Sequence

from asd_megatron.cli.launch import launch_recipe


def main(argv: Sequence[str]) -> int:
    """Run a recipe on the ranks that its layout needs; returns the exit status."""
    return launch_recipe("train", "asd_megatron.train", argv)
