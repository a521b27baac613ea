"""Stand-in until the memory model is merged."""

from __future__ import annotations

from asd_megatron.planner.parameters import stage_parameters
from asd_megatron.planner.setting import BYTES, Setting


def kv_tokens(setting: Setting) -> int:
    s, sv = setting.shape, setting.serving
    heads = s.kv_heads / min(sv.tensor_parallel, s.kv_heads)
    per = 2 * s.layers * heads * s.head_dim * 2
    attention = s.hidden * (s.heads + 2 * s.kv_heads) * s.head_dim + s.heads * s.head_dim * s.hidden
    mlp = 3 * s.hidden * s.ffn if s.experts is None else s.experts.count * 3 * s.hidden * s.experts.ffn
    weights = (s.layers * (attention + mlp) + 2 * s.hidden * s.vocab) * (1 if sv.fp8 else 2) / sv.tensor_parallel
    free = setting.gpu.memory_bytes * sv.memory_fraction - weights
    return max(int(free / per), 0)


def margin_gib(setting: Setting) -> float:
    t = setting.training
    held = max(stage_parameters(setting.shape, t.layout), key=lambda p: p.total)
    dense, experts = held.dense, held.experts
    dp = t.layout.data * t.layout.context if t.distributed_optimizer else 1
    edp = t.layout.stage_size // t.layout.expert if t.distributed_optimizer else 1
    state = {"float32": 12.0, "bfloat16": 6.0}[t.moments] if t.offload == "none" else 0
    w = BYTES[t.dtype]
    model = dense * (w + 4 + state / dp) + experts * (w + 4 + state / edp)
    tokens = t.pack / t.layout.context
    per = setting.shape.hidden * 34.0 / t.layout.tensor
    if t.recompute.kind == "mlp":
        per *= 0.5
    if t.recompute.kind == "full":
        per = setting.shape.hidden * 2 / t.layout.tensor
    acts = tokens * per * setting.shape.layers / t.layout.pipeline * min(t.layout.pipeline, 4)
    need = model + acts + 6e9
    return (setting.gpu.memory_bytes - need) / 2**30


def fits(setting: Setting) -> bool:
    return margin_gib(setting) >= setting.reserve_gib and kv_tokens(setting) > 0


def lacks(setting: Setting) -> tuple[str, ...]:
    return () if fits(setting) else ("memory",)
