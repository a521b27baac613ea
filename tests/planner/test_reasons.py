"""What a proposal is said to be bound by."""

from __future__ import annotations

from dataclasses import replace

from asd_megatron.distributed.layout import Layout
from asd_megatron.models.gpt import Recompute
from asd_megatron.planner.reasons import bound, reasons
from asd_megatron.planner.setting import Serving, Setting
from asd_megatron.planner.step_time import step_time
from tests.planner.settings import setting


def said(s: Setting, *phases: str) -> str:
    """Of a step that has only these phases; none: all."""
    time = step_time(s)
    return bound(s, replace(time, phases=tuple(p for p in time.phases if not phases or p.name in phases)))


def test_generation_is_bound_by_its_places_or_by_its_longest_responses() -> None:
    assert "32 places are fewer" in said(setting(serving=Serving(servers=2, requests=32)))
    many = said(setting(serving=Serving(servers=64)))
    assert "more servers do not shorten that part, larger ones do" in many
    assert "larger ones" not in said(setting(serving=Serving(servers=64, tensor_parallel=8)))


def test_training_is_bound_by_what_takes_its_time() -> None:
    assert "bound by matrix products" in said(setting(), "update")
    assert "mean rank waits for the busiest of 256" in said(setting(layout=Layout(data=256)), "update")
    assert "pipeline's bubble" in said(setting(layout=Layout(pipeline=6, data=8)), "update")
    assert "exchanges between ranks" in said(setting(layout=Layout(tensor=8, sequence_parallel=True)), "update")


def test_recomputation_is_explained() -> None:
    s = setting(layout=Layout(tensor=2, data=4, sequence_parallel=True), pack=65536, recompute=Recompute("full"))
    time = step_time(s)
    assert any("without it the activations do not fit" in reason for reason in reasons(s, time, time))
    slower = reasons(s, replace(time, phases=time.phases * 2), time)
    assert "100.0% slower than the fastest" in slower
