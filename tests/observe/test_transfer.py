"""Lines about loading and exporting a large model; none about a small or a quick one."""

from __future__ import annotations

from asd_megatron.observe.transfer import QUIET_BYTES, TransferProgress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _lines(total: int, seconds: float) -> list[str]:
    """Of a transfer in ten equal parts."""
    lines: list[str] = []
    clock = Clock()
    progress = TransferProgress("loading the model", lines.append, clock=clock)
    for part in range(1, 11):
        clock.now = part * seconds / 10
        progress(part * total // 10, total)
    return lines


def test_a_large_model() -> None:
    assert _lines(20_000_000_000, 20) == [
        "loading the model: 6.0 of 20.0 GB (1.00 GB/s)",
        "loading the model: 12.0 of 20.0 GB (1.00 GB/s)",
        "loading the model: 18.0 of 20.0 GB (1.00 GB/s)",
        "loading the model: 20.0 GB in 00:20 (1.00 GB/s)",
    ]


def test_silence() -> None:
    assert _lines(QUIET_BYTES - 1, 100) == []
    assert _lines(QUIET_BYTES, 4) == []


def test_a_last_part_that_takes_long_ends_in_one_line() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = TransferProgress("exporting the model", lines.append, clock=clock)
    clock.now = 10
    progress(2_000_000_000, 2_000_000_000)
    assert lines == ["exporting the model: 2.0 GB in 00:10 (0.20 GB/s)"]
