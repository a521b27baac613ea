"""The console command: verbs, errors without a traceback, what it starts and what it returns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.checkpoint import lineage
from asd_megatron.cli import launch
from asd_megatron.cli.guard import as_rank, guarded, report_at_once
from asd_megatron.cli.main import VERBS, main
from asd_megatron.distributed import first_error
from asd_megatron.distributed.launch import cores, set_defaults
from asd_megatron.errors import UserError
from asd_megatron.run.history import record

ROOT = Path(__file__).parents[2]
# Prints what a rank sees, then ends as OUTCOME says.
PROGRAM = """
import os, pathlib, sys, time
from asd_megatron.cli.guard import as_rank, leave
from asd_megatron.errors import UserError

def program():
    rank, outcome = os.environ["RANK"], os.environ["OUTCOME"]
    words = [rank, os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"], *sys.argv[1:], str(os.getpid())]
    os.write(1, (" ".join(words) + "\\n").encode())  # one write: ranks share the pipe
    pathlib.Path(__file__).with_name("spoken" + rank).touch()
    other = pathlib.Path(__file__).with_name("spoken" + ("0" if rank == "1" else "1"))
    while os.environ["WORLD_SIZE"] == "2" and not other.exists():  # a failing rank ends the others
        time.sleep(0.05)
    if outcome == "refuse" or outcome == "refuse_1" and rank == "1":
        raise UserError("the corpus is empty")
    if outcome == "sys.exit":
        sys.exit(0)
    if outcome == "exit" and rank == "1":
        os._exit(7)
    if outcome == "kill" and rank == "1":
        os.kill(os.getpid(), 9)
    if outcome in ("stop", "ctrl_c"):
        from asd_megatron.distributed.stop_signals import StopSignals
        with StopSignals() as signals:
            os.write(1, b"waits\\n")
            while signals.received is None:
                time.sleep(0.05)
            os.write(1, signals.received.encode() + b"\\n")
            time.sleep(60 if outcome == "ctrl_c" else 0.5)  # the step in flight
        import atexit
        atexit.register(os.kill, os.getpid(), 15)  # a further request on the way out changes nothing
    if outcome in ("sleep", "refuse_1"):
        time.sleep(60)
    return 0

leave(as_rank(program))
"""


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "max_position_embeddings": 40960,
    "vocab_size": 128,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def recipe(folder: Path, text: str = "", config: dict[str, Any] | None = None) -> str:
    path, model = folder / "recipe.yaml", folder / "m"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(config or MODEL))
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
        (["--dry_run", "r.yaml"], "did you mean --dry-run"),
        (["none.yaml"], "recipe none.yaml does not exist"),
    ],
)
def test_a_missing_recipe(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_a_folder_instead_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message() -> str:
        assert main(["train", str(tmp_path)]) == 2
        return capsys.readouterr().err

    assert "is a folder" in message()
    for name, words in (("b.yml", ["give the recipe in it", "b.yml"]), ("a.yaml", ["one of", "a.yaml, b.yml"])):
        (tmp_path / name).touch()
        said = message()
        assert all(word in said for word in words), said
    recipe(tmp_path)  # as a run leaves it
    assert f"give the recipe in it, {tmp_path / 'recipe.yaml'}\n" in message()


@pytest.mark.parametrize("how", ["launcher", "rank"])
def test_an_interruption_says_what_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path, folder = recipe(tmp_path), tmp_path / "run"
    begins: list[Path] = []  # the folder that the ranks begin a run in before they are interrupted

    def run_ranks(module: str, argv: list[str], ranks: int) -> int:
        for begun in begins:
            begun.mkdir(exist_ok=True)
            record(begun, "fresh", 0, stage="train")
        if how == "rank":
            return 130
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    command = ["train", path, "--run.folder", str(folder), "--checkpoint.resume", "never"]

    def said() -> str:
        assert main(command) == 130
        (line,) = capsys.readouterr().err.splitlines()
        assert f"asd-megatron {' '.join(command)}" in line
        return line

    assert "before the run began" in said()
    begins.append(folder)
    assert "no checkpoint" in (line := said()) and line.endswith("--checkpoint.resume auto")
    checkpoint = folder / "checkpoints" / lineage.name(20)
    checkpoint.mkdir(parents=True)
    (checkpoint / lineage.RUN_STATE).write_text("{}")
    lineage.name_latest(checkpoint.parent, checkpoint.name)
    assert "step 20" in (line := said()) and str(checkpoint) in line and line.endswith("--checkpoint.resume auto")


def test_an_interrupted_import_ends_the_process_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the exception can be turned into another one by the package that is being imported."""

    def end(status: int) -> None:
        raise SystemExit(status)

    def gpus() -> int:
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not ended")

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(launch, "_gpus", gpus)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the signal
    for words, text in (([], f"to start it: asd-megatron train {recipe(tmp_path)}\n"), (["--dry-run"], "nothing was")):
        with pytest.raises(SystemExit) as ended:
            main(["train", recipe(tmp_path), *words])
        assert ended.value.code == 130 and text in capfd.readouterr().err
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_start_is_seen_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gpus() -> int:  # the first import of torch
        assert "some seconds" in capsys.readouterr().out
        return 0

    monkeypatch.setattr(launch, "_gpus", gpus)
    monkeypatch.setattr(launch, "run_ranks", lambda *_: 0)
    assert main(["train", recipe(tmp_path)]) == 0


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


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TORCHELASTIC_RUN_ID": "x"}, ["start `torchrun ... -m asd_megatron.train RECIPE`"]),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, ["PET_NNODES is 2", "`torchrun -m asd_megatron.train RECIPE`"]),
        ({"PET_NNODES": "1:4"}, ["PET_NNODES is 1:4", "unset PET_NNODES"]),
        ({"PET_NNODES": " 2"}, ["PET_NNODES is 2"]),
        ({"RANK": "0", "WORLD_SIZE": "4"}, ["WORLD_SIZE is 4", "unset WORLD_SIZE"]),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "4"}, ["WORLD_SIZE is 4"]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ["OMPI_COMM_WORLD_SIZE is 4"]),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, ["PMI_SIZE is 4", "unset PMI_SIZE"]),
        ({"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "1"}, ["FLUX_JOB_SIZE is 2"]),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, ["SLURM_NTASKS is 2", "--ntasks-per-node=1"]),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, ["SLURM_STEP_NUM_TASKS is 2", "unset SLURM_PROCID"]),
    ],
)
def test_one_process_of_several_starts_no_ranks(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    words: list[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", recipe(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "8"},  # salloc
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script, itself one process
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # salloc with an interactive step
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1", "PET_NNODES": "1:1", "WORLD_SIZE": "4"},
    ],
)
def test_the_only_process_of_a_job_may_start_ranks(environment: dict[str, str]) -> None:
    launch.refuse_other_launchers("train", "asd_megatron.train", environment)


def test_kubeflow_variables_of_one_machine_do_not_reach_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "pod-0", "OMP_NUM_THREADS": "3"}
    set_defaults(2, environment)
    assert [name for name in environment if name.startswith("PET_")] == [] and environment["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "Qwen3ForCausalLM"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"num_hidden_layers": "many"}, ["config.json", "many"]),
        ({"num_key_value_heads": 1}, ["parallelism.tensor 2", "key-value heads"]),
    ],
)
def test_a_model_that_is_not_supported_starts_no_rank(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    words: list[str],
) -> None:
    monkeypatch.setattr(launch, "run_ranks", lambda *_: pytest.fail("started"))
    assert main(["train", recipe(tmp_path, "parallelism: {tensor: 2}\n", {**MODEL, **config})]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err


def test_the_launcher_creates_no_cuda_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with 8 GPUs it counts them and starts as many ranks; every call that would need a context fails."""
    import torch

    for name in ("is_available", "is_bf16_supported", "get_device_properties", "current_device", "init", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: pytest.fail("CUDA was initialized"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    started: list[int] = []
    monkeypatch.setattr(launch, "run_ranks", lambda module, argv, ranks: started.append(ranks) or 0)
    before = dict(os.environ)
    assert main(["train", recipe(tmp_path, "parallelism: {tensor: 2}\n")]) == 0
    assert os.environ == before  # what it sets is for the ranks
    assert main(["sft", recipe(tmp_path, "parallelism: {tensor: 2, data: 1}\n")]) == 0
    assert started == [8, 2]


def test_guard_passes_bugs_on() -> None:
    def bug() -> int:
        raise RuntimeError("ours")

    for run in (guarded, as_rank):
        with pytest.raises(RuntimeError, match="ours"):
            run(bug)


def test_an_error_is_reported_before_anything_is_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Closing may take long (servers), and rank 0 would then leave the report to another rank."""
    monkeypatch.setattr(first_error, "HEAD_START", 0.0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")

    def refuse() -> int:
        with ExitStack() as closing:
            closing.callback(lambda: print("closed", file=sys.stderr))
            with report_at_once():
                raise UserError("theirs")

    assert as_rank(refuse) == 2
    assert capsys.readouterr().err == "error (rank 3): theirs\nclosed\n"


def start(folder: Path, ranks: int, outcome: str) -> subprocess.Popen[str]:
    package = folder / "rank_program"
    package.mkdir()
    (package / "__main__.py").write_text(PROGRAM)
    call = f"sys.exit(run_ranks('rank_program', ['a', '--b.c'], {ranks}))"
    code = f"import sys; from asd_megatron.cli.launch import run_ranks; {call}"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "OUTCOME": outcome, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a terminal's foreground job, with a process group of its own
    )


@pytest.mark.parametrize(
    ("ranks", "outcome", "status", "error"),
    [
        (1, "", 0, ""),
        (1, "refuse", 2, "error: the corpus is empty\n"),
        (2, "", 0, ""),
        (2, "refuse", 2, "error: the corpus is empty\n"),
        (2, "refuse_1", 2, "error (rank 1): the corpus is empty\n"),
        (2, "exit", 7, ""),
        (2, "kill", 137, "error: rank 1 was killed by SIGKILL (by the system when its memory ran out, or by hand)\n"),
    ],
)
def test_exit_status_and_output_of_ranks(tmp_path: Path, ranks: int, outcome: str, status: int, error: str) -> None:
    process = start(tmp_path, ranks, outcome)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    if outcome == "refuse":  # once, by rank 0 unless a busy machine makes it some seconds later than rank 1
        err = err.replace(" (rank 1)", "")
    assert err == error
    assert f"0 {ranks} 1 a --b.c" in out


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_the_launcher_passes_a_request_to_stop_on_and_waits(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, 2, "stop")
    assert process.stdout is not None
    assert [process.stdout.readline().split()[0] for _ in range(4)].count("waits") == 2
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.count(number.name) == 2
    (line,) = err.splitlines()  # of rank 0
    assert "the run stops after the step in flight and saves its state" in line


def test_a_second_ctrl_c_in_a_terminal_ends_the_ranks(tmp_path: Path) -> None:
    """The terminal signals the launcher's process group, of which the ranks are no part: each press is one request."""
    process = start(tmp_path, 2, "ctrl_c")
    assert process.stdout is not None
    assert [process.stdout.readline().split()[0] for _ in range(4)].count("waits") == 2
    os.killpg(process.pid, signal.SIGINT)
    assert [process.stdout.readline() for _ in range(2)] == ["SIGINT\n"] * 2
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


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


def test_sys_exit_of_a_users_code_is_an_error(tmp_path: Path) -> None:
    process = start(tmp_path, 1, "sys.exit")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "sys.exit(0)" in err and "Traceback" in err and err.splitlines()[-1].startswith("error: ")


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR2])
def test_ranks_end_with_their_launcher(tmp_path: Path, number: signal.Signals) -> None:
    """Signals that the launcher cannot forward."""
    process = start(tmp_path, 2, "sleep")
    assert process.stdout is not None
    ranks = [int(process.stdout.readline().split()[-1]) for _ in range(2)]
    process.send_signal(number)
    _, err = process.communicate(timeout=30)  # stderr closes only when no rank holds it any more
    assert process.returncode == -number
    deadline = time.monotonic() + 20
    while any(alive(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert err.count("launcher") == 1 and "rank 0 ends too" in err


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
