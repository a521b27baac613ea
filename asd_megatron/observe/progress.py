"""The progress bar of rank 0; plain lines where the output is no terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO


def clock_text(seconds: float) -> str:
    """`05:07`, `1:02:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def print_line(text: str, stream: TextIO, bar: Any = None) -> None:
    """Print one line, above the tqdm bar if there is one."""
    if bar is not None:
        bar.write(text, file=stream)
    else:
        print(text, file=stream, flush=True)


def _count(n: float) -> str:
    """1234 as 1.2k, 56789 as 57k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.1f}{unit}" if n < 10 * size else f"{n / size:.0f}{unit}"
    return f"{n:.0f}"


def _gate(metrics: Mapping[str, float]) -> str:
    state = "open" if metrics["gate/open"] else "closed"
    if metrics.get("gate/warming_up"):
        state = "warming up"
    elif math.isnan(metrics.get("gate/h_warm", 0.0)):  # without thresholds there is no gate
        return f"lambda {metrics.get('gate/lambda', 0.0):g}"
    return f"gate {state} (lambda {metrics.get('gate/lambda', 0.0):g})"


def progress_text(metrics: Mapping[str, float]) -> str:
    """The main numbers of a step in one line; those that are missing or not finite are left out."""
    parts = []
    for name, form in (
        ("evaluation/accuracy", "held-out {:.3f}"),
        ("sft/loss", "loss {:.4f}"),
        ("reward/mean", "reward {:.3f}"),
        ("response/length_mean", "length {:.0f}"),
        ("entropy/student_median", "H student {:.3f}"),
        ("entropy/teacher_median", "H teacher {:.3f}"),
        ("divergence/mean", "D {:.3g}"),
        ("kl/k3", "KL to the initial weights {:.3g}"),
    ):
        if math.isfinite(metrics.get(name, math.nan)):
            parts.append(form.format(metrics[name]))
    if math.isfinite(metrics.get("lambda/mean", math.nan)):
        parts.append(f"lambda {metrics['lambda/mean']:.3g}" + " (warming up)" * bool(metrics["perplexity/warming_up"]))
    if "gate/open" in metrics:
        parts.append(_gate(metrics))
    if math.isfinite(metrics.get("tokens/per_second", math.nan)):
        parts.append(f"{_count(metrics['tokens/per_second'])} tokens/s")
    return ", ".join(parts)


class Progress:
    """A tqdm bar on a terminal, else a line at the first step, every `every_seconds` after it, and at the last.

    `done` is the number of steps before a resumed run. With `enabled` False (other ranks, `logging.progress: false`)
    every method does nothing.
    """

    def __init__(
        self,
        steps: int,
        *,
        done: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        every_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps, self.enabled, self.every_seconds = steps, enabled, every_seconds
        self._stream = stream or sys.stderr
        self._clock, self._started, self._first = clock, clock(), done
        self._last_line: float | None = None
        self._bar: Any = None
        if enabled and self._stream.isatty():
            from tqdm import tqdm

            # the numbers are on a line of their own: they would not fit beside the bar
            form = "step {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(total=steps, initial=done, file=self._stream, bar_format=form, position=1, leave=True)
            self._numbers = tqdm(total=0, file=self._stream, bar_format="{desc}", position=0, leave=True)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` (from 1) is complete."""
        if not self.enabled:
            return
        text = progress_text(metrics)
        if self._bar is not None:
            self._numbers.set_description_str(text)
            self._bar.update(step - self._bar.n)
            return
        now = self._clock()
        if self._last_line is None or now - self._last_line >= self.every_seconds or step >= self.steps:
            self._last_line = now
            print_line(f"step {step}/{self.steps} [{self._remaining(step, now)}] {text}", self._stream)

    def note(self, text: str) -> None:
        """Print one line (an evaluation, a checkpoint, a warning), above the bar if there is one."""
        if self.enabled:
            print_line(text, self._stream, self._bar)

    def close(self) -> None:
        if self._bar is not None:
            self._numbers.close()
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _remaining(self, step: int, now: float) -> str:
        spent = now - self._started
        left = spent / max(step - self._first, 1) * (self.steps - step)
        return f"{clock_text(spent)}<{clock_text(left)}"
