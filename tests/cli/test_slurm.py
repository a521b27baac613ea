"""`asd-megatron launch --slurm`: its scripts run with stand-ins for Slurm's commands, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from asd_megatron.cli.main import main
from asd_megatron.cli.slurm_script import server_overrides
from asd_megatron.config import load_recipe

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
STAND_INS = {
    "srun": r"""printf '%s\0' "$@" > srun.arguments; env > srun.environment
mkdir -p "$RUN"; printf '%s\n' "$HISTORY" > "$RUN/history.jsonl"; exit "$STATUS" """,
    "scontrol": """case "$1 $2" in
"show hostnames") printf 'n%s\\n' 1 2 3 4;;
"show node") echo "NodeName=$3 Arch=x NodeAddr=10.0.0.${3#n} NodeHostName=$3";;
*) echo "$@" >> scontrol.calls;;
esac""",
    "squeue": "echo 2030-01-01T00:00:00",
    "sbatch": "cat > submitted; echo Submitted batch job 7",
}
PLAIN = ["examples/gpu/qwen3_math.yaml", "--python", "python3"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_what_their_command_prints(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text()
    command = re.search(r"^# Made by: asd-megatron (.*)$", text, re.MULTILINE)
    assert command is not None
    assert main(shlex.split(command[1])) == 0
    assert capsys.readouterr().out == text


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", "--slurm", *arguments]) == 0
    return capsys.readouterr().out


def run_script(folder: Path, text: str, *, history: str = "{}", status: int = 0, run: str = "runs/r") -> list[str]:
    """Run a script in `folder` with the stand-ins; returns the arguments of srun."""
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]"}
    environment |= {"HISTORY": history, "STATUS": str(status), "RUN": run}
    done = subprocess.run(["bash"], input=text, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == status
    return (folder / "srun.arguments").read_text().split("\0")[:-1]


def test_every_value_reaches_the_rank_as_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nasty = """it's "$(touch broken)" `touch broken` \\ {prompt} $HOME; & *"""
    given = ["--run.name", "r", "--data.format", "raw", "--data.raw_prompt", nasty, f"--model.path={nasty}"]
    mounts = ["--container", "my image", "--container-mounts", "/a b:/c"]
    more = tmp_path / "a b.yaml"
    more.write_text("run: {steps: 7}")
    text = printed(capsys, PLAIN[0], "--nodes", "4", str(more), *PLAIN[1:], *mounts, *given)
    arguments = run_script(tmp_path, text)
    assert (
        "--container-image=my image" in arguments and f"--container-mounts={tmp_path}:{tmp_path},/a b:/c" in arguments
    )
    assert arguments[:2] == ["--nodes=4", "--ntasks=4"] and "--rdzv-endpoint=10.0.0.1:29500" in arguments
    program = arguments[arguments.index("asd_megatron.train") + 1 :]
    recipe = load_recipe(program[0], program[1:])
    assert recipe.run.steps == 7
    assert (recipe.data.raw_prompt, recipe.model.path, recipe.run.time_limit) == (nasty, nasty, "slurm")
    assert not (tmp_path / "broken").exists()
    environment = dict(line.split("=", 1) for line in (tmp_path / "srun.environment").read_text().splitlines())
    assert environment["SLURM_JOB_END_TIME"].isdigit() and "requeue 7" in environment["ASD_MEGATRON_COMMAND"]


@pytest.mark.parametrize(
    ("event", "cause", "learned", "status", "again"),
    [
        ("stop", "SIGUSR1", 12, 0, True),
        ("stop", "time_limit", 3, 0, True),
        ("stop", "time_limit", 0, 0, False),  # the next job would get no further
        ("stop", "stop_file", 3, 0, False),
        ("stop", "SIGTERM", 3, 0, False),
        ("end", "SIGUSR1", 3, 0, False),
        ("stop", "SIGUSR1", 3, 1, False),  # what failed is not repeated
    ],
)
def test_what_is_queued_again(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    event: str,
    cause: str,
    learned: int,
    status: int,
    again: bool,
) -> None:
    line = json.dumps({"event": event, "step": 12, "cause": cause, "learned": learned, "checkpoint": "c"})
    run_script(tmp_path, printed(capsys, *PLAIN, "--run.name", "r"), history=line, status=status)
    calls = tmp_path / "scontrol.calls"
    assert calls.exists() == again
    if again:
        assert calls.read_text() == "requeue 7\n"


def test_servers_are_dealt_to_nodes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "examples" / "slurm" / "server_over_two_nodes.sbatch").read_text()
    arguments = run_script(tmp_path, text)
    assert "--nodelist=n1,n2" in arguments
    assert json.loads(arguments[arguments.index("--rollout.server_hosts") + 1]) == ["n3+n4"]
    overrides, spans = server_overrides(gpus=4, tensor_parallel=2, server_nodes=2)
    assert spans == 1 and overrides[:4] == (
        *("--rollout.servers", "4"),
        *("--rollout.server_devices", '["0,1", "0,1", "2,3", "2,3"]'),
    )
    outside = [*SERVED, "--nodes", "2", "--rollout.server_hosts", "[n8, n9]", "--rollout.server_devices", "[]"]
    assert "--nnodes=2 --nproc-per-node=8" in printed(capsys, *outside, "--rollout.server_launcher", "ssh {host}")


def test_colocated_servers_are_on_every_node_of_the_trainer(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "slurm" / "four_nodes_colocated.sbatch").read_text()
    arguments = run_script(tmp_path, text, run="runs/paper/qwen3_30b_a3b/antisd")
    assert arguments[0] == "--nodes=4" and not any(word.startswith("--nodelist") for word in arguments)
    program = arguments[arguments.index("asd_megatron.train") + 1 :]
    rollout = load_recipe(program[0], program[1:]).rollout
    assert (rollout.server_hosts, rollout.servers) == (("n1", "n2", "n3", "n4"), 4)
    assert rollout.server_devices == ("0,1,2,3,4,5,6,7",) * 4 and rollout.placement == "colocated"


def test_a_supervised_recipe_on_one_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--sft", "examples/puzzle/warm_start.yaml", "--gpus-per-node", "0", "--python", "python3")
    arguments = run_script(tmp_path, text, run="runs/puzzle-warm-start")
    program = ["python3", "-m", "asd_megatron.cli.main", "sft", "examples/puzzle/warm_start.yaml"]
    assert arguments[-len(program) - 2 : -2] == program and "#SBATCH --gpus" not in text


def test_submitting(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\n{STAND_INS['sbatch']}\n".replace("submitted", f"{tmp_path}/s"))
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["launch", "--slurm", *PLAIN, "--submit"]) == 0
    assert "Submitted batch job 7" in capfd.readouterr().out
    assert main(["launch", "--slurm", *PLAIN]) == 0
    assert (tmp_path / "s").read_text() == capfd.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert main(["launch", "--slurm", *PLAIN, "--submit"]) == 2 and "login node" in capfd.readouterr().err


SERVED = ["examples/gpu/qwen3_math_sglang.yaml"]
SHARED = [f"examples/paper/{name}.yaml" for name in ("table5", "qwen3_30b_a3b", "qwen3_30b_a3b_four_nodes")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*PLAIN, "--optimizer.learning_rte", "1"], "learning_rte"),
        ([*PLAIN, "--nodes", "2", "--parallelism.data", "4"], "start 8, or set parallelism.data 8"),
        ([*PLAIN, "--parallelism.tensor", "16"], "needs 16 GPUs, and there are 8: raise --nodes"),
        ([*PLAIN, "--parallelism.expert", "3", "--parallelism.data", "2"], "expert 3 does not divide the 4 ranks"),
        ([*PLAIN, "--nodes", "3", "--gpus-per-node", "0", "--parallelism.data", "2"], "do not divide into 3 nodes"),
        ([*PLAIN, "--server-nodes", "1"], "set rollout.engine sglang"),
        ([*SERVED, "--nodes", "2"], "give --server-nodes"),
        ([*SERVED, "--parallelism.tensor", "8"], "needs 8 GPUs and rollout.server_devices 4"),
        ([*SERVED, "--server-nodes", "1", "--rollout.servers", "2"], "sets rollout.servers itself"),
        ([*SERVED, "--server-nodes", "1", "--rollout.server_tensor_parallel", "3"], "does not divide the 8 GPUs"),
        ([*SERVED, "--server-nodes", "3", "--rollout.server_tensor_parallel", "16"], "even number of --server-nodes"),
        ([*SERVED, "--server-nodes", "1", "--container", "i"], "asd-megatron serve"),
        ([*SHARED, "--nodes", "2", "--container", "i"], "asd-megatron serve"),
        ([*SHARED, "--nodes", "2", "--rollout.server_tensor_parallel", "16"], "at most 8"),
        (["examples/puzzle/quickstart.yaml", "--parallelism.tensor", "3"], "parallelism.tensor 3"),
        ([*PLAIN, "--time", "soon"], "--time 'soon'"),
        ([*PLAIN, "--partition", "a b"], "cannot be a line of #SBATCH"),
        ([*PLAIN, "--partition", "a\n#SBATCH --uid=0"], "control characters"),
        ([*PLAIN, "--model.path", "a\nb"], "control characters"),
        ([*PLAIN, "--account", "it's"], "sbatch --NAME=VALUE SCRIPT"),
        ([*PLAIN, "--sbatch=--comment=a#b"], "sbatch --NAME=VALUE SCRIPT"),
        ([*PLAIN, "--sbatch=--"], "write a value after the equals sign"),
        ([*PLAIN, "--sbatch=--nodes=7"], "give --nodes and --server-nodes"),
        ([*PLAIN, "--checkpoint.resume", "never"], "checkpoint.resume never"),
    ],
)
def test_what_cannot_run_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--slurm", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""
