"""Frequencies of rotary position embeddings (RoPE): no scaling, or Llama 3's.

They are computed here because Megatron-Core hard-codes one of Llama 3's scaling constants.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.models.hf_config import number, shown, whole_number

DEFAULT_THETA = 10000.0
COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
KINDS: dict[str, tuple[str, ...]] = {  # the supported kinds and the keys that each has beside the common ones
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

log = logging.getLogger("asd_megatron")


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's frequency scaling: low frequencies divided by `factor`, high ones kept, a linear blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class RotarySettings:
    """RoPE on complete heads of `head_dim` numbers with base `theta`."""

    head_dim: int
    theta: float
    llama3: Llama3Scaling | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int) -> RotarySettings:
        """From `rope_scaling` (transformers 4, or added by hand) if it is there, else `rope_parameters` (transformers
        5); `rope_theta` and `partial_rotary_factor` may stand beside them.

        The order is that of transformers and SGLang: `rope_scaling` replaces all of `rope_parameters`, the base in it
        too. Raises UserError for other kinds of RoPE, and for keys that the kind does not have.
        """
        scaling, parameters = (_mapping(config, key) for key in ("rope_scaling", "rope_parameters"))
        chosen, name = (scaling, "rope_scaling") if scaling else (parameters, "rope_parameters")
        kind = chosen.get("rope_type", chosen.get("type")) or "default"
        if not isinstance(kind, str) or kind not in KINDS:
            raise UserError(
                f"config.json: RoPE of type {shown(kind)} ({name}) is not supported; supported are "
                f"{' and '.join(KINDS)}"
            )
        unknown = sorted(k for k, v in chosen.items() if v is not None and k not in COMMON_KEYS + KINDS[kind])
        if unknown:
            raise UserError(
                f"config.json: RoPE of type {kind} has no {shown(unknown[0])} ({name}): name the rope_type that it"
                " belongs to, or remove the key"
            )
        if number({**config, **_given(chosen)}, "partial_rotary_factor", 1.0) != 1.0:
            raise UserError("config.json: RoPE on a part of each head (partial_rotary_factor) is not supported")
        if head_dim % 2:
            raise UserError(f"config.json: RoPE rotates pairs of numbers, so a head_dim of {head_dim} is not supported")
        theta = number({**config, **_given(chosen)}, "rope_theta", DEFAULT_THETA)
        replaced = parameters.get("rope_theta")
        if scaling and replaced not in (None, theta):
            log.warning(
                "config.json: rope_scaling replaces rope_parameters, as in transformers and SGLang, so rope_theta is "
                "%g and not the %s of rope_parameters: write rope_theta into rope_scaling too if that is not meant",
                theta,
                replaced,
            )
        return cls(head_dim, theta, _llama3(config, chosen, name) if kind == "llama3" else None)

    @property
    def attention_factor(self) -> float:
        """By which queries and keys are multiplied."""
        return 1.0

    def inverse_frequencies(self) -> Tensor:
        """float32 [head_dim / 2]."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        inverse = 1.0 / (self.theta**steps)
        if self.llama3 is None:
            return inverse
        s = self.llama3
        wavelength = 2 * math.pi / inverse
        longest, shortest = s.original_max_positions / s.low_freq_factor, s.original_max_positions / s.high_freq_factor
        smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        blended = (1 - smooth) * inverse / s.factor + smooth * inverse
        scaled = torch.where(wavelength > longest, inverse / s.factor, inverse)
        between = (wavelength <= longest) & (wavelength >= shortest)
        return torch.where(between, blended, scaled)


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"config.json: {key} is {shown(value)}, expected an object; download the model again")
    return value


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _llama3(config: Mapping[str, Any], chosen: Mapping[str, Any], name: str) -> Llama3Scaling:
    # transformers takes the length from beside the object first, then from in it, then the model's own positions
    key = "original_max_position_embeddings"
    length = config.get(key) or chosen.get(key) or config.get("max_position_embeddings")
    for needed in KINDS["llama3"][:3]:
        if chosen.get(needed) is None:
            raise UserError(f"config.json: RoPE of type llama3 needs {needed!r} in {name}; download the model again")
    scaling = Llama3Scaling(
        factor=number(chosen, "factor", 1.0),
        low_freq_factor=number(chosen, "low_freq_factor", 1.0),
        high_freq_factor=number(chosen, "high_freq_factor", 1.0),
        original_max_positions=whole_number({key: length}, key, (1 << 31) - 1),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError(
            f"config.json: RoPE of type llama3 needs a low_freq_factor ({scaling.low_freq_factor:g}) below its "
            f"high_freq_factor ({scaling.high_freq_factor:g}) in {name}; download the model again"
        )
    return scaling


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
