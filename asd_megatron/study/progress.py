"""How far a study is: a bar on a terminal, a line a cell elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from asd_megatron.observe.progress import clock_text, print_line


def seconds_left(durations: list[float], cells: int, parallel: int) -> float | None:
    """Expected seconds for `cells` more: the mean of the finished ones, `parallel` at a time; None before the first."""
    return sum(durations) / len(durations) * cells / parallel if durations else None


class StudyProgress:
    """`done` of `total` cells are finished before the start. `ended` takes a cell's name, what became of it and its
    seconds."""

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        parallel: int = 1,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self.parallel = total, done, parallel
        self.failed = 0
        self._running: list[str] = []
        self._durations: list[float] = []
        self._stream = stream or sys.stderr
        self._clock, self._begun = clock, clock()
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            form = "cell {n_fmt}/{total_fmt} |{bar:24}| {elapsed}{desc}"
            self._bar = tqdm(total=total, initial=done, file=self._stream, bar_format=form)

    def started(self, name: str) -> None:
        self._running.append(name)
        self._show()

    def ended(self, name: str, status: str, seconds: float) -> None:
        self._running.remove(name)
        self._durations.append(seconds)
        self.done += 1
        self.failed += status != "finished"
        text = f"{name} {status} in {clock_text(seconds)}"
        if self._bar is None:
            times = clock_text(self._clock() - self._begun) + self._left()
            self.note(f"cell {self.done}/{self.total} [{times}] {text}, {len(self._running)} running")
            return
        if status != "finished":
            self.note(text)
        self._bar.update(1)
        self._show()

    def note(self, text: str) -> None:
        """A line of its own."""
        print_line(text, self._stream, self._bar)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _left(self) -> str:
        """`<05:07`; empty before the first cell has ended."""
        left = seconds_left(self._durations, self.total - self.done, self.parallel)
        return "" if left is None else f"<{clock_text(left)}"

    def _show(self) -> None:
        if self._bar is None:
            return
        failed = f", {self.failed} failed" if self.failed else ""
        self._bar.set_description_str(f"{self._left()}, running {', '.join(self._running) or 'nothing'}{failed}")
