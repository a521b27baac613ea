"""Which rank is blamed for a hang: the one that the others wait for, and not before its own phase's time-out."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace

import pytest

from asd_megatron.distributed import activity
from asd_megatron.distributed.activity import Report
from asd_megatron.distributed.hangs import Hang, HangRule, Limits, waited_for


def report(position: int, *, waiting: bool = True, marks: int = 0, **collectives: int) -> Report:
    return Report("update", position, marks, waiting, "somewhere", collectives)


IN_TENSOR_GROUP = [report(5, tp=7), report(5, tp=6, waiting=False)]


@pytest.mark.parametrize(
    ("reports", "blamed"),
    [
        ([report(5), report(4), report(5)], [1]),  # it has not come to the others' meeting
        ([report(4, waiting=False), report(4), report(4)], [0]),  # in a reward, say: the others wait for its result
        (IN_TENSOR_GROUP, [1]),
        ([report(5, tp=7), report(5, tp=6)], [1]),  # although it waits too, for a message that nobody sends
        ([*IN_TENSOR_GROUP, report(6)], [1]),  # both are behind rank 2, and one of them behind the other
        ([report(5, a=7, x=1), report(5, a=6, x=1), report(5, b=3, x=1), report(5, b=3, x=0)], [3]),
        ([report(5, tp=7), report(5, tp=7)], [0, 1]),  # nobody is late: the network
        ([report(5, a=1, b=2), report(5, a=2, b=1)], [0, 1]),  # each before a collective that the other is in
    ],
)
def test_the_rank_that_the_others_wait_for(reports: list[Report], blamed: list[int]) -> None:
    assert waited_for(reports) == blamed


def test_a_rank_that_waits_is_not_blamed_while_the_late_one_works() -> None:
    """Rank 1 has much more to do than rank 0, which waits for far longer than the time-out."""
    rule = HangRule(2, {"update": 3.0}, beat=1.0)
    for marks in range(20):
        assert rule.look([report(6), report(5, waiting=False, marks=marks)]) is None
    looks = [rule.look([report(6), report(5, waiting=False, marks=19)]) for _ in range(3)]
    assert looks == [None, None, Hang((1,), "update", 3.0)]


def test_a_rank_whose_report_is_a_little_old_is_not_blamed() -> None:
    """Rank 1 has waited for a long work of rank 0, which then goes on before rank 1's next report is there."""
    rule = HangRule(2, {"update": 3.0}, beat=1.0)
    for marks in range(20):
        assert rule.look([report(5, waiting=False, marks=marks), report(6)]) is None
    assert [rule.look([report(7), report(6)]) for _ in range(3)] == [None] * 3
    assert [rule.look([report(8), report(8)]) for _ in range(3)] == [None] * 3


@pytest.mark.parametrize("limits", [{"update": None}, {"update": 100.0}, {}])
def test_the_late_ranks_phase_has_the_time_out(limits: Mapping[str, float | None]) -> None:
    """Rank 0 waits in a phase with a short one."""
    given: Limits = {**limits, "rollout": 2.0}  # type: ignore[dict-item]
    rule = HangRule(2, given, beat=1.0)
    for _ in range(20):
        assert rule.look([replace(report(6), phase="rollout"), report(5, waiting=False)]) is None


def test_a_report_says_what_the_main_thread_is_in() -> None:
    """Read by another thread, and the same after its way through the store."""
    found: list[Report] = []

    def read() -> None:
        found.append(activity.report())

    activity.restart()
    activity.enter("scoring")
    activity.mark()
    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    (seen,) = found
    assert (seen.phase, seen.position, seen.marks, seen.waiting) == ("scoring", 1, 1, False)
    assert "threading.py:" in seen.operation  # in `start` or `join`
    assert Report.from_text(seen.to_text()) == seen and Report.from_text("0") is None
