"""A plan as text and as JSON: memory item by item, seconds by phase, layouts that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asd_megatron.errors import plural
from asd_megatron.models.gpt import Recompute
from asd_megatron.planner.hardware import GIB
from asd_megatron.planner.memory import StageMemory, kv_tokens, rank_memory
from asd_megatron.planner.proposals import Proposal
from asd_megatron.planner.setting import Setting
from asd_megatron.planner.shortage import lacks
from asd_megatron.planner.step_time import StepTime, step_time

Row = tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What was worked out for one setting.

    Attributes:
        title: what is planned, in a line.
        memory: of each pipeline stage's fullest rank.
        time: of a step.
        lacking: sentences about what does not fit, each with what to change; empty: it fits.
        proposals: other settings that fit, fastest first.
        unproposed: why there is none.
    """

    title: str
    setting: Setting
    memory: tuple[StageMemory, ...]
    time: StepTime
    lacking: tuple[str, ...]
    proposals: tuple[Proposal, ...] = ()
    unproposed: str | None = None

    @property
    def fits(self) -> bool:
        return not self.lacking

    @property
    def fullest(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.peak().bytes())


def plan(title: str, setting: Setting) -> Plan:
    """The plan of one setting, without proposals. Raises UserError for a layout that cannot shard the model."""
    return Plan(title, setting, rank_memory(setting), step_time(setting), lacks(setting))


# ---------------------------------------------------------------- text


def plan_text(found: Plan) -> str:
    """The plan for a console."""
    parts = [
        found.title,
        _titled("layout", layout_text(found.setting)),
        _titled("memory of the fullest GPU", _memory(found)),
        _titled("time of a step", _time(found.time)),
    ]
    if found.proposals:
        parts.append(_titled("layouts that fit, fastest first", _proposals(found.proposals)))
    elif found.unproposed:
        parts.append(_titled("layouts that fit", found.unproposed))
    parts.append(verdict(found))
    return "\n\n".join(parts)


def verdict(found: Plan) -> str:
    """One line: whether it fits and the margin, or what lacks."""
    peak = found.fullest.peak()
    size = f"{peak.bytes() / GIB:.1f} of {found.setting.gpu.memory_gib:.1f} GiB in the phase {peak.name!r}"
    if found.lacking:
        return "\n".join([f"does not fit: {size}", *(f"  {reason}" for reason in found.lacking)])
    left = found.setting.gpu.memory_gib - peak.bytes() / GIB
    return f"fits: {size}, {left:.1f} GiB left; {_whole(found.time.total)} s a step"


def layout_text(setting: Setting) -> str:
    """Trainer and servers in a line each."""
    t, s = setting.training, setting.serving
    trainer = f"trainer   {plural(t.layout.world_size, 'GPU')}: {sizes(setting)}; {details(setting)}"
    if s.engine == "embedded":
        return f"{trainer}\nrollouts  the embedded engine on the trainer's GPUs"
    where = "on the trainer's GPUs" if s.colocated else f"on {plural(s.gpus, 'GPU')} of their own"
    many = plural(s.servers, "server")
    cache = f"{kv_tokens(setting):,} tokens of KV cache each"
    overlap = "; generates while the trainer trains" if s.overlap else ""
    return f"{trainer}\nrollouts  {many} x tensor {s.tensor_parallel} {where}, {cache}{overlap}"


def sizes(setting: Setting) -> str:
    """`tensor 2 x data 4`."""
    layout = setting.training.layout
    named = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual": layout.virtual_pipeline or 1,
        "context": layout.context,
        "data": layout.data,
        "expert": layout.expert,
    }
    return " x ".join(f"{name} {size}" for name, size in named.items() if size > 1) or "one GPU"


def details(setting: Setting) -> str:
    """What else decides about memory and speed."""
    t = setting.training
    parts = [f"recompute {recompute_text(t.recompute)}", f"{t.pack:,} tokens a micro-batch"]
    if t.moments != "float32":
        parts.append(f"moments {t.moments}")
    if t.offload != "none":
        parts.append(f"optimizer on the {t.offload}")
    if t.fp8:
        parts.append("FP8")
    return ", ".join(parts)


def recompute_text(recompute: Recompute) -> str:
    return recompute.kind if recompute.layers is None else f"{recompute.kind} of {recompute.layers} layers a stage"


def _memory(found: Plan) -> str:
    """The items of the fullest phase, then the peak of every phase, on device and host."""
    stage = found.fullest
    peak = stage.peak()
    where = f" of pipeline stage {stage.stage}" if len(found.memory) > 1 else ""
    items = sorted((item for item in peak.items if item.where == "device"), key=lambda item: -item.bytes)
    rows: list[Row] = [(item.name, f"{item.bytes / GIB:.2f}", item.note) for item in items]
    rows.append(("sum", f"{peak.bytes() / GIB:.2f}", f"GiB, phase {peak.name!r}{where}"))
    phases: list[Row] = [("phase", "GPU", "host")]
    phases += [(p.name, f"{p.bytes() / GIB:.1f}", f"{p.bytes('host') / GIB:.1f}") for p in stage.phases]
    return f"{_table(rows, '<>')}\n\nGiB of every phase (host: of one rank)\n{_table(phases, '<>>')}"


def _time(time: StepTime) -> str:
    rows: list[Row] = [("phase", "seconds", "compute", "memory", "exchange", "waiting", "of the step")]
    for phase in time.phases:
        cost = phase.cost
        parts = (cost.compute, cost.memory, cost.communication, cost.idle)
        fraction = f"{phase.seconds / time.total:.0%}"
        rows.append((phase.name, _seconds(phase.seconds), *(_seconds(value) for value in parts), fraction))
    lines = [
        _table(rows, "<>>>>>>"),
        f"a step: {_seconds(time.total)} s" + (", rollouts beside training" * time.overlap),
    ]
    mfu = "" if time.mfu is None else f", MFU of the trainer's passes {time.mfu:.0%}"
    lines.append(f"{time.tokens_per_second:,.0f} response tokens a second{mfu}")
    lines.append(f"{time.gpu_hours:.2f} GPU hours, {time.dollars:.2f} dollars")
    return "\n".join(lines)


def _whole(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else _seconds(seconds)


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 0.05 else ("0" if value == 0 else f"{value:.2g}")


def _proposals(proposals: Sequence[Proposal]) -> str:
    rows: list[Row] = [("", "s a step", "GPU hours", "GPUs", "trainer", "servers", "")]
    for number, proposal in enumerate(proposals, 1):
        setting, time = proposal.setting, proposal.time
        s = setting.serving
        servers = "embedded" if s.engine == "embedded" else f"{s.servers} x tensor {s.tensor_parallel}"
        if s.colocated:
            servers += ", colocated"
        gpus = str(setting.training.layout.world_size) + (f" + {s.gpus}" if s.gpus else "")
        rows.append(
            (
                f"{number}.",
                _whole(time.total),
                f"{time.gpu_hours:.2f}",
                gpus,
                sizes(setting),
                servers,
                details(setting),
            )
        )
    reasons = [
        f"{number}. {'; '.join(proposal.reasons)}" for number, proposal in enumerate(proposals, 1) if proposal.reasons
    ]
    return "\n".join([_table(rows, "<>>>"), *reasons])


def _titled(title: str, text: str) -> str:
    return f"{title}\n{'-' * len(title)}\n{text}"


def _table(rows: Sequence[Row], align: str) -> str:
    """Columns as wide as their longest cell, two spaces between; `align`: `<` or `>` for each, the rest `<`."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    sides = align.ljust(len(widths), "<")
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------- JSON


def plan_json(found: Plan) -> dict[str, Any]:
    """The plan as JSON: bytes, seconds."""
    return {
        "title": found.title,
        "fits": found.fits,
        "lacking": list(found.lacking),
        "gpu": found.setting.gpu.name,
        "gpu_memory_bytes": found.setting.gpu.memory_bytes,
        "gpus": found.setting.gpus,
        "layout": setting_json(found.setting),
        "memory": [
            {
                "stage": stage.stage,
                "phases": {
                    phase.name: {
                        "device_bytes": phase.bytes(),
                        "host_bytes": phase.bytes("host"),
                        "items": [
                            {"name": item.name, "bytes": item.bytes, "where": item.where, "note": item.note}
                            for item in phase.items
                        ],
                    }
                    for phase in stage.phases
                },
            }
            for stage in found.memory
        ],
        "time": time_json(found.time),
        "proposals": [
            {"layout": setting_json(p.setting), "time": time_json(p.time), "reasons": list(p.reasons)}
            for p in found.proposals
        ],
    }


def setting_json(setting: Setting) -> dict[str, Any]:
    """The recipe keys that a proposal decides about, by their names in a recipe."""
    t, s = setting.training, setting.serving
    layout = t.layout
    found: dict[str, Any] = {
        "parallelism.tensor": layout.tensor,
        "parallelism.pipeline": layout.pipeline,
        "parallelism.virtual_pipeline": layout.virtual_pipeline,
        "parallelism.context": layout.context,
        "parallelism.data": layout.data,
        "parallelism.expert": layout.expert,
        "parallelism.sequence_parallel": layout.sequence_parallel,
        "parallelism.distributed_optimizer": t.distributed_optimizer,
        "model.recompute": t.recompute.kind,
        "model.recompute_layers": t.recompute.layers,
        "batching.tokens_per_microbatch": t.pack,
        "optimizer.moments": t.moments,
        "optimizer.offload": t.offload,
    }
    if s.engine == "sglang":
        found |= {
            "rollout.servers": s.servers,
            "rollout.server_tensor_parallel": s.tensor_parallel,
            "rollout.placement": "colocated" if s.colocated else "disaggregated",
            "rollout.offload_optimizer": s.offload_optimizer,
            "rollout.weight_sync": s.transport,
        }
    return found


def time_json(time: StepTime) -> dict[str, Any]:
    return {
        "seconds": time.total,
        "phases": {
            phase.name: {
                "seconds": phase.seconds,
                "compute": phase.cost.compute,
                "memory": phase.cost.memory,
                "communication": phase.cost.communication,
                "idle": phase.cost.idle,
            }
            for phase in time.phases
        },
        "mfu": time.mfu,
        "gpu_hours": time.gpu_hours,
        "dollars": time.dollars,
        "tokens_per_second": time.tokens_per_second,
    }
