"""How each layer of a model attends: the windows and rotary embeddings that families read from their configs.

A window of w means what it means in `transformers` (`masking_utils.sliding_window_overlay`: key > query - w, and not
after the query): a query attends to the w newest keys, its own included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from asd_megatron.models.hf_config import MOST_POSITIONS, Fields, listed
from asd_megatron.models.rope import LAYER_TYPES, RotarySettings, rotary, rotary_by_layer_type

FULL, SLIDING = LAYER_TYPES
DEFAULT_WINDOW = 4096  # of every supported family in transformers, when the key is absent
DEFAULT_WINDOW_LAYERS = 28


@dataclass(frozen=True)
class AttentionKind:
    """How a layer attends.

    Attributes:
        rotary: its rotary position embedding.
        window: the newest keys that a query attends to, its own included; None: all.
    """

    rotary: RotarySettings
    window: int | None = None


Attention = Callable[[Fields, int, int], tuple[AttentionKind, ...]]
"""(config, layers, head_dim) -> how each layer attends. What is not supported becomes a problem of the fields."""


def full_attention(fields: Fields, layers: int, head_dim: int) -> tuple[AttentionKind, ...]:
    """Every layer attends to all earlier tokens."""
    _check_types(fields, layers, FULL)
    return (AttentionKind(rotary(fields, head_dim)),) * layers


def window_in_all_layers(fields: Fields, layers: int, head_dim: int) -> tuple[AttentionKind, ...]:
    """Mistral: `sliding_window` for every layer; null: none."""
    window = _window(fields)
    _check_types(fields, layers, FULL if window is None else SLIDING)
    return (AttentionKind(rotary(fields, head_dim), window),) * layers


def optional_window_in_all_layers(fields: Fields, layers: int, head_dim: int) -> tuple[AttentionKind, ...]:
    """Qwen3-MoE: `sliding_window` for every layer when `use_sliding_window` says so. `max_window_layers` has no effect,
    as in transformers."""
    window = _window(fields) if fields.flag("use_sliding_window") else None
    fields.get("sliding_window")
    _check_types(fields, layers, FULL if window is None else SLIDING)
    return (AttentionKind(rotary(fields, head_dim), window),) * layers


def optional_window_in_late_layers(fields: Fields, layers: int, head_dim: int) -> tuple[AttentionKind, ...]:
    """Qwen2 and Qwen3: with `use_sliding_window`, the layers that `layer_types` names, by default those from
    `max_window_layers` on, have a window of `sliding_window`."""
    window = _window(fields) if fields.flag("use_sliding_window") else None
    fields.get("sliding_window")
    first = fields.whole_number("max_window_layers", MOST_POSITIONS, least=0, default=DEFAULT_WINDOW_LAYERS)
    late = [SLIDING if window is not None and layer >= first else FULL for layer in range(layers)]
    settings = rotary(fields, head_dim)
    return _by_types(fields, _types(fields, layers, late), {FULL: settings, SLIDING: settings}, window)


def three_windows_to_one_full(fields: Fields, layers: int, head_dim: int) -> tuple[AttentionKind, ...]:
    """Olmo 3: `layer_types`, by default three layers with a window of `sliding_window` to one without, each type with a
    rotary embedding of its own."""
    settings = rotary_by_layer_type(fields, head_dim, default_theta=500_000.0)
    default = [FULL if layer % 4 == 3 else SLIDING for layer in range(layers)]
    return _by_types(fields, _types(fields, layers, default), settings, _window(fields))


def _window(fields: Fields) -> int | None:
    """`sliding_window`; null is None, absent is the default of transformers."""
    if fields.has("sliding_window") and fields.get("sliding_window") is None:
        return None
    return fields.whole_number("sliding_window", MOST_POSITIONS, default=DEFAULT_WINDOW)


def _types(fields: Fields, layers: int, default: list[str]) -> list[str]:
    """`layer_types`, one of FULL and SLIDING for each layer."""
    types = fields.get("layer_types", default)
    if not isinstance(types, list | tuple) or any(kind not in LAYER_TYPES for kind in types):
        fields.refuse("layer_types", f"a list of {listed(LAYER_TYPES)}")
    elif len(types) != layers and fields.good("num_hidden_layers"):
        fields.unsupported("layer_types", f"it has {len(types)} entries and num_hidden_layers is {layers}")
    return list(types) if fields.good("layer_types") and len(types) == layers else default


def _check_types(fields: Fields, layers: int, kind: str) -> None:
    """Refuse `layer_types` that differ from what this family does, in all layers, whatever they say."""
    if any(given != kind for given in _types(fields, layers, [kind] * layers)):
        fields.unsupported("layer_types", f"all layers of this model are {kind}, with the other settings as they are")


def _by_types(
    fields: Fields, types: list[str], settings: dict[str, RotarySettings], window: int | None
) -> tuple[AttentionKind, ...]:
    if SLIDING in types and window is None and fields.good("sliding_window", "use_sliding_window"):
        fields.problem(
            "config.json: layer_types asks for sliding_attention, but sliding_window is null or use_sliding_window"
            " false: correct one of them"
        )
    return tuple(AttentionKind(settings[kind], window if kind == SLIDING else None) for kind in types)
