"""Sentences that say why a proposed setting is as it is, and what bounds its step."""

from __future__ import annotations

from dataclasses import replace

from asd_megatron.models.gpt import NO_RECOMPUTE
from asd_megatron.planner.memory import fits
from asd_megatron.planner.setting import Setting
from asd_megatron.planner.step_time import StepTime

BUBBLE, EXCHANGE, TAIL = 0.1, 0.2, 0.25
"""Fractions of a phase from which on waiting, communication, and the longest responses are named as its bound."""


def reasons(setting: Setting, time: StepTime, fastest: StepTime) -> tuple[str, ...]:
    """fastest: the time of the best proposal."""
    found = [bound(setting, time)]
    if time.total > fastest.total * 1.001:
        found.append(f"{time.total / fastest.total - 1:.1%} slower than the fastest")
    found += _memory(setting)
    return tuple(found)


def bound(setting: Setting, time: StepTime) -> str:
    """What takes most of the step, and why more GPUs would or would not shorten it."""
    name, fraction = time.fractions()[0]
    text = f"{name} takes {fraction:.0%} of the step"
    if name == "rollout":
        return f"{text}: {_generation(setting, time)}"
    phase = next(phase for phase in time.phases if phase.name == name)
    if name not in ("teacher", "student", "reference", "update"):
        return text
    idle, exchanged = phase.cost.idle / phase.seconds, phase.cost.communication / phase.seconds
    if idle > BUBBLE:
        return f"{text}: {_waiting(setting, idle)}"
    if exchanged > EXCHANGE:
        return f"{text}: {exchanged:.0%} of it exchanges between ranks"
    return f"{text}, bound by matrix products and memory: more data-parallel ranks shorten it"


def _generation(setting: Setting, time: StepTime) -> str:
    rollouts, serving = time.rollouts, setting.serving
    if rollouts.limited:
        return f"a server's {rollouts.batch} places are fewer than its responses: more servers shorten it"
    if rollouts.tail > TAIL * rollouts.seconds:
        larger = ", larger ones do" if serving.tensor_parallel < setting.gpu.per_node else ""
        return (
            f"in {rollouts.tail:.0f} of {rollouts.seconds:.0f} s only the longest tenth of the responses, of up to"
            f" {rollouts.longest:,} tokens, is still generated: more servers do not shorten that part{larger}"
        )
    return f"{rollouts.batch} responses at a time on each server: more servers shorten it"


def _waiting(setting: Setting, idle: float) -> str:
    layout = setting.training.layout
    if layout.pipeline > 1:
        return f"{idle:.0%} of it is the pipeline's bubble and ranks that wait for the busiest"
    return (
        f"for {idle:.0%} of it the mean rank waits for the busiest of {layout.data} data-parallel ones, with"
        f" {setting.workload.rollouts / layout.data:.3g} rollouts each: more context parallelism shortens it, more data"
        " parallelism does not"
    )


def _memory(setting: Setting) -> list[str]:
    """What was chosen because less would not fit."""
    training, found = setting.training, []
    if training.recompute.kind != "none":
        less = replace(setting, training=replace(training, recompute=NO_RECOMPUTE))
        because = "without it the activations do not fit" if not fits(less) else "it lets packs be larger"
        found.append(f"model.recompute {training.recompute.kind}: {because}")
    if training.offload == "host":
        found.append("optimizer.offload host: with its state on the GPUs no layout fits")
    elif training.moments == "bfloat16":
        found.append("optimizer.moments bfloat16 (beta2 at most 0.99): with float32 moments no layout fits")
    return found
