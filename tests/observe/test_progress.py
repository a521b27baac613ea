"""The progress bar on a terminal, lines elsewhere, silence on other ranks."""

from __future__ import annotations

import io

from asd_megatron.observe.progress import Progress, progress_text

METRICS = {
    "reward/mean": 0.4219,
    "response/length_mean": 37.6,
    "entropy/student_median": 0.31,
    "entropy/teacher_median": float("nan"),
    "gate/open": 1.0,
    "gate/lambda": 0.5,
    "gate/warming_up": 0.0,
    "tokens/per_second": 1234.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_text() -> None:
    expected = "reward 0.422, length 38, H student 0.310, gate open (lambda 0.5), 1.2k tokens/s"
    assert progress_text(METRICS) == expected
    closed = {"gate/open": 0.0, "gate/lambda": 0.0, "tokens/per_second": 56789.0}
    assert progress_text(closed) == "gate closed (lambda 0), 57k tokens/s"
    assert progress_text({**closed, "gate/warming_up": 1.0}).startswith("gate warming up")
    warm_up = {"gate/open": 0.0, "gate/lambda": 0.0, "gate/h_warm": float("nan"), "gate/warming_up": 1.0}
    assert progress_text(warm_up) == "gate warming up (lambda 0)"
    assert progress_text({**warm_up, "gate/lambda": 0.5, "gate/warming_up": 0.0}) == "lambda 0.5"
    assert progress_text({"sft/loss": 0.5, "tokens/per_second": 999.0}) == "loss 0.5000, 999 tokens/s"
    assert progress_text({"evaluation/accuracy": 0.25}) == "held-out 0.250"
    assert progress_text({"divergence/mean": 0.1306, "kl/k3": 1e-4}) == "D 0.131, KL to the initial weights 0.0001"
    assert progress_text({"lambda/mean": 0.1234, "perplexity/warming_up": 0.0}) == "lambda 0.123"
    assert progress_text({"lambda/mean": 0.0, "perplexity/warming_up": 1.0}) == "lambda 0 (warming up)"


def test_lines_every_few_seconds_first_and_last() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(10, stream=out, clock=clock) as progress:
        for step in range(1, 11):
            clock.now += 2.0
            progress.update(step, METRICS)
        progress.note("saved")
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[1].startswith("step 4/10 [00:08<00:12] reward 0.422")
    assert lines[-1] == "saved"


def test_resumed_run_counts_its_own_steps_for_the_remaining_time() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(100, done=90, stream=out, clock=clock)
    clock.now = 3600.0
    progress.update(91, {})
    assert out.getvalue().startswith("step 91/100 [1:00:00<9:00:00]")


def test_bar_on_a_terminal() -> None:
    out = Terminal()
    with Progress(3, done=1, stream=out) as progress:
        progress.update(2, METRICS)
        progress.note("evaluation: 0.5")
        progress.update(3, METRICS)
    text = out.getvalue()
    assert "step 3/3" in text and "reward 0.422" in text and "evaluation: 0.5\n" in text


def test_silent_on_other_ranks() -> None:
    out = io.StringIO()
    with Progress(2, enabled=False, stream=out) as progress:
        progress.update(1, METRICS)
        progress.note("x")
    assert out.getvalue() == ""
