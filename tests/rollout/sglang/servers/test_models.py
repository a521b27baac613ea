"""Models that SGLang would compute otherwise than transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers.models import check_served, has_experts, read_config
from asd_megatron.rollout.sglang.servers.options import ServerOptions, command
from tests.models.tiny import OLMO3_ROPE

OLMO3: dict[str, Any] = {"architectures": ["Olmo3ForCausalLM"], "sliding_window": 8, "max_position_embeddings": 128}
MISTRAL: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 128}


def test_the_message_has_the_rope_settings_that_sglang_reads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**OLMO3, "rope_parameters": OLMO3_ROPE}))
    with pytest.raises(UserError) as refused:
        command(ServerOptions(Path("python"), tmp_path, port=1))
    new = json.loads("{" + str(refused.value).partition("replace them by ")[2].partition(", as published")[0] + "}")
    full = dict(OLMO3_ROPE["full_attention"])
    assert new == {"rope_theta": full.pop("rope_theta"), "rope_scaling": full}
    check_served({**OLMO3, **new})


def test_two_rope_bases_have_no_such_form() -> None:
    ropes = {**OLMO3_ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 7.0}}
    with pytest.raises(UserError, match="500000.0 and 7.0 as bases"):
        check_served({**OLMO3, "rope_parameters": ropes})


def test_a_window_that_sglang_ignores() -> None:
    with pytest.raises(UserError, match=r"sliding_window is 8.*all tokens of a MistralForCausalLM of up to 128"):
        check_served({**MISTRAL, "sliding_window": 8})
    check_served({**MISTRAL, "sliding_window": 8}, context_length=8)
    check_served({**MISTRAL, "sliding_window": None})
    check_served({**MISTRAL, "sliding_window": 8, "use_sliding_window": False})  # Qwen's switch


def test_experts_with_tied_embeddings() -> None:
    """Seen with SGLang 0.5.23: the server starts, and samples with an output layer that was never loaded."""
    config = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 6}
    with pytest.raises(UserError, match="tie_word_embeddings is true.*rollout.engine embedded"):
        check_served({**config, "tie_word_embeddings": True})
    check_served({**config, "tie_word_embeddings": False})


def test_what_cannot_be_read_is_left_to_the_server(tmp_path: Path) -> None:
    assert read_config(tmp_path) == {}
    (tmp_path / "config.json").write_text("[1]")
    assert read_config(tmp_path) == {} and not has_experts({})
