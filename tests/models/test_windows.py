"""Which keys each layer attends to: the translated windows against the gradients of models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from asd_megatron.errors import UserError
from asd_megatron.models.families import shape_of
from tests.models.test_rope import base

LENGTH, WINDOW = 12, 5
FULL, SLIDING = "full_attention", "sliding_attention"
LATE = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}

CASES: list[tuple[str, dict[str, Any], list[int | None]]] = [
    ("llama", {}, [None] * 4),
    ("mistral", {"sliding_window": WINDOW}, [WINDOW] * 4),
    ("mistral", {"sliding_window": 1}, [1] * 4),
    ("mistral", {"sliding_window": None}, [None] * 4),
    ("qwen2", {"sliding_window": WINDOW}, [None] * 4),
    ("qwen2", LATE, [None, None, WINDOW, WINDOW]),
    ("qwen3", {**LATE, "use_sliding_window": False}, [None] * 4),
    ("qwen3", {**LATE, "max_window_layers": 0}, [WINDOW] * 4),
    ("qwen3", {**LATE, "layer_types": [SLIDING, FULL, FULL, SLIDING]}, [WINDOW, None, None, WINDOW]),
    ("qwen3", {**LATE, "sliding_window": None}, [None] * 4),
    ("qwen3_moe", {**LATE}, [WINDOW] * 4),
    ("qwen3_moe", {**LATE, "use_sliding_window": False}, [None] * 4),
    ("olmo3", {"sliding_window": WINDOW}, [WINDOW, WINDOW, WINDOW, None]),
    ("olmo3", {"sliding_window": WINDOW, "layer_types": [FULL, SLIDING] * 2}, [None, WINDOW] * 2),
]


def their_keys(config: dict[str, Any], layer: int) -> set[int]:
    """The positions that the last position's output depends on, in a model whose other layers do not attend."""
    kept = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    torch.manual_seed(0)
    model = AutoModel.from_config(
        AutoConfig.for_model(config["model_type"], **kept), attn_implementation="eager"
    ).float()
    with torch.no_grad():
        for i, block in enumerate(model.layers):
            if i != layer:
                block.self_attn.o_proj.weight.zero_()
    inputs = torch.randn(1, LENGTH, config["hidden_size"], requires_grad=True)
    model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0, -1].square().sum().backward()
    assert inputs.grad is not None
    return set(inputs.grad[0].abs().sum(-1).nonzero().flatten().tolist())


@pytest.mark.parametrize(("family", "over", "windows"), CASES)
def test_a_window_is_the_newest_keys_that_transformers_attends_to(
    family: str, over: dict[str, Any], windows: list[int | None]
) -> None:
    config = {**base(family), **over}
    _, shape = shape_of(config)
    assert [kind.window for kind in shape.attention] == windows
    for layer, window in enumerate(windows):
        assert their_keys(config, layer) == set(range(LENGTH - (window or LENGTH), LENGTH))


@pytest.mark.parametrize(
    ("family", "key"), [("mistral", "sliding_window"), ("olmo3", "sliding_window"), ("qwen3", "max_window_layers")]
)
def test_absent_keys_have_the_defaults_of_transformers(family: str, key: str) -> None:
    config = {**base(family), "num_hidden_layers": 32, "use_sliding_window": True}
    config |= {} if family == "qwen3" else {"use_sliding_window": False}
    kept = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    theirs = AutoConfig.for_model(family, **kept)
    types = getattr(theirs, "layer_types", [SLIDING] * 32)
    _, shape = shape_of(config)
    assert [kind.window for kind in shape.attention] == [theirs.sliding_window if t == SLIDING else None for t in types]


@pytest.mark.parametrize(
    ("family", "over", "message"),
    [
        ("qwen3", {"layer_types": [FULL] * 3}, "layer_types is .*; it has 3 entries and num_hidden_layers is 4"),
        (
            "qwen3",
            {"layer_types": [FULL, "chunked_attention"] * 2},
            "layer_types is .*expected a list of full_attention",
        ),
        ("qwen3", {"layer_types": [FULL, SLIDING] * 2}, "asks for sliding_attention, but sliding_window is null"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0, expected a whole number"),
        ("qwen2", {**LATE, "max_window_layers": -1}, "max_window_layers is -1, expected a whole number from 0"),
        ("olmo3", {"sliding_window": None}, "asks for sliding_attention, but sliding_window is null"),
        ("mistral", {"layer_types": [FULL] * 4}, "layer_types is .*all layers of this model are sliding_attention"),
        ("qwen3_moe", {"layer_types": [SLIDING] * 4}, "layer_types is .*all layers of this model are full_attention"),
        ("llama", {"sliding_window": 4096}, "sliding_window is 4096; sliding-window.*not supported in this family"),
        ("llama", {"layer_types": [FULL, SLIDING] * 2}, "all layers of this model are full_attention"),
    ],
)
def test_windows_that_are_refused(family: str, over: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        shape_of({**base(family), **over})
    assert "\n" not in str(caught.value)  # the placeholder of the refused value is not refused too
