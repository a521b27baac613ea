"""The sbatch script of a run: pure text from a `Job`. `examples/slurm` holds its output for some commands."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass

from asd_megatron.errors import UserError

SIGNAL_SECONDS = 300  # before the end of the job
RENDEZVOUS_PORT = 29500
JOIN_SECONDS = 900  # for all nodes to start torchrun; a container may be unpacked first
READ_SECONDS = 300  # for the first node's torchrun to answer the others
SBATCH_LINE = re.compile(r"""--[a-z][a-z-]*(=[^\s"'\\#]+)?""")  # sbatch reads quotes, \ and # itself
REPEATABLE = ("SIGUSR1", "time_limit")
"""Causes of a stop after which the job is queued again; an operator's RUN/stop and scancel are meant to end it."""


@dataclass(frozen=True)
class Job:
    """A Slurm job that trains.

    module, recipes, overrides: what each rank runs. trainer_nodes x ranks_per_node ranks; one node is left to
    `asd-megatron train` (`verb`), which places ranks and servers on its GPUs. server_nodes: nodes of the same job for
    SGLang servers, `hosts_per_server` for each; colocated: the servers are on all of the trainer's nodes. gpus: of
    every node, 0 for a job without. options: lines `#SBATCH --NAME=VALUE` of the site, in order. interface: of the
    cluster's network, None: NCCL's and gloo's own choice.
    """

    command: str
    verb: str
    module: str
    recipes: tuple[str, ...]
    overrides: tuple[str, ...]
    run_folder: str
    run_name: str
    python: str
    trainer_nodes: int
    ranks_per_node: int
    gpus: int
    server_nodes: int = 0
    hosts_per_server: int = 1
    colocated: bool = False
    options: tuple[str, ...] = ()
    interface: str | None = None
    container: str | None = None
    container_mounts: str | None = None


def script(job: Job) -> str:
    """The script. Raises UserError for a value that `#SBATCH` or the comment with the command cannot hold."""
    if not job.command.isprintable():
        raise UserError(f"{job.command!r} has control characters: put such a value into the recipe")
    parts = [_header(job), _environment(job), _hosts(job), _training(job), _ending(job)]
    return "\n".join(part for part in parts if part)


def _header(job: Job) -> str:
    gpus = [f"--gpus-per-node={job.gpus}"] if job.gpus else []
    lines = [
        f"--job-name={job.run_name}",
        f"--nodes={_nodes(job)}",
        "--ntasks-per-node=1",
        *gpus,
        "--output=%x-%j.out",
        "--open-mode=append",  # a job that is queued again continues its log
        "--requeue",
        f"--signal=USR1@{SIGNAL_SECONDS}",  # without B: to the processes of the steps, the ranks among them
        *job.options,  # the last of several counts
    ]
    for line in lines:
        if not line.isprintable() or SBATCH_LINE.fullmatch(line) is None:
            raise UserError(
                f"{line!r} cannot be a line of #SBATCH: write --NAME or --NAME=VALUE, without spaces, control"
                " characters, quotes, backslashes or #, or give the option to sbatch itself:"
                " sbatch --NAME=VALUE SCRIPT"
            )
    text = "".join(f"#SBATCH {line}\n" for line in lines)
    return f"#!/bin/bash\n# Made by: {job.command}\n{text}"


def _environment(job: Job) -> str:
    if job.interface is None:
        network = "# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0  # if a node has several networks\n"
    else:
        name = shlex.quote(job.interface)
        network = f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}\n"
    torchrun = (
        "# torchrun leaves SIGTERM to the ranks, which save their state (older and newer torch).\n"
        "export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGINT,SIGQUIT PET_SIGNALS_TO_HANDLE=SIGINT,SIGQUIT\n"
    )
    return (
        "set -euo pipefail\n"
        f"run_folder={shlex.quote(job.run_folder)}\n"
        f"{network}"
        "# export NCCL_IB_HCA=mlx5 NCCL_DEBUG=WARN\n"
        'export ASD_MEGATRON_COMMAND="scontrol requeue $SLURM_JOB_ID"  # what the closing line says continues the run\n'
        f"{torchrun if _nodes(job) > 1 else ''}"
        "# Older releases of Slurm do not set it; `run.time_limit slurm` reads it.\n"
        'if [ -z "${SLURM_JOB_END_TIME:-}" ]; then\n'
        '  SLURM_JOB_END_TIME=$(date --date="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s) || true\n'
        "  export SLURM_JOB_END_TIME\n"
        "fi\n"
    )


def _hosts(job: Job) -> str:
    """What the script has to know of the job's nodes; empty on a single one."""
    if _nodes(job) == 1:
        return ""
    text = (
        'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")\n'
        "# The address of the first one, where the ranks meet: on some clusters names do not resolve.\n"
        "head=$(scontrol show node \"${hosts[0]}\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')\n"
    )
    if job.server_nodes:
        text += f'trainers=$(IFS=,; echo "${{hosts[*]:0:{job.trainer_nodes}}}")\n'
    if job.server_nodes or job.colocated:
        n = 0 if job.colocated else job.trainer_nodes
        entry = "${hosts[i]}" if job.hosts_per_server == 1 else "${hosts[i]}+${hosts[i + 1]}"
        text += (
            "server_hosts=\n"
            f"for ((i = {n}; i < ${{#hosts[@]}}; i += {job.hosts_per_server})); do\n"
            f'  server_hosts+="${{server_hosts:+, }}\\"{entry}\\""\n'
            "done\n"
        )
    return text


def _training(job: Job) -> str:
    """The step that trains, as an array, and its start."""
    srun = [f"--nodes={job.trainer_nodes}", f"--ntasks={job.trainer_nodes}", "--cpu-bind=none", "--kill-on-bad-exit=1"]
    lines = [shlex.join(["srun", *srun])]
    if job.server_nodes:
        lines.append('--nodelist="$trainers"')
    if job.container is not None:
        lines.append(shlex.join([f"--container-image={job.container}"]))
        mounts = "" if job.container_mounts is None else f",{shlex.quote(job.container_mounts)}"
        lines.append(f'--container-mounts="$PWD:$PWD"{mounts} --container-workdir="$PWD"')
    # Slurm signals every process of the step. torchrun ignores what it inherits as ignored; the ranks handle it.
    prepared = 'trap "" USR1 TERM'
    if _nodes(job) > 1:  # a node need not know itself by the address under which the others reach it
        limits = f"join_timeout={JOIN_SECONDS},read_timeout={READ_SECONDS}"
        prepared += f"; export PET_RDZV_CONF={limits},is_host=$((SLURM_NODEID == 0))"
    lines.append(f"""bash -c '{prepared}; exec "$@"' bash""")
    if _nodes(job) > 1:
        lines.append(shlex.join([job.python, "-m", "torch.distributed.run"]))
        lines.append(shlex.join([f"--nnodes={job.trainer_nodes}", f"--nproc-per-node={job.ranks_per_node}"]))
        lines.append(
            f'--rdzv-backend=c10d --rdzv-endpoint="$head:{RENDEZVOUS_PORT}"'
            ' --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"'
        )
        lines.append(shlex.join(["-m", job.module, *job.recipes]))
    else:
        lines.append(shlex.join([job.python, "-m", "asd_megatron.cli.main", job.verb, *job.recipes]))
    lines += [shlex.join(pair) for pair in zip(job.overrides[::2], job.overrides[1::2], strict=True)]
    if job.server_nodes or job.colocated:
        lines.append('--rollout.server_hosts "[$server_hosts]"')
    return "training=(\n" + "".join(f"  {line}\n" for line in lines) + ")\n"


def _ending(job: Job) -> str:
    """The job is queued again after a stop that leaves something to do, unless this start has learned nothing: the next
    one would not either."""
    causes = "|".join(REPEATABLE)
    return (
        "status=0\n"
        '"${training[@]}" || status=$?\n'
        "# Stopped before the end of the job, its state saved: continue in a job of the same id.\n"
        'if [ "$status" -eq 0 ] && tail -n 1 "$run_folder/history.jsonl" |\n'
        f'    grep -Eq \'"event": "stop".*"cause": "({causes})".*"learned": [1-9]\'; then\n'
        '  scontrol requeue "$SLURM_JOB_ID"\n'
        "fi\n"
        'exit "$status"\n'
    )


def server_overrides(gpus: int, tensor_parallel: int, server_nodes: int) -> tuple[tuple[str, ...], int]:
    """(overrides that fill `server_nodes` nodes of `gpus` GPUs with servers, nodes of one server). Server k runs on
    node k modulo their number. With 2 nodes of 4 GPUs and tensor parallelism 2:

        node 0: server 0 on "0,1", server 2 on "2,3"; node 1: server 1 on "0,1", server 3 on "2,3"

    Raises UserError for sizes that do not divide.
    """
    if tensor_parallel > gpus:
        if tensor_parallel != 2 * gpus or server_nodes % 2:
            raise UserError(
                f"rollout.server_tensor_parallel {tensor_parallel} on {server_nodes} server nodes of {gpus} GPUs: a"
                f" server takes GPUs of one node, or all of two: set it to at most {gpus}, or to {2 * gpus} with an"
                " even number of --server-nodes"
            )
        servers, spans, devices = server_nodes // 2, 2, [range(gpus)] * (server_nodes // 2)
    elif gpus % tensor_parallel:
        raise UserError(
            f"rollout.server_tensor_parallel {tensor_parallel} does not divide the {gpus} GPUs of a server node"
        )
    else:
        servers, spans = server_nodes * gpus // tensor_parallel, 1
        starts = [k // server_nodes * tensor_parallel for k in range(servers)]
        devices = [range(start, start + tensor_parallel) for start in starts]
    names = json.dumps([",".join(map(str, numbers)) for numbers in devices])
    launcher = f"srun --overlap --nodes=1 --ntasks=1 --gpus-per-node={gpus} --cpu-bind=none --nodelist={{host}}"
    return (
        *("--rollout.servers", str(servers), "--rollout.server_devices", names),
        *("--rollout.server_launcher", launcher),
    ), spans


def _nodes(job: Job) -> int:
    return job.trainer_nodes + job.server_nodes
