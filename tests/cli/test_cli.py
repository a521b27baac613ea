"""The console command: verbs, errors without a traceback, what it starts and what it returns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asd_megatron.cli import launch
from asd_megatron.cli.guard import guarded
from asd_megatron.cli.main import VERBS, main
from asd_megatron.distributed.launch import cores, set_defaults
from asd_megatron.errors import UserError

ROOT = Path(__file__).parents[2]
# Says what a rank sees, then ends as OUTCOME says.
PROGRAM = """
import os, pathlib, sys, time
from asd_megatron.cli.guard import guarded
from asd_megatron.errors import UserError

def program():
    rank, outcome = os.environ["RANK"], os.environ["OUTCOME"]
    words = [rank, os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"], *sys.argv[1:]]
    os.write(1, (" ".join(words) + "\\n").encode())  # one write: ranks share the pipe
    pathlib.Path(__file__).with_name("spoken" + rank).touch()
    if outcome in ("exit", "kill") and rank == "1":  # a failing rank ends the others, perhaps before they speak
        for _ in range(500):
            if pathlib.Path(__file__).with_name("spoken0").exists():
                break
            time.sleep(0.1)
    if outcome == "refuse":
        raise UserError("the corpus is empty")
    if outcome == "exit" and rank == "1":
        os._exit(7)
    if outcome == "kill" and rank == "1":
        os.kill(os.getpid(), 9)
    if outcome == "sleep":
        time.sleep(60)
    return 0

sys.exit(guarded(program))
"""


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def recipe(folder: Path, text: str = "") -> str:
    path, model = folder / "recipe.yaml", folder / "m"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    path.write_text(f"model: {{path: {model}}}\ndata: {{train: t}}\n{text}")
    return str(path)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("asd_megatron 0.")


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_help_of_a_verb_lists_every_key(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--optimizer.learning_rate  number > 0 [1.0e-06]" in out
    assert "The learning rate after its warm-up." in out


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tarin"]) == 2
    assert capsys.readouterr().err == "error: no verb 'tarin': did you mean 'train'?\n"


def test_every_verb_can_be_imported() -> None:
    import importlib

    for module, _ in VERBS.values():
        assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes a recipe first"),
        (["--run.steps", "3"], "takes a recipe first"),
        (["none.yaml"], "recipe none.yaml does not exist"),
    ],
)
def test_a_missing_recipe(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_a_refused_recipe_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "run_ranks", lambda *_: pytest.fail("started"))
    assert main(["train", recipe(tmp_path), "--sampling.top_p", "0.9"]) == 2
    assert "sampling.top_p" in capsys.readouterr().err


def test_train_starts_the_ranks_of_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run_ranks(module: str, argv: list[str], ranks: int) -> int:
        calls.append((module, argv, ranks))
        return 5

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    path = recipe(tmp_path, "parallelism: {tensor: 2, data: 2}\n")
    assert main(["train", path, "--parallelism.pipeline", "2"]) == 5
    assert main(["sft", path]) == 5
    assert calls == [
        ("asd_megatron.train", [path, "--parallelism.pipeline", "2"], 8),
        ("asd_megatron.sft", [path], 4),
    ]
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_cores_are_divided_among_the_ranks() -> None:
    mine = len(os.sched_getaffinity(0))
    assert cores() == mine
    for ranks, threads in ((1, mine), (mine, 1), (10 * mine, 1)):
        environment: dict[str, str] = {}
        set_defaults(ranks, environment)
        assert environment["OMP_NUM_THREADS"] == str(threads)


def test_under_torchrun_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert main(["train", recipe(tmp_path)]) == 2
    assert "start `torchrun ... -m asd_megatron.train RECIPE`" in capsys.readouterr().err


def test_more_ranks_than_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["train", recipe(tmp_path, "parallelism: {tensor: 4}\n")]) == 2
    assert "needs 4 ranks and this machine has 2 GPUs" in capsys.readouterr().err


def test_guard_passes_bugs_on_and_names_a_later_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug() -> int:
        raise RuntimeError("ours")

    def refuse() -> int:
        raise UserError("theirs")

    with pytest.raises(RuntimeError, match="ours"):
        guarded(bug)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert guarded(refuse) == 2
    assert capsys.readouterr().err == "error (rank 3): theirs\n"


def start(folder: Path, ranks: int, outcome: str) -> subprocess.Popen[str]:
    package = folder / "rank_program"
    package.mkdir()
    (package / "__main__.py").write_text(PROGRAM)
    call = f"sys.exit(run_ranks('rank_program', ['a', '--b.c'], {ranks}))"
    code = f"import sys; from asd_megatron.cli.launch import run_ranks; {call}"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "OUTCOME": outcome, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("ranks", "outcome", "status", "error"),
    [
        (1, "", 0, ""),
        (1, "refuse", 2, "error: the corpus is empty\n"),
        (2, "", 0, ""),
        (2, "refuse", 2, "error: the corpus is empty\n"),
        (2, "exit", 7, ""),
        (2, "kill", 137, "error: rank 1 was ended by signal 9\n"),
    ],
)
def test_exit_status_and_output_of_ranks(tmp_path: Path, ranks: int, outcome: str, status: int, error: str) -> None:
    process = start(tmp_path, ranks, outcome)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert err == error
    assert f"0 {ranks} 1 a --b.c" in out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_the_ranks(tmp_path: Path, number: signal.Signals, status: int) -> None:
    process = start(tmp_path, 2, "sleep")
    assert process.stdout is not None
    lines = {process.stdout.readline().split()[0] for _ in range(2)}  # both ranks run
    assert lines == {"0", "1"}
    began = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=40)  # stdout closes only when no rank holds it any more
    assert process.returncode == status
    assert time.monotonic() - began < 40


def test_the_reference_is_written_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "docs" / "recipes.md"
    assert main(["recipes", "--check", str(page)]) == 2
    assert main(["recipes", "--write", str(page)]) == 0
    assert main(["recipes", "--check", str(page)]) == 0
    page.write_text(page.read_text() + "more\n")
    capsys.readouterr()
    assert main(["recipes", "--check", str(page)]) == 2
    assert "run `make docs`" in capsys.readouterr().err
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out.startswith("# Recipes")
