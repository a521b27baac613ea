"""Rotary embedding frequencies, computed here: Megatron hard-codes one of Llama 3's scaling constants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asd_megatron.errors import UserError

DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's frequency scaling: low frequencies divided by `factor`, high ones kept, a linear blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class RotarySettings:
    head_dim: int
    theta: float
    llama3: Llama3Scaling | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int) -> RotarySettings:
        """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

        Raises UserError for other kinds of RoPE.
        """
        parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = float(parameters.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA)
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if float(parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
            raise UserError("config.json: RoPE on a part of each head (partial_rotary_factor) is not supported")
        if kind == "default":
            return cls(head_dim, theta)
        if kind != "llama3":
            raise UserError(f"config.json: RoPE of type {kind!r} is not supported; supported are default and llama3")
        try:
            scaling = Llama3Scaling(
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_max_positions=int(parameters["original_max_position_embeddings"]),
            )
        except KeyError as error:
            raise UserError(f"config.json: RoPE of type llama3 needs {error}") from None
        return cls(head_dim, theta, scaling)

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


def angles(positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotation angles in Megatron's layout for positions [s, b]: float32 [s, b, 1, head_dim]."""
    half = positions.float()[..., None] * inverse_frequencies
    return torch.cat([half, half], -1)[:, :, None]
