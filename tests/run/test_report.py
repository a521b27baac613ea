"""Rows of the start-up report that only a GPU's model has."""

from __future__ import annotations

from asd_megatron.run.report import attention_text


def test_which_attention_runs() -> None:
    """A backend that was asked for and does not run is named, with what makes it run."""
    assert "console names it" in attention_text("auto", "own") and attention_text("flash", "own").startswith("flash;")
    for backend in ("auto", "fused"):
        shared = attention_text(backend, "flex")
        assert shared.startswith("FlexAttention") and "batching.share_prefixes false" in shared
        assert ("model.attention_backend fused has no effect" in shared) == (backend == "fused")
