"""Section `gate`: the entropy-triggered gate."""

from __future__ import annotations

from pydantic import Field

from asd_megatron.config.base import Section


class GateSection(Section):
    """When the per-token term acts. Only the gated conditions close the gate; all of them honour `warmup_steps`."""

    warmup_steps: int | None = Field(
        None,
        ge=0,
        description=(
            "First steps with lambda 0, in which the entropy is calibrated; null: 5 for gated conditions without "
            "`gate.h_warm`, else 0."
        ),
    )
    tau_down: float = Field(
        0.93, gt=0, description="The gate closes when the entropy falls below this fraction of the calibrated one."
    )
    tau_up: float = Field(
        1.0, gt=0, description="The gate opens when the entropy reaches this fraction of the calibrated one."
    )
    h_warm: float | None = Field(
        None,
        gt=0,
        description="The calibrated entropy H_warm (nats), given instead of measured; null: measured in the warm-up.",
    )
