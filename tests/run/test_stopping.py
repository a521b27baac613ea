"""Requests to stop: how they reach a rank, and that all ranks stop at the same step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from asd_megatron.cli.main import main
from asd_megatron.distributed import stop_signals
from asd_megatron.distributed.stop_signals import StopSignals
from asd_megatron.run.folder import hold
from asd_megatron.run.history import HISTORY_FILE
from asd_megatron.run.stopping import MARGIN_SECONDS, Stopping, StopRequested, conclude, deadline
from tests.distributed.harness import run_ranks
from tests.rollout.toy import one_process_groups
from tests.run.starts import begin, recipe


def wait_for(signals: StopSignals) -> str | None:
    limit = time.monotonic() + 10
    while signals.received is None and time.monotonic() < limit:
        time.sleep(0.01)
    return signals.received


def test_signals_are_received_inside_and_several_at_once_are_one_request() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as under `trap "" USR1`
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert wait_for(signals) == "SIGUSR1"
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            assert signals.received == "SIGUSR1"
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_second_signal_ends_the_process_whatever_it_waits_for() -> None:
    program = """
import ctypes
from asd_megatron.distributed import stop_signals
stop_signals.REPEAT_SECONDS = 0.0
with stop_signals.StopSignals() as signals:
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).usleep(10_000)
        if signals.received: break
    print(signals.received, flush=True)
    while True: ctypes.CDLL(None).pause()  # native code, which runs no handler of Python's
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "SIGTERM\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 128 + signal.SIGUSR1


def test_a_rank_whose_neighbour_has_ended_ends_at_once() -> None:
    """torchrun ends the ranks that are left of a failed job by SIGTERM; they may wait for the one that failed."""
    program = """
import ctypes, os
from asd_megatron.distributed import stop_signals
with stop_signals.StopSignals() as signals:
    print("ready", flush=True)
    while True: ctypes.CDLL(None).pause()
"""
    variables = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    neighbour = subprocess.Popen(["sleep", "60"], env=os.environ | variables | {"LOCAL_RANK": "1"})
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert set(stop_signals.ranks_of(os.getpid())) >= {neighbour.pid, process.pid}
        neighbour.kill()
        neighbour.wait()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM


def _agree(rank: int, folder: str) -> list[object]:
    stop_signals.REPEAT_SECONDS = 60.0
    asked = recipe(Path(folder), "--run.time_limit", "1")
    said: list[object] = []
    with ExitStack() as closing:
        signals = closing.enter_context(StopSignals())
        stopping = Stopping(asked, one_process_groups().host, signals, lambda: 0.0)
        said.append(stopping.after_step(1))
        if rank == 0:
            (Path(folder) / "stop").touch()
        said.append(stopping.after_step(1))
        if rank == 0:
            (Path(folder) / "stop").unlink()
        stopping.after_step(1)
        stopping._deadline = time.time() + MARGIN_SECONDS + 5 if rank == 0 else None
        said.append(stopping.after_step(1))
        stopping._longest = 10.0
        said.append(stopping.after_step(1))
        stopping.while_waiting()  # the step in flight has time left
        if rank == 1:  # the others have received nothing
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(signals)
        with stopping.finishing():
            stopping.while_waiting()
        try:
            stopping.while_waiting()
        except StopRequested as request:
            said.append(request.cause)
    return said


def test_all_ranks_hear_of_a_request_at_one_of_them(tmp_path: Path) -> None:
    first, second = run_ranks(_agree, 2, str(tmp_path))
    assert first == second == [None, "stop_file", None, "time_limit", "SIGUSR1"]


def test_the_time_limit() -> None:
    assert deadline(None, {}, 5.0) is None and deadline(0.5, {}, 5.0) == 1805.0
    assert deadline("slurm", {"SLURM_JOB_END_TIME": "1700000000"}, 5.0) == 1.7e9
    assert deadline("slurm", {}, 5.0) is None
    with pytest.raises(Exception, match="run.time_limit"):
        recipe(Path("r"), "--run.time_limit", "0")


def test_a_time_limit_in_which_no_step_fits_is_said(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    limited = recipe(tmp_path / "run", "--run.time_limit", "0.01")
    told = [conclude(limited, StopRequested("time_limit", step), 2, None) for step in (2, 3)]
    assert ["no step fits: 120 s are left" in text for text in told] == [True, False]


def test_the_verb_asks_a_run_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["stop", str(folder)]) == 2 and "no run folder" in capsys.readouterr().err
    begin(folder)
    assert main(["stop", str(folder)]) == 2 and "nothing to stop" in capsys.readouterr().err
    with ExitStack() as closing:
        hold(folder, closing)
        assert main(["stop", str(folder)]) == 0 and "warning" not in capsys.readouterr().out
    assert (folder / "stop").exists()
    begin(folder)
    assert not (folder / "stop").exists()


def test_a_stop_on_a_full_disk_is_told_all_the_same(tmp_path: Path) -> None:
    (tmp_path / HISTORY_FILE).symlink_to("/dev/full")
    request = StopRequested("SIGTERM", 3, "state not saved (no room)")
    assert "stopped at step 3 after SIGTERM: state not saved (no room)" in conclude(recipe(tmp_path), request, 0, None)


def test_what_announces_a_stop_ends_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may stop within the seconds that the ranks need to agree on who says it, or as the signal arrives."""
    said: list[signal.Signals] = []
    neighbours = stop_signals._ended_neighbours

    def announce(number: signal.Signals, what: str) -> None:
        time.sleep(0.3)
        said.append(number)

    def look() -> list[int]:
        arrived.set()
        time.sleep(0.3)
        return neighbours()

    monkeypatch.setattr(stop_signals, "_announce", announce)
    monkeypatch.setattr(stop_signals, "_ended_neighbours", look)
    arrived = threading.Event()
    with StopSignals():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert arrived.wait(10)
    assert said == [signal.SIGUSR1]
