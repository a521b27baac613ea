"""What does not fit a rank's memory, and which keys of the recipe would change that: every change that is named has
been worked out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from asd_megatron.models.gpt import Recompute
from asd_megatron.planner.hardware import GIB
from asd_megatron.planner.memory import Phase, holds_a_response, kv_tokens, peak
from asd_megatron.planner.setting import Setting

SHOWN = 3  # items and changes that a sentence names
LEAST = 0.5 * GIB  # by which a change has to lower the peak to be named


def lacks(setting: Setting) -> tuple[str, ...]:
    """One sentence for each shortage, () where everything fits."""
    out = []
    stage, phase = peak(setting)
    if phase.bytes() > setting.gpu.memory_bytes:
        out.append(_shortage(setting, stage, phase))
    if not holds_a_response(setting):
        longest = setting.workload.prompt + setting.workload.responses.most
        out.append(
            f"the KV cache of a server holds {kv_tokens(setting):,} tokens, and one sequence may have {longest:,.0f}:"
            " raise rollout.server_tensor_parallel or mem-fraction-static in rollout.server_args, or lower"
            " sampling.max_response_tokens"
        )
    return tuple(out)


def _shortage(setting: Setting, stage: int, phase: Phase) -> str:
    items = sorted((item for item in phase.items if item.where == "device"), key=lambda item: -item.bytes)
    largest = ", ".join(f"{item.name} {item.bytes / GIB:.1f}" for item in items[:SHOWN])
    where = f" on pipeline stage {stage}" if setting.training.layout.pipeline > 1 else ""
    needed, memory = phase.bytes(), setting.gpu.memory_bytes
    text = (
        f"{phase.name}{where} needs {needed / GIB:.1f} GiB ({largest}, ...), and a GPU ({setting.gpu.name}) has"
        f" {memory / GIB:.1f}: "
    )
    found = []
    for change, changed in changes(setting):
        try:
            then = peak(changed)[1].bytes()
        except UserError:  # a layout that cannot shard the model
            continue
        if then < needed - LEAST:
            found.append((change, then))
    enough = [f"{change} ({then / GIB:.1f} GiB)" for change, then in found if then <= memory]
    if enough:
        return text + f"set {' or '.join(enough[:SHOWN])}"
    if not found:
        return text + "no single key lowers that: take more GPUs, or GPUs with more memory"
    found.sort(key=lambda pair: pair[1])
    most = ", ".join(f"{change} ({then / GIB:.1f} GiB)" for change, then in found[:SHOWN])
    return text + f"no single key is enough, combine some of {most}, or take more GPUs"


def changes(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """(keys of the recipe with their values, the setting with them): what takes least time first."""
    training, layout, serve = setting.training, setting.training.layout, setting.serving
    if layout.tensor > 1 and not layout.sequence_parallel:
        yield "parallelism.sequence_parallel true", setting.with_layout(replace(layout, sequence_parallel=True))
    if not training.distributed_optimizer and layout.stage_size > layout.tensor:
        changed = replace(training, distributed_optimizer=True)
        yield "parallelism.distributed_optimizer true", replace(setting, training=changed)
    if serve.colocated and not serve.offload_optimizer:
        yield "rollout.offload_optimizer true", replace(setting, serving=replace(serve, offload_optimizer=True))
    if serve.colocated and serve.memory_fraction > 0.5:
        lower = round(serve.memory_fraction - 0.1, 2)
        key = f"mem-fraction-static {lower:g} in rollout.server_args"
        yield key, replace(setting, serving=replace(serve, memory_fraction=lower))
    longest = round(setting.workload.prompt) + setting.workload.responses.most
    for pack in (training.pack // 2, training.pack // 4):
        if pack >= longest:
            yield f"batching.tokens_per_microbatch {pack}", replace(setting, training=replace(training, pack=pack))
    kinds = {"none": ("mlp", "full"), "mlp": ("full",), "full": ()}[training.recompute.kind]
    for kind in kinds:
        if kind == "full" or setting.shape.experts is None or training.layers == "te":
            changed = replace(training, recompute=Recompute(kind))  # type: ignore[arg-type]
            yield f"model.recompute {kind}", replace(setting, training=changed)
    if training.layers == "te" and training.dtype == "bfloat16" and training.distributed_optimizer:
        if training.offload == "none" and training.moments == "float32":
            changed = replace(training, moments="bfloat16")
            yield "optimizer.moments bfloat16", replace(setting, training=changed)
        if training.offload == "none":
            changed = replace(training, offload="host", moments="float32")
            yield "optimizer.offload host", replace(setting, training=changed)
    for key, changed_layout in _layouts(layout):
        yield key, setting.with_layout(changed_layout)


def _layouts(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Twice as many ranks of one kind, taken from the data-parallel ones where these are even."""
    half = layout.data // 2 if layout.data % 2 == 0 else layout.data
    gpus = "" if layout.data % 2 == 0 else " and twice the GPUs"
    for name, size in (("tensor", layout.tensor), ("pipeline", layout.pipeline), ("context", layout.context)):
        doubled = {name: 2 * size, "data": half}
        if name == "tensor":
            doubled["sequence_parallel"] = True
        try:
            yield f"parallelism.{name} {2 * size}{gpus}", replace(layout, **doubled)  # type: ignore[arg-type]
        except UserError:
            continue
    if layout.stage_size % (2 * layout.expert) == 0:
        yield f"parallelism.expert {2 * layout.expert}", replace(layout, expert=2 * layout.expert)
