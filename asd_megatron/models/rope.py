"""Frequencies of rotary position embeddings (RoPE) as `transformers` computes them from what it reads and writes.

They are computed here because Megatron-Core hard-codes one of Llama 3's scaling constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from asd_megatron.models.hf_config import DAMAGED, MOST_POSITIONS, Fields, listed, shown, warn_once

DEFAULT_THETA = 10000.0
ORIGINAL = "original_max_position_embeddings"
COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
KINDS: dict[str, tuple[str, ...]] = {  # the supported kinds: keys that each needs beside the common ones
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
OPTIONS: dict[str, tuple[str, ...]] = {  # and keys that it may have
    "llama3": (ORIGINAL,),
    "yarn": (ORIGINAL, "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
}
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor`, which is positions divided by it."""

    factor: float

    def frequencies(self, powers: Tensor, theta: float) -> Tensor:
        """Scaled frequencies from the inverses of the unscaled ones, both float32 [head_dim / 2]."""
        return 1.0 / powers / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's frequency scaling: low frequencies divided by `factor`, high ones kept, a linear blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def frequencies(self, powers: Tensor, theta: float) -> Tensor:
        """Scaled frequencies from the inverses of the unscaled ones, both float32 [head_dim / 2]."""
        inverse = 1.0 / powers
        positions, low, high = self.original_max_positions, self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / inverse
        longest, shortest = positions / low, positions / high
        smooth = (positions / wavelength - low) / (high - low)
        blended = (1 - smooth) * inverse / self.factor + smooth * inverse
        scaled = torch.where(wavelength > longest, inverse / self.factor, inverse)
        between = (wavelength <= longest) & (wavelength >= shortest)
        return torch.where(between, blended, scaled)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): frequencies that turn less than `beta_slow` times in the original length divided by
    `factor`, those above `beta_fast` turns kept, a ramp over the index of the frequency between.

    Attributes:
        attention_factor: what cos and sin are multiplied by; already derived where the config does not give it.
        truncate: whether the ends of the ramp are rounded outwards to whole indices.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, powers: Tensor, theta: float) -> Tensor:
        """Scaled frequencies from the inverses of the unscaled ones, both float32 [head_dim / 2]."""
        count = len(powers)
        low, high = (self._index(turns, 2 * count, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * count - 1)  # 2 * count: as transformers has it
        high = high + 0.001 if high == low else high
        kept = 1 - torch.clamp((torch.arange(count, dtype=torch.float32) - low) / (high - low), 0, 1)
        return 1.0 / (self.factor * powers) * (1 - kept) + 1.0 / powers * kept

    def _index(self, turns: float, head_dim: int, theta: float) -> float:
        """The index of the frequency that turns so often in the original length."""
        return head_dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


Scaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True)
class RotarySettings:
    """RoPE on complete heads of `head_dim` numbers with base `theta`."""

    head_dim: int
    theta: float
    scaling: Scaling | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int) -> RotarySettings:
        """Of a config whose layers all have the same RoPE (`rotary`). Raises UserError for what is not supported."""
        fields = Fields(config)
        settings = rotary(fields, head_dim)
        fields.finish()
        return settings

    @property
    def attention_factor(self) -> float:
        """What transformers multiplies cos and sin by, so that attention scores are multiplied by its square."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0

    def inverse_frequencies(self) -> Tensor:
        """float32 [head_dim / 2]."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        powers = self.theta**steps
        return 1.0 / powers if self.scaling is None else self.scaling.frequencies(powers, self.theta)


def rotary(fields: Fields, head_dim: int, default_theta: float = DEFAULT_THETA) -> RotarySettings:
    """The RoPE of a config whose layers all have the same: `rope_scaling` (transformers 4, or added by hand) if it is
    there, else `rope_parameters` (transformers 5); `rope_theta`, `partial_rotary_factor` and
    `original_max_position_embeddings` may stand beside them.

    The order is that of transformers and SGLang: `rope_scaling` replaces all of `rope_parameters`, the base in it too.
    Other kinds of RoPE, and keys that the kind does not have, are problems of `fields`.
    """
    scaling, parameters = fields.inside("rope_scaling"), fields.inside("rope_parameters")
    chosen = scaling if scaling.given() else parameters
    outside = fields.number("rope_theta", default_theta)
    theta = chosen.number("rope_theta", outside)
    replaced = parameters.get("rope_theta")
    if chosen is scaling and replaced not in (None, theta):
        warn_once(
            "config.json: rope_scaling replaces rope_parameters, as in transformers and SGLang, so rope_theta is "
            f"{theta:g} and not the {shown(replaced)} of rope_parameters: write rope_theta into rope_scaling too if "
            "that is not meant"
        )
    # transformers takes the original length from beside the object first, and `truncate: null` as false
    truncate = chosen.flag("truncate", not chosen.has("truncate"))
    return _settings(fields, chosen, RotarySettings(head_dim, theta), (fields, chosen), truncate)


def rotary_by_layer_type(fields: Fields, head_dim: int, default_theta: float) -> dict[str, RotarySettings]:
    """The RoPE of full-attention and of sliding-window layers: `rope_parameters` with an object for each of the two
    (transformers 5), or the flat `rope_scaling` and `rope_theta`, which are of the full-attention layers alone.

    Done as `Olmo3Config.convert_rope_params_to_dict` does it. Sliding-window layers never get the `rope_theta` beside
    the objects, but the default; `rope_scaling` is laid over the object of the full-attention layers, and has to say
    `rope_type`, not `type`; `truncate` is looked for outside the two objects, where nothing writes it, so that YaRN's
    ramp is always rounded.
    """
    parameters, scaling = fields.inside("rope_parameters"), fields.inside("rope_scaling")
    for key in parameters.given():
        if key not in LAYER_TYPES:
            parameters.unsupported(
                key, f"transformers does not read it there: give each of {listed(LAYER_TYPES)} an object of its own"
            )
    full, sliding = (parameters.inside(kind) for kind in LAYER_TYPES)
    if scaling.given():  # over a default that has a rope_type, so that a `type` in it is not read
        full = scaling.laid_over(full.values() or {"rope_type": "default"})
    theta = full.number("rope_theta", fields.number("rope_theta", default_theta))
    sliding_theta = sliding.number("rope_theta", default_theta)
    if fields.get("rope_theta") is not None and not sliding.has("rope_theta") and theta != sliding_theta:
        warn_once(
            f"config.json: rope_theta {theta:g} is of the full-attention layers alone, as in transformers, and the "
            f"sliding-window layers have {sliding_theta:g}: write rope_parameters with an object for each of "
            f"{listed(LAYER_TYPES)} if that is not meant"
        )
    if full.get("truncate", True) is False:
        warn_once(f"config.json: truncate of {full.name} has no effect, as in transformers")
    return {
        "full_attention": _settings(fields, full, RotarySettings(head_dim, theta), (full,), True),
        "sliding_attention": _settings(fields, sliding, RotarySettings(head_dim, sliding_theta), (sliding,), True),
    }


def _settings(
    fields: Fields, chosen: Fields, plain: RotarySettings, places: tuple[Fields, ...], truncate: bool
) -> RotarySettings:
    """`plain` with the scaling that `chosen`, an object of the config `fields`, asks for.

    The original length is looked for in `places`, in their order; without one it is the model's own.
    """
    kind = chosen.get("rope_type", chosen.get("type")) or "default"
    for part in (fields, chosen):
        if part.get("partial_rotary_factor") is not None and part.number("partial_rotary_factor", 1.0) != 1.0:
            part.unsupported("partial_rotary_factor", "RoPE on a part of each head is not supported")
    if plain.head_dim % 2:
        fields.problem(
            f"config.json: RoPE rotates pairs of numbers, so a head_dim of {plain.head_dim} is not supported"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        fields.problem(
            f"config.json: RoPE of type {shown(kind)} ({chosen.name}) is not supported; supported are {listed(KINDS)}"
        )
        return plain
    allowed = (*COMMON_KEYS, *KINDS[kind], *OPTIONS.get(kind, ()))
    unknown = sorted(key for key in chosen.given() if key not in allowed)
    for key in unknown:
        fields.problem(
            f"config.json: RoPE of type {kind} has no {shown(key)} ({chosen.name}): name the rope_type that it"
            " belongs to, or remove the key"
        )
    # transformers derives YaRN's factor from a null, but needs the key
    missing = [key for key in KINDS[kind] if not (chosen.has(key) if kind == "yarn" else key in chosen.given())]
    for key in missing:
        fields.problem(f"config.json: RoPE of type {kind} needs {key!r} in {chosen.name}; download the model again")
    if unknown or missing or kind == "default":
        return plain
    if kind == "linear":
        return replace(plain, scaling=LinearScaling(chosen.number("factor", 1.0)))
    holder, key = next(((p, ORIGINAL) for p in places if p.get(ORIGINAL)), (fields, "max_position_embeddings"))
    original = holder.whole_number(key, MOST_POSITIONS)
    if kind == "llama3":
        return replace(plain, scaling=_llama3(chosen, original))
    if plain.theta <= 1:
        fields.problem(f"config.json: RoPE of type yarn needs a rope_theta above 1, not {plain.theta:g}{DAMAGED}")
    return replace(plain, scaling=_yarn(fields, chosen, original, truncate))


def _llama3(chosen: Fields, original: int) -> Llama3Scaling:
    low, high = chosen.number("low_freq_factor", 1.0), chosen.number("high_freq_factor", 4.0)
    if low >= high and chosen.good("low_freq_factor", "high_freq_factor"):
        chosen.problem(
            f"config.json: RoPE of type llama3 needs a low_freq_factor ({low:g}) below its high_freq_factor ({high:g})"
            f" in {chosen.name}; download the model again"
        )
    return Llama3Scaling(chosen.number("factor", 1.0), low, high, original)


def _yarn(fields: Fields, chosen: Fields, original: int, truncate: bool) -> YarnScaling:
    if chosen.get("factor") is None:
        factor = fields.whole_number("max_position_embeddings", MOST_POSITIONS) / original
    else:
        factor = chosen.number("factor", 1.0)
    mscale, mscale_all_dim = (chosen.number(key, 0.0, zero=True) for key in ("mscale", "mscale_all_dim"))
    derived = _mscale(factor, 1.0)
    if mscale and mscale_all_dim:
        derived = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=chosen.number("attention_factor", derived),
        beta_fast=chosen.number("beta_fast", 32.0, zero=True) or 32.0,
        beta_slow=chosen.number("beta_slow", 1.0, zero=True) or 1.0,
        truncate=truncate,
    )


def _mscale(factor: float, mscale: float) -> float:
    """The paper's attention factor, its logarithmic part multiplied by `mscale`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class Rotation:
    """The rotation angles of a model's rotary embeddings, of which it may have several kinds."""

    def __init__(self, rotaries: Sequence[RotarySettings], device: torch.device) -> None:
        self.inverse_frequencies = [rotary.inverse_frequencies().to(device) for rotary in rotaries]

    def angles(self, positions: Tensor) -> Tensor:
        """In Megatron's layout for positions [s, b]: float32 [s, b, 1, head_dim]; with several kinds [kinds, s, b, 1,
        head_dim], of which each layer takes its own."""
        found = []
        for inverse in self.inverse_frequencies:
            half = positions.float()[..., None] * inverse
            found.append(torch.cat([half, half], -1)[:, :, None])
        return found[0] if len(found) == 1 else torch.stack(found)
