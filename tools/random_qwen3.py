"""Models with random weights for the benchmarks that need one of a certain size."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


def random_qwen3(*, vocabulary: int, hidden: int, layers: int, head_dim: int, positions: int) -> Qwen3ForCausalLM:
    """A float32 Qwen3 with heads of `head_dim`, two of them for each key and value, an MLP three times as wide as the
    model and an output layer of its own."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head_dim,
        num_key_value_heads=max(hidden // (2 * head_dim), 1),
        head_dim=head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )
    return Qwen3ForCausalLM(config).float()
