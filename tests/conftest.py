"""Fixtures of every room."""

from tests.rollout.sglang_world import sglang_pair, sglang_world

__all__ = ["sglang_pair", "sglang_world"]
