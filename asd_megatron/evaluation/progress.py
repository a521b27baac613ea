"""The progress of one set on global rank 0: a bar with the time left on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from asd_megatron.observe.progress import clock_text, print_line


class SetProgress:
    """Counts the problems of a set that are complete. `done`: those of earlier starts. With `enabled` False every
    method does nothing."""

    def __init__(
        self,
        name: str,
        problems: int,
        *,
        done: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        every_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.problems, self.enabled = name, problems, enabled
        self._stream, self._every, self._clock = stream or sys.stderr, every_seconds, clock
        self._began_with = self._done = done
        self._started = clock()
        self._told = self._started
        self._tokens = 0
        self._reward = 0.0
        self._bar: Any = None
        if enabled and self._stream.isatty():
            from tqdm import tqdm

            form = "{desc} {n_fmt}/{total_fmt} problems |{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(total=problems, initial=done, desc=name, file=self._stream, bar_format=form, leave=True)
        elif enabled and done:
            print_line(f"{name}: {done} of {problems} problems were answered by an earlier start", self._stream)

    def add(self, problems: int, reward: float, tokens: int) -> None:
        """Problems are complete: the sum of their mean rewards, and all tokens of their samples."""
        if not self.enabled:
            return
        self._done, self._tokens, self._reward = self._done + problems, self._tokens + tokens, self._reward + reward
        new = self._done - self._began_with
        now = self._clock()
        seconds = max(now - self._started, 1e-9)
        text = f"mean reward so far {self._reward / new:.3f}, {self._tokens / seconds:.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(problems)
        elif now - self._told >= self._every or self._done == self.problems:
            self._told = now
            left = seconds / new * (self.problems - self._done)
            times = f"{clock_text(seconds)}<{clock_text(left)}"
            print_line(f"{self.name}: problem {self._done}/{self.problems} [{times}] {text}", self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
