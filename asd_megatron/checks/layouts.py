"""The cells of the parity check: the supported parallel layouts and the settings they are run with.

Cells of Transformer Engine's layers (`te_*`) and of bfloat16 (`bf16_*`, `te_bf16_*`) have the names of their settings
in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from asd_megatron.checks.cases import ModelKind
from asd_megatron.distributed.layout import Layout


@dataclass(frozen=True)
class ParityCell:
    """One layout and its settings. A small `tokens_per_microbatch` makes many micro-batches of unequal size."""

    name: str
    layout: Layout = field(default_factory=Layout)
    model: ModelKind = "untied"
    distributed_optimizer: bool = False
    overlap: bool = False
    recompute: Literal["none", "mlp", "full"] = "none"
    share_prefixes: bool = False
    tokens_per_microbatch: int = 1 << 20
    exact: bool = False  # the divergence over the whole vocabulary instead of its estimate
    layers: Literal["local", "te"] = "local"
    attention: Literal["own", "flex"] = "own"
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def ranks(self) -> int:
        return self.layout.world_size

    @property
    def reference(self) -> str:
        """The cell it is compared with: one process, local layers, float32."""
        single = "single" if self.model == "untied" else f"{self.model}_single"
        return f"full_{single}" if self.exact else single

    @property
    def bfloat16_reference(self) -> str | None:
        """The cell whose own rounding errors bound this one's: one process in bfloat16; None for float32."""
        return _prefix(self.layers, self.dtype) + self.reference if self.dtype == "bfloat16" else None


def _prefix(layers: str, dtype: str) -> str:
    return ("te_" if layers == "te" else "") + ("bf16_" if dtype == "bfloat16" else "")


def _cells() -> dict[str, ParityCell]:
    cells = [
        ParityCell("single"),
        ParityCell("tied_single", model="tied"),
        ParityCell("micro_batches", tokens_per_microbatch=64),
        ParityCell("shared", share_prefixes=True, tokens_per_microbatch=128),
        ParityCell("recompute_full", recompute="full", tokens_per_microbatch=64),
        ParityCell("recompute_mlp", recompute="mlp"),
        ParityCell("tp2", Layout(tensor=2)),
        ParityCell("tp2_tied", Layout(tensor=2), model="tied", tokens_per_microbatch=64),
        ParityCell("tp2_sp", Layout(tensor=2, sequence_parallel=True), tokens_per_microbatch=64),
        ParityCell(
            "tp2_sp_shared",
            Layout(tensor=2, sequence_parallel=True),
            model="tied",
            share_prefixes=True,
            tokens_per_microbatch=128,
        ),
        ParityCell("pp2", Layout(pipeline=2), tokens_per_microbatch=64),
        ParityCell("pp2_tied", Layout(pipeline=2), model="tied", tokens_per_microbatch=64),
        ParityCell("pp2_vpp2", Layout(pipeline=2, virtual_pipeline=2), tokens_per_microbatch=64),
        ParityCell("cp2", Layout(context=2), tokens_per_microbatch=96),
        ParityCell("dp2", Layout(data=2), tokens_per_microbatch=64),
        ParityCell("dp2_distopt", Layout(data=2), distributed_optimizer=True, tokens_per_microbatch=64),
        ParityCell("dp2_overlap", Layout(data=2), distributed_optimizer=True, overlap=True, tokens_per_microbatch=64),
        ParityCell("dp2_overlap_tied", Layout(data=2), model="tied", overlap=True, tokens_per_microbatch=64),
        ParityCell("dp2_shared", Layout(data=2), share_prefixes=True, tokens_per_microbatch=128),
        ParityCell("tp2_pp2", Layout(tensor=2, pipeline=2, sequence_parallel=True), tokens_per_microbatch=64),
        ParityCell("tp2_cp2", Layout(tensor=2, context=2, sequence_parallel=True), tokens_per_microbatch=96),
        ParityCell(
            "pp2_vpp2_dp2",
            Layout(pipeline=2, virtual_pipeline=2, data=2),
            model="tied",
            distributed_optimizer=True,
            share_prefixes=True,
            recompute="full",
            tokens_per_microbatch=64,
        ),
        ParityCell("cp2_dp2", Layout(context=2, data=2), distributed_optimizer=True, tokens_per_microbatch=96),
    ]
    cells += [
        ParityCell("moe_single", model="moe"),
        ParityCell("moe_micro_batches", model="moe", tokens_per_microbatch=64),
        ParityCell("moe_shared", model="moe", share_prefixes=True, tokens_per_microbatch=128),
        ParityCell("moe_recompute", model="moe", recompute="full", tokens_per_microbatch=64),
        ParityCell("moe_tp2", Layout(tensor=2, sequence_parallel=True), model="moe", tokens_per_microbatch=64),
        ParityCell(
            "moe_tp2_ep2", Layout(tensor=2, sequence_parallel=True, expert=2), model="moe", tokens_per_microbatch=64
        ),
        ParityCell("moe_pp2_vpp2", Layout(pipeline=2, virtual_pipeline=2), model="moe", tokens_per_microbatch=64),
        ParityCell("moe_cp2_ep2", Layout(context=2, expert=2), model="moe", tokens_per_microbatch=96),
        ParityCell("moe_ep2", Layout(data=2, expert=2), model="moe", tokens_per_microbatch=64),
        ParityCell(
            "moe_ep2_distopt",
            Layout(data=2, expert=2),
            model="moe",
            distributed_optimizer=True,
            overlap=True,
            tokens_per_microbatch=64,
        ),
        ParityCell(
            "moe_ep2_pp2", Layout(data=2, pipeline=2, expert=2), model="moe", overlap=True, tokens_per_microbatch=64
        ),
        ParityCell(
            "moe_tp2_ep2_dp2",
            Layout(tensor=2, data=2, sequence_parallel=True, expert=2),
            model="moe",
            distributed_optimizer=True,
            share_prefixes=True,
            tokens_per_microbatch=64,
        ),
    ]
    full = ("single", "micro_batches", "tp2", "tp2_sp", "pp2", "cp2", "dp2", "tp2_pp2", "tp2_cp2")
    cells += [replace(c, name=f"full_{c.name}", exact=True) for c in cells if c.name in full]
    return {c.name: c for c in (*cells, *_variants(cells))}


def _variants(cells: Sequence[ParityCell]) -> Iterator[ParityCell]:
    """The cells with Transformer Engine's layers, and all of them in bfloat16."""
    moe = ParityCell("moe_recompute_mlp", model="moe", recompute="mlp", tokens_per_microbatch=64)
    te = [replace(c, layers="te", attention="flex" if c.share_prefixes else "own") for c in (*cells, moe)]
    for cell in (*te, *(replace(c, dtype="bfloat16") for c in (*cells, *te))):
        yield replace(cell, name=_prefix(cell.layers, cell.dtype) + cell.name)


CELLS = _cells()


def cells_of(layers: str, dtype: str) -> list[str]:
    """The names of the cells with these layers and this dtype, without those that others are compared with."""
    cells = [cell for cell in CELLS.values() if cell.layers == layers and cell.dtype == dtype]
    return [cell.name for cell in cells if cell.name not in (cell.reference, cell.bfloat16_reference)]
