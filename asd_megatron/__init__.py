"""AntiSD, anti-self-distillation for reasoning reinforcement learning, on Megatron-Core."""

from __future__ import annotations

__version__ = "0.1.0"
